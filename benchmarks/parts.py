"""Where the time of a large call goes on a CPU: ``python -m benchmarks.parts``.

A pair of video latents is larger than a core's own caches, so the gradient reads policy and target a second time, from
the last-level cache. Timed in one run, for 4 Wan 480p pairs: the whole call, its forward alone (3N·b from memory), that
second reading of one pair that was just read (policy and target summed again, which is all that the gradient reads),
and plain writes of the gradient's bytes to memory that is in use and to new memory. Forward + re-reading + write is the
least that the call could take with these parts as they are; what is left above it is the kernel's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.baselines import COMPILED
from benchmarks.cases import BETA, BOTH, FORWARD, SHAPES, Case, make_inputs
from benchmarks.suite import default_output, make_before, make_calls
from sipo_kernels import pair_loss

SECONDS = 6.0
LABEL = "Wan 480p"
COMPILE, CALL, FORWARD_PART = "torch.compile, whole call", "native, whole call", "native, forward"
AGAIN = "native, one pair's policy and target again"
USED, NEW = "a write of the gradient's size, memory in use", "a write of the gradient's size, new memory"


def calls_of(pairs: int, dtype: str) -> tuple[dict[str, Callable[[], Any]], Callable[[], None]]:
    """What is timed, and what runs before each call."""
    inputs = make_inputs(Case(LABEL, SHAPES[LABEL], pairs, dtype, BOTH), "cpu")
    whole = make_calls(Case(LABEL, SHAPES[LABEL], pairs, dtype, BOTH), inputs, "cpu", autotune=False)
    forward = make_calls(Case(LABEL, SHAPES[LABEL], pairs, dtype, FORWARD), inputs, "cpu", autotune=False)
    model = inputs[0].detach()
    one, one_target = model[:2].clone(), inputs[2][:2].clone()
    scale, error = torch.ones(2), torch.ones(2)
    used = torch.ones(model.numel() * model.element_size(), dtype=torch.uint8)

    def again() -> Tensor:
        options: dict[str, Any] = {"ratio_scale": scale, "ref_error": error, "backend": "native"}
        with torch.no_grad():
            return pair_loss(one, None, one_target, method="sipo", beta=BETA, **options).loss

    calls = {
        **({COMPILE: whole[COMPILED]} if COMPILED in whole else {}),
        CALL: whole["sipo native"],
        FORWARD_PART: forward["sipo native"],
        USED: lambda: used.fill_(1),
        NEW: lambda: torch.empty_like(used).fill_(1),
    }
    return calls | {AGAIN: again}, make_before(inputs)


def measure_parts(pairs: int, dtype: str, seconds: float, copy: measure.CopyBandwidth) -> dict[str, Any]:
    """One entry of the results file."""
    calls, before = calls_of(pairs, dtype)
    measure.warm_up(calls, device="cpu", before=before)
    again = {AGAIN: calls.pop(AGAIN)}
    copy.measure("between", 15)
    times = measure.time_alternately(calls, seconds=seconds, device="cpu", before=before, state="in turn")
    times |= measure.time_alternately(again, seconds=seconds / 6, device="cpu", state="warm")
    results = {name: t.summary() for name, t in times.items()}
    medians = {name: result["wall_ms"]["median"] for name, result in results.items()}
    least = medians[FORWARD_PART] + pairs * medians[AGAIN] + medians[USED]
    case = Case(LABEL, SHAPES[LABEL], pairs, dtype, BOTH)
    print(f"{case.name}")
    for name, result in results.items():
        low, high = result["wall_ms"]["quartiles"]
        print(f"  {name:<48}{medians[name]:8.3f} ms [{low:.3f}, {high:.3f}]")
    print(f"  {'forward, re-reading of all pairs, write in use':<48}{least:8.3f} ms")
    return {**case.fields(), "state": "in turn", "floor_bytes": case.floor_bytes, "results": results, "least_ms": least}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and returns the results file's content."""
    results: dict[str, Any] = {"kind": "parts", "machine": measure.machine("cpu"), "cases": []}
    copy = measure.CopyBandwidth("cpu")
    results["cases"] = [measure_parts(args.pairs, dtype, args.seconds, copy) for dtype in ("bfloat16", "float32")]
    results["copy_bandwidth_gb_s"] = copy.summary()
    for entry in results["cases"]:
        entry["floor_ms"] = entry["floor_bytes"] / copy.median / 1e6
        print(f"{entry['dtype']}: {entry['floor_ms']:.3f} ms at the copy bandwidth of {copy.median:.1f} GB/s")
    measure.write(results, args.output or default_output("parts", "cpu", partial=args.pairs != 4))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a Wan 480p batch (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each table (default %(default)s)")
    parser.add_argument("--output", type=Path, help="results file")
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
