"""The second-order meta-gradient: ours next to higher, torchopt, parallel-metalearn and loops over tasks, in one run.

    python -m benchmarks.meta_gradient                  # ours, two loops, and the peers that are installed
    pip install .[benchmarks]                           # adds the peers
    python -m benchmarks.meta_gradient --device cuda    # on a GPU
    python -m benchmarks.meta_gradient --json FILE      # ratios, times, limits and the machine, for a program to read
    python -m benchmarks.meta_gradient --quick          # tiny sizes, nothing compiled: does it run, do all agree?

Sinusoid regression (Finn et al. 2017: 1-40-40-1 ReLU, 10 + 10 points) with 25 and 1,024 tasks and 1 and 5 inner steps;
the policy gradient of 40 tasks x 20 episodes (8 numbers in, 64-64 tanh, 11 actions, likelihood-ratio inner loss, PPO's
clipped outer loss) with 20 and 50 days; and TRPO's direction on the same (gradient and 10 conjugate-gradient steps).
Every variant's gradient is compared with a float64 reference before anything is timed. Variants take turns within a
round; medians over rounds; one thread, float32. On the CPU every variant, ours and theirs, runs with torch's matrix
products as they are and routed through oneDNN, and each counts with its better setting. README.md says what each
ratio means. Compiling takes one to three minutes in all, once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from ecomlib.learners import mlp_adjoint, output_losses
from ecomlib.learners.adaptation import Inner, adapt
from ecomlib.learners.adaptation import meta_gradient as meta_gradient_reference
from ecomlib.learners.output_losses import Episodes
from ecomlib.learners.ppo import clipped_surrogate
from ecomlib.learners.trpo import conjugate_gradient
from ecomlib.networks import MLP, Module
from ecomlib.policies import Categorical
from ecomlib.rollout import Trajectories
from ecomlib.surrogates import ratio

from . import measure, peers
from .peers import Problem

CLIP, DAMPING, AGREEMENT = 0.2, 1e-5, 2e-4


class Variant(NamedTuple):
    """A way to compute the gradient: ``run`` is timed, ``result`` then gives it as one vector."""

    run: Callable[[], object]
    result: Callable[[], Tensor]


class Case(NamedTuple):
    """A problem, and how to take its outer loss and batch its data."""

    name: str
    problem: Problem
    network: MLP
    supervised: bool
    inner: Callable  # output losses of ours
    outer: Callable
    support: tuple  # task first, batched
    query: tuple
    chunk: int  # tasks at a time, for the variants that leave it to the user


# ------------------------------------------------------------------------------------------ problems
def squared_error(outputs: Tensor, data: tuple) -> Tensor:
    return ((outputs - data[1]) ** 2).mean()


def sinusoid(tasks: int, steps: int, device: str, name: str) -> Case:
    """Sine waves with random amplitude and phase, 10 points to adapt and 10 to score."""
    generator = Generator().manual_seed(tasks)
    network = MLP((1, 40, 40, 1), torch.relu)
    parameters = network.initial(generator)
    parameters[-2] = parameters[-2] * 100  # a last layer like the others
    amplitude, phase = (
        low + width * torch.rand(tasks, 1, 1, generator=generator) for low, width in ((0.1, 4.9), (0, 3))
    )

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.rand(tasks, 10, 1, generator=generator) * 10 - 5
        return x.to(device), (amplitude * torch.sin(x - phase)).to(device)

    support, query = draw(), draw()
    each = [list(zip(*data)) for data in (support, query)]
    parameters = [p.to(device) for p in parameters]
    problem = Problem(network.sizes, nn.ReLU, parameters, *each, squared_error, squared_error, 0.01, steps)
    mse = output_losses.squared_error
    return Case(name, problem, network, True, mse, mse, support, query, min(tasks, 128))


def surrogate(outputs: Tensor, data: tuple, episodes: int, clip: float | None = None) -> Tensor:
    """Minus the likelihood-ratio or the clipped surrogate of one task. Without ``torch.distributions``, whose checks
    would cost the peers time and which ``vmap`` does not take."""
    _, action, log_prob, advantage = data
    r = (torch.log_softmax(outputs, -1).gather(-1, action[:, None])[:, 0] - log_prob).exp()
    if clip is None:
        return -(r * advantage).sum() / episodes
    return -torch.minimum(r * advantage, r.clamp(1 - clip, 1 + clip) * advantage).sum() / episodes


def policy_gradient(tasks: int, days: int, episodes: int, device: str, clip: float | None, name: str) -> Case:
    """Episodes of random observations and advantages, collected by a policy near the one to be differentiated."""
    generator = Generator().manual_seed(days)
    policy = Categorical(MLP((8, 64, 64, 11)))
    parameters = policy.initial(generator)
    parameters[-2] = parameters[-2] * 100

    def draw() -> Episodes:
        lead = (days, tasks, episodes)
        observation = torch.randn(*lead, 8, generator=generator)
        action, log_prob = policy.sample(parameters, observation, torch.rand(*lead, 1, generator=generator))
        log_prob = log_prob + 0.1 * torch.randn(lead, generator=generator)
        data = Trajectories(observation, action, log_prob, torch.zeros(lead), torch.ones(lead))
        advantage = torch.randn(lead, generator=generator)
        return Episodes(*(field.to(device) for field in Episodes.of(data, advantage)))

    support, query = draw(), draw()
    rows = lambda data: [
        tuple(x.flatten(0, 1) for x in (o, a, p, w))
        for o, a, p, w in zip(data.observation, data.action, data.log_prob, data.advantage)
    ]
    inner, outer = (partial(surrogate, episodes=episodes, clip=c) for c in (None, clip))
    parameters = [p.to(device) for p in parameters]
    problem = Problem(policy.network.sizes, nn.Tanh, parameters, rows(support), rows(query), inner, outer, 0.1, 1)
    ours = output_losses.softmax_ratio
    of_outer = ours if clip is None else output_losses.softmax_clipped_ratio(clip)
    return Case(name, problem, policy.network, False, ours, of_outer, support, query, min(tasks, 8))


# ------------------------------------------------------------------------------------------ ours
def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def average(gradient: Callable, tasks: int, chunk: int, data: list) -> Callable[[], list[Tensor]]:
    """Runs ``gradient`` (mean over its tasks) on ``chunk`` tasks at a time, which must divide ``tasks``."""
    parts = [[[tuple(x[i : i + chunk] for x in each) for each in data]] for i in range(0, tasks, chunk)]

    def run() -> list[Tensor]:
        total = gradient(*parts[0][0])
        for part in parts[1:]:
            total = [t + g for t, g in zip(total, gradient(*part[0]))]
        return [t / len(parts) for t in total]

    return run


def kept(run: Callable[[], list[Tensor]], transposed: bool = False) -> Variant:
    """Keeps the last result. A module of torch holds its weights transposed."""
    last = []

    def keep() -> None:
        last[:] = run()

    return Variant(keep, lambda: (peers.flat if transposed else flat)(last))


def any_module(case: Case, compiled: bool) -> Variant:
    """The reference engine on an ``nn.Module``: grad(vmap(grad)) of ``torch.func``, whole or compiled whole."""
    problem, module = case.problem, case.problem.module()
    network, inner = Module(module, problem.sizes[-1]), Inner(steps=problem.steps, lr=problem.lr)
    loss = lambda of: lambda parameters, data: of(network.outputs(parameters, data[0]), data)
    losses = loss(problem.inner), loss(problem.outer)
    parameters = [p.detach() for p in module.parameters()]

    def gradient(support: tuple, query: tuple) -> list[Tensor]:
        return meta_gradient_reference(*losses, inner, parameters, [support] * problem.steps, query, 0)

    gradient = torch.compile(gradient, fullgraph=True, dynamic=False) if compiled else gradient
    rows = lambda data: [torch.stack(field) for field in zip(*data)]
    data = [rows(problem.support), rows(problem.query)]
    tasks = len(problem.support)
    chunk = case.chunk if compiled and tasks % case.chunk == 0 else tasks
    return kept(average(gradient, tasks, chunk, data), transposed=True)


def hand_batched(case: Case) -> Variant:
    """What the learners do with any network: all tasks side by side, autograd through the inner steps."""
    problem, network = case.problem, case.network
    inner = Inner(steps=problem.steps, lr=problem.lr)
    if case.supervised:
        loss = outer = lambda p, data: ((network.outputs(p, data[0]) - data[1]) ** 2).mean((-2, -1))
        data = [case.support, case.query]
    else:
        policy = Categorical(network)

        def of(surrogate: Callable) -> Callable:
            def loss(parameters: list[Tensor], data: tuple) -> Tensor:
                observation, action, log_prob, mask, advantage = (x.transpose(0, 1) for x in data)
                return -surrogate(
                    policy, parameters, Trajectories(observation, action, log_prob, mask, mask), advantage
                )

            return loss

        clipped = case.outer is not output_losses.softmax_ratio
        loss, outer = of(ratio), of(partial(clipped_surrogate, clip=CLIP) if clipped else ratio)
        data = [case.support, case.query]

    def gradient(support: tuple, query: tuple) -> list[Tensor]:
        leaves = [p.detach().requires_grad_() for p in problem.parameters]
        phi = adapt(loss, inner, leaves, [support] * problem.steps, len(support[0]))[-1]
        return list(torch.autograd.grad(outer(phi, query).mean(), leaves))

    tasks = len(problem.support)
    return kept(average(gradient, tasks, case.chunk if tasks % case.chunk == 0 else tasks, data))


def mlp(case: Case, compiled: bool, chunk: int | None = None) -> Variant:
    """``mlp_adjoint.meta_gradient``."""
    problem, steps = case.problem, case.problem.steps
    data = ([case.support] * steps, case.query, [problem.lr] * steps)
    settings = {"outer": case.outer, "chunk": chunk, "compile": compiled}
    run = partial(mlp_adjoint.meta_gradient, case.network, case.inner, problem.parameters, *data, **settings)
    return kept(lambda: run().gradient)


def gradient_variants(case: Case, quick: bool) -> tuple[dict[str, Variant], dict[str, Variant]]:
    """Ours and theirs."""
    ours = {"any module": any_module(case, False), "hand-batched": hand_batched(case), "MLP": mlp(case, False)}
    if not quick:
        ours["any module, compiled"] = any_module(case, True)
        ours["MLP, compiled"] = mlp(case, True, case.chunk)
    theirs = {}
    for name, (module, run) in peers.gradients(case.problem, case.supervised).items():
        theirs[name] = Variant(run, partial(peers.gradient_of, module))
    return ours, theirs


def divergence(outputs: Tensor) -> Tensor:
    """KL of one task's policy from itself: 0, with the Fisher information as its curvature."""
    new = torch.log_softmax(outputs, -1)
    old = new.detach()
    return (old.exp() * (old - new)).sum(-1).mean()


