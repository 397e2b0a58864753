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
        help="check that the files of a run are undamaged",
        description="Compares the configuration, checkpoints, logs, prompts and weights of a run with the hashes that "
        "it has written, and prints a line for each. The hashes of configuration, logs and prompts are written when "
        "a run ends. The exit status is 1 if a file is damaged. No file is changed.",
    )
    parser.add_argument("target", type=path, metavar="RUN", help="folder of a run, or a copy of its weights")
    parser.set_defaults(run=_verify)


@one_line_errors
def _verify(options: argparse.Namespace) -> int:
    from sipo.recipe.verify import verify_run

    items = verify_run(options.target)
    for item in items:
        print(item.describe())
    return 1 if any(item.fault for item in items) else 0
