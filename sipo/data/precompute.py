"""Pairs to latents and text embeddings, once: decoded in threads, encoded on the device, written shard by shard."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sipo.config import DataConfig, ModelConfig
from sipo.data.cache import (
    CROP,
    FILES,
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
    check_sizes,
    digest,
    intact_shard,
    other_path,
    read_index,
    read_json,
    read_pairs_index,
    read_shard,
    remove_leftovers,
    remove_shards,
    shard_from_entry,
    shard_name,
    text_key,
    trim,
    write_json,
    write_shard,
)
from sipo.data.changes import (
    FileRecord,
    compare_files,
    files_digest,
    first_row_change,
    path_named,
    record_file,
    row_of,
    side_name,
    stamps_of,
)
from sipo.data.check import BadPair, load_pair
from sipo.data.media import fit, nearest_size
from sipo.data.parts import Part, Tally, ahead, parts, prefix_of
from sipo.data.records import DataError, PairReader, PairRecord
from sipo.data.weights import PLACE
from sipo.families.base import Condition, Family
from sipo.training.data import derive_seed

TEXT_BATCH = 16
"""Prompts in one call of the text encoders."""

_ROWS, _FILES = "rows", "files"  # facts of a shard that its own JSON file has and the index leaves out


@dataclass(frozen=True)
class CacheSummary:
    """What is in a cache.

    Attributes:
        pairs: that can be trained on.
        records: rows of the source that were looked at.
        ties: rows without a preference, which are no pairs to train on.
        skipped: by reason, how many pairs were left out because they could not be used.
        skipped_rows: their rows, with what is wrong with each.
        prompts: distinct ones.
        bytes: of all files of tensors.
        written: shards of pairs that this process encoded.
        kept: shards of pairs that were there and whole.
        seconds: that this call took.
        changes: the first change in each shard that was there and is not what the source says any more.
        texts: shards of text that this process encoded.
        absent: shards of pairs none of whose files is there any more, so that they could not be compared.
    """

    pairs: int
    records: int
    ties: int
    skipped: dict[str, int]
    skipped_rows: list[tuple[int, str]]
    prompts: int
    bytes: int
    written: int
    kept: int
    seconds: float
    changes: list[str] = field(default_factory=list)
    texts: int = 0
    absent: int = 0

    def news(self) -> list[str]:
        """A line on what has changed since the pairs were encoded, and one on what could not be compared."""
        lines, shards = [], self.written + self.kept
        if self.changes:
            more = len(self.changes) - 1
            others = f", and in {more} more shard{'s' * (more > 1)}" if more else ""
            lines.append(
                f"the data has changed ({self.changes[0]}{others}): "
                f"{self.written} of {shards} shards of latents and {self.texts} of text encoded anew, {self.kept} kept"
            )
        if self.absent:
            lines.append(
                f"{self.absent} of {shards} shards not compared with their images or clips, none of which is there: "
                "used as they were encoded"
            )
        return lines

    def describe(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.pairs} pairs, {self.prompts} prompts, {self.bytes / 1e6:.1f} MB "
            f"({self.written} shards written, {self.kept} kept, {self.seconds:.0f} s)",
            f"rows: {self.records}, ties: {self.ties}, left out: {sum(self.skipped.values())}",
        ]
        return "\n".join(lines + [f"  {reason}: {count}" for reason, count in self.skipped.items()])


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

    A shard is compared with the rows that it is made of and with their files, by size and times, and by content where
    the times alone have changed. One that differs is encoded anew as a whole: latents where a row, a side or a file is
    another, text where a prompt is.

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
            ones; a change, where they are refused; no pair can be used.
        DataError: a source that cannot be read.
        ValueError: a setting out of its range; a size that the family cannot take; rows of the source that do not grow.
    """
    started = time.monotonic()
    folder = Path(folder)
    if settings.shard_pairs < 1:
        raise ValueError(f"data.shard_pairs={settings.shard_pairs}: expected at least 1")
    marks = fingerprint(model, settings, weights)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    index = _read_index(folder, marks)
    finished = index if index is not None and index["complete"] else None
    state = None
    # What is not finished needs the rows and nothing else, which may be at hand where a hub is out of reach.
    with contextlib.suppress(*(() if finished is not None else (DataError,))):
        state = getattr(reader, "state", lambda: None)()
    unread = finished is not None and not check_hashes and not verify
    if finished is not None and unread and _is_unchanged(folder, finished, reader, state, settings.path):
        _stop_at_skipped(finished["latents"], settings)
        for _ in range(0 if accelerator is None else 2):  # as below, should another process have seen a change
            accelerator.wait_for_everyone()
        return _summary(finished, 0, len(range(rank, len(finished["latents"]), world)), time.monotonic() - started)
    run = _Run(family, load_pipeline, folder, settings, marks, state, index)
    run.check_hashes, run.verify, run.refuse_changes = check_hashes, verify, refuse_changes
    run.stale |= world > 1  # the others may have new times to be written down
    if finished is None:
        run.pipeline()  # sizes are checked before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0 and index is None:
            run.begin()
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
    return _summary(index, run.written, run.kept, time.monotonic() - started, run)


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

    check_hashes = True
    verify = False
    refuse_changes = False

    def __init__(
        self,
        family: Family,
        load_pipeline: Callable[[], Any],
        folder: Path,
        settings: DataConfig,
        marks: dict[str, Any],
        state: Any,
        index: dict[str, Any] | None,
    ) -> None:
        self.family = family
        self.load_pipeline = load_pipeline
        self.folder = folder
        self.settings = settings
        self.marks = marks
        self.state = state
        self.path = settings.path if index is None else index["path"]  # of the pairs that are there
        self.finished = index is not None and index["complete"]
        self.known = {shard.name: shard for shard in _shards(index)} if index is not None and self.finished else {}
        self.source = digest(marks)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.tally = Tally()
        self.written = 0
        self.kept = 0
        self.texts = 0
        self.absent = 0
        self.changes: list[str] = []
        self._pipeline: Any = None
        self._begun = not self.finished  # whether the index says that the cache is being written
        self.stale = self._begun  # whether the index has to be written anew

    def pipeline(self) -> Any:
        """The encoders, loaded when they are first needed."""
        if self._pipeline is None:
            self._pipeline = self.load_pipeline()
            for height, width in self.settings.sizes:
                self.family.check_size(self._pipeline, height, width, self.settings.frames)
        return self._pipeline

    def begin(self) -> None:
        """Says that the cache is not finished, before any of its content changes."""
        index = {"format": FORMAT, "complete": False, "fingerprint": self.marks, "path": self.path}
        write_json(self.folder / INDEX, index)

    def encode_unconditional(self) -> None:
        """Writes what caption dropout puts in a prompt's place."""
        shard = self._there(UNCONDITIONAL)
        if shard is None or shard.facts.get("source") != self.source:
            condition = self.family.encode_unconditional(self.pipeline())
            self._write_text(UNCONDITIONAL, {"": condition}, {"source": self.source, "prompts": []})

    def encode_parts(self, reader: PairReader, rank: int, world: int, workers: int, progress: bool) -> None:
        """Encodes every shard that is this process's and not there yet, or another by now."""
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
        gone = self.known.get(shard_name(LATENTS, self.tally.parts))
        if rank == 0 and gone is not None:
            row = min(row for row, *_ in [*gone.facts["pairs"], *gone.facts["skipped"]])
            self._changed(f"row {row}: no longer a pair")

    def finish(self) -> None:
        """Writes the index, once every shard is there, and where it says anything new."""
        found, tally = read_index(self.folder), self.tally
        counts = None if found is None else [found.get(name) for name in ("records", "ties", "path", "state")]
        now = [tally.records, tally.ties, self.settings.path, self.state]
        if self.check_hashes or self._begun:  # else another run may be reading, and writing down new times
            remove_leftovers(self.folder)
        if not self.stale and not self.changes and found is not None and found["complete"] and counts == now:
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
            "fingerprint": self.marks,
            "path": self.settings.path,
            "state": self.state,
            "pairs": pairs,
            "records": self.tally.records,
            "ties": self.tally.ties,
            "skipped": dict(sorted(Counter(kind for _, kind, _ in skipped).items())),
            "text_shapes": shapes,
            "text": [shard.as_dict() for shard in text],
            "latents": [_indexed(shard) for shard in latents],
        }
        # Names before the index: until it is written, nothing relies on them.
        files: dict[str, FileRecord] = {}
        for shard in latents:
            files |= shard.facts[_FILES]
        seen = files_digest(record[:3] for record in files.values())
        write_json(self.folder / FILES, {"digest": seen, "names": list(files)}, indent=None)
        write_json(self.folder / INDEX, index, indent=None)
        remove_shards(self.folder, (LATENTS, TEXT), self.tally.parts)

    def _text_names(self) -> list[str]:
        return [UNCONDITIONAL, *(shard_name(TEXT, n) for n in range(self.tally.parts))]

    def _finished(self, name: str) -> Shard:
        shard = read_shard(self.folder, name)
        if shard is None:
            raise CacheError(
                f"{self.folder / name}.json: missing, expected it from another process: all must see one folder"
            )
        return shard

    def _todo(
        self, reader: PairReader, rank: int, world: int, pool: ThreadPoolExecutor, bar: Any
    ) -> Iterator[tuple[Part, PairRecord | None]]:
        """The records to encode, each with its part, and ``None`` after the last of a part."""
        for part in parts(reader, self.settings, self.tally):
            if part.number % world != rank:
                continue
            self._look(part, pool)
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

    def _look(self, part: Part, pool: ThreadPoolExecutor) -> None:
        """Looks for what is there of a part, whole, and still what the source says."""
        part.look(self.source, pool)
        text = self._there(shard_name(TEXT, part.number))
        facts = {} if text is None else text.facts
        part.needs_text = facts.get("source") != self.source or facts.get("prompts") != part.new_keys
        name = shard_name(LATENTS, part.number)
        latents = self._there(name)
        if latents is None or not (latents.facts.get("seen") == part.seen and not self.verify):
            self._compare(part, latents, pool)
        else:
            part.needs_latents = False
        if latents is not None and not part.needs_latents:
            _stop_at_skipped([latents.facts], self.settings)

    def _there(self, name: str) -> Shard | None:
        """A shard that is there and whole, as the finished index or its own JSON file has it."""
        if self.check_hashes:
            return intact_shard(self.folder, name)
        shard = self.known.get(name) or read_shard(self.folder, name)
        try:
            check_sizes(self.folder, [] if shard is None else [shard])
        except DamagedError:
            return None
        return shard

    def _compare(self, part: Part, shard: Shard | None, pool: ThreadPoolExecutor) -> None:
        """Compares a part with what its shard of latents was made of; new times and prompts are written down."""
        name = shard_name(LATENTS, part.number)
        shard = None if shard is None else read_shard(self.folder, name)  # the index has neither rows nor files
        if shard is None or not {_ROWS, _FILES, "pairs", "source"} <= shard.facts.keys():
            if self.finished and name not in self.known:
                self._changed(f"row {part.rows[0][0]}: a new pair")
            return
        facts = shard.facts
        if facts["source"] != self.source:
            return
        if facts[_ROWS] != part.rows:
            self._changed(first_row_change(facts[_ROWS], part.rows))
            return
        found = compare_files(facts[_FILES], lambda file: part.paths.get(file, Path(file)), pool, self.verify)
        if found.change:
            self._changed(f"row {row_of(part.rows, found.name)}: {found.name} {found.change}")
            return
        self.absent += found.absent
        part.needs_latents = False
        keys = {row[0]: key for row, key in zip(part.rows, part.keys, strict=True)}
        other = [row for row, key, _ in facts["pairs"] if keys[row] != key]
        if other:
            self._changed(f"row {other[0]}: another prompt")
            self._begin_change()
        pairs = [[row, keys[row], shape] for row, _, shape in facts["pairs"]]
        now = facts | {_FILES: found.files, "pairs": pairs}
        if not found.absent:
            now["seen"] = part.seen
        try:
            if now != facts:
                write_json(self.folder / f"{name}.json", replace(shard, facts=now).as_dict())
        except OSError:
            if other:
                raise
            return  # a cache that may only be read: new times are compared again the next time
        self.stale |= not found.absent

    def _changed(self, change: str) -> None:
        """Keeps a change to be told, or refuses it."""
        if self.path != self.settings.path:
            raise other_path(self.folder, self.path, self.settings.path)
        if self.refuse_changes:
            raise CacheError(
                f"{self.settings.path}: {change}, since {self.folder} was encoded: expected the data that the run has "
                "been trained on; another training.output_dir starts anew with this"
            )
        self.changes.append(change)

    def _begin_change(self) -> None:
        """A cache that was finished is not while it is changed, so that nobody takes it for what it was."""
        if not self._begun:
            self.begin()
        self._begun = self.stale = True

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
            raise _stop(row, kind, reason)
        part.skipped.append((row, kind, reason))

    def _flush(self, part: Part) -> None:
        """Writes what a part lacks."""
        if part.needs_text:
            conditions: dict[str, Condition] = {}
            for start in range(0, len(part.prompts), TEXT_BATCH):
                prompts = part.prompts[start : start + TEXT_BATCH]
                encoded = self.family.encode_text(self.pipeline(), prompts)
                conditions.update(zip(map(text_key, prompts), encoded, strict=True))
            facts = {"source": self.source, "prompts": list(conditions)}
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
            "source": self.source,
            "seen": part.seen,
            _ROWS: part.rows,
            _FILES: part.files,
            "own": sorted(part.pairs[0][3]) if part.pairs else [],
            "pairs": pairs,
            "skipped": sorted(part.skipped),
        }
        self._begin_change()
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
        self._begin_change()
        write_shard(self.folder, name, tensors, facts | {"shapes": shapes})


