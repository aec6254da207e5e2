"""What ``benchmarks.memory_learners`` found: learners with a memory on the families of the case studies, as tables
(chapters "Memory and belief" and "What meta-RL buys")."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from .case_studies import cell_of, table_of, widest

MEMORY_FORMAT = "ecomlib memory learners"


class MemoryStudies:
    """All stored results of a folder, FAMILY-LEARNER.json; a training that was not evaluated yet is left out.

    Columns ``low`` and ``high`` are the ends of the 95 % interval over training seeds; ``tasks_low`` and ``tasks_high``
    those over tasks. Raises ``ValueError`` naming the file where one is something else.
    """

    def __init__(self, folder: str | Path):
        self.files: dict[tuple[str, str], dict[str, Any]] = {}
        for path in sorted(Path(folder).glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("format") != MEMORY_FORMAT:
                raise ValueError(f"{path} is no {MEMORY_FORMAT}: its format is {content.get('format')!r}")
            if "result" in content:
                self.files[content["family"], content["learner"]] = content

    def lifetime(self, split: str = "test") -> pd.DataFrame:
        """Columns family, learner, method, score, low, high, over, ...: the whole trial."""
        return self._table("scores", split, lambda e: [({}, e["lifetime"])])

    def by_round(self, split: str = "test") -> pd.DataFrame:
        """As ``lifetime``, and round (1, ..., E)."""
        return self._table("scores", split, lambda e: [({"round": k}, r) for k, r in enumerate(e["rounds"], 1)])

    def difference(self, split: str = "test", of: str = "lifetime") -> pd.DataFrame:
        """Columns family, learner, method, rival ("greedy Bayes", "Thompson", "best"), against (its name), difference,
        low, high, over, ...: paired by task and luck, with the wider of the two intervals. ``of`` is "lifetime" or
        "last round"."""
        own = lambda e: [({"rival": e["rival"], "against": e["against"]}, e)] if e["of"] == of else []
        return self._table("differences", split, own, widest).rename(columns={"score": "difference"})

    def training_seconds(self) -> pd.Series:
        """Processor seconds of a seed, (family, learner) -> mean."""
        mean = lambda c: sum(s["processor seconds"] for s in c["seeds"].values()) / len(c["seeds"])
        return pd.Series({key: mean(content) for key, content in self.files.items()}, dtype=float)

    def _table(self, part: str, split: str, cells: Any, shown: Any = lambda cell: cell) -> pd.DataFrame:
        rows = []
        for (family, learner), content in self.files.items():
            for entry in content["result"][part]:
                if entry["split"] == split:
                    about = {"family": family, "learner": learner, "method": entry["method"]}
                    rows += [about | more | shown(cell_of(cell)) for more, cell in cells(entry)]
        return table_of(rows)
