"""What every backend agrees on: settings, results, layouts and accumulation types.

One place for the facts that the plain-torch, Triton and native backends share. Section numbers (§) refer to
``docs/math.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("diffusion_dpo", "dpo_cm", "sipo", "sdpo")
RATIOS = ("posterior", "reference")
REDUCTIONS = ("mean", "sum", "none")
NONFINITE = ("propagate", "skip", "raise")
LINKS = ("sigmoid", "ipo", "hinge", "dmpo")
SMOOTHED_LINKS = ("sigmoid", "dmpo")  # those that label_smoothing means something to
# dmpo's probability of the other label is at least this, as in its published code (§5): a logarithm is taken of it.
LEAST_SMOOTHING = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What a batch reports (§8), in the order in which the kernels write it.
METRICS = (
    "loss",
    "implicit_acc",
    "model_mse",
    "ref_mse",
    "reward_margin",
    "win_gap",
    "lose_gap",
    "weight_mean",
    "clip_fraction",
    "active_fraction",
    "nonfinite_pairs",
)
# Rows of the sums by noise level (§8): pairs that the sums are over, pairs that are left out, and what is summed.
STATISTICS = (
    "count",
    "nonfinite",
    "model_error_winner",
    "model_error_loser",
    "ref_error_winner",
    "ref_error_loser",
    "win_gap",
    "lose_gap",
    "ratio",
    "weight",
    "clipped",
    "active",
    "logits",
    "logits_sq",
    "implicit_acc",
    "coef",
    "coef_sq",
    "grad_sq",
)

# Half-precision predictions of fewer elements than this are accumulated in float64, like float32 ones of any size: long
# sums of short products average their rounding away, short ones may cancel and cannot.
SMALL_SAMPLE = 1 << 16


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
    link: str = "sigmoid"
    label_smoothing: float = 0.0
    winner_preserving: float | None = None

    @property
    def smoothing(self) -> float:
        """ε of the link's formula (§5)."""
        return max(self.label_smoothing, LEAST_SMOOTHING) if self.link == "dmpo" else self.label_smoothing

    @property
    def masks(self) -> bool:
        """Whether pairs are masked by their ratio (§4): never for ``diffusion_dpo`` or a threshold of 0."""
        return self.method != "diffusion_dpo" and self.mask_threshold > 0

    def loss_scale(self, pairs: int) -> float:
        """Factor between the sum over pairs and the reduced loss: 1/B for the mean."""
        return 1.0 / pairs if self.reduction == "mean" else 1.0


class Inputs(NamedTuple):
    """The tensors of one call, as :func:`sipo_kernels.pair_loss` takes them."""

    model_pred: Tensor
    ref_pred: Tensor | None
    target: Tensor
    ratio_scale: Tensor | None = None
    error_weight: Tensor | None = None
    ref_error: Tensor | None = None


class Totals(NamedTuple):
    """Running sums that a call adds its numbers to, on its device, so that many calls are read at once (§8).

    Attributes:
        metrics: ``[2, len(METRICS)]`` float32: sums of each metric's finite values, each times the pairs that it is a
            mean over, and sums of these pairs; of ``nonfinite_pairs`` its total, and the calls.
        levels: ``[len(STATISTICS), n]`` float32: sums over pairs by noise level, in n bins of equal width.
        timesteps: where each pair is in them: ``[B]`` or ``[S]`` (then the winners'), of any type but bool.
        top: the end of the noise levels: the number of training timesteps, or 1 for σ. Pair i is in bin
            ``⌊timesteps[i] · n / top⌋``, the first or last where that lies outside.
    """

    metrics: Tensor | None = None
    levels: Tensor | None = None
    timesteps: Tensor | None = None
    top: float = 1.0


class Stats(NamedTuple):
    """What a backend's forward returns; the first four in the order of the operator ``sipo::pair_loss``.

    Attributes:
        loss: scalar, or ``[B]`` for ``reduction="none"``.
        samples: ``[6, S]``, one row each: model_error, ref_error, reward_gap, log_ratio, weight, and coef: the
            factor of ``model_pred − target`` in the gradient (§6) for an upstream gradient of 1. One tensor,
            because each allocation costs a microsecond and small batches are latency.
        logits: ``[B]``.
        mask: ``[B]`` bool.
        grad: the gradient, where the backend made it along the way, else empty.
        numbers: ``[len(METRICS) + 1]``: the metrics of §8, and the upstream gradient that ``grad`` was made for;
            ``None`` from a backend that leaves §8 to ``output.py`` (eager).
    """

    loss: Tensor
    samples: Tensor
    logits: Tensor
    mask: Tensor
    grad: Tensor
    numbers: Tensor | None = None


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


def empty_stats(inputs: Inputs, settings: Settings, with_grad: bool) -> Stats:
    """Uninitialised results of one call: the one place for their shapes, types and devices."""
    model_pred = inputs.model_pred
    samples = model_pred.shape[0]
    pairs, dtype = samples // 2, stats_dtype(model_pred, inputs.ref_pred, inputs.target)
    rows = model_pred.new_empty((6, samples), dtype=dtype)
    return Stats(
        loss=rows.new_empty((pairs,) if settings.reduction == "none" else ()),
        samples=rows,
        logits=rows.new_empty(pairs),
        mask=rows.new_empty(pairs, dtype=torch.bool),
        grad=empty_grad(model_pred) if with_grad else model_pred.new_empty(0),
        numbers=rows.new_empty(len(METRICS) + 1),
    )


def scaled_coef(coef: Tensor, upstream: Tensor) -> Tensor:
    """``[S]`` coefficients (§6) times the upstream gradient: 0-d, or ``[B]`` for winner and loser alike.

    A coefficient of 0 stays 0 whatever comes down, so that a masked pair's gradient is exact zeros.
    """
    per_sample = upstream.repeat(2) if upstream.ndim else upstream
    return torch.where(coef == 0, 0, coef * per_sample.to(coef.dtype))


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
