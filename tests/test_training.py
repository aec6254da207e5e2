"""Training around the loop: full disks, curves, resuming in the same process, machines."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from notebooks import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ecomlib.configuration import OUTER, DataSettings, PolicySettings, default_config
from ecomlib.families import LogitPricing, PointNavigation
from ecomlib.runs import Run
from ecomlib.tracking import TensorBoard
from ecomlib.training import Interrupted, Machine, Training, train


def small(family="pricing", algorithm="ppo-maml", **changes):
    base = default_config(family, algorithm)
    tiny = {"pricing": LogitPricing(days=3), "navigation": PointNavigation(horizon=3), "shop": base.family}[family]
    data = replace(base.data, tasks=2, episodes=2, transitions=None)
    policy = replace(base.policy, hidden=(4,))
    if algorithm in ("rl2", "belief"):
        outer = replace(base.outer, tasks=2, replicas=2, hidden=4, episodes=2, minibatches=2)
        config = replace(base, family=tiny, outer=outer)
    else:
        config = replace(base, data=data, family=tiny, policy=policy)
    return replace(config, **{"iterations": 4, "checkpoint_every": 2, "keep": 2, **changes})


def outcome(path: Path) -> dict:
    vary = ("metrics.jsonl", "environment.json")
    there = [p for p in path.rglob("*") if p.is_file() and "tensorboard" not in p.parts and p.name not in vary]
    metrics = [{k: v for k, v in row.items() if k != "seconds"} for row in Run.open(path).metrics()]
    return {str(p.relative_to(path)): p.read_bytes() for p in there} | {"metrics": metrics, "curves": curves(path)}


def curves(path: Path, name: str = "return after 0 steps") -> dict[str, list[tuple[int, float]]]:
    result = {}
    for folder in sorted((path / "tensorboard").iterdir()):
        events = EventAccumulator(str(folder)).Reload()
        result[folder.name] = [(e.step, e.value) for e in events.Scalars(name)]
    return result


def stopped(config, path: Path, iteration: int, monkeypatch) -> None:
    """Train until the end of this iteration, then die without another word."""

    class Death(BaseException):
        pass

    after = Training._after_iteration

    def die(self, state):
        after(self, state)
        if state.iteration == iteration:
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_after_iteration", die)
        with pytest.raises(Death):
            train(config, path, progress=False)


# ------------------------------------------------------------------------------------------ resuming
@pytest.mark.parametrize("algorithm", OUTER)
@pytest.mark.parametrize("family", ["pricing", "shop", "navigation"])
def test_every_algorithm_resumes_bit_for_bit(tmp_path, monkeypatch, family, algorithm):
    config = small(family, algorithm, iterations=3)
    train(config, tmp_path / "whole", progress=False)
    stopped(config, tmp_path / "run", 2, monkeypatch)
    train(None, tmp_path / "run", resume=True, progress=False)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("iteration", range(1, 8))
def test_stopped_after_any_iteration_the_same_files_are_left(tmp_path, monkeypatch, iteration):
    """Ctrl-C saves out of turn: which checkpoints are kept, which is best and what they hold does not depend on it."""
    config = small(iterations=8, checkpoint_every=3, keep=1)
    train(config, tmp_path / "whole", progress=False)
    after = Training._after_iteration

    def interrupt(self, state):
        self.stopping = state.iteration == iteration
        after(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_after_iteration", interrupt)
        with pytest.raises(
            Interrupted, match=f"stopped after iteration {iteration}; saved. Go on with: python -m ecom"
        ):
            train(config, tmp_path / "run", progress=False)
    assert Run.open(tmp_path / "run").checkpoints((0,)).load().iteration == iteration
    train(None, tmp_path / "run", resume=True, progress=False)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(tmp_path):
    train(small(), tmp_path / "run", progress=False)
    before = outcome(tmp_path / "run")
    train(None, tmp_path / "run", resume=True, progress=False)
    assert outcome(tmp_path / "run") == before


def test_a_deleted_checkpoint_is_computed_again_and_said(tmp_path, capsys):
    train(small(), tmp_path / "run", progress=False)
    before = outcome(tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "seed-0" / "iteration-000004.safetensors"
    file.unlink()
    train(None, tmp_path / "run", resume=True, progress=False)
    assert f"note: {file} was deleted; going on from iteration 2" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == before


def test_the_callers_precision_is_left_alone(tmp_path):
    assert torch.get_default_dtype() == torch.float64
    train(small(dtype="float32"), tmp_path / "run", progress=False)
    assert torch.get_default_dtype() == torch.float64
    assert Run.open(tmp_path / "run").checkpoints((0,)).load().meta[0].dtype == torch.float32


# ------------------------------------------------------------------------------------------ full disks
class Disk:
    """A disk that is full for a while: whatever would make a file longer fails."""

    def __init__(self, monkeypatch):
        self.full, fsync, opened = False, os.fsync, Path.open

        def refuse_fsync(descriptor):
            self.check()
            fsync(descriptor)

        def refuse_to_open(path, mode="r", *arguments, **options):
            if mode[0] in "wax":
                self.check()
            return opened(path, mode, *arguments, **options)

        monkeypatch.setattr(os, "fsync", refuse_fsync)
        monkeypatch.setattr(Path, "open", refuse_to_open)

    def check(self):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


def full_between(monkeypatch, first: int, last: int) -> None:
    """The disk is full when iterations ``first`` to ``last`` end."""
    disk, after = Disk(monkeypatch), Training._after_iteration

    def at_the_end(self, state):
        disk.full = first <= state.iteration <= last
        after(self, state)

    monkeypatch.setattr(Training, "_after_iteration", at_the_end)


def test_training_goes_on_while_the_disk_is_full(tmp_path, monkeypatch, capsys):
    config = small(iterations=12, checkpoint_every=2, keep=9)
    train(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        full_between(patch, 3, 8)
        train(config, tmp_path / "run", progress=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: iteration 4 could not be saved (No space left on device); training goes on")
    assert [line.split(" could")[0] for line in lines[:-1]] == [f"warning: iteration {i}" for i in (4, 5, 7)]
    assert lines[-1] == "iteration 9 is saved, after 5 attempts that failed"
    saved, whole = (outcome(tmp_path / name) for name in ("run", "whole"))
    # The three that were due meanwhile are missing; the numbers are all there.
    entries = Run.open(tmp_path / "run").checkpoints((0,)).entries()
    assert [e.iteration for e in entries] == [2, 10, 12]
    assert saved["metrics"] == whole["metrics"] and saved["curves"] == whole["curves"]
    last = "checkpoints/seed-0/iteration-000012.safetensors"
    assert saved[last] == whole[last] and saved["result.json"] == whole["result.json"]


def test_a_disk_that_stays_full_ends_loudly_and_the_run_can_go_on(tmp_path, monkeypatch):
    config = small(iterations=6)
    train(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        full_between(patch, 3, 6)
        with pytest.raises(OSError, match=r"THE RESULT IS NOT SAVED in .*run \(No space left on device\).*--resume"):
            train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "result.json").exists()
    train(None, tmp_path / "run", resume=True, progress=False)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_stop_while_the_disk_is_full_does_not_say_saved(tmp_path, monkeypatch):
    full_between(monkeypatch, 3, 9)
    after = Training._after_iteration

    def stop_at_the_third(self, state):
        self.stopping = state.iteration == 3
        after(self, state)

    monkeypatch.setattr(Training, "_after_iteration", stop_at_the_third)
    with pytest.raises(Interrupted, match=r"after iteration 3; that could NOT be saved in .*\(No space left"):
        train(small(), tmp_path / "run", progress=False)


def test_half_a_row_is_taken_back(tmp_path, monkeypatch):
    """The disk fills up in the middle of a row: no torn line is left in front of the rows that are written later."""
    config = small(iterations=8)
    train(config, tmp_path / "whole", progress=False)
    opened = Path.open
    failures = iter([False, True, True, False, True])

    class Short:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if next(failures, False):
                self.file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    def open_short(path, mode="r", *arguments, **options):
        file = opened(path, mode, *arguments, **options)
        return Short(file) if path.name == "metrics.jsonl" and mode[0] == "a" else file

    monkeypatch.setattr(Path, "open", open_short)
    train(config, tmp_path / "run", progress=False)
    assert next(failures, None) is None
    assert outcome(tmp_path / "run")["metrics"] == outcome(tmp_path / "whole")["metrics"]


def test_too_little_room_is_refused_before_training(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(Training, "_meta_train", lambda *arguments: pytest.fail("it trained"))
    with pytest.raises(
        OSError, match=r"run: 1.0 MB are free and a run may need 2.0 MB: make room, name another folder"
    ):
        train(small(), tmp_path / "run", progress=False)


# ------------------------------------------------------------------------------------------ curves
def test_tensorboard_has_each_step_once(tmp_path, monkeypatch):
    config = small(iterations=7, seeds=2, checkpoint_every=3)
    stopped(config, tmp_path / "run", 5, monkeypatch)  # 4 and 5 come again
    train(None, tmp_path / "run", resume=True, progress=False)
    rows = Run.open(tmp_path / "run").metrics()
    for name in ("return after 1 steps", "oracle return", "seconds", "steps"):
        for seed in (0, 1):
            found = curves(tmp_path / "run", name)[f"seed-{seed}"]
            expected = [(r["iteration"], r[name]) for r in rows if r["seed"] == seed]
            assert [step for step, _ in found] == list(range(1, 8))
            if name != "seconds":  # what was killed took another time
                assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)
    assert len(list((tmp_path / "run" / "tensorboard" / "seed-0").iterdir())) == 2


def test_curves_that_cannot_be_written_wait(tmp_path, monkeypatch):
    """Half a record in a file must not hide what is written when there is room again."""
    board = TensorBoard(tmp_path / "tensorboard", [0], 0)
    board.log(0, 1, {"return after 0 steps": 1.0})
    board.flush()
    board.log(0, 2, {"return after 0 steps": 2.0})
    file, records = board.files[0]

    class Full:
        def write(self, event):
            file.write(b"half a record")
            raise OSError(errno.ENOSPC, "No space left on device")

    board.files[0] = file, Full()
    with pytest.raises(OSError):
        board.flush()
    board.log(0, 3, {"return after 0 steps": 3.0})
    board.close()
    assert curves(tmp_path)["seed-0"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_score_that_is_not_defined_is_left_out(tmp_path, monkeypatch):
    """With few tasks the oracle may gain nothing on those of an iteration."""
    monkeypatch.setattr(LogitPricing, "oracle_return", LogitPricing.blind_return)
    train(small(), tmp_path / "run", progress=False)
    assert [row["score"] for row in Run.open(tmp_path / "run").metrics()] == [None] * 4
    assert json.loads((tmp_path / "run" / "result.json").read_text())["training tasks"]["0"]["score"] is None
    assert [step for step, _ in curves(tmp_path / "run")["seed-0"]] == [1, 2, 3, 4]


def test_weights_and_biases_offline(tmp_path):
    """In a process of its own: the package keeps one of its own alive."""
    pytest.importorskip("wandb")
    path = tmp_path / "run"
    flags = "--data.tasks 2 --data.episodes 2 --family.days 3 --iterations 2 --track wandb".split()
    command = [sys.executable, "-m", "ecomlib", "train", "pricing", "--run", str(path), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    environment.pop("WANDB_MODE", None)
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    files = list((path / "wandb").rglob("*.wandb"))
    assert len(files) == 1 and b"return after 1 steps" in files[0].read_bytes()


# ------------------------------------------------------------------------------------------ machines
def test_a_run_goes_on_on_another_machine(tmp_path, monkeypatch):
    config = small(dtype="float64")
    train(config, tmp_path / "whole", progress=False)
    stopped(config, tmp_path / "run", 2, monkeypatch)
    train(None, tmp_path / "run", resume=True, machine=Machine("cpu", threads=2), progress=False)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert [s["threads"] for s in starts] == [1, 2] and [s["resumed"] for s in starts] == [False, True]
    for a, b in zip(*(Run.open(tmp_path / n).checkpoints((0,)).load().meta for n in ("run", "whole")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"Machine.device = 'cuda'; allowed: auto or cpu: this machine has no GPU"):
        Machine("cuda")


def test_seeds_one_by_one_are_those_of_a_batch(tmp_path):
    """To rounding; the files are for each group of seeds."""
    batch = train(small(seeds=3, dtype="float64"), tmp_path / "batch", progress=False)
    single = train(small(seeds=3, dtype="float64", seeds_at_once=2), tmp_path / "single", progress=False)
    assert single.config.groups == [(0, 1), (2,)]
    key = lambda row: (row["seed"], row["iteration"])
    for a, b in zip(sorted(batch.metrics(), key=key), sorted(single.metrics(), key=key), strict=True):
        same = [k for k in a if k != "seconds"]
        assert [a[k] for k in same] == pytest.approx([b[k] for k in same], rel=1e-9)


def test_small_is_what_it_says():
    """The settings of this file train in less than a blink, or the tests above take minutes."""
    config = small()
    assert isinstance(config.data, DataSettings) and isinstance(config.policy, PolicySettings)
    assert sum(p.numel() for p in config.learner().initial(torch.Generator().manual_seed(0))) < 100
