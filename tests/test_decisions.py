"""Policies that read product texts: the choice model against the world that made the log, rankers against the features
they were trained on, what a view hides, ranking metrics against scikit-learn, and the periodic review."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import log_loss, ndcg_score

from ecomlib.baselines import GreedyBayes, Random
from ecomlib.evaluation import normalised_score
from ecomlib.families import split
from ecomlib.families.recommendation import Catalogue, SlateRecommendation
from ecomlib.language.behaviour import BehaviourModel
from ecomlib.language.choice import ChoiceConfig, family_of, fit_choice, slates_of
from ecomlib.language.decisions import (
    KnownTaste,
    StageFilter,
    TextRanker,
    View,
    by_clicks,
    fit_click_head,
    own_effects,
)
from ecomlib.language.features import impression_features
from ecomlib.language.products import read_products
from ecomlib.language.ranking import money_of, ranking_scores, tastes_of
from ecomlib.language.review import Review, ReviewConfig, click_loss
from ecomlib.rollout import trial

MODEL = BehaviourModel()
ROWS = np.arange(0, 2100, 70)


@pytest.fixture(scope="module")
def products():
    return read_products("data/complete_journey_products.parquet").iloc[ROWS].reset_index(drop=True)


@pytest.fixture(scope="module")
def shop(products):
    return MODEL.family(products)


@pytest.fixture(scope="module")
def log(products):
    return MODEL.generate(products, range(100), 40, seed=3, assortment=range(len(products))).events


@pytest.fixture(scope="module")
def truth(shop):
    """Vectors that say all that shoppers see in a product."""
    table = shop.table
    return np.column_stack((table.features, table.appeal, table.pull))


@pytest.fixture(scope="module")
def choice(log, truth, shop):
    torch.set_default_dtype(torch.float64)
    return fit_choice(log, truth, shop)


@pytest.fixture(scope="module")
def tasks(shop):
    torch.set_default_dtype(torch.float64)
    return split(shop, "test", 60)[1]


def played(family, tasks, agent, episodes=2, replicas=3, seed=0):
    return trial(family, tasks, agent, episodes, replicas, seed, progress=False)


# ------------------------------------------------------------------------------------------------ the choice model
def test_slates_of_a_log_are_those_of_a_loop(log):
    """Clicked place, fatigue and reads, session by session."""
    some = log[log["session"] < 60].sample(frac=1, random_state=0)
    data = slates_of(some)
    row = 0
    for session, own in some.groupby("session"):
        fatigue = reads = 0
        for _, slate in own.sort_values(["slate", "place"]).groupby("slate"):
            event = slate["event"].to_numpy()
            assert data.session[row] == session and data.product[row].tolist() == slate["product"].tolist()
            assert (data.fatigue[row], data.reads[row]) == (fatigue, reads)
            assert data.event[row] == event.max() and data.clicked[row] == (event.argmax() if event.any() else 4)
            fatigue = 0 if event.any() else min(fatigue + 1, 3)
            reads = 0 if event.max() == 4 else min(reads + (event.max() == 2), 2)
            row += 1
    assert row == len(data.session)


def test_the_choice_model_finds_the_shops_tastes_and_the_products_appeal(choice, shop, log):
    """From the true features, log-odds of the log's shops; what is found does not depend on the features' units."""
    found = choice.tastes @ choice.features.T + choice.appeal
    exact = shop.log_weight(shop.tasks(torch.arange(100))).numpy()
    assert np.corrcoef(found.flatten(), exact.flatten())[0, 1] > 0.9  # 90 clicks a shop leave the rest
    centred = lambda x: x - x.mean(1, keepdims=True)
    assert np.square(centred(found) - centred(exact)).mean() < 0.15 * np.square(centred(exact)).mean()
    assert np.corrcoef(choice.pull, shop.table.pull)[0, 1] > 0.7
    assert np.allclose(choice.tastes.mean(0), 0, atol=1e-9) and np.allclose(np.cov(choice.tastes.T), np.eye(6))
    assert (np.diff(choice.place) < 0).all() and choice.place[0] == 0


def test_vectors_of_other_products_find_nothing(log, truth, shop):
    """A control, on products that the log does not hold: their own vectors predict them, those of others do not."""
    new = np.arange(0, 30, 3)
    slate = log.groupby(["session", "slate"])["product"].transform(lambda x: x.isin(new).any())
    held = log[~slate]
    assert len(held) > 2000 and not held["product"].isin(new).any()
    mixed = truth.copy()
    mixed[new] = truth[np.roll(new, 3)]
    odds = shop.log_weight(shop.tasks(torch.arange(100))).numpy()[:, new]

    def fit(vectors):
        found = fit_choice(held, vectors, shop, ChoiceConfig(steps=40))
        return np.corrcoef((found.tastes @ found.features[new].T + found.appeal[new]).flatten(), odds.flatten())[0, 1]

    assert fit(truth) > 0.6 and fit(mixed) < 0.3


@pytest.mark.parametrize(
    "field, value", [("factors", 0), ("factors", 101), ("ridge", 0.0), ("steps", 10**5), ("seed", -1)]
)
def test_a_bad_setting_of_the_choice_model_is_named(field, value):
    with pytest.raises(ValueError, match=f"ChoiceConfig.{field} = {value}"):
        ChoiceConfig(**{field: value})


def test_a_log_that_cannot_be_fitted_is_refused(log, truth, shop):
    with pytest.raises(ValueError, match="no click"):
        fit_choice(log.assign(event=0), truth, shop)
    with pytest.raises(ValueError, match="vectors = 10"):
        fit_choice(log, truth[:10], shop)
    with pytest.raises(ValueError, match="slates of one size"):
        slates_of(log.drop(index=5))


def test_the_believed_shop_holds_the_margins_and_nothing_else_of_the_truth(choice, shop):
    other = replace(shop, catalogue=Catalogue(shop.table.margin, tuple(np.arange(60.0))))
    believed = family_of(choice, shop, range(30))
    assert believed == family_of(choice, other, range(30))
    assert believed.table.margin == shop.table.margin and believed.table.appeal != shop.table.appeal
    with pytest.raises(ValueError, match="rows = 29"):
        family_of(choice, shop, range(29))


# ------------------------------------------------------------------------------------------------ rankers and views
def test_the_ranker_predicts_from_the_features_that_it_was_trained_on(products, shop, log, tasks):
    """Its probabilities in a trial, against ``impression_features`` of the same history written as a log."""
    vectors = np.random.default_rng(1).normal(size=(30, 5))
    head = fit_click_head(log, vectors)

    class Watched(TextRanker):
        history = []

        def act(self, observation, noise):
            action = super().act(observation, noise)
            self.history.append((self.seen, self.probability(self.seen.time), action))
            return action

        def observe(self, action, reward, next_observation, done):
            super().observe(action, reward, next_observation, done)
            self.history[-1] += (self.family.seen(next_observation),)

    agent = Watched(shop, head, vectors)
    played(shop, tasks, agent, 2, 2)
    compared = 0
    for number, m, n in ((0, 3, 1), (1, 3, 1), (1, 40, 0)):
        rows = []
        for time, (seen, probability, action, after) in enumerate(agent.history[6 * number : 6 * number + 6]):
            if seen.left[m, n]:
                break
            shown = [{"session": 0, "slate": time, "place": 0, "product": i, "event": 0} for i in range(30)]
            features = impression_features(pd.DataFrame(rows + shown), vectors)[-30:]
            expected = 1 / (1 + np.exp(-(features @ head.weight + head.intercept)))
            assert np.allclose(probability[m, n], expected, atol=1e-6)
            compared += time > 1
            for place, item in enumerate(action[m, n].tolist()):
                event = int(item == after.item[m, n].item())
                rows.append({"session": 0, "slate": time, "place": place, "product": item, "event": event})
    assert compared >= 4
    assert torch.equal(agent.history[3][2], (agent.history[3][1] * torch.tensor(shop.table.margin)).topk(4).indices)


def test_the_click_head_is_a_calibrated_regression(log):
    vectors = np.random.default_rng(1).normal(size=(30, 5))
    head = fit_click_head(log, vectors)
    chance = 1 / (1 + np.exp(-(impression_features(log, vectors) @ head.weight + head.intercept)))
    acted = log["event"].to_numpy() > 0
    assert abs(chance.mean() - acted.mean()) < 1e-3
    found = click_loss(head, log, vectors)
    assert np.isclose(found[7], log_loss(acted[log["shop"] == 7], chance[log["shop"] == 7]))
    assert found.mean() < log_loss(acted, np.full(len(acted), acted.mean())) - 0.005
    with pytest.raises(ValueError, match="only one outcome"):
        fit_click_head(log.assign(event=0), vectors)
    with pytest.raises(ValueError, match="weights for vectors of length 6"):
        TextRanker(MODEL.family(read_products("data/complete_journey_products.parquet").iloc[ROWS]), head,
                   np.zeros((30, 6)))  # fmt: skip


def observations(shop, tasks, stages):
    state = shop.reset(tasks, 2, torch.zeros(1))
    return [shop.observe(tasks, state._replace(stage=torch.full_like(state.stage, z))) for z in stages]


def test_a_view_shows_nothing_that_it_says_it_hides(shop, tasks, choice):
    """Neither the stage, where it is ignored or predicted, nor the true features, ever."""
    believed = family_of(choice, shop, range(30))
    luck = torch.full((60, 2, 1), 0.5)
    for intent in ("seen", "predicted", "ignored"):
        agent = View(shop, believed, GreedyBayes(believed, 32), intent)
        agent.begin(shop.context(tasks), 60, 2)
        browse, ready = (agent.act(x, luck) for x in observations(shop, tasks, (0, 2)))
        assert torch.equal(browse, ready) == (intent != "seen")
    other = replace(shop, catalogue=Catalogue(shop.table.margin, tuple(np.linspace(-1, 1, 180))))
    agent.begin(shop.context(tasks), 60, 2)
    assert torch.equal(agent.act(observations(other, tasks, (0,))[0], luck), browse)
    with pytest.raises(ValueError, match="intent = 'guessed'"):
        View(shop, believed, GreedyBayes(believed, 32), "guessed")


def test_a_view_of_the_truth_is_the_agent_itself(shop, tasks):
    direct = played(shop, tasks, GreedyBayes(shop, 32, stores=True))
    viewed = played(shop, tasks, View(shop, shop, GreedyBayes(shop, 32, stores=True)))
    assert torch.equal(direct.action, viewed.action) and torch.equal(direct.reward, viewed.reward)


def test_a_view_translates_to_a_family_with_more_features(shop, tasks, choice):
    """An effect of each item's own that is next to nothing changes next to no decision."""
    believed = family_of(choice, shop, range(30))
    same = own_effects(believed, 1e-6)
    assert same.features == 36
    plain = played(shop, tasks, by_clicks(believed))
    wider = played(shop, tasks, View(shop, same, by_clicks(same)))
    assert (plain.action == wider.action).double().mean() > 0.97
    alone = own_effects(believed, 1.0, keep=False)
    assert alone.features == 30 and played(shop, tasks, View(shop, alone, by_clicks(alone))).reward.sum() > 0


