"""The definition of the loss in float64, line by line from docs/math.md; every backend is tested against it.

It is written to be readable and right, not fast: plain torch on any device with float64, every intermediate tensor is
kept, and the whole batch is evaluated twice. Train with :class:`sipo.SIPOLoss`.

Section numbers (§) are those of docs/math.md; ``B`` pairs are stacked as ``[chosen; rejected]`` in ``S = 2B`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sipo_kernels.inputs import Inputs, check_tensors
from sipo_kernels.layout import stats_dtype
from sipo_kernels.options import LossOptions, OptionValues, Settings, make_settings, show_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ReferenceOutput(NamedTuple):
    """What :func:`pair_loss` returns. All float64 but the masks; all detached but ``loss``.

    Attributes:
        loss: 0-d, or ``[B]`` with ``reduction="none"``; differentiable in ``model_pred``.
        model_error: ``[S]``, §2.
        ref_error: ``[S]``, §2.
        error_gap: ``[S]``, §2.
        log_ratio: ``[S]``, §3, in nats per element, −inf at a terminal step.
        weight: ``[S]``, the clipped ratio of §4.
        reward: ``[S]``, §5, the sample's implicit reward as it stands in the logit.
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
    reward: Tensor
    mask: Tensor
    logits: Tensor
    clipped: Tensor
    finite: Tensor
    skip_nonfinite: bool

    def metrics(self) -> dict[str, Tensor]:
        """Returns what a batch reports (§8): 0-d float64 tensors.

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

        chosen_reward, rejected_reward = self.reward.chunk(2)
        chosen_gap, rejected_gap = self.error_gap.chunk(2)
        return {
            "loss": self.loss.detach().mean(),
            "rewards/chosen": over_pairs(chosen_reward),
            "rewards/rejected": over_pairs(rejected_reward),
            "rewards/margins": over_pairs(self.logits),
            "rewards/accuracies": over_pairs((self.logits > 0).double() + 0.5 * (self.logits == 0).double()),
            "model_mse": over_samples(self.model_error),
            "ref_mse": over_samples(self.ref_error),
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
    ratio_scale: Tensor | None = None,
    error_weight: Tensor | None = None,
    ref_error: Tensor | None = None,
    error_mask: Tensor | None = None,
    options: LossOptions | None = None,
    **given: Unpack[OptionValues],
) -> ReferenceOutput:
    """Computes the preference loss of one batch (§2 to §5), differentiable in ``model_pred`` alone.

    Args:
        model_pred: ``[S, ...]``, the policy's output, any floating-point type.
        ref_pred: ``[S, ...]``, the reference's output; ``None`` where ``ref_error`` is given.
        target: ``[S, ...]``, or ``[B, ...]`` if the chosen and the rejected sample share it.
        ratio_scale: ``[S]``, §3; may be left out for ``diffusion_dpo`` alone (then the log ratio is 0, the
            weight 1).
        error_weight: ``[S]``, the ``c`` of §5, 1 where it is left out.
        ref_error: ``[S]``, the reference's errors computed beforehand, in place of ``ref_pred``. The gap is
            then a plain difference.
        error_mask: ``[S, ...]`` or ``[B, ...]``, with 1 in place of any dimension after the first: which elements
            count (bool), or their weights w ≥ 0 (§2), which are rounded to float32.
        options: The options of the loss, in place of keyword arguments.
        **given: The fields of :class:`~sipo_kernels.LossOptions` by name. With ``safeguard``, what autograd makes of
            the loss is what :func:`pair_grad` returns, and not the derivative of the loss's value (§6, relatives).

    Returns:
        The loss and every number on the way to it.

    Raises:
        TypeError: As :func:`sipo_kernels.pair_loss`, whose checks these are.
        ValueError: As :func:`sipo_kernels.pair_loss`.
        FloatingPointError: With ``nonfinite="raise"``, naming the pairs that are not finite.
    """
    inputs = Inputs(model_pred, ref_pred, target, ratio_scale, error_weight, ref_error, error_mask)
    settings = _checked_settings(inputs, options, given)
    # Where a sample's coefficient (§6) or an element's weight is 0 the gradient is exact zeros, whatever the sample
    # holds, while autograd would make 0 · inf = NaN of it: such elements are cut off from the graph. That takes the
    # coefficients first.
    with torch.no_grad():
        coefficient = _coefficient(inputs, settings, _evaluate(inputs, settings))
    takes_part = _per_sample(coefficient != 0, inputs.model_pred) & (_weights(inputs) != 0)
    gated = torch.where(takes_part, inputs.model_pred, inputs.model_pred.detach())
    return _evaluate(inputs._replace(model_pred=gated), settings)


def pair_grad(
    model_pred: Tensor,
    ref_pred: Tensor | None,
    target: Tensor,
    *,
    ratio_scale: Tensor | None = None,
    error_weight: Tensor | None = None,
    ref_error: Tensor | None = None,
    error_mask: Tensor | None = None,
    grad_output: Tensor | None = None,
    options: LossOptions | None = None,
    **given: Unpack[OptionValues],
) -> Tensor:
    """Computes the gradient of :func:`pair_loss` in ``model_pred`` by the formula of §6, without autograd.

    Takes what :func:`pair_loss` takes, and

    Args:
        grad_output: The upstream gradient, shaped as the loss (0-d, or ``[B]`` with ``reduction="none"``); 1
            if left out.

    Returns:
        Float64, shaped as ``model_pred``: exact zeros in each sample whose coefficient is 0 and in each element
        whose weight is 0, whatever they hold.

    Raises:
        TypeError, ValueError, FloatingPointError: As :func:`pair_loss`.
    """
    inputs = Inputs(model_pred, ref_pred, target, ratio_scale, error_weight, ref_error, error_mask)
    settings = _checked_settings(inputs, options, given)
    with torch.no_grad():
        coefficient = _coefficient(inputs, settings, _evaluate(inputs, settings))
        if grad_output is not None:
            upstream = grad_output.double().expand(coefficient.shape[0] // 2)
            # an infinite upstream gradient (loss scaling that overflowed) leaves a coefficient of 0 alone
            coefficient = torch.where(coefficient == 0, coefficient, torch.cat([upstream, upstream]) * coefficient)
        d, w = _error(inputs), _weights(inputs)
        coefficient = _per_sample(coefficient, d)
        return torch.where((coefficient == 0) | (w == 0), 0.0, coefficient * w * d)


def _checked_settings(inputs: Inputs, options: LossOptions | None, given: Mapping[str, Any]) -> Settings:
    model_pred = inputs.model_pred
    ndim = model_pred.ndim if isinstance(model_pred, Tensor) and model_pred.ndim else 4
    settings = make_settings(ndim, options, given)
    check_tensors(inputs, settings)
    return settings


def _evaluate(inputs: Inputs, settings: Settings) -> ReferenceOutput:
    """§2 to §5 from top to bottom; the loss is in autograd's graph, the rest is detached."""
    method = settings.method
    returned = stats_dtype(*inputs[:3])  # the type of a backend's results, which decides what is finite
    inputs = inputs._replace(model_pred=inputs.model_pred.double())
    w = _weights(inputs)

    # §2: errors and error gap
    target = _stacked(inputs.target, inputs.model_pred)
    d = _error(inputs)
    model_error = _mean_over_elements(d**2, w)
    if inputs.ref_pred is not None:
        ref_pred = inputs.ref_pred.detach().double()
        d_ref = ref_pred - target
        ref_error = _mean_over_elements(d_ref**2, w)
        error_gap = _mean_over_elements((inputs.model_pred - ref_pred) * (d + d_ref), w)
    else:
        assert inputs.ref_error is not None  # checked; this is for the type checker
        # the mean over no elements is 0 for the reference too
        ref_error = torch.where(_sum(w) == 0, 0.0, inputs.ref_error.detach().double())
        error_gap = model_error - ref_error

    # §3: log importance ratio. Nothing that follows lets a gradient through.
    measured = (model_error if settings.ratio == "posterior" else error_gap).detach()
    if inputs.ratio_scale is None:
        log_ratio = torch.zeros_like(measured)
    else:
        scale = inputs.ratio_scale.detach().double()
        log_ratio = -scale * measured
        # the terminal step: −inf by definition, also where the error is 0; but a NaN stays to be seen
        log_ratio = torch.where(torch.isposinf(scale) & ~torch.isnan(measured), -torch.inf, log_ratio)

    # §4: weight, clip and mask
    importance = torch.exp(log_ratio)
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    weight = importance.clamp(low, high)
    clipped = (importance < low) | (importance > high)
    chosen_ratio, rejected_ratio = importance.chunk(2)
    mask = torch.minimum(chosen_ratio, rejected_ratio) >= settings.mask_threshold
    if method == "diffusion_dpo" or settings.mask_threshold == 0:
        mask = torch.ones_like(mask)
    if method == "diffusion_dpo":
        clipped = torch.zeros_like(clipped)

    # §5: logits and losses
    a, b = _placement(method, weight)
    c = _error_weight(inputs, weight)
    chosen_term, rejected_term = (a * c * error_gap).chunk(2)
    if settings.safeguard is not None:
        # §6, relatives: the same value with a share of its gradient. A gap that is not finite is left alone:
        # its difference with itself would be NaN.
        share = _rejected_share(inputs, settings.safeguard, a * c)
        let_through = rejected_term.detach() + share * (rejected_term - rejected_term.detach())
        rejected_term = torch.where(torch.isfinite(rejected_term), let_through, rejected_term)
    logits = -0.5 * settings.beta * (chosen_term - rejected_term)

    penalty = _logit_loss(settings, logits)
    of_pairs = [*model_error.chunk(2), *error_gap.chunk(2), *weight.chunk(2), logits, penalty]
    finite = torch.stack([torch.isfinite(value.detach().to(returned)) for value in of_pairs]).all(0)
    if settings.nonfinite == "raise" and not bool(finite.all()):
        pairs = ", ".join(str(i) for i in (~finite).nonzero().flatten().tolist())
        raise FloatingPointError(f"pairs {pairs} of {len(finite)} are not finite, expected finite errors and logits")
    pair_losses = b * mask * penalty
    if settings.nonfinite == "skip":
        mask = mask & finite
        pair_losses = torch.where(finite, pair_losses, 0.0)

    loss = pair_losses
    if settings.reduction != "none":
        loss = pair_losses.mean() if settings.reduction == "mean" else pair_losses.sum()
    return ReferenceOutput(
        loss=loss,
        model_error=model_error.detach(),
        ref_error=ref_error.detach(),
        error_gap=error_gap.detach(),
        reward=-0.5 * settings.beta * torch.cat([chosen_term, rejected_term]).detach(),
        log_ratio=log_ratio,
        weight=weight,
        mask=mask,
        logits=logits.detach(),
        clipped=clipped,
        finite=finite,
        skip_nonfinite=settings.nonfinite == "skip",
    )


