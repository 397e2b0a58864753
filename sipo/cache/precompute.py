"""Pairs to latents and text embeddings, once: decoded in threads, encoded on the device, written shard by shard."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sipo.cache.changes import FileRecord, record_file, side_name
from sipo.cache.existing import (
    FILES_FACT,
    ROWS_FACT,
    Existing,
    indexed,
    is_limit_raised,
    is_unchanged,
    read_files,
    read_known,
    stop,
    stop_at_skipped,
    write_files,
)
from sipo.cache.format import (
    FORMAT,
    INDEX,
    LATENTS,
    TEXT,
    UNCONDITIONAL,
    CacheError,
    DamagedError,
    Shard,
    read_index,
    read_shard,
    remove_shards,
    shard_name,
    text_key,
    trim,
    write_json,
    write_shard,
)
from sipo.cache.parts import Part, Tally, ahead, parts
from sipo.cache.savings import Cost
from sipo.cache.summary import CacheSummary
from sipo.cache.weights import PLACE
from sipo.data.check import BadPairError, load_pair
from sipo.data.config import DataConfig
from sipo.data.media import fit, nearest_size
from sipo.data.records import DataError, PairReader, PairRecord, row_name
from sipo.families.base import Condition, Family
from sipo.families.config import ModelConfig
from sipo.files import remove_leftovers
from sipo.locks import locked
from sipo.processes import everywhere, from_main, gathered, in_rounds, on_main
from sipo.progress import Meter
from sipo.seeds import RandomStream, derive_seed

TEXT_BATCH = 16
"""Prompts in one call of the text encoders."""


def fingerprint(model: ModelConfig, data: DataConfig, weights: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the content of a cache depends on beside the pairs, by the names of the configuration's keys; JSON values.

    Where pairs and weights are is none of it: what is the same is the same wherever it is.

    Args:
        model: where the encoders come from.
        data: how pairs are encoded.
        weights: the encoders' files (:func:`sipo.cache.weights.weight_hashes`); without them the model's path, revision
            and variant have to do.
    """
    of_model = ("family", "dtype")
    of_data = (
        "format",
        "dataset_split_name",
        "sizes",
        "frames",
        "fps",
        "crop",
        "random_flip",
        "latents",
        "enable_tiling",
        "vae_dtype",
        "dtype",
    )
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
    on_cost: Callable[[Cost], None] | None = None,
    progress: bool | None = True,
) -> CacheSummary:
    """Encodes every pair of a source, and every prompt once, into a cache; what is there and has not changed is kept.

    A pair's latents depend on its row, the settings and the encoders alone: images are encoded with the pair's other
    half and with nobody else, clips alone, as two would take twice the memory; and every random number (the
    posterior's draw, a random crop, a flip, which both halves share) has the row for its seed. So it does not matter
    how many processes there are, or how often they were interrupted.

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
        ValueError: a setting out of its range; a size that the family cannot take; rows of the source that do not grow.
        LockedError: another run is writing to the folder.
        OtherProcessError: whatever ended another process.
    """
    started = time.monotonic()
    folder = Path(folder)
    if settings.shard_pairs < 1:
        raise ValueError(f"data.shard_pairs={settings.shard_pairs}: expected at least 1")
    load_pipeline = functools.cache(load_pipeline)
    marks = fingerprint(model, settings, weights)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)

    def look() -> tuple[_Run, CacheSummary | None]:
        """What is there; its summary, where all is as it was."""
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
        run = _Run(family, load_pipeline, folder, settings, existing, state)
        if finished is None or check_hashes or verify:
            return run, None
        raised = any(is_limit_raised(shard, settings) for shard in finished["latents"])
        if raised or not is_unchanged(folder, finished, reader, state, settings.dataset_name):
            return run, None
        stop_at_skipped(finished["latents"], settings)
        return run, _summary(finished, len(range(rank, len(finished["latents"]), world)), time.monotonic() - started)

    def begin() -> None:
        if not run.existing.finished:
            folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                run.existing.begin()
        if rank == 0:
            if writable:
                remove_leftovers(folder)
            run.encode_unconditional()
            if on_cost is not None and not run.existing.finished:
                cost = run.cost(reader)
                if cost.pairs != 0:
                    on_cost(cost)

    run, unchanged = everywhere(accelerator, look)
    if all(gathered(accelerator, unchanged is not None)) and unchanged is not None:
        return unchanged
    # A finished cache that nobody can write to may still be compared, and is then found to be as it was.
    writable = from_main(accelerator, lambda: not folder.exists() or os.access(folder, os.W_OK))
    what = f"data.cache={str(folder)!r}"
    with locked(folder, what, accelerator=accelerator) if writable else contextlib.nullcontext():
        run, unchanged = everywhere(accelerator, look)  # again: another run may have been at work meanwhile
        if all(gathered(accelerator, unchanged is not None)) and unchanged is not None:
            return unchanged
        # Sizes are checked before anything is written, and no encoder is loaded where another run has the folder.
        everywhere(accelerator, lambda: run.existing.finished or run.pipeline())
        everywhere(accelerator, begin)
        in_rounds(accelerator, run.encode_parts(reader, rank, world, progress))
        on_main(accelerator, run.finish)
        index = everywhere(accelerator, lambda: read_index(folder))
    assert index is not None  # the first process has written it
    return _summary(index, run.kept, time.monotonic() - started, run)