def test_known_taste_earns_the_oracle_return_and_hiding_the_stage_costs(shop, tasks):
    exact = shop.oracle_return(tasks).mean()
    earned = lambda intent: played(
        shop, tasks, View(shop, shop, KnownTaste(shop, tasks), intent), 1, 300
    ).returns.mean()
    seen, ignored = earned("seen"), earned("ignored")
    assert abs(seen / exact - 1) < 0.02
    assert ignored < seen


def test_the_order_of_the_policies(shop, tasks, log, truth, choice):
    """With true features in its vectors the learned catalogue is nearly as good as the truth, and better than none."""
    blind, oracle = shop.blind_return(tasks), shop.oracle_return(tasks)
    believed = family_of(choice, shop, range(30))
    score = lambda agent: float(normalised_score(played(shop, tasks, agent, 4, 4).returns.mean((0, 2)), blind, oracle))
    random, ranker = score(Random(shop)), score(TextRanker(shop, fit_click_head(log, truth), truth))
    learned, exact = (score(GreedyBayes(family, 64, stores=True)) for family in (believed, shop))
    assert random < ranker - 0.3 and ranker < learned < exact + 0.05 and learned > exact - 0.35


def test_the_stage_filter_is_a_distribution_that_begins_anew(shop):
    found = StageFilter(shop, np.full(30, 0.5))
    found.begin(1, 4, torch.device("cpu"))
    row = lambda *values: torch.tensor([values])
    seen = shop.seen(shop.observe(shop.tasks(torch.arange(1)), shop.reset(shop.tasks(torch.arange(1)), 4, None)))
    after = seen._replace(
        time=row(1, 1, 1, 0), item=row(-1, 3, 3, 3), cart=row(False, False, True, False), order=row(0, 0, 1, 0) > 0
    )
    found.update(after)
    expected = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [1, 0, 0], [1, 0, 0]]])
    assert torch.allclose(found.chance, expected)
    found.update(after._replace(time=row(2, 2, 2, 0)))
    assert torch.allclose(found.chance.sum(-1), torch.ones(1, 4)) and found.chance[0, 1, 2] > 0.2
    with pytest.raises(ValueError, match="pull = 29"):
        StageFilter(shop, np.full(29, 0.5))


