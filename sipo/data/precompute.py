"""Pairs to latents and text embeddings, once: decoded in threads, encoded on the device, written shard by shard."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
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
    check_fingerprint,
    digest,
    intact_shard,
    read_index,
    read_shard,
    remove_leftovers,
    shard_name,
    text_key,
    trim,
    write_json,
    write_shard,
)
from sipo.data.check import BadPair, load_pair
from sipo.data.media import fit, nearest_size
from sipo.data.parts import Part, Tally, ahead, parts
from sipo.data.records import PairReader, PairRecord
from sipo.families.base import Condition, Family
from sipo.training.data import derive_seed

TEXT_BATCH = 16
"""Prompts in one call of the text encoders."""


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
        written: shards of pairs that this call encoded.
        kept: shards of pairs that were there and whole.
        seconds: that this call took.
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

    def describe(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.pairs} pairs, {self.prompts} prompts, {self.bytes / 1e6:.1f} MB "
            f"({self.written} shards written, {self.kept} kept, {self.seconds:.0f} s)",
            f"rows: {self.records}, ties: {self.ties}, left out: {sum(self.skipped.values())}",
        ]
        return "\n".join(lines + [f"  {reason}: {count}" for reason, count in self.skipped.items()])


def fingerprint(model: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """What the content of a cache depends on, by the names of the configuration's keys; JSON values."""
    of_model = ("family", "path", "revision", "variant", "dtype")
    of_data = ("path", "format", "split", "sizes", "frames", "fps", "crop", "flip", "latents", "tiling", "dtype")
    of_rows = ("max_pairs", "seed", "shard_pairs")
    marks = {f"model.{name}": getattr(model, name) for name in of_model}
    return marks | {f"data.{name}": getattr(data, name) for name in (*of_data, *of_rows)}


def precompute_pairs(
    reader: PairReader,
    family: Family,
    pipeline: Any,
    folder: str | Path,
    *,
    settings: DataConfig,
    model: ModelConfig,
    accelerator: Any = None,
    workers: int | None = None,
    progress: bool = True,
) -> CacheSummary:
    """Encodes every pair of a source, and every prompt once, into a cache; what is there already is kept.

    A pair's latents depend on its row, the settings and the encoders alone: both halves are encoded together and
    with nobody else, and every random number (the posterior's draw, a random crop, a flip, which both halves share) has
    the row for its seed. So it does not matter how many processes there are, or how often they were interrupted.
    Where the source has changed since (a prompt, an image in memory, a file's name or size), the shards with the
    change are encoded anew.

    Every process calls this, and reads the source from its start to find its own shards.

    Args:
        reader: the source.
        family: encodes.
        pipeline: of :meth:`Family.load_encoders`, on its device.
        folder: the cache's; must be empty, absent, or a cache of the same settings.
        settings: see :class:`sipo.config.DataConfig`. ``max_pairs`` counts rows that are no ties.
        model: what the encoders were loaded from, for the cache's fingerprint.
        accelerator: accelerate's, if there is one: shards are dealt out to its processes, who must see one folder.
        workers: decoding threads; ``None`` takes as many as there are processors, and 8 at most.
        progress: whether to draw a progress bar.

    Raises:
        BadPair: without ``settings.skip_bad``, a pair that cannot be used. What was finished stays.
        CacheError: the folder holds a cache of other settings; no pair can be used.
        ValueError: a setting out of its range; a size that the family cannot take; rows of the source that do not grow.
    """
    started = time.monotonic()
    folder = Path(folder)
    if settings.shard_pairs < 1:
        raise ValueError(f"data.shard_pairs={settings.shard_pairs}: expected at least 1")
    for height, width in settings.sizes:
        family.check_size(pipeline, height, width, settings.frames)
    marks = fingerprint(model, settings)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    _check_folder(folder, marks, begin=rank == 0)
    run = _Run(family, pipeline, folder, settings, marks)
    if rank == 0:
        run.encode_unconditional()
    run.encode_parts(reader, rank, world, workers or min(8, os.cpu_count() or 1), progress)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if rank == 0:
        run.finish()
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return _summary(folder, run.written, run.kept, time.monotonic() - started)


class _Prepared(NamedTuple):
    """Both halves of a pair: pixels ``[2, ...]`` float32 in [-1, 1], and what each is told beside its prompt."""

    pixels: Tensor
    own: Condition


