"""Click rates of new campaigns: meta-learners, classical shrinkage and the best possible prediction.

    python -m benchmarks.click_rates generated --json benchmarks/results/click_rates.json     # some ten minutes
    python -m benchmarks.click_rates open_bandit --json benchmarks/results/click_rates.json   # some five minutes
    python -m benchmarks.click_rates generated --quick                                        # does it run?

Part ``generated``: campaigns of ``CampaignFamily``, whose click rates are known. A seed is a shop with 200 past
campaigns of its own, 4,000 impressions each, from which every method learns; a training seed; and the impressions of
500 test campaigns, the same for all methods, from which it adapts. Scores: 0 is the best prediction without a log of
the campaign, 1 knows its rates; ratios of means over campaigns, computed from the true rates. Inner step sizes are
chosen on 200 campaigns of a shop that is not among the seeds'.

Part ``open_bandit``: leave one campaign of the Open Bandit sample out; train on the others before hour 72, choose the
number of iterations between hours 72 and 96, adapt to the first 2,000 impressions of each log of the campaign left out,
judge by what came after hour 96. A seed is a training seed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from benchmarks import measure
from ecomlib.families.base import split
from ecomlib.files import write_json
from ecomlib.language import click_metrics, click_studies
from ecomlib.language.campaigns import CampaignFamily, Campaigns
from ecomlib.language.click_rates import OPEN_BANDIT, ClickLoss, FactorisationMachine
from ecomlib.language.click_shrinkage import fit_empirical_bayes, fit_logistic, pooled_logit, posterior, predictive_rate
from ecomlib.learners import GradientStep, Inner, ReptileStep, SupervisedMAML
from ecomlib.learners.supervised import Examples

FAMILY = CampaignFamily()
SUPPORTS = (0, 100, 300, 1000, 3000, 10_000)
PAST, LENGTH, TEST = 200, 4000, 500
PRIOR = 1000.0
"""``ClickLoss.prior_impressions`` of the learners, if not said otherwise."""
GROUPS = (0,) + (1,) * FAMILY.categories


class Method(NamedTuple):
    """One gradient learner."""

    inner: Inner
    rank: int = 4
    prior: float = PRIOR
    support: int = 1000
    reptile: bool = False
    pooled: bool = False
    lr: float = 0.02

    def learner(self, features: int, base_rate: float, query: int, tasks: int) -> SupervisedMAML:
        """With the settings that all share."""
        network = FactorisationMachine(features, self.rank, base_rate)
        outer = ReptileStep(lr=self.lr, adam=True) if self.reptile else GradientStep(lr=self.lr)
        weights = (1.0,) + (0.0,) * self.inner.steps if self.pooled else None
        loss = ClickLoss(base_rate, self.prior)
        return SupervisedMAML(network, self.inner, outer, loss, self.support, query, tasks, weights)


HEAD = FactorisationMachine(2, 4).head
"""Weights and bias of a factorisation machine, beside the vectors."""


def methods(lr: dict[str, float] | None = None) -> dict[str, Method]:
    """Name -> learner, with the inner step sizes ``lr``."""
    rate = lambda name, first=0.3: (lr or {}).get(name, first)
    inner = lambda name, steps, **more: Inner(steps=steps, lr=rate(name), **more)
    anil = lambda name: inner(name, 5, adapted=HEAD, learn_lr=True)
    return {
        "pooled logistic": Method(Inner(lr=0.1), rank=0, pooled=True),
        "pooled FM": Method(Inner(lr=0.1), pooled=True),
        "MAML": Method(inner("MAML", 5)),
        "first-order MAML": Method(inner("first-order MAML", 5, first_order=True)),
        "Reptile": Method(inner("Reptile", 5), reptile=True),
        "ANIL": Method(inner("ANIL", 5, adapted=HEAD)),
        "Meta-SGD": Method(inner("Meta-SGD", 5, learn_lr=True)),
        "Meta-SGD, logistic": Method(inner("Meta-SGD, logistic", 5, learn_lr=True), rank=0),
        "ANIL, learned steps": Method(anil("ANIL, learned steps")),
        "the same, mean loss": Method(anil("ANIL, learned steps"), prior=0.0),
        "the same, trained at 300": Method(anil("ANIL, learned steps"), support=300),
    }


TUNED = ("MAML", "first-order MAML", "Reptile", "ANIL", "Meta-SGD", "Meta-SGD, logistic", "ANIL, learned steps")
RATES = (0.03, 0.1, 0.3, 1.0)
"""Inner step sizes tried."""


# ----------------------------------------------------------------------------------------------- generated campaigns
def shop(seed: int, past: int) -> Campaigns:
    """The past campaigns of a seed."""
    ids = torch.randint(2**62, (past,), generator=Generator().manual_seed(10_000 + seed))
    return FAMILY.tasks(ids)


def score(family: CampaignFamily, tasks: Campaigns, rate: Tensor) -> float:
    """Share of the gap between blind and oracle that a prediction closes."""
    blind, oracle = family.expected_loss(tasks, FAMILY.blind_rate()), family.oracle_loss(tasks)
    return float((blind - family.expected_loss(tasks, rate)).mean() / (blind - oracle).mean())


def rates_of(learner: SupervisedMAML, meta: list[Tensor], counts: Tensor) -> Tensor:
    """(M, cells) after adapting to counts (M, cells, 2); without adapting where they are empty."""
    x = FAMILY.features.expand(len(counts), -1, -1)
    steps = 0 if counts.sum() == 0 else None
    return click_studies.adapted_rates(learner, meta, Examples(x, counts), x, steps).clamp(1e-12, 1 - 1e-12)


def train(method: Method, seed: int, past: int, iterations: int) -> tuple[SupervisedMAML, list[Tensor]]:
    """A learner and its meta-parameters after the past campaigns of a seed."""
    query = LENGTH // 2
    learner = method.learner(FAMILY.features.shape[1], FAMILY.base_rate, query, 25)
    logs = FAMILY.logs(shop(seed, past), LENGTH, method.support, query)
    return learner, learner.meta_train(logs, seed, iterations, progress=False).meta


def tuned(past: int, iterations: int) -> dict[str, dict[str, float]]:
    """Score at 1,000 impressions of every learner and inner step size, on validation campaigns."""
    tasks = shop(-1, 2 * PAST)
    tasks = Campaigns(*(x[PAST:] for x in tasks))
    counts = FAMILY.counts(tasks, 1000, seed=-1)
    found: dict[str, dict[str, float]] = {}
    for name in tqdm(TUNED, desc="tuning"):
        for rate in RATES:
            try:
                learner, meta = train(methods({name: rate})[name], -1, past, iterations)
                value = score(FAMILY, tasks, rates_of(learner, meta, counts))
            except FloatingPointError:
                value = -np.inf
            found.setdefault(name, {})[str(rate)] = value if np.isfinite(value) else -1e9
    return found


def classical(seed: int, past: int):
    """Name -> function of counts to rates: what needs no gradient learner."""
    counts = FAMILY.counts(shop(seed, past), LENGTH, 0)
    design, one = FAMILY.design, torch.ones(FAMILY.cells, 1)
    whole, level = (fit_empirical_bayes(FAMILY.crossed, d, counts, g) for d, g in ((design, GROUPS), (one, (0,))))
    pooled = pooled_logit(FAMILY.crossed, counts)
    base = float(counts[..., 1].sum() / counts[..., 0].sum())
    true_mean = torch.zeros(design.shape[1])
    alone_sd = torch.ones(FAMILY.features.shape[1])

    def observed(y: Tensor) -> Tensor:
        shown, clicks = y.sum(1).unbind(-1)
        return ((clicks + 1) / (shown + 1 / base))[:, None].expand(-1, FAMILY.cells)

    def alone(y: Tensor) -> Tensor:
        offset = torch.full((FAMILY.cells,), float(np.log(base / (1 - base))))
        mode = posterior(FAMILY.features, offset, y, torch.zeros_like(alone_sd), alone_sd).mode
        return torch.sigmoid(offset + mode @ FAMILY.features.T)

    return {
        "Bayes, true prior": lambda y: predictive_rate(design, FAMILY.shared, y, true_mean, FAMILY.effect_sd)[0],
        "empirical Bayes": lambda y: whole.rates(design, y),
        "empirical Bayes, level only": lambda y: level.rates(one, y),
        "pooled logistic with crosses": lambda y: torch.sigmoid(pooled).expand(len(y), -1),
        "own log alone": alone,
        "observed rate": observed,
    }, {"level mean": float(whole.mean[0]), "level sd": float(whole.sd[0]), "category sd": float(whole.sd[1])}


def generated(seeds: list[int], quick: bool) -> dict[str, Any]:
    """Scores [method][split][support] as lists over seeds."""
    past, test, iterations = (20, 20, 3) if quick else (PAST, TEST, 600)
    grid = tuned(past, iterations if quick else 300)
    chosen = {name: float(max(each, key=each.get)) for name, each in grid.items()}
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    estimated, seconds, sizes = [], {}, {}
    for seed in tqdm(seeds, desc="seeds"):
        predictors, effects = classical(seed, past)
        estimated.append(effects)
        for name, method in methods(chosen).items():
            began = time.process_time()
            learner, meta = train(method, seed, past, iterations)
            seconds.setdefault(name, []).append(round(time.process_time() - began, 1))
            sizes[name] = sum(p.numel() for p in meta)
            predictors[name] = lambda y, learner=learner, meta=meta, pooled=method.pooled: rates_of(
                learner, meta, 0 * y if pooled else y
            )
        for part in ("test", "shifted"):
            family, tasks = split(FAMILY, part, test)
            for support in SUPPORTS:
                counts = family.counts(tasks, max(support, 1), seed) * (support > 0)
                for name, rates in predictors.items():
                    value = score(family, tasks, rates(counts))
                    into = scores.setdefault(name, {}).setdefault(part, {})
                    into.setdefault(str(support), []).append(value if np.isfinite(value) else -1e9)
    _, tasks = split(FAMILY, "test", test)
    blind, oracle = FAMILY.expected_loss(tasks, FAMILY.blind_rate()).mean(), FAMILY.oracle_loss(tasks).mean()
    return {
        "seeds": seeds, "supports": list(SUPPORTS), "past campaigns": past, "impressions of each": LENGTH,
        "test campaigns": test, "iterations": iterations, "prior impressions": PRIOR,
        "inner step sizes tried": grid, "inner step sizes": chosen, "log-loss blind": float(blind),
        "log-loss oracle": float(oracle), "scores": scores, "estimated effects": estimated,
        "processor seconds of training": seconds, "meta-parameters": sizes,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------- Open Bandit
BANDIT = {
    "pooled FM": Method(Inner(lr=0.1), pooled=True),
    "MAML, logistic": Method(Inner(lr=0.1), rank=0),
    "first-order MAML, logistic": Method(Inner(lr=0.1, first_order=True), rank=0),
    "Reptile, logistic": Method(Inner(steps=3, lr=0.1), rank=0, reptile=True),
    "Meta-SGD, logistic": Method(Inner(lr=0.1, learn_lr=True), rank=0),
    "ANIL, FM": Method(Inner(steps=3, lr=0.1, adapted=HEAD)),
}


def tuned_logistic(x: np.ndarray, clicks: np.ndarray, validation: list[click_studies.Trial]):
    """A pooled logistic regression and its penalty, the one with the least loss on the validation."""
    later = torch.cat([t.query.x[0] for t in validation]).numpy()
    label = torch.cat([t.query.y[0, :, 1] for t in validation]).numpy()
    models = {penalty: fit_logistic(x, clicks, None, penalty) for penalty in (1.0, 10.0, 100.0, 1000.0)}
    loss = {p: click_metrics.log_loss(label, model.predict_proba(later)[:, 1]) for p, model in models.items()}
    best = min(loss, key=loss.get)
    return models[best], best


def open_bandit(seeds: list[int], quick: bool) -> dict[str, Any]:
    """Metrics with bootstrap intervals of seed means, and the normalised entropy of every seed."""
    table = pd.read_parquet(Path(__file__).parents[1] / "data" / "open_bandit_impressions.parquet")
    x, iterations = OPEN_BANDIT(table), 4 if quick else 60
    labels, blocks, penalties = [], [], []
    rates: dict[str, list[list[np.ndarray]]] = {}
    stopped: dict[str, list[int]] = {}
    for campaign in tqdm(sorted(table["campaign"].unique()), desc="campaigns"):
        held = click_studies.hold_out(table, x, campaign, support=2000, query=1000)
        clicks = table["click"].to_numpy()[held.past]
        base = float(clicks.mean())
        logistic, penalty = tuned_logistic(x[held.past].numpy(), clicks, held.validation)
        penalties.append(penalty)
        one = torch.ones(1, 1)
        totals = torch.stack([t.support.y.sum(1) for t in held.validation])
        level = fit_empirical_bayes(one, one, totals, (0,))
        trained = {}
        for name, method in BANDIT.items():
            learner = method._replace(support=2000, lr=0.003).learner(OPEN_BANDIT.size, base, 1000, 4)
            trained[name] = learner, [click_studies.train_until_best(learner, held, s, iterations) for s in seeds]
            stopped.setdefault(name, []).extend(best.iteration for best in trained[name][1])
        for trial in held.test:
            query = trial.query.x
            labels.append(trial.query.y[0, :, 1].numpy())
            blocks.append(np.array([f"{trial.name} {hour}" for hour in trial.hour]))
            rows = len(labels[-1])
            own = float(level.rates(one, trial.support.y.sum(1, keepdim=True)))
            same = {
                "base rate": np.full(rows, base),
                "own rate, shrunk": np.full(rows, own),
                "pooled logistic": logistic.predict_proba(query[0].numpy())[:, 1],
            }
            for name, rate in same.items():
                rates.setdefault(name, []).append([rate] * len(seeds))
            for name, (learner, runs) in trained.items():
                steps = 0 if learner.stage_weights[0] else None
                adapted = [
                    click_studies.adapted_rates(learner, run.meta, trial.support, query, steps)[0].numpy()
                    for run in runs
                ]
                rates.setdefault(name, []).append(adapted)
    label, block = np.concatenate(labels), np.concatenate(blocks)
    by_seed = {name: np.concatenate([np.stack(r) for r in each], 1) for name, each in rates.items()}
    mean = {name: each.mean(0) for name, each in by_seed.items()}  # an ensemble over training seeds
    found = click_metrics.bootstrap(label, mean, block, "base rate", resamples=99 if quick else 999)
    needed = {
        name: click_metrics.impressions_needed(label, rate, mean["base rate"], gain=0.01)
        for name, rate in mean.items() if name != "base rate"
    }  # fmt: skip
    entropies = {n: [click_metrics.normalised_entropy(label, r) for r in each] for n, each in by_seed.items()}
    return {
        "seeds": seeds, "impressions judged": len(label), "clicks judged": int(label.sum()),
        "blocks": len(set(block)), "metrics": found.to_dict("records"), "normalised entropy by seed": entropies,
        "iterations kept": stopped, "penalties": penalties, "impressions needed to see a gain of 1 %": needed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("generated", "open_bandit"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--json", type=Path, help="file to write to; the other part in it is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    began = time.process_time()
    part = {"generated": generated, "open_bandit": open_bandit}[arguments.part](arguments.seeds, arguments.quick)
    environment = measure.environment("click_rates", "cpu", dtype="float64") | measure.conditions()
    environment["processor seconds"] = round(time.process_time() - began, 1)
    result = {"provenance": environment, **part}
    if arguments.json:
        stored = arguments.json.exists()
        kept = json.loads(arguments.json.read_text(encoding="utf-8")) if stored else {}
        write_json(arguments.json, measure._rounded(kept | {arguments.part: result}))
    else:
        print(measure._rounded(result))


if __name__ == "__main__":
    main()
