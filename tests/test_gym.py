"""The Gymnasium face of every family: the interface's rules, one environment as a row of many, and what a reset may
change."""

import itertools
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ecomlib.families import LogitPricing, PointNavigation, split, take
from ecomlib.families.shoppers import SegmentPrior
from ecomlib.gym import FAMILIES, distinct
from ecomlib.rollout import rollout

NAMES = sorted(FAMILIES)
SHORT = {
    "Bidding": {"segments": 2, "profile": (0.5, 1.0, 1.5)},
    "Inventory": {"days": 3},
    "Navigation": {"horizon": 4, "tolerance": 0.2},
    "Pricing": {"days": 3},
    "Recommendation": {"slates": 5, "prior": SegmentPrior(leave=(0.3, 0.6))},
}
"""Settings that end episodes within a few steps."""
LIMITS = ("minimum", "-infinity"), ("maximum", "infinity")
ENDS_EARLY = ["Navigation", "Recommendation"]
"""Families whose episodes may end before the horizon, at different steps in different rows."""


def make(name, **settings):
    return gymnasium.make(f"ecomlib/{name}-v0", **SHORT[name], **settings)


def make_vec(name, rows, **settings):
    return gymnasium.make_vec(f"ecomlib/{name}-v0", num_envs=rows, **SHORT[name], **settings)


def episode(env, actions, **reset):
    """Everything that a reset and the steps of one episode return."""
    seen = [env.reset(**reset)]
    for action in actions:
        seen.append(env.step(action))
        if seen[-1][2] or seen[-1][3]:
            break
    return seen


def some_actions(env, count=10):
    env.action_space.seed(3)
    return [env.action_space.sample() for _ in range(count)]


