"""Configurations: every valid one survives its file, and nothing else passes for one."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ecomlib.calibration import CalibrationConfig, SalesTableError, read_sales
from ecomlib.cli.train import read_market
from ecomlib.config_files import config_hash, config_type, plain, read_config, validate, write_config
from ecomlib.configuration import (
    FAMILIES,
    OUTER,
    DataSettings,
    InnerSettings,
    PolicySettings,
    TrainConfig,
    default_config,
)
from ecomlib.families import (
    CensoredInventory,
    LogitPricing,
    PointNavigation,
    SegmentBidding,
    ShopMDP,
    SlateRecommendation,
)
from ecomlib.families.inventory_priors import DemandRanges, LogNormalDemand
from ecomlib.families.priors import GaussianPrior, LogUniformPrior
from ecomlib.learners import (
    Inner,
    MAMLConfig,
    PPOConfig,
    PPOStep,
    ReinforceStep,
    ReptileStep,
    RL2Config,
    TRPOConfig,
    TRPOStep,
)
from ecomlib.learners.belief import BeliefConfig
from ecomlib.learners.meta import GradientStep
from ecomlib.learners.reinforce import ReinforceConfig
from ecomlib.training import Machine

quick = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PAIRS = [(family, algorithm) for family in FAMILIES for algorithm in OUTER]

# ------------------------------------------------------------------------------------------ what is allowed
whole = st.integers(1, 10**6)
positive = st.floats(1e-300, 1e300) | st.integers(1, 2**53)
share = st.floats(0, 1)
increasing = lambda low, high: (
    st.lists(st.floats(low, high), min_size=2, max_size=9, unique=True).map(sorted).map(tuple)
)
ranges = lambda low, high: st.tuples(st.floats(low, high), st.floats(low, high)).map(sorted).map(tuple)
triple = st.tuples(*[st.floats(-9, 9)] * 3)
factors = st.tuples(*[st.floats(0, 9)] * 6).map(lambda x: ((x[0], 0.0, 0), (x[1], x[2], 0.0), (x[3], x[4], x[5])))
log_uniform = st.builds(LogUniformPrior, ranges(0.1, 9), ranges(0.01, 0.9), ranges(1, 999), ranges(0.1, 9))
gaussian = st.builds(GaussianPrior, triple, factors, positive, ranges(0.1, 9))
pricing = st.builds(
    LogitPricing,
    days=whole,
    markups=increasing(0.5, 9),
    weekday=st.permutations(LogitPricing().weekday).map(tuple),
    prior=log_uniform | gaussian,
    stock=st.none() | whole,
    mean_traffic=positive,
) | st.builds(LogitPricing, continuous=st.just(True))
navigation = st.builds(PointNavigation, whole, st.floats(0, 1), st.floats(1.5, 9), positive, positive)
shop = st.builds(ShopMDP, horizon=whole)
adam = {"lr": positive, "log_std_lr": st.none() | positive}
trust = st.builds(TRPOConfig, positive, positive, whole, st.integers(0, 99), st.floats(0.01, 0.99))
inventory = st.builds(
    CensoredInventory,
    days=whole,
    levels=st.lists(st.integers(0, 400), min_size=2, max_size=9, unique=True).map(sorted).map(tuple),
    prior=st.builds(DemandRanges, ranges(1, 60), ranges(1.1, 4))
    | st.builds(LogNormalDemand, st.just((3.0, 0.5)), st.just(((0.8, 0.0), (0.1, 0.4)))),
)
bidding = st.builds(SegmentBidding, segments=st.integers(1, 9), first_price=st.booleans(), delay=st.integers(0, 9))
recommendation = st.builds(
    SlateRecommendation, slates=whole, tiredness=share, reward=st.sampled_from(["click", "cart", "purchase"])
)
VALID = {
    "pricing": pricing,
    "inventory": inventory,
    "bidding": bidding,
    "recommendation": recommendation,
    "navigation": navigation,
    "shop": shop,
    PPOStep: st.builds(PPOStep, epochs=whole, clip=st.floats(0.01, 0.99), **adam),
    ReinforceStep: st.builds(ReinforceStep, **adam),
    ReptileStep: st.builds(ReptileStep, positive, st.booleans()),
    TRPOStep: st.builds(TRPOStep, trust, transitions=st.none() | whole),
    RL2Config: st.builds(
        RL2Config,
        episodes=st.integers(1, 9),
        memory=st.sampled_from(["gru", "sum", "attention"]),
        replicas=st.integers(2, 99),
        lr=positive,
        own_unit=share,
        anneal=st.none() | whole,
    ),
    BeliefConfig: st.builds(
        BeliefConfig, latent=st.integers(1, 99), decode=st.sampled_from(["past", "all"]), lr=positive
    ),
}
hidden = st.lists(st.integers(1, 999), min_size=1, max_size=3).map(tuple)
mlp = st.builds(
    PolicySettings,
    hidden=hidden,
    activation=st.sampled_from(["tanh", "relu"]),
    inputs=st.none() | st.just((0,)) | st.just((1, 0)),
    minimum_std=st.floats(0, 9),
)
gru = st.builds(PolicySettings, st.just("gru"), whole.map(lambda n: (n,)))


@st.composite
def train_configs(draw) -> TrainConfig:
    """Any configuration that trains."""
    family, algorithm = draw(st.sampled_from(PAIRS))
    steps = draw(st.integers(1 if algorithm == "reptile" else 0, 3))
    learn = draw(st.booleans()) and steps > 0 and algorithm != "reptile"
    rates = st.tuples(*[positive] * max(steps, 1))
    inner = InnerSettings(
        steps,
        draw(positive if learn else positive | rates),
        draw(st.sampled_from(["log_likelihood", "ratio", "low_variance_curvature"])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(["all", "head"])),
        learn,
    )
    weights = st.none() | st.tuples(*[st.floats(0.1, 9)] * (steps + 1))
    advantage = st.sampled_from(["leave_one_out", "linear_feature", "same_step"])
    many = st.none() | whole
    data = DataSettings(draw(whole), draw(whole) + 1, draw(many), draw(weights), draw(advantage), draw(share),
                        draw(share), draw(many))  # fmt: skip
    outer, policy = draw(VALID[OUTER[algorithm]]), draw(mlp | gru)
    several = st.just(1) if isinstance(outer, TRPOStep | RL2Config) else whole
    if isinstance(outer, RL2Config):  # which has no use for these
        policy, inner, data = PolicySettings(), InnerSettings(steps=0), DataSettings()
    return TrainConfig(
        draw(VALID[family]), outer, family, algorithm, policy, inner, data, draw(whole),
        draw(st.integers(1, 99)), draw(st.integers(0, 2**31)), draw(st.none() | several), draw(whole),
        draw(st.integers(1, 99)), draw(st.sampled_from(["float32", "float64"])),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ there and back
@quick
@given(train_configs())
def test_every_configuration_survives_its_file(tmp_path, config):
    file = tmp_path / "config.toml"
    write_config(config, file)
    found = read_config(file)
    assert found == config and config_hash(found) == config_hash(config)
    assert hash(found) == hash(config)  # families are keys of caches


@pytest.mark.parametrize("family, algorithm", PAIRS)
def test_defaults_survive_and_fit_their_learner(tmp_path, family, algorithm):
    config = default_config(family, algorithm)
    write_config(config, tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == config
    torch.set_default_dtype(torch.float32)
    assert config.learner().initial(torch.Generator().manual_seed(0))


def test_a_file_has_every_field_by_name(tmp_path):
    """None too, which TOML has no word for: a default that is not None would come back in its place."""
    config = default_config("pricing", "ppo-maml")
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, inputs=None))
    write_config(config, tmp_path / "config.toml")
    text = (tmp_path / "config.toml").read_text()
    assert 'inputs = "none"' in text and read_config(tmp_path / "config.toml") == config
    assert all(re.search(rf"^{f.name} = ", text, re.M) for f in dataclasses.fields(DataSettings))


@settings(quick, max_examples=60)
@given(train_configs(), train_configs())
def test_different_configurations_have_different_hashes(one, other):
    assert (config_hash(one) == config_hash(other)) == (one == other)


def test_the_hash_does_not_depend_on_how_a_number_is_written():
    one = default_config("pricing", "ppo-maml")
    assert config_hash(one) == config_hash(dataclasses.replace(one, inner=dataclasses.replace(one.inner, lr=4)))
    assert config_hash(one) != config_hash(dataclasses.replace(one, inner=dataclasses.replace(one.inner, lr=4.5)))
    assert config_hash(one) != config_hash(dataclasses.replace(one, first_seed=1))


def test_a_part_of_a_file_takes_the_algorithms_defaults(tmp_path):
    file = tmp_path / "part.toml"
    file.write_text(
        'family_name = "navigation"\nalgorithm = "trpo-maml"\n[outer.trust]\ndamping = 0.5\n[inner]\nsteps = 2'
    )
    default = default_config("navigation", "trpo-maml")
    trust = dataclasses.replace(default.outer.trust, damping=0.5)
    assert read_config(file) == dataclasses.replace(default, outer=dataclasses.replace(default.outer, trust=trust))


def test_a_prior_of_another_kind_replaces_the_default(tmp_path):
    prior = GaussianPrior((0.4, -4.0, 5.0), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    head = 'family_name = "pricing"\nalgorithm = "ppo-maml"\n'
    (tmp_path / "c.toml").write_text(head + tomli_w.dumps({"family": {"prior": plain(prior)}}))
    assert read_config(tmp_path / "c.toml").family.prior == prior


# ------------------------------------------------------------------------------------------ what is refused
plain_values = (
    st.booleans() | st.integers() | st.integers(10**300, 10**310) | st.floats() | st.text(max_size=9)
    | st.sampled_from(["none", "mlp", "gru", "all", "float64", "cuda", "wandb", 10**400, -1, 0, 1, 2, math.nan])
)  # fmt: skip
values = st.recursive(
    plain_values,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=6,
)
gaussian_prior = GaussianPrior((0.4, -4.0, 5.0), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
PUBLIC = [
    PolicySettings(), InnerSettings(), DataSettings(), default_config("pricing", "rl-maml"), Machine(), PPOStep(),
    ReinforceStep(), ReptileStep(), TRPOStep(), GradientStep(), LogitPricing(), PointNavigation(), ShopMDP(),
    LogUniformPrior(), gaussian_prior, PPOConfig(), TRPOConfig(), ReinforceConfig(), MAMLConfig(), Inner(),
    CalibrationConfig(),
]  # fmt: skip
FIELDS = [(config, f.name) for config in PUBLIC for f in dataclasses.fields(config)]


def equal(given, found) -> bool:
    """The same value: a tuple may stand where a list was given, a float where a whole number was, never True for 1."""
    if isinstance(given, (list, tuple)):
        same_length = isinstance(found, (list, tuple)) and len(given) == len(found)
        return same_length and all(map(equal, given, found))
    numbers = {type(given), type(found)} <= {int, float} and not (type(given) is float and type(found) is int)
    return given == found and (type(given) is type(found) or numbers)


@pytest.mark.parametrize("config, field", FIELDS, ids=[f"{type(c).__name__}.{name}" for c, name in FIELDS])
@settings(quick, max_examples=25)
@given(value=st.none() | values)
def test_any_value_is_taken_as_it_is_or_refused_by_name(config, field, value):
    try:
        found = dataclasses.replace(config, **{field: value})
    except ValueError as error:
        named = re.match(r"\w+\.(\w+) = ", str(error))
        # Two fields that do not fit: either may be named, with what it would take.
        assert named and (named[1] == field or "allowed" in str(error)), error
        assert type(config).__name__.startswith(str(error).split(".")[0].removesuffix("Config")) or named[1] == field
    else:
        assert equal(value, getattr(found, field))
        hash(found)


def places(table: dict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where something stands in a table of tables."""
    below = [place for k, v in table.items() if isinstance(v, dict) for place in places(v, (*prefix, k))]
    return [(*prefix, k) for k in table] + below


