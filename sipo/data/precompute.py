"""Pairs to latents and text embeddings, once: decoded in threads, encoded on the device, written shard by shard."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sipo.config import DataConfig, ModelConfig
from sipo.data.cache import (
    CROP,
    FLIP,
    FORMAT,
    INDEX,
    LATENTS,
    POSTERIOR,
    TEXT,
    UNCONDITIONAL,
    CacheError,
    DamagedError,
    Shard,
    read_index,
    read_shard,
    remove_leftovers,
    remove_shards,
    shard_name,
    text_key,
    trim,
    write_json,
    write_shard,
)
from sipo.data.changes import FileRecord, record_file, side_name
from sipo.data.check import BadPair, load_pair
from sipo.data.existing import (
    FILES_FACT,
    ROWS_FACT,
    Existing,
    indexed,
    is_unchanged,
    read_known,
    stop,
    stop_at_skipped,
    write_files,
)
from sipo.data.media import fit, nearest_size
from sipo.data.parts import Part, Tally, ahead, parts
from sipo.data.records import DataError, PairReader, PairRecord
from sipo.data.summary import CacheSummary
from sipo.data.weights import PLACE
from sipo.families.base import Condition, Family
from sipo.training.data import derive_seed

TEXT_BATCH = 16
"""Prompts in one call of the text encoders."""


def fingerprint(model: ModelConfig, data: DataConfig, weights: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the content of a cache depends on beside the pairs, by the names of the configuration's keys; JSON values.

    Where pairs and weights are is none of it: what is the same is the same wherever it is.

    Args:
        model: where the encoders come from.
        data: how pairs are encoded.
        weights: the encoders' files (:func:`sipo.data.weights.weight_hashes`); without them the model's path, revision
            and variant have to do.
    """
    of_model = ("family", "dtype")
    of_data = ("format", "split", "sizes", "frames", "fps", "crop", "flip", "latents", "tiling", "dtype")
    of_rows = ("max_pairs", "seed", "shard_pairs")
    marks = {f"model.{name}": getattr(model, name) for name in of_model}
    if weights is None:
        weights = {name: getattr(model, name) for name in PLACE}
    marks |= {f"model.{name}": value for name, value in weights.items()}
    return marks | {f"data.{name}": getattr(data, name) for name in (*of_data, *of_rows)}


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
    workers: int | None = None,
    progress: bool = True,
) -> CacheSummary:
    """Encodes every pair of a source, and every prompt once, into a cache; what is there and has not changed is kept.

    A pair's latents depend on its row, the settings and the encoders alone: both halves are encoded together and
    with nobody else, and every random number (the posterior's draw, a random crop, a flip, which both halves share) has
    the row for its seed. So it does not matter how many processes there are, or how often they were interrupted.

    A shard is compared with the rows that it is made of and with their files, by size, times and inode, and by content
    where the size alone is equal. One that differs is encoded anew as a whole: latents where a row, a side or a file
    has changed, text where a prompt has.

    Every process calls this, and reads the source from its start to find its own shards. A source that says by itself
    that nothing has changed (``state()``) is not read.

    Args:
        reader: the source.
        family: encodes.
        load_pipeline: gives the pipeline of :meth:`Family.load_encoders` on its device; not called where a finished
            cache needs nothing.
        folder: the cache's; must be empty, absent, or a cache of the same settings.
        settings: see :class:`sipo.config.DataConfig`. ``max_pairs`` counts rows that are no ties.
        model: what the encoders are loaded from, for the cache's fingerprint.
        weights: their files, for the same.
        check_hashes: read every shard that is there and compare its hash; else its size alone.
        verify: read every file of the source that a shard was made of, and compare contents.
        refuse_changes: raise at the first change, before anything is encoded anew: for a run that goes on.
        accelerator: accelerate's, if there is one: shards are dealt out to its processes, who must see one folder.
        workers: decoding threads; ``None`` takes as many as there are processors, and 8 at most.
        progress: whether to draw a progress bar.

    Raises:
        BadPair: without ``settings.skip_bad``, a pair that cannot be used. What was finished stays.
        CacheError: the folder holds a cache of other settings, or one of another ``data.path`` whose pairs are other
            ones; a change, where they are refused; a shard whose files are all missing, where it has changed or is to
            be verified; no pair can be used.
        DataError: a source that cannot be read.
        ValueError: a setting out of its range; a size that the family cannot take; rows of the source that do not grow.
    """
    started = time.monotonic()
    folder = Path(folder)
    if settings.shard_pairs < 1:
        raise ValueError(f"data.shard_pairs={settings.shard_pairs}: expected at least 1")
    marks = fingerprint(model, settings, weights)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    index = read_known(folder, marks)
    finished = index if index is not None and index["complete"] else None
    state = None
    # An unfinished cache needs only the rows, which may be local when the hub is not reachable.
    with contextlib.suppress(*(() if finished is not None else (DataError,))):
        state = getattr(reader, "state", lambda: None)()
    unread = finished is not None and not check_hashes and not verify
    if finished is not None and unread and is_unchanged(folder, finished, reader, state, settings.path):
        stop_at_skipped(finished["latents"], settings)
        for _ in range(0 if accelerator is None else 2):  # as below, should another process have seen a change
            accelerator.wait_for_everyone()
        return _summary(finished, len(range(rank, len(finished["latents"]), world)), time.monotonic() - started)
    how = {"check_hashes": check_hashes, "verify": verify, "refuse_changes": refuse_changes}
    there = Existing(folder, settings, marks, index, **how)
    there.stale |= world > 1  # others may have recorded new times
    run = _Run(family, load_pipeline, folder, settings, there, state)
    if finished is None:
        run.pipeline()  # sizes are checked before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0 and index is None:
            there.begin()
    if rank == 0:
        run.encode_unconditional()
    run.encode_parts(reader, rank, world, workers or min(8, os.cpu_count() or 1), progress)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if rank == 0:
        run.finish()
    if accelerator is not None:
        accelerator.wait_for_everyone()
    index = read_index(folder)
    assert index is not None  # the first process has written it
    return _summary(index, run.kept, time.monotonic() - started, run)


