"""Page's cumulative sum test (1954) on shares, with exact run lengths (chapter "Language applications")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..families.base import check, number, require, whole


class Source(NamedTuple):
    """Headlines of one kind that a day brings, and what becomes of each of them."""

    headlines: int
    """How many a day."""
    negative: float
    """Chance that one is counted, and as negative."""
    counted: float
    """Chance that one is counted at all."""


@dataclass(frozen=True)
class Cusum:
    """Raises an alarm when the log-likelihood ratio of "the share of negatives has risen" to "it has not", maximised
    over the day of the change, is too large: equations (eq-cusum) and (eq-cusum-reference).

    The statistic is kept in units of one negative headline, S <- max(0, S + negatives - reference x headlines), and
    the reference is rounded to a multiple of 1 / ``grid``, so that S takes few values and run lengths are exact.
    """

    quiet: float
    """Share of negatives while all is well."""
    alarming: float
    """Share that is to be detected, above ``quiet``."""
    threshold: float = 5.0
    """Alarm where S >= threshold, a multiple of 1 / grid, in negative headlines."""
    grid: int = 20
    """Steps of S in one headline."""

    def __post_init__(self):
        check(self, "quiet", lambda x: number(x, 0, 1), "a number in (0, 1)")
        check(self, "alarming", lambda x: number(x, self.quiet, 1), f"a number in (quiet = {self.quiet}, 1)")
        check(self, "grid", lambda x: whole(x, 1, 1000), "a whole number in 1..1000")
        on_grid = lambda x: number(x, 0) and self.grid * x <= 5000 and abs(self.grid * x - round(self.grid * x)) < 1e-6
        check(self, "threshold", on_grid, "a multiple of 1 / grid above 0, at most 5000 / grid")
        rounded = f"two shares further apart, or a finer grid than {self.grid}"
        require(0 < self._step < self.grid, "Cusum.alarming", self.alarming, rounded)

    @property
    def _step(self) -> int:
        return round(self.grid * reference(self.quiet, self.alarming))

    @property
    def levels(self) -> int:
        """Values of S below the threshold."""
        return round(self.grid * self.threshold)

    def path(self, negatives: ArrayLike, headlines: ArrayLike) -> NDArray[np.float64]:
        """(..., days) the statistic S after each day, from counts (..., days). It is not reset at an alarm."""
        negatives, headlines = np.broadcast_arrays(np.asarray(negatives), np.asarray(headlines))
        bad = (negatives < 0) | (negatives > headlines)
        require(not bad.any(), "negatives", negatives[bad][:1], "from 0 to the day's headlines")
        increment = self.grid * negatives - self._step * headlines  # whole numbers: no rounding at the threshold
        value, path = np.zeros(increment.shape[:-1], np.int64), np.empty(increment.shape, np.int64)
        for day in range(increment.shape[-1]):
            value = np.maximum(0, value + increment[..., day])
            path[..., day] = value
        return path / self.grid

    def alarm(self, negatives: ArrayLike, headlines: ArrayLike) -> NDArray[np.int64]:
        """(...,) first day, from 0, on which S reaches the threshold; the number of days where it never does."""
        reached = self.path(negatives, headlines) >= self.threshold - 1e-9
        return np.where(reached.any(-1), reached.argmax(-1), reached.shape[-1])

    def transition(self, day: Sequence[Source]) -> NDArray[np.float64]:
        """(levels, levels) probabilities from S of one day to S of the next without an alarm; a row lacks the chance of
        an alarm. The headlines of a day are independent, those of a ``Source`` alike (Brook and Evans 1972)."""
        law, lowest = _increments(self._step, self.grid, tuple(day))
        size, up_to = self.levels, np.concatenate(([0.0], law.cumsum()))
        place = np.arange(size)[None, :] - np.arange(size)[:, None] - lowest  # of the increment that leads there
        matrix = np.where((place >= 0) & (place < len(law)), law[place.clip(0, len(law) - 1)], 0.0)
        matrix[:, 0] = up_to[(place[:, 0] + 1).clip(0, len(law))]  # whatever falls to zero or below
        return matrix

    def run_length(self, day: Sequence[Source]) -> float:
        """Expected days to the alarm from S = 0, if every day is like ``day``: equation (eq-run-length). On quiet days
        it is the mean time between false alarms."""
        return float(self._remaining(day)[0])

    def delay(self, quiet: Sequence[Source], after: Sequence[Source], quiet_days: int = 0) -> float:
        """Expected days to the alarm from the change on, the first bad day counted, given none in the ``quiet_days``
        before."""
        return float(self._state(quiet, quiet_days) @ self._remaining(after))

    def found_within(self, days: int, quiet: Sequence[Source], after: Sequence[Source], quiet_days: int = 0) -> float:
        """Chance of an alarm on one of the ``days`` from the change on, given none in the ``quiet_days`` before."""
        require(whole(days, 0, 10**5), "days", days, "a whole number in 0..100,000")
        state, matrix = self._state(quiet, quiet_days), self.transition(after)
        for _ in range(days):
            state = state @ matrix
        return 1 - float(state.sum())

    def _state(self, quiet: Sequence[Source], days: int) -> NDArray[np.float64]:
        """(levels,) law of S after quiet days without an alarm."""
        require(whole(days, 0, 10**5), "quiet_days", days, "a whole number in 0..100,000")
        state, matrix = np.eye(self.levels)[0], self.transition(quiet) if days else None
        for _ in range(days):
            state = state @ matrix
            state /= state.sum()
        return state

    def _remaining(self, day: Sequence[Source]) -> NDArray[np.float64]:
        matrix = self.transition(day)
        return np.linalg.solve(np.eye(len(matrix)) - matrix, np.ones(len(matrix)))


@lru_cache(maxsize=16)
def _increments(step: int, grid: int, day: tuple[Source, ...]) -> tuple[NDArray[np.float64], int]:
    """Probabilities of a day's increment in steps of 1 / grid, and the lowest increment."""
    law, lowest = np.ones(1), 0
    for count, negative, counted in day:
        fine = 0 <= negative <= counted + 1e-12 and counted <= 1 + 1e-12
        require(fine, "Source.negative", negative, f"from 0 to counted = {counted}, itself in 0..1")
        one = np.zeros(grid + 1)  # increments -step (not negative), 0 (not counted), grid - step (negative)
        one[0], one[grid] = max(0.0, counted - negative), negative
        one[step] += max(0.0, 1 - counted)
        for _ in range(count):
            law = np.convolve(law, one)
        lowest -= count * step
    return law, lowest


