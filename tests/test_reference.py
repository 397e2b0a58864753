"""sipo_kernels.reference against the golden files, against autograd and against what math.md says of it."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from conftest import GOLDEN_FILES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sipo_kernels.options import METHODS, RATIOS, REDUCTIONS
from sipo_kernels.reference import ReferenceOutput, pair_grad, pair_loss
from sipo_kernels.testing import GoldenCase, golden_cases

CASES = golden_cases(GOLDEN_FILES)
PER_SAMPLE = ("model_error", "ref_error", "error_gap", "log_ratio", "weight")


close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15, equal_nan=True)


def make_batch(
    seed: int = 0, pairs: int = 3, shape: tuple[int, ...] = (2, 3), scale: float = 0.1, gap: float = 0.02
) -> dict[str, Tensor]:
    """Float64 inputs whose errors are about ``scale`` and whose gaps are about ``scale · gap``."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(2 * pairs, *shape, generator=generator, dtype=torch.float64)

    target = draw()
    model_pred = target + math.sqrt(scale) * draw()
    return {
        "model_pred": model_pred,
        "ref_pred": model_pred + gap * math.sqrt(scale) * draw(),
        "target": target,
        "ratio_scale": torch.rand(2 * pairs, generator=generator, dtype=torch.float64),
    }


def autograd(batch: dict[str, Any], grad_output: Tensor | None = None, **options: Any) -> Tensor:
    model_pred = batch["model_pred"].clone().requires_grad_()
    pair_loss(**{**batch, "model_pred": model_pred}, **options).loss.backward(grad_output)
    assert model_pred.grad is not None
    return model_pred.grad


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case: GoldenCase) -> None:
    model_pred = case.model_pred.clone().requires_grad_()
    inputs = (case.ref_pred, case.target)
    out = pair_loss(model_pred, *inputs, ratio_scale=case.ratio_scale, **case.options)
    for name in (*PER_SAMPLE, "logits"):
        close(getattr(out, name), case.expected[name])
    assert out.mask.tolist() == case.expected["mask"].tolist()
    close(out.loss.detach(), case.expected["loss"])
    (grad,) = torch.autograd.grad(out.loss, model_pred)
    close(grad, case.expected["grad"])
    formula = pair_grad(case.model_pred, *inputs, ratio_scale=case.ratio_scale, **case.options)
    close(formula, case.expected["grad"])


def test_golden_files_cover_what_they_should() -> None:
    assert {case.options["method"] for case in CASES} == set(METHODS)
    assert {case.options["ratio"] for case in CASES} == set(RATIOS)
    assert len(CASES) == 11
    assert any(case.ratio_scale.isinf().any() for case in CASES)


