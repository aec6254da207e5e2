"""LogitPricing, few shots: a product is sold for one episode (14 days) in 1, 5 or 20 stores of a chain; then each
learner has adapted and sells it for a second. What is the second episode worth, and what did the two earn together?

    python -m benchmarks.pricing_few_shot --stores 5 --seed 0 --json benchmarks/results/pricing_few_shot_5_0.json
    python -m benchmarks.pricing_few_shot --summary benchmarks/results      # the table of all stored runs

All stores of a chain sell the same product, so their episodes are the N episodes of one task. Compared: PPO-MAML
trained for the second episode (``maml``), and for both (``lifetime``); the same adaptation from random initial
parameters (``scratch``) and from the best policy for the average product (``pretrain``), each with the inner step size
that suits it best on training products; greedy Bayes and Thompson, with the true prior, on the pooled days of all
stores (``PricingBelief``, stores); and the greedy Bayesian who is handed the very support episodes of PPO-MAML and
learns nothing afterwards (``same data``): nobody who must post one price on those data can expect more.

A seed is a training seed, 1,000 test products of its own and the shoppers of their stores; within a seed all methods
meet the same products, and their shoppers are the same uniforms. Scores use the expected profit of the posted prices.
Progress is saved every 50 iterations under build/pricing_few_shot, and the same command goes on from there. ``--train``
chooses among the three trainings; what is already in the file is kept, so that one can be added later.
"""

from __future__ import annotations

import argparse
import json
import platform
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
from ecomlib.baselines import GreedyBayes, Thompson
from ecomlib.evaluation.statistics import normalised_score, paired_difference, t_interval
from ecomlib.families import LogitPricing, split, take
from ecomlib.learners import MAML, Inner, MAMLConfig, MetaTraining, PPOStep
from ecomlib.networks import MLP
from ecomlib.policies import Categorical
from ecomlib.returns import per_transition, standardise
from ecomlib.rollout import Trajectories, trial
from ecomlib.surrogates import ratio

SHELF = LogitPricing()
METHODS = ("maml", "lifetime", "pretrain", "scratch", "greedy", "thompson", "same data")
TRAINED = METHODS[:3]
TEST_TASKS = 1000


