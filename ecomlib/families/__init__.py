"""Task families: Markov decision processes with hidden parameters, one task per batch row, and an oracle for every
task."""

from .base import TaskFamily, sample_tasks, split, take
from .bidding import SegmentBidding
from .inventory import CensoredInventory
from .navigation import Goals, PointNavigation
from .pricing import GaussianPrior, LogitPricing, LogUniformPrior, Market
from .recommendation import SlateRecommendation
from .tabular import ShopMDP, TabularTasks

__all__ = [
    "CensoredInventory",
    "GaussianPrior",
    "Goals",
    "LogUniformPrior",
    "LogitPricing",
    "Market",
    "PointNavigation",
    "SegmentBidding",
    "ShopMDP",
    "SlateRecommendation",
    "TabularTasks",
    "TaskFamily",
    "sample_tasks",
    "split",
    "take",
]
