"""Generated questions, their splits, retrieval, handing over, and few-shot tasks over vectors of texts."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import torch
from notebooks import ROOT

from ecomlib.calibration.tables import TableError
from ecomlib.language.encoder import load_encoder
from ecomlib.language.lexical import TfIdf
from ecomlib.language.service import (
    HandOver,
    QuestionGenerator,
    confidence,
    coverage_curve,
    load_questions,
    mean_reciprocal_rank,
    nearest_example,
    nearest_mean,
    rank_of_truth,
    split_questions,
)
from ecomlib.language.service_text import INTENTS, SLOTS
from ecomlib.language.templates import SLOT, fill, parse, typo
from ecomlib.language.text_episodes import ProjectedHead, TextTasks, accuracy, neighbour_scores, ridge_scores
from ecomlib.learners.adaptation import Inner
from ecomlib.learners.meta import GradientStep
from ecomlib.learners.supervised import SupervisedMAML, cross_entropy_loss

TABLE = QuestionGenerator().questions()


# ----------------------------------------------------------------------------------------------- generated text
def test_every_intent_has_an_answer_and_ten_wordings_of_known_slots():
    assert len(INTENTS) == 40
    for name, (answer, wordings) in INTENTS.items():
        assert answer and len(set(wordings)) == 10, name
        assert {slot for wording in wordings for slot in SLOT.findall(wording)} <= set(SLOTS)
    every = [wording for _, wordings in INTENTS.values() for wording in wordings]
    assert len(set(every)) == len(every)


def test_questions_are_those_of_their_seed_and_more_renderings_leave_the_first():
    again = QuestionGenerator().questions()
    pd.testing.assert_frame_equal(TABLE, again)
    assert (QuestionGenerator().questions(seed=1)["question"] != TABLE["question"]).mean() > 0.5
    fewer = QuestionGenerator(renderings=2).questions()
    first = TABLE[TABLE.groupby(["intent", "wording"]).cumcount() < 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(fewer, first)
    assert not TABLE["question"].str.contains(r"[{}|]").any()


def test_templates_are_read_filled_and_misspelt():
    block = parse("# a\n= An answer.\nfirst {x} | second\nthird\n# b/c\none")
    assert block == {"a": ("An answer.", ("first {x}", "second", "third")), "b/c": ("", ("one",))}
    generator = np.random.default_rng(0)
    assert fill("{x} and {x}", {"x": ["y"]}, generator) == "y and y"
    slips = {typo("kettle", generator) for _ in range(200)}
    left_out, doubled = {"kttle", "ketle", "kette"}, {"keettle", "ketttle", "kettlle"}
    assert slips == left_out | doubled | {"ktetle", "kettle", "ketlte", "kettel"}  # swapping t and t changes nothing
    assert typo("a 1", generator) == "a 1"


def test_generator_settings_are_checked():
    for setting in ({"renderings": 0}, {"renderings": 10**6}, {"typos": 1.5}, {"small_talk": float("nan")}):
        with pytest.raises(ValueError, match=f"QuestionGenerator.{next(iter(setting))}"):
            QuestionGenerator(**setting)


# ----------------------------------------------------------------------------------------------- splits
@pytest.mark.parametrize("seed", [0, 7])
def test_no_wording_and_no_foreign_intent_is_on_two_sides(seed):
    split = split_questions(TABLE, seed)
    parts = {name: TABLE.iloc[rows] for name, rows in split._asdict().items() if isinstance(rows, np.ndarray)}
    wordings = {name: set(zip(part["intent"], part["wording"])) for name, part in parts.items()}
    names = list(wordings)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not wordings[one] & wordings[other], (one, other)
    assert set(parts["train"]["intent"]) == set(split.known)
    assert set(parts["examples"]["intent"]) == set(split.new)
    foreign = {name: set(part["intent"]) & set(split.foreign) for name, part in parts.items()}
    assert not foreign["validation"] & foreign["test"] and not foreign["train"]
    assert foreign["validation"] | foreign["test"] == set(split.foreign) and len(foreign["test"]) == 3
    assert set(split.known) | set(split.new) <= set(parts["test"]["intent"])
    assert len(split.known) == 28 and len(parts["train"]) == 28 * 5 * 4
    assert not np.array_equal(split.train, split_questions(TABLE, seed + 1).train)


def test_splits_that_cannot_be_are_refused():
    for wrong in ({"new": 40}, {"foreign": 3}, {"shares": (0.5, 0.5)}, {"new": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            split_questions(TABLE, 0, **wrong)
    with pytest.raises(ValueError, match="wordings of intent 'return_how'"):
        split_questions(TABLE[(TABLE["intent"] != "return_how") | (TABLE["wording"] < 2)], 0)


# ----------------------------------------------------------------------------------------------- retrieval
def test_retrieval_by_hand():
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    queries, labels, intents = np.array([[0.6, 0.8]]), ["a", "a", "b"], ("a", "b")
    np.testing.assert_allclose(nearest_example(queries, vectors, labels, intents), [[0.96, 0.8]])
    mean = nearest_mean(queries, vectors, labels, intents)
    np.testing.assert_allclose(mean, [[-((0.6 - 0.9) ** 2 + (0.8 - 0.3) ** 2), -(0.36 + 0.04)]])
    with pytest.raises(ValueError, match="'c'"):
        nearest_example(queries, vectors, labels, ("a", "c"))


def test_ranks_count_ties_and_missing_intents_against_the_method():
    scores = np.array([[3.0, 2, 1], [0, 0, 0], [1, 2, 3], [1, 2, 3]])
    ranks = rank_of_truth(scores, ["a", "a", "a", "z"], ("a", "b", "c"))
    assert ranks.tolist() == [1, 3, 3, 4]
    assert mean_reciprocal_rank([1, 2, 4]) == pytest.approx((1 + 0.5 + 0.25) / 3)


def test_the_encoder_reads_new_wordings_that_tfidf_does_not():
    """A few dozen texts: the pretrained encoder is the packaged one, not a stand-in."""
    rows = TABLE[(TABLE["wording"].isin([1, 4])) & (TABLE.groupby(["intent", "wording"]).cumcount() == 0)].iloc[:40]
    answers = QuestionGenerator().answers()
    encoder, lexical = load_encoder(), TfIdf(list(answers["answer"]))
    intents = list(answers["intent"])
    right = {}
    for model in (encoder, lexical):
        scores = nearest_example(model.embed(list(rows["question"])), model.embed(answers["answer"]), intents, intents)
        right[model.name] = (rank_of_truth(scores, rows["intent"], intents) == 1).mean()
    assert right["MiniLM"] > right["TF-IDF"] + 0.1
    assert right["MiniLM"] > 0.4


def test_tfidf_has_unit_vectors_and_zeros_for_what_it_never_saw():
    model = TfIdf(["red kettle", "blue tent"])
    found = model.embed(["red tent", "qqqq"])
    assert found.shape == (2, model.size) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 0], atol=1e-6)
    for wrong in ({"texts": []}, {"texts": ["a b"], "features": 0}):
        with pytest.raises(ValueError, match="texts|features"):
            TfIdf(**wrong)


# ----------------------------------------------------------------------------------------------- handing over
def test_confidence_is_the_best_score_and_its_lead():
    np.testing.assert_allclose(confidence([[0.2, 0.9, 0.6], [1, 1, 0]]), [[0.9, 0.3], [1, 0]])


def test_the_estimated_chance_is_calibrated_and_the_rule_follows_costs():
    generator = np.random.default_rng(0)
    scores = generator.random((4000, 5))
    top = confidence(scores)
    truth = 1 / (1 + np.exp(-(8 * top[:, 0] + 6 * top[:, 1] - 8)))
    right = generator.random(4000) < truth
    cheap, dear = (HandOver(scores[:2000], right[:2000], cost) for cost in (2.0, 10.0))
    assert np.abs(cheap.chance(scores[2000:]) - truth[2000:]).mean() < 0.03
    assert dear.answers(scores).sum() < cheap.answers(scores).sum()
    assert not (dear.answers(scores) & ~cheap.answers(scores)).any()
    for wrong in ({"cost": 1.0}, {"cost": float("inf")}, {"right": np.ones(2000, bool)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HandOver(**({"scores": scores[:2000], "right": right[:2000]} | wrong))


def test_coverage_curve_by_hand():
    share, accurate = coverage_curve([0.9, 0.1, 0.5, 0.7], [True, False, True, False])
    np.testing.assert_allclose(share, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(accurate, [1, 0.5, 2 / 3, 0.5])


# ----------------------------------------------------------------------------------------------- a merchant's file
def test_a_file_of_questions_is_read(tmp_path):
    rows = pd.DataFrame({"question": [" Wo ist mein Paket? ", "Où est mon colis ?"], "answer": ["Here.", "Here."]})
    rows.to_csv(tmp_path / "q.csv", index=False)
    rows.to_parquet(tmp_path / "q.parquet")
    for name in ("q.csv", "q.parquet"):
        table = load_questions(tmp_path / name)
        assert list(table["question"]) == ["Wo ist mein Paket?", "Où est mon colis ?"]
        assert list(table["intent"]) == ["answer 1"] * 2 and list(table["wording"]) == [0, 1]
    assert list(load_questions(TABLE).columns) == ["question", "intent", "wording"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"text": ["a"]}, "missing column 'question'"),
        ({"question": ["a"]}, "missing column 'intent' or 'answer'"),
        ({"question": ["a", "  "], "intent": ["x", "x"]}, r"'question'.*empty.*row 2"),
        ({"question": ["a", None], "intent": ["x", "x"]}, r"'question'.*missing.*row 2"),
        ({"question": ["a", 7], "intent": ["x", "x"]}, r"'question'.*not text.*row 2"),
        ({"question": ["a", "b" * 6000], "intent": ["x", "x"]}, r"'question'.*long.*row 2"),
        ({"question": ["a", "CafÃ©"], "intent": ["x", "x"]}, r"'question'.*wrong encoding.*row 2"),
        ({"question": ["a", "b"], "intent": ["x", ""]}, r"'intent'.*empty.*row 2"),
        ({"question": ["a", "b"], "intent": ["x", "x"], "answer": ["1", "2"]}, r"'answer'.*differ.*row 2"),
    ],
)
def test_bad_questions_are_refused_by_column_and_row(rows, message):
    with pytest.raises(TableError, match=message):
        load_questions(pd.DataFrame(rows))


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_is_not_utf8_is_refused_by_line_and_column(tmp_path, packed):
    text = 'intent,question\nfr,"bien, merci"\nfr,"où, là"\n'.encode("latin-1")
    path = tmp_path / ("q.csv.gz" if packed else "q.csv")
    path.write_bytes(gzip.compress(text) if packed else text)
    with pytest.raises(TableError, match="column 'question', line 3: byte 0xf9 is not UTF-8"):
        load_questions(path)
    with pytest.raises(TableError, match="no such file"):
        load_questions(tmp_path / "missing.csv")


# ----------------------------------------------------------------------------------------------- few-shot tasks
def tasks(ways=3, draw=True):
    pools = [[list(range(10 * kind, 10 * kind + 5)) for kind in range(6)]]
    query = [[list(range(10 * kind + 5, 10 * kind + 10)) for kind in range(6)]]
    return TextTasks(torch.arange(60.0)[:, None], pools, query, ways, draw)


def test_support_and_query_never_share_a_row_and_classes_are_balanced():
    source = tasks()
    drawn = source.tasks(torch.arange(50))
    x, y = source.sample(drawn, 6, 3, 0)
    q, truth = source.sample(drawn, 9, 3, 1)
    assert x.shape == (50, 6, 1) and y[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert ((x % 10) < 5).all() and ((q % 10) >= 5).all()
    assert torch.equal(x[..., 0].long() // 10, drawn.kinds.gather(1, y))
    assert torch.equal(q[..., 0].long() // 10, drawn.kinds.gather(1, truth))
    assert all(len(set(row.tolist())) == 6 for row in x[..., 0])
    assert all(len(set(kinds.tolist())) == 3 for kinds in drawn.kinds) and len(drawn.kinds.unique()) == 6
    part = source.sample(source.tasks(torch.arange(20, 30)), 6, 3, 0)[0]
    assert torch.equal(part, x[20:30])  # a task does not depend on its batch
    assert not torch.equal(source.sample(drawn, 6, 4, 0)[0], x)


def test_kinds_keep_their_order_where_they_are_not_drawn():
    assert (tasks(draw=False).tasks(torch.arange(9)).kinds == torch.arange(3)).all()


def test_pools_of_different_sizes_are_never_read_beyond_their_end():
    pools = [[[0, 1], [2, 3, 4, 5, 6, 7]]]
    source = TextTasks(torch.arange(8.0)[:, None] + 1, pools, pools, 2, draw=False)
    x, y = source.sample(source.tasks(torch.arange(100)), 4, 0, 0)
    assert set(x[y == 0][:, 0].tolist()) == {1, 2} and set(x[y == 1][:, 0].tolist()) == {3, 4, 5, 6, 7, 8}


def test_few_shot_tasks_refuse_what_cannot_be_drawn():
    source = tasks()
    drawn = source.tasks(torch.arange(2))
    for points in (4, 18, 0):
        with pytest.raises(ValueError, match="points"):
            source.sample(drawn, points, 0, 0)
    with pytest.raises(ValueError, match="ways"):
        tasks(ways=7)
    with pytest.raises(ValueError, match="at least one row"):
        TextTasks(torch.zeros(3, 1), [[[0], []]], [[[1], [2]]], 2)
    with pytest.raises(ValueError, match="rows below 3"):
        TextTasks(torch.zeros(3, 1), [[[0], [1]]], [[[1], [3]]], 2)


def test_rules_without_training_on_a_line():
    x, y = torch.tensor([[[0.0, 1], [1, 0], [0.8, 0.6]]]), torch.tensor([[0, 1, 1]])
    query = torch.tensor([[[0.6, 0.8]]])
    torch.testing.assert_close(neighbour_scores(x, y, query, 2), torch.tensor([[[0.8, 0.96]]]))
    target = torch.eye(2)[y[0]] - 0.5
    weights = torch.linalg.solve(x[0].mT @ x[0] + 0.3 * torch.eye(2), x[0].mT @ target)  # the other form of ridge
    torch.testing.assert_close(ridge_scores(x, y, query, 2, 0.3), query @ weights, rtol=1e-5, atol=1e-6)
    assert accuracy(torch.tensor([[[0.1, 0.2], [0.3, 0.2]]]), torch.tensor([[1, 1]])).item() == 0.5


def test_meta_training_learns_which_direction_of_the_vectors_counts():
    """Vectors whose kind is in 2 of 12 directions and noise in 10: the learned map must find them on new kinds."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.arange(40) * 2 * torch.pi / 40
    centre = torch.stack((angle.cos(), angle.sin()), 1).repeat_interleave(12, 0)
    vectors = torch.cat(
        (centre + 0.05 * torch.randn(480, 2, generator=generator), torch.randn(480, 10, generator=generator)), 1
    )
    pools = lambda kinds, half: [[list(range(12 * k + 6 * half, 12 * k + 6 * half + 6)) for k in kinds]]
    train, test = (TextTasks(vectors, pools(own, 0), pools(own, 1), 4) for own in (range(0, 40, 2), range(1, 40, 2)))
    network = ProjectedHead(12, 4)
    learner = SupervisedMAML(
        network, Inner(lr=1.0, steps=2, adapted=network.head), GradientStep(0.02), cross_entropy_loss, 8, 8, tasks=16
    )
    drawn = test.tasks(torch.arange(200))
    support, (query, truth) = test.sample(drawn, 8, 9, 0), test.sample(drawn, 16, 9, 1)
    score = lambda meta: accuracy(network.outputs(learner.train_task(meta, support)[-1], query), truth).mean().item()
    before = score(learner.initial(torch.Generator()))
    after = score(learner.meta_train(train, 0, 60, progress=False).meta)
    assert after > before + 0.2


