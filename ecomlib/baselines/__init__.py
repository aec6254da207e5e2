"""Classical adaptive policies under the same trial protocol as the learners."""

from .bayes import BayesUCB, Belief, GreedyBayes, ParticlePrior, Random, Thompson, belief, empirical_prior
from .pricing import EpsilonGreedy, FixedMarkup, PricingBelief
from .recommendation import RecommendationBelief

__all__ = [
    "BayesUCB",
    "Belief",
    "EpsilonGreedy",
    "FixedMarkup",
    "GreedyBayes",
    "ParticlePrior",
    "PricingBelief",
    "Random",
    "RecommendationBelief",
    "Thompson",
    "belief",
    "empirical_prior",
]
