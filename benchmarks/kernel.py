"""The pair loss against plain torch and torch.compile on latents of real training: ``python -m benchmarks.kernel``.

Measures every implementation (``baselines.py``) on every case (``cases.py``) with the caches cold and "in turn"
(``timing.py``), writes a results file (``suite.py``) after each case, and ends with a summary of the headline cases
(``kernel_summary.py``; ``--summary FILE`` prints it again). Timings are results, never assertions.

Without options a run ends within 8 minutes on a GPU and 10 on a CPU: cases come in the order of what they tell, the
headline cases are timed three times as long as the others, and what the budget does not reach is listed as skipped.
``--only`` picks cases by name, and a second run with another ``--only`` and ``--output`` adds the rest:
``benchmarks.plots`` and ``benchmarks.compare`` take several files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import baselines
from benchmarks.cases import BOTH, Case, is_headline, kernel_cases, select, table_cases
from benchmarks.kernel_summary import STATES, print_summary, summarize, table
from benchmarks.suite import Suite, make_parser

BUDGET = {"cuda": 470.0, "cpu": 570.0}
SECONDS = {"cuda": 0.6, "cpu": 1.2}
HEADLINE = 3.0  # times as long: their ratios are quoted
CPU_INPUT_BYTES = 256 << 20
CPU_MANY_PAIRS = ("SD1.5", "SDXL")
# The eager backend is written to be read: it takes many times as long as plain torch.
CPU_EAGER_ELEMENTS = 1 << 22
QUICK = r"^(SD1.5, 1 pair|SDXL, 4 pairs), bfloat16, (float32 target, )?upstream"


def why_not(case: Case, device: str, everything: bool) -> str | None:
    """Returns why a case is left out by default; ``None`` if it is not. A GPU measures all."""
    if device == "cuda" or everything:
        return None
    if case.dtype == "float16":
        return "float16 is not measured on a CPU by default (--all)"
    if case.input_bytes > CPU_INPUT_BYTES:
        limit = CPU_INPUT_BYTES >> 20
        return (
            f"inputs of {case.input_bytes >> 20} MiB; a CPU run leaves out what exceeds {limit} MiB by default (--all)"
        )
    if is_headline(case):
        return None
    if case.mode != BOTH and not (case.dtype == "bfloat16" and case.pairs == 4):
        return "the forward alone is measured in bfloat16, with 4 pairs, on a CPU by default (--all)"
    if case.dtype == "float32" and not (case.pairs == 4 or (case.pairs == 1 and case.label == "SD1.5")):
        return "float32 is measured with 4 pairs, and SD1.5's 1 pair, on a CPU by default (--all)"
    if case.pairs == 16 and case.label not in CPU_MANY_PAIRS:
        return f"16 pairs are measured for {' and '.join(CPU_MANY_PAIRS)} on a CPU by default (--all)"
    return None


def autotuned(choice: str, device: str) -> Callable[[Case], bool]:
    """Returns which cases torch.compile also gets max-autotune for: it compiles for seconds, so not all by default."""
    table = list(table_cases())

    def chosen(case: Case) -> bool:
        if choice == "auto":
            return device == "cuda" and case in table
        return choice == "all"

    return chosen


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the options ask for; returns the results file's content."""
    device = args.device
    suite = Suite.of_options("kernel", args, SECONDS, BUDGET, autotune=args.autotune)
    eager = baselines.OURS + "eager"
    if device == "cpu" and not args.all and suite.results["auto"] != eager:
        why = f"not measured from {CPU_EAGER_ELEMENTS} elements on, on a CPU by default (--all)"
        suite.too_slow[eager] = CPU_EAGER_ELEMENTS, why
    cases = []
    for case in select(kernel_cases(), args.only or (QUICK if args.quick else None)):
        reason = why_not(case, device, args.all)
        if reason is None:
            cases.append(case)
        else:
            suite.skip(case, reason)
    chosen = autotuned(args.autotune, device)
    reason = "CUDA graphs and GPU configurations are what it adds; on a CPU it is measured with --autotune all"
    if device == "cuda":
        reason = "by default max-autotune is measured for the cases of the table (--autotune all)"
    if not all(chosen(case) for case in cases):
        suite.skip(None, reason, implementation=baselines.AUTOTUNED)
    done = suite.run(cases, STATES, chosen, lambda case: HEADLINE if is_headline(case) else 1.0)
    suite.count([case for case in done if is_headline(case)], chosen)
    suite.results["summary"] = summarize(suite.results)
    results = suite.finish()
    print_losses(results)
    print_summary(results)
    return results


def print_losses(results: dict[str, Any]) -> None:
    """The cases in which something else is faster than what users of ours get, by the medians of wall time."""
    print("\nWhere another implementation is faster than ours (wall time):")
    auto, fastest = results["auto"], True
    for entry in results["cases"]:
        walls = {name: result["wall_ms"]["median"] for name, result in entry["results"].items()}
        others = {name: wall for name, wall in walls.items() if not name.startswith(baselines.OURS)}
        if auto not in walls or not others:
            continue
        best = min(others, key=lambda name: others[name])
        if others[best] < walls[auto]:
            case = f"{Case.of(entry).name}, {entry['state']}"
            print(f"  {case}: {best} {others[best]:.3f} ms, {auto} {walls[auto]:.3f} ms")
            fastest = False
    if fastest:
        print("  none of the cases measured")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("kernel", __doc__, SECONDS, BUDGET)
    parser.add_argument("--all", action="store_true", help="also what a CPU run leaves out by default")
    parser.add_argument(
        "--autotune",
        choices=("auto", "all", "none"),
        default="auto",
        help="cases torch.compile also gets mode='max-autotune' for (default: some on a GPU, none on a CPU)",
    )
    parser.add_argument(
        "--summary", metavar="FILE", type=Path, help="print a results file's summary and README's table of it, and end"
    )
    args = parser.parse_args(argv)
    if args.summary:
        results = json.loads(args.summary.read_text(encoding="utf-8"))
        print_summary(results)
        print(f"\n{table(results)}")
    else:
        run(args)


if __name__ == "__main__":
    main()
