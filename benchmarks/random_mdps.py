"""Random decision processes (Duan et al. 2016): classical learners with different priors, and RL^2 after a few
processor minutes, on the same tasks with the same luck.

    python -m benchmarks.random_mdps --parts baselines       # three minutes
    python -m benchmarks.random_mdps --parts rl2             # ten minutes
    python -m benchmarks.random_mdps --quick --json FILE     # tiny sizes: does it run?

A trial is n episodes of one task; its return is the sum of all rewards. Two priors are compared. The one of the tasks,
with mean reward 1; and the ones that the published baselines had: the program that made the published table
(``sandbox/rocky/neural_learner`` in florensacc/rllab-curriculum) takes the agents of iosband/TabulaRL with their
defaults, whose prior mean is 0, and whose greedy agents have next to no prior. Settings are chosen on training tasks.
Results: benchmarks/results/random_mdps/random_mdps.json, shown in chapter "Bandits against the optimum".
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from ecomlib.baselines import Random
from ecomlib.baselines.tabular import PSRL, ConjugatePrior, ExplorationBonus, PosteriorMean
from ecomlib.evaluation.statistics import paired_difference, t_interval
from ecomlib.families import split
from ecomlib.families.random_mdps import RandomMDP
from ecomlib.learners.rl2 import RL2, RL2Config
from ecomlib.rollout import Agent, trial

RESULT = Path("benchmarks/results/random_mdps/random_mdps.json")
EPISODES = (10, 25, 50, 75, 100)
BONUSES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
EPSILONS = (0.05, 0.1, 0.2, 0.3)
DRAWS = 10
"""Worlds of an optimistic draw; the published number was chosen from 1 to 20 for each n, on the tasks of the table."""
TABULARL = ConjugatePrior(mean=0.0)
"""Prior of the agents of iosband/TabulaRL."""
NEXT_TO_NONE = ConjugatePrior(0.0, 100.0, 1e-4)
"""Prior of its greedy agents: precision and pseudo-counts of 0.0001."""
FAMILY = RandomMDP()

PUBLISHED = {
    "random": (100.1, 250.2, 499.7, 749.9, 999.4),
    "PSRL": (138.1, 408.8, 904.4, 1417.1, 1939.5),
    "OPSRL": (144.1, 425.2, 930.7, 1449.2, 1973.9),
    "UCRL2": (146.6, 424.1, 918.9, 1427.6, 1942.1),
    "BEB": (150.2, 427.8, 917.8, 1422.6, 1935.1),
    "epsilon-greedy": (132.8, 377.3, 823.3, 1293.9, 1778.2),
    "greedy": (134.8, 368.8, 769.3, 1172.9, 1578.5),
    "RL2 (Duan et al. 2016)": (156.2, 445.7, 936.1, 1428.8, 1913.7),
    "SNAIL (Mishra et al. 2018)": (159.1, 447.2, 942.3, 1447.5, 1953.1),
}
"""Mean return of 1,000 tasks, as the README of lucaslingle/pytorch_rl2 reprints the two papers' tables."""


def played(agent: Agent, name: str, tasks: int, episodes: int) -> Tensor:
    """(tasks,) return of a trial of ``episodes`` on the fixed list ``name``."""
    family, which = split(FAMILY, name, tasks)
    return trial(family, which, agent, episodes, 1, seed=7, progress=False).returns.sum(0)[:, 0]


def tuned(values: tuple[float, ...], build: Any, tasks: int, episodes: int) -> tuple[float, list[float]]:
    """The value with the highest mean on training tasks, and all means."""
    means = [played(build(value), "train", tasks, episodes).mean().item() for value in values]
    return values[means.index(max(means))], means


