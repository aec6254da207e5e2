"""``python -m ecomlib search FAMILY``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ..config_files import read_config
from ..configuration import FAMILIES, OUTER, TrainConfig, default_config
from ..evaluation.statistics import Interval
from ..families.base import check
from ..pictures import NAMES, history_picture, importance_picture
from ..search import LEAST_FOR_IMPORTANCE, Search, SearchConfig, SearchResult, saved_search
from ..search_space import own_value, space
from .calibrate import named_family
from .evaluate import aligned
from .train import read_market

SHOWN = 10
"""Trials in the table."""


@dataclass(frozen=True)
class SearchOptions:
    """Search settings of an algorithm: trials are trained, scored after adaptation on validation tasks, and pruned; the
    winner is trained again with fresh seeds and scored on other tasks. The same command goes on where it was stopped.
    Writes best.toml (for `train --config`), result.json and pictures into --search."""

    algorithm: Literal[
        "ppo-maml", "rl-maml", "trpo-maml", "reptile", "fomaml", "anil", "meta-sgd", "recurrent-ppo", "rl2", "belief"
    ] = "ppo-maml"
    """Whose settings."""
    settings: Annotated[SearchConfig, tyro.conf.arg(name="")] = field(default_factory=SearchConfig)
    search: Path | None = None
    """Folder of the search; by default runs/search-FAMILY-ALGORITHM."""
    config: Path | None = None
    """Search around the settings of this file (a config.toml, whole or in part) instead of the defaults."""
    market: Path | None = None
    """Take the task family from this file, written by `calibrate`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def __post_init__(self):
        missing = self.device == "cuda" and not torch.cuda.is_available()
        check(self, "device", lambda x: not missing, "auto or cpu: this machine has no GPU that torch can use")


def main(arguments: Sequence[str]) -> int:
    """Parse, search, print and draw."""
    family, rest = named_family(arguments, "search", FAMILIES)
    first = argparse.ArgumentParser("python -m ecomlib search", add_help=False, exit_on_error=False)
    first.add_argument("--algorithm", choices=tuple(OUTER))
    first.add_argument("--search", type=Path)
    try:
        early, _ = first.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    path = early.search or Path("runs") / f"search-{family}-{early.algorithm or 'ppo-maml'}"
    saved, default = saved_search(path), SearchOptions(early.algorithm or "ppo-maml", search=path)
    if saved:  # what is not said stays as it was
        if saved[0].family_name != family:
            raise ValueError(f"{path} is a search for {saved[0].family_name}: name another folder (--search)")
        default = replace(default, algorithm=saved[0].algorithm, settings=saved[1])
    options = tyro.cli(SearchOptions, default=default, args=rest, prog=f"python -m ecomlib search {family}")
    torch.set_num_threads(1)
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    search = Search(path, _base(options, family, saved and saved[0]), options.settings, device)
    found = search.run()
    files = [search.path / "result.json"]
    if found.best is not None:
        files = [search.path / "best.toml", *files, search.path / "history.svg"]
        draw(found, search.path)
    print(report(search, found))
    if found.importance:
        files.append(search.path / "importance.svg")
    print("written: " + ", ".join(map(str, files)))
    if found.best is not None:
        print(f"Next: python -m ecomlib train {family} --config {search.path / 'best.toml'}")
    return 0


def _base(options: SearchOptions, family: str, saved: TrainConfig | None) -> TrainConfig:
    """The settings that the search starts from."""
    if options.config:
        base = read_config(options.config)
        for name, given in (("family_name", family), ("algorithm", options.algorithm)):
            if getattr(base, name) != given:
                raise ValueError(f"{options.config}: {name} = {getattr(base, name)}; allowed: {given}")
    elif saved and saved.algorithm == options.algorithm:
        base = saved
    else:
        base = default_config(family, options.algorithm)
    return replace(base, family=read_market(options.market, family)) if options.market else base


def draw(found: SearchResult, folder: Path) -> None:
    """The pictures of a search."""
    values = [t.value for t in found.trials if t.value is not None and "scores" in t.user_attrs]
    confirmed = found.intervals["best, validation tasks"].estimate if found.confirmed else None
    history_picture(values, confirmed, folder / "history.svg")
    if found.importance:
        importance_picture(found.importance, folder / "importance.svg")


def report(search: Search, found: SearchResult) -> str:
    """The best trials, and what the winner is worth."""
    names, base, config = list(space(search.base)), search.base, search.config
    scored = [t for t in found.trials if "scores" in t.user_attrs]
    scored.sort(key=lambda t: -t.value)
    show = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    lines = [("trial", "score", *names)]
    lines += [(str(t.number), f"{t.value:.3f}", *(show(t.params[n]) for n in names)) for t in scored[:SHOWN]]
    lines.append(("start", "", *(show(own_value(base, n)) for n in names)))
    pruned = len(found.trials) - len(scored)
    diverged = sum("diverged" in t.user_attrs for t in found.trials)
    parts = [
        f"{search.path}: {base.family_name}, {NAMES[base.algorithm]}; {len(scored)} complete trials, "
        f"{pruned - diverged} pruned, {diverged} diverged",
        aligned(lines),
        f"Score: after adaptation, {config.validation_tasks} validation tasks, mean of {config.seeds} training "
        f"seed{'s'[: config.seeds > 1]}, {config.iterations} iterations"
        + ("" if base.data.transitions else f", {base.data.episodes} episodes of a task and round"),
    ]
    if found.importance:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in found.importance.items())
        parts.append(f"Importance (PED-ANOVA): {shares}")
    else:
        parts.append(f"Importance is told from {LEAST_FOR_IMPORTANCE} finished trials on.")
    if found.best is None:
        return "\n".join([*parts, "No trial is complete: nothing to recommend."])
    parts.append(f"Best of {len(scored)} trials: {found.best.value:.3f}, too good, since that number chose it")
    if found.confirmed:
        of, others = found.intervals, f"on {config.confirmation_tasks} other tasks"
        parts.append(f"With {config.confirm} fresh training seeds (95 % over seeds):")
        for name in found.confirmed:
            settings = {"best": "the same settings", "start": "settings at the start"}[name]
            parts.append(
                f"  {settings}: {_words(of[f'{name}, validation tasks'])} on the validation tasks, "
                f"{_words(of[name])} {others}"
            )
        if "start" in found.confirmed:
            parts.append(f"  best - start, paired by seed: {_words(of['best - start'])} {others}")
        else:
            parts.append("No trial beat the settings at the start.")
    if found.config.data.episodes != base.data.episodes:
        parts.append(
            f"The winner trains with {found.config.data.episodes} episodes of a task and round; its scores are with "
            f"{base.data.episodes}, so evaluate it with --episodes {base.data.episodes}."
        )
    return "\n".join(parts)


def _words(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
