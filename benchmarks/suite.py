"""Runs cases and keeps their results: checks each implementation, times it, writes the file after every case.

A results file (``kind`` "kernel" or "sweep"; the other benchmarks share the layout)::

    {"kind", "machine": {...}, "auto": the implementation users get, "options": {...}, "complete": bool,
     "copy_bandwidth_gb_s": {"median", "quartiles", "runs", "moments": {"start": ..., "between": ..., "end": ...}},
     "cases": [{"label", "shape", "pairs", "dtype": of the predictions, "target": of the target, "shared_target",
                "ref_error", "upstream", "mode", "state", "elements", "floor_bytes", "floor_ms",
                "copy_gb_s": measured just before this case, "others_cores": busy with other processes meanwhile,
                "results": {implementation: {"wall_ms", "host_ms", "device_ms": {"median", "quartiles", "runs"} | null,
                                             "gb_s", "of_copy", "extra_mb", "launches", "loss_error", "grad_error"}}}],
     "skipped": [{"label", ..., "mode", "state", "implementation": where they apply, "reason"}],
     "summary": of a kernel file: the headline cases' ratios (kernel_summary.py)}

``gb_s`` is ``floor_bytes`` over the median of ``device_ms`` (``wall_ms`` on a CPU), and ``of_copy`` that over the run's
median copy bandwidth. A copy reads and writes alike while the loss mostly reads, so ``of_copy`` may exceed 1; in the
"warm" state it may by much, because caches are faster than memory. ``grad_error`` is ‖grad − truth‖ / ‖truth‖ and
``loss_error`` |loss − truth|, the truth being float64; an implementation that misses is not timed but listed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, machine, timing
from benchmarks.baselines import AUTOTUNED, PUBLISHED
from benchmarks.cases import BOTH, Case, LossInputs, make_inputs
from benchmarks.footprint import extra_memory_mb, launched
from sipo_kernels import backends

MAX_ERROR = 0.05  # of a gradient, relative, and of a loss: rounding is far below, a wrong formula far above
CHECKED_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}
MAX_CALL_SECONDS = 2.0  # what takes longer is listed and not timed, nor called for larger cases
# Caches hold nothing of a case whose inputs are this many times their size: every call is a cold one.
ALWAYS_COLD = 4


class Suite:
    """One run of the kernel or sweep benchmark on one device."""

    def __init__(self, kind: str, device: str, output: Path, *, seconds: float, budget: float, **options: Any) -> None:
        self.device, self.output, self.seconds, self.budget = device, output, seconds, budget
        self.started, self.longest = time.perf_counter(), 0.0
        self.too_slow: dict[str, tuple[int, str]] = {}  # implementation → from how many elements on, and why
        self.copy = timing.CopyBandwidth(device)
        self.copy.measure("start", 15)
        self.results = new_results(kind, device, self.copy, seconds=seconds, budget=budget, **options)
        for name, why in baselines.available(device)[1].items():
            self.skip(None, why, implementation=name)

    @classmethod
    def of_options(
        cls, kind: str, args: argparse.Namespace, seconds: Mapping[str, float], budget: Mapping[str, float],
        **options: Any,
    ) -> Suite:  # fmt: skip
        """Returns the run that the options of the command line ask for; ``seconds`` and ``budget`` are the defaults."""
        output = args.output or default_output(kind, args.device, partial=bool(args.quick or args.only))
        limit = budget[args.device] if args.budget is None else args.budget
        each = args.seconds if args.seconds is not None else seconds[args.device] / (3 if args.quick else 1)
        return cls(kind, args.device, output, seconds=each, budget=limit, only=args.only, quick=args.quick, **options)

    def skip(self, case: Case | None, reason: str, **where: str) -> None:
        """Lists what was left out, and why."""
        self.results["skipped"].append({**(case.fields() if case else {}), **where, "reason": reason})

    def save(self) -> None:
        """Writes all that there is, its floors from the copies measured so far."""
        self.results["copy_bandwidth_gb_s"] = self.copy.summary()
        for entry in self.results["cases"]:
            derive(entry, self.copy.median)
        timing.write(self.results, self.output)

    def finish(self) -> dict[str, Any]:
        """Measures the copy a last time and writes the whole file."""
        self.copy.measure("end", 15)
        self.results["machine"]["clocks_at_end"] = machine.describe(self.device).get("clocks")
        self.results["complete"] = True
        self.save()
        cases = self.results["cases"]
        busy = machine.disturbed(cases)
        if busy:
            print(f"\nother processes were busy during {busy} of {len(cases)} entries: measure again, alone")
        skipped = len(self.results["skipped"])
        print(f"\n{len(cases)} entries, {skipped} left out, {self.spent():.0f} s: {self.output}")
        return self.results

    def spent(self) -> float:
        """Returns the seconds since the run began."""
        return time.perf_counter() - self.started

    def run(
        self,
        cases: list[Case],
        states: tuple[str, ...],
        autotune: Callable[[Case], bool] = lambda _: False,
        longer: Callable[[Case], float] = lambda _: 1.0,
    ) -> list[Case]:
        """Measures ``cases`` in their order until the budget is spent; returns those measured.

        Args:
            cases: what to time.
            states: of the caches.
            autotune: which cases torch.compile also gets max-autotune for.
            longer: how many times :attr:`seconds` a case is timed.
        """
        done = []
        share = 0.88 if self.device == "cuda" else 1.0  # the rest is for counting launches
        for case in cases:
            if self.spent() + self.longest > share * self.budget:
                self.skip(case, f"the run's budget of {self.budget:g} s was spent")
                continue
            short = lacks_memory(case, self.device)
            if short:
                self.skip(case, short)
                continue
            begin = time.perf_counter()
            try:
                self.measure_case(case, states, autotune(case), longer(case) * self.seconds)
            except torch.OutOfMemoryError as error:
                self.skip(case, f"out of memory: {str(error).splitlines()[0]}"[:300])
                continue
            self.longest = max(0.8 * self.longest, time.perf_counter() - begin)
            self.save()
            done.append(case)
        return done

    def measure_case(self, case: Case, states: tuple[str, ...], autotune: bool, seconds: float) -> None:
        """All implementations of one case, in each cache state; ``seconds`` of timing in all."""
        batch = make_inputs(case, self.device)
        calls = make_calls(case, batch, self.device, autotune)
        before = make_before(batch)
        failed = {name: why for name, (elements, why) in self.too_slow.items() if case.elements >= elements}
        calls = {name: call for name, call in calls.items() if name not in failed}
        failed.update(timing.warm_up(calls, device=self.device, before=before))
        calls = {name: call for name, call in calls.items() if name not in failed}
        errors = self._check(case, batch, calls, before)
        for name, error in errors.items():
            if error["seconds"] > MAX_CALL_SECONDS:
                failed[name] = f"too slow to repeat: {error['seconds']:.1f} s a call with {case.elements} elements"
                self.too_slow[name] = case.elements, failed[name]
                del calls[name]
            elif name != PUBLISHED and not error["fine"]:  # the published form is timed whatever it computes
                failed[name] = f"wrong, not timed: loss off by {error['loss_error']}, gradient by {error['grad_error']}"
                del calls[name]
        for name, why in failed.items():
            print(f"{case.name}: {name} is left out: {why}")
            self.skip(case, why, implementation=name)
        if not calls:
            return

        copy_gb_s = self.copy.measure("between", 3)
        large = "cold" in states and case.input_bytes > ALWAYS_COLD * machine.cache_bytes(self.device)
        entries = []
        for state in states:
            if large and state != "cold":
                self.skip(case, f"inputs exceed the caches {ALWAYS_COLD} times: every call is cold", state=state)
                continue
            load = machine.OthersLoad()
            times = timing.time_alternately(
                calls, seconds=seconds / len(states), device=self.device, before=before, state=state
            )
            entry: dict[str, Any] = {**case.fields(), "state": state, "elements": case.elements}
            entry.update(floor_bytes=case.floor_bytes, copy_gb_s=copy_gb_s, others_cores=load.cores())
            entries.append({**entry, "results": {name: t.summary() for name, t in times.items()}})
        for name, call in calls.items():
            extra: dict[str, Any] = {"extra_mb": None, "launches": None}
            if self.device == "cpu" or name != AUTOTUNED:  # a CUDA graph's memory is its own pool's
                extra["extra_mb"] = extra_memory_mb(call, device=self.device, before=before)
            extra.update({key: errors[name][key] for key in ("loss_error", "grad_error")})
            for entry in entries:
                entry["results"][name].update(extra)
        for entry in entries:
            derive(entry, self.copy.median)
            print_entry(entry, self.results["auto"])
        self.results["cases"] += entries

    def _check(
        self, case: Case, batch: LossInputs, calls: dict[str, Callable[[], Tensor]], before: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        """Each implementation's errors against float64 (``None`` for a case too large for that), and time of a call."""
        known = case.elements <= CHECKED_ELEMENTS[self.device]
        loss, grad = baselines.truth(batch) if known else (None, None)
        errors = {}
        for name, call in calls.items():
            before()
            begin = time.perf_counter()
            value = float(call())
            seconds = time.perf_counter() - begin
            error: dict[str, Any] = {"loss_error": None, "grad_error": None}
            if loss is not None:
                error["loss_error"] = abs(value - float(loss))
            if grad is not None and case.mode == BOTH:
                made = batch.model_pred.grad
                assert made is not None
                error["grad_error"] = float((made.double() - grad).norm() / grad.norm())
            fine = all(number <= MAX_ERROR for number in error.values() if number is not None)  # NaN is not
            errors[name] = {**error, "fine": fine, "seconds": seconds}
        before()
        return errors

    def count(self, cases: list[Case], autotune: Callable[[Case], bool]) -> None:
        """Launches of each implementation (GPU). After all timing: what the profiler loads slows launches down."""
        for case in cases if self.device == "cuda" else ():
            if self.spent() > self.budget:
                self.skip(case, f"launches not counted: the run's budget of {self.budget:g} s was spent")
                continue
            batch = make_inputs(case, self.device)
            calls, before = make_calls(case, batch, self.device, autotune(case)), make_before(batch)
            failed = timing.warm_up(calls, device=self.device, before=before)
            for name, call in calls.items():
                if name in failed:
                    continue
                launches = len(launched(call, before))
                for entry in self.results["cases"]:
                    if {**entry, **case.fields()} == entry and name in entry["results"]:
                        entry["results"][name]["launches"] = launches
        self.save()