# ------------------------------------------------------------------------------------------------ rankings
def test_ranking_scores_are_scikit_learns_and_the_definitions():
    rng = np.random.default_rng(0)
    wanted, score = rng.poisson(0.3, (50, 12)), rng.normal(size=(50, 12))
    wanted[0] = 0
    found = ranking_scores(wanted, score, 5)
    assert np.isnan(found.ndcg[0]) and np.isnan(found.recall[0]) and np.isnan(found.reciprocal_rank[0])
    for row in range(1, 50):
        if not wanted[row].any():
            continue
        order = sorted(range(12), key=lambda i: -score[row, i])
        assert np.isclose(found.ndcg[row], ndcg_score(wanted[row : row + 1], score[row : row + 1], k=5))
        assert np.isclose(found.recall[row], wanted[row, order[:5]].sum() / wanted[row].sum())
        first = next(rank for rank, i in enumerate(order, 1) if wanted[row, i])
        assert np.isclose(found.reciprocal_rank[row], 1 / first)
    best = ranking_scores(wanted, wanted, 5).means
    assert best["ndcg"] == 1 and best["reciprocal_rank"] == 1 and set(best) == set(found.means)


@pytest.mark.parametrize(
    "wanted, score, k, message",
    [
        ([[1, 0]], [[1.0]], 1, "score = "),
        ([[1, 0]], [[1.0, 2.0]], 3, "k = 3"),
        ([[1, 0]], [[1.0, float("nan")]], 1, "finite"),
        ([[-1, 0]], [[1.0, 2.0]], 1, "relevance"),
    ],
)
def test_a_list_that_cannot_be_scored_is_refused(wanted, score, k, message):
    with pytest.raises(ValueError, match=message):
        ranking_scores(wanted, score, k)


