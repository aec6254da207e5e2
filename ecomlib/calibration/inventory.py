"""From a shop's sales and stock to the prior of `CensoredInventory`. Chapter "Inventory"."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import nbinom

from ..families.base import require, whole
from ..families.inventory import CensoredInventory
from ..families.inventory_priors import LogNormalDemand
from .report import block, report
from .service import HeldOutService, evaluate_service, plot_service
from .stock_model import Demand, fit_demand
from .stock_table import InventoryConfig, Periods, count, period_of, prepare_stock, read_stock
from .tables import TableError

__all__ = ["InventoryCalibration", "InventoryConfig", "calibrate_inventory", "read_stock"]


@dataclass(frozen=True)
class InventoryCalibration:
    """What a table of sales says about how the demand of products differs, and what had to be assumed to hear it."""

    prior: LogNormalDemand
    """For `CensoredInventory(prior=...)`: normal (log mean, log(dispersion - 1)) of a day's demand."""
    prior_error: tuple[float, float]
    """Standard errors of the prior's mean (sampling of products and periods; not of the assumptions)."""
    products: pd.DataFrame
    """One row per product that was fitted, see `calibrate_inventory`."""
    funnel: pd.DataFrame
    """filter, products: how many are left after each filter."""
    held_out: HeldOutService
    """Goodness of fit on held-out periods."""
    assumptions: tuple[str, ...]
    """Sentences: what the table does not hold and was assumed."""
    config: InventoryConfig
    """The settings used."""
    sales: pd.DataFrame = field(repr=False)
    """The checked table, before the filters."""

    def prior_table(self, draws: int = 20_000) -> pd.DataFrame:
        """The prior in natural units: 5 %, 50 % and 95 % quantiles of what a product drawn from it looks like."""
        normal = np.random.default_rng(0).standard_normal((draws, 2))
        log_mean, log_excess = (self.prior.mean + normal @ np.array(self.prior.factor).T).T
        mean, dispersion = np.exp(log_mean), 1 + np.exp(log_excess)
        natural = {
            "mean units a day": mean,
            "dispersion: variance / mean of a day": dispersion,
            "standard deviation / mean of a day": np.sqrt(dispersion / mean),
            "stock enough on 19 days of 20": nbinom.ppf(0.95, mean / (dispersion - 1), 1 / dispersion),
        }
        quantiles = {name: np.quantile(value, (0.05, 0.5, 0.95)) for name, value in natural.items()}
        return pd.DataFrame.from_dict(quantiles, orient="index", columns=["5 %", "median", "95 %"])

    def for_demand(self, daily_units: float) -> LogNormalDemand:
        """The same spread of products in a shop where the median product sells `daily_units` a day.

        The dispersion stays as it is, as if the additional customers came independently with baskets like the
        others'. Additional demand that rises and falls together with the old would raise it.
        """
        require(0 < daily_units < np.inf, "daily_units", daily_units, "a finite number > 0")
        return replace(self.prior, mean=(float(np.log(daily_units)), self.prior.mean[1]))

    def family(self, daily_units: float | None = None, levels: int = 32, **settings) -> CensoredInventory:
        """`CensoredInventory` with this prior and order-up-to levels that its products need.

        The levels are whole numbers from 0, roughly log-spaced, to what keeps a product of the prior's 99th percentile
        of mean demand, with the typical dispersion, in stock on 99 days of 100. `daily_units` as in `for_demand`;
        further settings go to `CensoredInventory`.
        """
        require(whole(levels, 2), "levels", levels, "a whole number >= 2")
        prior = self.prior if daily_units is None else self.for_demand(daily_units)
        mean, dispersion = np.exp(prior.mean[0] + 2.33 * prior.factor[0][0]), 1 + np.exp(prior.mean[1])
        top = max(levels, int(nbinom.ppf(0.99, mean / (dispersion - 1), 1 / dispersion)))
        grid = _levels(top, levels)
        return CensoredInventory(**({"prior": prior, "levels": grid} | settings))

    def plot_fit(self, axes=None):
        """Held-out periods in two panels: units by decile, and service levels. Returns the figure."""
        return plot_service(self.held_out, axes)

    def summary(self) -> dict[str, int | list[float]]:
        """What the table held: rows, products and fitted products; and the errors of the prior's mean."""
        return {
            "rows": len(self.sales),
            "products": int(self.sales["product"].nunique()),
            "fitted_products": len(self.products),
            "prior_error": list(self.prior_error),
        }

    def __str__(self) -> str:
        blocks = (
            block("Products", self.funnel, index=False),
            block("Prior in natural units", self.prior_table()),
            block(f"Held-out periods ({self.held_out.periods})", self.held_out.models, index=False),
            block("Service levels on held-out periods", self.held_out.service, index=False),
        )
        return report(blocks, self.assumptions)


