"""Configurations as TOML files, read strictly (chapter "Running experiments")."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from .configuration import FAMILIES, OUTER, TrainConfig, default_config


def config_type(family: str, algorithm: str) -> Any:
    """``TrainConfig`` with the classes of this family and algorithm filled in."""
    return TrainConfig[FAMILIES[family], OUTER[algorithm]]


def plain(config: Any) -> Any:
    """A configuration as dictionaries, lists and numbers; what is None is left out."""
    if is_dataclass(config):
        values = ((f.name, getattr(config, f.name)) for f in fields(config))
        return {name: plain(value) for name, value in values if value is not None}
    return [plain(x) for x in config] if isinstance(config, tuple) else config


def config_hash(config: TrainConfig) -> str:
    """SHA-256 of the configuration: two runs with the same one compute the same thing."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()


def write_config(config: Any, path: Path) -> None:
    """TOML, tables last."""
    path.write_text(tomli_w.dumps(plain(config)), encoding="utf-8")


def read_config(path: str | Path) -> TrainConfig:
    """Read what ``write_config`` wrote, or a part of it: what is missing takes the family's and algorithm's default.

    Raises ``ValueError`` naming the file, and every field that is unknown, missing or has a value that is not allowed.
    """
    table = read_toml(path)
    for name, known in (("family_name", FAMILIES), ("algorithm", OUTER)):
        if table.get(name) not in known:
            raise ValueError(f"{path}: {name} = {table.get(name)!r}; allowed: {', '.join(known)}")
    default = plain(default_config(table["family_name"], table["algorithm"]))
    kind = config_type(table["family_name"], table["algorithm"])
    complete = {k: v | table[k] if isinstance(v, dict) and isinstance(table.get(k), dict) else table.get(k, v)
                for k, v in default.items()}  # fmt: skip
    return validate(kind, table | complete, str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ``ValueError`` naming the file where it is not one."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None


def validate(kind: Any, values: Any, where: str) -> Any:
    """``values`` (dictionaries, lists, numbers) as an object of ``kind``; strict: 3.0 is no whole number, "3" no
    number. Raises ``ValueError`` naming ``where``, every field and what is wrong with it."""
    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as error:  # a date of TOML
        raise ValueError(f"{where}: {error}") from None
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        problems = [f"{_name(e['loc'])}: {_message(e)}" for e in error.errors()]
        raise ValueError(f"{where}: " + "; ".join(problems)) from None


def _name(location: Sequence[str | int]) -> str:
    # Where a union was tried, pydantic adds the alternative's name to the path.
    return (
        ".".join(str(x) for x in location if not (isinstance(x, str) and ("[" in x or x in ("int", "float")))) or "all"
    )


def _message(error: Any) -> str:
    if error["type"] == "unexpected_keyword_argument":
        return "no such field"
    shown = "" if error["type"] in ("missing", "value_error") else f" (got {error['input']!r})"
    return error["msg"].removeprefix("Value error, ") + shown