def test_the_most_likely_taste_is_where_the_gradient_vanishes(choice, shop, log):
    believed = family_of(choice, shop, range(30))
    shops = [9, 4, 777]
    found = torch.tensor(tastes_of(believed, log, shops), requires_grad=True)
    assert (found[2] == 0).all()
    data = slates_of(log[log["shop"].isin(shops)])
    row = torch.tensor([shops.index(s) for s in data.shop])
    features, appeal = torch.tensor(believed.table.features), torch.tensor(believed.table.appeal)
    level = torch.tensor(believed.click)[data.reads] - believed.tiredness * torch.tensor(data.fatigue)
    logits = (features[data.product] * found[row][:, None]).sum(-1) + appeal[data.product] + level[:, None]
    logits = logits + 0.5 * torch.tensor(believed.places).log()
    logits = torch.cat((logits, torch.zeros(len(row), 1)), 1)
    posterior = -torch.nn.functional.cross_entropy(logits, torch.tensor(data.clicked), reduction="sum")
    (gradient,) = torch.autograd.grad(posterior - found.square().sum() / 2, found)
    assert gradient.abs().max() < 1e-6 and found[:2].abs().max() > 0.3


def test_money_of_a_list_is_the_mean_over_its_clicks(shop, tasks):
    score = np.linspace(1, 0, 30)
    odds = np.exp(shop.log_weight(tasks).numpy()[:, :4] + shop.click[1]) * shop.attention(tasks).numpy()
    chance = odds / (1 + odds.sum(1, keepdims=True))
    expected = (chance * np.array(shop.table.margin)[:4]).sum(1) * shop.cart[1] * shop.order[1]
    assert np.allclose(money_of(shop, tasks, score[None], 1), expected)


