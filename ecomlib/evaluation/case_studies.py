"""What ``benchmarks.case_studies`` found on one task family, as tables: classical policies, meta-learners and learners
without meta-learning on the same tasks with the same luck (part "Cases" of the book).

A trial is E rounds of N units (stores, campaigns, shoppers of one kind) of the same task. A score is a ratio of means
over tasks (``normalised_score``); that of the lifetime is of what all rounds earned together, learning included. The
format of the file is described in ``benchmarks/results/README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

KINDS = ("reference", "classical", "no meta", "meta")
"""reference: blind and random. classical: estimates or counts, with what a practitioner knows. no meta: policy
gradients whose starting point was not learned for adapting. meta: it was."""
CASE_FORMAT = "ecomlib case study"


@dataclass(frozen=True)
class CaseStudy:
    """A result file. Every table is long: one row a method, or a method and a round.

    Columns ``low`` and ``high`` are the ends of the 95 % interval that ``over`` names: "seeds" (Student, over training
    seeds) for what was trained, "tasks" (jackknife) for what was not. All tables also have ``seeds_low``,
    ``seeds_high``, ``tasks_low``, ``tasks_high``; what does not exist is nan.
    """

    family: str
    """Name on the command line."""
    protocol: dict[str, Any]
    """What all parts share: rounds, units, splits, tasks, luck, pace of drift, training seeds."""
    parts: dict[str, dict[str, Any]]
    """As in the file; each has its own ``provenance``."""

    def by_round(
        self, split: str = "test", units: int = 5, methods: Sequence[str] | None = None, kind: str | None = None
    ) -> pd.DataFrame:
        """Columns method, kind, round (1, ..., E), score, low, high, over, ...; rows in the order of the file, or of
        ``methods``. ``KeyError`` names what is missing and what there is."""
        rows = []
        for entry in self._entries(split, units, methods, kind):
            for number, cell in enumerate(entry["rounds"], 1):
                rows.append(_names(entry) | {"round": number} | cell_of(cell))
        return table_of(rows)

    def lifetime(
        self, split: str = "test", units: int = 5, methods: Sequence[str] | None = None, kind: str | None = None
    ) -> pd.DataFrame:
        """Columns method, kind, score, low, high, over, ...: the whole trial, best first unless ``methods`` are
        given."""
        table = table_of([_names(e) | cell_of(e["lifetime"]) for e in self._entries(split, units, methods, kind)])
        return table if methods is not None else table.sort_values("score", ascending=False, ignore_index=True)

    def last_round(
        self, split: str = "test", units: int = 5, methods: Sequence[str] | None = None, kind: str | None = None
    ) -> pd.DataFrame:
        """As ``lifetime``, of the last round alone: what the learner has become."""
        table = table_of([_names(e) | cell_of(e["rounds"][-1]) for e in self._entries(split, units, methods, kind)])
        return table if methods is not None else table.sort_values("score", ascending=False, ignore_index=True)

    def difference(
        self, split: str = "test", units: int = 5, of: str = "lifetime", rival: str = "best"
    ) -> pd.DataFrame:
        """Columns method, kind, against, difference, low, high, over, ...: each trained method less a classical policy,
        paired by task and luck. ``of`` is "lifetime" or "last round". ``rival`` is "best", of all on training tasks, or
        "without the prior", of those that are not given it (they estimate one from logs of training tasks, or need
        none). ``over`` names the wider of the two intervals."""
        rows = []
        for part in self.parts.values():
            for entry in part.get("differences", []):
                if (entry["split"], entry["units"], entry["of"], entry["rival"]) == (split, units, of, rival):
                    cell = widest(cell_of(entry))
                    cell["difference"] = cell.pop("score")
                    rows.append(_names(entry) | {"against": entry["against"]} | cell)
        return table_of(rows)

    def best_classical(self, units: int = 5, split: str = "test", rival: str = "best") -> str:
        """Name of the classical policy with the best lifetime score on training tasks (on drifting ones for the split
        "drifting"): of all, or of those that are not given the prior (``rival`` "without the prior")."""
        listed = {"best": "best on drifting training tasks" if split == "drifting" else "best on training tasks"}
        return self._part("baselines")[listed.get(rival, "best without the prior")][str(units)]

    def best_meta(self, units: int = 5, of: str = "lifetime") -> str:
        """Name of the meta-learner with the best score on training tasks: of the "lifetime" or the "last round"."""
        rows = [r for r in self._part("runs")["training scores"] if r["units"] == units and r[of] is not None]
        if not rows:
            raise KeyError(f"no meta-learner with {units} units has a score on training tasks")
        return max(rows, key=lambda r: r[of])["method"]

    def sensitivity(self, split: str = "test", units: int = 5) -> pd.DataFrame:
        """Columns training_tasks (number of distinct tasks; inf: a new one every time), score, low, high, over, ... of
        the lifetime, and last_score, last_low, last_high of the last round."""
        rows = []
        for entry in self._part("training tasks")["scores"]:
            if (entry["split"], entry["units"]) == (split, units):
                count, last = entry["training tasks"], cell_of(entry["rounds"][-1])
                row = {"training_tasks": float("inf") if count is None else float(count)} | cell_of(entry["lifetime"])
                rows.append(row | {f"last_{name}": last[name] for name in ("score", "low", "high")})
        return table_of(rows)

    def tuned(self) -> pd.DataFrame:
        """Columns method, units, setting, value, score (lifetime on training tasks), chosen (bool): the grids."""
        rows = []
        for part in self.parts.values():
            for entry in part.get("tuned", []):
                for value, score in zip(entry["grid"], entry["training score"]):
                    row = {name: entry[name] for name in ("method", "units", "setting")}
                    rows.append(row | {"value": value, "score": score, "chosen": value == entry["chosen"]})
        return table_of(rows)

    def cost(self) -> pd.DataFrame:
        """Columns method, kind, units, training_seconds (processor, one seed's share), training_episodes (of one seed),
        adapting_1, adapting_1000, deciding_1, deciding_1000 (milliseconds for a batch of 1 and of 1,000 tasks: of a
        round's adaptation and of a decision)."""
        return table_of(self._part("cost")["costs"])

    def goal(self) -> dict[str, Any]:
        """Whether a meta-learner reached nine tenths of the gap in the last round, or beat the best classical policy
        over the lifetime; and the experiments that say why where neither holds."""
        return self._part("goal")

    def provenance(self, part: str) -> dict[str, Any]:
        """Command, commit, hardware, processor seconds of a part."""
        return self._part(part)["provenance"]

    def methods(self, split: str = "test", units: int = 5) -> dict[str, str]:
        """Method -> kind, of all methods with scores there."""
        return {e["method"]: e["kind"] for e in self._entries(split, units, None, None)}

    def _part(self, name: str) -> dict[str, Any]:
        if name not in self.parts:
            raise KeyError(f"no part {name!r} of {self.family}; there are {', '.join(self.parts)}")
        return self.parts[name]

    def _entries(self, split: str, units: int, methods: Sequence[str] | None, kind: str | None) -> list[dict[str, Any]]:
        found = {}
        for name, part in self.parts.items():
            if name != "training tasks":
                for e in part.get("scores", []):
                    if (e["split"], e["units"]) == (split, units) and kind in (None, e["kind"]):
                        found[e["method"]] = e
        if missing := [m for m in methods or () if m not in found]:
            raise KeyError(f"no {', '.join(missing)} on {split} with {units} units; there are {', '.join(found)}")
        return [found[m] for m in methods] if methods is not None else list(found.values())


def load_case(path: str | Path) -> CaseStudy:
    """Read a result file. ``ValueError`` where it is none."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if content.get("format") != CASE_FORMAT:
        raise ValueError(f"{path} is no {CASE_FORMAT}: its format is {content.get('format')!r}")
    return CaseStudy(content["family"], content["protocol"], content["parts"])


def _names(entry: dict[str, Any]) -> dict[str, str]:
    return {"method": entry["method"], "kind": entry["kind"]}


def cell_of(cell: dict[str, Any]) -> dict[str, Any]:
    """Columns of a score with intervals over "seeds" and over "tasks", as the files hold it."""
    nothing = float("nan")
    plain = lambda x: nothing if x is None else x
    row = {"score": plain(cell.get("score", cell.get("difference")))}
    for over in ("seeds", "tasks"):
        low, high = cell.get(over) or (nothing, nothing)
        row |= {f"{over}_low": plain(low), f"{over}_high": plain(high)}
    over = "seeds" if row["seeds_low"] == row["seeds_low"] else "tasks"
    return row | {"low": row[f"{over}_low"], "high": row[f"{over}_high"], "over": over}


def widest(cell: dict[str, Any]) -> dict[str, Any]:
    """The same columns with the wider of the two intervals as low and high."""
    wide = lambda over: cell[f"{over}_high"] - cell[f"{over}_low"]
    over = max([o for o in ("seeds", "tasks") if wide(o) == wide(o)], key=wide)
    return cell | {"low": cell[f"{over}_low"], "high": cell[f"{over}_high"], "over": over}


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table, the columns that all tables have first."""
    table = pd.DataFrame(rows)
    first = [
        c for c in ("method", "kind", "against", "round", "score", "difference", "low", "high", "over") if c in table
    ]
    return table[first + [c for c in table if c not in first]]
