"""The commands of ``sipo`` that need data or a configuration: ``train``, ``precompute``, ``data check``, ``label``.

And ``export``, which needs the configuration that a run has kept.
"""

from __future__ import annotations

import argparse
import errno
import math
import sys
from collections.abc import Callable
from typing import Any

from sipo.cli.errors import INTERRUPTED, CommandError, one_line_errors, path, path_or_id, tell


def add_commands(commands: Any) -> None:
    """Adds the commands to a parser's subcommands; each sets ``run``."""
    train = commands.add_parser(
        "train",
        help="align a model as a YAML file says",
        description="Aligns a model on preference pairs: encodes them once, trains, and saves what diffusers loads. "
        "`accelerate launch -m sipo train CONFIG` runs it on many processes.",
    )
    _add_config(train)
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    train.set_defaults(run=_train)

    precompute = commands.add_parser(
        "precompute",
        help="encode the pairs of a configuration, and what else it wants beforehand",
        description="Writes latents, text embeddings and, where asked for, the reference's errors "
        "into data.cache. What is there is checked and kept, so that it goes on where it was stopped; "
        "what has changed since is encoded anew.",
    )
    _add_config(precompute)
    precompute.add_argument(
        "--verify", action="store_true", help="read every file again, also where size, times and inode are as they were"
    )
    precompute.set_defaults(run=_precompute)

    _add_export(commands)

    data = commands.add_parser("data", help="look at preference data").add_subparsers(required=True, metavar="COMMAND")
    check = data.add_parser(
        "check",
        help="find what training would stumble over",
        description="Reads every pair and lists what is wrong, by row. Exit status 0: training would skip nothing.",
    )
    check.add_argument("path", type=path_or_id, help="JSONL file, parquet files, hub id, or VideoDPO folder")
    check.add_argument("--format", choices=("auto", "jsonl", "pickapic", "videodpo"), default="auto", help="of PATH")
    check.add_argument("--split", default="train", help="of a data set with several")
    check.add_argument("--frames", type=_at_least(1), help="frames that training will need of each clip")
    check.add_argument("--fps", type=_rate, help="frames per second that it will read them at")
    check.add_argument("--limit", type=_at_least(1), help="look at no more than the first so many rows")
    check.add_argument("--streaming", action="store_true", help="read a hub's data set without downloading all of it")
    check.add_argument(
        "--rows", type=_at_least(0), default=5, help="rows to list of each kind of fault (default %(default)s)"
    )
    _add_max_pixels(check)
    check.add_argument("--json", type=path, metavar="FILE", help="write every row of the report as JSON")
    check.set_defaults(run=_check)

    label = commands.add_parser(
        "label",
        help="make pairs from a scorer's preferences",
        description="Scores the candidates of each prompt and writes pairs with both scores.",
    )
    label.add_argument(
        "source", type=path_or_id, help='JSONL: {"prompt": ..., "candidates": [paths]}, or pairs to score anew'
    )
    label.add_argument("output", type=path_or_id, help="JSONL file to write")
    label.add_argument(
        "--clip", type=path_or_id, metavar="MODEL", help="CLIP-style model (PickScore, HPSv2): folder or hub id"
    )
    label.add_argument("--processor", type=path_or_id, metavar="MODEL", help="where its processor is, if elsewhere")
    label.add_argument("--aesthetic", type=path, metavar="FILE", help="safetensors head on --clip's image embeddings")
    label.add_argument("--activation", choices=("none", "relu"), default="none", help="between the head's layers")
    label.add_argument("--function", metavar="MODULE:NAME", help="scores(images_or_clips, prompts) in Python")
    label.add_argument(
        "--pairs", choices=("best-worst", "all"), default="best-worst", help="of one prompt's candidates"
    )
    label.add_argument(
        "--min-margin", type=_at_least(0, float), default=0.0, help="leave out pairs whose scores differ by less"
    )
    label.add_argument("--frames", type=_at_least(1), default=8, help="that a clip is scored by (default %(default)s)")
    label.add_argument("--batch-size", type=_at_least(1), default=16, help="images in one call (default %(default)s)")
    label.add_argument("--device", default="cpu", help="of the scorer (default %(default)s)")
    label.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read, and count them")
    _add_max_pixels(label)
    label.set_defaults(run=_label)


