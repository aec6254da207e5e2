"""From a retailer's sales to the prior of `LogitPricing`. Chapter "Dynamic pricing"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from ecomlib.calibration.goodness import HeldOut, evaluate_held_out, plot_held_out, population_of
from ecomlib.calibration.preparation import CalibrationConfig, Prepared, centred, prepare
from ecomlib.calibration.purchase_model import PurchaseFit, best_markup, fit_purchases
from ecomlib.calibration.report import block, report
from ecomlib.calibration.sales import read_sales
from ecomlib.calibration.shrinkage import Population
from ecomlib.families.pricing import GaussianPrior, LogitPricing


@dataclass(frozen=True)
class PricingCalibration:
    """What a table of sales says about how products differ, and what had to be assumed to hear it."""

    prior: GaussianPrior
    """For `LogitPricing(prior=...)`: normal (log a, logit share at the reference markup, log daily traffic)."""
    prior_error: tuple[float, float, float]
    """Standard errors of the prior's mean (sampling of products and weeks; not of the assumptions)."""
    products: pd.DataFrame
    """One row per product that was fitted, see `calibrate_pricing`."""
    funnel: pd.DataFrame
    """filter, products: how many are left after each filter."""
    outside: pd.DataFrame
    """best_price (below / inside / above the observed range), products, share."""
    held_out: HeldOut
    """Goodness of fit on held-out weeks."""
    assumptions: tuple[str, ...]
    """Sentences: what the table does not hold and was assumed."""
    config: CalibrationConfig
    """The settings used."""
    sales: pd.DataFrame = field(repr=False)
    """The checked table, before the filters."""

    def prior_table(self, draws: int = 20_000) -> pd.DataFrame:
        """The prior in natural units: 5 %, 50 % and 95 % quantiles of what a product drawn from it looks like."""
        normal = np.random.default_rng(0).standard_normal((draws, 3))
        log_a, logit_share, log_traffic = (self.prior.mean + normal @ np.array(self.prior.factor).T).T
        a, m = np.exp(log_a), self.prior.reference_markup
        natural = {
            "sensitivity a, per unit of markup": a,
            f"purchase share at markup {m:.2f}": expit(logit_share),
            "shoppers a day": np.exp(log_traffic),
            "units a day": np.exp(log_traffic) * expit(logit_share),
            f"own-price elasticity at markup {m:.2f}": -a * m * expit(-logit_share),
            "best markup": best_markup(a, logit_share, m),
        }
        quantiles = {name: np.quantile(value, (0.05, 0.5, 0.95)) for name, value in natural.items()}
        return pd.DataFrame.from_dict(quantiles, orient="index", columns=["5 %", "median", "95 %"])

    def for_traffic(self, daily_shoppers: float) -> GaussianPrior:
        """The same products in a shop with another number of shoppers a day (the shares stay)."""
        if not 0 < daily_shoppers < np.inf:
            raise ValueError(f"daily_shoppers = {daily_shoppers!r}; allowed: a finite number > 0")
        return replace(self.prior, mean=(*self.prior.mean[:2], float(np.log(daily_shoppers))))

    def family(self, prices: int = 11, daily_shoppers: float | None = None, **settings) -> LogitPricing:
        """`LogitPricing` with this prior and prices that span the best markups of nine in ten of its products.

        The grid is geometric, from half the margin of the lowest of these best markups to one and a half times the
        margin of the highest. A grid that does not reach the best prices makes oracle and blind policy agree at its
        end, and scores meaningless. `daily_shoppers` as in `for_traffic`; further settings go to `LogitPricing`.
        """
        low, high = self.prior_table().loc["best markup", ["5 %", "95 %"]]
        grid = np.geomspace(1 + (low - 1) / 2, 1 + 1.5 * (high - 1), prices).round(3)
        prior = self.prior if daily_shoppers is None else self.for_traffic(daily_shoppers)
        units = float(np.exp(prior.mean[2]) * expit(prior.mean[1]))
        return LogitPricing(**({"prior": prior, "markups": tuple(map(float, grid)), "mean_traffic": units} | settings))

    def plot_fit(self, axes=None):
        """Held-out weeks in two panels: units by decile, and units against relative price. Returns the figure."""
        return plot_held_out(self.held_out, axes)

    def summary(self) -> dict[str, int | list[float]]:
        """What the table held: rows, products and fitted products; and the errors of the prior's mean."""
        return {
            "rows": len(self.sales),
            "products": int(self.sales["product"].nunique()),
            "fitted_products": len(self.products),
            "prior_error": list(self.prior_error),
        }

    def sensitivity(
        self, margins: Sequence[float] | None = None, visitors_scale: Sequence[float] = (0.5, 1.0, 2.0)
    ) -> pd.DataFrame:
        """Calibrate again under other assumptions: one row per margin and scale of the visitors.

        Columns: margin, visitors_scale, products, sensitivity and share (population medians), log_sensitivity_sd,
        shoppers_a_day, elasticity, best_markup and best_price (medians over products; the price in units of
        the product's median price), outside (share of products whose best price was never observed).

        Args:
            margins: default (0.2, 0.3, 0.4). With a unit_cost column the cost is not an assumption and
                margins must be None; the margin shown is nan.

        Raises:
            ValueError: margins given although the table has unit costs; a value outside its range.
        """
        known = "unit_cost" in self.sales
        if known and margins is not None:
            raise ValueError("margins: the table has a unit_cost column, so no margin is assumed; allowed: None")
        rows = []
        for margin in (self.config.margin,) if known else (0.2, 0.3, 0.4) if margins is None else margins:
            for scale in visitors_scale:
                config = replace(self.config, margin=margin, visitors_scale=self.config.visitors_scale * scale)
                prior, _, products, _, outside, _ = _calibrate(self.sales, config)
                rows.append(
                    {
                        "margin": np.nan if known else margin,
                        "visitors_scale": scale,
                        "products": len(products),
                        "sensitivity": np.exp(prior.mean[0]),
                        "log_sensitivity_sd": prior.factor[0][0],
                        "share": expit(prior.mean[1]),
                        "shoppers_a_day": np.exp(prior.mean[2]),
                        "elasticity": products["elasticity"].median(),
                        "best_markup": products["best_markup"].median(),
                        "best_price": (
                            products["best_markup"] * products["unit_cost"] / products["median_price"]
                        ).median(),
                        "outside": 1 - outside.set_index("best_price")["share"]["inside"],
                    }
                )
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        blocks = (
            block("Products", self.funnel, index=False),
            block("Prior in natural units", self.prior_table()),
            block("Best price against the prices observed", self.outside, index=False),
            block(f"Held-out weeks ({len(self.held_out.weeks)})", self.held_out.models, index=False),
        )
        return report(blocks, self.assumptions)


