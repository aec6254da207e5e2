"""How well calibrated demand predicts periods it has not seen: what a stock of so many units would have achieved."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import gammaln
from scipy.stats import nbinom, poisson

from ..plotting import COLOURS
from .report import two_panels
from .shrinkage import Array
from .stock_model import fit_demand
from .stock_table import Periods, count

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


class HeldOutService(NamedTuple):
    """Goodness of fit on periods that none of the compared models has seen."""

    models: pd.DataFrame
    """model, log_score (mean log probability of a product-period's sales), gain and gain_se (log_score more than the
    row above, and its standard error over products)."""
    deciles: pd.DataFrame
    """decile of the predicted mean, rows, predicted, actual (mean units sold a period; where stock cuts, both are of
    what can be sold)."""
    service: pd.DataFrame
    """model, level (asked for), rows, predicted and actual (share of product-periods in which demand did not exceed the
    stock that the model says is enough for the level; numbers of units are whole, so predicted is at least the
    level unless the period's own stock was smaller, which then takes its place)."""
    periods: int
    """Periods held out."""


def evaluate_service(periods: Periods, holdout_every: int) -> HeldOutService:
    """Fit without every `holdout_every`-th period and predict those periods."""
    held_period = np.arange(periods.units.shape[1]) % holdout_every == holdout_every - 1
    seen, held = periods.observed & ~held_period, periods.observed & held_period & (periods.stock > 0)
    trained = count(periods, seen)
    kept = trained.periods.sum(1) > 0
    mean = (periods.units * seen).sum(1) / np.maximum(seen.sum(1), 1)
    never = np.full(len(mean), 1e-9)  # Poisson as the limit of a negative binomial
    models = {"Poisson, each product's mean sales": (np.maximum(mean, 0.5 / np.maximum(seen.sum(1), 1)), never)}
    names = {"negative binomial, shrunk": trained}
    if trained.cut.any():
        ignored = trained._replace(cut=np.zeros_like(trained.cut))
        names = {"negative binomial, shrunk, sales taken as demand": ignored} | names
    for name, counts in names.items():
        fitted = np.exp(fit_demand(type(counts)(*(part[kept] for part in counts))).products)
        both = np.ones((2, len(mean)))
        both[:, kept] = fitted.T
        models[name] = (both[0], both[1])

    row, column = np.nonzero(held & kept[:, None])
    units, stock = periods.units[row, column], periods.stock[row, column]
    cut = units >= stock
    scores, service = [], []
    above = None
    for name, (centre, excess) in models.items():
        mu, extra = centre[row], excess[row]
        log_score = np.where(cut, _log_at_least(units, mu, extra), _log_probability(units, mu, extra))
        gain, gain_se = np.nan, np.nan
        if above is not None:
            total = np.bincount(row, log_score - above, len(mean))
            gain, gain_se = total.sum() / len(row), np.sqrt((total**2).sum()) / len(row)
        scores.append((name, log_score.mean(), gain, gain_se))
        above = log_score
        for level in LEVELS:
            enough = np.minimum(_enough(level, mu, extra), stock - 1)
            service.append((name, level, len(row), _up_to(enough, mu, extra).mean(), (units <= enough).mean()))

    mu, extra = (x[row] for x in models["negative binomial, shrunk"])
    predicted = _expected_sales(mu, extra, stock)
    parts = np.array_split(np.argsort(predicted, kind="stable"), 10)
    deciles = pd.DataFrame(
        {"decile": i + 1, "rows": len(part), "predicted": predicted[part].mean(), "actual": units[part].mean()}
        for i, part in enumerate(parts)
        if len(part)
    )
    return HeldOutService(
        pd.DataFrame(scores, columns=["model", "log_score", "gain", "gain_se"]),
        deciles,
        pd.DataFrame(service, columns=["model", "level", "rows", "predicted", "actual"]),
        int(held_period.sum()),
    )


def _size(mean: Array, excess: Array) -> tuple[Array, Array]:
    """r and success probability of scipy's negative binomial."""
    return mean / excess, 1 / (1 + excess)


def _is_poisson(excess: Array) -> bool:
    return bool((excess <= 1e-9).all())


def _log_probability(units: Array, mean: Array, excess: Array) -> Array:
    if _is_poisson(excess):
        return units * np.log(mean) - mean - gammaln(units + 1)
    return nbinom.logpmf(units, *_size(mean, excess))


def _log_at_least(units: Array, mean: Array, excess: Array) -> Array:
    law = poisson.sf(units - 1, mean) if _is_poisson(excess) else nbinom.sf(units - 1, *_size(mean, excess))
    return np.log(np.maximum(law, 1e-300))


def _up_to(units: Array, mean: Array, excess: Array) -> Array:
    return poisson.cdf(units, mean) if _is_poisson(excess) else nbinom.cdf(units, *_size(mean, excess))


def _enough(level: float, mean: Array, excess: Array) -> Array:
    return poisson.ppf(level, mean) if _is_poisson(excess) else nbinom.ppf(level, *_size(mean, excess))


def _expected_sales(mean: Array, excess: Array, stock: Array) -> Array:
    """E min(D, s) = mu P(D' <= s - 2) + s P(D >= s) for a stock of s, with D' negative binomial of size r + 1 and the
    same success probability; mu where the stock is infinite."""
    size, chance = _size(mean, excess)
    finite = np.where(np.isinf(stock), 0.0, stock)
    below = mean * nbinom.cdf(finite - 2, size + 1, chance)
    return np.where(np.isinf(stock), mean, below + finite * nbinom.sf(finite - 1, size, chance))


def plot_service(held_out: HeldOutService, axes=None):
    """Two panels on held-out periods: predicted and actual units by decile; service levels asked for and achieved.

    Args:
        axes: two matplotlib axes, or None for a new figure.

    Returns:
        The matplotlib figure.
    """
    left, right = two_panels(axes)
    deciles = held_out.deciles
    both = deciles[["predicted", "actual"]].to_numpy()
    limits = [both[both > 0].min(), both.max()]
    left.plot(limits, limits, "-", color=COLOURS["model"], label="predicted = actual")
    left.plot(
        deciles["predicted"], deciles["actual"], "o", color=COLOURS["data"], label="a tenth of the product-periods"
    )
    left.set(xscale="log", yscale="log", xlabel="predicted units a period", ylabel="actual units a period")
    log_ticks(left.xaxis, left.yaxis)
    left.legend(frameon=False)

    looks = (("blind", "^"), ("greedy", "s"), ("reinforce", "o"))
    names = list(held_out.service["model"].unique())
    for name, (colour, marker) in zip(names, looks if len(names) == 3 else looks[::2]):
        part = held_out.service[held_out.service["model"] == name]
        short = name.split(", ")
        label = "Poisson" if short[0] == "Poisson" else ", ".join(["negative binomial", *short[2:]])
        right.plot(part["predicted"], part["actual"], marker, color=COLOURS[colour], label=label)
    low = min(held_out.service[["predicted", "actual"]].to_numpy().min() - 0.02, 0.5)
    right.plot([low, 1], [low, 1], "-", color=COLOURS["model"])
    right.set(xlabel="share of periods with enough stock, predicted", ylabel="actual")
    right.legend(frameon=False)
    return left.figure


def log_ticks(*axes) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written as plain numbers; at powers alone where there are many."""
    from matplotlib.ticker import LogLocator, NullLocator

    for axis in axes:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
