"""Run chapters and store their outputs, normalised: python book/tools/execute.py [CHAPTER ...]

A chapter is named by its file name without the ending; none means all. Run twice, the second run changes nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from notebooks import ROOT, chapters, normalise, prepare_environment, read

CELL_TIMEOUT = 300
"""Seconds, as in the test."""


def execute(path: Path) -> None:
    """Run one notebook in its own folder and overwrite it with the result; a failing one stays as it was."""
    notebook = normalise(read(path))
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # a kernel warns on the terminal about its local connection
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    finished = path.with_suffix(".ipynb.new")
    nbformat.write(normalise(notebook), finished)
    finished.replace(path)


def main(names: list[str]) -> int:
    paths = chapters()
    if unknown := set(names) - {p.stem for p in paths}:
        print(f"error: no chapter {sorted(unknown)}; there are: {', '.join(p.stem for p in paths)}", file=sys.stderr)
        return 2
    prepare_environment()
    failed = 0
    for path in paths:
        if names and path.stem not in names:
            continue
        print(f"{path.relative_to(ROOT)} ...", end=" ", flush=True)
        start = time.perf_counter()
        try:
            execute(path)
        except (CellExecutionError, CellTimeoutError) as error:
            failed += 1
            print(f"failed\n{error}", flush=True)
        else:
            print(f"{time.perf_counter() - start:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
