"""Five seeds of a meta-training in one batch, next to one by one, in one run.

    python -m benchmarks.seed_batch                  # three sizes, RL-MAML and PPO-MAML
    python -m benchmarks.seed_batch --device cuda    # on a GPU
    python -m benchmarks.seed_batch --json FILE      # ratios, milliseconds and the machine, for a program to read
    python -m benchmarks.seed_batch --quick          # tiny sizes: does it run, do both agree?

What is timed is an iteration of all seeds: tasks, episodes, inner step, outer step, and reading what is logged. Both
sides are the library's ``meta_train`` from the same parameters, and the returns that they log must agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator
from tqdm.auto import tqdm

from ecomlib.families import LogitPricing
from ecomlib.learners import MAML, Inner, MAMLConfig, MetaTraining, PPOStep, ReinforceStep
from ecomlib.networks import GRU
from ecomlib.policies import Categorical, CategoricalMLP

from . import measure

AGREEMENT, DAYS, FEATURES, PRICES = 1e-3, 14, LogitPricing.observation_size, 11
SIZES = {
    "small": (10, 5, lambda: CategoricalMLP((FEATURES, 32, PRICES)), 1),
    "middle": (20, 20, lambda: CategoricalMLP((FEATURES, 64, 64, PRICES)), 1),
    "recurrent": (10, 5, lambda: Categorical(GRU(FEATURES, 32, PRICES)), 0),
}
"""Name -> products, episodes, policy, inner steps."""
OUTER = {"rl": ReinforceStep, "ppo": PPOStep}


def sides(size: str, outer: str, seeds: int, device: str, quick: bool) -> dict[str, Callable[[], list[MetaTraining]]]:
    """An iteration of all seeds, in one batch and one by one."""
    products, episodes, policy, steps = SIZES[size]
    products, episodes = (2, 3) if quick else (products, episodes)
    family, config = LogitPricing(days=3 if quick else DAYS), MAMLConfig(products, episodes)
    learner = MAML(policy(), Inner(steps=steps), OUTER[outer](), config)
    each = [[p.to(device) for p in learner.initial(Generator().manual_seed(seed))] for seed in range(seeds)]
    together = [torch.stack(same) for same in zip(*each)]

    def one(seed: int | range, meta: list[torch.Tensor]) -> MetaTraining:
        start = MetaTraining(0, meta, None, [])
        return learner.meta_train(family, seed, 1, start, device, progress=False)

    return {
        "batch": lambda: [one(range(seeds), together)],
        "one by one": lambda: [one(seed, meta) for seed, meta in enumerate(each)],
    }


def disagreement(runs: dict[str, Callable[[], list[MetaTraining]]]) -> float:
    """Largest relative difference of the returns that the two sides log."""
    (batch,), alone = runs["batch"](), runs["one by one"]()
    differences = [0.0]
    for name, values in batch.history[0].items():
        if name.startswith("return"):
            pairs = zip(values, (run.history[0][name] for run in alone), strict=True)
            differences += [abs(found - wanted) / abs(wanted) for found, wanted in pairs]
    return max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds; both sides run once a round (default 9)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of a batch (default 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--json", type=Path, help="file to write ratios, times and environment to")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, quick, seeds = arguments.device, arguments.quick, 2 if arguments.quick else arguments.seeds
    rounds, least = (1, 0.0) if quick else (arguments.rounds, 0.5)
    environment = measure.environment("seed_batch", device, seeds=seeds, days=DAYS, rounds=rounds, quick=quick)
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None))

    ratios, milliseconds, differences, measured = {}, {}, {}, {}
    for size in tqdm(SIZES, desc="sizes", leave=False):
        for outer in OUTER:
            key = f"{size}_{outer}"
            runs = sides(size, outer, seeds, device, quick)
            differences[key] = disagreement(runs)
            if not differences[key] < AGREEMENT:
                raise SystemExit(f"{key}: the batch's returns are off those one by one by {differences[key]:.1e}")
            started = measure.conditions()
            milliseconds[key] = measure.interleaved(runs, rounds, device, least)
            measured[key] = {"started": started, "ended": measure.conditions()}
            ratios[f"{key}_batch_vs_one_by_one"] = milliseconds[key]["one by one"] / milliseconds[key]["batch"]

    print(f"\nmilliseconds of an iteration of {seeds} seeds, and how many times as fast the batch is")
    for key, times in milliseconds.items():
        ratio = ratios[f"{key}_batch_vs_one_by_one"]
        print(f"{key:15s} one by one {times['one by one']:8.1f}   batch {times['batch']:8.1f}   ratio {ratio:.2f}")
    result = {
        "environment": environment,
        "ratios": ratios,
        "milliseconds": milliseconds,
        "disagreement": differences,
        "measured": measured,
    }
    measure.write(arguments.json, result)


if __name__ == "__main__":
    main()
