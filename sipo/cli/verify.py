"""``sipo verify``: compares what a run has written with the hashes that it has kept."""

from __future__ import annotations

import argparse
from typing import Any

from sipo.cli.arguments import path
from sipo.cli.errors import one_line_errors


def add(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser(
        "verify",
        help="is all that a run has written still as it was written?",
        description="Reads a run's configuration, checkpoints, logs, prompts and weights, compares them with the "
        "hashes that the run has written (of configuration, logs and prompts when it ended) and prints a line for "
        "each. Exit status 1 where something is damaged. Nothing is changed.",
    )
    parser.add_argument("target", type=path, metavar="RUN", help="folder of a run, or of weights copied from one")
    parser.set_defaults(run=_verify)


@one_line_errors
def _verify(options: argparse.Namespace) -> int:
    from sipo.recipe.verify import verify_run

    items = verify_run(options.target)
    for item in items:
        print(item.describe())
    return 1 if any(item.fault for item in items) else 0
