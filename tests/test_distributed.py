"""Two real processes under torchrun: the numbers of one, and training that goes on after one of them is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ecomlib.runs import load_run

TINY = "--dtype float64 --data.tasks 4 --data.episodes 3 --family.days 5 --checkpoint-every 2".split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(run: Path, algorithm: str, *flags: str, processes: int = 1, restarts: int = 0) -> list[str]:
    train = ["train", "pricing", "--algorithm", algorithm, "--run", str(run), *TINY, *flags]
    if processes == 1:
        return [sys.executable, "-m", "ecomlib", *train]
    launch = f"torch.distributed.run --nproc-per-node {processes} --max-restarts {restarts} --standalone".split()
    # torchrun on Python 3.11 takes --run for its own --run-path unless -- ends its options.
    return [sys.executable, "-m", *launch, "-m", "ecomlib", "--", *train]


def parameters(run: Path, seed: int) -> list[torch.Tensor]:
    return load_run(run, seed).meta


# On so few episodes the Fisher matrix is nearly singular: ten steps of conjugate gradient magnify the rounding of
# another order of summation to a few per cent of the parameters, three do not.
@pytest.mark.parametrize(
    "algorithm, flags",
    [
        ("meta-sgd", ("--seeds", "2")),
        ("trpo-maml", ("--outer.trust.cg-iterations", "3", "--outer.trust.damping", "0.1")),
    ],
)
def test_two_processes_give_the_numbers_of_one(tmp_path, algorithm, flags):
    flags = (*flags, "--iterations", "3")
    for name, processes in (("one", 1), ("two", 2)):
        done = subprocess.run(command(tmp_path / name, algorithm, *flags, processes=processes), env=ENVIRONMENT,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
    for seed in range(2 if "--seeds" in flags else 1):
        for one, two in zip(parameters(tmp_path / "one", seed), parameters(tmp_path / "two", seed), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)
    assert "Error" not in done.stderr


def test_training_ends_right_after_a_rank_is_killed(tmp_path):
    """torchrun starts the group again, which goes on from the last checkpoint: the same files as without the kill."""
    flags = ("--iterations", "40")
    calm = subprocess.run(command(tmp_path / "calm", "ppo-maml", *flags, processes=2), env=ENVIRONMENT, timeout=120)
    assert calm.returncode == 0
    run, victim = tmp_path / "killed", None
    with subprocess.Popen(
        command(run, "ppo-maml", *flags, processes=2, restarts=1), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as group:
        deadline = time.monotonic() + 120
        while victim is None and time.monotonic() < deadline:
            if (run / "checkpoints" / "seed-0" / "index.json").exists():
                children = psutil.Process(group.pid).children()
                victim = next(p for p in children if p.environ().get("RANK") == "1")
                victim.kill()
            time.sleep(0.005)
        messages = group.communicate(timeout=120)[1]
    assert victim is not None, "no checkpoint appeared"
    assert group.returncode == 0, messages
    starts = (run / "environment.json").read_text().count('"resumed": ')
    assert starts == 2, "the group was not started again"
    for name in ("iteration-000040.safetensors", "iteration-000036.safetensors"):
        folder = Path("checkpoints") / "seed-0" / name
        assert (run / folder).read_bytes() == (tmp_path / "calm" / folder).read_bytes()
