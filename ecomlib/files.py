"""Writing files so that a reader finds the old content or the new, never half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` as one step that survives a crash: temporary file, fsync, rename, fsync of the
    folder. Where it fails (full disk, no permission) the old file is as it was and ``OSError`` names the path."""
    unfinished = path.parent / f".{path.name}.{os.getpid()}.unfinished"
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise
    synchronise_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def synchronise_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut (POSIX)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, error: type[Exception]) -> Iterator[None]:
    """Nobody else writes to ``folder``. Raises ``error`` if somebody does; a process that is killed lets go."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise error(f"{folder} is in use by another process: wait for it, or name another folder") from None
    try:
        yield
    finally:
        lock.release()


def remove_unfinished(folder: Path) -> None:
    """Delete what writers that were killed left behind."""
    for file in folder.glob(".*.unfinished"):
        file.unlink(missing_ok=True)
