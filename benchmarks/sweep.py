"""Where launch overhead ends and bandwidth begins: ``python -m benchmarks.sweep``.

Forward + backward of 4 pairs as training has them (predictions in bfloat16, ``--dtypes float32`` for others; a target
in float32, an upstream gradient of 1/8), from 2^12 elements of the stacked predictions to 2^31 on a GPU (as memory
allows) and 2^27 on a CPU. Same implementations, timing and results file as ``benchmarks.kernel``; cold and warm caches.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.cases import DTYPES, TRAINED, select, sweep_cases
from benchmarks.suite import Suite, make_parser

BUDGET = {"cuda": 240.0, "cpu": 240.0}
SECONDS = {"cuda": 0.8, "cpu": 2.0}
LOW, HIGH = 12, {"cuda": 31, "cpu": 27}
QUICK_HIGH = 16
STATES = ("cold", "warm")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the options ask for; returns the results file's content."""
    suite = Suite.of_options("sweep", args, SECONDS, BUDGET)
    high = args.high or (QUICK_HIGH if args.quick else HIGH[args.device])
    suite.run(select(sweep_cases(args.low, high, tuple(args.dtypes)), args.only), STATES)
    return suite.finish()


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("sweep", __doc__, SECONDS, BUDGET)
    parser.add_argument("--low", type=int, default=LOW, help="smallest power of two (default %(default)s)")
    parser.add_argument("--high", type=int, help=f"largest (default {HIGH['cuda']} on a GPU, {HIGH['cpu']} on a CPU)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=[TRAINED], help="of the predictions (default %(default)s)"
    )
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
