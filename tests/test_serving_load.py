"""The service under load: many clients over loopback, no error, nothing lost, every product as if it were alone. In the
extended suite; ``python -m benchmarks.serving`` has the figures."""

import asyncio
import json
import sqlite3

import httpx
import pytest
import torch

from benchmarks.serving import COST, LEARNERS, load, server, untrained
from ecomlib.serving import Engine, MemoryStore, Service

pytestmark = pytest.mark.extended
CLIENTS, SECONDS = 32, 10.0


@pytest.fixture(params=list(LEARNERS))
def run(request, tmp_path):
    """Folder of an untrained run, in the precision that is served."""
    torch.set_default_dtype(torch.float32)
    return untrained(LEARNERS[request.param], tmp_path / "run"), tmp_path / "run"


def test_many_clients_at_once(run, tmp_path):
    loaded, folder = run
    with server(folder, tmp_path / "serve.sqlite", "--support-episodes", "1") as address:
        found = asyncio.run(load(address, CLIENTS, SECONDS))
        health = httpx.get(f"{address}/health", trust_env=False).json()
    assert found["errors"] == 0, found["first error"]
    assert found["decide"]["calls"] >= 20 * CLIENTS and health["status"] == "ok"
    with sqlite3.connect(tmp_path / "serve.sqlite") as database:
        rows = database.execute("SELECT kind, task, body FROM records ORDER BY position").fetchall()
    kinds = [kind for kind, _, _ in rows]
    assert kinds.count("decision") == found["decide"]["calls"]
    assert kinds.count("feedback") == found["feedback"]["calls"]
    # Each product has lived through the days that it would have lived through alone.
    service = Service([Engine(loaded, support_episodes=1)], MemoryStore())
    names = sorted({task for _, task, _ in rows})[:10]
    for name in names:
        lines = [json.loads(body) for kind, task, body in rows if task == name and kind != "episode"]
        for line in lines:
            if "units" not in line:
                assert service.decide(name, COST) == line
            else:
                assert service.feedback(line["decision"], line["units"]) == line
