"""What text, numbers and a picture of a product each add to a prediction of events, and what one model for click, cart
and purchase is worth (chapter "More than text").

    python -m benchmarks.multimodal                          # every shop that the folder does not hold yet
    python -m benchmarks.multimodal --seeds 0 1 --again      # these, once more
    python -m benchmarks.multimodal --quick --output FOLDER  # tiny sizes: does it run?

A seed is a shop with a taste of its own, its log, and the first weights. Models are scored on the test days against the
exact probabilities of the events, so no luck of the test log enters; one file for each seed, ``shop_SEED.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from tqdm import tqdm

from benchmarks import measure
from ecomlib import noise
from ecomlib.files import write_json
from ecomlib.language.behaviour import Log
from ecomlib.language.encoder import load_encoder
from ecomlib.language.features import tfidf_vectors
from ecomlib.language.funnel import calibration, exact_score, targets_of
from ecomlib.language.fusion import MODALITIES, FusionConfig, Inputs, inputs
from ecomlib.language.fusion_training import event_probabilities, target_probabilities, train_fusion
from ecomlib.language.product_images import product_images
from ecomlib.language.products import read_products
from ecomlib.language.promotions import PromotedBehaviour, with_conversions
from ecomlib.language.sessions import TARGETS

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "multimodal"
SHOPS = 10_000
"""Id of the first shop; those below served to choose the settings."""
SESSIONS = 1200
"""Sessions of a shop's log, over all its days."""
LOGS = (150, 350, 800)
"""Training sessions that the heads are compared with."""
CONFIG = FusionConfig(lr=4e-3, dropout=0.3, weight_decay=0.1, epochs=12, patience=2)
"""Chosen on shops 0 and 1 by validation loss."""
SEPARATE = ("click", "cart", "purchase")
TOGETHER = ("funnel", "softmax", "entire space", "nested")


class Shop(NamedTuple):
    """A shop's log, cut by time, and what is known of its products."""

    log: Log
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    unseen: np.ndarray
    """Of the test rows: the product's category was not sold before."""
    base: np.ndarray
    """Shares of the events in training."""

    @property
    def event(self) -> np.ndarray:
        """Of all rows."""
        return self.log.events["event"].to_numpy()

    def score(self, predicted: np.ndarray) -> dict[str, float]:
        """Exact scores of event probabilities for the test rows, by whether the category is new."""
        exact = self.log.probability[self.test]
        parts = {"seen": ~self.unseen, "unseen": self.unseen}
        return {name: exact_score(exact[rows], predicted[rows], self.base) for name, rows in parts.items()}


def shop_of(model: PromotedBehaviour, products: Any, shop: int, sessions: int) -> Shop:
    """The log of a shop and its splits: a session that runs across a cut is in no part."""
    log = model.generate(products, [shop], sessions, seed=1)
    first, last = (log.events.groupby("session")["time"].transform(how).to_numpy() for how in ("min", "max"))
    validation, test, _ = model.days
    parts = (last < validation, (first >= validation) & (last < test), first >= test)
    train, validating, testing = (np.flatnonzero(part) for part in parts)
    unseen = model.unseen(products)[log.events["product"].to_numpy()[testing]]
    base = np.bincount(log.events["event"].to_numpy()[train], minlength=5) / len(train)
    return Shop(log, train, validating, testing, unseen, base)


def subsets() -> list[tuple[str, ...]]:
    """Every set of modalities, smallest first."""
    return [chosen for count in range(4) for chosen in combinations(MODALITIES, count)]


def fitted(config: FusionConfig, shop: Shop, rows: Inputs, train: np.ndarray | None = None, event: Any = None) -> Any:
    """A model trained on the training rows, or on some of them, and its test rows."""
    train, event = shop.train if train is None else train, shop.event if event is None else event
    part = lambda chosen: rows.rows(torch.as_tensor(chosen))
    run = train_fusion(config, part(train), event[train], part(shop.validation), event[shop.validation])
    return run, part(shop.test)


