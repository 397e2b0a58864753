"""Opens a finished cache for reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipo.batch import padded
from sipo.cache.format import (
    INDEX,
    REMEDY,
    UNCONDITIONAL,
    CacheError,
    DamagedError,
    ShardFolder,
    ShardReader,
    digest,
)
from sipo.cache.index import IMAGE_LENGTH, MASK_FACT, PairsIndex, read_pairs_index
from sipo.families.network import Condition


class Cache:
    """A finished cache, for reading: ``N`` pairs in the order of their rows. Made by :func:`open_cache`.

    Attributes:
        folder: where it is.
        fingerprint: what its content depends on.
        path: ``data.dataset_name`` of its pairs, as it was when they were last compared.
        skipped: by reason, how many pairs were left out because they could not be used.
        rows: ``[N]`` int64, each pair's row in the source.
        group_of: ``[N]`` int64, equal for pairs that may share a batch: their latents have one shape, and all of them
            or none have a condition image, and likewise an error mask.
        text_sees_image: whether text embeddings depend on condition images.
        prompt_keys: one for each distinct prompt (:func:`sipo.cache.source.pair_key`).
        prompt_of: ``[N]`` int64, each pair's place in ``prompt_keys``.
        shard_of: ``[N]`` int64, each pair's place in ``latents``.
        with_image: ``[N]`` bool, which pairs have a condition image.
        masked: ``[N]`` bool, which pairs have an error mask.
        latents: the shards of latents, by number.
    """

    def __init__(self, folder: Path, index: PairsIndex) -> None:
        self.folder = folder
        self.fingerprint = index.fingerprint
        self.path = index.path
        self.skipped = index.skipped
        latents, text = index.latents, index.text
        # All of this is copied into every worker process: pairs in tensors, and no facts that nobody asks for again.
        self.latents = [
            replace(shard, facts={"own": shard.facts["own"], "image": shard.facts["image"]["names"]})
            for shard in latents
        ]
        self._reader = ShardReader(folder, [*self.latents, *(replace(shard, facts={}) for shard in text)])
        self._text_shapes = index.text_shapes
        self.prompt_keys = [key for shard in text for key in shard.facts["prompts"]]
        self._text_names = [shard.name for shard in text]
        self._text_shard_of = torch.tensor([n for n, shard in enumerate(text) for _ in shard.facts["prompts"]])
        place_of_text = {key: n for n, key in enumerate(self.prompt_keys)}
        self.text_sees_image = any(IMAGE_LENGTH in shard.facts for shard in text)
        numbers: dict[tuple[Any, ...], int] = {}
        table = []
        for n, shard in enumerate(latents):
            with_image, masked = set(shard.facts["image"]["rows"]), set(shard.facts[MASK_FACT])
            for row, key, shape in shard.facts["pairs"]:
                has = (row in with_image, row in masked)
                group = numbers.setdefault((*has, *shape), len(numbers))
                table.append((row, n, place_of_text[key], group, *has))
        columns = [column.clone() for column in torch.tensor(table).reshape(-1, 6).unbind(1)]
        self.rows, self.shard_of, self.prompt_of, self.group_of, images, masks = columns
        self.with_image, self.masked = images.bool(), masks.bool()
        self._starts = [0, *accumulate(len(shard.facts["pairs"]) for shard in latents)]

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, index: int) -> tuple[Tensor, Tensor, Condition]:
        """Reads both samples' latents as stored, and what each is told beside its prompt, ``[2, ...]`` by name."""
        shard, row = self.latents[int(self.shard_of[index])], int(self.rows[index])
        own = {name: self._reader.tensor(shard.name, f"{row}.own.{name}") for name in shard.facts["own"]}
        chosen, rejected = (self._reader.tensor(shard.name, f"{row}.{sample}") for sample in ("chosen", "rejected"))
        return chosen, rejected, own

    def condition_image(self, index: int) -> Condition:
        """Reads what encodes a pair's condition image, by name; empty where there is none."""
        if not self.with_image[index]:
            return {}
        shard, row = self.latents[int(self.shard_of[index])], int(self.rows[index])
        return {name: self._reader.tensor(shard.name, f"{row}.image.{name}") for name in shard.facts["image"]}

    def error_mask(self, index: int) -> Tensor | None:
        """Reads a pair's error mask, with the dimensions of its latents and 1 in place of all but height and width."""
        if not self.masked[index]:
            return None
        return self._reader.tensor(self.latents[int(self.shard_of[index])].name, f"{self.rows[index]}.{MASK_FACT}")

    def text(self, index: int) -> Condition:
        """Reads a pair's text embeddings, in their full length; ragged tensors as they are stored."""
        place = int(self.prompt_of[index])
        return self._text(self._text_names[int(self._text_shard_of[place])], f"{self.prompt_keys[place]}.")

    def unconditional(self) -> Condition:
        """Reads the text embeddings that stand for no prompt."""
        return self._text(UNCONDITIONAL, "")

    def shard_places(self, number: int) -> range:
        """Gives the places in the cache of a shard's pairs."""
        return range(self._starts[number], self._starts[number + 1])

    def shard_digest(self, number: int) -> str:
        """Hashes what results from one shard of latents depend on: its bytes, and the prompt of each pair."""
        places = self.shard_places(number)
        prompts = self.prompt_of[places.start : places.stop]
        used = self._text_shard_of[prompts].unique().tolist()
        names = [self.latents[number].name, UNCONDITIONAL, *(self._text_names[n] for n in used)]
        return digest([[self._reader.shards[name].sha256 for name in names], self._pairs(places.start, places.stop)])

    def content_hash(self) -> str:
        """Hashes all that training reads: tensors, rows and prompts; not where and when they were encoded."""
        shards = {name: shard.sha256 for name, shard in self._reader.shards.items()}
        return digest([shards, self._pairs(0, len(self))])

    def _pairs(self, start: int, stop: int) -> list[tuple[int, str]]:
        """Returns rows and the keys of their prompts."""
        prompts = self.prompt_of[start:stop].tolist()
        return [(row, self.prompt_keys[n]) for row, n in zip(self.rows[start:stop].tolist(), prompts, strict=True)]

    def _text(self, shard: str, prefix: str) -> Condition:
        condition = {}
        for name, shape in self._text_shapes.items():
            tensor = self._reader.tensor(shard, f"{prefix}{name}")
            condition[name] = tensor if not shape or shape[0] is None else padded(tensor, shape[0])
        return condition


def open_cache(folder: str | Path, fingerprint: Mapping[str, Any] | None = None) -> Cache:
    """Opens a cache for reading, after checking its index and the size of each file.

    A process compares the hash of a shard when it first uses it.

    Args:
        folder: the cache's.
        fingerprint: what its content is expected to depend on (:func:`sipo.cache.index.pairs_fingerprint`);
            ``None`` takes it as it is.

    Raises:
        CacheError: no cache, an unfinished one, one of other settings, a file cut short.
    """
    folder = Path(folder)
    index = read_pairs_index(folder, fingerprint)
    if index is None:
        raise CacheError(f"{folder}: no cache there, expected {INDEX}; `sipo precompute` makes one")
    if not index.complete:
        raise CacheError(f"{folder}: a cache that is not finished; `sipo precompute` continues where it stopped")
    try:
        cache = Cache(folder, index)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"not a whole index ({type(error).__name__}: {error})"
        raise DamagedError(f"{folder / INDEX}: {problem}; {REMEDY}") from error
    ShardFolder(folder).check_sizes(cache._reader.shards.values())
    return cache
