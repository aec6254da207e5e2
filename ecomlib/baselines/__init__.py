"""Classical adaptive policies under the same trial protocol as the learners."""

from .pricing import EpsilonGreedy, FixedMarkup, GreedyBayes, ParticlePosterior, Thompson

__all__ = ["EpsilonGreedy", "FixedMarkup", "GreedyBayes", "ParticlePosterior", "Thompson"]
