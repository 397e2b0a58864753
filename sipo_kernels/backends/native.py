"""Loads csrc's library and calls it: the pair loss on a CPU, loss and gradient in one call.

The library has a plain C interface, so the same file serves every Python and every torch.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipo_kernels import build_info
from sipo_kernels.backends import library as native_library
from sipo_kernels.backends.interface import Stats, empty_stats, scaled_coef
from sipo_kernels.inputs import Inputs
from sipo_kernels.layout import accumulate_dtype, agree, dense_like, empty_grad, lies_as
from sipo_kernels.options import LOSS_TYPES, METHODS, RATIOS, Settings
from sipo_kernels.output import Totals

_FOLDER = Path(build_info.__file__).parent  # where setup.py puts the library


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    """Returns fields of one type for a ctypes structure, from their names in one string."""
    return [(name, kind) for name in names.split()]


class CSettings(ctypes.Structure):
    """``sipo::Settings`` of csrc/pair_math.h, field by field."""

    _fields_ = [
        *fields(ctypes.c_double, "beta clip_min clip_max mask_threshold loss_scale"),
        *fields(ctypes.c_double, "smoothing log_label log_other safeguard"),
        *fields(ctypes.c_int, "method ratio loss_type skip_nonfinite double_stats"),
    ]

    @classmethod
    def of(cls, settings: Settings, pairs: int, double_stats: bool) -> CSettings:
        """Returns the settings of a call; its results are float64 with ``double_stats``, else float32."""
        return cls(
            beta=settings.beta,
            clip_min=1 - settings.clip_low,
            clip_max=1 + settings.clip_high,
            mask_threshold=settings.mask_threshold,
            loss_scale=settings.loss_scale(pairs),
            smoothing=settings.smoothing,
            log_label=math.log1p(-settings.smoothing),
            log_other=math.log(settings.smoothing) if settings.smoothing > 0 else -math.inf,
            safeguard=-1 if settings.safeguard is None else settings.safeguard,
            method=METHODS.index(settings.method),
            ratio=RATIOS.index(settings.ratio),
            loss_type=LOSS_TYPES.index(settings.loss_type),
            skip_nonfinite=settings.skip_nonfinite,
            double_stats=double_stats,
        )


class CpuArgs(ctypes.Structure):
    """``sipo::CpuArgs`` of csrc/cpu/call.h, field by field."""

    _fields_ = [
        *fields(ctypes.c_void_p, "model ref target"),
        *fields(ctypes.c_int64, "model_stride ref_stride target_stride pairs elements"),
        ("error_mask", ctypes.c_void_p),
        ("error_mask_stride", ctypes.c_int64),
        *fields(ctypes.c_void_p, "ratio_scale error_weight ref_error loss samples logits numbers coef mask grad"),
        *fields(ctypes.c_void_p, "metrics levels pair_levels"),
        *fields(ctypes.c_double, "top upstream"),
        ("isa", ctypes.c_char_p),
        ("settings", CSettings),
        *fields(ctypes.c_int32, "model_dtype ref_dtype target_dtype"),
        *fields(ctypes.c_int32, "ratio_scale_dtype error_weight_dtype ref_error_dtype pair_levels_dtype"),
        *fields(ctypes.c_int32, "bins target_shared error_mask_dtype error_mask_shared"),
        *fields(ctypes.c_int32, "wide_sums loss_per_pair threads own_threads"),
    ]


def _load() -> native_library.LoadedLibrary:
    """Loads the library, or says why it cannot be used."""
    path = _FOLDER / ("_native.dylib" if sys.platform == "darwin" else "_native.so")
    if not path.exists():
        if reason := build_info.part("cpu")["reason"]:
            return native_library.LoadedLibrary(None, f"there is no native library: {reason}")
        return native_library.refused(f"{path.name} was built but does not exist")
    try:
        library = ctypes.CDLL(str(path))
        for name in ("sipo_description", "sipo_sources", "sipo_isa"):
            getattr(library, name).restype = ctypes.c_char_p
        for name in ("sipo_pair_loss", "sipo_pair_grad"):
            getattr(library, name).argtypes = [ctypes.POINTER(CpuArgs)]
    except OSError as error:
        return native_library.refused(f"{path.name} does not load: {error}")
    except AttributeError as error:
        return native_library.refused(f"{path.name} lacks a function of this version ({error})")
    expected = native_library.description(settings=CSettings, arguments=CpuArgs)
    problem = native_library.difference(library.sipo_description().decode(), expected)
    if problem := problem or native_library.stale(library.sipo_sources().decode()):
        return native_library.refused(problem)
    return native_library.LoadedLibrary(library, f"C++, {library.sipo_isa(0).decode()}")


LIBRARY, REASON, REMEDY = _load()

# The instruction set to use, of instruction_sets(); None for the widest. Tests set it.
ISA: str | None = None
# Threads of our own in place of torch's. Tests set it.
OWN_THREADS = False


def instruction_sets() -> list[str]:
    """Returns the instruction sets that this build has and this processor runs, widest first."""
    if LIBRARY is None:
        return []
    names: list[str] = []
    while (name := LIBRARY.sipo_isa(len(names))) is not None:
        names.append(name.decode())
    return names


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# Codes of csrc/elements.h; None is a tensor that is not given.
CODE: dict[torch.dtype | None, int] = {dtype: i for i, dtype in enumerate(native_library.ELEMENT_TYPES)}
CODE[None] = 0


def set_tensors(
    args: Any, model: Tensor, ref: Tensor | None, target: Tensor, grad: Tensor | None, error_mask: Tensor | None
) -> None:
    """Sets the addresses and strides of a call's large tensors in the CPU's or the CUDA part's arguments."""
    args.model, args.model_stride = model.data_ptr(), model.stride(0)
    args.target, args.target_stride = target.data_ptr(), target.stride(0)
    if ref is not None:
        args.ref, args.ref_stride = ref.data_ptr(), ref.stride(0)
    args.grad = _pointer(grad)
    if error_mask is not None:
        args.error_mask, args.error_mask_stride = error_mask.data_ptr(), error_mask.stride(0)
        args.error_mask_dtype, args.error_mask_shared = CODE[error_mask.dtype], error_mask.shape[0] != model.shape[0]


