"""A real server process, killed with SIGKILL between and during requests: nothing that it answered is lost, and what it
decides afterwards is what it would have decided."""

import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import pytest
import torch
from torch import Generator

from ecomlib.configuration import PolicySettings, default_config
from ecomlib.families import LogitPricing
from ecomlib.learners import MetaTraining
from ecomlib.runs import Run, load_run
from ecomlib.serving import Engine, MemoryStore, Service

TASKS = ("sku-1", "sku-2", "sku-3")
DAYS = 8  # an inner step after day 4, and half an episode beyond


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of an untrained run with episodes of 4 days, each followed by an inner step."""
    torch.set_default_dtype(torch.float32)
    config = default_config("pricing", "meta-sgd")
    config = replace(
        config,
        family=LogitPricing(days=4),
        policy=PolicySettings(hidden=(8,), inputs=(0, 2)),
        data=replace(config.data, episodes=1),
    )
    made = Run.create(tmp_path_factory.mktemp("runs") / "pricing", config)
    meta = config.learner().initial(Generator().manual_seed(0))
    meta[2] = meta[2] * 100  # prices far from equally likely
    made.checkpoints((0,)).save(MetaTraining(1, meta, None, []))
    torch.set_default_dtype(torch.float64)
    return made.path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """The command in a process of its own, and a client that insists until it has an answer."""

    def __init__(self, run, store):
        self.run, self.store, self.port = run, store, free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20, trust_env=False)
        self.acknowledged, self.kills = [], 0
        self.start()

    def start(self):
        command = [sys.executable, "-m", "ecomlib", "serve", str(self.run), "--store", str(self.store)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.stderr.read().decode()
            try:
                return self.client.get("/health").raise_for_status()
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the server did not answer within a minute")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.kills += 1

    def post(self, path, body):
        """The answer; through as many restarts as it takes. An unanswered request is sent again."""
        while True:
            try:
                answer = self.client.post(path, json=body)
            except httpx.TransportError:
                self.process.wait()
                self.start()
                continue
            if path == "/decide" and answer.status_code == 409:  # decided before the process died
                return self.client.get(f"/tasks/{body['task']}").json()["open"]
            assert answer.status_code == 200, answer.text
            self.acknowledged.append(answer.json())
            return answer.json()

    def stop(self):
        self.process.terminate()
        self.process.communicate(timeout=20)
        self.client.close()


def units(decision):
    """Some number that a decision alone determines."""
    return int(decision["price"] * 97) % 30


def sell(post, between=lambda: None):
    """Decisions and feedback of all tasks, in turn."""
    answers = []
    for _ in range(DAYS):
        for task in TASKS:
            decision = post("/decide", {"task": task, "unit_cost": 1.3})
            between()
            feedback = post("/feedback", {"decision": decision["decision"], "units": units(decision)})
            between()
            answers += [decision, feedback]
    return answers


@pytest.fixture(scope="module")
def expected(run):
    """What a service that is never interrupted answers."""
    service = Service([Engine(load_run(run))], MemoryStore())
    call = {"/decide": service.decide, "/feedback": service.feedback}
    answers = sell(lambda path, body: call[path](**body))
    assert sum(a.get("adapted", False) for a in answers) == len(TASKS)
    return answers


def check(server, store, found, expected):
    """The same decisions as without interruption, and every acknowledged answer is in the file."""
    assert found == expected
    with sqlite3.connect(store) as database:
        bodies = [json.loads(body) for (body,) in database.execute("SELECT body FROM records ORDER BY position")]
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert all(answer in bodies for answer in server.acknowledged)
    assert [body for body in bodies if "decision" in body] == expected


def kill_during_requests(run, store, expected, kills, seed):
    """Kill at random moments while a client sells; the client restarts the server when it gets no answer."""
    server, chance, done = Server(run, store), random.Random(seed), threading.Event()

    def killer():
        # A request takes milliseconds, a start seconds: wait for the server to answer, then for a random moment.
        while server.kills < kills and not done.is_set():
            process = server.process
            before = len(server.acknowledged)
            while len(server.acknowledged) == before and not done.is_set():
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.02))
            if process is server.process and process.poll() is None:
                server.kill()

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        found = sell(server.post)
    finally:
        done.set()
        thread.join()
        server.stop()
    check(server, store, found, expected)
    return server.kills


def test_killed_between_requests(run, expected, tmp_path):
    store = tmp_path / "serve.sqlite"
    server, moments = Server(run, store), iter(range(10_000))
    kill_at = {5, 2 * len(TASKS) * 4}  # within the first episode, and right after the first inner steps

    def between():
        if next(moments) in kill_at:
            server.kill()

    found = sell(server.post, between)
    server.stop()
    assert server.kills == len(kill_at)
    check(server, store, found, expected)


def test_killed_during_requests(run, expected, tmp_path):
    assert kill_during_requests(run, tmp_path / "serve.sqlite", expected, kills=2, seed=0) == 2


@pytest.mark.extended
@pytest.mark.parametrize("seed", range(10))
def test_killed_during_many_requests(run, expected, tmp_path, seed):
    assert kill_during_requests(run, tmp_path / "serve.sqlite", expected, kills=4, seed=seed) >= 1


def test_the_command_says_what_is_wrong(run, tmp_path):
    (tmp_path / "other").write_text("no database, certainly not " * 50)
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "nowhere holds no run"),
        ([str(run), "--store", str(tmp_path / "other")], "other is no store"),
        ([str(run), "--port", "0"], "port = 0; allowed"),
        ([str(run), "--seed", "7"], "seed = 7; allowed: 0"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ecomlib", "serve", *arguments], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
