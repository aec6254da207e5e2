"""Environment throughput: LogitPricing batched on one thread next to a per-step Python environment, in one run.

    python -m benchmarks.environments                  # ours alone
    pip install --no-deps decisionrl==0.4.0            # then the same command prints the ratio too
    python -m benchmarks.environments --device cuda    # on a GPU
    python -m benchmarks.environments --json FILE      # the ratios and the machine, for a program to read

One env-step = draw the luck, post a price, observe. Variants take turns within a round; process CPU time is used on
the CPU, wall time on a GPU; the median over rounds is printed. Every variant plays a finite shelf of 8 units over 20
days with 8 prices; decisionrl's DynamicPricing has one product per object and fixed demand, ours a different product
in every row.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ecomlib import noise
from ecomlib.families import LogitPricing, sample_tasks

MARKUPS = tuple(1.1 + 0.2 * k for k in range(8))


def pricing(shelf: LogitPricing, tasks: int, device: str, compiled: bool) -> tuple[Callable[[], object], int]:
    """A function that plays one episode of every task, and how many env-steps that is."""
    drawn = sample_tasks(shelf, tasks, torch.Generator().manual_seed(0))
    drawn = type(drawn)(*(field.to(device) for field in drawn))
    replica = torch.zeros(1, dtype=torch.int64, device=device)
    actions = torch.randint(len(MARKUPS), (shelf.days, tasks, 1), device=device)

    def day(state, action, time):
        uniforms = noise.uniform(0, drawn.id, replica, 0, time, noise.FAMILY, shelf.noise_size)
        state, reward, done = shelf.step(drawn, state, action, uniforms)
        return state, shelf.observe(drawn, state), reward, done

    play = torch.compile(day, fullgraph=True) if compiled else day
    start = shelf.reset(drawn, 1, torch.zeros(tasks, 1, 1, device=device))
    times = torch.arange(shelf.days, device=device)

    def episode():
        state = start
        for t in range(shelf.days):
            state, observation, reward, done = play(state, actions[t], times[t])
        return observation, reward

    episode()
    return episode, shelf.days * tasks


def decisionrl_pricing(episodes: int) -> tuple[Callable[[], object], int]:
    """The same for decisionrl's DynamicPricing, ``episodes`` one after the other."""
    from decisionrl.envs.pricing import DynamicPricing

    environment = DynamicPricing(n_prices=8, initial_inventory=8, horizon=20)
    actions = torch.randint(8, (20,)).tolist()
    steps = 0
    environment.reset(seed=0)

    def play():
        nonlocal steps
        steps = 0
        for _ in range(episodes):
            environment.reset()
            for action in actions:
                _, _, terminated, truncated, _ = environment.step(action)
                steps += 1
                if terminated or truncated:
                    break
        return steps

    return play, play()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=4096, help="products in the batch (default 4096)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; every variant runs once a round (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--json", type=Path, help="file to write ratios, rates and environment to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    on_cpu = torch.device(arguments.device).type == "cpu"

    shelf = LogitPricing(days=20, markups=MARKUPS, stock=8)
    variants = {
        "LogitPricing, compiled": pricing(shelf, arguments.tasks, arguments.device, compiled=True),
        "LogitPricing, eager": pricing(shelf, arguments.tasks, arguments.device, compiled=False),
    }
    peer = "decisionrl DynamicPricing"
    if importlib.util.find_spec("decisionrl"):
        variants[peer] = decisionrl_pricing(500)

    def clock() -> float:
        if on_cpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    seconds = {name: [] for name in variants}
    for _ in tqdm(range(arguments.rounds), unit="round"):
        for name, (play, _) in variants.items():
            repeats, start = 0, clock()
            while clock() - start < 0.3:
                play()
                repeats += 1
            seconds[name].append((clock() - start) / repeats)
    rate = {name: steps / statistics.median(seconds[name]) for name, (_, steps) in variants.items()}
    ratios = {name: rate[name] / rate[peer] for name in rate if name != peer and peer in rate}
    environment = {
        "tasks": arguments.tasks,
        "device": arguments.device,
        "threads": 1,
        "dtype": "float32",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    for name, value in rate.items():
        ratio = f"   {ratios[name]:6.1f} x {peer}" if name in ratios else ""
        print(f"{name:28s} {value / 1e6:8.2f} M env-steps/s{ratio}")
    if peer not in rate:
        print("missing: decisionrl, so no ratio. `pip install --no-deps decisionrl==0.4.0` adds it.")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ratios": ratios, "rates": rate, "environment": environment}, indent=1))


if __name__ == "__main__":
    main()