def _coefficient(inputs: Inputs, settings: Settings, out: ReferenceOutput) -> Tensor:
    """§6: the factor of ``d`` in each sample's gradient, ``[S]``; exactly 0 for a masked pair."""
    a, b = _placement(settings.method, out.weight)
    c = _error_weight(inputs, out.weight)
    pairs = len(out.mask)
    divisor = pairs if settings.reduction == "mean" else 1
    g = b * _pull(settings, out.logits) * 0.5 * settings.beta / divisor
    g = torch.where(out.mask, g, 0.0)
    share = torch.ones_like(g) if settings.safeguard is None else _rejected_share(inputs, settings.safeguard, a * c)
    counted = _sum(_weights(inputs))
    # chosen once more after the product, which is NaN where an infinite c meets a masked pair
    coefficient = torch.cat([g, -g * share]) * a * c * (2 / counted)
    return torch.where(torch.cat([out.mask, out.mask]) & (counted != 0), coefficient, 0.0)


def _logit_loss(settings: Settings, z: Tensor) -> Tensor:
    """§5: ℓ(z), the loss of a logit."""
    # softplus(−z) = −log sigmoid(z); torch's softplus turns linear at 20, where it is off by 2e-9
    log_p, log_not_p = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
    if settings.loss_type == "ipo":
        return (z - 0.5) ** 2
    if settings.loss_type == "hinge":
        return torch.relu(1 - z)
    if settings.loss_type == "dmpo":
        smoothing = settings.smoothing
        # at |z| = 1000 both limits are long reached; without the bound an infinite logit would be 0 · ∞
        z = z.clamp(-1e3, 1e3)
        log_p, log_not_p = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
        return log_p.exp() * (log_p - math.log1p(-smoothing)) + log_not_p.exp() * (log_not_p - math.log(smoothing))
    if settings.label_smoothing == 0:  # else 0 · ∞ at an infinite logit
        return -log_p
    return -(1 - settings.label_smoothing) * log_p - settings.label_smoothing * log_not_p


