"""The loss of a cell: a method as it is, with one part changed, or without preferences at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sipo.loss import SIPOLoss
from sipo_kernels import PairLossOutput

SFT = "sft"
"""Supervised fine-tuning on chosen samples: what a method must beat."""

# Arguments of SIPOLoss. On sipo, which of its parts does the work (docs/math.md §4): an interval of no width makes
# every weight 1, one that is wide open clips nothing, and dpo_cm with weights of 1 is a mask on Diffusion-DPO.
PARTS: dict[str, dict[str, Any]] = {
    "mask alone": {"method": "dpo_cm", "clip_low": 0.0, "clip_high": 0.0},
    "clipped weight alone": {"mask_threshold": 0.0},
    "weight alone": {"mask_threshold": 0.0, "clip_low": 1.0, "clip_high": 100.0},
    "weight and mask, no clip": {"clip_low": 1.0, "clip_high": 100.0},
    "mask by the reference": {},
    **{f"threshold {x}": {"mask_threshold": x} for x in (0.8, 0.95, 0.99)},
    **{f"{n} sampler steps": {"num_inference_steps": n} for n in (10, 20, 100, 250)},
    "ratio to the reference": {"ratio": "reference"},
}
RELATIVES: dict[str, dict[str, Any]] = {
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "dmpo": {"loss_type": "dmpo"},
    "safeguard": {"safeguard": 0.0},
}
VARIANTS = {"": {}, **PARTS, **RELATIVES}


def make_loss(scheduler: Any, method: str, beta: float, variant: str = "") -> Any:
    """The loss of a method at a β with one of :data:`VARIANTS`; for :data:`SFT`, β only names the metrics' logits."""
    if method == SFT:
        return ChosenOnly(SIPOLoss(scheduler, method="diffusion_dpo", beta=beta))
    loss_fn = SIPOLoss(scheduler, beta=beta, **({"method": method} | VARIANTS[variant]))
    return MaskedByReference(loss_fn) if variant == "mask by the reference" else loss_fn


class _Changed(torch.nn.Module):
    """A loss made from another one, whose schedule and options it has; called with timesteps or ``sigmas=``."""

    def __init__(self, loss_fn: SIPOLoss) -> None:
        super().__init__()
        self.schedule, self.options, self.loss_fn = loss_fn.schedule, loss_fn.options, loss_fn


class MaskedByReference(_Changed):
    """A loss whose mask asks for the reference's ratio in place of the current policy's: it never closes further.

    Args:
        loss_fn: its mask threshold is the one used; its own mask is turned off.
    """

    def __init__(self, loss_fn: SIPOLoss) -> None:
        super().__init__(loss_fn)
        loss_fn.options = dataclasses.replace(loss_fn.options, mask_threshold=0.0)

    def forward(
        self, model_pred: Tensor, ref_pred: Tensor, target: Tensor, *timesteps: Tensor, **sigmas: Tensor
    ) -> PairLossOutput:
        with torch.no_grad():
            ratio = self.loss_fn(ref_pred, ref_pred, target, *timesteps, **sigmas).log_ratio.exp()
            mask = torch.minimum(*ratio.chunk(2)) >= self.options.mask_threshold
        # An error weight of 0 takes a pair's gradient away exactly (docs/math.md §6) and leaves a constant in the loss.
        weight = mask.repeat(2).double()
        out: PairLossOutput = self.loss_fn(model_pred, ref_pred, target, *timesteps, error_weight=weight, **sigmas)
        return dataclasses.replace(out, mask=mask, numbers=None)


class ChosenOnly(_Changed):
    """The denoising error of the chosen samples, with the pair loss's numbers for the log."""

    def forward(
        self, model_pred: Tensor, ref_pred: Tensor, target: Tensor, *timesteps: Tensor, **sigmas: Tensor
    ) -> PairLossOutput:
        with torch.no_grad():
            out: PairLossOutput = self.loss_fn(model_pred, ref_pred, target, *timesteps, **sigmas)
        loss = torch.nn.functional.mse_loss(model_pred[: len(out.mask)], target[: len(out.mask)])
        return dataclasses.replace(out, loss=loss, numbers=None)
