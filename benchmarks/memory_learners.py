"""Learners with a memory on the families of the case studies, on the same tasks with the same luck: does a learned
memory beat a Bayesian with the true prior?

    python -m benchmarks.memory_learners pricing                      # RL^2, seeds that are not stored yet
    python -m benchmarks.memory_learners pricing --learner belief     # the policy that reads a learned belief
    python -m benchmarks.memory_learners pricing --learner posterior  # the exact posterior, with learned optimism
    python -m benchmarks.memory_learners --summary                    # the table of all stored results
    python -m benchmarks.memory_learners pricing --quick --folder FOLDER    # tiny sizes: does it run?

A trial is five rounds of one unit of a task: a single stream of decisions, which is what RL^2 was made for. Whether a
learner draws its actions or takes the most likely one is chosen on training tasks, as its settings were. Differences
are paired, from greedy Bayes, from Thompson sampling and from the best tuned rule ("best on training tasks" of
``case_studies``). Trained parameters lie beside the result, so that ``load`` can play them again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks import measure
from benchmarks.bayes_teacher import BeliefTaughtByBayes, TaughtByBayes
from benchmarks.case_methods import PROTOCOLS, QUICK, Protocol, Returns, difference, plain, played, scores
from benchmarks.case_studies import CASES, Study
from benchmarks.posterior_policy import PosteriorConfig, PosteriorLearner
from ecomlib.baselines.oracle import oracle_decisions
from ecomlib.configuration import default_config
from ecomlib.evaluation.memory_studies import MEMORY_FORMAT
from ecomlib.families.base import TaskFamily
from ecomlib.files import write_atomically, write_json
from ecomlib.learners.belief import BeliefConfig, BeliefLearner
from ecomlib.learners.rl2 import RL2, RL2Config

RESULTS = Path(__file__).parent / "results"
UNITS = 1
RIVALS = ("greedy Bayes", "Thompson")


@dataclass(frozen=True)
class Plan:
    """A training of one learner on one family."""

    config: RL2Config | PosteriorConfig
    iterations: int
    expert: str | None = None
    """Of ``bayes_teacher.EXPERTS``: whom the first iterations imitate; None with ``pretrain`` is the oracle."""
    ppo_lr: float | None = None
    """PPO's step size after an expert was imitated; None is the same."""

    def learner(self, family: TaskFamily) -> RL2 | PosteriorLearner:
        """For tasks of this family."""
        if isinstance(self.config, PosteriorConfig):
            return PosteriorLearner(family, self.config)
        config = replace(self.config, anneal=self.iterations)
        reads_belief = isinstance(config, BeliefConfig)
        if self.expert is not None:
            kind = BeliefTaughtByBayes if reads_belief else TaughtByBayes
            return kind(family, config, self.expert, self.ppo_lr)
        return (BeliefLearner if reads_belief else RL2)(family, config, oracle_decisions)


GRU = RL2Config(hidden=32, minibatches=8)
"""One recurrent memory for the whole trial."""
SMALL = replace(GRU, memory="sum", tasks=16, minibatches=4, epochs=2, lr=6e-3, entropy=0.0)
"""For long observations: sums, one for each row, and few trials of an iteration."""
BELIEF = BeliefConfig(
    hidden=32, tasks=32, minibatches=4, epochs=2, lr=6e-3, entropy=0.0, latent=4, decoder_hidden=32, pretrain=70
)
"""A recurrent encoder; all of training imitates, while the belief is learned beside it."""
BELIEF_ROWS = replace(BELIEF, memory="sum", tasks=16, pretrain=36, initial_std=0.05)
"""For long observations, as ``SMALL``: a latent variable of each segment or item."""
NAMES = {"rl2": "RL2", "belief": "belief learner", "posterior": "learned optimism"}
"""Learners, by the names that the book writes."""
PLANS: dict[str, dict[str, Plan]] = {
    "pricing": {
        "rl2": Plan(replace(GRU, pretrain=80, entropy=0.015), 200, "Bayes-UCB"),
        "belief": Plan(BELIEF, 70, "Bayes-UCB"),
        "posterior": Plan(PosteriorConfig(width=1.0, step=0.5), 20),
    },
    "bidding": {
        "rl2": Plan(replace(SMALL, initial_std=0.05, pretrain=46), 46, "greedy Bayes"),
        "belief": Plan(BELIEF_ROWS, 36, "greedy Bayes"),
    },
    "recommendation": {
        "rl2": Plan(replace(SMALL, pretrain=40), 40, "greedy Bayes"),
        "belief": Plan(replace(BELIEF_ROWS, pretrain=30), 30, "greedy Bayes"),
    },
    "inventory": {
        "rl2": Plan(replace(GRU, epochs=2, lr=6e-3, entropy=0.0, pretrain=110), 130, "greedy Bayes", 3e-4),
        "belief": Plan(BELIEF, 70, "greedy Bayes"),
        "posterior": Plan(PosteriorConfig(spread=0.2, tasks=128, step=0.5), 12),
    },
}
"""By family and learner; tuned on training tasks."""


