"""Does a better prediction make a better decision? Policies that read product texts, next to those that do not, in
shops of generated shoppers (chapter "From prediction to decision").

    python -m benchmarks.language_decisions                           # all parts, the seeds that are missing
    python -m benchmarks.language_decisions --parts review --seeds 0 1
    python -m benchmarks.language_decisions --quick --output FOLDER    # tiny sizes: does it run?

A seed draws the log that the models learn from (its shops, its sessions, the quarter of the products that it does not
hold), the assortments of the test shops, the shops and their luck. Three assortments a seed: products of the log; new
products of categories of the log; products of categories that no log has seen.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks import measure
from ecomlib.baselines import GreedyBayes, Random
from ecomlib.baselines.recommenders import Blind, Logs, Popularity
from ecomlib.evaluation import normalised_score
from ecomlib.families import sample_tasks
from ecomlib.files import write_json
from ecomlib.language.behaviour import BehaviourModel
from ecomlib.language.choice import Choice, ChoiceConfig, family_of, fit_choice
from ecomlib.language.decisions import ClickHead, KnownTaste, TextRanker, View, by_clicks, fit_click_head, own_effects
from ecomlib.language.encoder import load_encoder
from ecomlib.language.features import reduced, tfidf_vectors
from ecomlib.language.products import read_products
from ecomlib.rollout import trial

PARTS = ("decisions", "ranking", "review", "cost")
VECTORS = ("TF-IDF", "MiniLM", "random encoder", "product ids")
KINDS = ("in the log", "new products", "new categories")


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    shops: int = 200
    sessions: int = 100
    head_sessions: int = 40
    components: int = 256
    head_components: int = 128
    steps: int = 150
    items: int = 48
    tasks: int = 150
    rounds: int = 10
    shoppers: int = 4
    particles: int = 256
    own: float = 1.0
    streams: int = 2
    periods: int = 20
    stream_shops: int = 60
    stream_sessions: int = 8
    drift: int = 10


STREAM = ("streams", "periods", "stream_shops", "stream_sessions", "drift")
"""Sizes that only the part "review" uses, and of the others it uses ``head_components`` alone."""
QUICK = Sizes(12, 12, 12, 8, 6, 5, 12, 4, 2, 2, 16, 1.0, 1, 8, 24, 6, 5)


class World:
    """What is shared by all seeds: products, their texts' vectors."""

    def __init__(self, sizes: Sizes):
        self.sizes, self.model = sizes, BehaviourModel()
        self.products = read_products("data/complete_journey_products.parquet")
        self.texts = list(self.products["text"])
        self.late = np.flatnonzero(self.model.unseen(self.products))
        self.sources = {"MiniLM": None, "random encoder": "random"}

    @cached_property
    def embedded(self) -> dict[str, np.ndarray]:
        """Vectors of all texts, by encoder."""
        return {name: load_encoder(source).embed(self.texts) for name, source in self.sources.items()}

    def seed(self, seed: int) -> Seed:
        """All that a seed draws."""
        return Seed(self, seed)