# ----------------------------------------------------------------------------------------------- the stored run
def test_the_stored_comparison_is_complete_and_its_intervals_are_those_of_its_values():
    stored = json.loads((ROOT / "benchmarks" / "results" / "applications.json").read_text(encoding="utf-8"))
    assert stored["provenance"]["command"].startswith("python -m benchmarks.applications")
    assert len(stored["provenance"]["seeds"]) >= 5 and stored["provenance"]["commit"]
    rules = {"nearest mean", "nearest example", "ridge"}
    for part, learners in (("intents", 3), ("topics", 2)):
        rows = stored[part]["accuracy"]
        for row in rows:
            assert row["estimate"] == pytest.approx(np.mean(row["values"]), abs=1e-3)
            assert row["low"] <= row["estimate"] <= row["high"] and row["seeds"] == len(row["values"]) >= 5
        for vectors in ("MiniLM", "TF-IDF"):
            for shots in (1, 5):
                methods = {r["method"] for r in rows if (r["vectors"], r["shots"]) == (vectors, shots)}
                assert rules < methods and len(methods) == 3 + learners
    mean = [r["estimate"] for r in stored["intents"]["accuracy"] if r["method"] == "nearest mean" and r["shots"] == 1]
    assert len(mean) == 3 and 0.2 < min(mean) < max(mean) < 1  # chance is one in five
