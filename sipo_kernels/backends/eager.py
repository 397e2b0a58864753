"""The pair loss in plain torch, for any device and dtype.

The formulas are those of ``csrc/pair_math.h`` and ``triton/math.py``, section by section of docs/math.md: read the
kernels beside it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sipo_kernels.backends.interface import Stats, scaled_coef
from sipo_kernels.inputs import Inputs
from sipo_kernels.layout import accumulate_dtype, empty_grad, mask_sums, pair_dtype, stats_dtype
from sipo_kernels.options import Settings
from sipo_kernels.output import Totals


def _as_pairs(tensor: Tensor, pairs: int, dtype: torch.dtype) -> Tensor:
    """Reshapes ``[S, ...]`` to ``[2, B, D]``, and a shared ``[B, ...]`` to ``[1, B, D]``, which broadcasts."""
    return tensor.reshape(-1, pairs, tensor[0].numel()).to(dtype)


def _errors(
    model_pred: Tensor,
    ref_pred: Tensor | None,
    target: Tensor,
    ref_error: Tensor | None,
    error_mask: Tensor | None,
    inner: bool,
) -> tuple[Tensor | int, Tensor, Tensor, Tensor, Tensor | None]:
    """Returns §2's Σw (D without a mask), errors of policy and reference and their gap, ``[2, B]`` each.

    With ``inner``, the fifth is §6's Σ(w_w · d_w · w_l · d_l)/Σw_l, ``[B]``.
    """
    pairs = model_pred.shape[0] // 2
    term, out = accumulate_dtype(model_pred[0].numel(), target, model_pred, ref_pred), pair_dtype(model_pred.device)
    model, goal = _as_pairs(model_pred, pairs, term), _as_pairs(target, pairs, term)
    ref = model if ref_pred is None else _as_pairs(ref_pred, pairs, term)
    counted: Tensor | int = model.shape[-1]
    if error_mask is not None:
        counted = mask_sums(error_mask, 2 * pairs).reshape(2, pairs)
        weight = _as_pairs(error_mask, pairs, error_mask.dtype)
        # What has no weight becomes 0 in every input, so that nothing that stood there is left.
        model, goal, ref = (torch.where(weight != 0, x, 0) for x in (model, goal, ref))

    def mean(value: Tensor) -> Tensor:
        if isinstance(counted, int):
            return value.mean(-1, dtype=out)
        return torch.where(counted == 0, 0, (weight * value).sum(-1, dtype=out) / counted)

    d = model - goal
    model_error = mean(d * d)
    alignment = None
    if inner:  # beside the safeguard a mask is boolean: d, which is 0 where the mask is False, is w · d
        product = d[0] * d[1]
        alignment = product.mean(-1, dtype=out) if isinstance(counted, int) else product.sum(-1, dtype=out) / counted[1]
    if ref_pred is None:
        assert ref_error is not None  # inputs.py
        given = ref_error.to(out).reshape(2, pairs)
        if isinstance(counted, Tensor):
            given = torch.where(counted == 0, 0, given)
        return counted, model_error, given, model_error - given, alignment
    d_ref = ref - goal
    return counted, model_error, mean(d_ref * d_ref), mean((model - ref) * (d + d_ref)), alignment


def _logit_loss(z: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Returns §5's ℓ(z) and §6's −ℓ'(z); NaN stays NaN."""
    smoothing = settings.smoothing
    if settings.loss_type == "ipo":
        return (z - 0.5) ** 2, 1 - 2 * z
    if settings.loss_type == "hinge":
        return F.relu(1 - z), torch.where(z < 1, 1, torch.where(z >= 1, 0, z))
    if settings.loss_type == "dmpo":
        # σ(−z) and what it multiplies, written so that nothing of the size of z cancels or meets a 0 at infinity.
        z = z.clamp(-1e3, 1e3)  # both limits are reached long before, in float64 too
        odds = math.log1p(-smoothing) - math.log(smoothing)
        pull = torch.sigmoid(-z) * (odds - z)
        return pull - math.log1p(-smoothing) + F.logsigmoid(z), torch.sigmoid(z) * pull
    # −log sigmoid(z) is softplus(−z); torch.softplus turns linear at 20, where it is off by 2e-9.
    if smoothing:  # (1 − ε) softplus(−z) + ε softplus(z)
        straight = torch.where(z < 0, (smoothing - 1) * z, smoothing * z)
        return straight + torch.log1p(torch.exp(-z.abs())), torch.sigmoid(-z) - smoothing
    return -F.logsigmoid(z), torch.sigmoid(-z)