def ablation(config: FusionConfig, shop: Shop, rows: dict[str, Inputs]) -> list[dict[str, Any]]:
    """One model for each set of modalities and each text; with the feed empty or complete; with modality dropout."""
    found = []

    def add(study: str, text: str, feed: float, chosen: tuple[str, ...], given: Inputs, **change: Any) -> None:
        start = time.process_time()
        run, test = fitted(replace(config, modalities=chosen, **change), shop, given)
        about = {"study": study, "text": text, "recorded": feed, "modalities": list(chosen)}
        about |= {"cpu_seconds": time.process_time() - start, "passes": len(run.train), "cost": run.model.cost()}
        about |= {"modality_dropout": run.model.config.modality_dropout}
        for without in subsets() if study == "missing" else [()]:
            score = shop.score(event_probabilities(run.model, test, without))
            found.append(about | {"without": list(without), "score": score})

    for chosen in subsets()[:-1]:
        add("ablation", "MiniLM", 0.5, chosen, rows["MiniLM"])
    add("missing", "MiniLM", 0.5, MODALITIES, rows["MiniLM"], modality_dropout=0.0)
    add("missing", "MiniLM", 0.5, MODALITIES, rows["MiniLM"], modality_dropout=0.2)
    for chosen in (("text",), MODALITIES):
        add("ablation", "TF-IDF", 0.5, chosen, rows["TF-IDF"])
    for feed in (0.0, 1.0):
        for chosen in (("numbers",), ("text", "numbers"), MODALITIES):
            add("feed", "MiniLM", feed, chosen, rows[f"feed {feed:g}"])
    add("reference", "none", 1.0, ("numbers",), rows["attraction"])
    return found


