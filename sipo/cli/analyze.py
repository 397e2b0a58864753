"""``sipo analyze``: a report on a run, or on a configuration before its run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sipo.cli.arguments import add_overrides, path
from sipo.cli.errors import CommandError, check_exists, in_one_line, missing_packages, one_line_errors

_REPORT_PACKAGES = {"accelerate": "accelerate", "matplotlib": "matplotlib", "yaml": "pyyaml"}


def add(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser(
        "analyze",
        help="report on a run, or on a configuration before its run",
        description="Writes one HTML page with curves, figures by noise level and a verdict, and prints the verdict. "
        "For a folder, the report is on the run in it; for a YAML file, on the model and the data before training.",
    )
    parser.add_argument("target", type=path, help="folder of a run, or YAML file")
    add_overrides(parser, "settings that replace those of the file")
    parser.add_argument(
        "--output",
        type=path,
        metavar="FILE",
        help="page to write (default: report.html in the run's folder, or before.html for a YAML file)",
    )
    parser.add_argument("--pairs", type=int, help="number of pairs to measure, for a YAML file (default 32)")
    parser.add_argument("--levels", type=int, help="number of noise levels, for a YAML file (default 50)")
    parser.set_defaults(run=_analyze)


def _analyze(options: argparse.Namespace) -> int:
    if missing := missing_packages(_REPORT_PACKAGES):
        raise CommandError(f"this needs {missing}: pip install 'sipo[train]'")
    check_exists(options.target)
    return _analyze_run(options) if options.target.is_dir() else _analyze_start(options)


def _analyze_run(options: argparse.Namespace) -> int:
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
    from sipo.recipe.analyze_start import analyze_start
    from sipo.recipe.config import load_config

    config = load_config(options.target, options.overrides)
    pairs = PAIRS if options.pairs is None else options.pairs
    levels = LEVELS if options.levels is None else options.levels
    page, findings = analyze_start(config, options.output, pairs=pairs, levels=levels)
    _print(page, findings)
    return 0


def _print(page: Path, findings: Any) -> None:
    from sipo.analysis.page import describe

    print(describe(findings))
    print(f"report: {page}")