TABLES = {(f, a): plain(default_config(f, a)) for f, a in PAIRS}
OPTIONAL = {
    "data": ["stage_weights", "transitions", "chunk"],
    "policy": ["inputs", "initial_std"],
    "outer": ["log_std_lr"],
}


@settings(quick, max_examples=300)
@given(st.data())
def test_any_value_in_a_file_is_taken_as_it_is_or_refused_by_name(tmp_path, data):
    table = json.loads(json.dumps(TABLES[data.draw(st.sampled_from(PAIRS))]))
    extra = [(part, name) for part, names in OPTIONAL.items() for name in names]
    *tables, name = data.draw(st.sampled_from(places(table) + extra + [("inner", "lrr"), ("iteratons",)]))
    value, target = data.draw(values), table
    for part in tables:
        target = target[part]
    target[name] = value
    file = tmp_path / "config.toml"
    try:
        file.write_text(tomli_w.dumps(table))
    except (ValueError, UnicodeEncodeError):  # a number too long to be written, half a character
        assume(False)
    try:
        found = read_config(file)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error).replace(repr(value), "")
        assert name in str(error) or name in ("network", "steps", "continuous", "surrogate", "transitions"), error
    else:
        for part in tables:
            found = getattr(found, part)
        if isinstance(value, dict):  # a part of a table: the rest is the default
            assert all(hasattr(getattr(found, name), k) for k in value)
        else:
            assert equal(None if value == "none" else value, getattr(found, name))


