"""Where the time of a large call goes on a CPU: ``python -m benchmarks.parts``.

A pair of video latents is larger than a core's own caches, so the gradient reads policy and target a second time, from
the last-level cache. Timed in one run, for each case: the whole call of torch.compile and of ours, our forward alone,
that second reading for one pair that was just read (policy and target summed again, which is all that the gradient
reads), and plain writes of the gradient's bytes to memory that is in use and to new memory. Forward, re-reading and
write together are the least that the call could take with these parts as they are; what is left above is the kernel's.

Beside each part stand the bytes that it has to move, and its page faults: memory that an allocator maps again costs one
on the first write to each page.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, timing
from benchmarks.baselines import COMPILED
from benchmarks.cases import BETA, DTYPES, FORWARD, SHAPES, TARGET, TRAINED, UPSTREAM, Case, LossInputs, make_inputs
from benchmarks.machine import OthersLoad
from benchmarks.suite import default_output, make_before, make_calls, new_results, run_cases
from sipo_kernels import pair_loss

SECONDS = 6.0
# The cases without options: the videos of the headline table, and with more pairs.
LABEL, PAIRS, TARGETS, UPSTREAMS = "Wan 480p", (1, 4), (TARGET, TRAINED), (UPSTREAM, 1.0)
COMPILE, CALL, FORWARD_PART = "torch.compile, whole call", "native, whole call", "native, forward"
AGAIN = "native, one pair's policy and target again"
USED, NEW = "a write of the gradient's size, memory in use", "a write of the gradient's size, new memory"
FAULT_RUNS = 9

Call = Callable[[], Any]


def calls_of(case: Case, batch: LossInputs) -> dict[str, Call]:
    """Returns the calls that are timed, by name."""
    whole = make_calls(case, batch, "cpu", autotune=False)
    forward = baselines.ours("native", batch)
    model = batch.model_pred.detach()
    one, one_target = model[:2].clone(), batch.target[: 1 if case.shared_target else 2].clone()
    scale, error = torch.ones(2), torch.ones(2)
    used = torch.ones(model.nbytes, dtype=torch.uint8)

    def forward_alone() -> Tensor:
        with torch.no_grad():
            return forward()

    def again() -> Tensor:
        options: dict[str, Any] = {"ratio_scale": scale, "ref_error": error, "backend": "native"}
        with torch.no_grad():
            return pair_loss(one, None, one_target, method="sipo", beta=BETA, **options).loss

    return {
        COMPILE: whole[COMPILED],
        CALL: whole[baselines.OURS + "native"],
        FORWARD_PART: forward_alone,
        USED: lambda: used.fill_(1),
        NEW: lambda: torch.empty_like(used).fill_(1),
        AGAIN: again,
    }


def bytes_of(case: Case) -> dict[str, int]:
    """Returns the bytes that each part has to move, from memory or, where it reads again, from a cache."""
    return {
        COMPILE: case.floor_bytes,
        CALL: case.floor_bytes,
        FORWARD_PART: replace(case, mode=FORWARD).floor_bytes,
        USED: case.tensor_bytes,
        NEW: case.tensor_bytes,
        AGAIN: (case.tensor_bytes + case.target_bytes) // case.pairs,
    }


def page_faults(calls: Mapping[str, Call], before: Call, runs: int = FAULT_RUNS) -> dict[str, dict[str, Any]]:
    """Counts minor page faults of this process during one call, in turns: median and quartiles, by name."""

    def so_far() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            before()
            start = so_far()
            call()
            found[name].append(so_far() - start)
    return {name: timing.summary(values) for name, values in found.items()}


def measure_parts(case: Case, seconds: float, copy: timing.CopyBandwidth) -> tuple[dict[str, Any], dict[str, str]]:
    """Measures a case; returns its entry in the results file, and the parts that failed: name → why."""
    batch = make_inputs(case, "cpu")
    calls, before = calls_of(case, batch), make_before(batch)
    failed = timing.warm_up(calls, device="cpu", before=before)
    calls = {name: call for name, call in calls.items() if name not in failed}
    again = {AGAIN: calls.pop(AGAIN)}
    copy.measure("between", 15)
    load = OthersLoad()
    times = timing.time_alternately(calls, seconds=seconds, device="cpu", before=before, state="in turn")
    times |= timing.time_alternately(again, seconds=seconds / 6, device="cpu", state="warm")
    faults, moved = page_faults(calls | again, before), bytes_of(case)
    results = {name: {**t.summary(), "bytes": moved[name], "page_faults": faults[name]} for name, t in times.items()}
    medians = {name: result["wall_ms"]["median"] for name, result in results.items()}
    least = medians[FORWARD_PART] + case.pairs * medians[AGAIN] + medians[USED]
    print(f"\n{case.name}")
    for name, result in results.items():
        low, high = result["wall_ms"]["quartiles"]
        rate = f"{moved[name] / 1e6:8.1f} MB {moved[name] / medians[name] / 1e6:7.1f} GB/s"
        print(f"  {name:46}{medians[name]:8.3f} ms [{low:.3f}, {high:.3f}] {rate}", end="")
        print(f" {faults[name]['median']:8.0f} page faults", flush=True)
    print(f"  {'forward, re-reading of all pairs, write in use':46}{least:8.3f} ms")
    entry = {**case.fields(), "state": "in turn", "elements": case.elements, "floor_bytes": case.floor_bytes}
    return {**entry, "others_cores": load.cores(), "results": results, "least_ms": least}, failed


def run(cases: Sequence[Case], seconds: float, output: Path) -> dict[str, Any]:
    """Measures and returns the results file's content."""
    copy = timing.CopyBandwidth("cpu")
    results = new_results("parts", "cpu", seconds=seconds)

    def measure(case: Case) -> tuple[dict[str, Any], dict[str, str]]:
        entry, failed = measure_parts(case, seconds, copy)
        results["copy_bandwidth_gb_s"] = copy.summary()
        for other in (*results["cases"], entry):
            other["floor_ms"] = other["floor_bytes"] / copy.median / 1e6
        return entry, failed

    run_cases(results, cases, output, measure)
    print(f"\nat the copy bandwidth of {copy.median:.1f} GB/s:")
    for entry in results["cases"]:
        print(f"  {entry['floor_ms']:8.3f} ms  {Case.of(entry).name}")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__.splitlines()[0])
    parser.add_argument("--label", choices=SHAPES, default=LABEL, help="whose latents (default %(default)s)")
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS, help="default %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default=TRAINED, help="of the predictions (default %(default)s)")
    parser.add_argument("--target", choices=DTYPES, nargs="+", default=TARGETS, help="its types (default %(default)s)")
    parser.add_argument("--upstream", type=float, nargs="+", default=UPSTREAMS, help="default %(default)s")
    parser.add_argument(
        "--shared-target", action="store_true", help="chosen and rejected sample of a pair have one target"
    )
    parser.add_argument("--ref-error", action="store_true", help="the reference's errors are numbers")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each case (default %(default)s)")
    parser.add_argument("--output", type=Path, help="results file")
    args = parser.parse_args(argv)

    def cases_of(label: str, dtype: str, pairs: Any, targets: Any, upstreams: Any) -> list[Case]:
        kinds = product(pairs, targets, upstreams)
        return [Case(label, SHAPES[label], n, dtype, target, upstream=u) for n, target, u in kinds]

    fields = {"shared_target": args.shared_target, "ref_error": args.ref_error}
    chosen = cases_of(args.label, args.dtype, args.pairs, args.target, args.upstream)
    cases = [replace(case, **fields) for case in chosen]
    usual = cases_of(LABEL, TRAINED, PAIRS, TARGETS, UPSTREAMS)
    run(cases, args.seconds, args.output or default_output("parts", "cpu", partial=cases != usual))


if __name__ == "__main__":
    main()
