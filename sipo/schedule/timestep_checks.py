"""Checks of timesteps and sigmas as :class:`sipo.NoiseSchedule` takes them: on the host where that is free."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sipo.schedule.levels import ROUNDING
from sipo_kernels.layout import pair_dtype

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8)
_ASSERTING_DEVICES = ("cpu", "cuda")  # that torch._assert_async runs on

SIGMAS_TAKEN_FOR_TIMESTEPS = 4
"""A flow's timesteps are refused as sigmas if all are in (0, 1] and so many of them differ.

Timesteps of diffusers' own grids are 1 or more where ``shift`` is; of those drawn continuously from (0, 1000], four
different ones are all as low in one batch of 10¹² and more.
"""


class LevelArgument(NamedTuple):
    """An argument that gives noise levels, and what its values mean.

    Attributes:
        name: ``"timesteps"`` or ``"sigmas"``.
        unit: ``"index"``; ``"sigma"``; ``"scaled"``, σ · num_train_timesteps; or ``"inverted"``,
            (1 − σ) · num_train_timesteps.
        num_train_timesteps: Number of levels, or the scale of a flow's timesteps.
        expected: What the values are to be, in words; made beforehand, because compiled code may not know the number.
        refuses_sigmas: Whether :data:`SIGMAS_TAKEN_FOR_TIMESTEPS` applies.
    """

    name: str
    unit: str
    num_train_timesteps: int
    expected: str
    refuses_sigmas: bool = False


def level_arguments(kind: str, num_train_timesteps: int, invert_sigmas: bool, shift: float) -> dict[str, LevelArgument]:
    """Returns the arguments by which a schedule takes noise levels, by name."""
    scale = num_train_timesteps
    if kind == "discrete":
        return {"timesteps": LevelArgument("timesteps", "index", scale, f"an integer in [0, {scale})")}
    if invert_sigmas:
        unit, meaning = "inverted", f"[0, {scale}), which is (1 - sigma) * {scale}"
    else:
        unit, meaning = "scaled", f"(0, {scale}], which is sigma * {scale}"
    expected = f"a number in {meaning}, or sigmas= in (0, 1]"
    refuses_sigmas = not invert_sigmas and shift >= 1 and scale >= 1000
    return {
        "timesteps": LevelArgument("timesteps", unit, scale, expected, refuses_sigmas),
        "sigmas": LevelArgument("sigmas", "sigma", scale, "sigma in (0, 1]"),
    }


def checked_levels(values: Tensor, argument: LevelArgument) -> Tensor:
    """Returns the noise levels that an argument's values stand for.

    Args:
        values: ``[N]``.
        argument: What they mean.

    Returns:
        ``[N]``: int64 indices, or σ in the type that per-sample numbers have on that device; NaN for a σ out of range
        where no assertion stops it.

    Raises:
        TypeError, ValueError: Of the wrong type or shape; on the CPU also a value out of range, NaN, or sigmas in place
            of timesteps, as far as :data:`SIGMAS_TAKEN_FOR_TIMESTEPS` tells.
        RuntimeError: Such a value on the CPU in a compiled function, or under a mode that watches or replaces operators
            (``FakeTensorMode``, ``make_fx``). On CUDA it is a device-side assertion.
    """
    name, unit, expected = argument.name, argument.unit, argument.expected
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is a {type(values).__name__}: expected a torch.Tensor")
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {list(values.shape)}: expected [N], one a sample")
    low: float
    high: float
    if unit == "index":
        if values.dtype not in (*_INTEGERS, torch.float32, torch.float64):
            raise TypeError(
                f"{name} has dtype {values.dtype}: expected an integer type (or whole numbers in float32 or float64)"
            )
        levels = values.to(torch.int64)
        low, high = 0, argument.num_train_timesteps - 1
    else:
        if not values.dtype.is_floating_point:
            hint = "" if unit == "sigma" else "; a solver with use_flow_sigmas rounds its timesteps, pass its sigmas"
            raise TypeError(f"{name} has dtype {values.dtype}: expected a floating-point type, {expected}{hint}")
        levels = values.to(pair_dtype(values.device))
        if unit != "sigma":
            levels = levels / argument.num_train_timesteps
            levels = 1 - levels if unit == "inverted" else levels
        # σ = 1 may have been rounded up on the way.
        low, high = torch.finfo(levels.dtype).tiny, 1 + ROUNDING * torch.finfo(values.dtype).eps

    compiled, on_host = torch.compiler.is_compiling() or torch.jit.is_tracing(), values.device.type == "cpu"
    if on_host and not compiled and not is_in_torch_dispatch_mode():
        wrong = _first_wrong(values, levels, low, high)
        if wrong is not None:
            value = values[wrong].item()
            raise ValueError(f"{name}[{wrong}]={value!r}: expected {expected}")
        if argument.refuses_sigmas and bool(_are_sigmas(values)):
            raise ValueError(f"{name} are all in (0, 1], as sigmas are: expected {expected}")
        return levels
    if not (compiled or on_host or values.is_floating_point()):
        return levels  # indices, which are looked up by an operation that has its own assertion
    right = _right(values, levels, low, high)
    if values.device.type in _ASSERTING_DEVICES:
        fine = right.all()
        if argument.refuses_sigmas:
            fine = torch.logical_and(fine, torch.logical_not(_are_sigmas(values)))
        torch._assert_async(fine, f"{name}: expected {expected}")  # CUDA takes up to 254 characters
    return levels if unit == "index" else torch.where(right, levels, torch.nan)


def _are_sigmas(values: Tensor) -> Tensor:
    """Whether what was given as a flow's timesteps must be sigmas; a 0-d tensor, which is not read here."""
    several = torch.count_nonzero(values.sort().values.diff()) >= SIGMAS_TAKEN_FOR_TIMESTEPS - 1
    return torch.logical_and(several, torch.logical_and(values > 0, values <= 1).all())


def _right(values: Tensor, levels: Tensor, low: float, high: float) -> Tensor:
    """Returns which values are in range; NaN and an index with a fraction are not."""
    # Not every unsigned integer can be compared with an int64, and one too large for it has become negative.
    given = levels if levels.is_floating_point() or not values.is_floating_point() else values
    return levels.clamp(low, high) == given


def _first_wrong(values: Tensor, levels: Tensor, low: float, high: float) -> int | None:
    """Returns the position of the first value out of range. Reads the tensor."""
    if levels.numel() == 0:
        return None
    # Lowest and highest first: one small operation where all is well, three times in each pass of training.
    lowest, highest = (bound.item() for bound in levels.aminmax())
    whole = levels.is_floating_point() or not values.is_floating_point()
    if lowest >= low and highest <= high and (whole or torch.equal(values, levels.to(values.dtype))):
        return None  # not so for NaN
    return int((~_right(values, levels, low, high)).nonzero()[0])
