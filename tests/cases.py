"""Batches, budgets and comparisons that the tests of the pair loss share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sipo_kernels import PairLossOutput, pair_loss, reference


class Batch(NamedTuple):
    """Tensors of one call; ``model_pred`` requires grad."""

    model_pred: Tensor
    ref_pred: Tensor
    target: Tensor
    ratio_scale: Tensor
    error_weight: Tensor | None = None


def make_batch(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3,
    *,
    scale: float = 1.0,
    distance: float = 0.1,
    shared_target: bool = False,
    weighted: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Batch:
    """A batch as training makes it: a reference near the policy, both some way off the target.

    Args:
        shape: ``[S, ...]``.
        dtypes: of model_pred, ref_pred and target.
        scale: size of every value.
        distance: of the reference from the policy, relative to ``scale``.
        shared_target: target ``[B, ...]``.
        weighted: with an error_weight.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    goal_shape = (shape[0] // 2, *shape[1:]) if shared_target else shape
    model = scale * randn(*shape)
    ref = model + scale * distance * randn(*shape)
    target = scale * randn(*goal_shape)
    # Ratios on both sides of the mask's threshold and of the clip.
    ratio_scale = 0.12 * torch.rand(shape[0], generator=g, dtype=torch.float64) / scale**2
    error_weight = 0.5 + torch.rand(shape[0], generator=g, dtype=torch.float64) if weighted else None
    return Batch(
        model.to(dtypes[0]).to(device).requires_grad_(),
        ref.to(dtypes[1]).to(device),
        target.to(dtypes[2]).to(device),
        ratio_scale.to(device),
        None if error_weight is None else error_weight.to(device),
    )


def beta_for(batch: Batch, logit: float = 15.0, **options: Any) -> float:
    """The β at which the largest |logit| of the batch is ``logit``: budgets are stated for |z| ≤ 20."""
    with torch.no_grad():
        out = run_reference(batch, beta=1.0, **options)
    largest = out.logits.abs().max().item()
    return logit / largest if largest > 1e-300 and math.isfinite(logit / largest) else 1.0


def run_reference(batch: Batch, **options: Any) -> reference.ReferenceOutput:
    """The float64 definition on the same, rounded inputs."""
    return reference.pair_loss(
        batch.model_pred.detach(),
        batch.ref_pred,
        batch.target,
        ratio_scale=batch.ratio_scale,
        error_weight=batch.error_weight,
        **options,
    )


def reference_grad(batch: Batch, **options: Any) -> Tensor:
    """§6 in float64."""
    return reference.pair_grad(
        batch.model_pred.detach(),
        batch.ref_pred,
        batch.target,
        ratio_scale=batch.ratio_scale,
        error_weight=batch.error_weight,
        **options,
    )


def run(batch: Batch, backend: str, upstream: Tensor | None = None, **options: Any) -> tuple[PairLossOutput, Tensor]:
    """Forward and backward through the public function: output and gradient."""
    batch.model_pred.grad = None
    out = pair_loss(
        batch.model_pred,
        batch.ref_pred,
        batch.target,
        ratio_scale=batch.ratio_scale,
        error_weight=batch.error_weight,
        backend=backend,
        **options,
    )
    (grad,) = torch.autograd.grad(out.loss, batch.model_pred, grad_outputs=upstream)
    return out, grad


def assert_within_budget(batch: Batch, out: PairLossOutput, grad: Tensor, truth_grad: Tensor, truth: Any) -> None:
    """The error budgets of the contract, against float64 on the same inputs.

    Logits within 1e-5·(1 + |z|); gradients within 5e-6 relative L2 over the batch where the output is float32 or wider,
    else no worse than rounding the exact gradient to the output's type (and 1e-6 for the float32 coefficient).
    """
    z = truth.logits
    assert bool(((out.logits.double() - z).abs() <= 1e-5 * (1 + z.abs())).all()), (out.logits, z)
    assert torch.equal(out.mask, truth.mask)
    exact = truth_grad.double()
    rounding = (exact.to(grad.dtype).double() - exact).norm()
    half = grad.dtype in (torch.bfloat16, torch.float16)
    budget = rounding + 1e-6 * exact.norm() if half else 5e-6 * exact.norm()
    error = (grad.double() - exact).norm()
    assert error <= budget, f"{grad.dtype}: error {error:.3g}, budget {budget:.3g}"
    torch.testing.assert_close(out.model_error.double(), truth.model_error, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.ref_error.double(), truth.ref_error, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.weight.double(), truth.weight, rtol=1e-5, atol=0)
    # A reference ratio is a cancelling sum: its error is relative to the terms, not to the result.
    slack = 1e-5 * truth.log_ratio.abs() + 1e-6 * batch.ratio_scale * (truth.model_error + truth.ref_error)
    assert bool(((out.log_ratio.double() - truth.log_ratio).abs() <= slack).all())
