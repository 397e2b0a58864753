"""One preference pair as a reader yields it, before anything is decoded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PairRecord:
    """One row of a data set of pairs.

    Attributes:
        row: its place in the source, from 0; reports count from 1 (:func:`row_name`). Rows grow, and may leave gaps
            (blank lines).
        prompt: the caption both were made for.
        chosen: the preferred image or clip: a file, or an encoded image's bytes.
        rejected: the other one.
        chosen_score: what a person or a scorer gave it, where the source says. Higher is better.
        rejected_score: likewise.
        tie: whether neither is preferred. A tie is no pair to train on; it is counted, and skipped as a pair
            without a preference.
        problem: what is wrong with the row itself (a label missing, an index that fits no file), where its
            fields could not be filled.
        problem_kind: with ``problem``: "index" where the row points at the wrong clip or at none, else "row".
        extra: whatever else the source says of the row, untouched.
    """

    row: int
    prompt: str
    chosen: Path | bytes
    rejected: Path | bytes
    chosen_score: float | None = None
    rejected_score: float | None = None
    tie: bool = False
    problem: str = ""
    problem_kind: Literal["row", "index"] = "row"
    extra: dict[str, Any] = field(default_factory=dict)


class PairReader(Protocol):
    """A source of pairs, read from the start each time.

    It may have three further things. ``root``: the folder that paths are given in, so that a data set that moves as a
    whole is known again. ``state()``: a JSON value that changes when a row or an image in memory changes, obtained
    without reading rows; it raises a ``DataError`` where it cannot be told. ``count()``: how many rows there are, where
    that is known without reading them, or ``None``.
    """

    def __iter__(self) -> Iterator[PairRecord]:
        """The rows in the source's order, ties and faulty rows included."""


def row_name(row: int) -> str:
    """A row as people are told of it: "row 1" is the first, as an editor numbers the lines of a file."""
    return f"row {row + 1}"


def has_half(text: str) -> bool:
    """Whether a text holds half of a character beyond 16 bits, which JSON lets through and UTF-8 does not."""
    return not text.isascii() and _HALF.search(text) is not None


class DataError(ValueError):
    """A data set that cannot be read at all, in one line that names the path and what was expected."""
