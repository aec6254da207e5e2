"""One whole iteration of RL-MAML on LogitPricing: ours next to a loop over tasks with cloned modules, in one run.

    python -m benchmarks.rl_iteration                  # 40 products x 20 episodes, 20 and 50 days
    python -m benchmarks.rl_iteration --device cuda    # on a GPU
    python -m benchmarks.rl_iteration --json FILE      # ratios, phases and the machine, for a program to read
    python -m benchmarks.rl_iteration --quick          # tiny sizes: does it run, do both agree?

An iteration: episodes of every product under the shared policy, advantages, one inner step for each product, episodes
under the adapted policies, their advantages, and an outer step: one epoch of PPO, or TRPO with its line search.

The loop is ours, written as learn2learn and pytorch-maml-rl work: a Python loop over products; one product's 20
episodes are stepped side by side; an ``nn.Sequential`` with ``torch.distributions.Categorical``; a differentiable clone
of the module for every product; TRPO by differentiating the divergence twice. It steps *our* environment, one product
at a time, with ``torch.rand`` for its luck (cheaper than our keyed uniforms), and uses our advantages and our
trust-region step on each product's data. So it measures the loop, not those libraries' environments or worker
processes. Before timing, both sides compute the outer gradient from the same episodes, and must agree.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from ecomlib.families import LogitPricing, sample_tasks
from ecomlib.families.base import take
from ecomlib.learners import MAML, Inner, MAMLConfig, PPOStep, TRPOConfig, TRPOStep
from ecomlib.learners.adaptation import adapt
from ecomlib.learners.maml import PolicyObjective, Stage
from ecomlib.learners.output_losses import of_clipped_surrogate, of_surrogate
from ecomlib.learners.ppo import clipped_surrogate
from ecomlib.learners.trpo import trust_region_step
from ecomlib.policies import CategoricalMLP
from ecomlib.returns import linear_feature_advantage
from ecomlib.rollout import Trajectories, rollout
from ecomlib.surrogates import ratio

from . import measure, peers
from .peers import Problem

LR, CLIP, AGREEMENT = 0.1, 0.2, 2e-4
SAMPLING = ("episodes before", "advantages before", "adaptation", "episodes after", "advantages after")
ADVANTAGE = linear_feature_advantage(gae_lambda=1.0)
Phases = dict[str, float]


class Stopwatch:
    """Milliseconds of each phase, one after another."""

    def __init__(self, device: str):
        self.device, self.phases = device, {}
        self.last = measure.clock(device)

    def phase(self, name: str) -> None:
        now = measure.clock(self.device)
        self.phases[name], self.last = 1e3 * (now - self.last), now


# ------------------------------------------------------------------------------------------ ours
class Ours:
    """The library's learner, its iteration taken apart."""

    def __init__(self, days: int, products: int, episodes: int, outer: PPOStep | TRPOStep, device: str):
        self.family, self.policy = LogitPricing(days=days), CategoricalMLP((6, 64, 64, 11))
        self.device, self.episodes = device, episodes
        inner = Inner(lr=LR, surrogate=ratio)
        config = MAMLConfig(tasks=products, episodes=episodes, advantage=ADVANTAGE)
        self.learner = MAML(self.policy, inner, outer, config)
        self.meta = [p.to(device) for p in self.learner.initial(Generator().manual_seed(0))]
        self.tasks = sample_tasks(self.family, products, Generator().manual_seed(1), device)
        self.round = 0

    def stage(self, parameters: list[Tensor], watch: Stopwatch, when: str) -> Stage:
        """Fresh episodes and their advantages."""
        self.round += 1
        parameters = [p.detach() for p in parameters]
        data = rollout(self.family, self.tasks, self.policy, parameters, self.episodes, 0, self.round)
        watch.phase(f"episodes {when}")
        advantage = ADVANTAGE(data)
        watch.phase(f"advantages {when}")
        return Stage(data, advantage, torch.zeros_like(advantage[0, :, 0]))

    def sample(self, watch: Stopwatch) -> PolicyObjective:
        """Everything before the outer step."""
        support = self.stage(self.meta, watch, "before")
        phi = adapt(self.learner.loss, self.learner.inner, self.meta, [support], len(self.tasks.id), create_graph=False)
        watch.phase("adaptation")
        return PolicyObjective(self.learner, [support, self.stage(phi[-1], watch, "after")])

    def iteration(self) -> Phases:
        """Milliseconds of each phase; the step is taken and thrown away, so that every iteration is the same work."""
        watch = Stopwatch(self.device)
        objective = self.sample(watch)
        self.learner.outer.update(objective, self.meta, None)
        watch.phase("outer step")
        return watch.phases


