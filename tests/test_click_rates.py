"""Click rates: the table of impressions, features, losses, logs as tasks, campaigns whose rates are known."""

import importlib.util
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import log_loss as sklearn_log_loss
from torch import Generator

from ecomlib.calibration import complete_journey, open_bandit
from ecomlib.calibration.tables import TableError
from ecomlib.families.base import split
from ecomlib.language import click_metrics, click_studies
from ecomlib.language.campaigns import CampaignFamily, Campaigns
from ecomlib.language.click_rates import (
    OPEN_BANDIT,
    CampaignLogs,
    ClickLoss,
    FactorisationMachine,
    FeatureMap,
    click_loss,
    count_cells,
    pairwise,
)
from ecomlib.language.click_shrinkage import fit_empirical_bayes, fit_logistic, posterior, predictive_rate
from ecomlib.learners import GradientStep, Inner, ReptileStep, SupervisedMAML
from ecomlib.learners.supervised import Examples

DATA = Path(__file__).parents[1] / "data"
TABLE = DATA / "open_bandit_impressions.parquet"
FAMILY = CampaignFamily()


@pytest.fixture(scope="module")
def impressions():
    return pd.read_parquet(TABLE)


@pytest.fixture
def campaigns():
    return split(FAMILY, "test", 200)[1]


# ------------------------------------------------------------------------------------------- the table
def test_table_of_impressions_is_what_the_logs_hold(impressions):
    if importlib.util.find_spec("obp") is None:
        pytest.skip(f"the logs are not installed: pip install --no-deps {open_bandit.PACKAGE}")
    pd.testing.assert_frame_equal(open_bandit.impressions(), impressions)


def test_table_of_impressions_agrees_with_that_of_decisions_and_its_card(impressions):
    decisions = pd.read_parquet(DATA / "open_bandit_decisions.parquet")
    same = ["policy", "campaign", "item", "position", "click"]
    pd.testing.assert_frame_equal(impressions[same], decisions[same])
    card = (DATA / "open_bandit.md").read_text(encoding="utf-8")
    assert f"`{TABLE.name}`: {len(impressions):,} rows" in card
    part = card[card.index(f"Of `{TABLE.name}`") :]
    for column, kind in impressions.dtypes.items():
        line = next(line for line in part.splitlines() if line.startswith("|") and f"`{column}`" in line)
        assert f"| {kind} |" in line, column
    values = [impressions[f"user_{k}"].nunique() for k in range(4)]
    assert "{}, {}, {} and {} values".format(*values) in part
    for name, digest in open_bandit.CONTEXT_SHA256.items():
        assert f"| `{name}/item_context.csv` | `{digest}` |" in card
    logs = impressions.groupby(["policy", "campaign"], observed=True, sort=False)["hour"]
    assert logs.apply(lambda hour: hour.is_monotonic_increasing).all() and impressions["hour"].max() == 167
    for k in (1, 2, 3):
        campaigns = impressions.groupby(f"item_{k}")["campaign"].nunique()
        assert (campaigns == 1).all()
    assert TABLE.stat().st_size < 400_000


def test_the_history_knows_the_future(impressions):
    """What the card warns of: on the first day a history of 0 means that no click will follow."""
    first = impressions["hour"] < 24
    assert impressions[first]["click"].sum() == 47
    assert impressions[first & (impressions["history"] == 0)]["click"].sum() == 0
    later = impressions[~first].groupby(impressions["history"] > 0)["click"].mean()
    assert 1 < later[True] / later[False] < 3
    assert "each of the 47 clicks" in (DATA / "open_bandit.md").read_text(encoding="utf-8")
    assert not any(name.startswith("history") for name in OPEN_BANDIT.names)


def test_foreign_item_features_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(open_bandit, "logs_folder", lambda: tmp_path)
    (tmp_path / "random" / "all").mkdir(parents=True)
    (tmp_path / "random" / "all" / "item_context.csv").write_text("not the features")
    with pytest.raises(complete_journey.PanelError, match="item_context.csv has sha256 .* expected eba04cc2"):
        open_bandit.impressions()