def baselines(tasks: int, episodes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (tasks,) of every classical learner, and what was tuned."""
    # The published value was the best of ten on the tasks of the table; here, as all settings, on training tasks.
    epsilon, epsilons = tuned(EPSILONS, lambda x: PosteriorMean(FAMILY, NEXT_TO_NONE, x), tasks, episodes)
    bonus, bonuses = tuned(BONUSES, lambda x: ExplorationBonus(FAMILY, bonus=x), tasks, episodes)
    agents = {
        "random": Random(FAMILY),
        "PSRL, prior mean 0": PSRL(FAMILY, TABULARL),
        "OPSRL, prior mean 0": PSRL(FAMILY, TABULARL, DRAWS),
        "greedy, no prior": PosteriorMean(FAMILY, NEXT_TO_NONE),
        "epsilon-greedy, no prior": PosteriorMean(FAMILY, NEXT_TO_NONE, epsilon),
        "PSRL": PSRL(FAMILY),
        "OPSRL": PSRL(FAMILY, draws=DRAWS),
        "greedy": PosteriorMean(FAMILY),
        "bonus": ExplorationBonus(FAMILY, bonus=bonus),
    }
    found = {name: played(agent, "test", tasks, episodes) for name, agent in agents.items()}
    _, which = split(FAMILY, "test", tasks)
    found["oracle"] = episodes * FAMILY.oracle_return(which)
    grids = {
        "epsilon": {"chosen": epsilon, "grid": EPSILONS, "training return": epsilons},
        "bonus": {"chosen": bonus, "grid": BONUSES, "training return": bonuses},
    }
    return found, grids


def summary(returns: Tensor) -> dict[str, float]:
    """Mean and Student's 95 % interval over tasks."""
    return t_interval(returns)._asdict()


def rl2(seed: int, seconds: float, tasks: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """RL^2 on trials of 10 episodes for so many processor seconds: its record, and returns (tasks,) with random and
    with most likely actions."""
    # The schedule needs the number of iterations: from the time of a few.
    config = RL2Config(episodes=10, by_action=True, tasks=16, replicas=8, lr=5e-3, entropy=0.01)
    learner = RL2(FAMILY, config)
    began = time.process_time()
    learner.meta_train(FAMILY, seed, 3, progress=False)
    iterations = max(3, int(seconds * 3 / (time.process_time() - began)))
    learner = RL2(FAMILY, RL2Config(**{**vars(config), "anneal": iterations}))
    began = time.process_time()
    state = learner.meta_train(FAMILY, seed, iterations)
    record = {
        "seed": seed,
        "iterations": iterations,
        "trials": iterations * config.tasks * config.replicas,
        "seconds": time.process_time() - began,
        "curve": [10 * log["return"] for log in state.history[:: max(1, iterations // 50)]],
        "settings": vars(learner.config),
    }
    sampled, likely = (played(learner.agent(state.meta, sample), "test", tasks, 10) for sample in (True, False))
    return record, sampled, likely


def main() -> None:
    """Parts of the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("baselines", "rl2"), default=("baselines", "rl2"))
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=300.0, help="processor seconds of a training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tasks, episodes = (50, (3, 5)) if arguments.quick else (2000, EPISODES)
    content = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"published": PUBLISHED}
    content |= {"episodes": EPISODES, "tasks": tasks}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    environment = measure.environment("random_mdps", "cpu", tasks=tasks) | measure.conditions()
    if "baselines" in arguments.parts:
        content["baselines"] = {"environment": environment}
        for n in episodes:
            began = time.process_time()
            found, grids = baselines(tasks, n)
            content["baselines"][str(n)] = {
                "return": {name: summary(values) for name, values in found.items()},
                "bonus less greedy": paired_difference(found["bonus"], found["greedy"])._asdict(),
                "tuned": grids,
                "seconds": time.process_time() - began,
            }
            print(n, {name: round(values.mean().item(), 1) for name, values in found.items()}, flush=True)
            measure.write(arguments.json, content)
    if "rl2" in arguments.parts:
        seeds, seconds = ([0], 3.0) if arguments.quick else (arguments.seeds, arguments.seconds)
        runs, greedy, bonus = [], played(PosteriorMean(FAMILY), "test", tasks, 10), None
        chosen = content.get("baselines", {}).get("10", {}).get("tuned", {}).get("bonus", {}).get("chosen", 0.5)
        bonus = played(ExplorationBonus(FAMILY, bonus=chosen), "test", tasks, 10)
        for seed in seeds:
            record, sampled, likely = rl2(seed, seconds, tasks)
            record |= {"return": summary(sampled), "return of most likely actions": summary(likely)}
            record["less greedy"] = paired_difference(sampled, greedy)._asdict()
            record["less bonus"] = paired_difference(sampled, bonus)._asdict()
            runs.append(record)
            print(seed, record["iterations"], record["return"], record["return of most likely actions"], flush=True)
            content["rl2"] = {"environment": environment, "runs": runs}
            measure.write(arguments.json, content)


if __name__ == "__main__":
    main()
