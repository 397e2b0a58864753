"""Measurements between two log lines: sums on the device, which are read at once when a line is due."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sipo.protocols import PairLoss, PairLossResult
from sipo.training.config import TrainingConfig
from sipo.training.statistics import TimestepStatistics
from sipo.training.timesteps import InformativeTimesteps
from sipo_kernels import METRICS, Totals
from sipo_kernels.output import add_metrics

_COUNTED = "nonfinite_pairs"


class Measured(NamedTuple):
    """The numbers read for one log line.

    Attributes:
        metrics: the line's metrics by name.
        statistics: the line of ``timesteps.jsonl``, or ``None``.
        nonfinite_row: the longest row of steps with a non-finite gradient up to now; it may have begun before the
            previous line.
    """

    metrics: dict[str, Any]
    statistics: dict[str, Any] | None
    nonfinite_row: int


class Measurements:
    """A run's metrics, its statistics by noise level and its running means for informative timesteps.

    Attributes:
        informative: draws timesteps where ``timestep_sampling="informative"``, else ``None``.
        skipped: forward passes without a backward pass since the last log line.

    Args:
        loss_fn: the run's.
        config: the run's.
        device: where the sums are kept.

    Raises:
        ValueError: informative timesteps for a loss or a schedule that has none.
    """

    def __init__(self, loss_fn: PairLoss, config: TrainingConfig, device: torch.device) -> None:
        self._config = config
        # A loss that adds to sums on the device by itself saves some thirty small operations a pass.
        self._loss_adds = takes_totals(loss_fn)
        self._window = MetricWindow(device, METRICS if self._loss_adds else ())
        self._statistics = TimestepStatistics.of(loss_fn, device) if config.timestep_statistics else None
        self.informative: InformativeTimesteps | None = None
        if config.timestep_sampling == "informative":
            self.informative = InformativeTimesteps(loss_fn, device, config.seed, config.timestep_distribution)
        self.skipped = 0

    def totals(self) -> Totals | None:
        """Where the loss adds a pass's numbers, without the noise levels; ``None`` if it does not."""
        if not self._loss_adds:
            return None
        metrics = self._window.totals
        return Totals(metrics) if self._statistics is None else self._statistics.totals(metrics)

    def add(self, output: PairLossResult, levels: Tensor, shape: Sequence[int]) -> None:
        """Adds the numbers of a pass that the loss has not added itself.

        Args:
            output: the loss's.
            levels: ``[B]`` on the device.
            shape: of the chosen samples, ``[B, ...]``.
        """
        if self.informative is not None:
            self.informative.add(levels, output)
        if self._loss_adds:
            return
        if self._statistics is not None:
            self._statistics.add(levels, output, shape)
        self._window.add(output.metrics())

    def add_step(self, grad_norm: Tensor) -> Tensor:
        """Counts an optimiser step; see :meth:`MetricWindow.add_step`."""
        return self._window.add_step(grad_norm)

    def read(self, step: int, accelerator: Any, more: dict[str, float]) -> Measured:
        """Reads a log line and starts the next. Every process calls it; it waits for the device.

        Args:
            step: optimiser steps done.
            accelerator: the run's.
            more: further metrics of the line.
        """
        # Not at the first and last line: what is drawn next must not depend on where a run began or ended.
        informative = self.informative if step % self._config.logging_steps == 0 else None
        windows = [each.window.flatten() for each in (informative, self._statistics) if each is not None]
        metrics, row, sums = self._window.read(accelerator, torch.cat(windows) if windows else None)
        if informative is not None:
            informative.absorb(sums[: informative.window.numel()])
            del sums[: informative.window.numel()]
        metrics |= more
        if self.informative is not None:
            metrics["timestep_share"] = self.informative.share
        if self._config.skip_inactive:
            metrics["skipped_passes"], self.skipped = self.skipped, 0
        return Measured(metrics, None if self._statistics is None else self._statistics.take(step, sums), row)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns tensors and JSON values for a checkpoint that falls between two log lines."""
        window = self._window.state()
        progress: dict[str, Any] = {"skipped": self.skipped}
        if self.informative is not None:
            window["ratios"] = self.informative.window
            progress["timesteps"] = self.informative.progress()
        if self._statistics is not None:
            window["statistics"] = self._statistics.window
        return window, progress

    def restore(self, window: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Undoes :meth:`state`.

        Raises:
            ValueError: tensors of another run.
        """
        for name, tensor in window.items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"window.{name} is {tensor.dtype}, expected float32")
        self._window.restore(window)
        self.skipped = progress["skipped"]
        if self._statistics is not None and "statistics" in window:
            self._statistics.restore(window["statistics"])
        if self.informative is not None:
            self.informative.restore(progress["timesteps"], window["ratios"])


