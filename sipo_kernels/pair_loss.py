"""The pair loss: public function, ``torch.autograd.Function``, custom operators and their fakes.

The way of one batch: :func:`pair_loss` checks it (``checks.py``), chooses a backend (``backends.py``) and calls the
operator ``sipo::pair_loss``, which returns every number of ``docs/math.md`` §2-5, one gradient coefficient per sample
(§6) and, where the backend fuses it, the gradient. The backward pass hands that gradient out, or calls
``sipo::pair_grad``, which rebuilds it from the inputs for the upstream gradient at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sipo_kernels import backends, checks
from sipo_kernels.contract import PairLossOutput, Settings, Stats, empty_grad, empty_stats

_SETTINGS_SCHEMA = (
    "str method, float beta, str ratio, float clip_low, float clip_high, float mask_threshold, "
    "str reduction, bool skip_nonfinite"
)
_OPS = torch.library.Library("sipo", "DEF")
_OPS.define(
    "pair_loss(Tensor model_pred, Tensor? ref_pred, Tensor target, Tensor? ratio_scale, Tensor? error_weight, "
    f"Tensor? ref_error, {_SETTINGS_SCHEMA}, bool with_grad, str backend) -> "
    "(Tensor loss, Tensor samples, Tensor logits, Tensor mask, Tensor grad)"
)
_OPS.define("pair_grad(Tensor model_pred, Tensor target, Tensor coef, Tensor upstream, str backend) -> Tensor")


def _pair_loss_op(
    model_pred: Tensor,
    ref_pred: Tensor | None,
    target: Tensor,
    ratio_scale: Tensor | None,
    error_weight: Tensor | None,
    ref_error: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    *settings, with_grad, backend = options
    module = backends.module(backend)
    return tuple(
        module.forward(
            model_pred, ref_pred, target, ratio_scale, error_weight, ref_error, Settings(*settings), with_grad
        )
    )


def _pair_loss_fake(
    model_pred: Tensor,
    ref_pred: Tensor | None,
    target: Tensor,
    ratio_scale: Tensor | None,
    error_weight: Tensor | None,
    ref_error: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    *numbers, with_grad, _ = options
    return tuple(empty_stats(model_pred, ref_pred, target, Settings(*numbers), with_grad))


def _pair_grad_op(model_pred: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, backend: str) -> Tensor:
    return backends.module(backend).gradient(model_pred, target, coef, upstream)


def _pair_grad_fake(model_pred: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, backend: str) -> Tensor:
    return empty_grad(model_pred)


_OPS.impl("pair_loss", _pair_loss_op, "CompositeExplicitAutograd")
_OPS.impl("pair_grad", _pair_grad_op, "CompositeExplicitAutograd")
torch.library.register_fake("sipo::pair_loss", _pair_loss_fake, lib=_OPS)
torch.library.register_fake("sipo::pair_grad", _pair_grad_fake, lib=_OPS)


class PairLoss(torch.autograd.Function):
    """Differentiable in its first input, ``model_pred``; returns the fields of :class:`~contract.Stats` but ``grad``.

    With ``with_grad`` the forward also makes the gradient, for the upstream gradient of 1 that most calls get.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model_pred: Tensor,
        ref_pred: Tensor | None,
        target: Tensor,
        per_sample: tuple[Tensor | None, ...],
        settings: Settings,
        with_grad: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        stats = Stats(
            *torch.ops.sipo.pair_loss(model_pred, ref_pred, target, *per_sample, *settings, with_grad, backend)
        )
        ctx.save_for_backward(model_pred, target, stats.samples)
        ctx.mark_non_differentiable(stats.samples, stats.logits, stats.mask)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        ctx.fused_grad = stats.grad if with_grad else None
        return stats[:4]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "pair_loss does not support double backward (create_graph=True): use sipo.reference.pair_loss for it"
            )
        nothing = (None,) * 6
        if upstream is None or not ctx.needs_input_grad[0]:
            return (None, *nothing)
        model_pred, target, samples = ctx.saved_tensors
        fused, ctx.fused_grad = ctx.fused_grad, None  # handed out once: autograd may accumulate into what it is given
        if fused is not None:
            grad = backends.module(ctx.backend).mend(fused, model_pred, target, samples[5], upstream)
        else:
            grad = torch.ops.sipo.pair_grad(model_pred, target, samples[5], upstream, ctx.backend)
        return (grad, *nothing)


