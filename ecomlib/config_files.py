"""Configurations as TOML files, read strictly (chapter "Running experiments")."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError

from .configuration import FAMILIES, OUTER, TrainConfig, default_config
from .files import write_atomically

NONE = "none"
"""How None is written in TOML, which has no word for it."""


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
    return hashlib.sha256(json.dumps(_same_numbers(plain(config)), sort_keys=True).encode()).hexdigest()


def _same_numbers(value: Any) -> Any:
    """Equal numbers written in one way: 1 and 1.0 are the same setting."""
    if isinstance(value, dict):
        return {name: _same_numbers(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_same_numbers(x) for x in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def differences(asked: Any, saved: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, asked for, saved) of every setting in which two configurations differ: ``inner.lr``, 0.3, 0.1."""
    for f in fields(saved):
        new, old = getattr(asked, f.name), getattr(saved, f.name)
        if is_dataclass(old) and type(new) is type(old):
            yield from differences(new, old, f"{prefix}{f.name}.")
        elif new != old:
            yield f"{prefix}{f.name}", new, old


def write_config(config: Any, path: Path) -> None:
    """TOML with every field, tables last, atomically. Raises ``OSError``."""
    write_atomically(path, tomli_w.dumps(_complete(config)).encode())


def _complete(config: Any) -> Any:
    if is_dataclass(config):
        return {f.name: _complete(getattr(config, f.name)) for f in fields(config)}
    return [_complete(x) for x in config] if isinstance(config, tuple) else NONE if config is None else config


def read_config(path: str | Path) -> TrainConfig:
    """Read what ``write_config`` wrote, or a part of it: what is missing takes the family's and algorithm's default.

    Raises ``ValueError`` naming the file, and every field that is unknown, missing or has a value that is not allowed.
    """
    table = read_toml(path)
    for name, known in (("family_name", FAMILIES), ("algorithm", OUTER)):
        if not isinstance(table.get(name), str) or table[name] not in known:
            raise ValueError(f"{path}: {name} = {table.get(name)!r}; allowed: {', '.join(known)}")
    default = plain(default_config(table["family_name"], table["algorithm"]))
    kind = config_type(table["family_name"], table["algorithm"])
    return validate(kind, _completed(table, default), str(path))


def _completed(table: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """``table``, and what it does not say from ``default``. A table with a name that is not in the default's is another
    kind (a prior, say) and is taken as it is."""
    result = dict(table)
    for name, value in default.items():
        given = table.get(name, value)
        both = isinstance(given, dict) and isinstance(value, dict)
        result[name] = _completed(given, value) if both and (name in _PARTS or set(given) <= set(value)) else given
    return result


_PARTS = ("family", "outer", "policy", "inner", "data")


LARGEST = 100_000
"""Bytes of a file of settings: ample, and what a hostile one can make the parser do stays small."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ``ValueError`` naming the file where it is not one."""
    if (size := Path(path).stat().st_size) > LARGEST:
        raise ValueError(f"{path} is not a file of settings: it has {size} bytes; allowed: at most {LARGEST}")
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not a TOML file of settings: it is nested too deeply") from None
    except ValueError as error:  # TOML, UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} is not a TOML file: {error}") from None


def validate(kind: Any, values: Any, where: str) -> Any:
    """``values`` (dictionaries, lists, numbers; "none" is None) as an object of ``kind``; strict: 3.0 is no whole
    number, "3" no number. Raises ``ValueError`` naming ``where``, every field and what is wrong with it."""
    try:
        text = json.dumps(_with_none(values))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(_problems(error.errors(), kind))) from None


def _with_none(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _with_none(x, f"{name}.{k}".lstrip(".")) for k, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_none(x, name) for x in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return None if value == NONE else value
    raise TypeError(f"{name} = {value}; allowed: numbers, texts and lists")  # a date of TOML


# ------------------------------------------------------------------------------------------------ what is wrong
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
WORDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "array": "a list",
         "an array": "a list", "object": "a table", "an object": "a table", "string": "a text"}  # fmt: skip
"""pydantic's types -> what a reader of TOML calls them."""
PARTS = {"PolicySettings": "policy.", "InnerSettings": "inner.", "Inner": "inner.", "DataSettings": "data.",
         "MAMLConfig": "data."}  # fmt: skip
"""Where the field of a class is found, if the message comes from two parts that do not fit."""


def _problems(errors: Sequence[Any], kind: Any) -> list[str]:
    """Each problem in the words of ``families.base.require``: field, value, allowed."""
    names = list(dict.fromkeys(_names(kind)))
    found: dict[tuple[str, str], list[str]] = {}  # (field, what it is) -> what would be allowed
    for e in _likely(errors):
        field, problem, allowed = _problem(e, names)
        found.setdefault((field, problem), []).append(allowed)
    return [f"{field}{problem}" + (f"; allowed: {' or '.join(filter(None, allowed))}" if any(allowed) else "")
            for (field, problem), allowed in found.items()]  # fmt: skip


def _likely(errors: Sequence[Any]) -> list[Any]:
    """Where a union of classes was tried, the problems of the class that was probably meant: the one to which the
    fewest names are unknown."""
    tried: dict[tuple, dict[str, list[Any]]] = {}
    for e in errors:
        loc = e["loc"]
        at = next((i for i, step in enumerate(loc) if isinstance(step, str) and step[:1].isupper()), None)
        place, name = ((), "") if at is None else (loc[:at], loc[at])
        tried.setdefault(place, {}).setdefault(name, []).append(e)
    surprise = lambda es: (sum(e["type"] in UNKNOWN for e in es), len(es))
    return [e for classes in tried.values() for e in min(classes.values(), key=surprise)]


def _problem(error: Any, names: Sequence[str]) -> tuple[str, str, str]:
    """Field, what is wrong, what is allowed."""
    steps: list[str] = []
    for step in map(str, error["loc"]):  # where a union was tried, it has the name of the alternative besides
        last = step is error["loc"][-1] and error["type"] in UNKNOWN
        if step.isdigit() or last or ".".join([*steps, step]) in names:
            steps.append(step)
    field = ".".join(steps)
    if error["type"] in UNKNOWN:
        close = difflib.get_close_matches(field, names, 1)
        return field, ": there is no such setting" + (f"; did you mean {close[0]}?" if close else ""), ""
    if error["type"] == "missing":
        return field, " is missing", ""
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        own = re.match(r"(\w+)\.(\w+)( = .*); allowed: (.*)", message, re.DOTALL)
        if own is None:
            return field or "settings", f": {message}", ""
        return (f"{field}." if field else PARTS.get(own[1], "")) + own[2], own[3], own[4]
    allowed = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return field or "settings", f" = {error['input']!r}", WORDS.get(allowed, allowed)


def _names(kind: Any, prefix: str = "") -> Iterator[str]:
    """Names of the fields of a dataclass and of those in it: ``inner.lr``."""
    origin = getattr(kind, "__origin__", kind)
    if not is_dataclass(origin):
        for part in get_args(kind):
            yield from _names(part, prefix)
        return
    filled = dict(zip(getattr(origin, "__parameters__", ()), get_args(kind)))
    hints = get_type_hints(origin)
    for f in fields(origin):
        yield f"{prefix}{f.name}"
        yield from _names(filled.get(hints[f.name], hints[f.name]), f"{prefix}{f.name}.")
