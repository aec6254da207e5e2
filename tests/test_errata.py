"""What the appendix says is wrong with two articles on the subject is wrong (chapters/appendix/errata.md)."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, cross_entropy


def test_the_loss_of_a_has_no_gradient():
    """sum_t E_D[r_t + gamma max_theta' V(s_{t+1}, theta')] on given data: where the search for theta' starts is
    forgotten. Contrast: a search that stops after one step, and the objective of a policy on the same rewards."""
    reward, state = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, -1.0, 0.1])
    curvature = torch.tensor([1.0, 0.6])

    def value(parameters):  # (t, 2) -> (t,); V(s_{t+1}, .) has its maximum at (s, 2 s) / curvature
        return state * (parameters @ torch.tensor([1.0, 2.0])) - (curvature * parameters**2).sum(1) / 2

    def loss(theta, steps):
        found = theta.expand(3, 2)
        for _ in range(steps):
            (slope,) = torch.autograd.grad(value(found).sum(), found, create_graph=True)
            found = found + 0.5 * slope
        return (reward + 0.9 * value(found)).sum()

    def policy_return(theta):
        return torch.softmax(torch.cat((theta, torch.zeros(1))), 0) @ reward

    def slope_of(function, *arguments):
        return torch.autograd.grad(function(theta, *arguments), theta)[0].abs().max()

    theta, other = (torch.tensor(start, requires_grad=True) for start in ([0.3, -0.2], [-2.0, 4.0]))
    maximum = (reward + 0.9 * state**2 * (1 / 1.0 + 4 / 0.6) / 2).sum().item()
    assert loss(theta, 200).item() == pytest.approx(maximum, rel=1e-12)
    assert loss(other, 200).item() == pytest.approx(maximum, rel=1e-12)
    assert slope_of(loss, 200) < 1e-12
    assert slope_of(loss, 1) > 0.1 and slope_of(policy_return) > 0.1


def test_sum_of_one_step_targets_is_not_the_return():
    """Rewards 1, 2, 4 without discount: the return is 7, the sum over t of r_t + V(s_{t+1}) is 7 + 6 + 4 = 17."""
    reward = [1.0, 2.0, 4.0]
    value = [sum(reward[t:]) for t in range(4)]  # exact values of a deterministic episode; value[3] = 0
    targets = [reward[t] + value[t + 1] for t in range(3)]
    assert targets == value[:3]  # each target is a value already
    assert (value[0], sum(targets)) == (7.0, 17.0)


def test_updating_in_place_depends_on_the_order_of_tasks():
    """Tasks (theta - c)^2 / 2 with c = -1 and 3: training in turn ends near the last; a step of MAML knows no order."""

    def in_turn(centres, theta=0.0, rate=0.5):
        for _ in range(100):
            for centre in centres:
                theta -= rate * (theta - centre)
        return theta

    def maml_step(centres, theta=0.0, inner=0.5, outer=0.1):
        adapted = [theta - inner * (theta - centre) for centre in centres]
        return theta - outer * sum((1 - inner) * (phi - c) for phi, c in zip(adapted, centres)) / len(centres)

    # Fixed points of two half-steps, solved by hand: theta = (c_1 + 2 c_2) / 3.
    assert in_turn([-1.0, 3.0]) == pytest.approx((-1 + 2 * 3) / 3)
    assert in_turn([3.0, -1.0]) == pytest.approx((3 + 2 * -1) / 3)
    assert maml_step([-1.0, 3.0]) == maml_step([3.0, -1.0]) == pytest.approx(0.1 * 0.25 * 1.0)


def test_rates_need_their_number_of_views():
    """One click in one view, and none in 999: one common rate, fitted with and without the number of views."""
    clicks, views = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 999.0])
    rates = torch.linspace(0.0005, 0.9995, 1999)

    def best(weight):
        loss = [binary_cross_entropy(rate.expand(2), clicks / views, weight=weight) for rate in rates]
        return rates[torch.stack(loss).argmin()].item()

    assert best(torch.ones(2)) == pytest.approx(0.5, abs=1e-3)
    assert best(views / views.sum()) == pytest.approx(1 / 1000, abs=3e-4)


def test_a_function_of_comments_is_no_python():
    with pytest.raises(SyntaxError):
        compile("def train(learner):\n    # ...\n\ndef evaluate(learner):\n    # ...\n", "article", "exec")


def test_token_labels_do_not_fit_a_sequence_classifier():
    """Shapes as the classification head of a sequence model makes them: logits (batch, classes)."""
    batch, positions, classes = 16, 128, 4
    logits, labels = torch.zeros(batch, classes), torch.zeros(batch, positions, dtype=torch.long)
    with pytest.raises(ValueError, match="batch_size"):
        cross_entropy(logits.view(-1, classes), labels.view(-1))
    with pytest.raises(IndexError):
        logits.argmax(dim=2)
    assert logits.argmax(dim=-1).shape == (batch,)


def test_a_label_is_read_letter_by_letter():
    known = {"O": 0, "click": 1}
    label = "click"
    with pytest.raises(KeyError, match="'c'"):
        [known[label] for label in label]


def test_padding_makes_a_useless_model_look_good():
    """Eight events, none of class O, padded to 128 positions; the model always answers O."""
    events, positions = 8, 128
    labels = torch.zeros(positions, dtype=torch.long)
    labels[:events] = 1
    logits = torch.tensor([3.0, 0.0]).expand(positions, 2)
    assert (logits.argmax(-1) == labels).double().mean() == 120 / 128
    assert (logits.argmax(-1) == labels)[:events].double().mean() == 0

    ignored = labels.clone()
    ignored[events:] = -100
    assert cross_entropy(logits, ignored) == pytest.approx(cross_entropy(logits[:events], labels[:events]).item())
    assert cross_entropy(logits, labels) < 0.25 < 3 < cross_entropy(logits, ignored)


def test_a_report_wants_flat_lists():
    """scikit-learn's report on sequences of labels: refused as B passes them, fine when they are joined."""
    report = pytest.importorskip("sklearn.metrics").classification_report
    truth, found = [["O", "click"], ["cart", "O"]], [["O", "O"], ["cart", "O"]]
    with pytest.raises(ValueError, match="not supported"):
        report(truth, found)
    flat = report([*truth[0], *truth[1]], [*found[0], *found[1]], output_dict=True, zero_division=0)
    assert flat["accuracy"] == 0.75