# ------------------------------------------------------------------------------------------ the loop
class Loop:
    """The same iteration, product by product."""

    def __init__(self, ours: Ours, trust_region: TRPOConfig | None):
        self.ours, self.trust_region = ours, trust_region
        self.markets = [take(ours.tasks, slice(i, i + 1)) for i in range(len(ours.tasks.id))]
        surrogates = [self._loss] * 2 if trust_region else [self._loss, partial(self._loss, clip=CLIP)]
        self.problem = Problem(ours.policy.network.sizes, nn.Tanh, ours.meta, [], [], *surrogates, LR, 1)
        self.module = self.problem.module()

    def _loss(self, outputs: Tensor, data: tuple, clip: float | None = None) -> Tensor:
        """Minus one product's surrogate."""
        _, action, log_prob, advantage, _ = data
        r = (torch.distributions.Categorical(logits=outputs).log_prob(action) - log_prob).exp()
        gain = r * advantage if clip is None else torch.minimum(r * advantage, r.clamp(1 - clip, 1 + clip) * advantage)
        return -gain.sum() / self.ours.episodes

    def play(self, module: nn.Module, market) -> Trajectories:
        """One product's episodes, side by side."""
        family, episodes, device = self.ours.family, self.ours.episodes, self.ours.device
        steps, ones = [], torch.ones(1, episodes, device=device)
        with torch.no_grad():
            state = family.reset(market, episodes, torch.zeros(1, episodes, 1, device=device))
            for _ in range(family.horizon):
                observation = family.observe(market, state)
                distribution = torch.distributions.Categorical(logits=module(observation))
                action = distribution.sample()
                luck = torch.rand(1, episodes, 1, device=device)
                state, reward, _ = family.step(market, state, action, luck)
                steps.append((observation, action, distribution.log_prob(action), reward, ones))
        return Trajectories(*map(torch.stack, zip(*steps)))

    def rows(self, data: Trajectories, advantage: Tensor) -> tuple:
        """One product's steps as rows: what the losses take."""
        observation, action, log_prob, reward, _ = (x.flatten(0, 2) for x in data)
        return observation, action, log_prob, advantage.flatten(), reward

    def iteration(self) -> Phases:
        """As ``Ours.iteration``."""
        watch = Stopwatch(self.ours.device)
        before = [self.play(self.module, market) for market in self.markets]
        watch.phase("episodes before")
        support = [self.rows(data, ADVANTAGE(data)) for data in before]
        watch.phase("advantages before")
        learners = [peers.adapted_clone(self.problem, self.module, data) for data in support]
        watch.phase("adaptation")
        after = [self.play(learner, market) for learner, market in zip(learners, self.markets)]
        watch.phase("episodes after")
        query = [self.rows(data, ADVANTAGE(data)) for data in after]
        watch.phase("advantages after")
        if self.trust_region:
            self.trust_region_step(support, query)
        else:
            self.gradient(support, query)
            torch.optim.Adam(self.module.parameters(), lr=0.0).step()
        watch.phase("outer step")
        return watch.phases

    def gradient(self, support: list[tuple], query: list[tuple]) -> Tensor:
        """Outer gradient of the loss, and in the module's ``.grad``."""
        self.module.zero_grad()
        for own, data in zip(support, query):
            learner = peers.adapted_clone(self.problem, self.module, own)
            (self.problem.outer(learner(data[0]), data) / len(support)).backward()
        return peers.gradient_of(self.module)

    def trust_region_step(self, support: list[tuple], query: list[tuple]) -> None:
        """The library's trust-region step, given products and evaluations by the loop; the module stays as it is."""
        theta, tasks = list(self.module.parameters()), len(support)
        objective, divergence, old = 0.0, 0.0, []
        for own, data in zip(support, query):
            outputs = torch.log_softmax(peers.adapted_clone(self.problem, self.module, own)(data[0]), -1)
            old.append(outputs.detach())
            objective = objective - self.problem.outer(outputs, data) / tasks
            divergence = divergence + self.divergence(old[-1], outputs) / tasks
        gradient = torch.autograd.grad(objective, theta, retain_graph=True)
        slope = torch.autograd.grad(divergence, theta, create_graph=True)

        def product(vector: list[Tensor]) -> tuple[Tensor, ...]:
            along = sum((s * v).sum() for s, v in zip(slope, vector))
            return torch.autograd.grad(along, theta, retain_graph=True)

        def evaluate(candidate: list[Tensor]) -> tuple[float, float]:
            module = peers.clone(self.module)
            peers.update(module, {p: c - q for p, c, q in zip(module.parameters(), candidate, theta)})
            value, kl = 0.0, 0.0
            for own, data, before in zip(support, query, old):
                outputs = torch.log_softmax(peers.adapted_clone(self.problem, module, own)(data[0]), -1)
                value -= self.problem.outer(outputs, data).item() / tasks
                kl += self.divergence(before, outputs).item() / tasks
            return value, kl

        trust_region_step([p.detach() for p in theta], gradient, product, evaluate, self.trust_region)

    @staticmethod
    def divergence(old: Tensor, new: Tensor) -> Tensor:
        """Mean over steps of the KL divergence, from log-probabilities."""
        return (old.exp() * (old - new)).sum(-1).mean()


