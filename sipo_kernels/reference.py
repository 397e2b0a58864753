"""docs/math.md in float64, line by line: the definition that every backend is held to.

Plain torch on any device with float64, written to be read and to be right, not to be fast: everything is
upcast, every intermediate tensor is kept, and the whole batch is evaluated twice. Train with
:class:`sipo.SIPOLoss`; test against this.

Section numbers (§) are those of docs/math.md; ``B`` pairs are stacked as ``[chosen; rejected]`` in ``S = 2B``
samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sipo_kernels.inputs import check_tensors
from sipo_kernels.layout import stats_dtype
from sipo_kernels.options import LEAST_SMOOTHING, check_settings


class ReferenceOutput(NamedTuple):
    """What :func:`pair_loss` returns. All float64 but the masks; all detached but ``loss``.

    Attributes:
        loss: 0-d, or ``[B]`` with ``reduction="none"``; differentiable in ``model_pred``.
        model_error: ``[S]``, §2.
        ref_error: ``[S]``, §2.
        error_gap: ``[S]``, §2.
        log_ratio: ``[S]``, §3, in nats per element, −inf at a terminal step.
        weight: ``[S]``, the clipped ratio of §4.
        mask: ``[B]`` bool, §4: the pairs that take part.
        logits: ``[B]``, §5.
        clipped: ``[S]`` bool, the samples whose ratio the clip changes; all False for a method that does not
            clip.
        finite: ``[B]`` bool, the pairs whose errors, gaps, weights, logits and losses before weight and mask are all
            finite, in the type that the backends return them in: float32, or float64 where a large input is.
        skip_nonfinite: Whether pairs that are not finite were left out (``nonfinite="skip"``).
    """

    loss: Tensor
    model_error: Tensor
    ref_error: Tensor
    error_gap: Tensor
    log_ratio: Tensor
    weight: Tensor
    mask: Tensor
    logits: Tensor
    clipped: Tensor
    finite: Tensor
    skip_nonfinite: bool

    def metrics(self) -> dict[str, Tensor]:
        """What a batch reports (§8): 0-d float64 tensors.

        ``loss`` is the loss as reduced (its mean for ``reduction="none"``), ``active_fraction`` counts out of
        all pairs and ``nonfinite_pairs`` is a count. Everything else is a mean over all pairs or samples;
        with ``nonfinite="skip"``, over the finite pairs (0 if there are none).
        """
        keep = self.finite if self.skip_nonfinite else torch.ones_like(self.finite)
        keep_samples = torch.cat([keep, keep])

        def over_pairs(value: Tensor) -> Tensor:
            return _mean_or_zero(value.double()[keep])

        def over_samples(value: Tensor) -> Tensor:
            return _mean_or_zero(value.double()[keep_samples])

        chosen_gap, rejected_gap = self.error_gap.chunk(2)
        return {
            "loss": self.loss.detach().mean(),
            "rewards/accuracies": over_pairs((self.logits > 0).double() + 0.5 * (self.logits == 0).double()),
            "model_mse": over_samples(self.model_error),
            "ref_mse": over_samples(self.ref_error),
            "rewards/margins": over_pairs(self.logits),
            "chosen_gap": over_pairs(chosen_gap),
            "rejected_gap": over_pairs(rejected_gap),
            "weight_mean": over_samples(self.weight),
            "clip_fraction": over_samples(self.clipped),
            "active_fraction": self.mask.double().mean(),
            "nonfinite_pairs": (~self.finite).double().sum(),
        }


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
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    safeguard: float | None = None,
) -> ReferenceOutput:
    """The preference loss of one batch (§2 to §5), differentiable in ``model_pred`` alone.

    Args:
        model_pred: ``[S, ...]``, the policy's output, any floating-point type.
        ref_pred: ``[S, ...]``, the reference's output; ``None`` where ``ref_error`` is given.
        target: ``[S, ...]``, or ``[B, ...]`` where both halves of a pair share it.
        method: ``"diffusion_dpo"``, ``"dpo_cm"``, ``"sipo"`` or ``"sdpo"`` (§5).
        beta: This project's β (§7): mean over elements, factor ½ inside.
        ratio_scale: ``[S]``, §3; may be left out for ``diffusion_dpo`` alone (then the log ratio is 0, the
            weight 1).
        error_weight: ``[S]``, the ``c`` of §5, 1 where it is left out.
        ref_error: ``[S]``, the reference's errors computed beforehand, in place of ``ref_pred``. The gap is
            then a plain difference.
        ratio: ``"posterior"`` or ``"reference"``, §3.
        clip_low: The weight is at least ``1 − clip_low``.
        clip_high: The weight is at most ``1 + clip_high``.
        mask_threshold: A pair takes part if both its ratios reach this; 0 disables the mask.
            ``diffusion_dpo`` never masks.
        reduction: ``"mean"`` over the B pairs (masked ones count in the divisor), ``"sum"`` or ``"none"``.
        nonfinite: ``"propagate"``, ``"skip"`` (a pair that is not finite counts as masked, with a loss of
            exactly 0) or ``"raise"``.
        loss_type: ``"sigmoid"``, ``"ipo"``, ``"hinge"`` or ``"dmpo"`` (§5, relatives).
        label_smoothing: The ε of ``"sigmoid"`` and ``"dmpo"``, in [0, 0.5).
        safeguard: μ in [0, 1], or ``None`` for off: the rejected sample's gap then lets only the share λ of its
            gradient through (§6, relatives). What autograd makes of the loss is still what :func:`pair_grad`
            returns, but it is no longer the derivative of the loss's value.

    Returns:
        The loss and every number on the way to it.

    Raises:
        TypeError: As :func:`sipo_kernels.pair_loss`, whose checks these are.
        ValueError: As :func:`sipo_kernels.pair_loss`.
        FloatingPointError: With ``nonfinite="raise"``, naming the pairs that are not finite.
    """
    inputs = _Inputs(
        model_pred, ref_pred, target, method, beta, ratio_scale, error_weight, ref_error,
        ratio, clip_low, clip_high, mask_threshold, reduction, nonfinite, loss_type, label_smoothing, safeguard,
    ).checked()  # fmt: skip
    # Where a sample's coefficient (§6) is 0 its gradient is exact zeros, whatever the sample holds, while
    # autograd would make 0 · inf = NaN of it: such samples are cut off from the graph. That takes their
    # coefficients first.
    with torch.no_grad():
        coefficient = _coefficient(inputs, _evaluate(inputs))
    takes_part = _per_sample(coefficient != 0, inputs.model_pred)
    gated = torch.where(takes_part, inputs.model_pred, inputs.model_pred.detach())
    return _evaluate(inputs._replace(model_pred=gated))


def pair_grad(
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
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    safeguard: float | None = None,
    grad_output: Tensor | None = None,
) -> Tensor:
    """The gradient of :func:`pair_loss` in ``model_pred`` by the formula of §6, without autograd.

    Takes what :func:`pair_loss` takes, and

    Args:
        grad_output: The upstream gradient, shaped as the loss (0-d, or ``[B]`` with ``reduction="none"``); 1
            if left out.

    Returns:
        Float64, shaped as ``model_pred``: exact zeros in each sample whose coefficient is 0, whatever it
        holds.

    Raises:
        TypeError, ValueError, FloatingPointError: As :func:`pair_loss`.
    """
    inputs = _Inputs(
        model_pred, ref_pred, target, method, beta, ratio_scale, error_weight, ref_error,
        ratio, clip_low, clip_high, mask_threshold, reduction, nonfinite, loss_type, label_smoothing, safeguard,
    ).checked()  # fmt: skip
    with torch.no_grad():
        coefficient = _coefficient(inputs, _evaluate(inputs))
        if grad_output is not None:
            upstream = grad_output.double().expand(coefficient.shape[0] // 2)
            # an infinite upstream gradient (loss scaling that overflowed) leaves a coefficient of 0 alone
            coefficient = torch.where(coefficient == 0, coefficient, torch.cat([upstream, upstream]) * coefficient)
        d = _error(inputs)
        coefficient = _per_sample(coefficient, d)
        return torch.where(coefficient == 0, 0.0, coefficient * d)


class _Inputs(NamedTuple):
    """The arguments of :func:`pair_loss`."""

    model_pred: Tensor
    ref_pred: Tensor | None
    target: Tensor
    method: str
    beta: float
    ratio_scale: Tensor | None
    error_weight: Tensor | None
    ref_error: Tensor | None
    ratio: str
    clip_low: float
    clip_high: float
    mask_threshold: float
    reduction: str
    nonfinite: str
    loss_type: str
    label_smoothing: float
    safeguard: float | None
    returned: torch.dtype = torch.float64  # what the backends return; here it is only asked what is finite in it

    def checked(self) -> _Inputs:
        """The same in float64, once the checks that every backend shares have passed."""
        check_settings(
            method=self.method,
            beta=self.beta,
            ratio=self.ratio,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            mask_threshold=self.mask_threshold,
            reduction=self.reduction,
            nonfinite=self.nonfinite,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            safeguard=self.safeguard,
        )
        check_tensors(
            self.model_pred,
            self.ref_pred,
            self.target,
            method=self.method,
            ratio_scale=self.ratio_scale,
            error_weight=self.error_weight,
            ref_error=self.ref_error,
        )
        returned = stats_dtype(self.model_pred, self.ref_pred, self.target)
        return self._replace(model_pred=self.model_pred.double(), returned=returned)


def _evaluate(inputs: _Inputs) -> ReferenceOutput:
    """§2 to §5 from top to bottom; the loss is in autograd's graph, the rest is detached."""
    method = inputs.method

    # §2: errors and reward gap
    target = _stacked(inputs.target, inputs.model_pred)
    d = _error(inputs)
    model_error = _mean_over_elements(d**2)
    if inputs.ref_pred is not None:
        ref_pred = inputs.ref_pred.detach().double()
        d_ref = ref_pred - target
        ref_error = _mean_over_elements(d_ref**2)
        error_gap = _mean_over_elements((inputs.model_pred - ref_pred) * (d + d_ref))
    else:
        assert inputs.ref_error is not None  # checked; this is for the type checker
        ref_error = inputs.ref_error.detach().double()
        error_gap = model_error - ref_error

    # §3: log importance ratio. Nothing that follows lets a gradient through.
    measured = (model_error if inputs.ratio == "posterior" else error_gap).detach()
    if inputs.ratio_scale is None:
        log_ratio = torch.zeros_like(measured)
    else:
        scale = inputs.ratio_scale.detach().double()
        log_ratio = -scale * measured
        # the terminal step: −inf by definition, also where the error is 0; but a NaN stays to be seen
        log_ratio = torch.where(torch.isposinf(scale) & ~torch.isnan(measured), -torch.inf, log_ratio)

    # §4: weight, clip and mask
    importance = torch.exp(log_ratio)
    low, high = 1 - inputs.clip_low, 1 + inputs.clip_high
    weight = importance.clamp(low, high)
    clipped = (importance < low) | (importance > high)
    chosen_ratio, rejected_ratio = importance.chunk(2)
    mask = torch.minimum(chosen_ratio, rejected_ratio) >= inputs.mask_threshold
    if method == "diffusion_dpo" or inputs.mask_threshold == 0:
        mask = torch.ones_like(mask)
    if method == "diffusion_dpo":
        clipped = torch.zeros_like(clipped)

    # §5: logits and losses
    a, b = _placement(method, weight)
    c = _error_weight(inputs, weight)
    chosen_term, rejected_term = (a * c * error_gap).chunk(2)
    if inputs.safeguard is not None:
        # §6, relatives: the same value with a share of its gradient. A gap that is not finite is left alone:
        # its difference with itself would be NaN.
        share = _rejected_share(inputs, a * c)
        let_through = rejected_term.detach() + share * (rejected_term - rejected_term.detach())
        rejected_term = torch.where(torch.isfinite(rejected_term), let_through, rejected_term)
    logits = -0.5 * inputs.beta * (chosen_term - rejected_term)

    penalty = _link(inputs, logits)
    of_pairs = [*model_error.chunk(2), *error_gap.chunk(2), *weight.chunk(2), logits, penalty]
    finite = torch.stack([torch.isfinite(value.detach().to(inputs.returned)) for value in of_pairs]).all(0)
    if inputs.nonfinite == "raise" and not bool(finite.all()):
        pairs = ", ".join(str(i) for i in (~finite).nonzero().flatten().tolist())
        raise FloatingPointError(f"pairs {pairs} of {len(finite)} are not finite, expected finite errors and logits")
    pair_losses = b * mask * penalty
    if inputs.nonfinite == "skip":
        mask = mask & finite
        pair_losses = torch.where(finite, pair_losses, 0.0)

    loss = pair_losses
    if inputs.reduction != "none":
        loss = pair_losses.mean() if inputs.reduction == "mean" else pair_losses.sum()
    return ReferenceOutput(
        loss=loss,
        model_error=model_error.detach(),
        ref_error=ref_error.detach(),
        error_gap=error_gap.detach(),
        log_ratio=log_ratio,
        weight=weight,
        mask=mask,
        logits=logits.detach(),
        clipped=clipped,
        finite=finite,
        skip_nonfinite=inputs.nonfinite == "skip",
    )


