"""Networks: equal to torch's own, shared or one per task, differentiable twice under vmap."""

import pytest
import torch
from torch import nn

from ecomlib.networks import GRU, MLP, BySegment, Context, Module


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random(shapes, generator):
    return [torch.randn(p.shape, generator=generator) for p in shapes]


def sequential():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


NETWORKS = [
    MLP((4, 8, 3)),
    MLP((4, 8, 3), torch.relu),
    GRU(4, 5, 3),
    Context(MLP((6, 8, 3)), 2),
    Module(sequential(), 3),
    BySegment(2, 2, 1, (5,)),
]


def name(network):
    return type(network).__name__


def test_gru_is_torch_gru(generator):
    network, theirs = GRU(4, 5, 3), nn.GRU(4, 5)
    parameters = random(network.initial(generator), generator)
    with torch.no_grad():
        pairs = ((theirs.weight_ih_l0, 0), (theirs.bias_ih_l0, 1), (theirs.weight_hh_l0, 2), (theirs.bias_hh_l0, 3))
        for own, index in pairs:
            own.copy_(parameters[index].mT.reshape(own.shape))
    x = torch.randn(7, 6, 4, generator=generator)
    hidden, _ = theirs(x)
    assert torch.allclose(network.outputs(parameters, x), hidden @ parameters[4] + parameters[5], atol=1e-12)


def test_gru_step_by_step_is_the_sequence(generator):
    network = GRU(4, 5, 3)
    parameters = random(network.initial(generator), generator)
    x = torch.randn(7, 2, 6, 4, generator=generator)
    memory, outputs = network.begin(x[0]), []
    for observation in x:
        output, memory = network.step(parameters, observation, memory)
        outputs.append(output)
    assert torch.allclose(torch.stack(outputs), network.outputs(parameters, x), atol=1e-13)


def test_a_network_by_segment_serves_every_segment_alike(generator):
    """Its output for a segment is the MLP of the common entries and the segment's own, plus the segment's bias; with
    ``inputs`` it does not see the rest."""
    network = BySegment(3, 2, 2, (5,), inputs=(0, 2, 3))
    parameters = random(network.initial(generator), generator)
    x = torch.randn(7, 2, 6, 8, generator=generator)
    found = network.outputs(parameters, x)
    for k in range(3):
        own = torch.stack((x[..., 0], x[..., 2 + k], x[..., 5 + k]), -1)
        expected = MLP((3, 5, 1)).outputs(parameters[:-1], own)[..., 0] + parameters[-1][0, k]
        assert torch.allclose(found[..., k], expected, atol=1e-13)
    unseen = x.clone()
    unseen[..., 1] += 1
    assert torch.equal(network.outputs(parameters, unseen), found)
    assert [parameters[i].shape for i in network.head] == [(1, 3)]
    with pytest.raises(ValueError, match="BySegment.own = 0"):
        BySegment(3, 2, 0, (5,))


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
def test_module_equals_hand_batched_mlp(activation, generator):
    """The fast path and any module: identical numbers, shared and per task, value and gradient."""
    mlp = MLP((4, 8, 3), activation)
    layer = nn.Tanh() if activation is torch.tanh else nn.ReLU()
    module = Module(nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3)), 3)
    x = torch.randn(7, 2, 6, 4, generator=generator)
    for tasks in (None, 2):
        shapes = [p if tasks is None else p.expand(tasks, *p.shape) for p in mlp.initial(generator)]
        parameters = [p.requires_grad_() for p in random(shapes, generator)]
        transposed = [p.mT if i % 2 == 0 else p.squeeze(-2) for i, p in enumerate(parameters)]
        ours, theirs = mlp.outputs(parameters, x), module.outputs(transposed, x)
        assert torch.allclose(ours, theirs, atol=1e-13)
        for a, b in zip(
            torch.autograd.grad(ours.sin().sum(), parameters), torch.autograd.grad(theirs.sin().sum(), parameters)
        ):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS, ids=name)
def test_one_set_per_task_is_each_task_alone(network, generator):
    shared = random(network.initial(generator), generator)
    per_task = [torch.randn(3, *p.shape, generator=generator) for p in shared]
    x = torch.randn(5, 3, 6, 4, generator=generator)
    found = network.outputs(per_task, x)
    assert found.shape == (5, 3, 6, network.output_size)
    for task in range(3):
        alone = network.outputs([p[task] for p in per_task], x[:, task : task + 1])
        assert torch.allclose(found[:, task : task + 1], alone, atol=1e-12)
    # Some shared, some per task, as where only the last layer adapts.
    mixed = [per_task[i] if i in network.head else p for i, p in enumerate(shared)]
    found = network.outputs(mixed, x)
    for task in range(3):
        own = [p[task] if i in network.head else p for i, p in enumerate(mixed)]
        assert torch.allclose(found[:, task : task + 1], network.outputs(own, x[:, task : task + 1]), atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS, ids=name)
def test_counts_its_parameters(network, generator):
    parameters = network.initial(generator)
    assert len(parameters) == network.tensors and all(0 <= i < network.tensors for i in network.head)
    changed = [p + 1.0 if i in network.head else p for i, p in enumerate(parameters)]
    x = torch.randn(2, 3, 4, generator=generator)
    assert not torch.allclose(network.outputs(changed, x), network.outputs(parameters, x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRU(0, 5, 3), "GRU.observation = 0; allowed"),
        (lambda: GRU(4, 2.5, 3), "GRU.hidden = 2.5; allowed"),
        (lambda: Module(None, 3), "Module.module = None; allowed"),
        (lambda: Module(sequential(), 0), "Module.output_size = 0; allowed"),
        (lambda: Context(MLP((4, 3)), 0), "Context.size = 0; allowed"),
        (lambda: MLP((4,)), r"MLP.sizes = \(4,\); allowed"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
