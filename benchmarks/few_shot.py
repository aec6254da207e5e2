"""Few-shot behaviour prediction on new shops and new departments: who learns most from 1, 5, 20 and 100 sessions.

    python -m benchmarks.few_shot heads --seeds 0 1 2 3 4 --output benchmarks/results/few_shot
    python -m benchmarks.few_shot ideal --seeds 0 --output benchmarks/results/few_shot
    python -m benchmarks.few_shot adapters --seeds 0 1 2 3 4 --output benchmarks/results/few_shot

``heads``: small networks over vectors of the products' texts that were computed once. ``ideal``: the Bayesian who knows
how the log was generated. ``adapters``: low-rank corrections inside the encoder's last block. All of it is sized for
one core of a CPU, 2 to 6 minutes a seed; ``--device cuda`` moves the adapters to a GPU.

One file for every part, setting and training seed, written as it is finished; files that are there are not made again.
Test shops, their supports and queries are the same for all seeds and methods of a part; a seed draws initial parameters
and the order of training.

Step size and number of steps of every method that descends are chosen on validation shops, for each size of support,
from the same grid. Chapter "Few-shot across categories and shops" reads the files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.measure import environment
from ecomlib.environment import distribution_version
from ecomlib.files import write_json
from ecomlib.language.adapters import AdaptedEncoder, LoRAConfig, product_rows, text_tokens
from ecomlib.language.behaviour import BehaviourModel
from ecomlib.language.encoder import load_encoder
from ecomlib.language.features import reduced, tfidf_vectors
from ecomlib.language.few_shot import (
    Reference,
    SessionTasks,
    click_rate,
    compact_features,
    few_shot_learner,
    fine_tuned,
    initial,
    log_odds,
    losses,
    reference,
    score,
    session_tasks,
)
from ecomlib.language.ideal import ideal_probabilities, posterior_particles
from ecomlib.language.products import read_products
from ecomlib.language.shop_shrinkage import learned_prior, own_weights, ridge_prior, shrunk_log_odds
from ecomlib.learners.adaptation import Inner
from ecomlib.networks import MLP

PRODUCTS = Path(__file__).parents[1] / "data" / "complete_journey_products.parquet"
VALIDATION, TEST = 1_000, 10_000
"""Ids of the first validation and test shop; training shops start at 0."""
SUPPORT = 100
"""Sessions of a task that may be support; the query is what comes after."""


class Sizes(NamedTuple):
    """How much of everything."""

    shops: int
    sessions: int
    validation: int
    test: int
    queries: int
    k: tuple[int, ...]


HEADS = Sizes(shops=200, sessions=40, validation=12, test=40, queries=20, k=(1, 5, 20, 100))
ADAPTERS = Sizes(shops=200, sessions=40, validation=4, test=16, queries=10, k=(1, 5, 20))
QUICK = Sizes(shops=6, sessions=8, validation=3, test=4, queries=2, k=(1, 2))


class Lists(NamedTuple):
    """Training tasks, and validation and test tasks whose first SUPPORT sessions are support."""

    train: SessionTasks
    validation: SessionTasks
    test: SessionTasks


def lists(features: Any, sizes: Sizes, setting: str) -> tuple[Lists, pd.DataFrame]:
    """Tasks, and the log of the test.

    "shops": new shops that sell what the shops of training sell. "departments": a task is one department of a shop; in
    training it is one of those sold all along, in the test one that opens later, in a shop that is new too.
    """
    products, model = read_products(PRODUCTS), BehaviourModel()
    late = model.unseen(products)
    department = products["department"].to_numpy(object)
    support = min(SUPPORT, max(sizes.k))
    if setting == "shops":
        known = unknown = [np.flatnonzero(~late)]
    else:
        of = lambda names: [np.flatnonzero((department == name) & chosen) for name, chosen in names]
        known = of([(name, ~late) for name in sorted(set(department[~late]))])
        unknown = of([(name, late) for name in model.unseen_departments])
        known = [rows for rows in known if len(rows) >= 20]
    per = lambda count, parts: max(2, count // len(parts))
    make = lambda first, count, sessions, parts, seed: session_tasks(
        model, products, range(first, first + per(count, parts)), sessions, features, parts, seed
    )
    test, events = make(TEST, sizes.test, support + sizes.queries, unknown, 3_000)
    train = make(0, sizes.shops * (1 if setting == "shops" else 2), sizes.sessions, known, 1_000)[0]
    return Lists(train, make(VALIDATION, sizes.validation, support + sizes.queries, known, 2_000)[0], test), events


class Judge:
    """Scores on a list of tasks after ``support`` sessions were set aside."""

    def __init__(self, tasks: SessionTasks, rate: Tensor, sizes: Sizes):
        self.tasks, self.query = tasks, tasks.after(min(SUPPORT, max(sizes.k)))
        self.rows = self.query.rows()
        self.ends: Reference = reference(self.query, rate)

    def loss(self, odds: Tensor) -> Tensor:
        """(T,)."""
        return losses(odds.to(self.query.exact.dtype), self.rows.y)

    def score(self, odds: Tensor) -> float:
        """Ratio of means over tasks."""
        return float(score(self.loss(odds), self.ends))


def descend(
    network: Any, start: list[Tensor], judge: Judge, k: int, lr: float, steps: int, adapted: Any, chunk: int, last: bool
) -> list[Tensor]:
    """Log-odds after 0, 1, ..., ``steps`` steps, or only after the ``last``, ``chunk`` tasks at a time."""
    support, parts = judge.tasks.first(k), []
    for first in range(0, len(support.x), chunk):
        part = slice(first, first + chunk)
        own = type(support)(support.x[part], support.y[part])
        parts.append(fine_tuned(network, start, own, judge.rows.x[part], lr, steps, adapted, last))
    return [torch.cat(stage) for stage in zip(*parts)]


def tuned(
    network: Any,
    start: list[Tensor],
    judges: tuple[Judge, Judge],
    k: int,
    rates: Sequence[float],
    steps: int,
    adapted: Any = None,
    chunk: int = 10_000,
) -> dict[str, Any]:
    """Score on the test after the step size and number of steps that are best on validation; more steps than 0."""
    validation, test = judges
    best = (-np.inf, rates[0], 1)
    for lr in rates:
        for step, odds in enumerate(descend(network, start, validation, k, lr, steps, adapted, chunk, False)):
            found = validation.score(odds) if step else -np.inf
            best = max(best, (found if np.isfinite(found) else -np.inf, lr, step))
    _, lr, step = best
    odds = descend(network, start, test, k, lr, step, adapted, chunk, True)[-1]
    return {"score": test.score(odds), "lr": lr, "steps": step, "validation": best[0]}


# ------------------------------------------------------------------------------------------ heads over vectors
HEAD_RATES, HEAD_STEPS = (0.03, 0.1, 0.3), 12
TAUS = (0.02, 0.05, 0.1, 0.2, 0.4)
VECTORS = ("MiniLM", "random encoder", "TF-IDF", "category and tier")


@lru_cache(maxsize=4)
def vectors_of(name: str, components: int = 64) -> np.ndarray:
    """(products, d) what a small network is told of a product."""
    products, late = read_products(PRODUCTS), BehaviourModel().unseen(read_products(PRODUCTS))
    texts, sold = list(products["text"]), np.flatnonzero(~late)
    if name == "category and tier":
        indicator = lambda column: (
            products[column].to_numpy(object)[:, None] == np.unique(products[column].to_numpy(object))
        )
        return np.column_stack((3.0 * indicator("category"), indicator("tier"))).astype(np.float32)
    if name == "TF-IDF":
        found = tfidf_vectors(texts, sold, components)
        return found / found[sold].std(0)
    encoder = load_encoder("random" if name == "random encoder" else None)
    return reduced(encoder.embed(texts), sold, components)


def inner_for(k: int) -> tuple[int, float]:
    """(sessions, step size) of the inner loop that a method to be used with k sessions is meta-trained with."""
    return (20, 0.3) if k >= 20 else (min(k, 5), 0.1)


def heads(seed: int, setting: str, name: str, sizes: Sizes, quick: bool) -> dict[str, Any]:
    """All methods over one kind of vectors; meta-learners over two kinds."""
    vectors = vectors_of(name)
    data = lists(lambda events: compact_features(events, vectors), sizes, setting)[0]
    d, rate = vectors.shape[1], click_rate(data.train)
    judges = Judge(data.validation, rate, sizes), Judge(data.test, rate, sizes)
    network = MLP((data.train.x.shape[-1], 64, 32, 2), torch.relu)
    seconds, scores = {}, {}
    every = [3] if quick else [150, 300]

    def train(method: str, k: int, rounds: list[int], judge: Callable[[list[Tensor]], float], **settings: Any) -> Any:
        """The state, of those after ``rounds`` iterations, that validation shops like best."""
        start, state, best = time.process_time(), None, (-np.inf, None)
        learner = few_shot_learner(network, method, Inner(steps=3, lr=inner_for(k)[1]), **settings)
        for iterations in rounds:
            state = learner.meta_train(data.train, seed, iterations, state, progress=False)
            best = max(best, (judge(state.meta), state.meta), key=lambda pair: pair[0])
        seconds[f"{method} {k}" if k else method] = time.process_time() - start
        return best[1]

    half = sizes.sessions // 2
    offset = lambda meta, x: log_odds(network.outputs(meta, x)).detach()
    plain = lambda meta: judges[0].score(offset(meta, judges[0].rows.x))
    rounds = every if quick else [100, 200, 300]
    pooled = train("pooled", 0, rounds, plain, tasks=40, shots=1, queries=min(10, half), lr=3e-3)
    validation, test = judges
    scores["pooled, not adapted"] = {"0": {"score": test.score(offset(pooled, test.rows.x))}}
    scores["place alone"] = {"0": {"score": test.score(place_alone(data.train, test.rows.x, d))}}
    budget = lambda k: 2 if quick else HEAD_STEPS
    if name == "MiniLM":
        scores["pooled, fine-tuned"] = {
            str(k): tuned(network, pooled, judges, k, HEAD_RATES, budget(k)) for k in sizes.k
        }

    columns = slice(0, d + 4)  # the product and its place: what one shop's own weights are fitted on
    raw = lambda x: x[..., columns]
    shrinkage(scores, "pooled", sizes, data, judges, raw, lambda x: offset(pooled, x), seconds, quick)
    methods = ("MAML", "FOMAML", "ANIL", "Reptile") if name == "MiniLM" else ()
    methods = methods[:1] if setting == "departments" else methods
    if len(methods) > 1:
        scratch = initial(network, seed)
        scores["from scratch"] = {str(k): tuned(network, scratch, judges, k, HEAD_RATES, budget(k)) for k in sizes.k}
    for method in methods:
        scores[method], trained = {}, {}
        adapted = network.head if method == "ANIL" else None
        for k in sizes.k if method == "MAML" else sizes.k[:3]:
            shots, lr = inner_for(max(min(k, half), 2 if quick else 5))
            if shots not in trained:
                own = {"k": shots, "lr": lr, "steps": 3, "adapted": adapted, "chunk": 10_000, "last": True}
                judge = lambda meta, own=own: validation.score(descend(network, meta, validation, **own)[-1])
                batch = {"tasks": 16, "shots": shots, "queries": min(20, half)}
                trained[shots] = train(method, shots, every, judge, **batch, lr=2e-3)
            scores[method][str(k)] = tuned(network, trained[shots], judges, k, HEAD_RATES, budget(k), adapted)
        if method == "MAML":  # its last hidden layer in the place of the raw vectors, and the classical method on top
            meta = trained[max(trained)]
            hidden = lambda x, meta=meta: with_one(MLP(network.sizes[:-1], torch.relu).outputs(meta[:-2], x).relu())
            shrinkage(
                scores, "MAML's features", sizes, data, judges, hidden, lambda x: offset(pooled, x), seconds, quick
            )
    return {"scores": scores, "seconds": seconds, "parameters": sum(p.numel() for p in pooled)}


def place_alone(train: SessionTasks, x: Tensor, d: int) -> Tensor:
    """Log-odds of the rate of each place of a slate: what is known before a product or a shop is looked at."""
    every = train.rows()
    where, clicks = every.x[..., d : d + 4], (every.y == 1).to(every.x)[..., None]
    real = (every.y >= 0).to(every.x)[..., None]
    rates = (where * clicks).sum((0, 1)) / (where * real).sum((0, 1))
    return x[..., d : d + 4] @ torch.special.logit(rates)


def with_one(x: Tensor) -> Tensor:
    """A column of ones at the end."""
    return torch.cat((x, torch.ones_like(x[..., :1])), -1).detach()


def shrinkage(
    scores: dict[str, Any],
    title: str,
    sizes: Sizes,
    data: Lists,
    judges: tuple[Judge, Judge],
    z: Callable[[Tensor], Tensor],
    offset: Callable[[Tensor], Tensor],
    seconds: dict[str, float],
    quick: bool,
) -> None:
    """Ridge with a standard deviation chosen on validation, and the prior learned from the shops of training."""
    began = time.process_time()
    every = data.train.rows()
    features = z(every.x)
    start = ridge_prior(features.shape[-1], 0.1, features)
    prior = learned_prior(features, every.y, offset(every.x), start, rounds=2 if quick else 10)
    seconds[f"{title} + learned prior"] = time.process_time() - began

    def shrunk(judge: Judge, k: int, prior: Tensor) -> float:
        own = judge.tasks.first(k)
        found = own_weights(z(own.x), own.y, offset(own.x), prior)
        return judge.score(shrunk_log_odds(found, z(judge.rows.x), offset(judge.rows.x)))

    ridge, learned = scores.setdefault(f"{title} + ridge", {}), scores.setdefault(f"{title} + learned prior", {})
    for k in sizes.k:
        priors = {sd: ridge_prior(len(prior), sd, prior) for sd in TAUS}
        sd = max(TAUS, key=lambda sd: shrunk(judges[0], k, priors[sd]))
        ridge[str(k)] = {"score": shrunk(judges[1], k, priors[sd]), "sd": sd}
        learned[str(k)] = {"score": shrunk(judges[1], k, prior)}


def ideal(seed: int, setting: str, sizes: Sizes, quick: bool) -> dict[str, Any]:
    """The posterior over a shop's taste, on the same tests: ``seed`` draws the particles."""
    nothing = lambda events: np.zeros((len(events), 1), np.float32)
    data, events = lists(nothing, sizes, setting)
    judge = Judge(data.test, click_rate(data.train), sizes)
    products, began = read_products(PRODUCTS), time.process_time()
    family, support = BehaviourModel().family(products), len(data.test.x[0]) - sizes.queries
    scores: dict[str, Any] = {}
    for k in (0, *sizes.k):
        odds, effective = torch.zeros(judge.query.y.shape, dtype=torch.float64), []
        for task, own in events.groupby("task"):
            number = own["session"] % len(data.test.x[0])
            shop = posterior_particles(family, own[number < k], 200 if quick else 1000, seed=seed)
            effective.append(shop.effective)
            rows = own[number >= support]
            click = 1 - ideal_probabilities(family, rows, shop)[:, 0]
            found = torch.full((len(events),), 0.5, dtype=torch.float64)
            found[rows.index.to_numpy().copy()] = torch.tensor(click)
            odds[task] = torch.special.logit(found)[judge.query.row[task].clamp(min=0)]
        score_ = judge.score(odds.flatten(1).to(judge.query.exact.dtype))
        scores[str(k)] = {"score": score_, "fewest effective particles": min(effective)}
    return {"scores": {"ideal": scores}, "seconds": {"ideal": time.process_time() - began}}