def _coefficient(inputs: _Inputs, out: ReferenceOutput) -> Tensor:
    """§6: the factor of ``d`` in each sample's gradient, ``[S]``; exactly 0 for a masked pair."""
    a, b = _placement(inputs.method, out.weight)
    c = _error_weight(inputs, out.weight)
    pairs = len(out.mask)
    elements = inputs.model_pred[0].numel()
    divisor = pairs if inputs.reduction == "mean" else 1
    g = b * _pull(inputs, out.logits) * 0.5 * inputs.beta / divisor
    g = torch.where(out.mask, g, 0.0)
    share = torch.ones_like(g) if inputs.safeguard is None else _rejected_share(inputs, a * c)
    # chosen once more after the product, which is NaN where an infinite c meets a masked pair
    coefficient = torch.cat([g, -g * share]) * a * c * (2 / elements)
    return torch.where(torch.cat([out.mask, out.mask]), coefficient, 0.0)


def _link(inputs: _Inputs, z: Tensor) -> Tensor:
    """§5: ℓ(z), the loss of a logit."""
    # softplus(−z) = −log sigmoid(z); torch's softplus turns linear at 20, where it is off by 2e-9
    log_p, log_not_p = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
    if inputs.loss_type == "ipo":
        return (z - 0.5) ** 2
    if inputs.loss_type == "hinge":
        return torch.relu(1 - z)
    if inputs.loss_type == "dmpo":
        smoothing = _dmpo_smoothing(inputs)
        # at |z| = 1000 both limits are long reached; without the bound an infinite logit would be 0 · ∞
        z = z.clamp(-1e3, 1e3)
        log_p, log_not_p = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
        return log_p.exp() * (log_p - math.log1p(-smoothing)) + log_not_p.exp() * (log_not_p - math.log(smoothing))
    if inputs.label_smoothing == 0:  # else 0 · ∞ at an infinite logit
        return -log_p
    return -(1 - inputs.label_smoothing) * log_p - inputs.label_smoothing * log_not_p


