"""Pictures that commands write, in the look of the book's (``plotting``)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import plotting
from .evaluation.statistics import Interval
from .files import write_atomically
from .run_results import Evaluation

NAMES = {
    "ppo-maml": "PPO-MAML",
    "rl-maml": "RL-MAML",
    "trpo-maml": "TRPO-MAML",
    "reptile": "Reptile",
    "fomaml": "FOMAML",
    "anil": "ANIL",
    "meta-sgd": "Meta-SGD",
    "recurrent-ppo": "recurrent PPO",
    "rl2": "RL2",
    "belief": "belief learner",
}
"""An algorithm of the command line, as it is written."""
BASELINES = {"greedy Bayes": "greedy", "Thompson": "thompson"}
"""A baseline -> who it is in ``plotting.LOOKS``."""


@contextmanager
def picture(*files: Path, **figure: object) -> Iterator[Figure]:
    """A figure in the house style, without a display; written to ``files`` (.svg, .png) atomically at the end."""
    with mpl.rc_context():
        plotting.use_style()
        drawn = Figure(**figure)
        yield drawn
        for file in files:
            buffer = io.BytesIO()
            drawn.savefig(buffer, format=file.suffix[1:], metadata={"Date": None} if file.suffix == ".svg" else None)
            write_atomically(file, buffer.getvalue())


def evaluation_picture(found: Evaluation) -> list[Path]:
    """Score against inner steps, with intervals; a run that takes no inner step is a point among points."""
    files = [found.run / f"evaluation-{found.split}.{ending}" for ending in ("svg", "png")]
    rows = [r for r in found.rows() if r.policy not in ("blind", "oracle") and np.isfinite(r.score)]
    policies = list(dict.fromkeys(r.policy for r in rows))
    with picture(*files) as figure:
        ax = figure.subplots()
        if found.steps == 0:
            intervals = {}
            for r in rows:
                over = r.over_seeds or r.over_tasks
                intervals[NAMES.get(r.policy, r.policy)] = over or Interval(r.score, r.score, r.score, 1)
            points(ax, intervals, [BASELINES.get(p, "reinforce") for p in policies])
            plotting.score_axes(ax)
            ax.set_ylabel("score of an episode")
        else:
            for policy in policies:
                own = [r for r in rows if r.policy == policy]
                over = [r.over_seeds or r.over_tasks for r in own]
                ends = {"low": [o.low for o in over], "high": [o.high for o in over]} if all(over) else {}
                steps, scores = [r.step for r in own], [r.score for r in own]
                who = BASELINES.get(policy, "reinforce")
                plotting.curve(ax, steps, scores, who=who, name=NAMES.get(policy, policy), **ends)
            rounds = " (baselines: rounds of episodes)" if found.baselines else ""
            plotting.score_axes(ax, f"inner steps{rounds} taken before")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        title = f"{found.config.family_name}, {found.split}: {len(found.ids)} tasks"
        over = "tasks"
        if len(found.seeds) > 1:
            over = f"{len(found.seeds)} training seeds" + "; of baselines over tasks" * bool(found.baselines)
        ax.set_title(f"{title}\n95 % intervals over {over}")
        plotting.label_ends(ax)
    return files


def points(ax: Axes, intervals: Mapping[str, Interval], who: Sequence[str]) -> None:
    """Named points side by side, with their intervals."""
    for at, ((name, interval), look) in enumerate(zip(intervals.items(), who)):
        estimate, low, high = interval[:3]
        ax.errorbar(
            at,
            estimate,
            [[max(0.0, estimate - low)], [max(0.0, high - estimate)]],
            color=plotting.LOOKS[look].colour,
            marker=plotting.LOOKS[look].marker or "o",
            capsize=4,
            label=f"_{name}",
        )
    ax.set_xticks(range(len(intervals)), list(intervals))
    ax.set_xlim(-0.5, len(intervals) - 0.5)


def difference_picture(differences: Mapping[str, tuple[Interval | None, Interval]], title: str, file: Path) -> None:
    """Differences of scores, with the interval over seeds (dot) and the one over tasks (square) side by side."""
    with picture(file, figsize=(6.4, 1.2 + 0.9 * len(differences))) as figure:
        ax = figure.subplots()
        ax.axvline(0, color=plotting.LOOKS["blind"].colour, linestyle=plotting.LOOKS["blind"].line, linewidth=1.2)
        looks = (("over seeds", "reinforce", "o", 0.12), ("over tasks", "greedy", "s", -0.12))
        for row, pair in enumerate(differences.values()):
            for interval, (name, look, marker, shift) in zip(pair, looks):
                if interval is not None:
                    estimate, low, high = interval[:3]
                    ends = [[estimate - low], [high - estimate]]
                    style = {"color": plotting.LOOKS[look].colour, "marker": marker, "capsize": 4}
                    name = name if f"{name}" not in ax.get_legend_handles_labels()[1] else f"_{name}"
                    ax.errorbar(estimate, -row + shift, xerr=ends, linestyle="none", label=name, **style)
        ax.set_yticks([-row for row in range(len(differences))], list(differences))
        ax.set_ylim(0.5 - len(differences), 0.5)
        ax.set_xlabel("difference of scores")
        ax.set_title(title)
        figure.legend(loc="outside lower center", ncols=2)


def history_picture(values: Sequence[float], confirmed: float | None, file: Path) -> None:
    """Score of each complete trial in the order they were tried, the best so far, and the winner's with fresh seeds."""
    with picture(file) as figure:
        ax = figure.subplots()
        number, best = np.arange(1, len(values) + 1), np.maximum.accumulate(values)
        plotting.curve(ax, number, values, who="data", name="a trial")
        plotting.curve(ax, number, best, who="reinforce", name="best so far", marker="", drawstyle="steps-post")
        if confirmed is not None:
            ends = number[[0, -1]]
            plotting.curve(ax, ends, [confirmed] * 2, who="thompson", name="best, fresh seeds", marker="")
        ax.set(xlabel="complete trials", ylabel="score on validation tasks")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        plotting.label_ends(ax)


def importance_picture(importance: Mapping[str, float], file: Path) -> None:
    """How much of the difference between good trials and all trials each setting accounts for."""
    with picture(file, figsize=(6.4, 1.0 + 0.35 * len(importance))) as figure:
        ax = figure.subplots()
        ax.barh(list(importance)[::-1], list(importance.values())[::-1], color=plotting.COLOURS["reinforce"])
        ax.set(xlabel="importance (PED-ANOVA)", title="Which settings matter")
        ax.grid(False, axis="y")
