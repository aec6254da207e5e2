"""How well the calibrated demand predicts weeks it has not seen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from ecomlib.calibration.preparation import CalibrationConfig, Prepared, centred
from ecomlib.calibration.purchase_model import (
    Array,
    PurchaseFit,
    Weeks,
    expected_units,
    fit_purchases,
    poisson_deviance,
)
from ecomlib.calibration.report import two_panels
from ecomlib.calibration.shrinkage import Population, fit_population
from ecomlib.plotting import COLOURS


class HeldOut(NamedTuple):
    """Goodness of fit on weeks that none of the compared models has seen."""

    models: pd.DataFrame
    """model, deviance (mean Poisson deviance per product-week), explained (1 - deviance / that of a constant
    share), explained_se (over products), gain (explained more than by the model of the row above) and gain_se (paired
    over products: the same weeks of the same products)."""
    deciles: pd.DataFrame
    """decile of the units predicted by the shrunk model, rows, predicted, actual (mean units a week)."""
    response: pd.DataFrame
    """bin of price / median price: price, rows, actual, predicted (units relative to a constant share)."""
    weeks: tuple[int, ...]
    """The weeks held out."""


def population_of(fit: PurchaseFit, weeks: Weeks) -> Population:
    """The population of products behind a fit; traffic is the mean of a product's weekly visitors over 7."""
    daily = (weeks.visitors * weeks.observed).sum(1) / weeks.observed.sum(1) / 7
    swap = np.ix_(range(len(daily)), (1, 0), (1, 0))
    return fit_population(fit.coefficients[:, 1], fit.coefficients[:, 0], fit.covariance[swap], np.log(daily))


def shrunk_coefficients(fit: PurchaseFit, population: Population) -> Array:
    """(P, 2 + C): the posterior mean of share and slope, and the controls that go with them.

    The controls move by their regression on the change of the first two, as a normal likelihood would have it.
    """
    target = np.stack((population.logit_share, population.sensitivity), 1)
    change = target - fit.coefficients[:, :2]
    gain = np.linalg.solve(fit.covariance[:, :2, :2], change[..., None])
    controls = fit.coefficients[:, 2:] + (fit.covariance[:, 2:, :2] @ gain)[..., 0]
    return np.concatenate((target, controls), 1)


def evaluate_held_out(prepared: Prepared, config: CalibrationConfig) -> HeldOut:
    """Refit without every `holdout_every`-th week and predict those weeks.

    The weeks are spread over the season, not taken from the end: the question is what the price does, given
    the season, and not how well a sine curve forecasts.
    """
    training = np.arange(len(prepared.week)) % config.holdout_every != config.holdout_every - 1
    weeks = centred(prepared.weeks, np.broadcast_to(training, prepared.weeks.observed.shape))
    seen = weeks._replace(observed=weeks.observed & training)
    held = weeks.observed & ~training

    fit = fit_purchases(seen, config.control_sd)
    shrunk = shrunk_coefficients(fit, population_of(fit, seen))
    flat = weeks._replace(gap=np.zeros_like(weeks.gap))
    no_price = fit_purchases(seen._replace(gap=flat.gap), config.control_sd)
    share = (seen.units * seen.observed).sum(1) / (seen.visitors * seen.observed).sum(1)
    expected = {
        "constant share": weeks.visitors * np.maximum(share, 1e-9)[:, None],
        "promotion and season, no price": expected_units(flat, no_price.coefficients),
        "with price, each product alone": expected_units(weeks, fit.coefficients),
        "with price, shrunk": expected_units(weeks, shrunk),
    }
    deviance = {name: (poisson_deviance(weeks.units, mean) * held).sum(1) for name, mean in expected.items()}
    constant = deviance["constant share"]

    def ratio(value: Array) -> tuple[float, float]:
        """value / constant, summed over products, and the standard error of that ratio over products."""
        share = value.sum() / constant.sum()
        return share, np.sqrt(((value - share * constant) ** 2).sum()) / constant.sum()

    rows, above = [], constant
    for name, value in deviance.items():
        (left, left_se), (gain, gain_se) = ratio(value), ratio(above - value)
        rows.append((name, value.sum() / held.sum(), 1 - left, left_se, gain, gain_se))
        above = value
    models = pd.DataFrame(rows, columns=["model", "deviance", "explained", "explained_se", "gain", "gain_se"])

    units, predicted, base = (
        array[held] for array in (weeks.units, expected["with price, shrunk"], expected["constant share"])
    )
    order = np.argsort(predicted, kind="stable")
    deciles = pd.DataFrame(
        {"decile": i + 1, "rows": len(part), "predicted": predicted[part].mean(), "actual": units[part].mean()}
        for i, part in enumerate(np.array_split(order, 10))
    )
    price = (prepared.markup * prepared.unit_cost[:, None] / prepared.median_price[:, None])[held]
    response = pd.DataFrame(
        {
            "price": (price[part] * base[part]).sum() / base[part].sum(),
            "rows": len(part),
            "actual": units[part].sum() / base[part].sum(),
            "predicted": predicted[part].sum() / base[part].sum(),
        }
        for part in _price_bins(price)
    )
    return HeldOut(models, deciles, response, tuple(int(w) for w in prepared.week[~training]))


def _price_bins(price: Array, bins: int = 10) -> list[np.ndarray]:
    """Row numbers by quantile of price; prices that are equal share a bin."""
    edges = np.unique(np.quantile(price, np.linspace(0, 1, bins + 1)))
    if len(edges) < 2:
        return [np.arange(len(price))]
    index = np.clip(np.searchsorted(edges, price, side="right") - 1, 0, len(edges) - 2)
    return [part for k in range(len(edges) - 1) if len(part := np.flatnonzero(index == k))]


def plot_held_out(held_out: HeldOut, axes=None):
    """Two panels on held-out weeks: predicted and actual units by decile; units against relative price.

    Args:
        axes: two matplotlib axes, or None for a new figure.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    left, right = two_panels(axes)
    deciles, response = held_out.deciles, held_out.response
    model, data = COLOURS["model"], COLOURS["data"]

    limits = [deciles[["predicted", "actual"]].to_numpy().min(), deciles[["predicted", "actual"]].to_numpy().max()]
    left.plot(limits, limits, "-", color=model, label="predicted = actual")
    left.plot(deciles["predicted"], deciles["actual"], "o", color=data, label="a tenth of the product-weeks")
    left.set(xscale="log", yscale="log", xlabel="predicted units a week", ylabel="actual units a week")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    left.legend(frameon=False)

    right.plot(response["price"], response["predicted"], "-", color=model, label="predicted")
    right.plot(response["price"], response["actual"], "o", color=data, label="actual")
    right.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    right.set(xlabel="price / the product's median price", ylabel="units / units at a constant share")
    right.legend(frameon=False)
    return left.figure
