"""Answers to customers' questions by retrieval, and when to hand a question over to a person (chapter "Language
applications")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression

from ..calibration.tables import TableError, refuse
from ..families.base import check, number, require, whole
from .service_text import CLOSERS, INTENTS, OPENERS, SLOTS
from .templates import fill, typo
from .text_tables import read_texts


# ----------------------------------------------------------------------------------------------- questions
@dataclass(frozen=True)
class QuestionGenerator:
    """Questions to a made-up shop: 40 intents in 10 wordings each, with slots, small talk and slips of the keyboard.

    Generated text. A classifier that only has to tell these wordings apart, seen before, has an easy life: hold out
    wordings and intents (``split_questions``).
    """

    renderings: int = 4
    """Questions made from each wording."""
    small_talk: float = 0.35
    """Chance of a greeting; the same again of a closing formula."""
    typos: float = 0.25
    """Chance of one slip of the keyboard."""
    lower_case: float = 0.2
    """Chance that all letters are small."""

    def __post_init__(self):
        check(self, "renderings", lambda x: whole(x, 1, 1000), "a whole number in 1..1000")
        for field in ("small_talk", "typos", "lower_case"):
            check(self, field, lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")

    def questions(self, seed: int = 0) -> pd.DataFrame:
        """Columns question, intent, wording (0..9 within the intent), one row for each rendering."""
        rows = []
        for intent, (name, (_, wordings)) in enumerate(INTENTS.items()):
            for wording, text in enumerate(wordings):
                for copy in range(self.renderings):
                    # A row's luck is its own: more renderings leave those that are there as they are.
                    generator = np.random.default_rng((seed, intent, wording, copy))
                    rows.append((self._render(text, generator), name, wording))
        return pd.DataFrame(rows, columns=["question", "intent", "wording"])

    def answers(self) -> pd.DataFrame:
        """Columns intent, answer."""
        return pd.DataFrame([(name, answer) for name, (answer, _) in INTENTS.items()], columns=["intent", "answer"])

    def _render(self, wording: str, generator: np.random.Generator) -> str:
        chances = (self.small_talk, self.small_talk, self.typos, self.lower_case)
        greet, close, slip, small = (generator.random(4) < chances).tolist()
        text = fill(wording, SLOTS, generator)
        text = str(generator.choice(OPENERS)) * greet + text + str(generator.choice(CLOSERS)) * close
        text = typo(text, generator) if slip else text
        return text.lower() if small else text


def load_questions(source: pd.DataFrame | str | Path) -> pd.DataFrame:
    """A merchant's questions from a DataFrame, `.csv`, `.csv.gz` or `.parquet`: one row a question that was answered.

    ==========  ========================================================================================
    Column      Allowed
    ==========  ========================================================================================
    question    text of 1 to 5,000 characters
    intent      text; optional where there is an answer: equal answers then make one intent
    answer      text; optional where there is an intent; one for each intent
    wording     optional: rows that were made from the same sentence, never split between train and test
    ==========  ========================================================================================

    Returns question, intent, answer (where given) and wording, the row's number unless given. Raises TableError naming
    column and row: a column or text that is missing, empty or not UTF-8, or an intent with two answers.
    """
    first = read_texts(source, ["question"], ["question"], "at least one question")
    named = [name for name in ("intent", "answer") if name in first.columns]
    if not named:
        raise TableError("missing column 'intent' or 'answer'; found: " + ", ".join(map(str, first.columns)))
    table = read_texts(first, ["question", *named], named, "at least one question")
    if "intent" not in named:
        table["intent"] = "answer " + (table["answer"].factorize()[0] + 1).astype(str).astype(object)
    if "answer" in named:
        usual = table.groupby("intent")["answer"].transform("first")
        refuse(table, ["intent"], "answer", table["answer"] != usual, "differ within an intent", "one answer an intent")
    table["wording"] = table["wording"] if "wording" in table.columns else np.arange(len(table))
    return table[["question", "intent", *(["answer"] if "answer" in named else []), "wording"]]


class QuestionSplit(NamedTuple):
    """Which intents the shop knows, and which rows are for what. Rows are positions in the table that was split."""

    known: tuple[str, ...]
    """Intents with an answer and training questions."""
    new: tuple[str, ...]
    """Intents that came later: an answer, and only as many examples as are taken from ``examples``."""
    foreign: tuple[str, ...]
    """Intents without an answer: their questions belong to a person. Half are met in validation, half in the test."""
    train: NDArray[np.int64]
    """Questions of known intents."""
    validation: NDArray[np.int64]
    """Known intents in other wordings, and foreign ones."""
    test: NDArray[np.int64]
    """Known and new intents in wordings of their own, and other foreign ones."""
    examples: NDArray[np.int64]
    """Questions of new intents in wordings that are not in the test."""


def split_questions(
    table: pd.DataFrame, seed: int, new: int = 6, foreign: int = 6, shares: tuple[float, float] = (0.5, 0.2)
) -> QuestionSplit:
    """Draw new and foreign intents, and in every intent the wordings for training, validation and test.

    ``shares`` of each intent's wordings train and validate (at least one each), the rest test. A wording is never in
    two parts, and what is foreign in validation is not foreign in the test. Raises ValueError where an intent has
    fewer than 3 wordings, or no known intent would be left.
    """
    intents = table["intent"].unique()
    require(whole(new, 0), "new", new, "a whole number >= 0")
    require(whole(foreign, 0) and foreign % 2 == 0, "foreign", foreign, "an even number >= 0")
    require(new + foreign < len(intents), "new + foreign", new + foreign, f"less than {len(intents)} intents")
    require(all(number(s, 0, 1) for s in shares) and sum(shares) < 1, "shares", shares, "two in (0, 1), sum below 1")
    generator = np.random.default_rng(seed)
    order = generator.permutation(intents)
    role = {name: "new" if i < new else "foreign" if i < new + foreign else "known" for i, name in enumerate(order)}
    part = np.full(len(table), "", dtype=object)
    for number_, (name, rows) in enumerate(table.groupby("intent", sort=True).indices.items()):
        wordings = pd.unique(table["wording"].to_numpy()[rows])
        require(len(wordings) >= 3, f"wordings of intent {name!r}", len(wordings), "at least 3")
        rank = dict(zip(np.random.default_rng((seed, number_)).permutation(wordings), range(len(wordings))))
        place = table["wording"].iloc[rows].map(rank).to_numpy()
        train = min(max(1, round(shares[0] * len(wordings))), len(wordings) - 2)
        validation = min(max(1, round(shares[1] * len(wordings))), len(wordings) - train - 1)
        part[rows] = np.where(place < train, "train", np.where(place < train + validation, "validation", "test"))
    by_role = {kind: tuple(name for name in order if role[name] == kind) for kind in ("known", "new", "foreign")}
    roles, early = table["intent"].map(role).to_numpy(), by_role["foreign"][: foreign // 2]
    known, alien, first = roles == "known", roles == "foreign", table["intent"].isin(early).to_numpy()
    rows = lambda mask: np.flatnonzero(mask)
    return QuestionSplit(
        *(by_role[kind] for kind in ("known", "new", "foreign")),
        rows(known & (part == "train")),
        rows(known & (part == "validation") | alien & first),
        rows((roles != "foreign") & (part == "test") | alien & ~first),
        rows((roles == "new") & (part != "test")),
    )


# ----------------------------------------------------------------------------------------------- retrieval
def nearest_example(queries: ArrayLike, vectors: ArrayLike, labels: Sequence[str], intents: Sequence[str]) -> NDArray:
    """(queries, intents) inner product with the nearest example of each intent, from examples ``vectors`` (rows, size).

    With answers as the only examples this is "the nearest answer". Raises ValueError where an intent has no example.
    """
    similarity = np.asarray(queries) @ np.asarray(vectors).T
    return np.stack([similarity[:, rows].max(1) for rows in _rows(labels, intents)], 1)


def nearest_mean(queries: ArrayLike, vectors: ArrayLike, labels: Sequence[str], intents: Sequence[str]) -> NDArray:
    """(queries, intents) minus the squared distance to the mean of each intent's examples, equation (eq-prototype)."""
    vectors, queries = np.asarray(vectors), np.asarray(queries)
    mean = np.stack([vectors[rows].mean(0) for rows in _rows(labels, intents)])
    return 2 * queries @ mean.T - (mean**2).sum(1) - (queries**2).sum(1)[:, None]


