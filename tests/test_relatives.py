"""The pair loss's relatives (math.md §5 and §6): loss types, label smoothing and the safeguard, on every backend."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sipo import NoiseSchedule, SIPOLoss
from sipo.recipe.config import LossConfig
from sipo_kernels import METHODS, pair_loss, reference
from sipo_kernels.inputs import Inputs
from sipo_kernels.options import DEFAULTS, LOSS_TYPES
from sipo_kernels.testing import Batch, beta_for, make_batch, reference_grad, run, run_reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SMOOTHED = [
    (loss_type, s) for loss_type in LOSS_TYPES for s in (0.0, 0.1, 0.4) if s == 0 or loss_type in ("sigmoid", "dmpo")
]

# ---- Golden numbers --------------------------------------------------------------------------------------------------

# (z, ℓ(z), −ℓ'(z)) by loss type and label_smoothing. Made once with mpmath: ℓ as the papers write it
# (with p = 1/(1 + e^−z): −(1−ε) ln p − ε ln(1−p); (z − 1/2)²; max(0, 1−z); p ln(p/(1−ε)) + (1−p) ln((1−p)/ε), where ε
# is 1e-6 for 0), −ℓ' by mp.diff, with 60 digits; at |z| = 10,000 with 9,000, and by a central difference of step
# 1e-4000.
LOSS_TYPE_VALUES: dict[tuple[str, float], list[tuple[float, float, float]]] = {
    ("sigmoid", 0.0): [
        (-10000.0, 10000.0, 1.0),
        (-40.0, 40.0, 1.0),
        (-3.0, 3.048587351573742, 0.9525741268224333),
        (-0.25, 0.8259394198788436, 0.5621765008857981),
        (0.0, 0.6931471805599453, 0.5),
        (0.75, 0.38687100611489994, 0.320821300824607),
        (2.0, 0.1269280110429725, 0.11920292202211756),
        (14.0, 8.315283733837542e-07, 8.315280276641321e-07),
        (40.0, 4.248354255291589e-18, 4.248354255291589e-18),
        (10000.0, 0.0, 0.0),
    ],
    ("sigmoid", 0.25): [
        (-10000.0, 7500.0, 0.75),
        (-40.0, 30.0, 0.75),
        (-3.0, 2.298587351573742, 0.7025741268224333),
        (-0.25, 0.7634394198788436, 0.3121765008857981),
        (0.0, 0.6931471805599453, 0.25),
        (0.75, 0.5743710061149, 0.07082130082460703),
        (2.0, 0.6269280110429725, -0.13079707797788245),
        (14.0, 3.5000008315283733, -0.24999916847197234),
        (40.0, 10.0, -0.25),
        (10000.0, 2500.0, -0.25),
    ],
    ("ipo", 0.0): [
        (-10000.0, 100010000.25, 20001.0),
        (-40.0, 1640.25, 81.0),
        (-3.0, 12.25, 7.0),
        (-0.25, 0.5625, 1.5),
        (0.0, 0.25, 1.0),
        (0.75, 0.0625, -0.5),
        (2.0, 2.25, -3.0),
        (14.0, 182.25, -27.0),
        (40.0, 1560.25, -79.0),
        (10000.0, 99990000.25, -19999.0),
    ],
    ("hinge", 0.0): [
        (-10000.0, 10001.0, 1.0),
        (-40.0, 41.0, 1.0),
        (-3.0, 4.0, 1.0),
        (-0.25, 1.25, 1.0),
        (0.0, 1.0, 1.0),
        (0.75, 0.25, 1.0),
        (2.0, 0.0, 0.0),
        (14.0, 0.0, 0.0),
        (40.0, 0.0, 0.0),
        (10000.0, 0.0, 0.0),
    ],
    ("dmpo", 0.0): [
        (-10000.0, 13.815510557964274, 0.0),
        (-40.0, 13.815510557964274, 2.286273490312606e-16),
        (-3.0, 12.96943298267838, 0.7596685535020301),
        (-0.25, 7.08136052659348, 3.462001293286336),
        (0.0, 6.2146085984224415, 3.4538773894909434),
        (0.75, 3.8048237662078743, 2.846909123627438),
        (2.0, 1.2815162534470679, 1.240552711860017),
        (14.0, 1.5063153227312332e-08, -1.5340884582540575e-07),
        (40.0, 1.000000499884844e-06, -1.1124099139206653e-16),
        (10000.0, 1.0000005000003334e-06, 0.0),
    ],
    ("dmpo", 0.25): [
        (-10000.0, 1.3862943611198906, 0.0),
        (-40.0, 1.3862943611198904, 1.7460146440314234e-16),
        (-3.0, 1.143326742939758, 0.1851616127340942),
        (-0.25, 0.21990079006796315, 0.3319394486399784),
        (0.0, 0.14384103622589045, 0.27465307216702745),
        (0.75, 0.012653314270827347, 0.07596087246462947),
        (2.0, 0.0533060123432181, -0.0946399276513961),
        (14.0, 0.2876705130579298, -1.0727856557213258e-05),
        (40.0, 0.28768207245178073, -1.6526687602018477e-16),
        (10000.0, 0.2876820724517809, 0.0),
    ],
}

# Two pairs of two elements, one aligned (⟨g_w, g_l⟩ > 0) and one not, with settings, loss, λ of each pair and gradient.
# Made likewise, with the weights held constant: the derivative of the mean loss by each element with mp.diff, the
# rejected sample's times λ = min((1−μ) |g_w|² / ⟨g_w, g_l⟩, 1), which is 1 where the inner product is negative.
MODEL = [[0.5, -0.25], [0.25, 0.75], [1.0, -0.5], [-0.5, 0.375]]
REF = [[0.625, -0.5], [0.5, 0.5], [0.75, -0.25], [-0.25, 0.5]]
TARGET = [[0.125, 0.25], [0.0, 0.5], [0.25, 0.125], [0.25, 0.25]]
SCALE, WEIGHT = [0.125, 0.25, 0.0625, 0.375], [1.5, 1.0, 0.75, 0.5]
PAIR_VALUES: list[tuple[dict[str, Any], float, list[float], list[list[float]]]] = [
    (
        {"loss_type": "sigmoid", "label_smoothing": 0.125, "safeguard": 0.25},
        0.5528719432781651,
        [0.9921567867765283, 1.0],
        [
            [0.07880670306883253, -0.1050756040917767],
            [0.06084904620311609, 0.06084904620311609],
            [-0.07776977276529526, 0.06480814397107938],
            [0.08343982698817573, -0.013906637831362622],
        ],
    ),
    (
        {"loss_type": "ipo", "label_smoothing": 0.0, "safeguard": 0.5},
        0.08710609452680154,
        [0.6614378578510188, 1.0],
        [
            [-0.22255148300717054, 0.2967353106762274],
            [0.11742151330076059, 0.11742151330076059],
            [0.1464154493468227, -0.1220128744556856],
            [0.16101535464993863, -0.026835892441656437],
        ],
    ),
    (
        {"loss_type": "hinge", "label_smoothing": 0.0, "safeguard": 0.375},
        0.523885740452968,
        [0.8267973223137736, 1.0],
        [
            [0.41170002896348107, -0.5489333719513081],
            [0.18459308193851406, 0.18459308193851406],
            [-0.3385691027660206, 0.28214091897168386],
            [0.253125, -0.0421875],
        ],
    ),
    (
        {"loss_type": "dmpo", "label_smoothing": 0.125, "safeguard": 1.0},
        0.22715183318519835,
        [0.0, 1.0],
        [
            [0.10468921360155989, -0.13958561813541318],
            [0.08073394295964594, 0.08073394295964594],
            [0.0, 0.0],
            [0.11070717871467853, -0.01845119645244642],
        ],
    ),
]


def at_logits(z: list[float]) -> dict[str, Any]:
    """Pairs of one element with exactly these logits at β = 2; the chosen sample's gradient is −ℓ'(z) · 2/B."""
    logits = torch.tensor(z, dtype=F64, device=DEVICE)
    ones = torch.ones(2 * len(z), dtype=F64, device=DEVICE)
    return {
        "model_pred": ones.clone().requires_grad_(),
        "ref_pred": None,
        "target": torch.zeros_like(ones),
        "ref_error": torch.cat([1 + logits, ones[: len(z)]]),
        "method": "diffusion_dpo",
        "beta": 2.0,
    }


@pytest.mark.parametrize(("loss_type", "smoothing"), LOSS_TYPE_VALUES)
def test_golden_links(loss_type: str, smoothing: float, backend: str) -> None:
    z, loss, pull = map(list, zip(*LOSS_TYPE_VALUES[loss_type, smoothing], strict=True))
    call = at_logits(z)
    out = pair_loss(**call, loss_type=loss_type, label_smoothing=smoothing, reduction="none", backend=backend)
    assert out.logits.tolist() == z
    torch.testing.assert_close(out.loss.detach().cpu(), torch.tensor(loss, dtype=F64), rtol=1e-13, atol=1e-14)
    out.loss.sum().backward()
    expected = 2 * torch.tensor(pull, dtype=F64)
    grad = call["model_pred"].grad.cpu()
    torch.testing.assert_close(grad, torch.cat([expected, -expected]), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(out.coef.cpu(), grad, rtol=0, atol=0)  # d is 1


@pytest.mark.parametrize("case", PAIR_VALUES, ids=lambda case: case[0]["loss_type"])
def test_golden_pairs(case: tuple[dict[str, Any], float, list[float], list[list[float]]], backend: str) -> None:
    options, loss, share, grad = case
    model, ref, target, scale, weight = (
        torch.tensor(x, dtype=F64, device=DEVICE) for x in (MODEL, REF, TARGET, SCALE, WEIGHT)
    )
    batch = Batch(model.requires_grad_(), ref, target, scale, weight)
    options = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, **options}
    out, got = run(batch, backend, **options)
    torch.testing.assert_close(out.loss.item(), loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(got.cpu(), torch.tensor(grad, dtype=F64), rtol=1e-13, atol=1e-16)
    plain, _ = run(batch, backend, **{**options, "safeguard": None})
    assert torch.equal(plain.loss, out.loss)
    active = plain.coef.cpu()[2:] != 0
    ratio = (out.coef / plain.coef).cpu()[2:][active]
    torch.testing.assert_close(ratio, torch.tensor(share, dtype=F64)[active], rtol=1e-13, atol=0)
    torch.testing.assert_close(reference_grad(batch, **options).cpu(), got.cpu(), rtol=1e-13, atol=1e-16)


# ---- The reference against the papers --------------------------------------------------------------------------------

PUBLISHED: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    # h is the published code's, without β: ref_diff − model_diff of mean squared errors, ½ inside
    "sigmoid": lambda h, beta, e: -(1 - e) * torch.sigmoid(beta * h).log() - e * torch.sigmoid(-beta * h).log(),
    "ipo": lambda h, beta, e: beta**2 * (h - 1 / (2 * beta)) ** 2,
    "hinge": lambda h, beta, e: torch.relu(1 - beta * h),
    "dmpo": lambda h, beta, e: F.kl_div(
        torch.tensor([1 - max(e, 1e-6), max(e, 1e-6)], dtype=F64).log(),
        torch.stack([torch.sigmoid(beta * h), torch.sigmoid(-beta * h)], -1),
        reduction="none",
    ).sum(-1),
}


def published(model: Tensor, batch: Batch, beta: float, loss_type: str, smoothing: float, mu: float | None) -> Tensor:
    """Diffusion-DPO with that loss type as a training script has it, and Safeguarded DPO's λ, here for each pair."""
    errors = F.mse_loss(model, batch.target, reduction="none").flatten(1).mean(1)
    chosen, rejected = errors.chunk(2)
    if mu is not None:
        left = model.detach().requires_grad_()
        own = F.mse_loss(left, batch.target, reduction="none").flatten(1).mean(1).sum()
        g_chosen, g_rejected = torch.autograd.grad(own, left)[0].flatten(1).chunk(2)
        inner = (g_chosen * g_rejected).sum(1)
        share = ((1 - mu) * g_chosen.square().sum(1) / inner).clamp(0, 1).where(inner > 0, 1)
        rejected = rejected.detach() + share * (rejected - rejected.detach())
    ref_chosen, ref_rejected = F.mse_loss(batch.ref_pred, batch.target, reduction="none").flatten(1).mean(1).chunk(2)
    h = 0.5 * ((ref_chosen - ref_rejected) - (chosen - rejected))
    return PUBLISHED[loss_type](h, beta, smoothing).mean()


