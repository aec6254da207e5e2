"""Task families: Markov decision processes with hidden parameters, one task per batch row, and an oracle for every
task."""

from .base import TaskFamily, sample_tasks, split, take
from .navigation import Goals, PointNavigation
from .pricing import GaussianPrior, LogitPricing, LogUniformPrior, Market
from .tabular import ShopMDP, TabularTasks

__all__ = [
    "GaussianPrior",
    "Goals",
    "LogUniformPrior",
    "LogitPricing",
    "Market",
    "PointNavigation",
    "ShopMDP",
    "TabularTasks",
    "TaskFamily",
    "sample_tasks",
    "split",
    "take",
]
