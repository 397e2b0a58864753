"""The loss as a module (docs/math.md §5) and the conventions of β (§7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sipo.schedule import DEFAULT_INFERENCE_STEPS, NoiseSchedule, schedule_for
from sipo.schedule.levels import check_count, check_positive
from sipo_kernels import PairLossOutput, Totals, pair_loss
from sipo_kernels.backends import BACKENDS
from sipo_kernels.layout import pair_dtype
from sipo_kernels.options import (
    DEFAULTS,
    HIDDEN,
    LossOptions,
    OptionValues,
    check_choice,
    make_options,
    show_options,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

# docs/math.md §7: what beta = 1 is called in each convention; "sum" divides by the number of elements
_BETA_CONVENTIONS = {"sipo": 1.0, "paper": 1 / 1000, "diffusers_sd": 0.5, "diffusers_sdxl": 1.0, "sum": 1.0}


class SIPOLoss(torch.nn.Module):
    """Preference loss on network outputs: Diffusion-DPO, DPO-C&M, SIPO or SDPO (docs/math.md).

    Takes the place of the loss block of a Diffusion-DPO script, with its stacked ``[chosen; rejected]``
    layout::

        loss_fn = SIPOLoss(noise_scheduler, method="sipo")
        out = loss_fn(model_pred, ref_pred, target, timesteps)
        out.loss.backward()
        log(out.metrics())

    It has no parameters and no buffers; its schedule follows the device of the timesteps by itself.

    It remembers the upstream gradient that the last backward pass brought (1/n where n passes accumulate, times a loss
    scale) and has the next forward pass make the gradient for that. Where another one comes the gradient is made again:
    results never depend on what was remembered, only time does.

    Args:
        schedule: A diffusers scheduler (see :meth:`NoiseSchedule.from_scheduler`) or a
            :class:`NoiseSchedule`.
        num_inference_steps: Steps of the sampler in the importance ratio (§3): 50 for a scheduler if left
            out; a :class:`NoiseSchedule` has its own, and giving another is an error.
        prediction_type: In place of the scheduler's own; a :class:`NoiseSchedule` has its own here as well.
        backend: ``"auto"``, or one of :data:`sipo_kernels.backends.BACKENDS`.
        options: The options of the loss, in place of keyword arguments.
        **given: The fields of :class:`sipo_kernels.LossOptions` by name: ``method``, ``beta``, ``ratio``, ...

    Attributes:
        options: :class:`sipo_kernels.LossOptions`. Frozen; assign another to change the loss
            (``dataclasses.replace``).

    Raises:
        TypeError, ValueError: A setting outside its range, or a scheduler that is not known.
    """

    def __init__(
        self,
        schedule: Any,
        *,
        num_inference_steps: int | None = None,
        prediction_type: str | None = None,
        backend: str = "auto",
        options: LossOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> None:
        """Makes a loss for one noise schedule; :class:`SIPOLoss` describes the arguments and the errors raised."""
        super().__init__()
        self.options = make_options(options, given)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.schedule = _as_schedule(schedule, num_inference_steps, prediction_type)
        self.backend = backend
        # By device, written by backward passes. Not a buffer: those follow module.half(), which 1/3 does not survive,
        # and are broadcast by DistributedDataParallel, which would cost a launch and mean nothing.
        self._upstream: dict[torch.device, Tensor] = {}

    def forward(
        self,
        model_pred: Tensor,
        ref_pred: Tensor | None,
        target: Tensor,
        timesteps: Tensor | None = None,
        *,
        sigmas: Tensor | None = None,
        error_weight: Tensor | None = None,
        ref_error: Tensor | None = None,
        error_mask: Tensor | None = None,
        totals: Totals | None = None,
    ) -> PairLossOutput:
        """Computes the loss of one batch of ``B`` pairs, ``S = 2B`` samples (§1).

        Args:
            model_pred: ``[S, ...]``, the policy's output: bfloat16, float16, float32 or float64, as are the
                next two.
            ref_pred: ``[S, ...]``, the frozen reference's output, or ``None`` with ``ref_error``.
            target: ``[S, ...]``, or ``[B, ...]`` where chosen and rejected sample share it.
            timesteps: ``[S]``, or ``[B]`` where chosen and rejected sample share it, in the units of diffusers'
                schedulers: discrete indices, or 0 to 1000 for a flow (see :class:`NoiseSchedule`).
            sigmas: Shaped likewise, in place of ``timesteps``: σ in (0, 1] of a flow.
            error_weight: ``[S]``, the ω(λ_t) of Diffusion-DPO (§5).
            ref_error: ``[S]``, errors of the reference computed beforehand.
            error_mask: Which elements count (bool), or their weights ≥ 0 (§2): ``[S, ...]`` or ``[B, ...]``, with 1 in
                place of any dimension after the first.
            totals: Running sums that the batch's metrics, and its sums by noise level, are added to (§8).

        Returns:
            :class:`sipo_kernels.PairLossOutput`: the loss, differentiable in ``model_pred``, and every number
            on the way to it; ``metrics()`` names them for a log.

        Raises:
            TypeError, ValueError: Inputs that do not fit each other or the schedule; no default β for a batch
                that is neither 4-D nor 5-D.
            FloatingPointError: ``nonfinite="raise"`` and a pair that is not finite.
        """
        ratio_scale = schedule_for(self.schedule, model_pred).ratio_scale(timesteps, sigmas=sigmas)
        # anything but a batch is left to pair_loss to refuse
        if isinstance(model_pred, Tensor) and model_pred.ndim > 0:
            samples, scales = model_pred.shape[0], ratio_scale.shape[0]
            if scales * 2 == samples:
                ratio_scale = ratio_scale.repeat(2)
            elif scales != samples:
                name = "timesteps" if sigmas is None else "sigmas"
                raise ValueError(
                    f"{name} has shape [{scales}]: expected [{samples}], or [{samples // 2}] shared by each pair"
                )
            ratio_scale = ratio_scale.to(model_pred.device)
        return pair_loss(
            model_pred,
            ref_pred,
            target,
            ratio_scale=ratio_scale,
            error_weight=error_weight,
            ref_error=ref_error,
            error_mask=error_mask,
            expected_upstream=self._expected(model_pred),
            totals=totals,
            backend=self.backend,
            options=self.options,
        )

    def _expected(self, model_pred: Tensor) -> Tensor | None:
        """Returns the last backward pass's upstream gradient on this device, first 1; ``None`` without gradients."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not isinstance(model_pred, Tensor):
            return None
        device = model_pred.device
        if device not in self._upstream:
            self._upstream[device] = torch.ones((), dtype=pair_dtype(device), device=device)
        return self._upstream[device]

    def settings(self) -> dict[str, Any]:
        """Returns all that the loss depends on, by the names of the constructor's arguments; JSON values."""
        return self.options.values() | {"backend": self.backend, "schedule": self.schedule.settings()}

    def extra_repr(self) -> str:
        options = self.options.values().items()
        shown = {name: value for name, value in options if name not in HIDDEN or value != DEFAULTS[name]}
        shown |= {"backend": self.backend, "schedule": self.schedule}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


