"""``sipo precompute``: encodes the pairs of a configuration before training."""

from __future__ import annotations

import argparse
from typing import Any

from sipo.cli.arguments import add_config
from sipo.cli.errors import one_line_errors


def add(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser(
        "precompute",
        help="encode the pairs of a configuration before training",
        description="Writes latents, text embeddings and, with data.reference_errors, the errors of the reference to "
        "data.cache. Files that exist are checked and kept, so an interrupted command continues where it stopped; "
        "pairs that have changed are encoded again.",
    )
    add_config(parser)
    parser.add_argument(
        "--verify", action="store_true", help="read every file again, even if its size, times and inode are unchanged"
    )
    parser.set_defaults(run=_precompute)


@one_line_errors
def _precompute(options: argparse.Namespace) -> int:
    from sipo.recipe.build import open_run
    from sipo.recipe.config import load_config
    from sipo.recipe.preflight import check_run
    from sipo.recipe.prepare_data import prepare_data

    config = load_config(options.config, options.overrides)
    run = open_run(config)
    check_run(run, "precompute")
    summary = prepare_data(run, repair=True, verify=options.verify, progress=config.training.progress).summary
    if run.accelerator.is_main_process and summary is not None:
        print(summary.describe())
    return 0
