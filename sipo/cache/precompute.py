"""Pairs to latents and text embeddings, once: decoded in threads, encoded on the device, written shard by shard."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sipo.cache.encode import PairEncoder
from sipo.cache.existing import Existing, is_limit_raised, stop_at_skipped
from sipo.cache.fingerprint import fingerprint
from sipo.cache.format import ShardFolder
from sipo.cache.index import is_unchanged, read_files, read_known, write_pairs_index
from sipo.cache.savings import Cost
from sipo.cache.summary import CacheSummary
from sipo.data.config import DataConfig
from sipo.data.records import DataError, PairReader
from sipo.families.base import Family
from sipo.families.config import ModelConfig
from sipo.files import remove_leftovers
from sipo.locks import locked
from sipo.processes import everywhere, from_main, gathered, in_rounds, on_main


def precompute_pairs(
    reader: PairReader,
    family: Family,
    load_pipeline: Callable[[], Any],
    folder: str | Path,
    *,
    settings: DataConfig,
    model: ModelConfig,
    weights: Mapping[str, str] | None = None,
    check_hashes: bool = True,
    verify: bool = False,
    refuse_changes: bool = False,
    accelerator: Any = None,
    on_cost: Callable[[Cost], None] | None = None,
    progress: bool | None = True,
) -> CacheSummary:
    """Encodes every pair of a source, and every prompt once, into a cache; what is there and has not changed is kept.

    A pair's latents depend on its row, the settings and the encoders alone: the two images of a pair are
    encoded together, clips one by one, as two would take twice the memory; and every random number (the posterior's
    draw, a random crop, a flip, which both samples share) is seeded by the row. So it does not matter how many
    processes there are, or how often they were interrupted.

    A shard is compared with the rows that it is made of and with their files, by size, times and inode, and by content
    where the size alone is equal. One that differs is encoded anew as a whole: latents where a row, a side or a file
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
        model: what the encoders are loaded from, for the cache's fingerprint.
        weights: their files, for the same.
        check_hashes: read every shard that is there and compare its hash; else its size alone.
        verify: read every file of the source that a shard was made of, and compare contents.
        refuse_changes: raise at the first change, before anything is encoded anew: for a run that goes on.
        accelerator: accelerate's, if there is one: shards are dealt out to its processes, who must see one folder.
        on_cost: told what is to be encoded, if anything is, before any pair of a cache that is not finished is; in the
            first process.
        progress: as in :mod:`sipo.progress`.

    Raises:
        BadPairError: without ``settings.skip_bad``, a pair that cannot be used. What was finished stays.
        CacheError: the folder holds a cache of other settings, or one of another ``data.dataset_name`` whose pairs are
            other ones; a change, where they are refused; a shard whose files are all missing, where it has changed or
            is to be verified; no pair can be used.
        DataError: a source that cannot be read.
        ValueError: a size that the family cannot take; rows of the source that do not grow.
        LockedError: another run is writing to the folder.
        OtherProcessError: whatever ended another process.
    """
    started = time.monotonic()
    folder = Path(folder)
    load_pipeline = functools.cache(load_pipeline)
    marks = fingerprint(model, settings, weights)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)

    def look() -> tuple[PairEncoder, CacheSummary | None]:
        """Reads what is there; gives its summary if nothing has changed."""
        index = read_known(folder, marks)
        finished = index if index is not None and index["complete"] else None
        state = None
        try:
            state = getattr(reader, "state", lambda: None)()
        except DataError:
            if finished is not None:
                raise
            # An unfinished cache needs only the rows, which may be local when the hub is not reachable. Where they
            # are not, this says so before any encoder is loaded.
            next(iter(reader), None)
        how = {"check_hashes": check_hashes, "verify": verify, "refuse_changes": refuse_changes}
        existing = Existing(folder, settings, marks, index, **how)
        existing.stale |= world > 1  # others may have recorded new times
        encoder = PairEncoder(family, load_pipeline, settings, existing, state)
        if finished is None or check_hashes or verify:
            return encoder, None
        raised = any(is_limit_raised(shard, settings) for shard in finished["latents"])
        if raised or not is_unchanged(folder, finished, reader, state, settings.dataset_name):
            return encoder, None
        stop_at_skipped(finished["latents"], settings)
        return encoder, _summary(
            finished, len(range(rank, len(finished["latents"]), world)), time.monotonic() - started
        )

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

    encoder, unchanged = everywhere(accelerator, look)
    if all(gathered(accelerator, unchanged is not None)) and unchanged is not None:
        return unchanged
    # A finished cache that nobody can write to may still be compared, and is then found to be as it was.
    writable = from_main(accelerator, lambda: not folder.exists() or os.access(folder, os.W_OK))
    what = f"data.cache={str(folder)!r}"
    with locked(folder, what, accelerator=accelerator) if writable else contextlib.nullcontext():
        encoder, unchanged = everywhere(accelerator, look)  # again: another run may have been at work meanwhile
        if all(gathered(accelerator, unchanged is not None)) and unchanged is not None:
            return unchanged
        # Sizes are checked before anything is written, and no encoder is loaded where another run has the folder.
        everywhere(accelerator, lambda: encoder.existing.finished or encoder.pipeline())
        everywhere(accelerator, begin)
        in_rounds(accelerator, encoder.encode_shards(reader, rank, world, progress))
        on_main(accelerator, lambda: _finish(encoder))
        index = everywhere(accelerator, ShardFolder(folder).read_index)
    assert index is not None  # the first process has written it
    return _summary(index, encoder.kept, time.monotonic() - started, encoder)


def _summary(index: dict[str, Any], kept: int, seconds: float, encoder: PairEncoder | None = None) -> CacheSummary:
    shards = [*index["latents"], *index["text"]]
    return CacheSummary(
        pairs=index["pairs"],
        records=index["records"],
        ties=index["ties"],
        skipped=index["skipped"],
        skipped_rows=[(row, reason) for shard in index["latents"] for row, _, reason in shard["skipped"]],
        prompts=sum(len(shard["prompts"]) for shard in index["text"]),
        bytes=sum(shard["bytes"] for shard in shards),
        written=0 if encoder is None else encoder.written,
        kept=kept,
        seconds=seconds,
        changes=[] if encoder is None else encoder.existing.changes,
        texts=0 if encoder is None else encoder.texts,
        absent=0 if encoder is None else encoder.existing.absent,
    )


def _finish(encoder: PairEncoder) -> None:
    """Writes the index, once every shard is there, if it has changed."""
    existing, tally, settings = encoder.existing, encoder.tally, encoder.settings
    found = existing.shards.read_index()
    before = None if found is None else [found.get(name) for name in ("records", "ties", "path", "state")]
    now = [tally.records, tally.ties, settings.dataset_name, encoder.state]
    changed = existing.stale or existing.changes or read_files(existing.folder) is None
    if not changed and found is not None and found["complete"] and before == now:
        return
    write_pairs_index(
        existing.shards,
        existing.marks,
        settings.dataset_name,
        encoder.state,
        count=tally.shards,
        records=tally.records,
        ties=tally.ties,
    )
