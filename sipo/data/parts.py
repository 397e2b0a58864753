"""Which pairs of a source make up which shard, and running ahead of whoever takes them."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from sipo.config import DataConfig
from sipo.data.cache import digest, text_key
from sipo.data.records import PairReader, PairRecord
from sipo.families.base import Condition

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass
class Tally:
    """What was met on the way through the source; the same in every process."""

    records: int = 0
    ties: int = 0
    parts: int = 0


@dataclass
class Part:
    """The records of one shard, and the prompts that no earlier one has."""

    number: int
    records: list[PairRecord] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    pairs: list[tuple[int, str, Tensor, Condition]] = field(default_factory=list)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)
    source: str = ""
    needs_latents: bool = True
    needs_text: bool = True

    def digest(self, marks: dict[str, Any]) -> str:
        """What the shards' content depends on: the settings and the records, files by name and size."""
        rows = [[r.row, r.prompt, _trace(r.chosen), _trace(r.rejected), r.problem] for r in self.records]
        return digest([marks, rows, self.prompts])


def parts(reader: PairReader, settings: DataConfig, tally: Tally) -> Iterator[Part]:
    """Cuts the source into shards: which pair is in which follows from the source's order and nothing else."""
    seen: set[str] = set()
    part = Part(0)
    candidates, last = 0, -1
    for record in reader:
        if settings.max_pairs is not None and candidates == settings.max_pairs:
            break
        if record.row <= last:  # its latents are stored under it
            raise ValueError(f"row {record.row} after row {last}: expected a source whose rows grow")
        last = record.row
        tally.records += 1
        if record.tie:
            tally.ties += 1
            continue
        candidates += 1
        part.records.append(record)
        if not record.problem and (key := text_key(record.prompt)) not in seen:
            seen.add(key)
            part.prompts.append(record.prompt)
        if len(part.records) == settings.shard_pairs:
            yield part
            part = Part(part.number + 1)
        tally.parts = part.number
    if part.records:
        yield part
        tally.parts = part.number + 1


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T], depth: int
) -> Generator[tuple[_T, _R], None, None]:
    """``(item, function(item))`` in order, with no more than ``depth`` results computed or waiting."""
    waiting: deque[tuple[_T, Future[_R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > depth:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _trace(source: Path | bytes) -> list[str | int]:
    """What tells one image or clip from another that has taken its place, as far as that is cheap."""
    if isinstance(source, bytes):
        return [hashlib.sha256(source).hexdigest()]
    return [source.name, source.stat().st_size if source.is_file() else -1]