@pytest.mark.parametrize(
    "text, message",
    [
        ("iterations = 0", "iterations = 0; allowed: a whole number from 1 to 1000000000"),
        ("iterations = 3.0", "iterations = 3.0; allowed: a whole number"),
        ("iterations = true", "iterations = True; allowed: a whole number"),
        ('iterations = "3"', "iterations = '3'; allowed: a whole number"),
        ("iteratons = 3", "iteratons: there is no such setting; did you mean iterations?"),
        ("[inner]\nlrr = 3", "inner.lrr: there is no such setting; did you mean inner.lr?"),
        ("[inner]\nlr = -1", "inner.lr = -1.0; allowed: a finite number > 0, or steps = 1 of them"),
        ('[inner]\nlr = "x"', "inner.lr = 'x'; allowed: a number or a list"),
        ("[inner]\nsteps = 1189358018", "inner.steps = 1189358018; allowed: a whole number from 0 to 10000"),
        ("[inner]\nfirst_order = 1", "inner.first_order = 1; allowed: true or false"),
        ('[data]\nadvantage = "gae"',
         "data.advantage = 'gae'; allowed: 'leave_one_out', 'linear_feature' or 'same_step'"),
        ("[data]\nstage_weights = [1, 2, 3]",
         "data.stage_weights = (1.0, 2.0, 3.0); allowed: inner.steps + 1 = 2 numbers"),
        ("[policy]\ninputs = [0, 17]",
         "policy.inputs = (0, 17); allowed: numbers of the 6 entries of an observation, from 0"),
        ("[family.prior]\nshare = [0.5, 2]",
         "family.prior.share = (0.5, 2.0); allowed: two finite numbers with 0 < low <= high < 1"),
        ("[family.prior]\nmean = [0, 0, 0]", "family.prior.factor is missing"),
        ("outer = 3", "outer = 3; allowed: a table"),
        ("iterations = 1979-05-27", "iterations = 1979-05-27; allowed: numbers, texts and lists"),
        ("[outer]\nlr = nan", "outer.lr = nan; allowed: a finite number > 0"),
    ],
)  # fmt: skip
def test_messages_say_field_value_and_what_is_allowed(tmp_path, text, message):
    file = tmp_path / "config.toml"
    file.write_text(f'family_name = "pricing"\nalgorithm = "ppo-maml"\n{text}\n')
    with pytest.raises(ValueError) as refusal:
        read_config(file)
    assert str(refusal.value) == f"{file}: {message}"


