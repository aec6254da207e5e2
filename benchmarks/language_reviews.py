"""Rankings and reviews for ``benchmarks.language_decisions``, which runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from benchmarks.language_decisions import VECTORS
from ecomlib.families.slates import best_slate, expected_gain
from ecomlib.language.behaviour import BehaviourModel
from ecomlib.language.decisions import fit_click_head, own_effects
from ecomlib.language.features import reduced
from ecomlib.language.ranking import money_of, ranking_scores, tastes_of
from ecomlib.language.review import Review, ReviewConfig, click_loss

if TYPE_CHECKING:
    from benchmarks.language_decisions import Seed, World

HISTORIES, HELD = (0, 5, 20), 20
"""Sessions of a shop that its list may use, and later sessions whose clicks it is judged by."""
STREAMS = ("stable", "sudden", "gradual", "assortment")


def ranking(seed: Seed) -> list[dict]:
    """Metrics of lists of all items, and what the first places earn, after some sessions of a shop."""
    return [row for kind in seed.rows for row in ranked(seed, kind)]


def ranked(seed: Seed, kind: str) -> list[dict]:
    """Of one kind of shop."""
    world, own, rows = seed.world, seed.rows[kind], []
    first = 10_000 + 1000 * seed.number
    test, known = list(range(first, first + world.sizes.tasks)), max(HISTORIES)
    shop = seed.shop(kind)
    tasks = shop.tasks(torch.tensor(test))
    log = world.model.generate(world.products, test, known + HELD, seed=seed.number, assortment=own).events
    log["product"] = np.searchsorted(own, log["product"])
    session = log["session"] % (known + HELD)
    later = log[(session >= known) & (log["event"] > 0)]
    wanted = np.zeros((len(test), len(own)))
    np.add.at(wanted, (later["shop"].to_numpy() - first, later["product"].to_numpy()), 1)
    truth, margin = shop.log_weight(tasks), torch.tensor(shop.table.margin)
    odds, attention = torch.exp(truth + shop.click[0]), shop.attention(tasks)
    value = (margin * shop.cart[0] * shop.order[0]).expand_as(odds)
    most = best_slate(odds, value, attention)[1].mean()

    def add(name: str, history: int, score: torch.Tensor) -> None:
        score = score.expand(len(test), -1)
        believed = best_slate(torch.exp(score + shop.click[0]), value, attention.mean(0).expand_as(attention))[0]
        earned = {
            "by click": money_of(shop, tasks, score),
            "by click times margin": money_of(shop, tasks, score.exp() * margin),
            "best slate": expected_gain(believed, odds, value, attention),
        }
        shares = {how: (money.mean() / most).item() for how, money in earned.items()}
        metrics = ranking_scores(wanted, score.numpy()).means
        rows.append({"kind": kind, "ranker": name, "history": history, "seed": seed.number, **metrics, **shares})

    add("oracle", 0, truth)
    families = {name: seed.believed(name, kind) for name in VECTORS}
    families["clicks per product"] = own_effects(seed.flat(kind), world.sizes.own, keep=False)
    for history in HISTORIES:
        for name, family in families.items():
            taste = torch.tensor(tastes_of(family, log[session < history], test))
            add(name, history, taste @ torch.tensor(family.table.features).T + torch.tensor(family.table.appeal))
    return rows


def review(seed: Seed) -> list[dict]:
    """Streams with and without drift; four times as many without, to count false alarms."""
    world, rows = seed.world, []
    vectors = reduced(world.embedded["MiniLM"], seed.old, min(32, world.sizes.head_components))
    for kind in STREAMS:
        for copy in range(world.sizes.streams * (4 if kind == "stable" else 1)):
            found = stream(world, kind, 100 * seed.number + copy, vectors)
            rows.append({"kind": kind, "seed": seed.number, "copy": copy, "start": world.sizes.drift} | found)
    return rows


def stream(world: World, kind: str, number: int, vectors: np.ndarray) -> dict[str, list]:
    """A stream of periods under review, and the losses of its first model if that is never refitted."""
    sizes, start = world.sizes, world.sizes.drift
    first = 50_000 + 1000 * number
    shops = range(first, first + sizes.stream_shops)
    early = np.setdiff1d(np.arange(len(world.products)), world.late)
    loss = lambda head, events: click_loss(head, events, vectors)
    review = Review(lambda events: fit_click_head(events, vectors), loss, ReviewConfig())
    other, verdicts, never, oldest = BehaviourModel(seed=1), [], [], None
    for period in range(sizes.periods):
        share = {"sudden": 1.0, "gradual": (period - start + 1) / 6}.get(kind, 0.0)
        moved = round(min(max(share, 0.0), 1.0) * len(shops)) if period >= start else 0
        sold = np.arange(len(world.products)) if kind == "assortment" and period >= start else early
        play = lambda model, own, sold=sold, period=period: (
            model.generate(world.products, own, sizes.stream_sessions, 1000 * number + period, sold).events
        )
        parts = [play(model, own) for model, own in ((other, shops[:moved]), (world.model, shops[moved:])) if len(own)]
        parts[-1]["session"] += 10**6  # sessions of two worlds keep apart
        events = pd.concat(parts, ignore_index=True)
        never.append(None if oldest is None else float(loss(oldest, events).mean()))
        verdicts.append(review.review(events))
        if oldest is None and not review.filling:
            oldest = review.model
    return {
        "alarms": [v.period for v in verdicts if v.alarm],
        "loss": [None if v.period == 0 else v.loss for v in verdicts],
        "never refitted": never,
    }
