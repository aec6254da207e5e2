"""Pictures of the case studies: a kind of method has the same colour and marker in every chapter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from . import plotting
from .evaluation.case_studies import CaseStudy

KIND_LOOKS = {"reference": "blind", "classical": "greedy", "no meta": "epsilon", "meta": "reinforce"}
"""Kind of a method -> who lends it colour and marker in ``plotting.LOOKS``."""
LINES = ("-", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
"""Dash patterns of the methods of one kind, in the order they are drawn."""
MARKERS = {
    "reference": ("x", "+", "1", "2"),
    "classical": ("s", "o", "P", "h"),
    "no meta": ("^", "<", ">", "v"),
    "meta": ("D", "*", "p", "X"),
}


def plot_rounds(
    ax: Axes, case: CaseStudy, methods: Sequence[str], split: str = "test", units: int = 5, ends: bool = True
) -> None:
    """Score of each round, 1, ..., E, with 95 % intervals, in the order of ``methods`` (at most four of a kind).

    ``ends`` names the lines; leave it out and call ``plotting.label_ends`` where more is drawn.
    """
    table, drawn = case.by_round(split, units, methods), {}
    for method in methods:
        own = table[table.method == method]
        kind = own.kind.iloc[0]
        number = drawn[kind] = drawn.get(kind, -1) + 1
        if number >= len(LINES):
            raise ValueError(f"methods holds more than {len(LINES)} of kind {kind!r}: draw them in two pictures")
        style = {"linestyle": LINES[number], "marker": MARKERS[kind][number]}
        bounds = {} if own.low.isna().any() else {"low": own.low, "high": own.high}
        plotting.curve(ax, own["round"], own.score, who=KIND_LOOKS[kind], name=method, **bounds, **style)
    plotting.score_axes(ax, "round")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ends:
        plotting.label_ends(ax)


def plot_lifetime(
    ax: Axes, case: CaseStudy, split: str = "test", units: int = 5, methods: Sequence[str] | None = None
) -> None:
    """Lifetime scores with 95 % intervals, one row a method, best on top; random choice is left out unless named."""
    table = case.lifetime(split, units, methods)
    if methods is None:
        table = table[table.kind != "reference"]
    table = table.sort_values("score", ignore_index=True)
    _rows(ax, table.method, table.kind, table.score, table.low, table.high)
    for who, level in (("blind", 0.0), ("oracle", 1.0)):
        look = plotting.LOOKS[who]
        ax.axvline(level, color=look.colour, linestyle=look.line, linewidth=1.2, zorder=1.5)
        ax.annotate(look.name, (level, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                    color=plotting.text_colour(look.colour), fontsize=9)  # fmt: skip
    ax.set_xlabel("lifetime score")


def plot_differences(ax: Axes, case: CaseStudy, split: str = "test", units: int = 5, of: str = "lifetime") -> None:
    """Trained methods less the best classical policy, with the wider 95 % interval, best on top."""
    table = case.difference(split, units, of).sort_values("difference", ignore_index=True)
    _rows(ax, table.method, table.kind, table.difference, table.low, table.high)
    look = plotting.LOOKS["blind"]
    ax.axvline(0, color=look.colour, linestyle=look.line, linewidth=1.2, zorder=1.5)
    ax.set_xlabel(f"{of} score less that of {table.against.iloc[0]}")


def _rows(ax: Axes, names: Sequence[str], kinds: Sequence[str], *columns: Sequence[float]) -> None:
    score, low, high = (np.asarray(c, dtype=float) for c in columns)
    for row, kind in enumerate(kinds):
        look = plotting.LOOKS[KIND_LOOKS[kind]]
        bars = [[max(0.0, score[row] - low[row])], [max(0.0, high[row] - score[row])]]
        ax.errorbar(score[row], row, xerr=None if np.isnan(bars).any() else bars, color=look.colour,
                    marker=MARKERS[kind][0], capsize=3)  # fmt: skip
    ax.set_yticks(range(len(score)), list(names))
    for label, kind in zip(ax.get_yticklabels(), kinds):
        label.set_color(plotting.text_colour(plotting.LOOKS[KIND_LOOKS[kind]].colour))
    ax.set_ylim(-0.6, len(score) - 0.4)
    ax.grid(False, axis="y")
