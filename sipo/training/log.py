"""Metrics of a run: summed on the device, read once per log line, written to JSONL, trackers and a bar."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from sipo.files import check_regular, write_aside
from sipo.processes import on_main
from sipo.progress import Steps
from sipo.training.config import TrainingConfig
from sipo.training.log_reader import metrics_fault, read_log
from sipo.training.statistics import scalars, statistics_fault
from sipo.training.sums import remove_run_sums
from sipo_kernels.output import add_metrics

_COUNTED = "nonfinite_pairs"
_SHOWN = {"loss": "loss", "accuracy": "rewards/accuracies", "active": "active_fraction"}


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
        """Averages over all processes and starts anew: the one device read of a log line.

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
        """The sums, for a checkpoint that falls between two log lines."""
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


class Recorder:
    """Writes log lines; on the main process only, the others keep quiet.

    ``metrics.jsonl`` is appended to line by line, so that a run can be watched; a resumed run first drops the
    lines after its checkpoint, and one that starts keeps the log of an earlier one as ``metrics.1.jsonl``. Lines of a
    validation have ``"kind": "validation"``, and :func:`read_lines` tells them from those of training.
    ``timesteps.jsonl`` is written likewise, where there are statistics.

    Args:
        config: the run's.
        first_step: the step the run starts after, 0 for a new run.
        accelerator: keeps the trackers, those included that the caller has started.

    Raises:
        ValueError: a tracker that accelerate does not know.
        ImportError: a tracker that is not installed.
    """

    def __init__(self, config: TrainingConfig, first_step: int, accelerator: Any) -> None:
        self.history: list[dict[str, Any]] = []
        self.validation: list[dict[str, Any]] = []
        self._started = time.perf_counter()
        self._accelerator = accelerator
        self._file: TextIO | None = None
        self._statistics: TextIO | None = None
        self._statistics_path = config.statistics_path
        self._trackers = start_trackers(accelerator, config, first_step)
        on_main(accelerator, lambda: self._open(config, first_step))
        self._shown = Steps(
            config.progress if accelerator.is_main_process else None, config.max_train_steps, first_step
        )

    def _open(self, config: TrainingConfig, first_step: int) -> None:
        config.folder.mkdir(parents=True, exist_ok=True)
        logs = check_logs(config)
        remove_run_sums(config.folder)  # the logs will not be those that it has hashes of
        if first_step == 0:
            _set_aside(logs)
        else:
            faults = {config.metrics_path: metrics_fault, config.statistics_path: statistics_fault}
            for path in logs:
                _keep_lines(path, faults[path], first_step)
        self._file = config.metrics_path.open("a", encoding="utf-8")

    def advance(self) -> None:
        """Counts a step."""
        self._shown.advance()

    def write(self, step: int, values: dict[str, Any], statistics: dict[str, Any] | None = None) -> dict[str, Any]:
        """Writes one log line and returns it; a number that is not finite becomes null: JSON has no other.

        Args:
            step: optimiser steps done.
            values: the line's metrics.
            statistics: a line of :class:`sipo.training.statistics.TimestepStatistics`, for a file of its own;
                trackers get a few numbers of it alone.
        """
        if statistics is not None and self._file is not None:
            if self._statistics is None:  # a run without such numbers has no such file
                self._statistics = self._statistics_path.open("a", encoding="utf-8")
            _append(self._statistics, statistics)
        tracked = {} if statistics is None else {f"timesteps/{k}": v for k, v in scalars(statistics).items()}
        line = self._write({"step": step}, values, "train/", tracked)
        self.history.append(line)
        self._shown.show(step, _numbers(line, "", "loss", "accuracy"), _numbers(line, "", "active"))
        return line

    def write_validation(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Likewise for a validation, whose names start with "validation/".

        Without values, where a hook alone has run, the line has the kind "hook": a resumed run need not run it again.
        """
        named = {f"validation/{name}": value for name, value in values.items()}
        line = self._write({"step": step, "kind": "validation" if values else "hook"}, named, "")
        if values:
            self.validation.append(line)
            self._shown.note(step, f"held out: {_numbers(line, 'validation/', *_SHOWN)}")
        return line

    def _write(
        self, line: dict[str, Any], values: dict[str, Any], prefix: str, tracked: dict[str, float] | None = None
    ) -> dict[str, Any]:
        for name, value in values.items():
            line[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        line["seconds"] = round(time.perf_counter() - self._started, 3)
        if self._file is not None:
            _append(self._file, line)
        if values:
            numbers = {prefix + name: v for name, v in line.items() if name not in ("step", "kind") and v is not None}
            self._accelerator.log(numbers | (tracked or {}), step=line["step"])
        return line

    def close(self) -> None:
        """Closes the files, the bar and the trackers that were started here."""
        for file in (self._file, self._statistics):
            if file is not None:
                with contextlib.suppress(OSError):  # said by the line that could not be written
                    file.close()
        self._shown.close()
        for tracker in self._trackers:
            tracker.finish()
            self._accelerator.trackers.remove(tracker)


def _append(file: TextIO, line: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(line) + "\n")
        file.flush()
    except OSError as error:  # a full disk, of which Python does not say the file
        raise OSError(error.errno, error.strerror, file.name) from error


def start_trackers(accelerator: Any, config: TrainingConfig, first_step: int) -> list[Any]:
    """Starts the trackers that a configuration asks for, beside those that the accelerator has.

    TensorBoard's events go to ``tensorboard/`` in the run's folder; where a run is resumed, those after its checkpoint
    are purged.

    Raises:
        ValueError: a tracker that accelerate does not know.
        ImportError: a tracker that is not installed.
    """
    available = check_trackers(config)
    running = list(accelerator.trackers)
    wanted = [] if running else list(accelerator.log_with)  # the caller's, not yet started
    wanted += [name for name in config.trackers if name in available and name not in wanted]
    if not accelerator.logging_dir:
        accelerator.project_configuration.logging_dir = str(config.folder)
    options = {
        "tensorboard": {"purge_step": first_step + 1},
        "wandb": {"name": config.folder.name, "dir": str(config.folder)},
    }
    started: list[Any] = []
    for tracker in wanted:
        if str(tracker) in {t.name for t in running}:
            continue
        # init_trackers starts whatever the accelerator holds, running or not: one at a time, then.
        accelerator.log_with, accelerator.trackers = [tracker], []
        accelerator.init_trackers("tensorboard" if str(tracker) == "tensorboard" else "sipo", init_kwargs=options)
        started += accelerator.trackers
    accelerator.log_with, accelerator.trackers = [], running + started
    return started


def check_trackers(config: TrainingConfig) -> list[str]:
    """Refuses trackers that cannot be started. Errors as for :func:`start_trackers`.

    Returns:
        Names of those that are installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    for name in config.trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"report_to={name!r}: expected one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available and name != "tensorboard":
            raise ImportError(f"report_to={name!r}: not installed, expected `pip install {name}`")
    return available


def read_lines(path: Path, kind: str = "training") -> list[dict[str, Any]]:
    """The log lines of a run, in order: those of "training", or those of its "validation".

    Damaged ones are left out, with a warning that names them. Errors as for :func:`sipo.training.log_reader.read_log`.
    """
    log = read_log(path, metrics_fault)
    log.complain(path)
    return [line for line in log.lines if line.get("kind", "training") == kind]


def check_logs(config: TrainingConfig) -> list[Path]:
    """A run's logs that are there; nothing else may stand in their places, as a FIFO, which a run would wait for.

    Raises:
        FileError: something else does.
    """
    logs = [path for path in (config.metrics_path, config.statistics_path) if path.exists()]
    for path in logs:
        check_regular(path)
    return logs


def _keep_lines(path: Path, fault: Callable[[dict[str, Any]], str], last_step: int) -> None:
    """Drops the lines after ``last_step``, and a last line that a crash cut short.

    So are damaged ones, with a warning: a log that had some is kept as it was, as those of earlier runs are.
    """
    log = read_log(path, fault)
    if log.damage:
        (copy,) = _free_names([path])
        shutil.copyfile(path, copy)  # without its mode, which not every file system can set
        log.complain(path, f"; the log as it was is {copy.name}")
    kept = (text for text, line in zip(log.texts, log.lines, strict=True) if line["step"] <= last_step)
    write_aside(path, b"".join(kept))


def _set_aside(logs: Sequence[Path]) -> None:
    """Renames the logs of an earlier run in the same folder, all with the next free number: ``metrics.1.jsonl``."""
    written = [path for path in logs if path.stat().st_size]
    for path, name in zip(written, _free_names(written), strict=True):
        path.rename(name)


def _free_names(paths: Sequence[Path]) -> list[Path]:
    """The paths with the next number that none of them has yet."""
    for number in itertools.count(1):
        names = [path.with_name(f"{path.stem}.{number}{path.suffix}") for path in paths]
        if not any(name.exists() for name in names):
            break
    return names


def _numbers(line: dict[str, Any], prefix: str, *names: str) -> str:
    """What of a line is shown while a run goes on; a loss of one's own may lack some."""
    values = {name: line.get(prefix + _SHOWN[name], "") for name in names}
    shown = {name: "nan" if value is None else f"{value:.3f}" for name, value in values.items() if value != ""}
    return ", ".join(f"{name} {text}" for name, text in shown.items())


def pluck(history: Sequence[dict[str, Any]], name: str) -> list[float]:
    """One metric over the log lines, NaN where a line has none."""
    return [math.nan if line.get(name) is None else float(line[name]) for line in history]


def step_mean(history: Sequence[dict[str, Any]], name: str) -> float:
    """Mean of a metric over the steps of a run from its start; lines stand for the steps since the one before."""
    total, covered, previous = 0.0, 0, 0
    for line, value in zip(history, pluck(history, name), strict=True):
        if not math.isnan(value):
            total += value * (line["step"] - previous)
            covered += line["step"] - previous
        previous = line["step"]
    return total / covered if covered else math.nan
