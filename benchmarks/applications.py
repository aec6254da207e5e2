"""Few-shot intents and few-shot topics: classical rules and meta-learned heads over MiniLM, a random encoder and TF-IDF
(chapter "Language applications").

    python -m benchmarks.applications --json benchmarks/results/applications.json
    python -m benchmarks.applications --quick

Intents: 5 intents that the shop never answered before, k examples of each, questions in wordings that no example has.
Topics: the sentiment of headlines on a topic that was left out of training, k labelled headlines of each sentiment.
A seed is a split: which intents are known, which wordings train. Settings of the learners were chosen on seeds 0 to 2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks import measure
from ecomlib.evaluation.statistics import paired_difference, t_interval
from ecomlib.language.encoder import load_encoder
from ecomlib.language.lexical import TfIdf
from ecomlib.language.monitor import (
    SENTIMENTS,
    TOPICS,
    HeadlineGenerator,
    split_wordings,
    vader_sentiment,
)
from ecomlib.language.service import QuestionGenerator, split_questions
from ecomlib.language.text_episodes import (
    ProjectedHead,
    TextTasks,
    accuracy,
    neighbour_scores,
    prototype_scores,
    ridge_scores,
)
from ecomlib.learners.adaptation import Inner
from ecomlib.learners.meta import GradientStep
from ecomlib.learners.supervised import Examples, SupervisedMAML, cross_entropy_loss
from ecomlib.networks import MLP

WAYS, QUERIES, SHOTS = 5, 5, (1, 5)
SCALE = 5.0
"""Length of the vectors that learners see: a step of size 1 then moves a score by about 1."""
COMPONENTS = 384
"""Singular directions of TF-IDF that learners see, as many as MiniLM has numbers."""
CLASSICAL = {"nearest mean": prototype_scores, "nearest example": neighbour_scores, "ridge": ridge_scores}
FIRST_TEST = 10**6
"""Id of the first test task."""


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10, 15)))
    parser.add_argument("--tasks", type=int, default=200, help="test tasks of a seed")
    parser.add_argument("--iterations", type=int, default=80, help="of meta-training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    sizes = {"seeds": arguments.seeds, "tasks": arguments.tasks, "iterations": arguments.iterations}
    if arguments.quick:
        sizes = {"seeds": [0, 1], "tasks": 4, "iterations": 1}
    result = {"provenance": measure.environment("applications", "cpu", **sizes) | {"dtype": "float64"}}
    start = time.process_time()
    for part, rows in (("intents", intents), ("topics", topics)):
        result[part] = summary(list(rows(**sizes, quick=arguments.quick)))
        result[part]["processor seconds"] = round(time.process_time() - start, 1)
    result["provenance"] |= measure.conditions()
    for part in ("intents", "topics"):
        for row in result[part]["accuracy"]:
            print(part, *(row[key] for key in ("vectors", "method", "shots", "estimate", "low", "high")))
    measure.write(arguments.json, result)


# ----------------------------------------------------------------------------------------------- intents
def intents(seeds: list[int], tasks: int, iterations: int, quick: bool) -> Iterator[dict]:
    """Rows of vectors, method, shots, seed and accuracy on new intents."""
    table = QuestionGenerator(renderings=1 if quick else 4).questions()
    texts, intent, wording = list(table["question"]), table["intent"].to_numpy(), table["wording"].to_numpy()
    encoded = encoders(texts)
    for seed in tqdm(seeds, desc="intents", unit="seed"):
        split = split_questions(table, seed)
        order = {name: np.random.default_rng((seed, i)).permutation(10) for i, name in enumerate(sorted(set(intent)))}
        early = np.array([order[name][w] < 5 for name, w in zip(intent, wording)])
        unseen = (*split.new, *split.foreign)
        tests = [[rows_of(intent, names, mask)] for names, mask in ((unseen, early), (unseen, ~early))]
        trains = [[rows_of(intent, names, mask)] for names, mask in ((split.known, early), (split.known, ~early))]
        for name, (whole, small) in vectors_of(texts, encoded, split.train).items():
            for shots in (1,) if quick else SHOTS:
                for method, score in CLASSICAL.items():
                    yield row(name, method, shots, seed, scored(TextTasks(whole, *tests, WAYS), score, shots, tasks))
                if name != "random":
                    source, test = TextTasks(small, *trains, WAYS), TextTasks(small, *tests, WAYS)
                    size = small.shape[1]
                    for method, network, adapted in (
                        ("ANIL from the nearest mean", ProjectedHead(size, WAYS), (2, 3)),
                        ("MAML from the nearest mean", ProjectedHead(size, WAYS), None),
                        ("ANIL from random weights", MLP((size, 64, WAYS)), (2, 3)),
                    ):
                        random = "random" in method
                        inner = Inner(steps=3, lr=0.3 if adapted is None else 1.0, adapted=adapted)
                        outer = GradientStep(1e-3 if random else 1e-4)
                        learner = learned(network, inner, outer, shots, WAYS, QUERIES, by_hand=random)
                        meta = learner.meta_train(source, seed, iterations, progress=False).meta
                        yield row(name, method, shots, seed, adapted_accuracy(learner, meta, test, shots, tasks))


# ----------------------------------------------------------------------------------------------- topics
def topics(seeds: list[int], tasks: int, iterations: int, quick: bool) -> Iterator[dict]:
    """Rows of vectors, method, shots, seed and accuracy: mean over topics, each left out of training once."""
    table = HeadlineGenerator(renderings=3 if quick else 4).headlines()
    texts = list(table["headline"])
    encoded, lexicon = encoders(texts), vader_sentiment(texts) == table["sentiment"].to_numpy()
    for seed in tqdm(seeds, desc="topics", unit="seed"):
        train, test = (np.isin(np.arange(len(table)), rows) for rows in split_wordings(table, seed))
        found: dict[tuple, list[float]] = {}
        for left_out in TOPICS[:2] if quick else TOPICS:
            vectors = vectors_of(texts, encoded, np.flatnonzero(train & (table["topic"] != left_out)))
            for name, shots, method, value in on_topic(table, left_out, train, test, vectors, seed, tasks, iterations):
                found.setdefault((name, method, shots), []).append(value)
        yield row("none", "VADER", 0, seed, lexicon[test].mean())
        for (name, method, shots), values in found.items():
            yield row(name, method, shots, seed, np.mean(values))


def on_topic(
    table: pd.DataFrame, left_out: str, train: NDArray, test: NDArray, vectors: dict, seed: int, tasks: int, steps: int
) -> Iterator[tuple[str, int, str, float]]:
    """(vectors, shots, method, accuracy) on the topic that is left out of training."""
    topic, sentiment = table["topic"].to_numpy(), table["sentiment"].to_numpy()
    label = np.array([SENTIMENTS.index(s) for s in sentiment])
    others = [name for name in TOPICS if name != left_out]
    pools = [[rows_of(sentiment, SENTIMENTS, mask & (topic == left_out))] for mask in (train, test)]
    sources = [[rows_of(sentiment, SENTIMENTS, mask & (topic == o)) for o in others] for mask in (train, test)]
    rows, mine = np.flatnonzero(train & (topic != left_out)), np.flatnonzero(test & (topic == left_out))
    for name, (whole, small) in vectors.items():
        pooled = LogisticRegression(C=10.0, max_iter=1000).fit(small[rows] / SCALE, label[rows])
        yield name, 0, "trained on other topics", pooled.score(small[mine] / SCALE, label[mine])
        for shots in SHOTS:
            own = TextTasks(whole, *pools, 3, draw=False)
            for method, score in CLASSICAL.items():
                yield name, shots, method, scored(own, score, shots, tasks)
            if name == "random":
                continue
            own, source = TextTasks(small, *pools, 3, draw=False), TextTasks(small, *sources, 3, draw=False)
            learner = learned(MLP((small.shape[1], 3)), Inner(3, 0.1), GradientStep(1e-2), shots, 3, QUERIES, True)
            start = [torch.as_tensor(pooled.coef_.T / SCALE), torch.as_tensor(pooled.intercept_)[None]]
            value = adapted_accuracy(learner, start, own, shots, tasks)
            yield name, shots, "other topics, then these", value
            meta = learner.meta_train(source, seed, steps, progress=False).meta
            yield name, shots, "MAML over other topics", adapted_accuracy(learner, meta, own, shots, tasks)


def rows_of(label: NDArray, kinds: Sequence[str], mask: NDArray) -> list[NDArray]:
    """Rows of each kind where ``mask`` holds."""
    return [np.flatnonzero((label == kind) & mask) for kind in kinds]


# ----------------------------------------------------------------------------------------------- shared
def encoders(texts: list[str]) -> dict[str, NDArray]:
    """Vectors of length 1 by the pretrained and by the random encoder."""
    return {name: load_encoder(source).embed(texts) for name, source in (("MiniLM", None), ("random", "random"))}


def vectors_of(texts: list[str], encoded: dict[str, NDArray], fit: NDArray) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (vectors for rules that need no training, of length 1; vectors for learners, of length SCALE)."""
    found = {name: (torch.as_tensor(v, dtype=torch.float64),) * 2 for name, v in encoded.items()}
    lexical = TfIdf([texts[i] for i in fit]).embed(texts).astype(np.float64)
    components = min(COMPONENTS, len(fit) - 1)
    svd = TruncatedSVD(components, random_state=0).fit(lexical[fit])
    found["TF-IDF"] = torch.as_tensor(lexical), torch.nn.functional.normalize(torch.as_tensor(svd.transform(lexical)))
    return {name: (whole, SCALE * small) for name, (whole, small) in found.items()}