# ------------------------------------------------------------------------------------------ Gymnasium's own checks
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"resample": True, "oracle": True, "split": "shifted"}])
def test_gymnasium_finds_nothing_wrong(name, settings):
    """But for the bounds of observations: sales, spending and clicks have none. And for bids on [-5, 5], where 1 is the
    natural step."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_env(make(name, **settings).unwrapped)
    if name == "Bidding":
        found = [warning for warning in found if "symmetric and normalized" not in str(warning.message)]
    bounds = [f"A Box observation space {side} value is {value}" for side, value in LIMITS]
    assert len(found) == 2 and all(text in str(warning.message) for text, warning in zip(bounds, found))


def test_the_real_actions_of_a_family_are_on_the_interval_that_learners_expect():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_env(gymnasium.make("ecomlib/Pricing-v0", continuous=True).unwrapped)
    assert len(found) == 2  # the observation's bounds


@pytest.mark.parametrize("name", NAMES)
def test_a_spec_makes_the_same_environment_again(name):
    env = gymnasium.make(f"ecomlib/{name}-v0", split="test", task=5)
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.family == env.unwrapped.family
    assert data_equivalence(env.reset(seed=1), again.reset(seed=1), exact=True)


# ------------------------------------------------------------------------------------------ one row of many
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("settings", [{}, {"resample": True}, {"oracle": True}])
def test_the_batch_is_gymnasiums_own_vector_of_single_environments(name, mode, settings):
    """Observations, rewards, ends, final observations and infos, through several episodes."""
    rows = 5
    batch = make_vec(name, rows, autoreset_mode=mode, tasks=4, **settings)
    single = [lambda row=row: make(name, task=row % 4, tasks=4, **settings) for row in range(rows)]
    loop = SyncVectorEnv(single, autoreset_mode=mode)
    assert batch.metadata["autoreset_mode"] is AutoresetMode(mode)
    assert _same(batch.reset(seed=7), loop.reset(seed=7), oracle="oracle" in settings)
    ends = np.zeros(rows)
    for actions in some_actions(batch, 14):
        ours, theirs = batch.step(actions), loop.step(actions)
        assert _same(ours, theirs, oracle="oracle" in settings)
        ends += ours[2] | ours[3]
    assert (ends >= 2).all()
    if name in ENDS_EARLY and not settings:  # else the masks were not tested
        assert len(set(ends)) > 1
    assert _same(batch.reset(), loop.reset(), oracle="oracle" in settings)


def _same(ours, theirs, oracle=False):
    """Exactly equal; but the returns that a plan of several tasks finds are rounded as their number has it."""
    for info, other in ((ours[-1], theirs[-1]), (ours[-1].get("final_info", {}), theirs[-1].get("final_info", {}))):
        for name in ("oracle_return", "blind_return") if oracle else ():
            assert (name in info) == (name in other)
            if name in info:
                np.testing.assert_allclose(info.pop(name), other.pop(name), rtol=1e-12)
    return data_equivalence(tuple(ours), tuple(theirs), exact=True)


@pytest.mark.parametrize("name", NAMES)
def test_without_autoreset_only_the_masked_rows_begin_again(name):
    rows = 5
    batch = make_vec(name, rows, autoreset_mode="Disabled")
    loop = SyncVectorEnv([lambda row=row: make(name, task=row) for row in range(rows)], autoreset_mode="Disabled")
    batch.reset(seed=7), loop.reset(seed=7)
    for actions in some_actions(batch, 14):
        ours, theirs = batch.step(actions), loop.step(actions)
        assert data_equivalence(ours[:4], theirs[:4], exact=True)
        over = ours[2] | ours[3]
        if over.any():
            with pytest.raises(ResetNeeded):
                batch.step(actions)
            assert _same(batch.reset(options={"reset_mask": over}), loop.reset(options={"reset_mask": over}))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_neighbours(name):
    few, many = make_vec(name, 3), make_vec(name, 40)
    few.reset(seed=2), many.reset(seed=2)
    for actions in some_actions(many):
        ours, theirs = few.step(actions[:3]), many.step(actions)
        assert all(data_equivalence(a, b[:3], exact=True) for a, b in zip(ours[:4], theirs[:4]))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_returned_is_not_written_to_later(name):
    env = make_vec(name, 3)
    actions = some_actions(env)
    first, _ = env.reset(seed=0)
    kept, copies = [first], [first.copy()]
    for action in actions:
        for part in env.step(action)[:4]:
            kept.append(part)
            copies.append(part.copy())
    assert data_equivalence(kept, copies, exact=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_caller_writes_into_an_observation_changes_nothing(name):
    torch.set_default_dtype(torch.float32)  # in which an observation could be a part of the state
    env, spoilt = make_vec(name, 3), make_vec(name, 3)
    env.reset(seed=0)
    spoilt.reset(seed=0)[0][:] = 9
    for actions in some_actions(env):
        expected, found = env.step(actions), spoilt.step(actions)
        assert data_equivalence(expected, found, exact=True)
        for part in (*found[:4], *found[4].values()):
            part[:] = 9


# ------------------------------------------------------------------------------------------ the library's own luck
class Replay:
    """Plays given actions (T, M, N, ...) whatever it sees."""

    noise_size = 1

    def __init__(self, actions):
        self.actions = iter(actions)

    def act(self, parameters, observation, noise, memory):
        action = next(self.actions)
        return action, observation.new_zeros(observation.shape[:2]), None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split_name", ["train", "test", "shifted"])
def test_an_episode_is_that_of_a_rollout_with_its_seed(name, split_name):
    env = make(name, split=split_name, task=3, tasks=10).unwrapped
    family, tasks = split(FAMILIES[name](**SHORT[name]), split_name, 10)
    assert family == env.family
    actions = some_actions(env, family.horizon)
    played = [episode(env, actions, seed=11), episode(env, actions), episode(env, actions)]
    replay = np.stack(actions) if not hasattr(family, "slate") else distinct(np.stack(actions), family.items)
    replay = torch.as_tensor(replay.astype(float) if replay.dtype == np.float32 else replay)[:, None, None]
    for number, seen in enumerate(played):
        data = rollout(family, take(tasks, torch.tensor([3])), Replay(replay), [], 1, 11, number)
        length = len(seen) - 1
        assert length == data.mask[:, 0, 0].sum()
        for step in range(length):
            np.testing.assert_array_equal(seen[step][0], data.observation[step, 0, 0].float().numpy())
            assert seen[step + 1][1] == data.reward[step, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_and_actions_make_the_same_trial(name):
    env, other = make(name), make(name)
    actions = some_actions(env)
    once = episode(env, actions, seed=5) + episode(env, actions)
    again = episode(env, actions, seed=5) + episode(env, actions)
    elsewhere = episode(other, actions, seed=5) + episode(other, actions)
    assert data_equivalence(once, again, exact=True)
    assert data_equivalence(once, elsewhere, exact=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Navigation"])  # in which nothing is random
def test_luck_is_fresh_in_every_episode_seed_and_row(name):
    env = gymnasium.make_vec(f"ecomlib/{name}-v0", num_envs=500, task=0)
    actions = np.stack([env.single_action_space.sample()] * 500)

    def rewards(**reset):
        env.reset(**reset)
        return np.concatenate([env.step(actions)[1] for _ in range(3)])

    first = rewards(seed=5)
    assert len(np.unique(first)) > 1
    assert not np.array_equal(first, rewards())
    assert not np.array_equal(first, rewards(options={"task": 0}))
    assert not np.array_equal(first, rewards(seed=500))
    assert np.array_equal(first, rewards(seed=5))


def test_without_a_seed_two_environments_differ():
    returns = []
    for _ in range(2):
        env = gymnasium.make("ecomlib/Pricing-v0")
        returns.append([step[1] for step in episode(env, [4] * 14)[1:]])
    assert returns[0] != returns[1]


# ------------------------------------------------------------------------------------------ tasks
@pytest.mark.parametrize("name", NAMES)
def test_a_reset_changes_the_task_only_when_asked(name):
    env = make(name, tasks=50)
    assert env.reset(seed=1)[1] == {"task": 0, "trial_episode": 0}
    assert env.reset()[1] == {"task": 0, "trial_episode": 1}
    assert env.reset(options={})[1] == {"task": 0, "trial_episode": 2}
    assert env.reset(options={"task": 7})[1] == {"task": 7, "trial_episode": 0}
    assert env.step(env.action_space.sample())[4] == {"task": 7, "trial_episode": 0}
    assert env.reset()[1] == {"task": 7, "trial_episode": 1}
    assert env.reset(seed=9)[1] == {"task": 7, "trial_episode": 0}
    drawn = {env.reset(options={"task": "new"})[1]["task"] for _ in range(30)}
    assert len(drawn) > 10
    assert env.reset()[1]["trial_episode"] == 1


def test_the_tasks_of_a_batch():
    env = make_vec("Pricing", 4, tasks=3)
    assert env.reset(seed=0)[1]["task"].tolist() == [0, 1, 2, 0]
    assert env.reset(options={"task": [2, 2, 1, 0]})[1]["task"].tolist() == [2, 2, 1, 0]
    mask = np.array([True, False, False, True])
    info = env.reset(options={"task": 1, "reset_mask": mask})[1]
    assert info["_task"].tolist() == mask.tolist()
    info = env.step(env.action_space.sample())[4]
    assert info["task"].tolist() == [1, 2, 1, 1]
    assert info["trial_episode"].tolist() == [0, 0, 0, 0]
    assert env.reset(options={"task": 2})[1]["task"].tolist() == [2] * 4
    assert make_vec("Pricing", 2, task=[1, 2]).reset()[1]["task"].tolist() == [1, 2]


def test_new_tasks_are_drawn_evenly_from_the_list():
    env = make_vec("Pricing", 2000, tasks=4, resample=True)
    first, second = (env.reset(**reset)[1]["task"] for reset in ({"seed": 0}, {}))
    for drawn in (first, second):
        assert np.abs(np.bincount(drawn, minlength=4) - 500).max() < 4 * np.sqrt(2000 * 3 / 16)
    assert 0.15 < (first == second).mean() < 0.35


def test_resampling_takes_place_at_every_end():
    env = make_vec("Pricing", 3, resample=True, autoreset_mode="SameStep")
    numbers = [env.reset(seed=0)[1]["task"]]
    for _ in range(9):
        *_, terminated, _, info = env.step(env.action_space.sample())
        if terminated.all():
            assert (info["final_info"]["task"] == numbers[-1]).all()
            numbers.append(info["task"])
    assert len(np.unique(numbers)) > 8


def test_an_observation_tells_the_context_of_the_new_task():
    env = make("Pricing", tasks=20)
    _, tasks = split(env.unwrapped.family, "train", 20)
    for number in (0, 4, 19):
        observation, _ = env.reset(seed=0, options={"task": number})
        assert observation[1] == np.float32(tasks.cost[number])


@pytest.mark.parametrize("name", NAMES)
def test_info_holds_the_oracle_and_the_blind_return_where_asked(name):
    env = make(name, split="test", tasks=6, oracle=True)
    family, tasks = split(FAMILIES[name](**SHORT[name]), "test", 6)
    for number in (2, 5, 2):
        _, info = env.reset(options={"task": number})
        one = take(tasks, torch.tensor([number]))
        assert info["oracle_return"] == pytest.approx(family.oracle_return(one).item(), rel=1e-6)
        assert info["blind_return"] == pytest.approx(family.blind_return(one).item(), rel=1e-6)
        assert set(info) == {"task", "trial_episode", "oracle_return", "blind_return"}
    assert set(make(name).reset()[1]) == {"task", "trial_episode"}


# ------------------------------------------------------------------------------------------ ends
def test_the_horizon_of_a_problem_that_sees_the_time_terminates():
    env = make("Pricing")
    ends = [step[2:4] for step in episode(env, [3] * 5, seed=0)[1:]]
    assert ends == [(False, False), (False, False), (True, False)]


def test_a_horizon_that_is_not_seen_truncates_and_a_goal_terminates():
    family, tasks = split(PointNavigation(horizon=6), "train", 1)
    away, goal = np.zeros(2, dtype=np.float32), tasks.goal[0].numpy()
    env = gymnasium.make("ecomlib/Navigation-v0", horizon=6).unwrapped
    assert [step[2:4] for step in episode(env, [away] * 9, seed=0)[1:]] == [(False, False)] * 5 + [(False, True)]

    def walk(env):
        seen = [env.reset(seed=0)]
        while not (seen[-1][2:4] + (False, False))[0] and len(seen) < 9:
            seen.append(env.step(np.clip((goal - seen[-1][0]) / family.stride, -1, 1).astype(np.float32)))
            if seen[-1][3]:
                break
        return seen

    steps = int(np.ceil(np.abs(goal).max() / family.stride))
    assert 1 < steps < 6
    assert [step[2:4] for step in walk(env)[1:]] == [(False, False)] * (steps - 1) + [(True, False)]
    # reached on the very last step: the goal counts
    env = gymnasium.make("ecomlib/Navigation-v0", horizon=steps).unwrapped
    assert walk(env)[-1][2:4] == (True, False)
    total = sum(step[1] for step in walk(env)[1:])
    assert total == pytest.approx(family.oracle_return(tasks).item(), rel=1e-6)


def test_the_last_observation_and_info_of_an_episode_are_kept():
    env = make_vec("Pricing", 3, autoreset_mode="SameStep")
    env.reset(seed=0)
    for _ in range(2):
        assert "final_obs" not in env.step(np.array([1, 2, 3]))[4]
    observation, _, terminated, _, info = env.step(np.array([1, 2, 3]))
    assert terminated.all() and info["_final_obs"].all()
    assert [row[0] for row in info["final_obs"]] == [1, 1, 1]  # day / days
    assert observation[:, 0].tolist() == [0, 0, 0]
    assert info["final_info"]["trial_episode"].tolist() == [0, 0, 0]
    assert info["trial_episode"].tolist() == [1, 1, 1]


def test_the_step_after_an_end_only_resets():
    env = make_vec("Pricing", 2)
    env.reset(seed=0)
    for _ in range(3):
        _, _, terminated, _, info = env.step(np.array([1, 2]))
    assert terminated.all() and info["trial_episode"].tolist() == [0, 0]
    observation, reward, terminated, truncated, info = env.step(np.array([1, 2]))
    assert not (reward.any() or terminated.any() or truncated.any())
    assert observation[:, 0].tolist() == [0, 0] and info["trial_episode"].tolist() == [1, 1]


# ------------------------------------------------------------------------------------------ actions
def test_real_prices_are_stretched_to_the_range_of_prices():
    env = gymnasium.make("ecomlib/Pricing-v0", continuous=True, markups=(1.2, 3.0))
    for action, markup in ((-1.0, 1.2), (0.0, 2.1), (1.0, 3.0), (0.5, 2.55)):
        env.reset(seed=0)
        observation = env.step(np.array([action], dtype=np.float32))[0]
        assert observation[3] == pytest.approx(markup, rel=1e-6)


def test_repeated_items_give_way_to_the_next_free_ones():
    assert distinct(np.array([[3, 3, 4], [0, 1, 2], [4, 4, 4], [2, 4, 2]]), 5).tolist() == [
        [3, 0, 4], [0, 1, 2], [4, 0, 1], [2, 4, 3],
    ]  # fmt: skip


def test_a_slate_with_repeats_is_shown_without_them():
    env = gymnasium.make("ecomlib/Recommendation-v0")
    seen = []
    for slate in ([3, 3, 19, 3], [3, 4, 19, 5]):
        env.reset(seed=0)
        seen.append(env.step(np.array(slate)))
    assert data_equivalence(seen[0], seen[1], exact=True)
    family = env.unwrapped.family
    places = seen[0][0].reshape(family.items, -1)[:, family.row.index("place")]
    assert np.flatnonzero(places).tolist() == [3, 4, 5, 19]


def test_every_slate_of_few_items():
    slates = np.array(list(itertools.product(range(5), repeat=4)))
    mended = distinct(slates, 5)
    assert all(len(set(row)) == 4 for row in mended.tolist())
    for before, after in zip(slates.tolist(), mended.tolist()):
        first = [position for position, item in enumerate(before) if item not in before[:position]]
        assert all(after[position] == before[position] for position in first)
    assert distinct(np.array([[1, 1, 1]]), 3).tolist() == [[1, 2, 0]]


# ------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "validation"}, "split = 'validation'; allowed: one of train, test, shifted"),
        ({"tasks": 0}, "tasks = 0; allowed: a whole number >= 1"),
        ({"task": 1000}, "task = 1000; allowed: .* 0..999"),
        ({"task": -1}, "task = -1; allowed: .* 0..999"),
        ({"task": "any"}, 'task = .any.; allowed: "new", or task numbers'),
        ({"task": 1.5}, "task = 1.5; allowed"),
        ({"resample": 1}, "resample = 1; allowed: True or False"),
        ({"oracle": "yes"}, "oracle = .yes.; allowed: True or False"),
        ({"family": "Groceries"}, "family = .Groceries.; allowed: one of .*Pricing"),
        ({"days": 0}, "LogitPricing.days = 0; allowed"),
    ],
)  # fmt: skip
def test_settings_are_refused_in_words(settings, message):
    with pytest.raises(ValueError, match=message):
        gymnasium.make("ecomlib/Pricing-v0", **settings)
    with pytest.raises(ValueError, match=message):
        gymnasium.make_vec("ecomlib/Pricing-v0", num_envs=2, **settings)


def test_an_unknown_keyword_is_a_type_error():
    """Stable-Baselines3 asks for a picture first and leaves the keyword out on a TypeError."""
    with pytest.raises(TypeError, match="'weeks' is no setting of LogitPricing, which has days, "):
        gymnasium.make("ecomlib/Pricing-v0", weeks=3)


def test_settings_of_a_batch_are_refused_in_words():
    with pytest.raises(ValueError, match="autoreset_mode = 'never'; allowed: one of NextStep"):
        make_vec("Pricing", 2, autoreset_mode="never")
    with pytest.raises(ValueError, match="num_envs = 0; allowed: a whole number >= 1"):
        make_vec("Pricing", 0)
    with pytest.raises(ValueError, match="task = .*; allowed: .* or 2 .one a row"):
        make_vec("Pricing", 2, task=[1, 2, 3])


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        ({"options": {"task": 1000}}, r"options\[.task.\] = 1000; allowed: .* 0..999"),
        ({"options": {"tusk": 1}}, "options key = 'tusk'; allowed: one of task"),
        ({"options": {"task": [1, 2, 3]}}, "allowed: .* one"),
    ],
)
def test_resets_are_refused_in_words(reset, message):
    for env in (gymnasium.make("ecomlib/Pricing-v0"), make_vec("Pricing", 2)):
        with pytest.raises(ValueError, match=message):
            env.reset(**reset)


@pytest.mark.parametrize(
    "reset",
    [
        {"seed": [1, 2, 3]},
        {"seed": [-1, 2]},
        {"seed": [0.5, 2]},
        {"options": {"reset_mask": [True, False]}},  # the first reset is of all
        {"options": {"reset_mask": [True, True, True]}},
        {"options": {"reset_mask": [0, 1]}},
    ],
)
def test_resets_of_a_batch_are_refused(reset):
    with pytest.raises(ValueError, match="allowed: "):
        make_vec("Pricing", 2).reset(**reset)


@pytest.mark.parametrize(
    ("settings", "action", "message"),
    [
        ({}, 11, "action 11 is out of range; expected one of Discrete"),
        ({}, -1, "action -1 is out of range"),
        ({}, 2.0, "an action has type float64; expected whole numbers"),
        ({}, [1, 2], r"an action has shape \(2,\); expected \(\)"),
        ({"continuous": True}, [1.5], "action 1.5 is out of range; expected one of Box"),
        ({"continuous": True}, [np.nan], "action nan is out of range"),
        ({"continuous": True}, 0.5, r"an action has shape \(\); expected \(1,\)"),
    ],
)
def test_actions_are_refused_in_words(settings, action, message):
    env = gymnasium.make("ecomlib/Pricing-v0", **settings).unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    many = gymnasium.make_vec("ecomlib/Pricing-v0", num_envs=2, **settings)
    many.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        many.step([action, action])
    assert env.step(env.action_space.sample())[4]["trial_episode"] == 0  # a refused action changed nothing


def test_steps_outside_an_episode_are_refused():
    env, many = make("Pricing").unwrapped, make_vec("Pricing", 2)
    for each, action in ((env, 1), (many, [1, 1])):
        with pytest.raises(ResetNeeded, match="call reset"):
            each.step(action)
    episode(env, [1] * 3)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(1)
    with pytest.raises(ValueError, match=r"actions have shape \(3,\); expected \(2,\), one a row"):
        many.reset()
        many.step([1, 1, 1])


def test_a_family_object_may_be_given_and_changed():
    family = LogitPricing(days=9, stock=5)
    assert gymnasium.make("ecomlib/Pricing-v0", family=family).unwrapped.family == family
    assert gymnasium.make("ecomlib/Pricing-v0", family=family, days=4).unwrapped.family == LogitPricing(days=4, stock=5)
    shifted = gymnasium.make("ecomlib/Pricing-v0", family=family, split="shifted").unwrapped.family
    assert shifted == family.shifted()


def test_seeds_of_any_size():
    env = gymnasium.make("ecomlib/Pricing-v0")
    seen = [episode(env, [3] * 14, seed=seed)[-1] for seed in (0, 2**40, 2**62 - 1, 10**30)]
    assert len({step[0].tobytes() for step in seen}) == 4
