"""Meta-training on several processes: what is moved, what it takes, and what that predicts for more of them.

    python -m benchmarks.scaling                  # 1 and 2 processes on this machine's cores
    python -m benchmarks.scaling --json FILE      # for a program to read
    python -m benchmarks.scaling --quick          # tiny sizes: does it run?

Each process differentiates its share of an iteration's tasks; the meta-gradients are averaged by one all-reduce for
every gradient of the outer step (chapter "Running experiments"). Measured here:

- seconds of an iteration of one process for several numbers of tasks M, fitted as serial + M * task: what does not
  shrink with more processes, and what does;
- seconds of an all-reduce of n bytes between two processes (gloo, loopback), fitted as 2 (P - 1) latency +
  2 (P - 1) / P n / bandwidth, the cost of a ring (Patarasuk and Yuan 2009);
- seconds of an iteration of two processes with the same M in all, next to what the two fits predict for it.

Wall time, since a process that waits uses no processor time: other load on the machine shows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Generator

from ecomlib.families import LogitPricing
from ecomlib.learners import MAML, Inner, MAMLConfig, PPOStep
from ecomlib.learners.sharding import Shards
from ecomlib.policies import CategoricalMLP
from ecomlib.surrogates import ratio

from . import measure

EPOCHS = 5


def learner(tasks: int, episodes: int, hidden: int) -> MAML:
    """PPO-MAML on LogitPricing."""
    policy = CategoricalMLP((6, hidden, hidden, 11))
    return MAML(policy, Inner(surrogate=ratio), PPOStep(epochs=EPOCHS), MAMLConfig(tasks=tasks, episodes=episodes))


def iteration_seconds(maml: MAML, iterations: int) -> float:
    """Median wall time of an iteration, after two that warm up."""
    times = []
    maml.meta_train(
        LogitPricing(), 0, iterations + 2, progress=False, callback=lambda state: times.append(time.perf_counter())
    )
    return float(statistics.median(np.diff(times)[1:]))


def all_reduce_seconds(elements: int, rounds: int) -> float:
    """Median wall time of an all-reduce of ``elements`` float32."""
    buffer, times = torch.zeros(elements), []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(buffer)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def process(rank: int, processes: int, folder: str, arguments: argparse.Namespace) -> None:
    """One of the processes of a measurement; the first writes what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    measured: dict[str, object] = {"iteration": {}}
    for tasks in arguments.tasks:
        maml = learner(tasks, arguments.episodes, arguments.hidden)
        maml.shards = Shards(rank, processes)
        measured["iteration"][tasks] = iteration_seconds(maml, arguments.iterations)
        measured["bytes"] = maml.shards.bytes_moved / (arguments.iterations + 2)
    if processes > 1:
        measured["all_reduce"] = {4 * n: all_reduce_seconds(n, arguments.rounds) for n in arguments.elements}
    if rank == 0:
        torch.save(measured, f"{folder}/measured")
    dist.barrier()
    dist.destroy_process_group()


def run(processes: int, arguments: argparse.Namespace) -> dict:
    """What ``processes`` processes measure together."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (processes, folder, arguments), nprocs=processes)
        return torch.load(f"{folder}/measured")


def fit_line(points: dict[int, float]) -> tuple[float, float]:
    """(intercept, slope), each >= 0, of the least squares line in relative error."""
    x, y = (np.array(list(values), float) for values in (points.keys(), points.values()))
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    return max(float(intercept), 0.0), max(float(slope), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.tasks = (2, 4) if quick else (20, 40, 80, 160)
    arguments.episodes, arguments.hidden = (3, 8) if quick else (20, 64)
    arguments.iterations, arguments.rounds = (2, 5) if quick else (12, 60)
    arguments.elements = (100, 1000) if quick else (100, 1000, 10_000, 100_000, 1_000_000)
    torch.set_num_threads(1)
    one, two = run(1, arguments), run(2, arguments)
    serial, task = fit_line(one["iteration"])
    intercept, slope = fit_line(two["all_reduce"])
    latency, bandwidth = intercept / 2, 1 / slope if slope else float("inf")
    parameters = sum(p.numel() for p in learner(2, 2, arguments.hidden).initial(Generator().manual_seed(0)))
    rows = []
    for tasks in arguments.tasks:
        alone, shared = one["iteration"][tasks], two["iteration"][tasks]
        buffer = two["bytes"] / EPOCHS
        predicted = serial + task * tasks / 2 + EPOCHS * (2 * latency + buffer / bandwidth)
        rows.append({"tasks": tasks, "one_process_s": alone, "two_processes_s": shared, "predicted_s": predicted,
                     "efficiency": alone / (2 * shared)})  # fmt: skip
        print(f"{tasks:4d} tasks: 1 process {1e3 * alone:6.1f} ms, 2 processes {1e3 * shared:6.1f} ms "
              f"(predicted {1e3 * predicted:6.1f}), efficiency {alone / (2 * shared):.2f}")  # fmt: skip
    print(f"{parameters} parameters: {two['bytes']:.0f} bytes in {EPOCHS} all-reduces an iteration; "
          f"latency {1e6 * latency:.0f} us, bandwidth {bandwidth / 1e9:.2f} GB/s")  # fmt: skip
    measure.write(arguments.json, {
        "rows": rows,
        "parameters": parameters,
        "bytes_per_iteration": two["bytes"],
        "all_reduces_per_iteration": EPOCHS,
        "serial_s": serial,
        "task_s": task,
        "all_reduce_s": {str(n): s for n, s in two["all_reduce"].items()},
        "latency_s": latency,
        "bandwidth_bytes_per_s": bandwidth,
        "environment": measure.environment("scaling", "cpu", clock="wall time", backend="gloo, loopback"),
        "conditions": measure.conditions(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
