"""Environment throughput: every family batched on one thread, next to environments of other libraries, in one run.

    python -m benchmarks.environments                            # ours, and the peers that are installed here
    pip install .[benchmarks]                                    # adds decisionrl and or-gym-inventory
    python -m venv JAX && JAX/bin/pip install gymnax==1.0.1 six  # gymnax needs an older Gymnasium: a Python of its own
    python -m benchmarks.environments --jax-python JAX/bin/python --json FILE
    python -m benchmarks.environments --device cuda              # ours alone, on a GPU

One env-step = draw the luck, act (actions are drawn beforehand), observe. ``eager`` and ``compiled`` (torch.compile, a
step at a time) are the functional families; ``Gymnasium`` is ``make_vec``, NumPy in and out, with autoreset. Variants
take turns within a round; process CPU time is used on the CPU, wall time on a GPU; the median over rounds counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecomlib.families import LogitPricing, PointNavigation, sample_tasks
from ecomlib.families.base import TaskFamily
from ecomlib.families.bidding import SegmentBidding
from ecomlib.families.inventory import CensoredInventory
from ecomlib.families.recommendation import SlateRecommendation

from . import environment_peers as peers
from . import measure

BATCHES = 4096, 64
SHELF = {"days": 20, "markups": tuple(round(1.1 + 0.2 * k, 1) for k in range(8)), "stock": 8}
"""Pricing as decisionrl has it: 20 days, 8 prices, 8 units."""
FAMILIES: dict[str, TaskFamily] = {
    "Pricing": LogitPricing(**SHELF),
    "Inventory": CensoredInventory(),
    "Inventory, lead time 2": CensoredInventory(lead_time=2),
    "Bidding": SegmentBidding(),
    "Recommendation": SlateRecommendation(),
    "Navigation": PointNavigation(),
}
SETTINGS: dict[str, dict[str, Any]] = {"Pricing": SHELF}
"""What differs from the family's defaults."""
RATIOS = {
    "Pricing": ("decisionrl DynamicPricing", "gymnax port of Pricing"),
    "Inventory": ("or-gym-inventory Newsvendor", "decisionrl InventoryManagement", "gymnax port of Inventory"),
    "Inventory, lead time 2": ("or-gym-inventory Newsvendor",),
    "Navigation": ("gymnax PointRobot-misc",),
}
"""Family -> the peers that it is divided by: the nearest problem of each."""


class Played(NamedTuple):
    """A family's steps, ready to be timed."""

    measurement: peers.Measurement
    bytes: int  # that an env-step has to move at the least


def random_actions(family: TaskFamily, batch: int) -> Tensor:
    """(T, M, 1, ...) actions of every step."""
    shape = family.horizon, batch, 1
    if hasattr(family, "slate"):
        return torch.rand(*shape, family.items).topk(family.slate, -1).indices
    if family.actions:
        return torch.randint(family.actions, shape)
    return torch.rand(*shape, family.action_size) * 2 - 1


