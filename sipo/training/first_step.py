"""Compares policy and reference in the first step, before any weight moves."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from sipo.batch import counted_mean
from sipo.progress import say
from sipo.training.config import TrainingConfig, TrainingMismatchError, TrainingWarning
from sipo.training.sharding import HALF_TYPES

Mismatch = Literal["warn", "raise"]

NAMES = ("start_difference", "start_logit")
"""Names in the first log line (docs/math.md §8)."""

# How far two passes of one network differ where other kernels run, each with roundings of its own: 1.2 times the type's
# eps for the 860 million weights of SD1.5 in bfloat16 and float16, 7 times in float32. The limits leave room for deeper
# networks. A GPU may multiply float32 in TF32, which has as many digits as float16.
_ROUNDING = {
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.float32: 1024 * torch.finfo(torch.float32).eps,
    torch.float64: 1024 * torch.finfo(torch.float32).eps,
}

# Roots of errors differ less than predictions do: rounding has no direction, and a relative difference r turns a
# relative root error e into hypot(e, r). A smaller share would not do at high noise, where e is as small as r.
_ERRORS_SHARE = 0.25

NOTICEABLE = 0.1
"""A logit below it hardly moves a loss: σ(0.1) = 0.525."""

NOTICEABLE_ERRORS = 1.0
"""The same where the reference's errors were computed beforehand, whose logits are never exactly 0."""

_NONE = -1.0  # in place of a maximum over no finite value


class FirstStep:
    """How far policy and reference differ over the passes of a run's first step (docs/math.md §8).

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
        self._most = torch.full((2,), _NONE, dtype=torch.float32, device=accelerator.device)

    @torch.no_grad()
    def add(
        self,
        model_pred: Tensor,
        reference: Tensor,
        target: Tensor,
        output: Any,
        error_mask: Tensor | None = None,
        *,
        errors: bool,
    ) -> None:
        """Adds one forward pass.

        Args:
            model_pred: ``[S, ...]``.
            reference: its predictions, shaped likewise; or its errors ``[S]``.
            target: ``[S, ...]`` or ``[S / 2, ...]``.
            output: the loss's, with ``logits`` or without.
            error_mask: which elements count: ``[S / 2, ...]``, with 1 in place of any dimension after the first.
            errors: which of the two ``reference`` is.
        """
        self.same_pass = not errors
        if errors:
            targets = target.repeat(len(model_pred) // len(target), *[1] * (target.ndim - 1))
            error = _rms(model_pred.float() - targets, error_mask)
            # If two predictions differ by an RMS of d, the square roots of their errors differ by at most d.
            difference, size = (error - reference.to(error.dtype).sqrt()).abs(), _rms(model_pred, error_mask)
        else:
            difference, size = _rms(model_pred.float() - reference.float(), error_mask), _rms(reference, error_mask)
        share = torch.where(difference > 0, difference / size, 0.0)
        logits = getattr(output, "logits", difference.new_full((1,), math.nan)).abs().float()
        # What is not finite is counted by the metrics, and would hide the rest here.
        share = torch.where(difference.isfinite(), share, _NONE)
        logits = torch.where(logits.isfinite(), logits, _NONE)
        self._most = torch.maximum(self._most, torch.stack([share.max(), logits.max()]))
        self.limit = max(self.limit, self._rounding(model_pred.dtype), self._rounding(reference.dtype))

    def _rounding(self, dtype: torch.dtype) -> float:
        if dtype in (torch.float32, torch.float64):
            dtype = HALF_TYPES.get(self.accelerator.mixed_precision, dtype)
            if dtype not in HALF_TYPES.values() and self.accelerator.device.type == "cuda":
                dtype = torch.float16
        return _ROUNDING[dtype] * (1.0 if self.same_pass else _ERRORS_SHARE)

    def read(self) -> dict[str, float]:
        """Returns the largest finite value of all passes and processes, by ``NAMES``; NaN where there is none.

        Waits for the device; every process calls it.
        """
        most = self._most[None]
        if self.accelerator.num_processes > 1:
            most = self.accelerator.gather(most)
        largest = (math.nan if value == _NONE else value for value in most.amax(0).tolist())
        return dict(zip(NAMES, largest, strict=True))

    def judge(self, found: dict[str, float]) -> tuple[bool, str | None]:
        """Returns whether the difference exceeds rounding, and a message or ``None``.

        Args:
            found: of :meth:`read`.
        """
        difference, logit = (found[name] for name in NAMES)
        if math.isnan(difference):
            return False, "policy and reference cannot be compared before training: no sample is finite in both"
        beyond = difference > self.limit
        if not beyond and not logit > (NOTICEABLE if self.same_pass else NOTICEABLE_ERRORS):
            return False, None
        what = "their predictions differ by"
        if not self.same_pass:
            what = "the errors imply that predictions differ by at least"
        measured = f"{what} {difference:.2g} times their size, and a logit is {logit:.2g} where 0 is expected"
        if not beyond and self.same_pass:
            return False, (
                f"policy and reference round differently before training: {measured}; their kernels or types differ, "
                "and a smaller beta or float32 reduces the effect"
            )
        if not beyond:
            return False, (
                f"policy and reference errors differ before training: {measured}; look for errors of other weights or "
                "draws; where it is rounding, a smaller beta or float32 reduces the effect"
            )
        causes = "weights or types that are not the policy's, dropout or another layer that acts in training alone"
        causes += ", or a predict that draws at random" if self.same_pass else ", or errors of other weights or draws"
        return True, (
            f"policy and reference differ before training: {measured}; rounding explains {self.limit:.2g}; "
            f"look for {causes}"
        )


def check_start(first: FirstStep, config: TrainingConfig, mismatch: Mismatch) -> dict[str, float]:
    """Compares policy and reference after the passes of the first step, before any weight moves.

    Every process calls it; it waits for the device.

    Args:
        first: has seen these passes.
        config: the run's; ``alarms="off"`` neither warns nor raises.
        mismatch: what to do where they differ by more than rounding.

    Returns:
        What was found, for the first log line.

    Raises:
        TrainingMismatchError: they differ, and ``mismatch="raise"``.

    Warns:
        TrainingWarning: they differ, or cannot be compared.
    """
    found = first.read()
    main = first.accelerator.is_main_process
    if config.progress is not None and main:
        difference, logit = (found[name] for name in NAMES)
        say(f"step 1: policy and reference differ by {difference:.2g}, logits by {logit:.2g}")
    beyond, message = first.judge(found)
    if message is not None and config.alarms != "off":
        if beyond and mismatch == "raise":
            raise TrainingMismatchError(f"step 1: {message}; alarms='off' trains anyway")
        if main:
            warnings.warn(f"step 1: {message}", TrainingWarning, stacklevel=2)
    return found


def _rms(values: Tensor, error_mask: Tensor | None) -> Tensor:
    """Returns the root mean square of each sample's elements that count, ``[S]`` float32."""
    masks = itertools.cycle([None] if error_mask is None else error_mask)
    means = [counted_mean(sample.float().square(), mask) for sample, mask in zip(values, masks, strict=False)]
    return torch.stack(means).sqrt()
