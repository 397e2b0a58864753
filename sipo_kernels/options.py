"""The options of the loss: names, ranges, defaults (docs/math.md §4 to §6)."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch

METHODS = ("diffusion_dpo", "dpo_cm", "sipo", "sdpo")
RATIOS = ("posterior", "reference")
REDUCTIONS = ("mean", "sum", "none")
NONFINITE = ("propagate", "skip", "raise")
LOSS_TYPES = ("sigmoid", "ipo", "hinge", "dmpo")
SMOOTHED_LOSS_TYPES = ("sigmoid", "dmpo")  # those that label_smoothing means something to
# dmpo's probability of the other label is at least this, as in its published code (§5): a logarithm is taken of it.
LEAST_SMOOTHING = 1e-6


class Settings(NamedTuple):
    """The numbers and choices of one call, all host-side constants."""

    method: str
    beta: float
    ratio: str
    clip_low: float
    clip_high: float
    mask_threshold: float
    reduction: str
    skip_nonfinite: bool
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    safeguard: float | None = None

    @property
    def smoothing(self) -> float:
        """ε of the loss type's formula (§5)."""
        return max(self.label_smoothing, LEAST_SMOOTHING) if self.loss_type == "dmpo" else self.label_smoothing

    @property
    def masks(self) -> bool:
        """Whether pairs are masked by their ratio (§4): never for ``diffusion_dpo`` or a threshold of 0."""
        return self.method != "diffusion_dpo" and self.mask_threshold > 0

    def loss_scale(self, pairs: int) -> float:
        """Factor between the sum over pairs and the reduced loss: 1/B for the mean."""
        return 1.0 / pairs if self.reduction == "mean" else 1.0


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


def _check_number(name: str, value: object, low: float, high: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected a number, {expected}")
    # Compiled, the value may be a symbol, which neither math.isinf nor a string takes.
    if not low <= float(value) <= high or float(value) == math.inf:
        if torch.compiler.is_compiling():
            raise ValueError(f"{name}: expected {expected}")
        raise ValueError(f"{name}={value!r}: expected {expected}")


def check_settings(
    *,
    method: str,
    beta: float,
    ratio: str,
    clip_low: float,
    clip_high: float,
    mask_threshold: float,
    reduction: str,
    nonfinite: str,
    loss_type: str,
    label_smoothing: float,
    safeguard: float | None,
) -> None:
    """Checks everything about a loss that is not a tensor.

    Raises:
        TypeError: a number is not a number.
        ValueError: a choice or number outside its range, or settings that do not go together.
    """
    check_choice("method", method, METHODS)
    check_choice("ratio", ratio, RATIOS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("nonfinite", nonfinite, NONFINITE)
    check_choice("loss_type", loss_type, LOSS_TYPES)
    _check_number("beta", beta, math.ulp(0.0), math.inf, "a finite number > 0")
    _check_number("clip_low", clip_low, 0.0, 1.0, "0 <= clip_low <= 1 (weights are clipped below at 1 - clip_low)")
    _check_number("clip_high", clip_high, 0.0, math.inf, "clip_high >= 0 (weights are clipped above at 1 + clip_high)")
    _check_number("mask_threshold", mask_threshold, 0.0, 1.0, "0 <= mask_threshold <= 1 (0 turns the mask off)")
    smoothed = "0 <= label_smoothing < 0.5 (the share of pairs whose labels are taken to be swapped)"
    _check_number("label_smoothing", label_smoothing, 0.0, math.nextafter(0.5, 0), smoothed)
    if label_smoothing and loss_type not in SMOOTHED_LOSS_TYPES:
        loss_types = " or ".join(map(repr, SMOOTHED_LOSS_TYPES))
        raise ValueError(
            f"label_smoothing={label_smoothing!r} with loss_type={loss_type!r}: expected 0, or loss_type {loss_types}"
        )
    if safeguard is not None:
        expected = "None (off) or 0 <= safeguard <= 1"
        _check_number("safeguard", safeguard, 0.0, 1.0, expected)