class _Run:
    """One process's share of a :func:`precompute_pairs` call."""

    def __init__(
        self, family: Family, pipeline: Any, folder: Path, settings: DataConfig, marks: dict[str, Any]
    ) -> None:
        self.family = family
        self.pipeline = pipeline
        self.folder = folder
        self.settings = settings
        self.marks = marks
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.tally = Tally()
        self.written = 0
        self.kept = 0

    def encode_unconditional(self) -> None:
        """Writes what caption dropout puts in a prompt's place."""
        source = digest(self.marks)
        shard = intact_shard(self.folder, UNCONDITIONAL)
        if shard is None or shard.facts.get("source") != source:
            condition = self.family.encode_unconditional(self.pipeline)
            self._write_text(UNCONDITIONAL, {"": condition}, {"source": source, "prompts": []})

    def encode_parts(self, reader: PairReader, rank: int, world: int, workers: int, progress: bool) -> None:
        """Encodes every shard that is this process's and not there yet."""
        from tqdm.auto import tqdm

        with (
            ThreadPoolExecutor(workers, "decode") as pool,
            tqdm(desc="precompute", unit="pair", disable=not progress or rank != 0) as bar,
            closing(ahead(pool, self._prepare, self._todo(reader, rank, world), 2 * workers)) as pairs,
        ):
            for (part, record), prepared in pairs:
                if record is None or prepared is None:
                    self._flush(part)
                    continue
                self._encode(part, record, prepared)
                bar.update()

    def finish(self) -> None:
        """Writes the index, once every shard is there."""
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
            "pairs": pairs,
            "records": self.tally.records,
            "ties": self.tally.ties,
            "skipped": dict(sorted(Counter(kind for _, kind, _ in skipped).items())),
            "text_shapes": shapes,
            "text": [shard.as_dict() for shard in text],
            "latents": [shard.as_dict() for shard in latents],
        }
        write_json(self.folder / INDEX, index)
        remove_leftovers(self.folder)

    def _text_names(self) -> list[str]:
        return [UNCONDITIONAL, *(shard_name(TEXT, n) for n in range(self.tally.parts))]

    def _finished(self, name: str) -> Shard:
        shard = read_shard(self.folder, name)
        if shard is None:
            raise CacheError(
                f"{self.folder / name}.json: missing, expected it from another process: all must see one folder"
            )
        return shard

    def _todo(self, reader: PairReader, rank: int, world: int) -> Iterator[tuple[Part, PairRecord | None]]:
        """The records to encode, each with its part, and ``None`` after the last of a part."""
        for part in parts(reader, self.settings, self.tally):
            if part.number % world != rank:
                continue
            self._look(part)
            if not part.needs_latents and not part.needs_text:
                self.kept += 1
                continue
            if part.needs_latents:
                for record in part.records:
                    yield part, record
            part.records.clear()  # encoded images are large, and no longer needed once they are in line
            yield part, None

    def _look(self, part: Part) -> None:
        """Looks for what is there of a part and whole."""
        part.source = part.digest(self.marks)
        latents, text = (intact_shard(self.folder, shard_name(kind, part.number)) for kind in (LATENTS, TEXT))
        part.needs_latents = latents is None or latents.facts.get("source") != part.source
        part.needs_text = text is None or text.facts.get("source") != part.source
        if latents is not None and not part.needs_latents and not self.settings.skip_bad:
            for row, kind, reason in latents.facts["skipped"]:
                raise _stop(row, kind, reason)

    def _prepare(self, item: tuple[Part, PairRecord | None]) -> _Prepared | BadPair | None:
        """Decodes a pair and cuts it to size; runs in a thread."""
        _, record = item
        if record is None:
            return None
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

    def _encode(self, part: Part, record: PairRecord, prepared: _Prepared | BadPair) -> None:
        if isinstance(prepared, BadPair):
            return self._skip(part, record.row, prepared.kind, str(prepared))
        generator = None
        if self.settings.latents == "sample":
            generator = torch.Generator().manual_seed(derive_seed(self.settings.seed, POSTERIOR, record.row))
        # Left on the device until the part is whole, so that the host decodes on meanwhile.
        latents = self.family.encode_pixels(self.pipeline, prepared.pixels, generator).to(self.dtype)
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
                encoded = self.family.encode_text(self.pipeline, prompts)
                conditions.update(zip(map(text_key, prompts), encoded, strict=True))
            facts = {"source": part.source, "prompts": list(conditions)}
            self._write_text(shard_name(TEXT, part.number), conditions, facts)
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
            "source": part.source,
            "own": sorted(part.pairs[0][3]) if part.pairs else [],
            "pairs": pairs,
            "skipped": sorted(part.skipped),
        }
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
        write_shard(self.folder, name, tensors, facts | {"shapes": shapes})


def _stop(row: int, kind: str, reason: str) -> BadPair:
    return BadPair(
        kind,
        f"row {row}: {reason} (data.skip_bad=true leaves such pairs out and counts them; `sipo data check` lists them)",
    )


def _check_folder(folder: Path, marks: dict[str, Any], begin: bool) -> None:
    """Refuses a folder with another cache in it; one process leaves the fingerprint in a new one."""
    try:
        index = read_index(folder)
    except DamagedError:
        index = None  # the shards' own files say what there is
    if index is not None:
        check_fingerprint(folder, index["fingerprint"], marks)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if begin:
        write_json(folder / INDEX, {"format": FORMAT, "complete": False, "fingerprint": marks})


def _summary(folder: Path, written: int, kept: int, seconds: float) -> CacheSummary:
    index = read_index(folder)
    assert index is not None  # the first process has written it
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
    )
