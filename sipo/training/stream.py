"""The run's stream of pairs: which pair comes when, and the random numbers that go with it.

A run reads an endless stream of pairs, a fresh permutation of the data set each epoch. Position ``p`` of the
stream decides everything about a pair: which one it is, its noise, whether it keeps its caption, and (with the
others of its step) its noise level. Nothing depends on what was drawn before, so resuming is arithmetic, and the split
of a step into processes and accumulated passes changes no random number.

Where pairs differ in shape, they come in groups, and a forward pass of all processes takes pairs of one group. Each
group then has such a stream of its own, and passes go to groups in a shuffled order in which, over epochs, every pair
comes up equally often.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from sipo.batch import OF_IMAGE, collate, is_ragged, padded
from sipo.protocols import PairDataset, Schedule
from sipo.seeds import RandomStream, derive_seed, happens
from sipo.training.config import TrainingConfig
from sipo.training.stopping import release_signals


def batches_in_order(dataset: PairDataset, size: int, pairs: int | None = None) -> list[list[int]]:
    """Divides a data set, or its first ``pairs``, into batches of at most ``size`` indices of one group each."""
    groups = getattr(dataset, "groups", None) or [range(len(dataset))]
    parts = [[index for index in group if pairs is None or index < pairs] for group in groups]
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


class StreamSampler(Sampler[list[int]]):
    """Batches of data set indices for one process, from one pass of the run to its last.

    Args:
        length: pairs in the data set.
        batch_size: pairs per pass and process.
        seed: the run's.
        first_pass: pass to start from, counted from the start of the run.
        passes: pass to stop before.
        rank: this process.
        world: number of processes.
        groups: indices that may share a batch, each index in one group; all may where left out.

    Raises:
        ValueError: groups that are empty or do not hold every index once.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        first_pass: int,
        passes: int,
        rank: int = 0,
        world: int = 1,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.passes = range(first_pass, passes)
        self.rank = rank
        self.world = world
        self.groups: list[Sequence[int]] = [range(length)] if groups is None else list(groups)
        if groups is not None and sorted(i for group in groups for i in group) != list(range(length)):
            raise ValueError(f"groups: expected every index of the data set's {length} pairs once")
        if not all(self.groups):
            raise ValueError(f"groups[{[len(g) for g in self.groups].index(0)}] is empty, expected at least one pair")

    def positions(self, index: int) -> range:
        """Returns the positions in the run's stream of this process's pairs in pass ``index``."""
        start = (index * self.world + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        sequence = _GroupSequence([len(group) for group in self.groups], self.batch_size * self.world, self.seed)
        if len(self.groups) == 1:  # its stream is the data set's
            streams = [_Shuffled(self.groups[0], self.seed)]
        else:
            streams = [
                _Shuffled(group, derive_seed(self.seed, RandomStream.GROUPS, -1 - number))
                for number, group in enumerate(self.groups)
            ]
        for index in self.passes:
            group, earlier = sequence[index]
            yield [streams[group][position] for position in self.positions(earlier)]

    def __len__(self) -> int:
        return len(self.passes)


class _Shuffled:
    """An endless stream of indices, a fresh permutation each epoch; made to be read in order."""

    def __init__(self, indices: Sequence[int], seed: int) -> None:
        self.indices = indices
        self.seed = seed
        self.epoch = -1
        self.order: list[int] = []

    def __getitem__(self, position: int) -> int:
        # A pass may straddle two epochs, or many where there are fewer pairs than a batch takes.
        epoch, offset = divmod(position, len(self.indices))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, RandomStream.ORDER, epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.indices), generator=generator).tolist()
        return self.indices[self.order[offset]]