def calibrate_inventory(
    sales: pd.DataFrame | str | Path, config: InventoryConfig | None = None
) -> InventoryCalibration:
    """Fit the prior of `CensoredInventory` to daily or weekly sales of many products.

    1. *Filter* products with too few periods or units; the funnel counts the survivors.
    2. *Fit* the population: a product's demand is negative binomial with mean mu and dispersion phi (variance / mean),
       and (log mu, log(phi - 1)) is normal over products. Both levels are fitted at once by marginal maximum
       likelihood (`stock_model.fit_demand`), so that products with little data count as little as they should.
       A period that sold out enters with the probability of a demand of at least its stock.
    3. *Judge*: the same on a part of the periods, scored on the others.

    A week's demand is the sum of seven days'. Where days are independent and alike, its mean is seven times and its
    dispersion the same as a day's, and a sum of negative binomials with one phi is negative binomial. Days that move
    together (a promotion, a season) make weeks more dispersed than days, so daily rows are to be preferred.

    `products` has one row per product: periods, units, sold_out (share of its periods), mean_sales (units a day, as
    sold), mean and dispersion (a day's demand, shrunk: exp of the posterior means).

    Args:
        sales: as `read_stock` takes it.
        config: settings; default `InventoryConfig()`.

    Raises:
        TableError: the table is bad, or too few products survive; the message says what to change.
    """
    config = config or InventoryConfig()
    sales = read_stock(sales)
    period = period_of(sales)
    days = 7 if period == "week" else 1
    if config.absent_is_zero and "stock" in sales:
        raise TableError("column 'stock': a period without a row has no stock; allowed: absent_is_zero = False")
    products, periods, funnel = prepare_stock(sales, period, config)
    found = fit_demand(count(periods, periods.observed))
    shift = np.array([np.log(days), 0.0])
    factor = np.linalg.cholesky(found.covariance)
    prior = LogNormalDemand(
        mean=tuple(map(float, found.mean - shift)), factor=tuple(tuple(map(float, row)) for row in factor)
    )
    return InventoryCalibration(
        prior=prior,
        prior_error=tuple(map(float, found.mean_error)),
        products=_product_table(products, periods, found, days),
        funnel=funnel,
        held_out=evaluate_service(periods, config.holdout_every),
        assumptions=_assumptions(periods, found, period, config),
        config=config,
        sales=sales,
    )


def _product_table(products: pd.Index, periods: Periods, found: Demand, days: int) -> pd.DataFrame:
    observed = periods.observed.sum(1)
    units = (periods.units * periods.observed).sum(1)
    return pd.DataFrame(
        {
            "product": products,
            "periods": observed,
            "units": units.astype(int),
            "sold_out": periods.cut.sum(1) / observed,
            "mean_sales": units / observed / days,
            "mean": np.exp(found.products[:, 0]) / days,
            "dispersion": 1 + np.exp(found.products[:, 1]),
        }
    )


def _assumptions(periods: Periods, found: Demand, period: str, config: InventoryConfig) -> tuple[str, ...]:
    result = []
    if np.isinf(periods.stock).all():
        result.append(
            "Stock is not in the table: every unit asked for is taken as sold. Where shelves ran empty, means and "
            f"dispersions come out too low, and a {period} without sales may have been one without stock."
        )
    else:
        result.append(
            f"A {period} in which all of the stock was sold had a demand of at least that ({periods.cut.sum()} of "
            f"{periods.observed.sum()} product-{period}s). Shoppers who found the shelf empty bought nothing instead."
        )
    if config.absent_is_zero:
        result.append(f"A {period} without a row, between a product's first and last, is one without sales.")
    else:
        result.append(f"A {period} without a row is unobserved: if those without sales are left out, means are high.")
    if period == "week":
        result.append(
            "A day's demand is a seventh of a week's, with the same variance / mean: days are taken as independent and "
            "alike. Where they move together, days are less dispersed than this prior says."
        )
    result.append(
        f"Demand of a product does not change over time: season, weekday, price and promotion, which the shop knows, "
        f"count as chance and raise the dispersion of a {period}."
    )
    if not found.converged:
        result.append("The population did not settle: the table says next to nothing about how dispersion differs.")
    if found.mean[1] < -3:
        result.append("Demand is close to Poisson: the spread of the dispersion is not to be trusted.")
    return tuple(result)


def _levels(top: int, size: int) -> tuple[int, ...]:
    """At most `size` whole numbers from 0 to `top`, log-spaced where there is room."""
    grid = np.unique(np.concatenate(([0], np.geomspace(1, top, size - 1).round().astype(int))))
    for more in range(size, 4 * size):
        wider = np.unique(np.concatenate(([0], np.geomspace(1, top, more).round().astype(int))))
        if len(wider) > size:
            break
        grid = wider
    return tuple(map(int, grid))
