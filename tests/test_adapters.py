"""Meta-learned low-rank adapters: the encoder as a network of the learners, its second derivatives, what attention has
them."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Generator
from torch.nn.attention import SDPBackend, sdpa_kernel

from ecomlib.language.adapters import AdaptedEncoder, Corrected, LoRAConfig, product_rows, text_tokens, token_rows
from ecomlib.language.encoder import Encoder, _byte_tokenizer
from ecomlib.language.few_shot import PADDING, SessionTasks, event_loss, few_shot_learner
from ecomlib.learners.adaptation import Inner, adapt, adapt_task
from ecomlib.learners.supervised import Examples

TEXTS = ["oat milk", "rye bread", "soap", "green tea", "cat food", "apples"]


def tiny(attention="eager", dtype=torch.float64, seed=0):
    """A random BERT of two layers of 16 numbers that reads bytes."""
    from transformers import BertConfig, BertModel

    tokenizer = _byte_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel._from_config(config, attn_implementation=attention, dtype=dtype)
    for parameter in model.parameters():  # far enough from zero for curvature to matter
        parameter.data *= 3.0 if parameter.dim() > 1 else 1.0
    return Encoder("tiny", tokenizer, model.eval(), "tiny")


@pytest.fixture(scope="module")
def rows():
    """(2 tasks, 6 points, L + 1) of what an encoder reads, and classes."""
    events = pd.DataFrame({
        "session": np.repeat([0, 1, 2], 4), "slate": np.tile([0, 0, 1, 1], 3), "place": np.tile([0, 1], 6),
        "product": [0, 1, 2, 3, 4, 5, 0, 2, 1, 3, 5, 4], "event": [1, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 0],
    })  # fmt: skip
    found = token_rows(events, TEXTS, tiny(), 24)
    y = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, PADDING]])
    return torch.as_tensor(found).unflatten(0, (2, 6)), y, events, found


def started(network, seed=1):
    """Parameters away from B = 0 and a head of zeros, where half of all derivatives vanish."""
    generator = Generator().manual_seed(seed)
    start = network.initial(generator)
    return [p + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in start]


def setting(attention="eager"):
    network = AdaptedEncoder(tiny(attention), LoRAConfig(rank=2, alpha=4.0))
    return network, lambda parameters, data: event_loss(network.outputs(parameters, data[0]), data[1])


def meta_gradient(network, loss, start, support, query, steps=2, first_order=False):
    leaves = [p.clone().requires_grad_() for p in start]
    inner = Inner(steps=steps, lr=0.5, first_order=first_order)
    phi = adapt(loss, inner, leaves, [support] * steps, len(support[0]))[-1]
    return torch.autograd.grad(loss(phi, query).mean(), leaves)


def value(network, loss, start, support, query, steps=2):
    inner = Inner(steps=steps, lr=0.5)
    phi = adapt(loss, inner, start, [support] * steps, len(support[0]), create_graph=False)[-1]
    with torch.no_grad():
        return loss(phi, query).mean()


def test_rows_hold_the_candidate_and_what_was_last_acted_on(rows):
    _, _, events, found = rows
    tokens = lambda row: tiny().tokenizer.convert_ids_to_tokens([t for t in found[row][:-1] if t > 4])
    read = lambda row: "".join(tokens(row)).replace("Ġ", " ").strip()
    assert read(0) == "oat milk" and read(1) == "rye bread"
    assert read(2) == "soap oat milk"  # an event of an earlier slate
    assert read(7) == "soap" and read(8) == "rye bread"  # its own slate's event is not in it; nor another session's
    assert found[:, -1].tolist() == events["place"].tolist()
    shuffled = events.sample(frac=1, random_state=0)
    assert (token_rows(shuffled, TEXTS, tiny(), 24) == found[shuffled.index.to_numpy()]).all()
    changed = events.assign(event=events["event"].where(events["slate"] == 0, 3 - events["event"]))
    assert (token_rows(changed, TEXTS, tiny(), 24) == found).all(), "the label of a row is in its text"


def test_without_correction_it_is_the_pretrained_encoder(rows):
    x = rows[0]
    plain, network = tiny(), AdaptedEncoder(tiny(), LoRAConfig(rank=2))
    start = network.initial(Generator().manual_seed(0))
    head = torch.randn(start[-2].shape, dtype=torch.float64)
    found = network.outputs([*start[:-2], head, start[-1]], x)
    vectors = torch.as_tensor(plain.embed([TEXTS[0]]))[0]
    expected = 4.0 * vectors.double() @ head[:16] + head[16]
    assert torch.allclose(found[0, 0], expected, atol=1e-5)
    assert all(not p.requires_grad for p in network.encoder.model.parameters())


def test_corrections_equal_those_of_peft(rows):
    peft = pytest.importorskip("peft")
    x = rows[0][0, :, :-1]
    network = AdaptedEncoder(tiny(), LoRAConfig(rank=2, alpha=4.0))
    start = started(network)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], lora_dropout=0.0)
    other = peft.get_peft_model(tiny().model, config).double()
    layers = [m for m in other.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(layers) == len(network.corrected) == 4
    for i, layer in enumerate(layers):
        layer.lora_A["default"].weight.data = start[2 * i].T.clone()
        layer.lora_B["default"].weight.data = start[2 * i + 1].T.clone()
    mask = (x != network.pad).long()
    with network._with(start):
        mine = network.encoder.model(x, attention_mask=mask).last_hidden_state
    assert torch.allclose(mine, other(x, attention_mask=mask).last_hidden_state, atol=1e-10)


def test_each_task_has_corrections_of_its_own(rows):
    x = rows[0]
    network, _ = setting()
    one, two = started(network, 1), started(network, 2)
    together = network.outputs([torch.stack(pair) for pair in zip(one, two)], x)
    assert torch.allclose(together[0], network.outputs(one, x[0]), atol=1e-12)
    assert torch.allclose(together[1], network.outputs(two, x[1]), atol=1e-12)
    assert (together[0] - network.outputs(two, x[0])).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_second_order_meta_gradient_equals_finite_differences(rows, attention):
    x, y, *_ = rows
    network, loss = setting(attention)
    start, support, query = started(network), Examples(x[:, :3], y[:, :3]), Examples(x[:, 3:], y[:, 3:])
    with sdpa_kernel(SDPBackend.MATH):
        found = meta_gradient(network, loss, start, support, query)
        first = meta_gradient(network, loss, start, support, query, first_order=True)
    generator = Generator().manual_seed(3)
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in start]
        moved = ([p + step * d for p, d in zip(start, direction)] for step in (1e-5, -1e-5))
        up, down = (value(network, loss, parameters, support, query) for parameters in moved)
        numeric = (up - down) / 2e-5
        slope, without = (sum((g * d).sum() for g, d in zip(gradient, direction)) for gradient in (found, first))
        assert abs(slope - numeric) < 1e-6 * max(1, abs(numeric))
        assert abs(without - numeric) > 1e-3 * abs(numeric), "first order passes for second"


def test_first_order_lacks_the_hessian_term(rows):
    """One step: the full gradient is (I - lr H) times the first-order one, H by differentiating the support loss."""
    x, y, *_ = rows
    network, loss = setting()
    start = started(network)
    support, query = Examples(x[:1, :3], y[:1, :3]), Examples(x[:1, 3:], y[:1, 3:])
    full = meta_gradient(network, loss, start, support, query, steps=1)
    first = meta_gradient(network, loss, start, support, query, steps=1, first_order=True)
    leaves = [p.clone().requires_grad_() for p in start]
    gradient = torch.autograd.grad(loss(leaves, support).sum(), leaves, create_graph=True)
    product = torch.autograd.grad(sum((g * v).sum() for g, v in zip(gradient, first)), leaves)
    for a, b, c in zip(full, first, product):
        assert torch.allclose(a, b - 0.5 * c, atol=1e-10)
    assert max(c.abs().max() for c in product) > 1e-3


def test_batched_adaptation_equals_one_task_at_a_time(rows):
    x, y, *_ = rows
    network, loss = setting()
    start, inner, support = started(network), Inner(steps=2, lr=0.5), Examples(x, y)
    together = adapt(loss, inner, start, [support] * 2, 2, create_graph=False)[-1]
    for task in range(2):
        own = [p.clone().requires_grad_() for p in start]
        for _ in range(2):
            gradient = torch.autograd.grad(loss(own, (x[task : task + 1], y[task : task + 1])).sum(), own)
            own = [(p - 0.5 * g).detach().requires_grad_() for p, g in zip(own, gradient)]
        assert all(torch.allclose(a[task], b, atol=1e-10) for a, b in zip(together, own))
    assert adapt_task is not adapt  # the reference of the learners needs torch.func, which transformers' masks refuse


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("last", [1, 2])
def test_remembered_texts_give_the_same_numbers(attention, last):
    """Outputs and meta-gradients, whether the lower blocks are computed anew or once."""
    config = LoRAConfig(rank=2, alpha=4.0, last=last)
    anew, once = AdaptedEncoder(tiny(attention), config), AdaptedEncoder(tiny(attention), config)
    tokens = text_tokens(TEXTS, once.encoder, 16)
    once.remember(tokens)
    events = pd.DataFrame({"product": [0, 1, 5, 2, 3, 4, 4, 1], "place": [0, 1, 2, 3, 0, 1, 2, 5]})
    short = torch.as_tensor(product_rows(events)).unflatten(0, (2, 4))
    long = torch.cat((tokens[short[..., 0]], short[..., 1:]), -1)
    y = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]])
    start = started(anew)
    assert len(start) == 4 * last + 2
    assert torch.allclose(anew.outputs(start, long), once.outputs(start, short), atol=1e-10)
    gradients = []
    for network, x in ((anew, long), (once, short)):
        loss = lambda parameters, data, network=network: event_loss(network.outputs(parameters, data[0]), data[1])
        with sdpa_kernel(SDPBackend.MATH):
            gradients.append(meta_gradient(network, loss, start, Examples(x, y), Examples(x.flip(0), y.flip(0))))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*gradients))


def test_which_attention_has_second_derivatives(rows):
    """The fused kernel fails aloud, eager and the MATH backend do not."""
    x, y, *_ = rows
    support, query = Examples(x[:, :3], y[:, :3]), Examples(x[:, 3:], y[:, 3:])
    network, loss = setting("sdpa")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="derivative|not implemented"):
        meta_gradient(network, loss, started(network), support, query)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # first order needs none
        first = meta_gradient(network, loss, started(network), support, query, first_order=True)
    with sdpa_kernel(SDPBackend.MATH):
        same = meta_gradient(network, loss, started(network), support, query, first_order=True)
        full = meta_gradient(network, loss, started(network), support, query)
    eager, own = setting("eager")
    expected = meta_gradient(eager, own, started(eager), support, query)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(full, expected))
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(first, same))


@pytest.mark.parametrize("name", ["pooled", "MAML", "FOMAML", "ANIL", "Reptile"])
def test_every_learner_trains_adapters(rows, name):
    x, y, *_ = rows
    sessions = SessionTasks(x.unflatten(1, (6, 1)), y.unflatten(1, (6, 1)), torch.rand(2, 6, 1), y.unflatten(1, (6, 1)))
    network, _ = setting()
    learner = few_shot_learner(network, name, Inner(steps=2, lr=0.1), tasks=2, shots=3, queries=3, lr=0.05)
    before = network.initial(Generator().manual_seed(0))
    state = learner.meta_train(sessions, 0, 3, progress=False)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(state.meta, before))
    phi = learner.train_task(state.meta, sessions.first(3), 2)[-1]
    moved = [i for i, (a, b) in enumerate(zip(phi, state.meta)) if a.shape != b.shape]
    assert moved == list(network.head if name == "ANIL" else range(network.tensors))


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"LoRAConfig.rank = 0"):
        LoRAConfig(rank=0)
    with pytest.raises(ValueError, match="LoRAConfig.layers"):
        AdaptedEncoder(tiny(), LoRAConfig(layers=("nowhere",)))
    encoder = tiny()
    AdaptedEncoder(encoder)
    with pytest.raises(ValueError, match="one not in use"):
        AdaptedEncoder(encoder)
    assert len(AdaptedEncoder(tiny(), LoRAConfig(last=1)).corrected) == 2
    assert not any(isinstance(m, Corrected) for m in tiny().model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptedEncoder(tiny()).initial(Generator().manual_seed(0))
