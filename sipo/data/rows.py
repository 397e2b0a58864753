"""What the readers of pairs share: files that are looked at before they are opened, and rows that cannot be used."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from sipo.data.records import DataError, PairRecord
from sipo.files import FileError, check_regular


def exists(place: Path) -> bool:
    """Whether the path exists; False for names that no file can have, on which older Python raises."""
    return os.path.exists(place)


def check_file(path: Path) -> None:
    """Refuses anything but a regular file, before anything opens it.

    Raises:
        DataError: a folder, a FIFO, a socket or a device, or nothing.
    """
    try:
        check_regular(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected a file") from error
    except FileError as error:
        raise DataError(str(error)) from error


def states(folder: Path, paths: Iterable[Path]) -> list[list[Any]]:
    """Names in a folder, with sizes, times and inodes (:func:`sipo.cache.changes.stamp`)."""
    from sipo.cache.changes import stamp

    return [[path.relative_to(folder).as_posix(), *stamp(path)] for path in paths]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def bad_row(row: int, problem: str, prompt: str = "", kind: Literal["row", "index"] = "row") -> PairRecord:
    """A row that cannot be used, with the reason."""
    return PairRecord(row, prompt, b"", b"", problem=problem, problem_kind=kind)


def plain(text: str) -> str:
    """A text in one line, with single spaces."""
    return " ".join(text.split())
