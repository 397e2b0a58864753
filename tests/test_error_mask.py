"""error_mask: which elements of a sample count, and how much (docs/math.md §2, §6, §8), for every backend."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from conftest import DEVICE, assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sipo import NoiseSchedule, SIPOLoss
from sipo_kernels import METHODS, METRICS, STATISTICS, Totals, backends, pair_loss, reference
from sipo_kernels.output import add_totals
from sipo_kernels.testing import (
    Batch,
    assert_within_budget,
    beta_for,
    make_batch,
    reference_grad,
    run,
    run_reference,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
MASKS = ("bool", "weights", "shared bool", "shared weights")
OPTIONS: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0}
dtypes = st.tuples(*[st.sampled_from([F32, BF16, F16, F64])] * 3)


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal with the sign of their zeros."""
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def weights_of(batch: Batch) -> Tensor:
    """The mask in float64 for every element."""
    mask = batch.error_mask
    assert mask is not None
    mask = mask.double() if len(mask) == len(batch.model_pred) else torch.cat([mask, mask]).double()
    return mask.expand(batch.model_pred.shape)


def masked(shape: tuple[int, ...], mask: str, types: tuple[torch.dtype, ...] = (F32,) * 3, **making: Any) -> Batch:
    return make_batch(shape, types, mask=mask, device=DEVICE, **making)  # type: ignore[arg-type]


@settings(max_examples=30)
@given(
    shape=st.sampled_from([(2, 1), (2,), (4, 7), (6, 3, 5, 7), (10, 1, 1, 13), (4, 2, 3, 5, 11), (2, 8209)]),
    types=dtypes,
    method=st.sampled_from(METHODS),
    ratio=st.sampled_from(["posterior", "reference"]),
    safeguard=st.sampled_from([None, 0.4]),
    shared=st.booleans(),
    weighted=st.booleans(),
    mask=st.sampled_from(MASKS),
    seed=st.integers(0, 10_000),
)
def test_matches_reference(
    backend: str,
    shape: tuple[int, ...],
    types: tuple[torch.dtype, ...],
    method: str,
    ratio: str,
    safeguard: float | None,
    shared: bool,
    weighted: bool,
    mask: str,
    seed: int,
) -> None:
    batch = masked(shape, mask, types, shared_target=shared, weighted=weighted, seed=seed)
    options: dict[str, Any] = {"method": method, "ratio": ratio, "mask_threshold": 0.0}
    options |= {"safeguard": safeguard if mask.endswith("bool") else None}
    options |= {"beta": beta_for(batch, **options)}
    out, grad = run(batch, backend, **options)
    assert_within_budget(batch, out, grad, reference_grad(batch, **options), run_reference(batch, **options))


