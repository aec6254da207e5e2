"""2D navigation of Finn, Abbeel and Levine (2017): meta-train, adapt to the 40 published goals, compare.

    python -m benchmarks.navigation --method trpo --seed 0 --json benchmarks/results/navigation_trpo_0.json
    python -m benchmarks.navigation --summary benchmarks/results      # the table of all stored runs

Methods: ``trpo`` and ``ppo`` are TRPO-MAML and PPO-MAML; ``pretrain`` learns the best single policy for the average
goal (TRPO on the return before adaptation) and ``random`` learns nothing: they bracket what meta-training is worth.
All four are tested alike: 4 policy-gradient steps on each of the 40 goals, step sizes 0.5 and then 0.25, each from
whole episodes of at least 4,000 transitions; the return after k steps is that of the episodes collected after k steps.

The published experiment trained one inner step. Its curve after two steps is reached by training two, with the test's
own step sizes, and by counting the return of every stage. The weight of the return before adaptation keeps theta itself
from running away, which nothing else in the objective forbids. A lower bound on the standard deviation (std) is for the
second step: near a goal a policy with a small std arrives sooner, but its gradient grows like 1 / std, and below 0.4
the step of 0.25 overshoots on the few goals that were not reached after the first. Both were chosen on the training
seeds 100 to 102, with weights 0 or 0.2, radii 0.01, 0.015 and 0.02, and bounds 0 and 0.4, and so were PPO's step sizes
(0.001 or 0.002 for weights; 0.004, 0.006 or 0.02 for log std), before the published runs of seeds 0 to 4.

Progress is saved every 10 iterations under build/navigation, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks import measure
from ecomlib.evaluation.adaptation import AdaptationReturns, adaptation_returns
from ecomlib.evaluation.statistics import t_interval
from ecomlib.families import Goals, PointNavigation
from ecomlib.learners import MAML, Inner, MAMLConfig, MetaTraining, PPOStep, TRPOConfig, TRPOStep
from ecomlib.networks import MLP
from ecomlib.policies import Gaussian
from ecomlib.returns import linear_feature_advantage
from ecomlib.rollout import Trajectories, rollout_transitions

FAMILY = PointNavigation()
PUBLISHED = {
    "TRPO-MAML, 2017": ([-40.41, -11.68, -3.33, -3.23, -3.35], [4.06, 2.19, 0.56, 0.58, 0.60]),
    "pre-trained, 2017": ([-40.81, -19.73, -11.72, -8.47, -7.49], [4.09, 3.03, 1.67, 0.54, 0.38]),
    "random, 2017": ([-82.66, -57.96, -53.84, -46.81, -42.91], [2.19, 1.86, 1.64, 1.30, 1.29]),
}
"""Mean return after 0 to 4 steps and 1.96 standard errors over the 40 goals, of one training seed: decoded from the
result files of the authors' repository."""
PUBLISHED_ORACLE = -2.29
"""A policy trained by the authors to see its goal; the exact optimum is ``PointNavigation.oracle_return``."""


@dataclass(frozen=True)
class Protocol:
    """Everything that a run depends on but its method and seed."""

    iterations: int = 100
    """Outer steps; fixed before the first published run, and the last one is what is tested."""
    tasks: int = 20
    """Goals of an iteration."""
    transitions: int = 2000
    """Steps of each goal and stage: whole episodes until there are as many."""
    inner_lr: tuple[float, ...] = (0.5, 0.25)
    """Step sizes of adaptation, in training and in the test, where the last one repeats."""
    stage_weights: tuple[float, ...] = (0.2, 0.4, 0.4)
    """Share of the return before adaptation, after one step and after two, in what is maximised."""
    discount: float = 0.99
    """gamma of the advantages."""
    hidden: tuple[int, ...] = (100, 100)
    """ReLU layers of the Gaussian policy, as published."""
    minimum_std: float = 0.4
    """Lower bound of the policy's standard deviation, in units of the longest move."""
    radius: float = 0.015
    """TRPO: largest mean divergence of the adapted policies from the old ones (published: 0.01)."""
    fisher_transitions: int = 250
    """TRPO: steps of each goal and stage that Fisher-vector products use; gradient and line search use all."""
    lr: float = 2e-3
    """PPO: step size of Adam."""
    log_std_lr: float = 0.006
    """PPO: step size of Adam for log std: at that of the weights it would lag behind, at 0.02 run ahead of them."""
    epochs: int = 5
    """PPO: Adam steps an iteration."""
    test_transitions: int = 4000
    """Steps of each test goal and adaptation step."""
    test_steps: int = 4
    """Adaptation steps of the test."""
    test_seed: int = 12345
    """Seed of the test episodes, the same for every run, so that runs are paired."""


def counted_in_transitions(transitions: int) -> Callable[..., Trajectories]:
    """A ``Collect``: whole episodes of every task until each has ``transitions`` steps."""
    return lambda family, tasks, policy, parameters, seed, episode: rollout_transitions(
        family, tasks, policy, parameters, transitions, seed, episode
    )


