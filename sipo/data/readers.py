"""Readers of pairs: JSONL, Pick-a-Pic's parquet, VideoDPO's two JSON files.

A row that cannot be used becomes a record with a ``problem``, never an exception and never another row's files: a
reader drops nothing and moves nothing, so that row 7 is row 7 to whoever counts. No file is opened that is no regular
one: a FIFO in its place would be waited for without end.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from sipo.data.parquet import read_rows, rows_of
from sipo.data.records import DataError, PairReader, PairRecord, has_half, row_name, short
from sipo.files import FileError, check_regular, parse_json, read_text

Format = Literal["auto", "jsonl", "pickapic", "videodpo"]

_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_JSONL_NAME = "pairs.jsonl"
_METADATA, _PAIRS = "metadata.json", "pair.json"
_PAIR_KEYS = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score")
_PICKAPIC_COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
_PICKAPIC_EXTRA = ("has_label", "are_different", "best_image_uid", "image_0_uid", "image_1_uid")
_LONGEST_LINE = 1 << 24  # bytes of a row of JSONL: what is longer is another kind of file
_DEEPEST = 64  # levels of a row of JSONL
_HUB_SECONDS = 10.0  # to wait for an answer
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
    if not _exists(place):
        raise DataError(f"{path}: no such file or folder, expected {format} data")
    if not place.is_dir():
        _check_file(place)
    if format == "jsonl":
        return JsonlReader(_jsonl_in(place) if place.is_dir() else place)
    if format == "videodpo":
        return VideoDpoReader(place if place.is_dir() else place.parent)
    raise DataError(f"format={format!r}: expected one of auto, jsonl, pickapic, videodpo")


def _exists(place: Path) -> bool:
    """Whether anything is there: of a name that no file can have, older Python raises an error."""
    return os.path.exists(place)


def _check_file(path: Path) -> None:
    try:
        check_regular(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected a file") from error
    except FileError as error:
        raise DataError(str(error)) from error


def _detect(path: str | Path) -> Format:
    place = Path(path)
    if not _exists(place):
        if isinstance(path, str) and _HUB_ID.fullmatch(path) and not place.suffix:
            return "pickapic"
        raise DataError(f"{path}: no such file or folder, and no hub id (owner/name)")
    if place.is_dir():
        found = [name for name in (_METADATA, _PAIRS) if (place / name).exists()]
        if len(found) == 2:
            return "videodpo"
        if any(place.glob("*.jsonl")):
            return "jsonl"
        if any(place.rglob("*.parquet")):
            return "pickapic"
        if found:
            raise DataError(f"{path}: has {found[0]} alone, expected both {_METADATA} and {_PAIRS} (VideoDPO)")
        raise DataError(f"{path}: expected a .jsonl file, parquet files, or {_METADATA} and {_PAIRS} in that folder")
    _check_file(place)
    if place.suffix in _JSONL_SUFFIXES:
        return "jsonl"
    if place.suffix == ".parquet":
        return "pickapic"
    if place.name in (_METADATA, _PAIRS):
        return "videodpo"
    raise DataError(f"{path}: expected a name that ends in .jsonl or .parquet, or {_PAIRS}; or name the format")


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
        return _states(self.root, [self.path])

    def __iter__(self) -> Iterator[PairRecord]:
        folder = self.root
        for row, value in read_lines(self.path):
            yield self._record(row, value, folder)

    def _record(self, row: int, value: dict[str, Any] | str, folder: Path) -> PairRecord:
        if isinstance(value, str):
            return _bad(row, value)
        extra = {key: item for key, item in value.items() if key not in _PAIR_KEYS}
        for key in ("prompt", "chosen", "rejected"):
            if not isinstance(value.get(key), str):
                return _bad(row, f"{key}={short(value[key])}: expected text" if key in value else f"no key {key!r}")
            if has_half(value[key]):
                return _bad(row, f"{key}={short(value[key])}: holds half a character")  # which JSON lets through
        for key in ("chosen", "rejected"):
            if not value[key]:
                return _bad(row, f"{key}='': expected a path", value["prompt"])
        for key in ("chosen_score", "rejected_score"):
            if value.get(key) is not None and not is_number(value[key]):
                return _bad(row, f"{key}={short(value[key])}: expected a number", value["prompt"])
        better, worse = value.get("chosen_score"), value.get("rejected_score")
        if better is not None and worse is not None and better < worse:
            problem = f"chosen_score={short(better)} is below rejected_score={short(worse)}"
            return _bad(row, problem, value["prompt"])
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
    try:
        check_regular(path)
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected a JSONL file") from error
    except FileError as error:
        raise DataError(str(error)) from error
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


# ---- Pick-a-Pic ----


@dataclass(frozen=True)
class PickapicReader:
    """Pick-a-Pic v1 and v2 as published: ``jpg_0``, ``jpg_1`` (bytes), ``label_0``, ``label_1``, ``caption``.

    A label of 0.5 for both is a tie. ``has_label``, ``are_different``, ``best_image_uid``, ``image_0_uid`` and
    ``image_1_uid`` are compared with the labels where a data set has them. Local files are read where they lie, row
    group by row group; a hub's are downloaded first unless ``streaming``, which reads them row group by row group too.
    """

    path: str
    split: str = "train"
    streaming: bool = False

    def __iter__(self) -> Iterator[PairRecord]:
        for row, value in enumerate(self._rows()):
            yield _bad(row, value) if isinstance(value, str) else _pickapic_record(row, value)

    def state(self) -> Any:
        """Names, sizes, times and inodes of the local files, or names and git hashes of the hub's; images are not read.

        Raises:
            DataError: nothing there, or a hub that cannot be reached.
        """
        place = Path(self.path)
        if _exists(place):
            return _states(place, [place] if place.is_file() else sorted(place.rglob("*.parquet")))
        from huggingface_hub import HfApi

        try:
            info = HfApi().dataset_info(self.path, timeout=_HUB_SECONDS, files_metadata=True)
            # Not the commit: another README would have every image downloaded again, to find that it is the same.
            blobs = {file.rfilename: file.blob_id for file in info.siblings or []}
            files = {name: blob for name, blob in blobs.items() if name.endswith(".parquet")}
            configs = info.card_data.get("configs") if info.card_data is not None else None
            return {"files": files or info.sha, "configs": configs}
        except Exception as error:  # of the hub's library, of the one below it for HTTP, and of the network
            missing = f"{self.path}: no such file or folder, and not found on the hub"
            raise DataError(f"{missing}: {_one_line(error)}") from error

    def count(self) -> int | None:
        """Rows of local files, by their footers; ``None`` of a hub's, and where a file cannot be read."""
        from pyarrow import parquet

        place = Path(self.path)
        if not _exists(place):
            return None
        try:
            return sum(parquet.read_metadata(file).num_rows for file in self._files(place))
        except (DataError, OSError, ValueError):  # which reading says better
            return None

    def _rows(self) -> Iterator[dict[str, Any] | str]:
        """The rows; for one that cannot be read, what is wrong with it."""
        wanted = (*_PICKAPIC_COLUMNS, *_PICKAPIC_EXTRA)
        place = Path(self.path)
        if self.streaming or _exists(place):
            yield from read_rows(self._files(place), wanted, _PICKAPIC_COLUMNS)
            return
        from datasets import config, load_dataset

        # What has been downloaded is read without the hub too. Else one request: the library tries for half a minute.
        if not (Path(config.HF_DATASETS_CACHE) / self.path.replace("/", "___")).exists():
            self.state()
        try:
            data = load_dataset(self.path, split=self.split)
            missing = [name for name in _PICKAPIC_COLUMNS if name not in data.column_names]
            if missing:
                raise DataError(f"{self.path}: has no column {missing[0]!r}, expected Pick-a-Pic's columns")
            # As tables, so that images stay encoded, and a row that cannot be converted is no other row's fault.
            for table in data.with_format("arrow").iter(batch_size=64):
                yield from rows_of(table, wanted)
        except DataError:
            raise
        except Exception as error:  # of the hub's library, of the one below it for HTTP, of pyarrow, and of the network
            raise DataError(f"{self.path}: split {self.split!r} cannot be read: {_one_line(error)}") from error

    def _files(self, place: Path) -> list[str]:
        """The split's parquet files, in their order: paths, or ``hf://`` addresses of one revision."""
        if place.is_dir():
            for path in place.rglob("*.parquet"):
                _check_file(path)
        elif _exists(place):
            return [str(place)]
        else:
            self.state()  # as above
        from datasets import load_dataset_builder

        try:
            found = load_dataset_builder(self.path).config.data_files or {}
        except Exception as error:  # as above
            raise DataError(f"{self.path}: cannot be read: {_one_line(error)}") from error
        if self.split not in found:
            names = ", ".join(map(str, found)) or "none"
            raise DataError(f"{self.path}: split {self.split!r} cannot be read: expected one of {names}")
        files = [str(name) for name in found[self.split]]
        for name in files:
            if not name.endswith(".parquet"):
                raise DataError(f"{self.path}: {name} is no parquet file, expected Pick-a-Pic's files")
        return files


