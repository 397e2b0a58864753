"""One contract for every backend: the values of sipo_kernels/reference.py, and the properties of docs/math.md."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE, GOLDEN_FILES, each_backend_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from sipo_kernels import METHODS, LossOptions, backends, pair_loss, reference
from sipo_kernels.output import RESULTS, PairLossOutput
from sipo_kernels.testing import (
    Batch,
    assert_within_budget,
    beta_for,
    golden_cases,
    make_batch,
    reference_grad,
    run,
    run_reference,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CASES = golden_cases(GOLDEN_FILES)

# Odd shapes are the normal case: primes, ones, one pair, a run longer than a chunk of any backend.
SHAPES = [(2, 1), (2,), (4, 7), (6, 3, 5, 7), (2, 4, 8, 8), (10, 1, 1, 13), (4, 2, 3, 5, 11), (2, 8209)]
sizes = st.sampled_from(SHAPES)
dtypes = st.tuples(*[st.sampled_from([F32, BF16, F16, F64])] * 3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case: Any, backend: str) -> None:
    model = case.model_pred.to(DEVICE).requires_grad_()
    out = pair_loss(
        model,
        case.ref_pred.to(DEVICE),
        case.target.to(DEVICE),
        ratio_scale=case.ratio_scale.to(DEVICE),
        backend=backend,
        **case.options,
    )
    (grad,) = torch.autograd.grad(out.loss, model)
    for name in ("model_error", "ref_error", "error_gap", "log_ratio", "weight", "logits", "loss"):
        torch.testing.assert_close(
            getattr(out, name).cpu(), case.expected[name], rtol=1e-11, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert torch.equal(out.mask.cpu(), case.expected["mask"])
    torch.testing.assert_close(grad.cpu(), case.expected["grad"], rtol=1e-11, atol=1e-15)


@settings(max_examples=60)
@given(
    shape=sizes,
    types=dtypes,
    method=st.sampled_from(METHODS),
    ratio=st.sampled_from(["posterior", "reference"]),
    reduction=st.sampled_from(["mean", "sum"]),
    distance=st.sampled_from([1e-3, 0.1, 1.0]),
    shared=st.booleans(),
    weighted=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_reference(
    backend: str,
    shape: tuple[int, ...],
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    method: str,
    ratio: str,
    reduction: str,
    distance: float,
    shared: bool,
    weighted: bool,
    masked: bool,
    seed: int,
) -> None:
    batch = make_batch(
        shape, types, distance=distance, shared_target=shared, weighted=weighted, seed=seed, device=DEVICE
    )
    options = {"method": method, "ratio": ratio, "mask_threshold": 0.9 if masked else 0.0}
    options |= {"beta": beta_for(batch, **options), "reduction": reduction}
    out, grad = run(batch, backend, **options)
    assert_within_budget(batch, out, grad, reference_grad(batch, **options), run_reference(batch, **options))
    assert grad.dtype == batch.model_pred.dtype


@settings(max_examples=25)
@given(
    exponent=st.integers(-4, 4),
    dtype=st.sampled_from([F32, BF16, F64]),
    shape=st.sampled_from([(4, 3, 5, 7), (2, 1)]),
    seed=st.integers(0, 10_000),
)
def test_scales(backend: str, exponent: int, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    batch = make_batch(shape, (dtype,) * 3, scale=10.0**exponent, seed=seed, device=DEVICE)
    options: dict[str, Any] = {"method": "sipo"}
    options["beta"] = beta_for(batch, **options)
    out, grad = run(batch, backend, **options)
    assert_within_budget(batch, out, grad, reference_grad(batch, **options), run_reference(batch, **options))


@functools.cache
def long_sample(shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype, torch.dtype], shared: bool) -> Any:
    """Two pairs, options, and what the reference makes of them, which takes longer than any backend."""
    batch = make_batch((4, *shape), types, distance=0.05, shared_target=shared, device=DEVICE)
    options: dict[str, Any] = {"method": "dpo_cm", "mask_threshold": 0.0}
    options["beta"] = beta_for(batch, **options)
    return batch, options, reference_grad(batch, **options), run_reference(batch, **options)


# Types of real training first: half-precision predictions beside a float32 target.
@pytest.mark.parametrize(
    ("types", "shared"),
    [((BF16, BF16, F32), False), ((BF16, BF16, F32), True), ((F16, F16, F32), True), ((F32,) * 3, False),
     ((BF16,) * 3, False)],
)  # fmt: skip
def test_a_long_sample(backend: str, types: tuple[torch.dtype, ...], shared: bool) -> None:
    """Longer than SMALL_SAMPLE, so that float32 terms are summed, and over many chunks, blocks and threads."""
    # Backend triton's interpreter is slow.
    batch, options, *truth = long_sample((3, 211, 337) if backend == "triton" else (7, 223, 353), types, shared)
    assert_within_budget(batch, *run(batch, backend, **options), *truth)


@pytest.mark.parametrize("types", [(F32,) * 3, (BF16, BF16, F32), (F16, F16, F32), (BF16,) * 3])
def test_long_sums_that_cancel(backend: str, types: tuple[torch.dtype, ...]) -> None:
    """Unrelated policy and reference: the gap is a hundredth of its terms.

    Summing float32 predictions in float32 misses the budget; half-precision ones, whose differences are exact, do not.
    """
    for seed in range(8 if types[0] == F32 else 4):
        batch = make_batch((2, 4, 128, 128), types, distance=1.0, seed=seed, device=DEVICE)
        options: dict[str, Any] = {"method": "dpo_cm", "mask_threshold": 0.0}
        options["beta"] = beta_for(batch, 20.0, **options)
        out, grad = run(batch, backend, **options)
        assert_within_budget(batch, out, grad, reference_grad(batch, **options), run_reference(batch, **options))


# ---- Layouts ---------------------------------------------------------------------------------------------------------


def _assert_same(got: torch.Tensor, want: torch.Tensor, backend: str) -> None:
    """Bit for bit; backend ``cuda`` sums in an order that depends on alignment and on whether a gradient is made."""
    if backend == "cuda" and got.is_floating_point():
        torch.testing.assert_close(got, want, rtol=2**-8 if got.dtype == BF16 else 3e-7, atol=0)
    else:
        assert torch.equal(got, want)


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in every stride that a network can produce; ``x`` is ``[S, C, F, H, W]``."""
    wide = torch.empty(x.shape[0], 2 * x.shape[1], *x.shape[2:], dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    steps = torch.empty(2 * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
    steps[::2] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last_3d": x.contiguous(memory_format=torch.channels_last_3d),
        "frames first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "half the channels": wide[:, : x.shape[1]],
        "every other sample": steps[::2],
        "batch innermost": x.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
        "strided last": torch.stack([x, x], -1)[..., 0],
        "offset storage": torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape),
    }


