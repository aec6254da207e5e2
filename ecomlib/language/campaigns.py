"""Generated campaigns whose click rates are known (chapter "Click-rate prediction with MAML").

Users, categories and places act on all campaigns alike; a campaign has a level of its own and its own deviation in each
category. Both are hidden and drawn from normal distributions, so that the best prediction from any log can be computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.special import ndtri

from .. import noise as noise_
from ..families.base import check, number, require, whole
from .click_rates import CampaignLogs, count_cells, gather


class Campaigns(NamedTuple):
    """M campaigns. All but ``id`` is hidden."""

    id: Tensor  # (M,)
    effects: Tensor  # (M, 1 + categories) level, and deviation of each category, in log-odds
    rate: Tensor  # (M, cells) click rate of every cell


@dataclass(frozen=True)
class CampaignFamily:
    """Impressions of advertising campaigns: cells of user type x category x place, all shown equally often.

    log-odds of a click = shared log-odds of the cell + level of the campaign + its deviation in the category, where the
    shared part is a sum of effects and a product of two-dimensional vectors of user type and category. Not a decision
    process: nothing is chosen.
    """

    users: int = 6
    """Types of users."""
    categories: int = 8
    """Categories of products."""
    places: int = 3
    """Places on the page."""
    base_rate: float = 0.01
    """Click rate of a campaign at the mean level in a cell without effects."""
    level_sd: float = 0.5
    """Standard deviation of campaigns' levels in log-odds: 0.5 is a factor of 1.6."""
    category_sd: float = 0.5
    """Standard deviation of a campaign's deviation in a category."""
    level_shift: float = 0.0
    """What is added to all levels: 0 for the campaigns of training."""
    shared_seed: int = 0
    """Seed of the effects that all campaigns share."""

    def __post_init__(self):
        for field in ("users", "categories", "places"):
            check(self, field, lambda x: whole(x, 2, 100), "a whole number from 2 to 100")
        check(self, "base_rate", lambda x: number(x, 0, 0.5), "between 0 and 0.5, both excluded")
        for field in ("level_sd", "category_sd"):
            check(self, field, lambda x: number(x, 0, 5), "between 0 and 5, both excluded")
        check(self, "level_shift", lambda x: number(x, -5, 5), "between -5 and 5, both excluded")
        check(self, "shared_seed", lambda x: whole(x, 0, 2**31), "a whole number from 0 to 2^31")

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.users * self.categories * self.places

    @cached_property
    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """User type, category and place of each cell, (cells,) each."""
        cell = torch.arange(self.cells)
        return cell // (self.categories * self.places), cell // self.places % self.categories, cell % self.places

    @property
    def features(self) -> Tensor:
        """(cells, users + categories + places) one-hot."""
        sizes = (self.users, self.categories, self.places)
        return torch.cat([_one_hot(code, size) for code, size in zip(self.codes, sizes)], 1)

    @property
    def crossed(self) -> Tensor:
        """(cells, users categories + places) one-hot of the pairs of user type and category, and of the place: what a
        linear model needs to say what all campaigns share."""
        user, category, place = self.codes
        pair = user * self.categories + category
        return torch.cat((_one_hot(pair, self.users * self.categories), _one_hot(place, self.places)), 1)

    @property
    def design(self) -> Tensor:
        """(cells, 1 + categories): which of a campaign's own effects a cell has."""
        return torch.cat((torch.ones(self.cells, 1), _one_hot(self.codes[1], self.categories)), 1)

    @property
    def shared(self) -> Tensor:
        """(cells,) shared log-odds, the base rate's and the shift of the levels included."""
        draw = np.random.default_rng(self.shared_seed).standard_normal
        user, category, place = self.codes
        to = lambda x: torch.as_tensor(x, dtype=torch.get_default_dtype())
        effects = to(0.4 * draw(self.users))[user] + to(0.4 * draw(self.categories))[category]
        pairs = (to(0.7 * draw((self.users, 2)))[user] * to(0.7 * draw((self.categories, 2)))[category]).sum(1)
        level = math.log(self.base_rate / (1 - self.base_rate)) + self.level_shift
        return level + effects + pairs - 0.3 * place

    @property
    def effect_sd(self) -> Tensor:
        """(1 + categories,) standard deviations of a campaign's own effects."""
        return torch.tensor([self.level_sd] + [self.category_sd] * self.categories)

    def tasks(self, task_id: Tensor) -> Campaigns:
        """The campaigns named by ``task_id`` (M,) int64: a function of the id alone."""
        replica = torch.zeros(1, dtype=torch.int64)
        uniforms = noise_.uniform(0, task_id, replica, 0, 0, noise_.PRIOR, 1 + self.categories)[:, 0]
        effects = self.effect_sd * ndtri(uniforms)
        return Campaigns(task_id, effects, torch.sigmoid(self.shared + effects @ self.design.T))

    def shifted(self) -> CampaignFamily:
        """Levels two standard deviations higher, so that rates are about e times as high."""
        return replace(self, level_shift=self.level_shift + 2 * self.level_sd)

    def impressions(self, tasks: Campaigns, points: int, seed: int | Tensor, episode: int = 0) -> tuple[Tensor, Tensor]:
        """Cells and clicks (M, points) of impressions one by one. The first 5 are the same whether 5 or 10 are asked
        for; different episodes are independent."""
        require(whole(points, 1, 10**6), "points", points, "a whole number from 1 to 1,000,000")
        uniforms = noise_.uniform(seed, tasks.id, torch.arange(points), episode, 0, noise_.FAMILY, 2)
        cell = (uniforms[..., 0] * self.cells).long()
        return cell, (uniforms[..., 1] < tasks.rate.gather(1, cell)).to(uniforms.dtype)

    def sample(self, tasks: Campaigns, points: int, seed: int | Tensor, episode: int = 0) -> tuple[Tensor, Tensor]:
        """Features and counts of impressions, as ``CampaignLogs.sample``: campaigns without end to learn from."""
        return gather(self.features, *self.impressions(tasks, points, seed, episode))

    def counts(self, tasks: Campaigns, points: int, seed: int | Tensor, episode: int = 0) -> Tensor:
        """(M, cells, 2) the same impressions summed into cells."""
        return count_cells(self.cells, *self.impressions(tasks, points, seed, episode))

    def logs(self, tasks: Campaigns, points: int, support: int, query: int, seed: int = 0) -> CampaignLogs:
        """The same campaigns as logs of ``points`` impressions each: what a shop has kept."""
        cell, click = self.impressions(tasks, points, seed)
        return CampaignLogs(self.features, cell.flatten(), click.flatten(), [points] * len(cell), support, query)

    def expected_loss(self, tasks: Campaigns, rate: Tensor) -> Tensor:
        """(M,) expected cross-entropy of an impression predicted with ``rate`` (M, cells) or (cells,), exactly:
        equation (eq-click-calibrated). By Gibbs' inequality never below ``oracle_loss``."""
        true, rate = tasks.rate, rate.expand_as(tasks.rate)
        return -(true * rate.log() + (1 - true) * torch.log1p(-rate)).mean(-1)

    def oracle_loss(self, tasks: Campaigns) -> Tensor:
        """(M,) the same of who knows the campaign: the entropy of its clicks."""
        return self.expected_loss(tasks, tasks.rate)

    def blind_rate(self) -> Tensor:
        """(cells,) the best prediction without a log: the mean rate over campaigns, by Gauss-Hermite quadrature."""
        node, weight = np.polynomial.hermite_e.hermegauss(40)
        sd = math.hypot(self.level_sd, self.category_sd)
        node, weight = (torch.as_tensor(x, dtype=torch.get_default_dtype()) for x in (node, weight))
        return torch.sigmoid(self.shared[:, None] + sd * node) @ (weight / weight.sum())


def _one_hot(code: Tensor, size: int) -> Tensor:
    return torch.nn.functional.one_hot(code, size).to(torch.get_default_dtype())
