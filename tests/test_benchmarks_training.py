"""``benchmarks.training`` at tiny size: all take the same step, and the file has what it promises. No timings."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training, training_implementations, training_memory
from benchmarks.step_network import PLAIN
from benchmarks.training_implementations import HAND, HAND_LORA, IMPLEMENTATIONS, Bench, Implementation
from benchmarks.training_setup import TrainingCase, make_setup

TINY_WAN = training.TINY[1]
IN_MEMORY = TrainingCase(
    "random latents", "sd15", 2, {"layers_per_block": 1}, sample=(4, 8, 8), text=(5, 16), precision="bf16"
)
OURS = "ours, SIPO, frozen copy"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short chunks, and one thread."""
    for module in (training, training_implementations):
        monkeypatch.setattr(module, "SKIPPED", 2)
        monkeypatch.setattr(module, "COUNTED", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def way(name: str) -> Implementation:
    return next(way for way in IMPLEMENTATIONS if way.name == name)


def test_a_tiny_run_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("diffusers", "peft", "av"):
        pytest.importorskip(package)
    monkeypatch.setattr(training, "TINY", [TINY_WAN])
    path = tmp_path / "new" / "training.json"
    training.main(["--device=cpu", "--quick", "--seconds=0", "--steps=0", f"--output={path}"])
    results = json.loads(path.read_text())
    assert not path.with_name(path.name + ".part").exists()
    assert (results["kind"], results["complete"], results["skipped"]) == ("training", True, [])
    assert {"device", "threads", "torch", "date", "commit"} <= set(results["machine"])
    assert results["memory"] is None
    (entry,) = results["cases"]
    assert entry["network"] == "diffusers WanTransformer3DModel"
    assert (entry["pairs"], entry["sample"], entry["rounds"]) == (2, [16, 2, 4, 4], training.MIN_ROUNDS)
    assert list(entry["results"]) == [way.name for way in IMPLEMENTATIONS]
    for name, result in entry["results"].items():
        target = way(name).target
        assert result["step_ms"]["runs"] == 3 * training.MIN_ROUNDS
        assert 0 < result["step_ms"]["quartiles"][0] <= result["step_ms"]["median"]
        assert result["host_ms"] is None  # no GPU
        assert result["gradient_error"] < 1e-3
        assert result["ratio"]["runs"] == training.MIN_ROUNDS
        assert result["target"] == target
        assert result["met"] is (None if target is None else result["ratio"]["median"] <= target)
        assert result["peak_mb"] == pytest.approx(result["resident_mb"] + result["step_mb"])
        assert result["step_mb"] > 0
    assert [entry["results"][name]["ratio"]["quartiles"] for name in (HAND, HAND_LORA)] == [[1.0, 1.0]] * 2
    # float32: weights, reference, two moments; one network less without the reference. Buffers are the rest.
    network, resident = 4 * entry["parameters"] / 1e6, {n: r["resident_mb"] for n, r in entry["results"].items()}
    assert resident[HAND] == pytest.approx(4 * network, rel=0.05)
    assert resident[HAND] - resident["ours, SIPO, reference errors"] == pytest.approx(network, rel=0.1)
    assert resident[HAND_LORA] - resident["ours, LoRA, SIPO, adapter off"] == pytest.approx(network, rel=0.1)
    shown = capsys.readouterr().out
    assert all(name in shown for name in entry["results"])


def test_a_wrong_or_broken_loss_is_listed_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")

    def doubled(*args: Any, method: str, beta: float, **options: Any) -> Any:
        if method == "diffusion_dpo":
            raise RuntimeError("out of ideas\nand more")
        return real(*args, method=method, beta=2 * beta, **options)

    real = training_implementations.SIPOLoss
    monkeypatch.setattr(training_implementations, "SIPOLoss", doubled)
    monkeypatch.setattr(training_implementations, "IMPLEMENTATIONS", [w for w in IMPLEMENTATIONS if not w.lora])
    case = TrainingCase("small", "sd15", 2, {**IN_MEMORY.network, **_small_unet()}, sample=(4, 8, 8), text=(5, 16))
    entry, failed = training.measure_case(case, "cpu", 0.0, tmp_path)
    assert set(failed) == {w.name for w in IMPLEMENTATIONS if w.ours and not w.lora}
    assert failed["ours, Diffusion-DPO, frozen copy"] == "RuntimeError: out of ideas"
    assert failed[OURS].startswith("wrong gradient, not timed: relative error ")
    assert list(entry["results"]) == [w.name for w in IMPLEMENTATIONS if not w.ours and not w.lora]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_random_latents_in_memory_give_everybody_one_gradient(tmp_path: Path, precision: str) -> None:
    """Reference errors computed beforehand included, and with SIPO's mask and weights at work."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    network = {**IN_MEMORY.network, **_small_unet()}
    case = TrainingCase("small", "sd15", 8, network, sample=(4, 8, 8), text=(5, 16), precision=precision)
    bench = Bench(make_setup(case, "cpu", tmp_path), "cpu", tmp_path)
    errors, failed = bench.errors()
    assert failed == {}
    assert set(errors) == {w.name for w in IMPLEMENTATIONS} == {w.name for w in bench.implementations}
    assert max(errors.values()) < training_implementations.MAX_ERROR[precision]
    true = bench.gradient(Implementation("", ours=False, method="sipo"))
    assert true.norm() > 0 and not torch.equal(true, bench.gradient(way(HAND)))


def _small_unet() -> dict[str, Any]:
    return {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }


def test_torch_alone_measures_the_hand_written_loop_and_says_why_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a lent GPU machine has: neither diffusers nor accelerate."""
    for package in ("diffusers", "accelerate", "peft"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(training.CASES, "cpu", [IN_MEMORY, TINY_WAN])
    path = tmp_path / "training.json"
    training.run(training.CASES["cpu"], "cpu", 0.0, 0, path)
    results = json.loads(path.read_text())
    (entry,) = results["cases"]
    assert entry["network"] == PLAIN
    assert list(entry["results"]) == [w.name for w in IMPLEMENTATIONS if not w.ours and not w.lora]
    why = {(s["label"], s["implementation"]): s["reason"] for s in results["skipped"]}
    assert why[IN_MEMORY.label, OURS] == "accelerate is not installed"
    assert why[IN_MEMORY.label, HAND_LORA].startswith("diffusers is not installed")
    assert why[TINY_WAN.label, ""].startswith("accelerate, diffusers: not installed")


def test_a_chunk_leaves_the_shared_networks_as_the_next_needs_them(tmp_path: Path) -> None:
    """They take turns on one policy: hooks, modes and the reference's weights must not be left changed."""
    setup = make_setup(TINY_WAN, "cpu", tmp_path)
    bench = Bench(setup, "cpu", tmp_path)
    before = {name: tensor.clone() for name, tensor in bench.trained[False].reference.state_dict().items()}
    for each in bench.implementations:
        bench.run(each, 6)
        device, host = bench.clock.steps()
        assert len(device) == 3 and device is not None and device == host
        policy = bench.trained[each.lora].policy
        assert "forward" not in policy.__dict__ and policy.training
        assert all(p.grad is None for p in policy.parameters())
    assert all(torch.equal(before[n], t) for n, t in bench.trained[False].reference.state_dict().items())
    base = setup.base.state_dict()
    assert any(not torch.equal(base[n], t) for n, t in bench.trained[False].policy.state_dict().items())


def test_memory_is_looked_at_while_training(tmp_path: Path) -> None:
    for package in ("diffusers", "av"):
        pytest.importorskip(package)
    looks = training_memory.watch(8, "cpu", tmp_path)
    assert [look["step"] for look in looks] == list(range(1, 9))
    assert all(look["rss_mb"] > 50 and look["python_objects"] > 1000 for look in looks)
    memory = training_memory.summarise(looks)
    warm = [look for look in looks if look["step"] >= 2]
    line = statistics.linear_regression([w["step"] for w in warm], [w["rss_mb"] for w in warm])
    assert memory["growth_mb_per_1000_steps"] == pytest.approx(1000 * line.slope)
    assert memory["steps"] == 8 and memory["met"] is None


@pytest.mark.parametrize(("per_step", "met"), [(0.0005, True), (0.002, False)])
def test_growth_is_what_a_warm_run_adds(per_step: float, met: bool) -> None:
    looks = [{"step": s, "rss_mb": 500.0 + per_step * s + (80 if s < 500 else 0)} for s in range(100, 2001, 100)]
    memory = training_memory.summarise(looks)
    assert memory["growth_mb_per_1000_steps"] == pytest.approx(1000 * per_step)
    assert memory["met"] is met


def test_resident_memory_counts_what_is_touched() -> None:
    before = training_memory.resident_mb()
    held = torch.ones(16 << 20)
    assert 60 < training_memory.resident_mb() - before < 75
    del held