def reference(quiet: float, alarming: float) -> float:
    """Share of negatives at which a headline is no evidence either way, equation (eq-cusum-reference)."""
    loss = math.log((1 - quiet) / (1 - alarming))
    return loss / (math.log(alarming / quiet) + loss)


def calibrated(quiet: float, alarming: float, day: Sequence[Source], days: float = 200.0, grid: int = 20) -> Cusum:
    """The test with the lowest threshold whose mean time between false alarms on days like ``day`` is ``days`` or more.

    Raises ValueError where no threshold of up to 2,000 steps does, as where ``day`` has more negatives than
    ``alarming``.
    """
    require(number(days, 1), "days", days, "a finite number > 1")
    test = Cusum(quiet, alarming, 1 / grid, grid)
    at = lambda level: replace(test, threshold=level / grid)
    high = 1
    while at(high).run_length(day) < days:
        high *= 2
        require(high <= 2000, "days", days, "a time that a threshold of 2,000 steps reaches: is `day` quiet?")
    low = high // 2
    while high - low > 1:  # the run length grows with the threshold
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).run_length(day) >= days else (middle, high)
    return at(high)


def kl_bernoulli(p: float, q: float) -> float:
    """Kullback-Leibler divergence of a share q from a share p, in nats: p log(p / q) + (1 - p) log((1 - p) / (1 -
    q))."""
    term = lambda a, b: 0.0 if a == 0 else a * math.log(a / b)
    return term(p, q) + term(1 - p, 1 - q)
