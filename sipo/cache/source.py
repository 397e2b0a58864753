"""The source of a cache's pairs: its rows, divided among shards, and its files; and whether either has changed.

A file is known by its size, times and inode, and by its content (SHA-256) where only the size is as it was: a copy or a
clone has other times and inodes, and the same content. Content that changes while all of these stay is found where
everything is to be verified.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sipo.cache.format import digest, text_key
from sipo.data.config import DataConfig
from sipo.data.records import DataError, PairReader, PairRecord, row_name, stamp
from sipo.families.base import Family
from sipo.families.network import Condition
from sipo.files import file_hash

RowFacts = list[Any]
"""``[row, problem, whether it has a caption, its images or clips by name]``.

These are given by their paths, or by ``sha256:...`` of bytes.
"""

FileRecord = list[Any]
"""``[bytes, mtime_ns, ctime_ns, inode, sha256]`` of a file; empty where there was none."""

_CHUNK = 32  # files: smaller than a shard, so that all threads get work
_NO_FILE = [-1, -1, -1, -1]
_64_BITS = (1 << 64) - 1
_IN_MEMORY = "sha256:"


def record_file(path: Path) -> FileRecord:
    """Reads a file's stamp and then its hash, so that a change in between is found next time."""
    found = stamp(path)
    try:
        return [*found, file_hash(path)] if found else []
    except OSError:  # not readable, which decoding reports more precisely
        return []


def files_digest(stamps: Iterable[list[int]]) -> str:
    """Hashes stamps in their order."""
    numbers = array("Q")
    for found in stamps:
        numbers.extend(number & _64_BITS for number in found or _NO_FILE)
    return hashlib.sha256(numbers.tobytes()).hexdigest()


def stamps_of(paths: Sequence[str | Path], executor: Executor) -> Iterator[list[int]]:
    """Reads the stamps of many files, several at a time: on a network drive each takes a round trip."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    return chain.from_iterable(executor.map(lambda chunk: list(map(stamp, chunk)), chunks))


def path_named(name: str, prefix: str) -> str:
    """Undoes :func:`side_name`."""
    return name if os.path.isabs(name) else prefix + name


def side_name(source: Path | bytes, prefix: str) -> str:
    """Names an image or clip of a pair: its path without the source's folder, or the hash of its bytes."""
    if isinstance(source, bytes):
        return _IN_MEMORY + hashlib.sha256(source).hexdigest()
    return source.as_posix().removeprefix(prefix)


class Comparison(NamedTuple):
    """The result of comparing the files of a shard with their records.

    Attributes:
        change: the first change in words, without the row; empty if there is none.
        name: of the file that has changed.
        files: up-to-date records by name, where nothing has changed.
        absent: whether all files are gone, so that they cannot be compared.
    """

    change: str
    name: str
    files: dict[str, FileRecord]
    absent: bool


def compare_files(
    records: Mapping[str, FileRecord], path_of: Callable[[str], Path], executor: Executor, verify: bool = False
) -> Comparison:
    """Compares files with their records; reads those whose stamp has changed and whose size has not.

    Args:
        records: by name.
        path_of: where a name is now.
        executor: reads.
        verify: read all of them.
    """
    stamps = dict(zip(records, stamps_of([path_of(name) for name in records], executor), strict=True))
    recorded = [name for name, record in records.items() if record]
    if _absent(records, stamps):
        return Comparison("", "", dict(records), absent=True)
    for name, record in records.items():
        now = stamps[name]
        if bool(now) != bool(record):
            return Comparison("exists now" if now else "no longer exists", name, {}, absent=False)
        if now and now[0] != record[0]:
            return Comparison(f"has other content ({now[0]} bytes, {record[0]} before)", name, {}, absent=False)
    doubtful = [name for name in recorded if verify or stamps[name] != records[name][:-1]]
    files = dict(records)
    for name, now in zip(doubtful, executor.map(record_file, map(path_of, doubtful)), strict=True):
        if not now or now[-1] != records[name][-1]:
            return Comparison("has other content", name, {}, absent=False)
        files[name] = now
    return Comparison("", "", files, absent=False)


def are_absent(records: Mapping[str, FileRecord], path_of: Callable[[str], Path], executor: Executor) -> bool:
    """Tells whether files were recorded and none of them exists any more."""
    return _absent(records, dict(zip(records, stamps_of([path_of(name) for name in records], executor), strict=True)))


def _absent(records: Mapping[str, FileRecord], stamps: Mapping[str, list[int]]) -> bool:
    return any(records.values()) and not any(stamps.values())


def first_row_change(before: Iterable[RowFacts], after: Iterable[RowFacts]) -> str:
    """Describes the first row that differs; empty if none does."""
    for old, new in zip_longest(before, after):
        if old == new:
            continue
        if new is None or (old is not None and old[0] < new[0]):
            return f"{row_name(old[0])}: no longer a pair"
        if old is None or new[0] < old[0]:
            return f"{row_name(new[0])}: a new pair"
        for side in old[3] | new[3]:
            was, now = old[3].get(side, "none"), new[3].get(side, "none")
            if was != now:
                in_memory = was.startswith(_IN_MEMORY) and now.startswith(_IN_MEMORY)
                return f"{row_name(new[0])}: {side} " + ("has other content" if in_memory else f"is {now}, was {was}")
        if old[1] != new[1]:
            return f"{row_name(new[0])}: {new[1] or 'is valid now'}"
        return f"{row_name(new[0])}: {'has a caption now' if new[2] else 'the caption is empty now'}"
    return ""