def disagreement(ours: Ours, loop: Loop) -> float:
    """Relative difference of the two outer gradients on the same episodes."""
    objective = ours.sample(Stopwatch(ours.device))
    if loop.trust_region:
        surrogate, at_outputs = ratio, of_surrogate(ours.policy, ratio)
    else:
        surrogate, at_outputs = partial(clipped_surrogate, clip=CLIP), of_clipped_surrogate(ours.policy, CLIP)
    _, gradient = objective.policy_gradient(ours.meta, surrogate, at_outputs)
    product = lambda stage, i: loop.rows(Trajectories(*(x[:, i : i + 1] for x in stage.data)), stage.advantage[:, i])
    theirs = loop.gradient(*([product(stage, i) for i in range(len(loop.markets))] for stage in objective.stages))
    difference = torch.cat([g.flatten() for g in gradient]) + theirs  # ours ascends, theirs descends
    return (difference.abs().max() / theirs.abs().max()).item()


def timed(sides: dict, settings: list[str], rounds: int, least: float, device: str) -> dict[str, dict[str, Phases]]:
    """Medians over iterations of each phase and of the total, by side and setting; sides take turns."""
    for side in sides.values():
        side.iteration()  # what only a first call pays for
    phases = {(side, setting): [] for side in sides for setting in settings}
    for _ in tqdm(range(rounds), desc="timing", unit="round", leave=False):
        for (side, setting), found in phases.items():
            start, first = measure.clock(device), True
            with measure.matmul_setting(setting):
                while first or measure.clock(device) - start < least:
                    found.append(sides[side].iteration())
                    found[-1]["total"], first = sum(found[-1].values()), False
    medians = lambda found: {name: statistics.median(each[name] for each in found) for name in found[0]}
    return {side: {setting: medians(phases[side, setting]) for setting in settings} for side in sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds; every variant runs once a round (default 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--json", type=Path, help="file to write ratios, phases and environment to")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, quick, rounds = arguments.device, arguments.quick, 1 if arguments.quick else arguments.rounds
    products, episodes = (3, 4) if quick else (40, 20)
    settings = list(measure.SETTINGS) if device == "cpu" else ["default"]
    sizes = {"products": products, "episodes": episodes, "rounds": rounds, "quick": quick}
    environment = measure.environment("rl_iteration", device, **sizes)
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None))

    ratios, milliseconds, rates, differences, measured = {}, {}, {}, {}, {}
    for name, outer in (("ppo", PPOStep(epochs=1, clip=CLIP)), ("trpo", TRPOStep())):
        for nominal, days in ((20, 3 if quick else 20), (50, 5 if quick else 50)):
            key = f"{name}_{nominal}"
            ours = Ours(days, products, episodes, outer, device)
            loop = Loop(ours, outer.trust if name == "trpo" else None)
            differences[key] = disagreement(ours, loop)
            if not differences[key] < AGREEMENT:
                raise SystemExit(f"{key}: the loop's gradient is off ours by {differences[key]:.1e}")
            started = measure.conditions()
            times = timed({"loop": loop, "ours": ours}, settings, rounds, 0.0 if quick else 0.3, device)
            best = {side: min(found.values(), key=lambda phases: phases["total"]) for side, found in times.items()}
            measured[key] = {"started": started, "ended": measure.conditions()}
            milliseconds[key] = times
            ratios[f"{key}_vs_loop"] = best["loop"]["total"] / best["ours"]["total"]
            plain = {side: found["default"]["total"] for side, found in times.items()}
            ratios[f"{key}_vs_loop_default_setting"] = plain["loop"] / plain["ours"]
            sampling = {side: sum(best[side][phase] for phase in SAMPLING) for side in best}
            steps = 2 * days * products * episodes
            if name == "ppo":
                ratios[f"sampling_{nominal}_vs_loop"] = sampling["loop"] / sampling["ours"]
            rates[key] = {f"{side}, env-steps/s with adaptation": 1e3 * steps / sampling[side] for side in best}
            print_phases(f"{name.upper()}-MAML, {days} days", best, ratios[f"{key}_vs_loop"])
            result = {"ratios": ratios, "environment": environment, "milliseconds": milliseconds, "rates": rates}
            measure.write(arguments.json, {**result, "disagreement": differences, "measured": measured})


def print_phases(title: str, best: dict[str, Phases], total_ratio: float) -> None:
    """The table of one problem, each side with its better setting."""
    print(f"\n{title}\n  {'milliseconds':20s}{'loop':>10s}{'ours':>10s}{'ratio':>8s}")
    for phase, theirs in best["loop"].items():
        mine = best["ours"][phase]
        shown = total_ratio if phase == "total" else theirs / max(mine, 1e-9)
        print(f"  {phase:20s}{theirs:10.2f}{mine:10.2f}{shown:8.1f}")


if __name__ == "__main__":
    main()
