"""Encodes pairs once: decoded in threads, encoded on the device, written shard by shard."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sipo.cache.encode import PairEncoder
from sipo.cache.existing import ExistingCache, bad_pair, read_files
from sipo.cache.index import PairsIndex, no_pairs, read_pairs_index, write_pairs_index
from sipo.cache.savings import Cost
from sipo.cache.source import Tally, shard_sources
from sipo.data.config import DataConfig
from sipo.data.load import CUT_TOLERANCE
from sipo.data.records import DataError, PairReader, PairRecord, row_name
from sipo.families.base import Family
from sipo.files import remove_leftovers
from sipo.locks import locked
from sipo.processes import everywhere, from_all, from_main, in_rounds, on_main


@dataclass(frozen=True)
class CacheSummary:
    """What a cache holds, and what a call of :func:`precompute_pairs` did to it.

    Attributes:
        pairs: that can be trained on.
        records: rows of the source that were looked at.
        ties: rows without a preference, which are no pairs to train on.
        skipped: by reason, how many pairs were left out because they could not be used.
        skipped_rows: their rows, with what is wrong with each.
        prompts: distinct ones.
        bytes: of all files of tensors.
        seconds: that this call took.
        written: shards of latents that were encoded, by all processes together.
        kept: shards of latents that were whole and up to date.
        texts: shards of text that were encoded.
        absent: shards of latents none of whose images or clips exists any more, so that they could not be compared.
        changes: the first change in each shard that no longer agrees with the source.
        cut: files of the condition images that were encoded and lost more than :data:`sipo.data.load.CUT_TOLERANCE` of
            their area to get their samples' shape, by row.
    """

    pairs: int
    records: int
    ties: int
    skipped: dict[str, int]
    skipped_rows: list[tuple[int, str]]
    prompts: int
    bytes: int
    seconds: float
    written: int
    kept: int
    texts: int = 0
    absent: int = 0
    changes: list[str] = field(default_factory=list)
    cut: dict[int, str] = field(default_factory=dict)

    def news(self) -> list[str]:
        """Describes in one line each what has changed, what could not be compared, and what was cut."""
        lines, shards = [], self.written + self.kept
        if self.changes:
            more = len(self.changes) - 1
            others = f", and in {more} more shard{'s' * (more > 1)}" if more else ""
            lines.append(
                f"the data has changed ({self.changes[0]}{others}): "
                f"{self.written} of {shards} shards of latents and {self.texts} of text encoded again, {self.kept} kept"
            )
        if self.absent:
            lines.append(
                f"{self.absent} of {shards} shards could not be checked: their images or clips are missing; the "
                "encoded data is used unchanged"
            )
        if self.cut:
            first = min(self.cut)
            lines.append(
                f"{len(self.cut)} condition image{'s' * (len(self.cut) > 1)} lost more than {CUT_TOLERANCE:.0%} of the "
                f"area to get the shape of the samples, first {row_name(first)}: {self.cut[first]}"
            )
        return lines

    def describe(self) -> str:
        """Formats the summary in two lines for a terminal."""
        return (
            f"{self.pairs} pairs, {self.prompts} prompts, {self.bytes / 1e6:.1f} MB "
            f"({self.written} shards written, {self.kept} kept, {self.seconds:.0f} s)\n"
            f"rows: {self.records}, ties: {self.ties}, left out: {sum(self.skipped.values())}"
        )


def precompute_pairs(
    reader: PairReader,
    family: Family,
    load_pipeline: Callable[[], Any],
    folder: str | Path,
    *,
    settings: DataConfig,
    fingerprint: dict[str, Any],
    check_hashes: bool = True,
    verify: bool = False,
    refuse_changes: bool = False,
    accelerator: Any = None,
    on_cost: Callable[[Cost], None] | None = None,
    progress: bool | None = True,
) -> CacheSummary:
    """Encodes every pair of a source, and every prompt once, into a cache; keeps what has not changed.

    A pair's latents depend on its row, the settings and the encoders alone: the two images of a pair are
    encoded together, clips one by one, as two would take twice the memory; and every random number (the posterior's
    draw, a random crop, a flip, which both samples share) is seeded by the row. So it does not matter how many
    processes there are, or how often they were interrupted.

    A shard is compared with the rows that it is made of and with their files, by size, times and inode, and by content
    where the size alone is equal. One that differs is encoded again as a whole: latents where a row, a side or a file
    has changed, text where a prompt has.

    Every process calls this, and reads the source from its start to find its own shards. A source that says by itself
    that nothing has changed (``state()``) is not read. An error of one process ends all of them
    (:mod:`sipo.processes`).

    Args:
        reader: the source.
        family: encodes.
        load_pipeline: gives the pipeline of :meth:`Family.load_encoders` on its device; not called where a finished
            cache needs nothing.
        folder: the cache's; must be empty, absent, or a cache of the same settings.
        settings: see :class:`sipo.data.config.DataConfig`. ``max_pairs`` counts rows that are no ties.
        fingerprint: what the content depends on (:func:`sipo.cache.index.pairs_fingerprint`).
        check_hashes: read every existing shard and compare its hash; else its size alone.
        verify: read every file of the source that a shard was made of, and compare contents.
        refuse_changes: raise at the first change, before anything is encoded again: for a run that continues.
        accelerator: accelerate's, if there is one: shards are dealt out to its processes, who must see one folder.
        on_cost: told what is to be encoded, if anything is, before any pair of a cache that is not finished is; in the
            first process.
        progress: as in :mod:`sipo.progress`.

    Raises:
        BadPairError: without ``settings.skip_bad``, a pair that cannot be used. What was finished stays.
        CacheError: the folder holds a cache of other settings, or one of another ``data.dataset_name`` whose pairs are
            other ones; a change, where they are refused; a shard whose files are all missing, where it has changed or
            is to be verified; no pair can be used.
        DataError: a source that cannot be read, or has condition images where the family takes none.
        ValueError: a size that the family cannot take; rows of the source that do not grow.
        LockedError: another run is writing to the folder.
        OtherProcessError: whatever ended another process.
    """
    started = time.monotonic()
    folder = Path(folder)
    load_pipeline = functools.cache(load_pipeline)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    encoder: PairEncoder

    def is_unchanged() -> bool:
        """Opens the folder; compares it with the source as far as that needs no reading of either."""
        nonlocal encoder
        how = {"check_hashes": check_hashes, "verify": verify, "refuse_changes": refuse_changes}
        existing = ExistingCache(folder, settings, fingerprint, **how)
        existing.stale |= world > 1  # others may have recorded new times
        encoder = PairEncoder(family, load_pipeline, settings, existing, _state(reader, existing.finished))
        return existing.is_unchanged(reader, encoder.state)

    def load() -> None:
        if encoder.existing.finished:
            return
        _check_rows(reader, family, settings)
        encoder.pipeline()

    def begin() -> None:
        if not encoder.existing.finished:
            folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                encoder.existing.begin()
        if rank == 0:
            if writable:
                remove_leftovers(folder)
            encoder.encode_unconditional()
            if on_cost is not None and not encoder.existing.finished:
                cost = encoder.cost(reader)
                if cost.pairs != 0:
                    on_cost(cost)

    unchanged = all(from_all(accelerator, is_unchanged))
    if not unchanged:
        # A finished cache that nobody can write to may still be compared, and is then found to be as it was.
        writable = from_main(accelerator, lambda: not folder.exists() or os.access(folder, os.W_OK))
        what = f"data.cache={str(folder)!r}"
        with locked(folder, what, accelerator=accelerator) if writable else contextlib.nullcontext():
            unchanged = all(from_all(accelerator, is_unchanged))  # again: another run may have been at work meanwhile
            if not unchanged:
                # Sizes are checked before anything is written, and no encoder is loaded where another run has the
                # folder.
                everywhere(accelerator, load)
                everywhere(accelerator, begin)
                in_rounds(accelerator, encoder.encode_shards(reader, rank, world, progress))
                on_main(accelerator, lambda: _finish(encoder))
    # Where nothing has changed, the index that was opened is still the cache's.
    index = encoder.existing.index if unchanged else everywhere(accelerator, lambda: read_pairs_index(folder))
    assert index is not None  # else the first process has written it
    seconds = time.monotonic() - started
    if unchanged:
        return _summary(index, seconds, written=0, kept=len(index.latents))
    counts = (encoder.written, encoder.kept, encoder.texts, encoder.existing.absent)
    everyone = from_all(accelerator, lambda: (counts, encoder.existing.changes, encoder.cut))
    written, kept, texts, absent = (sum(each) for each in zip(*(counts for counts, _, _ in everyone), strict=True))
    changes = [change for _, own, _ in everyone for change in own]
    cut = {row: file for _, _, own in everyone for row, file in own.items()}
    return _summary(index, seconds, written=written, kept=kept, texts=texts, absent=absent, changes=changes, cut=cut)


def _check_rows(reader: PairReader, family: Family, settings: DataConfig) -> None:
    """Refuses rows that cannot be used, as far as that is quickly known, before encoders are loaded."""
    whole = getattr(reader, "root", None) is not None  # rows of paths alone are read at once
    if not whole and family.condition_image != "required":
        return
    rows = reader if whole else itertools.islice(reader, 1)  # the first shows whether there are condition images
    tally = Tally()
    faulty: list[PairRecord] = []
    for source in shard_sources(rows, family, settings, tally):
        faulty += [record for record in source.records if record.problem]
        if faulty and not settings.skip_bad:
            raise bad_pair(faulty[0].row, faulty[0].problem_kind, faulty[0].problem)
    if whole and faulty and len(faulty) == tally.records - tally.ties:
        why = f"{row_name(faulty[0].row)}: {faulty[0].problem}"
        raise no_pairs(settings.dataset_name, tally.records, why)


def _state(reader: PairReader, required: bool) -> Any:
    """Returns the source's own description of its state as JSON; ``None`` if it has none.

    Raises:
        DataError: it cannot be read; also where its state is not ``required`` and its rows cannot be read either.
    """
    try:
        return getattr(reader, "state", lambda: None)()
    except DataError:
        if required:
            raise
        # An unfinished cache needs only the rows, which may be local when the hub is not reachable. Where they
        # are not, this says so before any encoder is loaded.
        next(iter(reader), None)
        return None


def _summary(index: PairsIndex, seconds: float, **done: Any) -> CacheSummary:
    return CacheSummary(
        pairs=index.pairs,
        records=index.records,
        ties=index.ties,
        skipped=index.skipped,
        skipped_rows=[(row, reason) for shard in index.latents for row, _, reason in shard.facts["skipped"]],
        prompts=sum(len(shard.facts["prompts"]) for shard in index.text),
        bytes=sum(shard.bytes for shard in index.shards),
        seconds=seconds,
        **done,
    )


def _finish(encoder: PairEncoder) -> None:
    """Writes the index, once every shard is written, if it has changed."""
    existing, tally, settings = encoder.existing, encoder.tally, encoder.settings
    index = read_pairs_index(existing.shards.path)
    changed = existing.stale or existing.changes or read_files(existing.shards.path) is None
    now = (tally.records, tally.ties, settings.dataset_name, encoder.state)
    if not changed and index and index.complete and (index.records, index.ties, index.path, index.state) == now:
        return
    write_pairs_index(
        existing.shards,
        existing.fingerprint,
        settings.dataset_name,
        encoder.state,
        count=tally.shards,
        records=tally.records,
        ties=tally.ties,
    )
