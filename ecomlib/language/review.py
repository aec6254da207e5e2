"""The periodic re-evaluation of a deployed ranker: score it on fresh sessions, compare, refit when it fell (chapter
"From prediction to decision")."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from ..families.base import check, number, require, whole
from .decisions import ClickHead
from .features import impression_features

FORMAT = "ecomlib review"


@dataclass(frozen=True)
class ReviewConfig:
    """When a ranker is refitted."""

    level: float = 0.05
    """Probability of a false alarm between two refits, however many periods pass."""
    keep: int = 3
    """Periods of log that a model is fitted on, the newest."""
    shops: int = 20
    """Fewest shops that both periods of a comparison must have."""

    def __post_init__(self):
        check(self, "level", lambda x: number(x, 0, 1), "a number > 0 and < 1")
        check(self, "keep", lambda x: whole(x, 1, 1000), "a whole number from 1 to 1000")
        check(self, "shops", lambda x: whole(x, 6, 10**6), "a whole number from 6 to 1000000")


class Verdict(NamedTuple):
    """What one period's review found."""

    period: int
    """From 0."""
    loss: float
    """Mean over shops of the deployed model's loss in this period, before any refit."""
    reference: float | None
    """The same in the reference period, over the shops of both; None where there is nothing to compare with."""
    p_value: float | None
    """One-sided: is the loss higher than in the reference period?"""
    level: float | None
    """What the p-value was compared with: equation (eq-spending)."""
    alarm: bool
    """Whether it was lower."""
    refitted: bool
    """Whether a model was fitted on the log up to and including this period; it serves the next one."""