def _pull(settings: Settings, z: Tensor) -> Tensor:
    """§6: −ℓ'(z)."""
    if settings.loss_type == "ipo":
        return 1 - 2 * z
    if settings.loss_type == "hinge":
        return torch.where(torch.isnan(z), z, (z < 1).double())
    if settings.loss_type == "dmpo":
        smoothing, z = settings.smoothing, z.clamp(-1e3, 1e3)
        return torch.sigmoid(z) * torch.sigmoid(-z) * (math.log((1 - smoothing) / smoothing) - z)
    return torch.sigmoid(-z) - settings.label_smoothing


def _rejected_share(inputs: Inputs, safeguard: float, a: Tensor) -> Tensor:
    """§6, relatives: λ ``[B]``, by which ``safeguard`` scales the rejected sample's gradient; ``a`` is a · c."""
    w, d = _weights(inputs), _error(inputs).detach()
    g = torch.where(w == 0, 0.0, _per_sample(a / _sum(w), d) * w * d)
    g_chosen, g_rejected = g.reshape(len(a), -1).chunk(2)
    inner = (g_chosen * g_rejected).sum(1)
    share = (1 - safeguard) * (g_chosen**2).sum(1) / inner
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


def _error_weight(inputs: Inputs, like: Tensor) -> Tensor:
    return torch.ones_like(like) if inputs.error_weight is None else inputs.error_weight.detach().double()