class _Prepared(NamedTuple):
    """Both halves of a pair: pixels ``[2, ...]`` float32 in [-1, 1], and what each is told beside its prompt."""

    pixels: Tensor
    own: Condition


class _Decoded(NamedTuple):
    """What became of a pair, and its files as they were just before."""

    result: _Prepared | BadPair
    files: dict[str, FileRecord]


class _Run:
    """One process's share of a :func:`precompute_pairs` call."""

    def __init__(
        self,
        family: Family,
        load_pipeline: Callable[[], Any],
        folder: Path,
        settings: DataConfig,
        existing: Existing,
        state: Any,
    ) -> None:
        self.family = family
        self.load_pipeline = load_pipeline
        self.folder = folder
        self.settings = settings
        self.existing = existing
        self.state = state
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.tally = Tally()
        self.written = 0
        self.kept = 0
        self.texts = 0
        self._pipeline: Any = None

    def pipeline(self) -> Any:
        """The encoders, loaded when they are first needed."""
        if self._pipeline is None:
            self._pipeline = self.load_pipeline()
            for height, width in self.settings.sizes:
                self.family.check_size(self._pipeline, height, width, self.settings.frames)
        return self._pipeline

    def encode_unconditional(self) -> None:
        """Writes what caption dropout puts in a prompt's place."""
        shard = self.existing.there(UNCONDITIONAL)
        if shard is None or shard.facts.get("source") != self.existing.source:
            condition = self.family.encode_unconditional(self.pipeline())
            self._write_text(UNCONDITIONAL, {"": condition}, {"source": self.existing.source, "prompts": []})

    def encode_parts(self, reader: PairReader, rank: int, world: int, workers: int, progress: bool) -> None:
        """Encodes every shard of this process that is missing or no longer agrees with the source."""
        from tqdm.auto import tqdm

        # A cache that has everything is compared in a moment, and needs no bar.
        bar = tqdm(desc="precompute", unit="pair", delay=1.0, disable=not progress or rank != 0)
        with bar, ThreadPoolExecutor(workers, "decode") as pool:
            todo = self._todo(reader, rank, world, pool, bar)
            with closing(ahead(pool, self._prepare, todo, 2 * workers)) as pairs:
                for (part, record), decoded in pairs:
                    if record is None or decoded is None:
                        self._flush(part)
                        continue
                    self._encode(part, record, decoded)
                    bar.update()
        if rank == 0:
            self.existing.find_gone(self.tally.parts)

    def finish(self) -> None:
        """Writes the index, once every shard is there, if it has changed."""
        found, tally = read_index(self.folder), self.tally
        counts = None if found is None else [found.get(name) for name in ("records", "ties", "path", "state")]
        now = [tally.records, tally.ties, self.settings.path, self.state]
        existing = self.existing
        if existing.check_hashes or existing.begun:  # else another run may be recording new times
            remove_leftovers(self.folder)
        if not existing.stale and not existing.changes and found is not None and found["complete"] and counts == now:
            return
        latents = [self._finished(shard_name(LATENTS, n)) for n in range(self.tally.parts)]
        text = [self._finished(name) for name in self._text_names()]
        shapes: dict[str, list[int]] = text[0].facts["shapes"]
        for shard in text:
            if shard.facts["prompts"] and shard.facts["shapes"] != shapes:
                raise CacheError(
                    f"{self.folder / shard.file}: text embeddings of shapes {shard.facts['shapes']}, expected "
                    f"{shapes} as for the empty prompt"
                )
        pairs = sum(len(shard.facts["pairs"]) for shard in latents)
        if pairs == 0:
            raise CacheError(f"{self.folder}: none of {self.tally.records} rows is a pair that can be used")
        skipped = [entry for shard in latents for entry in shard.facts["skipped"]]
        index = {
            "format": FORMAT,
            "complete": True,
            "fingerprint": existing.marks,
            "path": self.settings.path,
            "state": self.state,
            "pairs": pairs,
            "records": self.tally.records,
            "ties": self.tally.ties,
            "skipped": dict(sorted(Counter(kind for _, kind, _ in skipped).items())),
            "text_shapes": shapes,
            "text": [shard.as_dict() for shard in text],
            "latents": [indexed(shard) for shard in latents],
        }
        write_files(self.folder, latents)  # before the index: until it is there, nothing relies on them
        write_json(self.folder / INDEX, index, indent=None)
        remove_shards(self.folder, (LATENTS, TEXT), self.tally.parts)

    def _text_names(self) -> list[str]:
        return [UNCONDITIONAL, *(shard_name(TEXT, n) for n in range(self.tally.parts))]

    def _finished(self, name: str) -> Shard:
        shard = read_shard(self.folder, name)
        if shard is None:
            raise DamagedError(
                f"{self.folder / name}.json: missing or damaged; `sipo precompute` rebuilds it (of several processes, "
                "all must see one folder)"
            )
        return shard

    def _todo(
        self, reader: PairReader, rank: int, world: int, pool: ThreadPoolExecutor, bar: Any
    ) -> Iterator[tuple[Part, PairRecord | None]]:
        """The records to encode, each with its part, and ``None`` after the last of a part."""
        for part in parts(reader, self.settings, self.tally):
            if part.number % world != rank:
                continue
            self.existing.look(part, pool)
            if not part.needs_latents:
                self.kept += 1
                bar.update(len(part.records))
            if not part.needs_latents and not part.needs_text:
                continue
            self.pipeline()  # here, and not in the midst of a part
            if part.needs_latents:
                for record in part.records:
                    yield part, record
            part.records.clear()  # encoded images are large, and no longer needed once they are in line
            yield part, None

    def _prepare(self, item: tuple[Part, PairRecord | None]) -> _Decoded | None:
        """Decodes a pair and cuts it to size; runs in a thread."""
        part, record = item
        if record is None:
            return None
        files = {
            side_name(source, part.prefix): record_file(source)
            for source in (record.chosen, record.rejected)
            if isinstance(source, Path)
        }
        return _Decoded(self._decode(record), files)

    def _decode(self, record: PairRecord) -> _Prepared | BadPair:
        settings = self.settings
        try:
            media = load_pair(record, frames=settings.frames, fps=settings.fps)
        except BadPair as error:
            return error
        shape = media[0].pixels.shape
        height, width = nearest_size(shape[-2], shape[-1], settings.sizes)
        flip = settings.flip and derive_seed(settings.seed, FLIP, record.row) % 2 == 1
        halves = []
        for side in media:
            # Made anew for each half: where both have one size, both are cut alike.
            generator = torch.Generator().manual_seed(derive_seed(settings.seed, CROP, record.row))
            halves.append(fit(side.pixels, height, width, crop=settings.crop, flip=flip, generator=generator))
        own = [self.family.own_condition(h.original_size, h.crop_top_left, (height, width)) for h in halves]
        stacked = {name: torch.stack([own[0][name], own[1][name]]) for name in own[0]}
        pixels = torch.stack([half.pixels for half in halves])
        if self.family.video and pixels.ndim == 4:  # an image is a clip of one frame
            pixels = pixels.unsqueeze(1)
        return _Prepared(pixels, stacked)

    def _encode(self, part: Part, record: PairRecord, decoded: _Decoded) -> None:
        part.files |= decoded.files
        prepared = decoded.result
        if isinstance(prepared, BadPair):
            return self._skip(part, record.row, prepared.kind, str(prepared))
        generator = None
        if self.settings.latents == "sample":
            generator = torch.Generator().manual_seed(derive_seed(self.settings.seed, POSTERIOR, record.row))
        # Left on the device until the part is whole, so that the host decodes on meanwhile.
        latents = self.family.encode_pixels(self.pipeline(), prepared.pixels, generator).to(self.dtype)
        part.pairs.append((record.row, text_key(record.prompt), latents, prepared.own))

    def _skip(self, part: Part, row: int, kind: str, reason: str) -> None:
        if not self.settings.skip_bad:
            raise stop(row, kind, reason, part.change)
        part.skipped.append((row, kind, reason))

    def _flush(self, part: Part) -> None:
        """Writes what a part lacks."""
        if part.needs_text:
            conditions: dict[str, Condition] = {}
            for start in range(0, len(part.prompts), TEXT_BATCH):
                prompts = part.prompts[start : start + TEXT_BATCH]
                encoded = self.family.encode_text(self.pipeline(), prompts)
                conditions.update(zip(map(text_key, prompts), encoded, strict=True))
            facts = {"source": self.existing.source, "prompts": list(conditions)}
            self._write_text(shard_name(TEXT, part.number), conditions, facts)
            self.texts += 1
        if part.needs_latents:
            self._write_latents(part)
            self.written += 1

    def _write_latents(self, part: Part) -> None:
        tensors: dict[str, Tensor] = {}
        pairs: list[tuple[int, str, list[int]]] = []
        for row, key, latents, own in part.pairs:
            if not latents.isfinite().all():
                self._skip(part, row, "latents", f"its latents are not finite in {self.settings.dtype}")
                continue
            pairs.append((row, key, list(latents.shape[1:])))
            tensors |= {f"{row}.winner": latents[0], f"{row}.loser": latents[1]}
            tensors |= {f"{row}.own.{name}": tensor for name, tensor in own.items()}
        facts = {
            "source": self.existing.source,
            "seen": part.seen,
            ROWS_FACT: part.rows,
            FILES_FACT: part.files,
            "own": sorted(part.pairs[0][3]) if part.pairs else [],
            "pairs": pairs,
            "skipped": sorted(part.skipped),
        }
        self.existing.begin_change()
        write_shard(self.folder, shard_name(LATENTS, part.number), tensors, facts)

    def _write_text(self, name: str, conditions: dict[str, Condition], facts: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, list[int]] = {}
        for key, condition in conditions.items():
            cast = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in condition.items()}
            for tensor_name, tensor in cast.items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{tensor_name} of a prompt in {name} is not finite in {self.dtype}")
                if shapes.setdefault(tensor_name, list(tensor.shape)) != list(tensor.shape):
                    raise ValueError(f"{tensor_name} has shape {list(tensor.shape)}, expected {shapes[tensor_name]}")
                tensors[f"{key}.{tensor_name}" if key else tensor_name] = trim(tensor)
        self.existing.begin_change()
        write_shard(self.folder, name, tensors, facts | {"shapes": shapes})


def _summary(index: dict[str, Any], kept: int, seconds: float, run: _Run | None = None) -> CacheSummary:
    shards = [*index["latents"], *index["text"]]
    return CacheSummary(
        pairs=index["pairs"],
        records=index["records"],
        ties=index["ties"],
        skipped=index["skipped"],
        skipped_rows=[(row, reason) for shard in index["latents"] for row, _, reason in shard["skipped"]],
        prompts=sum(len(shard["prompts"]) for shard in index["text"]),
        bytes=sum(shard["bytes"] for shard in shards),
        written=0 if run is None else run.written,
        kept=kept,
        seconds=seconds,
        changes=[] if run is None else run.existing.changes,
        texts=0 if run is None else run.texts,
        absent=0 if run is None else run.existing.absent,
    )
