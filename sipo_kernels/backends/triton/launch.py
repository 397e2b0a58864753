"""Launches the Triton kernels of the pair loss; on a machine without a GPU, Triton's interpreter runs them.

``forward``, ``gradient`` and ``mend`` are one launch each of a kernel in ``passes.py``. The host decides everything
from shapes and types, and reads no values.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from sipo_kernels.backends.interface import Stats, empty_stats
from sipo_kernels.backends.triton import plan as triton_plan
from sipo_kernels.backends.triton.batch_report import RECORD
from sipo_kernels.backends.triton.passes import pair_backward, pair_forward
from sipo_kernels.backends.triton.plan import WARPS
from sipo_kernels.inputs import Inputs
from sipo_kernels.layout import accumulate_dtype, agree, dense_like, empty_grad, stats_dtype
from sipo_kernels.options import LOSS_TYPES, METHODS, Settings
from sipo_kernels.output import Totals

# Neighbours in a tile that are added up before they reach an accumulator, which saves accumulators and so registers: as
# many as one thread loads at a time.
FOLD = {torch.float32: 8, torch.float64: 4}

_TL = {torch.float32: tl.float32, torch.float64: tl.float64}


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' device the current one, on which Triton launches."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _limits(device: torch.device) -> dict[str, int]:
    """Returns a limit on registers per thread, which only NVIDIA's compiler takes; it would use more than it needs."""
    return {"maxnreg": triton_plan.REGISTERS} if device.type == "cuda" and torch.version.hip is None else {}


def forward(
    inputs: Inputs,
    settings: Settings,
    *,
    with_grad: bool = False,
    expected: Tensor | float = 1.0,
    totals: Totals | None = None,
) -> Stats:
    """See :func:`sipo_kernels.backends.eager.forward`: one launch makes gradient, metrics and running sums too."""
    model, goal, ref, error_mask = agree(inputs.model_pred, inputs.target, inputs.ref_pred, inputs.error_mask)
    samples, pairs, elements = model.shape[0], model.shape[0] // 2, model.numel() // model.shape[0]
    acc, device = accumulate_dtype(elements, goal, model, ref), model.device
    block = triton_plan.block(acc, model, ref, goal, error_mask=error_mask)
    kept_bytes = triton_plan.kept_bytes(model, goal, error_mask)
    plan = triton_plan.plan(pairs, elements, block, kept_bytes, triton_plan.device_of(model))
    stats = empty_stats(inputs, settings, with_grad)
    filled = dense_like(model, stats.grad) if with_grad else stats.grad
    safeguarded = settings.safeguard is not None
    sums = (3 if error_mask is None else 4) * samples + (pairs if safeguarded else 0)
    partial = torch.empty(sums * plan.parts, dtype=acc, device=device)
    records = torch.empty(RECORD * pairs, dtype=torch.float64, device=device)
    tickets = torch.zeros(2 + pairs, dtype=torch.int32, device=device)
    scale, weight, given = (t if t is None else t.contiguous() for t in inputs[3:6])
    metrics, levels, pair_levels, top = totals or Totals()

    def pointer(tensor: Tensor | None) -> Tensor:  # a tensor that is not given is not read, but Triton needs one
        return model if tensor is None else tensor

    with _on(device):
        pair_forward[(plan.programs,)](
            model,
            pointer(ref),
            goal,
            pointer(scale),
            pointer(weight),
            pointer(given),
            expected if isinstance(expected, Tensor) else model,
            pointer(pair_levels),
            partial,
            records,
            tickets,
            stats.loss,
            stats.samples,
            stats.logits,
            stats.mask,
            stats.numbers,
            filled,
            pointer(metrics),
            pointer(levels),
            elements,
            model.stride(0),
            0 if ref is None else ref.stride(0),
            goal.stride(0),
            0 if pair_levels is None else pair_levels.stride(0),
            pairs,
            plan.parts,
            plan.tiles,
            plan.distance,
            plan.keep,
            0 if levels is None else levels.shape[1],
            settings.beta,
            1 - settings.clip_low,
            1 + settings.clip_high,
            settings.mask_threshold,
            settings.loss_scale(pairs),
            settings.smoothing,
            math.log1p(-settings.smoothing),
            math.log(settings.smoothing) if settings.smoothing > 0 else -math.inf,
            settings.safeguard if safeguarded else 0.0,
            top,
            0.0 if isinstance(expected, Tensor) else float(expected),
            pointer(error_mask),
            0 if error_mask is None else error_mask.stride(0),
            METHOD=METHODS.index(settings.method),
            LOSS_TYPE=LOSS_TYPES.index(settings.loss_type),
            SMOOTHED=settings.smoothing > 0,
            SAFEGUARDED=safeguarded,
            MASKS=settings.masks,
            POSTERIOR=settings.ratio == "posterior",
            SKIP=settings.skip_nonfinite,
            PER_PAIR=settings.reduction == "none",
            HAS_REF=ref is not None,
            HAS_SCALE=scale is not None,
            HAS_WEIGHT=weight is not None,
            SHARED_TARGET=goal.shape[0] != samples,
            HAS_ERROR_MASK=error_mask is not None,
            SHARED_ERROR_MASK=error_mask is not None and error_mask.shape[0] != samples,
            WITH_GRAD=with_grad,
            EXPECTED_ON_DEVICE=isinstance(expected, Tensor),
            METRICS_TOO=metrics is not None,
            LEVELS=levels is not None,
            ACC=_TL[acc],
            GRAD_ACC=_TL[stats_dtype(model, goal)],
            PARTS=triton.next_power_of_2(plan.parts),
            BLOCK=block,
            FOLD=FOLD[acc],
            num_warps=WARPS,
            **_limits(device),
        )
    if filled is not stats.grad:
        stats.grad.copy_(filled)
    return stats