def heads(config: FusionConfig, shop: Shop, rows: Inputs, world: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Click, cart and purchase by each head, from logs of several sizes, on products that were sold before."""
    events, found = shop.log.events, []
    exact = targets_of(shop.log.probability[shop.test])[~shop.unseen]
    label = shop.event[shop.test][~shop.unseen][:, None] >= np.array((1, 3, 4))
    session = events["session"].to_numpy()
    first = lambda part, count: part[np.isin(session[part], np.unique(session[part])[:count])]
    for size in sizes:
        train = first(shop.train, size)
        some = shop._replace(validation=first(shop.validation, max(size // 6, 10)))
        base = [(shop.event[train] >= kind).mean() for kind in (1, 3, 4)]
        base = np.maximum(base, 1 / len(train))
        passes = round(config.epochs * sizes[-1] / size)  # about as many steps whatever the size
        patience = max(config.patience, passes // 5)
        for name in (*TOGETHER, "separate"):
            predicted, seconds, parameters = [], 0.0, 0
            for head in SEPARATE if name == "separate" else (name,):
                start = time.process_time()
                own = replace(config, modalities=("text", "numbers"), head=head, epochs=passes, patience=patience)
                run, test = fitted(own, some, rows, train)
                predicted.append(target_probabilities(run.model, test)[~shop.unseen])
                seconds += time.process_time() - start
                parameters += sum(count for count, _ in run.model.cost().values())
            q = np.concatenate(predicted, 1)
            about = {"world": world, "sessions": size, "head": name, "cpu_seconds": seconds, "parameters": parameters}
            about["purchases"] = int((shop.event[train] == 4).sum())
            about["calibration"] = [values.tolist() for values in calibration(exact[:, 2], q[:, 2])]
            about["impossible"] = float((q[:, 2] > q[:, 1]).mean())
            about["targets"] = {
                target: {
                    "score": exact_score(exact[:, j], q[:, j].clip(1e-12), base[j]),
                    "pr_auc": float(average_precision_score(label[:, j], q[:, j])),
                    "ceiling": float(average_precision_score(label[:, j], exact[:, j])),
                    "mean": float(q[:, j].mean() / exact[:, j].mean()),
                }
                for j, target in enumerate(TARGETS)
            }
            found.append(about)
    return found


def attraction(model: PromotedBehaviour, products: Any, shop: int, log: Log) -> np.ndarray:
    """(rows,) what a product adds to the log-odds of a click in this shop: all that a model can learn of a product."""
    family, ids, zero = model.family(products), torch.tensor([shop]), torch.zeros(1, dtype=torch.int64)
    uniforms = noise.uniform(0, ids, zero, 0, 0, noise.PRIOR, family.prior_size, torch.float64)[:, 0]
    weight = family.log_weight(family.from_uniforms(ids, uniforms))[0].numpy()
    return weight[2 * log.events["product"].to_numpy() + log.events["promoted"].to_numpy()]


def conversions(model: PromotedBehaviour, products: Any) -> tuple[np.ndarray, np.ndarray]:
    """Shares by product of the world in which products differ in what follows a click: the cart by category (hashed),
    the purchase by price tier: what is dear is taken along and left at the till."""
    share = {name: 0.1 + 0.5 * model._hashed(6, name, 1)[0] for name in set(products["category"].astype(str))}
    cart = products["category"].astype(str).map(share).to_numpy()
    return cart, products["tier"].astype(str).map({"low": 0.6, "middle": 0.4, "high": 0.2}).to_numpy()


def measured(seed: int, products: Any, texts: dict[str, np.ndarray], args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one shop."""
    pictures = np.stack([product_images(products, flag) for flag in (False, True)])
    config, model = replace(CONFIG, seed=seed), PromotedBehaviour()
    sizes, sessions = (LOGS, SESSIONS) if not args.quick else ((30, 60), 200)
    config = replace(config, epochs=2) if args.quick else config
    number, price, rows = SHOPS + seed, products["price"].to_numpy(), {}
    shop = shop_of(model, products, number, sessions)
    for name, vectors in texts.items():
        rows[name] = inputs(shop.log.events, vectors, price, pictures)
    full = shop.log.events.assign(recorded=shop.log.events["promoted"])
    rows["feed 1"] = inputs(full, texts["MiniLM"], price, pictures)
    rows["feed 0"] = inputs(full, texts["MiniLM"], price, pictures, recorded=False)
    known = torch.as_tensor(attraction(model, products, number, shop.log), dtype=rows["feed 0"].numbers.dtype)
    rows["attraction"] = rows["feed 0"]._replace(numbers=known[:, None])
    other = shop._replace(log=with_conversions(shop.log, *conversions(model, products), seed=seed))
    result = {"ablation": ablation(config, shop, rows)}
    # the session so far is read off the log that the model sees, so the other world has a context of its own
    context = inputs(other.log.events, texts["MiniLM"], price, pictures).context
    result["heads"] = [
        *heads(config, shop, rows["feed 1"], "stages", sizes),
        *heads(config, other, rows["feed 1"]._replace(context=context), "products", sizes),
    ]
    result["log"] = {
        "shop": number,
        "sessions": sessions,
        "rows": {name: len(getattr(shop, name)) for name in ("train", "validation", "test")},
        "unseen": float(shop.unseen.mean()),
        "base": shop.base.tolist(),
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--again", action="store_true", help="also what the folder holds already")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, meaningless results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    products = read_products(ROOT / "data" / "complete_journey_products.parquet")
    text, sold = products["text"].tolist(), np.flatnonzero(~PromotedBehaviour().unseen(products))
    encoder = load_encoder()
    texts = {"MiniLM": encoder.embed(text), "TF-IDF": tfidf_vectors(text, sold, encoder.size)}
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in tqdm(args.seeds, desc="shops"):
        path = args.output / f"shop_{seed}.json"
        if path.exists() and not args.again:
            continue
        started = measure.conditions()
        where = measure.environment("multimodal", "cpu", encoder=encoder.digest, config=repr(CONFIG))
        result = {"environment": where, "conditions": started, "seed": seed, "quick": args.quick}
        write_json(path, _short(result | measured(seed, products, texts, args)))
        print(json.loads(path.read_text())["log"])


def _short(value: Any) -> Any:
    """Five digits of every number: what a chapter shows, and a tenth of the file."""
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
