"""Meta-reinforcement learning for e-commerce: task families with exact oracles, and the learners that adapt to them."""

__version__ = "0.1.0"