def calibrate_pricing(sales: pd.DataFrame | str | Path, config: CalibrationConfig | None = None) -> PricingCalibration:
    """Fit the prior of `LogitPricing` to weekly sales of many products.

    1. *Filter* products with too few weeks, units or price changes; the funnel counts the survivors.
    2. *Fit* each product: units ~ Poisson(visitors * sigmoid(q + a (m_ref - m) + promotion + season)), with markup
       m = price / unit cost; standard errors allow for overdispersion (`purchase_model.fit_purchases`).
    3. *Shrink*: the population of (log a, q, log traffic) is fitted by marginal maximum likelihood, each slope
       entering with its standard error (`shrinkage.fit_population`). Noisy slopes, and slopes of the wrong
       sign, move to what the population makes plausible; precise ones stay.
    4. *Judge*: the same on a part of the weeks, scored on the others.

    Daily traffic is weekly visitors / 7. Traffic and share are **not separately identified**: sales only show
    their product, so the visitors column (or its replacement) is an assumption that moves the one against
    the other, and cost is an assumption that rescales the markup. Slopes are **descriptive**: prices were
    set by someone who knew the market, so a is not the effect of an experiment with prices.

    `products` has one row per product: weeks, units, median_price, unit_cost, slope (a, as fitted), slope_se,
    dispersion, sensitivity (a, shrunk: exp of the posterior mean of log a), share (at the reference markup,
    shrunk), elasticity_raw and elasticity (own-price, at the reference markup, from slope and from
    sensitivity), best_markup (of the shrunk product, unclipped), lowest_markup and highest_markup
    (observed), best_price ("inside", "below" or "above" the two).

    Args:
        sales: as `read_sales` takes it.
        config: settings; default `CalibrationConfig()`.

    Raises:
        TableError: the table is bad, or too few products survive; the message says what to change.
    """
    config = config or CalibrationConfig()
    sales = read_sales(sales)
    prior, error, products, prepared, outside, funnel = _calibrate(sales, config)
    return PricingCalibration(
        prior=prior,
        prior_error=error,
        products=products,
        funnel=funnel,
        outside=outside,
        held_out=evaluate_held_out(prepared, config),
        assumptions=prepared.assumptions,
        config=config,
        sales=sales,
    )