def pair_loss(
    model_pred: Tensor,
    ref_pred: Tensor | None,
    target: Tensor,
    *,
    method: str,
    beta: float,
    ratio_scale: Tensor | None = None,
    error_weight: Tensor | None = None,
    ref_error: Tensor | None = None,
    ratio: str = "posterior",
    clip_low: float = 0.1,
    clip_high: float = 0.1,
    mask_threshold: float = 0.9,
    reduction: str = "mean",
    nonfinite: str = "propagate",
    backend: str = "auto",
) -> PairLossOutput:
    """Preference loss of ``B`` pairs, from network outputs to gradient (``docs/math.md`` §2-6).

    Samples are stacked ``[winners; losers]`` along dimension 0, ``S = 2B``. The three large inputs may differ in
    dtype (bfloat16, float16, float32, float64) and lie in any layout; sums are accumulated in float32 or wider.

    Args:
        model_pred: ``[S, ...]`` output of the policy; the gradient flows here and has its dtype and layout.
        ref_pred: ``[S, ...]`` output of the frozen reference, or ``None`` with ``ref_error``.
        target: ``[S, ...]``, or ``[B, ...]`` where both halves of a pair share it.
        method: ``"diffusion_dpo"``, ``"dpo_cm"``, ``"sipo"`` or ``"sdpo"`` (§5).
        beta: strength of the implicit reward in this project's convention (§7), > 0.
        ratio_scale: ``[S]`` factor between error and log ratio (§3), ``inf`` at the terminal step. Only
            ``diffusion_dpo`` does without.
        error_weight: ``[S]`` optional weight of each sample's gap (ω(λ_t) of Diffusion-DPO).
        ref_error: ``[S]`` reference errors computed beforehand, in place of ``ref_pred``.
        ratio: ``"posterior"`` or ``"reference"`` (§3).
        clip_low: weights are clipped below at ``1 − clip_low``, in [0, 1].
        clip_high: weights are clipped above at ``1 + clip_high``, >= 0.
        mask_threshold: pairs whose smaller ratio lies below are masked, in [0, 1]; 0 turns the mask off.
        reduction: ``"mean"`` over the B pairs, ``"sum"`` or ``"none"`` (``[B]``).
        nonfinite: ``"propagate"`` NaN and infinity as torch would; ``"skip"`` such a pair as if masked; ``"raise"``
            (reads the result on the host).
        backend: ``"auto"``, ``"eager"``, ``"triton"`` or ``"native"``; ``SIPO_BACKEND`` sets what ``"auto"`` means.

    Returns:
        :class:`~sipo_kernels.PairLossOutput`; numbers are float32, or float64 if any large input is.

    Raises:
        TypeError: an input of the wrong type or dtype.
        ValueError: shapes, devices, ranges or choices that do not fit; a gradient asked of anything but
            ``model_pred``.
        RuntimeError: a named backend that cannot run here, with the reason.
        FloatingPointError: ``nonfinite="raise"`` and a pair that is not finite.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "pair_loss does not support torch.func transforms (vmap, grad, jvp): use loss.backward() on stacked pairs"
        )
    checks.check_settings(
        method=method,
        beta=beta,
        ratio=ratio,
        clip_low=clip_low,
        clip_high=clip_high,
        mask_threshold=mask_threshold,
        reduction=reduction,
        nonfinite=nonfinite,
    )
    checks.check_tensors(
        model_pred,
        ref_pred,
        target,
        method=method,
        ratio_scale=ratio_scale,
        error_weight=error_weight,
        ref_error=ref_error,
    )
    chosen = backends.choose(backend, model_pred.device)
    if compiling and nonfinite == "raise":
        raise ValueError(
            "nonfinite='raise' reads the loss on the host and cannot be compiled: expected 'propagate' or 'skip'"
        )
    # A compiled graph keeps forward and backward functional: there the gradient is made in the backward pass. So it is
    # for float16, whose gradients underflow without the loss scale that only the backward pass knows.
    with_grad = (
        torch.is_grad_enabled()
        and model_pred.requires_grad
        and not compiling
        and chosen in backends.FUSED
        and model_pred.dtype != torch.float16
    )
    settings = Settings(
        method,
        float(beta),
        ratio,
        float(clip_low),
        float(clip_high),
        float(mask_threshold),
        reduction,
        nonfinite == "skip",
    )
    loss, samples, logits, mask = PairLoss.apply(
        model_pred, ref_pred, target, (ratio_scale, error_weight, ref_error), settings, with_grad, chosen
    )
    model_error, ref_err, reward_gap, log_ratio, weight, _ = samples.unbind()
    output = PairLossOutput(
        loss,
        model_error,
        ref_err,
        reward_gap,
        log_ratio,
        weight,
        mask,
        logits,
        clip_range=None if method == "diffusion_dpo" else (1 - settings.clip_low, 1 + settings.clip_high),
        skip_nonfinite=settings.skip_nonfinite,
    )
    if nonfinite == "raise":
        broken = (~output.finite_pairs()).nonzero().flatten().tolist()
        if broken:
            raise FloatingPointError(f"pairs {broken} of {output.logits.shape[0]} are not finite (nonfinite='raise')")
    return output
