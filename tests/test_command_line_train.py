"""``python -m ecomlib train``: its flags, files and messages, from the settings that the library itself uses."""

import dataclasses
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from notebooks import ROOT

from ecomlib.__main__ import COMMANDS, main
from ecomlib.cli.train import TrainOptions
from ecomlib.config_files import config_type, read_config, write_config
from ecomlib.configuration import FAMILIES, OUTER, default_config
from ecomlib.families import LogitPricing
from ecomlib.families.priors import GaussianPrior
from ecomlib.runs import Run
from ecomlib.training import Machine

TINY = "--data.tasks 2 --data.episodes 2 --family.days 3 --policy.hidden 4 --iterations 2".split()
PAIRS = [(family, algorithm) for family in FAMILIES for algorithm in OUTER]


def run(*arguments: object) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def words(text: str) -> str:
    """What is printed, without boxes, colours and line ends."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╰╮╯─]", " ", text).split())


# ------------------------------------------------------------------------------------------ help
def test_help_at_every_level(capsys):
    assert run("--help") == 0
    shown = words(capsys.readouterr().out)
    assert all(name in shown and words(about) in shown for name, about in COMMANDS.items())
    assert run("train", "--help") == 0
    shown = words(capsys.readouterr().out)
    assert all(name in shown for name in (*FAMILIES, *OUTER)) and "--resume" in shown


@pytest.mark.parametrize("family, algorithm", PAIRS)
def test_help_explains_every_setting(capsys, monkeypatch, family, algorithm):
    """Every field of every dataclass has its flag there, with the line that stands under it in the source."""
    monkeypatch.setenv("COLUMNS", "100")
    assert run("train", family, "--algorithm", algorithm, "--help") == 0
    shown = words(capsys.readouterr().out)

    def walk(config, prefix=""):
        kind = type(config)
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if dataclasses.is_dataclass(value):
                walk(value, f"{prefix}{f.name}.")
            elif f.name != "family_name":  # the word after train
                flag = f"--{prefix}{f.name}".replace("_", "-")
                about = explanation(kind, f.name)
                assert flag in shown, flag
                assert about in shown, f"{flag}: {about}"

    walk(default_config(family, algorithm))
    walk(Machine())
    for f in dataclasses.fields(TrainOptions):
        if f.name not in ("settings", "machine"):
            assert explanation(TrainOptions, f.name) in shown


def explanation(kind, field: str) -> str:
    """The line under a field, in the class that names it first."""
    kind = next(k for k in reversed(kind.__mro__) if field in k.__dict__.get("__annotations__", {}))
    source = Path(sys.modules[kind.__module__].__file__).read_text()
    body = source[source.index(f"class {kind.__name__}") :]
    return words(re.search(rf'\n    {field}: (?:(?!\n    \w+: ).)*?"""(.*?)"""', body, re.S)[1])


def test_help_does_not_wait_for_torch():
    """The list of commands is there at once."""
    code = (
        "import sys; from ecomlib.__main__ import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "False", ran.stderr


# ------------------------------------------------------------------------------------------ what flags do
@pytest.mark.parametrize("family, algorithm", PAIRS)
def test_flags_reach_the_configuration(tmp_path, family, algorithm):
    """Parsed as the command parses them; training is tested elsewhere."""
    kind = TrainOptions[config_type(family, algorithm)]
    flags = ["--iterations", "7", "--inner.surrogate", "log_likelihood", "--policy.hidden", "5", "--outer.lr", "0.25"]
    default = TrainOptions(default_config(family, algorithm))
    if algorithm == "trpo-maml":
        flags[-2:] = ["--outer.trust.radius", "0.25"]
    surrogate, hidden = "log_likelihood", (5,)
    if algorithm in ("rl2", "belief"):  # all of it is the outer step's
        flags[2:6] = ["--outer.hidden", "5"]
        surrogate, hidden = "ratio", (64, 64)
    parsed = tyro.cli(tyro.conf.configure(tyro.conf.AvoidSubcommands)(kind), default=default, args=flags).settings
    assert (parsed.iterations, parsed.inner.surrogate, parsed.policy.hidden) == (7, surrogate, hidden)
    assert getattr(parsed.outer, "hidden", 5) == 5
    assert 0.25 in (getattr(parsed.outer, "lr", None), getattr(getattr(parsed.outer, "trust", None), "radius", None))
    assert replace(parsed, iterations=200, inner=default.settings.inner, policy=default.settings.policy,
                   outer=default.settings.outer) == default.settings  # fmt: skip
    write_config(parsed, tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == parsed


def test_a_run_from_flags_then_resumed_then_from_its_file(tmp_path, capsys):
    path = tmp_path / "run"
    flags = [*TINY, "--inner.lr", 0.5, "--policy.inputs", "None", "--no-inner.own-unit", "--seeds", 2]
    flags[flags.index("--no-inner.own-unit")] = "--inner.no-own-unit"
    assert run("train", "pricing", "--run", path, *flags) == 0
    assert capsys.readouterr().out == f"{path}: done. Next: python -m ecomlib evaluate {path}\n"
    config = Run.open(path).config
    assert (config.inner.lr, config.policy.inputs, config.inner.own_unit, config.seeds) == (0.5, None, False, 2)
    assert run("train", "--run", path, "--resume") == 0  # the folder knows its family
    assert run("train", "pricing", "--run", path, "--resume", "--inner.lr", 0.5) == 0  # nothing contradicts
    assert run("train", "--config", path / "config.toml", "--run", tmp_path / "again") == 0
    assert Run.open(tmp_path / "again").config == config
    assert (tmp_path / "again" / "result.json").read_bytes() == (path / "result.json").read_bytes()
    assert run("train", "pricing", "--config", path / "config.toml", "--run", tmp_path / "other", "--seeds", 1) == 0
    assert Run.open(tmp_path / "other").config == replace(config, seeds=1)


def test_the_folder_has_a_name_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", "shop", "--algorithm", "reptile", *TINY[:4], "--iterations", 1) == 0
    assert (tmp_path / "runs" / "shop-reptile" / "result.json").exists()


def test_a_market_takes_the_place_of_the_family(tmp_path):
    prior = GaussianPrior((0.4, -4.0, 5.0), ((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)))
    family = LogitPricing(days=3, prior=prior)
    write_config(replace(default_config("pricing", "ppo-maml"), family=family), tmp_path / "market.toml")
    flags = ["--market", tmp_path / "market.toml", *TINY[:4], "--iterations", 1]
    assert run("train", "pricing", *flags, "--run", tmp_path / "run") == 0
    assert Run.open(tmp_path / "run").config.family == family
    assert run("train", "pricing", *flags, "--run", tmp_path / "b", "--family.prior.reference-markup", 1.25) == 0
    assert Run.open(tmp_path / "b").config.family.prior == replace(prior, reference_markup=1.25)


# ------------------------------------------------------------------------------------------ what is refused
@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert run("train", "pricing", "--run", path, *TINY) == 0
    return path


def refusal(capsys, *arguments: object) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown
    return shown.err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--inner.lr", "0.5"], "--inner.lr 0.5 contradicts {path}/config.toml, where inner.lr = 4.0. A run keeps its "
         "settings: leave the flag out, or start a new run (--config, --run)"),
        (["--iterations", "9"], "--iterations 9 contradicts {path}/config.toml, where iterations = 2."),
        (["--seeds", "2"], "--seeds 2 contradicts"),
        (["--dtype", "float64"], "--dtype float64 contradicts"),
        (["--policy.minimum-std", "1.0"], "--policy.minimum-std 1.0 contradicts"),
        (["--family.prior.share", "0.1", "0.2"], "--family.prior.share (0.1, 0.2) contradicts"),
        (["--algorithm", "rl-maml"], "--algorithm rl-maml contradicts {path}/config.toml, where algorithm = ppo-maml"),
        (["--config", "x.toml"], "--config and --market start a new run; --resume goes on with the"),
    ],
)  # fmt: skip
def test_a_resumed_run_keeps_its_settings(trained, capsys, flags, message):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    assert refusal(capsys, "train", "pricing", "--run", trained, "--resume", *flags).startswith(
        message.format(path=trained)
    )
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("flags", [["--threads", "2"], ["--device", "cpu"], ["--no-compile"]])
def test_a_resumed_run_may_change_machines(trained, flags):
    assert run("train", "pricing", "--run", trained, "--resume", *flags) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name a task family: python -m ecomlib train {pricing,inventory,bidding,recommendation,navigation,shop}"),
        (["prcing"], f"FAMILY prcing; allowed: {', '.join(FAMILIES)}; did you mean pricing?"),
        (["pricing", "--algorithm", "mamal"], "--algorithm mamal; allowed: ppo-maml, rl-maml, trpo-maml,"),
        (["pricing", "--run"], "argument --run: expected one argument"),
        (["pricing", "--resume"], "--resume needs --run, the folder of the run"),
        (["pricing", "--resume", "--run", "nowhere"], "nowhere holds no run: there is no config.toml in it"),
        (["pricing", "--config", "nowhere.toml"], "[Errno 2] No such file or directory: 'nowhere.toml'"),
        (["pricing", "--market", "nowhere.toml"], "[Errno 2] No such file or directory: 'nowhere.toml'"),
        (["pricing", "--iterations", "0"], "--iterations = 0; allowed: a whole number from 1 to 1000000000"),
        (["pricing", "--data.stage-weights", "1"], "--data.stage-weights = (1.0,); allowed: inner.steps + 1 = 2 num"),
        (["pricing", "--policy.inputs", "0", "17"], "--policy.inputs = (0, 17); allowed: numbers of the 6 entries"),
        (["pricing", "--threads", "0"], "--threads = 0; allowed: a whole number from 1 to 1024"),
        (["navigation", "--algorithm", "trpo-maml", "--seeds", "2", "--seeds-at-once", "2"],
         "--seeds-at-once = 2; allowed: None or a whole number >= 1; 1 with trpo-maml"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, "train", *arguments).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--iteratons", "3"], ["--iteratons", "--iterations INT"]),
        (["--inner.lrr", "3"], ["--inner.lrr", "--inner.lr FLOAT"]),
        (["--iterations", "x"], ["--iterations", "'x'"]),
        (["--inner.surrogate", "dise"], ["--inner.surrogate", "'dise'", "'ratio', 'low_variance_curvature', 'dice'"]),
        (["--data.tasks", "3.5"], ["--data.tasks", "'3.5'"]),
        (["--outer.epochs"], ["--outer.epochs"]),
        (["stray"], ["stray"]),
        (["--res"], ["--res", "--resume"]),
        (["--inner.lr", "-1"], ["Inner.lr = -1.0; allowed: a finite number > 0, or steps = 1 of them"]),
        (["--inner.lr", "nan"], ["Inner.lr = nan; allowed: a finite number > 0, or steps = 1 of them"]),
        (["--outer.clip", "2"], ["outer: PPOStep.clip = 2.0; allowed: a number in (0, 1)"]),
        (["--family.prior.share", "0.5", "2"], ["family.prior: LogUniformPrior.share = (0.5, 2.0); allowed: two"]),
    ],
)
def test_flags_that_cannot_be_read_are_named(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert run("train", "pricing", *arguments) == 2
    shown = words(capsys.readouterr().err)
    assert all(name in shown for name in named), shown
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_names_those_there_are(capsys):
    assert run("trian") == 2
    shown = capsys.readouterr().err
    assert "invalid choice: 'trian'" in shown and all(name in shown for name in COMMANDS)


@pytest.mark.parametrize(
    "name, data",
    [
        ("a pickle", b"cos\nsystem\n(S'touch exploited'\ntR."),
        ("JSON", b'{"family_name": "pricing"}'),
        ("bytes", bytes(range(256))),
        ("no family", b'algorithm = "ppo-maml"'),
        ("another family", b'family_name = "shop"\nalgorithm = "ppo-maml"\n[family]\n'),
        ("a setting that is not there", b'family_name = "pricing"\nalgorithm = "ppo-maml"\n[family]\nexec = "x"'),
    ],
)
@pytest.mark.parametrize("flag", ["--config", "--market"])
def test_foreign_files_are_named_and_nothing_is_begun(tmp_path, monkeypatch, capsys, flag, name, data):
    monkeypatch.chdir(tmp_path)
    Path("market.toml").write_bytes(data)
    assert "market.toml" in refusal(capsys, "train", "pricing", flag, "market.toml")
    assert Path("market.toml").read_bytes() == data and len(list(tmp_path.iterdir())) == 1
