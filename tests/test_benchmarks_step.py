"""``benchmarks.step`` on a tiny network: every loss takes its turn, and the file has what it promises. No timings."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import baselines, step, step_cases, step_network
from sipo_kernels import backends
from tests.benchmark_results import small_machine

__all__ = ["small_machine"]  # a fixture that every test here runs in

OURS = baselines.OURS + backends.choose("auto", torch.device("cpu"))


def test_a_tiny_run_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    path = tmp_path / "step.json"
    step.main(["--device=cpu", "--quick", "--seconds=0", f"--output={path}"])
    results = json.loads(path.read_text())
    assert (results["kind"], results["complete"], results["auto"], results["skipped"]) == ("step", True, OURS, [])
    (entry,) = results["cases"]
    assert entry["network"] == step_network.WAN and entry["shape"] == [2, 16, 1, 4, 8]
    assert entry["elements"] == 2 * 16 * 4 * 8 and entry["floor_bytes"] == 4 * 4 * entry["elements"]
    assert (entry["mode"], entry["target"], entry["upstream"]) == (step_cases.MODE, "float32", 1 / 8)
    assert list(entry["results"]) == [step.TRIVIAL, baselines.PUBLISHED, baselines.UPCAST, baselines.COMPILED, OURS]
    for name, result in entry["results"].items():
        assert result["wall_ms"]["runs"] >= 3 and result["peak_mb"] > 0
        if name == step.TRIVIAL:
            assert "difference_ms" not in result
            continue
        median = entry["results"][step.TRIVIAL]["wall_ms"]["median"]
        difference = result["difference_ms"]
        assert difference["median"] == pytest.approx(result["wall_ms"]["median"] - median)
        assert difference["interval"][0] <= difference["interval"][1]
        share = result["direct_ms"]["wall_ms"]["median"] / result["wall_ms"]["median"]
        assert result["share_direct"] == pytest.approx(share)
        assert result["loss_error"] < 1e-3 and result["grad_error"] < 1e-3
        assert result["extra_mb"] == pytest.approx(result["peak_mb"] - entry["results"][step.TRIVIAL]["peak_mb"])


def test_a_wrong_loss_is_listed_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*tensors: Any) -> torch.Tensor:
        *inputs, beta = tensors
        return baselines.published(*inputs, 2 * beta)

    monkeypatch.setattr(baselines, "upcast", wrong)
    entry, failed = step.measure_case(step.TINY, "cpu", 0.0, 10.0)
    assert set(failed) == {baselines.UPCAST, baselines.COMPILED}
    assert failed[baselines.UPCAST].startswith("wrong result, not timed: ")
    assert list(entry["results"]) == [step.TRIVIAL, baselines.PUBLISHED, OURS]


def test_half_predictions_meet_a_float32_target() -> None:
    """The network's type is the predictions'; the loss's floor counts the target in its own."""
    case = step.CASES["cuda"][0]
    assert case.floor_bytes == 10 * case.elements
    half = dataclasses.replace(step.TINY, dtype="bfloat16")
    made = step.Step(half, "cpu")
    batch = made.frozen()
    assert [t.dtype for t in batch[:3] if t is not None] == [torch.bfloat16, torch.bfloat16, torch.float32]
    loss_error, grad_error = step._errors(step.losses("cpu")[OURS], batch)
    assert loss_error < 1e-5 and grad_error < 4e-3  # bfloat16 has 8 bits


def test_a_step_trains_the_policy_alone() -> None:
    made = step.Step(step.TINY, "cpu")
    before = [[p.detach().clone() for p in network.parameters()] for network in (made.policy, made.reference)]
    model_pred, ref_pred = made.predict()
    assert torch.equal(model_pred, ref_pred) and model_pred.requires_grad and not ref_pred.requires_grad
    made.run(step.losses("cpu")[OURS])
    moved = [
        any(not torch.equal(p, old) for p, old in zip(network.parameters(), olds, strict=True))
        for network, olds in zip((made.policy, made.reference), before, strict=True)
    ]
    assert moved == [True, False]
    model_pred, ref_pred = made.predict()
    assert not torch.equal(model_pred, ref_pred)
    assert all(p.grad is None for p in made.policy.parameters())


def test_without_diffusers_it_says_so_and_takes_another_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    step_network._say_once.cache_clear()
    made = step.Step(step.TINY, "cpu")
    assert made.network == step_network.PLAIN
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "a plain torch transformer of similar shape takes its place" in said
    model_pred, _ = made.predict()
    assert model_pred.shape == step.TINY.shape
    made.run(step.losses("cpu")[OURS])
    changed, _ = made.predict()
    assert not torch.equal(changed, model_pred)
    # The output depends on everything that goes in.
    for name in ("latents", "text", "timesteps"):
        kept = getattr(made, name)
        setattr(made, name, kept + 1)
        assert not torch.equal(made.predict()[0], changed), name
        setattr(made, name, kept)


def test_difference_of_medians() -> None:
    same = step.difference([1.0, 2.0, 3.0] * 5, [1.0, 2.0, 3.0] * 5)
    assert same["median"] == 0 and same["interval"][0] <= 0 <= same["interval"][1]
    apart = step.difference([11.0, 12.0, 13.0] * 5, [1.0, 2.0, 3.0] * 5)
    assert apart["median"] == 10 and 8 <= apart["interval"][0] <= 10 <= apart["interval"][1] <= 12
