"""Behaviour prediction: a pretrained encoder adapted in several ways, a random one, and words as indicators, on
products that were sold in training and on products that were not.

    python -m benchmarks.behaviour --output FILE                                # what needs no GPU
    python -m benchmarks.behaviour --device cuda --tune --jobs 4 --output FILE  # step sizes, then all fine-tunes
    python -m benchmarks.behaviour --device cuda --cost --output FILE           # seconds a step and memory, alone
    python -m benchmarks.behaviour --quick --device cpu --variant full --output FILE    # tiny sizes: does it run?

A seed is another log of the same shops, cut by time, and other luck in training; every variant sees the same log of a
seed. Step sizes are chosen by the validation loss on the log of a seed that is not among the reported ones. Runs that
the file holds are not made again. Chapter "Behaviour prediction with a pretrained encoder" reads the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, log_loss
from tqdm import tqdm

from benchmarks.measure import environment, peak_memory
from ecomlib.environment import distribution_version
from ecomlib.files import write_json
from ecomlib.language import baselines
from ecomlib.language.behaviour import BehaviourModel
from ecomlib.language.encoder import Encoder, load_encoder
from ecomlib.language.features import reduced, tfidf_vectors
from ecomlib.language.ideal import ideal_probabilities, posterior_particles, prior_particles
from ecomlib.language.metrics import summary
from ecomlib.language.models import (
    ADAPTATIONS,
    ClassifierConfig,
    EventClassifier,
    ensemble,
    further_pretrained,
    on_device,
    predict,
)
from ecomlib.language.products import read_products
from ecomlib.language.sessions import TARGETS, Batch, SessionDataset, Splits, split_by_time
from ecomlib.language.training import TrainingConfig, fit, optimiser_for, reworded, shuffled_labels, training_step

PRODUCTS = Path(__file__).parents[1] / "data" / "complete_journey_products.parquet"
TUNING_SEED = 100


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    shops: int = 200
    sessions: int = 40
    epochs: int = 4
    batch: int = 128
    particles: int = 2000
    components: int = 64
    pretraining: int = 20
    steps: int = 100
    tokens: int = 128
    history: int = 4
    ensemble: bool = True
    own_shops: bool = False
    """Every seed has shops of its own."""
    bfloat16: bool = False
    """Also where there is no GPU."""


SMALL = Sizes(
    shops=1,
    sessions=1600,
    epochs=1,
    batch=32,
    components=128,
    pretraining=5,
    steps=10,
    tokens=64,
    history=2,
    ensemble=False,
    own_shops=True,
    bfloat16=True,
)
"""For one core of a processor: the log of one shop, so that there is one taste to learn; short histories, one pass."""

QUICK = Sizes(shops=4, sessions=6, epochs=1, batch=8, particles=50, components=8, pretraining=1, steps=2)


@dataclass(frozen=True)
class Variant:
    """A way of making a classifier."""

    adaptation: str
    rates: tuple[float, ...]
    """Step sizes of the encoder (of the head, if it is frozen) that are tried."""
    source: str = "pretrained"
    """"pretrained", "random" (weights drawn from the seed) or "further pretrained" on the product texts."""
    change: str = ""
    """"shuffled" labels, "augmented" texts, "balanced" classes, or nothing."""
    members: int = 1
    """Classifiers that are trained with other luck; what they say together is kept as the "ensemble"."""
    tuned_as: str = ""
    """Whose step size it takes; by itself, its own."""
    epochs: float = 1.0
    """Most epochs, times those of the sizes."""


VARIANTS = {
    "frozen": Variant("frozen", (5e-4, 2e-3, 8e-3)),
    "top": Variant("top", (1e-4, 3e-4)),
    "lora": Variant("lora", (3e-4, 1e-3, 3e-3)),
    "full": Variant("full", (3e-5, 1e-4, 3e-4), members=3),
    "random": Variant("full", (1e-4, 3e-4), source="random", epochs=1.5),
    "further frozen": Variant("frozen", (), source="further pretrained", tuned_as="frozen"),
    "further full": Variant("full", (), source="further pretrained", tuned_as="full"),
    "augmented": Variant("full", (), change="augmented", tuned_as="full"),
    "balanced": Variant("full", (), change="balanced", tuned_as="full"),
    "shuffled": Variant("full", (), change="shuffled", tuned_as="full", epochs=0.5),
}
LINEAR = ("tfidf", "tfidf svd", "linear pretrained", "linear random")
"""Logistic regression on words; on their singular vectors; on fixed embeddings of either encoder."""
CLASSICAL = ("place", "ideal", *LINEAR)
"""What needs no GPU: rates by place, the Bayesian who knows how the log was generated, and the linear models."""


# ---------------------------------------------------------------------------------------------- the data of a seed
@lru_cache(maxsize=1)
def products() -> tuple[pd.DataFrame, BehaviourModel, NDArray[np.bool_]]:
    """The product table, the world, and which products are sold from the test on."""
    table, model = read_products(PRODUCTS), BehaviourModel()
    return table, model, model.unseen(table)


@lru_cache(maxsize=2)
def data(seed: int, sizes: Sizes) -> tuple[Splits, NDArray[np.float64], dict[str, NDArray[np.bool_]]]:
    """The parts of a seed's log, exact probabilities of the test part, and its groups of rows."""
    table, model, late = products()
    shops = range(seed * sizes.shops, (seed + 1) * sizes.shops) if sizes.own_shops else range(sizes.shops)
    log = model.generate(table, shops, sizes.sessions, seed)
    splits = split_by_time(log.events.assign(row=np.arange(len(log.events))), model.days[:2])
    new_department = table["department"].isin(model.unseen_departments).to_numpy()
    shown = splits.test["product"].to_numpy()
    groups = {
        "all": np.ones(len(shown), bool),
        "seen": ~late[shown],
        "unseen category": (late & ~new_department)[shown],
        "unseen department": new_department[shown],
    }
    return splits, log.probability[splits.test["row"]], {name: rows for name, rows in groups.items() if rows.any()}


