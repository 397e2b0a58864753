"""The reference's errors at fixed draws: training with them needs no reference network.

The loss depends on the reference through one number for each sample and draw (docs/math.md §2). Only these are kept,
beside the cache that they were computed from (precompute_errors.py):

    references/<16 digits>/index.json                what the numbers depend on, and the size and hash of every shard
    references/<16 digits>/errors-00000.safetensors  for the pairs of latents-00000, in their order:
                                                     errors [n, K, 2] float64, chosen first, and levels [n, K]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipo.cache.finished import Cache
from sipo.cache.format import INDEX, CacheError, DamagedError, Shard, ShardFolder, ShardReader, digest
from sipo.cache.index import check_fingerprint
from sipo.protocols import Schedule
from sipo.schedule import NoiseSchedule
from sipo.seeds import RandomStream, derive_seed

FOLDER = "references"
ERRORS = "errors"


@dataclass(frozen=True)
class FixedDraws:
    """What decides the fixed draws of noise and noise level of each pair.

    A draw is a function of these, the pair's row in the source and the draw's number: neither the number of draws, nor
    which other pairs there are, nor where and in what order they are read changes it.

    Attributes:
        draws: for each pair.
        seed: of all draws.
        distribution: of the noise levels; the schedule knows which it has.
        proportion_empty_prompts: share of draws whose caption is dropped, in [0, 1].

    Raises:
        ValueError: a number out of its range.
    """

    draws: int
    seed: int
    distribution: str = "uniform"
    proportion_empty_prompts: float = 0.0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws={self.draws}: expected at least 1")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(f"proportion_empty_prompts={self.proportion_empty_prompts}: expected a share in [0, 1]")

    def noise(self, row: int, draw: int, shape: torch.Size) -> Tensor:
        """Draws noise of a shape, float32."""
        return torch.randn(shape, generator=self._generator(RandomStream.FIXED_NOISE, row, draw), dtype=torch.float32)

    def level(self, row: int, draw: int, schedule: Schedule) -> Tensor:
        """Draws a noise level, 0-d."""
        generator = self._generator(RandomStream.FIXED_LEVEL, row, draw)
        return schedule.sample_levels(1, generator, distribution=self.distribution)[0]

    def drops_caption(self, row: int, draw: int) -> bool:
        """Whether the draw is without the pair's caption."""
        generator = self._generator(RandomStream.FIXED_CAPTION, row, draw)
        return bool(torch.rand((), generator=generator, dtype=torch.float32) < self.proportion_empty_prompts)

    def _generator(self, stream: RandomStream, row: int, draw: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(derive_seed(self.seed, stream, row), stream, draw))


class ReferenceErrors:
    """Reference errors on disk, for reading; made by :func:`open_reference_errors`.

    Attributes:
        folder: where they are.
        fingerprint: what they depend on.
    """

    def __init__(self, cache: Cache, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self.shards = [Shard.from_dict(entry) for entry in index["shards"]]
        self._reader = ShardReader(folder, self.shards)
        self._shard_of = cache.shard_of
        self._first = [cache.shard_places(number).start for number in range(len(self.shards))]

    def at(self, place: int) -> tuple[Tensor, Tensor]:
        """Reads errors ``[K, 2]`` float64 and their noise levels ``[K]`` of the pair at a place in the cache."""
        number = int(self._shard_of[place])
        offset = place - self._first[number]
        name = self.shards[number].name
        return self._reader.tensor(name, "errors")[offset], self._reader.tensor(name, "levels")[offset]


def reference_fingerprint(
    cache: Cache, schedule: NoiseSchedule, fixed: FixedDraws, reference: Mapping[str, Any]
) -> dict[str, Any]:
    """Lists what reference errors depend on.

    The arguments are those of :func:`sipo.cache.precompute_errors.precompute_reference_errors`.
    """
    return {
        **{f"reference.{key}": value for key, value in reference.items()},
        **dataclasses.asdict(fixed),
        # The sampler's steps enter the loss alone, and FLUX.2's shift, which stays in the list.
        "schedule": {key: value for key, value in schedule.settings().items() if key != "num_inference_steps"},
        "cache": digest(cache.fingerprint),
    }


def open_reference_errors(
    cache: Cache, schedule: NoiseSchedule, fixed: FixedDraws, reference: Mapping[str, Any]
) -> ReferenceErrors:
    """Opens what :func:`sipo.cache.precompute_errors.precompute_reference_errors` wrote for the same arguments.

    Raises:
        CacheError: there are no errors for these arguments (and how those that exist differ), they are unfinished or
            damaged, or the latents have changed since.
    """
    wanted = reference_fingerprint(cache, schedule, fixed, reference)
    folder = errors_folder(cache, wanted)
    index = ShardFolder(folder).read_index()
    if index is None:
        others = [path.parent for path in sorted((cache.folder / FOLDER).glob(f"*/{INDEX}"))]
        marks = {other: (ShardFolder(other).read_index() or {"fingerprint": {}})["fingerprint"] for other in others}
        for other in sorted(others, key=lambda each: _differences(marks[each], wanted)):
            check_fingerprint(other, marks[other], wanted)  # the one that is most alike says where it is not
        raise CacheError(f"{cache.folder / FOLDER}: no reference errors, expected some; `sipo precompute` makes them")
    if not index["complete"]:
        raise CacheError(f"{folder}: reference errors that are not finished; `sipo precompute` finishes them")
    if len(index["shards"]) != len(cache.latents):
        raise DamagedError(
            f"{folder}: errors of {len(index['shards'])} shards of pairs, expected {len(cache.latents)}; "
            "`sipo precompute` rebuilds them"
        )
    references = ReferenceErrors(cache, folder, index)
    ShardFolder(folder).check_sizes(references.shards)
    for number, shard in enumerate(references.shards):
        if shard.facts["inputs"] != cache.shard_digest(number):
            raise DamagedError(
                f"{folder / shard.file}: computed from other pairs than those of {cache.latents[number].file}; "
                "`sipo precompute` rebuilds it"
            )
    return references


def errors_folder(cache: Cache, fingerprint: Mapping[str, Any]) -> Path:
    """Gives the folder of the errors that a fingerprint belongs to."""
    return cache.folder / FOLDER / digest(fingerprint)[:16]


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    return sum(digest(found.get(key)) != digest(wanted.get(key)) for key in {*found, *wanted})
