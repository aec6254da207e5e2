"""The experiments of part "Cases": what meta-learning buys on a task family, next to classical policies and to policy
gradients without meta-learning, on the same tasks with the same luck.

    python -m benchmarks.case_studies pricing                          # everything that the file does not hold yet
    python -m benchmarks.case_studies pricing --parts baselines cost   # these parts only
    python -m benchmarks.case_studies pricing --parts runs --again     # once more, from the beginning
    python -m benchmarks.case_studies pricing --quick --json FILE --runs FOLDER    # tiny sizes: does it run?

A trial is E rounds of N units of a task. Gradient learners take an inner step after every round, classical agents learn
after every step; both pool the N units. Settings are tuned, and the best method of a kind is chosen, on training tasks.
The file is described in ``benchmarks/results/README.md`` and read by ``ecomlib.evaluation.case_studies.load_case``.

A part that is in the file is skipped unless ``--again``; a training that was stopped goes on. Returns of single tasks
are kept under build/case_studies, and are made again where they are missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks import measure
from benchmarks.case_costs import decision_costs, explanations, training_episodes
from benchmarks.case_methods import (
    KNOW_THE_PRIOR,
    MAIN_UNITS,
    PROTOCOLS,
    QUICK,
    REFERENCES,
    Protocol,
    Returns,
    Setting,
    TaskPool,
    classical,
    difference,
    name_of,
    plain,
    played,
    scores,
    setting,
    starts,
    trained,
    training,
)
from ecomlib.configuration import FAMILIES, TrainConfig, default_config
from ecomlib.evaluation.case_studies import CASE_FORMAT, CaseStudy
from ecomlib.files import write_json
from ecomlib.learners import MAML
from ecomlib.runs import Run, load_run
from ecomlib.training import train

PARTS = ("baselines", "runs", "no meta", "training tasks", "cost", "goal")
CASES = ("pricing", "inventory", "bidding", "recommendation")
ALGORITHMS = ("rl-maml", "ppo-maml", "trpo-maml", "fomaml", "reptile")
OTHER_UNITS = ("ppo-maml", "reptile")
"""Algorithms that are also trained with the other numbers of units."""
KEEP_CURVES = ("ppo-maml-5", "reptile-5")
"""Runs whose metrics stay in their folder; those of the others, a hundred times the size of the rest, go."""
POOLS = (5, 20, 100)
"""Distinct training tasks of a seed; without a pool every iteration has new ones."""
LR_FACTORS = (0.0625, 0.25, 1.0, 4.0, 16.0)
"""Inner step sizes tried for a start that was not meta-learned, times the meta-learner's."""