def base_rates(splits: Splits) -> NDArray[np.float64]:
    """(5,) of the training part."""
    return np.bincount(splits.train["event"], minlength=5) / len(splits.train)


def judged(probability: NDArray[np.float64], seed: int, sizes: Sizes) -> dict[str, Any]:
    """Group -> metrics on the test part."""
    splits, exact, groups = data(seed, sizes)
    return summary(splits.test["event"], probability, base_rates(splits), exact, groups)


# ---------------------------------------------------------------------------------------------- without a GPU
def classical_run(name: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """One of CLASSICAL on the log of a seed."""
    torch.set_num_threads(1)
    splits, _, _ = data(seed, sizes)
    table, model, late = products()
    sold, began, about = np.flatnonzero(~late), time.process_time(), {}
    if name == "place":
        probability = baselines.place_rates(splits.train)(splits.test)
        about["parameters"] = 16
    elif name == "ideal":
        torch.set_default_dtype(torch.float64)
        family = model.family(table)
        if sizes.shops == 1:  # one shop: whose past tells its taste
            shop = posterior_particles(family, splits.train, sizes.particles, 12, seed)
            about["effective"] = shop.effective
        else:
            shop = prior_particles(family, sizes.particles, seed)
        probability = ideal_probabilities(family, splits.test, shop)
        torch.set_default_dtype(torch.float32)
    else:
        if name == "tfidf":
            features = baselines.word_features(table["text"], sold)
        elif name == "tfidf svd":
            features = baselines.vector_features(tfidf_vectors(table["text"], sold, sizes.components))
        else:
            encoder = load_encoder(None if name == "linear pretrained" else "random", seed=seed)
            vectors = encoder.embed(table["text"].tolist())
            features = baselines.vector_features(reduced(vectors, sold, sizes.components))
        found = baselines.fit_linear(features, splits.train, splits.validation)
        probability = found.probabilities(splits.test)
        about |= {"parameters": found.parameters, "strength": found.strength, "losses": list(found.losses.values())}
    return about | {"seconds": time.process_time() - began, "groups": judged(probability, seed, sizes)}


# ---------------------------------------------------------------------------------------------- fine-tunes
@lru_cache(maxsize=2)
def encoder_of(source: str, seed: int, device: str, epochs: int) -> Encoder:
    """The encoder that a variant starts from."""
    if source == "random":
        return load_encoder("random", device, seed=seed)
    encoder = load_encoder(device=device)
    if source == "pretrained":
        return encoder
    table, _, late = products()
    return further_pretrained(encoder, table["text"][~late].tolist(), epochs=epochs, seed=seed)


def classifier_run(name: str, seed: int, sizes: Sizes, rate: float, device: str, members: int = 1) -> dict[str, Any]:
    """One fine-tune with one step size; with several ``members``, also what they say together."""
    variant = VARIANTS[name]
    torch.set_num_threads(1)
    encoder = encoder_of(variant.source, seed, device, sizes.pretraining)
    splits, _, _ = data(seed, sizes)
    texts = products()[0]["text"].tolist()
    slates = lambda part, texts: SessionDataset(part, texts, encoder, sizes.tokens, sizes.history)
    train, validation, test = (slates(part, texts) for part in splits)
    sets = [train]
    frozen = variant.adaptation == "frozen"
    settings = TrainingConfig(
        epochs=max(1, int(variant.epochs * sizes.epochs)),
        batch=sizes.batch,
        lr=rate,
        head_lr=rate if frozen else 1e-3,
        autocast=sizes.bfloat16 or device != "cpu",
        balanced=variant.change == "balanced",
        word_dropout=0.1 if variant.change == "augmented" else 0.0,
        seed=seed,
    )
    if variant.change == "augmented":
        sets += [slates(splits.train, reworded(texts, luck)) for luck in range(1, settings.epochs)]
    if variant.change == "shuffled":
        shuffled_labels(train, seed)
        shuffled_labels(validation, seed + 1)
    every, began, about = [], time.perf_counter(), {}
    for member in range(members):
        luck = seed + 1000 * member
        model = EventClassifier(encoder, ClassifierConfig(adaptation=variant.adaptation, seed=luck))
        history = fit(model, sets, validation, replace(settings, seed=luck), encoder)
        every.append(predict(model, test, autocast=settings.autocast))
        if member == 0:
            trained = sum(p.numel() for p in model.trained().values())
            about = history._asdict() | {"best": history.best, "parameters": trained}
            about["wall seconds"] = time.perf_counter() - began
    found = every[0]
    reached = test.targets.numpy()
    shares = train.targets.mean(0).numpy()
    sessions = {
        target: {
            "log-loss": log_loss(reached[:, i], found.session[:, i], labels=[0, 1]),
            "base": log_loss(reached[:, i], np.full(len(reached), shares[i]), labels=[0, 1]),
            "PR-AUC": float(average_precision_score(reached[:, i], found.session[:, i])),
            "share": float(reached[:, i].mean()),
        }
        for i, target in enumerate(TARGETS)
    }
    about |= {"rate": rate, "slates": len(train), "sessions": sessions}
    if members > 1:
        about["ensemble"] = judged(ensemble(every).event, seed, sizes)
    if variant.change == "balanced":
        uncorrected = predict(model, test, autocast=settings.autocast, corrected=False)
        about["uncorrected"] = judged(uncorrected.event, seed, sizes)["all"]
    return about | {"groups": judged(found.event, seed, sizes)}


# ---------------------------------------------------------------------------------------------- cost
def cost_of(adaptation: str, sizes: Sizes, device: str) -> dict[str, Any]:
    """Seconds of a training step and of reading 1,000 slates, and the peak of a step's memory, with nothing else
    running: the clock is the processor's on a CPU, the wall's on a GPU."""
    torch.set_num_threads(1)
    encoder = encoder_of("pretrained", 0, device, 0)
    splits, _, _ = data(0, sizes)
    texts = products()[0]["text"].tolist()
    slates = SessionDataset(splits.train, texts, encoder, sizes.tokens, sizes.history)
    settings = TrainingConfig(batch=sizes.batch, autocast=sizes.bfloat16 or device != "cpu")
    model = EventClassifier(encoder, ClassifierConfig(adaptation=adaptation))
    optimiser, weight = optimiser_for(model, settings), torch.ones(5, device=model.device)
    ready = list(itertools.islice(slates.batches(sizes.batch, torch.Generator().manual_seed(0)), sizes.steps))
    step = lambda batch: training_step(model, optimiser, batch, weight, settings)

    def read(batch: Batch) -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=settings.autocast):
            model(on_device(batch, model.device))

    model.train()
    seconds, memory = _seconds(step, ready, device), peak_memory(lambda: step(ready[0]), device)
    model.eval()
    return {
        "batch": sizes.batch,
        "tokens": float(np.mean([b.attention_mask.sum().item() for b in ready])),
        "seconds a step": seconds,
        "peak MB": memory,
        "seconds 1000 slates": 1000 * _seconds(read, ready, device) / sizes.batch,
        "parameters": sum(p.numel() for p in model.trained().values()),
    }


