"""Log lines of a run: written to JSONL files, trackers and a progress bar."""

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

from sipo.files import check_regular, write_aside
from sipo.processes import on_main
from sipo.progress import StepProgress
from sipo.training.config import TrainingConfig
from sipo.training.log_reader import metrics_fault, read_log
from sipo.training.statistics import scalars, statistics_fault
from sipo.training.sums import remove_run_sums
from sipo.training.trackers import finish_trackers, log_numbers, start_trackers

_SHOWN = {"loss": "loss", "accuracy": "rewards/accuracies", "active": "active_fraction"}


class Recorder:
    """Writes log lines, in the main process only.

    ``metrics.jsonl`` is appended to line by line, so that a run can be watched. A resumed run first drops the lines
    after its checkpoint, and a new run keeps the log of an earlier one as ``metrics.1.jsonl``. Lines of a validation
    have ``"kind": "validation"``; :func:`sipo.training.log_reader.read_metrics` reads one kind or the other.
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
        self._shown = StepProgress(
            config.progress if accelerator.is_main_process else None, config.max_train_steps, first_step
        )

    def _open(self, config: TrainingConfig, first_step: int) -> None:
        config.folder.mkdir(parents=True, exist_ok=True)
        logs = check_logs(config)
        remove_run_sums(config.folder)  # the logs will not be those that it has hashes of
        if first_step == 0:
            set_aside_logs(logs)
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
        """Writes a validation's numbers likewise, with names that start with "validation/".

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
            log_numbers(self._accelerator, line["step"], numbers | (tracked or {}))
        return line

    def close(self) -> None:
        """Closes the files, the bar and the trackers that were started here."""
        for file in (self._file, self._statistics):
            if file is not None:
                with contextlib.suppress(OSError):  # said by the line that could not be written
                    file.close()
        self._shown.close()
        finish_trackers(self._accelerator, self._trackers)


def _append(file: TextIO, line: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(line) + "\n")
        file.flush()
    except OSError as error:  # a full disk, of which Python does not say the file
        raise OSError(error.errno, error.strerror, file.name) from error


def check_logs(config: TrainingConfig) -> list[Path]:
    """Returns a run's logs that exist; refuses anything else of their names, such as a FIFO, at which a run would wait.

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
        log.warn(path, f"; the log as it was is {copy.name}")
    kept = (text for text, line in zip(log.texts, log.lines, strict=True) if line["step"] <= last_step)
    write_aside(path, b"".join(kept))


def set_aside_logs(logs: Sequence[Path]) -> None:
    """Renames the logs of an earlier run in the same folder, all with the next free number: ``metrics.1.jsonl``."""
    written = [path for path in logs if path.stat().st_size]
    for path, name in zip(written, _free_names(written), strict=True):
        path.rename(name)


def _free_names(paths: Sequence[Path]) -> list[Path]:
    """Returns the paths with the next number that none of them has yet."""
    for number in itertools.count(1):
        names = [path.with_name(f"{path.stem}.{number}{path.suffix}") for path in paths]
        if not any(name.exists() for name in names):
            break
    return names


def _numbers(line: dict[str, Any], prefix: str, *names: str) -> str:
    """Returns what is shown of a line during a run; a user's own loss may lack some."""
    values = {name: line.get(prefix + _SHOWN[name], "") for name in names}
    shown = {name: "nan" if value is None else f"{value:.3f}" for name, value in values.items() if value != ""}
    return ", ".join(f"{name} {text}" for name, text in shown.items())
