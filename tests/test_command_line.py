"""Every command as the README prints it, on a tiny setting, in a process of its own; and help that explains itself."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ecomlib.__main__ import COMMANDS, main
from ecomlib.checkpoints import CheckpointFolder
from ecomlib.runs import Run

ROOT = Path(__file__).parents[1]
TINY = "--iterations 3 --data.tasks 4 --data.episodes 2 --policy.hidden 4 --family.days 4".split()


def command(folder, words, before=("-m",)):
    """Run ``python -m ecomlib ...`` in ``folder``; what it printed. Fails where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *before, "ecomlib", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a user works: two runs, both trained by command."""
    folder = tmp_path_factory.mktemp("work")
    words = "train pricing --algorithm ppo-maml --seeds 2 --checkpoint-every 2 --run runs/pricing".split()
    trained = command(folder, [*words, *TINY])
    assert "100%" in trained.stderr and all(word in trained.stderr for word in ("return=", "score=", "steps/s="))
    with pytest.MonkeyPatch.context() as there:  # the same in this process, which is faster
        there.chdir(folder)
        assert main("train pricing --algorithm fomaml --seeds 2 --run runs/b".split() + TINY) == 0
    return folder


# ------------------------------------------------------------------------------------------------- as printed
def test_train_leaves_a_folder_that_describes_itself_and_resumes(folder):
    run = folder / "runs" / "pricing"
    names = {"config.toml", "environment.json", "metrics.jsonl", "result.json", "tensorboard", "checkpoints"}
    assert names <= {p.name for p in run.iterdir()}
    before = (run / "metrics.jsonl").read_bytes()
    command(folder, "train pricing --run runs/pricing --resume".split())
    assert (run / "metrics.jsonl").read_bytes() == before


def test_evaluate(folder):
    ran = command(folder, "evaluate runs/pricing --split test --split shifted --tasks 9".split())
    for name in ("test", "shifted"):
        told = json.loads((folder / "runs" / "pricing" / f"evaluation-{name}.json").read_text())
        assert told["split"] == name and told["tasks"] == 9
        rows = {(r["policy"], r["step"]): r for r in told["rows"]}
        row = rows["ppo-maml", 1]
        low, high = row["over seeds"]["low"], row["over seeds"]["high"]
        line = f"{row['score']:.3f}  [{low:.3f}, {high:.3f}]"
        assert " ".join(line.split()) in " ".join(ran.stdout.split())
        assert rows["blind", 0]["score"] == 0 and rows["oracle", 0]["score"] == 1
        assert {"greedy Bayes", "Thompson"} <= {r["policy"] for r in told["rows"]}
        for ending, start in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("npz", b"PK")):
            data = (folder / "runs" / "pricing" / f"evaluation-{name}.{ending}").read_bytes()
            assert data.startswith(start)
    assert "n = 2 training seeds" in ran.stdout and "9 tasks" in ran.stdout
    assert "100%" in ran.stderr


def test_compare(folder):
    ran = command(folder, "compare runs/pricing runs/b --tasks 9 --out compared.json".split())
    told = json.loads((folder / "compared.json").read_text())
    (d,) = told["differences from the first"]
    assert d["seeds are paired"] and d["over seeds"]["n"] == 2 and d["over tasks"]["n"] == 9
    assert f"{d['over seeds']['estimate']:+.3f} [{d['over seeds']['low']:+.3f}" in ran.stdout
    assert f"{d['over tasks']['estimate']:+.3f} [{d['over tasks']['low']:+.3f}" in ran.stdout
    assert (folder / "compared.svg").read_text().startswith("<?xml")


def test_search_and_train_with_what_it_found(folder):
    words = "search pricing --algorithm ppo-maml --trials 2 --iterations 2 --validation-tasks 5 --confirm 2".split()
    ran = command(folder, words)
    search = folder / "runs" / "search-pricing-ppo-maml"
    assert {"study.db", "best.toml", "result.json", "history.svg"} <= {p.name for p in search.iterdir()}
    best = json.loads((search / "result.json").read_text())
    assert f"Best of 2 trials: {best['best']['score']:.3f}, too good" in ran.stdout
    assert f"{best['intervals']['best']['estimate']:.3f} [" in ran.stdout.split("the same settings: ")[1]
    words = f"train pricing --config {search / 'best.toml'} --iterations 1 --run {folder / 'runs' / 'best'}".split()
    assert main(words) == 0
    assert Run.open(folder / "runs" / "best").config.first_seed == 1000


def test_calibrate(folder):
    rng = np.random.default_rng(0)
    product, week = np.indices((25, 30)).reshape(2, -1)
    price = rng.choice([1.6, 2.0, 2.4], 25 * 30)
    units = rng.poisson(99 * np.exp(-rng.uniform(0.2, 1, 25)[product] * price))
    table = {"product": product, "week": week, "price": price, "units": units, "visitors": 400}
    pd.DataFrame(table).to_parquet(folder / "sales.parquet")
    words = "calibrate pricing --table sales.parquet --out my_market.toml".split()
    assert "Assumptions" in command(folder, words).stdout
    assert main(f"train pricing --market {folder / 'my_market.toml'} --run {folder / 'm'}".split() + TINY) == 0


def test_export(folder):
    days = {"day": range(1, 5), "price": [1.34, 1.63, 1.05, 1.195], "units": [9, 3, 20, 14], "unit_cost": 1.0}
    pd.DataFrame(days).to_csv(folder / "week1.csv", index=False)
    command(folder, "export runs/pricing --task-data week1.csv --format onnx".split())
    assert (folder / "runs" / "pricing" / "policy.onnx").stat().st_size > 0


def test_torchrun(folder):
    """torchrun takes a word that starts like an option of its own (--run) for that option, hence the two dashes."""
    words = "train pricing --algorithm ppo-maml --run runs/two".split() + TINY
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--")
    command(folder, words, torchrun)
    assert main("train pricing --algorithm ppo-maml".split() + ["--run", str(folder / "runs" / "one")] + TINY) == 0
    one, two = (Run.open(folder / "runs" / name) for name in ("one", "two"))
    assert isinstance(one.checkpoints((0,)), CheckpointFolder)
    for a, b in zip(one.checkpoints((0,)).load().meta, two.checkpoints((0,)).load().meta):
        assert np.allclose(a, b, rtol=1e-3, atol=1e-4)  # float32; in float64 see the tests of distributed training


# ------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate nowhere", "nowhere holds no run"),
        ("compare runs/pricing", "runs = 1; allowed: at least 2"),
        ("compare runs/pricing nowhere", "nowhere holds no run"),
        ("compare runs/pricing runs/b --out folder/out.json", "folder: there is no such folder"),
        ("compare runs/pricing runs/b --out out.svg", "another ending than .svg"),
        ("evaluate runs/pricing --tasks 1", "EvaluationConfig.tasks = 1; allowed: a whole number >= 2"),
        ("search pricing --trials 0", "SearchConfig.trials = 0; allowed: a whole number >= 1"),
        ("search groceries", "family = 'groceries'; allowed for search: pricing, inventory, bidding,"),
        ("search pricing --algorithm sarsa", "invalid choice: 'sarsa'"),
        ("search pricing --search runs/pricing", "runs/pricing exists and is no search"),
        ("search pricing --config runs/b/config.toml", "algorithm = fomaml; allowed: ppo-maml"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    assert main(words.split()) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and message in told.err
    assert told.err.count("\n") == 1


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert main("evaluate runs/pricing".split()) == 2 and "cannot be written to" in capsys.readouterr().err


def test_an_unknown_split_names_those_there_are(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        main("evaluate runs/pricing --split holdout".split())
    told = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "holdout" in told and "'train', 'test', 'shifted'" in told


# ------------------------------------------------------------------------------------------------- help
@pytest.mark.parametrize("name", ["evaluate", "compare", "search", "calibrate"])
def test_help_explains_every_option(name, capsys):
    """An option is followed by words that are not only its default."""
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    options, words = [], []
    for line in told.split(" options ", 1)[1].splitlines():
        cell = line.strip("│| ")
        if re.match("--?[a-z]", cell):
            options.append(cell)
            words.append("")
        elif words:
            words[-1] += " " + cell
    assert len(options) > 5
    for option, text in zip(options, words):
        explained = (option.split("  ", 1)[1:] or [""])[0] + text
        assert len(re.split(r"\(default|\(required", explained)[0].split()) >= 3, option


def test_the_program_lists_its_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    for name, about in COMMANDS.items():
        assert name in told and about.split()[0] in told
        assert callable(importlib.import_module(f"ecomlib.cli.{name}").main)
    with pytest.raises(SystemExit) as ended:
        main(["undo"])
    assert ended.value.code == 2 and "invalid choice: 'undo'" in capsys.readouterr().err
