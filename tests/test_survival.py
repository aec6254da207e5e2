"""Training that is killed and resumed ends with the files of a run that was not: real processes and real signals."""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from notebooks import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ecomlib.__main__ import main
from ecomlib.config_files import read_config
from ecomlib.configuration import DataSettings, PolicySettings, default_config
from ecomlib.families import LogitPricing
from ecomlib.learners import MAML
from ecomlib.runs import Run, load_run
from ecomlib.training import Interrupted, Training, train

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
def kill_and_resume(
    path: Path, flags: list[str], rows_between: list[tuple[int, int]], luck: random.Random
) -> list[int]:
    """Train with a kill -9 at a random moment within each range of rows of metrics (less than 0: at random in the first
    seconds); how many rows there were at each."""
    targets = [luck.randint(low, high) for low, high in rows_between]
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
LONG_BATCH = [*SMALL, "--seeds", "2", "--iterations", "150", "--checkpoint-every", "7"]
ONE_BY_ONE = [*SMALL, "--seeds", "2", "--iterations", "15", "--checkpoint-every", "2", "--seeds-at-once", "1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What the runs below end with if nothing happens to them."""
    result = {}
    for name, flags in (("batch", BATCH), ("long batch", LONG_BATCH), ("one by one", ONE_BY_ONE)):
        path = tmp_path_factory.mktemp("whole") / "run"
        status, _, err = finish(start(path, *flags))
        assert status == 0, err
        result[name] = outcome(path)
    return result


@pytest.mark.parametrize(
    "name, flags, moments",
    [
        ("long batch", LONG_BATCH, [(-1, -1), (2, 100), (101, 200)]),  # while it starts, trains, and near the end
        ("one by one", ONE_BY_ONE, [(1, 14), (16, 28)]),  # in the first seed and in the second
    ],
)
def test_killed_five_times_at_random(tmp_path, uninterrupted, name, flags, moments):
    seen = kill_and_resume(tmp_path / "run", flags, moments, random.Random(4))
    assert any(0 < n < moments[-1][1] for n in seen)  # it was hit while it trained, not only before or after
    assert outcome(tmp_path / "run") == uninterrupted[name]


@pytest.mark.extended
@pytest.mark.parametrize("chain", range(20))
def test_killed_a_hundred_times_at_random(tmp_path, uninterrupted, chain):
    name, flags, total = [("long batch", LONG_BATCH, 300), ("one by one", ONE_BY_ONE, 30)][chain % 2]
    luck = random.Random(100 + chain)
    moments = sorted(luck.randint(-total // 5, total) for _ in range(5))
    kill_and_resume(tmp_path / "run", flags, [(m, m) for m in moments], luck)
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


def fork(function, err: Path | None = None) -> int:
    """Run ``function`` in a copy of this process, which ends with the status that it returns; its number."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            if err is not None:
                os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)
            status = function() or 0
        finally:
            os._exit(status)
    CHILDREN.append(pid)
    return pid


CHILDREN: list[int] = []


@pytest.fixture(autouse=True)
def no_child_is_left():
    yield
    for pid in CHILDREN:  # those that have not ended, stopped ones too
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    CHILDREN.clear()


def ended(pid: int, seconds: float = 60) -> int | None:
    """Exit status of a child, or minus the signal that ended it; None if it has not ended in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            CHILDREN.remove(pid)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.001)


@needs_fork
@pytest.mark.parametrize("seeds_at_once, iterations", [(None, 3), (1, 2)])
def test_killed_at_every_step_of_writing(tmp_path, seeds_at_once, iterations):
    """A process that dies at the n-th step of writing, for every n, loses nothing that the next cannot compute."""
    config = small(seeds_at_once=seeds_at_once, iterations=iterations, keep=1)
    train(config, tmp_path / "whole", progress=False)
    expected = outcome(tmp_path / "whole")
    assert sum("iteration-" in name for name in expected["files"]) <= 2 * len(config.groups)  # the last and the best
    for fatal in itertools.count():
        path = tmp_path / f"killed-{fatal}"

        def doomed(path=path, fatal=fatal):
            Steps(fatal).install()
            train(config, path, progress=False)

        if (status := ended(fork(doomed))) == 0:
            break  # it has fewer steps
        assert status == -signal.SIGKILL
        resume = (path / "config.toml").exists()
        train(None if resume else config, path, resume=resume, progress=False)
        assert outcome(path) == expected, f"killed at step {fatal}"
    assert fatal > 40
    assert outcome(path) == expected


# ------------------------------------------------------------------------------------------ signals
def test_ctrl_c_saves_and_the_command_that_it_prints_goes_on(tmp_path, uninterrupted):
    path = tmp_path / "run"
    process = start(path, *BATCH)
    wait_for(lambda: len(rows(path)) >= 10)
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130, err
    message = err.splitlines()[-1]
    done = int(re.search(r"stopped after iteration (\d+); saved", message)[1])
    assert len(rows(path)) == 2 * done < 60  # nothing is lost, not even what came after the last checkpoint due
    command = message.split("Go on with: python ")[1]
    again = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f" {done}/30" in again.stderr  # the progress bar begins there
    assert outcome(path) == uninterrupted["batch"]


def command(path: Path, *flags: str):
    """``python -m ecomlib train`` without the seconds it takes to start."""
    return lambda: main(["train", "pricing", "--run", str(path), *flags])


@needs_fork
@pytest.mark.parametrize("name, flags", [("batch", BATCH), ("one by one", ONE_BY_ONE)])
def test_sigterm_saves(tmp_path, uninterrupted, name, flags):
    path, err = tmp_path / "run", tmp_path / "err"
    child = fork(command(path, *flags), err)
    wait_for(lambda: len(rows(path)) >= 17)  # of one by one, in the second seed
    os.kill(child, signal.SIGTERM)
    assert ended(child) == 130
    assert f"--run {path} --resume" in err.read_text().splitlines()[-1]
    assert ended(fork(command(path, "--resume"))) == 0
    assert outcome(path) == uninterrupted[name]


@needs_fork
@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background job"])
def test_the_second_ctrl_c_stops_at_once(tmp_path, before):
    path, err = tmp_path / "run", tmp_path / "err"

    def slow():
        signal.signal(signal.SIGINT, before)
        objective = MAML.objective

        def wait_at_the_fourth(self, source, meta, seed, iteration):
            if iteration == 3:
                (tmp_path / "there").touch()
                time.sleep(60)
            return objective(self, source, meta, seed, iteration)

        MAML.objective = wait_at_the_fourth
        return main(["train", "pricing", "--run", str(path), *BATCH])

    child = fork(slow, err)
    wait_for((tmp_path / "there").exists)
    os.kill(child, signal.SIGINT)
    assert ended(child, 0.5) is None  # it would like to finish the iteration
    os.kill(child, signal.SIGINT)
    assert ended(child, 30) == 130
    assert "stopped at once; saved is the last checkpoint" in err.read_text()
    saved = (path / "checkpoints" / "seeds-0-1").glob("*.safetensors")
    assert [p.name for p in saved] == ["iteration-000003.safetensors"]


@pytest.mark.extended
def test_ctrl_c_under_torchrun_saves_too(tmp_path):
    """The terminal sends it to all processes; none leaves the others in the middle of an iteration."""
    path = tmp_path / "run"
    launch = "-m torch.distributed.run --nproc-per-node 2 --standalone -m ecomlib -- train pricing".split()
    flags = [*SMALL, "--seeds", "2", "--iterations", "100000", "--checkpoint-every", "50000"]
    group = subprocess.Popen(
        [sys.executable, *launch, "--run", str(path), *flags], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(rows(path)) >= 10)
    os.killpg(group.pid, signal.SIGINT)
    _, err = group.communicate(timeout=60)
    done = int(re.search(r"stopped after iteration (\d+); saved. Go on with: python -m ecomlib train pricing", err)[1])
    assert load_run(path).iteration == done and len(rows(path)) == 2 * done


def test_ctrl_c_at_the_end_of_a_seed_does_not_begin_the_next(tmp_path, monkeypatch):
    config, after = small(seeds_at_once=1), Training._after_iteration

    def signal_at_the_last(self, state):
        if state.iteration == config.iterations:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # the handler runs
        after(self, state)

    monkeypatch.setattr(Training, "_after_iteration", signal_at_the_last)
    with pytest.raises(Interrupted, match="saved"):
        train(config, tmp_path / "run", progress=False)
    assert {row["seed"] for row in rows(tmp_path / "run")} == {0}


# ------------------------------------------------------------------------------------------ one process at a time
@needs_fork
def test_a_run_in_use_is_refused_until_its_process_is_gone(tmp_path, uninterrupted):
    path, err = tmp_path / "run", tmp_path / "err"
    child = fork(command(path, *BATCH), tmp_path / "first")
    wait_for(lambda: len(rows(path)) >= 4)
    os.kill(child, signal.SIGSTOP)  # it is there and holds the folder
    assert ended(fork(command(path, "--resume"), err)) == 2
    assert err.read_text() == f"error: {path} is in use by another process: wait for it, or name another folder\n"
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    assert ended(fork(command(path, "--resume"), err)) == 0
    assert outcome(path) == uninterrupted["batch"]


@needs_fork
def test_of_two_that_begin_together_one_trains(tmp_path):
    path = tmp_path / "run"
    children = [fork(command(path, *BATCH, "--inner.lr", lr), tmp_path / lr) for lr in ("1.0", "2.0")]
    statuses = [ended(child) for child in children]
    assert sorted(statuses) == [0, 2]
    winner = ("1.0", "2.0")[statuses.index(0)]
    assert read_config(path / "config.toml").inner.lr == float(winner)


# ------------------------------------------------------------------------------------------ no room
@needs_fork
def test_a_file_that_cannot_grow_is_reported_and_the_run_goes_on_when_it_can(tmp_path, uninterrupted):
    path, err = tmp_path / "run", tmp_path / "err"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, resource.RLIM_INFINITY))
        return main(["train", "pricing", "--run", str(path), *BATCH])

    assert ended(fork(limited, err)) == 2
    text = err.read_text()
    assert "THE RESULT IS NOT SAVED" in text.splitlines()[-1] and "--resume" in text.splitlines()[-1]
    warnings = [line for line in text.splitlines() if "warning: iteration" in line]
    assert 2 <= len(warnings) <= 5, text  # the first at once, then rarer and rarer
    assert "File too large" in warnings[0] and "make room" in warnings[0]
    saved = Run.open(path).checkpoints((0, 1)).load().iteration
    assert 0 < saved < 30 and len(rows(path)) >= 2 * saved  # what was saved before stands
    assert ended(fork(command(path, "--resume"), err)) == 0
    assert outcome(path) == uninterrupted["batch"]


