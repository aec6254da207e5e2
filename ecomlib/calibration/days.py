"""A product's own days of selling as support data: a table of days in, episodes that a learner adapts to out (chapter
"Shipping a policy")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..families.pricing import LogitPricing, Market, ShelfState
from ..policies import Policy
from ..rollout import Trajectories
from .sales import SalesTableError
from .tables import plain, read_file

REQUIRED = ("day", "units", "unit_cost")
LARGEST = 1e9
"""No price, cost or number of units is beyond this: a slip of the keyboard is refused instead of learned from."""
WHOLE = f"whole numbers from 0 to {LARGEST:g} (take returns out)"


def read_days(source: pd.DataFrame | str | Path, family: LogitPricing) -> pd.DataFrame:
    """Read and check a table with one row a day of *one* product. The input is never modified.

    ===========  ===================  =====================================================================
    Column       Needed               Meaning and allowed values
    ===========  ===================  =====================================================================
    day          required             a whole number from 1, day 1 a Monday; or an ISO date. No day between
                                      the first and the last may be missing or repeated
    price        unless there is a    what a unit cost the shopper that day, > 0
                 markup
    markup       instead of a price   price / unit cost, > 0
    units        required             units sold, a whole number >= 0
    unit_cost    required             what a unit cost the merchant, > 0, in the money of the family, where the
                                      average unit cost is 1; a price is in the same money
    probability  optional             with which the price was chosen, in (0, 1], where that was written down
    ===========  ===================  =====================================================================

    A markup must be within half a step of the nearest of ``family.markups`` (an edge has the step next to it), which
    then stands for it; a ``continuous`` family takes any between the smallest and the largest.

    Returns:
        A new table sorted by day, with ``episode`` and ``day`` (both from 0; an episode is ``family.days`` days and
        starts on a Monday), ``markup`` as in the family's grid, ``action``, ``units``, ``unit_cost``, ``reward``, and
        ``probability`` where it was given.

    Raises:
        TableError: (a ``ValueError``) naming the column, the number of offending rows, the first of them (counted
            from 1, header not counted) and what is allowed.
    """
    table = (source if isinstance(source, pd.DataFrame) else read_file(source)).reset_index(drop=True)
    priced = [name for name in ("markup", "price") if name in table.columns]
    missing = [repr(name) for name in REQUIRED if name not in table.columns] + ([] if priced else ["'price'"])
    if missing:
        found = ", ".join(map(str, table.columns)) or "none"
        raise SalesTableError(
            f"missing column{'s'[: len(missing) > 1]} {', '.join(missing)} in a table of {len(table)} rows; required "
            f"are {', '.join(REQUIRED)} and price or markup; found: {found}"
        )
    if repeated := sorted({str(name) for name in table.columns[table.columns.duplicated()]}):
        raise SalesTableError(f"column {repeated[0]!r} appears more than once; allowed: once")
    if len(table) == 0:
        raise SalesTableError("the table is empty: 0 rows; needed is one row a day")
    positive = f"numbers > 0, at most {LARGEST:g}"
    units, cost = _numbers(table, "units"), _numbers(table, "unit_cost")
    _refuse(table, "units", ~((units >= 0) & (units <= LARGEST) & (units == np.floor(units))), WHOLE)
    _refuse(table, "unit_cost", ~((cost > 0) & (cost <= LARGEST)), positive)
    chance = _numbers(table, "probability") if "probability" in table else None
    if chance is not None:
        _refuse(table, "probability", ~((chance > 0) & (chance <= 1)), "numbers in (0, 1]")
    value = _numbers(table, priced[0])
    _refuse(table, priced[0], ~((value > 0) & (value <= LARGEST)), positive)
    markup = value if priced[0] == "markup" else value / cost
    action, markup = _action(table, priced[0], markup.to_numpy(), family)
    day = _days(table)
    read = pd.DataFrame({"day": day, "markup": markup, "action": action, "units": units, "unit_cost": cost})
    read = (read if chance is None else read.assign(probability=chance)).sort_values("day", ignore_index=True)
    read.insert(0, "episode", read["day"] // family.days)
    read["day"] -= read["episode"] * family.days
    read["reward"] = read["unit_cost"] * (read["markup"] - 1) * read["units"]
    if family.stock is not None:
        over = read.groupby("episode")["units"].sum()
        if (over > family.stock).any():
            raise SalesTableError(
                f"column 'units': {over.max():g} sold in one episode; allowed: {family.stock}, the family's stock"
            )
    return read


def support_episodes(table: pd.DataFrame, family: LogitPricing, policy: Policy, theta: list[Tensor]) -> Trajectories:
    """The days of ``read_days`` as (T, 1, N) support episodes of one product: the N episodes that the table reaches
    into, of T <= ``family.days`` days.

    Where it has days of several episodes and not all of the first or the last, the absent ones have ``mask`` 0.
    Yesterday's markup and units are 0 on the first day of the table and of every episode, as for a policy that starts
    to sell.

    ``log_prob`` is the logarithm of the table's ``probability``. Where nobody wrote it down, it is that of the policy
    ``theta``, as if it had acted: every likelihood ratio is then 1 at theta and no day is reweighted. The inner step
    then follows an average over the days that the other pricing chose, off by the missing weight of equation
    (eq-missing-weight) of chapter "Shipping a policy"; it is the policy's own only where the other pricing chose as
    theta does. Surrogates without a ratio (``log_likelihood``) leave the weight out in any case.
    """
    column = lambda name: torch.tensor(table[name].to_numpy(dtype=float), dtype=theta[0].dtype)
    starts = torch.tensor(table["episode"].diff().ne(0).to_numpy())
    yesterday = lambda x: torch.where(starts, 0.0, x.roll(1))
    units, cost = column("units"), column("unit_cost")
    if family.stock is None:
        left = torch.full_like(units, torch.inf)
    else:
        earlier = table.groupby("episode")["units"].cumsum() - table["units"]
        left = family.stock - torch.tensor(earlier.to_numpy(dtype=float)).to(units)
    # Cost may change from day to day, and belongs to a task: every row is one, with one episode.
    hidden = torch.full_like(units, torch.nan)
    product = Market(torch.zeros(len(table), dtype=torch.int64), hidden, hidden, hidden, cost)
    state = ShelfState(*(x[:, None] for x in (column("day"), yesterday(column("markup")), yesterday(units), left)))
    observation = family.observe(product, state)[:, 0]

    one = table["episode"].nunique() == 1
    time = torch.tensor((table["day"] - (table["day"].min() if one else 0)).to_numpy())
    episode = torch.tensor((table["episode"] - table["episode"].min()).to_numpy())
    shape = int(time.max()) + 1, 1, int(episode.max()) + 1
    place = lambda empty, rows: empty.index_put((time, torch.zeros_like(time), episode), rows)
    # What stands where mask is 0 is never used, but must be something that the family can produce.
    observation = place(observation[0].expand(*shape, -1).clone(), observation)
    action = torch.tensor(table["action"].to_numpy(), dtype=torch.int64 if family.actions else units.dtype)
    action = place(action[0].expand(shape).clone(), action)
    zeros, ones = units.new_zeros(shape), torch.ones_like(units)
    with torch.no_grad():
        log_prob = policy.log_prob(theta, observation, action)
    if "probability" in table:
        log_prob = place(log_prob, column("probability").log())
    return Trajectories(observation, action, log_prob, place(zeros, column("reward")), place(zeros, ones))


def _action(
    table: pd.DataFrame, name: str, markup: NDArray[np.float64], family: LogitPricing
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Actions and their markups: the nearest of the grid, refused where it is further than half a step."""
    grid = np.array(family.markups)
    if family.continuous:
        allowed = f"a markup (price / unit cost) in [{grid[0]:g}, {grid[-1]:g}]"
        _refuse(table, name, (markup < grid[0]) | (markup > grid[-1]), allowed)
        return markup, markup
    step = np.diff(grid)
    nearest = np.abs(markup[:, None] - grid).argmin(1)
    # Between two prices the nearest is within half of their step by itself: only the edges can refuse.
    far = (markup < grid[0] - step[0] / 2) | (markup > grid[-1] + step[-1] / 2)
    listed = ", ".join(f"{m:g}" for m in grid)
    _refuse(table, name, far, f"a markup (price / unit cost) within half a step of one of {listed}")
    return nearest, grid[nearest]