def learned(
    network: MLP, inner: Inner, outer: GradientStep, shots: int, ways: int, queries: int, by_hand: bool
) -> SupervisedMAML:
    """A meta-learner of ``ways`` classes."""
    sizes = {"shots": shots * ways, "queries": queries * ways, "tasks": 25, "by_hand": by_hand}
    return SupervisedMAML(network, inner, outer, cross_entropy_loss, **sizes)


def batches(source: TextTasks, shots: int, tasks: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Support and query of the test tasks, the same for every method and for all vectors."""
    for first in range(FIRST_TEST, FIRST_TEST + tasks, 25):
        drawn = source.tasks(torch.arange(first, min(first + 25, FIRST_TEST + tasks)))
        support = source.sample(drawn, shots * source.ways, 0, 0)
        yield *support, *source.sample(drawn, QUERIES * source.ways, 0, 1)


def scored(source: TextTasks, score: Callable[..., Tensor], shots: int, tasks: int) -> float:
    """Mean accuracy of a rule that needs no training."""
    found = [accuracy(score(x, y, query, source.ways), truth) for x, y, query, truth in batches(source, shots, tasks)]
    return torch.cat(found).mean().item()


def adapted_accuracy(learner: SupervisedMAML, meta: list[Tensor], source: TextTasks, shots: int, tasks: int) -> float:
    """Mean accuracy after the inner steps."""
    found = []
    for x, y, query, truth in batches(source, shots, tasks):
        adapted = learner.train_task(meta, Examples(x, y))[-1]
        found.append(accuracy(learner.network.outputs(adapted, query), truth))
    return torch.cat(found).mean().item()


def row(vectors: str, method: str, shots: int, seed: int, value: float) -> dict:
    """One entry of ``intents`` or ``topics``."""
    return {"vectors": vectors, "method": method, "shots": shots, "seed": seed, "accuracy": float(value)}


def summary(rows: list[dict]) -> dict:
    """Accuracy with its interval over seeds, and differences from the best rule that needs no training."""
    values: dict[tuple, dict[int, float]] = {}
    for entry in rows:
        key = entry["vectors"], entry["method"], entry["shots"]
        values.setdefault(key, {})[entry["seed"]] = entry["accuracy"]
    name = lambda key: dict(zip(("vectors", "method", "shots"), key))
    numbers = lambda interval: {k: v for k, v in interval._asdict().items() if k != "n"} | {"seeds": interval.n}
    accuracies, differences = [], []
    for key, own in values.items():
        accuracies.append(name(key) | numbers(t_interval(list(own.values()))) | {"values": list(own.values())})
        if key[1] in CLASSICAL or key[2] == 0:
            continue
        for rule in CLASSICAL:
            other = values[key[0], rule, key[2]]
            difference = paired_difference(list(own.values()), [other[seed] for seed in own])
            differences.append(name(key) | {"less": rule} | numbers(difference))
    return {"accuracy": accuracies, "difference": differences}


if __name__ == "__main__":
    main()