# ------------------------------------------------------------------------------------------------ the review
def stream(products, period, drifted, shops=40, sessions=6):
    model = BehaviourModel(seed=1) if drifted else MODEL
    return model.generate(products, range(shops), sessions, seed=period, assortment=range(len(products))).events


@pytest.fixture(scope="module")
def reviewed(products, truth):
    """A stream whose tastes change at period 6: what the review said, and its states as JSON before every period."""
    fit, loss = (lambda e: fit_click_head(e, truth)), (lambda h, e: click_loss(h, e, truth))
    review, verdicts, saved = Review(fit, loss, ReviewConfig(keep=2, shops=10)), [], []
    for period in range(12):
        saved.append((json.dumps(review.state()), review.kept(), review.model))
        verdicts.append(review.review(stream(products, period, period >= 6)))
    return verdicts, saved, fit, loss


def test_a_review_finds_the_drift_and_recovers(reviewed, products):
    verdicts = reviewed[0]
    assert [v.period for v in verdicts if v.alarm] == [6]
    assert [v.period for v in verdicts if v.refitted] == [0, 1, 6, 7]
    assert [v.p_value is None for v in verdicts] == [True] * 3 + [False] * 4 + [True] * 2 + [False] * 3
    assert np.isnan(verdicts[0].loss) and verdicts[6].loss > verdicts[6].reference + 0.01
    _, saved, _, loss = reviewed
    later = [stream(products, period, True) for period in range(8, 12)]
    stale, fresh = (np.mean([loss(saved[period][2], events).mean() for events in later]) for period in (5, 8))
    assert fresh < stale - 0.005  # the model of before the change, and the refitted one, on the same sessions
    levels = [v.level for v in verdicts if v.level]
    assert np.isclose(levels[0], 0.05 * 6 / np.pi**2) and np.isclose(levels[1], levels[0] / 4)
    assert np.isclose(levels[4], levels[0])  # a new stretch begins


@pytest.mark.parametrize("period", [0, 1, 4, 7, 10])
def test_a_review_goes_on_from_its_state(reviewed, products, period):
    verdicts, saved, fit, loss = reviewed
    state, log, model = saved[period]
    resumed = Review.resume(json.loads(state), log, fit, loss, model)
    for later in range(period, 12):
        found = resumed.review(stream(products, later, later >= 6))
        assert str(found) == str(verdicts[later])


def test_a_review_refuses_what_it_cannot_use_and_is_as_before(reviewed, products):
    _, saved, fit, loss = reviewed
    state, log, model = saved[4]
    state = json.loads(state)
    review = Review.resume(state, log, fit, loss, model)
    with pytest.raises(ValueError, match="column shop"):
        review.review(log.iloc[:0])
    with pytest.raises(ValueError, match="events.shop = 0.*at least 10 shops"):
        review.review(stream(products, 4, False).assign(shop=lambda e: e["shop"] + 1000))
    review.loss = lambda head, events: pd.Series({3: float("nan")})
    with pytest.raises(ValueError, match="not finite for shop 3"):
        review.review(stream(products, 4, False))
    assert review.state() == state
    with pytest.raises(ValueError, match="what Review.state returned"):
        Review.resume({}, log, fit, loss)
    with pytest.raises(ValueError, match="without period 2"):
        Review.resume(state, log[log["period"] != 2], fit, loss)
    with pytest.raises(ValueError, match="the deployed model"):
        Review.resume(state, log, fit, loss)  # fitted on periods that the log no longer has
    refitted = Review.resume(json.loads(saved[2][0]), saved[2][1], fit, loss)  # these it still has
    assert np.allclose(refitted.model.weight, saved[2][2].weight)


@pytest.mark.parametrize("field, value", [("level", 0.0), ("level", 1.0), ("keep", 0), ("shops", 5)])
def test_a_bad_setting_of_the_review_is_named(field, value):
    with pytest.raises(ValueError, match=f"ReviewConfig.{field} = {value}"):
        ReviewConfig(**{field: value})


def test_the_family_of_a_view_must_fit(shop, choice):
    small = SlateRecommendation()
    with pytest.raises(ValueError, match="believed ="):
        View(shop, small, Random(small))