def learner(method: str, protocol: Protocol, transitions: int) -> MAML:
    """The meta-learner of a method, with ``transitions`` steps of each task and stage."""
    policy = Gaussian(MLP((2, *protocol.hidden, 2), torch.relu), minimum_std=protocol.minimum_std)
    weights, inner = protocol.stage_weights, Inner(steps=len(protocol.inner_lr), lr=protocol.inner_lr)
    if method == "pretrain":  # the return before adaptation alone: no gradient passes through the one inner step
        weights, inner = (1.0, 0.0), Inner(steps=1, lr=protocol.inner_lr[0])
    if method == "ppo":
        outer = PPOStep(lr=protocol.lr, epochs=protocol.epochs, log_std_lr=protocol.log_std_lr)
    else:
        outer = TRPOStep(TRPOConfig(radius=protocol.radius), transitions=protocol.fisher_transitions)
    config = MAMLConfig(
        tasks=protocol.tasks,
        stage_weights=weights,
        advantage=linear_feature_advantage(protocol.discount),
        collect=counted_in_transitions(transitions),
        compact=True,
    )
    maml = MAML(policy, inner, outer, config)
    maml.name = {"pretrain": "TRPO on the average goal"}.get(method, maml.name)
    return maml


def train(method: str, seed: int, protocol: Protocol, checkpoint: Path, device: str) -> dict[str, Any]:
    """Meta-parameters, training curve and processor seconds; goes on from ``checkpoint`` if it is of this run."""
    maml = learner(method, protocol, protocol.transitions)
    if method == "random":
        theta = [p.to(device) for p in maml.initial(Generator().manual_seed(seed))]
        return {"meta": theta, "curve": [], "seconds": 0.0}
    run = {"method": method, "seed": seed, "protocol": asdict(protocol) | {"iterations": None}}
    state, curve, seconds = None, [], 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        if saved["run"] != run:
            raise ValueError(f"{checkpoint} holds another run: delete it, or name another file with --checkpoint")
        state, curve, seconds = MetaTraining(**saved["state"]), saved["curve"], saved["seconds"]
    started = time.process_time()

    def save(state: MetaTraining) -> None:
        number = len(state.history)
        if number % 10 == 1 or number == protocol.iterations:
            std = state.meta[-1].exp().flatten().tolist()
            curve.append({"iteration": number - 1, **state.history[-1], "std after": std})
        if number % 10 == 0 or number == protocol.iterations:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            total = seconds + time.process_time() - started
            unfinished = checkpoint.with_suffix(".tmp")
            torch.save({"run": run, "state": state._asdict(), "curve": curve, "seconds": total}, unfinished)
            unfinished.replace(checkpoint)

    state = maml.meta_train(FAMILY, seed, protocol.iterations, start=state, device=device, callback=save)
    return {"meta": state.meta, "curve": curve, "seconds": seconds + time.process_time() - started}