def _seconds(run: Any, batches: list[Batch], device: str) -> float:
    """Of one batch, on average, after some that do not count."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    for part in (batches[: max(1, len(batches) // 5)], batches):
        began = clock()
        for batch in part:
            run(batch)
        if device != "cpu":
            torch.cuda.synchronize()
    return (clock() - began) / len(batches)


# ---------------------------------------------------------------------------------------------- the file
class Results:
    """The file: runs by variant and seed, tuned step sizes, costs, and where they were made."""

    def __init__(self, path: Path, sizes: Sizes):
        self.path = path
        self.content: dict[str, Any] = {
            "sizes": asdict(sizes),
            "environments": {},
            "runs": {},
            "tuning": {},
            "cost": {},
        }
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content["sizes"] != asdict(sizes):
                raise SystemExit(f"{path} has other sizes: delete it, or name another file with --output")

    def keep(self, part: str, name: str, key: str, value: Any) -> None:
        """Store one value and write the file."""
        self.content[part].setdefault(name, {})[key] = _rounded(value)
        write_json(self.path, self.content)

    def rate(self, name: str) -> float:
        """The step size with the best validation loss; untuned, the middle one of those to be tried."""
        variant = VARIANTS[name]
        own = variant.tuned_as or name
        found = self.content["tuning"].get(own)
        rates = VARIANTS[own].rates
        return float(min(found, key=found.get)) if found else rates[len(rates) // 2]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def work(task: tuple[str, str, int, float, Sizes, str]) -> dict[str, Any]:
    """One run, in a process of its own."""
    kind, name, seed, rate, sizes, device = task
    if kind == "runs" and name in CLASSICAL:
        return classical_run(name, seed, sizes)
    members = VARIANTS[name].members if kind == "runs" and sizes.ensemble else 1
    return classifier_run(name, seed, sizes, rate, device, members)


def main(arguments: list[str] | None = None) -> None:
    """Make what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the file, made or gone on with")
    parser.add_argument("--variant", nargs="+", choices=(*CLASSICAL, *VARIANTS), help="default: those of the device")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--tune", action="store_true", help="choose step sizes first")
    parser.add_argument("--cost", action="store_true", help="only measure seconds and memory")
    parser.add_argument("--small", action="store_true", help="sizes for one core of a processor: about an hour")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else SMALL if options.small else Sizes()
    own = tuple(name for name in VARIANTS if name != "balanced")
    names = options.variant or (CLASSICAL if options.device == "cpu" else own)
    results = Results(options.output, sizes)
    part = "cost" if options.cost else "classical" if set(names) <= set(CLASSICAL) else "classifiers"
    libraries = {name: distribution_version(name) for name in ("transformers", "peft", "scikit-learn")}
    about = environment("behaviour", options.device, jobs=options.jobs, seeds=options.seeds, **libraries)
    about["command"] = about["command"].replace(str(options.output), options.output.name)
    half = sizes.bfloat16 or options.device != "cpu"
    about["dtype"] = "bfloat16 autocast, float32 weights" if half else "float32"
    results.keep("environments", part, options.device, about)
    if options.cost:
        if options.device == "cpu":  # a batch that a laptop would use
            sizes = replace(sizes, batch=8, steps=min(sizes.steps, 20))
        for adaptation in tqdm(ADAPTATIONS, desc="cost"):
            results.keep("cost", adaptation, options.device, cost_of(adaptation, sizes, options.device))
        return
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        if options.tune:
            grid = [
                ("tuning", name, TUNING_SEED, rate, sizes, options.device)
                for name in dict.fromkeys(VARIANTS[name].tuned_as or name for name in names if name in VARIANTS)
                for rate in VARIANTS[name].rates
                if str(rate) not in results.content["tuning"].get(name, {})
            ]
            for task, found in _made(pool, grid):
                results.keep("tuning", task[1], str(task[3]), min(found["validation"]))
        missing = [
            ("runs", name, seed, 0.0 if name in CLASSICAL else results.rate(name), sizes, options.device)
            for seed in range(options.seeds)
            for name in names
            if str(seed) not in results.content["runs"].get(name, {})
        ]
        for task, found in _made(pool, missing):
            results.keep("runs", task[1], str(task[2]), found)


def _made(pool: ProcessPoolExecutor, tasks: list[Any]) -> Any:
    futures = {pool.submit(work, task): task for task in tasks}
    for future in tqdm(as_completed(futures), total=len(futures)):
        yield futures[future], future.result()


if __name__ == "__main__":
    main()