def _pull(inputs: _Inputs, z: Tensor) -> Tensor:
    """§6: −ℓ'(z)."""
    if inputs.loss_type == "ipo":
        return 1 - 2 * z
    if inputs.loss_type == "hinge":
        return torch.where(torch.isnan(z), z, (z < 1).double())
    if inputs.loss_type == "dmpo":
        smoothing, z = _dmpo_smoothing(inputs), z.clamp(-1e3, 1e3)
        return torch.sigmoid(z) * torch.sigmoid(-z) * (math.log((1 - smoothing) / smoothing) - z)
    return torch.sigmoid(-z) - inputs.label_smoothing


def _dmpo_smoothing(inputs: _Inputs) -> float:
    return max(inputs.label_smoothing, LEAST_SMOOTHING)


def _rejected_share(inputs: _Inputs, a: Tensor) -> Tensor:
    """§6, relatives: λ ``[B]``, by which ``safeguard`` scales the rejected sample's gradient; ``a`` is a · c."""
    assert inputs.safeguard is not None  # the callers' question
    g_chosen, g_rejected = (_per_sample(a, inputs.model_pred) * _error(inputs)).detach().reshape(len(a), -1).chunk(2)
    inner = (g_chosen * g_rejected).sum(1)
    share = (1 - inputs.safeguard) * (g_chosen**2).sum(1) / inner
    return torch.where((inner > 0) & (share < 1), share, 1.0)


