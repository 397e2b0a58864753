"""What a child process of gpu_check does: it runs checks and writes down how each of them ended."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import faults
from benchmarks.gpu_check.all_checks import CHECKS, emulate_cuda
from benchmarks.gpu_check.child_processes import CheckOptions, Row
from benchmarks.gpu_check.context import Context, NotRunError

STICKY = 3  # exit code: an error of the device that every further call in the process would repeat


def run_child(names: Sequence[str], backend: str, options: CheckOptions, report: Path) -> int:
    """Runs checks one after the other and writes a report of each.

    Returns:
        The process's exit code.
    """
    if options.device == "cpu" and backend == "cuda":
        emulate_cuda()
    with report.open("a", encoding="utf-8", buffering=1) as lines:
        for name in names:
            lines.write(json.dumps({"start": name}) + "\n")
            context = Context(backend, options.device, options.quick)
            begin = time.perf_counter()
            with faults.injected(options.fault) if options.fault else contextlib.nullcontext():
                outcome, reason, detail = _attempt(CHECKS[name].run, context)
            sticky = _device_error() if context.on_gpu else None
            if sticky and outcome == "pass":
                outcome, reason = "fail", sticky
            elif sticky:
                reason += f"; the device is lost: {sticky}"
            row = Row(
                name, backend, outcome, reason, context.cases, context.worst, context.worst_half,
                time.perf_counter() - begin, detail,
            )  # fmt: skip
            lines.write(json.dumps(asdict(row)) + "\n")
            if sticky:  # every further call in this process would fail
                return STICKY
            gc.collect()
    return 0


def _attempt(run: Callable[[Any], None], context: Any) -> tuple[str, str, list[str]]:
    try:
        run(context)
        if context.cases == 0:
            return "fail", "it compared nothing", []
    except NotRunError as why:
        return "not run", str(why), []
    except AssertionError as broken:
        return "fail", _line(str(broken) or "assertion"), traceback.format_exc().splitlines()[-12:]
    except Exception as error:
        return "fail", _line(f"{type(error).__name__}: {error}"), traceback.format_exc().splitlines()[-30:]
    return "pass", "", []


def _device_error() -> str | None:
    """Returns what the device complains about once it has done everything, or ``None``."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return _line(f"{type(error).__name__}: {error}")
    return None


def _line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "")[:400]
