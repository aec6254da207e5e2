"""Engines and a store put together: read the task, ask the engine, write the task, answer (chapter "Shipping a
policy")."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..families.base import number, require
from .drift import Drift, drift_test
from .engine import Engine
from .state import Decision, TaskState, pack, unpack
from .store import Conflict, Record, TaskStore

RETRIES = 20
"""Attempts at a task that others keep changing."""
SMALLEST = 8
"""Tasks that a drift test needs: with fewer, even the clearest drift has a p-value above 1 %."""
T = TypeVar("T")


class UnknownDecision(ValueError):
    """Feedback on a decision that was never made, or by a model that is not loaded."""


class UnknownTask(ValueError):
    """The task has not been decided on."""


class AlreadyAnswered(ValueError):
    """Other feedback on the decision is recorded."""


class Busy(RuntimeError):
    """Too many requests for one task at the same moment."""


class Service:
    """Several models, one of which answers; every model keeps tasks of its own.

    A model that the store has not seen is activated when the service starts, in the order given, so that a new run
    answers at once; otherwise the store remembers which one answers, also after a rollback. Feedback goes to the model
    that decided. ``level`` is that of the drift test.
    """

    def __init__(self, engines: Sequence[Engine], store: TaskStore, level: float = 0.01):
        require(len(engines) > 0, "engines", len(engines), "at least one")
        require(number(level, 0, 1), "level", level, "a number in (0, 1)")
        self.engines, self.store, self.level = {engine.version: engine for engine in engines}, store, level
        known = set(store.activations())
        for version in self.engines:
            if version not in known:
                store.activate(version)
        if self.model not in self.engines:
            raise ValueError(
                f"the store's model {self.model} is not among those loaded, {', '.join(self.engines)}: add its run"
            )

    @property
    def activations(self) -> list[str]:
        """Models in the order of activation, without those taken back: the last one answers."""
        history: list[str] = []
        for model in self.store.activations():
            if model is not None:
                history.append(model)
            elif len(history) > 1:
                history.pop()
        return history

    @property
    def model(self) -> str:
        """Version of the model that answers."""
        return self.activations[-1]

    def decide(self, task: str, unit_cost: float) -> dict[str, Any]:
        """A price for the task's next day. Raises what ``Engine.begin`` and ``Engine.decide`` do, or ``Busy``."""

        def attempt() -> dict[str, Any]:
            engine = self.engines[self.model]
            version, state = self._read(engine, task)
            state, decision = engine.decide(state, unit_cost)
            answer = self._answer(engine, task, decision)
            record = Record("decision", decision.id, engine.version, task, json.dumps(answer))
            self.store.put(engine.version, task, version, pack(state), [record])
            return answer

        return self._retried(task, attempt)

    def feedback(self, decision: str, units: int) -> dict[str, Any]:
        """Units sold at a decision's price; the task may adapt. The same feedback again gets the same answer.

        Raises ``UnknownDecision``, ``AlreadyAnswered`` where other units are recorded, ``ValueError`` for bad units,
        or ``Busy``.
        """
        named = isinstance(decision, str) and decision.isprintable()
        found = self.store.record("decision", decision) if named else None
        if found is None:
            raise UnknownDecision(f"decision = {decision!r}; allowed: the id of a decision that was made here")
        if found.model not in self.engines:
            raise UnknownDecision(f"decision = {decision!r} was made by {found.model}, which is not loaded")
        engine = self.engines[found.model]

        def attempt() -> dict[str, Any]:
            version, state = self._read(engine, found.task)
            if state.open is None or state.open.id != decision:
                return self._recorded(decision, units)
            state, feedback = engine.feedback(state, units)
            answer = {"decision": decision, "units": int(units), **feedback._asdict()}
            records = [Record("feedback", decision, found.model, found.task, json.dumps(answer))]
            if feedback.episode is not None:
                key = json.dumps([found.model, found.task, feedback.episode])
                body = {"episode": feedback.episode, "reward": feedback.episode_reward, "stage": feedback.stage}
                records.append(Record("episode", key, found.model, found.task, json.dumps(body)))
            self.store.put(found.model, found.task, version, pack(state), records)
            return answer

        return self._retried(found.task, attempt)

    def task(self, task: str) -> dict[str, Any]:
        """Where a task stands under the model that answers. Raises ``UnknownTask``, or ``ValueError`` for no name."""
        engine = self.engines[self.model]
        engine.begin(task)  # checks the name
        found = self.store.get(engine.version, task)
        if found is None:
            raise UnknownTask(f"task = {task!r}; allowed: a task that model {engine.version} has decided on")
        state = unpack(found[1])
        return {
            "task": task,
            "model": engine.version,
            "episode": state.answered // engine.family.days,
            "day": state.answered % engine.family.days,
            "inner_steps": state.stage,
            "diverged": state.diverged,
            "open": None if state.open is None else self._answer(engine, task, state.open),
            "bytes": len(found[1]),
        }

    def health(self) -> dict[str, Any]:
        """Which model answers, and whether its tasks earn what they did. Reads the log of all episodes: ask once in a
        while, not with every request."""
        drift = self.drift()
        return {
            "status": "ok",
            "model": self.model,
            "loaded": list(self.engines),
            "activations": self.activations,
            "drift": None if drift is None else drift._asdict() | {"level": self.level},
        }

    def drift(self) -> Drift | None:
        """The test on each task's first and last complete episode with its final parameters; None below ``SMALLEST``
        such tasks."""
        model, rewards = self.model, {}
        for record in self.store.records("episode", model):
            body = json.loads(record.body)
            if body["stage"] == self.engines[model].steps:
                rewards.setdefault(record.task, []).append(max(body["reward"], 0.0))
        pairs = [(earned[0], earned[-1]) for earned in rewards.values() if len(earned) > 1]
        return drift_test(*zip(*pairs), self.level) if len(pairs) >= SMALLEST else None

    def activate(self, model: str) -> str:
        """Let a loaded model answer."""
        require(model in self.engines, "model", model, ", ".join(self.engines))
        if model != self.model:
            self.store.activate(model)
        return self.model

    def rollback(self) -> str:
        """Let the model answer that did so before the present one. Its tasks are as it left them."""
        history = self.activations
        if len(history) < 2:
            raise ValueError(f"model {history[-1]} is the first; there is none to go back to")
        if history[-2] not in self.engines:
            raise ValueError(f"model {history[-2]} answered before, and is not loaded: start the service with its run")
        self.store.activate(None)
        return self.model

    def _recorded(self, decision: str, units: int) -> dict[str, Any]:
        recorded = self.store.record("feedback", decision)
        if recorded is None:  # the task was read before another process decided
            raise Conflict(decision)
        answer = json.loads(recorded.body)
        if type(units) is not int or answer["units"] != units:
            allowed = f"{answer['units']}, which is recorded already"
            raise AlreadyAnswered(f"units = {units!r} for decision {decision!r}; allowed: {allowed}")
        return answer

    def _read(self, engine: Engine, task: str) -> tuple[int, TaskState]:
        state = engine.begin(task)  # checks the name
        found = self.store.get(engine.version, task)
        return (0, state) if found is None else (found[0], unpack(found[1]))

    def _answer(self, engine: Engine, task: str, decision: Decision) -> dict[str, Any]:
        named = decision._asdict()
        return {"decision": named.pop("id"), "task": task, "model": engine.version, **named}

    def _retried(self, task: str, attempt: Callable[[], T]) -> T:
        for _ in range(RETRIES):
            try:
                return attempt()
            except Conflict:
                continue
        raise Busy(f"task = {task!r} is being changed by too many requests at once; try again")
