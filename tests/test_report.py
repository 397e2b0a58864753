"""docs/math.md §8 out of the kernels: metrics, and running sums over calls, against plain torch on the same fields."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from sipo_kernels import METHODS, METRICS, STATISTICS, Totals, backends, pair_loss
from sipo_kernels.output import add_totals
from sipo_kernels.testing import Batch, make_batch, run, run_reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BINS = 7


def totals(timesteps: Tensor, top: float = 1000.0) -> Totals:
    levels = torch.zeros(len(STATISTICS), BINS, device=DEVICE)
    return Totals(torch.zeros(2, len(METRICS), device=DEVICE), levels, timesteps.to(DEVICE), top)


def assert_same_sums(got: Totals, want: Totals) -> None:
    """Within the rounding of float32 fields, whose squares and small differences the statistics are made of."""
    assert got.metrics is not None and want.metrics is not None and got.levels is not None and want.levels is not None
    assert torch.equal(got.metrics[1], want.metrics[1])
    torch.testing.assert_close(got.metrics[0], want.metrics[0], rtol=2e-5, atol=1e-6)
    assert torch.equal(got.levels[:2], want.levels[:2])
    torch.testing.assert_close(got.levels[2:], want.levels[2:], rtol=2e-5, atol=1e-6)


def broken(batch: Batch, sample: int, value: float = math.nan) -> Batch:
    model = batch.model_pred.detach().clone()
    model[sample, 0, 0] = value
    return batch._replace(model_pred=model.requires_grad_())


@pytest.mark.parametrize("types", [(F32,) * 3, (BF16, BF16, F32), (F64, F32, F32)])
def test_metrics_and_totals_are_those_of_the_fields(backend: str, types: tuple[torch.dtype, ...]) -> None:
    clean = make_batch((12, 3, 37), types, distance=1.0, weighted=True, device=DEVICE)
    timesteps = torch.tensor([0, 142, 143, 999, 500, 500])
    kinds = itertools.product(METHODS, ("mean", "sum", "none"), ("propagate", "skip"), (None, 4))
    for turn, (method, reduction, nonfinite, bad) in enumerate(kinds):
        if backend == "triton" and turn % 5:  # its interpreter is slow
            continue
        batch = clean if bad is None else broken(clean, bad)
        options: dict[str, Any] = {"method": method, "reduction": reduction, "nonfinite": nonfinite, "beta": 3.0}
        options["mask_threshold"] = (0.0, 0.9)[turn % 2]
        upstream = torch.ones(6, device=DEVICE, dtype=F64 if F64 in types else F32) if reduction == "none" else None
        got, want = totals(timesteps), totals(timesteps)
        out, _ = run(batch, backend, upstream=upstream, totals=got, **options)
        assert (out.numbers is None) == (backend == "eager")
        fields = dataclasses.replace(out, numbers=None)
        for name, value in fields.metrics().items():
            torch.testing.assert_close(
                out.metrics()[name], value, rtol=2e-6, atol=1e-7, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        unit = 111 / 3.0 * (6 if reduction == "mean" else 1)
        add_totals(want, fields, unit)
        assert_same_sums(got, want)
        assert got.levels is not None and got.levels[:2].sum() == 6


@pytest.mark.parametrize("method", METHODS)
def test_rewards_are_what_the_logit_is_made_of(backend: str, method: str) -> None:
    """TRL's identity: the margin is the chosen reward less the rejected one, error weights and ratios included."""
    batch = make_batch((12, 3, 37), (F32,) * 3, distance=1.0, weighted=True, device=DEVICE)
    out, _ = run(batch, backend, method=method, beta=3.0, mask_threshold=0.0)
    truth = run_reference(batch, method=method, beta=3.0, mask_threshold=0.0)
    chosen, rejected = out.reward.chunk(2)
    torch.testing.assert_close(chosen - rejected, out.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.reward.double().cpu(), truth.reward.cpu(), rtol=1e-5, atol=1e-6)
    if method == "diffusion_dpo":
        assert batch.error_weight is not None
        plain = -1.5 * batch.error_weight.double() * out.error_gap.double()
        torch.testing.assert_close(out.reward.double(), plain, rtol=1e-5, atol=1e-6)
    metrics = out.metrics()
    torch.testing.assert_close(metrics["rewards/chosen"], chosen.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["rewards/rejected"], rejected.mean(), rtol=1e-5, atol=1e-6)
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    torch.testing.assert_close(margin, metrics["rewards/margins"], rtol=1e-5, atol=1e-6)