class Seed:
    """A log, the models that were fitted to it, and test shops."""

    def __init__(self, world: World, seed: int):
        self.world, self.number, sizes = world, seed, world.sizes
        rng = np.random.default_rng(seed)
        early = np.setdiff1d(np.arange(len(world.products)), world.late)
        new = np.sort(rng.choice(early, len(early) // 4, replace=False))
        self.old = np.setdiff1d(early, new)
        pools = dict(zip(KINDS, (self.old, new, world.late)))
        self.rows = {kind: np.sort(rng.choice(pool, sizes.items, replace=False)) for kind, pool in pools.items()}
        shops = range(sizes.shops * seed, sizes.shops * (seed + 1))
        log = world.model.generate(world.products, shops, sizes.sessions, seed=seed, assortment=self.old).events
        self.log = log[log["time"] < world.model.days[0]].reset_index(drop=True)
        number = self.log["session"] % sizes.sessions
        self.head_log = self.log[number < sizes.head_sessions]
        self._choices: dict[str, Choice] = {}

    @cached_property
    def vectors(self) -> dict[str, np.ndarray]:
        """Vectors for the sorted lists."""
        world, d = self.world, self.world.sizes.head_components
        words = tfidf_vectors(world.texts, self.old, d)
        return {"TF-IDF": words, "MiniLM": reduced(world.embedded["MiniLM"], self.old, d)}

    def choice(self, name: str) -> Choice:
        """The choice model that reads these vectors, fitted when it is first asked for."""
        world, sizes = self.world, self.world.sizes
        if name not in self._choices:
            ids = lambda: np.eye(len(world.products))
            words = lambda: tfidf_vectors(world.texts, self.old, sizes.components)
            own = {"TF-IDF": words, "product ids": ids}.get(name, lambda: world.embedded[name])()
            config = ChoiceConfig(steps=sizes.steps, seed=self.number)
            self._choices[name] = fit_choice(self.log, own, world.model.family(world.products), config)
        return self._choices[name]

    @cached_property
    def head(self) -> dict[str, ClickHead]:
        """Regressions of clicks, for the sorted lists."""
        return {name: fit_click_head(self.head_log, own) for name, own in self.vectors.items()}

    def shop(self, kind: str):
        """The true decision problem of an assortment."""
        return self.world.model.family(self.world.products.iloc[self.rows[kind]])

    def believed(self, name: str, kind: str):
        """It, as ``name``'s vectors make it out."""
        return family_of(self.choice(name), self.shop(kind), self.rows[kind])

    def flat(self, kind: str):
        """It, where all products are alike before they are shown."""
        known = self.choice("MiniLM")
        every = np.full(len(known.appeal), 1.0)
        same = known._replace(
            appeal=known.appeal[self.old].mean() * every, pull=known.pull[self.old].mean() * every
        )  # fmt: skip
        return family_of(same, self.shop(kind), self.rows[kind])

    def policies(self, kind: str, tasks) -> dict:
        """Every policy by name, made when it is called."""
        sizes, shop, rows = self.world.sizes, self.shop(kind), self.rows[kind]
        bayes = lambda family: GreedyBayes(family, sizes.particles, stores=True)
        product, event = self.log["product"].to_numpy(), self.log["event"].to_numpy() > 0
        count = lambda mask: torch.tensor(np.bincount(product[mask], minlength=len(self.world.products))[rows])[None]
        shown, clicks = count(np.ones_like(event)).double() + 20, count(event).double() + 20 * event.mean()
        clicked = lambda family: View(shop, family, by_clicks(family, scale=0.3))
        found = {
            "blind": lambda: Blind(shop),
            "oracle": lambda: KnownTaste(shop, tasks),
            "random": lambda: Random(shop),
            "popularity": lambda: Popularity(shop, Logs(shown, clicks)),
            "learned per product": lambda: clicked(own_effects(self.flat(kind), sizes.own, keep=False)),
            "Bayes, true features": lambda: bayes(shop),
        }
        for name in self.vectors:
            found[f"sorted, {name}"] = lambda name=name: TextRanker(shop, self.head[name], self.vectors[name][rows])
            found[f"planned, {name}"] = lambda name=name: Blind(self.believed(name, kind))
            own = lambda name=name: own_effects(self.believed(name, kind), sizes.own)
            found[f"learned, {name}"] = lambda name=name: clicked(self.believed(name, kind))
            found[f"learned, {name} and own effects"] = lambda own=own: clicked(own())
        for name in VECTORS:
            found[f"Bayes, {name}"] = lambda name=name: bayes(self.believed(name, kind))
        known = {"oracle": lambda: shop, "Bayes, true features": lambda: shop}
        known |= {f"Bayes, {name}": lambda name=name: self.believed(name, kind) for name in self.vectors}
        text, average = (
            self.choice("MiniLM").pull[rows],
            np.full(len(rows), self.choice("MiniLM").pull[self.old].mean()),
        )
        for name, family in known.items():
            inner = (lambda: KnownTaste(shop, tasks)) if name == "oracle" else (lambda family=family: bayes(family()))
            for intent, pull in (("predicted", text), ("predicted without text", average), ("ignored", text)):
                word = intent.split()[0]
                found[f"{name}; intent {intent}"] = lambda inner=inner, family=family, word=word, pull=pull: View(
                    shop, family(), inner(), word, pull
                )
        return found


def decisions(seed: Seed) -> list[dict]:
    """Score of every policy in every kind of shop, by round."""
    return [row for kind in KINDS for row in decided(seed, kind)]


def decided(seed: Seed, kind: str) -> list[dict]:
    """Of one kind of shop."""
    sizes, shop, rows, base = seed.world.sizes, seed.shop(kind), [], None
    tasks = sample_tasks(shop, sizes.tasks, torch.Generator().manual_seed(1000 + seed.number))
    blind, oracle = shop.blind_return(tasks), shop.oracle_return(tasks)
    score = lambda x: float(normalised_score(x, blind, oracle))
    for name, make_policy in seed.policies(kind, tasks).items():
        done = trial(shop, tasks, make_policy(), sizes.rounds, sizes.shoppers, seed.number, progress=False)
        returns = done.returns.mean(-1)
        base = returns if base is None else base
        paired = returns - base + blind  # the same luck as the blind policy's trial, whose mean is known exactly
        rounds, lifetime = [score(x) for x in paired], score(paired.mean(0))
        rows.append({"kind": kind, "policy": name, "seed": seed.number, "rounds": rounds, "lifetime": lifetime})
    return rows


def cost(seed: Seed) -> list[dict]:
    """Milliseconds of a decision and of learning from it, for one segment and for a thousand.

    They do not depend on how well the models were fitted, so these are fitted to a few slates, on TF-IDF.
    """
    world, sizes, kind, rows = seed.world, seed.world.sizes, KINDS[0], []
    few = seed.log[seed.log["shop"] < seed.log["shop"].min() + 12]
    shop = seed.shop(kind)
    vectors = tfidf_vectors(world.texts, seed.old, sizes.head_components)
    choice = fit_choice(few, vectors, world.model.family(world.products), ChoiceConfig(steps=3))
    text = family_of(choice, shop, seed.rows[kind])
    clicked = lambda family: View(shop, family, by_clicks(family, scale=0.3))
    agents = {
        "blind": lambda: Blind(shop),
        "sorted": lambda: TextRanker(shop, fit_click_head(few, vectors), vectors[seed.rows[kind]]),
        "learned per product": lambda: clicked(own_effects(text, sizes.own, keep=False)),
        "learned, text and own effects": lambda: clicked(own_effects(text, sizes.own)),
        "Bayes, text": lambda: GreedyBayes(text, sizes.particles, stores=True),
    }
    for count in (1, 1000):
        tasks = sample_tasks(shop, count, torch.Generator().manual_seed(0))
        calls = {name: decision(shop, tasks, make_agent()) for name, make_agent in agents.items()}
        least = 0.02 if sizes == QUICK else 0.2
        for name, milliseconds in measure.interleaved(calls, 3, "cpu", least).items():
            rows.append({"policy": name, "segments": count, "milliseconds": milliseconds, "seed": seed.number})
    return rows


def decision(shop, tasks, agent):
    """A call that decides once for each of ``tasks``, and learns that nothing was clicked."""
    count, observation = len(tasks.id), shop.observe(tasks, shop.reset(tasks, 1, torch.zeros(1)))
    agent.begin(shop.context(tasks), count, 1)
    luck = torch.rand(count, 1, agent.noise_size, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(count, 1)

    def decide():
        agent.observe(agent.act(observation, luck), nothing, observation, nothing)

    return decide


def make(parts: list[str], seeds: list[int], output: Path, sizes: Sizes, again: bool) -> None:
    """Fill the parts' files with the seeds that they lack."""
    output.mkdir(parents=True, exist_ok=True)
    content = {}
    for part in parts:
        path = output / f"{part}.json"
        used = {name: x for name, x in asdict(sizes).items() if (name in STREAM) == (part == "review")}
        empty = {"format": "ecomlib language decisions", "version": 1, "sizes": used, "rows": []}
        content[part] = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not again else empty
        if content[part]["sizes"] != used:
            raise SystemExit(f"{path} has other sizes: name another --output, or --again")
    from benchmarks.language_reviews import ranking, review

    runs = {"decisions": decisions, "ranking": ranking, "review": review, "cost": cost}
    world = World(sizes)
    for number in tqdm(seeds, unit="seed"):
        wanted = [p for p in parts if number not in {row["seed"] for row in content[p]["rows"]}]
        wanted = [p for p in wanted if p != "cost" or number == seeds[0]]  # costs of one seed will do
        if not wanted:
            continue
        seed = world.seed(number)
        for part in wanted:
            began = time.process_time()
            content[part]["rows"] += runs[part](seed)
            content[part]["provenance"] = measure.environment("language_decisions", "cpu") | {
                **measure.conditions(), "dtype": "float64", "seeds": seeds,
                "processor seconds of the last seed": round(time.process_time() - began, 1),
            }  # fmt: skip
            write_json(output / f"{part}.json", content[part])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/language_decisions"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--again", action="store_true", help="make the parts anew")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    make(arguments.parts, arguments.seeds, arguments.output, QUICK if arguments.quick else Sizes(), arguments.again)


if __name__ == "__main__":
    main()
