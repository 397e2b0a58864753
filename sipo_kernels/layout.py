"""What every backend agrees on: settings, results, layouts and accumulation types.

One place for the facts that the plain-torch, Triton and native backends share. Section numbers (§) refer to
``docs/math.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Half-precision predictions of fewer elements than this are accumulated in float64, like float32 ones of any size: long
# sums of short products average their rounding away, short ones may cancel and cannot.
SMALL_SAMPLE = 1 << 16


def has_lazy_bit(tensor: Tensor) -> bool:
    """Whether a tensor's values are not those in its memory: a pending negation (``x.conj().imag``), or no memory."""
    return tensor.is_neg() or tensor._is_zerotensor()


def stats_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Type of per-sample and per-pair results: float64 if any input is, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def accumulate_dtype(elements: int, target: Tensor, *predictions: Tensor | None) -> torch.dtype:
    """Type in which elements are subtracted, multiplied and summed.

    float64 for float32 and float64 predictions: the gap is a sum that may cancel a thousandfold, and the gradient's
    relative error is the logit's absolute one; float32 sums miss the error budget on unrelated predictions. The loss is
    bound by memory traffic, which the wider arithmetic does not touch, once the latents outgrow the caches.
    float32 for half-precision predictions, whose difference it holds exactly and their products almost, beside a target
    of float32 or less (``SMALL_SAMPLE`` excepted): what is rounded in ``d`` is random and averages away.
    """
    if target.is_mps:
        return torch.float32
    wide = elements < SMALL_SAMPLE or target.dtype == torch.float64
    for tensor in predictions:
        wide = wide or (tensor is not None and tensor.dtype in (torch.float32, torch.float64))
    return torch.float64 if wide else torch.float32


def pair_dtype(device: torch.device) -> torch.dtype:
    """Type of the per-pair arithmetic: float64 wherever the device has it; it is a handful of numbers."""
    return torch.float32 if device.type == "mps" else torch.float64


def dense_sample_strides(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides of dimensions 1.. if each sample fills its memory without gaps, else ``None``.

    Dimensions of size 1 get stride 1 whatever they say, so that equal layouts compare equal.
    """
    strides = [1] * tensor.ndim
    expected = 1
    for dim in sorted(range(1, tensor.ndim), key=tensor.stride):
        if tensor.shape[dim] == 1:
            continue
        if tensor.stride(dim) != expected:
            return None
        strides[dim] = expected
        expected *= tensor.shape[dim]
    return tuple(strides[1:])


def _empty_dense(like: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Uninitialised tensor of ``like``'s shape: samples in these strides, back to back."""
    elements = like.numel() // like.shape[0]
    return torch.empty_strided(like.shape, (elements, *strides), dtype=like.dtype, device=like.device)


def with_sample_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` itself where its samples already lie in these strides, else a copy that does."""
    if dense_sample_strides(tensor) == strides:
        return tensor
    return _empty_dense(tensor, strides).copy_(tensor)


def agree(model_pred: Tensor, *others: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """Inputs in one common layout of dense samples: copies only what differs from ``model_pred``.

    Samples need not touch each other: a slice along dimension 0, or a half of the channels, is read where it lies.
    """
    if model_pred.is_contiguous() and all(t is None or t.is_contiguous() for t in others):
        return model_pred, list(others)
    strides = dense_sample_strides(model_pred)
    if strides is None:
        model_pred = model_pred.contiguous()
        strides = dense_sample_strides(model_pred)
        assert strides is not None  # contiguous is dense
    return model_pred, [t if t is None else with_sample_strides(t, strides) for t in others]


def empty_grad(model_pred: Tensor) -> Tensor:
    """Uninitialised gradient with ``model_pred``'s type and layout (§6); dense also where that has gaps."""
    return torch.empty_like(model_pred)


def lies_as(agreed: Tensor, grad: Tensor) -> bool:
    """Whether ``grad`` lies in ``agreed``'s layout with its samples back to back, as kernels write it."""
    if grad.is_contiguous() and agreed.is_contiguous():
        return True
    same = dense_sample_strides(grad) == dense_sample_strides(agreed)
    return same and grad.stride(0) == agreed.numel() // agreed.shape[0]


def dense_like(agreed: Tensor, grad: Tensor) -> Tensor:
    """``grad`` itself where it :func:`lies_as` ``agreed``, else a buffer that does.

    A kernel fills the result; a caller that got a buffer copies it into ``grad``.
    """
    if lies_as(agreed, grad):
        return grad
    strides = dense_sample_strides(agreed)
    assert strides is not None  # agree
    return _empty_dense(grad, strides)
