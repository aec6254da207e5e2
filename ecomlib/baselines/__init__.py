"""Classical adaptive policies under the same trial protocol as the learners."""

from .bayes import BayesUCB, Belief, GreedyBayes, ParticlePrior, Random, Thompson, belief, empirical_prior
from .bidding import SegmentBelief
from .forgetting import ForgettingThompson
from .inventory import DemandBelief
from .pricing import EpsilonGreedy, FixedMarkup, PricingBelief
from .recommendation import RecommendationBelief

__all__ = [
    "BayesUCB",
    "Belief",
    "DemandBelief",
    "EpsilonGreedy",
    "FixedMarkup",
    "ForgettingThompson",
    "GreedyBayes",
    "ParticlePrior",
    "PricingBelief",
    "Random",
    "RecommendationBelief",
    "SegmentBelief",
    "Thompson",
    "belief",
    "empirical_prior",
]
