"""The first step, at which the policy still is its reference: how far apart the two are, and what is said about it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

Mismatch = Literal["warn", "raise"]

NAMES = ("start_difference", "start_logit")
"""Names in the first log line (docs/math.md §8)."""

# What one network's predictions differ by when it computes them twice in other kernels, each of which rounds in its own
# places: 1.2 times the type's eps for the 860 million weights of SD1.5 in bfloat16 and float16, 7 times in float32.
# Deeper networks get room. A GPU may multiply float32 in TF32, which has float16's digits.
_ROUNDING = {
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.float32: 1024 * torch.finfo(torch.float32).eps,
    torch.float64: 1024 * torch.finfo(torch.float32).eps,
}
_COMPUTED = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Of errors that were computed beforehand: rounding has no direction, and leaves an error nearer than its predictions.
_ERRORS_SHARE = 0.25

NOTICEABLE = 0.1
"""A logit below it hardly moves a loss: σ(0.1) = 0.525."""


class FirstStep:
    """How far policy and reference are apart over the passes of a run's first step (docs/math.md §8).

    Numbers stay on the device until :meth:`read`.

    Attributes:
        limit: what rounding explains of the difference, for the types that were seen.
        same_pass: whether a reference network ran beside the policy, on the same batches.

    Args:
        accelerator: the run's.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.limit = 0.0
        self.same_pass = True
        self._most = torch.zeros(2, dtype=torch.float32, device=accelerator.device)

    @torch.no_grad()
    def add(self, model_pred: Tensor, reference: Tensor, target: Tensor, output: Any, *, errors: bool) -> None:
        """Takes one pass.

        Args:
            model_pred: ``[S, ...]``.
            reference: its predictions, shaped likewise; or its errors ``[S]``.
            target: ``[S, ...]`` or ``[S / 2, ...]``.
            output: the loss's; NaN stands for the logits of one that has none.
            errors: which of the two ``reference`` is.
        """
        self.same_pass = not errors
        if errors:
            error = _rms(model_pred.float() - target.repeat(len(model_pred) // len(target), *[1] * (target.ndim - 1)))
            # Predictions that differ by d, as root mean squares go, have errors whose roots differ by d at most.
            difference, size = (error - reference.to(error.dtype).sqrt()).abs(), _rms(model_pred)
        else:
            difference, size = _rms(model_pred.float() - reference.float()), _rms(reference)
        logits = getattr(output, "logits", torch.full_like(difference, math.nan)).abs().float()
        # What is not finite is counted by the metrics, and would hide the rest here.
        counts = difference.isfinite() & (difference > 0)
        most = [torch.where(counts, difference / size, 0.0), torch.where(logits.isinf(), 0.0, logits)]
        self._most = torch.maximum(self._most, torch.stack([values.max() for values in most]))
        self.limit = max(self.limit, self._rounding(model_pred.dtype), self._rounding(reference.dtype))

    def _rounding(self, dtype: torch.dtype) -> float:
        if dtype in (torch.float32, torch.float64):
            dtype = _COMPUTED.get(self.accelerator.mixed_precision, dtype)
            if dtype not in _COMPUTED.values() and self.accelerator.device.type == "cuda":
                dtype = torch.float16
        return _ROUNDING[dtype] * (1.0 if self.same_pass else _ERRORS_SHARE)

    def read(self) -> dict[str, float]:
        """The largest of all passes and processes, by ``NAMES``. Waits for the device; every process calls it."""
        most = self._most[None]
        if self.accelerator.num_processes > 1:
            most = self.accelerator.gather(most)
        return dict(zip(NAMES, most.amax(0).tolist(), strict=True))

    def judge(self, found: dict[str, float]) -> tuple[bool, str | None]:
        """Whether this is more than rounding, and what to say; ``None`` where there is nothing to.

        Args:
            found: of :meth:`read`.
        """
        difference, logit = (found[name] for name in NAMES)
        beyond = difference > self.limit
        if not beyond and not (self.same_pass and logit > NOTICEABLE):
            return False, None
        what = "predictions differ by" if self.same_pass else "errors are those of predictions that differ by at least"
        measured = f"their {what} {difference:.2g} times their size, and a logit is {logit:.2g} where 0 is due"
        if not beyond:
            return False, (
                f"policy and reference round differently before training: {measured}; their kernels or types differ, "
                "and a smaller beta, or float32, makes less of it"
            )
        causes = "weights or types that are not the policy's, dropout or another layer that acts in training alone"
        causes += ", or a predict that draws at random" if self.same_pass else ", or errors of other weights or draws"
        return True, (
            f"policy and reference differ before training: {measured}; rounding explains {self.limit:.2g}; "
            f"look for {causes}"
        )


def _rms(values: Tensor) -> Tensor:
    """Root mean square of each sample, ``[S]`` float32."""
    return values.float().flatten(1).square().mean(1).sqrt()