# ------------------------------------------------------------------------------------------- features
def test_features_are_one_where_they_should_be(impressions):
    rows = impressions.iloc[[0, 30_000, 59_999]].reset_index(drop=True)
    x = OPEN_BANDIT(rows)
    names = OPEN_BANDIT.names
    assert x.shape == (3, OPEN_BANDIT.size) == (3, len(names))
    hashed = slice(names.index("bucket 0"), names.index("bucket 31") + 1)
    for i, row in rows.iterrows():
        on = {names[k] for k in x[i].nonzero()[:, 0] if not names[k].startswith("bucket")}
        expected = {f"{name} {row[name]}" for name in ("position", "user_0", "user_1", "user_2", "user_3")}
        assert on == expected | {"item_0"}
        assert x[i, -1] == row["item_0"] and x[i, hashed].sum() == 4
    pd.testing.assert_series_equal(rows["click"], impressions.iloc[[0, 30_000, 59_999]]["click"], check_index=False)


def test_hashing_is_stable_and_sees_the_campaign():
    """The same item number of two campaigns is two items; and the buckets are those of every process."""
    table = pd.DataFrame({"campaign": ["a", "b", "a"], "item": [7, 7, 7]})
    coded = FeatureMap((), hashed=(("campaign", "item"),), buckets=1000)(table)
    assert torch.equal(coded[0], coded[2]) and not torch.equal(coded[0], coded[1])
    assert coded.nonzero()[:, 1].tolist() == [391, 966, 391]


def test_values_that_cannot_be_coded_are_named():
    coded = FeatureMap((("place", 1, 3),))
    assert coded(pd.DataFrame({"place": [1, 9]})).tolist() == [[1, 0, 0], [0, 0, 1]]
    with pytest.raises(TableError, match=r"'place': 1 of 2 rows cannot be coded; the first is row 2 \(place 0\)"):
        coded(pd.DataFrame({"place": [1, 0]}))
    with pytest.raises(TableError, match="missing columns place; found: item"):
        coded(pd.DataFrame({"item": [1]}))
    with pytest.raises(ValueError, match=r"buckets = 0; allowed: a whole number from 1"):
        FeatureMap((), hashed=(("item",),), buckets=0)
    with pytest.raises(ValueError, match="FeatureMap = 0; allowed: 1 to"):
        FeatureMap(())


# ------------------------------------------------------------------------------------------- models and losses
def test_factorisation_machine_is_the_double_sum():
    generator = Generator().manual_seed(0)
    vectors, x = (torch.randn(shape, generator=generator) for shape in ((7, 3), (5, 7)))
    naive = sum((vectors[i] @ vectors[j]) * x[:, i] * x[:, j] for i, j in combinations(range(7), 2))
    torch.testing.assert_close(pairwise(vectors, x)[:, 0], naive)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_task_axis_of_parameters_is_the_tasks_one_by_one(rank):
    network = FactorisationMachine(7, rank)
    tasks = [[torch.randn_like(p) for p in network.initial(Generator().manual_seed(i))] for i in range(4)]
    x = torch.randn(4, 5, 7, generator=Generator().manual_seed(9))
    together = network.outputs([torch.stack(p) for p in zip(*tasks)], x)
    torch.testing.assert_close(together, torch.stack([network.outputs(p, x[i]) for i, p in enumerate(tasks)]))
    assert len(tasks[0]) == network.tensors and together.shape == (4, 5, 1)


def test_the_start_predicts_the_base_rate():
    network = FactorisationMachine(7, 0, base_rate=0.02)
    outputs = network.outputs(network.initial(Generator()), torch.ones(3, 7))
    torch.testing.assert_close(torch.sigmoid(outputs), torch.full((3, 1), 0.02))