def _rows(labels: Sequence[str], intents: Sequence[str]) -> list[NDArray[np.int64]]:
    labels = np.asarray(labels, dtype=object)
    found = [np.flatnonzero(labels == name) for name in intents]
    empty = [name for name, rows in zip(intents, found) if len(rows) == 0]
    require(not empty, "labels", empty[:1], "at least one example of every intent")
    return found


def rank_of_truth(scores: ArrayLike, truth: Sequence[str], intents: Sequence[str]) -> NDArray[np.int64]:
    """(queries,) place of the right intent among ``scores`` (queries, intents), 1 the best. Equal scores count as
    better, so that nothing is won by guessing; where the right intent is not on offer the place is one after the
    last."""
    scores, column = np.asarray(scores), {name: i for i, name in enumerate(intents)}
    at = np.array([column.get(name, -1) for name in truth])
    rank = (scores >= scores[np.arange(len(at)), at][:, None]).sum(1)
    return np.where(at >= 0, rank, scores.shape[1] + 1)


def mean_reciprocal_rank(ranks: ArrayLike) -> float:
    """Mean of 1 / rank: 1 if the right answer always comes first, 1/2 if it always comes second."""
    return float((1 / np.asarray(ranks)).mean())


# ----------------------------------------------------------------------------------------------- handing over
class HandOver:
    """Answer, or hand over to a person: Chow's rule (1970), equation (eq-chow), on an estimated chance of being right.

    The chance is a logistic regression on two numbers of a question: its best score, and by how much that is ahead of
    the second best.
    """

    def __init__(self, scores: ArrayLike, right: ArrayLike, cost: float = 5.0):
        """Learns from validation questions: ``scores`` (questions, intents >= 2) and whether the best of them is
        ``right`` (questions,). ``cost`` of a wrong answer, in units of what a person's answer costs, is above 1.

        Raises ValueError for a cost of 1 or less, or where all or none are right."""
        require(number(cost, 1), "cost", cost, "a finite number > 1, what a wrong answer costs in hand-overs")
        right = np.asarray(right, dtype=bool)
        require(0 < right.sum() < len(right), "right", f"{right.sum()} of {len(right)}", "some right, some wrong")
        self.cost, self.scale = cost, np.asarray(confidence(scores)).std(0) + 1e-12
        self.model = LogisticRegression(C=100.0).fit(confidence(scores) / self.scale, right)

    def chance(self, scores: ArrayLike) -> NDArray[np.float64]:
        """(questions,) estimated chance that the best answer is right."""
        return self.model.predict_proba(confidence(scores) / self.scale)[:, 1]

    def answers(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """(questions,) whether to answer."""
        return self.chance(scores) >= 1 - 1 / self.cost


def confidence(scores: ArrayLike) -> NDArray[np.float64]:
    """(questions, 2): the best score of each row of ``scores`` (questions, intents), and its lead over the second."""
    top = np.sort(np.asarray(scores, dtype=np.float64), 1)[:, -2:]
    return np.stack((top[:, 1], top[:, 1] - top[:, 0]), 1)


def cost_per_question(answered: ArrayLike, right: ArrayLike, cost: float) -> float:
    """Mean cost in hand-overs: 1 where a person answers, ``cost`` for a wrong answer, 0 for a right one."""
    answered, right = np.asarray(answered, dtype=bool), np.asarray(right, dtype=bool)
    return float(np.where(answered, np.where(right, 0.0, cost), 1.0).mean())


def coverage_curve(chance: ArrayLike, right: ArrayLike) -> tuple[NDArray, NDArray]:
    """(shares, accuracies): of the questions of highest ``chance``, share by share, how many are ``right``."""
    order = np.argsort(-np.asarray(chance), kind="stable")
    right = np.asarray(right, dtype=float)[order]
    count = np.arange(1, len(right) + 1)
    return count / len(right), right.cumsum() / count
