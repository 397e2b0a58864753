"""``sipo data check``: lists what is wrong with preference data."""

from __future__ import annotations

import argparse
from typing import Any

from sipo.cli.arguments import add_max_pixels, at_least, path, path_or_id, positive
from sipo.cli.errors import one_line_errors


def add(commands: Any) -> None:
    """Adds the command ``data``, with ``check`` below it, to the parser's subcommands."""
    data = commands.add_parser("data", help="inspect preference data").add_subparsers(required=True, metavar="COMMAND")
    parser = data.add_parser(
        "check",
        help="list the pairs that training could not use",
        description="Reads every pair and lists the faults by row. The exit status is 0 if training can use all pairs.",
    )
    parser.add_argument("path", type=path_or_id, help="JSONL file, parquet files, hub id, or VideoDPO folder")
    parser.add_argument(
        "--format", choices=("auto", "jsonl", "pickapic", "videodpo"), default="auto", help="format of PATH"
    )
    parser.add_argument("--split", default="train", help="split of a data set that has several")
    parser.add_argument("--frames", type=at_least(1), help="frames of each clip that training will use")
    parser.add_argument("--fps", type=positive, help="frames per second at which training will read them")
    parser.add_argument("--limit", type=at_least(1), help="check at most this many rows, from the first")
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="read a data set of the hub row by row, without downloading all of it first",
    )
    parser.add_argument(
        "--rows", type=at_least(0), default=5, help="rows to list for each kind of fault (default %(default)s)"
    )
    add_max_pixels(parser)
    parser.add_argument("--json", type=path, metavar="FILE", help="JSON file to write, with every row of the report")
    parser.set_defaults(run=_check)


@one_line_errors
def _check(options: argparse.Namespace) -> int:
    from sipo.data.check import run_check

    arguments = {name: value for name, value in vars(options).items() if name not in ("run", "json")}
    return run_check(**arguments, json_file=options.json)