def _pickapic_record(row: int, value: Mapping[str, Any]) -> PairRecord:
    prompt = value["caption"]
    if not isinstance(prompt, str) or has_half(prompt):
        return _bad(row, f"caption={short(prompt)}: expected text")
    if value.get("has_label") is False:
        return _bad(row, "has_label=False: nobody has compared this pair", prompt)
    labels = [value["label_0"], value["label_1"]]
    if not all(is_number(label) and label >= 0 for label in labels) or not math.isclose(sum(labels), 1.0):
        return _bad(row, f"label_0={short(labels[0])}, label_1={short(labels[1])}: expected a sum of 1", prompt)
    tie = math.isclose(labels[0], labels[1])
    best = 0 if labels[0] >= labels[1] else 1
    named, uids = value.get("best_image_uid"), [value.get("image_0_uid"), value.get("image_1_uid")]
    if named and all(uids):
        expected = "tie" if tie else uids[best]
        if named != expected:
            return _bad(row, f"best_image_uid={named}: expected {expected}, which the labels name", prompt)
    if value.get("are_different") is False:
        return _bad(row, "are_different=False: both images are one", prompt)
    images = [_encoded(value[name]) for name in ("jpg_0", "jpg_1")]
    for name, image in zip(("jpg_0", "jpg_1"), images, strict=True):
        if not image:
            return _bad(row, f"{name} is empty: expected an encoded image", prompt)
    return PairRecord(row, prompt, images[best], images[1 - best], labels[best], labels[1 - best], tie)


