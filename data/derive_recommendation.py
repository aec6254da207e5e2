"""Derive the recommendation tables: python data/derive_recommendation.py [folder]

Writes into the folder, by default this one, open_bandit_clicks.csv, open_bandit_decisions.parquet and
open_bandit_impressions.parquet from the logs inside the package obp 0.4.1, and complete_journey_tastes.parquet from the
Complete Journey panel. Both packages are read by path and never imported; their files are pinned by sha256.
"""

import sys
from pathlib import Path

from ecomlib.calibration import complete_journey, open_bandit


def derive(folder: Path) -> None:
    clicks = open_bandit.clicks()
    clicks.to_csv(folder / "open_bandit_clicks.csv", index=False)
    decisions = open_bandit.decisions()
    decisions.to_parquet(folder / "open_bandit_decisions.parquet", compression="zstd", index=False)
    impressions = open_bandit.impressions()
    impressions.to_parquet(folder / "open_bandit_impressions.parquet", compression="zstd", index=False)
    baskets = complete_journey.category_baskets()
    compact = baskets.astype({"household": "category", "category": "category", "baskets": "int16"})
    compact.to_parquet(folder / "complete_journey_tastes.parquet", compression="zstd", index=False)
    print(f"{len(clicks)} rows of clicks, {len(decisions)} decisions, {len(baskets)} rows of baskets")


if __name__ == "__main__":
    derive(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
