"""The meta-gradient as other libraries compute it, each in the way its own documentation shows.

A peer sees an ``nn.Sequential`` of linear layers and losses of the outputs of *one* task, ``loss(outputs, data)`` ->
scalar, where a data set's first entry is the input. It returns a function without arguments that leaves the gradient
of the mean over tasks in the module's ``.grad``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Problem(NamedTuple):
    """A meta-gradient to compute: M tasks, K inner steps on one support set, float32."""

    sizes: tuple[int, ...]
    activation: type[nn.Module]
    parameters: list[Tensor]  # weight (in, out) and bias (1, out) of each layer
    support: list[tuple]  # of each task
    query: list[tuple]
    inner: Callable[[Tensor, tuple], Tensor]  # loss of one task's outputs
    outer: Callable[[Tensor, tuple], Tensor]
    lr: float
    steps: int

    def module(self) -> nn.Sequential:
        """The network with these parameters, as torch's users write it."""
        layers = []
        for k, (fan_in, fan_out) in enumerate(zip(self.sizes, self.sizes[1:])):
            like = self.parameters[2 * k]
            layer = nn.Linear(fan_in, fan_out, device=like.device, dtype=like.dtype)
            layer.weight.data.copy_(self.parameters[2 * k].T)
            layer.bias.data.copy_(self.parameters[2 * k + 1][0])
            layers += [layer, self.activation()]
        return nn.Sequential(*layers[:-1])


def gradient_of(module: nn.Module) -> Tensor:
    """``.grad`` as one vector, in the order and layout of the library's parameters."""
    return flat(p.grad for p in module.parameters())


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of tensors shaped as torch's parameters, weights (out, in) transposed."""
    return torch.cat([t.mT.flatten() if t.dim() == 2 else t for t in tensors])


# ------------------------------------------------------------------------------------------ loops over tasks
def clone(module: nn.Module) -> nn.Module:
    """A module whose parameters are differentiable copies, as learn2learn's ``clone_module`` makes it."""
    copy = module.__new__(type(module))
    copy.__dict__ = module.__dict__.copy()
    copy._parameters = {name: p.clone() for name, p in module._parameters.items()}
    copy._modules = {name: clone(child) for name, child in module._modules.items()}
    return copy


def update(module: nn.Module, step: dict[Tensor, Tensor]) -> None:
    """Replace every parameter p by p + step[p], keeping the graph (learn2learn's ``update_module``)."""
    for child in module.modules():
        child._parameters = {name: p + step[p] for name, p in child._parameters.items()}


def adapted_clone(problem: Problem, module: nn.Module, data: tuple) -> nn.Module:
    """One task's module after the inner steps."""
    learner = clone(module)
    for _ in range(problem.steps):
        parameters = list(learner.parameters())
        gradient = torch.autograd.grad(problem.inner(learner(data[0]), data), parameters, create_graph=True)
        update(learner, {p: -problem.lr * g for p, g in zip(parameters, gradient)})
    return learner


def loop(problem: Problem) -> tuple[nn.Module, Callable[[], None]]:
    """A Python loop over tasks with cloned modules: what learn2learn does."""
    module = problem.module()

    def run() -> None:
        module.zero_grad()
        for support, query in zip(problem.support, problem.query):
            learner = adapted_clone(problem, module, support)
            (problem.outer(learner(query[0]), query) / len(problem.support)).backward()

    return module, run


def functional_outputs(problem: Problem, parameters: list[Tensor], x: Tensor) -> Tensor:
    """Forward pass on a list of parameters, as pytorch-maml-rl's policies do it."""
    activation = problem.activation()
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2]):
        x = activation(linear(x, weight, bias))
    return linear(x, parameters[-2], parameters[-1])


def adapted_list(problem: Problem, parameters: list[Tensor], data: tuple) -> list[Tensor]:
    """One task's parameters after the inner steps."""
    for _ in range(problem.steps):
        loss = problem.inner(functional_outputs(problem, parameters, data[0]), data)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        parameters = [p - problem.lr * g for p, g in zip(parameters, gradient)]
    return parameters


def functional_loop(problem: Problem) -> tuple[nn.Module, Callable[[], None]]:
    """A Python loop over tasks with lists of parameters and no modules: what pytorch-maml-rl does."""
    module = problem.module()
    theta = list(module.parameters())

    def run() -> None:
        module.zero_grad()
        for support, query in zip(problem.support, problem.query):
            phi = adapted_list(problem, theta, support)
            (problem.outer(functional_outputs(problem, phi, query[0]), query) / len(problem.support)).backward()

    return module, run


# ------------------------------------------------------------------------------------------ libraries
def higher_loop(problem: Problem) -> tuple[nn.Module, Callable[[], None]]:
    """``higher.innerloop_ctx`` with SGD. Initial weights must not be copied, or the meta-gradient is None."""
    with contextlib.redirect_stderr(io.StringIO()):
        import higher
    module = problem.module()
    optimiser = torch.optim.SGD(module.parameters(), lr=problem.lr)

    def run() -> None:
        module.zero_grad()
        for support, query in zip(problem.support, problem.query):
            with higher.innerloop_ctx(module, optimiser, copy_initial_weights=False) as (learner, steps):
                for _ in range(problem.steps):
                    steps.step(problem.inner(learner(support[0]), support))
                (problem.outer(learner(query[0]), query) / len(problem.support)).backward()

    return module, run