class Comparison:
    """One learner on one family: its plan, its seeds, its file."""

    def __init__(self, name: str, learner: str, folder: Path, quick: bool = False):
        self.name, self.label, self.quick = name, learner, quick
        self.plan = PLANS[name][learner]
        if quick:
            self.plan = tiny(self.plan)
        protocol: Protocol = QUICK if quick else PROTOCOLS[name]
        self.protocol = replace(protocol, rounds=self.plan.config.episodes)
        stored = RESULTS / "case_studies" / f"{name}.json"
        cache = Path("build") / "case_studies" / (f"{name}-quick-memory" if quick else name)
        self.study = Study(name, self.protocol, folder / "none.json" if quick else stored, folder / "runs", cache)
        self.family, self.folder = default_config(name, "ppo-maml").family, folder
        self.learner, self.path = self.plan.learner(self.family), folder / f"{name}-{learner}.json"
        about = {"format": MEMORY_FORMAT, "version": 1, "family": name, "learner": learner, "units": UNITS}
        self.content = about | {"protocol": asdict(self.protocol), "plan": described(self.plan), "seeds": {}}
        self.content = json.loads(json.dumps(self.content))
        if self.path.exists():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if any(stored[key] != self.content[key] for key in ("protocol", "plan")):
                raise SystemExit(f"{self.path} holds a run of other settings: --again makes it anew")
            self.content = stored

    # -------------------------------------------------------------------------------------------- training
    def parameters_path(self, seed: int) -> Path:
        """Where a seed's trained parameters are."""
        return self.folder / f"{self.name}-{self.label}-{seed}.safetensors"

    def parameters(self, seed: int) -> list[Tensor]:
        """Of a trained seed."""
        return load_parameters(self.parameters_path(seed))

    def train(self) -> None:
        """The seeds that are missing, one after another; each is stored when it is done."""
        for seed in range(self.protocol.seeds):
            if str(seed) in self.content["seeds"] and self.parameters_path(seed).exists():
                continue
            began = time.process_time()
            state = self.learner.meta_train(self.family, seed, self.plan.iterations)
            seconds = time.process_time() - began
            self.folder.mkdir(parents=True, exist_ok=True)
            named = {f"{i:02d}": p.detach().contiguous() for i, p in enumerate(state.meta)}
            write_atomically(self.parameters_path(seed), safetensors.torch.save(named))
            about = {"processor seconds": round(seconds, 1), "curve": curve(state.history)}
            self.content["seeds"][str(seed)] = about | measure.conditions()
            self.content.pop("result", None)
            self.save()

    # -------------------------------------------------------------------------------------------- evaluation
    def returns(self, split: str, sample: bool) -> Returns:
        """Returns of all seeds on a list, (S, E, M)."""
        where = self.study.setting(split)
        play = lambda seed: played(self.learner.agent(self.parameters(seed), sample), where, UNITS, self.protocol)
        values = np.stack([play(seed) for seed in range(self.protocol.seeds)])
        return Returns(values, np.zeros(values.shape, dtype=bool), True)

    def rivals(self, split: str) -> dict[str, str]:
        """Whom it is compared with, by what they are: greedy Bayes and Thompson sampling with the prior of training,
        and the best rule on training tasks (on drifting ones, where the test's drift)."""
        found = {rival: rival for rival in RIVALS}
        if "baselines" in self.study.parts:
            found["best"] = self.study.rivals(split, UNITS)["best"]
        return found

    def rival_returns(self, method: str, split: str) -> Returns:
        """Of a classical method: as ``Study.of_agent``, without making agents where the cache has what is asked for."""
        tuned = self.study._stored_tuned().get(method)
        key = method if tuned is None else f"{method}-{tuned[UNITS]}"
        return self.study.returns(key, split, UNITS, lambda: self.study.of_agent(method, split, UNITS))

    def evaluate(self) -> None:
        """Scores and differences on every list."""
        began = time.process_time()
        training = {drawn: self.returns("train", drawn) for drawn in (True, False)}
        on_training = {d: scores(r, self.study.setting("train")) for d, r in training.items()}
        drawn = on_training[True]["lifetime"]["score"] > on_training[False]["lifetime"]["score"]
        result: dict[str, Any] = {
            "actions are": "drawn" if drawn else "the most likely",
            "on training tasks": {
                "drawn": on_training[True]["lifetime"]["score"],
                "the most likely": on_training[False]["lifetime"]["score"],
                "by seed": on_training[drawn]["by seed"],
            },
            "scores": [],
            "differences": [],
        }
        for split in tqdm(self.protocol.splits, desc=f"{self.name}, {self.label}", unit="list"):
            where, found = self.study.setting(split), self.returns(split, drawn)
            about = {"method": NAMES[self.label], "kind": "memory", "split": split, "units": UNITS}
            result["scores"].append(about | scores(found, where))
            for rival, other in self.rivals(split).items():
                theirs = self.rival_returns(other, split)
                for of in ("lifetime", "last round"):
                    lead = difference(found, theirs, where, of)
                    result["differences"].append(about | {"rival": rival, "against": other} | lead)
        environment = measure.environment("memory_learners", "cpu") | measure.conditions()
        environment["processor seconds"] = round(time.process_time() - began, 1)
        self.content["result"] = {"provenance": environment, **plain(result)}
        self.save()

    def save(self) -> None:
        """Write the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)

    def make(self) -> None:
        """What is missing."""
        self.train()
        if "result" not in self.content:
            self.evaluate()


def tiny(plan: Plan) -> Plan:
    """The same in tiny sizes, imitating an expert in the first of two iterations."""
    if isinstance(plan.config, PosteriorConfig):
        small = {"episodes": 3, "tasks": 2, "rules": 2, "kept": 2, "particles": 32, "test_particles": 32}
    else:
        small = {"episodes": 3, "tasks": 2, "replicas": 2, "hidden": 4, "minibatches": 1}
        small |= {"pretrain": min(1, plan.config.pretrain)}
    return replace(plan, config=replace(plan.config, **small), iterations=2)


def described(plan: Plan) -> dict[str, Any]:
    """A plan for the file."""
    own = {"learner": type(plan.config).__name__, "expert": plan.expert, "ppo_lr": plan.ppo_lr}
    return own | {"iterations": plan.iterations, "config": asdict(plan.config)}


def curve(history: list[dict[str, float]], points: int = 20) -> list[list[float]]:
    """[iteration, mean return of an episode] of stretches of training."""
    earned = np.array([next(v for k, v in log.items() if k.startswith("return")) for log in history])
    edges = np.unique(np.linspace(0, len(earned), min(points, len(earned)) + 1).round().astype(int))
    return [[int(b), plain(float(earned[a:b].mean()))] for a, b in zip(edges, edges[1:])]


def load_parameters(path: str | Path) -> list[Tensor]:
    """Trained parameters, as ``RL2.agent`` takes them, in torch's present default precision."""
    stored = safetensors.torch.load_file(path)
    return [stored[name].to(torch.get_default_dtype()) for name in sorted(stored)]