# ------------------------------------------------------------------------------------------ adapters
ADAPTER_RATES, ADAPTER_STEPS = (0.1, 0.4), 2


def adapters(seed: int, sizes: Sizes, options: Any, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Corrections of the encoder's last block: pooled training and then fine-tuning, against corrections that were
    meta-learned from the pooled ones on. Pooled training itself goes on for as many rows as FOMAML reads. What is there
    is saved after every method."""
    quick, device, methods = options.quick, options.device, options.methods
    encoder = load_encoder(options.encoder, device=device, attention="eager", seed=seed)
    data = Lists(*(part.to(device) for part in lists(product_rows, sizes, "shops")[0]))
    rate = click_rate(data.train)
    judges = Judge(data.validation, rate, sizes), Judge(data.test, rate, sizes)
    network = AdaptedEncoder(encoder, LoRAConfig(rank=4, alpha=8.0, last=1, autocast=True))
    network.remember(text_tokens(list(read_products(PRODUCTS)["text"]), encoder, 12))
    pooled_steps, meta_steps, shots = (2, 1, 2) if quick else (100, options.iterations, 5)
    tasks, pooled_tasks = (2, 2) if quick else (4, 20)
    scores: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    result = {"scores": scores, "seconds": seconds, "parameters": network.numbers, "encoder": encoder.name}

    def clock() -> float:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def judged(name: str, start: list[Tensor]) -> None:
        began = clock()
        scores[name] = {
            str(k): tuned(network, start, judges, k, ADAPTER_RATES, 2 if quick else ADAPTER_STEPS, None, 4)
            for k in sizes.k
        }
        seconds[f"{name}: tuning and test"] = clock() - began
        print(f"seed {seed} {name}: {scores[name]} {seconds}", flush=True)
        save(result | {"complete": False})

    def plain(meta: list[Tensor]) -> float:
        with torch.no_grad():
            parts = [log_odds(network.outputs(meta, rows)) for rows in judges[1].rows.x.split(4)]
        return judges[1].score(torch.cat(parts))

    # A batch is a session of each of 20 shops: about as many rows as one inner step of four tasks reads.
    learner = few_shot_learner(network, "pooled", Inner(), tasks=pooled_tasks, shots=1, queries=1, lr=3e-3)
    began = clock()
    state = learner.meta_train(data.train, seed, pooled_steps, device=device, progress=False)
    more = pooled_steps + 3 * meta_steps  # two inner steps and the query
    longer = learner.meta_train(data.train, seed, more, state, device=device, progress=False).meta
    seconds["pooled"] = clock() - began
    scores["pooled, not adapted"] = {"0": {"score": plain(longer)}}
    judged("pooled, fine-tuned", longer)
    inner = Inner(steps=2, lr=0.3)
    for method in methods:
        began, second = clock(), method == "MAML"
        settings = {"tasks": tasks, "shots": shots, "queries": shots, "lr": 1e-3}
        meta_learner = few_shot_learner(network, method, inner, **settings)
        warm = state._replace(iteration=0, memory=None, history=[])
        iterations = max(1, meta_steps // 2) if second else meta_steps
        meta = meta_learner.meta_train(data.train, seed, iterations, warm, device=device, progress=False).meta
        seconds[method] = clock() - began
        scores[f"{method}, not adapted"] = {"0": {"score": plain(meta)}}
        judged(method, meta)
    return result | {"iterations": {"pooled": more, "warm start": pooled_steps, "meta": meta_steps}}


# ------------------------------------------------------------------------------------------ the files
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("heads", "ideal", "adapters"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default="cpu", help="of adapters")
    parser.add_argument("--settings", nargs="+", default=["shops", "departments"], choices=("shops", "departments"))
    parser.add_argument("--vectors", nargs="+", default=list(VECTORS), choices=VECTORS, help="of heads")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/few_shot"))
    parser.add_argument("--methods", nargs="+", default=["FOMAML", "Reptile"])
    parser.add_argument("--label", default="", help="part of the files' names, where settings differ")
    parser.add_argument("--iterations", type=int, default=40, help="of meta-training of adapters; MAML takes half")
    parser.add_argument("--encoder", default=None, help="folder of the encoder, or 'random'")
    parser.add_argument("--quick", action="store_true", help="everything tiny: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    vectors = options.vectors if options.part == "heads" else [options.label]
    settings = ["shops"] if options.part == "adapters" else options.settings
    jobs = [(seed, setting, name) for setting in settings for name in vectors for seed in options.seeds]
    for seed, setting, name in jobs:
        stem = "_".join(part.replace(" ", "-") for part in (options.part, setting, name, str(seed)) if part)
        path = options.output / f"few_shot_{stem}.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["complete"]:
            continue
        began = time.perf_counter()
        sizes = QUICK if options.quick else ADAPTERS if options.part == "adapters" else HEADS
        about = environment("few_shot", options.device, transformers=distribution_version("transformers"))
        about["command"] = about["command"].replace(str(options.output), options.output.name)
        about = {"environment": about, "part": options.part, "setting": setting, "vectors": name, "seed": seed}
        path.parent.mkdir(parents=True, exist_ok=True)

        def save(result: dict[str, Any], path: Path = path, about: Any = about, sizes: Sizes = sizes) -> None:
            write_json(path, about | {"sizes": sizes._asdict()} | result)

        if options.part == "heads":
            save(heads(seed, setting, name, sizes, options.quick) | {"complete": True})
        elif options.part == "ideal":
            save(ideal(seed, setting, sizes, options.quick) | {"complete": True})
        else:
            save(adapters(seed, sizes, options, save) | {"complete": True})
        print(f"{path.name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
