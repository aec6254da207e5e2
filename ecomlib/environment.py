"""What produced a result: versions, hardware, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment(device: str) -> dict[str, Any]:
    """Everything besides the configuration that numbers and timings may depend on."""
    return {
        "command": " ".join(["python -m ecomlib", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(device),
        "cores": os.cpu_count(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: distribution_version(name) for name in ("ecomlib", "torch", "numpy")},
    }


def hardware(device: str) -> str:
    """Model name of the GPU or CPU."""
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else processor()


def processor() -> str:
    """Model name of the CPU."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def distribution_version(name: str) -> str | None:
    """The installed version, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this library's files, with "+" if some were changed since; None outside a git checkout."""
    folder = Path(__file__).parents[1]
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=folder)
    try:
        top, head = git("rev-parse", "--show-toplevel"), git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "-uno", "--", ".")
    except OSError:
        return None
    if head.returncode or Path(top.stdout.strip()) != folder:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