def trust_region_variants(case: Case, quick: bool) -> tuple[dict[str, Variant], dict[str, Variant]]:
    """TRPO's direction: gradient, then 10 steps of conjugate gradient. What is compared is one Fisher-vector product,
    of the gradient: rounding grows from step to step of conjugate gradient."""
    problem = case.problem

    def ours(solve: Callable) -> Tensor:
        data = (problem.parameters, [case.support], case.query, [problem.lr])
        gradient = mlp_adjoint.meta_gradient(case.network, case.inner, *data, case.outer).gradient
        product = mlp_adjoint.fisher_vector_product(case.network, case.inner, output_losses.softmax_divergence, *data)
        sizes = [p.numel() for p in problem.parameters]
        shaped = lambda v: [part.view_as(p) for part, p in zip(v.split(sizes), problem.parameters)]
        return solve(lambda v: flat(product(shaped(v))), flat(gradient))

    def variant(direction: Callable) -> Variant:
        steps = lambda product, b: conjugate_gradient(lambda v: product(v) + DAMPING * v, b, 1 if quick else 10)
        return Variant(lambda: direction(steps), lambda: direction(lambda product, gradient: product(gradient)))

    theirs = peers.trust_regions(problem, divergence)
    return {"MLP, Gauss-Newton": variant(ours)}, {name: variant(run) for name, run in theirs.items()}


