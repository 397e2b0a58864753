"""Readers of pairs: which of them reads a path, and the one of JSONL.

A row that cannot be used becomes a record with a ``problem``, never an exception and never another row's files: a
reader drops nothing and moves nothing, so that row 7 is row 7 to whoever counts. No file is opened that is no regular
one: a FIFO in its place would be waited for without end.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from sipo.data.pickapic import PickapicReader
from sipo.data.records import DataError, PairReader, PairRecord, has_half, row_name
from sipo.data.rows import bad_row, check_data_file, exists, is_finite_number, states
from sipo.data.videodpo import METADATA, PAIRS, VideoDpoReader
from sipo.files import FileError, parse_json, short

Format = Literal["auto", "jsonl", "pickapic", "videodpo"]

_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_JSONL_NAME = "pairs.jsonl"
_PAIR_KEYS = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score")
_LONGEST_LINE = 1 << 24  # bytes of a row of JSONL: what is longer is another kind of file
_DEEPEST = 64  # levels of a row of JSONL
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def open_pairs(path: str | Path, format: Format = "auto", split: str = "train", streaming: bool = False) -> PairReader:
    """Opens a data set of pairs.

    Args:
        path: a JSONL file or a folder with one; a parquet file, a folder of them or a hub id; a VideoDPO folder.
        format: of ``path``; "auto" looks at names, and opens nothing to guess.
        split: of a data set with several. JSONL and VideoDPO have one, whatever its name.
        streaming: read a hub's data set without downloading all of it first. Local files are never copied.

    Raises:
        DataError: nothing there, or nothing that is known.
    """
    if format == "auto":
        format = _detect(path)
    if format == "pickapic":
        return PickapicReader(str(path), split, streaming)
    place = Path(path)
    if not exists(place):
        raise DataError(f"{path}: no such file or folder, expected {format} data")
    if not place.is_dir():
        check_data_file(place)
    if format == "jsonl":
        return JsonlReader(_jsonl_in(place) if place.is_dir() else place)
    if format == "videodpo":
        return VideoDpoReader(place if place.is_dir() else place.parent)
    raise DataError(f"format={format!r}: expected one of auto, jsonl, pickapic, videodpo")


def _detect(path: str | Path) -> Format:
    place = Path(path)
    if not exists(place):
        if isinstance(path, str) and _HUB_ID.fullmatch(path) and not place.suffix:
            return "pickapic"
        raise DataError(f"{path}: no such file or folder, and no hub id (owner/name)")
    if place.is_dir():
        found = [name for name in (METADATA, PAIRS) if (place / name).exists()]
        if len(found) == 2:
            return "videodpo"
        if any(place.glob("*.jsonl")):
            return "jsonl"
        if any(place.rglob("*.parquet")):
            return "pickapic"
        if found:
            raise DataError(f"{path}: has {found[0]} alone, expected both {METADATA} and {PAIRS} (VideoDPO)")
        raise DataError(f"{path}: expected a .jsonl file, parquet files, or {METADATA} and {PAIRS} in that folder")
    check_data_file(place)
    if place.suffix in _JSONL_SUFFIXES:
        return "jsonl"
    if place.suffix == ".parquet":
        return "pickapic"
    if place.name in (METADATA, PAIRS):
        return "videodpo"
    raise DataError(f"{path}: expected a name that ends in .jsonl or .parquet, or {PAIRS}; or name the format")


def _jsonl_in(folder: Path) -> Path:
    found = sorted(folder.glob("*.jsonl"))
    if (folder / _JSONL_NAME) in found:
        return folder / _JSONL_NAME
    if len(found) != 1:
        raise DataError(f"{folder}: has {len(found)} .jsonl files, expected one, or {_JSONL_NAME}, or a file's name")
    return found[0]


# ---- JSONL ----


@dataclass(frozen=True)
class JsonlReader:
    """One JSON object a line: ``prompt``, ``chosen``, ``rejected`` and, if there are any, both scores.

    Paths are relative to the file's folder. Equal scores are a tie. A record's row is its line's number less one;
    empty lines are passed over. Further keys go to ``extra``.
    """

    path: Path

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.path.parent

    def state(self) -> Any:
        """Name, size, times and inode of the file."""
        return states(self.root, [self.path])

    def __iter__(self) -> Iterator[PairRecord]:
        folder = self.root
        for row, value in read_lines(self.path):
            yield self._record(row, value, folder)

    def _record(self, row: int, value: dict[str, Any] | str, folder: Path) -> PairRecord:
        if isinstance(value, str):
            return bad_row(row, value)
        extra = {key: item for key, item in value.items() if key not in _PAIR_KEYS}
        for key in ("prompt", "chosen", "rejected"):
            if not isinstance(value.get(key), str):
                return bad_row(row, f"{key}={short(value[key])}: expected text" if key in value else f"no key {key!r}")
            if has_half(value[key]):
                return bad_row(row, f"{key}={short(value[key])}: holds half a character")  # which JSON lets through
        for key in ("chosen", "rejected"):
            if not value[key]:
                return bad_row(row, f"{key}='': expected a path", value["prompt"])
        for key in ("chosen_score", "rejected_score"):
            if value.get(key) is not None and not is_finite_number(value[key]):
                return bad_row(row, f"{key}={short(value[key])}: expected a number", value["prompt"])
        better, worse = value.get("chosen_score"), value.get("rejected_score")
        if better is not None and worse is not None and better < worse:
            problem = f"chosen_score={short(better)} is below rejected_score={short(worse)}"
            return bad_row(row, problem, value["prompt"])
        return PairRecord(
            row,
            value["prompt"],
            folder / value["chosen"],
            folder / value["rejected"],
            better,
            worse,
            tie=better is not None and better == worse,
            extra=extra,
        )


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The objects of a JSONL file with their rows; for a line that holds none, what is wrong with it.

    Raises:
        DataError: the file cannot be opened.
    """
    check_data_file(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected a JSONL file") from error
    with file:
        for row in count():
            try:
                line = file.readline(_LONGEST_LINE)
                whole = line.endswith(b"\n") or len(line) < _LONGEST_LINE
                while not whole and not (rest := file.readline(_LONGEST_LINE)).endswith(b"\n") and rest:
                    pass
            except OSError as error:
                raise DataError(f"{path}: cannot be read from {row_name(row)} on: {error.strerror}") from error
            if not line:
                return
            if line.strip():
                long = f"is longer than {_LONGEST_LINE} bytes, expected a JSON object"
                yield row, _parse_line(line) if whole else long


def _parse_line(line: bytes) -> dict[str, Any] | str:
    """A JSON object, or what is wrong with a line."""
    try:
        # "utf-8-sig": a byte order mark before the first line is some editors' doing.
        value = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"not JSON: {error}"
    except FileError as error:
        cause = error.__cause__
        if isinstance(cause, json.JSONDecodeError):  # whose own message calls each line the first
            return f"not JSON: {cause.msg}, character {cause.pos + 1}"
        return str(error)
    if _is_deep(value):  # parsed here, it may still be too deep to be printed or written elsewhere
        return f"nested too deeply, expected JSON of at most {_DEEPEST} levels"
    return value if isinstance(value, dict) else f"holds {short(value)}, expected a JSON object"


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        inner = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    return bool(level)


def write_jsonl(records: Iterable[PairRecord], path: str | Path) -> int:
    """Writes pairs as :class:`JsonlReader` reads them, aside and renamed; paths become relative to the file.

    Returns:
        How many were written.

    Raises:
        DataError: a record that is faulty, or whose image is in memory and has no path.
    """
    from sipo.files import write_aside

    path = Path(path)
    lines = []
    for record in records:
        if record.problem:
            raise DataError(f"{row_name(record.row)}: {record.problem}, expected a pair")
        value: dict[str, Any] = {"prompt": record.prompt}
        for key, source in (("chosen", record.chosen), ("rejected", record.rejected)):
            if isinstance(source, bytes):
                raise DataError(f"{row_name(record.row)}: {key} is {len(source)} bytes in memory, expected a file")
            value[key] = Path(os.path.relpath(source, path.parent)).as_posix()
        for key, score in (("chosen_score", record.chosen_score), ("rejected_score", record.rejected_score)):
            if score is not None:
                value[key] = score
        line = json.dumps(value | record.extra, ensure_ascii=False)
        lines.append((json.dumps(value | record.extra) if has_half(line) else line) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, "".join(lines))
    return len(lines)
