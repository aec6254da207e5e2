"""What the calibrations of all families print and draw alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from .shrinkage import Array


def block(title: str, table: pd.DataFrame, index: bool = True) -> str:
    """A table under its title, three significant digits a number."""
    return f"{title}\n{table.to_string(float_format='{:.3g}'.format, index=index)}"


def report(blocks: Iterable[str], assumptions: Iterable[str]) -> str:
    """Blocks one below the other, the assumptions last."""
    return "\n\n".join((*blocks, "Assumptions\n" + "\n".join(f"- {sentence}" for sentence in assumptions)))


def score_table(scores: Mapping[str, Array]) -> pd.DataFrame:
    """Mean log score of each model, and its gain over the model of the row above with a standard error.

    ``scores``: model -> (n,) log score of each held-out row, the same rows for all; empty where nothing was held out.
    """
    rows, above = [], None
    for name, score in scores.items():
        gain, gain_se = np.nan, np.nan
        if above is not None and len(score):
            gain, gain_se = (score - above).mean(), (score - above).std() / np.sqrt(len(score))
        rows.append((name, score.mean() if len(score) else np.nan, gain, gain_se))
        above = score
    return pd.DataFrame(rows, columns=["model", "log_score", "gain", "gain_se"])


def two_panels(axes=None):
    """Two matplotlib axes side by side: those given, or of a new figure."""
    import matplotlib.pyplot as plt  # not needed by a calibration without pictures

    return plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")[1] if axes is None else axes
