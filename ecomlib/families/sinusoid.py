"""Sinusoid regression (Finn et al. 2017): curves of hidden amplitude and phase, each seen at a few points (chapter
"MAML, derived")."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import noise as noise_
from .base import check, numbers, require, whole


class Waves(NamedTuple):
    """M curves y = amplitude sin(x - phase). Every field is (M,); all but ``id`` are hidden."""

    id: Tensor
    amplitude: Tensor
    phase: Tensor  # radians


@dataclass(frozen=True)
class Sinusoid:
    """Regression tasks y = A sin(x - b), each a function of its id; no noise in y.

    Not a decision process: nothing is chosen, so there is no ``step``. The defaults are the tasks of Finn, Abbeel and
    Levine (2017, section 5.1).
    """

    amplitude: tuple[float, float] = (0.1, 5.0)
    """Range of the amplitude A, uniform."""
    phase: tuple[float, float] = (0.0, math.pi)
    """Range of the phase b in radians, uniform."""
    inputs: tuple[float, float] = (-5.0, 5.0)
    """Range of x, uniform."""

    def __post_init__(self):
        for field in ("amplitude", "phase", "inputs"):
            increasing = lambda x: numbers(x, 2) and x[0] < x[1]
            check(self, field, increasing, "two finite numbers, low < high")

    def tasks(self, task_id: Tensor) -> Waves:
        """The curves named by ``task_id`` (M,) int64: a function of the id alone."""
        replica = torch.zeros(1, dtype=torch.int64, device=task_id.device)
        uniforms = noise_.uniform(0, task_id, replica, 0, 0, noise_.PRIOR, 2)[:, 0]
        return Waves(task_id, _between(self.amplitude, uniforms[:, 0]), _between(self.phase, uniforms[:, 1]))

    def shifted(self) -> Sinusoid:
        """Amplitudes above all that training saw: the next interval of the same width."""
        low, high = self.amplitude
        return replace(self, amplitude=(high, 2 * high - low))

    def sample(self, tasks: Waves, points: int, seed: int, episode: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """Inputs and values (M, points, 1) at random places.

        Different episodes are independent draws: take support and query data from different ones. The first 5 points
        are the same whether 5 or 10 are asked for.
        """
        require(whole(points, 1), "points", points, "a whole number >= 1")
        replica = torch.arange(points, device=tasks.id.device)
        x = _between(self.inputs, noise_.uniform(seed, tasks.id, replica, episode, 0, noise_.FAMILY, 1))
        return x, self.value(tasks, x)

    def grid(self, tasks: Waves, points: int = 100) -> tuple[Tensor, Tensor]:
        """Inputs and values (M, points, 1) at evenly spaced places, both ends included: what a learner is scored on."""
        require(whole(points, 2), "points", points, "a whole number >= 2")
        x = torch.linspace(*self.inputs, points, device=tasks.id.device)[:, None].expand(len(tasks.id), points, 1)
        return x, self.value(tasks, x)

    def value(self, tasks: Waves, x: Tensor) -> Tensor:
        """The curves (M, points, 1) at ``x`` (M, points, 1)."""
        return tasks.amplitude[:, None, None] * torch.sin(x - tasks.phase[:, None, None])


def least_squares_sine(x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """Values at ``query`` (M, Q, 1) of the sine of period 2 pi that fits the points (M, P, 1) best.

    A sin(x - b) = (A cos b) sin x - (A sin b) cos x is linear in two coefficients, so two noiseless points at
    different phases determine the curve: the classical method for whoever knows the form of the curve.
    """
    features = lambda x: torch.cat((x.sin(), x.cos()), -1)
    return features(query) @ torch.linalg.lstsq(features(x), y).solution


def _between(bounds: tuple[float, float], uniform: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform
