"""What a learned belief and the memory of RL^2 know of a product, next to the exact posterior (chapter "Memory and
belief").

    python -m benchmarks.belief --json benchmarks/results/belief.json
    python -m benchmarks.belief --quick

Calibration: encoder and decoder are trained by the ELBO on trials of LogitPricing in which prices are drawn almost at
random, once explaining what a belief has seen and once the whole trial. On products that training did not meet, the
belief after some days gives means, standard deviations and central intervals of every price's expected profit on an
average day, and so does a particle posterior with the true prior on the same days.

Probe: linear regressions, fitted on some products and judged on others, from the memory of a stored RL^2 (seed 0 of
``benchmarks.memory_learners``) to the exact posterior's moments and to counts and sums by price; the same from the
memory of an untrained network that is fed the same trials.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from benchmarks import measure
from benchmarks.memory_learners import load
from ecomlib.baselines.bayes import belief
from ecomlib.families import LogitPricing, split
from ecomlib.families.pricing import purchase_probability
from ecomlib.learners.belief import BeliefConfig, BeliefLearner

LEVELS = (0.5, 0.9)
DAYS = (1, 3, 7, 14, 28)
SAMPLES = 200


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--iterations", type=int, default=120)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick, family = arguments.quick, LogitPricing()
    sizes = {"iterations": 2, "tasks": 20, "particles": 256} if quick else {"iterations": arguments.iterations}
    sizes = {"tasks": 150, "particles": 32768, "probe_tasks": 60 if quick else 1000} | sizes
    result: dict[str, Any] = {"provenance": measure.environment("belief", "cpu", **sizes), "calibration": {}}
    for decode in ("past", "all"):
        result["calibration"][decode] = calibration(family, decode, **sizes)
    result["probe"] = probe(family, sizes["probe_tasks"])
    result["provenance"] |= measure.conditions()
    print(result["calibration"], result["probe"], sep="\n")
    measure.write(arguments.json, result)


# ------------------------------------------------------------------------------------------------ calibration
def calibration(
    family: LogitPricing, decode: str, iterations: int, tasks: int, particles: int, **_: Any
) -> dict[str, Any]:
    """Train a belief and compare it with the posterior."""
    settings = {"memory": "sum", "replicas": 2, "belief_lr": 1e-2, "beliefs": 4, "steps": 16}
    config = BeliefConfig(decode=decode, warmup=iterations, anneal=iterations, **settings)
    learner, start = BeliefLearner(family, config), time.process_time()
    state = learner.meta_train(family, 0, iterations)
    seconds = time.process_time() - start
    print(decode, round(seconds), "s", state.history[-1], flush=True)
    _, products = split(family, "test", tasks)
    recorded, reward = learner.play(family, state.meta, products.id, 1, 1)
    names = torch.arange(family.actions)
    margin = products.cost[:, None] * (torch.tensor(family.markups) - 1)
    truth = (
        margin
        * products.traffic[:, None]
        * purchase_probability(products, torch.tensor(family.markups).expand(tasks, -1))
    )
    latent = learner.belief(state.meta, recorded.inputs)
    days: dict[str, Any] = {}
    for day in DAYS:
        now = type(latent)(*(x[day] for x in latent))
        z = now.sample(torch.randn(SAMPLES, *now.mean.shape, generator=Generator().manual_seed(day)))
        seen = recorded.observation[day]  # (M, 1, observation)
        action = names.view(-1, 1, 1, 1).expand(-1, 1, tasks, 1)
        led = torch.cat(
            [learner.expected(state.meta, seen[None, None], a[None], z) for a in action], 0
        )  # (A, S, M, 1, 1, observation)
        units = led[..., 0, 0, 4] * family.mean_traffic
        learned = margin.T[:, None] * units / family.seen(seen).weekday[:, 0]  # (A, S, M)
        weight = torch.full((tasks, SAMPLES), 1 / SAMPLES)
        exact, rate = posterior(family, products, recorded, reward, day, particles)
        both = {"learned": (learned, weight), "exact": (margin.T[:, None] * rate[:, :, None], exact)}
        days[str(day)] = compare(both, truth.T) | {
            "effective particles": round((1 / exact.square().sum(1)).median().item(), 1),
            "divergence": round(now.divergence().mean().item(), 2),
            "spread of means over products": rounded(now.mean[:, 0, 0].std(0)),
        }
    return {"config": asdict(config), "processor seconds": round(seconds, 1), "days": days}


def posterior(family: LogitPricing, products: Any, recorded: Any, reward: Tensor, day: int, particles: int) -> tuple:
    """Weights (M, P) after ``day`` days, and what each particle would sell at each price on an average day, (A, P)."""
    exact = belief(family, particles)
    exact.begin(family.context(products), len(products.id), 1)
    exact.units, exact.exposure = (x[:, None] for x in sums(family, products, recorded, reward, day))
    return exact.weight[:, 0], exact.rate


def sums(family: LogitPricing, products: Any, recorded: Any, reward: Tensor, day: int) -> tuple[Tensor, Tensor]:
    """(M, A) units sold and weekday multipliers by price, in the first ``day`` days of trials."""
    action, chosen = recorded.action[:day, :, 0], one_hot(recorded.action[:day, :, 0], family.actions)
    sold = (reward[:day, :, 0] / (products.cost * (family.markup(action) - 1))).round()
    weekday = family.seen(recorded.observation[:day]).weekday[..., 0]
    return (chosen * sold[..., None]).sum(0), (chosen * weekday[..., None]).sum(0)


def compare(both: dict[str, tuple[Tensor, Tensor]], truth: Tensor) -> dict[str, Any]:
    """Moments and coverage of weighted samples (A, S, M or 1) with weights (M, S) of ``truth`` (A, M)."""
    found: dict[str, Any] = {}
    for name, (samples, weight) in both.items():
        samples = samples.expand(*samples.shape[:2], truth.shape[1])
        mean = (samples * weight.T).sum(1)
        std = ((samples - mean[:, None]).square() * weight.T).sum(1).clamp(min=0).sqrt()
        below = ((samples < truth[:, None]) * weight.T).sum(1)
        below = below + 0.5 * ((samples == truth[:, None]) * weight.T).sum(1)
        found[name] = {"mean": mean, "std": std, "below": below}
    scale = truth.abs().amax(0)  # profits are compared in units of the best price's
    learned, exact = found["learned"], found["exact"]
    off = ((learned["mean"] - exact["mean"]) / scale).square().mean().sqrt()
    spread = ((exact["mean"] - (exact["mean"] / scale).mean(1, keepdim=True) * scale) / scale).square().mean().sqrt()
    ratio = (learned["std"] / exact["std"].clamp(min=1e-9)).log()
    cover = lambda x, level: ((x["below"] - 0.5).abs() < level / 2).double().mean().item()
    points = [(m, a) for m in range(0, min(60, truth.shape[1])) for a in (0, 4, 8)]
    pick = lambda x, n: [rounded((x[n] / scale)[a, m]) for m, a in points]
    return {
        "coverage": {name: {str(p): round(cover(x, p), 3) for p in LEVELS} for name, x in found.items()},
        "distance of means": rounded(off),
        "spread of exact means": rounded(spread),
        "median ratio of standard deviations": rounded(ratio.median().exp()),
        "points": {f"{name} {n}": pick(found[name], n) for name in found for n in ("mean", "std")},
    }


# ------------------------------------------------------------------------------------------------ probe
def probe(family: LogitPricing, tasks: int, day: int = 28) -> dict[str, Any]:
    """Held-out R^2 of linear regressions from a memory after ``day`` days."""
    learner, parameters = load("pricing", "rl2", 0)
    _, products = split(family, "test", tasks)
    recorded, reward = learner.play(family, parameters, products.id, 1, 1)
    untrained = learner.initial(Generator().manual_seed(1))
    memories = {
        "trained": memory_after(learner, parameters, recorded.inputs, day),
        "untrained": memory_after(learner, untrained, recorded.inputs, day),
        "last input": recorded.inputs[day].flatten(1),
    }
    wanted = targets(family, products, recorded, reward, day)
    fitted = {name: {t: held_out(x.double(), y.double()) for t, y in wanted.items()} for name, x in memories.items()}
    return {"day": day, "products": tasks, "hidden": learner.config.hidden, "r2": fitted}


def memory_after(learner: Any, parameters: list[Tensor], inputs: Tensor, day: int) -> Tensor:
    """(M, hidden) state with which the decision of ``day`` is taken."""
    network, own = learner.policy.network, learner.policy._weights(parameters)
    memory = network.begin(inputs[0])
    with torch.no_grad():
        for seen in inputs[: day + 1]:
            _, memory = network.step(own, seen, memory)
    return memory.flatten(1)


def targets(family: LogitPricing, products: Any, recorded: Any, reward: Tensor, day: int) -> dict[str, Tensor]:
    """What to read off a memory, each (M,) or (M, several)."""
    weight, rate = posterior(family, products, recorded, reward, day, 8192)
    exact = family.prior_sample(8192)
    units, exposure = sums(family, products, recorded, reward, day)
    average = lambda x: weight @ x
    found: dict[str, Tensor] = {}
    hidden = {"log sensitivity": exact.sensitivity.log(), "utility": exact.utility, "log traffic": exact.traffic.log()}
    for name, x in hidden.items():
        mean = average(x)
        found[f"mean of {name}"] = mean
        found[f"log spread of {name}"] = (average(x**2) - mean**2).clamp(min=1e-6).sqrt().log()
    profit = (torch.tensor(family.markups)[:, None] - 1) * rate
    found["log profit of the best price"] = (weight @ profit.T).amax(1).log()
    found["best markup"] = torch.tensor(family.markups)[(weight @ profit.T).argmax(1)]
    found["log units sold"] = torch.log1p(units.sum(1))
    found["days at each price"] = torch.log1p(exposure)
    found["units at each price"] = torch.log1p(units)
    return found


def held_out(x: Tensor, y: Tensor, ridge: float = 1e-2) -> float:
    """1 - residual / total sum of squares on the second 40 % of rows, of a ridge regression on the first 60 %."""
    y, first = y.view(len(y), -1), int(0.6 * len(y))
    center, spread = x[:first].mean(0), x[:first].std(0) + 1e-9
    design = torch.cat(((x - center) / spread, torch.ones(len(x), 1, dtype=x.dtype)), 1)
    a, b = design[:first], y[:first]
    weights = torch.linalg.solve(a.T @ a / first + ridge * torch.eye(a.shape[1], dtype=a.dtype), a.T @ b / first)
    missed = (y[first:] - design[first:] @ weights).square().sum()
    return round(1 - (missed / (y[first:] - y[:first].mean(0)).square().sum()).item(), 3)


def rounded(x: Tensor) -> Any:
    """Four significant digits."""
    return [rounded(v) for v in x] if x.dim() else float(f"{x.item():.4g}")


if __name__ == "__main__":
    main()