@dataclass(frozen=True)
class Protocol:
    """Everything that a run depends on but the number of stores and the seed."""

    iterations: int = 400
    """Outer steps of PPO-MAML, fixed before the published runs; what the last one leaves is tested."""
    pretrain_iterations: int = 100
    """Outer steps of the policy for the average product, which are enough for it to settle."""
    store_episodes: int = 400
    """Episodes of an iteration and stage, over all products: products times stores."""
    most_tasks: int = 200
    """No more products than this in an iteration."""
    inner_lr: float = 4.0
    """First inner step size, of which Meta-SGD makes one for every parameter."""
    lr: float = 3e-3
    """Outer step size (Adam)."""
    epochs: int = 3
    """Adam steps an iteration."""
    hidden: int = 32
    """Units of the one hidden layer."""
    lifetime_weights: tuple[float, float] = (1.0, 1.0)
    """Weights of the two episodes in the training for both."""
    tuned_lr: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0, 256.0)
    """Inner step sizes tried for ``scratch`` and ``pretrain``."""

    def tasks(self, stores: int) -> int:
        """Products of an iteration."""
        return min(self.most_tasks, max(1, self.store_episodes // stores))


class Calendar:
    """A network that sees the day and its traffic multiplier only: what was sold reaches the policy by adaptation."""

    def __init__(self, hidden: int):
        self.network = MLP((2, hidden, SHELF.actions))
        self.output_size, self.tensors, self.head = SHELF.actions, self.network.tensors, self.network.head
        self.initial = self.network.initial

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """As ``MLP.outputs``."""
        return self.network.outputs(parameters, observation[..., [0, 2]])


def profit_of_day(data: Trajectories) -> Tensor:
    """(T, M, N) profit of the day less the product's mean over all days and stores, corrected for the weekday.

    A price has no effect on later days, so later profits would only be noise. The mean over all days and stores needs
    no second store; it shrinks the expected gradient by one part in the number of store-days (eq-sampling-baseline).
    """
    profit = data.reward / SHELF.seen(data.observation).weekday
    return profit - profit.mean((0, 2), keepdim=True)


def money(data: Trajectories) -> Tensor:
    """The outer loop's advantage: ``profit_of_day`` of all products in one unit, since money is what is scored."""
    profit = profit_of_day(data)
    return per_transition(profit / profit.std(), data.mask)


def ratio_in_own_unit(policy: Categorical, parameters: list[Tensor], data: Trajectories, advantage: Tensor) -> Tensor:
    """The inner loop's surrogate: ``ratio`` with ``profit_of_day`` in units of the product's own standard deviation, so
    that one step size serves products whose turnovers differ a hundredfold."""
    own = per_transition(standardise(profit_of_day(data), data.mask), data.mask)
    return ratio(policy, parameters, data, own)


def learner(stores: int, protocol: Protocol, weights: tuple[float, float], inner: Inner) -> MAML:
    """PPO-MAML on the chain: one support episode in every store, one inner step."""
    config = MAMLConfig(tasks=protocol.tasks(stores), episodes=stores, stage_weights=weights, advantage=money)
    policy = Categorical(Calendar(protocol.hidden))
    return MAML(policy, inner, PPOStep(lr=protocol.lr, epochs=protocol.epochs), config)


def meta_sgd(protocol: Protocol) -> Inner:
    """One inner step with a learned step size for every parameter."""
    return Inner(lr=protocol.inner_lr, surrogate=ratio_in_own_unit, learn_lr=True)


def train(maml: MAML, run: dict[str, Any], checkpoint: Path, iterations: int) -> tuple[list[Tensor], float, list]:
    """Meta-parameters, processor seconds and training curve; goes on from ``checkpoint`` if it is of this run."""
    state, seconds = None, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        if saved["run"] != run:
            raise ValueError(f"{checkpoint} holds another run: delete it")
        state, seconds = MetaTraining(**saved["state"]), saved["seconds"]
    started = time.process_time()

    def save(state: MetaTraining) -> None:
        if state.iteration % 50 == 0 or state.iteration == iterations:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            total = seconds + time.process_time() - started
            unfinished = checkpoint.with_suffix(".tmp")
            torch.save({"run": run, "state": state._asdict(), "seconds": total}, unfinished)
            unfinished.replace(checkpoint)

    state = maml.meta_train(SHELF, run["seed"], iterations, start=state, callback=save)
    curve = [list(log.values())[:2] for log in state.history[:: max(1, iterations // 20)]]
    return state.meta, seconds + time.process_time() - started, curve


# ------------------------------------------------------------------------------------------------- evaluation
class SameData(GreedyBayes):
    """Posts the given prices ``actions`` (T, M, N) in the first episode; then what its posterior thinks best, without
    learning any more."""

    def __init__(self, family: LogitPricing, actions: Tensor):
        super().__init__(family, stores=True)
        self.actions = actions

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """As the parent's."""
        super().begin(context, tasks, episodes)
        self.learning = True

    def choose(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The given price, then the best one."""
        day = self.family.seen(observation).day.long()[0, 0]
        return self.actions[day] if self.learning else super().choose(observation, noise)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Learn from the first episode only."""
        if self.learning:
            super().observe(action, reward, next_observation, done)

    def end_episode(self) -> None:
        """The first episode is over."""
        self.learning = False


def adapted_actions(maml: MAML, meta: list[Tensor], family: LogitPricing, tasks: Any, seed: int) -> Tensor:
    """(2, T, M, N) prices before and after the inner step."""
    phi, support = maml.train_task(meta, family, tasks, seed)
    query = maml.evaluate_task(phi[-1], family, tasks, seed, episode=1)
    return torch.stack((support[0].data.action, query.action))


def scores(family: LogitPricing, tasks: Any, actions: Tensor) -> dict[str, float]:
    """Scores of the first episode, the second and both, of prices (2, T, M, N)."""
    blind, oracle = family.blind_return(tasks), family.oracle_return(tasks)
    returns = family.mean_reward(tasks, actions).sum(1).mean(-1)
    before, after = map(float, normalised_score(returns, blind, oracle))
    return {"before": before, "after": after, "lifetime": normalised_score(returns.mean(0), blind, oracle)}


def tuned(stores: int, protocol: Protocol, theta: list[Tensor]) -> tuple[MAML, float]:
    """The learner that adapts ``theta`` with the inner step size of ``protocol.tuned_lr`` that gives the best score
    after adaptation on 300 training products."""
    _, tasks = split(SHELF, "train", 300)
    after = {}
    for lr in protocol.tuned_lr:
        maml = learner(stores, protocol, (0.0, 1.0), Inner(lr=lr, surrogate=ratio_in_own_unit))
        after[lr] = scores(SHELF, tasks, adapted_actions(maml, theta, SHELF, tasks, seed=0))["after"]
    best = max(after, key=after.get)
    return learner(stores, protocol, (0.0, 1.0), Inner(lr=best, surrogate=ratio_in_own_unit)), best


def evaluate(
    sellers: dict[str, Callable[[LogitPricing, Any, int], Tensor]], stores: int, seed: int, name: str
) -> dict[str, dict[str, float]]:
    """Scores of the sellers on the products of ``seed`` from the split ``name``; where PPO-MAML is among them, of the
    Bayesians too."""
    family, tasks = split(SHELF, name, TEST_TASKS * (seed + 1))
    tasks = take(tasks, slice(TEST_TASKS * seed, None))
    luck = 1_000_000 + seed
    actions = {method: seller(family, tasks, luck) for method, seller in sellers.items()}
    if "maml" in actions:
        agents = {
            "greedy": GreedyBayes(SHELF, stores=True),  # the prior stays that of training, also where products moved
            "thompson": Thompson(SHELF, stores=True),
            "same data": SameData(SHELF, actions["maml"][0]),
        }
        for method, agent in agents.items():
            actions[method] = trial(family, tasks, agent, 2, stores, luck, progress=False).action
    return {method: scores(family, tasks, chosen) for method, chosen in actions.items()}


def result(arguments: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    """Train, test, and everything a result file holds."""
    stores, seed = arguments.stores, arguments.seed
    weights = {"maml": (0.0, 1.0), "lifetime": protocol.lifetime_weights, "pretrain": (1.0, 0.0)}
    mamls, metas, seconds, curves, chosen = {}, {}, {}, {}, {}
    for method in arguments.train:
        run = {"method": method, "stores": stores, "seed": seed, "protocol": asdict(protocol) | {"iterations": None}}
        mamls[method] = learner(stores, protocol, weights[method], meta_sgd(protocol))
        count = protocol.pretrain_iterations if method == "pretrain" else protocol.iterations
        checkpoint = arguments.checkpoints / f"{method}_{stores}_{seed}.pt"
        print(f"training {method}, {stores} stores, seed {seed}")
        metas[method], seconds[method], curves[method] = train(mamls[method], run, checkpoint, count)
    if "pretrain" in mamls:
        metas["pretrain"] = metas["pretrain"][: mamls["pretrain"].policy.tensors]
    if "maml" in mamls:
        metas["scratch"] = mamls["maml"].policy.initial(Generator().manual_seed(seed))
    for method in {"pretrain", "scratch"} & set(metas):
        mamls[method], chosen[method] = tuned(stores, protocol, metas[method])
    sellers = {
        method: lambda family, tasks, luck, m=method: adapted_actions(mamls[m], metas[m], family, tasks, luck)
        for method in mamls
    }
    return {
        "stores": stores,
        "seed": seed,
        "scores": {name: evaluate(sellers, stores, seed, name) for name in ("test", "shifted")},
        "inner_lr": chosen,
        "curves": curves,
        "cpu_seconds": seconds,
        "protocol": asdict(protocol),
        "environment": {method: environment() for method in arguments.train},
    }


def merged(stored: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A stored result with the methods of another run of the same settings added."""
    same = ("stores", "seed", "protocol")
    if any(stored[key] != json.loads(json.dumps(found[key])) for key in same):
        raise ValueError("the result file holds a run of other settings: name another file with --json")
    for key in ("inner_lr", "curves", "cpu_seconds", "environment"):
        found[key] = stored[key] | found[key]
    for name, scores_ in found["scores"].items():
        found["scores"][name] = stored["scores"][name] | scores_
    return found


def environment() -> dict[str, Any]:
    """What produced a result, apart from the settings."""
    return {
        "command": "python -m benchmarks.pricing_few_shot " + shlex.join(sys.argv[1:]),
        "library": measure.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": measure.processor(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }


def summary(folder: Path) -> str:
    """The table of all stored runs: mean over seeds with Student's 95 % interval, and paired differences."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("pricing_few_shot_*.json"))]
    if not runs:
        raise SystemExit(f"{folder} holds no pricing_few_shot_*.json")
    lines = []
    for name in ("test", "shifted"):
        for stores in sorted({run["stores"] for run in runs}):
            chosen = sorted((r for r in runs if r["stores"] == stores), key=lambda r: r["seed"])
            lines.append(f"\n{name} products, {stores} stores, {len(chosen)} seeds" + " " * 12 + "after - PPO-MAML's")
            for method in [m for m in METHODS if all(m in r["scores"][name] for r in chosen)]:
                values = {k: [r["scores"][name][method][k] for r in chosen] for k in ("before", "after", "lifetime")}
                cells = []
                for key in values:
                    mean = sum(values[key]) / len(chosen)
                    half = t_interval(values[key]).high - mean if len(chosen) > 1 else float("nan")
                    cells.append(f"{key} {mean:6.3f} ±{half:.3f}")
                reference = [r["scores"][name]["maml"]["after"] for r in chosen]
                if len(chosen) > 1 and method != "maml":
                    gap = paired_difference(values["after"], reference)
                    cells.append(f"{gap.estimate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]")
                lines.append(f"  {method:10s} " + "   ".join(cells))
    seconds = sorted(run["cpu_seconds"]["maml"] for run in runs)
    lines.append(f"\ntraining PPO-MAML: {seconds[0]:.0f} to {seconds[-1]:.0f} s of processor time; ±: 95 % over seeds")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Protocol()
    add("--stores", type=int, default=5, help="stores of the chain: support episodes of a product (5)")
    add("--seed", type=int, default=0, help="training seed (0)")
    add("--iterations", type=int, default=default.iterations, help=f"outer steps ({default.iterations})")
    add("--train", nargs="+", choices=TRAINED, default=TRAINED, help="what is trained (all three)")
    add("--json", type=Path, help="file to write the result to")
    add("--checkpoints", type=Path, default=Path("build/pricing_few_shot"), help="folder where progress is kept")
    add("--summary", type=Path, metavar="FOLDER", help="print the table of the results in FOLDER and stop")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(arguments.summary))
        return
    torch.set_num_threads(1)
    stored = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else None
    if stored:
        arguments.train = [method for method in arguments.train if method not in stored["cpu_seconds"]]
        if not arguments.train:
            raise SystemExit(f"{arguments.json} holds these trainings already")
    found = result(arguments, Protocol(iterations=arguments.iterations))
    found = merged(stored, found) if stored else found
    test = {method: row["after"] for method, row in found["scores"]["test"].items()}
    if "maml" in test:
        found["ratios"] = {f"after_maml_over_{m.replace(' ', '_')}": test["maml"] / test[m] for m in METHODS[4:]}
    for name, by_method in found["scores"].items():
        print(f"{name} products, {arguments.stores} stores, seed {arguments.seed}: score before, after, both")
        for method, row in by_method.items():
            print(f"  {method:10s} " + "  ".join(f"{value:6.3f}" for value in row.values()))
    print("processor seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in found["cpu_seconds"].items()))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