def _calibrate(
    sales: pd.DataFrame, config: CalibrationConfig
) -> tuple[GaussianPrior, tuple[float, float, float], pd.DataFrame, Prepared, pd.DataFrame, pd.DataFrame]:
    prepared = prepare(sales, config)
    weeks = centred(prepared.weeks, prepared.weeks.observed)
    fit = fit_purchases(weeks, config.control_sd)
    kept = fit.converged
    funnel = pd.concat(
        (
            prepared.funnel,
            pd.DataFrame({"filter": ["the fit converged"], "products": [int(kept.sum())]}),
        ),
        ignore_index=True,
    )
    fit = PurchaseFit(*(part[kept] for part in fit))
    weeks = type(weeks)(*(part[kept] for part in weeks))
    population = population_of(fit, weeks)
    if not population.converged:
        warning = (
            "The population of slopes did not settle: price explains next to nothing in this table, and the "
            "sensitivity of the prior is not to be used."
        )
        prepared = prepared._replace(assumptions=(*prepared.assumptions, warning))
    products = _product_table(prepared, kept, fit, population)
    counts = products["best_price"].value_counts().reindex(["below", "inside", "above"], fill_value=0)
    outside = pd.DataFrame(
        {"best_price": counts.index, "products": counts.to_numpy(), "share": counts.to_numpy() / len(products)}
    )
    factor = np.linalg.cholesky(population.covariance + 1e-12 * np.eye(3))  # traffic may not vary at all
    prior = GaussianPrior(
        mean=tuple(map(float, population.mean)),
        factor=tuple(tuple(map(float, row)) for row in factor),
        reference_markup=float(prepared.reference_markup),
        unit_cost=_cost_range(prepared.unit_cost[kept]),
    )
    return prior, tuple(map(float, population.mean_error)), products, prepared, outside, funnel


def _product_table(prepared: Prepared, kept: np.ndarray, fit: PurchaseFit, population: Population) -> pd.DataFrame:
    weeks, reference = prepared.weeks, prepared.reference_markup
    slope = fit.coefficients[:, 1]
    sensitivity = np.exp(population.log_sensitivity)
    best = best_markup(sensitivity, population.logit_share, reference)
    lowest, highest = np.nanmin(prepared.markup[kept], 1), np.nanmax(prepared.markup[kept], 1)
    return pd.DataFrame(
        {
            "product": prepared.products[kept],
            "weeks": weeks.observed[kept].sum(1),
            "units": (weeks.units * weeks.observed)[kept].sum(1).astype(int),
            "median_price": prepared.median_price[kept],
            "unit_cost": prepared.unit_cost[kept],
            "slope": slope,
            "slope_se": np.sqrt(fit.covariance[:, 1, 1]),
            "dispersion": fit.dispersion,
            "sensitivity": sensitivity,
            "share": expit(population.logit_share),
            "elasticity_raw": -slope * reference * expit(-fit.coefficients[:, 0]),
            "elasticity": -sensitivity * reference * expit(-population.logit_share),
            "best_markup": best,
            "lowest_markup": lowest,
            "highest_markup": highest,
            "best_price": np.where(best > highest, "above", np.where(best < lowest, "below", "inside")),
        }
    )


def _cost_range(unit_cost: np.ndarray) -> tuple[float, float]:
    """The log-uniform range with the products' spread of log cost, in units of its own mean."""
    half = np.sqrt(3) * np.log(unit_cost).std()
    mean = np.sinh(half) / half if half > 1e-9 else 1.0
    return float(np.exp(-half) / mean), float(np.exp(half) / mean)
