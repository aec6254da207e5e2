"""One look for every picture: a decision maker has the same colour, line and marker on every page of the book.

The colours are those of Okabe and Ito (2008), some darkened until they stand out from white (contrast of at
least 3 to 1) and stay apart for readers who see no difference between red and green. Colour is never the only
cue: each decision maker has its own marker and dash pattern too, and lines are named at their ends. Figures have
a white face, so they stay readable on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression


class Look(NamedTuple):
    """How one decision maker, or data or model, is drawn."""

    name: str
    """The name printed at the end of its line."""
    colour: str
    """Hexadecimal sRGB colour."""
    line: str | tuple[int, tuple[float, ...]]
    """Matplotlib dash pattern."""
    marker: str
    """Matplotlib marker; empty for a plain line."""


LOOKS = {
    "oracle": Look("oracle", "#000000", (0, (6, 3)), ""),
    "blind": Look("blind", "#767676", (0, (2, 2)), ""),
    "greedy": Look("greedy Bayes", "#bb5300", "-", "s"),
    "thompson": Look("Thompson", "#006b4e", (0, (5, 1)), "o"),
    "epsilon": Look("epsilon-greedy", "#c18600", (0, (3, 1, 1, 1)), "^"),
    "reinforce": Look("REINFORCE", "#0072b2", (0, (1, 1)), "D"),
    "data": Look("data", "#404040", "none", "."),
    "model": Look("model", "#cc79a7", "-", ""),
}
"""Every ``who`` that :func:`curve` knows."""

COLOURS = {who: look.colour for who, look in LOOKS.items()}
"""Colour of each ``who``, for bars, histograms and areas."""

INK = "#1a1a1a"
"""Colour of text and axes."""


def use_style() -> None:
    """Set the house style for every figure that follows. Call it once, in the first cell of a notebook.

    It starts from Matplotlib's defaults, whatever the reader's own settings file says, and uses the font that
    ships with Matplotlib, so that pictures are the same on every machine.
    """
    mpl.rcdefaults()
    cycle = [LOOKS[who] for who in ("reinforce", "greedy", "thompson", "epsilon", "model")]
    sns.set_theme(
        style="ticks",
        font="DejaVu Sans",
        rc={
            "axes.axisbelow": True,
            "axes.edgecolor": INK,
            "axes.formatter.useoffset": False,
            "axes.grid": True,
            "axes.labelcolor": INK,
            "axes.labelsize": 10,
            "axes.linewidth": 0.8,
            "axes.prop_cycle": cycler(color=[look.colour for look in cycle], linestyle=[look.line for look in cycle]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
            "axes.xmargin": 0.02,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.figsize": (6.4, 3.4),
            "figure.titlesize": 11,
            "font.size": 10,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.6,
            "image.cmap": "cividis",
            "legend.fontsize": 9,
            "legend.frameon": False,
            "legend.title_fontsize": 9,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "savefig.dpi": 110,
            "savefig.facecolor": "white",
            "svg.hashsalt": "ecomlib",
            "text.color": INK,
            "xtick.color": INK,
            "xtick.labelsize": 9,
            "ytick.color": INK,
            "ytick.labelsize": 9,
        },
    )


def curve(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    who: str = "model",
    name: str | None = None,
    **line: object,
) -> Line2D:
    """Draw one line, with a band between ``low`` and ``high``, in the look of ``who``.

    Call :func:`label_ends` when all lines are there.

    ====== ========= ===========================================================
    Symbol Shape     Description
    ====== ========= ===========================================================
    x, y   (points,) the line
    low    (points,) lower ends of the intervals; give both ends or neither
    high   (points,) upper ends
    who    text      a key of :data:`LOOKS`
    name   text      printed instead of the usual name; ``""`` for a nameless line
    ====== ========= ===========================================================

    Further keywords go to ``ax.plot``. On a line of more than 20 points only some are marked; of data, all are.

    Raises:
        ValueError: ``who`` is unknown, the shapes differ, or only one end of the band is given.
    """
    look = _look(who)
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must have one axis of the same length, got shapes {x.shape} and {y.shape}")
    if (low is None) != (high is None):
        raise ValueError("low and high must be given together")
    if low is not None:
        low, high = np.asarray(low), np.asarray(high)
        if low.shape != x.shape or high.shape != x.shape:
            raise ValueError(f"low and high must have the shape of x, {x.shape}, got {low.shape} and {high.shape}")
        ax.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)
    label = look.name if name is None else name
    looks = {
        "color": look.colour,
        "linestyle": look.line,
        "marker": look.marker,
        "markevery": max(1, len(x) // 10) if len(x) > 20 and look.line != "none" else 1,
        "label": label or "_nameless",
    }
    return ax.plot(x, y, **(looks | line))[0]


def score_axes(ax: Axes, xlabel: str | None = None) -> None:
    """Make ``ax`` a picture of scores, with dashed lines at 0 (blind) and 1 (oracle).

    :func:`label_ends` names the two lines.
    """
    for who, level in (("blind", 0.0), ("oracle", 1.0)):
        look = LOOKS[who]
        ax.axhline(level, color=look.colour, linestyle=look.line, linewidth=1.2, label=look.name, zorder=1.5)
    ax.set_ylabel("score")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2.5, 5, 10]))
    if xlabel is not None:
        ax.set_xlabel(xlabel)


def label_ends(ax: Axes) -> list[Annotation]:
    """Write the name of every line of ``ax`` to the right of its end, in the line's colour.

    Names that would touch are moved apart. It takes the place of a legend. Call it last, when the limits of the
    axes are final. Lines without a name (a label that starts with ``_``) are passed over.
    """
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    if not lines:
        return []
    ax.figure.draw_without_rendering()  # settles limits and layout, so that the height is known
    size = mpl.rcParams["legend.fontsize"]
    gap = 1.3 * size / 72 * ax.figure.dpi / ax.get_window_extent().height
    heights = np.array([_end_height(ax, line) for line in lines])
    order = np.argsort(heights, kind="stable")
    places = _spread(heights[order], gap)
    return [
        ax.annotate(
            lines[i].get_label(),
            xy=(1.0, place),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=text_colour(lines[i].get_color()),
            fontsize=size,
            annotation_clip=False,
        )
        for i, place in zip(order, places, strict=True)
    ]


def text_colour(colour: str) -> str:
    """``colour``, darkened until small text in it can be read on white (WCAG 2: a contrast of 4.5 to 1)."""
    rgb = np.array(to_rgb(colour))
    while _contrast_on_white(rgb) < 4.5:
        rgb = 0.97 * rgb
    return mpl.colors.to_hex(rgb)


def _look(who: str) -> Look:
    if who not in LOOKS:
        raise ValueError(f"who must be one of {sorted(LOOKS)}, got {who!r}")
    return LOOKS[who]


def _end_height(ax: Axes, line: Line2D) -> float:
    """Height of a line's last finite point as a fraction of the axes, kept inside them."""
    heights = np.asarray(line.get_ydata(), dtype=float)
    finite = heights[np.isfinite(heights)]
    if len(finite) == 0:
        return 0.0
    _, height = ax.transAxes.inverted().transform(ax.transData.transform((ax.get_xlim()[1], finite[-1])))
    return float(np.clip(height, 0.0, 1.0))


def _spread(heights: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:
    """Ascending ``heights``, moved as little as possible (in squares) until they are ``gap`` apart."""
    steps = gap * np.arange(len(heights))
    return isotonic_regression(np.asarray(heights) - steps).x + steps


def _contrast_on_white(rgb: np.ndarray) -> float:
    """Contrast ratio of WCAG 2: (1 + 0.05) / (luminance + 0.05), luminance from linearised sRGB."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return 1.05 / (float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