LAYOUTS = list(_layouts(torch.zeros(2, 2, 2, 2, 2)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts(layout: str, dtype: torch.dtype, backend: str) -> None:
    base = make_batch((4, 4, 3, 5, 6), (dtype,) * 3, device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0}
    _, plain = run(base, backend, **options)
    model = _layouts(base.model_pred.detach())[layout].detach().requires_grad_()
    for other in LAYOUTS:
        batch = Batch(
            model, _layouts(base.ref_pred)[layout], _layouts(base.target)[other], base.ratio_scale, base.error_weight
        )
        _, grad = run(batch, backend, **options)
        _assert_same(grad, plain, backend)
        # The gradient has model_pred's layout wherever that is dense.
        expected = torch.empty_like(model)
        assert grad.stride() == expected.stride()


def test_expanded_inputs(backend: str) -> None:
    batch = make_batch((4, 3, 5), device=DEVICE)
    one = batch.target[:1]
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0}
    out, grad = run(batch._replace(target=one.expand(4, 3, 5)), backend, **options)
    copied, copied_grad = run(batch._replace(target=one.repeat(4, 1, 1)), backend, **options)
    assert torch.equal(out.logits, copied.logits)
    assert torch.equal(grad, copied_grad)


def test_shared_target_is_the_stacked_target(backend: str) -> None:
    batch = make_batch((6, 3, 7), shared_target=True, device=DEVICE)
    stacked = batch._replace(target=torch.cat([batch.target, batch.target]))
    out, grad = run(batch, backend, method="sipo", beta=5.0)
    same, same_grad = run(stacked, backend, method="sipo", beta=5.0)
    assert torch.equal(out.logits, same.logits) and torch.equal(grad, same_grad)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_reference_errors_in_place_of_the_reference(backend: str, dtype: torch.dtype) -> None:
    batch = make_batch((6, 3, 37), (dtype,) * 3, distance=1.0, device=DEVICE)
    truth_full = run_reference(batch, method="sipo", beta=3.0)
    given = truth_full.ref_error
    out = pair_loss(
        batch.model_pred, None, batch.target, ref_error=given, method="sipo", beta=3.0,
        ratio_scale=batch.ratio_scale, backend=backend,
    )  # fmt: skip
    truth = reference.pair_loss(
        batch.model_pred.detach(), None, batch.target, ref_error=given, method="sipo", beta=3.0,
        ratio_scale=batch.ratio_scale,
    )  # fmt: skip
    torch.testing.assert_close(out.logits.double(), truth.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.ref_error.double(), given, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.logits.double(), truth_full.logits, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(out.loss, batch.model_pred)
    exact = reference_grad(batch, method="sipo", beta=3.0)
    assert (grad.double() - exact).norm() <= (2**-8 if dtype == BF16 else 5e-6) * exact.norm()


# ---- Invariances -----------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(shape=sizes, dtype=st.sampled_from([F32, BF16]), seed=st.integers(0, 1000))
def test_swapping_negates_diffusion_dpo(backend: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    batch = make_batch(shape, (dtype,) * 3, seed=seed, device=DEVICE)
    swapped = Batch(*(torch.cat(t.detach().chunk(2)[::-1]) for t in batch[:4]))
    swapped.model_pred.requires_grad_()
    out, _ = run(batch, backend, method="diffusion_dpo", beta=7.0)
    other, _ = run(swapped, backend, method="diffusion_dpo", beta=7.0)
    assert torch.equal(out.logits, -other.logits)
    assert bool((out.logits != 0).any())


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_permuting_elements_changes_rounding_only(backend: str, seed: int) -> None:
    batch = make_batch((4, 523), seed=seed, device=DEVICE)
    order = torch.randperm(523, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    shuffled = Batch(*(t.detach()[:, order] for t in batch[:3]), batch.ratio_scale)
    shuffled.model_pred.requires_grad_()
    options: dict[str, Any] = {"method": "sipo", "mask_threshold": 0.0}
    options["beta"] = beta_for(batch, **options)
    out, grad = run(batch, backend, **options)
    other, other_grad = run(shuffled, backend, **options)
    torch.testing.assert_close(other.logits, out.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_grad, grad[:, order], rtol=1e-5, atol=0)


@settings(max_examples=20)
@given(shape=sizes, types=dtypes, method=st.sampled_from(METHODS), seed=st.integers(0, 1000))
def test_policy_equal_to_reference(
    backend: str, shape: tuple[int, ...], types: tuple[torch.dtype, ...], method: str, seed: int
) -> None:
    batch = make_batch(shape, (types[0], types[0], types[2]), seed=seed, weighted=True, device=DEVICE)
    batch = batch._replace(ref_pred=batch.model_pred.detach().clone())
    out, grad = run(batch, backend, method=method, beta=2000.0)
    assert torch.equal(out.logits, torch.zeros_like(out.logits))
    assert torch.equal(out.error_gap, torch.zeros_like(out.error_gap))
    active = out.mask.double()
    if method == "dpo_cm":
        active = active * torch.minimum(*out.weight.double().chunk(2))
    torch.testing.assert_close(out.loss.double(), active.mean() * math.log(2), rtol=1e-6, atol=0)
    d = batch.model_pred.double() - batch.target.double()
    moved = grad.double().flatten(1).norm(dim=1) if grad.ndim > 1 else grad.double().abs()
    away = d.flatten(1).norm(dim=1) if d.ndim > 1 else d.abs()
    assert torch.equal(moved > 0, (away > 0) & out.mask.repeat(2))


def test_masked_pairs_get_exact_zeros(backend: str) -> None:
    batch = make_batch((8, 3, 11), distance=1.0, device=DEVICE)
    scale = torch.tensor([0.0, 9.0, 0.0, math.inf] * 2, dtype=F64, device=DEVICE)
    batch = batch._replace(ratio_scale=scale)
    with torch.no_grad():  # a pair pruned by its timestep may hold anything
        batch.model_pred[7, 0, 3] = math.inf
        batch.model_pred[5] = 1e30
    for upstream in (None, torch.tensor(math.inf, device=DEVICE), torch.tensor(0.25, device=DEVICE)):
        out, grad = run(batch, backend, upstream=upstream, method="sipo", beta=3.0, nonfinite="skip")
        assert out.mask.tolist() == [True, False, True, False]
        for masked in (1, 3, 5, 7):
            assert torch.equal(grad[masked], torch.zeros_like(grad[masked]))
        for active in (0, 2, 4, 6):
            assert bool((grad[active] != 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["model_pred", "ref_pred", "target"])
def test_a_broken_pair_stays_alone(backend: str, where: str, value: float) -> None:
    clean = make_batch((6, 3, 517), device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, "reduction": "none"}
    ones = torch.ones(3, device=DEVICE)
    before, grad_before = run(clean, backend, upstream=ones, **options)
    tensors = {name: getattr(clean, name).detach().clone() for name in ("model_pred", "ref_pred", "target")}
    tensors[where][4, 1, 7] = value  # rejected sample of pair 1
    tensors["model_pred"].requires_grad_()
    broken = clean._replace(**tensors)
    after, grad_after = run(broken, backend, upstream=ones, **options)
    keep = torch.tensor([0, 2], device=DEVICE)
    assert torch.equal(after.loss[keep], before.loss[keep])
    rows = torch.tensor([0, 2, 3, 5], device=DEVICE)
    assert torch.equal(grad_after[rows], grad_before[rows])
    # ... and is what torch would make of it.
    truth = run_reference(broken, **options)
    torch.testing.assert_close(after.logits.double(), truth.logits, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(after.loss.double(), truth.loss, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert after.metrics()["nonfinite_pairs"].item() == 1

    skipped, grad_skipped = run(broken, backend, upstream=ones, **options, nonfinite="skip")
    assert skipped.mask.tolist() == [True, False, True]
    assert skipped.loss[1].item() == 0
    assert torch.equal(skipped.loss[keep], before.loss[keep])
    assert torch.equal(grad_skipped[[1, 4]], torch.zeros_like(grad_skipped[[1, 4]]))
    assert torch.equal(grad_skipped[rows], grad_before[rows])
    assert skipped.metrics()["nonfinite_pairs"].item() == 1

    with pytest.raises(FloatingPointError, match=r"pairs \[1\] of 3 are not finite"):
        run(broken, backend, **options, nonfinite="raise")


def test_skip_leaves_the_mean_over_all_pairs(backend: str) -> None:
    batch = make_batch((6, 3, 5), device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, "nonfinite": "skip"}
    each, _ = run(batch, backend, upstream=torch.ones(3, device=DEVICE), reduction="none", **options)
    with torch.no_grad():
        batch.model_pred[0] = math.nan
    out, _ = run(batch, backend, **options)
    torch.testing.assert_close(out.loss, (each.loss[1] + each.loss[2]) / 3)
    metrics = out.metrics()
    assert metrics["active_fraction"].item() == pytest.approx(2 / 3)
    torch.testing.assert_close(metrics["rewards/margins"], out.logits[1:].mean())
    torch.testing.assert_close(metrics["model_mse"], out.model_error[[1, 2, 4, 5]].mean())


def test_terminal_step(backend: str) -> None:
    batch = make_batch((4, 3, 5), device=DEVICE)
    scale = torch.tensor([math.inf, 0.0, 0.01, 0.01], dtype=F64, device=DEVICE)
    with torch.no_grad():
        batch.target[0] = batch.model_pred[0]  # error 0: −inf by definition, never NaN
    out, _ = run(batch._replace(ratio_scale=scale), backend, method="sipo", beta=3.0)
    assert out.log_ratio[0].item() == -math.inf
    assert out.weight[0].item() == pytest.approx(0.9)
    assert out.mask.tolist() == [False, True]
    out, _ = run(batch._replace(ratio_scale=scale), backend, method="sipo", beta=3.0, mask_threshold=0.0)
    assert out.mask.tolist() == [True, True]


def test_extreme_logits(backend: str) -> None:
    """Far out the loss is linear, its gradient 0 or full; nothing overflows."""
    batch = make_batch((4, 31), (F64,) * 3, distance=1.0, device=DEVICE)
    for beta in (1e4, 1e7):
        out, grad = run(batch, backend, method="diffusion_dpo", beta=beta)
        truth = run_reference(batch, method="diffusion_dpo", beta=beta)
        torch.testing.assert_close(out.loss, truth.loss, rtol=1e-10, atol=1e-300)
        exact = reference_grad(batch, method="diffusion_dpo", beta=beta)
        torch.testing.assert_close(grad, exact, rtol=1e-10, atol=0)


# ---- Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(backend: str, method: str, reduction: str) -> None:
    """Numerical differentiation of diffusion_dpo; the others hold their weights constant, which it cannot see."""
    batch = make_batch((4, 1, 3), (F64,) * 3, distance=1.0, device=DEVICE)
    scale = batch.ratio_scale if method == "diffusion_dpo" else torch.zeros_like(batch.ratio_scale)

    def loss(model_pred: torch.Tensor) -> torch.Tensor:
        return pair_loss(
            model_pred, batch.ref_pred, batch.target, method=method, beta=3.0, ratio_scale=scale,
            reduction=reduction, backend=backend,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, batch.model_pred, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("upstream", [0.25, 1 / 3, 65536.0, -2.0, 0.0])
def test_upstream_gradient(backend: str, dtype: torch.dtype, upstream: float) -> None:
    batch = make_batch((4, 3, 97), (dtype,) * 3, device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0}
    factor = torch.tensor(upstream, dtype=F32, device=DEVICE)
    _, grad = run(batch, backend, upstream=factor, **options)
    exact = reference_grad(batch, grad_output=factor.double(), **options)
    rounding = (exact.to(dtype).double() - exact).norm()
    assert (grad.double() - exact).norm() <= rounding + 1e-6 * exact.norm()


def test_float16_gradients_survive_through_the_loss_scale(backend: str) -> None:
    """Unscaled, every gradient of this batch is below float16's smallest number."""
    batch = make_batch((2, 40_000), (F16,) * 3, scale=0.01, device=DEVICE)
    options: dict[str, Any] = {"method": "diffusion_dpo", "beta": 0.01}
    _, unscaled = run(batch, backend, **options)
    assert torch.count_nonzero(unscaled) == 0
    scale = torch.tensor(2.0**20, device=DEVICE)
    _, grad = run(batch, backend, upstream=scale, **options)
    exact = reference_grad(batch, grad_output=scale.double(), **options)
    assert (grad.double() - exact).norm() <= (exact.to(F16).double() - exact).norm() + 1e-6 * exact.norm()
    assert torch.count_nonzero(grad) > 30_000


def test_incoming_gradient_of_any_stride(backend: str) -> None:
    batch = make_batch((6, 3, 7), device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, "reduction": "none"}
    dense = torch.tensor([0.5, 0.5, 0.5], device=DEVICE)
    _, expected = run(batch, backend, upstream=dense, **options)
    expanded = torch.tensor(0.5, device=DEVICE).expand(3)
    strided = torch.full((3, 2), 0.5, device=DEVICE)[:, 0]
    for upstream in (expanded, strided):
        _, grad = run(batch, backend, upstream=upstream, **options)
        assert torch.equal(grad, expected)
    per_pair = torch.tensor([1.0, -3.0, 0.0], device=DEVICE)
    _, grad = run(batch, backend, upstream=per_pair, **options)
    exact = reference_grad(batch, grad_output=per_pair.double(), **options)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-6, atol=1e-12)


def test_accumulation_adds_up(backend: str) -> None:
    """Two half batches at half the loss give the whole batch's gradient."""
    batch = make_batch((8, 3, 13), device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, "backend": backend}
    _, whole = run(batch, backend, method="sipo", beta=3.0, mask_threshold=0.0)
    batch.model_pred.grad = None
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
        part = [t[rows] for t in batch[:4]]
        out = pair_loss(*part[:3], ratio_scale=part[3], **options)
        (out.loss / 2).backward()
    torch.testing.assert_close(batch.model_pred.grad, whole, rtol=1e-5, atol=1e-9)


def test_backward_twice_through_a_kept_graph(backend: str) -> None:
    batch = make_batch((4, 3, 13), device=DEVICE)
    out = pair_loss(*batch[:3], method="sipo", beta=3.0, ratio_scale=batch.ratio_scale, backend=backend)
    (first,) = torch.autograd.grad(out.loss, batch.model_pred, retain_graph=True)
    kept = first.clone()
    first.mul_(100)  # what was handed out is the caller's
    (second,) = torch.autograd.grad(out.loss, batch.model_pred)
    assert torch.equal(second, kept)


def test_identical_bits(backend: str) -> None:
    batch = make_batch((6, 5, 1999), (BF16, BF16, F32), device=DEVICE)
    out, grad = run(batch, backend, method="sipo", beta=30.0, mask_threshold=0.0)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(3):
                again, grad_again = run(batch, backend, method="sipo", beta=30.0, mask_threshold=0.0)
                if backend == "eager" and count != threads:
                    continue  # torch's own sums may depend on the number of threads
                assert torch.equal(grad, grad_again)
                for name in ("loss", "logits", "model_error", "ref_error", "error_gap", "weight"):
                    assert torch.equal(getattr(out, name), getattr(again, name)), name
    finally:
        torch.set_num_threads(threads)


# ---- torch's ways of calling -----------------------------------------------------------------------------------------


def _values(**options: Any) -> list[Any]:
    """The options of an operator's call, in its order."""
    return list(LossOptions(beta=3.0, **options).values().values())


def _op_samples(backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    batch = make_batch((4, 3, 5), (BF16, F32, F32), weighted=True, mask="bool", device=DEVICE)
    model, ref, target, scale, weight, mask = (t.detach() for t in batch)
    last = make_batch((4, 2, 3, 5), device=DEVICE)
    nhwc = [t.detach().contiguous(memory_format=torch.channels_last) for t in last[:3]]
    op, grad = torch.ops.sipo.pair_loss, torch.ops.sipo.pair_grad
    dmpo: dict[str, Any] = {"loss_type": "dmpo", "label_smoothing": 0.1, "safeguard": 0.5}
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (op, (model, ref, target, scale, weight, None, None, *_values(method="sipo"), backend)),
        (op, (model, None, target, scale, None, scale, mask,
              *_values(method="dpo_cm", reduction="none", nonfinite="skip", **dmpo), backend)),
        (op, (*nhwc, None, None, None, None,
              *_values(method="diffusion_dpo", reduction="sum", loss_type="hinge"), backend)),
        (grad, (model, target, torch.tensor([1.0, 0.0, -2.0, 0.5]), torch.tensor(3.0), None, backend)),
        (grad, (nhwc[0], nhwc[2][:2], torch.ones(4), torch.tensor([3.0, 0.0]), nhwc[1][:2], backend)),
    ]  # fmt: skip
    return [(op, tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args)) for op, args in calls]


@each_backend_once
@pytest.mark.parametrize("index", range(5))
def test_opcheck(backend: str, index: int) -> None:
    op, args = _op_samples(backend)[index]
    result = torch.library.opcheck(op, args)
    assert set(result.values()) == {"SUCCESS"}, result


class _Log(TorchDispatchMode):
    """Notes which of this package's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sipo":
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_by_operator_and_past_it(backend: str, dtype: torch.dtype) -> None:
    """A mode that listens to the dispatcher sees the operators; without one the backend is called directly."""
    batch = make_batch((6, 3, 517), (dtype,) * 3, weighted=True, device=DEVICE)
    direct, grad = run(batch, backend, method="sipo", beta=3.0)
    with _Log() as log:
        listened, same_grad = run(batch, backend, method="sipo", beta=3.0)
    assert log.seen == ["pair_loss.default", "pair_grad.default"]
    _assert_same(grad, same_grad, backend)
    for field in dataclasses.fields(PairLossOutput):
        if field.name == "numbers":  # an operator leaves the metrics to torch
            continue
        got, same = getattr(listened, field.name), getattr(direct, field.name)
        if isinstance(got, torch.Tensor):
            _assert_same(got, same, backend)
        else:
            assert got == same
    out = pair_loss(*batch[:3], method="sipo", beta=3.0, ratio_scale=batch.ratio_scale, backend=backend)
    with _Log() as log:  # a mode that is there for the backward pass alone
        (grad_alone,) = torch.autograd.grad(out.loss, batch.model_pred)
    assert log.seen == ["pair_grad.default"]
    _assert_same(grad_alone, run(batch._replace(error_weight=None), backend, method="sipo", beta=3.0)[1], backend)


def test_subclasses_keep_their_way(backend: str) -> None:
    class Tagged(torch.Tensor):
        pass

    batch = make_batch((4, 3, 5), device=DEVICE)
    plain, grad = run(batch, backend, method="sipo", beta=3.0)
    model = batch.model_pred.detach().as_subclass(Tagged).requires_grad_()
    out, tagged_grad = run(batch._replace(model_pred=model), backend, method="sipo", beta=3.0)
    _assert_same(out.loss.as_subclass(torch.Tensor), plain.loss, backend)
    _assert_same(tagged_grad.as_subclass(torch.Tensor), grad, backend)


def test_fake_tensors(backend: str) -> None:
    """Shapes, types and layouts without data, backward pass included."""
    batch = make_batch((4, 2, 3, 5), (BF16, F32, F32), device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0}
    out, grad = run(batch, backend, **options)
    with FakeTensorMode() as mode:
        fake = Batch(*(mode.from_tensor(t) for t in batch[:4]))
        fake_out, fake_grad = run(fake, backend, **options)
    for real, got in zip(
        [*(getattr(out, name) for name in RESULTS), grad],
        [*(getattr(fake_out, name) for name in RESULTS), fake_grad],
        strict=True,
    ):
        assert (got.shape, got.dtype, got.device, got.stride()) == (real.shape, real.dtype, real.device, real.stride())


def test_make_fx_traces_the_operators(backend: str) -> None:
    batch = make_batch((4, 3, 5), device=DEVICE)

    def step(model: torch.Tensor, ref: torch.Tensor, target: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out = pair_loss(model, ref, target, method="sipo", beta=3.0, ratio_scale=scale, backend=backend)
        return torch.autograd.grad(out.loss, model)[0]

    traced = make_fx(step)(*batch[:4])
    called = [node.target for node in traced.graph.nodes]
    assert torch.ops.sipo.pair_loss.default in called and torch.ops.sipo.pair_grad.default in called
    other = make_batch((4, 3, 5), seed=1, device=DEVICE)
    assert torch.equal(traced(*other[:4]), step(*other[:4]))


def test_the_gradient_is_not_kept(backend: str) -> None:
    """A gradient made in the forward pass goes with the graph, and no later than when it is handed out."""
    batch = make_batch((4, 3, 5), device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "ratio_scale": batch.ratio_scale, "backend": backend}
    if backend not in backends.FUSED:
        assert pair_loss(*batch[:3], **options).loss.grad_fn.fused_grad is None
        return
    gc.disable()  # reference counts alone must do
    try:
        out = pair_loss(*batch[:3], **options)
        made = weakref.ref(out.loss.grad_fn.fused_grad)
        assert made() is not None
        del out
        assert made() is None
        out = pair_loss(*batch[:3], **options)
        address = out.loss.grad_fn.fused_grad.data_ptr()
        out.loss.backward(retain_graph=True)
        assert out.loss.grad_fn.fused_grad is None
        assert batch.model_pred.grad.data_ptr() == address  # autograd took it as it was
        made = weakref.ref(batch.model_pred.grad)
        batch.model_pred.grad = None
        assert made() is None
    finally:
        gc.enable()


@each_backend_once
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_equals_eager_mode(backend: str, dtype: torch.dtype, reduction: str) -> None:
    torch._dynamo.reset()
    batch = make_batch((4, 3, 8, 8), (dtype,) * 3, device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, "reduction": reduction}

    def step(model: torch.Tensor, ref: torch.Tensor, target: torch.Tensor, scale: torch.Tensor) -> Any:
        # Something for the compiler to fuse around the operator, in a layout of its own choice.
        model = (model * 2).contiguous(memory_format=torch.channels_last)
        out = pair_loss(model, ref, target, ratio_scale=scale, backend=backend, **options)
        return out.loss.sum() * 0.5, out.metrics()

    compiled = torch.compile(step, fullgraph=True)
    loss, metrics = step(*batch[:4])
    (grad,) = torch.autograd.grad(loss, batch.model_pred)
    c_loss, c_metrics = compiled(*batch[:4])
    (c_grad,) = torch.autograd.grad(c_loss, batch.model_pred)
    assert torch.equal(c_grad, grad)
    torch.testing.assert_close(c_loss, loss, rtol=1e-6, atol=0)
    for name, value in metrics.items():
        torch.testing.assert_close(c_metrics[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_autocast(backend: str) -> None:
    """A half-precision network under autocast beside a float32 target, as in every training script."""
    batch = make_batch((4, 16), device=DEVICE)
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).div_(4).to(DEVICE).requires_grad_()
    with torch.autocast(DEVICE, dtype=BF16):
        pred = batch.model_pred.detach() @ weight
        assert pred.dtype == BF16
        out = pair_loss(
            pred, batch.ref_pred, batch.target, method="sipo", beta=3.0, ratio_scale=batch.ratio_scale, backend=backend
        )
    assert out.loss.dtype == F32 and out.logits.dtype == F32
    truth = reference.pair_loss(
        pred.detach(), batch.ref_pred, batch.target, method="sipo", beta=3.0, ratio_scale=batch.ratio_scale
    )
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-6, atol=0)
    out.loss.backward()
    exact = reference.pair_grad(
        pred.detach(), batch.ref_pred, batch.target, method="sipo", beta=3.0, ratio_scale=batch.ratio_scale
    )
    inputs = batch.model_pred.detach().to(BF16).double()
    torch.testing.assert_close(weight.grad.double(), inputs.T @ exact, rtol=2e-2, atol=2e-2 * exact.norm().item())


def test_metrics_are_those_of_the_reference(backend: str) -> None:
    batch = make_batch((12, 3, 5), distance=1.0, weighted=True, device=DEVICE)
    for method, ratio in itertools.product(METHODS, ["posterior", "reference"]):
        out, _ = run(batch, backend, method=method, beta=3.0, ratio=ratio)
        truth = run_reference(batch, method=method, beta=3.0, ratio=ratio).metrics()
        got = out.metrics()
        assert got.keys() == truth.keys()
        for name, value in truth.items():
            assert got[name].ndim == 0 and not got[name].requires_grad
            assert got[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name


def test_a_tie_counts_half() -> None:
    batch = make_batch((4, 3))
    with torch.no_grad():
        batch.ref_pred[[0, 2]] = batch.model_pred[[0, 2]]
    out, _ = run(batch, "eager", method="diffusion_dpo", beta=3.0)
    right = 1.0 if out.logits[1] > 0 else 0.0
    assert out.metrics()["rewards/accuracies"].item() == (0.5 + right) / 2


def test_without_gradient(backend: str) -> None:
    batch = make_batch((4, 3, 7), device=DEVICE)
    with torch.no_grad():
        out = pair_loss(*batch[:3], method="sipo", beta=3.0, ratio_scale=batch.ratio_scale, backend=backend)
    assert not out.loss.requires_grad
    with_grad, _ = run(batch, backend, method="sipo", beta=3.0)
    assert torch.equal(out.loss, with_grad.loss.detach())
    assert with_grad.loss.requires_grad and not with_grad.logits.requires_grad and not with_grad.weight.requires_grad


def test_double_backward_says_so(backend: str) -> None:
    batch = make_batch((4, 3), device=DEVICE)
    out = pair_loss(*batch[:3], method="sipo", beta=3.0, ratio_scale=batch.ratio_scale, backend=backend)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(out.loss, batch.model_pred, create_graph=True)


def test_vmap_says_so() -> None:
    batch = make_batch((4, 3, 5))
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda m: pair_loss(m, batch.ref_pred[0], batch.target[0], method="diffusion_dpo", beta=1.0).loss)(
            batch.model_pred.detach()
        )


def allocated_by(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates on the CPU, whether or not they are given back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())


@pytest.mark.parametrize(("upstream", "expected"), [(1.0, None), (0.125, None), (0.125, 0.125), (0.125, 1.0)])
def test_memory_is_the_gradient_and_little_else(backend: str, upstream: float, expected: float | None) -> None:
    """Contract 6: beyond the gradient, per-sample numbers and partial sums only, whatever the upstream gradient."""
    if backend == "eager":
        pytest.skip("plain torch keeps every intermediate tensor; the contract's memory clause is for the kernels")
    batch = make_batch((4, 5, 101, 103), (BF16, BF16, F32), device="cpu")
    options = {"upstream": torch.tensor(upstream), "method": "sipo", "beta": 3.0, "expected_upstream": expected}
    allocated = allocated_by(lambda: run(batch, backend, **options))
    gradient = batch.model_pred.numel() * 2
    assert gradient <= allocated <= gradient + 16_384


def test_memory_of_a_layout_that_kernels_do_not_write(backend: str) -> None:
    """Its samples lie side by side: inputs are copied, and the gradient is made again where it is, not beside it."""
    if backend == "eager":
        pytest.skip("plain torch keeps every intermediate tensor; the contract's memory clause is for the kernels")
    batch = make_batch((4, 5, 31, 37), (BF16, BF16, F32), device="cpu")
    _, plain = run(batch, backend, upstream=torch.tensor(0.125), method="sipo", beta=3.0)
    model = batch.model_pred.detach().permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    moved = batch._replace(model_pred=model.requires_grad_())
    grads: list[torch.Tensor] = []
    allocated = allocated_by(
        lambda: grads.append(run(moved, backend, upstream=torch.tensor(0.125), method="sipo", beta=3.0)[1])
    )
    assert torch.equal(grads[0], plain) and grads[0].stride() == model.stride()
    gradient = model.numel() * 2
    # Forward: the gradient and a contiguous copy of the policy's prediction; backward: such a copy once more. The other
    # inputs are contiguous. Only native writes over the copy; of the others each call has a buffer to fill.
    assert allocated <= (3 if backend == "native" else 5) * gradient + 16_384


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_memory_of_the_plain_gradient(dtype: torch.dtype, shared: bool) -> None:
    """In float32 it is the only tensor of its size; for bfloat16 there is one in float32 beside it."""
    batch = make_batch((4, 5, 31, 37), (dtype, dtype, F32), shared_target=shared, device="cpu")
    coef, upstream = torch.full((4,), 0.5), torch.tensor(0.125)
    model = batch.model_pred.detach()
    allocated = allocated_by(lambda: backends.module("eager").gradient(model, batch.target, coef, upstream))
    assert allocated <= model.numel() * (4 if dtype == F32 else 4 + 2) + 16_384


def test_a_gradient_that_is_made_again_does_not_wait_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream gradient that only the dispatcher can read goes to the operator, which makes one of its own."""
    backend = next((name for name in backends.FUSED if backends.status(name, "cpu").available), None)
    if backend is None:
        pytest.skip("no backend here makes the gradient in the forward pass")
    batch = make_batch((4, 5, 7), device="cpu")
    out = pair_loss(*batch[:3], method="sipo", beta=3.0, ratio_scale=batch.ratio_scale, backend=backend)
    held = weakref.ref(out.loss.grad_fn.fused_grad)
    module = backends.module(backend)
    gone, gradient = [], module.gradient

    def watch(*arguments: Any, error_mask: torch.Tensor | None) -> torch.Tensor:
        gone.append(held() is None)
        return gradient(*arguments, error_mask=error_mask)

    monkeypatch.setattr(module, "gradient", watch)
    upstream = torch.tensor(0.125 - 0.25j).conj().imag  # behind a negative bit
    (grad,) = torch.autograd.grad(out.loss, batch.model_pred, grad_outputs=upstream)
    assert gone == [True]
    torch.testing.assert_close(grad, run(batch, backend, upstream=torch.tensor(0.25), method="sipo", beta=3.0)[1])