def _days(table: pd.DataFrame) -> NDArray[np.int64]:
    """Days counted from 0, a Monday; one after the other, in any order of rows."""
    allowed = "whole numbers from 1 (day 1 a Monday), or ISO dates such as 2024-01-31; one row a day, none left out"
    column = table["day"]
    number = pd.to_numeric(column, errors="coerce").astype("float64")
    if number.notna().any() and not pd.api.types.is_datetime64_any_dtype(column):
        _refuse(table, "day", ~((number >= 1) & (number <= 100_000) & (number == np.floor(number))), allowed)
        day = number.to_numpy(dtype=np.int64) - 1
    else:
        dates = pd.to_datetime(column.astype(str), errors="coerce", format="ISO8601")
        _refuse(table, "day", dates.isna() | (dates != dates.dt.normalize()), allowed)
        first = dates.min()
        day = (dates - first).dt.days.to_numpy() + first.weekday()
    ordered = np.sort(day)
    wrong = np.flatnonzero(np.diff(ordered) != 1)
    if len(wrong):
        late = int(np.flatnonzero(day == ordered[wrong[0] + 1])[-1])
        bad = np.arange(len(day)) == late
        _refuse(table, "day", bad, allowed, "do not follow the day before, or repeat it")
    return day


def _numbers(table: pd.DataFrame, name: str) -> pd.Series:
    """A column as finite float64 numbers."""
    dates = pd.api.types.is_datetime64_any_dtype(table[name]) or pd.api.types.is_timedelta64_dtype(table[name])
    value = pd.to_numeric(table[name], errors="coerce")
    if dates or value.dtype.kind not in "iufb":
        raise SalesTableError(f"column {name!r}: {len(table)} rows of {table[name].dtype}; allowed: finite numbers")
    value = value.astype("float64")
    _refuse(table, name, ~np.isfinite(value), "finite numbers", "missing or not a finite number")
    return value


def _refuse(table: pd.DataFrame, name: str, bad: ArrayLike, allowed: str, problem: str = "out of range") -> None:
    """Raise ``SalesTableError`` where some rows are ``bad``."""
    rows = np.flatnonzero(np.asarray(bad))
    if len(rows):
        value = plain(table[name].iloc[rows[0]])
        raise SalesTableError(
            f"column {name!r}: {len(rows)} of {len(table)} rows {problem}; the first is row {rows[0] + 1} "
            f"({name} {value!r}); allowed: {allowed}"
        )
