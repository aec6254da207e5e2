"""The chapters as files: which there are, how a stored one looks, and the environment they are run in."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
KEPT = {"tags", "mystnb"}
"""Cell metadata that means something to the build; the rest is an editor's."""
LARGEST = 1_500_000
"""Bytes of a stored chapter: more would be slow to open, to review and to clone."""
IMAGES = ("image/png", "image/jpeg", "image/svg+xml")
LAX = {"nbval-ignore-output", "nbval-raises-exception", "raises-exception"}
"""Tags that relax the comparison with a fresh run. Each needs a comment line `# nbval: why` in its cell."""
FORBIDDEN = ("nbval-skip", "NBVAL_SKIP", "NBVAL_IGNORE_OUTPUT", "NBVAL_RAISES_EXCEPTION")


def chapters(root: Path = ROOT) -> list[Path]:
    """Every notebook of the book, in order of path."""
    found = (root / "chapters").rglob("*.ipynb")
    return sorted(p for p in found if ".ipynb_checkpoints" not in p.parts)


def reference_platform(system: str | None = None, machine: str | None = None) -> bool:
    """Whether stored outputs were made on this kind of machine (Linux, x86-64)."""
    system, machine = system or platform.system(), machine or platform.machine()
    return system == "Linux" and machine.lower() in {"x86_64", "amd64"}


def prepare_environment() -> None:
    """Give chapters the same surroundings in `make execute` and `make test`. A thread count already set is kept."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, os.environ.get("OMP_NUM_THREADS", "1"))
    os.environ.setdefault("PYTHONHASHSEED", "0")
    os.environ.pop("MPLBACKEND", None)  # the kernel's inline figures; any other value would hide them


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Keep sources, outputs, ids and the metadata in ``KEPT``; in place."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for position, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEPT})
        if "id" not in cell:
            cell.id = hashlib.sha256(f"{position}:{cell.source}".encode()).hexdigest()[:8]
    return notebook


def read(path: Path) -> nbformat.NotebookNode:
    """A stored chapter, as notebook format 4."""
    return nbformat.read(path, 4)


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What nbval would let pass: incomplete, unordered, unnormalised or inaccessible stored outputs."""
    found = []
    code = [c for c in notebook.cells if c.cell_type == "code"]
    counts = [c.execution_count for c in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"execution counts are {counts}, not 1 to {len(code)}: run `make execute`")
    ids = [c.get("id") for c in notebook.cells]
    if None in ids or len(set(ids)) != len(ids):
        found.append("cell ids are missing or repeated")
    if set(notebook.metadata) != {"kernelspec", "language_info"} or set(notebook.metadata.language_info) != {"name"}:
        found.append("notebook metadata is not normalised: run `make execute`")
    for cell in notebook.cells:
        if extra := set(cell.metadata) - KEPT:
            found.append(f"cell {cell.get('id')}: metadata {sorted(extra)} is not normalised: run `make execute`")
    for cell in code:
        found += [f"cell {cell.get('id')}: {problem}" for problem in _cell_problems(cell)]
    return found


def _cell_problems(cell: nbformat.NotebookNode) -> list[str]:
    found, tags = [], set(cell.metadata.get("tags", []))
    for word in FORBIDDEN:
        if word in tags or word in cell.source:
            found.append(f"{word} hides what the cell does")
    if tags & LAX and not re.search(r"^# nbval: \w.{9,}$", cell.source, re.M):
        found.append(f"tag {sorted(tags & LAX)} without a comment line `# nbval: why`")
    if cell.source.rstrip().endswith(";"):
        found.append("a trailing ; does not hide a value from nbval: assign it to _")
    shown = [o for o in cell.outputs if o.output_type in ("display_data", "execute_result")]
    if any(o.output_type == "error" for o in cell.outputs) and not tags & LAX:
        found.append("stores an error")
    if any(o.get("name") == "stderr" for o in cell.outputs):
        found.append("stores stderr")
    if any(mime in o.data for o in shown for mime in IMAGES):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if len(alt.split()) < 4:
            found.append(f"shows an image whose alternative text is {alt!r}: describe it in metadata mystnb.image.alt")
    return found
