"""Calls csrc/cuda through the library that native.py loads: the pair loss on an NVIDIA GPU, gradient included.

Nothing here waits for the device: the launches go to torch's current stream, and their workspace comes from torch's
allocator. ``plan.py`` decides how a call is cut up.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from sipo_kernels import build_info
from sipo_kernels.backends import library as native_library
from sipo_kernels.backends import native
from sipo_kernels.backends.cuda.plan import (
    ANY,
    BLOCKS_PER_SM,
    ELEMENTS,
    MIXED,
    SCRATCH_BYTES,
    THREADS,
    VECTOR,
    CudaCall,
    Gpu,
    make_plan,
)
from sipo_kernels.backends.interface import Stats, empty_stats
from sipo_kernels.backends.native import fields
from sipo_kernels.inputs import Inputs
from sipo_kernels.layout import accumulate_dtype, agree, dense_like, empty_grad
from sipo_kernels.options import Settings
from sipo_kernels.output import Totals

# Targets that the predictions of a type have kernels for: csrc/cuda/readers.h.
_TARGETS = {
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
}


class _Numbers(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int64)]


class CudaArgs(ctypes.Structure):
    """``sipo::CudaArgs`` of csrc/cuda/call.h, field by field."""

    _fields_ = [
        *fields(ctypes.c_void_p, "model ref target"),
        *fields(ctypes.c_int64, "model_stride ref_stride target_stride pairs elements"),
        *fields(_Numbers, "ratio_scale error_weight ref_error pair_levels upstream"),
        *fields(ctypes.c_void_p, "loss samples logits numbers mask grad metrics levels"),
        *fields(ctypes.c_void_p, "expected_at remembered coef workspace stream"),
        *fields(ctypes.c_double, "expected top"),
        ("settings", native.CSettings),
        *fields(ctypes.c_int32, "group tiles blocks parts lead hold shared_bytes one_pass"),
        ("keep", ctypes.c_float),
        *fields(ctypes.c_int32, "model_dtype ref_dtype target_dtype reader double_terms target_shared"),
        *fields(ctypes.c_int32, "loss_per_pair bins mend device"),
        ("error_mask", ctypes.c_void_p),
        ("error_mask_stride", ctypes.c_int64),
        *fields(ctypes.c_int32, "error_mask_dtype error_mask_shared"),
    ]


def _load(library: ctypes.CDLL | None) -> native_library.LoadedLibrary:
    """Prepares the CUDA part of ``library``, or says why it cannot be used."""
    if library is None:
        return native_library.LoadedLibrary(None, native.REASON, native.REMEDY)
    try:
        library.sipo_cuda_description.restype = ctypes.c_char_p
        library.sipo_cuda_workspace_bytes.restype = ctypes.c_int64
        library.sipo_cuda_workspace_bytes.argtypes = [ctypes.POINTER(CudaArgs)]
        library.sipo_cuda_error.restype = ctypes.c_char_p
        for name in ("sipo_cuda_pair_loss", "sipo_cuda_pair_grad"):
            getattr(library, name).argtypes = [ctypes.POINTER(CudaArgs)]
    except AttributeError:
        why = build_info.part("cuda").get("reason") or "the package was built without it"
        return native_library.LoadedLibrary(None, f"the native library has no CUDA part: {why}")
    expected = native_library.description(
        f"threads {THREADS}, blocks {BLOCKS_PER_SM}, scratch {SCRATCH_BYTES}, vector {VECTOR}, "
        f"mixed {MIXED} by {ELEMENTS[MIXED]}, any {ANY} by {ELEMENTS[ANY]}",
        settings=native.CSettings,
        numbers=_Numbers,
        arguments=CudaArgs,
    )
    if problem := native_library.difference(library.sipo_cuda_description().decode(), expected):
        return native_library.refused(problem)
    return native_library.LoadedLibrary(library, "CUDA C++")


LIBRARY, REASON, REMEDY = _load(native.LIBRARY)

# A GPU to plan for where there is none: tests set it, with a LIBRARY that runs the kernels on the CPU.
EMULATED: Gpu | None = None


@cache
def read_gpu(index: int) -> Gpu:
    """Reads the properties of CUDA device ``index`` that a plan needs."""
    found: Any = torch.cuda.get_device_properties(index)  # the stub does not know all that is there
    return Gpu(
        sms=found.multi_processor_count,
        l2_bytes=found.L2_cache_size,
        shared_bytes_per_sm=found.shared_memory_per_multiprocessor,
        shared_bytes_per_block=found.shared_memory_per_block_optin,
    )


@cache
def _problem(index: int) -> str:
    assert LIBRARY is not None
    code = LIBRARY.sipo_cuda_status(index)
    return LIBRARY.sipo_cuda_error(code).decode() if code else ""


def problem(index: int) -> str:
    """Returns why CUDA device ``index`` and its driver cannot run the kernels, or nothing."""
    return _problem(index)


# A call by ctypes cannot be traced. torch.compiler.assume_constant_result sets this, and imports all of Dynamo.
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' device torch's current one where it is not."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _aligned(tensor: Tensor, step: int) -> bool:
    """Whether ``step`` elements at the beginning of every sample can be read at once."""
    size = tensor.element_size()
    unit = min(16, step * size)
    return tensor.data_ptr() % unit == 0 and tensor.stride(0) * size % unit == 0


def _reader(
    elements: int,
    model: Tensor,
    ref: Tensor | None,
    target: Tensor,
    grad: Tensor | None,
    error_mask: Tensor | None,
) -> int:
    """Chooses how the kernel reads: its compiled types, any mix of types 4 elements at a time, or one by one."""
    typed = target.dtype in _TARGETS[model.dtype] and (ref is None or ref.dtype == model.dtype) and error_mask is None
    step = 16 // target.element_size() if typed else 4
    tensors = (model, ref, target, grad, error_mask)
    if elements % step or not all(_aligned(t, step) for t in tensors if t is not None):
        return ANY
    return VECTOR if typed else MIXED


def _call(
    model: Tensor, ref: Tensor | None, target: Tensor, grad: Tensor | None, error_mask: Tensor | None = None
) -> CudaCall:
    samples = model.shape[0]
    elements = model.numel() // samples
    return CudaCall(
        pairs=samples // 2,
        elements=elements,
        item_bytes=(model.element_size(), target.element_size()),
        reader=_reader(elements, model, ref, target, grad, error_mask),
        shared_target=target.shape[0] != samples,
        error_mask_bytes=0 if error_mask is None else error_mask.element_size(),
        shared_error_mask=error_mask is not None and error_mask.shape[0] != samples,
        with_grad=grad is not None,
    )


@lru_cache(maxsize=256)
def _template(
    gpu: Gpu, call: CudaCall, dtypes: tuple[torch.dtype, ...], double_terms: bool, settings: Settings | None
) -> bytes:
    """Returns the part of :class:`CudaArgs` that does not change between training steps: all but addresses and strides.

    Args:
        gpu: The GPU to plan for.
        call: The call to plan.
        dtypes: Of policy, reference and target.
        double_terms: Whether half precision is summed in float64.
        settings: None for a call that makes the gradient alone.
    """
    plan = make_plan(gpu, call)
    model, ref, target = map(native.CODE.__getitem__, dtypes)
    args = CudaArgs(
        pairs=call.pairs,
        elements=call.elements,
        tiles=plan.tiles,
        blocks=min(plan.tiles * call.pairs, 2 * BLOCKS_PER_SM * gpu.sms),
        reader=call.reader,
        model_dtype=model,
        ref_dtype=ref,
        target_dtype=target,
        target_shared=call.shared_target,
        double_terms=double_terms,
    )
    if settings is not None:
        for name in ("group", "blocks", "parts", "lead", "hold", "keep", "shared_bytes", "one_pass"):
            setattr(args, name, getattr(plan, name))
        args.settings = native.CSettings.of(settings, call.pairs, torch.float64 in dtypes)
        args.loss_per_pair = settings.reduction == "none"
    return bytes(args)


def _args(
    model: Tensor,
    ref: Tensor | None,
    target: Tensor,
    grad: Tensor | None,
    error_mask: Tensor | None,
    settings: Settings | None = None,
) -> CudaArgs:
    """Returns the arguments that forward and gradient have in common."""
    index = model.device.index or 0
    gpu = read_gpu(index) if EMULATED is None else EMULATED
    call = _call(model, ref, target, grad, error_mask)
    dtypes = (model.dtype, model.dtype if ref is None else ref.dtype, target.dtype)
    double_terms = accumulate_dtype(call.elements, target, model, ref) == torch.float64
    args = CudaArgs.from_buffer_copy(_template(gpu, call, dtypes, double_terms, settings))
    native.set_tensors(args, model, ref, target, grad, error_mask)
    args.device = index
    args.stream = torch._C._cuda_getCurrentRawStream(index) if model.is_cuda else None
    return args


def _numbers(tensor: Tensor) -> _Numbers:
    return _Numbers(tensor.data_ptr(), tensor.stride(0) if tensor.ndim else 0, native.CODE[tensor.dtype])


def _run(name: str, args: CudaArgs, device: torch.device) -> None:
    assert LIBRARY is not None  # backends.choose
    with _on(device):
        code = getattr(LIBRARY, name)(ctypes.byref(args))
    if code:
        raise RuntimeError(f"{name} failed: {LIBRARY.sipo_cuda_error(code).decode()} (CUDA error {code})")


def forward(
    inputs: Inputs,
    settings: Settings,
    *,
    with_grad: bool = False,
    expected: Tensor | float = 1.0,
    totals: Totals | None = None,
) -> Stats:
    """See :func:`sipo_kernels.backends.eager.forward`; with ``with_grad`` the gradient comes out of the same launch."""
    assert LIBRARY is not None  # backends.choose
    model, goal, ref, error_mask = agree(inputs.model_pred, inputs.target, inputs.ref_pred, inputs.error_mask)
    stats = empty_stats(inputs, settings, with_grad)
    filled = dense_like(model, stats.grad) if with_grad else None
    args = _args(model, ref, goal, filled, error_mask, settings)
    for name in ("ratio_scale", "error_weight", "ref_error"):
        if (tensor := getattr(inputs, name)) is not None:
            setattr(args, name, _numbers(tensor))
    if isinstance(expected, Tensor):
        args.expected_at = expected.data_ptr()
    else:
        args.expected = float(expected)
    native.set_results(args, stats)
    if totals is not None and (pair_levels := native.set_totals(args, totals)) is not None:
        args.pair_levels = _numbers(pair_levels)
    workspace = model.new_empty(LIBRARY.sipo_cuda_workspace_bytes(args), dtype=torch.uint8)
    args.workspace = workspace.data_ptr()
    _run("sipo_cuda_pair_loss", args, model.device)
    if filled is not None and filled is not stats.grad:
        stats.grad.copy_(filled)
    return stats


def gradient(
    model_pred: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, error_mask: Tensor | None = None
) -> Tensor:
    """See :func:`sipo_kernels.backends.eager.gradient`: one launch."""
    return mend(empty_grad(model_pred), model_pred, target, coef, upstream, None, error_mask=error_mask)


def mend(
    grad: Tensor,
    model_pred: Tensor,
    target: Tensor,
    coef: Tensor,
    upstream: Tensor,
    numbers: Tensor | None,
    remembered: Tensor | None = None,
    error_mask: Tensor | None = None,
) -> Tensor:
    """See :func:`sipo_kernels.backends.native.mend`: one launch, which compares the upstream gradients on the device.

    With ``numbers=None``, ``grad`` is written whatever came.
    """
    model, goal, _, error_mask = agree(model_pred, target, error_mask=error_mask)
    filled = dense_like(model, grad)
    args = _args(model, None, goal, filled, error_mask)
    coef = coef.contiguous()
    args.coef, args.settings.double_stats = coef.data_ptr(), coef.dtype == torch.float64
    args.upstream = _numbers(upstream)
    if remembered is not None:
        args.remembered = remembered.data_ptr()
    if numbers is not None and filled is grad:  # else the kernel fills a buffer, with the whole gradient
        args.numbers, args.mend = numbers.data_ptr(), True
    _run("sipo_cuda_pair_grad", args, model.device)
    return grad if filled is grad else grad.copy_(filled)