def gradient(
    model_pred: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, error_mask: Tensor | None = None
) -> Tensor:
    """See :func:`sipo_kernels.backends.eager.gradient`: one launch."""
    return mend(empty_grad(model_pred), model_pred, target, coef, upstream, None, error_mask=error_mask)


def mend(
    grad: Tensor,
    model_pred: Tensor,
    target: Tensor,
    coef: Tensor,
    upstream: Tensor,
    numbers: Tensor | None,
    remembered: Tensor | None = None,
    error_mask: Tensor | None = None,
) -> Tensor:
    """See :func:`sipo_kernels.backends.native.mend`: one launch, which the host does not wait for.

    It reads ``upstream`` and ``numbers`` alone if what came is what was expected. With ``numbers=None``, ``grad`` is
    written whatever came.
    """
    model, goal, _, error_mask = agree(model_pred, target, error_mask=error_mask)
    filled = dense_like(model, grad)
    mends = numbers is not None and filled is grad  # else the kernel fills a buffer, with the whole gradient
    samples, elements = model.shape[0], model.numel() // model.shape[0]
    block = triton_plan.block(accumulate_dtype(elements, goal, model), model, goal, error_mask=error_mask)
    parts, tiles = triton_plan.split(elements, block)
    programs = samples * parts
    if mends:
        programs = min(programs, triton_plan.PROGRAMS_PER_PROCESSOR * triton_plan.device_of(model).processors)
    with _on(model.device):
        pair_backward[(programs,)](
            model,
            goal,
            coef.contiguous(),
            upstream,
            coef if numbers is None else numbers,
            coef if remembered is None else remembered,
            filled,
            elements,
            model.stride(0),
            goal.stride(0),
            upstream.stride(0) if upstream.ndim else 0,
            samples // 2,
            parts,
            tiles,
            coef if error_mask is None else error_mask,
            0 if error_mask is None else error_mask.stride(0),
            MEND=mends,
            REMEMBER=remembered is not None,
            PER_PAIR=upstream.ndim == 1,
            SHARED_TARGET=goal.shape[0] != samples,
            HAS_ERROR_MASK=error_mask is not None,
            SHARED_ERROR_MASK=error_mask is not None and error_mask.shape[0] != samples,
            ACC=_TL[stats_dtype(model, goal)],
            BLOCK=block,
            num_warps=WARPS,
        )
    return grad if filled is grad else grad.copy_(filled)
