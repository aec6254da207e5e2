"""A small service that decides, learns from feedback and survives restarts (chapter "Shipping a policy").

``state``: what it remembers of a task. ``engine``: state and request in, answer and state out; knows no web and no
disk. ``store``: keeps states. ``service``: puts the two together. ``drift``: has the market changed? ``app``: HTTP.
"""

from .drift import Drift, drift_test
from .engine import Engine, Feedback, OpenDecision
from .service import AlreadyAnswered, Busy, Service, UnknownDecision, UnknownTask
from .state import Decision, TaskState
from .store import Conflict, MemoryStore, Record, SQLiteStore, TaskStore

__all__ = [
    "AlreadyAnswered",
    "Busy",
    "Conflict",
    "Decision",
    "Drift",
    "Engine",
    "Feedback",
    "MemoryStore",
    "OpenDecision",
    "Record",
    "SQLiteStore",
    "Service",
    "TaskState",
    "TaskStore",
    "UnknownDecision",
    "UnknownTask",
    "drift_test",
]
