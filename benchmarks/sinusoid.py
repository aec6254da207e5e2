"""Sinusoid regression (Finn et al. 2017, section 5.1): MAML and its relatives on 1,000 held-out tasks.

    python -m benchmarks.sinusoid --json benchmarks/results/sinusoid.json    # about an hour on one thread
    python -m benchmarks.sinusoid --only MAML ANIL --iterations 3000         # a quick look

Protocol of the paper: network 1-40-40-1 with ReLU, 10 points to adapt with and 10 to be judged by, 25 tasks an
iteration, Adam with step size 0.001, inner step size 0.01. What differs: weights start at Normal(0, 1 / fan-in) instead
of a truncated normal of standard deviation 0.01. A task is scored by its mean squared error on 100 evenly spaced
points, after 0 to 10 steps on 10 points. Seeds stand in one batch as further rows; they share no number but the code.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from benchmarks import measure
from ecomlib.evaluation.statistics import interquartile_mean
from ecomlib.families.base import split
from ecomlib.families.sinusoid import Sinusoid, Waves
from ecomlib.learners.adaptation import Inner, adapt
from ecomlib.learners.supervised import Examples, mean_squared_error
from ecomlib.networks import MLP, Context, Network

FAMILY = Sinusoid()
TASKS, POINTS, STEPS, TEST_TASKS = 25, 10, 10, 1000
COMPARED = 3_000
"""Iterations at which all learners are compared."""
CHECKPOINTS = (0, 300, 1_000, COMPARED, 15_000, 30_000, 50_000, 70_000)
"""Iterations at which a learner is scored; its last one always is."""
DIVERGED = FAMILY.amplitude[1] ** 2 / 2
"""An error above this, the mean square of the tallest curve, is worse than any curve deserves from the answer 0."""


NETWORK = MLP((1, 40, 40, 1), torch.relu)


@dataclass(frozen=True)
class Method:
    """One learner of the comparison."""

    inner: Inner = Inner(lr=0.01)
    weights: tuple[float, ...] = (0.0, 1.0)
    network: Network = NETWORK
    reptile: bool = False
    trained: bool = True
    iterations: int = 15_000

    def loss(self, parameters: list[Tensor], data: Examples) -> Tensor:
        """(rows,) squared error."""
        return mean_squared_error(self.network.outputs(parameters, data.x), data.y)


FIVE = Inner(steps=5, lr=0.01)
METHODS = {
    "random": Method(trained=False),
    "average task": Method(weights=(1.0, 0.0)),
    "MAML": Method(iterations=70_000),
    "first-order MAML": Method(Inner(lr=0.01, first_order=True)),
    "Reptile": Method(FIVE, reptile=True),
    "Meta-SGD": Method(Inner(lr=0.01, learn_lr=True)),
    "ANIL": Method(Inner(lr=0.01, adapted=NETWORK.head)),
    "CAVIA": Method(Inner(lr=1.0, adapted=(0,)), network=Context(MLP((5, 40, 40, 1), torch.relu), 4)),
    "MAML, 5 steps": Method(FIVE, (0.0,) * 5 + (1.0,)),
    "MAML, 5 steps, all count": Method(FIVE, (0.0,) + (0.2,) * 5),
}


def rows(parameters: list[Tensor], tasks: int) -> list[Tensor]:
    """(seeds, in, out) -> (seeds * tasks, in, out), the parameters that each task starts from."""
    return [p.repeat_interleave(tasks, 0) for p in parameters]


def pooled(support: Examples, query: Examples) -> Examples:
    """Both data sets in one: what a learner without a query may use."""
    return Examples(torch.cat((support.x, query.x), 1), torch.cat((support.y, query.y), 1))


def start(method: Method, seeds: int) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and step sizes, (seeds, in, out); no step sizes unless they are learned."""
    drawn = [method.network.initial(Generator().manual_seed(seed)) for seed in range(seeds)]
    theta = [torch.stack(p).requires_grad_() for p in zip(*drawn)]
    sizes = method.inner.step_sizes([p.detach() for p in theta]) if method.inner.learn_lr else []
    return theta, [s.requires_grad_() for s in sizes]


