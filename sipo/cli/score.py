"""``sipo score``: implicit rewards of pairs by a trained model."""

from __future__ import annotations

import argparse
from typing import Any

from sipo.cli.arguments import add_overrides, path
from sipo.cli.errors import check_exists, one_line_errors


def add(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser(
        "score",
        help="compute implicit rewards of pairs from a trained model and its reference",
        description="Writes a line for each pair: the rewards of both samples and their margin, with standard errors "
        "over draws of noise. Prints how often the model prefers the chosen sample.",
    )
    parser.add_argument("target", type=path, help="folder of a run of `sipo train`, or its YAML file")
    add_overrides(parser, "settings that replace those of the run, for example other data")
    parser.add_argument("--weights", type=path, metavar="DIR", help="trained weights (default: weights of the run)")
    parser.add_argument(
        "--draws", type=int, default=16, help="draws of noise for each pair, an even number (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default %(default)s)")
    parser.add_argument(
        "--of",
        choices=("auto", "held-out", "training", "all"),
        default="auto",
        help="pairs to score; auto: the held-out pairs, if any",
    )
    parser.add_argument(
        "--output", type=path, metavar="FILE", help="JSONL file to write (default: scores.jsonl in the run's folder)"
    )
    parser.set_defaults(run=_score)


@one_line_errors
def _score(options: argparse.Namespace) -> int:
    from sipo.recipe.score_run import score_run

    check_exists(options.target)
    scored = score_run(
        options.target,
        options.overrides,
        options.output,
        weights=options.weights,
        of=options.of,
        draws=options.draws,
        seed=options.seed,
    )
    print(scored.describe())
    return 0