def load(name: str, learner: str = "rl2", seed: int = 0, folder: Path | None = None) -> tuple[Any, list[Tensor]]:
    """A stored learner of a family and its trained parameters, to play with: ``learner.agent(parameters)``."""
    folder = RESULTS / "memory_learners" if folder is None else folder
    family = default_config(name, "ppo-maml").family
    return PLANS[name][learner].learner(family), load_parameters(folder / f"{name}-{learner}-{seed}.safetensors")


def summary(folder: Path) -> None:
    """The table of all stored results."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        seconds = [s["processor seconds"] for s in content["seeds"].values()]
        print(f"\n{content['family']}, {content['learner']}: {len(seconds)} seeds, {np.mean(seconds):.0f} s each")
        if "result" not in content:
            continue
        result = content["result"]
        print(f"  actions are {result['actions are']}; on training tasks {result['on training tasks']}")
        cell = lambda e, x: f"{e[x]:+.3f}, seeds {span(e['seeds'])}, tasks {span(e['tasks'])}"
        for entry in result["scores"]:
            rounds = " ".join(f"{r['score']:.3f}" for r in entry["rounds"])
            print(f"  {entry['split']:9} {cell(entry['lifetime'], 'score')}; rounds {rounds}")
            for lead in result["differences"]:
                if lead["split"] == entry["split"] and lead["of"] == "lifetime":
                    print(f"            less {lead['against']:22} ({lead['rival']}) {cell(lead, 'difference')}")


def span(ends: list[float] | None) -> str:
    """An interval."""
    return "-" if ends is None else f"[{ends[0]:+.3f}, {ends[1]:+.3f}]"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=CASES)
    parser.add_argument("--learner", choices=tuple(NAMES), default="rl2")
    parser.add_argument("--again", action="store_true", help="train and evaluate anew")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; needs --folder")
    parser.add_argument("--folder", type=Path, default=RESULTS / "memory_learners")
    parser.add_argument("--summary", action="store_true", help="print what is stored")
    arguments = parser.parse_args()
    if arguments.summary:
        return summary(arguments.folder)
    if arguments.family is None:
        parser.error("name a family, or --summary")
    if arguments.learner not in PLANS[arguments.family]:
        parser.error(f"{arguments.family} has plans for {', '.join(PLANS[arguments.family])}")
    if arguments.quick and arguments.folder == RESULTS / "memory_learners":
        parser.error("--quick needs --folder: its numbers are no results")
    torch.set_num_threads(1)
    if arguments.again:
        (arguments.folder / f"{arguments.family}-{arguments.learner}.json").unlink(missing_ok=True)
    Comparison(arguments.family, arguments.learner, arguments.folder, arguments.quick).make()
    return None


if __name__ == "__main__":
    main()
