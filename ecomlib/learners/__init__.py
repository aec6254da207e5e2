"""Learning algorithms, one file each."""

from .adaptation import Inner
from .first_order import ReptileStep
from .maml import MAML, MAMLConfig
from .meta import GradientStep, MetaTraining
from .outer import PPOStep, ReinforceStep, TRPOStep
from .ppo import PPO, PPOConfig
from .reinforce import Reinforce, ReinforceConfig
from .supervised import SupervisedMAML
from .trpo import TRPO, TRPOConfig

__all__ = [
    "MAML",
    "PPO",
    "TRPO",
    "GradientStep",
    "Inner",
    "MAMLConfig",
    "MetaTraining",
    "PPOConfig",
    "PPOStep",
    "Reinforce",
    "ReinforceConfig",
    "ReinforceStep",
    "ReptileStep",
    "SupervisedMAML",
    "TRPOConfig",
    "TRPOStep",
]
