"""Selects the reader for a path, and reads and writes JSONL.

A row that cannot be used becomes a record with a ``problem``, never an exception and never another row's files. A
reader drops no row, so that row numbers agree everywhere. Only regular files are opened: a FIFO would block for ever.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

from sipo.data.pickapic import PickapicReader
from sipo.data.records import (
    FURTHER_IMAGES,
    DataError,
    PairReader,
    PairRecord,
    bad_row,
    check_data_file,
    has_unpaired_surrogate,
    is_finite_number,
    row_name,
    states,
)
from sipo.data.videodpo import METADATA, PAIRS, VideoDpoReader
from sipo.fields import nearest
from sipo.files import FileError, parse_json, short, write_aside

Format = Literal["auto", "jsonl", "pickapic", "videodpo"]

_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_JSONL_NAME = "pairs.jsonl"
_OPTIONAL_KEYS = (*FURTHER_IMAGES, "chosen_score", "rejected_score")
_PAIR_KEYS = ("prompt", "chosen", "rejected", *_OPTIONAL_KEYS)
_LONGEST_LINE = 1 << 24  # bytes of a row of JSONL; a longer line means another kind of file
_DEEPEST = 64  # levels of nesting in a row of JSONL
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def open_pairs(path: str | Path, format: Format = "auto", split: str = "train", streaming: bool = False) -> PairReader:
    """Opens a data set of pairs.

    Args:
        path: a JSONL file or a folder with one; a parquet file, a folder of them or a hub id; a VideoDPO folder.
        format: of ``path``; "auto" detects it from file names, without opening a file.
        split: of a data set with several. JSONL and VideoDPO have one, whatever its name.
        streaming: read a data set of the hub without downloading all of it first. Local files are never copied.

    Raises:
        DataError: the path does not exist, or its format is not known.
    """
    if format == "auto":
        format = _detect(path)
    if format == "pickapic":
        return PickapicReader(str(path), split, streaming)
    place = Path(path)
    if not os.path.exists(place):
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
    if not os.path.exists(place):
        if isinstance(path, str) and _HUB_ID.fullmatch(path) and not place.suffix:
            return "pickapic"
        raise DataError(f"{path}: no such file or folder, and no hub id (owner/name)")
    if place.is_dir():
        lists = [name for name in (METADATA, PAIRS) if (place / name).exists()]
        if len(lists) == 2:
            return "videodpo"
        if any(place.glob("*.jsonl")):
            return "jsonl"
        if any(place.rglob("*.parquet")):
            return "pickapic"
        if lists:
            raise DataError(f"{path}: has {lists[0]} alone, expected both {METADATA} and {PAIRS} (VideoDPO)")
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
    files = sorted(folder.glob("*.jsonl"))
    if (folder / _JSONL_NAME) in files:
        return folder / _JSONL_NAME
    if len(files) != 1:
        raise DataError(f"{folder}: has {len(files)} .jsonl files, expected one, or {_JSONL_NAME}, or a file's name")
    return files[0]


# ---- JSONL ----


@dataclass(frozen=True)
class JsonlReader:
    """Reads one JSON object a line: ``prompt``, ``chosen``, ``rejected``, optional :data:`FURTHER_IMAGES` and scores.

    Paths are relative to the file's folder. Equal scores are a tie. A record's row is its line number minus one; empty
    lines are skipped. Further keys go to ``extra``; those that may be misspelt are listed too.
    """

    path: Path

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.path.parent

    def state(self) -> Any:
        """Lists name, size, times and inode of the file."""
        return states(self.root, [self.path])

    def __iter__(self) -> Iterator[PairRecord]:
        for row, value in read_lines(self.path):
            yield self._record(row, value)

    def _record(self, row: int, value: dict[str, Any] | str) -> PairRecord:
        if isinstance(value, str):
            return bad_row(row, value)
        extra = {key: item for key, item in value.items() if key not in _PAIR_KEYS}
        paths = ["chosen", "rejected", *(key for key in FURTHER_IMAGES if value.get(key) is not None)]
        for key in ("prompt", *paths):
            if not isinstance(value.get(key), str):
                return bad_row(row, f"{key}={short(value[key])}: expected text" if key in value else f"no key {key!r}")
            if has_unpaired_surrogate(value[key]):
                return bad_row(row, f"{key}={short(value[key])}: holds an unpaired surrogate")  # JSON allows it
        for key in paths:
            if not value[key]:
                return bad_row(row, f"{key}='': expected a path", value["prompt"])
        for key in ("chosen_score", "rejected_score"):
            if value.get(key) is not None and not is_finite_number(value[key]):
                return bad_row(row, f"{key}={short(value[key])}: expected a number", value["prompt"])
        better, worse = value.get("chosen_score"), value.get("rejected_score")
        if better is not None and worse is not None and better < worse:
            problem = f"chosen_score={short(better)} is below rejected_score={short(worse)}"
            return bad_row(row, problem, value["prompt"])
        tie, files = better is not None and better == worse, {key: self.root / value[key] for key in paths}
        nearest_keys = {key: meant for key in extra if (meant := _nearest_key(key)) and value.get(meant) is None}
        more: dict[str, Any] = {"chosen_score": better, "rejected_score": worse, "extra": extra}
        return PairRecord(row, value["prompt"], **files, **more, tie=tie, misspelt=nearest_keys)


@lru_cache
def _nearest_key(key: str) -> str | None:
    """Returns the optional key that another key is spelt almost like, apart from upper case; ``None`` for most."""
    return nearest(key.lower(), _OPTIONAL_KEYS, 0.85)  # "chosen_seed" is 0.78 like "chosen_score"


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields rows and objects of a JSONL file; in place of an object, what is wrong with a line that holds none.

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
    """Returns the JSON object of a line, or what is wrong with it."""
    try:
        # "utf-8-sig": some editors write a byte order mark before the first line.
        value = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"not JSON: {error}"
    except FileError as error:
        cause = error.__cause__
        if isinstance(cause, json.JSONDecodeError):  # its own message calls every line the first
            return f"not JSON: {cause.msg}, character {cause.pos + 1}"
        return str(error)
    if _is_deep(value):  # what the parser accepts may still be too deep to be printed or written
        return f"nested too deeply, expected JSON of at most {_DEEPEST} levels"
    return value if isinstance(value, dict) else f"holds {short(value)}, expected a JSON object"


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        inner = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    return bool(level)


def write_jsonl(records: Iterable[PairRecord], path: str | Path) -> None:
    """Writes pairs as :class:`JsonlReader` reads them, aside and renamed; paths become relative to the file.

    Raises:
        DataError: a record is faulty, or its image is in memory and has no path.
    """
    path = Path(path)
    lines = []
    for record in records:
        if record.problem:
            raise DataError(f"{row_name(record.row)}: {record.problem}, expected a pair")
        value: dict[str, Any] = {"prompt": record.prompt}
        for key, source in record.sources.items():
            if isinstance(source, bytes):
                raise DataError(f"{row_name(record.row)}: {key} is {len(source)} bytes in memory, expected a file")
            value[key] = Path(os.path.relpath(source, path.parent)).as_posix()
        for key, score in (("chosen_score", record.chosen_score), ("rejected_score", record.rejected_score)):
            if score is not None:
                value[key] = score
        line = json.dumps(value | record.extra, ensure_ascii=False)
        lines.append((json.dumps(value | record.extra) if has_unpaired_surrogate(line) else line) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, "".join(lines))
