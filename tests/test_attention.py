"""The attention memory: step by step = all at once, causal, by hand with torch's own attention; refuses bad sizes."""

import pytest
import torch

from ecomlib.attention import AttentionMemory
from ecomlib.memories import memory_network


def network(layers=1, pooled=False, rows=1, hidden=8, heads=2):
    return AttentionMemory(5, rows, 3, hidden, pooled, layers=layers, heads=heads)


def drawn(memory, seed=0):
    """Parameters of ordinary size everywhere, biases and output weights included."""
    generator = torch.Generator().manual_seed(seed)
    return [0.5 * torch.randn(p.shape, generator=generator) for p in memory.initial(generator)]


def inputs_of(memory, time=9, tasks=3, units=2, seed=1):
    return torch.randn(time, tasks, units, memory.rows * 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rows, pooled", [(1, False), (1, True), (4, False), (4, True)])
def test_steps_are_the_whole_trial(layers, rows, pooled):
    memory = network(layers, pooled, rows)
    parameters, inputs = drawn(memory), inputs_of(network(layers, pooled, rows))
    state, steps = memory.begin(inputs[0]), []
    for now in inputs:
        output, state = memory.step(parameters, now, state)
        steps.append(output)
    assert torch.allclose(torch.stack(steps), memory.outputs(parameters, inputs), rtol=0, atol=1e-10)
    assert state[0][0].shape == (3, 1 if pooled else 2, rows, 9, 8)


@pytest.mark.parametrize("layers", [1, 2])
def test_nothing_depends_on_what_comes_later_and_all_on_what_came_before(layers):
    memory = network(layers)
    parameters, inputs = drawn(memory), inputs_of(memory)
    before = memory.outputs(parameters, inputs)
    changed = inputs.clone()
    changed[4] += 1.0
    after = memory.outputs(parameters, changed)
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).any(-1).all()
    changed = inputs.clone()
    changed[:, 1] += 1.0  # another task's steps are not seen
    assert torch.equal(memory.outputs(parameters, changed)[:, 0], before[:, 0])


def test_a_layer_is_the_transformers():
    """Against torch.nn.MultiheadAttention and the formulas, for one row of one unit of one task. The reading is shared
    with the other memories."""
    memory = network(heads=2)
    parameters, inputs = drawn(memory), inputs_of(memory, tasks=1, units=1)
    embed, bias, qkv, qkv_bias, out, out_bias, wide, wide_bias, narrow, narrow_bias, *_ = parameters
    unit = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    x = torch.tanh(inputs[:, 0, 0] @ embed + bias)
    own = torch.nn.MultiheadAttention(8, 2, dtype=torch.float64)
    state = {"in_proj_weight": qkv.T, "in_proj_bias": qkv_bias, "out_proj.weight": out.T, "out_proj.bias": out_bias}
    own.load_state_dict(state)
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    y = x + own(unit(x), unit(x), unit(x), attn_mask=later, need_weights=False)[0]
    y = y + torch.relu(unit(y) @ wide + wide_bias) @ narrow + narrow_bias
    expected = memory._read(parameters, x[:, None, None, None], y[:, None, None, None])
    for found, wanted in zip(memory.outputs_and_values(parameters, inputs), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-10)


def test_every_parameter_matters():
    memory = network(2, rows=4)
    leaves = [p.requires_grad_() for p in drawn(memory)]
    outputs, values = memory.outputs_and_values(leaves, inputs_of(memory))
    gradients = torch.autograd.grad(outputs.square().sum() + values.square().sum(), leaves)
    assert len(leaves) == memory.tensors and all((g != 0).any() for g in gradients)
    assert leaves[memory.head[0]].shape == (8, 3)


def test_it_has_a_name_and_checks_its_sizes():
    assert isinstance(memory_network("attention", size=5, rows=1, outputs=3, hidden=16), AttentionMemory)
    with pytest.raises(ValueError, match="heads = 3; allowed: a divisor of hidden = 8"):
        network(heads=3)
    with pytest.raises(ValueError, match="layers = 0"):
        network(layers=0)
