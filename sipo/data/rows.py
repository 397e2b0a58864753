"""What the readers of pairs share: files that are looked at before they are opened, and rows that cannot be used."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from sipo.data.records import DataError, PairRecord
from sipo.files import FileError, check_regular


def exists(place: Path) -> bool:
    """Tells whether a path exists; False for names that no file can have, on which older Python raises."""
    return os.path.exists(place)


def check_data_file(path: Path) -> None:
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
    """Lists names in a folder, with sizes, times and inodes (:func:`stamp`)."""
    return [[path.relative_to(folder).as_posix(), *stamp(path)] for path in paths]


def stamp(path: str | Path) -> list[int]:
    """Reads a file's size in bytes, mtime and ctime in nanoseconds, and inode; empty if there is no file.

    ctime changes even if a file is replaced and its mtime reset. Two files that were written within one tick of the
    clock may have equal times, and their folders may be renamed: their inodes differ.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return []
    regular = stat.S_ISREG(found.st_mode)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino] if regular else []


def is_finite_number(value: Any) -> bool:
    """Tells whether a JSON value is a finite number."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def bad_row(row: int, problem: str, prompt: str = "", kind: Literal["row", "index"] = "row") -> PairRecord:
    """Makes the record of a row that cannot be used, with the reason."""
    return PairRecord(row, prompt, b"", b"", problem=problem, problem_kind=kind)


def plain(text: str) -> str:
    """Puts a text on one line, with single spaces."""
    return " ".join(text.split())
