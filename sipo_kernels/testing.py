"""Test batches, golden values and error budgets of the pair loss, for this package's tests and for new backends.

A backend passes if, on every batch, its results stay within :func:`assert_within_budget` of the float64 definition
(``sipo_kernels.reference``) and reproduce the golden values. Needs torch alone; checks raise AssertionError themselves,
so that they also work under ``python -O``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sipo_kernels import reference
from sipo_kernels.output import PairLossOutput
from sipo_kernels.pair_loss import pair_loss

# Error budgets against float64 on the same, rounded inputs, for |logits| <= 20.
LOGIT_BUDGET = 1e-5  # times 1 + |z|
GRAD_BUDGET = 5e-6  # relative L2 error over the batch, for float32 and float64 gradients
COEF_BUDGET = 1e-6  # for half-precision gradients, beyond rounding the exact gradient to the type: float32 coefficients


class Batch(NamedTuple):
    """The tensors of one call; ``model_pred`` requires grad."""

    model_pred: Tensor
    ref_pred: Tensor
    target: Tensor
    ratio_scale: Tensor
    error_weight: Tensor | None = None
    error_mask: Tensor | None = None


def make_batch(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3,
    *,
    scale: float = 1.0,
    distance: float = 0.1,
    shared_target: bool = False,
    weighted: bool = False,
    mask: str | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Batch:
    """Makes a random batch like those of training: a reference near the policy, and both far from the target.

    Args:
        shape: ``[S, ...]``.
        dtypes: Types of ``model_pred``, ``ref_pred`` and ``target``.
        scale: Standard deviation of the values.
        distance: Distance of the reference from the policy, relative to ``scale``.
        shared_target: Whether the target is ``[B, ...]``, shared by the two samples of a pair.
        weighted: Whether to add an ``error_weight``.
        mask: Whether to add an ``error_mask``: ``"bool"`` or ``"weights"``, of ``[S, ...]``; with ``"shared "`` before
            it ``[B, ...]``. A third of it is 0.
        seed: Seed of the values, which are drawn in float64 and rounded.
        device: Device of the tensors.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    goal_shape = (shape[0] // 2, *shape[1:]) if shared_target else shape
    model = scale * randn(*shape)
    ref = model + scale * distance * randn(*shape)
    target = scale * randn(*goal_shape)
    # Gives ratios on both sides of the mask's threshold and of the clip.
    ratio_scale = 0.12 * torch.rand(shape[0], generator=g, dtype=torch.float64) / scale**2
    error_weight = 0.5 + torch.rand(shape[0], generator=g, dtype=torch.float64) if weighted else None
    error_mask = None
    if mask is not None:
        rows = shape[0] // 2 if mask.startswith("shared ") else shape[0]
        weights = (torch.rand(rows, *shape[1:], generator=g, dtype=torch.float32) - 1 / 3).clamp(min=0)
        error_mask = weights > 0 if mask.endswith("bool") else weights
    return Batch(
        model.to(dtypes[0]).to(device).requires_grad_(),
        ref.to(dtypes[1]).to(device),
        target.to(dtypes[2]).to(device),
        ratio_scale.to(device),
        None if error_weight is None else error_weight.to(device),
        None if error_mask is None else error_mask.to(device),
    )


def beta_for(batch: Batch, logit: float = 15.0, **options: Any) -> float:
    """Returns the β at which the largest |logit| of the batch is ``logit``."""
    with torch.no_grad():
        out = run_reference(batch, beta=1.0, **options)
    largest = out.logits.abs().max().item()
    return logit / largest if largest > 1e-300 and math.isfinite(logit / largest) else 1.0


def run_reference(batch: Batch, **options: Any) -> reference.ReferenceOutput:
    """Runs the float64 definition on the batch's values."""
    return reference.pair_loss(**batch._asdict() | {"model_pred": batch.model_pred.detach()}, **options)


def reference_grad(batch: Batch, **options: Any) -> Tensor:
    """Computes the gradient of §6 in float64."""
    return reference.pair_grad(**batch._asdict() | {"model_pred": batch.model_pred.detach()}, **options)


def run(batch: Batch, backend: str, upstream: Tensor | None = None, **options: Any) -> tuple[PairLossOutput, Tensor]:
    """Runs forward and backward through the public function; returns the output and the gradient."""
    batch.model_pred.grad = None
    out = pair_loss(**batch._asdict(), backend=backend, **options)
    (grad,) = torch.autograd.grad(out.loss, batch.model_pred, grad_outputs=upstream)
    return out, grad


def assert_within_budget(
    batch: Batch, out: PairLossOutput, grad: Tensor, truth_grad: Tensor, truth: reference.ReferenceOutput
) -> None:
    """Checks a backend's results and gradient against float64 on the same inputs.

    Logits may be off by 1e-5·(1 + |z|), and gradients in float32 or float64 by 5e-6 in relative L2 norm over the batch.
    Gradients in half precision may be no worse than the exact gradient rounded to that type, plus 1e-6 for the float32
    coefficient. The mask must be equal.

    Args:
        batch: The inputs.
        out: What the backend returned.
        grad: The backend's gradient.
        truth_grad: :func:`reference_grad` of the batch.
        truth: :func:`run_reference` of the batch.

    Raises:
        AssertionError: A result outside its budget.
    """
    z = truth.logits
    if not bool(((out.logits.double() - z).abs() <= LOGIT_BUDGET * (1 + z.abs())).all()):
        raise AssertionError(f"logits {out.logits}, expected {z}")
    if not torch.equal(out.mask, truth.mask):
        raise AssertionError(f"mask {out.mask}, expected {truth.mask}")
    exact = truth_grad.double()
    rounding = (exact.to(grad.dtype).double() - exact).norm()
    half = grad.dtype in (torch.bfloat16, torch.float16)
    budget = rounding + COEF_BUDGET * exact.norm() if half else GRAD_BUDGET * exact.norm()
    error = (grad.double() - exact).norm()
    if not error <= budget:
        raise AssertionError(f"gradient in {grad.dtype}: error {error:.3g}, budget {budget:.3g}")
    torch.testing.assert_close(out.model_error.double(), truth.model_error, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.ref_error.double(), truth.ref_error, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.weight.double(), truth.weight, rtol=1e-5, atol=0)
    # With ratio="reference" the log ratio is a sum that cancels: its error is relative to the terms of the sum.
    slack = 1e-5 * truth.log_ratio.abs() + 1e-6 * batch.ratio_scale * (truth.model_error + truth.ref_error)
    if not bool(((out.log_ratio.double() - truth.log_ratio).abs() <= slack).all()):
        raise AssertionError(f"log_ratio {out.log_ratio}, expected {truth.log_ratio}")


@dataclass(frozen=True)
class GoldenCase:
    """One batch with known results, from an implementation that shares no code with the package.

    Attributes:
        name: The file's stem, ``METHOD-SCHEDULE...``; usable as a pytest id.
        schedule: How ``ratio_scale`` was made; :func:`golden_ratio_scales` describes the keys.
        options: Options of ``pair_loss``: method, beta, ratio, clip_low, clip_high, mask_threshold (0 where the file
            says ``masked: false``).
        model_pred: Float64 ``[S, ...]``, as are ``ref_pred`` and ``target``.
        noise_levels: ``[S]``, int64 timesteps of a discrete schedule or float64 σ of a flow.
        ratio_scale: Float64 ``[S]``, with infinities.
        expected: ``model_error, ref_error, error_gap, log_ratio, weight`` ``[S]``, ``mask`` (bool) and
            ``logits`` ``[B]``, ``loss`` (0-d, the mean over pairs) and ``grad`` (shaped as ``model_pred``).
    """

    name: str
    schedule: dict[str, Any]
    options: dict[str, Any]
    model_pred: Tensor
    ref_pred: Tensor
    target: Tensor
    noise_levels: Tensor
    ratio_scale: Tensor
    expected: dict[str, Tensor]

    @property
    def num_pairs(self) -> int:
        return self.model_pred.shape[0] // 2


@dataclass(frozen=True)
class RatioScaleCase:
    """``ratio_scale`` (float64 ``[N]``) at chosen ``noise_levels`` (``[N]``, as in GoldenCase) of one schedule."""

    name: str
    schedule: dict[str, Any]
    noise_levels: Tensor
    ratio_scale: Tensor


def golden_cases(folder: Path) -> list[GoldenCase]:
    """Reads every ``METHOD-SCHEDULE*.json`` file of a folder, in order of name.

    Raises:
        FileNotFoundError: The folder has none.
    """
    cases = []
    for path in sorted(folder.glob("*-*.json")):
        raw = json.loads(path.read_text())
        options = dict(raw["loss"])
        if not options.pop("masked"):
            options["mask_threshold"] = 0.0
        expected = {name: _tensor(value) for name, value in raw["expected"].items()}
        expected["mask"] = expected["mask"].bool()
        tensors = {name: _tensor(raw[name]) for name in ("model_pred", "ref_pred", "target", "ratio_scale")}
        levels = _noise_levels(raw)
        cases.append(GoldenCase(path.stem, raw["schedule"], options, noise_levels=levels, expected=expected, **tensors))
    if not cases:
        raise FileNotFoundError(f"no golden cases in {folder}")
    return cases


def golden_ratio_scales(folder: Path) -> list[RatioScaleCase]:
    """Reads the schedules of ``ratio_scale.json``.

    ``schedule`` has ``kind``, ``prediction`` and ``num_inference_steps``. A discrete one also has
    ``num_train_timesteps``, ``beta_start``, ``beta_end`` (all are ``scaled_linear``) and, where they are set,
    ``snr_shift_scale`` and ``rescale_betas_zero_snr``; a flow has ``shift``.
    """
    return [
        RatioScaleCase(raw["name"], raw["schedule"], _noise_levels(raw), _tensor(raw["ratio_scale"]))
        for raw in json.loads((folder / "ratio_scale.json").read_text())
    ]


def _noise_levels(raw: dict[str, Any]) -> Tensor:
    return torch.tensor(raw["timesteps"], dtype=torch.int64 if raw["schedule"]["kind"] == "discrete" else torch.float64)


def _tensor(value: Any) -> Tensor:
    return torch.tensor(_numbers(value), dtype=torch.float64)


def _numbers(value: Any) -> Any:
    """Turns the strings "inf" and "-inf" in nested lists into floats."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value)
