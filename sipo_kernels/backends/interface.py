"""What a backend is given and what it returns, beyond the inputs: results, and the coefficients of the gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sipo_kernels.inputs import Inputs
from sipo_kernels.layout import empty_grad, stats_dtype
from sipo_kernels.options import Settings
from sipo_kernels.output import METRICS, SAMPLE_ROWS


class Stats(NamedTuple):
    """What a backend's forward returns; the first four in the order of the operator ``sipo::pair_loss``.

    Attributes:
        loss: scalar, or ``[B]`` for ``reduction="none"``.
        samples: ``[len(SAMPLE_ROWS), S]``, one row each. One tensor, because each allocation costs a microsecond and
            small batches are latency.
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


def empty_stats(inputs: Inputs, settings: Settings, with_grad: bool) -> Stats:
    """Uninitialised results of one call: the one place for their shapes, types and devices."""
    model_pred = inputs.model_pred
    samples = model_pred.shape[0]
    pairs, dtype = samples // 2, stats_dtype(model_pred, inputs.ref_pred, inputs.target)
    rows = model_pred.new_empty((len(SAMPLE_ROWS), samples), dtype=dtype)
    return Stats(
        loss=rows.new_empty((pairs,) if settings.reduction == "none" else ()),
        samples=rows,
        logits=rows.new_empty(pairs),
        mask=rows.new_empty(pairs, dtype=torch.bool),
        grad=empty_grad(model_pred) if with_grad else model_pred.new_empty(0),
        numbers=rows.new_empty(len(METRICS) + 1),
    )


def scaled_coef(coef: Tensor, upstream: Tensor) -> Tensor:
    """``[S]`` coefficients (§6) times the upstream gradient: 0-d, or ``[B]`` for chosen and rejected sample alike.

    A coefficient of 0 stays 0 whatever comes down, so that a masked pair's gradient is exact zeros.
    """
    per_sample = upstream.repeat(2) if upstream.ndim else upstream
    return torch.where(coef == 0, 0, coef * per_sample.to(coef.dtype))