def _stacked(shared: Tensor, model_pred: Tensor) -> Tensor:
    """Returns a tensor in float64 for all S samples: one of ``[B, ...]`` (§1) serves both samples of a pair."""
    shared = shared.detach().double()
    return shared if shared.shape[0] == model_pred.shape[0] else torch.cat([shared, shared])


def _weights(inputs: Inputs) -> Tensor:
    """§2: w ``[S, ...]``, 1 without a mask."""
    if inputs.error_mask is None:
        return torch.ones_like(inputs.model_pred, dtype=torch.float64)
    return _stacked(inputs.error_mask.float(), inputs.model_pred).expand(inputs.model_pred.shape)


def _error(inputs: Inputs) -> Tensor:
    """§2: d."""
    return inputs.model_pred.double() - _stacked(inputs.target, inputs.model_pred)


def _sum(value: Tensor) -> Tensor:
    """Returns the sum over each sample's elements, ``[S]``."""
    return value.reshape(len(value), -1).sum(1)


def _mean_over_elements(value: Tensor, w: Tensor) -> Tensor:
    """§2: mean_D, Σ(w·x)/Σw; 0 where Σw is 0."""
    total = _sum(w)
    return _sum(torch.where(w == 0, 0.0, w * value)) / torch.where(total == 0, 1.0, total)


def _mean_or_zero(value: Tensor) -> Tensor:
    return value.mean() if value.numel() else value.new_zeros(())


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Reshapes ``[S]`` so that it multiplies ``[S, ...]``."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


show_options(pair_loss)
show_options(pair_grad)
