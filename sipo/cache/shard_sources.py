"""Divides the records of a source among the shards of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sipo.cache.changes import FileRecord, RowFacts, side_name, stamps_of
from sipo.cache.format import digest, text_key
from sipo.data.config import DataConfig
from sipo.data.records import PairReader, PairRecord, row_name
from sipo.families.network import Condition


@dataclass
class Tally:
    """Counts of what was read from the source; the same in every process."""

    records: int = 0
    ties: int = 0
    shards: int = 0


@dataclass
class ShardSource:
    """The records that one shard is made from, and the prompts that no earlier shard has.

    Attributes:
        number: of the shard.
        prefix: the source's folder with a slash at its end, which the names of its files leave out.
        records: of the shard's pairs; removed once they wait to be encoded.
        keys: of their prompts.
        prompts: that no earlier shard has.
        rows: what latents depend on beside the files' content.
        seen: digest of settings, rows, prompts and of the files' stamps.
        pairs: what has been encoded: row, key, latents, and what each half is told.
        skipped: row, kind and reason of pairs that cannot be used.
        files: records of the files that have been read.
        change: the first change since it was encoded, in words; empty where there is none.
    """

    number: int
    prefix: str
    records: list[PairRecord] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    rows: list[RowFacts] = field(default_factory=list)
    seen: str = ""
    pairs: list[tuple[int, str, Tensor, Condition]] = field(default_factory=list)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    change: str = ""
    needs_latents: bool = True
    needs_text: bool = True

    def look(self, settings: str, executor: Executor) -> None:
        """Fills in ``rows`` and ``seen``.

        Args:
            settings: digest of what else the content depends on.
            executor: asks for the files' stamps.
        """
        paths: dict[str, Path] = {}
        for record in self.records:
            names = []
            for source in (record.chosen, record.rejected):
                names.append(side_name(source, self.prefix))
                if isinstance(source, Path):
                    paths[names[-1]] = source
            self.rows.append([record.row, *names, record.problem, bool(record.prompt.strip())])
        stamps = list(stamps_of(list(paths.values()), executor))
        self.seen = digest([settings, self.rows, self.keys, stamps])

    @property
    def new_keys(self) -> list[str]:
        """Keys of ``prompts``."""
        return [text_key(prompt) for prompt in self.prompts]


def prefix_of(reader: PairReader) -> str:
    """Gives what the names of a source's files leave out: its folder with a slash at its end, or nothing."""
    root: Path | None = getattr(reader, "root", None)
    return "" if root is None else f"{root.as_posix().rstrip('/')}/"


def shard_sources(reader: PairReader, settings: DataConfig, tally: Tally) -> Iterator[ShardSource]:
    """Divides the source into shards by row number, so that one row more or less changes its own shard alone."""
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
        tally.records += 1
        if record.tie:
            tally.ties += 1
            continue
        candidates += 1
        if part.records and record.row // settings.shard_pairs != part.records[0].row // settings.shard_pairs:
            tally.shards += 1
            yield part
            part = ShardSource(tally.shards, prefix)
        key = text_key(record.prompt)
        part.records.append(record)
        part.keys.append(key)
        if not record.problem and key not in seen:
            seen.add(key)
            part.prompts.append(record.prompt)
    if part.records:
        tally.shards += 1
        yield part