def set_results(args: Any, stats: Stats) -> None:
    """Sets the addresses of a call's results."""
    args.loss, args.samples, args.logits = stats.loss.data_ptr(), stats.samples.data_ptr(), stats.logits.data_ptr()
    args.mask, args.numbers = stats.mask.data_ptr(), _pointer(stats.numbers)


def set_totals(args: Any, totals: Totals) -> Tensor | None:
    """Sets what a call adds its results to.

    Returns:
        The pairs' noise levels in a type that the library reads, or None if there are no sums by noise level. They may
        be a copy: keep them until the call is made.
    """
    args.metrics, args.levels, pair_levels = _pointer(totals.metrics), _pointer(totals.levels), totals.pair_levels
    if totals.levels is None or pair_levels is None:
        return None
    args.bins, args.top = totals.levels.shape[1], totals.top
    if pair_levels.dtype in CODE:
        return pair_levels
    return pair_levels.to(torch.float64 if pair_levels.is_floating_point() else torch.int64)


@functools.lru_cache(maxsize=64)
def _template(
    samples: int,
    elements: int,
    target_shared: bool,
    dtypes: tuple[torch.dtype | None, ...],
    settings: Settings | None,
    wide_sums: bool,
    double_stats: bool,
) -> bytes:
    """Returns the part of :class:`CpuArgs` that does not change between training steps: all but addresses and strides.

    ``dtypes`` are those of model_pred, ref_pred and target and, with ``settings``, of ratio_scale, error_weight and
    ref_error.
    """
    model, ref, target, *numbers = map(CODE.__getitem__, dtypes)
    args = CpuArgs(
        pairs=samples // 2,
        elements=elements,
        model_dtype=model,
        # Without a reference the type only picks a loop; the policy's own type keeps the accumulation type.
        ref_dtype=model if dtypes[1] is None else ref,
        target_dtype=target,
        target_shared=target_shared,
        wide_sums=wide_sums,
        settings=CSettings(double_stats=double_stats),
    )
    if settings is not None:
        args.ratio_scale_dtype, args.error_weight_dtype, args.ref_error_dtype = numbers
        args.loss_per_pair = settings.reduction == "none"
        args.settings = CSettings.of(settings, samples // 2, double_stats)
    return bytes(args)


def _args(
    template: bytes, model: Tensor, ref: Tensor | None, target: Tensor, grad: Tensor | None, error_mask: Tensor | None
) -> CpuArgs:
    args = CpuArgs.from_buffer_copy(template)
    set_tensors(args, model, ref, target, grad, error_mask)
    if ISA is not None:
        args.isa = ISA.encode()
    args.threads, args.own_threads = torch.get_num_threads(), OWN_THREADS
    return args


def _run(name: str, args: CpuArgs) -> None:
    if getattr(LIBRARY, name)(ctypes.byref(args)):
        names = ", ".join(instruction_sets())
        raise RuntimeError(f"instruction set {ISA!r} does not run here: expected one of {names}")


def forward(
    inputs: Inputs,
    settings: Settings,
    *,
    with_grad: bool = False,
    expected: Tensor | float = 1.0,
    totals: Totals | None = None,
) -> Stats:
    """See :func:`sipo_kernels.backends.eager.forward`; with ``with_grad`` the gradient comes out of the same call."""
    model, goal, ref, error_mask = agree(inputs.model_pred, inputs.target, inputs.ref_pred, inputs.error_mask)
    stats = empty_stats(inputs, settings, with_grad)
    filled = _to_fill(stats.grad, model, inputs.model_pred) if with_grad else None
    samples = model.shape[0]
    elements = model.numel() // samples
    numbers = [t if t is None else t.contiguous() for t in inputs[3:6]]
    template = _template(
        samples,
        elements,
        goal.shape[0] != samples,
        tuple([t if t is None else t.dtype for t in (model, ref, goal, *numbers)]),
        settings,
        accumulate_dtype(elements, goal, model, ref) == torch.float64,
        stats.logits.dtype == torch.float64,
    )
    args = _args(template, model, ref, goal, filled, error_mask)
    args.ratio_scale, args.error_weight, args.ref_error = map(_pointer, numbers)
    args.upstream = expected if isinstance(expected, float) else float(expected)
    set_results(args, stats)
    if totals is not None and (pair_levels := set_totals(args, totals)) is not None:
        pair_levels = pair_levels.contiguous()
        args.pair_levels, args.pair_levels_dtype = pair_levels.data_ptr(), CODE[pair_levels.dtype]
    _run("sipo_pair_loss", args)
    if filled is not None and filled is not stats.grad:
        stats.grad.copy_(filled)
    return stats


def mend(
    grad: Tensor,
    model_pred: Tensor,
    target: Tensor,
    coef: Tensor,
    upstream: Tensor,
    numbers: Tensor,
    remembered: Tensor | None = None,
    error_mask: Tensor | None = None,
) -> Tensor:
    """Corrects the gradient that a fused ``forward`` made, if another upstream gradient than it expected came.

    The gradient is then made again in place, from the inputs: scaling it would round it a second time. On a device all
    of this is one launch, which the host does not wait for.

    Args:
        grad: The gradient that ``forward`` returned.
        model_pred, target, coef, upstream, error_mask: As for :func:`sipo_kernels.backends.eager.gradient`.
        numbers: Of the same ``forward``; the last is the upstream gradient that it expected.
        remembered: 0-d ``pair_dtype``, which is set to the upstream gradient that came, if that is finite, for the next
            ``forward`` to expect.
    """
    came, made_for = (upstream if upstream.ndim == 0 else upstream[0]).item(), numbers.tolist()[-1]
    if remembered is not None and came != remembered.item() and math.isfinite(came):
        remembered.fill_(came)
    if came == made_for and (upstream.ndim == 0 or bool((upstream == made_for).all())):
        return grad
    return _write_gradient(grad, model_pred, target, coef, upstream, error_mask)


def gradient(
    model_pred: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, error_mask: Tensor | None = None
) -> Tensor:
    """See :func:`sipo_kernels.backends.eager.gradient`."""
    return _write_gradient(empty_grad(model_pred), model_pred, target, coef, upstream, error_mask)


def _to_fill(grad: Tensor, model: Tensor, model_pred: Tensor) -> Tensor:
    """Returns the tensor that the library writes the gradient to: ``grad``, if the library can write its layout.

    If not and ``model`` is a copy made by :func:`agree`, that copy is overwritten, which saves the memory of a second
    gradient: each element is read before it is written.
    """
    return model if model is not model_pred and not lies_as(model, grad) else dense_like(model, grad)


def _write_gradient(
    grad: Tensor, model_pred: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, error_mask: Tensor | None
) -> Tensor:
    model, goal, _, error_mask = agree(model_pred, target, None, error_mask)
    filled = _to_fill(grad, model, model_pred)
    coef = scaled_coef(coef, upstream)
    samples, double = model.shape[0], coef.dtype == torch.float64
    dtypes = (model.dtype, None, goal.dtype)
    template = _template(samples, model.numel() // samples, goal.shape[0] != samples, dtypes, None, False, double)
    args = _args(template, model, None, goal, filled, error_mask)
    args.coef = coef.data_ptr()
    _run("sipo_pair_grad", args)
    return grad if filled is grad else grad.copy_(filled)
