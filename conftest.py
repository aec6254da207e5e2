"""Pytest set-up: chapters are compared with a fresh run, images tolerantly; seconds per chapter are kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import sys
from collections import Counter
from pathlib import Path

import images
import matplotlib
import nbval.plugin as nbval
import pytest
from notebooks import ROOT, prepare_environment, reference_platform

# A size that was not refused fails its own test, before it takes all the memory there is and the process with it.
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, resource.getrlimit(resource.RLIMIT_DATA)[1]))
prepare_environment()  # before any kernel starts: they inherit it
matplotlib.use("Agg")  # of the tests' own figures; not by the environment, which kernels would inherit

RUN_TIMES = ROOT / "book" / "run_times.json"
SECONDS: dict[str, float] = {}

_compare, _run = nbval.IPyNbCell.compare_outputs, nbval.IPyNbCell.runtest


def _compare_with_images(self, test, ref, skip_compare=None):
    """nbval skips shown images and compares glued ones byte for byte: compare both by how they look."""
    skip = tuple(skip_compare or self.parent.skip_compare) + images.MIMES
    if not _compare(self, test, ref, skip):
        return False
    if problem := images.difference(ref, test):
        self.comparison_traceback.append(problem)
    return problem is None


def _run_and_say_where(self):
    """Elsewhere than on the reference platform a difference is expected, and reported as such; an error never is."""
    try:
        _run(self)
    except nbval.NbCellError as error:
        if str(error) != "Cell outputs differ" or reference_platform():
            raise
        here = f"{platform.system()} {platform.machine()}"
        pytest.xfail(f"outputs differ here ({here}); the reference platform is Linux x86-64")


nbval.IPyNbCell.compare_outputs = _compare_with_images
nbval.IPyNbCell.runtest = _run_and_say_where


@pytest.fixture(autouse=True)
def _same_luck_in_any_order():
    """A test that forgets to bring its own generator still repeats itself, whatever ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--record-run-times", action="store_true", help="write seconds per chapter to book/run_times.json")


def pytest_runtest_logreport(report):
    """Sum what each chapter took: starting its kernel, running its cells, comparing their outputs."""
    path = report.nodeid.split("::")[0]
    if path.endswith(".ipynb"):
        name = Path(path).with_suffix("").as_posix()
        SECONDS[name] = SECONDS.get(name, 0.0) + report.duration


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
    if not SECONDS:
        return
    times = ", ".join(f"{Path(name).name} {seconds:.0f}" for name, seconds in sorted(SECONDS.items()))
    terminalreporter.write_line(f"seconds a chapter took: {times}")
    if config.getoption("--record-run-times"):
        if exitstatus != 0:
            terminalreporter.write_line("run times are not recorded: the chapters did not all pass")
            return
        RUN_TIMES.write_text(json.dumps(_record(), indent=1) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"recorded in {RUN_TIMES.relative_to(ROOT)}")


def _record() -> dict:
    from importlib.metadata import version

    from ecomlib.environment import processor

    packages = ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch", "numpy", "pandas", "matplotlib"))
    environment = {
        "Date": datetime.date.today().isoformat(),
        "Processor": processor(),
        "System": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "Packages": packages,
        "Threads": f"{os.environ['OMP_NUM_THREADS']} per chapter, {os.cpu_count()} processors in the machine",
    }
    return {"environment": environment, "seconds": {k: round(v, 1) for k, v in sorted(SECONDS.items())}}