def _stop(row: int, kind: str, reason: str) -> BadPair:
    return BadPair(
        kind,
        f"row {row}: {reason} (data.skip_bad=true leaves such pairs out and counts them; `sipo data check` lists them)",
    )


def _stop_at_skipped(shards: Iterable[dict[str, Any]], settings: DataConfig) -> None:
    if not settings.skip_bad:
        for shard in shards:
            for row, kind, reason in shard["skipped"]:
                raise _stop(row, kind, reason)


def _is_unchanged(folder: Path, index: dict[str, Any], reader: PairReader, state: Any, path: str) -> bool:
    """Whether neither rows nor files of a finished cache have changed, as far as sizes and times tell."""
    if state is None or index["state"] != state or index["path"] != path:
        return False
    try:
        files = read_json(folder / FILES)
    except CacheError:
        return False
    if files is None:
        return False
    prefix = prefix_of(reader)
    with ThreadPoolExecutor(8, "stat") as pool:
        return files_digest(stamps_of([path_named(name, prefix) for name in files["names"]], pool)) == files["digest"]


def _read_index(folder: Path, marks: dict[str, Any]) -> dict[str, Any] | None:
    """The index of a folder; another cache in it is refused."""
    try:
        index = read_pairs_index(folder, marks)
        if index is not None and index["complete"]:
            _shards(index)
    except (DamagedError, KeyError, TypeError):
        return None  # the shards' own files say what there is
    return index


def _shards(index: dict[str, Any]) -> list[Shard]:
    return [shard_from_entry(entry) for entry in (*index["latents"], *index["text"])]


def _indexed(shard: Shard) -> dict[str, Any]:
    """An entry of the index: without what is as large as the data set, and asked for only where something changes."""
    return {key: value for key, value in shard.as_dict().items() if key not in (_ROWS, _FILES)}


def _summary(
    index: dict[str, Any], written: int, kept: int, seconds: float, run: _Run | None = None
) -> CacheSummary:
    shards = [*index["latents"], *index["text"]]
    return CacheSummary(
        pairs=index["pairs"],
        records=index["records"],
        ties=index["ties"],
        skipped=index["skipped"],
        skipped_rows=[(row, reason) for shard in index["latents"] for row, _, reason in shard["skipped"]],
        prompts=sum(len(shard["prompts"]) for shard in index["text"]),
        bytes=sum(shard["bytes"] for shard in shards),
        written=written,
        kept=kept,
        seconds=seconds,
        changes=[] if run is None else run.changes,
        texts=0 if run is None else run.texts,
        absent=0 if run is None else run.absent,
    )
