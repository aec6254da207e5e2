"""The throughput benchmark runs, its tables follow from its own measurements, and what is not installed is named. Speed
is not tested: it depends on the machine."""

import json
import subprocess
import sys

import gymnasium
import pytest
import torch
from notebooks import ROOT

from benchmarks import environment_peers, environments
from ecomlib.families import LogitPricing

pytestmark = pytest.mark.extended  # compiling takes minutes


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("environments") / "result.json"
    command = [sys.executable, "-m", "benchmarks.environments", "--quick", "--json", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(path.read_text(encoding="utf-8")), ran.stdout


def test_every_family_is_timed_at_both_sizes_and_through_gymnasium(quick):
    rates = quick[0]["M env-steps a CPU second"]
    for name in environments.FAMILIES:
        for batch in environments.BATCHES:
            assert rates[f"{name}, eager, {batch}"] > 0
            if name != "Inventory, lead time 2":
                assert rates[f"{name}, Gymnasium, {batch}"] > 0
    assert quick[0]["environment"]["quick"] is True and quick[0]["environment"]["torch"] == torch.__version__


def test_ratios_and_shares_follow_from_the_rates_of_the_same_file(quick):
    result, printed = quick
    rates = result["M env-steps a CPU second"]
    for name, ratio in result["ratios"].items():
        ours, peer = name.split(", vs ")
        assert ratio == pytest.approx(rates[f"{ours}, 4096"] / rates[peer], rel=2e-3)  # both are rounded
        assert name in printed
    for name, row in result["limits"].items():
        share = rates[f"{name}, eager, 4096"] * row["bytes a step"] / result["copy GB/s"] / 1e3
        assert row["share of it, eager"] == pytest.approx(share, rel=2e-3)


def test_installed_peers_are_timed_and_missing_ones_are_named(quick):
    result, printed = quick
    for module, distribution in environment_peers.DISTRIBUTIONS.items():
        if module in environment_peers.installed():
            assert any(name.startswith(distribution) for name in result["M env-steps a CPU second"])
        elif result["environment"][distribution] is None:
            assert distribution in printed.split("not installed: ")[1]
    assert "gymnax (--jax-python)" in printed.split("not installed: ")[1]


def test_bytes_of_a_step_are_counted_once_each():
    torch.set_default_dtype(torch.float32)
    shelf = LogitPricing(days=2, stock=3)
    # state (4 numbers) read and written, an action of 8 bytes, observation (6), reward, a byte for done, one uniform,
    # and of the product its id (8 bytes) and 4 numbers
    assert environments.play(shelf, 5, "cpu", compiled=False).bytes == 4 * (2 * 4 + 6 + 1 + 1 + 4) + 8 + 1 + 8


def test_a_single_environment_is_stepped_and_reset():
    counted = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("ecomlib.gym:ecomlib/Pricing-v0", days=5))
    measurement = environment_peers.one_by_one(counted, steps=50)
    assert measurement(1e-9) > 0
    assert counted.episode_count == 10