def torchopt_loop(problem: Problem) -> tuple[nn.Module, Callable[[], None]]:
    """``torchopt.MetaSGD``; the network's state is put back after each task."""
    import torchopt

    module = problem.module()
    inner = torchopt.MetaSGD(module, lr=problem.lr)
    leaves = list(module.parameters())
    network_state = torchopt.extract_state_dict(module, by="reference", detach_buffers=True)
    optimiser_state = torchopt.extract_state_dict(inner, by="reference")

    def run() -> None:
        for p in leaves:
            p.grad = None
        for support, query in zip(problem.support, problem.query):
            for _ in range(problem.steps):
                inner.step(problem.inner(module(support[0]), support))
            (problem.outer(module(query[0]), query) / len(problem.support)).backward()
            torchopt.recover_state_dict(module, network_state)
            torchopt.recover_state_dict(inner, optimiser_state)

    return module, run


def parallel_metalearn(problem: Problem, chunk: int) -> tuple[nn.Module, Callable[[], None]]:
    """``metalearn``'s ``MAML.step``: ``vmap`` over ``chunk`` tasks at a time. Its outer optimiser is given nothing to
    do. Supervised only: its losses see inputs and targets of one task."""
    from metalearn.algorithms.MAML import MAML
    from metalearn.inner_optimizers.optimizers import InnerSGD
    from metalearn.loss.base import BaseLoss
    from metalearn.model_wrappers.MAMLWrapper import MAML_Model

    class Loss(BaseLoss):
        def forward(self, out_dict: dict, targets: Tensor, model_states: Any = None, **kwargs: Any):
            value = problem.inner(out_dict["logits"], (None, targets))
            return value, value.detach()

    class Sequential(nn.Sequential):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return super().forward(x)

    module = problem.module()
    model = MAML_Model(backbone=Sequential(*module[:-1]), head=Sequential(module[-1]))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    optimiser.step = lambda: None
    inner = InnerSGD(model.get_fast_weights(), inner_lr=problem.lr, max_inner_steps=problem.steps, learn_lr=False)
    device = problem.parameters[0].device
    learner = MAML(model=model, optimizer=optimiser, inner_optimizer=inner, support_loss_fn=Loss(),
                   inner_steps=problem.steps, chunk_size=chunk, device=device)  # fmt: skip
    batch = [torch.stack(field) for data in (problem.support, problem.query) for field in zip(*data)]
    return module, lambda: learner.step(iter([tuple(batch)]))


def installed(name: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(name) is not None


def gradients(problem: Problem, supervised: bool) -> dict[str, tuple[nn.Module, Callable[[], None]]]:
    """Name -> peer, of those that are installed."""
    peers = {"loop": loop(problem), "functional loop": functional_loop(problem)}
    if installed("higher"):
        peers["higher"] = higher_loop(problem)
    if installed("torchopt"):
        peers["torchopt"] = torchopt_loop(problem)
    if installed("metalearn") and supervised:
        tasks = len(problem.support)
        peers["parallel-metalearn"] = parallel_metalearn(problem, 80)  # its default
        if tasks > 80:
            peers["parallel-metalearn, all tasks"] = parallel_metalearn(problem, tasks)
    return peers


# ------------------------------------------------------------------------------------------ TRPO
def trust_region_products(problem: Problem, adapted: Callable, divergence: Callable) -> Callable:
    """Meta-gradient, and the Hessian of the mean divergence through adaptation by differentiating twice: one graph
    through all tasks, one backward pass for each product, as pytorch-maml-rl and cherry do.

    ``adapted(support)`` -> (function of inputs, theta); returns run(conjugate_gradient) -> natural gradient.
    """

    def run(conjugate_gradient: Callable) -> Tensor:
        tasks, objective, mean_divergence = len(problem.support), 0.0, 0.0
        for support, query in zip(problem.support, problem.query):
            outputs, theta = adapted(support)
            outputs = outputs(query[0])
            objective = objective + problem.outer(outputs, query) / tasks
            mean_divergence = mean_divergence + divergence(outputs) / tasks
        gradient = flat(torch.autograd.grad(objective, theta, retain_graph=True))
        slope = flat(torch.autograd.grad(mean_divergence, theta, create_graph=True))
        product = lambda v: flat(torch.autograd.grad((slope * v).sum(), theta, retain_graph=True))
        return conjugate_gradient(product, gradient)

    return run


def trust_regions(problem: Problem, divergence: Callable) -> dict[str, Callable]:
    """Name -> TRPO outer direction with cloned modules, and with lists of parameters."""
    module, bare = problem.module(), problem.module()
    theta = list(bare.parameters())

    def cloned(support: tuple):
        return adapted_clone(problem, module, support), list(module.parameters())

    def listed(support: tuple):
        phi = adapted_list(problem, theta, support)
        return (lambda x: functional_outputs(problem, phi, x)), theta

    return {
        "loop": trust_region_products(problem, cloned, divergence),
        "functional loop": trust_region_products(problem, listed, divergence),
    }
