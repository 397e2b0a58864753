"""Arguments that several commands have, and the types that read them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def path_or_id(text: str) -> str:
    """Reads an argument that may be a path or a hub id, and expands ``~`` and environment variables.

    Raises:
        argparse.ArgumentTypeError: an environment variable that is not set.
    """
    from sipo.files import expand

    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path(text: str) -> Path:
    """Reads a path as :func:`path_or_id` does."""
    return Path(path_or_id(text))


def at_least(least: int, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """Returns a reader of numbers from ``least`` on; argparse then names the option in the error."""

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


def positive(text: str) -> float:
    """Reads a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number > 0")
    return value


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds a configuration file and the settings that override it."""
    parser.add_argument("config", type=path, help="YAML file with the configuration; see examples/")
    add_overrides(parser, "settings that replace those of the file")


def add_overrides(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds settings that override those of a file."""
    # With a default, or argparse lists it among missing arguments as if it were required.
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=help)


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Adds the largest number of pixels that an image or a frame may have."""
    text = "most pixels that an image or a frame may have (default: 120 million)"
    parser.add_argument("--max-pixels", type=at_least(1), default=argparse.SUPPRESS, help=text)
