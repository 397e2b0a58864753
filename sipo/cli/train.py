"""``sipo train``: aligns a model as a configuration says."""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
from typing import Any

from sipo.cli.arguments import add_config
from sipo.cli.errors import INTERRUPTED, CommandError, one_line_errors, tell


def add(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser(
        "train",
        help="align a model as a configuration says",
        description="Aligns a model on preference pairs: encodes them once, trains, and saves weights that "
        "diffusers loads. `accelerate launch -m sipo train CONFIG` runs it on many processes.",
    )
    add_config(parser)
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    earlier.add_argument("--overwrite", action="store_true", help="replace the run that training.output_dir holds")
    parser.set_defaults(run=_train)


@one_line_errors
def _train(options: argparse.Namespace) -> int:
    from sipo.analysis.facts import describe_held_out
    from sipo.recipe.config import load_config
    from sipo.recipe.train import run_training
    from sipo.training import TrainingAlarmError, TrainingInterruptedError, make_accelerator

    config = load_config(options.config, options.overrides)
    accelerator = make_accelerator(config.training)

    def print_config() -> None:
        if accelerator.is_main_process:
            _print_config(config, accelerator.num_processes)

    command = f"`{shlex.join(['sipo', 'train', str(options.config), *options.overrides, '--resume'])}`"
    if accelerator.num_processes > 1:  # how they were launched is not known here
        command = "the same command with --resume"
    try:
        trained = run_training(
            config,
            resume=options.resume,
            overwrite=options.overwrite,
            accelerator=accelerator,
            on_start=print_config,  # not before: a refusal is one line
        )
    except TrainingAlarmError as alarm:
        raise CommandError(f"{alarm.said}; {command} continues from there") from alarm
    except TrainingInterruptedError as stop:
        if accelerator.is_main_process:
            tell(f"sipo: stopped after step {stop.step}; {command} continues from there")
        return INTERRUPTED
    if accelerator.is_main_process:
        if trained.result.validation:
            print(f"held out: {describe_held_out(trained.result.validation)}")
        print(f"weights, and how to load them: {trained.weights / 'README.md'}")
    return 0


def _print_config(config: Any, processes: int) -> None:
    """Prints the whole configuration as YAML, behind a comment with what it does not say."""
    import yaml

    readable = (sys.stdout.encoding or "").lower().startswith("utf")  # other encodings lack some letters
    try:
        pairs = config.training.pairs_in_step(processes)
        print(f"# {processes} process{'es' * (processes > 1)}, {pairs} pairs in a step")
        print(yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=readable), flush=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise CommandError(f"standard output: {error.strerror}") from error