class Review:
    """Step by step: score, compare, refit.

    ``fit(events)`` makes a model of a log, and ``loss(model, events)`` returns its loss for every shop of a log (a
    Series by shop, lower is better), measured on sessions whose slates nobody chose: the loss on slates that the ranker
    itself chose would change with the ranker. The first ``keep`` periods fill the log. The period after a fit is the
    *reference*; every later one is compared with it, shop by shop, by Wilcoxon's signed-rank test (1945), at a level
    that falls with the number of looks so that all of them together raise a false alarm with probability at most
    ``level`` (equation (eq-spending)). After an alarm the log of the time before is dropped, since it speaks of another
    market, and the model is fitted anew in each of the ``keep`` periods that fill the log again.
    """

    def __init__(
        self,
        fit: Callable[[pd.DataFrame], Any],
        loss: Callable[[Any, pd.DataFrame], pd.Series],
        config: ReviewConfig = ReviewConfig(),
    ):
        self.fit, self.loss, self.config = fit, loss, config
        self.model: Any = None
        self.log: dict[int, pd.DataFrame] = {}
        self.period, self.looks, self.filling = 0, 0, True
        self.reference: pd.Series | None = None
        self.fitted_on: list[int] = []

    def review(self, events: pd.DataFrame) -> Verdict:
        """Review one period's fresh sessions. Raises ValueError where the events, or what ``loss`` makes of them,
        cannot be used; nothing has changed then."""
        require(len(events) > 0 and "shop" in events, "events", list(events), "rows with a column shop")
        mean, found, p_value, level, alarm = math.nan, None, None, None, False
        losses = None if self.model is None else self._losses(events)
        if losses is not None:
            mean = float(losses.mean())
        if losses is not None and not self.filling and self.reference is not None:
            both = losses.index.intersection(self.reference.index)
            require(
                len(both) >= self.config.shops, "events.shop", len(both),
                f"at least {self.config.shops} shops of the reference period",
            )  # fmt: skip
            now, before = losses[both].to_numpy(), self.reference[both].to_numpy()
            worse = now - before
            found = float(before.mean())
            p_value = float(stats.wilcoxon(worse, alternative="greater").pvalue) if (worse != 0).any() else 1.0
            level = spent(self.config.level, self.looks + 1)
            alarm = p_value <= level
        # From here on nothing can fail but the fit.
        log = {} if alarm else dict(self.log)
        log[self.period] = events
        log = {period: log[period] for period in sorted(log)[-self.config.keep :]}
        filling = self.filling or alarm
        model = self.fit(pd.concat(log.values(), ignore_index=True)) if filling else self.model
        verdict = Verdict(self.period, mean, found, p_value, level, alarm, filling)
        if filling:
            self.model, self.fitted_on, self.reference, self.looks = model, sorted(log), None, 0
        elif self.reference is None:
            self.reference = losses
        else:
            self.looks += 1
        self.filling = filling and len(log) < self.config.keep
        self.log, self.period = log, self.period + 1
        return verdict

    def _losses(self, events: pd.DataFrame) -> pd.Series:
        losses = self.loss(self.model, events)
        bad = losses.index[~np.isfinite(losses.to_numpy(float))]
        require(len(bad) == 0, "loss", f"not finite for shop {bad[0]}" if len(bad) else None, "finite losses")
        return losses

    # ----------------------------------------------------------------------------------------------- stop and go on
    def state(self) -> dict[str, Any]:
        """All but the log, for ``json.dumps``."""
        reference = None if self.reference is None else [[*map(_plain, pair)] for pair in self.reference.items()]
        return {
            "format": FORMAT, "version": 1, "config": asdict(self.config), "period": self.period, "looks": self.looks,
            "filling": self.filling, "fitted_on": self.fitted_on, "kept": sorted(self.log), "reference": reference,
        }  # fmt: skip

    def kept(self) -> pd.DataFrame:
        """The log to keep beside ``state``: the last periods' events with a column ``period``."""
        parts = [events.assign(period=period) for period, events in self.log.items()]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"period": []})

    @classmethod
    def resume(
        cls,
        state: dict[str, Any],
        log: pd.DataFrame,
        fit: Callable[[pd.DataFrame], Any],
        loss: Callable[[Any, pd.DataFrame], pd.Series],
        model: Any = None,
    ) -> Review:
        """Go on where ``state`` and ``log`` (``kept``) were saved.

        ``model`` is the deployed one; None fits it again on the periods it was fitted on, where the log still has them.
        Raises ValueError where ``state`` is none, or the log lacks what it names.
        """
        require(isinstance(state, dict) and state.get("format") == FORMAT, "state", type(state).__name__,
                "what Review.state returned")  # fmt: skip
        require(state["version"] == 1, "state.version", state["version"], "1")
        self = cls(fit, loss, ReviewConfig(**state["config"]))
        present = set(log["period"].unique().tolist()) if len(log) else set()
        missing = sorted(set(state["kept"]) - present)
        require(not missing, "log", f"without period {missing[0]}" if missing else None, f"periods {state['kept']}")
        part = lambda period: log[log["period"] == period].drop(columns="period").reset_index(drop=True)
        self.log = {period: part(period) for period in state["kept"]}
        self.period, self.looks, self.filling = state["period"], state["looks"], state["filling"]
        self.fitted_on = list(state["fitted_on"])
        if state["reference"] is not None:
            self.reference = pd.Series(dict(map(tuple, state["reference"])))
        self.model = model
        if model is None and self.fitted_on:
            gone = sorted(set(self.fitted_on) - present)
            require(not gone, "model", None, f"the deployed model: the log no longer has periods {gone} to fit it on")
            self.model = fit(pd.concat([part(period) for period in self.fitted_on], ignore_index=True))
        return self


def spent(level: float, look: int) -> float:
    """The level of the ``look``-th comparison, from 1: equation (eq-spending). All together spend ``level``."""
    return level * 6 / (math.pi * look) ** 2


def click_loss(head: ClickHead, events: pd.DataFrame, vectors: NDArray[np.floating]) -> pd.Series:
    """Mean log-loss in nats of ``head``'s click probabilities, for every shop of the log."""
    score = impression_features(events, vectors).astype(np.float64) @ head.weight + head.intercept
    acted = events["event"].to_numpy() > 0
    loss = np.logaddexp(0, np.where(acted, -score, score))
    return pd.Series(loss).groupby(events["shop"].to_numpy()).mean()


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
