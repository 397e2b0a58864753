"""Checks of timesteps as :class:`sipo.NoiseSchedule` takes them: on the host where that is free, else on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sipo.schedule.levels import ROUNDING
from sipo_kernels.layout import pair_dtype

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8)
_ASSERTING_DEVICES = ("cpu", "cuda")  # that torch._assert_async runs on


def in_range(kind: str, num_train_timesteps: int) -> str:
    """What timesteps are to be, in words; made beforehand, as a compiled function may not know the number."""
    return f"an integer in [0, {num_train_timesteps})" if kind == "discrete" else "sigma in (0, 1]"


def checked_levels(
    timesteps: Tensor, kind: str, num_train_timesteps: int, expected: str, *, asserted: bool = False
) -> Tensor:
    """The noise levels that timesteps stand for.

    Args:
        timesteps: ``[N]``: indices or σ.
        kind: ``"discrete"`` or ``"flow"``.
        num_train_timesteps: Number of a discrete schedule's levels.
        expected: Of :func:`in_range`.
        asserted: Whether an accelerator is to look at the values outside compiled code too, at the price of five small
            launches. It needs none for integers, which are looked up by an operation with an assertion of its own.

    Returns:
        ``[N]``: int64 indices, or σ in the type that per-sample numbers have on that device.

    Raises:
        TypeError, ValueError: Of the wrong type or shape; on the CPU also a value out of range, or NaN.
        RuntimeError: Such a value on the CPU in a compiled function, or under a mode that watches or replaces operators
            (``FakeTensorMode``, ``make_fx``). On CUDA it is a device-side assertion.
    """
    if not isinstance(timesteps, Tensor):
        raise TypeError(f"timesteps is a {type(timesteps).__name__}: expected a torch.Tensor")
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps has shape {list(timesteps.shape)}: expected [N], one a sample")
    low: float
    high: float
    if kind == "discrete":
        if timesteps.dtype not in (*_INTEGERS, torch.float32, torch.float64):
            raise TypeError(
                f"timesteps has dtype {timesteps.dtype}: "
                "expected an integer type (or whole numbers in float32 or float64)"
            )
        levels = timesteps.to(torch.int64)
        low, high = 0, num_train_timesteps - 1
    else:
        if not timesteps.dtype.is_floating_point:
            raise TypeError(
                f"timesteps has dtype {timesteps.dtype}: expected floating-point sigma in (0, 1], "
                f"which is t / {num_train_timesteps}"
            )
        levels = timesteps.to(pair_dtype(timesteps.device))
        # σ = 1 may have been rounded up on the way
        low, high = torch.finfo(levels.dtype).tiny, 1 + ROUNDING * torch.finfo(timesteps.dtype).eps

    compiled, on_host = torch.compiler.is_compiling() or torch.jit.is_tracing(), timesteps.device.type == "cpu"
    if on_host and not compiled and not is_in_torch_dispatch_mode():
        wrong = _first_wrong(timesteps, levels, low, high)
        if wrong is not None:
            value = timesteps[wrong].item()
            if kind == "flow" and 1 < value <= num_train_timesteps:
                expected += f", which is t / {num_train_timesteps} for a timestep t"
            raise ValueError(f"timesteps[{wrong}]={value!r}: expected {expected}")
        return levels
    if not (compiled or on_host or (asserted and timesteps.is_floating_point())):
        return levels
    right = _right(timesteps, levels, low, high)
    if timesteps.device.type in _ASSERTING_DEVICES:
        torch._assert_async(right.all(), f"timesteps: expected {expected}")  # CUDA takes up to 254 characters
    return levels if kind == "discrete" else torch.where(right, levels, torch.nan)


def _right(timesteps: Tensor, levels: Tensor, low: float, high: float) -> Tensor:
    """Which are in range: neither NaN nor an index with a fraction is."""
    # Not every unsigned integer can be compared with an int64, and one too large for it has become negative.
    given = timesteps if timesteps.is_floating_point() else levels
    return levels.clamp(low, high) == given


def _first_wrong(timesteps: Tensor, levels: Tensor, low: float, high: float) -> int | None:
    """Position of the first value out of range. Reads the tensor."""
    if levels.numel() == 0:
        return None
    # Lowest and highest first: one small operation where all is well, three times in each pass of training.
    lowest, highest = (bound.item() for bound in levels.aminmax())
    whole = levels.is_floating_point() or not timesteps.is_floating_point()
    if lowest >= low and highest <= high and (whole or torch.equal(timesteps, levels.to(timesteps.dtype))):
        return None  # not so for NaN
    return int((~_right(timesteps, levels, low, high)).nonzero()[0])