def adapt_and_test(meta: list[Tensor], goals: Goals, protocol: Protocol) -> AdaptationReturns:
    """Mean return of each goal's episodes after 0, 1, ... adaptation steps."""
    tester = learner("trpo", protocol, protocol.test_transitions)
    return adaptation_returns(tester, meta, FAMILY, goals, protocol.test_steps, protocol.test_seed)


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """What produced a result, apart from the settings."""
    on_gpu = torch.device(arguments.device).type == "cuda"
    return {
        "command": "python -m benchmarks.navigation " + shlex.join(sys.argv[1:]),
        "library": measure.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else measure.processor(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "matmul": "oneDNN, torch.backends.mkldnn.matmul.fp32_precision = 'bf16' (error as float32 without AMX)"
        if arguments.onednn
        else "torch default",
    }


def result(arguments: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    """Train, test, and everything a result file holds."""
    trained = train(arguments.method, arguments.seed, protocol, arguments.checkpoint, arguments.device)
    started = time.process_time()
    goals = FAMILY.test_goals(arguments.device)
    tested = adapt_and_test(trained["meta"], goals, protocol)
    returns = tested.returns.cpu()
    mean = returns.mean(1)
    published = PUBLISHED["TRPO-MAML, 2017"][0]
    return {
        "method": arguments.method,
        "seed": arguments.seed,
        "ratios": {f"return_{k}_over_published": (mean[k] / published[k]).item() for k in range(len(published))},
        "mean_return": mean.tolist(),
        "half_width": (1.96 * returns.std(1) / returns.shape[1] ** 0.5).tolist(),
        "median_return": returns.median(1).values.tolist(),
        "share_below_-10": (returns < -10).double().mean(1).tolist(),
        "share_diverged": tested.diverged_share.tolist(),
        "return_by_step_and_goal": [[round(r, 4) for r in row] for row in returns.tolist()],
        "oracle_return": FAMILY.oracle_return(goals).mean().item(),
        "blind_return": FAMILY.blind_return(goals).mean().item(),
        "final_std": trained["meta"][-1].exp().clamp(min=protocol.minimum_std).flatten().tolist(),
        "curve": trained["curve"],
        "cpu_seconds": {"training": trained["seconds"], "test": time.process_time() - started},
        "protocol": asdict(protocol),
        "environment": environment(arguments),
    }


def row(name: str, values: list[float], halves: list[float] | None = None) -> str:
    """One line of a table."""
    halves = halves or [None] * len(values)
    cells = [f"{v:8.2f}" + (f" ±{h:5.2f}" if h is not None else " " * 7) for v, h in zip(values, halves)]
    return f"{name:24s}" + "".join(cells)


def summary(folder: Path) -> str:
    """The table of all stored runs: each seed, the mean over seeds with Student's 95 % interval, what is published."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("navigation_*.json"))]
    if not runs:
        raise SystemExit(f"{folder} holds no navigation_*.json")
    lines = [
        "mean return over the 40 goals after",
        row("adaptation steps", []) + "".join(f"{k:8d}       " for k in range(5)),
    ]
    for method in ("trpo", "ppo", "pretrain", "random"):
        seeds = sorted((r for r in runs if r["method"] == method), key=lambda r: r["seed"])
        for run in seeds:
            std = "/".join(f"{s:.2f}" for s in run["final_std"])
            worst = max(run["share_below_-10"][2:])
            lines.append(
                row(f"{method}, seed {run['seed']}", run["mean_return"], run["half_width"])
                + f"  std {std}, {worst:.0%} of goals below -10 from step 2 on, {run['cpu_seconds']['training']:.0f} s"
            )
        if len(seeds) > 1:
            intervals = [t_interval(values) for values in zip(*(r["mean_return"] for r in seeds))]
            halves = [i.high - i.estimate for i in intervals]
            lines.append(row(f"{method}, mean of {len(seeds)}", [i.estimate for i in intervals], halves))
        lines += [""] * bool(seeds)
    lines += [row(name, *values) for name, values in PUBLISHED.items()]
    lines.append(
        f"\nexact oracle {runs[0]['oracle_return']:.2f}, staying at the start {runs[0]['blind_return']:.2f}; "
        f"the published, trained oracle {PUBLISHED_ORACLE}\n"
        "± of one run: 1.96 standard errors over goals; of a mean: Student's 95 % interval over training seeds"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Protocol()
    add("--method", choices=("trpo", "ppo", "pretrain", "random"), default="trpo", help="what is trained (trpo)")
    add("--seed", type=int, default=0, help="training seed (0)")
    add("--iterations", type=int, default=default.iterations, help=f"outer steps ({default.iterations})")
    add("--tasks", type=int, default=default.tasks, help=f"goals of an iteration ({default.tasks})")
    add("--transitions", type=int, default=default.transitions, help=f"steps of a goal ({default.transitions})")
    add("--stage-weights", type=float, nargs=3, default=default.stage_weights, help="weights of phi_0, phi_1, phi_2")
    add("--minimum-std", type=float, default=default.minimum_std, help=f"bound of the std ({default.minimum_std})")
    add("--log-std-lr", type=float, default=default.log_std_lr, help=f"PPO's rate of log std ({default.log_std_lr})")
    add("--radius", type=float, default=default.radius, help=f"TRPO's trust region ({default.radius})")
    add("--json", type=Path, help="file to write the result to")
    add("--checkpoint", type=Path, help="where progress is kept (build/navigation/METHOD_SEED.pt)")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--no-onednn", dest="onednn", action="store_false", help="torch's default matrix products, half as fast")
    add("--summary", type=Path, metavar="FOLDER", help="print the table of the results in FOLDER and stop")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(arguments.summary))
        return
    torch.set_num_threads(1)
    if arguments.onednn:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if arguments.checkpoint is None:
        arguments.checkpoint = Path("build/navigation") / f"{arguments.method}_{arguments.seed}.pt"
    protocol = Protocol(
        iterations=arguments.iterations,
        tasks=arguments.tasks,
        transitions=arguments.transitions,
        stage_weights=tuple(arguments.stage_weights),
        minimum_std=arguments.minimum_std,
        log_std_lr=arguments.log_std_lr,
        radius=arguments.radius,
    )
    found = result(arguments, protocol)
    print(row("adaptation steps", []) + "".join(f"{k:8d}       " for k in range(len(found["mean_return"]))))
    print(row(f"{arguments.method}, seed {arguments.seed}", found["mean_return"], found["half_width"]))
    for name, values in PUBLISHED.items():
        print(row(name, *values))
    print(f"training {found['cpu_seconds']['training']:.0f} s of processor time, final std {found['final_std']}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1)
        numbers = re.compile(r"\[\s*([^\[\]{}]*?)\s*\]")  # a list of numbers on one line
        arguments.json.write_text(numbers.sub(lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n")


if __name__ == "__main__":
    main()
