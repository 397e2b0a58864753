"""Whole optimiser steps of ``sipo.training`` beside a hand-written loop's: ``python -m benchmarks.training``.

A step is everything from one update of the weights to the next: loading the batch, noise, forward passes, loss,
backward, clipping, AdamW and, in ours, metrics and log lines (one in ten steps; no progress bar, no TensorBoard). The
hand-written loop (``training_baseline.py``) has the published loss and no log at all. All of them train the same
networks with the same AdamW on the same pairs, in chunks of some steps, in a random order each round. ``ratio`` is
the mean step of a chunk over the mean step of the hand-written loop's chunk in the same round: log lines count, and a
slow moment of the machine meets both.

First of all, a process of its own trains for ``--steps`` steps and says how much memory it has on the way
(``training_memory.py``). Before anything is timed, each implementation's gradient is compared with the hand-written
loop's on the same draws. Timings are results, never assertions.
"""

from __future__ import annotations

import functools
import gc
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.footprint import extra_memory_mb
from benchmarks.machine import OthersLoad
from benchmarks.suite import default_output, make_parser, new_results, run_cases
from benchmarks.training_implementations import COUNTED, HAND, HAND_LORA, SKIPPED, Bench, Clock
from benchmarks.training_memory import growth, print_growth
from benchmarks.training_setup import TrainingCase, make_setup

MIN_ROUNDS = 2
SECONDS = {"cpu": 75.0, "cuda": 60.0}

_WAN_WIDTH = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 1536}
CASES = {
    "cpu": [
        TrainingCase("SD1.5, toy", "sd15", 4, {"block_out_channels": (32, 64)}, pixels=(128, 128, 1)),
        TrainingCase("SDXL, toy", "sdxl", 4, {"block_out_channels": (32, 64)}, pixels=(128, 128, 1)),
        TrainingCase(
            "CogVideoX, toy", "cogvideox", 2,
            {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3}, pixels=(64, 64, 9),
        ),
        TrainingCase(
            "Wan, toy", "wan", 2,
            {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 3}, pixels=(64, 64, 9),
        ),
    ],
    "cuda": [
        TrainingCase(
            "SD1.5 at 512 pixels, one layer in each block", "sd15", 4,
            {"layers_per_block": 1, "cross_attention_dim": 768},
            sample=(4, 64, 64), text=(77, 768), precision="bf16",
        ),
        TrainingCase(
            "Wan 480p, 1.3B's width with 2 of 30 layers", "wan", 1, {**_WAN_WIDTH, "num_layers": 2},
            sample=(16, 21, 60, 104), text=(512, 1536), precision="bf16",
        ),
    ],
}  # fmt: skip
TINY = [
    TrainingCase("SD1.5, tiny", "sd15", 2, pixels=(32, 32, 1)),
    TrainingCase("Wan, tiny", "wan", 2, pixels=(32, 32, 5)),
]


