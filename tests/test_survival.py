"""Training that is killed and resumed ends with the files of a run that was not: real processes and real signals."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from notebooks import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ecomlib.configuration import DataSettings, PolicySettings, default_config
from ecomlib.families import LogitPricing
from ecomlib.training import train

SMALL = "--data.tasks 2 --data.episodes 2 --family.days 3 --policy.hidden 4".split()
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")


def small(**changes):
    data, family = DataSettings(2, 2, advantage="same_step"), LogitPricing(days=3)
    policy = PolicySettings(hidden=(4,), inputs=(0, 2))
    config = replace(default_config("pricing", "ppo-maml"), data=data, family=family, policy=policy)
    return replace(config, **{"iterations": 3, "checkpoint_every": 1, "keep": 2, "seeds": 2, **changes})


def start(path: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ecomlib", "train", "pricing", "--run", str(path), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def rows(path: Path) -> list[dict]:
    """Complete lines of the metrics."""
    file = path / "metrics.jsonl"
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []


def outcome(path: Path) -> dict:
    """All that a run computes: bytes of its files, its metrics but for the time they took, and its curves."""
    vary = ("metrics.jsonl", "environment.json")
    there = [p for p in path.rglob("*") if p.is_file() and "tensorboard" not in p.parts and p.name not in vary]
    files = {str(p.relative_to(path)): p.read_bytes() for p in there}
    metrics = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(path)]
    return {"files": files, "metrics": metrics, "curves": curves(path)}


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    result = {}
    for folder in sorted((path / "tensorboard").iterdir()):
        events = EventAccumulator(str(folder)).Reload()
        result[folder.name] = [(e.step, e.value) for e in events.Scalars("score")]
    return result


# ------------------------------------------------------------------------------------------------ random moments
def kill_and_resume(path: Path, flags: list[str], total: int, kills: int, luck: random.Random) -> list[int]:
    """Train with ``kills`` kills -9, spread over the life of a run of ``total`` rows of metrics; how many rows there
    were at each."""
    # Before anything is written, while it is, and at the end; then each at a moment of its own.
    targets = sorted(luck.randint(-total // (kills + 1), total) for _ in range(kills))
    seen = []
    for target in targets:
        begun = (path / "config.toml").exists()
        process = start(path, *(["--resume"] if begun else flags))
        if target < 0:
            time.sleep(luck.uniform(0, 3))
        while process.poll() is None and len(rows(path)) < target:
            time.sleep(0.001)
        time.sleep(luck.uniform(0, 0.03))
        process.kill()
        finish(process)
        seen.append(len(rows(path)))
    begun = (path / "config.toml").exists()
    status, _, err = finish(start(path, *(["--resume"] if begun else flags)))
    assert status == 0, err
    return seen


BATCH = [*SMALL, "--seeds", "2", "--iterations", "30", "--checkpoint-every", "3"]
ONE_BY_ONE = [*SMALL, "--seeds", "2", "--iterations", "15", "--checkpoint-every", "2", "--seeds-at-once", "1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What the runs below end with if nothing happens to them."""
    result = {}
    for name, flags in (("batch", BATCH), ("one by one", ONE_BY_ONE)):
        path = tmp_path_factory.mktemp("whole") / "run"
        status, _, err = finish(start(path, *flags))
        assert status == 0, err
        result[name] = outcome(path)
    return result


@pytest.mark.parametrize("name, flags, total, kills", [("batch", BATCH, 60, 3), ("one by one", ONE_BY_ONE, 30, 2)])
def test_killed_five_times_at_random(tmp_path, uninterrupted, name, flags, total, kills):
    seen = kill_and_resume(tmp_path / "run", flags, total, kills, random.Random(kills))
    assert any(0 < n < total for n in seen)  # it was hit while it trained, not only before or after
    assert outcome(tmp_path / "run") == uninterrupted[name]


@pytest.mark.extended
@pytest.mark.parametrize("chain", range(20))
def test_killed_a_hundred_times_at_random(tmp_path, uninterrupted, chain):
    name, flags, total = [("batch", BATCH, 60), ("one by one", ONE_BY_ONE, 30)][chain % 2]
    kill_and_resume(tmp_path / "run", flags, total, 5, random.Random(100 + chain))
    assert outcome(tmp_path / "run") == uninterrupted[name]


# ------------------------------------------------------------------------------------------ every step of a writer
class Steps:
    """Counts the steps by which files change, and kills this very process before step ``fatal``, or half-way through
    it where it writes."""

    def __init__(self, fatal: float = float("inf")):
        self.fatal, self.count = fatal, 0

    def step(self) -> None:
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def before(self, function):
        def counted(*arguments, **options):
            self.step()
            return function(*arguments, **options)

        return counted

    def install(self) -> None:
        """Only in a process that ends soon."""
        for name in ("fsync", "replace", "unlink", "mkdir", "truncate"):
            setattr(os, name, self.before(getattr(os, name)))
        opened = Path.open

        def open_counted(path, mode="r", *arguments, **options):
            if mode[0] not in "wax":
                return opened(path, mode, *arguments, **options)
            self.step()
            file = opened(path, mode, 0)  # unbuffered, so that half of what is written is on disk
            return Writer(file, self)

        Path.open = open_counted


class Writer:
    def __init__(self, file, steps):
        self.file, self.steps = file, steps

    def write(self, data) -> int:
        half = len(data) // 2
        self.file.write(data[:half])
        self.steps.step()
        return half + self.file.write(data[half:])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def in_child(function) -> int:
    """Run ``function`` in a copy of this process; its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            function()
            status = 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@needs_fork
@pytest.mark.parametrize("seeds_at_once", [None, 1])
def test_killed_at_every_step_of_writing(tmp_path, seeds_at_once):
    """A process that dies at the n-th step of writing, for every n, loses nothing that the next cannot compute."""
    config = small(seeds_at_once=seeds_at_once, iterations=2)
    train(config, tmp_path / "whole", progress=False)
    expected = outcome(tmp_path / "whole")
    for fatal in itertools.count():
        path = tmp_path / f"killed-{fatal}"

        def doomed(path=path, fatal=fatal):
            Steps(fatal).install()
            train(config, path, progress=False)

        if (status := in_child(doomed)) == 0:
            break  # it has fewer steps
        assert status == -signal.SIGKILL
        resume = (path / "config.toml").exists()
        train(None if resume else config, path, resume=resume, progress=False)
        assert outcome(path) == expected, f"killed at step {fatal}"
    assert fatal > 40
    assert outcome(path) == expected
