"""Checks the tensors of a call of the pair loss before any kernel runs.

Each error is one line that names the wrong value and what was expected. The checks read types, shapes, devices and
numbers on the host but no tensor's values, so they never synchronise with a device.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from sipo_kernels.layout import DTYPES, has_lazy_bit, pair_dtype
from sipo_kernels.options import Settings
from sipo_kernels.output import METRICS, STATISTICS, Totals


class Inputs(NamedTuple):
    """The tensors of one call, as :func:`sipo_kernels.pair_loss` takes them."""

    model_pred: Tensor
    ref_pred: Tensor | None
    target: Tensor
    ratio_scale: Tensor | None = None
    error_weight: Tensor | None = None
    ref_error: Tensor | None = None
    error_mask: Tensor | None = None


def _check_tensor(name: str, value: object, *, allow_bool: bool = False) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a torch.Tensor")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} has layout {layout}: expected a dense (strided) tensor")
    if value.dtype not in DTYPES and not (allow_bool and value.dtype == torch.bool):
        expected = "bool, " * allow_bool + "float32, bfloat16, float16 or float64"
        raise TypeError(f"{name} has dtype {value.dtype}: expected {expected}")
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


def check_tensors(inputs: Inputs, settings: Settings) -> None:
    """Checks types, shapes, devices and gradient requirements of what a call was given as its tensors.

    Raises:
        TypeError: An input is not a tensor, or its dtype or layout is not supported.
        ValueError: Shapes or devices do not fit, an input is missing or one too many, or an input other than
            ``model_pred`` requires a gradient.
    """
    model_pred, ref_pred, target, ratio_scale, error_weight, ref_error, error_mask = inputs
    model = _check_tensor("model_pred", model_pred)
    shape, device = model.shape, model.device  # asking a tensor for them costs as much as the check
    if not shape or model.numel() == 0:
        raise ValueError(f"model_pred has shape {list(shape)}: expected a batch [chosen; rejected] that is not empty")
    samples = shape[0]
    if samples % 2:
        raise ValueError(
            f"model_pred has first dimension {samples}: expected an even number, chosen samples stacked on rejected "
            "samples"
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
    elif settings.method != "diffusion_dpo":
        needed = f"method {settings.method!r} needs ratio_scale[{samples}]"
        raise ValueError(f"ratio_scale=None: {needed}, only diffusion_dpo does not")
    if error_weight is not None:
        _check_per_sample("error_weight", error_weight, samples, device)
    if error_mask is not None:
        _check_mask(error_mask, model)
        if settings.safeguard is not None and error_mask.dtype != torch.bool:
            raise ValueError(
                f"error_mask has dtype {error_mask.dtype} beside safeguard={settings.safeguard!r}: expected bool"
            )


def _check_mask(value: object, model: Tensor) -> None:
    mask, shape = _check_tensor("error_mask", value, allow_bool=True), model.shape
    fits = mask.ndim == len(shape) and mask.shape[0] in (shape[0], shape[0] // 2)
    if not fits or any(have not in (1, want) for have, want in zip(mask.shape[1:], shape[1:], strict=True)):
        raise ValueError(
            f"error_mask has shape {list(mask.shape)}: expected {list(shape)}, or {[shape[0] // 2, *shape[1:]]} shared "
            "by each pair, with 1 in place of any dimension after the first"
        )
    _check_beside("error_mask", mask, model.device)


def check_extras(expected_upstream: object, totals: object, model_pred: Tensor) -> None:
    """Checks the optional arguments of a call, given its ``model_pred``.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, or another device than that of ``model_pred``.
    """
    device = model_pred.device
    if isinstance(expected_upstream, Tensor):
        _check_sums("expected_upstream", expected_upstream, (), pair_dtype(device), device)
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
        _check_pair_levels(totals, model_pred)


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


def _check_pair_levels(totals: Totals, model_pred: Tensor) -> None:
    levels, samples = totals.pair_levels, model_pred.shape[0]
    if not isinstance(levels, Tensor) or levels.dtype == torch.bool or levels.is_complex():
        found = levels.dtype if isinstance(levels, Tensor) else type(levels).__name__
        raise TypeError(f"totals.pair_levels is a {found}: expected a tensor of integers or real numbers")
    if levels.shape != (samples,) and levels.shape != (samples // 2,):
        raise ValueError(
            f"totals.pair_levels has shape {list(levels.shape)}: expected [{samples // 2}], or [{samples}]"
        )
    _check_device("totals.pair_levels", levels, model_pred.device)
    if not 0 < totals.top < math.inf:
        raise ValueError(f"totals.top={totals.top!r}: expected a finite number > 0")
