"""Every input error of the pair loss, in one place, raised before any kernel runs.

Each message is one line that names the offending value and what was expected. Nothing here reads tensor *values*, so
nothing here synchronises with a device; it looks at types, shapes, devices and host-side numbers.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from sipo_kernels.contract import (
    DTYPES,
    LINKS,
    METHODS,
    METRICS,
    NONFINITE,
    RATIOS,
    REDUCTIONS,
    SMOOTHED_LINKS,
    STATISTICS,
    Totals,
    has_lazy_bit,
    pair_dtype,
)


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
    link: str,
    label_smoothing: float,
    winner_preserving: float | None,
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
    check_choice("link", link, LINKS)
    _check_number("beta", beta, math.ulp(0.0), math.inf, "a finite number > 0")
    _check_number("clip_low", clip_low, 0.0, 1.0, "0 <= clip_low <= 1 (weights are clipped below at 1 - clip_low)")
    _check_number("clip_high", clip_high, 0.0, math.inf, "clip_high >= 0 (weights are clipped above at 1 + clip_high)")
    _check_number("mask_threshold", mask_threshold, 0.0, 1.0, "0 <= mask_threshold <= 1 (0 turns the mask off)")
    smoothed = "0 <= label_smoothing < 0.5 (the share of pairs whose labels are taken to be swapped)"
    _check_number("label_smoothing", label_smoothing, 0.0, math.nextafter(0.5, 0), smoothed)
    if label_smoothing and link not in SMOOTHED_LINKS:
        links = " or ".join(map(repr, SMOOTHED_LINKS))
        raise ValueError(f"label_smoothing={label_smoothing!r} with link={link!r}: expected 0, or link {links}")
    if winner_preserving is not None:
        expected = "None (off) or 0 <= winner_preserving <= 1"
        _check_number("winner_preserving", winner_preserving, 0.0, 1.0, expected)


def _check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a torch.Tensor")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} has layout {layout}: expected a dense (strided) tensor")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}: expected float32, bfloat16, float16 or float64")
    return value


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}: expected {device}, where model_pred is")


def _check_beside(name: str, value: Tensor, device: torch.device, remedy: str = "") -> None:
    _check_device(name, value, device)
    if value.requires_grad and torch.is_grad_enabled():
        remedy = remedy or f"pass {name}.detach()"
        raise ValueError(f"{name} requires grad, but gradients flow to model_pred alone: {remedy}")


def _check_per_sample(name: str, value: object, samples: int, device: torch.device) -> None:
    tensor = _check_tensor(name, value)
    if tensor.shape != (samples,):
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected [{samples}], a number for each sample")
    _check_beside(name, tensor, device)


def check_tensors(
    model_pred: object,
    ref_pred: object,
    target: object,
    *,
    method: str,
    ratio_scale: object,
    error_weight: object,
    ref_error: object,
) -> None:
    """Checks types, shapes, devices and gradient requirements of the tensors of one call.

    Raises:
        TypeError: not a tensor, or of an unsupported dtype or layout.
        ValueError: shapes or devices that do not fit, too many or too few inputs, a gradient asked where none flows.
    """
    model = _check_tensor("model_pred", model_pred)
    shape, device = model.shape, model.device  # asking a tensor for them costs as much as the check
    if not shape or model.numel() == 0:
        raise ValueError(f"model_pred has shape {list(shape)}: expected a batch [winners; losers] that is not empty")
    samples = shape[0]
    if samples % 2:
        raise ValueError(
            f"model_pred has first dimension {samples}: expected an even number, winners stacked on losers"
        )

    if (ref_pred is None) == (ref_error is None):
        given = "neither" if ref_pred is None else "both"
        raise ValueError(f"{given} of ref_pred and ref_error given: expected exactly one of them")
    if ref_pred is not None:
        ref = _check_tensor("ref_pred", ref_pred)
        if ref.shape != shape:
            raise ValueError(f"ref_pred has shape {list(ref.shape)}: expected {list(shape)}, that of model_pred")
        _check_beside("ref_pred", ref, device, "run the reference under torch.no_grad() or pass ref_pred.detach()")
    else:
        _check_per_sample("ref_error", ref_error, samples, device)

    goal = _check_tensor("target", target)
    if goal.shape != shape and goal.shape != (samples // 2, *shape[1:]):
        shapes = f"{list(shape)}, or {[samples // 2, *shape[1:]]} shared by each pair"
        raise ValueError(f"target has shape {list(goal.shape)}: expected {shapes}")
    _check_beside("target", goal, device)

    if ratio_scale is not None:
        _check_per_sample("ratio_scale", ratio_scale, samples, device)
    elif method != "diffusion_dpo":
        needed = f"method {method!r} needs ratio_scale[{samples}]"
        raise ValueError(f"ratio_scale=None: {needed}, only diffusion_dpo does not")
    if error_weight is not None:
        _check_per_sample("error_weight", error_weight, samples, device)


def check_extras(expected_upstream: object, totals: object, model_pred: Tensor) -> None:
    """Checks what a call may be given beside its tensors and settings.

    Args:
        expected_upstream: a number, a 0-d tensor, or ``None``.
        totals: :class:`Totals`, or ``None``.
        model_pred: checked already.

    Raises:
        TypeError: of the wrong type or dtype.
        ValueError: of the wrong shape, or on another device than ``model_pred``.
    """
    device = model_pred.device
    if isinstance(expected_upstream, Tensor):
        dtype = pair_dtype(device)
        _check_sums("expected_upstream", expected_upstream, (), dtype, device)
    elif expected_upstream is not None and (
        isinstance(expected_upstream, bool) or not isinstance(expected_upstream, numbers.Real)
    ):
        found = type(expected_upstream).__name__
        raise TypeError(f"expected_upstream={expected_upstream!r} is a {found}: expected a number or a 0-d tensor")
    if totals is None:
        return
    if not isinstance(totals, Totals):
        raise TypeError(f"totals is a {type(totals).__name__}: expected sipo_kernels.Totals")
    if totals.metrics is not None:
        _check_sums("totals.metrics", totals.metrics, (2, len(METRICS)), torch.float32, device)
    if totals.levels is not None:
        bins = totals.levels.shape[-1] if isinstance(totals.levels, Tensor) and totals.levels.ndim else 1
        _check_sums("totals.levels", totals.levels, (len(STATISTICS), max(bins, 1)), torch.float32, device)
        _check_timesteps(totals, model_pred)


def _check_sums(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a torch.Tensor")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}: expected {list(shape)}")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}: expected {dtype}")
    _check_device(name, value, device)
    lazy = not torch.compiler.is_compiling() and has_lazy_bit(value)  # is_neg cannot be traced
    if value.requires_grad or not value.is_contiguous() or lazy:
        raise ValueError(
            f"{name} requires grad, is not contiguous or has a lazy negative or zero bit: expected a plain buffer"
        )


def _check_timesteps(totals: Totals, model_pred: Tensor) -> None:
    timesteps, samples = totals.timesteps, model_pred.shape[0]
    if not isinstance(timesteps, Tensor) or timesteps.dtype == torch.bool or timesteps.is_complex():
        found = timesteps.dtype if isinstance(timesteps, Tensor) else type(timesteps).__name__
        raise TypeError(f"totals.timesteps is a {found}: expected a tensor of integers or real numbers")
    if timesteps.shape != (samples,) and timesteps.shape != (samples // 2,):
        raise ValueError(
            f"totals.timesteps has shape {list(timesteps.shape)}: expected [{samples // 2}], or [{samples}]"
        )
    _check_device("totals.timesteps", timesteps, model_pred.device)
    if not 0 < totals.top < math.inf:
        raise ValueError(f"totals.top={totals.top!r}: expected a finite number > 0")
