"""Search for settings with Optuna: resumable, with pruning, honest about its winner (chapter "Running experiments").

Tasks from the family's prior are kept apart. Trials are *trained* on the fresh tasks of each iteration and *chosen* by
their score on validation tasks. The best of many noisy numbers is too good, so the winner is *confirmed* with training
seeds that no trial had: on the validation tasks, which shows how much of the number was luck of the seeds, and on more
tasks that chose nothing, which shows how much was luck of the tasks. Nothing here looks at the ``test`` list, which is
left for ``python -m ecomlib evaluate``.
"""

from __future__ import annotations

import signal
import sqlite3
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.exceptions import StorageInternalError
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from tqdm import tqdm

from .config_files import config_hash, differences, read_config, read_toml, validate, write_config
from .configuration import TrainConfig
from .environment import environment
from .evaluation.statistics import Interval, paired_difference, t_interval
from .families.base import check, whole
from .files import locked, remove_unfinished, write_json
from .search_space import chosen, own_value, scores_of, space

VALIDATION, CONFIRMATION = 3_000_000_001, 3_000_000_002
"""Generator seeds of two lists of tasks: not those of ``families.split``, nor of iterations of seeds up to 2,998."""
FRESH_SEED = 1000
"""First training seed of the confirmation; trials have seeds from 0."""
LEAST_FOR_IMPORTANCE = 20
"""Finished trials below which the importance of settings is not told: it would be noise."""
FREE = ("trials", "confirm", "confirmation_tasks")
"""What may change when a search goes on."""
RETRIES = 2
"""How often a trial whose process was killed is tried again: it may be what kills the process."""


@dataclass(frozen=True)
class SearchConfig:
    """A search, besides the settings it starts from. All but ``FREE`` must stay when it goes on."""

    trials: int = 50
    """Finished trials in all, those of earlier calls included."""
    iterations: int = 100
    """Outer steps of a trial."""
    seeds: int = 2
    """Training seeds of a trial; its score is their mean."""
    validation_tasks: int = 200
    """Tasks on which a trial is scored after adaptation: from the prior, neither training tasks nor the test list."""
    reports: int = 5
    """How often a trial is scored on its way, and may be pruned: stopped because it is below the median of the others
    at that iteration. Not in the first two fifths."""
    confirm: int = 5
    """Fresh training seeds for the winner and the settings that the search started from; 0 for no confirmation."""
    confirmation_tasks: int = 1000
    """Tasks of the confirmation, besides the validation tasks."""
    search_seed: int = 0
    """Seed of the sampler (TPE)."""

    def __post_init__(self):
        for name in ("trials", "iterations", "seeds", "reports"):
            check(self, name, lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "seeds", lambda x: whole(x, 1, FRESH_SEED), f"a whole number from 1 to {FRESH_SEED}")
        for name in ("validation_tasks", "confirmation_tasks"):
            check(self, name, lambda x: whole(x, 2), "a whole number >= 2")
        check(self, "confirm", lambda x: x == 0 or whole(x, 2), "0, or a whole number >= 2")
        check(self, "search_seed", lambda x: whole(x, 0, 2**31), "a whole number from 0 to 2147483648")


# ------------------------------------------------------------------------------------------------- the search
class SearchInterrupted(KeyboardInterrupt):
    """The search was asked to stop; the message says how to go on."""


class SearchError(ValueError):
    """A folder that cannot be searched in as asked. The message says why and what to do."""


class SearchResult(NamedTuple):
    """What a search found."""

    trials: list[FrozenTrial]
    """Finished trials: complete, or pruned (diverged ones too)."""
    best: FrozenTrial | None
    """The complete trial with the best score; None if none is complete."""
    config: TrainConfig | None
    """Its settings, with the training seeds of the confirmation."""
    confirmed: dict[str, list[list[float]]]
    """"best" and "start" -> scores of the fresh seeds on the validation tasks, and on the tasks of the confirmation;
    empty without confirmation, without "start" where that is the best."""
    importance: dict[str, float]
    """Setting -> share; empty for too few trials."""

    @property
    def intervals(self) -> dict[str, Interval]:
        """95 % over fresh seeds, of the confirmed scores on either list; and of "best - start", paired by seed."""
        found = {}
        for name, (validation, others) in self.confirmed.items():
            found |= {f"{name}, validation tasks": t_interval(validation), name: t_interval(others)}
        if len(self.confirmed) == 2:
            found["best - start"] = paired_difference(self.confirmed["best"][1], self.confirmed["start"][1])
        return found


