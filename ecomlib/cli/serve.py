"""``python -m ecomlib serve``: a trained policy as a service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ..families.base import check, number, whole
from ..runs import load_run


@dataclass(frozen=True)
class ServeOptions:
    """Answer decisions over HTTP, adapt to feedback, and lose nothing in a restart."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, the oldest model first; the last one that the store has not seen answers. Name earlier ones too,
    so that their tasks can be answered and a rollback has where to go."""
    store: Path = Path("serve.sqlite")
    """SQLite file with the state of all tasks; created if it is not there."""
    host: str = "127.0.0.1"
    """Address to listen at. There are no users and no encryption here: put a proxy in front of anything but your own
    machine."""
    port: int = 8000
    """Port to listen at."""
    seed: int | None = None
    """Which training seed's policy; by default the first."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint."""
    steps: int | None = None
    """Inner steps of a task; by default as in training."""
    support_episodes: int | None = None
    """Episodes that each inner step learns from; by default as in training."""
    level: float = 0.01
    """Of the drift test in /health: chance of a false alarm at one look."""

    def __post_init__(self):
        check(self, "runs", lambda x: len(x) > 0, "at least one folder")
        check(self, "port", lambda x: whole(x, 1, 65_535), "a whole number from 1 to 65535")
        check(self, "steps", lambda x: x is None or whole(x, 0), "None or a whole number >= 0")
        check(self, "support_episodes", lambda x: x is None or whole(x, 1), "None or a whole number >= 1")
        check(self, "level", lambda x: number(x, 0, 1), "a number in (0, 1)")


def main(arguments: Sequence[str]) -> int:
    """Serve until interrupted."""
    options = tyro.cli(ServeOptions, args=list(arguments), prog="python -m ecomlib serve")
    try:
        import uvicorn

        from ..serving.app import create_app
    except ImportError as error:
        raise ValueError(f"{error}; serving needs the extra: pip install 'ecomlib[serve]'") from None
    from ..serving import Engine, Service, SQLiteStore

    torch.set_num_threads(1)  # a decision is a few small products: threads would only get in each other's way
    runs = [load_run(path, options.seed, options.checkpoint) for path in options.runs]
    engines = [Engine(run, options.steps, options.support_episodes) for run in runs]
    service = Service(engines, SQLiteStore(options.store), options.level)
    print(
        f"model {service.model} at http://{options.host}:{options.port} (documentation: /docs), store {options.store}"
    )
    uvicorn.run(create_app(service), host=options.host, port=options.port, log_level="warning")
    return 0
