"""The best prediction that anyone could make from a log: a Bayesian who knows how it was generated, but not a shop's
taste (chapters "Behaviour prediction with a pretrained encoder" and "Few-shot across categories and shops").

The posterior over taste and position bias is a set of weighted particles; the shopper's stage of intent, which the
events show only in part, is filtered exactly for every particle. What is left is Monte Carlo error, which the effective
number of particles tells of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import noise
from ..families.base import require, whole
from ..families.constants import constant
from ..families.recommendation import SlateRecommendation
from ..families.sessions import FATIGUE, STAGES

IDEAL = 103
"""Stream of ``noise`` that draws the particles."""


class Particles(NamedTuple):
    """P weighted guesses at a shop."""

    taste: Tensor  # (P, d)
    bias: Tensor  # (P,), position bias
    log_weight: Tensor  # (P,), of sum 1

    @property
    def effective(self) -> float:
        """Effective number of particles, 1 / sum of squared weights."""
        return float(torch.exp(-torch.logsumexp(2 * self.log_weight, 0)))


def prior_particles(family: SlateRecommendation, particles: int = 2000, seed: int = 0) -> Particles:
    """Shops as the prior has them."""
    require(whole(particles, 2, 10**6), "particles", particles, "a whole number from 2 to 1000000")
    one = torch.zeros(1, dtype=torch.int64)
    uniforms = noise.uniform(seed, one, torch.arange(particles), 0, 0, IDEAL, family.prior_size, torch.float64)[0]
    taste, bias, _ = family.prior.hidden(uniforms)
    return Particles(taste, bias, torch.full((particles,), -math.log(particles), dtype=torch.float64))


def posterior_particles(
    family: SlateRecommendation, support: pd.DataFrame, particles: int = 2000, rounds: int = 6, seed: int = 0
) -> Particles:
    """What the events ``support`` of one shop say about it: adaptive importance sampling.

    The first round draws from the prior. Each later round draws from a normal distribution with the moments of the
    round before (tempered, so that a tenth of its particles count), its covariance half as wide again, and one draw in
    five from the prior, so that no place is forgotten. Without a row of support the prior comes back.
    """
    found = prior_particles(family, particles, seed)
    if len(support) == 0:
        return found
    arrays = _arrays(support)
    low, high = family.prior.attention
    fixed = high == low
    place = lambda p: torch.special.ndtri(((p.bias - low) / ((high - low) or 1.0)).clamp(1e-9, 1 - 1e-9))
    points = lambda p: p.taste if fixed else torch.cat((p.taste, place(p)[:, None]), 1)
    log_prior = lambda x: _log_prior(family, x[:, : family.features]) + (0 if fixed else _normal(x[:, -1]))
    x = points(found)
    log_weight = _log_likelihood(family, found, arrays)
    for number in range(1, rounds):
        weight = _tempered(log_weight, particles / 10)
        mean = weight @ x
        covariance = 1.5 * (x - mean).T @ (weight[:, None] * (x - mean)) + 1e-6 * torch.eye(x.shape[1])
        proposal = torch.distributions.MultivariateNormal(mean, covariance)
        one = torch.zeros(1, dtype=torch.int64)
        fresh = prior_particles(family, particles, seed + number)
        uniforms = noise.uniform(seed, one, torch.arange(particles), number, 1, IDEAL, x.shape[1], torch.float64)[0]
        drawn = mean + torch.special.ndtri(uniforms) @ torch.linalg.cholesky(covariance).T
        x = torch.where((torch.arange(particles) % 5 == 0)[:, None], points(fresh), drawn)
        bias = fresh.bias if fixed else low + (high - low) * torch.special.ndtr(x[:, -1])
        prior = log_prior(x)
        mixture = torch.logaddexp(math.log(0.8) + proposal.log_prob(x), math.log(0.2) + prior)
        found = Particles(x[:, : family.features], bias, found.log_weight)
        log_weight = _log_likelihood(family, found, arrays) + prior - mixture
    return found._replace(log_weight=torch.log_softmax(log_weight, 0))


def ideal_probabilities(
    family: SlateRecommendation, events: pd.DataFrame, shop: Particles, chunk: int = 64
) -> NDArray[np.float64]:
    """(rows, 5) probability of each event for every impression of ``events``, given what ``shop`` says and what the
    earlier slates of the same session showed. Sessions do not learn from each other. Rows keep their order."""
    arrays = _arrays(events)
    result = np.empty((len(events), 5))
    for start in range(0, len(arrays.event), chunk):
        part = Arrays(*(x[start : start + chunk] for x in arrays))
        for slate, (predicted, _) in enumerate(_filter(family, shop, part)):
            inside = part.row[:, slate] >= 0
            result[part.row[:, slate][inside].numpy()] = predicted[inside].numpy()
    return result


class Arrays(NamedTuple):
    """Sessions side by side: S of them, T slates, k places. -1 where there is no product."""

    product: Tensor  # (S, T, k) int64
    event: Tensor  # (S, T, k) int64
    row: Tensor  # (S, T, k) int64, of the events


def _arrays(events: pd.DataFrame) -> Arrays:
    session = pd.factorize(events["session"])[0]
    slate = events.groupby(session)["slate"].rank(method="dense").to_numpy().astype(int) - 1
    place = events["place"].to_numpy()
    shape = (session.max() + 1, slate.max() + 1, place.max() + 1)
    found = []
    for values in (events["product"].to_numpy(), events["event"].to_numpy(), np.arange(len(events))):
        array = np.full(shape, -1)
        array[session, slate, place] = values
        found.append(torch.as_tensor(array))
    return Arrays(*found)


def _filter(family: SlateRecommendation, shop: Particles, arrays: Arrays) -> Iterator[tuple[Tensor, Tensor]]:
    """For each slate: the events' probabilities (S, k, 5) before it is seen, and the log weights (S, P) after it."""
    like = shop.taste
    odds_of = torch.exp(like @ constant(family.table.features, like).T + constant(family.table.appeal, like)).T
    attention = constant(family.places[: family.slate], like) ** shop.bias[:, None]  # (P, places)
    level, cart, order = (constant(x, like) for x in (family.click, family.cart, family.order))
    pulls = constant(family.table.pull, like)
    sessions, particles = len(arrays.event), len(like)
    stage = torch.eye(STAGES, dtype=like.dtype)[0].expand(sessions, particles, STAGES)
    fatigue = torch.zeros(sessions, dtype=torch.int64)
    log_weight = shop.log_weight.expand(sessions, -1)
    for slate in range(arrays.product.shape[1]):
        product, event = arrays.product[:, slate], arrays.event[:, slate]
        there, product = product >= 0, product.clamp(min=0)
        tired = torch.exp(-family.tiredness * fatigue)[:, None] * there  # (S, k)
        odds = odds_of[product] * attention.T[: product.shape[1]] * tired[..., None]  # (S, k, P)
        stay = 1 / (1 + odds.sum(1)[..., None] * torch.exp(level))  # (S, P, stage), chance of no click
        # Of a click, by stage: only that, reading on, the cart, a purchase.
        pull = pulls[product][:, None]  # (S, 1, k)
        put, bought = cart[:, None], order[:, None]
        parts = ((1 - put) * (1 - pull), (1 - put) * pull, put * (1 - bought) + 0 * pull, put * bought + 0 * pull)
        part = torch.stack(parts, -1)  # (S, stage, k, 4)
        weight = torch.softmax(log_weight, 1)[..., None] * stage * stay * torch.exp(level)
        clicked = torch.einsum("skp,spz->szk", odds, weight)
        furthest = torch.einsum("szk,szke->ske", clicked, part)
        predicted = torch.cat((1 - furthest.sum(-1, keepdim=True), furthest), -1)

        place = (event > 0).long().argmax(-1, keepdim=True)  # (S, 1), where something happened
        kind = event.gather(-1, place)[:, 0].clamp(min=0)
        any_click = (kind > 0)[:, None, None]
        at = odds.gather(1, place[..., None].expand(-1, 1, particles))[:, 0, :, None] * torch.exp(level)
        own = part.gather(2, place[:, None, :, None].expand(-1, STAGES, 1, 4))[:, :, 0]  # (S, stage, 4)
        own = own.gather(-1, (kind - 1).clamp(min=0)[:, None, None].expand(-1, STAGES, 1))[..., 0]
        seen = torch.where(any_click, at * own[:, None], 1.0) * stay  # (S, P, stage), of what happened
        joint = stage * torch.where(there.any(-1)[:, None, None], seen, 1.0)
        total = joint.sum(-1)
        log_weight = log_weight + torch.log(total)
        yield predicted, log_weight

        stage = joint / total[..., None]
        up = torch.stack((torch.zeros_like(stage[..., 0]), stage[..., 0], stage[..., 1:].sum(-1)), -1)
        # The cart hides whether the shopper read on; a purchase ends what the shopper came for.
        keen = torch.where(kind == 3, pulls[product.gather(-1, place)[:, 0]], (kind == 2).to(like.dtype))
        stage = torch.lerp(stage, up, keen[:, None, None])
        stage = torch.where((kind == 4)[:, None, None], torch.eye(STAGES, dtype=like.dtype)[0], stage)
        fatigue = torch.where(kind > 0, 0, (fatigue + 1).clamp(max=FATIGUE - 1))


