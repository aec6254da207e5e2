"""A trained policy as one file that needs no ecomlib: a ``torch.export`` program or ONNX, and a description next to it
(chapter "Shipping a policy")."""

from __future__ import annotations

import hashlib
import logging
import platform
import tempfile
import warnings
from dataclasses import is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from . import __version__
from .calibration.days import read_days, support_episodes
from .config_files import config_hash, plain
from .families.base import TaskFamily, require
from .families.pricing import LogitPricing, Seen
from .files import write_atomically, write_json
from .learners import MAML
from .learners.adaptation import adapt
from .learners.maml import Stage
from .learners.objective import split_meta
from .learners.rl2 import RL2
from .policies import Categorical, Gaussian, Policy, SquashedGaussian
from .runs import LoadedRun

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
"""Format -> ending of its file."""
TOLERANCE = 1e-5
"""An exported policy whose outputs differ by more from the library's, in single precision, is not put in place."""


class PolicyModule(nn.Module):
    """A policy with its parameters as buffers, in single precision: observations in, the action's distribution out.

    ===========  =====================  ========================================================================
    Kind         Input                  Output
    ===========  =====================  ========================================================================
    softmax      observation (B, O)     probability (B, A)
    Gaussian     observation (B, O)     mean (B, D) and standard_deviation (B, D), before any squashing
    recurrent    also memory (B, H),    also the new memory (B, H), to be passed in at the next step
                 zeros at first
    ===========  =====================  ========================================================================
    """

    def __init__(self, policy: Policy, parameters: list[Tensor]):
        super().__init__()
        if not isinstance(policy, Categorical | Gaussian):
            raise ValueError(f"policy = {type(policy).__name__}; allowed: one with softmax or Gaussian actions")
        self.policy, self.recurrent = policy, hasattr(policy.network, "step")
        self.count = len(parameters)
        for index, value in enumerate(parameters):
            self.register_buffer(f"parameter_{index}", value.detach().float().clone())

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Names of inputs and outputs."""
        outputs = ["probability"] if isinstance(self.policy, Categorical) else ["mean", "standard_deviation"]
        memory = ["memory"] if self.recurrent else []
        return ["observation", *memory], outputs + [f"new_{name}" for name in memory]

    def forward(self, observation: Tensor, memory: Tensor | None = None) -> Any:
        """As the table above."""
        parameters = [getattr(self, f"parameter_{index}") for index in range(self.count)]
        if self.recurrent:
            own = parameters[: self.policy.network.tensors]
            output, memory = self.policy.network.step(own, observation, memory)
        else:
            output = self.policy.outputs(parameters, observation[None])[0]  # one task, a batch of episodes
        if isinstance(self.policy, Categorical):
            found = (torch.softmax(output, -1),)
        else:
            spread = parameters[-1].exp().clamp(min=self.policy.minimum_std)
            found = (output, spread.expand_as(output))
        found = (*found, memory) if self.recurrent else found
        return found if len(found) > 1 else found[0]


def adapted_parameters(
    learner: MAML, meta: list[Tensor], family: TaskFamily, days: pd.DataFrame
) -> tuple[list[Tensor], int]:
    """theta adapted by the learner's inner steps to the days of ``calibration.days.read_days``, without a task axis,
    and the number of episodes they are.

    With several inner steps each is on the same days, since there are no others.
    """
    theta, step_sizes = split_meta(learner.inner, [p.detach() for p in meta])
    data = support_episodes(days, family, learner.policy, theta)
    try:
        advantage = learner.config.advantage(data)
    except ValueError as error:
        raise ValueError(f"--task-data: the run's advantage cannot be computed from these days: {error}") from None
    support = [Stage(data, advantage, torch.zeros_like(data.reward[0, :, 0]))] * learner.inner.steps
    phi = adapt(learner.loss, learner.inner, theta, support, 1, step_sizes, create_graph=False)[-1]
    adapts = learner.inner.adapts(theta)
    return [p[0].detach() if i in adapts else p for i, p in enumerate(phi)], data.reward.shape[-1]


def export_policy(
    run: LoadedRun, out: str | Path, format: str = "onnx", task_data: pd.DataFrame | str | Path | None = None
) -> Path:
    """Write the run's policy, adapted to one product's days where ``task_data`` is given, to ``out``.

    Next to it goes ``out`` with the ending ``.json``: what goes in and comes out, how to scale it, where it comes from
    and the file's SHA-256. Both are written whole or not at all, the description last. A recurrent policy adapts by its
    memory, which goes in and comes out, and takes no data.

    Returns:
        The path of the description.

    Raises:
        ValueError: a format or family that is not supported or lacks a package, or data that cannot be used
            (``SalesTableError``).
        RuntimeError: what was exported does not compute what the library does.
    """
    out, learner, family = Path(out), run.learner, run.family
    require(format in FORMATS, "--format", format, ", ".join(FORMATS))
    require(out.suffix == FORMATS[format], "--out", str(out), f"a file that ends with {FORMATS[format]}")
    if isinstance(learner, RL2):
        allowed = "the others. What it is fed is put together in Python (TrialInput): use its agent() there"
        raise ValueError(f"algorithm = {run.config.algorithm}; allowed: {allowed}")
    theta, _ = split_meta(learner.inner, [p.detach() for p in run.meta])
    recurrent, adapted = hasattr(learner.policy.network, "step"), None
    if task_data is not None:
        if recurrent or learner.inner.steps == 0:
            raise ValueError("--task-data: this run has no inner step; a recurrent policy adapts by its memory alone")
        if not isinstance(family, LogitPricing):
            raise ValueError(
                f"--task-data: a run on {type(family).__name__} has no table format; allowed: LogitPricing"
            )
        days = read_days(task_data, family)
        theta, episodes = adapted_parameters(learner, run.meta, family, days)
        name = task_data if isinstance(task_data, str | Path) else None
        adapted = {
            "table": None if name is None else Path(name).name,
            "days": len(days),
            "episodes": episodes,
            "episodes_in_training": learner.config.episodes,
            "inner_steps": learner.inner.steps,
            "probabilities": "of the table"
            if "probability" in days
            else "assumed: those of the policy before adaptation",
        }
    module = PolicyModule(learner.policy, theta).eval()
    sizes = {"observation": family.observation_size}
    if recurrent:
        sizes["memory"] = learner.policy.network.begin(theta[0].new_zeros(1, family.observation_size)).shape[-1]
    out.parent.mkdir(parents=True, exist_ok=True)
    content, difference = _convert(module, sizes, format, out.parent)
    described = description(run, module, sizes, format) | {
        "model": out.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "adapted": adapted,
        "largest_difference": difference,
    }
    write_atomically(out, content)
    write_json(out.with_suffix(".json"), described)
    return out.with_suffix(".json")


def description(run: LoadedRun, module: PolicyModule, sizes: dict[str, int], format: str) -> dict[str, Any]:
    """What a user of the file must know and cannot see in it."""
    family, policy = run.family, module.policy
    observed = " ".join((family.observe.__doc__ or "").split())
    action = {"probability": "of each action, in order", "mean": "of the action", "standard_deviation": "of the action"}
    if isinstance(policy, SquashedGaussian):
        rule = f"action = {policy.low} + ({policy.high} - {policy.low}) sigmoid(2 x), x ~ Normal(mean, deviation^2)"
    elif isinstance(policy, Gaussian):
        rule = "action ~ Normal(mean, deviation^2)"
    else:
        rule = "draw an action from the probabilities; the most probable one alone would stop exploring"
    memory = "zeros at the start of an episode, then new_memory of the step before"
    meanings = {"observation": observed, "memory": memory, "new_memory": "to pass in at the next step", **action}
    widths = sizes | {"new_memory": sizes.get("memory")}
    port = lambda name: {
        "name": name,
        "shape": ["batch", widths.get(name) or policy.network.output_size],
        "dtype": "float32",
        "meaning": meanings[name],
    }
    described = {
        "format": format,
        "inputs": [port(name) for name in module.names[0]],
        "outputs": [port(name) for name in module.names[1]],
        "action": rule,
        "family": {"name": type(family).__name__, "settings": plain(family) if is_dataclass(family) else None},
        "run": {"config_sha256": config_hash(run.config), "seed": run.seed, "iteration": run.iteration},
        "versions": {"ecomlib": __version__, "torch": torch.__version__, "python": platform.python_version()}
        | ({"onnx": version("onnx")} if format == "onnx" else {}),
    }
    if isinstance(family, LogitPricing):
        described["inputs"][0]["entries"] = list(Seen._fields)
        described["scaling"] = {
            "day": f"day of the episode from 0, divided by {family.days}",
            "cost": "unit cost, in units of the average unit cost",
            "weekday": f"today's traffic multiplier, Monday first: {list(family.weekday)}",
            "markup": "yesterday's price / unit cost; 0 on the first day of an episode",
            "sold": f"yesterday's units divided by {family.mean_traffic:g}; 0 on the first day of an episode",
            "stock": "1" if family.stock is None else f"units left divided by {family.stock}",
        }
        if family.actions:
            described["markups"] = list(family.markups)
    return described


def _convert(module: PolicyModule, sizes: dict[str, int], format: str, folder: Path) -> tuple[bytes, float | None]:
    """The file's content, and by how much its outputs differ at most from the module's on random inputs."""
    if format == "onnx":
        for name in ("onnx", "onnxscript"):
            try:
                __import__(name)
            except ImportError:
                raise ValueError(f"--format onnx needs the package {name}: pip install onnx onnxscript") from None
    generator = torch.Generator().manual_seed(0)
    draw = lambda rows: tuple(torch.randn(rows, n, generator=generator, dtype=torch.float32) for n in sizes.values())
    batch = {name: {0: torch.export.Dim("batch")} for name in sizes}
    inputs = draw(64)
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=folder, prefix=".export") as place:
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of every operator of absent torchvision
        expected = module(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        path = str(Path(place) / f"policy{FORMATS[format]}")
        if format == "torch":
            torch.export.save(torch.export.export(module, draw(2), dynamic_shapes=batch), path)
            found = torch.export.load(path).module()(*inputs)
            found = found if isinstance(found, tuple) else (found,)
        else:
            names = {"input_names": module.names[0], "output_names": module.names[1], "dynamic_shapes": batch}
            torch.onnx.export(module, draw(2), path, dynamo=True, external_data=False, verbose=False, **names)
            found = _run_onnx(path, dict(zip(sizes, inputs)))
        content = Path(path).read_bytes()
    if found is None:
        return content, None
    difference = max(float((torch.as_tensor(np.asarray(a)) - b).abs().max()) for a, b in zip(found, expected))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the {format} policy differs by {difference:.2g} from the library's: nothing was written")
    return content, difference


def _run_onnx(path: str, inputs: dict[str, Tensor]) -> list[np.ndarray] | None:
    """Outputs by ONNX Runtime; None where it is not installed, so that the file goes unchecked."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})