def forward(
    inputs: Inputs,
    settings: Settings,
    *,
    with_grad: bool = False,
    expected: Tensor | float = 1.0,
    totals: Totals | None = None,
) -> Stats:
    """Computes one batch's loss, everything on the way to it, and the coefficients of its gradient.

    Args:
        inputs: The tensors of the call, in any layout and floating dtype.
        settings: The options of the call.
        with_grad: Make the gradient as well. Ignored here, as are the next two: plain torch makes the gradient in the
            backward pass, and ``output.py`` adds to the totals.
        expected: The upstream gradient to make it for: a number, or a 0-d ``pair_dtype`` tensor on the device.
        totals: Running sums to add the batch's numbers to.
    """
    model_pred, ref_pred, target, ratio_scale, error_weight, ref_error, error_mask = inputs
    samples, pairs = model_pred.shape[0], model_pred.shape[0] // 2
    counted, model_error, ref_err, error_gap, alignment = _errors(
        model_pred, ref_pred, target, ref_error, error_mask, settings.safeguard is not None
    )
    real = model_error.dtype

    # §3: log importance ratio. An infinite scale is the terminal step: −inf by definition, also at error 0.
    if ratio_scale is None:
        log_ratio = torch.zeros_like(model_error)
    else:
        scale = ratio_scale.to(real).reshape(2, pairs)
        error = model_error if settings.ratio == "posterior" else error_gap
        log_ratio = torch.where(torch.isposinf(scale) & ~torch.isnan(error), -torch.inf, -scale * error)

    # §4: weight, mask, pair weight.
    ratio = torch.exp(log_ratio)
    weight = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    pair_weight = torch.minimum(weight[0], weight[1])
    if settings.masks:
        mask = torch.minimum(ratio[0], ratio[1]) >= settings.mask_threshold
    else:
        mask = torch.ones_like(pair_weight, dtype=torch.bool)

    # §5: logits and loss.
    one = torch.ones_like(pair_weight)
    a, b = {
        "diffusion_dpo": (torch.stack([one, one]), one),
        "dpo_cm": (torch.stack([one, one]), pair_weight),
        "sipo": (weight, one),
        "sdpo": (torch.stack([pair_weight, pair_weight]), one),
    }[settings.method]
    if error_weight is not None:
        a = a * error_weight.to(real).reshape(2, pairs)
    weighted_gap = a * error_gap
    logits = -0.5 * settings.beta * (weighted_gap[0] - weighted_gap[1])
    reward = -0.5 * settings.beta * weighted_gap
    penalty, pull = _logit_loss(logits, settings)
    pair_loss = b * mask * penalty
    dtype = stats_dtype(model_pred, ref_pred, target)
    if settings.skip_nonfinite:  # in the type of the results, in which an overflow would be seen
        finite = torch.isfinite(torch.stack([*model_error, *error_gap, *weight, logits, penalty]).to(dtype)).all(0)
        mask = mask & finite
        pair_loss = torch.where(finite, pair_loss, 0)
    loss = pair_loss if settings.reduction == "none" else pair_loss.sum() * settings.loss_scale(pairs)

    # §6: one coefficient per sample; exactly 0 where the pair is masked, whatever the rest holds.
    g = torch.where(mask, b * pull * (0.5 * settings.beta * settings.loss_scale(pairs)), 0)
    share = one
    if alignment is not None and settings.safeguard is not None:  # for the type checker: both or none
        inner = a[0] * a[1] * alignment
        room = (1 - settings.safeguard) * a[0] * a[0] * model_error[0] / inner
        share = torch.where((inner > 0) & (room < 1), room, 1)
    counts = mask if error_mask is None else mask & (counted != 0)
    coef = torch.where(counts, torch.stack([g, -g * share]) * a * (2.0 / counted), 0)

    rows = (model_error, ref_err, error_gap, log_ratio, weight, reward, coef)
    per_sample = torch.stack([x.reshape(samples) for x in rows]).to(dtype)
    return Stats(loss.to(dtype), per_sample, logits.to(dtype), mask, model_pred.new_empty(0))


def gradient(
    model_pred: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, error_mask: Tensor | None = None
) -> Tensor:
    """Returns §6's gradient ``coef · upstream · w · (model_pred − target)`` in ``model_pred``'s dtype and layout.

    It is exactly 0 where ``coef`` or ``w`` is 0. ``upstream`` is 0-d or ``[B]``, like the loss.
    """
    acc = stats_dtype(model_pred, target)
    c = scaled_coef(coef, upstream).to(acc).reshape(-1, *[1] * (model_pred.ndim - 1))
    # In place: no other tensor of the gradient's size is made, or one if the gradient is in half precision.
    grad = torch.empty_like(model_pred, dtype=acc).copy_(model_pred)
    grad.unflatten(0, (-1, target.shape[0])).sub_(target)
    if error_mask is not None:
        grad.unflatten(0, (-1, error_mask.shape[0])).mul_(error_mask)
    grad.mul_(c).masked_fill_(c == 0, 0)
    if error_mask is not None:
        grad.unflatten(0, (-1, error_mask.shape[0])).masked_fill_(error_mask == 0, 0)
    return grad if acc == model_pred.dtype else empty_grad(model_pred).copy_(grad)