def aligned_batch(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (F32,) * 3, **options: Any) -> Batch:
    """A batch whose rejected samples err as the chosen ones do, as with shared noise; the last pair the other way."""
    batch = make_batch(shape, (F64,) * 3, **options)
    pairs = shape[0] // 2
    target = batch.target if batch.target.shape[0] == shape[0] else torch.cat([batch.target] * 2)
    d = batch.model_pred.detach() - target
    d[pairs:] = 1.2 * d[:pairs] + 0.4 * d[pairs:]
    if pairs > 1:
        d[-1] = -d[-1]
    model = (target + d).to(dtypes[0])
    ref = (target + d + batch.ref_pred - batch.model_pred.detach()).to(dtypes[1])
    return Batch(model.requires_grad_(), ref, batch.target.to(dtypes[2]), batch.ratio_scale, batch.error_weight)


@settings(max_examples=60)
@given(
    choice=st.sampled_from(SMOOTHED),
    mu=st.sampled_from([None, 0.0, 0.3, 1.0]),
    shape=st.sampled_from([(2, 3), (8, 2, 5), (6, 1, 3, 2)]),
    logit=st.sampled_from([0.1, 2.0, 15.0]),
    seed=st.integers(0, 10_000),
)
def test_reference_is_what_the_papers_say(
    choice: tuple[str, float], mu: float | None, shape: tuple[int, ...], logit: float, seed: int
) -> None:
    loss_type, smoothing = choice
    batch = aligned_batch(shape, (F64,) * 3, seed=seed)
    options: dict[str, Any] = {"method": "diffusion_dpo", "loss_type": loss_type, "label_smoothing": smoothing}
    options |= {"safeguard": mu, "beta": beta_for(batch, logit, method="diffusion_dpo")}
    paper = published(batch.model_pred, batch, options["beta"], loss_type, smoothing, mu)
    (expected,) = torch.autograd.grad(paper, batch.model_pred)
    ours = reference.pair_loss(*batch[:3], **options).loss
    (by_autograd,) = torch.autograd.grad(ours, batch.model_pred)
    size = expected.abs().max().item() + options["beta"] * 1e-3
    torch.testing.assert_close(ours, paper, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_autograd, expected, rtol=1e-9, atol=1e-11 * size)
    torch.testing.assert_close(reference_grad(batch, **options), by_autograd, rtol=1e-11, atol=1e-13 * size)