@pytest.mark.parametrize("types", [(BF16, BF16, F32), (F32,) * 3])
@pytest.mark.parametrize("mask", ["bool", "shared weights"])
def test_a_long_sample(backend: str, mask: str, types: tuple[torch.dtype, ...]) -> None:
    """Over many chunks and blocks, and, for half precision, with terms in float32."""
    shape = (2, 3, 167, 131) if backend in ("triton", "cuda") and DEVICE == "cpu" else (4, 7, 101, 103)
    batch = masked(shape, mask, types, distance=0.05)
    options: dict[str, Any] = {"method": "dpo_cm", "mask_threshold": 0.0}
    options["beta"] = beta_for(batch, **options)
    out, grad = run(batch, backend, **options)
    assert_within_budget(batch, out, grad, reference_grad(batch, **options), run_reference(batch, **options))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_definition_by_hand(mask: str, method: str) -> None:
    """The reference's errors against sums over a loop, and its gradient against finite differences."""
    batch = masked((4, 2, 3), mask, (F64,) * 3)
    options: dict[str, Any] = {"method": method, "beta": 3.0, "mask_threshold": 0.0}
    truth, w = run_reference(batch, **options), weights_of(batch)
    for s in range(4):
        terms = [
            (w[s, i, j], (batch.model_pred[s, i, j] - batch.target[s, i, j]) ** 2) for i in range(2) for j in range(3)
        ]
        expected = sum(a * b for a, b in terms) / sum(a for a, _ in terms)
        assert truth.model_error[s].item() == pytest.approx(expected.item(), rel=1e-12)
    gap = truth.model_error - truth.ref_error
    torch.testing.assert_close(truth.error_gap, gap, rtol=1e-10, atol=1e-14)
    frozen = truth.weight if method != "diffusion_dpo" else torch.ones(4, dtype=F64)

    def loss(model: Tensor) -> Tensor:  # with the weights of §4 held, through which no gradient goes
        def error(pred: Tensor) -> Tensor:
            return (w * (pred - batch.target) ** 2).flatten(1).sum(1) / w.flatten(1).sum(1)

        pair = frozen.view(2, 2).amin(0)
        a, b = {"sipo": (frozen, 1.0), "sdpo": (pair.repeat(2), 1.0), "dpo_cm": (torch.ones(4), pair)}.get(
            method, (torch.ones(4), 1.0)
        )
        chosen, rejected = (a * (error(model) - error(batch.ref_pred))).chunk(2)
        return (b * torch.nn.functional.softplus(1.5 * (chosen - rejected))).mean()

    model = batch.model_pred.detach().requires_grad_()
    torch.testing.assert_close(loss(model), truth.loss, rtol=1e-12, atol=0)
    exact = reference_grad(batch, **options)
    torch.testing.assert_close(torch.autograd.grad(loss(model), model)[0], exact, rtol=1e-12, atol=1e-17)
    step, point = 1e-6, (1, 1, 2)
    moved = torch.zeros_like(model)
    moved[point] = step
    slope = (loss(model + moved) - loss(model - moved)) / (2 * step)
    assert slope.item() == pytest.approx(exact[point].item(), rel=1e-6, abs=1e-9)
    free = batch.model_pred.detach().requires_grad_()
    of_reference = reference.pair_loss(**batch._asdict() | {"model_pred": free}, **options).loss
    torch.testing.assert_close(torch.autograd.grad(of_reference, free)[0], exact, rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("types", [(F32,) * 3, (BF16, BF16, F32), (BF16,) * 3, (F16, F32, F64)])
@pytest.mark.parametrize("weights", [False, True])
def test_a_mask_of_ones_changes_no_bit(backend: str, types: tuple[torch.dtype, ...], weights: bool) -> None:
    batch = make_batch((4, 3, 5, 37), types, weighted=True, device=DEVICE)  # type: ignore[arg-type]
    plain, grad = run(batch, backend, **OPTIONS)
    mask = torch.ones(batch.model_pred.shape, dtype=F32 if weights else torch.bool, device=DEVICE)
    for ones in (mask, mask[:2], mask[:, :1, :1]):
        out, masked_grad = run(batch._replace(error_mask=ones), backend, **OPTIONS)
        assert torch.equal(out.samples, plain.samples) and torch.equal(out.loss, plain.loss)
        assert bits_equal(masked_grad, grad)


@pytest.mark.parametrize("types", [(F32,) * 3, (BF16, BF16, F32)])
@pytest.mark.parametrize(("mask", "safeguard"), [("bool", None), ("bool", 0.4), ("shared weights", None)])
def test_what_has_no_weight_does_not_matter(
    backend: str, mask: str, types: tuple[torch.dtype, ...], safeguard: float | None
) -> None:
    """Not even NaN or infinity; the gradient there is exactly 0."""
    batch = masked((4, 3, 5, 37), mask, types)
    options = OPTIONS | {"safeguard": safeguard}
    plain, grad = run(batch, backend, **options)
    none = weights_of(batch) == 0
    spoilt = batch._replace(
        model_pred=torch.where(none, math.nan, batch.model_pred.detach()).requires_grad_(),
        ref_pred=torch.where(none, math.inf, batch.ref_pred),
        target=torch.where(none, -math.inf, batch.target),
    )
    out, spoilt_grad = run(spoilt, backend, **options)
    assert torch.equal(out.samples, plain.samples) and bits_equal(spoilt_grad, grad)
    assert not spoilt_grad[none].any() and none.any()  # 0 or −0
    assert spoilt_grad[~none].all()
    truth = run_reference(spoilt, **options)
    exact = reference_grad(spoilt, **options)
    assert_within_budget(spoilt, out, spoilt_grad, exact, truth)
    free = spoilt.model_pred.detach().double().requires_grad_()
    of_reference = reference.pair_loss(**spoilt._asdict() | {"model_pred": free}, **options).loss
    torch.testing.assert_close(torch.autograd.grad(of_reference, free)[0], exact, rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("mask", ["bool", "weights"])
@pytest.mark.parametrize("given_errors", [False, True])
def test_a_sample_in_which_nothing_counts(backend: str, mask: str, given_errors: bool) -> None:
    """Its errors and gap are 0, and so is its gradient; the other sample of its pair is trained as ever."""
    batch = masked((6, 5, 7), mask)
    assert batch.error_mask is not None
    empty = [0, 1, 4]  # the chosen sample of pair 0, and all of pair 1
    batch.error_mask[empty] = 0
    with torch.no_grad():
        batch.model_pred[empty] = math.nan
    arguments: dict[str, Any] = batch._asdict()
    if given_errors:
        arguments |= {"ref_pred": None, "ref_error": torch.linspace(0.5, 2.5, 6, device=DEVICE)}
    levels = torch.zeros(len(STATISTICS), 1, device=DEVICE)
    totals = Totals(torch.zeros(2, len(METRICS), device=DEVICE), levels, torch.zeros(3, device=DEVICE))
    out = pair_loss(**arguments, totals=totals, backend=backend, **OPTIONS)
    (grad,) = torch.autograd.grad(out.loss, batch.model_pred)
    exact = arguments | {"model_pred": batch.model_pred.detach()}
    truth, expected = reference.pair_loss(**exact, **OPTIONS), reference.pair_grad(**exact, **OPTIONS)
    for name in ("model_error", "ref_error", "error_gap", "log_ratio", "weight", "logits", "loss"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-7)
    for values in (out.model_error, out.ref_error, out.error_gap, out.coef, grad):
        assert not values[empty].any()
    assert out.logits[1] == 0 and out.weight[empty].tolist() == [1, 1, 1]
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-9)
    assert grad[3].any() and levels[STATISTICS.index("count")].item() == 3


@pytest.mark.parametrize("kind", [torch.bool, F32, BF16, F64])
def test_masks_that_are_smaller_than_the_batch(backend: str, kind: torch.dtype) -> None:
    """Padded tokens, a region, a video's frames: the same bits as with the mask in full, in bool or float32."""
    generator = torch.Generator().manual_seed(0)
    for shape, small in (((4, 9, 5), (4, 9, 1)), ((4, 3, 4, 5), (2, 1, 4, 5)), ((4, 3, 7, 2, 5), (2, 1, 7, 1, 1))):
        batch = make_batch(shape, (BF16, BF16, F32), device=DEVICE)
        mask = (torch.rand(small, generator=generator) - 0.3).clamp(min=0).to(DEVICE)
        mask = mask > 0 if kind == torch.bool else mask.to(kind)
        full = mask.expand(small[0], *shape[1:]).to(torch.bool if kind == torch.bool else F32).contiguous()
        out, grad = run(batch._replace(error_mask=mask), backend, **OPTIONS)
        for whole in (full, torch.cat([full] * (4 // len(full)))):
            same, same_grad = run(batch._replace(error_mask=whole), backend, **OPTIONS)
            assert torch.equal(out.samples, same.samples) and bits_equal(grad, same_grad)


@pytest.mark.parametrize("mask", ["bool", "shared weights"])
def test_other_layouts(backend: str, mask: str) -> None:
    """The mask need not lie as the predictions do; none of them need be dense."""
    batch = masked((4, 3, 5, 7), mask)
    plain, grad = run(batch, backend, **OPTIONS)
    assert batch.error_mask is not None
    last = [t.detach().contiguous(memory_format=torch.channels_last) for t in (*batch[:3], batch.error_mask)]
    wide = torch.cat([batch.error_mask] * 2, dim=1)[:, :3]
    for predictions, moved in (
        (last[:3], batch.error_mask),
        (last[:3], last[3]),
        (batch[:3], last[3]),
        (batch[:3], wide),
    ):
        model = predictions[0].detach().requires_grad_()
        changed = Batch(model, *predictions[1:], batch.ratio_scale, error_mask=moved)  # type: ignore[misc]
        out, moved_grad = run(changed, backend, upstream=torch.tensor(0.5, device=DEVICE), **OPTIONS)
        torch.testing.assert_close(out.samples, plain.samples, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(moved_grad, 0.5 * grad, rtol=1e-5, atol=1e-9)
        assert moved_grad.stride() == model.stride()


@pytest.mark.parametrize("types", [(F32,) * 3, (BF16, BF16, F32)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_whatever_was_expected(backend: str, types: tuple[torch.dtype, ...], reduction: str) -> None:
    batch = masked((6, 3, 37), "shared bool", types)
    options = OPTIONS | {"reduction": reduction}
    out = pair_loss(**batch._asdict(), backend=backend, **options)
    upstream = torch.full_like(out.loss, 1 / 3)
    plain = backends.module(backend).gradient(
        batch.model_pred.detach(), batch.target, out.coef, upstream, error_mask=batch.error_mask
    )
    for expected in (1 / 3, 1.0, None):
        _, grad = run(batch, backend, upstream=upstream, expected_upstream=expected, **options)
        assert bits_equal(grad, plain)
    exact = reference_grad(batch, grad_output=torch.full_like(out.loss.double(), 1 / 3), **options)
    torch.testing.assert_close(plain.double(), exact, rtol=2**-8 if types[0] == BF16 else 1e-5, atol=1e-7)


def test_compiled() -> None:
    """The operators take the mask; a smaller one is made full inside the graph. "aot_eager" saves inductor's minute."""
    torch._dynamo.reset()
    batch = masked((4, 3, 8, 8), "weights", (BF16, BF16, F32))
    frames = weights_of(batch)[:2, :1, :, :1]
    levels = torch.zeros(len(STATISTICS), 1, device=DEVICE)
    totals = Totals(None, levels, torch.zeros(2, device=DEVICE))

    def step(model: Tensor, mask: Tensor) -> Tensor:
        tensors = {"ratio_scale": batch.ratio_scale, "error_mask": mask}
        return pair_loss(model * 2, *batch[1:3], **tensors, totals=totals, **OPTIONS).loss

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = call(batch.model_pred, frames)
        results.append((loss.detach(), torch.autograd.grad(loss, batch.model_pred)[0], levels.clone()))
        levels.zero_()
    assert torch.equal(results[0][1], results[1][1]) and results[0][1].any()
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", ["bool", "shared weights"])
def test_statistics_have_the_count_of_each_sample(backend: str, mask: str, method: str) -> None:
    """§8: k is the coefficient without the sizes, whatever the mask leaves of a sample."""
    batch = masked((6, 3, 37), mask, weighted=True)
    options = OPTIONS | {"method": method}
    sums = [torch.zeros(len(STATISTICS), 1, device=DEVICE) for _ in range(2)]
    totals = [Totals(None, of, torch.zeros(3, device=DEVICE)) for of in sums]
    out, _ = run(batch, backend, totals=totals[0], **options)
    counted = weights_of(batch).flatten(1).sum(1)
    add_totals(totals[1], dataclasses.replace(out, numbers=None), counted * 3 / 3.0)
    torch.testing.assert_close(sums[0], sums[1], rtol=2e-5, atol=1e-6)
    truth = run_reference(batch, **options)
    chosen, rejected = truth.weight.chunk(2)
    a = {"sipo": chosen, "sdpo": torch.minimum(chosen, rejected)}.get(method, torch.ones_like(chosen))
    b = torch.minimum(chosen, rejected) if method == "dpo_cm" else 1.0
    assert batch.error_weight is not None
    k = a * b * batch.error_weight[:3] * torch.sigmoid(-truth.logits)
    rows = {name: sums[0][row].item() for row, name in enumerate(STATISTICS)}
    assert rows["coef"] == pytest.approx(k.sum().item(), rel=1e-5)
    assert rows["coef_sq"] == pytest.approx((k**2).sum().item(), rel=1e-5)
    if mask == "bool":  # then k² · model_error / Σw is a sample's squared gradient, but for (β/B)²
        squares = (reference_grad(batch, **options) ** 2).flatten(1).sum(1) * counted
        assert rows["grad_sq"] == pytest.approx(squares.sum().item(), rel=1e-5)


@pytest.mark.parametrize("mask", ["bool", "shared bool"])
def test_safeguard_with_a_mask(backend: str, mask: str) -> None:
    """§6: moving along − g_w + λ g_l, the chosen sample's error falls by μ of what its own gradient achieves."""
    batch, mu = masked((12, 3, 37), mask, seed=3), 0.4
    with torch.no_grad():  # errors in the same direction, more or less
        common = torch.randn(6, 3, 37, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        batch.model_pred.copy_(
            batch.target + torch.cat([common, (0.5 + torch.arange(6, device=DEVICE))[:, None, None] * common])
        )
    plain, _ = run(batch, backend, **OPTIONS)
    out, grad = run(batch, backend, **OPTIONS, safeguard=mu)
    exact = reference_grad(batch, **OPTIONS, safeguard=mu)
    assert_within_budget(batch, out, grad, exact, run_reference(batch, **OPTIONS, safeguard=mu))
    share = out.coef[6:] / plain.coef[6:]
    assert ((share > 0) & (share < 1)).sum() >= 3
    own, push = reference_grad(batch, **OPTIONS).flatten(1).chunk(2)
    pair = own.pow(2).sum(1), (own * -push).sum(1)  # of gradients, which have the weights and the counts in them
    fall = pair[0] - share.double() * pair[1]
    assert (fall >= mu * pair[0] * (1 - 1e-5)).all()
    tight = share < 1
    torch.testing.assert_close(fall[tight], mu * pair[0][tight], rtol=1e-4, atol=0)


def test_a_weight_that_is_not_finite_is_seen(backend: str) -> None:
    batch = masked((6, 5, 7), "weights")
    assert batch.error_mask is not None
    batch.error_mask[1, 2, 3], batch.error_mask[3, 0, 0] = math.nan, math.inf
    out, grad = run(batch, backend, **OPTIONS, nonfinite="skip")
    assert out.mask.tolist() == [False, False, True] == run_reference(batch, **OPTIONS, nonfinite="skip").mask.tolist()
    assert not grad[[0, 1, 3, 4]].any() and grad[[2, 5]].any()


@pytest.mark.parametrize("shared", [False, True])
def test_memory(backend: str, shared: bool) -> None:
    """A full mask takes none; a smaller one is made full once, a byte or a float32 for each element."""
    if backend == "eager":
        pytest.skip("plain torch keeps every intermediate tensor; the contract's memory clause is for the kernels")
    shape = (4, 5, 53, 47) if backend == "triton" else (4, 5, 101, 103)  # its interpreter is slow
    batch = make_batch(shape, (BF16, BF16, F32))
    full = torch.ones((2 if shared else 4, *shape[1:]), dtype=torch.bool)
    gradient = batch.model_pred.numel() * 2
    for mask, more in ((full, 0), (full[:, :1], full.numel()), (full[:, :1].float(), 4 * full.numel())):
        with torch.profiler.profile(profile_memory=True) as profile:
            run(batch._replace(error_mask=mask), backend, upstream=torch.tensor(0.125), **OPTIONS)
        allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
        assert gradient + more <= allocated <= gradient + more + 16_384


def _float(*shape: int) -> Tensor:
    return torch.ones(*shape)


@pytest.mark.parametrize(
    ("mask", "options", "error", "message"),
    [
        ([True], {}, TypeError, "error_mask is a list: expected a torch.Tensor"),
        (_float(4, 3, 5).byte(), {}, TypeError, "error_mask has dtype torch.uint8: expected bool, float32, bfloat16"),
        (_float(4, 3), {}, ValueError, "error_mask has shape [4, 3]: expected [4, 3, 5], or [2, 3, 5] shared by each"),
        (_float(1, 3, 5), {}, ValueError, "error_mask has shape [1, 3, 5]: expected [4, 3, 5]"),
        (_float(4, 3, 4), {}, ValueError, "with 1 in place of any dimension after the first"),
        (_float(4, 3, 5).to("meta"), {}, ValueError, "error_mask is on meta: expected cpu, where model_pred is"),
        (_float(4, 3, 5).requires_grad_(), {}, ValueError, "error_mask requires grad, but gradients flow to"),
        (_float(4, 3, 5), {"safeguard": 0.5}, ValueError, "error_mask has dtype torch.float32 beside safeguard=0.5"),
    ],
)  # fmt: skip
def test_what_is_refused(mask: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    batch = make_batch((4, 3, 5))
    arguments = batch._asdict() | {"error_mask": mask}
    assert_refused(lambda: pair_loss(**arguments, **OPTIONS, **options), error, message)
    assert_refused(lambda: reference.pair_loss(**arguments, **OPTIONS, **options), error, message)


def test_the_module_takes_it() -> None:
    batch = masked((4, 3, 5, 7), "shared bool")
    loss_fn = SIPOLoss(NoiseSchedule.flow(), method="sipo", beta=3.0)
    sigmas = torch.tensor([0.3, 0.8], device=DEVICE)
    out = loss_fn(*batch[:3], sigmas=sigmas, error_mask=batch.error_mask)
    w = weights_of(batch)
    expected = (w * (batch.model_pred.double() - batch.target) ** 2).flatten(1).sum(1) / w.flatten(1).sum(1)
    torch.testing.assert_close(out.model_error.double(), expected, rtol=1e-6, atol=0)
