"""Checkpoints: the state of meta-training as tensors and JSON in one safetensors file, never a pickle (chapter "Running
experiments").

A folder of checkpoints has an ``index.json``, replaced last: a checkpoint exists once it is listed there with its
SHA-256, so a crash between the two files costs one checkpoint and never shows half of one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .families.base import number
from .files import remove_unfinished, write_atomically, write_json
from .learners import MetaTraining

FORMAT, VERSION = "ecomlib checkpoint", 1
NAME = re.compile(r"iteration-\d{6,}\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and says what to do."""


class Entry(NamedTuple):
    """A line of the index."""

    file: str
    iteration: int
    score: float | None  # what "best" means: mean score of the iterations since the checkpoint before
    sha256: str
    bytes: int
    out_of_turn: bool  # not at a multiple of ``checkpoint_every``


class CheckpointFolder:
    """Checkpoints of one training (one batch of seeds): the last ``keep``, and the one with the best score."""

    def __init__(self, path: Path, config: str, seeds: tuple[int, ...], keep: int = 3):
        """``config`` is the hash of the configuration, which a checkpoint must carry to be loaded here."""
        self.path, self.config, self.seeds, self.keep = path, config, seeds, keep

    # -------------------------------------------------------------------------------------------- writing
    def save(self, state: MetaTraining, score: float | None = None, out_of_turn: bool = False) -> Path:
        """Write ``state`` and drop what need not be kept: all but the last ``keep`` and the best. One that is written
        ``out_of_turn`` (Ctrl-C, a disk that was full when it was time) goes with the next, so that a run that was
        stopped and resumed ends with the files of one that was not.

        ``OSError`` leaves every earlier checkpoint in place. Raises ``FloatingPointError`` if the state is not finite.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path)
        score = score if score is not None and math.isfinite(score) else None
        file = self.path / f"iteration-{state.iteration:06d}.safetensors"
        data = pack(state, self.config, self.seeds)
        write_atomically(file, data)
        entry = Entry(file.name, state.iteration, score, hashlib.sha256(data).hexdigest(), len(data), out_of_turn)
        entries = [e for e in self.entries() if e.iteration < state.iteration and not e.out_of_turn] + [entry]
        best = max((e for e in entries if e.score is not None), key=lambda e: e.score, default=None)
        kept = entries[-self.keep :] + ([best] if best and best not in entries[-self.keep :] else [])
        kept.sort(key=lambda e: e.iteration)
        index = {"format": FORMAT, "version": VERSION, "best": best.file if best else None}
        write_json(self.path / "index.json", index | {"checkpoints": [e._asdict() for e in kept]})
        self.tidy()
        return file

    def tidy(self) -> None:
        """Delete files that the index does not list: what a writer that was killed left behind."""
        remove_unfinished(self.path)
        listed = {e.file for e in self.entries()}
        for file in self.path.glob("iteration-*.safetensors"):
            if NAME.fullmatch(file.name) and file.name not in listed:
                file.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------- reading
    def entries(self) -> list[Entry]:
        """What the index lists, oldest first; empty without an index. Raises ``CheckpointError`` if it is damaged."""
        return self._index()[0]

    def missing(self) -> list[Path]:
        """Files that the index lists and that are not there."""
        return [self.path / e.file for e in self.entries() if not (self.path / e.file).exists()]

    def _index(self) -> tuple[list[Entry], str | None]:
        path = self.path / "index.json"
        if not path.exists():
            return [], None
        try:
            index = json.loads(path.read_bytes())
            if index["format"] != FORMAT or index["version"] != VERSION:
                raise CheckpointError(f"{path}: format {index['format']!r}, version {index['version']!r}; this library "
                                      f"reads {FORMAT!r}, version {VERSION}")  # fmt: skip
            entries = [Entry(**e) for e in index["checkpoints"]]
            valid = all(
                NAME.fullmatch(e.file) and type(e.iteration) is int and type(e.bytes) is int and type(e.sha256) is str
                and (e.score is None or number(e.score)) and type(e.out_of_turn) is bool
                for e in entries
            ) and (index["best"] is None or index["best"] in {e.file for e in entries})  # fmt: skip
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            valid = False
        if not valid:
            raise CheckpointError(f"{path} is damaged: it does not list checkpoints. Restore it from a copy, or train "
                                  "anew in another folder")  # fmt: skip
        return sorted(entries, key=lambda e: e.iteration), index["best"]

    def load(self, which: Literal["last", "best"] = "last") -> MetaTraining | None:
        """The checkpoint, verified, its tensors on the CPU; None where there is none yet.

        A file that was deleted counts as never written. Raises ``CheckpointError`` for one that is listed and damaged,
        belongs to another configuration or was not written by this library; nothing in it is executed.
        """
        entries, best = self._index()
        there = [e for e in entries if (self.path / e.file).exists()]
        if which == "best":
            there = [e for e in there if e.file == best] or there
        if not there:
            return None
        entry, file = there[-1], self.path / there[-1].file
        data = file.read_bytes()
        if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            earlier = f"iteration {there[-2].iteration}" if len(there) > 1 else "the beginning"
            raise CheckpointError(
                f"{file} is damaged: {len(data)} bytes of {entry.bytes}, or another SHA-256. Restore it from a copy, "
                f"or delete it to go on from {earlier}"
            )
        state = unpack(data, str(file), self.config, self.seeds)
        if state.iteration != entry.iteration:
            raise CheckpointError(f"{file} holds iteration {state.iteration}; the index says {entry.iteration}")
        return state


def pack(state: MetaTraining, config: str, seeds: tuple[int, ...]) -> bytes:
    """A safetensors file: meta-parameters and the outer step's memory as tensors, the rest as JSON in the header.

    The luck of an iteration is a function of (seed, its number), so the state of all generators is these two numbers.
    Raises ``FloatingPointError`` if a tensor is not finite: training from there would be lost.
    """
    tensors: dict[str, Tensor] = {}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": config,
        "iteration": state.iteration,
        "generators": {"seeds": list(seeds), "next iteration": state.iteration},
        "meta": _describe(state.meta, "meta", tensors),
        "memory": _describe(state.memory, "memory", tensors),
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} of iteration {state.iteration} is not finite")
    return safetensors.torch.save(tensors, {"ecomlib": json.dumps(header)})


def unpack(data: bytes, name: str, config: str, seeds: tuple[int, ...]) -> MetaTraining:
    """The inverse of ``pack``, without history. Raises ``CheckpointError`` naming ``name`` and what is wrong."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["ecomlib"])
        tensors = safetensors.torch.load(data)
        known = header["format"] == FORMAT and header["version"] == VERSION
        found, saved_seeds = header["config"], tuple(header["generators"]["seeds"])
        iteration, meta, memory = header["iteration"], header["meta"], header["memory"]
        known = known and type(iteration) is int and iteration >= 0
        meta, memory = _rebuild(meta, tensors), _rebuild(memory, tensors)
        finite = all(bool(t.isfinite().all()) for t in tensors.values())
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError):  # nested too deeply; formats of numbers
        known = False
    if not known or not isinstance(meta, list) or not all(isinstance(p, Tensor) for p in meta):
        raise CheckpointError(f"{name} is no checkpoint of this library (version {VERSION}), or is damaged")
    if found != config or saved_seeds != seeds:
        raise CheckpointError(f"{name} belongs to another configuration or other seeds: {saved_seeds}, here {seeds}")
    if not finite:
        raise CheckpointError(f"{name} holds numbers that are not finite")
    return MetaTraining(iteration, meta, memory, [])


def _describe(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``tree`` with every tensor replaced by its name in ``tensors``."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(tree, (list, tuple)):
        return [_describe(x, f"{name}.{i}", tensors) for i, x in enumerate(tree)]
    if isinstance(tree, dict):
        if not all(isinstance(key, str) and key != "tensor" for key in tree):
            raise TypeError(f"{name}: keys of a checkpoint are strings other than 'tensor'")
        return {key: _describe(x, f"{name}.{key}", tensors) for key, x in tree.items()}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{name} is a {type(tree).__name__}: a checkpoint holds tensors, lists, dictionaries and numbers")


def _rebuild(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        return (
            tensors[tree["tensor"]] if set(tree) == {"tensor"} else {k: _rebuild(x, tensors) for k, x in tree.items()}
        )
    return [_rebuild(x, tensors) for x in tree] if isinstance(tree, list) else tree