@given(
    seed=st.integers(0, 2**32),
    pairs=st.integers(1, 4),
    shape=st.sampled_from([(), (1,), (7,), (2, 3), (1, 5, 2)]),
    method=st.sampled_from(METHODS),
    ratio=st.sampled_from(RATIOS),
    reduction=st.sampled_from(REDUCTIONS),
    threshold=st.sampled_from([0.0, 0.9, 0.97]),
    scale=st.sampled_from([1e-4, 0.1, 1e4]),
    weighted=st.booleans(),
    shared=st.booleans(),
    given_error=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_formula_is_the_gradient(
    seed: int, pairs: int, shape: tuple[int, ...], method: str, ratio: str, reduction: str, threshold: float,
    scale: float, weighted: bool, shared: bool, given_error: bool,
) -> None:  # fmt: skip
    batch: dict[str, Any] = make_batch(seed, pairs, shape, scale)
    batch["ratio_scale"] /= scale
    if weighted:
        batch["error_weight"] = torch.rand(2 * pairs, dtype=torch.float64) + 0.5
    if shared:
        batch["target"] = batch["target"][:pairs]
    if given_error:
        batch["ref_error"], batch["ref_pred"] = torch.rand(2 * pairs, dtype=torch.float64) * scale, None
    options = {"method": method, "beta": 3.0 / scale, "ratio": ratio, "reduction": reduction}
    options["mask_threshold"] = threshold
    upstream = torch.rand((pairs,) if reduction == "none" else (), dtype=torch.float64) + 0.1
    formula = pair_grad(**batch, **options, grad_output=upstream)
    expected = autograd(batch, upstream, **options)
    close(formula, expected, atol=1e-13 * expected.abs().max().item())
    # no upstream gradient is the same as one of 1
    if reduction != "none":
        close(pair_grad(**batch, **options) * upstream, formula, atol=1e-13 * expected.abs().max().item())


@given(st.integers(0, 2**32), st.integers(1, 3))
@settings(max_examples=5, deadline=None)
def test_gradient_against_finite_differences(seed: int, pairs: int) -> None:
    batch = make_batch(seed, pairs, (3,))
    model_pred = batch.pop("model_pred").requires_grad_()

    def loss(pred: Tensor) -> Tensor:
        return pair_loss(pred, **batch, method="diffusion_dpo", beta=20.0).loss

    assert torch.autograd.gradcheck(loss, (model_pred,), rtol=1e-6, atol=1e-8)


@given(st.integers(0, 2**32), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_swapping_chosen_and_rejected_negates_dpo(seed: int, pairs: int) -> None:
    batch = make_batch(seed, pairs)
    swapped = {name: value.roll(pairs, 0) for name, value in batch.items()}
    out = pair_loss(**batch, method="diffusion_dpo", beta=50.0)
    other = pair_loss(**swapped, method="diffusion_dpo", beta=50.0)
    assert torch.equal(other.logits, -out.logits)
    # log sigmoid(z) − log sigmoid(−z) = z
    difference = (
        pair_loss(**swapped, method="diffusion_dpo", beta=50.0, reduction="none").loss
        - pair_loss(**batch, method="diffusion_dpo", beta=50.0, reduction="none").loss
    )
    close(difference, out.logits, rtol=1e-10, atol=1e-13)


@given(st.integers(0, 2**32), st.sampled_from(METHODS), st.sampled_from(RATIOS), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_policy_equal_to_reference(seed: int, method: str, ratio: str, pairs: int) -> None:
    batch = make_batch(seed, pairs)
    batch["ref_pred"] = batch["model_pred"]
    out = pair_loss(**batch, method=method, beta=1000.0, ratio=ratio)
    assert torch.equal(out.logits, torch.zeros(pairs, dtype=torch.float64))
    chosen, rejected = out.weight.chunk(2)
    share = out.mask.double()
    if method == "dpo_cm":
        share = share * torch.minimum(chosen, rejected)
    close(out.loss, math.log(2) * share.mean())
    if method != "dpo_cm":
        close(out.loss, math.log(2) * out.metrics()["active_fraction"])
    assert out.metrics()["rewards/accuracies"] == 0.5
    # the gradient is not zero: §6 with sigmoid(0) = ½
    grad = pair_grad(**batch, method="diffusion_dpo", beta=1000.0)
    sign = torch.cat([torch.ones(pairs), -torch.ones(pairs)]).double().reshape(-1, 1, 1)
    close(grad, sign * 0.25 * 1000 / pairs * (2 / 6) * (batch["model_pred"] - batch["target"]))


@given(st.integers(0, 2**32), st.sampled_from(METHODS))
@settings(max_examples=30, deadline=None)
def test_order_of_elements_and_pairs_does_not_matter(seed: int, method: str) -> None:
    batch = make_batch(seed, 4, (7,))
    generator = torch.Generator().manual_seed(seed)
    elements, order = torch.randperm(7, generator=generator), torch.randperm(4, generator=generator)
    stacked = torch.cat([order, order + 4])
    out = pair_loss(**batch, method=method, beta=20.0, reduction="none")
    moved = {name: (v[:, elements] if v.ndim > 1 else v)[stacked] for name, v in batch.items()}
    other = pair_loss(**moved, method=method, beta=20.0, reduction="none")
    close(other.loss, out.loss[order], rtol=1e-11, atol=1e-14)
    close(other.weight, out.weight[stacked])


def test_gap_keeps_its_accuracy_next_to_the_reference() -> None:
    # exact: model = t + 1, ref = t + 1 + 2⁻⁴⁰, so the gap is 1 − (1 + 2⁻⁴⁰)² = −2⁻³⁹ − 2⁻⁸⁰
    target = torch.zeros(2, 5, dtype=torch.float64)
    out = pair_loss(target + 1, target + 1 + 2.0**-40, target, method="diffusion_dpo", beta=1.0)
    assert out.error_gap.tolist() == [-(2.0**-39) - 2.0**-80] * 2


def test_shared_target_and_given_reference_errors() -> None:
    batch = make_batch(3, 3)
    batch["target"] = torch.cat([batch["target"][:3]] * 2)
    options: dict[str, Any] = {"method": "sipo", "beta": 100.0}
    out = pair_loss(**batch, **options)
    shared = pair_loss(**{**batch, "target": batch["target"][:3]}, **options)
    assert torch.equal(shared.loss, out.loss)
    assert torch.equal(shared.error_gap, out.error_gap)
    numbers = pair_loss(**{**batch, "ref_pred": None}, ref_error=out.ref_error, **options)
    assert torch.equal(numbers.ref_error, out.ref_error)
    close(numbers.error_gap, out.model_error - out.ref_error, rtol=0, atol=0)
    close(numbers.logits, out.logits, rtol=1e-10)


def test_error_weight_multiplies_the_gap_alone() -> None:
    batch = make_batch(4, 3)
    c = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.25], dtype=torch.float64)
    plain = pair_loss(**batch, method="sipo", beta=40.0)
    out = pair_loss(**batch, method="sipo", beta=40.0, error_weight=c)
    term = c * plain.weight * plain.error_gap
    close(out.logits, -20.0 * (term[:3] - term[3:]))
    assert torch.equal(out.log_ratio, plain.log_ratio)
    close(pair_loss(**batch, method="sipo", beta=20.0, error_weight=2 * c).loss, out.loss)


def test_reductions() -> None:
    batch = make_batch(5, 3)
    losses = {r: pair_loss(**batch, method="sdpo", beta=40.0, reduction=r).loss for r in REDUCTIONS}
    assert losses["none"].shape == (3,)
    close(losses["sum"], losses["none"].sum())
    close(losses["mean"], losses["none"].sum() / 3)


@pytest.mark.parametrize("logit", [-800.0, -30.0, -21.0, 0.0, 21.0, 30.0, 800.0])
def test_softplus_is_exact_far_out(logit: float) -> None:
    # one element, d = 1: with reference errors of 1 and 1 + 2·logit/β, logits = ½·β·gap of the rejected sample's
    model, beta = torch.ones(2, 1), 2.0
    ref_error = torch.tensor([1.0, 1.0 - logit], dtype=torch.float64)
    out = pair_loss(model, None, torch.zeros(2, 1), method="diffusion_dpo", beta=beta, ref_error=ref_error)
    assert out.logits.item() == logit
    expected = max(-logit, 0.0) + math.log1p(math.exp(-abs(logit)))
    assert out.loss.item() == pytest.approx(expected, rel=1e-15, abs=1e-300)


def masked_batch(ratios: list[float]) -> dict[str, Any]:
    """A batch of D = 1 whose ratios are ``ratios``: error 1, ratio_scale = −log ratio."""
    samples = len(ratios)
    scale = torch.tensor([-math.log(r) if r > 0 else math.inf for r in ratios], dtype=torch.float64)
    model = torch.ones(samples, 1, dtype=torch.float64)
    return {"model_pred": model, "ref_pred": 1.25 * model, "target": 0 * model, "ratio_scale": scale}


def test_weight_clip_mask_and_metrics_by_hand() -> None:
    # chosen samples 1, 0.95, 0.5, 0; rejected samples 0.97, 0.85, 1, 1
    batch = masked_batch([1.0, 0.95, 0.5, 0.0, 0.97, 0.85, 1.0, 1.0])
    weights = [1.0, 0.95, 0.9, 0.9, 0.97, 0.9, 1.0, 1.0]
    out = pair_loss(**batch, method="sipo", beta=16.0)
    close(out.weight, torch.tensor(weights, dtype=torch.float64))
    assert out.mask.tolist() == [True, False, False, False]
    # gap = 1 − 1.5625 in every sample; logits = −8 · gap · (w_w − w_l)
    logits = [4.5 * (weights[i] - weights[i + 4]) for i in range(4)]
    close(out.logits, torch.tensor(logits, dtype=torch.float64), atol=1e-14)
    loss = math.log1p(math.exp(-logits[0])) / 4
    assert out.loss.item() == pytest.approx(loss, rel=1e-13)
    expected = {
        "loss": loss,
        "rewards/chosen": 4.5 * sum(weights[:4]) / 4,
        "rewards/rejected": 4.5 * sum(weights[4:]) / 4,
        "rewards/margins": sum(logits) / 4,
        "rewards/accuracies": 0.5,  # 4.5·0.03 > 0, 4.5·0.05 > 0, two below 0
        "model_mse": 1.0,
        "ref_mse": 0.0625 * 25,
        "chosen_gap": -0.5625,
        "rejected_gap": -0.5625,
        "weight_mean": sum(weights) / 8,
        "clip_fraction": 3 / 8,
        "active_fraction": 0.25,
        "nonfinite_pairs": 0.0,
    }
    metrics = out.metrics()
    assert list(metrics) == list(expected)
    for name, value in expected.items():
        assert metrics[name].shape == () and metrics[name].dtype == torch.float64
        assert metrics[name].item() == pytest.approx(value, rel=1e-13), name

    for method, b in (("dpo_cm", 0.97), ("sdpo", 1.0)):
        other = pair_loss(**batch, method=method, beta=16.0)
        assert other.logits.tolist() == [0.0] * 4  # gaps and weights inside the logits are equal
        assert other.loss.item() == pytest.approx(b * math.log(2) / 4, rel=1e-12)
    dpo = pair_loss(**batch, method="diffusion_dpo", beta=16.0)
    assert dpo.mask.all() and dpo.metrics()["clip_fraction"] == 0
    close(dpo.weight, out.weight)
    assert dpo.loss.item() == pytest.approx(math.log(2), rel=1e-15)


def test_mask_reaches_its_threshold_and_zero_disables_it() -> None:
    batch = masked_batch([0.5, 0.5, 0.0, 1.0, 0.25, 0.0])
    batch["ratio_scale"] = torch.zeros(6, dtype=torch.float64)
    out = pair_loss(**batch, method="sipo", beta=1.0, mask_threshold=1.0)
    assert out.mask.tolist() == [True, True, True]  # a ratio of exactly 1 reaches 1
    batch["ratio_scale"][4] = 1e-15
    assert pair_loss(**batch, method="sipo", beta=1.0, mask_threshold=1.0).mask.tolist() == [True, False, True]
    batch["ratio_scale"][:] = math.inf
    assert pair_loss(**batch, method="sipo", beta=1.0).mask.tolist() == [False] * 3
    assert pair_loss(**batch, method="sipo", beta=1.0, mask_threshold=0.0).mask.tolist() == [True] * 3


@pytest.mark.parametrize("ratio", RATIOS)
def test_terminal_step(ratio: str) -> None:
    # errors: 0, 1, NaN, and inf, at the terminal step; both halves alike
    model = torch.tensor([0.0, 1.0, math.nan, math.inf] * 2, dtype=torch.float64).reshape(-1, 1)
    batch: dict[str, Any] = {"model_pred": model, "ref_pred": None, "target": 0 * torch.ones(8, 1)}
    batch["ref_error"] = torch.zeros(8, dtype=torch.float64)
    batch["ratio_scale"] = torch.full((8,), math.inf, dtype=torch.float64)
    out = pair_loss(**batch, method="sipo", beta=1.0, ratio=ratio, reduction="none")
    close(out.log_ratio[:4], torch.tensor([-math.inf, -math.inf, math.nan, -math.inf], dtype=torch.float64))
    close(out.weight[:4], torch.tensor([0.9, 0.9, math.nan, 0.9], dtype=torch.float64))
    assert not out.mask.any()


def test_ratio_below_the_reference_is_above_one() -> None:
    batch = masked_batch([math.exp(-0.05)] * 4)
    out = pair_loss(**batch, method="sipo", beta=1.0, ratio="reference", clip_high=0.02)
    close(out.log_ratio, torch.full((4,), 0.05 * 0.5625, dtype=torch.float64))
    close(out.weight, torch.full((4,), 1.02, dtype=torch.float64))
    assert out.metrics()["clip_fraction"] == 1


def test_without_ratio_scale() -> None:
    batch = make_batch(6)
    with_scale = pair_loss(**batch, method="diffusion_dpo", beta=30.0)
    del batch["ratio_scale"]
    out = pair_loss(**batch, method="diffusion_dpo", beta=30.0)
    assert torch.equal(out.loss, with_scale.loss)
    assert torch.equal(out.log_ratio, torch.zeros(6, dtype=torch.float64))
    assert torch.equal(out.weight, torch.ones(6, dtype=torch.float64))


def poisoned(kind: float, masked: bool) -> dict[str, Any]:
    """Three pairs; pair 1's chosen sample holds one bad element; ``masked``: the rejected one is at the last step."""
    batch = make_batch(7, 3, scale=0.01)
    batch["model_pred"][1, 0, 1] = kind
    if masked:
        batch["ratio_scale"][4] = math.inf
    return batch


@pytest.mark.parametrize("kind", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_skip_leaves_a_broken_pair_out(kind: float, method: str) -> None:
    batch = poisoned(kind, masked=False)
    options: dict[str, Any] = {"method": method, "beta": 100.0, "nonfinite": "skip"}
    out = pair_loss(**batch, **options)
    good = [0, 2, 3, 5]
    kept = pair_loss(**{name: v[good] for name, v in batch.items()}, **options)
    assert out.mask.tolist() == [True, False, True]
    close(out.loss, kept.loss * 2 / 3)  # it still counts in the divisor
    losses = pair_loss(**batch, **options, reduction="none").loss
    assert losses[1].item() == 0.0
    for grad in (autograd(batch, **options), pair_grad(**batch, **options)):
        assert torch.equal(grad[[1, 4]], torch.zeros(2, 2, 3, dtype=torch.float64))
        close(grad[good], pair_grad(**{n: v[good] for n, v in batch.items()}, **options) * 2 / 3)
    metrics, kept_metrics = out.metrics(), kept.metrics()
    assert metrics["nonfinite_pairs"] == 1 and metrics["active_fraction"].item() == pytest.approx(2 / 3)
    close(metrics["loss"], kept.loss * 2 / 3)
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "model_mse",
        "ref_mse",
        "chosen_gap",
        "rejected_gap",
        "weight_mean",
    ):
        close(metrics[name], kept_metrics[name])


def test_skip_with_nothing_left() -> None:
    batch = make_batch(8, 2)
    batch["model_pred"][:, 0, 0] = math.nan
    out = pair_loss(**batch, method="sipo", beta=100.0, nonfinite="skip")
    metrics = out.metrics()
    assert out.loss.item() == 0.0
    assert metrics.pop("nonfinite_pairs") == 2
    assert {name: value.item() for name, value in metrics.items()} == dict.fromkeys(metrics, 0.0)


@pytest.mark.parametrize("kind", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["dpo_cm", "sipo", "sdpo"])
def test_propagate_keeps_it_in_its_pair(kind: float, method: str) -> None:
    options: dict[str, Any] = {"method": method, "beta": 100.0, "reduction": "none"}
    for masked in (False, True):
        batch = poisoned(kind, masked)
        out = pair_loss(**batch, **options)
        clean = pair_loss(**make_batch(7, 3, scale=0.01), **options)
        assert torch.equal(out.loss[[0, 2]], clean.loss[[0, 2]])
        # the literal product: 0 · softplus(NaN or inf)
        assert math.isnan(out.loss[1].item())
        assert out.mask.tolist() == [True, False, True]  # a ratio of NaN or 0 reaches no threshold
        assert out.metrics()["nonfinite_pairs"] == 1
        upstream = torch.ones(3, dtype=torch.float64)
        for grad in (autograd(batch, upstream, **options), pair_grad(**batch, **options)):
            assert torch.equal(grad[[1, 4]], torch.zeros(2, 2, 3, dtype=torch.float64))
            close(grad[[0, 2]], pair_grad(**make_batch(7, 3, scale=0.01), **options)[[0, 2]])


def test_propagate_without_a_mask() -> None:
    batch = poisoned(math.nan, masked=False)
    for method, threshold in (("diffusion_dpo", 0.9), ("sipo", 0.0)):
        options: dict[str, Any] = {"method": method, "beta": 100.0, "mask_threshold": threshold}
        grad = pair_grad(**batch, **options)
        assert grad[[1, 4]].isnan().all()
        close(autograd(batch, **options), grad)
        out = pair_loss(**batch, **options)
        assert math.isnan(out.loss.item())
        # logits of NaN are neither above 0 nor a tie
        assert out.metrics()["model_mse"].isnan() and out.metrics()["ref_mse"].isfinite()
        share = ((out.logits[0] > 0).double() + (out.logits[2] > 0).double()) / 3
        assert out.metrics()["rewards/accuracies"] == share


def test_infinite_upstream_gradient_leaves_zeros_alone() -> None:
    batch = masked_batch([1.0, 0.5, 1.0, 1.0])
    grad = pair_grad(**batch, method="sipo", beta=1.0, grad_output=torch.tensor(math.inf))
    assert grad[:, 0].tolist() == [math.inf, 0.0, -math.inf, 0.0]


def test_raise_names_the_pairs() -> None:
    batch = make_batch(9, 4)
    batch["model_pred"][1, 0, 0] = math.nan
    batch["model_pred"][7, 0, 0] = math.inf
    options: dict[str, Any] = {"method": "sipo", "beta": 1.0, "nonfinite": "raise"}
    with pytest.raises(FloatingPointError, match=r"^pairs 1, 3 of 4 are not finite"):
        pair_loss(**batch, **options)
    with pytest.raises(FloatingPointError, match=r"^pairs 1, 3 of 4 are not finite"):
        pair_grad(**batch, **options)
    clean = make_batch(9, 4)
    assert torch.equal(pair_loss(**clean, **options).loss, pair_loss(**clean, method="sipo", beta=1.0).loss)


def test_computes_in_float64_whatever_comes_in() -> None:
    batch = make_batch(10, 3)
    half = {name: value.bfloat16() for name, value in batch.items()}
    half["model_pred"].requires_grad_()
    out: ReferenceOutput = pair_loss(**half, method="sipo", beta=10.0)
    wide = pair_loss(**{name: v.detach().double() for name, v in half.items()}, method="sipo", beta=10.0)
    assert torch.equal(out.loss, wide.loss) and out.loss.dtype == torch.float64
    out.loss.backward()
    assert half["model_pred"].grad is not None and half["model_pred"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "dpo"}, ValueError, "method='dpo'"),
        ({"reduction": "avg"}, ValueError, "reduction='avg'"),
        ({"beta": -1.0}, ValueError, "beta=-1.0"),
        ({"ratio_scale": None}, ValueError, "ratio_scale"),
        ({"ref_pred": None}, ValueError, "ref_error"),
        ({"target": torch.zeros(5, 2, 3)}, ValueError, r"target has shape \[5, 2, 3\]"),
    ],
)
def test_errors_are_those_of_every_backend(change: dict[str, Any], error: type, message: str) -> None:
    arguments = {**make_batch(), "method": "sipo", "beta": 1.0, **change}
    for function in (pair_loss, pair_grad):
        with pytest.raises(error, match=message) as caught:
            function(**arguments)
        assert "\n" not in str(caught.value)