# ------------------------------------------------------------------------------------------ checks and work
def in_double(case: Case) -> Case:
    """The same problem in float64."""
    wide = lambda data: tree_map(lambda x: x.double() if x.is_floating_point() else x, data)
    problem, lists = case.problem, ("parameters", "support", "query")
    problem = problem._replace(**{name: wide(getattr(problem, name)) for name in lists})
    return case._replace(problem=problem, support=wide(case.support), query=wide(case.query))


def disagreement(result: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest entry."""
    return ((result.double() - reference).abs().max() / reference.abs().max()).item()


def work(case: Case, trust_region: bool) -> dict[str, float]:
    """GFLOP of matrix products, and GB moved if no activation stays in cache, counted from the formula.

    A unit is one product with every weight matrix for every sample. A gradient takes 3 (forward 1, backward 2), a
    Hessian-vector product 6 (2 forward, 4 backward), a Gauss-Newton product 4.
    """
    sizes, steps = case.network.sizes, case.problem.steps
    samples = case.support[0].numel() // sizes[0]
    units = 9 * steps + 3
    if trust_region:
        units += 3 * steps + 1 + 10 * (6 * steps + 4 + 6 * steps)
    products = sum(fan_in * fan_out for fan_in, fan_out in zip(sizes, sizes[1:]))
    return {"GFLOP": 2e-9 * samples * products * units, "GB": 2 * 4e-9 * samples * sum(sizes[1:-1]) * units}


def measure_case(case: Case, variants: Callable, rounds: int, device: str, quick: bool) -> tuple[dict, set[str]]:
    """Milliseconds of every variant under every setting, after all were found to agree; and the names of ours."""
    reference = variants(in_double(case), True)[1]["loop"]
    reference.run()
    reference = reference.result()
    ours, theirs = variants(case, quick)
    settings = list(measure.SETTINGS) if device == "cpu" else ["default"]

    def under(setting: str, variant: Variant) -> None:
        with measure.matmul_setting(setting):
            variant.run()

    runs = {}
    for name, variant in tqdm({**theirs, **ours}.items(), desc=f"{case.name}: compile and compare", leave=False):
        for setting in settings:
            with measure.matmul_setting(setting):
                variant.run()
                error = disagreement(variant.result(), reference)
            if not error < AGREEMENT:
                raise SystemExit(f"{case.name}: {name} ({setting}) is off the reference by {error:.1e}")
            runs[name, setting] = partial(under, setting, variant)
    times = measure.interleaved(runs, rounds, device, 0.0 if quick else 0.2)
    return {name: {s: times[name, s] for s in settings} for name in {**ours, **theirs}}, set(ours)


def ratios_of(name: str, times: dict, ours: set[str]) -> dict[str, float]:
    """What the result file says of one problem. Every side counts with its better setting, unless the key says not."""
    best = {variant: min(by_setting.values()) for variant, by_setting in times.items()}
    plain = {variant: by_setting["default"] for variant, by_setting in times.items()}
    peer = lambda of: min(value for variant, value in of.items() if variant not in ours)
    mine = lambda of: min(of[variant] for variant in ours)
    ratios = {f"{name}_vs_loop": best["loop"] / mine(best), f"{name}_vs_best_peer": peer(best) / mine(best)}
    ratios[f"{name}_vs_best_peer_default_setting"] = peer(plain) / mine(plain)
    for variant in sorted(ours):
        key = variant.lower().replace(",", "").replace(" ", "_").replace("-", "_")
        ratios[f"{name}_{key}_vs_loop"] = best["loop"] / best[variant]
        ratios[f"{name}_{key}_vs_best_peer"] = peer(best) / best[variant]
    return ratios


def print_case(name: str, times: dict, ours: set[str], done: dict[str, float], limits: dict[str, float]) -> dict:
    """The table of one problem, and how far its best time is from the machine's limits."""
    best = {variant: min(by_setting.values()) for variant, by_setting in times.items()}
    peer = min((v for v in best if v not in ours), key=best.get)
    settings = list(next(iter(times.values())))
    print(f"\n{name}: best peer is {peer}")
    print(
        f"{'':2}{'milliseconds':34s}" + "".join(f"{s:>12s}" for s in settings) + f"{'x loop':>10s}{'x best peer':>13s}"
    )
    for variant in sorted(best, key=best.get, reverse=True):
        row = "".join(f"{times[variant][s]:12.3f}" for s in settings)
        row += f"{best['loop'] / best[variant]:10.1f}{best[peer] / best[variant]:13.2f}"
        print(f"{'* ' if variant in ours else '  '}{variant:34s}{row}")
    fastest = min(best[v] for v in ours)
    peak = max(value for key, value in limits.items() if key.startswith("GEMM"))
    bounds = {
        "milliseconds at GEMM peak": 1e3 * done["GFLOP"] / peak,
        "milliseconds at memory bandwidth": 1e3 * done["GB"] / limits["memory GB/s"],
        "share of GEMM peak": 1e3 * done["GFLOP"] / peak / fastest,
    }
    print(f"  {done['GFLOP']:.3g} GFLOP: {bounds['milliseconds at GEMM peak']:.2f} ms at the measured GEMM peak; "
          f"{done['GB']:.3g} GB if no activation stayed in cache: "
          f"{bounds['milliseconds at memory bandwidth']:.2f} ms at the measured bandwidth; "
          f"ours reaches {bounds['share of GEMM peak']:.0%} of the GEMM peak")  # fmt: skip
    return {**done, **bounds}


def memory(cases: dict[str, Callable[[int, int], Case]], device: str) -> dict[str, dict[str, float]]:
    """Peak MB by variant, tasks at a time and inner steps; per task and per inner step from the differences."""
    table = {}
    for name, make in cases.items():
        case = {(t, k): make(t, k) for t, k in ((1, 1), (2, 1), (2, 2))}
        whole = case[2, 1]
        tasks = len(whole.problem.support)
        ways = {
            "any module, torch.func": lambda c, chunk: any_module(c, False) if chunk is None else None,
            "hand-batched": lambda c, chunk: hand_batched(c._replace(chunk=chunk or len(c.problem.support))),
            "MLP": lambda c, chunk: mlp(c, False, chunk or len(c.problem.support)),
        }
        for way, build in ways.items():
            all_at_once = {key: measure.peak_memory(build(c, None).run, device) for key, c in case.items()}
            row = {
                f"MB, {tasks} tasks at once": all_at_once[2, 1],
                "KB a task": 1e3 * (all_at_once[2, 1] - all_at_once[1, 1]) / (tasks / 2),
                "KB a task and further inner step": 1e3 * (all_at_once[2, 2] - all_at_once[2, 1]) / tasks,
            }
            if (chunked := build(whole, whole.chunk)) is not None:
                row[f"MB, {whole.chunk} tasks at a time"] = measure.peak_memory(chunked.run, device)
            table[f"{name}: {way}"] = row
    return table


def with_steps(case: Case, steps: int) -> Case:
    """The same problem with another number of inner steps."""
    return case._replace(problem=case.problem._replace(steps=steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds; every variant runs once a round (default 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--json", type=Path, help="file to write ratios, times, limits and environment to")
    parser.add_argument(
        "--only", nargs="+", help="problems (or memory); others that the --json file has stay as they are"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes and nothing compiled")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, quick, rounds = arguments.device, arguments.quick, 1 if arguments.quick else arguments.rounds

    many, few, products, episodes = (8, 4, 4, 4) if quick else (1024, 25, 40, 20)
    days = (3, 5) if quick else (20, 50)
    sines = [("sinusoid_25", few, 1), ("sinusoid_25_5_steps", few, 5), ("sinusoid_1024", many, 1)]
    sines += [("sinusoid_1024_5_steps", many, 5)]
    problems = [(partial(sinusoid, tasks, steps, device, name), gradient_variants) for name, tasks, steps in sines]
    for clip, prefix, variants in ((CLIP, "rl", gradient_variants), (None, "trpo", trust_region_variants)):
        for length, nominal in zip(days, (20, 50)):
            make = partial(policy_gradient, products, length, episodes, device, clip, f"{prefix}_{nominal}")
            problems.append((make, variants))

    limits = measure.machine_limits(device, 0.0 if quick else 0.2)
    environment = measure.environment("meta_gradient", device, rounds=rounds, quick=quick)
    measure.print_environment(environment, limits)
    sine = lambda half, steps: sinusoid(many * half // 2, steps, device, "")
    policy = lambda half, steps: with_steps(
        policy_gradient(products * half // 2, days[0], episodes, device, CLIP, ""), steps
    )
    result = {"ratios": {}, "environment": {}, "milliseconds": {}, "limits": {}, "memory": {}, "measured": {}}
    if arguments.only and arguments.json and arguments.json.exists():
        result = json.loads(arguments.json.read_text(encoding="utf-8"))
    result["environment"], result["limits"]["machine"] = environment, limits
    if not arguments.only or "memory" in arguments.only:
        result["memory"] = memory({"sinusoid": sine, "policy gradient": policy}, device)
        print("\npeak memory")
        for name, row in result["memory"].items():
            print(f"  {name:42s}" + "; ".join(f"{value:.4g} {unit}" for unit, value in row.items()))
        measure.write(arguments.json, result)
    for make, variants in tqdm(problems, desc="problems", unit="problem"):
        case = make()
        if arguments.only and case.name not in arguments.only:
            continue
        torch._dynamo.reset()  # nothing compiled for one problem serves another
        started = measure.conditions()
        times, ours = measure_case(case, variants, rounds, device, quick)
        result["measured"][case.name] = {"started": started, "ended": measure.conditions(), "rounds": rounds}
        result["milliseconds"][case.name] = times
        result["ratios"] |= ratios_of(case.name, times, ours)
        done = work(case, case.name.startswith("trpo"))
        result["limits"][case.name] = print_case(case.name, times, ours, done, limits)
        measure.write(arguments.json, result)


if __name__ == "__main__":
    main()
