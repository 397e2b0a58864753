"""The commands of ``sipo`` that look at a run, or at what one would be: ``analyze``, ``score``, ``verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sipo.cli.errors import CommandError, in_one_line, missing_packages, one_line_errors, path


def add_commands(commands: Any) -> None:
    """Adds the commands to a parser's subcommands; each sets ``run``."""
    analyze = commands.add_parser(
        "analyze",
        help="is it learning? a report on a run, or on a configuration before its run",
        description="Writes one HTML page with curves, figures by noise level and a verdict, and prints the verdict. "
        "Of a folder: the run in it. Of a YAML file: the model with its data before any training.",
    )
    analyze.add_argument("target", type=path, help="folder of a run, or YAML file")
    analyze.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")
    analyze.add_argument(
        "--output",
        type=path,
        metavar="FILE",
        help="page to write (default: report.html in the run's folder; of a YAML file, before.html there)",
    )
    analyze.add_argument("--pairs", type=int, help="of a YAML file: pairs to look at (default 32)")
    analyze.add_argument("--levels", type=int, help="of a YAML file: noise levels (default 50)")
    analyze.set_defaults(run=_analyze)

    score = commands.add_parser(
        "score",
        help="implicit rewards of pairs by a trained model against its reference",
        description="Writes a line for each pair: the rewards of both halves and their margin with standard errors "
        "over draws of noise. Prints how often the model prefers what was chosen.",
    )
    score.add_argument("target", type=path, help="folder of a run of `sipo train`, or its YAML file")
    score.add_argument("overrides", nargs="*", metavar="section.key=value", help="other data, for instance")
    score.add_argument("--weights", type=path, metavar="DIR", help="trained weights (default: weights of the run)")
    score.add_argument("--draws", type=int, default=16, help="of noise, for each pair; even (default %(default)s)")
    score.add_argument("--seed", type=int, default=0, help="the same seed gives the same numbers")
    score.add_argument(
        "--of", choices=("auto", "held-out", "training", "all"), default="auto", help="auto: held-out pairs, if any"
    )
    score.add_argument(
        "--output", type=path, metavar="FILE", help="JSONL file (default: scores.jsonl in the run's folder)"
    )
    score.set_defaults(run=_score)

    verify = commands.add_parser(
        "verify",
        help="is all that a run has written still as it was written?",
        description="Reads a run's configuration, checkpoints, logs, prompts and weights, compares them with the "
        "hashes that the run has written (of configuration, logs and prompts when it ended) and prints a line for "
        "each. Exit status 1 where something is damaged. Nothing is changed.",
    )
    verify.add_argument("target", type=path, metavar="RUN", help="folder of a run, or of weights copied from one")
    verify.set_defaults(run=_verify)


def _analyze(options: argparse.Namespace) -> int:
    if missing := missing_packages({"accelerate": "accelerate", "matplotlib": "matplotlib", "yaml": "pyyaml"}):
        raise CommandError(f"this needs {missing}: pip install 'sipo[train]'")
    _check_there(options.target)
    if not options.target.is_dir():
        return _analyze_start(options)
    from sipo.analysis.report import report_run

    for name in ("pairs", "levels"):
        if getattr(options, name) is not None:
            raise CommandError(f"--{name} is for a YAML file, and {options.target} is a folder")
    if options.overrides:
        raise CommandError(f"{options.overrides[0]!r} is for a YAML file, and {options.target} is a folder")
    with in_one_line():
        page, findings = report_run(options.target, options.output)
    _print(page, findings)
    return 0


@one_line_errors
def _analyze_start(options: argparse.Namespace) -> int:
    from sipo.analysis.untrained import LEVELS, PAIRS
    from sipo.recipe import config as configuration
    from sipo.recipe.analyze_start import analyze_start

    config = configuration.load(options.target, options.overrides)
    pairs = PAIRS if options.pairs is None else options.pairs
    levels = LEVELS if options.levels is None else options.levels
    page, findings = analyze_start(config, options.output, pairs=pairs, levels=levels)
    _print(page, findings)
    return 0


def _print(page: Path, findings: Any) -> None:
    from sipo.analysis.page import describe

    print(describe(findings))
    print(f"report: {page}")


def _check_there(target: Path) -> None:
    if not target.exists():
        raise CommandError(f"{target}: no such file or folder, expected the folder of a run or a YAML file")


@one_line_errors
def _score(options: argparse.Namespace) -> int:
    from sipo.recipe.score_run import score_run

    _check_there(options.target)
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


@one_line_errors
def _verify(options: argparse.Namespace) -> int:
    from sipo.recipe.verify import verify_run

    items = verify_run(options.target)
    for item in items:
        print(item.describe())
    return 1 if any(item.fault for item in items) else 0
