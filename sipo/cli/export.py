"""``sipo export``: writes a run's LoRA as one file for another tool."""

from __future__ import annotations

import argparse
from typing import Any

from sipo.cli.arguments import add_overrides, path
from sipo.cli.errors import one_line_errors


def add(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    from sipo.families.lora_files import FORMATS

    parser = commands.add_parser(
        "export",
        help="write a run's LoRA as one file for diffusers, kohya's scripts or ComfyUI",
        description="Writes the LoRA of a run of `sipo train`, or of one of its checkpoints, in the format that "
        "another tool reads, with its strength in the weights.",
    )
    parser.add_argument("target", type=path, metavar="RUN", help="folder of the run (training.output_dir)")
    add_overrides(parser, "model.pretrained_model_name_or_path=PATH, if the model has moved")
    parser.add_argument("--format", choices=FORMATS, required=True, help="format of the file")
    parser.add_argument(
        "--checkpoint", metavar="STEP", help='export a checkpoint: a step or "latest" (default: weights)'
    )
    parser.add_argument(
        "--output", type=path, metavar="FILE", help="file to write (default: in the run's folder, with its name)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.set_defaults(run=_export)


@one_line_errors
def _export(options: argparse.Namespace) -> int:
    from sipo.recipe.export import export_run

    file, adapter = export_run(
        options.target,
        options.overrides,
        format=options.format,
        checkpoint_step=options.checkpoint,
        output=options.output,
        force=options.force,
    )
    print(f"{file}: {len(adapter.layers)} layers of rank {adapter.rank}, to be loaded at strength 1")
    return 0