def test_parts_that_do_not_fit_are_refused_before_anything_is_trained():
    base = default_config("pricing", "ppo-maml")
    with pytest.raises(ValueError, match="stage_weights"):
        dataclasses.replace(base, data=dataclasses.replace(base.data, stage_weights=(1.0, 2.0, 3.0)))
    with pytest.raises(ValueError, match=r"TrainConfig.outer = .*; allowed: a PPOStep"):
        dataclasses.replace(base, outer=TRPOStep())
    with pytest.raises(ValueError, match=r"seeds_at_once = 2; allowed: .* 1 with trpo-maml"):
        dataclasses.replace(default_config("pricing", "trpo-maml"), seeds_at_once=2)
    reptile = default_config("shop", "reptile")
    for change in ({"steps": 0}, {"learn_lr": True}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} = .* with reptile"):
            dataclasses.replace(reptile, inner=dataclasses.replace(reptile.inner, **change))


# ------------------------------------------------------------------------------------------ any bytes
HEAD = 'family_name = "pricing"\nalgorithm = "ppo-maml"\n'
toml_like = st.lists(
    st.sampled_from(["[", "]", "=", '"', "\n", "a", ".", "1", "inner", "lr", "{", "}", ",", "'", "#", "nan", "\\u0"])
).map("".join)
bytes_of_a_file = st.one_of(
    st.binary(max_size=99), toml_like.map(str.encode), toml_like.map(lambda x: (HEAD + x).encode())
)


