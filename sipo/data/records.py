"""The pair records that readers yield before anything is decoded, and what all readers share."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sipo.files import FileError, check_regular, short

FURTHER_IMAGES = ("condition_image", "error_mask")
"""Images that a pair may have beside its samples; names of a record's fields and of JSONL's keys."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """A data set that cannot be read at all; the message is one line with the path and what was expected."""


@dataclass(frozen=True)
class PairRecord:
    """One row of a data set of pairs.

    Attributes:
        row: index in the source, from 0; reports count from 1 (:func:`row_name`). Rows increase, and may have gaps
            (blank lines).
        prompt: the caption of both samples.
        chosen: the preferred image or clip: a file, or the bytes of an encoded image.
        rejected: the other one.
        chosen_score: the score from a person or a scorer, if the source has one. Higher is better.
        rejected_score: likewise.
        tie: whether neither is preferred. Ties are counted, and skipped as pairs without a preference.
        problem: what is wrong with the row itself, such as a missing label or an index out of range; the other fields
            may then be empty.
        problem_kind: with ``problem``: "index" if the row refers to the wrong clip or to none, "condition" if the
            family needs a condition image, else "row".
        condition_image: the image that both samples are edits of, if there is one.
        error_mask: an image of the samples' shape, if there is one: errors count where it is white (docs/math.md §2).
        extra: all other values of the row, unchanged.
        misspelt: keys of ``extra`` that are spelt almost like an optional one that the row lacks, each with that one.
    """

    row: int
    prompt: str
    chosen: Path | bytes
    rejected: Path | bytes
    chosen_score: float | None = None
    rejected_score: float | None = None
    tie: bool = False
    problem: str = ""
    problem_kind: Literal["row", "index", "condition"] = "row"
    condition_image: Path | bytes | None = None
    error_mask: Path | bytes | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    misspelt: dict[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> dict[str, Path | bytes]:
        """Both samples and the further images that there are, by name."""
        further = {name: getattr(self, name) for name in FURTHER_IMAGES}
        found = {name: image for name, image in further.items() if image is not None}
        return {"chosen": self.chosen, "rejected": self.rejected, **found}


class PairReader(Protocol):
    """A source of pairs, read from the start each time.

    It may have three further members. ``root``: the folder that paths are relative to, so that a data set that is moved
    as a whole is recognised. ``state()``: a JSON value that changes when a row or an image in memory changes, obtained
    without reading rows; raises a ``DataError`` if it cannot be determined. ``count()``: the number of rows if it is
    known without reading them, else ``None``.
    """

    def __iter__(self) -> Iterator[PairRecord]:
        """Yields the rows in the source's order, ties and faulty rows included."""


def bad_row(row: int, problem: str, prompt: str = "", kind: Literal["row", "index"] = "row") -> PairRecord:
    """Makes the record of a row that cannot be used."""
    return PairRecord(row, prompt, b"", b"", problem=problem, problem_kind=kind)


def row_name(row: int) -> str:
    """Names a row in messages: "row 1" is the first, as editors number the lines of a file."""
    return f"row {row + 1}"


def new_misspelt(record: PairRecord, seen: set[str]) -> list[str]:
    """Describes the misspelt keys of a row that no earlier one has, and adds them to ``seen``."""
    new = {key: meant for key, meant in record.misspelt.items() if key not in seen}
    seen.update(new)
    return [f"the key {short(key)} is not read, did you mean {meant!r}?" for key, meant in new.items()]


def has_unpaired_surrogate(text: str) -> bool:
    """Tells whether a text has an unpaired surrogate, which JSON allows and UTF-8 does not."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def is_finite_number(value: Any) -> bool:
    """Tells whether a JSON value is a finite number."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def check_data_file(path: Path) -> None:
    """Refuses anything but a regular file, before anything opens it.

    Raises:
        DataError: a folder, a FIFO, a socket or a device; or the path does not exist.
    """
    try:
        check_regular(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected a file") from error
    except FileError as error:
        raise DataError(str(error)) from error


def states(folder: Path, paths: Iterable[Path]) -> list[list[Any]]:
    """Lists files by their names in a folder, each with its :func:`stamp`."""
    return [[path.relative_to(folder).as_posix(), *stamp(path)] for path in paths]


def stamp(path: str | Path) -> list[int]:
    """Reads a file's size in bytes, mtime and ctime in nanoseconds, and inode; empty if there is no file.

    ctime changes even if a file is replaced and its mtime reset. Two files that were written within one tick of the
    clock may have equal times, and their folders may be renamed: their inodes differ.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return []
    regular = stat.S_ISREG(status.st_mode)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino] if regular else []
