"""The sample of the Open Bandit Dataset as tables of impressions and clicks.

The logs are read by path from the installed package `obp` 0.4.1, which is never imported, and only if the files have
the pinned sha256. `data/open_bandit.md` says what they are and what must not be concluded from them. Chapters
"Recommendation" and "Evaluating adaptive policies".
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pandas as pd

from .complete_journey import PanelError

PACKAGE = "obp==0.4.1"
SHA256 = {
    "random/all": "7168295b6e0a9eabcf3392320a5dd434e542b68e705d5cd9491499af589812f1",
    "random/men": "ede6d08c6877f99cd3770f7d09e26c738e6aa6de4445ccccfb1356ba5d06b1eb",
    "random/women": "e65f3bd3beb17664fa69cc129bf7bf852a775f8ffa630506e505fc905315bb34",
    "bts/all": "0ad874e4dbf6902f0845dd478ad8dde5ef6903583d3ffaace78411bdad064106",
    "bts/men": "db6d1f7ed2d591ba521533e45286d4c1fba7fe57a8ad2e80342210335f43c527",
    "bts/women": "e5d1b49a39b608585a2f3014a3f54970430cd37a495c1b73fceb85cdf428a5b8",
}
"""Policy and campaign -> hash of its log."""
CONTEXT_SHA256 = {
    "random/all": "eba04cc23d5f130a93ff174c5392986882b94c3839433cb8143870eaa6221358",
    "random/men": "6d855c2b7e917d0448d71bbe62c023147495882c0fdc8c41e86fef86abf9fe09",
    "random/women": "b1ca4905f97703d196004f2ad4552c1e90c2afad8b50688d333b0d2dc0b33147",
}
"""Hash of the items' features of each campaign. The folders of the other policy hold the same with other codes."""
USER_FEATURES, ITEM_FEATURES = range(4), range(1, 4)
"""Numbers of the hashed features; the item's feature 0 is a real number."""


def logs_folder() -> Path:
    """The folder of the logs. Raises PanelError with the pip command when they are not installed."""
    spec = importlib.util.find_spec("obp")
    if spec is None or spec.origin is None:
        raise PanelError(f"the Open Bandit logs are not installed; to install them: pip install --no-deps {PACKAGE}")
    return Path(spec.origin).parent / "dataset" / "obd"