# ------------------------------------------------------------------------------------------ divergence
WILD = [*SMALL, "--policy.hidden", "64", "--iterations", "9", "--outer.lr", "3e37", "--outer.epochs", "1"]


@needs_fork
def test_divergence_names_the_last_good_checkpoint(tmp_path):
    path, err = tmp_path / "run", tmp_path / "err"
    assert ended(fork(command(path, *WILD, "--checkpoint-every", "1"), err)) == 1
    message = err.read_text().splitlines()[-1]
    assert message.startswith("diverged: PPO-MAML, iteration ") and "is not finite" in message
    named = Path(re.search(r"the last good checkpoint is (\S+)", message)[1])
    last = load_run(path)
    assert named.exists() and named.name == f"iteration-{last.iteration:06d}.safetensors"
    assert all(p.isfinite().all() for p in last.meta)


@needs_fork
def test_divergence_before_the_first_checkpoint_says_so(tmp_path):
    path, err = tmp_path / "run", tmp_path / "err"
    assert ended(fork(command(path, *WILD, "--checkpoint-every", "9"), err)) == 1
    assert "no checkpoint yet" in err.read_text().splitlines()[-1]


@needs_fork
def test_a_step_size_that_its_precision_cannot_hold_is_divergence(tmp_path):
    path, err = tmp_path / "run", tmp_path / "err"
    assert ended(fork(command(path, *SMALL, "--outer.lr", "1e38"), err)) == 1
    assert "diverged: a step size is too large for float32" in err.read_text().splitlines()[-1]