def make_calls(case: Case, batch: LossInputs, device: str, autotune: bool) -> dict[str, Callable[[], Tensor]]:
    """Returns name → the timed work: the loss, and in that mode ``backward``; it returns the loss, detached."""

    def forward(function: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return function()

    def both(function: Callable[[], Tensor]) -> Tensor:
        loss = function()
        loss.backward(batch.upstream)
        return loss.detach()

    work = both if case.mode == BOTH else forward
    functions = baselines.implementations(batch, device, autotune)
    return {name: functools.partial(work, function) for name, function in functions.items()}


def make_before(batch: LossInputs) -> Callable[[], None]:
    """Returns what runs before every call: it clears the gradient, and begins a new step for CUDA graphs."""
    model = batch.model_pred

    def before() -> None:
        model.grad = None
        if model.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()

    return before


def derive(entry: dict[str, Any], copy_gb_s: float) -> None:
    """Fills in what follows from times, bytes and copy bandwidth: ``floor_ms``, ``gb_s``, ``of_copy``."""
    entry["floor_ms"] = entry["floor_bytes"] / copy_gb_s / 1e6
    for result in entry["results"].values():
        result["gb_s"] = entry["floor_bytes"] / (result["device_ms"] or result["wall_ms"])["median"] / 1e6
        result["of_copy"] = result["gb_s"] / copy_gb_s


def lacks_memory(case: Case, device: str) -> str | None:
    """Why a case does not fit into memory, by a rough estimate of what plain torch needs; ``None`` if it does."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    need, free = case.input_bytes + 24 * case.elements, machine.memory_bytes(device)
    if 0 < 0.85 * free < need:
        return f"needs about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return None


def print_entry(entry: dict[str, Any], auto: str) -> None:
    """A line for each implementation: times with quartiles, share of the copy bandwidth, memory."""
    shape = "×".join(map(str, entry["shape"]))
    print(f"\n[{shape}] {Case.of(entry).name}, {entry['state']}: floor {entry['floor_ms']:.3f} ms")
    ours = entry["results"].get(auto)
    for name, result in entry["results"].items():
        cells = []
        for kind in ("wall_ms", "host_ms", "device_ms"):
            if result[kind]:
                low, high = result[kind]["quartiles"]
                cells.append(f"{kind[:-3]} {result[kind]['median']:9.3f} ms [{low:.3f}, {high:.3f}]")
        if ours:
            cells.append(f"{result['wall_ms']['median'] / ours['wall_ms']['median']:6.2f}x")
        cells.append(f"{result['of_copy']:5.0%} of copy")
        if result["extra_mb"] is not None:
            cells.append(f"+{result['extra_mb']:.1f} MB")
        print(f"  {name:24} {'  '.join(cells)}  ({result['wall_ms']['runs']} runs)", flush=True)


def default_output(kind: str, device: str, partial: bool = False) -> Path:
    """``benchmarks/results/kernel-cpu.json``, ``kernel-nvidia-h100-80gb-hbm3.json``; ``out/bench/`` for a partial run.

    What measures only some cases must not take the place of what measured all.
    """
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device).lower().replace(" ", "-").replace("/", "-")
    return (machine.ROOT / "out" / "bench" if partial else timing.RESULTS) / f"{kind}-{name}.json"


def make_parser(
    kind: str, doc: str | None, seconds: Mapping[str, float], budget: Mapping[str, float] | None = None
) -> argparse.ArgumentParser:
    """The parser of a benchmark with the options that all have; ``seconds`` and ``budget`` are defaults by device."""

    def by_device(numbers: Mapping[str, float]) -> str:
        return ", ".join(f"{number:g} on {device}" for device, number in numbers.items())

    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{kind}", description=(doc or "").splitlines()[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=machine.default_device(), help="default %(default)s"
    )
    parser.add_argument("--seconds", type=float, help=f"time for each case (default {by_device(seconds)})")
    parser.add_argument("--quick", action="store_true", help="a few small cases, or a short time, to see that it works")
    if budget is not None:
        parser.add_argument("--budget", type=float, help=f"seconds for the whole run (default {by_device(budget)})")
        parser.add_argument("--only", metavar="REGEX", help="cases whose name matches, e.g. 'Wan.*bfloat16, forward$'")
    place = f"benchmarks/results/{kind}-<device>.json; out/bench for a part of the cases"
    parser.add_argument("--output", type=Path, help=f"results file (default {place})")
    return parser


def new_results(kind: str, device: str, copy: timing.CopyBandwidth | None = None, **options: Any) -> dict[str, Any]:
    """A results file's content before any case, after saying what is measured, first of all whether that is a GPU."""
    results: dict[str, Any] = {
        "kind": kind,
        "machine": machine.describe(device),
        "auto": baselines.OURS + backends.choose("auto", torch.device(device)),
        "options": options,
        "complete": False,
        "copy_bandwidth_gb_s": copy.summary() if copy else {},
        "cases": [],
        "skipped": [],
    }
    if device == "cpu":
        print("no GPU is measured: these are the CPU backends")
    print(machine.caption(results["machine"]), flush=True)
    if copy is not None:
        low, high = copy.summary()["quartiles"]
        print(f"copy bandwidth {copy.median:.1f} GB/s [{low:.1f}, {high:.1f}]", flush=True)
    return results


def run_cases(
    results: dict[str, Any], cases: Sequence[Any], output: Path,
    measure: Callable[[Any], tuple[dict[str, Any], dict[str, str]]],
) -> dict[str, Any]:  # fmt: skip
    """Measures one case after another, and writes the results file after each.

    Args:
        results: of :func:`new_results`; filled in and returned.
        cases: each has a ``label``.
        output: the results file.
        measure: a case → its entry, and what was left out of it: name → why.
    """
    begin = time.perf_counter()
    for case in cases:
        try:
            entry, failed = measure(case)
            results["cases"].append(entry)
        except torch.OutOfMemoryError as error:
            failed = {"": f"out of memory: {str(error).splitlines()[0][:200]}"}
        except ImportError as error:
            failed = {"": str(error)}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for name, why in failed.items():
            print(f"{case.label}: {name or 'the whole case'} is left out: {why}", flush=True)
            results["skipped"].append({"label": case.label, "implementation": name, "reason": why})
        timing.write(results, output)
    results["complete"] = True
    timing.write(results, output)
    print(f"\n{len(results['cases'])} entries, {time.perf_counter() - begin:.0f} s: {output}")
    return results