def _checked(name: str, file: str | None = None, pinned: dict[str, str] = SHA256) -> Path:
    path = logs_folder() / name / (file or f"{name.split('/')[1]}.csv")
    remedy = f"to install the pinned version: pip install --no-deps --force-reinstall {PACKAGE}"
    if not path.is_file():
        raise PanelError(f"{path} is missing; {remedy}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != pinned[name]:
        raise PanelError(f"{path} has sha256 {found}, expected {pinned[name]}; {remedy}")
    return path


def clicks() -> pd.DataFrame:
    """Impressions and clicks by policy, campaign, item and position, with the mean propensity of the rows.

    Columns: policy (random, bts), campaign (all, men, women), item, position (1 to 3), impressions, clicks, propensity
    (mean over the impressions of the logged probability of showing the item in the position).

    Raises:
        PanelError: the package is missing or its files are not the pinned ones.
    """
    parts = []
    for name in SHA256:
        policy, campaign = name.split("/")
        log = pd.read_csv(_checked(name), usecols=["item_id", "position", "click", "propensity_score"])
        cells = log.groupby(["item_id", "position"], as_index=False).agg(
            impressions=("click", "size"), clicks=("click", "sum"), propensity=("propensity_score", "mean")
        )
        parts.append(cells.rename(columns={"item_id": "item"}).assign(policy=policy, campaign=campaign))
    table = pd.concat(parts, ignore_index=True)
    table["propensity"] = table["propensity"].round(6)
    return table[["policy", "campaign", "item", "position", "impressions", "clicks", "propensity"]]


def decisions() -> pd.DataFrame:
    """Every impression of the six logs in the order of time: what ``data/open_bandit_decisions.parquet`` holds.

    Columns: policy, campaign, item, position (1 to 3), click, propensity (logged probability of showing the item in the
    position at that moment: the policy "bts" was learning, so its propensities change).

    Raises:
        PanelError: as ``clicks``.
    """
    parts = []
    for name in SHA256:
        policy, campaign = name.split("/")
        log = pd.read_csv(_checked(name), usecols=["timestamp", "item_id", "position", "click", "propensity_score"])
        if not log["timestamp"].is_monotonic_increasing:
            raise PanelError(f"the log {name} is not in the order of time")
        log = log.drop(columns="timestamp").rename(columns={"item_id": "item", "propensity_score": "propensity"})
        parts.append(log.assign(policy=policy, campaign=campaign))
    table = pd.concat(parts, ignore_index=True)
    small = {"policy": "category", "campaign": "category", "item": "uint8", "position": "uint8", "click": "uint8"}
    return table[["policy", "campaign", "item", "position", "click", "propensity"]].astype(small)


def impressions() -> pd.DataFrame:
    """Every impression with what was known of user and item: what ``data/open_bandit_impressions.parquet`` holds.

    Columns: policy, campaign, hour (0 to 167 from the beginning of the logged week; rows of a log are in the order of
    time), item, position (1 to 3), click, user_0 to user_3 (the rank of the hashed feature among all hashes of the six
    logs), history (clicks of the user on all items of the campaign, as the logs give them: on the first day it counts
    clicks that were not yet made, see ``data/open_bandit.md``), item_0 (a real feature of the item), item_1 to item_3
    (rank of the hashed feature over the three campaigns).

    Raises:
        PanelError: as ``clicks``.
    """
    users = [f"user_feature_{k}" for k in USER_FEATURES]
    items = [f"item_feature_{k}" for k in ITEM_FEATURES]
    contexts = [
        pd.read_csv(_checked(name, "item_context.csv", CONTEXT_SHA256), index_col=0).assign(campaign=name.split("/")[1])
        for name in CONTEXT_SHA256
    ]
    context = pd.concat(contexts).rename(columns={"item_id": "item", "item_feature_0": "item_0"})
    parts = []
    for name in SHA256:
        policy, campaign = name.split("/")
        log = pd.read_csv(_checked(name), index_col=0)
        time = pd.to_datetime(log["timestamp"], format="ISO8601")
        known = log[["item_id", "position", "click", *users]].rename(columns={"item_id": "item"})
        parts.append(
            known.assign(
                policy=policy,
                campaign=campaign,
                hour=(time - pd.Timestamp("2019-11-24", tz="UTC")) // pd.Timedelta(hours=1),
                history=log.filter(like="user-item_affinity_").sum(axis=1),
            )
        )
    table = pd.concat(parts, ignore_index=True).merge(context, on=["campaign", "item"], how="left", validate="m:1")
    small = {"policy": "category", "campaign": "category", "item_0": "float32"}
    for column in (*users, *items):
        table[column.replace("_feature", "")] = table[column].astype("category").cat.codes
    counted = ["hour", "item", "position", "click", *(f"user_{k}" for k in USER_FEATURES), "history"]
    hashed = [f"item_{k}" for k in ITEM_FEATURES]
    columns = ["policy", "campaign", *counted, "item_0", *hashed]
    return table[columns].astype(small | dict.fromkeys([*counted, *hashed], "uint8"))


def random_clicks(path: str | Path) -> pd.DataFrame:
    """What the random policy showed, from the committed table, as `read_clicks` wants it: item, position, impressions,
    clicks. An item is one of a campaign; items of different campaigns are different."""
    table = pd.read_csv(path)
    table = table[table["policy"] == "random"]
    item = table["campaign"] + " " + table["item"].astype(str)
    return table.assign(item=item)[["item", "position", "impressions", "clicks"]].reset_index(drop=True)