def row_of(rows: Iterable[RowFacts], name: str) -> int:
    """Finds the first row that has a file."""
    return next((int(row[0]) for row in rows if name in row[3].values()), -1)


@dataclass
class Tally:
    """Counts of what was read from the source; the same in every process."""

    records: int = 0
    ties: int = 0
    shards: int = 0


class EncodedPair(NamedTuple):
    """A pair as it is written.

    Attributes:
        row: in the source.
        key: of its text (:func:`pair_key`).
        latents: ``[2, ...]``, chosen first.
        own: what each sample is told beside its prompt, ``[2, ...]`` by name.
        image: of its condition image, by name; empty where there is none.
        error_mask: ``[1, h, w]``, or with more dimensions of 1; ``None`` where there is none.
    """

    row: int
    key: str
    latents: Tensor
    own: Condition
    image: Condition
    error_mask: Tensor | None


@dataclass
class ShardSource:
    """The records that one shard is made from, and the prompts that no earlier shard has.

    Attributes:
        number: of the shard.
        prefix: the source's folder with a slash at its end, which the names of its files leave out.
        records: of the shard's pairs; removed once they wait to be encoded.
        keys: of their prompts.
        prompts: that no earlier shard has, by key.
        rows: what latents depend on beside the files' content.
        seen: digest of settings, rows, prompts and of the files' stamps.
        pairs: what has been encoded.
        conditions: text embeddings that have been encoded, by key.
        skipped: row, kind and reason of pairs that cannot be used.
        files: records of the files that have been read.
        change: the first change since it was encoded, in words; empty where there is none.
    """

    number: int
    prefix: str
    records: list[PairRecord] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)
    rows: list[RowFacts] = field(default_factory=list)
    seen: str = ""
    pairs: list[EncodedPair] = field(default_factory=list)
    conditions: dict[str, Condition] = field(default_factory=dict)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    change: str = ""
    needs_latents: bool = True
    needs_text: bool = True

    def read_rows(self, settings: str, executor: Executor) -> None:
        """Fills in ``rows`` and ``seen``.

        Args:
            settings: digest of what else the content depends on.
            executor: asks for the files' stamps.
        """
        paths: dict[str, Path] = {}
        for record in self.records:
            names = {side: side_name(source, self.prefix) for side, source in record.sources.items()}
            paths |= {names[side]: source for side, source in record.sources.items() if isinstance(source, Path)}
            self.rows.append([record.row, record.problem, bool(record.prompt.strip()), names])
        stamps = list(stamps_of(list(paths.values()), executor))
        self.seen = digest([settings, self.rows, self.keys, stamps])

    @property
    def new_keys(self) -> list[str]:
        """Keys of ``prompts``."""
        return list(self.prompts)


def prefix_of(reader: PairReader) -> str:
    """Gives what the names of a source's files leave out: its folder with a slash at its end, or nothing."""
    root: Path | None = getattr(reader, "root", None)
    return "" if root is None else f"{root.as_posix().rstrip('/')}/"


def pair_key(record: PairRecord, family: Family) -> str:
    """Gives the key of a pair's text embeddings: its prompt's, or its own where they depend on the condition image."""
    key = text_key(record.prompt)
    return f"{key}-{record.row}" if family.text_sees_image else key


def shard_sources(reader: PairReader, family: Family, settings: DataConfig, tally: Tally) -> Iterator[ShardSource]:
    """Divides the source into shards by row number, so that one row more or less changes its own shard alone.

    Raises:
        DataError: a row with a condition image, for a family that takes none.
        ValueError: rows that do not grow.
    """
    seen: set[str] = set()
    prefix = prefix_of(reader)
    part = ShardSource(0, prefix)
    candidates, last = 0, -1
    for record in reader:
        if settings.max_pairs is not None and candidates == settings.max_pairs:
            break
        if record.row <= last:  # its latents are stored under it
            raise ValueError(f"{row_name(record.row)} after {row_name(last)}: expected a source whose rows grow")
        last = record.row
        if record.condition_image is not None and family.condition_image == "none":
            where = f"{settings.dataset_name}: {row_name(record.row)}"
            raise DataError(f"{where} has a condition_image, family {family.name!r} takes none")
        if record.condition_image is None and family.condition_image == "required" and not record.problem:
            problem = f"no condition_image, family {family.name!r} needs one"
            near = [key for key, meant in record.misspelt.items() if meant == "condition_image"]
            problem += f"; the row has {near[0]!r}" if near else ""
            record = replace(record, problem=problem, problem_kind="condition")
        tally.records += 1
        if record.tie:
            tally.ties += 1
            continue
        candidates += 1
        if part.records and record.row // settings.shard_pairs != part.records[0].row // settings.shard_pairs:
            tally.shards += 1
            yield part
            part = ShardSource(tally.shards, prefix)
        key = pair_key(record, family)
        part.records.append(record)
        part.keys.append(key)
        if not record.problem and key not in seen:
            seen.add(key)
            part.prompts[key] = record.prompt
    if part.records:
        tally.shards += 1
        yield part
