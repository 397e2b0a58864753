"""Computes the reference's errors at fixed draws, shard by shard, beside the cache that the pairs are in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sipo.batch import PairBatch, collate, counted_mean, noisy_pairs
from sipo.cache.finished import Cache
from sipo.cache.format import INDEX, Shard, ShardFolder, shard_name
from sipo.cache.pairs import CachedPairs, DrawnPairs
from sipo.cache.reference_errors import (
    ERRORS,
    FixedDraws,
    ReferenceErrors,
    errors_folder,
    open_reference_errors,
    reference_fingerprint,
)
from sipo.data.records import row_name
from sipo.files import remove_leftovers
from sipo.processes import everywhere, in_rounds, on_main
from sipo.progress import track
from sipo.protocols import Predict
from sipo.schedule import NoiseSchedule


def precompute_reference_errors(
    cache: Cache,
    network: nn.Module,
    predict: Predict,
    schedule: NoiseSchedule,
    fixed: FixedDraws,
    reference: Mapping[str, Any],
    *,
    batch_size: int,
    accelerator: Any = None,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    num_workers: int = 0,
    progress: bool | None = True,
) -> ReferenceErrors:
    """Computes the reference's error for every pair at each of its fixed draws, and writes them beside the cache.

    The noisy latents and targets are those of training: the same items (:class:`sipo.cache.pairs.DrawnPairs`), the same
    calls of the schedule, in the same types. Errors are summed in float64, so that they are the exact errors of the
    prediction. Errors that exist are kept after a check. Every process calls this, and an error of one ends all of
    them (:mod:`sipo.processes`).

    Args:
        cache: pairs.
        network: the reference, on its device; run in evaluation mode, and put back as it was.
        predict: calls it (:meth:`sipo.families.base.Family.predict`).
        schedule: training's.
        fixed: draws of each pair.
        reference: JSON values that say which network this is and how it runs. Errors of one reference are never used
            for another.
        batch_size: pairs in one forward pass, ``2 * batch_size`` samples.
        accelerator: accelerate's, if there is one: shards are dealt out to its processes.
        autocast: gives the context that predictions are made in; the accelerator's own if left out.
        num_workers: data loader processes.
        progress: as in :mod:`sipo.progress`.

    Raises:
        CacheError: the cache is damaged.
        ValueError: a number out of its range, or an error that is not finite, with its row and noise level.
        OtherProcessError: whatever ended another process.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    drawn = DrawnPairs(CachedPairs(cache), schedule, fixed)
    marks = reference_fingerprint(cache, schedule, fixed, reference)
    folder = errors_folder(cache, marks)
    shards = ShardFolder(folder)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    context = autocast or (nullcontext if accelerator is None else accelerator.autocast)

    def begin() -> list[int]:
        """Returns this process's shards that are missing, damaged or of other pairs."""
        missing = [n for n in range(rank, len(cache.latents), world) if not _is_current(cache, shards, n)]
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0 and not (folder / INDEX).is_file():
            shards.write_index(marks, {}, complete=False)
        return missing

    mine = everywhere(accelerator, begin)

    def compute() -> Generator[None, None, None]:
        for found in _errors_of_shards(
            drawn, mine, network, predict, schedule, batch_size, context, num_workers, progress if rank == 0 else None
        ):
            if found is not None:
                number, errors, levels = found
                _check_finite(cache, number, errors, levels)
                facts = {"pairs": len(errors), "inputs": cache.shard_digest(number)}
                shards.write(shard_name(ERRORS, number), {"errors": errors, "levels": levels}, facts)
            yield

    was_training = network.training
    network.eval()
    try:
        in_rounds(accelerator, compute())
    finally:
        network.train(was_training)

    def finish() -> None:
        whole = [shards.require(shard_name(ERRORS, n)).as_dict() for n in range(len(cache.latents))]
        shards.write_index(marks, {"shards": whole}, complete=True)
        shards.remove_beyond((ERRORS,), len(whole))
        remove_leftovers(folder)

    on_main(accelerator, finish)
    return everywhere(accelerator, lambda: open_reference_errors(cache, schedule, fixed, reference))