class Search:
    """A search in a folder: ``base.toml`` (the settings it starts from), ``search.toml``, ``study.db`` (Optuna's),
    ``best.toml``, ``result.json`` and pictures."""

    def __init__(self, path: str | Path, base: TrainConfig, config: SearchConfig, device: str = "cpu"):
        """Make the folder, or go on with the search that is there. Raises ``SearchError`` naming the setting in which
        that one differs."""
        self.path, self.device, self.config = Path(path), device, config
        self.base = replace(base, iterations=config.iterations, seeds=config.seeds, first_seed=0)
        if saved := saved_search(self.path):
            for name in ("family_name", "algorithm"):
                _refuse_value(name, getattr(self.base, name), getattr(saved[0], name), self.path / "base.toml")
            for file, asked, there in (("search.toml", self.config, saved[1]), ("base.toml", self.base, saved[0])):
                for name, new, old in differences(asked, there):
                    if name not in FREE:
                        _refuse_value(name, new, old, self.path / file)
        elif self.path.exists() and (not self.path.is_dir() or {p.name for p in self.path.iterdir()} - {"base.toml"}):
            raise SearchError(f"{self.path} exists and is no search: name another folder (--search)")
        self.path.mkdir(parents=True, exist_ok=True)
        write_config(self.base, self.path / "base.toml")
        write_config(config, self.path / "search.toml")  # the last sign of a search

    def run(self, progress: bool = True) -> SearchResult:
        """Trials until there are enough finished ones, then the confirmation, and the files.

        Raises ``SearchInterrupted`` (Ctrl-C, SIGTERM), ``SearchError`` (folder in use, damaged database), ``OSError``.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            with locked(self.path, SearchError), _stoppable():
                remove_unfinished(self.path)
                self.study = self._study()
                self._trials(progress)
                return self._result(progress)
        except (sqlite3.DatabaseError, StorageInternalError) as error:
            raise SearchError(f"{self.path / 'study.db'} cannot be used: {str(error).splitlines()[0]}") from None
        except KeyboardInterrupt:
            raise SearchInterrupted(
                f"stopped; {self.path} keeps the finished trials. Go on with: python -m ecomlib search "
                f"{self.base.family_name} --search {self.path}"
            ) from None

    def _study(self) -> optuna.Study:
        """The study in the folder; trials that a killed process left unfinished are queued again."""
        database = (self.path / "study.db").resolve()
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("pragma schema_version")  # fails where the file is no database
        study = optuna.create_study(
            storage=f"sqlite:///{database}",
            study_name="search",
            direction="maximize",
            load_if_exists=True,
            pruner=MedianPruner(n_startup_trials=5, n_warmup_steps=2 * self.config.iterations // 5),
        )
        if not study.trials:
            study.enqueue_trial({name: own_value(self.base, name) for name in space(self.base)})
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            _try_again(study, trial.number, 1)
        return study

    @property
    def finished(self) -> list[FrozenTrial]:
        """Trials that have a result: a score, or that they were pruned."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def _trials(self, progress: bool) -> None:
        done = len(self.finished)
        bar = tqdm(total=self.config.trials, initial=done, desc="search", unit="trial", disable=not progress)
        with bar:
            while len(self.finished) < self.config.trials:
                # A sampler for each trial, so that a search that went on draws what an uninterrupted one would.
                seed = self.config.search_seed * 1_000_003 + len(self.study.get_trials(deepcopy=False))
                self.study.sampler = TPESampler(seed=seed % 2**32)
                trial = self.study.ask(fixed_distributions=space(self.base))
                try:
                    value = self._score(trial, progress)
                    self.study.tell(trial, value)
                except optuna.TrialPruned:
                    self.study.tell(trial, state=TrialState.PRUNED)
                except FloatingPointError as error:  # as bad as it gets, and worth knowing for the sampler
                    trial.set_user_attr("diverged", str(error))
                    self.study.tell(trial, state=TrialState.PRUNED)
                except BaseException as error:
                    _try_again(self.study, trial.number, 0 if isinstance(error, KeyboardInterrupt) else 1)
                    raise
                if best := self._best():
                    bar.set_postfix({"best": f"{best.value:.3f}"}, refresh=False)
                bar.update()

    def _score(self, trial: optuna.Trial, progress: bool) -> float:
        config = chosen(self.base, trial.params)
        last, reports = self.config.iterations, self.config.reports
        milestones = sorted({max(1, last * k // reports) for k in range(1, reports + 1)})

        def report(iteration: int, score: float) -> None:
            trial.report(score, iteration)
            if iteration < last and trial.should_prune():
                raise optuna.TrialPruned

        total, name = last * len(config.groups), f"trial {trial.number}"
        with tqdm(total=total, desc=name, unit="it", leave=False, disable=not progress) as bar:
            (scores,) = scores_of(config, self.base, [self._validation], self.device, milestones, report, bar.update)
        trial.set_user_attr("scores", scores)
        return sum(scores) / len(scores)

    def _best(self) -> FrozenTrial | None:
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return max(complete, key=lambda trial: trial.value, default=None)

    # ------------------------------------------------------------------------------------ afterwards
    def _result(self, progress: bool) -> SearchResult:
        best = self._best()
        result = SearchResult(self.finished, best, None, {}, self._importance())
        if best is not None:
            fresh = replace(self.base, first_seed=FRESH_SEED, seeds=self.config.confirm or self.config.seeds)
            confirmed = {}
            if self.config.confirm:
                confirmed["best"] = self._confirmed(chosen(fresh, best.params), progress)
                if chosen(fresh, best.params) != fresh:
                    confirmed["start"] = self._confirmed(fresh, progress)
            result = result._replace(config=chosen(fresh, best.params), confirmed=confirmed)
            write_config(result.config, self.path / "best.toml")
        write_json(self.path / "result.json", self._description(result))
        return result

    @property
    def _validation(self) -> tuple[int, int]:
        return VALIDATION, self.config.validation_tasks

    def _confirmed(self, config: TrainConfig, progress: bool) -> list[list[float]]:
        """Scores of fresh seeds on the validation tasks and on others, computed once."""
        lists = [self._validation, (CONFIRMATION, self.config.confirmation_tasks)]
        key = f"confirmed {config_hash(config)} on {lists}"
        if key not in self.study.user_attrs:
            total = config.iterations * len(config.groups)
            with tqdm(total=total, desc="confirmation", unit="it", leave=False, disable=not progress) as bar:
                try:
                    scores = scores_of(config, self.base, lists, self.device, [config.iterations], None, bar.update)
                except FloatingPointError as error:
                    raise FloatingPointError(f"the confirmation with fresh seeds: {error}") from None
            self.study.set_user_attr(key, scores)
        return self.study.user_attrs[key]

    def _importance(self) -> dict[str, float]:
        """PED-ANOVA (Watanabe, Bansal and Hutter 2023): how much each setting tells the best tenth of the trials from
        all. It asks only which trials are the best, so a pruned one counts with its score when it was stopped."""
        finished = self.finished
        lowest = min((t.value for t in finished if t.value is not None), default=0.0)
        if len(finished) < LEAST_FOR_IMPORTANCE or len({t.value for t in finished}) < 2:
            return {}
        ranked = optuna.create_study(direction="maximize")
        for t in finished:
            value = lowest if t.value is None else t.value
            ranked.add_trial(create_trial(params=t.params, distributions=t.distributions, value=value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return dict(get_param_importances(ranked, evaluator=PedAnovaImportanceEvaluator()))

    def _description(self, result: SearchResult) -> dict[str, Any]:
        states, best = [t.state for t in result.trials], None
        if t := result.best:
            best = {"number": t.number, "score": t.value, "by seed": t.user_attrs["scores"], "values": t.params}
        return {
            "format": "ecomlib search",
            "version": 1,
            "family": self.base.family_name,
            "algorithm": self.base.algorithm,
            "start": config_hash(self.base),
            "search": asdict(self.config),
            "trials": {
                "complete": states.count(TrialState.COMPLETE),
                "pruned": sum(t.state == TrialState.PRUNED and "diverged" not in t.user_attrs for t in result.trials),
                "diverged": sum("diverged" in t.user_attrs for t in result.trials),
            },
            "best": best,
            "confirmed with fresh seeds": result.confirmed,
            "intervals": {name: interval._asdict() for name, interval in result.intervals.items()},
            "importance": result.importance,
            "environment": environment(self.device),
        }


def _try_again(study: optuna.Study, number: int, failures: int) -> None:
    """Give up an unfinished trial and queue its settings, unless it failed too often."""
    trial = study.get_trials(deepcopy=False)[number]
    failed = trial.user_attrs.get("failed", 0) + failures
    study.tell(number, state=TrialState.FAIL)
    if trial.params and failed <= RETRIES:
        study.enqueue_trial(trial.params, user_attrs={"failed": failed})


def saved_search(path: Path) -> tuple[TrainConfig, SearchConfig] | None:
    """The settings of the search in a folder, None where there is none. Raises ``ValueError`` for damaged files."""
    if not (path / "search.toml").exists() or not (path / "base.toml").exists():
        return None
    return read_config(path / "base.toml"), validate(SearchConfig, read_toml(path / "search.toml"), str(path))


def _refuse_value(name: str, new: Any, old: Any, file: Path) -> None:
    if new != old:
        raise SearchError(
            f"{name} = {new} contradicts {file}, where it is {old}: leave the flag out to go on with that search, or "
            "name another folder (--search)"
        )


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM is treated as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