def test_totals_run_over_calls_in_the_same_bits(backend: str) -> None:
    """Two calls add up; the same two calls again give the same sums, with the gradient or without."""
    batches = [make_batch((10, 3, 517), (BF16, BF16, F32), seed=seed, device=DEVICE) for seed in range(2)]
    timesteps = torch.tensor([10, 990, 10, 400, 10])
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0}
    found = []
    for grad in (True, True, False):
        sums = totals(timesteps)
        with torch.set_grad_enabled(grad):
            for batch in batches:
                pair_loss(*batch[:3], ratio_scale=batch.ratio_scale, backend=backend, totals=sums, **options)
        found.append(sums)
    for other in found[1:]:
        assert torch.equal(other.metrics, found[0].metrics) and torch.equal(other.levels, found[0].levels)
    assert found[0].metrics[1].tolist() == [10.0] * (len(METRICS) - 1) + [2.0]  # pairs; for a number of them, calls
    assert found[0].levels[0].tolist() == [6.0, 0.0, 2.0, 0.0, 0.0, 0.0, 2.0]


def test_what_is_not_finite_is_left_out_of_the_sums(backend: str) -> None:
    batch = broken(make_batch((6, 3, 37), device=DEVICE), 4)
    sums = totals(torch.tensor([10, 20, 30]))
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0}
    for nonfinite in ("propagate", "skip"):
        run(batch, backend, totals=sums, nonfinite=nonfinite, **options)
    counts = dict(zip(METRICS, sums.metrics[1].tolist(), strict=True))
    assert counts["loss"] == 3 and counts["model_mse"] == 2  # of "skip" alone, which has two finite pairs of three
    assert counts["nonfinite_pairs"] == 2 and counts["active_fraction"] == 6 and counts["ref_mse"] == 5
    assert sums.metrics[0][METRICS.index("nonfinite_pairs")] == 2
    assert bool(sums.metrics.isfinite().all()) and bool(sums.levels.isfinite().all())
    assert sums.levels[:2, 0].tolist() == [4.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, F32, F64, BF16, F16])
def test_timesteps_of_any_type_and_stride(backend: str, dtype: torch.dtype) -> None:
    batch = make_batch((6, 3, 5), device=DEVICE)
    options: dict[str, Any] = {"method": "diffusion_dpo", "beta": 3.0}
    place = torch.tensor([6.0, 0.0, 3.0])
    for timesteps in (place, place.repeat(2), torch.stack([place, place], 1)[:, 0]):
        sums = totals(timesteps.to(dtype), top=7.0)
        assert sums.pair_levels is not None and sums.pair_levels.dtype == dtype
        run(batch, backend, totals=sums, **options)
        assert sums.levels[0].tolist() == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def test_ends_of_the_noise_levels(backend: str) -> None:
    """σ in (0, 1] in equal bins, 1 in the last; float32's 2/7 begins a bin; what lies outside is at an end."""
    batch = make_batch((16, 3), device=DEVICE)
    sigma = torch.tensor([1e-6, 1 / 7, 2 / 7, 0.999, 1.0, -3.0, math.inf, math.nan])
    sums = totals(sigma, top=1.0)
    run(batch, backend, totals=sums, method="diffusion_dpo", beta=3.0)
    assert sums.levels[0].tolist() == [3.0, 1.0, 1.0, 0.0, 0.0, 0.0, 3.0]