class Study:
    """A family's case study: its lists of tasks, its file, and the returns of single tasks."""

    def __init__(self, name: str, protocol: Protocol, path: Path, runs: Path, cache: Path):
        self.name, self.protocol, self.path, self.runs, self.cache = name, protocol, path, runs, cache
        self.family = default_config(name, "ppo-maml").family
        self.fresh = False  # made anew in this call: nothing of the cache is used
        self._settings: dict[str, Setting] = {}
        self._agents = None
        about = asdict(protocol) | {"pace of drift": protocol.pace}
        self.content = {"format": CASE_FORMAT, "version": 1, "family": name, "protocol": about, "parts": {}}
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["protocol"] != json.loads(json.dumps(about)):
                raise SystemExit(f"{path} has another protocol: delete it, or name another file with --json")
            self.content = stored

    @property
    def parts(self) -> dict[str, Any]:
        """Of the file."""
        return self.content["parts"]

    def setting(self, name: str) -> Setting:
        """A list of tasks, made once."""
        if name not in self._settings:
            self._settings[name] = setting(self.family, name, self.protocol)
        return self._settings[name]

    def agents(self):
        """The classical methods, made once: the empirical prior takes a while."""
        if self._agents is None:
            self._agents = classical(self.family, self.name, self.protocol)
        return self._agents

    # -------------------------------------------------------------------------------------------- returns
    def returns(self, key: str, split: str, units: int, compute: Any) -> Returns:
        """Returns of a method, from the cache where they are."""
        file = self.cache / f"{key.replace(' ', '-').replace(',', '')}-{split.replace(' ', '-')}-{units}.npz"
        stamp = json.dumps([asdict(self.protocol), repr(self.family)])
        if file.exists() and not self.fresh:
            stored = np.load(file, allow_pickle=False)
            if str(stored["stamp"]) == stamp:
                return Returns(stored["values"], stored["diverged"], bool(stored["trained"]))
        found = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, stamp=np.array(stamp), **found._asdict())
        return found

    def of_agent(self, method: str, split: str, units: int, value: float | None = None) -> Returns:
        """Returns of a classical method; ``value`` overrides what was tuned."""
        fixed, tunable = self.agents()
        if method in fixed:
            make = lambda: fixed[method](units)
        else:
            value = self.chosen(method, units) if value is None else value
            make = lambda: tunable[method].build(units, value)
        key = method if method in fixed else f"{method}-{value}"
        where = self.setting(split)
        return self.returns(key, split, units, lambda: Returns.of_agent(played(make(), where, units, self.protocol)))

    def chosen(self, method: str, units: int) -> float:
        """What was tuned."""
        tuned = self.tuned if method not in self._stored_tuned() else self._stored_tuned()
        return tuned[method][units]

    def _stored_tuned(self) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for entry in self.parts.get("baselines", {}).get("tuned", []):
            found.setdefault(entry["method"], {})[entry["units"]] = entry["chosen"]
        return found

    # -------------------------------------------------------------------------------------------- baselines
    def baselines(self) -> dict[str, Any]:
        """Classical methods on every list with every number of units."""
        self.parts.pop("baselines", None)
        fixed, tunable = self.agents()
        self.tuned: dict[str, dict[int, float]] = {name: {} for name in tunable}
        result: dict[str, Any] = {"scores": [], "tuned": [], "best on training tasks": {}}
        result["best on drifting training tasks"], result["best without the prior"] = {}, {}
        lists, everything = ("train", "drifting train", *self.protocol.splits), [*fixed, *tunable]
        few = [m for m in fixed if m != "empirical Thompson"] if self.protocol.few else everything
        count = lambda own: len(own) * len(lists) + sum(len(t.grid) for m, t in tunable.items() if m in own)
        main, others = count(everything), (len(self.protocol.units) - 1) * count(few)
        with tqdm(total=main + others, desc=f"{self.name}, baselines", unit="trial") as bar:
            for units in self.protocol.units:
                methods = everything if units == self.main_units else few
                for method, t in [(m, t) for m, t in tunable.items() if m in methods]:
                    lifetimes = []
                    for value in t.grid:
                        found = self.of_agent(method, t.on, units, value)
                        lifetimes.append(scores(found, self.setting(t.on))["lifetime"]["score"])
                        bar.update()
                    self.tuned[method][units] = t.grid[int(np.argmax(lifetimes))]
                    result["tuned"].append({
                        "method": method, "units": units, "setting": t.setting, "grid": list(t.grid), "on": t.on,
                        "training score": lifetimes, "chosen": self.tuned[method][units],
                    })  # fmt: skip
                on_training: dict[str, dict[str, float]] = {}
                for split in lists:
                    for method in methods:
                        found = scores(self.of_agent(method, split, units), self.setting(split))
                        bar.update()
                        if split in self.protocol.splits:
                            kind = "reference" if method in REFERENCES else "classical"
                            entry = {"method": method, "kind": kind, "split": split, "units": units}
                            result["scores"].append(entry | found)
                        else:
                            on_training.setdefault(split, {})[method] = found["lifetime"]["score"]
                choices = {
                    "best on training tasks": ("train", REFERENCES),
                    "best on drifting training tasks": ("drifting train", REFERENCES),
                    "best without the prior": ("train", (*REFERENCES, *KNOW_THE_PRIOR)),
                }
                for title, (split, without) in choices.items():
                    among = {m: score for m, score in on_training[split].items() if m not in without}
                    result[title][str(units)] = max(among, key=among.get) if among else None
        return result

    def rivals(self, split: str, units: int) -> dict[str, str]:
        """Whom a trained method is compared with: the best classical method on training tasks (on drifting ones, where
        the test's drift), and the best of those that are not given the prior."""
        part = self.parts["baselines"]
        best = part["best on drifting training tasks" if split == "drifting" else "best on training tasks"]
        found = {"best": best[str(units)], "without the prior": part["best without the prior"][str(units)]}
        return {name: method for name, method in found.items() if method}

    # -------------------------------------------------------------------------------------------- training
    def train(self, config: TrainConfig, name: str) -> Run:
        """The run in ``runs/FAMILY/name``, trained if it is not there; with only what a reader needs kept."""
        path = self.runs / self.name / name
        if self.fresh and (path / "config.toml").exists():
            shutil.rmtree(path)
        if (path / "result.json").exists():
            run = Run.open(path)
            if run.config != config:
                raise SystemExit(f"{path} holds a run of other settings: --again trains it anew")
            return run
        began, said = time.process_time(), sys.argv
        sys.argv = ["ecomlib", *train_command(config, name)]  # what the run's own record says
        try:
            run = train(config, path, resume=(path / "config.toml").exists())
        finally:
            sys.argv = said
        seconds = (time.process_time() - began) / config.seeds
        curve = training_curve(run)
        write_json(path / "cost.json", {"processor seconds of a seed": round(seconds, 2), "training score": curve})
        shutil.rmtree(path / "tensorboard", ignore_errors=True)
        if name not in KEEP_CURVES:
            run.metrics_path.unlink(missing_ok=True)
        return run

    def metas(self, run: Run) -> list[list[Tensor]]:
        """Meta-parameters of every seed."""
        return [load_run(run.path, seed).meta for seed in range(self.protocol.seeds)]

    def learner(self, config: TrainConfig, lr: Any = None) -> MAML:
        """The learner, with another inner step size if given."""
        learner = config.learner()
        inner = learner.inner if lr is None else replace(learner.inner, steps=1, lr=lr, learn_lr=False)
        return MAML(learner.policy, inner, learner.outer, replace(learner.config, stage_weights=None))

    def plan(self) -> list[tuple[str, str, TrainConfig, int]]:
        """(method, name of the run, configuration, units) of every meta-training."""
        found = []
        for units in self.protocol.units:
            for algorithm in ALGORITHMS if units == self.main_units else OTHER_UNITS:
                config = training(self.name, algorithm, units, self.protocol)
                found.append((name_of(algorithm), f"{algorithm}-{units}", config, units))
        rounds, config = self.protocol.rounds, training(self.name, "ppo-maml", self.main_units, self.protocol)
        data = replace(config.data, stage_weights=(1.0,) * rounds, tasks=max(2, config.data.tasks // 2))
        lr = config.inner.lr if isinstance(config.inner.lr, float) else config.inner.lr[0]
        config = replace(config, data=data, inner=replace(config.inner, steps=rounds - 1, lr=lr))
        name = f"ppo-maml-all-rounds-{self.main_units}"
        return [*found, ("PPO-MAML, all rounds", name, config, self.main_units)]

    @property
    def main_units(self) -> int:
        """Units of the comparisons that are made with one number only."""
        return MAIN_UNITS if MAIN_UNITS in self.protocol.units else self.protocol.units[-1]

    def of_run(self, name: str, config: TrainConfig, metas: Any, split: str, lr: Any = None, adapts: bool = True):
        """Returns of trained policies on a list."""
        where = self.setting(split)
        play = lambda: Returns(*trained(self.learner(config, lr), metas, where, self.protocol, adapts), True)
        return self.returns(name if lr is None else f"{name}-{lr}", split, config.data.episodes, play)

    def entries(self, method: str, kind: str, units: int, of: Any, **more: Any) -> tuple[list, list]:
        """Scores on every list, and differences from the rivals; ``of`` is split -> returns."""
        found, differences = [], []
        for split in self.protocol.splits:
            where, returns = self.setting(split), of(split)
            about = {"method": method, "kind": kind, "split": split, "units": units}
            found.append(about | scores(returns, where) | more)
            for rival, other in self.rivals(split, units).items():
                for part in ("lifetime", "last round"):
                    lead = difference(returns, self.of_agent(other, split, units), where, part)
                    differences.append(about | {"rival": rival, "against": other} | lead)
        return found, differences

    def meta_runs(self) -> dict[str, Any]:
        """Meta-learners."""
        result: dict[str, Any] = {"scores": [], "differences": [], "training scores": [], "runs": {}}
        for method, name, config, units in self.plan():
            run = self.train(config, name)
            metas = self.metas(run)
            of = lambda split, name=name, config=config, metas=metas: self.of_run(name, config, metas, split)
            found, differences = self.entries(method, "meta", units, of, run=f"{self.name}/{name}")
            result["scores"] += found
            result["differences"] += differences
            on_training = scores(of("train"), self.setting("train"))
            result["training scores"].append({
                "method": method, "units": units, "last round": on_training["rounds"][-1]["score"],
                "lifetime": on_training["lifetime"]["score"],
            })  # fmt: skip
            result["runs"][name] = json.loads((run.path / "cost.json").read_text())
        return result

    def no_meta(self) -> dict[str, Any]:
        """Policy gradients from starts that were not meta-learned, and policies that never adapt."""
        result: dict[str, Any] = {"scores": [], "differences": [], "tuned": [], "runs": {}}
        units = self.main_units
        base = training(self.name, "ppo-maml", units, self.protocol)
        changes = {"inner.steps": 0, "data.stage_weights": None}
        average = training(self.name, "ppo-maml", units, self.protocol, **changes)
        run = self.train(average, f"average-{units}")
        result["runs"][f"average-{units}"] = json.loads((run.path / "cost.json").read_text())
        fixed = {"average policy": ("average", average, self.metas(run))}
        if base.policy.inputs is not None and units > 1:
            changes |= {"policy.inputs": None, "data.advantage": "leave_one_out"}
            config = training(self.name, "ppo-maml", units, self.protocol, **changes)
            run = self.train(config, f"average-sees-all-{units}")
            result["runs"][f"average-sees-all-{units}"] = json.loads((run.path / "cost.json").read_text())
            fixed["average policy, sees all"] = ("average-sees-all", config, self.metas(run))
        begins = {"from scratch": starts(base.learner(), self.protocol.seeds),
                  "pre-trained, fine-tuned": fixed["average policy"][2]}  # fmt: skip
        lr = base.inner.lr if isinstance(base.inner.lr, float) else base.inner.lr[0]
        for method, metas in begins.items():
            of = lambda split, rate, m=method, metas=metas: self.of_run(m, base, metas, split, rate)
            grid = [lr * factor for factor in LR_FACTORS]
            found = [scores(of("train", rate), self.setting("train"))["lifetime"]["score"] for rate in grid]
            best = grid[int(np.argmax([-np.inf if x is None else x for x in found]))]
            result["tuned"].append({
                "method": method, "units": units, "setting": "inner step size", "grid": grid, "on": "train",
                "training score": found, "chosen": best,
            })  # fmt: skip
            more = self.entries(method, "no meta", units, lambda split, of=of, best=best: of(split, best))
            result["scores"] += more[0]
            result["differences"] += more[1]
        for method, (key, config, metas) in fixed.items():
            of = lambda split, key=key, config=config, metas=metas: self.of_run(key, config, metas, split, adapts=False)
            more = self.entries(method, "no meta", units, of)
            result["scores"] += more[0]
            result["differences"] += more[1]
        return result

    def training_tasks(self) -> dict[str, Any]:
        """PPO-MAML that meets few distinct tasks in training, each seed its own."""
        units, seeds, result = self.main_units, self.protocol.seeds, {"scores": []}
        config = training(self.name, "ppo-maml", units, self.protocol)
        run = self.train(config, f"ppo-maml-{units}")
        metas: dict[int | None, Any] = {None: self.metas(run)}
        for size in POOLS:
            learner = config.learner()
            pool = TaskPool(config.family, size, seeds)
            state = learner.meta_train(pool, tuple(range(seeds)), config.iterations, progress=True)
            metas[size] = [[p[s] for p in state.meta] for s in range(seeds)]
        for size, theta in metas.items():
            for split in self.protocol.splits:
                about = {"method": "PPO-MAML", "kind": "meta", "split": split, "units": units, "training tasks": size}
                name = f"ppo-maml-{units}" if size is None else f"ppo-maml-pool-{size}"
                result["scores"].append(about | scores(self.of_run(name, config, theta, split), self.setting(split)))
        return result

    def cost(self) -> dict[str, Any]:
        """Training, adapting and deciding."""
        units, costs = self.main_units, []
        fixed, tunable = self.agents()
        logged = self.protocol.logged_tasks * self.protocol.logged_episodes
        for method in [m for m in (*fixed, *tunable) if m not in REFERENCES]:
            make = lambda m=method: fixed[m](units) if m in fixed else tunable[m].build(units, self.chosen(m, units))
            episodes = logged if "empirical" in method else 0
            about = {"method": method, "kind": "classical", "units": units, "training_seconds": 0.0}
            costs.append(about | {"training_episodes": episodes} | decision_costs(make(), self.setting("test"), units))
        own = {m: (n, c) for m, n, c, u in self.plan() if u == units}
        average = training(
            self.name, "ppo-maml", units, self.protocol, **{"inner.steps": 0, "data.stage_weights": None}
        )
        own["average policy"] = (f"average-{units}", average)
        for method, (name, config) in own.items():
            kind = "no meta" if method == "average policy" else "meta"
            seconds = json.loads((self.runs / self.name / name / "cost.json").read_text())
            about = {"method": method, "kind": kind, "units": units}
            about |= {"training_seconds": seconds["processor seconds of a seed"]}
            meta = self.metas(Run.open(self.runs / self.name / name))[0]
            about |= {"training_episodes": training_episodes(config)}
            learner = self.learner(config)
            costs.append(about | decision_costs(learner, self.setting("test"), units, meta))
        return {"costs": plain(costs)}

    def goal(self) -> dict[str, Any]:
        """Whether a meta-learner, chosen on training tasks, reaches the goal on test tasks; and why, or why not."""
        units, part = self.main_units, self.parts["runs"]
        case = CaseStudy(self.name, self.content["protocol"], self.parts)
        chosen = {of: case.best_meta(units, of) for of in ("last round", "lifetime")}
        at = {e["method"]: e for e in part["scores"] if (e["split"], e["units"]) == ("test", units)}
        last = {"method": chosen["last round"]} | at[chosen["last round"]]["rounds"][-1]
        mine = lambda d: (d["method"], d["split"], d["units"], d["of"], d["rival"])
        wanted = (chosen["lifetime"], "test", units, "lifetime", "best")
        lead = next(d for d in part["differences"] if mine(d) == wanted)
        lead = {name: lead[name] for name in ("method", "against", "difference", "seeds", "tasks")}
        above = min(lead[over][0] for over in ("seeds", "tasks") if lead[over] is not None) > 0
        near = last["score"] is not None and last["score"] >= 0.9
        name, config = next((n, c) for m, n, c, u in self.plan() if (m, u) == (chosen["last round"], units))
        metas = self.metas(Run.open(self.runs / self.name / name))
        why = explanations(self.learner(config), metas, self.setting("test"), units, self.protocol)
        return {
            "units": units, "split": "test", "reached": near or above,
            "nine tenths of the gap in the last round": near, "lifetime above the best classical": above,
            "last round": last, "lifetime difference": lead,
            "explanations": [{"method": chosen["last round"]} | row for row in why],
        }  # fmt: skip

    # -------------------------------------------------------------------------------------------- parts
    def make(self, part: str, again: bool) -> None:
        """Make a part and write the file, unless it is there."""
        if part in self.parts and not again:
            print(f"{self.name}, {part}: in {self.path} already")
            return
        self.fresh = again
        methods = {"baselines": self.baselines, "runs": self.meta_runs, "no meta": self.no_meta,
                   "training tasks": self.training_tasks, "cost": self.cost, "goal": self.goal}  # fmt: skip
        began = time.process_time()
        print(f"{self.name}, {part}")
        found = methods[part]()
        self.fresh = False
        environment = measure.environment("case_studies", "cpu") | measure.conditions()
        environment["processor seconds"] = round(time.process_time() - began, 1)
        self.parts[part] = {"provenance": environment, **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


def train_command(config: TrainConfig, name: str) -> list[str]:
    """The command line that trains a configuration: the flags that differ from the defaults."""
    words = ["train", config.family_name, "--algorithm", config.algorithm]
    default = default_config(config.family_name, config.algorithm)
    for key, value, before in flags(config, default):
        if value != before:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{key}".replace("_", "-"), *map(str, values)]
    return [*words, "--run", f"benchmarks/results/runs/{config.family_name}/{name}"]


def flags(config: Any, default: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(name, value, default) of every setting."""
    found = []
    for key, value in vars(config).items():
        before = getattr(default, key)
        if hasattr(value, "__dataclass_fields__") and type(value) is type(before) and key != "family":
            found += flags(value, before, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value, before))
    return found


def training_curve(run: Run, points: int = 20) -> list[list[float | None]]:
    """[last iteration, score] of so many stretches of training, on training tasks, all seeds together."""
    rows, last = run.metrics(), run.config.iterations
    edges = np.linspace(0, last, min(points, last) + 1).round().astype(int)
    stretches = [(b, [r for r in rows if a < r["iteration"] <= b]) for a, b in zip(edges, edges[1:])]
    return [[int(b), plain(run.score(stretch))] for b, stretch in stretches]


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=[f for f in CASES if f in FAMILIES])
    names = [part.replace(" ", "-") for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--again", action="store_true", help="make these parts anew")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; needs --json and --runs")
    parser.add_argument("--json", type=Path)
    results = Path(__file__).parent / "results"
    parser.add_argument("--runs", type=Path, default=results / "runs")
    arguments = parser.parse_args()
    if arguments.quick and (arguments.json is None or arguments.runs == results / "runs"):
        parser.error("--quick needs --json and --runs: its numbers are no results")
    torch.set_num_threads(1)
    path = arguments.json or results / "case_studies" / f"{arguments.family}.json"
    own = arguments.family if arguments.json is None else f"{arguments.family}-{path.stem}-elsewhere"
    cache = Path("build") / "case_studies" / own
    protocol = QUICK if arguments.quick else PROTOCOLS[arguments.family]
    study = Study(arguments.family, protocol, path, arguments.runs, cache)
    for part in PARTS:
        if part.replace(" ", "-") in arguments.parts:
            study.make(part, arguments.again)


if __name__ == "__main__":
    main()
