"""Bernoulli bandits: what each method earns on 20,000 instances, next to the exact optimum where there is one.

    python -m benchmarks.bandits 10 5                           # pulls, arms: what its file does not hold yet
    python -m benchmarks.bandits 10 5 --parts baselines --again # these parts only, anew
    python -m benchmarks.bandits --summary                      # the table of all stored settings
    python -m benchmarks.bandits 10 5 --quick --folder FOLDER   # tiny sizes: does it run?

The settings are those of Duan et al. (2016): chances uniform on [0, 1], one episode of n pulls, no discount. Instances
are the first 20,000 of split ``test``; every method meets the same, with the same luck. A mean is given three times:
of the rewards; of their means given what was seen before (``exact_bandits.posterior_reward``), which has less noise;
and, where the dynamic programme can be solved, as the optimum less the pulls' gaps (``exact_bandits.optimality_gaps``),
which has hardly any. Settings of the classical methods, and whether a trained policy draws its pulls or takes the most
likely one, are chosen on split ``train``. Trained parameters are kept under build/bandits, where a setting with more
arms finds those of one with fewer; what is not there is trained again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks import measure
from ecomlib.baselines.bandits import UCB1, BanditGreedy, agents
from ecomlib.exact_bandits import LARGEST_EXACT, bayes_optimal, optimality_gaps, posterior_reward, relaxation_bound
from ecomlib.families.bandits import BernoulliBandit
from ecomlib.families.base import split, take
from ecomlib.files import write_json
from ecomlib.learners.rl2 import RL2, RL2Config
from ecomlib.rollout import Agent, trial

FORMAT = "ecomlib bandits"
WIDTHS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
EPSILONS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
RESULTS = Path(__file__).parent / "results" / "bandits"


@dataclass(frozen=True)
class Sizes:
    """What a result depends on but setting, method and seed."""

    instances: int = 20_000
    """Of split ``test``."""
    tuning: int = 5_000
    """Of split ``train``, for what is chosen."""
    seeds: int = 5
    """Training seeds, unless the training has fewer."""


QUICK = Sizes(200, 100, 2)

FLAT = RL2Config(episodes=1, own_unit=0.0)
"""RL^2 as published but for its size: one recurrent unit sees everything, arms are numbered."""
ROWS = replace(FLAT, memory="sum", by_action=True, hidden=32)
"""One network for all arms, each with sums of what it met."""


@dataclass(frozen=True)
class Training:
    """One way to train RL^2 for a setting."""

    name: str
    config: RL2Config
    iterations: int
    arms: int | None = None
    """Arms of the bandits that it trains on, where they are fewer than those it plays."""
    seeds: int = 5
    """Training seeds."""

    def learner(self, family: BernoulliBandit) -> RL2:
        """For bandits of this family."""
        return RL2(family, replace(self.config, anneal=self.iterations))


SMALL = replace(ROWS, tasks=32, replicas=4)
PLANS = {
    (10, 5): (Training("RL2, GRU", FLAT, 150), Training("RL2, rows", ROWS, 100)),
    (10, 10): (Training("RL2, GRU", FLAT, 200, seeds=3), Training("RL2, rows", ROWS, 80)),
    (10, 50): (
        Training("RL2, GRU", FLAT, 160, seeds=3),
        Training("RL2, rows", SMALL, 100),
        Training("RL2, rows, trained on 10 arms", ROWS, 80, arms=10),
    ),
    (100, 5): (Training("RL2, rows", SMALL, 80, seeds=3),),
    (100, 10): (Training("RL2, rows", SMALL, 60, seeds=3),),
    (100, 50): (Training("RL2, rows, trained on 10 arms", SMALL, 60, arms=10, seeds=3),),
}
"""What is trained for (pulls, arms)."""


class Setting:
    """A bandit, its lists of instances and its file."""

    def __init__(self, pulls: int, arms: int, sizes: Sizes, folder: Path):
        self.family, self.sizes, self.folder = BernoulliBandit(arms, pulls), sizes, folder
        self.path = folder / f"{pulls}_{arms}.json"
        self.instances = {
            name: split(self.family, name, count)[1]
            for name, count in (("test", sizes.instances), ("train", sizes.tuning))
        }
        self.content: dict[str, Any] = {"format": FORMAT, "version": 1, "pulls": pulls, "arms": arms}
        self.content |= {"sizes": asdict(sizes), "parts": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
            if self.content["sizes"] != asdict(sizes):
                raise SystemExit(f"{self.path} has other sizes: delete it, or name another --folder")
        self.solved = pulls <= LARGEST_EXACT

    # -------------------------------------------------------------------------------------------- playing
    def play(self, agent: Agent, name: str = "test") -> tuple[Tensor, Tensor]:
        """Actions and rewards (T, M, 1); a few thousand instances at a time, for memory."""
        tasks, parts = self.instances[name], []
        size = max(1, 100_000 // self.family.arms)
        for first in range(0, len(tasks.id), size):
            done = trial(self.family, take(tasks, slice(first, first + size)), agent, 1, 1, 0, progress=False)
            parts.append((done.action[0], done.reward[0]))
        return tuple(torch.cat(x, 1) for x in zip(*parts))

    def tuning_score(self, agent: Agent) -> float:
        """Mean on the training list."""
        return posterior_reward(self.family, *self.play(agent, "train")).sum(0).double().mean().item()

    def measured(self, agent: Agent) -> dict[str, Any]:
        """What an agent earns on the test list, with half-widths of 95 % intervals, and how it pulls."""
        action, reward = self.play(agent)
        known = posterior_reward(self.family, action, reward).sum(0)[:, 0]
        found = {"reward": interval(reward.sum(0)[:, 0]), "expected": interval(known)}
        if self.solved:
            value = bayes_optimal(self.family).value
            gap, half = interval(optimality_gaps(self.family, action, reward.double()).sum(0)[:, 0])
            found |= {"value": [value - gap, half], "fraction": [1 - gap / value, half / value]}
        else:
            if not hasattr(self, "gittins"):
                index = agents(self.family)["Gittins"]
                self.gittins = posterior_reward(self.family, *self.play(index)).sum(0)[:, 0]
            found["ahead of Gittins"] = interval(known - self.gittins)
        return found | {"leaving": leaving(action, reward)}

    # -------------------------------------------------------------------------------------------- parts
    def baselines(self) -> dict[str, Any]:
        """Classical methods, and what nobody exceeds."""
        part: dict[str, Any] = {"oracle": self.family.oracle_return(self.instances["test"]).double().mean().item()}
        part["bound"] = relaxation_bound(self.family)[0]
        if self.solved:
            part["optimum"] = bayes_optimal(self.family).value
        methods = {name: (lambda agent=agent: agent) for name, agent in agents(self.family).items()}
        part["chosen"] = {}
        for name, grid, build in (
            ("UCB1", WIDTHS, lambda x: UCB1(self.family, x)),
            ("UCB1 with prior", WIDTHS, lambda x: UCB1(self.family, x, prior=True)),
            ("epsilon-greedy", EPSILONS, lambda x: BanditGreedy(self.family, x)),
        ):
            tried = [self.tuning_score(build(x)) for x in grid]
            best = grid[tried.index(max(tried))]
            part["chosen"][name] = {"grid": list(grid), "training": tried, "chosen": best}
            methods[name] = lambda build=build, best=best: build(best)
        part["methods"] = {
            name: self.measured(build()) for name, build in tqdm(methods.items(), desc=str(self.path.stem))
        }
        return part

    def rl2(self, save: Callable[[dict], None], part: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
        """Every training of the plan, or those of these names, seed by seed; what is there stays."""
        for plan in PLANS[self.family.pulls, self.family.arms]:
            if names and plan.name not in names:
                continue
            about = {"training": asdict(plan), "seeds": {}}
            entry = part.setdefault(plan.name, about)
            if {"seeds": 5} | entry["training"] != json.loads(json.dumps(asdict(plan))) and entry["seeds"]:
                raise SystemExit(f"{self.path}: {plan.name} was trained with other settings; --again trains it anew")
            for seed in range(min(plan.seeds, self.sizes.seeds)):
                if str(seed) not in entry["seeds"]:
                    entry["seeds"][str(seed)] = self.trained(plan, seed)
                    save(part)
        return part

    def trained(self, plan: Training, seed: int) -> dict[str, Any]:
        """Train one seed and play it."""
        source = self.family if plan.arms is None else replace(self.family, arms=plan.arms)
        iterations = 2 if self.sizes == QUICK else plan.iterations
        meta, curve, seconds = parameters(plan.learner(source), source, seed, iterations)
        player = plan.learner(self.family)
        training = {drawn: self.tuning_score(player.agent(meta, sample=drawn)) for drawn in (True, False)}
        drawn = training[True] >= training[False]
        found = self.measured(player.agent(meta, sample=drawn))
        about = {"pulls are": "drawn" if drawn else "the most likely", "training": list(training.values())}
        about |= {"processor seconds": seconds, "curve": curve}
        return found | about | measure.conditions()

    def make(self, name: str, again: bool, names: list[str] | None = None) -> None:
        """A part, unless it is there."""
        parts, began = self.content["parts"], time.process_time()
        if again:
            parts.pop(name, None)

        def save(part: dict[str, Any]) -> None:
            about = measure.environment("bandits", "cpu") | measure.conditions()
            parts[name] = {"environment": about, "result": part}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.path, rounded(self.content))

        if name == "baselines" and name not in parts:
            save(self.baselines() | {"processor seconds": round(time.process_time() - began, 1)})
        if name == "rl2":
            self.rl2(save, parts.get(name, {}).get("result", {}), names)


def parameters(learner: RL2, source: BernoulliBandit, seed: int, iterations: int) -> tuple[list, list, float]:
    """Meta-parameters after training, the curve of returns, and processor seconds; from the cache where they are."""
    stamp = hashlib.sha256(repr((source, learner.config, seed, iterations)).encode()).hexdigest()[:16]
    file = Path("build") / "bandits" / f"{stamp}.npz"
    if not file.exists():
        began = time.process_time()
        state = learner.meta_train(source, seed, iterations, progress=False)
        curve, seconds = [log["return after 0 steps"] for log in state.history], time.process_time() - began
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, *(p.numpy() for p in state.meta), curve=curve, seconds=seconds)
    stored = np.load(file, allow_pickle=False)
    meta = [torch.from_numpy(stored[f"arr_{i}"]) for i in range(len(stored.files) - 2)]
    return meta, stored["curve"].tolist(), round(float(stored["seconds"]), 1)


def interval(values: Tensor) -> list[float]:
    """Mean and half-width of a 95 % interval of values (M,)."""
    values = values.double()
    return [values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5]


def leaving(action: Tensor, reward: Tensor) -> dict[str, list]:
    """How often a pull goes to another arm than the last one: by pull, after a failure and after a success; and, while
    only one arm was pulled and has just failed, by its (successes, failures): [visits, leaves]."""
    left = (action[1:] != action[:-1]).double()
    failed = reward[:-1] == 0
    share = lambda where: [round((a[w].mean().item() if w.any() else 0.0), 4) for a, w in zip(left, where)]
    only = (action[1:] == action[:1]).to(torch.int64).cumprod(0)  # at pull t + 1: whether it is still the first arm
    before = torch.cat((torch.ones_like(only[:1]), only[:-1])).bool()  # whether only one arm was pulled so far
    success, table = reward[:-1].cumsum(0), {}
    for t in range(min(len(left), 12)):
        for s in range(t + 1):
            here = before[t] & failed[t] & (success[t] == s)
            if here.any():
                table[f"{s},{t + 1 - s}"] = [int(here.sum()), int(left[t][here].sum())]
    return {"after a failure": share(failed), "after a success": share(~failed), "first arm": table}


def rounded(value: Any) -> Any:
    """Six digits of every number."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def summary(folder: Path) -> None:
    """The table of all stored settings."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: part["result"] for name, part in content["parts"].items()}
        head = parts.get("baselines", {})
        best = f"optimum {head['optimum']:.4f}" if "optimum" in head else f"at most {head.get('bound', 0):.2f}"
        print(f"\n{content['pulls']} pulls, {content['arms']} arms: {best}, oracle {head.get('oracle', 0):.2f}")
        rows = [(name, found) for name, found in head.get("methods", {}).items()]
        for name, entry in parts.get("rl2", {}).items():
            rows += [(f"{name}, seed {seed}", found) for seed, found in entry["seeds"].items()]
        for name, found in rows:
            measured = {k: v for k, v in found.items() if k in ("reward", "expected", "fraction", "ahead of Gittins")}
            cells = [f"{k} {mean:.4f} +- {half:.4f}" for k, (mean, half) in measured.items()]
            print(f"{name:38} {', '.join(cells)} {found.get('processor seconds', '')} {found.get('pulls are', '')}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pulls", type=int, nargs="?")
    parser.add_argument("arms", type=int, nargs="?")
    parser.add_argument("--parts", nargs="+", choices=("baselines", "rl2"), default=("baselines", "rl2"))
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of part rl2 only these trainings")
    parser.add_argument("--again", action="store_true", help="make these parts anew")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; needs --folder")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="print what is stored")
    arguments = parser.parse_args()
    if arguments.summary:
        return summary(arguments.folder)
    if (arguments.pulls, arguments.arms) not in PLANS:
        parser.error(f"PULLS ARMS must be one of {', '.join(f'{n} {k}' for n, k in PLANS)}")
    if arguments.quick and arguments.folder == RESULTS:
        parser.error("--quick needs --folder: its numbers are no results")
    torch.set_num_threads(1)
    setting = Setting(arguments.pulls, arguments.arms, QUICK if arguments.quick else Sizes(), arguments.folder)
    for part in arguments.parts:
        setting.make(part, arguments.again, arguments.names)
    return None


if __name__ == "__main__":
    main()