def test_many_pairs(backend: str) -> None:
    """More than a block has threads, and than a group has pairs."""
    pairs = 40 if backend == "triton" else 700
    batch = make_batch((2 * pairs, 5), distance=1.0, device=DEVICE)
    timesteps = torch.arange(pairs) * 1000 // pairs
    got, want = totals(timesteps), totals(timesteps)
    out, _ = run(batch, backend, totals=got, method="sipo", beta=3.0, mask_threshold=0.9)
    add_totals(want, dataclasses.replace(out, numbers=None), 5 * pairs / 3.0)
    torch.testing.assert_close(got.metrics, want.metrics, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.levels, want.levels, rtol=1e-4, atol=1e-4)
    assert got.levels[0].sum() == pairs


def test_metrics_alone_and_levels_alone(backend: str) -> None:
    batch = make_batch((6, 3, 5), device=DEVICE)
    both = totals(torch.tensor([0, 500, 999]))
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0}
    run(batch, backend, totals=both, **options)
    metrics, levels = Totals(torch.zeros_like(both.metrics)), both._replace(levels=torch.zeros_like(both.levels))
    run(batch, backend, totals=metrics, **options)
    run(batch, backend, totals=levels._replace(metrics=None), **options)
    assert torch.equal(metrics.metrics, both.metrics) and torch.equal(levels.levels, both.levels)


def test_by_operator_too() -> None:
    """Under torch.compile the sums are torch's own operations in the graph."""
    torch._dynamo.reset()
    batch = make_batch((6, 3, 5), device=DEVICE)
    direct, traced = totals(torch.tensor([0, 500, 999])), totals(torch.tensor([0, 500, 999]))
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "ratio_scale": batch.ratio_scale}

    def step(model: Tensor, sums: Totals) -> Tensor:
        return pair_loss(model, *batch[1:3], totals=sums, **options).loss

    step(batch.model_pred, direct)
    torch.compile(step, fullgraph=True, backend="aot_eager")(batch.model_pred, traced)
    assert_same_sums(traced, direct)


GOOD = torch.zeros(len(STATISTICS), 3)


@pytest.mark.parametrize(
    ("sums", "error", "message"),
    [
        ((None, None), TypeError, "totals is a tuple: expected sipo_kernels.Totals"),
        (Totals(torch.zeros(2, 3)), ValueError, r"totals.metrics has shape \[2, 3\]: expected \[2, 13\]"),
        (Totals(torch.zeros(2, 13, dtype=F64)), TypeError, "totals.metrics has dtype torch.float64: expected"),
        (Totals(torch.zeros(13, 2).T), ValueError, "totals.metrics requires grad, is not contiguous"),
        (Totals(None, torch.zeros(3, 50), torch.zeros(2)), ValueError, r"totals.levels has shape \[3, 50\]"),
        (Totals(None, torch.zeros(18, 0), torch.zeros(2)), ValueError, r"totals.levels has shape \[18, 0\]"),
        (Totals(None, GOOD), TypeError, "totals.pair_levels is a NoneType: expected a tensor"),
        (
            Totals(None, GOOD, torch.zeros(3)),
            ValueError,
            r"totals.pair_levels has shape \[3\]: expected \[2\], or \[4\]",
        ),
        (Totals(None, GOOD, torch.ones(2, dtype=torch.bool)), TypeError, "totals.pair_levels is a torch.bool"),
        (Totals(None, GOOD, torch.zeros(2), 0.0), ValueError, "totals.top=0.0: expected a finite number > 0"),
    ],
)
def test_totals_that_do_not_fit_are_refused(sums: Any, error: type[Exception], message: str) -> None:
    batch = make_batch((4, 3))
    with pytest.raises(error, match=message):
        run(batch, "eager", method="diffusion_dpo", beta=1.0, totals=sums)
    assert not GOOD.any()


def test_an_output_that_was_changed_is_reported_as_it_is() -> None:
    batch = make_batch((4, 3), device=DEVICE)
    out, _ = run(batch, "auto", method="diffusion_dpo", beta=1.0)
    changed = dataclasses.replace(out, mask=torch.zeros_like(out.mask), numbers=None)
    assert out.metrics()["active_fraction"] == 1 and changed.metrics()["active_fraction"] == 0
    assert list(out.metrics()) == list(changed.metrics()) == list(METRICS)
    assert "native" in backends.FUSED