def _add_max_pixels(parser: argparse.ArgumentParser) -> None:
    text = "that an image or a frame may have (default: 120 million)"
    parser.add_argument("--max-pixels", type=_at_least(1), default=argparse.SUPPRESS, help=text)


def _at_least(least: int, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """Reads a number, so that an error names the option."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            number = "number" if kind is float else "whole number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected a {number} of at least {least}")
        return value

    return read


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number > 0")
    return value


def _add_export(commands: Any) -> None:
    from sipo.families.lora_files import FORMATS

    export = commands.add_parser(
        "export",
        help="a run's LoRA as one file for diffusers, kohya's scripts or ComfyUI",
        description="Writes the LoRA of a run of `sipo train`, or of one of its checkpoints, in the format that "
        "another tool reads, with its strength in the weights.",
    )
    export.add_argument("target", type=path, metavar="RUN", help="folder of the run (training.output_dir)")
    export.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="model.pretrained_model_name_or_path, if it has moved"
    )
    export.add_argument("--format", choices=FORMATS, required=True, help="of the file")
    export.add_argument("--checkpoint", metavar="STEP", help='of a checkpoint, by step or "latest" (default: weights)')
    export.add_argument("--output", type=path, metavar="FILE", help="to write (default: named after the run, in it)")
    export.add_argument("--force", action="store_true", help="replace a file that is there")
    export.set_defaults(run=_export)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=path, help="YAML file; see examples/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")


@one_line_errors
def _train(options: argparse.Namespace) -> int:
    import yaml

    from sipo.analysis.facts import describe_held_out
    from sipo.recipe import config as configuration
    from sipo.recipe.train import run_training
    from sipo.training import TrainingAlarmError, TrainingInterruptedError, make_accelerator

    config = configuration.load(options.config, options.overrides)
    accelerator = make_accelerator(config.training)
    if accelerator.is_main_process:
        readable = (sys.stdout.encoding or "").lower().startswith("utf")  # of others not every letter can be written
        try:
            print(yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=readable), flush=True)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise CommandError(f"standard output: {error.strerror}") from error
    command = f"`{' '.join(['sipo train', str(options.config), *options.overrides, '--resume'])}`"
    if accelerator.num_processes > 1:  # their launcher's own words are not known here
        command = "the same command with --resume"
    try:
        trained = run_training(config, resume=options.resume, accelerator=accelerator)
    except TrainingAlarmError as alarm:
        raise CommandError(f"{alarm.said}; {command} goes on from there") from alarm
    except TrainingInterruptedError as stop:
        if accelerator.is_main_process:
            tell(f"sipo: stopped after step {stop.step}; {command} goes on from there")
        return INTERRUPTED
    if accelerator.is_main_process:
        if trained.result.validation:
            print(f"held out: {describe_held_out(trained.result.validation)}")
        print(f"weights, and how to load them: {trained.weights / 'README.md'}")
    return 0


@one_line_errors
def _precompute(options: argparse.Namespace) -> int:
    from sipo.recipe import config as configuration
    from sipo.recipe.build import open_run, prepare_data
    from sipo.recipe.preflight import check_run

    config = configuration.load(options.config, options.overrides)
    run = open_run(config)
    check_run(run, "precompute")
    summary = prepare_data(run, repair=True, verify=options.verify, progress=config.training.progress).summary
    if run.accelerator.is_main_process and summary is not None:
        print(summary.describe())
    return 0


@one_line_errors
def _check(options: argparse.Namespace) -> int:
    from sipo.data.check import run_check

    arguments = {name: value for name, value in vars(options).items() if name not in ("run", "json")}
    return run_check(**arguments, json_file=options.json)


@one_line_errors
def _label(options: argparse.Namespace) -> int:
    from sipo.data.label import run_label

    arguments = {name: value for name, value in vars(options).items() if name not in ("run", "source", "output")}
    return run_label(options.source, options.output, **arguments)


@one_line_errors
def _export(options: argparse.Namespace) -> int:
    from sipo.recipe.export import export_run

    arguments = {"checkpoint_step": options.checkpoint, "output": options.output, "force": options.force}
    file, adapter = export_run(options.target, options.overrides, format=options.format, **arguments)
    print(f"{file}: {len(adapter.layers)} layers of rank {adapter.rank}, to be loaded at strength 1")
    return 0
