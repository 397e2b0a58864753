"""The types of elements, sums and results, and the memory layouts that the kernels read and write.

All backends follow it. Section numbers (§) are those of docs/math.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Half-precision predictions of fewer elements than this are accumulated in float64, like float32 ones of any size: long
# sums of short products average their rounding away, short ones may cancel and cannot.
SMALL_SAMPLE = 1 << 16


def has_lazy_bit(tensor: Tensor) -> bool:
    """Returns whether a tensor's memory lacks its values: a pending negation (``x.conj().imag``), or zeros."""
    return tensor.is_neg() or tensor._is_zerotensor()


def stats_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Returns the type of per-sample and per-pair results: float64 if any input is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def accumulate_dtype(elements: int, target: Tensor, *predictions: Tensor | None) -> torch.dtype:
    """Returns the type in which elements are subtracted, multiplied and summed.

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
    """Returns the type of the per-pair arithmetic: float64 unless the device lacks it, since it is a few numbers."""
    return torch.float32 if device.type == "mps" else torch.float64


def dense_sample_strides(tensor: Tensor) -> tuple[int, ...] | None:
    """Returns the strides of dimensions 1.. if each sample fills its memory without gaps, else None.

    Dimensions of size 1 get stride 1, so that equal layouts compare equal.
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
    """Allocates a tensor of ``like``'s shape whose samples have these strides and no gaps between them."""
    elements = like.numel() // like.shape[0]
    return torch.empty_strided(like.shape, (elements, *strides), dtype=like.dtype, device=like.device)


def _with_sample_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Returns ``tensor`` if its samples have these strides, else a copy whose samples do."""
    if dense_sample_strides(tensor) == strides:
        return tensor
    return _empty_dense(tensor, strides).copy_(tensor)


def full_mask(error_mask: Tensor, model_pred: Tensor) -> Tensor:
    """Returns ``error_mask`` as backends read it: ``[S, ...]`` or ``[B, ...]`` in full, bool or else float32.

    It is a copy in ``model_pred``'s layout unless it is all that already.
    """
    dtype = torch.bool if error_mask.dtype == torch.bool else torch.float32
    if error_mask.dtype == dtype and error_mask.shape[1:] == model_pred.shape[1:]:
        return error_mask
    return torch.empty_like(model_pred[: error_mask.shape[0]], dtype=dtype).copy_(error_mask)


def mask_sums(error_mask: Tensor, samples: int) -> Tensor:
    """Returns Σw of each sample (§2), ``[S]``, for a mask from :func:`full_mask`."""
    sums = error_mask.reshape(error_mask.shape[0], -1).sum(1, dtype=pair_dtype(error_mask.device))
    return sums.repeat(samples // error_mask.shape[0])


def agree(
    model_pred: Tensor, target: Tensor, ref_pred: Tensor | None = None, error_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns the large inputs in one common layout of dense samples; copies only what differs from ``model_pred``.

    Samples need not be adjacent in memory: a slice along dimension 0, or part of the channels, is read in place.
    """
    inputs = (model_pred, target, ref_pred, error_mask)
    if all(tensor is None or tensor.is_contiguous() for tensor in inputs):
        return inputs
    strides = dense_sample_strides(model_pred)
    if strides is None:
        model_pred = model_pred.contiguous()
        strides = dense_sample_strides(model_pred)
        assert strides is not None  # contiguous is dense
    ref_pred = None if ref_pred is None else _with_sample_strides(ref_pred, strides)
    error_mask = None if error_mask is None else _with_sample_strides(error_mask, strides)
    return model_pred, _with_sample_strides(target, strides), ref_pred, error_mask


def empty_grad(model_pred: Tensor) -> Tensor:
    """Allocates the gradient (§6) in ``model_pred``'s type and layout, without the gaps that a layout may have."""
    return torch.empty_like(model_pred)


def lies_as(agreed: Tensor, grad: Tensor) -> bool:
    """Returns whether ``grad`` has ``agreed``'s layout and no gaps between samples, as kernels write it."""
    if grad.is_contiguous() and agreed.is_contiguous():
        return True
    same = dense_sample_strides(grad) == dense_sample_strides(agreed)
    return same and grad.stride(0) == agreed.numel() // agreed.shape[0]


def dense_like(agreed: Tensor, grad: Tensor) -> Tensor:
    """Returns the tensor for a kernel to fill: ``grad`` if it :func:`lies_as` ``agreed``, else a buffer that does.

    A caller that gets a buffer copies it into ``grad`` afterwards.
    """
    if lies_as(agreed, grad):
        return grad
    strides = dense_sample_strides(agreed)
    assert strides is not None  # agree
    return _empty_dense(grad, strides)