def _log_likelihood(family: SlateRecommendation, shop: Particles, arrays: Arrays, chunk: int = 64) -> Tensor:
    """(P,) log-likelihood of sessions, up to the chance of staying, which does not depend on taste."""
    flat = shop._replace(log_weight=torch.zeros_like(shop.log_weight))
    total = torch.zeros_like(shop.log_weight)
    for start in range(0, len(arrays.event), chunk):
        *_, (_, after) = _filter(family, flat, Arrays(*(x[start : start + chunk] for x in arrays)))
        total = total + after.sum(0)
    return total


def _tempered(log_weight: Tensor, least: float) -> Tensor:
    """(P,) weights with the largest power <= 1 of the likelihood ratio that keeps ``least`` particles effective."""
    effective = lambda power: 1 / (torch.softmax(power * log_weight, 0) ** 2).sum()
    low, high = 0.0, 1.0
    if effective(1.0) < least:
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if effective(middle) >= least else (low, middle)
        high = low
    return torch.softmax(high * log_weight, 0)


def _log_prior(family: SlateRecommendation, taste: Tensor) -> Tensor:
    centres = constant(family.prior.centres(family.features), taste)
    apart = (taste[:, None] - centres) / family.prior.deviation
    return (
        torch.logsumexp(_normal(apart).sum(-1), 1)
        - math.log(len(centres))
        - taste.shape[1] * math.log(family.prior.deviation)
    )


def _normal(x: Tensor) -> Tensor:
    return -0.5 * x**2 - 0.5 * math.log(2 * math.pi)