def iterate(method: Method, theta: list[Tensor], sizes: list[Tensor], iteration: int) -> Tensor:
    """Set the gradients of one iteration; returns the loss (seeds,)."""
    seeds, inner = len(theta[0]), method.inner
    count = seeds * TASKS
    tasks = FAMILY.tasks(torch.arange(count) + iteration * count)
    support, query = (Examples(*FAMILY.sample(tasks, POINTS, 0, episode)) for episode in (0, 1))
    adapted = lambda data, create_graph: adapt(
        method.loss,
        inner,
        rows(theta, TASKS),
        [data] * inner.steps,
        count,
        rows(sizes, TASKS) or None,
        shared=False,
        create_graph=create_graph,
        guard=False,
    )
    if method.reptile:
        phi = adapted(pooled(support, query), False)
        for p, end in zip(theta, phi[-1]):
            p.grad = p.detach() - end.detach().unflatten(0, (seeds, TASKS)).mean(1)
        return method.loss(phi[-1], query).detach().view(seeds, TASKS).mean(1)
    if method.weights[0] == 1:
        losses = method.loss(rows(theta, TASKS), pooled(support, query))
    else:
        stages = adapted(support, True)
        losses = sum(w * method.loss(phi, query) for w, phi in zip(method.weights, stages) if w)
    losses = losses.view(seeds, TASKS).mean(1)
    losses.sum().backward()
    return losses.detach()


def errors(method: Method, theta: list[Tensor], sizes: list[Tensor], family: Sinusoid, tasks: Waves) -> Tensor:
    """(steps + 1, seeds, tasks) squared error on the grid after 0 to 10 steps, all on the same 10 points."""
    seeds, count = len(theta[0]), len(tasks.id)
    repeat = lambda data: Examples(*(x.repeat(seeds, 1, 1) for x in data))
    support, grid = repeat(family.sample(tasks, POINTS, 1)), repeat(family.grid(tasks))
    start_at = rows([p.detach() for p in theta], count)
    step_sizes = rows([s.detach() for s in sizes], count) or None
    stages = adapt(
        method.loss, method.inner, start_at, [support] * STEPS, seeds * count, step_sizes, False, False, False
    )
    with torch.no_grad():
        return torch.stack([method.loss(phi, grid).view(seeds, count) for phi in stages])


def sharpness(method: Method, theta: list[Tensor], tasks: Waves, iterations: int = 60) -> Tensor:
    """(seeds, tasks) largest curvature of the support loss at the initial parameters, by power iteration."""
    seeds, count = len(theta[0]), len(tasks.id)
    support = Examples(*(x.repeat(seeds, 1, 1) for x in FAMILY.sample(tasks, POINTS, 1)))
    at = [p.requires_grad_() for p in rows([p.detach() for p in theta], count)]
    gradient = torch.autograd.grad(method.loss(at, support).sum(), at, create_graph=True)
    generator = Generator().manual_seed(0)
    v = [torch.randn(p.shape, generator=generator) for p in at]
    for _ in range(iterations):
        length = sum((x**2).sum((1, 2)) for x in v).sqrt()[:, None, None]
        v = [x / length for x in v]
        product = torch.autograd.grad(gradient, at, v, retain_graph=True)
        curvature = sum((x * y).sum((1, 2)) for x, y in zip(v, product))
        v = product
    return curvature.view(seeds, count)


def summary(error: Tensor) -> dict[str, list[list[float]]]:
    """(steps + 1, seeds, tasks) -> numbers [step][seed]. Tasks that diverged count in the median and the interquartile
    mean as they are, infinitely bad at worst; a mean that is not finite is null."""
    error = error.double().nan_to_num(nan=math.inf)
    bounded = error.clamp(max=1e30)  # beyond any quartile that a learner worth a line has
    number = lambda x: x if math.isfinite(x) else None
    each = lambda function, x: [[number(function(seed)) for seed in step] for step in x]
    return {
        "median": each(lambda seed: seed.median().item(), bounded),
        "interquartile_mean": each(interquartile_mean, bounded),
        "mean": each(lambda seed: seed.mean().item(), error),
        "diverged": each(lambda seed: (seed > DIVERGED).double().mean().item(), error),
    }


