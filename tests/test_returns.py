"""Returns and advantages against sums written out and against numpy."""

import numpy as np
import pytest
import torch

from ecomlib.returns import LinearFeatureBaseline, gae, leave_one_out, reward_to_go
from ecomlib.rollout import Trajectories


@pytest.fixture
def data():
    """Random episodes (T, M, N) = (7, 3, 5) of random lengths."""
    generator = torch.Generator().manual_seed(0)
    steps, tasks, episodes = 7, 3, 5
    length = torch.randint(1, steps + 1, (tasks, episodes), generator=generator)
    mask = (torch.arange(steps)[:, None, None] < length).double()
    observation = torch.randn(steps, tasks, episodes, 2, generator=generator)
    reward = torch.randn(steps, tasks, episodes, generator=generator) * mask
    action = torch.zeros_like(reward)
    return Trajectories(observation, action, action, reward, mask)


def test_reward_to_go_by_hand():
    reward = torch.tensor([1.0, 0.0, 2.0, -1.0])[:, None, None]
    assert torch.equal(reward_to_go(reward)[:, 0, 0], torch.tensor([2.0, 1.0, 1.0, -1.0]))
    assert torch.equal(reward_to_go(reward, 0.5)[:, 0, 0], torch.tensor([1.375, 0.75, 1.5, -1.0]))
    assert torch.equal(reward_to_go(reward, 0.0), reward)


def test_gae_of_lambda_one_is_reward_to_go_minus_value(data):
    value = torch.randn(data.reward.shape)
    expected = (reward_to_go(data.reward, 0.9) - value) * data.mask
    assert torch.allclose(gae(data.reward, value, data.mask, 0.9, 1.0), expected, atol=1e-12)


def test_gae_of_lambda_zero_is_one_error(data):
    """An episode that ended has no next value; nor has the last step."""
    value = torch.randn(data.reward.shape)
    found = gae(data.reward, value, data.mask, 0.9, 0.0)
    length = data.mask.sum(0).long()
    for m in range(3):
        for n in range(5):
            for t in range(7):
                following = value[t + 1, m, n] if t + 1 < length[m, n] else 0.0
                error = data.reward[t, m, n] + 0.9 * following - value[t, m, n] if t < length[m, n] else 0.0
                assert found[t, m, n] == pytest.approx(float(error), abs=1e-12)


def test_gae_ignores_what_comes_after_the_end(data):
    """Neither a value nor a reward beyond the end may leak into the episode."""
    value = torch.randn(data.reward.shape)
    junk = 100 * (1 - data.mask)
    found = gae(data.reward + junk, value + junk, data.mask, 0.9, 0.7)
    assert torch.equal(found, gae(data.reward, value * data.mask, data.mask, 0.9, 0.7))


def test_leave_one_out_does_not_see_its_own_episode(data):
    """The baseline subtracted from an episode stays the same when only that episode changes."""
    changed = data.reward.clone()
    changed[:, :, 2] += 10
    baseline = data.reward - leave_one_out(data.reward)
    assert torch.allclose((changed - leave_one_out(changed))[:, :, 2], baseline[:, :, 2], atol=1e-12)
    assert not torch.allclose((changed - leave_one_out(changed))[:, :, 0], baseline[:, :, 0], atol=1e-3)


def test_linear_baseline_is_a_ridge_regression_per_task(data):
    """Against numpy's least squares on the steps before the end, the ridge as extra rows."""
    ridge, discount = 1e-3, 0.9
    baseline = LinearFeatureBaseline(ridge).fit(data, discount)
    predicted = baseline.predict(data)
    target = reward_to_go(data.reward, discount)
    for task in range(3):
        rows, wanted = [], []
        for t in range(7):
            for n in range(5):
                x = data.observation[t, task, n].numpy()
                features = np.concatenate((x, x**2, [t / 7, (t / 7) ** 2, (t / 7) ** 3, 1.0]))
                assert predicted[t, task, n].item() == pytest.approx(
                    features @ baseline.weights[task].numpy(), abs=1e-12
                )
                if data.mask[t, task, n]:
                    rows.append(features)
                    wanted.append(target[t, task, n].item())
        x, y = np.array(rows), np.array(wanted)
        extra = np.sqrt(ridge * (x**2).sum(0).mean()) * np.eye(x.shape[1])
        weights = np.linalg.lstsq(np.vstack((x, extra)), np.concatenate((y, np.zeros(x.shape[1]))), rcond=None)[0]
        assert np.allclose(baseline.weights[task].numpy(), weights, atol=1e-9)


def test_linear_baseline_of_a_task_ignores_the_others(data):
    alone = Trajectories(*(x[:, 1:2] for x in data))
    together = LinearFeatureBaseline().fit(data).weights[1]
    assert torch.allclose(LinearFeatureBaseline().fit(alone).weights[0], together, atol=1e-9)


def test_linear_baseline_recovers_a_linear_value():
    """Rewards whose reward to go is a linear function of the features are predicted, in new episodes too."""
    generator = torch.Generator().manual_seed(1)

    def episodes(count):
        x = torch.randn(6, 1, count, 1, generator=generator)
        value = 2 * x[..., 0] - 0.5 * x[..., 0] ** 2 + 1
        reward = value - torch.cat((value[1:], torch.zeros_like(value[:1])))
        nothing = torch.zeros_like(value)
        return Trajectories(x, nothing, nothing, reward, torch.ones_like(value)), value

    train, _ = episodes(40)
    test, value = episodes(10)
    assert torch.allclose(LinearFeatureBaseline(1e-9).fit(train).predict(test), value, atol=1e-5)


def test_linear_baseline_says_what_is_wrong(data):
    with pytest.raises(ValueError, match="ridge = 0"):
        LinearFeatureBaseline(0.0)
    with pytest.raises(RuntimeError, match="before fit"):
        LinearFeatureBaseline().predict(data)


def test_spare_episodes_are_in_no_mean():
    """What another task of the batch needs does not change a task's numbers."""
    value, counts = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3)
    padded = torch.cat((value, torch.full((4, 2, 2), 7.0)), -1)
    found = leave_one_out(padded, torch.cat((counts, torch.zeros(2, 2)), -1))
    assert torch.allclose(found[..., :3], leave_one_out(value), atol=1e-6)
    assert not found[..., 3:].any()
    assert not leave_one_out(value, torch.tensor([[1.0, 0, 0], [1, 0, 0]])).any()