class _Prepared(NamedTuple):
    """Both halves of a pair: uint8 pixels of one shape, and what each is told beside its prompt, ``[2, ...]``."""

    pixels: list[Tensor]
    own: Condition


class _Fitter:
    """Brings both halves of a pair, frame by frame, to the one of the sizes that is nearest in shape to the first.

    Attributes:
        size: (height, width) that they are brought to.
        crops: (top, left) of the crop, by the size that a half had.
    """

    def __init__(self, settings: DataConfig, row: int) -> None:
        self.settings = settings
        self.flip = settings.random_flip and derive_seed(settings.seed, RandomStream.FLIP, row) % 2 == 1
        self.seed = derive_seed(settings.seed, RandomStream.CROP, row)
        self.size: tuple[int, int] = (0, 0)
        self.crops: dict[tuple[int, int], tuple[int, int]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[3, H, W]`` to ``[3, *size]``, both uint8."""
        if not self.crops:
            self.size = nearest_size(pixels.shape[-2], pixels.shape[-1], self.settings.sizes)
        # Made anew each time: frames of one size are cut alike, in both halves.
        generator = torch.Generator().manual_seed(self.seed)
        fitted = fit(pixels, *self.size, crop=self.settings.crop, flip=self.flip, generator=generator)
        self.crops[fitted.original_size] = fitted.crop_top_left
        return fitted.pixels


class _Decoded(NamedTuple):
    """What became of a pair, and its files as they were just before."""

    result: _Prepared | BadPairError
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

    def cost(self, reader: PairReader) -> Cost:
        """What is to be encoded, by what the source says and what is there; latents and text as stored."""
        settings, pipeline = self.settings, self.pipeline()
        latents = [prod(self.family.latent_shape(pipeline, *size, settings.frames)) for size in settings.sizes]
        unconditional = self._finished(UNCONDITIONAL)
        text = sum(map(prod, unconditional.facts["shapes"].values()))
        names = {path.stem for path in self.folder.glob(f"{LATENTS}-*.json")}
        shards = [shard for name in sorted(names) if (shard := read_shard(self.folder, name)) is not None]
        there = {s.name: len(s.facts["pairs"]) for s in shards if s.facts["source"] == self.existing.source}
        exact = getattr(reader, "root", None) is not None  # of paths alone, which are read in a moment
        pairs: int | None = 0
        prompts = 0
        if exact:
            assert pairs is not None
            for part in parts(reader, settings, Tally()):
                if shard_name(LATENTS, part.number) not in there:
                    pairs += sum(not record.problem for record in part.records)
                    prompts += len(part.prompts)
        else:
            counts = [getattr(reader, "count", lambda: None)(), settings.max_pairs]
            known = [count for count in counts if count is not None]
            pairs = max(0, min(known) - sum(there.values())) if known else None
            prompts = 1 if pairs is None else pairs
        width = self.dtype.itemsize
        sizes = (2 * max(latents) * width, 2 * min(latents) * width)
        return Cost(pairs, sum(there.values()), prompts, exact, sizes, text * width)

    def encode_parts(
        self, reader: PairReader, rank: int, world: int, progress: bool | None
    ) -> Generator[None, None, None]:
        """Encodes every shard of this process that is missing or no longer agrees with the source, pair by pair."""
        bar = Meter("precompute", "pairs", progress if rank == 0 else None)
        workers = self.settings.num_workers or min(8, os.cpu_count() or 1)
        with bar, ThreadPoolExecutor(workers, "decode") as pool:
            todo = self._todo(reader, rank, world, pool, bar)
            with closing(ahead(pool, self._prepare, todo, self._queue_length(workers))) as pairs:
                for pair in pairs:
                    if pair is not None:
                        (part, record), decoded = pair
                        if record is None or decoded is None:
                            yield from self._flush(part)
                        else:
                            self._encode(part, record, decoded)
                            bar.update()
                        del pair, decoded  # before the next is waited for
                    yield
        if rank == 0:
            self.existing.find_gone(self.tally.parts)

    def _queue_length(self, workers: int) -> int:
        """Pairs that are decoded ahead: with the one that is being encoded they fit into ``queue_mb``, but for one."""
        settings = self.settings
        pair = 2 * settings.frames * 3 * max(height * width for height, width in settings.sizes)
        return max(1, min(2 * workers, settings.queue_mb * 10**6 // pair - 1))

    def finish(self) -> None:
        """Writes the index, once every shard is there, if it has changed."""
        found, tally = read_index(self.folder), self.tally
        counts = None if found is None else [found.get(name) for name in ("records", "ties", "path", "state")]
        now = [tally.records, tally.ties, self.settings.dataset_name, self.state]
        existing = self.existing
        changed = existing.stale or existing.changes or read_files(self.folder) is None
        if not changed and found is not None and found["complete"] and counts == now:
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
            "path": self.settings.dataset_name,
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
    ) -> Iterator[tuple[Part, PairRecord | None] | None]:
        """The records to encode, each with its part and ``None`` after the last of a part.

        And nothing after each part that was read or compared, which may take long of itself.
        """
        for part in parts(reader, self.settings, self.tally):
            if part.number % world != rank:
                yield None
                continue
            self.existing.look(part, pool)
            yield None
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

    def _decode(self, record: PairRecord) -> _Prepared | BadPairError:
        settings = self.settings
        fitter = _Fitter(settings, record.row)
        try:
            what = {"frames": settings.frames, "fps": settings.fps, "max_pixels": settings.max_pixels}
            media = load_pair(record, **what, transform=fitter)  # type: ignore[arg-type]
        except BadPairError as error:
            return error
        own = [self.family.own_condition(half.size, fitter.crops[half.size], fitter.size) for half in media]
        stacked = {name: torch.stack([own[0][name], own[1][name]]) for name in own[0]}
        pixels = [half.pixels for half in media]
        if self.family.video and settings.frames == 1:  # an image is a clip of one frame
            pixels = [half[None] for half in pixels]
        return _Prepared(pixels, stacked)

    def _encode(self, part: Part, record: PairRecord, decoded: _Decoded) -> None:
        part.files |= decoded.files
        prepared = decoded.result
        if isinstance(prepared, BadPairError):
            return self._skip(part, record.row, prepared.kind, str(prepared))
        generator = None
        if self.settings.latents == "sample":
            generator = torch.Generator().manual_seed(
                derive_seed(self.settings.seed, RandomStream.POSTERIOR, record.row)
            )
        batches = [torch.stack(prepared.pixels)]
        if self.family.video:  # one at a time
            batches = [half[None] for half in prepared.pixels]
        # Left on the device until the part is whole, so that the host decodes on meanwhile.
        latents = [self.family.encode_pixels(self.pipeline(), batch, generator).to(self.dtype) for batch in batches]
        part.pairs.append((record.row, text_key(record.prompt), torch.cat(latents), prepared.own))

    def _skip(self, part: Part, row: int, kind: str, reason: str) -> None:
        if not self.settings.skip_bad:
            raise stop(row, kind, reason, part.change)
        part.skipped.append((row, kind, reason))

    def _flush(self, part: Part) -> Generator[None, None, None]:
        """Writes what a part lacks."""
        if part.needs_text:
            conditions: dict[str, Condition] = {}
            for start in range(0, len(part.prompts), TEXT_BATCH):
                prompts = part.prompts[start : start + TEXT_BATCH]
                encoded = self.family.encode_text(self.pipeline(), prompts)
                conditions.update(zip(map(text_key, prompts), encoded, strict=True))
                yield
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
                if self.settings.vae_dtype == "float16":  # the setting's fault, and not the pair's
                    raise ValueError(
                        f"{row_name(row)}: latents that are not finite with data.vae_dtype='float16', expected "
                        "'float32' or 'bfloat16'"
                    )
                self._skip(part, row, "latents", f"its latents are not finite in {self.settings.dtype}")
                continue
            pairs.append((row, key, list(latents.shape[1:])))
            tensors |= {f"{row}.chosen": latents[0], f"{row}.rejected": latents[1]}
            tensors |= {f"{row}.own.{name}": tensor for name, tensor in own.items()}
        facts: dict[str, Any] = {
            "source": self.existing.source,
            "seen": part.seen,
            ROWS_FACT: part.rows,
            FILES_FACT: part.files,
            "own": sorted(part.pairs[0][3]) if part.pairs else [],
            "pairs": pairs,
            "skipped": sorted(part.skipped),
        }
        if any(kind == "large" for _, kind, _ in part.skipped):
            facts["max_pixels"] = self.settings.max_pixels
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
