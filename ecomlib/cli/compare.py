"""``python -m ecomlib compare RUN RUN ...``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ..evaluation.statistics import Interval
from ..files import write_json
from ..pictures import NAMES, difference_picture
from ..run_comparison import Comparison, compare_runs, score_over_tasks
from ..run_results import EvaluationConfig
from .evaluate import aligned, ends


@dataclass(frozen=True)
class CompareOptions:
    """Compare runs of one task family after their last inner step: same tasks, same luck, differences from the first
    run with intervals."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """Folders of the runs, at least two; all others are compared with the first."""
    split: Literal["train", "test", "shifted"] = "test"
    """Which fixed list of tasks: train and test are from the prior of training, shifted from another one."""
    tasks: int = 500
    """Tasks: the first so many of the split's fixed list."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint. The best is that of the best training score: where seeds are few, a lucky peak."""
    luck: int = 0
    """Seed of all chance in the evaluation: the same for all runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    out: Path | None = None
    """File for the result as JSON; a picture with the ending .svg goes next to it. An earlier one is replaced."""


def main(arguments: Sequence[str]) -> int:
    """Parse, evaluate all runs, print and write."""
    options = tyro.cli(CompareOptions, args=list(arguments), prog="python -m ecomlib compare")
    if options.out is not None:
        if options.out.suffix == ".svg" or options.out.is_dir():
            raise ValueError(f"out = {options.out}; allowed: a file with another ending than .svg, such as .json")
        if not os.access(options.out.parent, os.W_OK):
            raise OSError(f"{options.out.parent}: there is no such folder, or it cannot be written to")
    torch.set_num_threads(1)
    settings = EvaluationConfig(options.tasks, checkpoint=options.checkpoint, luck=options.luck, device=options.device)
    found = compare_runs(options.runs, options.split, settings)
    print(report(found))
    if options.out is not None:
        write_json(options.out, found.description())
        title = f"{found.evaluations[0].config.family_name}, {options.split}: less {options.runs[0]}"
        differences = {str(run): (d.over_seeds, d.over_tasks) for run, d in zip(options.runs[1:], found.differences)}
        difference_picture(differences, title, options.out.with_suffix(".svg"))
        print(f"written: {options.out}, {options.out.with_suffix('.svg')}")
    return 0


def report(found: Comparison) -> str:
    """Scores by seed, differences, and what has to be known to read them."""
    first, evaluations = found.evaluations[0], found.evaluations
    seeds = sorted({s for e in evaluations for s in e.seeds})
    by_seed = [f"seed {s}" for s in seeds]
    lines = [("run", "algorithm", "steps", "episodes paid", *by_seed, "mean", "over tasks", "diverged")]
    for e in evaluations:
        score = dict(zip(e.seeds, e.scores()[:, -1]))
        lines.append(
            (
                str(e.run),
                NAMES.get(e.name, e.name),
                str(e.steps),
                str(e.steps * e.episodes),
                *(f"{score[s]:.3f}" if s in score else "" for s in seeds),
                f"{e.scores()[:, -1].mean():.3f}",
                ends(score_over_tasks(e)),
                f"{e.diverged[:, -1].mean():.1%}",
            )
        )
    title = f"{first.config.family_name}, {first.split}, {len(first.ids)} tasks: scores after the last inner step"
    parts = [title, aligned(lines)]
    parts += [f"{e.run}: training is not finished" for e in evaluations if not e.finished]
    paid = {(e.steps, e.episodes) for e in evaluations}
    if len(paid) > 1:
        parts.append("The runs do not pay for the same number of episodes before they are scored.")
    for e, d in zip(evaluations[1:], found.differences):
        parts.append(f"{e.run} - {first.run}")
        how = "same seeds, paired" if d.paired else "other seeds, not paired (Welch)"
        alone = "no interval: one training seed is no sample"
        parts.append(f"  over seeds  {_signed(d.over_seeds)}  {how}" if d.over_seeds else f"  over seeds  {alone}")
        if d.over_tasks:
            parts.append(f"  over tasks  {_signed(d.over_tasks)}  same tasks, paired; these trained policies")
    if len(evaluations) > 2:
        parts.append(f"{len(evaluations) - 1} differences: each interval is at 95 % by itself, not all at once.")
    return "\n".join(parts)


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}], n = {interval.n}"