show_options(SIPOLoss.__init__)


def convert_beta(value: float, *, source: str, target: str, elements: int | None = None) -> float:
    """Converts β to another convention (docs/math.md §7).

    ==================  =============================================================  =============
    convention          who writes β so                                                is
    ==================  =============================================================  =============
    ``sipo``            this project, and ``beta_dpo`` of the original Diffusion-DPO    beta
    ``paper``           the papers' β, where βT with T = 1000 stands in the loss        beta / 1000
    ``diffusers_sd``    diffusers' Stable Diffusion example, without the ½              beta / 2
    ``diffusers_sdxl``  diffusers' SDXL example, with the ½                             beta
    ``sum``             squared errors summed over elements, with the ½                 beta / D
    ==================  =============================================================  =============

    Args:
        value: β in the convention ``source``, > 0.
        source: One of the above.
        target: One of the above.
        elements: ``D``, the number of elements of one sample (C·H·W or C·F·H·W); needed to convert to or from
            ``"sum"``.

    Returns:
        β in the convention ``target``.

    Raises:
        TypeError: ``value`` is not a number or ``elements`` not an integer.
        ValueError: An unknown convention, a ``value`` that is not finite and > 0, or ``elements`` missing or
            < 1.
    """
    check_choice("source", source, tuple(_BETA_CONVENTIONS))
    check_choice("target", target, tuple(_BETA_CONVENTIONS))
    check_positive("value", value)
    if elements is None and "sum" in (source, target) and source != target:
        raise ValueError("elements=None: expected the number of elements of a sample, which the convention 'sum' needs")
    if elements is not None:
        check_count("elements", elements, 1)
    if source == target:
        return float(value)

    def unit(convention: str) -> float:
        return _BETA_CONVENTIONS[convention] / (elements or 1 if convention == "sum" else 1)

    return value / unit(source) * unit(target)


def _as_schedule(schedule: Any, num_inference_steps: int | None, prediction_type: str | None) -> NoiseSchedule:
    if not isinstance(schedule, NoiseSchedule):
        steps = DEFAULT_INFERENCE_STEPS if num_inference_steps is None else num_inference_steps
        return NoiseSchedule.from_scheduler(schedule, steps, prediction_type)
    for name, given, own in (
        ("num_inference_steps", num_inference_steps, schedule.num_inference_steps),
        ("prediction_type", prediction_type, schedule.prediction_type),
    ):
        if given is not None and given != own:
            raise ValueError(f"{name}={given!r}: expected None or {own!r}, which the NoiseSchedule given has")
    return schedule
