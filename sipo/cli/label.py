"""``sipo label``: makes pairs from a scorer's preferences."""

from __future__ import annotations

import argparse
from typing import Any

from sipo.cli.arguments import add_max_pixels, at_least, path, path_or_id
from sipo.cli.errors import one_line_errors


def add(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser(
        "label",
        help="make pairs from a scorer's preferences",
        description="Scores the candidates of each prompt and writes pairs with both scores.",
    )
    parser.add_argument(
        "source",
        type=path_or_id,
        help='JSONL: {"prompt": ..., "candidates": [paths]}, or pairs, which are scored again',
    )
    parser.add_argument("output", type=path_or_id, help="JSONL file to write")
    parser.add_argument(
        "--clip", type=path_or_id, metavar="MODEL", help="CLIP-style model (PickScore, HPSv2): folder or hub id"
    )
    parser.add_argument(
        "--processor",
        type=path_or_id,
        metavar="MODEL",
        help="folder or hub id of the processor, if it is not with the model",
    )
    parser.add_argument(
        "--aesthetic", type=path, metavar="FILE", help="safetensors file with a head on the image embeddings of --clip"
    )
    parser.add_argument(
        "--activation", choices=("none", "relu"), default="none", help="activation between the layers of the head"
    )
    parser.add_argument("--function", metavar="MODULE:NAME", help="Python function scores(images_or_clips, prompts)")
    parser.add_argument(
        "--pairs",
        choices=("best-worst", "all"),
        default="best-worst",
        help="pairs to make of the candidates of a prompt",
    )
    parser.add_argument(
        "--min-margin", type=at_least(0, float), default=0.0, help="leave out pairs whose scores differ by less"
    )
    parser.add_argument(
        "--frames", type=at_least(1), default=8, help="frames by which a clip is scored (default %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=16, help="images per call of the scorer (default %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="device of the scorer (default %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read, and count them")
    add_max_pixels(parser)
    parser.set_defaults(run=_label)


@one_line_errors
def _label(options: argparse.Namespace) -> int:
    from sipo.data.label import run_label

    arguments = {name: value for name, value in vars(options).items() if name not in ("run", "source", "output")}
    return run_label(options.source, options.output, **arguments)
