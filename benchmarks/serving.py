"""How fast a decision is answered: gradient adaptation next to recurrent memory, in process and over HTTP.

    python -m benchmarks.serving --json benchmarks/results/serving.json
    python -m benchmarks.serving --quick                     # seconds, to see that it works; its numbers mean nothing

Two learners of ``ecomlib.configuration`` with their default networks for pricing: ``meta-sgd`` adapts by a gradient
step once, after its support episodes; ``recurrent-ppo`` has a memory that changes with every decision. Parameters are
those before training, which changes no time. In process, each call is timed by itself: the engine alone, then the
service with a store, in memory or an SQLite file, whose commit waits for the disk. Over HTTP, ``python -m ecomlib
serve`` runs in a process of its own, and C clients on loopback ask for decisions and send feedback without a pause,
each for products of its own; a time is from the request's first byte to the answer's last, and the client program takes
a share of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch import Generator

from benchmarks import measure
from ecomlib.configuration import default_config
from ecomlib.learners import MetaTraining
from ecomlib.runs import LoadedRun, Run, load_run
from ecomlib.serving import Engine, MemoryStore, Service, SQLiteStore, TaskStore

LEARNERS = {"gradient": "meta-sgd", "memory": "recurrent-ppo"}
COST = 1.3


def untrained(algorithm: str, folder: Path) -> LoadedRun:
    """A run's folder as training leaves it, its parameters those of iteration 0."""
    config = default_config("pricing", algorithm)
    meta = config.learner().initial(Generator().manual_seed(0))
    Run.create(folder, config).checkpoints((0,)).save(MetaTraining(0, meta, None, []))
    return load_run(folder)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, 99th percentile, and how many calls they are of."""
    p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1e3
    return {"p50 ms": float(p50), "p99 ms": float(p99), "calls": len(seconds)}


def sold(number: int) -> int:
    """Units of some day."""
    return 7 * number % 31


# ------------------------------------------------------------------------------------------------- in process
def engine_alone(engine: Engine, days: int) -> dict[str, dict[str, float]]:
    """Decisions, ordinary feedback and feedback that adapts, of one product after another, without a store."""
    seconds: dict[str, list[float]] = {"decide": [], "feedback": [], "adapt": []}
    lifetime = engine.family.days * (engine.support_episodes * engine.steps + 1)
    state = engine.begin("sku-0")
    for number in range(days):
        if number % lifetime == 0:
            state = engine.begin(f"sku-{number}")
        started = time.perf_counter()
        state, _ = engine.decide(state, COST)
        decided = time.perf_counter()
        state, feedback = engine.feedback(state, sold(number))
        ended = time.perf_counter()
        seconds["decide"].append(decided - started)
        seconds["adapt" if feedback.adapted else "feedback"].append(ended - decided)
    return {name: quantiles(values) for name, values in seconds.items() if values}


def with_store(engine: Engine, store: TaskStore, days: int, folder: Path, tasks: int = 50) -> dict[str, Any]:
    """The same through the service: read, decide, commit. Also bytes kept for a product, at most; and what a durable
    write of one page costs on this disk without any of our code, at the same time, since it varies by the minute."""
    service, page = Service([engine], store), os.open(folder / "page", os.O_WRONLY | os.O_CREAT)
    seconds: dict[str, list[float]] = {"decide": [], "feedback": [], "adapt": [], "one durable write": []}
    largest = 0
    for number in range(days):
        task = f"sku-{number % tasks}"
        started = time.perf_counter()
        decision = service.decide(task, COST)
        decided = time.perf_counter()
        feedback = service.feedback(decision["decision"], sold(number))
        ended = time.perf_counter()
        seconds["decide"].append(decided - started)
        seconds["adapt" if feedback["adapted"] else "feedback"].append(ended - decided)
        largest = max(largest, service.task(task)["bytes"])
        if number % 10 == 0:
            started = time.perf_counter()
            os.write(page, b"x" * 4096)
            getattr(os, "fdatasync", os.fsync)(page)  # as SQLite does
            seconds["one durable write"].append(time.perf_counter() - started)
    os.close(page)
    return {name: quantiles(values) for name, values in seconds.items() if values} | {"largest state bytes": largest}


# ------------------------------------------------------------------------------------------------- over HTTP
@contextmanager
def server(run: Path, store: Path, *arguments: str) -> Iterator[str]:
    """Address of ``python -m ecomlib serve`` in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "ecomlib", "serve", str(run), "--store", str(store), "--port", port, *arguments]
    address, process = f"http://127.0.0.1:{port}", subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            try:
                httpx.get(f"{address}/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait()


class Client:
    """One connection that is kept open, and nothing else: a full HTTP client would be slower than the server."""

    def __init__(self, address: str):
        self.host, port = address.removeprefix("http://").split(":")
        self.port = int(port)

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.writer.close()

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], float]:
        """Status, answer and seconds."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        started = time.perf_counter()
        self.writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        status, *headers = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in headers if line.startswith("content-length"))
        answer = await self.reader.readexactly(length)
        return int(status.split()[1]), json.loads(answer), time.perf_counter() - started


async def load(address: str, clients: int, seconds: float) -> dict[str, Any]:
    """``clients`` that decide and feed back in turn for so many seconds, each a new product every 28 days."""
    found: dict[str, list[float]] = {"/decide": [], "/feedback": []}
    errors, begun = [], time.perf_counter()

    async def sell(name: int) -> None:
        number = 0
        async with Client(address) as client:
            while time.perf_counter() - begun < seconds:
                body: dict[str, Any] = {"task": f"c{clients}-{name}-{number // 28}", "unit_cost": COST}
                for path in found:
                    status, answer, took = await client.post(path, body)
                    found[path].append(took)
                    if status != 200:
                        errors.append(str(answer))
                        break
                    body = {"decision": answer["decision"], "units": sold(number)}
                number += 1

    done = await asyncio.gather(*(sell(name) for name in range(clients)), return_exceptions=True)
    errors += [repr(error) for error in done if error is not None]
    elapsed = time.perf_counter() - begun
    return {
        "requests per second": sum(map(len, found.values())) / elapsed,
        "decide": quantiles(found["/decide"]),
        "feedback": quantiles(found["/feedback"]),
        "errors": len(errors),
        "first error": errors[0] if errors else None,
    }


# ------------------------------------------------------------------------------------------------- everything
def measured(algorithm: str, arguments: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """All numbers of one learner."""
    run = untrained(algorithm, folder / algorithm)
    engine = Engine(run)
    engine_alone(engine, 50)  # the first calls make torch load what it needs
    days = 300 if arguments.quick else 12_000
    result: dict[str, Any] = {
        "algorithm": algorithm,
        "support episodes": engine.support_episodes,
        "steps": engine.steps,
    }
    result["parameters"] = sum(p.numel() for p in engine.theta)
    say("engine alone")
    result["engine"] = engine_alone(engine, days)
    say("service, store in memory and on disk")
    early = Engine(run, support_episodes=1)  # products adapt within the run
    result["memory store"] = with_store(early, MemoryStore(), days // 4, folder)
    store = SQLiteStore(folder / f"{algorithm}.sqlite")
    result["sqlite"] = with_store(early, store, days // 4, folder)
    store.close()
    result["http"] = {}
    with server(folder / algorithm, folder / f"{algorithm}-http.sqlite", "--support-episodes", "1") as address:
        asyncio.run(load(address, 4, 0.5))
        for clients in arguments.clients:
            say(f"HTTP, {clients} clients")
            result["http"][str(clients)] = asyncio.run(load(address, clients, arguments.seconds))
    return result | {"measured": measure.conditions()}


def table(result: dict[str, Any]) -> str:
    """Everything in lines."""
    lines = [f"{'':34}{'p50 ms':>9}{'p99 ms':>9}"]
    row = lambda name, q, rest="": f"{name:34}{q['p50 ms']:9.3f}{q['p99 ms']:9.3f}  {rest}"
    for name in LEARNERS:
        found = result[name]
        for place in ("engine", "memory store", "sqlite"):
            lines += [row(f"{name}, {place}, {call}", q) for call, q in found[place].items() if isinstance(q, dict)]
        for clients, q in found["http"].items():
            rest = f"{q['requests per second']:.0f} requests/s, {q['errors']} errors"
            lines += [row(f"{name}, HTTP, {clients} clients, {call}", q[call], rest) for call in ("decide", "feedback")]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser("python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="clients at the same time")
    parser.add_argument("--seconds", type=float, default=15.0, help="of load for each number of clients")
    parser.add_argument("--quick", action="store_true", help="few calls")
    parser.add_argument("--json", type=Path, help="result file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clients, arguments.seconds = [1, 4], 1.0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        result: dict[str, Any] = {"environment": measure.environment("serving", "cpu", clock="wall time")}
        for name, algorithm in LEARNERS.items():
            say = lambda what, name=name: print(f"{name}: {what}", file=sys.stderr)
            result[name] = measured(algorithm, arguments, folder, say)
    print(table(result))
    measure.write(arguments.json, result)


if __name__ == "__main__":
    main()
