"""Learning algorithms, one file each."""

from .adaptation import Inner
from .belief import BeliefConfig, BeliefLearner
from .first_order import ReptileStep
from .maml import MAML, MAMLConfig
from .meta import GradientStep, MetaTraining
from .outer import PPOStep, ReinforceStep, TRPOStep
from .ppo import PPO, PPOConfig
from .reinforce import Reinforce, ReinforceConfig
from .rl2 import RL2, RL2Config
from .supervised import SupervisedMAML
from .trpo import TRPO, TRPOConfig

__all__ = [
    "MAML",
    "PPO",
    "RL2",
    "TRPO",
    "BeliefConfig",
    "BeliefLearner",
    "GradientStep",
    "Inner",
    "MAMLConfig",
    "MetaTraining",
    "PPOConfig",
    "PPOStep",
    "RL2Config",
    "Reinforce",
    "ReinforceConfig",
    "ReinforceStep",
    "ReptileStep",
    "SupervisedMAML",
    "TRPOConfig",
    "TRPOStep",
]
