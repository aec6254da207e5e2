"""``python -m ecomlib evaluate RUN``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ..evaluation.statistics import Interval
from ..pictures import NAMES, evaluation_picture
from ..run_evaluation import evaluate_run
from ..run_results import Evaluation, EvaluationConfig
from ..runs import Run


@dataclass(frozen=True)
class EvaluateOptions:
    """Test a run on tasks that it was not trained on: returns and scores after every inner step, with intervals, next
    to classical policies on the same tasks with the same luck. Writes evaluation-SPLIT.json (.npz, .svg, .png) into the
    run's folder."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, finished or not."""
    split: tyro.conf.UseAppendAction[tuple[Literal["train", "test", "shifted", "drifting"], ...]] = ()
    """Which fixed list of tasks: train and test are from the prior of training, shifted from another one, drifting is
    test with hidden parameters that walk from round to round. May be given several times; test if it is not given."""
    settings: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluationConfig)


def main(arguments: Sequence[str]) -> int:
    """Parse, evaluate, print and write."""
    options = tyro.cli(EvaluateOptions, args=list(arguments), prog="python -m ecomlib evaluate")
    torch.set_num_threads(1)
    Run.open(options.run)
    if not os.access(options.run, os.W_OK):
        raise OSError(f"{options.run} cannot be written to, and that is where the result goes")
    for name in dict.fromkeys(options.split or ("test",)):
        found = evaluate_run(options.run, name, options.settings)
        print(report(found))
        files = found.save() + evaluation_picture(found)
        print("written: " + ", ".join(map(str, files)) + "\n")
    return 0


def report(found: Evaluation) -> str:
    """The table, and what has to be known to read it."""
    lines = [("policy", "after", "return", "score", "over seeds", "over tasks", "diverged")]
    for r in found.rows():
        after = "" if r.policy in ("blind", "oracle") else f"{r.step}"
        diverged = f"{r.diverged:.1%}" if r.seeds else ""
        policy = NAMES.get(r.policy, r.policy)
        lines.append(
            (policy, after, f"{r.value:.4g}", f"{r.score:.3f}", ends(r.over_seeds), ends(r.over_tasks), diverged)
        )
    lives = [("all rounds together", "", "", "score", "over seeds", "over tasks")]
    for x in found.lifetimes():
        policy = NAMES.get(x.policy, x.policy)
        lives.append((policy, "", "", f"{x.score:.3f}", ends(x.over_seeds), ends(x.over_tasks)))
    for x in found.leads():
        if x.over_tasks is not None:
            lead = f"{x.over_tasks.estimate:+.3f}"
            lives.append((f"less {x.baseline}", "", "", lead, ends(x.over_seeds), ends(x.over_tasks)))
    config, seeds = found.config, ", ".join(map(str, found.seeds))
    several = len(found.seeds) > 1
    title = f"{found.run}: {config.family_name}, {found.split}, {len(found.ids)} tasks, seed{'s'[:several]} {seeds}"
    unfinished = []
    if not found.finished:
        done = ", ".join(f"{s} at {c['iteration']}" for s, c in zip(found.seeds, found.checkpoints))
        unfinished.append(
            f"Not the end of training ({config.iterations} iterations): seed {done}"
            + (f"; no checkpoint of seed {', '.join(map(str, found.missing))}" if found.missing else "")
        )
    notes = [
        f"Score: 0 is the best policy that never adapts, 1 the policy that knows the task. A round is {found.episodes} "
        f'episodes of each task; "after" counts the inner steps{" or rounds" * bool(found.baselines)} before it.',
        f"Over seeds: 95 % (Student), n = {len(found.seeds)} training seeds, these tasks."
        if several
        else "Over seeds: no interval, since there is one training seed; what another one would give is unknown.",
        f"Over tasks: 95 % (jackknife), n = {len(found.ids)} tasks, these trained policies.",
    ]
    if found.baselines:
        pooled = "pool the episodes of a round" if found.steps else "know their own episode alone"
        notes.append(
            f"Baselines start from the prior of training, {pooled}, and learn from day to day, also within a round."
        )
    if found.steps > 0:
        lines += [(), *lives]
    return "\n".join([title, *unfinished, aligned(lines), *notes])


def ends(interval: Interval | None) -> str:
    """An interval's ends."""
    return "" if interval is None else f"[{interval.low:.3f}, {interval.high:.3f}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    place = lambda i, word, width: word.ljust(width) if i == 0 else word.rjust(width)
    return "\n".join(
        "  ".join(place(i, w, width) for i, (w, width) in enumerate(zip(row, widths))).rstrip() for row in rows
    )
