"""Common code of the benchmarks: fair timing, cache states, copy bandwidth, results files.

Every suite uses it the same way::

    copy = CopyBandwidth(device)
    copy.measure("start")
    warm_up(calls, device=device, before=before)
    times = time_alternately(calls, seconds=2, device=device, before=before, state="cold")
    results = {name: t.summary() for name, t in times.items()}      # {"wall_ms": {...}, "host_ms": ..., ...}

What is timed:

- ``wall_ms``: host time from the call until its result is there (the device synchronised).
- ``host_ms`` (GPU): host time until the call returns: how long Python is kept busy. No synchronisation inside.
- ``device_ms`` (GPU): time between two events around the call, with everything queued behind a spinning kernel
  before the first event fires, so that gaps between launches do not count.

Cache states, each a pass of its own:

- ``"cold"``: a buffer of four times the last cache is written, then read, before each timed call. Data, and on a CPU
  Python's own data, come from memory. The nearest to training, where a network ran in between.
- ``"in turn"``: nothing between calls; another implementation has just run on the same inputs.
- ``"warm"``: the same implementation has just run on the same inputs.

Implementations take turns, and the order is drawn again for each turn: a slow moment of the machine affects all of
them, and none always follows the same other one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"
STATES = ("cold", "in turn", "warm")
MIN_RUNS = 7
# An implementation that has taken this many times its share of the time is content with three runs.
PATIENCE = 3.0
MAX_HOLD_MS = 50.0

Call = Callable[[], Any]


@dataclass
class Times:
    """Milliseconds of one implementation in one cache state; one number for each run."""

    wall_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    # Runs whose device time has gaps in it, because the call waits for the device on the host.
    with_gaps: int = 0

    def summary(self) -> dict[str, Any]:
        """``{"wall_ms", "host_ms", "device_ms"}``, each as :func:`summary` or ``None`` where there is no GPU."""
        times = {"wall_ms": self.wall_ms, "host_ms": self.host_ms, "device_ms": self.device_ms}
        gaps = {"device_ms_with_host_gaps": self.with_gaps} if self.with_gaps else {}
        return {name: summary(values) if values else None for name, values in times.items()} | gaps


def summary(values: list[float]) -> dict[str, Any]:
    """Returns ``{"median", "quartiles": [low, high], "runs"}`` of ``values``, in their own unit."""
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "quartiles": [low, high], "runs": len(values)}


def sync(device: str) -> None:
    """Waits until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(
    calls: Mapping[str, Call], *, device: str, before: Call | None = None, runs: int = 5, seconds: float = 1.0
) -> dict[str, str]:
    """Runs each call a few times: compilation, autotuning, module load, allocator. Nothing of it is timed.

    Args:
        calls: name → what to run.
        device: ``"cuda"`` or ``"cpu"``.
        before: runs before every call.
        runs: how often each is run.
        seconds: after the first run, stop early once the following ones took so long.

    Returns:
        Name → error, of the calls that failed (out of memory, a compiler error); time the others.
    """
    failed = {}
    for name, call in calls.items():
        first = end = 0.0
        try:
            for _ in range(runs):
                if before is not None:
                    before()
                call()
                sync(device)
                end = time.perf_counter()
                first = first or end
                if end - first > seconds:
                    break
        except Exception as error:  # whatever an implementation dies of is a result, not the suite's end
            failed[name] = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"[:300]
    return failed


def time_alternately(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    device: str,
    before: Call | None = None,
    state: str = "in turn",
    min_runs: int = MIN_RUNS,
    device_times: bool = True,
    seed: int = 0,
) -> dict[str, Times]:
    """Times implementations in turns, in an order drawn again for each turn. Call :func:`warm_up` first.

    Args:
        calls: name → function of no arguments that does the work once.
        seconds: about how long to measure, all implementations together; each gets about the same share, so slow ones
            run less often. Each gets at least ``min_runs`` runs, or three if those take longer than ``PATIENCE`` times
            its share.
        device: ``"cuda"`` or ``"cpu"``.
        before: runs before every call, not timed: resets gradients and the like.
        state: one of ``STATES``.
        min_runs: fewest runs of each implementation.
        device_times: on a GPU, also measure ``device_ms`` (calls of their own in each turn).
        seed: of the order.

    Returns:
        Name → :class:`Times`.
    """
    if state not in STATES:
        raise ValueError(f"state={state!r}: expected one of {', '.join(STATES)}")
    on_gpu = torch.device(device).type == "cuda"
    flush = _flusher(device) if state == "cold" else None
    times = {name: Times() for name in calls}
    hold = dict.fromkeys(calls, 0.0)
    turns = _Turns(list(calls), seconds, min_runs, seed)

    def prepare(call: Call) -> None:
        if state == "warm":
            if before is not None:
                before()
            call()
        if before is not None:
            before()
        if flush is not None:
            flush()

    collecting = gc.isenabled()
    gc.disable()
    try:
        while order := turns.draw():
            for name in order:
                with turns.charged(name):
                    prepare(calls[name])
                    wall, host = _wall_once(calls[name], device)
                times[name].wall_ms.append(wall)
                if on_gpu:
                    times[name].host_ms.append(host)
                    hold[name] = max(hold[name], min(2 * host + 0.05, MAX_HOLD_MS))
            for name in order if on_gpu and device_times else ():
                with turns.charged(name):
                    _time_on_device(calls[name], prepare, hold, name, times[name])
    finally:
        if collecting:
            gc.enable()
    return times


