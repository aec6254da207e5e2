"""``python -m ecomlib export``: a trained policy as a file for another program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ..export import FORMATS, export_policy
from ..runs import load_run


@dataclass(frozen=True)
class ExportOptions:
    """Write a run's policy to a file that needs no ecomlib, adapted to one product where its days are given."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    task_data: Path | None = None
    """Table of one product's days to adapt to: day, price (or markup), units, unit_cost, and the price's probability
    where it is known. Without a table the policy before adaptation is exported. A recurrent policy takes none."""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx: for ONNX Runtime. torch: a torch.export program."""
    out: Path | None = None
    """File to write, .onnx or .pt2; by default policy.onnx or policy.pt2 in the run's folder. Its description has the
    ending .json."""
    seed: int | None = None
    """Which training seed's policy; by default the first."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint."""


def main(arguments: Sequence[str]) -> int:
    """Export, and say where the files are."""
    options = tyro.cli(ExportOptions, args=list(arguments), prog="python -m ecomlib export")
    run = load_run(options.run, options.seed, options.checkpoint)
    torch.set_default_dtype(getattr(torch, run.config.dtype))
    out = options.out or options.run / f"policy{FORMATS[options.format]}"
    description = export_policy(run, out, options.format, options.task_data)
    print(f"{out}: seed {run.seed}, iteration {run.iteration}; inputs and outputs are described in {description}")
    return 0