def test_loss_is_that_of_scikit_learn_and_of_counts():
    generator = Generator().manual_seed(0)
    logit, label = torch.randn(200, 1, generator=generator), (torch.rand(200, generator=generator) < 0.3).double()
    cell = torch.arange(200) % 10
    logit = logit[cell]  # ten cells
    each = click_loss(logit, torch.stack((torch.ones(200), label), -1))
    assert each.item() == pytest.approx(sklearn_log_loss(label, torch.sigmoid(logit[:, 0])), abs=1e-12)
    counts = count_cells(10, cell[None], label[None])
    empty = torch.cat((counts[0], torch.zeros(1, 2)))  # a cell that was never shown
    assert click_loss(torch.cat((logit[:10], torch.full((1, 1), 3.0))), empty).item() == pytest.approx(each.item())
    scaled = ClickLoss(0.1, prior_impressions=50)(logit[:10], counts[0])
    assert scaled.item() == pytest.approx(each.item() / 0.09 * 200 / 250)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClickLoss(0.0), "base_rate = 0.0; allowed: a number between 0 and 1"),
        (lambda: ClickLoss(0.1, -1.0), "prior_impressions = -1.0; allowed: a number >= 0"),
        (lambda: FactorisationMachine(0), "features = 0; allowed: 1 to"),
        (lambda: FactorisationMachine(10**9), "features = 1000000000; allowed: 1 to"),
        (lambda: FactorisationMachine(3, rank=-1), "rank = -1; allowed: 0 to 1000"),
        (lambda: CampaignFamily(users=1), "users = 1; allowed: a whole number from 2 to 100"),
        (lambda: CampaignFamily(level_sd=0.0), "level_sd = 0.0; allowed: between 0 and 5"),
        (lambda: CampaignFamily(base_rate=0.9), "base_rate = 0.9; allowed: between 0 and 0.5"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------- logs as tasks
def test_a_query_never_precedes_its_support():
    """Rows carry their own number as a feature, so that what was drawn can be read off."""
    number = torch.arange(30.0)[:, None]
    logs = CampaignLogs(number, torch.arange(30), torch.zeros(30), [12, 18], support=4, query=3)
    tasks = logs.tasks(torch.arange(200))
    support, query = (logs.sample(tasks, points, episode=e)[0][..., 0] for points, e in ((4, 0), (3, 1)))
    assert torch.equal(query[:, 0], support[:, -1] + 1)
    ends = torch.where(tasks.log == 0, 12.0, 30.0)
    begins = torch.where(tasks.log == 0, 0.0, 12.0)
    assert (support[:, 0] >= begins).all() and (query[:, -1] < ends).all()
    assert support[tasks.log == 0].min() == 0 and query[tasks.log == 1].max() == 29  # every stretch can come up
    with pytest.raises(ValueError, match="points = 5; allowed: 1 to 4"):
        logs.sample(tasks, 5)
    with pytest.raises(ValueError, match="at least support \\+ query = 13"):
        CampaignLogs(number, torch.arange(30), torch.zeros(30), [12, 18], support=10, query=3)
    with pytest.raises(ValueError, match="allowed: 30 impressions"):
        CampaignLogs(number, torch.arange(30), torch.zeros(30), [12, 17], support=4, query=3)


def test_counts_and_single_impressions_have_one_loss(campaigns):
    few = Campaigns(*(x[:3] for x in campaigns))
    network = FactorisationMachine(FAMILY.features.shape[1], 2)
    theta = [torch.randn_like(p) for p in network.initial(Generator().manual_seed(0))]
    cell, click = FAMILY.impressions(few, 500, seed=0)
    rows = click_loss(network.outputs(theta, FAMILY.features[cell]), torch.stack((torch.ones_like(click), click), -1))
    x, y = FAMILY.sample(few, 500, seed=0)
    assert x.shape[1] == FAMILY.cells
    torch.testing.assert_close(click_loss(network.outputs(theta, x), y), rows)
    assert FAMILY.sample(few, 20, seed=0)[0].shape[1] == 20


def test_a_held_out_campaign_is_met_in_the_order_of_time(impressions):
    x = torch.arange(float(len(impressions)))[:, None]  # the number of the row
    for campaign in ("all", "men", "women"):
        held = click_studies.hold_out(impressions, x, campaign, support=2000, query=1000)
        past = impressions.iloc[held.past]
        assert past["hour"].max() < 72 and campaign not in set(past["campaign"])
        assert torch.equal(held.train.features[:, 0], x[held.past, 0])
        for trials, until, since in ((held.validation, 72, 72), (held.test, 96, 96)):
            for trial in trials:
                support, query = (impressions.iloc[part.x[0, :, 0].long().numpy()] for part in trial[1:3])
                assert len(support) == 2000 and support["hour"].max() < until and query["hour"].min() >= since
                assert set(support["campaign"]) == set(query["campaign"]) == {trial.name.split("/")[1]}
                assert (trial.query.y[0, :, 1].numpy() == query["click"]).all()
            assert (campaign in {t.name.split("/")[1] for t in trials}) == (trials is held.test)
        assert max(t.hour.max() for t in held.validation) < 96
    with pytest.raises(ValueError, match="campaign = 'children'; allowed: one of"):
        click_studies.hold_out(impressions, x, "children", 2000, 1000)
    short = ~((impressions["campaign"] == "men") & (impressions["hour"] < 90))
    with pytest.raises(ValueError, match="support = 2000; allowed: at most [0-9]+, the impressions of random/men"):
        click_studies.hold_out(impressions[short], x[np.flatnonzero(short)], "men", 2000, 1000)
    with pytest.raises(ValueError, match="/men'; allowed: rows of each log in the order of time"):
        click_studies.hold_out(impressions[::-1], x, "women", 2000, 1000)


# ------------------------------------------------------------------------------------------- generated campaigns
def test_a_campaign_is_a_function_of_its_id_and_has_the_stated_distribution():
    tasks = FAMILY.tasks(torch.arange(4000))
    alone = FAMILY.tasks(torch.tensor([17]))
    assert torch.equal(alone.rate[0], tasks.rate[17])
    sd = tasks.effects.std(0)
    assert (sd - 0.5).abs().max() < 5 * 0.5 / math.sqrt(2 * 4000) and tasks.effects.mean().abs() < 0.01
    assert tasks.rate.mean(1).quantile(0.1) > 0.004 and tasks.rate.mean(1).quantile(0.9) < 0.03
    for seeds in ((0, 0), (0, 1)):  # the same luck, and another
        draws = [FAMILY.impressions(Campaigns(*(x[:2] for x in tasks)), 50, s)[0] for s in seeds]
        assert torch.equal(*draws) == (seeds[0] == seeds[1])
    shifted, moved = split(FAMILY, "shifted", 4000)
    assert shifted.shared[0] - FAMILY.shared[0] == pytest.approx(1.0)
    assert 2 < moved.rate.mean() / tasks.rate.mean() < math.e


def test_clicks_come_at_the_rates(campaigns):
    counts = FAMILY.counts(campaigns, 5000, seed=3)
    shown, clicks = counts.unbind(-1)
    assert (shown.sum(1) == 5000).all()
    expected, variance = (shown * campaigns.rate).sum(0), (shown * campaigns.rate * (1 - campaigns.rate)).sum(0)
    z = (clicks.sum(0) - expected) / variance.sqrt()
    assert z.abs().max() < 4.5 and 0.75 < z.std() < 1.25


def test_blind_is_the_best_constant_and_oracle_is_a_bound(campaigns):
    many = FAMILY.tasks(torch.arange(20_000))
    mean = many.rate.mean(0)
    error = many.rate.std(0) / math.sqrt(20_000)
    assert ((FAMILY.blind_rate() - mean).abs() < 4.5 * error).all()
    blind, oracle = FAMILY.expected_loss(campaigns, FAMILY.blind_rate()), FAMILY.oracle_loss(campaigns)
    assert (blind >= oracle).all() and blind.mean() > 1.02 * oracle.mean()
    for factor in (0.8, 1.25):
        assert (
            FAMILY.expected_loss(many, factor * FAMILY.blind_rate()).mean()
            > FAMILY.expected_loss(many, FAMILY.blind_rate()).mean()
        )


# ------------------------------------------------------------------------------------------- shrinkage
def test_the_mode_is_stationary_and_the_covariance_is_the_curvature(campaigns):
    counts = FAMILY.counts(Campaigns(*(x[:4] for x in campaigns)), 2000, seed=0)
    mean = torch.full((9,), 0.1)
    found = posterior(FAMILY.design, FAMILY.shared, counts, mean, FAMILY.effect_sd)

    def minus_log(z, y):
        logit = FAMILY.shared + FAMILY.design @ z
        prior = 0.5 * (((z - mean) / FAMILY.effect_sd) ** 2).sum()
        return y[:, 0].sum() * click_loss(logit[:, None], y) + prior

    for i in range(4):
        gradient = torch.func.grad(minus_log)(found.mode[i], counts[i])
        assert gradient.abs().max() < 1e-9
        hessian = torch.func.hessian(minus_log)(found.mode[i], counts[i])
        torch.testing.assert_close(found.covariance[i] @ hessian, torch.eye(9), atol=1e-8, rtol=0)


def test_predictive_rate_is_the_integral():
    """One effect and one cell: against a fine grid."""
    design, offset = torch.ones(1, 1), torch.tensor([-4.6])
    counts = torch.tensor([[[300.0, 0.0]], [[300.0, 9.0]], [[0.0, 0.0]]])
    mean, sd = torch.tensor([0.2]), torch.tensor([0.7])
    found, effective = predictive_rate(design, offset, counts, mean, sd, samples=4096)
    z = torch.linspace(-6, 6, 20_001)
    rate = torch.sigmoid(offset + z)
    log = counts[..., 1] * rate.log() + (counts[..., 0] - counts[..., 1]) * torch.log1p(-rate)
    weight = torch.softmax(log - 0.5 * ((z - mean) / sd) ** 2, 1)
    torch.testing.assert_close(found[:, 0], (weight * rate).sum(1), rtol=2e-3, atol=0)
    assert (effective > 0.6 * 4096).all()


def test_no_log_gives_the_blind_prediction_and_all_logs_the_oracle(campaigns):
    zeros = torch.zeros(9)
    empty = torch.zeros(1, FAMILY.cells, 2)
    rate, _ = predictive_rate(FAMILY.design, FAMILY.shared, empty, zeros, FAMILY.effect_sd, samples=4096)
    torch.testing.assert_close(rate[0], FAMILY.blind_rate(), rtol=1e-2, atol=0)
    few = Campaigns(*(x[:5] for x in campaigns))
    shown = torch.full_like(few.rate, 1e8)
    rate, _ = predictive_rate(FAMILY.design, FAMILY.shared, torch.stack((shown, shown * few.rate), -1), zeros,
                              FAMILY.effect_sd)  # fmt: skip
    torch.testing.assert_close(rate, few.rate, rtol=1e-3, atol=0)


def test_bayes_lies_between_blind_and_oracle_and_nothing_beats_it(campaigns):
    """The order that theory demands, on campaigns and luck that all share."""
    counts = FAMILY.counts(campaigns, 1000, seed=5)
    past = FAMILY.counts(FAMILY.tasks(torch.arange(10**6, 10**6 + 150)), 4000, seed=0)
    fitted = fit_empirical_bayes(FAMILY.crossed, FAMILY.design, past, (0,) + (1,) * 8)
    assert fitted.sd[0] == pytest.approx(0.5, abs=0.12) and fitted.sd[1] == pytest.approx(0.5, abs=0.12)
    bayes, _ = predictive_rate(FAMILY.design, FAMILY.shared, counts, torch.zeros(9), FAMILY.effect_sd)
    observed = (counts[..., 1].sum(1) + 0.5)[:, None] / (counts[..., 0].sum(1) + 50)[:, None]
    rates = {"oracle": campaigns.rate, "bayes": bayes, "eb": fitted.rates(FAMILY.design, counts),
             "blind": FAMILY.blind_rate(), "observed": observed}  # fmt: skip
    loss = {name: FAMILY.expected_loss(campaigns, rate.expand(200, -1)).mean().item() for name, rate in rates.items()}
    assert loss["oracle"] < loss["bayes"] < loss["eb"] < loss["blind"] < loss["observed"]
    assert loss["eb"] - loss["bayes"] < 0.1 * (loss["blind"] - loss["bayes"])


# ------------------------------------------------------------------------------------------- learners
@pytest.fixture
def past_logs():
    return FAMILY.logs(FAMILY.tasks(torch.arange(10**6, 10**6 + 60)), 3000, support=1000, query=2000)


def learner(inner, outer=None, rank=2):
    network = FactorisationMachine(FAMILY.features.shape[1], rank)
    return SupervisedMAML(network, inner, outer or GradientStep(lr=0.02), ClickLoss(0.01, 1000), 1000, 2000, 20)


def test_a_meta_learned_start_beats_blind_and_stays_below_bayes(past_logs, campaigns):
    head = FactorisationMachine(2, 2).head
    anil = learner(Inner(steps=3, lr=0.3, adapted=head, learn_lr=True))
    meta = anil.meta_train(past_logs, 0, 150, progress=False).meta
    counts = FAMILY.counts(campaigns, 1000, seed=5)
    x = FAMILY.features.expand(200, -1, -1)
    loss = lambda rate: FAMILY.expected_loss(campaigns, rate).mean()
    adapted = loss(click_studies.adapted_rates(anil, meta, Examples(x, counts), x))
    start = loss(click_studies.adapted_rates(anil, meta, Examples(x, counts), x, steps=0))
    bayes = loss(predictive_rate(FAMILY.design, FAMILY.shared, counts, torch.zeros(9), FAMILY.effect_sd)[0])
    blind = loss(FAMILY.blind_rate())
    assert bayes < adapted < blind < start, "the start is good for being adapted, not as it is"
    other = counts[torch.randperm(200, generator=Generator().manual_seed(0))]
    assert loss(click_studies.adapted_rates(anil, meta, Examples(x, other), x)) > blind, "other campaigns' logs mislead"


def test_usual_step_sizes_do_nothing(campaigns):
    """With the plain loss and a step size of 0.01, a log of a thousand impressions moves nothing."""
    network = FactorisationMachine(FAMILY.features.shape[1], 0)
    plain = SupervisedMAML(network, Inner(steps=5, lr=0.01), loss=click_loss)
    theta = network.initial(Generator())
    x, counts = FAMILY.features.expand(200, -1, -1), FAMILY.counts(campaigns, 1000, seed=5)
    moved = click_studies.adapted_rates(plain, theta, Examples(x, counts), x) / 0.01 - 1
    assert moved.abs().max() < 0.005
    scaled = learner(Inner(steps=5, lr=0.3), rank=0)
    assert (click_studies.adapted_rates(scaled, theta, Examples(x, counts), x) / 0.01 - 1).abs().mean() > 0.1


@pytest.mark.parametrize("inner, outer", [
    (Inner(steps=2, lr=0.3, first_order=True), None),
    (Inner(steps=2, lr=0.03), ReptileStep(lr=0.02, adam=True)),
])  # fmt: skip
def test_other_outer_steps_and_two_seeds_in_one_batch(past_logs, inner, outer):
    both = learner(inner, outer).meta_train(past_logs, [0, 1], 3, progress=False).meta
    alone = learner(inner, outer).meta_train(past_logs, 1, 3, progress=False).meta
    for together, single in zip(both, alone):
        torch.testing.assert_close(together[1], single, rtol=1e-7, atol=1e-9)


def test_early_stopping_keeps_the_best_on_the_validation(impressions):
    table = impressions.groupby(["policy", "campaign"], observed=True).sample(frac=0.2, random_state=0).sort_index()
    x = FeatureMap((("position", 1, 3), ("user_0", 0, 3)))(table)
    held = click_studies.hold_out(table, x, "men", support=300, query=200)
    network = FactorisationMachine(6, 2, 0.005)
    maml = SupervisedMAML(network, Inner(lr=0.1), GradientStep(lr=0.05), ClickLoss(0.005, 1000), 300, 200, 4)
    stopped = click_studies.train_until_best(maml, held, seed=0, iterations=20, every=5)
    assert [k for k, _ in stopped.losses] == [0, 5, 10, 15, 20]
    losses = dict(stopped.losses)
    assert losses[stopped.iteration] == min(losses.values())
    assert click_studies.validation_loss(maml, stopped.meta, held.validation) == losses[stopped.iteration]


# ------------------------------------------------------------------------------------------- metrics
LABEL = np.array([0, 1, 0, 0, 1, 0, 0, 0, 0, 0] * 40)
GOOD = np.where(LABEL == 1, 0.3, 0.175)


def test_metrics_by_hand():
    base = np.full(400, 0.2)
    assert click_metrics.log_loss(LABEL, base) == pytest.approx(sklearn_log_loss(LABEL, base))
    assert click_metrics.normalised_entropy(LABEL, base) == pytest.approx(1.0)
    assert click_metrics.normalised_entropy(LABEL, GOOD) < 1
    assert click_metrics.average_precision(LABEL, base) == pytest.approx(0.2)
    assert click_metrics.average_precision(LABEL, GOOD) == 1.0
    assert click_metrics.predicted_per_click(LABEL, 2 * base) == pytest.approx(2.0)
    assert click_metrics.entropy(0.0) == 0.0 and click_metrics.entropy(0.5) == pytest.approx(math.log(2))


def test_bootstrap_is_paired_and_by_block():
    label = np.random.default_rng(0).random(4000) < 0.2
    worse = np.full(4000, 0.25)
    found = click_metrics.bootstrap(label, {"base": np.full(4000, 0.2), "worse": worse}, np.arange(4000) // 10, "base")
    row = found.set_index(["metric", "model"]).loc[("log-loss", "worse")]
    expected = sklearn_log_loss(label, worse) - sklearn_log_loss(label, np.full(4000, 0.2))
    assert row["difference"] == pytest.approx(expected)
    # the difference of two constants is linear in the click rate: its interval is that of a share
    slope = math.log(0.2 / 0.8) - math.log(0.25 / 0.75)
    half = 1.96 * abs(slope) * math.sqrt(0.16 / 4000)
    assert (row["difference_high"] - row["difference_low"]) / 2 == pytest.approx(half, rel=0.2)
    assert row["low"] < row["estimate"] < row["high"]
    same = found.set_index(["metric", "model"]).loc[("PR-AUC", "base")]
    assert same["difference_low"] == same["difference_high"] == 0
    whole = click_metrics.bootstrap(np.repeat(label[:80], 50), {"base": np.full(4000, 0.2)}, np.arange(4000) // 50,
                                    "base").iloc[0]  # fmt: skip
    assert (whole["high"] - whole["low"]) > 4 * (row["high"] - row["low"]), "equal rows of a block are one"


def test_calibration_counts_every_row_once():
    generator = np.random.default_rng(0)
    rate = generator.uniform(0.01, 0.3, 20_000)
    label = generator.random(20_000) < rate
    table = click_metrics.calibration(label, rate, bins=5)
    assert table["impressions"].sum() == 20_000 and table["clicks"].sum() == label.sum()
    assert (table["observed"] - table["clicks"] / table["impressions"]).abs().max() < 1e-12
    covered = 0
    for seed in range(20):
        drawn = np.random.default_rng(seed).random(20_000) < rate
        found = click_metrics.calibration(drawn, rate, bins=5)
        covered += ((found["low"] < found["predicted"]) & (found["predicted"] < found["high"])).sum()
    assert 88 <= covered <= 100, "95 % of 100 bins, give or take"
    over = click_metrics.calibration(label, np.minimum(1.6 * rate, 0.99), bins=5)
    assert (over["high"] < over["predicted"]).all()


def test_impressions_needed_is_the_textbook_formula():
    generator = np.random.default_rng(0)
    label = generator.random(50_000) < 0.01
    needed = click_metrics.impressions_needed(label, np.full(50_000, 0.011), np.full(50_000, 0.01), gain=0.01)
    sd = (math.log(1.1) - math.log(0.989 / 0.99)) * math.sqrt(0.01 * 0.99)
    assert needed == pytest.approx((2.8 * sd / (0.01 * click_metrics.entropy(0.01))) ** 2, rel=0.1)


@pytest.mark.parametrize("label, rate, message", [
    ([0, 1], [0.1], "two lists of the same rows"),
    ([0, 2], [0.1, 0.2], "labels must be 0 or 1"),
    ([0, 1], [0.0, 0.2], "strictly between 0 and 1"),
    ([0, 1], [math.nan, 0.2], "strictly between 0 and 1"),
    ([], [], "two lists of the same rows"),
    ([0, 0], [0.1, 0.2], r"clicks = 0; allowed: some of the 2 labels"),
])  # fmt: skip
def test_bad_predictions_are_refused(label, rate, message):
    with pytest.raises(ValueError, match=message):
        click_metrics.normalised_entropy(label, rate)


def test_logistic_regression_balances_its_clicks():
    x = np.eye(3)[np.random.default_rng(0).integers(3, size=3000)]
    label = (np.random.default_rng(1).random(3000) < x @ [0.02, 0.1, 0.3]).astype(int)
    predicted = fit_logistic(x, label, None, penalty=1e-6).predict_proba(x)[:, 1]
    for k in range(3):
        assert predicted[x[:, k] == 1].sum() == pytest.approx(label[x[:, k] == 1].sum(), rel=1e-3)
