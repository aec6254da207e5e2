"""What the benchmarks share: interleaved timing, the machine's limits, peak memory, and the result file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from ecomlib.environment import commit, distribution_version, processor

PEERS = {"higher": "higher", "torchopt": "torchopt", "metalearn": "parallel-metalearn"}
"""Module that a peer is imported as -> name of its distribution."""
SETTINGS = {"default": "none", "oneDNN": "bf16"}
"""Name of a setting -> ``torch.backends.mkldnn.matmul.fp32_precision``."""


@contextmanager
def matmul_setting(name: str):
    """Route float32 matrix products through oneDNN, or not.

    On a CPU with AVX-512 and without AMX the route multiplies in float32 whatever the value's name says, and faster
    than the default; every variant's gradient is compared with the reference under each setting, so a machine on which
    it loses precision stops the benchmark.
    """
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = SETTINGS[name]
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def clock(device: str) -> float:
    """Seconds: of process CPU time, so that other programs of the machine do not count, or on a GPU of wall time."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, device: str, least: float = 0.2
) -> dict[str, float]:
    """Median milliseconds of a call. In a round every variant runs in turn, for at least ``least`` seconds."""
    samples = {name: [] for name in variants}
    with tqdm(total=rounds * len(variants), unit="run", leave=False, desc="timing") as bar:
        for _ in range(rounds):
            for name, run in variants.items():
                calls, start = 0, clock(device)
                while calls == 0 or clock(device) - start < least:
                    run()
                    calls += 1
                samples[name].append(1e3 * (clock(device) - start) / calls)
                bar.update()
    return {name: statistics.median(times) for name, times in samples.items()}


def machine_limits(device: str, least: float) -> dict[str, float]:
    """Measured here and now: float32 matrix products in GFLOP/s under each setting, and memory bandwidth in GB/s."""
    a, b = (torch.randn(1024, 1024, device=device) for _ in range(2))
    result, limits = torch.empty_like(a), {}
    for name in SETTINGS if torch.device(device).type == "cpu" else ["default"]:
        with matmul_setting(name):
            milliseconds = interleaved({"mm": lambda: torch.mm(a, b, out=result)}, 3, device, least)["mm"]
        limits[f"GEMM GFLOP/s, {name}"] = 2 * 1024**3 / milliseconds / 1e6
    x, y = (torch.zeros(2**25, device=device) for _ in range(2))
    milliseconds = interleaved({"add": lambda: torch.add(x, 1.0, out=y)}, 3, device, least)["add"]
    limits["memory GB/s"] = 2 * x.numel() * 4 / milliseconds / 1e6
    return limits


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside the context that are alive, those that autograd keeps included, and their
    peak. What a kernel allocates for itself is not seen."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.storages = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        given = {t.untyped_storage() for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.storages and storage not in given:
                    self.storages.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


def peak_memory(run: Callable[[], object], device: str) -> float:
    """Largest sum of bytes that a call holds at once, above what was held before it, in MB."""
    if torch.device(device).type == "cpu":
        with LiveBytes() as held:
            run()
        return held.peak / 1e6
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def missing_peers() -> list[str]:
    """Distributions of ``PEERS`` that are not installed."""
    return [name for name in PEERS.values() if not distribution_version(name)]


def environment(benchmark: str, device: str, **settings: object) -> dict[str, object]:
    """Where and with what a result was measured."""
    packages = {name: distribution_version(name) for name in ("torch", "numpy", *PEERS.values())}
    hardware = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else processor()
    options = [Path(o).name if i and sys.argv[i] == "--json" else o for i, o in enumerate(sys.argv[1:])]
    return {
        "command": " ".join([f"python -m benchmarks.{benchmark}", *options]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware,
        "cores": os.cpu_count(),
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "clock": "process CPU time" if device == "cpu" else "wall time",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **packages,
        **settings,
    }


def conditions() -> dict[str, object]:
    """Time of day, and how many processes wanted a core in the last minute (Unix)."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"time": datetime.datetime.now().isoformat(timespec="seconds"), "load": load}


def write(path: Path | None, result: dict) -> None:
    """The result file, for a program to read."""
    if path:
        path.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")


def print_environment(environment: dict[str, object], limits: dict[str, float]) -> None:
    """One line each for the machine and its limits, and one that names the peers that are missing."""
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None))
    print(", ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    if missing := missing_peers():
        print(f"missing: {', '.join(missing)}. `pip install .[benchmarks]` adds them.")


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
