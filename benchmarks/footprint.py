"""What a call costs besides time: memory beyond its inputs, and launches. Measured outside of all timing."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Call, sync

# Kineto, which records for torch.profiler, else reports each start and stop on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def extra_memory_mb(call: Call, *, device: str, before: Call | None = None) -> float:
    """Returns the peak of torch's allocations during one call beyond what was there before, in MB (1e6 bytes).

    A GPU's allocator counts; on a CPU the profiler's record of allocations is summed in order of time. What is not
    torch's (a C++ library's scratch on the stack, Triton's module) is not in it.
    """
    if before is not None:
        before()
    if torch.device(device).type == "cuda":
        sync(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        call()
        sync(device)
        return (torch.cuda.max_memory_allocated(device) - start) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 1e6


def launched(call: Call, before: Call = lambda: None) -> list[str]:
    """Returns names of the kernels, copies and fills that one call gives the GPU, by torch's profiler.

    ``before`` runs before the call, outside the profile. Profile last: what the profiler loads may slow down launches
    from then on.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first profile of a process may miss what ran while the tools were being loaded
        before()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return launches_in(json.loads(path.read_text(encoding="utf-8")))


def launches_in(trace: dict[str, Any]) -> list[str]:
    """Returns names of the kernels, copies and fills in a Chrome trace of torch's profiler."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") in kinds]