def _is_current(cache: Cache, shards: ShardFolder, number: int) -> Shard | None:
    shard = shards.read_intact(shard_name(ERRORS, number))
    return shard if shard is not None and shard.facts.get("inputs") == cache.shard_digest(number) else None


def _errors_of_shards(
    drawn: DrawnPairs,
    numbers: list[int],
    network: nn.Module,
    predict: Predict,
    schedule: NoiseSchedule,
    batch_size: int,
    context: Callable[[], AbstractContextManager[Any]],
    num_workers: int,
    progress: bool | None,
) -> Iterator[tuple[int, Tensor, Tensor] | None]:
    """Yields number, errors ``[n, K, 2]`` and levels ``[n, K]`` of each shard; ``None`` after each batch before."""
    cache, device = drawn.cached.cache, next(network.parameters()).device
    batches = {number: list(_batches(cache, drawn.draws, number, batch_size)) for number in numbers}
    loader: DataLoader[Any] = DataLoader(
        drawn,  # type: ignore[arg-type]
        batch_sampler=[batch for number in numbers for batch in batches[number]],
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        collate_fn=collate,
    )
    items = iter(loader)
    for number in track(numbers, "reference errors", "shards", progress):
        start, pairs = cache.shard_places(number).start * drawn.draws, len(cache.shard_places(number))
        errors = torch.empty(pairs * drawn.draws, 2, dtype=torch.float64)
        levels: Tensor | None = None
        # Errors stay on the device until the shard is whole, so that the host is a batch ahead of it.
        found = []
        for batch in batches[number]:
            found.append(
                (batch, *_errors(PairBatch.of_items(next(items)).to(device), network, predict, schedule, context))
            )
            yield None
        for batch, batch_errors, batch_levels in found:
            if levels is None:
                levels = torch.empty(len(errors), dtype=batch_levels.dtype)
            places = torch.tensor(batch) - start
            errors[places] = batch_errors.to("cpu", torch.float64)
            levels[places] = batch_levels.cpu()
        if levels is None:  # every pair of the shard was left out
            levels = torch.empty(0, dtype=torch.float32)
        yield number, errors.view(pairs, drawn.draws, 2), levels.view(pairs, drawn.draws)


def _batches(cache: Cache, draws: int, number: int, batch_size: int) -> Iterator[list[int]]:
    """Divides the indices of a shard's items into batches of one group each."""
    places = cache.shard_places(number)
    groups = cache.group_of[places.start : places.stop]
    for group in groups.unique().tolist():
        of_group = (places.start + (groups == group).nonzero()[:, 0]).tolist()
        items = [place * draws + draw for place in of_group for draw in range(draws)]
        for start in range(0, len(items), batch_size):
            yield items[start : start + batch_size]


def _errors(
    batch: PairBatch,
    network: nn.Module,
    predict: Predict,
    schedule: NoiseSchedule,
    context: Callable[[], AbstractContextManager[Any]],
) -> tuple[Tensor, Tensor]:
    """Computes ``[B, 2]`` squared errors at fixed draws (docs/math.md §2); also returns the levels ``[B]``."""
    pairs = noisy_pairs(batch, schedule)
    with torch.no_grad(), context():
        prediction = predict(network, pairs.samples, pairs.timesteps, pairs.condition)
    wide = torch.float32 if prediction.device.type == "mps" else torch.float64
    # One sample at a time: a copy of a whole batch in float64 may be as large as the network.
    targets = itertools.cycle(pairs.target)  # both samples of a pair may share one
    masks = itertools.cycle([None] if batch.error_mask is None else batch.error_mask)
    errors = [
        counted_mean((p.to(wide) - t.to(wide)).square(), mask)
        for p, t, mask in zip(prediction, targets, masks, strict=False)
    ]
    return torch.stack(errors).view(2, -1).T, pairs.levels[: len(batch)]


def _check_finite(cache: Cache, number: int, errors: Tensor, levels: Tensor) -> None:
    wrong = (~errors.isfinite()).any(-1).nonzero()
    if len(wrong):
        pair, draw = wrong[0].tolist()
        row = int(cache.rows[cache.shard_places(number)[pair]])
        raise ValueError(
            f"{row_name(row)}: the reference's errors at noise level {levels[pair, draw].item()} are "
            f"{errors[pair, draw].tolist()}, expected finite numbers"
        )
