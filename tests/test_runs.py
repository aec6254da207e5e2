"""A run's folder: what is damaged or somebody else's is refused by name and stays as it was."""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecomlib.checkpoints import CheckpointError
from ecomlib.configuration import DataSettings, PolicySettings, default_config
from ecomlib.families import LogitPricing
from ecomlib.runs import Run, RunError, load_run
from ecomlib.training import train

quick = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def small(**changes):
    data, family = DataSettings(2, 2, advantage="same_step"), LogitPricing(days=3)
    policy = PolicySettings(hidden=(4,), inputs=(0, 2))
    config = replace(default_config("pricing", "ppo-maml"), data=data, family=family, policy=policy)
    return replace(config, **{"iterations": 4, "checkpoint_every": 2, "seeds": 2, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(small(), tmp_path_factory.mktemp("runs") / "run", progress=False).path


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to damage, of a run that has one more checkpoint to go."""
    path = Path(shutil.copytree(trained, tmp_path / "run"))
    (path / "result.json").unlink()
    (path / "checkpoints" / "seeds-0-1" / "iteration-000004.safetensors").unlink()
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------ what is in it
def test_the_folder_describes_itself(trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {
        ".lock", "config.toml", "environment.json", "metrics.jsonl", "result.json", "tensorboard", "checkpoints"
    }  # fmt: skip
    environment = json.loads((trained / "environment.json").read_text())
    run = Run.open(trained)
    assert environment["config"] == run.hash and environment["seeds"] == [0, 1]
    start = environment["starts"][0]
    assert {"torch", "python", "hardware", "commit", "command", "date", "device", "threads"} <= set(start)
    result = json.loads((trained / "result.json").read_text())
    assert result["config"] == run.hash and set(result["training tasks"]) == {"0", "1"}


def test_the_result_is_of_the_last_iterations_and_its_score_a_ratio_of_means(trained, tmp_path):
    config = small(iterations=20)
    path = train(config, tmp_path / "run", progress=False).path
    result = json.loads((path / "result.json").read_text())
    assert result["mean of the last iterations"] == 2
    for seed in (0, 1):
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        a, b = (r for r in rows if r["seed"] == seed and r["iteration"] in (19, 20))
        mean = lambda name, a=a, b=b: (a[name] + b[name]) / 2
        gain, possible = (
            mean("return after 1 steps") - mean("blind return"),
            mean("oracle return") - mean("blind return"),
        )
        found = result["training tasks"][str(seed)]
        assert found["return after 1 steps"] == pytest.approx(mean("return after 1 steps"), rel=1e-12)
        assert found["score"] == pytest.approx(gain / possible, rel=1e-9)


def test_no_score_where_there_is_nothing_to_gain(trained):
    run = Run.open(trained)
    row = {"return after 1 steps": 1.0, "blind return": 2.0, "oracle return": 2.0}
    assert run.score([row]) is None
    assert run.score([row, row | {"oracle return": 4.0}]) == -1.0


# ------------------------------------------------------------------------------------------ who may make one
def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("Chapter 1")
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"is no run and not empty \(thesis.tex\): name another folder"):
        train(small(), tmp_path, progress=False)
    assert contents(tmp_path) == before


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RunError, match="file is a file: name a folder"):
        train(small(), file, progress=False)
    with pytest.raises(OSError, match="Not a directory: '.*below'"):
        train(small(), file / "below", progress=False)
    with pytest.raises(RunError, match="holds no run"):
        train(None, file, resume=True, progress=False)
    assert file.read_text() == "mine"


def test_an_existing_run_is_not_begun_again(trained):
    before = contents(trained)
    with pytest.raises(RunError, match="holds a run already: go on with it"):
        train(small(), trained, progress=False)
    with pytest.raises(RunError, match="was started with another configuration"):
        train(small(iterations=5), trained, resume=True, progress=False)
    assert contents(trained) == before


def test_a_run_that_another_process_begins_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    lock = Run.lock

    @contextmanager
    def too_late(run):
        (run.path / "config.toml").write_text("theirs")
        with lock(run):
            yield

    monkeypatch.setattr(Run, "lock", too_late)
    with pytest.raises(RunError, match="holds a run already"):
        train(small(), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "config.toml").read_text() == "theirs"


def test_a_folder_that_nobody_may_write_to_is_refused_before_training(tmp_path, monkeypatch):
    def denied(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("mkdir", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, denied)
            with pytest.raises(PermissionError, match="Permission denied: '.*run"):
                train(small(), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "config.toml").exists()
    train(small(iterations=1), tmp_path / "run", progress=False)  # what is left over does not stand in the way


# ------------------------------------------------------------------------------------------ damage
def refused(run: Path, message: str) -> None:
    before = contents(run)
    with pytest.raises(ValueError, match=message) as refusal:
        train(None, run, resume=True, progress=False)
    assert str(run) in str(refusal.value) and "\n" not in str(refusal.value)
    assert contents(run) == before


def test_resuming_needs_nothing_but_the_run(run):
    train(None, run, resume=True, progress=False)
    assert len(Run.open(run).metrics()) == 8


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"starts": 3}', '{"config": "x"}', "[" * 100_000, "\x00"], ids=lambda x: x[:9]
)
def test_a_damaged_environment_is_named(run, text):
    (run / "environment.json").write_text(text)
    refused(run, "environment.json is damaged: restore it from a copy, or delete it")


@pytest.mark.parametrize("text", ["", "\x00" * 9, "family_name = 3", 'family_name = "pricing"\nalgorithm = "x"'])
def test_a_damaged_configuration_is_named(run, text):
    (run / "config.toml").write_text(text)
    refused(run, "config.toml")


def test_a_checkpoint_of_other_settings_is_refused(run):
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("lr = 4.0", "lr = 4.5"))
    refused(run, "iteration-000002.safetensors belongs to another configuration or other seeds")


def row(**changes) -> str:
    right = {"seed": 0, "iteration": 1, "return after 0 steps": 1, "return after 1 steps": 1.0}
    return json.dumps(right | {"blind return": 0.0, "oracle return": 2.0} | changes)


LINES = {
    "no JSON": "{",
    "a number": "3",
    "nothing of ours": "{}",
    "nested": "[" * 100_000,
    "a seed that is a text": row(seed="0"),
    "a seed that is True": row(seed=True),
    "no UTF-8": b"\xff\xfe",
    "a pickle": b"cos\nsystem\n",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_damaged_line_of_metrics_is_named(run, line):
    file = run / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[2] = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(b"\n".join(lines))
    refused(run, r"metrics.jsonl, line [34]: not a row of metrics")


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[2:],
        lambda rows: [],
        lambda rows: rows[:1] + rows,
        lambda rows: [*rows[:2], row(iteration=2)[:-1] + ', "x": 1}', *rows[3:4], row(iteration="2")],
        lambda rows: [*rows[:3], row(seed=1, iteration=2, **{"oracle return": None})],
        lambda rows: [*rows[:3], row(seed=1, iteration=2, **{"return after 1 steps": "high"})],
    ],
    ids=["the first iteration is missing", "all are missing", "one is there twice", "not a number", "null", "a text"],
)
def test_metrics_that_did_not_lead_to_the_checkpoint_are_refused(run, change):
    file = run / "metrics.jsonl"
    file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))
    refused(run, "metrics.jsonl")


def test_metrics_that_are_gone_are_refused(run):
    (run / "metrics.jsonl").unlink()
    refused(run, "does not hold seed 0 at all iterations from 1 to 2")


def test_a_last_line_that_a_crash_cut_off_is_forgotten(run, trained):
    file = run / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    train(None, run, resume=True, progress=False)
    expected = [{k: v for k, v in r.items() if k != "seconds"} for r in Run.open(trained).metrics()]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in Run.open(run).metrics()] == expected


@quick
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from([b"{", b"null", b"NaN", b'{"seed": 0, "iteration": 1}', b'{"seed": 1e400}', b"9" * 5_000]),
        )
    )
)
def test_any_bytes_of_metrics_give_rows_or_name_the_line(trained, lines):
    run = Run.open(trained)
    run.path = trained.parent / "any"
    run.path.mkdir(exist_ok=True)
    run.metrics_path.write_bytes(b"\n".join(lines))
    try:
        rows = run.metrics()
    except RunError as error:
        assert str(error).startswith(f"{run.metrics_path}, line ")
    else:
        assert all(type(r["seed"]) is int for r in rows)
    with pytest.raises(RunError):
        run.metrics_until((0, 1), 2)


# ------------------------------------------------------------------------------------------ reading it back
@pytest.mark.parametrize("seed", [0, 1])
def test_one_seed_is_read_back(trained, seed):
    found = load_run(trained, seed)
    assert (found.seed, found.iteration) == (seed, 4)
    alone = train(small(seeds=1, first_seed=seed), trained.parent / f"alone-{seed}", progress=False)
    for a, b in zip(found.meta, load_run(alone.path).meta, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_best_checkpoint_is_the_one_with_the_best_score(tmp_path):
    path = train(small(seeds=1, iterations=9, checkpoint_every=1, keep=1), tmp_path / "run", progress=False).path
    rows = Run.open(path).metrics()
    best = max(rows, key=lambda r: float("-inf") if r["score"] is None else r["score"])
    assert load_run(path, checkpoint="best").iteration == best["iteration"]
    assert load_run(path).iteration == 9


def test_what_cannot_be_read_back_is_said(trained, tmp_path):
    with pytest.raises(RunError, match="seed = 7; allowed: 0, 1"):
        load_run(trained, 7)
    with pytest.raises(RunError, match="holds no run"):
        load_run(tmp_path)
    fresh = Run.create(tmp_path / "fresh", small())
    with pytest.raises(RunError, match="has no checkpoint of seed 0 yet"):
        load_run(fresh.path)


@pytest.mark.parametrize("change", ["shape", "dtype", "seed axis", "memory", "memory of another kind", "number"])
def test_a_checkpoint_that_does_not_fit_the_policy_is_refused(trained, tmp_path, change):
    run = Run.open(shutil.copytree(trained, tmp_path / "run"))
    state = run.checkpoints((0, 1)).load()
    meta, memory = state.meta, state.memory
    wrong = {
        "shape": state._replace(meta=[torch.ones(2, 7), *meta[1:]]),
        "dtype": state._replace(meta=[p.double() for p in meta]),
        "seed axis": state._replace(meta=[p[0] for p in meta]),
        "memory": state._replace(memory={"step": memory["step"]}),
        "memory of another kind": state._replace(memory={**memory, "exp_avg": [3] * len(meta)}),
        "number": state._replace(meta=meta[:-1]),
    }[change]
    run.checkpoints((0, 1)).save(wrong._replace(iteration=4))
    before = contents(run.path)
    for read in (lambda: load_run(run.path), lambda: train(None, run.path, resume=True, progress=False)):
        with pytest.raises(CheckpointError, match=f"a checkpoint of {run.path} holds "):
            read()
    assert contents(run.path) == before