@pytest.mark.parametrize(("loss_type", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_against_finite_differences(loss_type: str, smoothing: float, method: str) -> None:
    """With the weights held where they are: to the gradient they are constants (§4)."""
    batch = make_batch((4, 3), (F64,) * 3, weighted=True, seed=3)
    # what posterior ratios depend on is the policy itself; at a scale of 0 they are 1 and stay it
    batch.ratio_scale.zero_()
    options = {"method": method, "beta": 7.0, "loss_type": loss_type, "label_smoothing": smoothing}

    def loss(model: Tensor) -> Tensor:
        return reference.pair_loss(
            model, *batch[1:3], ratio_scale=batch.ratio_scale, error_weight=batch.error_weight, **options
        ).loss

    assert (run_reference(batch, **options).logits - 1).abs().min() > 1e-3  # away from the hinge's kink
    assert torch.autograd.gradcheck(loss, (batch.model_pred,), rtol=1e-6, atol=1e-8)


# ---- Every backend against the reference -----------------------------------------------------------------------------


def assert_gradient_within_budget(batch: Batch, grad: Tensor, coef: Tensor, options: dict[str, Any]) -> None:
    """That of ``sipo_kernels.testing``, and what the logit's own budget of 1e-5 (1 + |z|) makes of −ℓ'(z).

    −ℓ' of a smoothed loss type or of ipo goes through 0, near which no relative error of it is bounded by z's.
    """
    truth, exact = run_reference(batch, **options), reference_grad(batch, **options).double()
    slack = 1e-5 * (1 + truth.logits.abs())
    if options["loss_type"] == "hinge":  # steep at its kink only
        slack = slack * ((truth.logits - 1).abs() <= slack)
    method, c = options["method"], 1 if batch.error_weight is None else batch.error_weight.double()
    a = truth.weight if method in ("sipo", "sdpo") else 1  # sdpo's is the smaller of the pair's, no more than this
    steepest = 2.0 if options["loss_type"] == "ipo" else 1.0 + 14.0 * (options["loss_type"] == "dmpo")  # of |ℓ''|: §5
    common = 0.5 * options["beta"] * 2 / exact[0].numel() / (1 if options["reduction"] == "sum" else len(slack))
    both = torch.cat([slack, slack]) * torch.cat([truth.mask, truth.mask]) * a * c * steepest * common
    target = batch.target if batch.target.shape[0] == len(both) else torch.cat([batch.target] * 2)
    d = (batch.model_pred.detach().double() - target.double()).reshape(len(both), -1)
    allowed = ((both.unsqueeze(1) * d) ** 2).sum().sqrt().item()
    rounding = (exact.to(grad.dtype).double() - exact).norm().item()
    half = grad.dtype in (BF16, F16)
    allowed += rounding + 1e-6 * exact.norm().item() if half else 5e-6 * exact.norm().item()
    assert (grad.double() - exact).norm().item() <= allowed
    assert bool((coef[torch.cat([truth.mask, truth.mask]).logical_not()] == 0).all())


@settings(max_examples=60)
@given(
    choice=st.sampled_from(SMOOTHED),
    mu=st.sampled_from([None, 0.0, 0.3, 1.0]),
    method=st.sampled_from(METHODS),
    ratio=st.sampled_from(["posterior", "reference"]),
    reduction=st.sampled_from(["mean", "sum"]),
    dtypes=st.sampled_from([(F32,) * 3, (BF16,) * 3, (F64,) * 3, (BF16, F32, F16), (F16, F16, F32)]),
    shape=st.sampled_from([(2, 1), (2,), (4, 7), (6, 3, 5, 7), (2, 4, 8, 8), (4, 2, 3, 5, 11), (2, 8209)]),
    logit=st.sampled_from([0.5, 15.0]),
    shared=st.booleans(),
    weighted=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_reference(
    backend: str,
    choice: tuple[str, float],
    mu: float | None,
    method: str,
    ratio: str,
    reduction: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    logit: float,
    shared: bool,
    weighted: bool,
    masked: bool,
    seed: int,
) -> None:
    batch = aligned_batch(shape, dtypes, shared_target=shared, weighted=weighted, seed=seed, device=DEVICE)
    options: dict[str, Any] = {"method": method, "ratio": ratio, "mask_threshold": 0.9 if masked else 0.0}
    options |= {"beta": beta_for(batch, logit, **options), "reduction": reduction}
    options |= {"loss_type": choice[0], "label_smoothing": choice[1], "safeguard": mu}
    out, grad = run(batch, backend, **options)
    truth = run_reference(batch, **options)
    z = truth.logits
    assert bool(((out.logits.double() - z).abs() <= 1e-5 * (1 + z.abs())).all())
    assert torch.equal(out.mask, truth.mask)
    steepest = 14.0 if choice[0] == "dmpo" else 2 * z.abs().max().item() + 1  # of |ℓ'|
    slack = 1e-5 * (1 + z.abs().max().item()) * steepest * (len(z) if reduction == "sum" else 1)
    assert abs(out.loss.item() - truth.loss.item()) <= slack + 1e-6 * abs(truth.loss.item())
    assert_gradient_within_budget(batch, grad, out.coef, options)


@functools.cache
def long_sample(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Batch, dict[str, Any]]:
    """A batch and options, the same for all backends."""
    batch = aligned_batch(shape, (dtype,) * 3, distance=0.05, device=DEVICE)
    options: dict[str, Any] = {"method": "diffusion_dpo", "safeguard": 0.25}
    return batch, options | {"beta": beta_for(batch, 3.0, **options)}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_long_sample_keeps_its_inner_product(backend: str, dtype: torch.dtype) -> None:
    """Over many chunks, parts, blocks and threads: λ is that of the whole sample."""
    shape = (4, 7, 201, 353)
    if backend == "triton":  # the interpreter is slow: just long enough for half precision to be summed in float32
        shape = (4, 3, 211, 104) if dtype == BF16 else (4, 3, 71, 50)
    batch, options = long_sample(shape, dtype)
    out, _ = run(batch, backend, **options)
    plain, _ = run(batch, backend, **{**options, "safeguard": None})
    d_chosen, d_rejected = (batch.model_pred.detach().double() - batch.target.double()).flatten(1).chunk(2)
    share = 0.75 * d_chosen.square().sum(1) / (d_chosen * d_rejected).sum(1)
    expected = torch.tensor([share[0], 1.0], dtype=F64)
    assert 0.5 < expected[0] < 0.999 and share[1] < 0
    torch.testing.assert_close((out.coef / plain.coef)[2:].double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(out.coef[:2], plain.coef[:2]) and torch.equal(out.loss, plain.loss)


# ---- Properties ------------------------------------------------------------------------------------------------------


def test_where_nothing_is_aligned_the_bits_are_those_of_a_plain_call(backend: str) -> None:
    batch = aligned_batch((6, 3, 50), (BF16,) * 3, device=DEVICE)
    model = batch.model_pred.detach().clone()
    model[3:5] = (
        2 * batch.target[3:5] - model[3:5]
    )  # every rejected sample's error turned away from its chosen sample's
    opposed = batch._replace(model_pred=model.requires_grad_())
    options: dict[str, Any] = {"method": "sipo", "beta": 20.0, "mask_threshold": 0.0}
    plain, grad = run(opposed, backend, **options)
    safe, safe_grad = run(opposed, backend, **options, safeguard=0.9)
    assert torch.equal(safe_grad, grad) and torch.equal(safe.coef, plain.coef) and torch.equal(safe.loss, plain.loss)


def test_mu_of_one_stops_the_rejected_where_it_is_aligned(backend: str) -> None:
    batch = aligned_batch((6, 3, 50), device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 20.0, "mask_threshold": 0.0}
    _, plain = run(batch, backend, **options)
    _, grad = run(batch, backend, **options, safeguard=1.0)
    assert not grad[3:5].any() and plain[3:5].all()
    keep = [0, 1, 2, 5]  # the chosen samples, and the rejected sample that points elsewhere
    assert torch.equal(grad[keep], plain[keep]) and bool(plain[keep].any(1).all())


@settings(max_examples=40)
@given(
    method=st.sampled_from(METHODS),
    choice=st.sampled_from(SMOOTHED),
    mu=st.sampled_from([0.0, 0.2, 0.9]),
    seed=st.integers(0, 10_000),
)
def test_the_chosen_does_not_get_worse_to_first_order(
    method: str, choice: tuple[str, float], mu: float, seed: int
) -> None:
    """Both outputs moved by what descent asks of the two together, where the pair pulls at all (−ℓ' > 0).

    Safeguarded DPO's proposition: the chosen sample's error then changes by no more than −μ of what its own gradient
    makes.
    """
    batch = aligned_batch((8, 3, 7), (F64,) * 3, weighted=True, seed=seed)
    options: dict[str, Any] = {"method": method, "mask_threshold": 0.0, "safeguard": mu}
    options |= {"beta": beta_for(batch, 4.0, **options), "loss_type": choice[0], "label_smoothing": choice[1]}
    (g_chosen, g_rejected) = reference_grad(batch, **options).flatten(1).chunk(2)
    d = (batch.model_pred.detach() - batch.target).flatten(1)[:4]
    pulls = (g_chosen * d).sum(1) > 0  # the chosen sample's coefficient is positive
    worse = -(d * (g_chosen + g_rejected)).sum(1)
    own = (d * g_chosen).sum(1)
    assert bool((worse <= -mu * own + 1e-12 * own.abs())[pulls].all())
    if bool(pulls[0]):  # without it the aligned ones can: the test would not see that otherwise
        without = reference_grad(batch, **{**options, "safeguard": None}).flatten(1).chunk(2)[1]
        assert bool((without.abs() >= g_rejected.abs()).all())


def test_safeguard_is_needed() -> None:
    """The plain gradient does push a chosen sample away, so that the property above says something."""
    batch = aligned_batch((2, 3, 7), (F64,) * 3, weighted=False, seed=1)
    far = (batch.target + (batch.model_pred.detach() - batch.target) * torch.tensor([0.3, 1.0]).view(2, 1, 1)).detach()
    batch = batch._replace(model_pred=far.requires_grad_())
    d = (far - batch.target).flatten(1)[0]
    for mu, worse in ((None, True), (0.1, False)):
        g = reference_grad(batch, method="diffusion_dpo", beta=1.0, safeguard=mu).flatten(1).sum(0)
        assert (-(d * g).sum() > 0) == worse


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_logits_beyond_all_bounds(loss_type: str, backend: str) -> None:
    """Infinite ones have the limits of the formulas; NaN stays NaN, in its own pair."""
    call = at_logits([math.inf, -math.inf, math.nan, 1e300, 0.25])
    smoothing = 0.1 if loss_type in ("sigmoid", "dmpo") else 0.0
    out = pair_loss(**call, loss_type=loss_type, label_smoothing=smoothing, reduction="none", backend=backend)
    high, low, broken, huge, plain = out.loss.tolist()
    limits = {
        "sigmoid": (math.inf, math.inf),  # ε of the labels are wrong for sure
        "ipo": (math.inf, math.inf),
        "hinge": (0.0, math.inf),
        "dmpo": (-math.log(0.9), -math.log(0.1)),
    }[loss_type]
    assert (high, low) == pytest.approx(limits, rel=1e-14) and math.isnan(broken)
    assert huge == pytest.approx({"sigmoid": 1e299, "ipo": math.inf, "hinge": 0.0, "dmpo": -math.log(0.9)}[loss_type])
    truth = reference.pair_loss(**call, loss_type=loss_type, label_smoothing=smoothing, reduction="none")
    assert plain == pytest.approx(truth.loss[4].item(), rel=1e-14)
    pull = out.coef[:5].tolist()  # 2 · −ℓ'
    if loss_type == "hinge":
        assert pull[:2] == [0.0, 2.0]
    if loss_type == "dmpo":
        assert pull[:2] == [0.0, 0.0] and pull[3] == 0
    assert math.isnan(pull[2])
    skipped = pair_loss(
        **call, loss_type=loss_type, label_smoothing=smoothing, reduction="none", nonfinite="skip", backend=backend
    )
    assert skipped.loss[:3].tolist() == [0.0] * 3 and skipped.coef[[0, 1, 2, 5, 6, 7]].tolist() == [0.0] * 6
    assert skipped.loss[4] == out.loss[4]


def test_a_broken_pair_keeps_to_itself_with_safeguard(backend: str) -> None:
    batch = aligned_batch((8, 3, 50), device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 20.0, "mask_threshold": 0.0, "safeguard": 0.5}
    _, clean = run(batch, backend, **options)
    model = batch.model_pred.detach().clone()
    model[1, 0, 3] = math.nan
    broken = batch._replace(model_pred=model.requires_grad_())
    _, grad = run(broken, backend, **options)
    keep = [0, 2, 3, 4, 6, 7]
    assert torch.equal(grad[keep], clean[keep]) and bool(grad[[1, 5]].isnan().all())
    _, skipped = run(broken, backend, **options, nonfinite="skip")
    assert torch.equal(skipped[keep], clean[keep]) and not skipped[[1, 5]].any()


def test_smoothing_towards_nothing_is_the_plain_link() -> None:
    batch = make_batch((8, 3, 7), (F64,) * 3)
    options: dict[str, Any] = {"method": "sipo", "mask_threshold": 0.0}
    options["beta"] = beta_for(batch, 5.0, **options)
    plain = reference_grad(batch, **options)
    for smoothing in (1e-3, 1e-6, 1e-9):
        difference = (reference_grad(batch, **options, label_smoothing=smoothing) - plain).norm()
        assert 0 < difference < 300 * smoothing * plain.norm()


def test_dmpo_rests_where_the_model_says_what_the_labels_do(backend: str) -> None:
    """σ(z) = 1 − ε: no loss and no gradient; ever less of both towards it."""
    odds = math.log(0.9 / 0.1)
    call = at_logits([odds - 1, odds - 0.01, odds, odds + 0.01])
    out = pair_loss(**call, loss_type="dmpo", label_smoothing=0.1, reduction="none", backend=backend)
    assert out.loss.tolist()[2] == pytest.approx(0, abs=1e-15) and out.coef[2].abs() < 1e-14
    assert out.loss[0] > out.loss[1] > 1e-7 and out.coef[0] > out.coef[1] > 0 > out.coef[3]


# ---- On the way to the backends --------------------------------------------------------------------------------------


def test_through_the_operator_and_compiled(backend: str) -> None:
    batch = aligned_batch((4, 3, 20), device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 20.0, "mask_threshold": 0.0}
    options |= {"loss_type": "dmpo", "label_smoothing": 0.2, "safeguard": 0.25}
    out, grad = run(batch, backend, **options)

    def step(model: Tensor) -> Tensor:
        return pair_loss(model, *batch[1:3], ratio_scale=batch.ratio_scale, backend=backend, **options).loss

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(batch.model_pred)
    (compiled,) = torch.autograd.grad(loss, batch.model_pred)
    assert torch.equal(loss, out.loss) and torch.equal(compiled, grad)
    plain = {**options, "safeguard": None}
    loss = torch.compile(
        lambda model: pair_loss(model, *batch[1:3], ratio_scale=batch.ratio_scale, backend=backend, **plain).loss,
        fullgraph=True,
        backend="aot_eager",
    )(batch.model_pred)
    (compiled,) = torch.autograd.grad(loss, batch.model_pred)
    assert torch.equal(compiled, run(batch, backend, **plain)[1]) and not torch.equal(compiled, grad)


def test_every_setting_reaches_the_operator() -> None:
    """Settings go to it in order: one that is missing there would shift the others."""
    schema = torch.ops.sipo.pair_loss.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names == [*Inputs._fields, *DEFAULTS, "backend"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "tanh"}, "loss_type='tanh': expected one of sigmoid, ipo, hinge, dmpo"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5: expected 0 <= label_smoothing < 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1: expected 0 <= label_smoothing < 0.5"),
        ({"label_smoothing": math.nan}, "label_smoothing=nan: expected"),
        (
            {"label_smoothing": 0.1, "loss_type": "ipo"},
            "label_smoothing=0.1 with loss_type='ipo': expected 0, or loss_type 'sigmoid' or 'dmpo'",
        ),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing=0.1 with loss_type='hinge'"),
        ({"safeguard": 1.5}, "safeguard=1.5: expected None"),
        ({"safeguard": -0.1}, "safeguard=-0.1: expected None"),
        ({"safeguard": True}, "safeguard=True is a bool: expected None (off) or 0 <= safeguard <= 1"),
        ({"label_smoothing": "0.1"}, "label_smoothing='0.1' is a str: expected 0 <= label_smoothing < 0.5"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    batch = make_batch((2, 3))
    for call in (
        lambda: pair_loss(*batch[:3], method="diffusion_dpo", beta=1.0, **options),
        lambda: reference.pair_loss(*batch[:3], method="diffusion_dpo", beta=1.0, **options),
        lambda: SIPOLoss(NoiseSchedule.discrete(), **options),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_module_and_configuration_hand_them_on() -> None:
    config = LossConfig(beta=50.0, loss_type="dmpo", label_smoothing=0.1, safeguard=0.5, mask_threshold=0.0)
    batch = aligned_batch((4, 2, 3, 3))
    schedule, timesteps = NoiseSchedule.discrete(), torch.tensor([300, 700])
    out = SIPOLoss(schedule, options=config)(*batch[:3], timesteps)
    (grad,) = torch.autograd.grad(out.loss, batch.model_pred)
    scaled = batch._replace(ratio_scale=schedule.ratio_scale(timesteps).repeat(2))
    exact = reference_grad(scaled, **config.values())
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())


def test_repr_shows_what_is_not_the_default() -> None:
    """It is part of a checkpoint's identity: that of a plain loss is, to the letter, what it was before."""
    schedule = NoiseSchedule.discrete()
    before = (
        "SIPOLoss(method='sipo', beta=None, ratio='posterior', clip_low=0.1, clip_high=0.1, mask_threshold=0.9, "
        f"reduction='mean', nonfinite='propagate', backend='auto', schedule={schedule!r})"
    )
    assert repr(SIPOLoss(schedule)) == before
    assert repr(SIPOLoss(schedule, label_smoothing=0, safeguard=None)) == before
    changed = repr(SIPOLoss(schedule, loss_type="dmpo", safeguard=0.0))
    assert changed == before.replace("'propagate',", "'propagate', loss_type='dmpo', safeguard=0.0,")
