"""Task families: Markov decision processes with hidden parameters, one task per batch row, and an oracle for every
task."""

from .base import TaskFamily, sample_tasks, split, take
from .pricing import GaussianPrior, LogitPricing, LogUniformPrior, Market
from .tabular import ShopMDP, TabularTasks

__all__ = [
    "GaussianPrior",
    "LogUniformPrior",
    "LogitPricing",
    "Market",
    "ShopMDP",
    "TabularTasks",
    "TaskFamily",
    "sample_tasks",
    "split",
    "take",
]
