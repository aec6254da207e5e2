"""Where the states of tasks are kept: a small interface, in memory and in SQLite; another database can take its place.

An answer leaves the service only after ``put`` has returned, so whatever was acknowledged is in the store.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class Conflict(RuntimeError):
    """Somebody else changed the task since it was read: read it again."""


class Record(NamedTuple):
    """A line of the log, never changed."""

    kind: str
    """decision, feedback or episode."""
    key: str
    """Unique within its kind."""
    model: str
    task: str
    body: str
    """JSON."""


class TaskStore(Protocol):
    """What a service needs of a database. All methods may be called from several threads."""

    def get(self, model: str, task: str) -> tuple[int, bytes] | None:
        """Version and state of a task under a model; None if there is none."""

    def put(self, model: str, task: str, version: int, state: bytes, records: Sequence[Record] = ()) -> None:
        """Compare and set: replace the state that was read at ``version`` (0: there was none) by one of version + 1,
        and append ``records``; all of it or nothing, and durably. Raises ``Conflict`` if the task has another version
        by now or a record's key exists, ``OSError`` where it cannot be written (a full disk)."""

    def record(self, kind: str, key: str) -> Record | None:
        """One line of the log."""

    def records(self, kind: str, model: str) -> list[Record]:
        """The lines of a model, oldest first."""

    def activate(self, model: str | None) -> None:
        """Note that from now on this model answers, or (None) that the last activation is taken back."""

    def activations(self) -> list[str | None]:
        """Everything that ``activate`` noted, oldest first."""

    def close(self) -> None:
        """Let go of files."""


class MemoryStore:
    """A ``TaskStore`` that forgets everything with its process: for tests and experiments."""

    def __init__(self):
        self._lock = threading.Lock()
        self._tasks: dict[tuple[str, str], tuple[int, bytes]] = {}
        self._records: dict[tuple[str, str], Record] = {}
        self._activations: list[str | None] = []

    def get(self, model: str, task: str) -> tuple[int, bytes] | None:
        """As ``TaskStore.get``."""
        with self._lock:
            return self._tasks.get((model, task))

    def put(self, model: str, task: str, version: int, state: bytes, records: Sequence[Record] = ()) -> None:
        """As ``TaskStore.put``."""
        keys = [(r.kind, r.key) for r in records]
        with self._lock:
            now = self._tasks.get((model, task), (0, b""))[0]
            if now != version or len(set(keys) - set(self._records)) < len(keys):
                raise Conflict(f"task {task!r}: version {now}, not {version}, or a record exists")
            self._tasks[model, task] = version + 1, state
            self._records.update(zip(keys, records))

    def record(self, kind: str, key: str) -> Record | None:
        """As ``TaskStore.record``."""
        with self._lock:
            return self._records.get((kind, key))

    def records(self, kind: str, model: str) -> list[Record]:
        """As ``TaskStore.records``."""
        with self._lock:
            return [r for r in self._records.values() if (r.kind, r.model) == (kind, model)]

    def activate(self, model: str | None) -> None:
        """As ``TaskStore.activate``."""
        with self._lock:
            self._activations.append(model)

    def activations(self) -> list[str | None]:
        """As ``TaskStore.activations``."""
        with self._lock:
            return list(self._activations)

    def close(self) -> None:
        """Nothing to let go of."""


_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
  model TEXT, task TEXT, version INTEGER NOT NULL, state BLOB NOT NULL, PRIMARY KEY (model, task)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (
  position INTEGER PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, task TEXT NOT NULL,
  body TEXT NOT NULL, UNIQUE (kind, key)
);
CREATE INDEX IF NOT EXISTS records_of_model ON records (kind, model, position);
CREATE TABLE IF NOT EXISTS activations (position INTEGER PRIMARY KEY, model TEXT);
"""
_APPLICATION, _VERSION = 0x65636F6D, 1  # "ecom"; SQLite keeps both in the file's header


class SQLiteStore:
    """A ``TaskStore`` in one file, also for several processes on one machine.

    Write-ahead log with ``synchronous=FULL``: a commit is on the disk before ``put`` returns, so neither a killed
    process nor a power cut loses what was acknowledged.
    """

    def __init__(self, path: str | Path):
        """Open or create ``path``. Raises ``ValueError`` if it is something else than such a store, ``OSError`` if it
        cannot be opened."""
        self.path, self._lock = Path(path), threading.Lock()
        try:
            self._database = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
            self._open()
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is no store of served tasks: {error}") from None

    def _open(self) -> None:
        execute = self._database.execute
        owner, version, tables = (
            execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if (tables or owner) and (owner, version) != (_APPLICATION, _VERSION):
            raise sqlite3.DatabaseError(f"application {owner}, version {version}; expected {_APPLICATION}, {_VERSION}")
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=FULL")
        if not tables:
            statements = f"PRAGMA application_id={_APPLICATION};PRAGMA user_version={_VERSION};"
            self._database.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}{statements}COMMIT;")

    def get(self, model: str, task: str) -> tuple[int, bytes] | None:
        """As ``TaskStore.get``."""
        return self._one("SELECT version, state FROM tasks WHERE model = ? AND task = ?", model, task)

    def put(self, model: str, task: str, version: int, state: bytes, records: Sequence[Record] = ()) -> None:
        """As ``TaskStore.put``."""
        with self._lock:
            execute = self._database.execute
            execute("BEGIN IMMEDIATE")
            try:
                if version:
                    update = "UPDATE tasks SET version = ?, state = ? WHERE model = ? AND task = ? AND version = ?"
                    if execute(update, (version + 1, state, model, task, version)).rowcount != 1:
                        raise Conflict(f"task {task!r} is no longer at version {version}")
                else:
                    execute("INSERT INTO tasks VALUES (?, ?, 1, ?)", (model, task, state))
                for record in records:
                    execute("INSERT INTO records (kind, key, model, task, body) VALUES (?, ?, ?, ?, ?)", record)
                execute("COMMIT")
            except BaseException as error:
                if self._database.in_transaction:
                    execute("ROLLBACK")
                if isinstance(error, sqlite3.IntegrityError):
                    raise Conflict(f"task {task!r} exists, or a record does: {error}") from None
                if isinstance(error, sqlite3.OperationalError):
                    raise OSError(f"{self.path}: {error}") from None
                raise

    def record(self, kind: str, key: str) -> Record | None:
        """As ``TaskStore.record``."""
        row = self._one("SELECT kind, key, model, task, body FROM records WHERE kind = ? AND key = ?", kind, key)
        return row and Record(*row)

    def records(self, kind: str, model: str) -> list[Record]:
        """As ``TaskStore.records``."""
        query = "SELECT kind, key, model, task, body FROM records WHERE kind = ? AND model = ? ORDER BY position"
        with self._lock:
            return [Record(*row) for row in self._database.execute(query, (kind, model))]

    def activate(self, model: str | None) -> None:
        """As ``TaskStore.activate``."""
        with self._lock:
            self._database.execute("INSERT INTO activations (model) VALUES (?)", (model,))

    def activations(self) -> list[str | None]:
        """As ``TaskStore.activations``."""
        with self._lock:
            return [row[0] for row in self._database.execute("SELECT model FROM activations ORDER BY position")]

    def close(self) -> None:
        """As ``TaskStore.close``."""
        with self._lock:
            self._database.close()

    def _one(self, query: str, *values: str) -> tuple | None:
        with self._lock:
            return self._database.execute(query, values).fetchone()