class _GroupSequence:
    """Which group each pass takes, and how many passes that group had before it.

    In epoch ``e`` a group of ``n`` pairs gets ``(e+1)·n // batch − e·n // batch`` passes: over epochs, as many as its
    pairs need, without remainder.
    """

    def __init__(self, sizes: list[int], batch: int, seed: int) -> None:
        self.sizes = sizes
        self.batch = batch
        self.seed = seed
        self.epoch = -1
        self.passes: list[tuple[int, int]] = []

    def _start(self, epoch: int) -> int:
        """Returns the number of passes before an epoch."""
        return sum(epoch * size // self.batch for size in self.sizes)

    def __getitem__(self, index: int) -> tuple[int, int]:
        # Rounding down loses less than one pass a group, so that the epoch wanted is below this bound.
        bound = (index + len(self.sizes) + 1) * self.batch // sum(self.sizes) + 2
        epoch = bisect_right(range(bound), index, key=self._start) - 1
        if epoch != self.epoch:
            counts = [epoch * size // self.batch for size in self.sizes]
            ends = [(epoch + 1) * size // self.batch for size in self.sizes]
            labels = [g for g, (a, b) in enumerate(zip(counts, ends, strict=True)) for _ in range(a, b)]
            generator = torch.Generator().manual_seed(derive_seed(self.seed, RandomStream.GROUPS, epoch))
            self.epoch, self.passes = epoch, []
            for place in torch.randperm(len(labels), generator=generator).tolist():
                group = labels[place]
                self.passes.append((group, counts[group]))
                counts[group] += 1
        return self.passes[index - self._start(epoch)]


def pair_loader(
    dataset: PairDataset,
    batches: Any,
    config: TrainingConfig,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """Loads batches of a data set's items, each as :func:`sipo.batch.collate` makes it.

    Args:
        dataset: the pairs.
        batches: lists of indices.
        config: number of the loader's processes.
        device: that batches are copied to later.
        generator: of the seed that the loader draws when it starts.
    """
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=config.dataloader_num_workers,
        pin_memory=device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=release_signals,
        generator=generator,
    )


def pair_noise(like: Tensor, positions: Sequence[int], seed: int, generator: torch.Generator) -> Tensor:
    """Draws Gaussian noise with ``like``'s shape, type and device, from one seed per pair of the stream.

    Args:
        like: ``[B, ...]``.
        positions: the ``B`` pairs' places in the stream.
        seed: the run's.
        generator: reseeded for every pair; on ``like``'s device, so that nothing is copied there.
    """
    noise = torch.empty_like(like, memory_format=torch.contiguous_format)
    for row, position in enumerate(positions):
        noise[row].normal_(generator=generator.manual_seed(derive_seed(seed, RandomStream.NOISE, position)))
    return noise


def step_levels(schedule: Schedule, n: int, step: int, seed: int, distribution: str) -> Tensor:
    """Draws the noise levels ``[n]`` of an optimiser step's pairs, for every process and pass, on the CPU."""
    generator = torch.Generator().manual_seed(derive_seed(seed, RandomStream.LEVELS, step))
    return schedule.sample_levels(n, generator, distribution=distribution)


def drop_captions(condition: Any, unconditional: Any, positions: Sequence[int], seed: int, probability: float) -> None:
    """Replaces some rows of a batch's condition by the condition of no caption, on the host, in place.

    Ragged tensors (:func:`sipo.batch.is_ragged`) become as long as the longer of both. What encodes a condition image,
    whose names begin with ``condition_``, stays.

    Args:
        condition: tensor ``[B, ...]`` or dictionary of them.
        unconditional: likewise without the ``B``.
        positions: the ``B`` pairs' places in the stream, which decide.
        seed: the run's.
        probability: of each pair.

    Raises:
        ValueError: the two do not fit each other.
    """
    rows = [
        row for row, position in enumerate(positions) if happens(probability, seed, RandomStream.CAPTIONS, position)
    ]
    if not rows:
        return
    pairs = [("", condition, unconditional)]
    if isinstance(condition, dict) and isinstance(unconditional, dict):
        for name in condition.keys() ^ unconditional.keys():
            if not name.startswith(OF_IMAGE):
                raise ValueError(f"{name!r} is in one of condition and unconditional, expected the same names in both")
        for name in (name for name in unconditional if is_ragged(name, condition)):
            length = max(condition[name].shape[1], len(unconditional[name]))
            condition[name] = padded(condition[name], length, dim=1)
            unconditional = unconditional | {name: padded(unconditional[name], length)}
        pairs = [(f"[{name!r}]", condition[name], unconditional[name]) for name in unconditional]
    for name, kept, empty in pairs:
        if not isinstance(kept, Tensor) or not isinstance(empty, Tensor) or kept.shape[1:] != empty.shape:
            shapes = [list(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (empty, kept)]
            raise ValueError(f"unconditional{name} is {shapes[0]}, expected one row of condition{name}, {shapes[1]}")
        kept[rows] = empty.to(kept.dtype)
