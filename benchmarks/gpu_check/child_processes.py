"""Runs checks in processes of their own: a crash, a hang or an illegal address ends one check and not the run.

The parent, in this file, starts a child (``child.py``) for the checks of one group and one backend. The child writes a
line before and a line after each check. If it dies in between, that check has failed, and the parent starts another
child for the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Seconds that a child may take before its first check: torch, the driver and a busy machine.
START_LIMIT = 180.0
# Set by a signal: children are ended, nothing more is started, and the report is still written.
STOP = threading.Event()


@dataclass
class Row:
    """One line of the report.

    Attributes:
        check: its name.
        backend: what was checked; empty where it is no backend.
        outcome: ``"pass"``, ``"fail"`` or ``"not run"``.
        reason: why it failed or was not run; a remark where it passed.
        cases: comparisons made.
        worst: largest error as a fraction of its budget; ``worst_half`` the same of half-precision gradients, whose
            budget is the rounding itself.
        seconds: wall time.
        detail: more of what was said, for the results file.
    """

    check: str
    backend: str
    outcome: str
    reason: str = ""
    cases: int = 0
    worst: float | None = None
    worst_half: float | None = None
    seconds: float = 0.0
    detail: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CheckOptions:
    """How the checks of one run are run.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        quick: fewer repetitions.
        limit: seconds that one check may take.
        deadline: ``time.monotonic()`` at which no further check starts; ``None`` for none.
        fault: a fault of ``faults.py`` that every backend gets: what comes out must be a failure.
    """

    device: str
    quick: bool = False
    limit: float = 240.0
    deadline: float | None = None
    fault: str | None = None

    def arguments(self) -> list[str]:
        return [
            f"--device={self.device}",
            *(["--quick"] if self.quick else []),
            *([f"--fault={self.fault}"] if self.fault else []),
        ]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_check", *arguments]


def environment(options: CheckOptions) -> dict[str, str]:
    """Returns the environment of a child: this checkout first on the path, Triton interpreted on a CPU."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1" if options.device == "cpu" else "0"}
    found.pop("SIPO_BACKEND", None)
    return found


def no_more(options: CheckOptions) -> str:
    """Returns why nothing more may be started; empty if it may."""
    if STOP.is_set():
        return "interrupted"
    return "out of time (--seconds)" if options.deadline is not None and time.monotonic() > options.deadline else ""


def run_checks(names: Sequence[str], backend: str, options: CheckOptions) -> list[Row]:
    """Runs the checks in child processes, one after the other as each dies; returns a row for every check."""
    rows: list[Row] = []
    remaining = list(names)
    while remaining:
        if why := no_more(options):
            return rows + [Row(name, backend, "fail", why) for name in remaining]
        found = _one_child(remaining, backend, options)
        rows += found
        done = {row.check for row in found}
        remaining = [name for name in remaining if name not in done]
    return rows


def _one_child(names: list[str], backend: str, options: CheckOptions) -> list[Row]:
    """Runs a child; returns a row of each check that it finished, and of the one that ended it."""
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report", Path(folder) / "log"
        report.touch()
        arguments = [f"--child={report}", f"--backend={backend}", *options.arguments(), *(f"--only={n}" for n in names)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(*arguments), cwd=ROOT, env=environment(options), stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what a child starts ends with it
            )  # fmt: skip
            begin = time.monotonic()
            try:
                ended = _wait(process, report, options.limit)
            finally:
                _end(process)
        seconds = time.monotonic() - begin
        rows, running = _read(report.read_text(encoding="utf-8"))
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if running is not None:
        rows.append(Row(running, backend, "fail", ended, seconds=seconds, detail=said[-30:]))
    elif not rows:  # before the first check: the next child would fare no better
        rows = [Row(name, backend, "fail", f"before the first check: {ended}", detail=said[-30:]) for name in names]
    return rows


def _wait(process: subprocess.Popen[bytes], report: Path, limit: float) -> str:
    """Waits until the child ends or a check takes too long; returns how it ended."""
    size, since, allowed = 0, time.monotonic(), START_LIMIT
    while process.poll() is None:
        time.sleep(0.05)
        if report.stat().st_size != size:
            size, since, allowed = report.stat().st_size, time.monotonic(), limit
        if STOP.is_set():
            return "interrupted"
        if time.monotonic() - since > allowed:
            return f"took longer than {allowed:.0f} seconds"
    code = process.returncode
    return f"the process died: {signal.Signals(-code).name}" if code < 0 else f"the process ended with code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a child of ours and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(text: str) -> tuple[list[Row], str | None]:
    """Reads the rows of a child's report, and the check that it had begun and not finished."""
    rows, running = [], None
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off in the middle
            continue
        if "start" in entry:
            running = entry["start"]
        else:
            rows.append(Row(**entry))
            running = None
    return rows, running