def measure_case(
    case: TrainingCase, device: str, seconds: float, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measures one case; returns its entry in the results file, and the implementations left out: name → why.

    Raises:
        ImportError: a package is missing that the case needs.
    """
    setup = make_setup(case, device, folder)
    bench = Bench(setup, device, folder)
    gradient_errors, failed = bench.errors()
    calls = {way.name: functools.partial(bench.run, way) for way in bench.implementations if way.name not in failed}
    load = OthersLoad()
    rounds = _rounds(calls, bench.clock, seconds)
    entry: dict[str, Any] = {
        "label": case.label,
        "network": setup.network,
        "parameters": sum(p.numel() for p in setup.base.parameters()),
        "pairs": case.batch_size,
        "sample": list(setup.pairs[0]["chosen"].shape),
        "precision": case.precision,
        "others_cores": load.cores(),
        "rounds": len(next(iter(rounds.values()), [])),
        "results": {},
    }
    for way in bench.implementations:
        if way.name not in rounds:
            continue
        chunks, base = rounds[way.name], rounds.get(HAND_LORA if way.lora else HAND)
        result: dict[str, Any] = {
            "step_ms": timing.summary([step for chunk, _ in chunks for step in chunk]),
            "host_ms": timing.summary([step for _, chunk in chunks for step in chunk]) if device == "cuda" else None,
            "gradient_error": gradient_errors[way.name],
            "resident_mb": bench.resident_mb(way),
            "step_mb": extra_memory_mb(functools.partial(bench.run, way, 2), device=device),
        }
        result["peak_mb"] = result["resident_mb"] + result["step_mb"]
        if base is not None:
            each = zip(chunks, base, strict=True)
            ratio = timing.summary([sum(ours) / sum(hand) for (ours, _), (hand, _) in each])
            result.update(ratio=ratio, target=way.target)
            result["met"] = None if way.target is None else ratio["median"] <= way.target
        entry["results"][way.name] = result
    return entry, bench.missing | failed


def _rounds(
    calls: Mapping[str, Callable[[int], None]], clock: Clock, seconds: float
) -> dict[str, list[tuple[list[float], list[float]]]]:
    """Returns name → for each round, milliseconds of each counted step on the device and on the host."""
    chunk = SKIPPED + COUNTED + 1
    order, draw = list(calls), random.Random(0)
    for call in calls.values():  # what is made once: AdamW's moments, buffers, modules
        call(SKIPPED)
    clock.steps()
    rounds: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in calls}
    begin, done = time.perf_counter(), 0
    # Another round only where it will end in time.
    while calls and (done < MIN_ROUNDS or (time.perf_counter() - begin) * (done + 1) / done <= seconds):
        draw.shuffle(order)
        for name in order:
            gc.collect()  # one implementation's garbage is not collected at another's expense
            calls[name](chunk)
            rounds[name].append(clock.steps())
        done += 1
    return rounds


def print_entry(entry: dict[str, Any]) -> None:
    """A line for each implementation: the step, over the hand-written loop's, memory."""
    shape = "×".join(map(str, entry["sample"]))
    print(
        f"\n{entry['label']}: {entry['network']}, {entry['parameters'] / 1e6:.2f}M parameters, "
        f"{entry['pairs']} pairs of {shape}, {entry['rounds']} rounds, others kept {entry['others_cores']} cores busy"
    )
    for name, result in entry["results"].items():
        low, high = result["step_ms"]["quartiles"]
        cells = [f"step {result['step_ms']['median']:8.2f} ms [{low:.2f}, {high:.2f}]"]
        if result["host_ms"] is not None:
            cells.append(f"host {result['host_ms']['median']:7.2f} ms")
        if "ratio" in result:
            low, high = result["ratio"]["quartiles"]
            cells.append(f"ratio {result['ratio']['median']:.3f} [{low:.3f}, {high:.3f}]")
        cells.append(f"peak {result['peak_mb']:.1f} MB, {result['resident_mb']:.1f} between steps")
        if result.get("met") is not None:
            cells.append(f"target {result['target']:.1f} {'met' if result['met'] else 'missed'}")
        print(f"  {name:38} {'  '.join(cells)}", flush=True)


def run(cases: Sequence[TrainingCase], device: str, seconds: float, steps: int, output: Path) -> dict[str, Any]:
    """Measures memory over ``steps`` steps, then ``cases`` for ``seconds`` each; returns the file's content."""
    chunk = {"skipped": SKIPPED, "counted": COUNTED}
    results = new_results("training", device, seconds=seconds, steps=steps, chunk=chunk) | {"memory": None}
    if steps:
        results["memory"], why = growth(steps, device)
        if results["memory"] is None:
            print(f"memory is left out: {why}", flush=True)
            results["skipped"].append({"label": "memory", "implementation": "", "reason": why})
        else:
            print_growth(results["memory"])

    def measure(case: TrainingCase) -> tuple[dict[str, Any], dict[str, str]]:
        with tempfile.TemporaryDirectory() as folder:
            entry, failed = measure_case(case, device, seconds, Path(folder))
        print_entry(entry)
        return entry, failed

    return run_cases(results, cases, output, measure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("training", __doc__, SECONDS)
    parser.add_argument("--steps", type=int, help="of the memory run (default 2000); 0 leaves it out")
    args = parser.parse_args(argv)
    seconds = args.seconds if args.seconds is not None else (4.0 if args.quick else SECONDS[args.device])
    steps = args.steps if args.steps is not None else (100 if args.quick else 2000)
    output = args.output or default_output("training", args.device, partial=args.quick)
    run(TINY if args.quick else CASES[args.device], args.device, seconds, steps, output)


if __name__ == "__main__":
    main()
