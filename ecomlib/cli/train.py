"""``python -m ecomlib train FAMILY``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from ..config_files import config_type, read_config, read_toml, validate
from ..configuration import FAMILIES, OUTER, TrainConfig, default_config
from ..runs import Run
from ..training import Machine, train

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class TrainOptions(Generic[ConfigT]):
    """Meta-train. Writes config.toml, metrics.jsonl, TensorBoard events, checkpoints and result.json into --run."""

    settings: Annotated[ConfigT, tyro.conf.arg(name="")]
    machine: Annotated[Machine, tyro.conf.arg(name="")] = field(default_factory=Machine)
    run: Path | None = None
    """Folder of the run; by default runs/FAMILY-ALGORITHM."""
    resume: bool = False
    """Go on with the run in --run, with its own config.toml."""
    config: Path | None = None
    """Start from the settings of this file (a config.toml, whole or in part) instead of the defaults."""
    market: Path | None = None
    """Take the task family from this file, written by `calibrate`."""


def main(arguments: Sequence[str]) -> int:
    """Parse and train."""
    first = argparse.ArgumentParser("python -m ecomlib train", add_help=False, exit_on_error=False)
    first.add_argument("family", nargs="?", choices=tuple(FAMILIES))
    first.add_argument("--algorithm", choices=tuple(OUTER))
    for name in ("run", "config", "market"):
        first.add_argument(f"--{name}", type=Path)
    first.add_argument("--resume", action="store_true")
    try:
        early, rest = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if early.family is None:
        raise ValueError(f"name a task family: python -m ecomlib train {{{','.join(FAMILIES)}}} [--help]")
    if early.resume and (early.config or early.market):
        raise ValueError("--config and --market start a new run; --resume goes on with the settings of its own")
    if early.resume and early.run is None:
        raise ValueError("--resume needs --run, the folder of the run")
    settings = _base(early)
    kind = TrainOptions[config_type(settings.family_name, settings.algorithm)]
    options = tyro.cli(
        tyro.conf.configure(tyro.conf.AvoidSubcommands)(kind),
        default=TrainOptions(settings, run=early.run, resume=early.resume, config=early.config, market=early.market),
        args=list(arguments)[1:]
        if list(arguments)[:1] == [early.family]
        else [a for a in arguments if a != early.family],
        prog=f"python -m ecomlib train {early.family}",
    )
    if early.resume:
        _refuse_contradiction(options.settings, settings, early.run)
    path = options.run or Path("runs") / f"{early.family}-{options.settings.algorithm}"
    run = train(options.settings, path, options.resume, options.machine)
    print(f"{run.path}: done. Next: python -m ecomlib evaluate {run.path}")
    return 0


def _base(early: argparse.Namespace) -> TrainConfig:
    """What flags change: the run's own settings, those of a file, or the defaults."""
    if early.resume:
        settings, source = Run.open(early.run).config, early.run / "config.toml"
    elif early.config:
        settings, source = read_config(early.config), early.config
    else:
        settings, source = default_config(early.family, early.algorithm or "ppo-maml"), None
    for name, given in (("family_name", early.family), ("algorithm", early.algorithm)):
        if given is not None and given != getattr(settings, name):
            flag = {"family_name": "family"}.get(name, f"--{name}")
            raise ValueError(f"{flag} {given} contradicts {source}, where {name} = {getattr(settings, name)}")
    return replace(settings, family=read_market(early.market, early.family)) if early.market else settings


def read_market(path: Path, family: str) -> Any:
    """The task family in a file of ``calibrate``. Raises ``ValueError`` naming the field that is wrong."""
    table = read_toml(path)
    if table.get("family_name") != family or not isinstance(table.get("family"), dict):
        raise ValueError(
            f"{path}: family_name = {table.get('family_name')!r}; allowed: {family!r}, and a table [family]"
        )
    return validate(FAMILIES[family], table["family"], f"{path}, family")


def _refuse_contradiction(asked: Any, saved: Any, path: Path, prefix: str = "") -> None:
    for f in fields(saved):
        new, old = getattr(asked, f.name), getattr(saved, f.name)
        if is_dataclass(old) and type(new) is type(old):
            _refuse_contradiction(new, old, path, f"{prefix}{f.name}.")
        elif new != old:
            flag = f"--{prefix}{f.name}".replace("_", "-")
            raise ValueError(
                f"{flag} {new} contradicts {path / 'config.toml'}, where {prefix}{f.name} = {old}. A run keeps its "
                "settings: leave the flag out, or start a new run (--config, --run)"
            )
