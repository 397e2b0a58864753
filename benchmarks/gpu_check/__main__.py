"""Checks every backend on this GPU: ``python -m benchmarks.gpu_check``, from a checkout with PYTHONPATH=.

Builds the library for the present card where that is due, runs every check of every backend of the device in processes
of their own, and ends with a table and ``benchmarks/results/gpu_check-DEVICE.json``. Exit code 0: everything that ran
passed, and what did not run has a reason that is the machine's. 1: something failed, or there was no time for it.
2: there is no GPU (``--device cpu`` rehearses the checks on a CPU: native, cuda on the emulator, and Triton's
interpreter).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.child_processes import ROOT, STOP, CheckOptions, Row, environment, run_checks

ALONE = ("large",)  # groups that want the machine, its memory above all, to themselves
EXPECTED = {"cuda": ("cuda", "triton"), "cpu": ("native", "cuda", "triton")}
# Packages that a checkout must do without: torch and Triton alone.
UNWANTED = ("accelerate", "diffusers", "hypothesis", "peft", "pytest", "sklearn", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(arguments)
    if not __debug__:
        print("gpu_check: python -O leaves assertions out, and its checks use them: run it without -O")
        return 2
    import torch

    if args.device is None and not torch.cuda.is_available():
        print("gpu_check: no GPU that torch can use here; --device cpu rehearses the checks on the CPU")
        return 2
    device = args.device or "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: --device cuda, but torch finds no GPU")
        return 2
    os.environ.update(environment(CheckOptions(device)))  # before anything imports Triton
    os.environ.pop("SIPO_BACKEND", None)
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    options = CheckOptions(device, args.quick, args.limit, deadline, args.fault)
    if args.child:
        from benchmarks.gpu_check.child import run_child

        return run_child(args.only, args.backend[0], options, args.child)
    if args.sanitizer_cases:
        from benchmarks.gpu_check.sanitizer import run_small_cases

        return run_small_cases(args.backend, device)
    if args.self_test:
        return _self_test(args.backend or _present(device)[:1], options)
    return _run(args, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: a rehearsal with smaller sizes (default: cuda)")
    parser.add_argument("--backend", action="append", default=[], help="only this backend (may be repeated)")
    parser.add_argument("--only", action="append", default=[], help="only this check (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="leave out repetitions of what another case covers")
    parser.add_argument("--seconds", type=float, help="start nothing after this time; what is left counts as failed")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that one check may take (default 240)")
    parser.add_argument("--output", type=Path, help="results file")
    parser.add_argument("--self-test", action="store_true", help="show that each check catches its faults")
    parser.add_argument("--fault", help="run with one of faults.py's faults in every backend")
    parser.add_argument("--list", action="store_true", help="print the checks and end")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sanitizer-cases", action="store_true", help=argparse.SUPPRESS)
    return parser


# ---- One run ---------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace, options: CheckOptions) -> int:
    begin = time.perf_counter()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: STOP.set())
    report = Report(options, args.output, begin)
    whole = not args.only and not args.list
    if whole or options.device == "cuda":
        report.add([build(options.device)])  # before anything loads the library
    from benchmarks.gpu_check.all_checks import CHECKS, emulate_cuda
    from benchmarks.gpu_check.sanitizer import TOOLS, run_tool
    from sipo_kernels import backends

    unknown = [name for name in args.only if name not in CHECKS]
    if unknown or args.list:
        print("\n".join(f"{c.name:24} {(c.run.__doc__ or '').splitlines()[0]}" for c in CHECKS.values()))
        return 2 if unknown else 0
    report.describe()
    if whole:
        report.add([imports()])
    chosen = []
    for backend in args.backend or EXPECTED[options.device]:
        no_emulator = emulate_cuda() if (backend, options.device) == ("cuda", "cpu") else ""
        status = backends.status(backend, options.device) if backend in backends.BACKENDS else None
        if status is not None and status.available:
            chosen.append(backend)
            continue
        why = no_emulator or (status.reason if status else "this checkout has no backend of that name")
        # A rehearsal takes what there is; a GPU run that leaves out a backend has not shown what it is for.
        report.add([Row("every check", backend, "not run" if options.device == "cpu" else "fail", why)])

    jobs: list[tuple[list[str], str, bool]] = []
    for group in dict.fromkeys(check.group for check in CHECKS.values()):
        wanted = [c for c in CHECKS.values() if c.group == group and (not args.only or c.name in args.only)]
        ready = [c.name for c in wanted if options.device != "cpu" or not c.needs_gpu]
        for backend in chosen:
            report.add([Row(c.name, backend, "not run", "needs a GPU") for c in wanted if c.name not in ready])
            if ready:
                jobs.append((ready, backend, group not in ALONE))
    with ThreadPoolExecutor(max_workers=2 if options.device == "cpu" else 6) as pool:
        for rows in pool.map(lambda job: run_checks(job[0], job[1], options), [job for job in jobs if job[2]]):
            report.add(rows)
    for names, backend, parallel in jobs:
        if not parallel:
            report.add(run_checks(names, backend, options))
    if whole and chosen:
        with ThreadPoolExecutor(max_workers=len(TOOLS)) as pool:
            for row in pool.map(lambda tool: run_tool(tool, chosen, options, args.limit), TOOLS):
                report.add([row])
    if not chosen:
        report.add([Row("every check", "", "fail", "no backend could be checked")])
    return report.end()


def build(device: str) -> Row:
    """Makes the library what the sources say (``setup.py`` knows whether that is due), for the present card alone."""
    if device == "cpu":
        return Row("build", "", "not run", "a rehearsal takes the library as it is")
    import torch

    major, minor = torch.cuda.get_device_capability()
    card = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    record = ROOT / "sipo_kernels" / "_build_info.json"
    archs = _recorded(record).get("archs", [])
    # A library for more cards than this one is as good, and need not be built again.
    wanted = os.environ.get("SIPO_CUDA_ARCHS") or (";".join(archs) if card in archs else card)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, text=True, check=False,
        env={**os.environ, "SIPO_CUDA_ARCHS": wanted}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    part = _recorded(record)
    row = Row("build", "", "fail", seconds=time.perf_counter() - begin, detail=done.stdout.splitlines()[-30:])
    if done.returncode != 0:
        row.reason = f"setup.py ended with code {done.returncode}"
    elif not part.get("built"):
        row.reason = f"no CUDA part: {part.get('reason') or 'the build says nothing about one'}"
    else:
        row.outcome, row.cases, row.detail = "pass", 1, []
        row.reason = f"{part.get('compiler', '')}, for {';'.join(part.get('archs', []))}"
    return row


def _recorded(record: Path) -> dict[str, Any]:
    """Returns what the last build says about the CUDA part; empty where there is no record."""
    try:
        return dict(json.loads(record.read_text(encoding="utf-8"))["parts"]["cuda"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def imports() -> Row:
    """Returns whether ``sipo`` and these checks import where none of what they can do without is installed."""
    script = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name.split('.')[0] in {UNWANTED}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import sipo, sipo_kernels.reference, sipo_kernels, benchmarks.gpu_check.all_checks\n"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    said, seconds = done.stderr.strip().splitlines(), time.perf_counter() - begin
    if done.returncode:
        return Row("imports", "", "fail", said[-1][:300] if said else "", seconds=seconds, detail=said[-10:])
    return Row("imports", "", "pass", "torch and Triton alone", 1, seconds=seconds)


def _present(device: str) -> list[str]:
    from sipo_kernels import backends

    names = [name for name in EXPECTED[device] if name in backends.BACKENDS]
    return [name for name in names if backends.status(name, device).available]


# ---- The report ------------------------------------------------------------------------------------------------------


class Report:
    """Prints rows as they come and keeps the results file whole at every moment."""

    def __init__(self, options: CheckOptions, path: Path | None, begin: float) -> None:
        self.options, self.path, self.begin = options, path, begin
        self.rows: list[Row] = []
        self.machine: dict[str, Any] = {}

    def describe(self) -> None:
        """Machine facts, once the library is built: the record names its backends."""
        from benchmarks.machine import describe

        self.machine = {**describe(self.options.device), "nvcc": _nvcc()}
        slug = re.sub("[^a-z0-9]+", "-", self.machine["device"].lower()).strip("-")
        if self.path is None:  # a rehearsal is no result
            folder = ROOT / ("benchmarks/results" if self.options.device == "cuda" else "out")
            self.path = folder / f"gpu_check-{slug if self.options.device == 'cuda' else 'rehearsal-on-cpu'}.json"

    def add(self, rows: list[Row]) -> None:
        for row in rows:
            print(_one_line(row), flush=True)
        self.rows += rows
        if self.path is not None:
            self._write(complete=False)

    def end(self) -> int:
        """Prints the table, writes the file, and returns the exit code."""
        self._write(complete=True)
        numbers = f"{'cases':>6} {'worst':>7} {'half':>7} {'seconds':>8}"
        print(f"\n{'check':24} {'backend':14} {'outcome':8} {numbers}  reason")
        for row in sorted(self.rows, key=lambda r: (r.outcome != "fail", r.outcome == "not run")):
            print(_one_line(row))
        count = {kind: sum(row.outcome == kind for row in self.rows) for kind in ("pass", "fail", "not run")}
        info, seconds = self.machine, time.perf_counter() - self.begin
        print("worst: largest error as a fraction of its budget")
        print("half:  the same of half-precision gradients, whose budget is the rounding itself")
        print(f"{info['device']}, torch {info['torch']}, Triton {info['triton']}, commit {info['commit']}")
        counted = ", ".join(f"{number} {kind}" for kind, number in count.items())
        print(f"{counted}, in {seconds:.0f} s; {self.path}")
        return 1 if count["fail"] or not count["pass"] else 0

    def _write(self, complete: bool) -> None:
        from benchmarks.timing import write

        assert self.path is not None
        write(
            {
                "kind": "gpu_check",
                "machine": self.machine,
                "rehearsal": self.options.device == "cpu",
                "quick": self.options.quick,
                "fault": self.options.fault,
                "complete": complete,
                "failed": sum(row.outcome == "fail" for row in self.rows),
                "seconds": round(time.perf_counter() - self.begin, 1),
                "cases": [asdict(row) for row in self.rows],
            },
            self.path,
        )


def _one_line(row: Row) -> str:
    worst, half = ("" if x is None else f"{x:.4f}" for x in (row.worst, row.worst_half))
    numbers = f"{row.cases or '':>6} {worst:>7} {half:>7} {row.seconds:8.1f}"
    return f"{row.check:24} {row.backend:14} {row.outcome:8} {numbers}  {row.reason[:200]}".rstrip()


def _nvcc() -> str | None:
    for nvcc in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        try:
            done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        except OSError:
            continue
        return next((line.strip() for line in done.stdout.splitlines() if "release" in line), None)
    return None


# ---- The self-test ---------------------------------------------------------------------------------------------------


def _self_test(names: Sequence[str], options: CheckOptions) -> int:
    """Runs every check with every fault that it names, and with a crash that must end only one check."""
    from benchmarks.gpu_check import faults
    from benchmarks.gpu_check.all_checks import emulate_cuda

    if options.device == "cpu" and "cuda" in names:
        emulate_cuda()

    def show(row: faults.SelfTestRow) -> None:
        print(f"{row.check:24} {row.fault or 'no fault':26} {row.outcome:8}  {row.said[:120]}", flush=True)

    good = bool(names)
    for backend in names:
        print(f"self-test of {backend} on {options.device}")
        good = faults.self_test(backend, options.device, show) and good
        rows = run_checks(
            ["golden", "kept graph"], backend, CheckOptions(options.device, True, options.limit, fault="crashes")
        )
        for row in rows:
            caught = row.outcome == "fail" and "SIGSEGV" in row.reason
            show(faults.SelfTestRow(row.check, "crashes", "caught" if caught else "missed", row.reason))
            good = good and caught
        good = good and len(rows) == 2
    print("every fault was caught" if good else "a fault was missed, or a check fails without one")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
