"""The benchmarks run, every variant agrees with the reference, and the result files hold what is promised. Speed is not
tested: it depends on the machine."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from notebooks import ROOT

from benchmarks import measure, meta_gradient

GRADIENTS = ["sinusoid_25", "sinusoid_25_5_steps", "sinusoid_1024", "sinusoid_1024_5_steps", "rl_20", "rl_50"]
TRUST_REGIONS = ["trpo_20", "trpo_50"]


def run(name: str, folder) -> tuple[dict, str]:
    """Result file and printed text of ``python -m benchmarks.NAME --quick``."""
    path = folder / "result.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(path.read_text(encoding="utf-8")), ran.stdout


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    return run("meta_gradient", tmp_path_factory.mktemp("meta_gradient"))


def test_meta_gradient_writes_the_named_ratios(gradients):
    result, _ = gradients
    for problem in GRADIENTS + TRUST_REGIONS:
        for other in ("loop", "best_peer", "best_peer_default_setting"):
            assert result["ratios"][f"{problem}_vs_{other}"] > 0
    for variant in ("any_module", "hand_batched", "mlp"):
        assert result["ratios"][f"sinusoid_25_{variant}_vs_loop"] > 0
    assert result["environment"]["quick"] is True
    assert set(result["measured"]) == set(GRADIENTS + TRUST_REGIONS)
    assert result["environment"]["torch"] == torch.__version__
    assert result["limits"]["machine"]["memory GB/s"] > 0
    assert result["limits"]["rl_20"]["milliseconds at GEMM peak"] > 0
    for row in result["memory"].values():
        assert row["KB a task"] > 0


def test_only_replaces_the_problems_it_names(gradients, tmp_path, monkeypatch, capsys):
    kept = gradients[0] | {"ratios": {"sinusoid_1024_vs_loop": 0.5, "rl_20_vs_loop": 0.5}}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(kept), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["meta_gradient", "--quick", "--only", "rl_20", "--json", str(path)])
    torch.set_default_dtype(torch.float32)
    meta_gradient.main()
    ratios = json.loads(path.read_text(encoding="utf-8"))["ratios"]
    assert ratios["sinusoid_1024_vs_loop"] == 0.5
    assert ratios["rl_20_vs_loop"] != 0.5


def test_a_ratio_is_that_of_the_times_in_the_same_file(gradients):
    result, _ = gradients
    best = {name: min(found.values()) for name, found in result["milliseconds"]["rl_20"].items()}
    ours = min(best[name] for name in ("any module", "hand-batched", "MLP"))
    assert result["ratios"]["rl_20_vs_loop"] == pytest.approx(best["loop"] / ours, rel=2e-3)  # both are rounded


def test_installed_peers_are_timed_and_missing_ones_are_named(gradients):
    result, printed = gradients
    for module, name in measure.PEERS.items():
        if importlib.util.find_spec(module):
            label = "parallel-metalearn" if module == "metalearn" else module
            assert label in result["milliseconds"]["sinusoid_25"]
        else:
            assert result["environment"][name] is None
            assert name in printed.split("missing: ")[1]


def test_a_wrong_gradient_stops_the_benchmark(monkeypatch):
    torch.set_default_dtype(torch.float32)
    case = meta_gradient.sinusoid(2, 1, "cpu", "wrong")

    def variants(case, quick):
        ours, theirs = meta_gradient.gradient_variants(case, True)
        right = ours["MLP"]
        return {"MLP": right._replace(result=lambda: right.result() * 1.001)}, {"loop": theirs["loop"]}

    with pytest.raises(SystemExit, match="MLP .* is off the reference by 1"):
        meta_gradient.measure_case(case, variants, 1, "cpu", quick=True)


def test_work_counts_match_a_count_by_hand():
    """403 kFLOP a task for one inner step on the sinusoid: 12 products with 1,680 weights for 10 points."""
    torch.set_default_dtype(torch.float32)
    case = meta_gradient.sinusoid(2, 1, "cpu", "")
    assert meta_gradient.work(case, False)["GFLOP"] == pytest.approx(2 * 12 * 2 * 1680 * 10 / 1e9)
    assert meta_gradient.work(case, True)["GFLOP"] == pytest.approx(2 * (12 + 4 + 160) * 2 * 1680 * 10 / 1e9)


def test_peak_memory_counts_what_is_alive_at_once():
    million = 250_000  # float32 numbers in 1 MB

    def run():
        kept = torch.zeros(million, dtype=torch.float32)
        torch.zeros(2 * million, dtype=torch.float32)  # dies here
        return kept + torch.zeros(million, dtype=torch.float32)

    assert measure.peak_memory(run, "cpu") == pytest.approx(3.0)


def test_rl_iteration_writes_ratios_and_phases(tmp_path):
    result, printed = run("rl_iteration", tmp_path)
    for name in ("ppo_20", "ppo_50", "trpo_20", "trpo_50"):
        assert result["ratios"][f"{name}_vs_loop"] > 0
        assert result["disagreement"][name] < 2e-4
        for side in ("loop", "ours"):
            phases = result["milliseconds"][name][side]["default"]
            total = phases.pop("total")
            assert total == pytest.approx(sum(phases.values()), rel=0.02)
            assert list(phases) == [*meta_gradient_phases(), "outer step"]
    assert result["ratios"]["sampling_20_vs_loop"] > 0
    assert "TRPO-MAML" in printed


def meta_gradient_phases():
    from benchmarks.rl_iteration import SAMPLING

    return SAMPLING


def test_seed_batch_writes_ratios_of_the_times_in_the_same_file(tmp_path):
    result, printed = run("seed_batch", tmp_path)
    for size in ("small", "middle", "recurrent"):
        for outer in ("rl", "ppo"):
            key = f"{size}_{outer}"
            times = result["milliseconds"][key]
            assert result["ratios"][f"{key}_batch_vs_one_by_one"] == pytest.approx(
                times["one by one"] / times["batch"], rel=2e-3
            )
            assert result["disagreement"][key] < 1e-3 and key in printed
