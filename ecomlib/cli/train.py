"""``python -m ecomlib train FAMILY``."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from ..config_files import PARTS, config_type, differences, read_config, read_toml, validate
from ..configuration import FAMILIES, OUTER, TrainConfig, default_config
from ..machine import Machine
from ..runs import Run
from ..training import train

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
    early, rest = _early(arguments)
    settings, source = _base(early)
    kind = TrainOptions[config_type(settings.family_name, settings.algorithm)]
    default = TrainOptions(settings, run=early.run, resume=early.resume, config=early.config, market=early.market)
    try:
        options = tyro.cli(
            tyro.conf.configure(tyro.conf.AvoidSubcommands)(kind),
            default=default,
            args=rest,
            prog=f"python -m ecomlib train {settings.family_name}",
        )
    except ValueError as error:
        raise ValueError(_as_flag(str(error), settings)) from None
    if early.resume:
        _refuse_contradiction(options.settings, settings, source)
    path = options.run or Path("runs") / f"{settings.family_name}-{options.settings.algorithm}"
    run = train(options.settings, path, options.resume, options.machine)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(f"{run.path}: done. Next: python -m ecomlib evaluate {run.path}")
    return 0


def _early(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The family and the flags that decide which settings there are; and all arguments but the family."""
    first = argparse.ArgumentParser("python -m ecomlib train", add_help=False, exit_on_error=False, allow_abbrev=False)
    first.add_argument("--algorithm")
    for name in ("run", "config", "market"):
        first.add_argument(f"--{name}", type=Path)
    first.add_argument("--resume", action="store_true")
    named = bool(arguments) and not arguments[0].startswith("-")
    family, rest = (arguments[0], list(arguments[1:])) if named else (None, list(arguments))
    try:
        early, _ = first.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    early.family = family
    for name, value, known in (("FAMILY", family, FAMILIES), ("--algorithm", early.algorithm, OUTER)):
        if value is not None and value not in known:
            close = difflib.get_close_matches(value, known, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{name} {value}; allowed: {', '.join(known)}{meant}")
    if family is None and not (early.resume or early.config):
        if {"-h", "--help"} & set(rest):
            print(_HELP)
            raise SystemExit(0)
        raise ValueError(f"name a task family: python -m ecomlib train {{{','.join(FAMILIES)}}}")
    if early.resume and (early.config or early.market):
        raise ValueError("--config and --market start a new run; --resume goes on with the settings of its own")
    if early.resume and early.run is None:
        raise ValueError("--resume needs --run, the folder of the run")
    return early, rest


_HELP = f"""usage: python -m ecomlib train FAMILY [--algorithm ALGORITHM] [OPTIONS]

Meta-train on a task family: progress, metrics, checkpoints, resuming.

FAMILY      {", ".join(FAMILIES)}
ALGORITHM   {", ".join(OUTER)}

All options of a family and an algorithm, with their defaults:
            python -m ecomlib train pricing --algorithm ppo-maml --help
Go on with a run that was stopped:
            python -m ecomlib train --run DIR --resume"""


def _as_flag(message: str, settings: TrainConfig) -> str:
    """``Inner.lr = -1; allowed: ...`` with the flag's name instead of the class's."""
    name, _, rest = message.partition(" = ")
    kind, _, field = name.partition(".")
    places = {"TrainConfig": "", "Machine": "", **PARTS, **_places(settings)}
    return f"--{places[kind]}{field}".replace("_", "-") + f" = {rest}" if kind in places else message


def _places(config: Any, prefix: str = "") -> dict[str, str]:
    """Class of every configuration in ``config`` -> what stands before the names of its fields."""
    result = {}
    for f in fields(config):
        if is_dataclass(value := getattr(config, f.name)):
            result |= {type(value).__name__: f"{prefix}{f.name}.", **_places(value, f"{prefix}{f.name}.")}
    return result


def _base(early: argparse.Namespace) -> tuple[TrainConfig, Path | None]:
    """What flags change: the run's own settings, those of a file, or the defaults; and the file."""
    if early.resume:
        settings, source = Run.open(early.run).config, early.run / "config.toml"
    elif early.config:
        settings, source = read_config(early.config), early.config
    else:
        settings, source = default_config(early.family, early.algorithm or "ppo-maml"), None
    for name, given in (("family_name", early.family), ("algorithm", early.algorithm)):
        if given is not None and given != getattr(settings, name):
            flag = {"family_name": "FAMILY"}.get(name, f"--{name}")
            raise ValueError(f"{flag} {given} contradicts {source}, where {name} = {getattr(settings, name)}")
    if early.market:
        settings = replace(settings, family=read_market(early.market, settings.family_name))
    return settings, source


def read_market(path: Path, family: str) -> Any:
    """The task family in a file of ``calibrate``. Raises ``ValueError`` naming the field that is wrong."""
    table = read_toml(path)
    if table.get("family_name") != family or not isinstance(table.get("family"), dict):
        raise ValueError(
            f"{path}: family_name = {table.get('family_name')!r}; allowed: {family!r}, and a table [family]"
        )
    return validate(FAMILIES[family], table["family"], f"{path}, family")


def _refuse_contradiction(asked: TrainConfig, saved: TrainConfig, source: Path) -> None:
    for name, new, old in differences(asked, saved):
        flag = f"--{name}".replace("_", "-")
        raise ValueError(
            f"{flag} {new} contradicts {source}, where {name} = {old}. A run keeps its "
            "settings: leave the flag out, or start a new run (--config, --run)"
        )
