"""Thompson sampling for tasks that drift: evidence fades from round to round (chapter "What meta-RL buys")."""

from __future__ import annotations

from typing import Any

from ..families.base import check, number
from .bayes import ParticlePrior, Thompson


class ForgettingThompson(Thompson):
    """Thompson sampling that keeps only the power ``memory`` of what an episode's likelihood said, once it is over.

    1 never forgets; 0 begins every episode at the prior. A likelihood to a power is the discounting of West and
    Harrison (1997) for a parameter whose law of motion nobody has written down.
    """

    def __init__(
        self,
        family: Any,
        particles: int | None = None,
        stores: bool = False,
        prior: ParticlePrior | None = None,
        memory: float = 0.5,
    ):
        super().__init__(family, particles, stores, prior)
        self.memory = memory
        check(self, "memory", lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")

    def end_episode(self) -> None:
        """The evidence fades."""
        self.belief.fade(self.memory)