class _Turns:
    """Whose turn it is: all in random order, slow ones less often, so that each gets about the same time.

    Nobody follows itself, and at least two take part in each turn (if there are two).
    """

    def __init__(self, names: list[str], seconds: float, min_runs: int, seed: int) -> None:
        self.spent, self.runs = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        self.share, self.min_runs = max(seconds, 1e-9) / max(len(names), 1), min_runs
        self.random, self.last = random.Random(seed), ""

    @contextlib.contextmanager
    def charged(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[name] += time.perf_counter() - start

    def progress(self, name: str) -> float:
        """Returns 1 or more once ``name`` has had its time and its runs; a slow one, once it ran three times."""
        time_had, runs = self.spent[name] / self.share, self.runs[name]
        return max(min(time_had, runs / self.min_runs), min(time_had / PATIENCE, runs / min(3, self.min_runs)))

    def draw(self) -> list[str]:
        """Returns the next turn; empty once all have had theirs."""
        progress = {name: self.progress(name) for name in self.spent}
        least = min(progress.values(), default=1.0)
        if least >= 1:
            return []
        order = [name for name in progress if progress[name] <= least + 0.1]
        if len(order) < 2:
            order = sorted(progress, key=lambda name: progress[name])[:2]
        self.random.shuffle(order)
        if order[0] == self.last:
            order.append(order.pop(0))
        for name in order:
            self.runs[name] += 1
        self.last = order[-1]
        return order


def _wall_once(call: Call, device: str) -> tuple[float, float]:
    """Times one call: milliseconds until the result is there, and until the call returned."""
    sync(device)
    start = time.perf_counter()
    call()
    returned = time.perf_counter()
    sync(device)
    return 1e3 * (time.perf_counter() - start), 1e3 * (returned - start)


def _time_on_device(
    call: Call, prepare: Callable[[Call], None], hold: dict[str, float], name: str, times: Times
) -> None:
    """Adds one ``device_ms``; holds the device for longer and tries again where the queue was not full in time."""
    while True:
        prepare(call)
        milliseconds, queued = _device_once(call, hold[name])
        if queued or hold[name] >= MAX_HOLD_MS:
            break
        hold[name] = min(2 * hold[name], MAX_HOLD_MS)
    times.device_ms.append(milliseconds)
    times.with_gaps += not queued


def _device_once(call: Call, hold_ms: float) -> tuple[float, bool]:
    """Device milliseconds of a call queued behind a spinning kernel, and whether all was queued before it ended."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(hold_ms * _cycles_per_ms()))
    start.record()
    call()
    end.record()
    queued = not start.query()
    torch.cuda.synchronize()
    return start.elapsed_time(end), queued


@lru_cache(maxsize=1)
def _cycles_per_ms() -> float:
    """Returns how many of ``torch.cuda._sleep``'s cycles take a millisecond."""
    cycles, rates = 5_000_000, []
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
        rates.append(cycles / start.elapsed_time(end))
    return max(rates)


@lru_cache(maxsize=2)
def _flusher(device: str) -> Call:
    """Returns a function that empties the caches of useful data: it writes a large buffer, then reads it.

    The read comes last, so that the timed call finds clean lines and is not charged for writing ours back.
    """
    buffer = torch.zeros(4 * max(machine.cache_bytes(device), 1 << 20) // 4, device=device)

    def flush() -> None:
        buffer.neg_()
        buffer.sum()

    return flush


class CopyBandwidth:
    """The machine's copy bandwidth in GB/s (1e9 bytes; read plus written), measured at several moments of a run."""

    def __init__(self, device: str) -> None:
        self.device = device
        on_gpu = torch.device(device).type == "cuda"
        size = max((1 << 30) if on_gpu else (128 << 20), 8 * machine.cache_bytes(device))
        if size > machine.memory_bytes(device) // 4 > 0:
            size = machine.memory_bytes(device) // 4
        self._source = torch.ones(size // 4, device=device)
        self._target = torch.empty_like(self._source)
        self._rates: dict[str, list[float]] = {}
        self._copy()

    def measure(self, moment: str = "between", runs: int = 5) -> float:
        """Copies ``runs`` times; returns the median and keeps all under ``moment`` (start, between, end)."""
        rates = [2 * self._source.nbytes / self._copy() / 1e6 for _ in range(runs)]
        self._rates.setdefault(moment, []).extend(rates)
        return statistics.median(rates)

    def _copy(self) -> float:
        """Returns milliseconds of one copy."""

        def copy() -> None:
            self._target.copy_(self._source)

        sync(self.device)
        if torch.device(self.device).type == "cuda":
            return _device_once(copy, 0.2)[0]
        return _wall_once(copy, self.device)[0]

    @property
    def median(self) -> float:
        """Over everything measured so far: what floors are computed from."""
        return statistics.median(rate for rates in self._rates.values() for rate in rates)

    def summary(self) -> dict[str, Any]:
        """Returns median, quartiles and runs over all, the same for each moment, and the copy's size."""
        everything = [rate for rates in self._rates.values() for rate in rates]
        return {
            **summary(everything),
            "moments": {moment: summary(rates) for moment, rates in self._rates.items()},
            "copied_mib": self._source.nbytes / 2**20,
        }


def write(results: dict[str, Any], path: Path) -> None:
    """Writes a results file aside and renames it, so that a cut-off run leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