def _encoded(value: Any) -> bytes:
    """An image's bytes, from a binary column or from one of images that are left encoded."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""


# ---- VideoDPO ----


@dataclass(frozen=True)
class VideoDpoReader:
    """VideoDPO's layout: ``metadata.json`` lists the clips, ``pair.json`` pairs their places in that list.

    An item of the first is ``{"basic": {"clip_path", ...}, "misc": {"frame_caption": [prompt]}}``, of the second
    ``{"video1": winner, "video2": loser, "frame_caption": prompt}``. Its ``label`` is not read: the published lists
    have the winner first whatever the label says, and so does the published loader.

    The places are those of the whole list. (The published loader drops clips of less than a second from the list
    before it counts, which shifts every place behind them.) Both clips' captions must be the pair's: this is what a
    shifted index is known by. A ``clip_path`` is relative to the folder; an absolute one that is not there, which is
    how the lists come from another machine, is looked for under the folder by its last two parts.
    """

    folder: Path

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.folder

    def state(self) -> Any:
        """Names, sizes, times and inodes of both lists."""
        return _states(self.folder, [self.folder / name for name in (_METADATA, _PAIRS)])

    def __iter__(self) -> Iterator[PairRecord]:
        clips = [_clip(self.folder, item) for item in _load_list(self.folder / _METADATA)]
        captioned: dict[str, list[int]] = {}
        for place, clip in enumerate(clips):
            if clip is not None:
                captioned.setdefault(clip.caption, []).append(place)
        for row, item in enumerate(_load_list(self.folder / _PAIRS)):
            yield self._record(row, item, clips, captioned)

    def _record(self, row: int, item: Any, clips: list[_Clip | None], captioned: dict[str, list[int]]) -> PairRecord:
        if not isinstance(item, dict):
            return _bad(row, f"holds {short(item)}, expected an object")
        prompt = _caption(item.get("frame_caption"))
        if prompt is None:
            return _bad(row, f"frame_caption={short(item.get('frame_caption'))}: expected text")
        found: list[_Clip] = []
        for key in ("video1", "video2"):
            place = item.get(key)
            if not isinstance(place, int) or isinstance(place, bool):
                return _bad(row, f"{key}={short(place)}: expected a place in {_METADATA}", prompt)
            if not 0 <= place < len(clips):
                return _bad(row, f"{key}={place}: expected 0 to {len(clips) - 1}", prompt, "index")
            clip = clips[place]
            if clip is None:
                return _bad(row, f"{key}={place}: that item of {_METADATA} has no clip_path or frame_caption", prompt)
            if clip.caption != _plain(prompt):
                text = f"{key}={place} is captioned {short(clip.caption)}, the pair {short(prompt)}"
                return _bad(row, text + _nearest(captioned.get(_plain(prompt), []), place), prompt, "index")
            found.append(clip)
        first, second = found
        if item["video1"] == item["video2"]:
            return _bad(row, f"video1=video2={item['video1']}: expected two clips", prompt, "index")
        if first.number is not None and second.number is not None and first.number != second.number:
            text = f"video1 was made for prompt {first.number} and video2 for prompt {second.number}: expected one"
            return _bad(row, text, prompt, "index")
        extra = {key: value for key, value in item.items() if key not in ("video1", "video2", "frame_caption")}
        return PairRecord(row, prompt, first.path, second.path, first.score, second.score, extra=extra)


@dataclass(frozen=True)
class _Clip:
    path: Path
    caption: str
    number: str | None
    score: float | None


def _clip(folder: Path, item: Any) -> _Clip | None:
    """One item of ``metadata.json``; ``None`` where it is not as expected, so that its place stays taken."""
    basic = item.get("basic") if isinstance(item, dict) else None
    misc = item.get("misc") if isinstance(item, dict) else None
    if not isinstance(basic, dict) or not isinstance(misc, dict):
        return None
    name, caption = basic.get("clip_path"), _caption(misc.get("frame_caption"))
    if not isinstance(name, str) or not name or has_half(name) or caption is None:
        return None
    path = folder / name
    if Path(name).is_absolute() and not os.path.exists(path):  # which is quiet about names that no file can have
        path = folder.joinpath(*Path(name).parts[-2:])
    number, score = basic.get("globalidx", basic.get("vidproidx")), basic.get("score")
    score = score if is_number(score) else None
    return _Clip(path, _plain(caption), str(number) if isinstance(number, (int, str)) else None, score)


def _caption(value: Any) -> str | None:
    """A caption, given as text or as a list that starts with it."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) and not has_half(value) else None


def _nearest(places: list[int], wanted: int) -> str:
    if not places:
        return ""
    place = min(places, key=lambda each: abs(each - wanted))
    return f", which is at {place}: the index is off by {wanted - place:+d}"


def _load_list(path: Path) -> list[Any]:
    try:
        value = parse_json(read_text(path), path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected VideoDPO's list") from error
    except FileError as error:
        raise DataError(str(error)) from error
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {type(value).__name__}, expected a list")
    return value


# ---- Shared ----


def _states(folder: Path, paths: Iterable[Path]) -> list[list[Any]]:
    from sipo.data.changes import stamp

    return [[path.relative_to(folder).as_posix(), *stamp(path)] for path in paths]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def _bad(row: int, problem: str, prompt: str = "", kind: Literal["row", "index"] = "row") -> PairRecord:
    return PairRecord(row, prompt, b"", b"", problem=problem, problem_kind=kind)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _one_line(error: object) -> str:
    return _plain(str(error)) or type(error).__name__