def _placement(method: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """§5's table: the factors ``a`` ``[S]`` inside the logits and ``b`` ``[B]`` outside the softplus."""
    chosen, rejected = weight.chunk(2)
    pair_weight = torch.minimum(chosen, rejected)
    if method == "diffusion_dpo":
        return torch.ones_like(weight), torch.ones_like(pair_weight)
    if method == "dpo_cm":
        return torch.ones_like(weight), pair_weight
    if method == "sipo":
        return weight, torch.ones_like(pair_weight)
    return torch.cat([pair_weight, pair_weight]), torch.ones_like(pair_weight)  # sdpo


def _error_weight(inputs: _Inputs, like: Tensor) -> Tensor:
    return torch.ones_like(like) if inputs.error_weight is None else inputs.error_weight.detach().double()


def _stacked(target: Tensor, model_pred: Tensor) -> Tensor:
    """The target in float64 for all S samples: a shared one (``[B, ...]``, §1) serves both halves."""
    target = target.detach().double()
    return target if target.shape[0] == model_pred.shape[0] else torch.cat([target, target])


def _error(inputs: _Inputs) -> Tensor:
    """§2: d."""
    return inputs.model_pred - _stacked(inputs.target, inputs.model_pred)


def _mean_over_elements(value: Tensor) -> Tensor:
    return value.flatten(1).mean(1) if value.ndim > 1 else value


def _mean_or_zero(value: Tensor) -> Tensor:
    return value.mean() if value.numel() else value.new_zeros(())


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """``[S]`` shaped so that it multiplies ``[S, ...]``."""
    return value.reshape(-1, *[1] * (like.ndim - 1))
