"""Loads csrc's library and calls it: the pair loss on a CPU, loss and gradient in one call.

The library has a plain C interface, so the same file serves every Python and every torch.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from sipo_kernels.contract import (
    DTYPES,
    METHODS,
    RATIOS,
    Settings,
    Stats,
    accumulate_dtype,
    agree,
    dense_like,
    empty_grad,
    empty_stats,
    scaled_coef,
)

_HERE = Path(__file__).parent


class _Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("beta", "clip_min", "clip_max", "mask_threshold", "loss_scale")),
        *((name, ctypes.c_int) for name in ("method", "ratio", "skip_nonfinite")),
    ]


class _Args(ctypes.Structure):
    """``sipo::Args`` of csrc/cpu/pair_loss.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("model", "ref", "target")),
        *((name, ctypes.c_int64) for name in ("model_stride", "ref_stride", "target_stride", "pairs", "elements")),
        *((name, ctypes.c_void_p) for name in ("ratio_scale", "error_weight", "ref_error")),
        *((name, ctypes.c_void_p) for name in ("loss", "samples", "logits", "coef")),
        *((name, ctypes.c_void_p) for name in ("mask", "grad", "partial")),
        ("isa", ctypes.c_char_p),
        ("settings", _Settings),
        *(
            (name, ctypes.c_int32)
            for name in (
                "model_dtype",
                "ref_dtype",
                "target_dtype",
                "target_shared",
                "wide_sums",
                "double_stats",
                "loss_per_pair",
                "threads",
                "own_threads",
            )
        ),
    ]


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and a line about it, or ``None`` and the reason why there is none."""
    path = _HERE / ("_native.dylib" if sys.platform == "darwin" else "_native.so")
    if not path.exists():
        try:  # what setup.py wrote down
            why = json.loads((_HERE / "_build_info.json").read_text(encoding="utf-8"))["parts"]["cpu"]["reason"]
        except (OSError, ValueError, KeyError, TypeError):
            why = "the package was not built (from a checkout: python setup.py build_ext --inplace)"
        return None, f"there is no native library: {why}"
    try:
        library = ctypes.CDLL(str(path))
        for name in ("sipo_args_size", "sipo_partial_count"):
            getattr(library, name).restype = ctypes.c_int64
        library.sipo_partial_count.argtypes = [ctypes.c_int64, ctypes.c_int64]
        library.sipo_isa.restype = ctypes.c_char_p
        for name in ("sipo_pair_loss", "sipo_pair_grad"):
            getattr(library, name).argtypes = [ctypes.POINTER(_Args)]
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load: {error}"
    if library.sipo_args_size() != ctypes.sizeof(_Args):
        return None, f"{path.name} was built from other sources (reinstall the package)"
    return library, f"C++, {library.sipo_isa(0).decode()}"


LIBRARY, REASON = _load()

# The instruction set to use, of instruction_sets(); None for the widest. Tests set it.
ISA: str | None = None
# Threads of our own in place of torch's. Tests set it.
OWN_THREADS = False


def instruction_sets() -> list[str]:
    """Names of the instruction sets that this build has and this processor runs, widest first."""
    if LIBRARY is None:
        return []
    names: list[str] = []
    while (name := LIBRARY.sipo_isa(len(names))) is not None:
        names.append(name.decode())
    return names


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _per_sample(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or (tensor.dtype == torch.float64 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float64).contiguous()


def _args(model: Tensor, ref: Tensor | None, target: Tensor) -> _Args:
    args = _Args()
    args.model, args.ref, args.target = model.data_ptr(), _pointer(ref), target.data_ptr()
    args.model_stride, args.target_stride = model.stride(0), target.stride(0)
    args.ref_stride = 0 if ref is None else ref.stride(0)
    args.pairs, args.elements = model.shape[0] // 2, model.numel() // model.shape[0]
    args.model_dtype, args.target_dtype = DTYPES.index(model.dtype), DTYPES.index(target.dtype)
    # Without a reference the type only picks a loop; the model's own keeps the accumulation type.
    args.ref_dtype = args.model_dtype if ref is None else DTYPES.index(ref.dtype)
    args.target_shared = target.shape[0] != model.shape[0]
    args.isa = None if ISA is None else ISA.encode()
    args.threads, args.own_threads = torch.get_num_threads(), OWN_THREADS
    return args


def _run(name: str, args: _Args) -> None:
    if getattr(LIBRARY, name)(ctypes.byref(args)):
        names = ", ".join(instruction_sets())
        raise RuntimeError(f"instruction set {ISA!r} does not run here: expected one of {names}")


def forward(
    model_pred: Tensor,
    ref_pred: Tensor | None,
    target: Tensor,
    ratio_scale: Tensor | None,
    error_weight: Tensor | None,
    ref_error: Tensor | None,
    settings: Settings,
    with_grad: bool,
) -> Stats:
    """See :func:`sipo_kernels.eager.forward`; with ``with_grad`` the gradient comes out of the same call."""
    assert LIBRARY is not None  # backends.choose
    model, (ref, goal) = agree(model_pred, ref_pred, target)
    assert goal is not None
    args = _args(model, ref, goal)
    stats = empty_stats(model_pred, ref_pred, target, settings, with_grad)
    args.double_stats = stats.logits.dtype == torch.float64
    args.wide_sums = accumulate_dtype(args.elements, model_pred, ref_pred, target) == torch.float64

    numbers = [_per_sample(t) for t in (ratio_scale, error_weight, ref_error)]
    args.ratio_scale, args.error_weight, args.ref_error = (_pointer(t) for t in numbers)
    args.settings = _Settings(
        beta=settings.beta,
        clip_min=1 - settings.clip_low,
        clip_max=1 + settings.clip_high,
        mask_threshold=settings.mask_threshold,
        loss_scale=settings.loss_scale(args.pairs),
        method=METHODS.index(settings.method),
        ratio=RATIOS.index(settings.ratio),
        skip_nonfinite=settings.skip_nonfinite,
    )
    args.loss_per_pair = settings.reduction == "none"

    filled = dense_like(model, stats.grad) if with_grad else None
    args.loss, args.samples = stats.loss.data_ptr(), stats.samples.data_ptr()
    args.logits, args.mask = stats.logits.data_ptr(), stats.mask.data_ptr()
    args.grad = _pointer(filled)
    partial = torch.empty(LIBRARY.sipo_partial_count(2 * args.pairs, args.elements), dtype=torch.float64)
    args.partial = partial.data_ptr()
    _run("sipo_pair_loss", args)
    if filled is not None and filled is not stats.grad:
        stats.grad.copy_(filled)
    return stats


def mend(fused: Tensor, model_pred: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
    """The gradient that ``forward`` made for an upstream gradient of 1, made right for another one.

    Rebuilt from the inputs rather than scaled: what was rounded once already would be rounded again.
    """
    if upstream.item() == 1 if upstream.ndim == 0 else bool((upstream == 1).all()):
        return fused
    return gradient(model_pred, target, coef, upstream)


def gradient(model_pred: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
    """See :func:`sipo_kernels.eager.gradient`."""
    model, (goal,) = agree(model_pred, target)
    assert goal is not None
    args = _args(model, None, goal)
    coef = scaled_coef(coef, upstream)
    args.coef, args.double_stats = coef.data_ptr(), coef.dtype == torch.float64
    grad = empty_grad(model_pred)
    filled = dense_like(model, grad)
    args.grad = filled.data_ptr()
    _run("sipo_pair_grad", args)
    return grad if filled is grad else grad.copy_(filled)