def play(family: TaskFamily, batch: int, device: str, compiled: bool) -> Played:
    """Episodes of a batch of tasks, step by step."""
    tasks = sample_tasks(family, batch, torch.Generator().manual_seed(0), device)
    replica = torch.zeros(1, dtype=torch.int64, device=device)
    actions, times = random_actions(family, batch).to(device), torch.arange(family.horizon, device=device)

    def step(state: Any, action: Tensor, time: Tensor) -> tuple:
        luck = peers.luck(family, tasks, replica, time)
        state, reward, done = family.step(tasks, state, action, luck)
        return state, family.observe(tasks, state), reward, done

    # Compiled code is kept with the code object: each variant needs one of its own.
    step.__code__ = step.__code__.replace()
    played = torch.compile(step, fullgraph=True) if compiled else step
    start = family.reset(tasks, 1, torch.full((batch, 1, family.noise_size), 0.5, device=device))

    def episode() -> tuple:
        state = start
        with torch.no_grad():
            for time in range(family.horizon):
                state, observation, reward, done = played(state, actions[time], times[time])
        return state, observation, reward, done

    state, *seen = episode()
    drawn = 4 * family.noise_size * batch
    moved = [*start, *state, actions[0], *seen, *(field for field in tasks if field.dim() == 1)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in moved) + drawn
    return Played(peers.repeated(episode, family.horizon * batch, device), size // batch)


def gymnasium_vector(name: str, batch: int) -> peers.Measurement:
    """``make_vec`` of a family."""
    import gymnasium

    many = gymnasium.make_vec(f"ecomlib.gym:ecomlib/{name}-v0", num_envs=batch, **SETTINGS.get(name, {}))
    many.reset(seed=0)
    actions = many.action_space.sample()
    return peers.repeated(lambda: many.step(actions), batch)


def gymnax(python: str) -> tuple[peers.Gymnax, dict[str, peers.Measurement], dict[str, float]]:
    """The other Python, what it times, and how far its two ports of ours are from them."""
    client, found, differences = peers.Gymnax(python), {}, {}
    batch, pricing, inventory = BATCHES[0], FAMILIES["Pricing"], FAMILIES["Inventory"]
    ports = {
        "Pricing": (pricing, SHELF | {"weekday": pricing.weekday, "mean_traffic": pricing.mean_traffic}),
        "Inventory": (inventory, {"days": inventory.days, "levels": inventory.levels}),
    }
    for name, (family, settings) in ports.items():
        found[f"gymnax port of {name}"], differences[name] = client.port(name, family, settings, batch)
    found["gymnax PointRobot-misc"] = client.own("PointRobot-misc", 0, 100, batch)
    found["gymnax BernoulliBandit-misc"] = client.own("BernoulliBandit-misc", 2, 100, batch)
    return client, found, differences


def copies(device: str) -> peers.Measurement:
    """Bytes that a large copy reads and writes, instead of env-steps: the memory's bandwidth."""
    source = torch.zeros(2**25, device=device)
    target = torch.empty_like(source)
    return peers.repeated(lambda: target.copy_(source), 2 * 4 * source.numel(), device)


def variants(quick: bool, device: str) -> tuple[dict[str, peers.Measurement], dict[str, int]]:
    """Everything to be timed in this Python, and the bytes of an env-step of each family."""
    found: dict[str, peers.Measurement] = {}
    size: dict[str, int] = {}
    builds: list[Callable[[], None]] = []

    def ours(name: str, batch: int, compiled: bool) -> None:
        played = play(FAMILIES[name], batch, device, compiled)
        found[f"{name}, {'compiled' if compiled else 'eager'}, {batch}"] = played.measurement
        size[name] = played.bytes

    for name in FAMILIES:
        for batch in BATCHES:
            for compiled in (False,) if quick else (True, False):
                builds.append(lambda name=name, batch=batch, compiled=compiled: ours(name, batch, compiled))
            if name != "Inventory, lead time 2" and device == "cpu":
                vector = lambda name=name, batch=batch: found.update(
                    {f"{name}, Gymnasium, {batch}": gymnasium_vector(name, batch)}
                )
                builds.append(vector)
        if name in ("Pricing", "Inventory") and device == "cpu" and measure.distribution_version("stable_baselines3"):
            dummy = lambda name=name: found.update(peers.stable_baselines(name, SETTINGS.get(name, {}), BATCHES[1]))
            builds.append(dummy)
    builds += [lambda peer=peer: found.update(peer()) for peer in peers.installed().values() if device == "cpu"]
    for build in tqdm(builds, desc="compiling", unit="variant", leave=False):
        build()
    return found, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds; every variant runs once a round (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--jax-python", metavar="PYTHON", help="an interpreter that has gymnax")
    parser.add_argument("--quick", action="store_true", help="nothing compiled, one short round: to see that it works")
    parser.add_argument("--json", type=Path, help="file to write ratios, rates and environment to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds, least = (1, 0.02) if arguments.quick else (arguments.rounds, 0.3)

    measured, size = variants(arguments.quick, arguments.device)
    client, versions, differences = None, {}, {}
    if arguments.jax_python:
        client, theirs, differences = gymnax(arguments.jax_python)
        if max(differences.values()) > 1e-3:
            sys.exit(f"the ports to gymnax differ from the library's families: {differences}")
        measured, versions = measured | theirs, client.versions
    measured["copy"] = copies(arguments.device)

    conditions, seconds = measure.conditions(), {name: [] for name in measured}
    with tqdm(total=rounds * len(measured), unit="run", leave=False, desc="timing") as bar:
        for _ in range(rounds):
            for name, run in measured.items():
                seconds[name].append(run(least))
                bar.update()
    if client:
        client.close()

    rate = {name: 1 / statistics.median(times) for name, times in seconds.items()}
    bandwidth = rate.pop("copy")
    spread = {name: [1 / max(times), 1 / min(times)] for name, times in seconds.items() if name != "copy"}
    ratios = {}
    for name, others in RATIOS.items():
        for kind in ("eager", "compiled"):
            for peer in others:
                if f"{name}, {kind}, {BATCHES[0]}" in rate and peer in rate:
                    ratios[f"{name}, {kind}, vs {peer}"] = rate[f"{name}, {kind}, {BATCHES[0]}"] / rate[peer]
    limits = {
        name: {
            "bytes a step": bytes_,
            "M steps/s at the bandwidth": bandwidth / bytes_ / 1e6,
            **{
                f"share of it, {kind}": rate[f"{name}, {kind}, {BATCHES[0]}"] * bytes_ / bandwidth
                for kind in ("eager", "compiled")
                if f"{name}, {kind}, {BATCHES[0]}" in rate
            },
        }
        for name, bytes_ in size.items()
    }
    environment = measure.environment("environments", arguments.device, quick=arguments.quick, rounds=rounds)
    environment |= {name: measure.distribution_version(name) for name in peers.DISTRIBUTIONS.values()} | versions
    show(rate, spread, ratios, limits, bandwidth, environment)
    result = {
        "ratios": ratios,
        "M env-steps a CPU second": {name: value / 1e6 for name, value in rate.items()},
        "lowest and highest of the rounds": {name: [low / 1e6, high / 1e6] for name, (low, high) in spread.items()},
        "limits": limits,
        "copy GB/s": bandwidth / 1e9,
        "largest difference of the ports to gymnax": differences,
        "conditions": conditions,
        "environment": environment,
    }
    measure.write(arguments.json, result)


def show(rate, spread, ratios, limits, bandwidth, environment) -> None:
    """The tables."""
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None))
    print(f"copy {bandwidth / 1e9:.1f} GB/s")
    for name, value in rate.items():
        low, high = spread[name]
        print(f"{name:46s} {value / 1e6:9.3f} M env-steps/s   ({low / 1e6:.3f} to {high / 1e6:.3f})")
    for name, value in ratios.items():
        print(f"{name:76s} {value:8.1f} x")
    for name, row in limits.items():
        print(f"{name:30s} " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    missing = [distribution for distribution in peers.DISTRIBUTIONS.values() if environment[distribution] is None]
    missing += [] if "gymnax" in environment else ["gymnax (--jax-python)"]
    if missing:
        print(f"not installed: {', '.join(missing)}")


if __name__ == "__main__":
    main()
