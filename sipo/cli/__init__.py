"""The command line ``sipo``: one module for each command.

Each command imports heavy packages when it runs, so that ``sipo doctor`` also works where half of the packages are
missing.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

import sipo
from sipo.cli import analyze, data_check, demo, doctor, export, label, precompute, score, train, verify
from sipo.cli.errors import INTERRUPTED, READER_GONE, CommandError, gone_readers, print_nowhere, tell

_COMMANDS = (train, precompute, export, data_check, label, analyze, score, verify, demo, doctor)  # in the order of help


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line, and which takes ``--debug`` before and after the command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Without a default, so that a subcommand's parser does not reset what came before the command.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(message))


def _fail(message: str) -> int:
    """Prints a user error as one line and returns the exit status for it."""
    tell(f"sipo: error: {' '.join(message.split())}")
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``sipo`` and ``python -m sipo``.

    Args:
        argv: arguments without the program's name; the process's own if left out.

    Returns:
        Exit status: 0; 1 for faults that ``data check`` or ``verify`` find; 2 for a user error; 130 after Ctrl-C; 141
        if the reader of the output has gone (``| head``). Parsing errors and ``--help`` raise ``SystemExit`` instead.
    """
    status = 0
    try:
        try:
            status = _run(argv)
        except KeyboardInterrupt:
            status = INTERRUPTED
            tell("sipo: interrupted")
        finally:  # here, because errors when the interpreter exits are not ours to handle
            tell()
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()
    except OSError as error:  # EIO: of a terminal that was closed
        if error.errno not in (errno.EPIPE, errno.EIO) or not (gone := gone_readers()):
            raise
        print_nowhere(gone)
        return status or READER_GONE
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes no positional arguments after an option where some came before it
        if not hasattr(options, "overrides") or any("=" not in word or word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides += rest
    debug = vars(options).pop("debug", False)  # commands pass on the options that are left
    try:
        with _plain_warnings():
            status: int = options.run(options)
    except CommandError as error:
        if debug:
            tell("".join(traceback.format_exception(error.__cause__ or error)).rstrip())
        return _fail(str(error))
    return status


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints our own warnings as one line on standard error, and all others as Python does."""
    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.split(".")[0] in ("sipo", "sipo_kernels"):
            from sipo.progress import say

            say(f"sipo: warning: {' '.join(str(message).split())}")
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = others


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sipo", description=(sipo.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"sipo {sipo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