@quick
@given(bytes_of_a_file)
def test_any_bytes_give_a_configuration_or_name_the_file(tmp_path, data):
    file = tmp_path / "config.toml"
    file.write_bytes(data)
    for read in (read_config, lambda path: read_market(path, "pricing")):
        try:
            read(file)
        except ValueError as error:
            assert str(error).startswith(str(file))
    assert file.read_bytes() == data


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 90_000, "a" + ".a" * 5_000 + " = 1", "a = " + "9" * 5_000, "\ufffe", "#" * 100_000]
)
def test_large_and_nested_files_are_refused(tmp_path, text):
    file = tmp_path / "config.toml"
    file.write_text(HEAD + text, encoding="utf-8")
    with pytest.raises(ValueError) as refusal:
        read_config(file)
    assert str(refusal.value).startswith(str(file)) and len(str(refusal.value)) < 1_000


@settings(quick, max_examples=60)
@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from('product week price units , 1 -2 x nan \n "'.split(" "))).map(
        lambda x: ",".join(x).encode()
    )
)
@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet"])
def test_any_bytes_of_a_sales_table_give_a_table_or_a_refusal(tmp_path, ending, data):
    file = tmp_path / f"sales{ending}"
    file.write_bytes(data)
    with pytest.raises(SalesTableError):  # the two products it needs do not come by chance
        read_sales(file)


def test_a_market_is_a_family_by_name(tmp_path):
    file, family = tmp_path / "market.toml", LogitPricing(days=5, prior=gaussian_prior)
    write_config(dataclasses.replace(default_config("pricing", "ppo-maml"), family=family), file)
    assert read_market(file, "pricing") == family
    with pytest.raises(ValueError, match=r"market.toml: family_name = 'pricing'; allowed: 'shop'"):
        read_market(file, "shop")
    file.write_text('family_name = "pricing"\n[family]\ndayz = 3\n')
    with pytest.raises(ValueError, match=r"market.toml.*dayz: there is no such setting; did you mean days\?"):
        read_market(file, "pricing")


# ------------------------------------------------------------------------------------------ explained
@pytest.mark.parametrize("family, algorithm", PAIRS)
def test_every_field_has_an_explanation(family, algorithm):
    """The line under it in the source, which --help shows."""
    seen = set()

    def walk(config):
        # A field may be inherited.
        modules = [__import__(kind.__module__, fromlist=["x"]) for kind in type(config).__mro__[:-1]]
        source = "".join(Path(typing.cast(str, module.__file__)).read_text() for module in modules)
        for f in dataclasses.fields(config):
            seen.add((type(config).__name__, f.name))
            explained = re.search(rf'^    {f.name}: .*\n(?:(?!    \w+: ).*\n){{0,5}}?    """\S', source, re.M)
            assert explained, f"{type(config).__name__}.{f.name} has no line of explanation"
            if dataclasses.is_dataclass(getattr(config, f.name)):
                walk(getattr(config, f.name))

    walk(default_config(family, algorithm))
    walk(Machine())
    assert ("InnerSettings", "lr") in seen


def test_validation_is_of_the_class_that_is_asked_for():
    kind = config_type("shop", "trpo-maml")
    table = TABLES["shop", "trpo-maml"]
    assert validate(kind, table, "here") == default_config("shop", "trpo-maml")
    with pytest.raises(ValueError, match=r"^here: outer.epochs: there is no such setting"):
        validate(kind, table | {"outer": {"epochs": 3}}, "here")