def run(name: str, method: Method, seeds: int, iterations: int | None) -> dict:
    """Train and score one learner."""
    splits = {key: split(FAMILY, key, TEST_TASKS) for key in ("test", "shifted")}
    theta, sizes = start(method, seeds)
    optimiser = torch.optim.Adam([*theta, *sizes], lr=1e-3)
    last = (iterations or method.iterations) if method.trained else 0
    begin, found = time.perf_counter(), {"iterations": last, "checkpoints": {}}
    for iteration in tqdm(range(last + 1), desc=name, unit="iteration", mininterval=5):
        if iteration in CHECKPOINTS or iteration == last:
            error = errors(method, theta, sizes, *splits["test"])
            at = {"after_steps": summary(error)}
            if name == "MAML":
                curvature = sharpness(method, theta, splits["test"][1])
                product = 0.01 * curvature  # its step size
                at["sharpness"] = {
                    "quantiles": torch.quantile(product, torch.tensor([0.05, 0.5, 0.95, 1.0]), dim=1).T.tolist(),
                    "unstable": (product > 2).double().mean(1).tolist(),
                }
            found["checkpoints"][str(iteration)] = at
        if iteration < last:
            optimiser.zero_grad()
            iterate(method, theta, sizes, iteration)
            optimiser.step()
    found["shifted"] = summary(errors(method, theta, sizes, *splits["shifted"]))
    del found["shifted"]["diverged"]  # its bound is for the amplitudes of training
    if name == "MAML":  # one seed, task by task: which tasks diverge
        steps = (0, 1, 10)
        after = {str(k): error[k, 0].clamp(max=1e30).tolist() for k in steps}
        found["tasks"] = {"sharpness": (0.01 * curvature[0]).tolist(), "after": after}
    return found | {"seconds": round(time.perf_counter() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="training seeds (default 5)")
    parser.add_argument("--iterations", type=int, help="instead of each learner's own number")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="learners to run")
    parser.add_argument("--json", type=Path, help="file to write to; learners already in it are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.strftime("%Y-%m-%d")
    command = shlex.join(["python", "-m", "benchmarks.sinusoid", *sys.argv[1:]])
    stored = arguments.json is not None and arguments.json.exists()
    results = json.loads(arguments.json.read_text())["results"] if stored else {}
    for name in arguments.only:
        results[name] = run(name, METHODS[name], arguments.seeds, arguments.iterations) | {"command": command}
        *_, last = results[name]["checkpoints"].values()
        median = [statistics.mean(step) for step in last["after_steps"]["median"]]
        diverged = [statistics.mean(step) for step in last["after_steps"]["diverged"]]
        line = "  ".join(f"{k}: {median[k]:.3f} ({100 * diverged[k]:.1f} %)" for k in (0, 1, 2, 5, 10))
        print(f"{name:26s} median error after k steps (diverged)   {line}", flush=True)
        if arguments.json:
            arguments.json.parent.mkdir(exist_ok=True)
            arguments.json.write_text(compact(report(results, arguments, began)))


def compact(report: dict) -> str:
    """JSON with four significant digits, and a list of numbers on one line."""
    text = json.dumps(report, indent=1)
    text = re.sub(r"-?\d+\.\d+(e[+-]?\d+)?", lambda number: f"{float(number[0]):.4g}", text)
    return re.sub(r"\[[^\[\]{}]*\]", lambda row: " ".join(row[0].split()), text) + "\n"


def report(results: dict, arguments: argparse.Namespace, began: str) -> dict:
    """Everything measured, with what it was measured by."""
    equal = {name: found["checkpoints"].get(str(COMPARED)) for name, found in results.items()}
    after_one = {name: statistics.mean(at["after_steps"]["median"][1]) for name, at in equal.items() if at}
    ratios = {
        f"{name.replace(' ', '_').replace(',', '')}_vs_average_task": after_one[name] / after_one["average task"]
        for name in after_one
        if "average task" in after_one and name != "average task"
    }
    environment = {
        "date": began,
        "seeds": arguments.seeds,
        "dtype": "float32",
        "threads": 1,
        "device": "cpu",
        "ecomlib": version("ecomlib"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": measure.processor(),
        "commit": measure.commit(),
        "seconds": round(sum(found["seconds"] for found in results.values())),
    }
    return {"ratios": ratios, "environment": environment, "results": results}


if __name__ == "__main__":
    main()