class MetricWindow:
    """Means of per-pass metrics since the last log line, kept on the device.

    A value that is not finite is left out of its mean, so that one broken step does not blind the line; the
    line counts such steps instead. ``nonfinite_pairs`` is a total.

    Attributes:
        totals: ``[2, M]``: sums of each metric's finite values times the pairs of each, and of pairs. A loss that takes
            :class:`sipo_kernels.Totals` adds its passes here by itself; :meth:`add` is for others.

    Args:
        device: where the metrics live.
        names: of the metrics; the first :meth:`add` tells where they are left out.
    """

    def __init__(self, device: torch.device, names: Sequence[str] = ()) -> None:
        self._device = device
        self._names = list(names)
        self.totals = torch.zeros(2, len(names), dtype=torch.float32, device=device)
        # Optimiser steps in this window; those with a non-finite gradient: in this window, in a row until
        # now, the longest such row; the other steps' gradient norms: their sum, and squared deviations from their mean.
        self._steps = torch.zeros(6, dtype=torch.float32, device=device)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds one pass's metrics, 0-d tensors under the same names each time."""
        if not self._names:
            self._names = list(metrics)
            if self.totals.shape[1] != len(metrics):  # else they are a checkpoint's
                self.totals = torch.zeros(2, len(metrics), dtype=torch.float32, device=self._device)
        add_metrics(self.totals, torch.stack([metrics[name].detach().float() for name in self._names]))

    def add_step(self, grad_norm: Tensor) -> Tensor:
        """Counts one optimiser step by its 0-d gradient norm; returns whether that is finite, as a tensor."""
        finite = torch.isfinite(grad_norm)
        bad = (~finite).float()
        steps, broken, row, longest, norms, deviations = self._steps.unbind()
        row = (row + 1.0) * bad
        norm = torch.where(finite, grad_norm.detach().float(), 0.0)
        # Youngs and Cramer's update: the sum of squares less the squared sum would leave nothing but rounding.
        n = steps - broken
        deviations = deviations + finite * (n * norm - norms).square() / (n * (n + 1.0)).clamp(min=1.0)
        longest = torch.maximum(longest, row)
        self._steps = torch.stack([steps + 1.0, broken + bad, row, longest, norms + norm, deviations])
        return finite

    def read(self, accelerator: Any, extra: Tensor | None = None) -> tuple[dict[str, Any], int, list[float]]:
        """Averages over all processes and starts again: the one device read of a log line.

        Args:
            accelerator: the run's.
            extra: further float32 values on the device, 1-D, read along.

        Returns:
            The metrics, with ``grad_norm`` (before clipping), its standard deviation over the window's steps
            (``grad_norm_std``, NaN for fewer than two) and ``nonfinite_steps``; the longest row of non-finite steps up
            to now, which may have begun before the window; and ``extra``'s sums over processes.
        """
        sums = torch.cat([self.totals.flatten(), *([] if extra is None else [extra])])
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
        values = torch.cat([self._steps, sums]).tolist()
        steps, broken, row, longest, norms, deviations = values[:6]
        del values[:6]
        n = len(self._names)
        metrics: dict[str, Any] = {}
        for i, name in enumerate(self._names):
            total, count = values[i], values[n + i]
            metrics[name] = int(total) if name == _COUNTED else total / count if count else math.nan
        finite = steps - broken
        metrics["grad_norm"] = norms / finite if finite else math.nan
        metrics["grad_norm_std"] = math.sqrt(deviations / (finite - 1)) if finite > 1 else math.nan
        metrics["nonfinite_steps"] = int(broken)
        self.totals.zero_()
        self._steps = torch.zeros_like(self._steps)
        self._steps[2:4] = row
        return metrics, int(longest), values[2 * n :]

    def state(self) -> dict[str, Tensor]:
        """Returns the sums, for a checkpoint that falls between two log lines."""
        return {"sums": self.totals[0], "counts": self.totals[1], "steps": self._steps}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Undoes :meth:`state`.

        Raises:
            ValueError: sums of other metrics.
        """
        totals, steps = torch.stack([state["sums"], state["counts"]]), state["steps"]
        if (self._names and totals.shape != self.totals.shape) or totals.ndim != 2 or steps.shape != self._steps.shape:
            raise ValueError(f"sums of shapes {[*totals.shape]} and {[*steps.shape]}, expected those of this run")
        self.totals, self._steps = totals.to(self._device), steps.to(self._device)


def takes_totals(loss_fn: Any) -> bool:
    """Whether a loss adds its numbers to :class:`sipo_kernels.Totals` by itself, as :class:`sipo.SIPOLoss` does."""
    call = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    return "totals" in inspect.signature(call).parameters
