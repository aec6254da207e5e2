"""Has the market changed since the tasks were adapted to? A test on what they earned (chapter "Shipping a policy")."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ..families.base import number, require


class Drift(NamedTuple):
    """What the test found."""

    tasks: int
    """Pairs that it rests on."""
    change: float
    """Median of (recent - reference) / (recent + reference) over tasks; 0.05 is about 10 % more."""
    p_value: float
    """Two-sided."""
    alarm: bool
    """Whether ``p_value`` is at most the level."""


def drift_test(reference: ArrayLike, recent: ArrayLike, level: float = 0.01) -> Drift:
    """Wilcoxon's signed-rank test (1945) of two episodes of each task: equation (eq-signed-rank).

    ``reference`` and ``recent`` (tasks,) are profits >= 0 of two episodes of the same tasks under the same parameters.
    Each task is its own control, since turnovers differ a hundredfold between products and by far less within one; and
    differences are divided by sums, so that small products count like large ones. Without drift the two episodes are
    exchangeable, hence the differences symmetric about 0, and one look gives a false alarm with probability at most
    ``level``, whatever the products are. Looking every day gives more of them: divide the level by the number of looks
    that one false alarm may cost.

    Raises:
        ValueError: the lengths differ, no task is there, a profit is negative or not finite, or ``level`` is not in
            (0, 1).
    """
    a, b = np.asarray(reference, dtype=float), np.asarray(recent, dtype=float)
    require(
        a.ndim == 1 and a.shape == b.shape and len(a) > 0, "recent", b.shape, f"as many tasks as in {a.shape}, >= 1"
    )
    for name, values in (("reference", a), ("recent", b)):
        bad = values[~(np.isfinite(values) & (values >= 0))]
        require(len(bad) == 0, name, bad[0].item() if len(bad) else None, "finite profits >= 0")
    require(number(level, 0, 1), "level", level, "a number in (0, 1)")
    change = (b - a) / np.where(a + b > 0, a + b, 1.0)
    moved = change[change != 0]
    # Equal profits say nothing about the sign; without them the test is exact for the others.
    p_value = float(stats.wilcoxon(moved).pvalue) if len(moved) else 1.0
    return Drift(len(a), float(np.median(change)), p_value, p_value <= level)
