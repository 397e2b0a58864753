"""Encodes the shards of a cache: latents of pairs, and text embeddings of prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sipo.batch import is_ragged
from sipo.cache.decode import DecodedPair, PairDecoder, ahead, queue_length
from sipo.cache.existing import ExistingCache, bad_pair
from sipo.cache.format import LATENTS, TEXT, UNCONDITIONAL, CacheError, shard_name, trim
from sipo.cache.index import FILES_FACT, IMAGE_LENGTH, MASK_FACT, ROWS_FACT
from sipo.cache.savings import Cost
from sipo.cache.source import EncodedPair, ShardSource, Tally, pair_key, shard_sources, side_name
from sipo.data.config import DataConfig
from sipo.data.load import BadPairError
from sipo.data.records import PairReader, PairRecord, new_misspelt, row_name
from sipo.families.base import Condition, Family
from sipo.progress import Meter, say
from sipo.seeds import RandomStream, derive_seed

TEXT_BATCH = 16
"""Prompts in one call of the text encoders."""

LONGEST_TEXT = 512
"""Tokens that are taken for the length of ragged text whose family names no limit, before any is encoded."""


class PairEncoder:
    """Encodes one process's share of the shards of a source.

    Attributes:
        tally: counts of what was read from the source.
        written: shards of latents that were encoded.
        kept: shards of latents that still agree with the source.
        texts: shards of text that were encoded.
        cut: files of condition images that lost much of their area to get their samples' shape, by row.

    Args:
        family: encodes.
        load_pipeline: gives the pipeline of the encoders.
        settings: how pairs are encoded.
        existing: what the cache's folder holds.
        state: what the source says of itself, by which it is known again; JSON.
    """

    def __init__(
        self,
        family: Family,
        load_pipeline: Callable[[], Any],
        settings: DataConfig,
        existing: ExistingCache,
        state: Any,
    ) -> None:
        self.family = family
        self.load_pipeline = load_pipeline
        self.settings = settings
        self.existing = existing
        self.shards = existing.shards
        self.decoder = PairDecoder(family, settings)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.state = state
        self.tally = Tally()
        self.written = 0
        self.kept = 0
        self.texts = 0
        self.cut: dict[int, str] = {}
        self._pipeline: Any = None

    def pipeline(self) -> Any:
        """Loads the encoders when they are first needed."""
        if self._pipeline is None:
            self._pipeline = self.load_pipeline()
            for height, width in self.settings.sizes:
                self.family.check_size(height, width, self.settings.frames)
                self.family.check_encoders_size(self._pipeline, height, width)
        return self._pipeline

    def encode_unconditional(self) -> None:
        """Writes what caption dropout puts in a prompt's place.

        Where text depends on the condition image, nothing can: the shard then has no tensors, only the shapes of text
        with a black image, and the length that this has without a prompt.
        """
        shard = self.existing.find(UNCONDITIONAL)
        if shard is not None and shard.facts.get("source") == self.existing.source:
            return
        facts: dict[str, Any] = {"source": self.existing.source, "prompts": []}
        if self.family.text_sees_image:
            black = torch.zeros(3, *self.settings.sizes[0], dtype=torch.uint8)
            (condition,) = self.family.encode_text(self.pipeline(), [""], [black])
            shapes = {name: _shape(name, condition) for name in condition}
            self.existing.begin_change()
            length = max((len(condition[name]) for name, shape in shapes.items() if None in shape), default=0)
            self.shards.write(UNCONDITIONAL, {}, facts | {"shapes": shapes, IMAGE_LENGTH: length})
        else:
            condition = self.family.encode_unconditional(self.pipeline())
            self._write_text(UNCONDITIONAL, {"": condition}, facts)

    def cost(self, reader: PairReader) -> Cost:
        """Estimates what is to be encoded from what the source says and what is encoded already."""
        settings, pipeline = self.settings, self.pipeline()
        latents = [prod(self.family.latent_shape(pipeline, *size, settings.frames)) for size in settings.sizes]
        unconditional = self.shards.require(UNCONDITIONAL)
        longest = self.family.text_options.get("max_sequence_length", LONGEST_TEXT)
        longest += unconditional.facts.get(IMAGE_LENGTH, 0)
        text = sum(prod(longest if n is None else n for n in shape) for shape in unconditional.facts["shapes"].values())
        names = {path.stem for path in self.shards.path.glob(f"{LATENTS}-*.json")}
        shards = [shard for name in sorted(names) if (shard := self.shards.read(name)) is not None]
        encoded = {s.name: len(s.facts["pairs"]) for s in shards if s.facts["source"] == self.existing.source}
        exact = getattr(reader, "root", None) is not None  # rows of paths alone are read at once
        pairs: int | None = 0
        prompts = 0
        if exact:
            assert pairs is not None
            for source in shard_sources(reader, self.family, settings, Tally()):
                if shard_name(LATENTS, source.number) not in encoded:
                    pairs += sum(not record.problem for record in source.records)
                    prompts += len(source.prompts)
        else:
            counts = [getattr(reader, "count", lambda: None)(), settings.max_pairs]
            known = [count for count in counts if count is not None]
            pairs = max(0, min(known) - sum(encoded.values())) if known else None
            prompts = 1 if pairs is None else pairs
        width = self.dtype.itemsize
        images = {"none": (2, 2), "optional": (3, 2), "required": (3, 3)}[self.family.condition_image]
        sizes = (images[0] * max(latents) * width, images[1] * min(latents) * width)
        return Cost(pairs, sum(encoded.values()), prompts, exact, sizes, text * width, images[0])

    def encode_shards(
        self, reader: PairReader, rank: int, world: int, progress: bool | None
    ) -> Generator[None, None, None]:
        """Encodes, pair by pair, each shard of this process that is missing or no longer agrees with the source."""
        bar = Meter("precompute", "pairs", progress if rank == 0 else None)
        workers = self.settings.num_workers or min(8, os.cpu_count() or 1)
        with bar, ThreadPoolExecutor(workers, "decode") as pool:
            todo = self._todo(reader, rank, world, pool, bar)
            with closing(ahead(pool, self._decode, todo, queue_length(self.family, self.settings, workers))) as pairs:
                for pair in pairs:
                    if pair is not None:
                        (source, record), decoded = pair
                        if record is None or decoded is None:
                            yield from self._flush(source)
                        else:
                            self._encode(source, record, decoded)
                            bar.update()
                        del pair, decoded  # before waiting for the next
                    yield
        if rank == 0:
            self.existing.find_gone(self.tally.shards)

    def _todo(
        self, reader: PairReader, rank: int, world: int, pool: ThreadPoolExecutor, bar: Any
    ) -> Iterator[tuple[ShardSource, PairRecord | None] | None]:
        """Yields the records to encode, each with its shard, and the shard with ``None`` after its last record.

        Also yields ``None`` after each shard that was read or compared, which may take long by itself. The first
        process prints keys that may be misspelt.
        """
        misspelt: set[str] = set()
        for source in shard_sources(reader, self.family, self.settings, self.tally):
            for record in source.records if rank == 0 else ():
                for text in new_misspelt(record, misspelt):
                    say(f"{self.settings.dataset_name}: {row_name(record.row)}: {text}")
            if source.number % world != rank:
                yield None
                continue
            absent = self.existing.absent
            self.existing.compare(source, pool)
            yield None
            if self.family.text_sees_image and source.needs_latents != source.needs_text:  # from one decoded image
                if self.existing.absent > absent:  # encoded again, every pair would be lost
                    raise CacheError(
                        f"{self.settings.dataset_name}: {shard_name(TEXT, source.number)} is to be encoded again, and "
                        f"none of its images exists any more: expected those of {row_name(source.rows[0][0])} and on"
                    )
                source.needs_latents = source.needs_text = True
            if not source.needs_latents:
                self.kept += 1
                bar.update(len(source.records))
            if not source.needs_latents and not source.needs_text:
                continue
            self.pipeline()  # here, and not in the middle of a shard
            if source.needs_latents:
                for record in source.records:
                    yield source, record
            source.records.clear()  # encoded images are large, and no longer needed once they wait
            yield source, None

    def _decode(self, item: tuple[ShardSource, PairRecord | None]) -> DecodedPair | None:
        """Decodes a pair in a thread."""
        source, record = item
        return None if record is None else self.decoder.decode(record, source.prefix)

    def _encode(self, source: ShardSource, record: PairRecord, decoded: DecodedPair) -> None:
        source.files |= decoded.files
        prepared = decoded.result
        if isinstance(prepared, BadPairError):
            return self._skip(source, record.row, prepared.kind, str(prepared))
        generator = None
        if self.settings.latents == "sample":
            generator = torch.Generator().manual_seed(
                derive_seed(self.settings.seed, RandomStream.POSTERIOR, record.row)
            )
        batches = [torch.stack(prepared.pixels)]
        if self.family.video:  # one at a time
            batches = [sample[None] for sample in prepared.pixels]
        # Left on the device until the shard is whole, so that the host decodes meanwhile.
        latents = [self.family.encode_pixels(self.pipeline(), batch, generator).to(self.dtype) for batch in batches]
        key, image = pair_key(record, self.family), prepared.condition_image
        encoded: Condition = {}
        if image is not None:
            (tensors,) = self.family.encode_condition_image(self.pipeline(), image[None])
            encoded = {name: self._cast(tensor) for name, tensor in tensors.items()}
            if prepared.is_cut:
                assert record.condition_image is not None
                self.cut[record.row] = side_name(record.condition_image, "")
            if self.family.text_sees_image:
                (source.conditions[key],) = self.family.encode_text(self.pipeline(), [record.prompt], [image])
        stacked, mask = torch.cat(latents), prepared.error_mask
        if mask is not None:
            height, width = stacked.shape[-2:]
            # Divided last: sums of integers are exact.
            means = F.adaptive_avg_pool2d(mask[None].to(torch.float32), (height, width)) / 255
            mask = self._cast(means.view(*[1] * (stacked.ndim - 3), height, width))  # channels and frames share it
        source.pairs.append(EncodedPair(record.row, key, stacked, prepared.own, encoded, mask))

    def _skip(self, source: ShardSource, row: int, kind: str, reason: str) -> None:
        if not self.settings.skip_bad:
            raise bad_pair(row, kind, reason, source.change)
        source.skipped.append((row, kind, reason))

    def _flush(self, source: ShardSource) -> Generator[None, None, None]:
        """Writes what a shard lacks."""
        if source.needs_text:
            # Where text depends on the image, it was encoded with it, and a pair that cannot be used has neither.
            keys = [] if self.family.text_sees_image else source.new_keys
            for start in range(0, len(keys), TEXT_BATCH):
                some = keys[start : start + TEXT_BATCH]
                encoded = self.family.encode_text(self.pipeline(), [source.prompts[key] for key in some])
                source.conditions.update(zip(some, encoded, strict=True))
                yield
            facts = {"source": self.existing.source, "prompts": source.new_keys}
            self._write_text(shard_name(TEXT, source.number), source.conditions, facts)
            self.texts += 1
        if source.needs_latents:
            self._write_latents(source)
            self.written += 1

    def _write_latents(self, source: ShardSource) -> None:
        tensors: dict[str, Tensor] = {}
        pairs: list[tuple[int, str, list[int]]] = []
        images: dict[str, Any] = {"names": [], "rows": []}
        masked: list[int] = []
        for row, key, latents, own, image, mask in source.pairs:
            if not all(tensor.isfinite().all() for tensor in (latents, *image.values())):
                if self.settings.vae_dtype == "float16":  # the setting's fault, not the pair's
                    raise ValueError(
                        f"{row_name(row)}: latents that are not finite with data.vae_dtype='float16', expected "
                        "'float32' or 'bfloat16'"
                    )
                self._skip(source, row, "latents", f"its latents are not finite in {self.settings.dtype}")
                continue
            pairs.append((row, key, list(latents.shape[1:])))
            tensors |= {f"{row}.chosen": latents[0], f"{row}.rejected": latents[1]}
            tensors |= {f"{row}.own.{name}": tensor for name, tensor in own.items()}
            tensors |= {f"{row}.image.{name}": tensor for name, tensor in image.items()}
            if image:
                images["names"] = sorted(image)
                images["rows"].append(row)
            if mask is not None:
                tensors[f"{row}.{MASK_FACT}"] = mask
                masked.append(row)
        facts: dict[str, Any] = {
            "source": self.existing.source,
            "seen": source.seen,
            ROWS_FACT: source.rows,
            FILES_FACT: source.files,
            "own": sorted(source.pairs[0].own) if source.pairs else [],
            "image": images,
            MASK_FACT: masked,
            "pairs": pairs,
            "skipped": sorted(source.skipped),
        }
        if any(kind == "large" for _, kind, _ in source.skipped):
            facts["max_pixels"] = self.settings.max_pixels
        self.existing.begin_change()
        self.shards.write(shard_name(LATENTS, source.number), tensors, facts)

    def _write_text(self, name: str, conditions: dict[str, Condition], facts: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, list[int | None]] = {}
        for key, condition in conditions.items():
            for tensor_name, original in condition.items():
                tensor = self._cast(original)
                if not tensor.isfinite().all():
                    raise ValueError(f"{tensor_name} of a prompt in {name} is not finite in {self.dtype}")
                shape = _shape(tensor_name, condition)
                if shapes.setdefault(tensor_name, shape) != shape:
                    raise ValueError(f"{tensor_name} has shape {shape}, expected {shapes[tensor_name]}")
                tensors[f"{key}.{tensor_name}" if key else tensor_name] = trim(tensor) if None not in shape else tensor
        self.existing.begin_change()
        self.shards.write(name, tensors, facts | {"shapes": shapes})

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _shape(name: str, condition: Condition) -> list[int | None]:
    """Returns the shape that a tensor has for every prompt; ``None`` for the length of a ragged one."""
    shape: list[int | None] = list(condition[name].shape)
    return [None, *shape[1:]] if is_ragged(name, condition) else shape
