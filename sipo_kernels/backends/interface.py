"""The results that a backend returns, and the coefficients of the gradient times the upstream gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sipo_kernels.inputs import Inputs
from sipo_kernels.layout import empty_grad, stats_dtype
from sipo_kernels.options import Settings
from sipo_kernels.output import METRICS, SAMPLE_ROWS


class Stats(NamedTuple):
    """The results of a backend's forward; the operator ``sipo::pair_loss`` returns the first four.

    Attributes:
        loss: Scalar, or ``[B]`` for ``reduction="none"``.
        samples: ``[len(SAMPLE_ROWS), S]``, one row each. One tensor, because each allocation takes a microsecond, which
            counts in a small batch.
        logits: ``[B]``.
        mask: ``[B]`` bool.
        grad: The gradient if the forward made it, else empty.
        numbers: ``[len(METRICS) + 1]``: the metrics of §8, and the upstream gradient that ``grad`` was made for. None
            from the eager backend, which leaves §8 to ``output.py``.
    """

    loss: Tensor
    samples: Tensor
    logits: Tensor
    mask: Tensor
    grad: Tensor
    numbers: Tensor | None = None


def empty_stats(inputs: Inputs, settings: Settings, with_grad: bool) -> Stats:
    """Allocates the results of one call: all backends take their shapes, dtypes and devices from here."""
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
    """Returns the ``[S]`` coefficients (§6) times the upstream gradient, which is 0-d or ``[B]``.

    A coefficient of 0 stays 0 whatever the upstream gradient is, so that a masked pair's gradient is exactly 0.
    """
    per_sample = upstream.repeat(2) if upstream.ndim else upstream
    return torch.where(coef == 0, 0, coef * per_sample.to(coef.dtype))
