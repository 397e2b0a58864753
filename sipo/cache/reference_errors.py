"""The reference's errors at fixed draws, computed beforehand: training then needs no reference network.

The loss depends on the reference through one number for each sample and draw (docs/math.md §2), so these are all that
is kept, beside the cache they were computed from:

    references/<16 digits>/index.json              what the numbers depend on, and the size and hash of every shard
    references/<16 digits>/errors-00000.safetensors  for the pairs of latents-00000, in their order:
                                                   errors [n, K, 2] float64 (chosen sample's, rejected sample's) and
                                                   timesteps [n, K]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from sipo.batch import PairBatch, noisy_pairs
from sipo.cache.format import (
    FORMAT,
    INDEX,
    Cache,
    CacheError,
    DamagedError,
    Shard,
    ShardReader,
    check_fingerprint,
    check_sizes,
    digest,
    intact_shard,
    read_index,
    read_shard,
    remove_shards,
    shard_from_entry,
    shard_name,
    write_json,
    write_shard,
)
from sipo.cache.pairs import CachedPairs, DrawnPairs
from sipo.data.records import row_name
from sipo.files import remove_leftovers
from sipo.processes import everywhere, in_rounds, on_main
from sipo.progress import track
from sipo.protocols import Predict
from sipo.recipe.config import Config, differing_types, policy_dtype, reference_dtype
from sipo.schedule import NoiseSchedule

FOLDER = "references"
ERRORS = "errors"


class References:
    """Reference errors on disk, for reading; made by :func:`open_references`.

    Attributes:
        folder: where they are.
        fingerprint: what they depend on.
    """

    def __init__(self, cache: Cache, folder: Path, index: dict[str, Any], check_hashes: bool = True) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self.shards = [shard_from_entry(entry) for entry in index["shards"]]
        self._reader = ShardReader(folder, self.shards, check_hashes)
        self._shard_of = cache.shard_of
        self._first = [cache.shard_places(number).start for number in range(len(self.shards))]

    def at(self, place: int) -> tuple[Tensor, Tensor]:
        """For the pair at a place in the cache: errors ``[K, 2]`` float64 and the timesteps ``[K]`` they are for."""
        number = int(self._shard_of[place])
        offset = place - self._first[number]
        name = self.shards[number].name
        return self._reader.tensor(name, "errors")[offset], self._reader.tensor(name, "timesteps")[offset]


def reference_fingerprint(
    cache: Cache,
    schedule: NoiseSchedule,
    *,
    reference: Mapping[str, Any],
    draws: int,
    seed: int,
    distribution: str,
    proportion_empty_prompts: float,
) -> dict[str, Any]:
    """What reference errors depend on; see :func:`precompute_references` for the arguments."""
    levels = schedule.invert_sigmas if schedule.kind == "flow" else digest(_alphas(schedule))
    return {
        **{f"reference.{key}": value for key, value in reference.items()},
        "draws": draws,
        "seed": seed,
        "distribution": distribution,
        "proportion_empty_prompts": proportion_empty_prompts,
        "schedule": [schedule.prediction_type, schedule.kind, schedule.num_train_timesteps, schedule.shift, levels],
        "cache": digest(cache.fingerprint),
    }


def reference_marks(config: Config, whole: torch.dtype | None = None) -> dict[str, Any]:
    """A configuration's reference, as ``reference`` of the other functions here.

    Args:
        config: the run's.
        whole: see :func:`sipo.training.sharding.whole_dtype`.
    """
    marks = {
        name: getattr(config.model, name) for name in ("family", "pretrained_model_name_or_path", "revision", "variant")
    }
    # One that predicts as the policy does has the policy's type: the storage type does not change the errors.
    dtype = policy_dtype(config) if differing_types(config) is None else reference_dtype(config)
    if whole is not None:
        dtype = f"{str(whole).removeprefix('torch.')}, norms too"
    return marks | {"dtype": dtype, "mixed_precision": config.training.mixed_precision}


def open_references(
    cache: Cache,
    schedule: NoiseSchedule,
    *,
    reference: Mapping[str, Any],
    draws: int,
    seed: int,
    distribution: str,
    proportion_empty_prompts: float,
    check_hashes: bool = True,
) -> References:
    """Opens what :func:`precompute_references` wrote for the same arguments.

    Raises:
        CacheError: there is nothing for these arguments (and how what there is differs), it is unfinished or
            damaged, or the latents have changed since.
    """
    wanted = reference_fingerprint(
        cache,
        schedule,
        reference=reference,
        draws=draws,
        seed=seed,
        distribution=distribution,
        proportion_empty_prompts=proportion_empty_prompts,
    )
    folder = _folder(cache, wanted)
    index = read_index(folder)
    if index is None:
        others = [path.parent for path in sorted((cache.folder / FOLDER).glob(f"*/{INDEX}"))]
        marks = {other: (read_index(other) or {"fingerprint": {}})["fingerprint"] for other in others}
        for other in sorted(others, key=lambda each: _differences(marks[each], wanted)):
            check_fingerprint(other, marks[other], wanted)  # the one that is most alike says where it is not
        raise CacheError(f"{cache.folder / FOLDER}: no reference errors, expected some; `sipo precompute` makes them")
    if not index["complete"]:
        raise CacheError(f"{folder}: reference errors that are not finished; `sipo precompute` goes on with them")
    if len(index["shards"]) != len(cache.latents):
        raise DamagedError(
            f"{folder}: errors of {len(index['shards'])} shards of pairs, expected {len(cache.latents)}; "
            "`sipo precompute` rebuilds them"
        )
    references = References(cache, folder, index, check_hashes)
    check_sizes(folder, references.shards)
    for number, shard in enumerate(references.shards):
        if shard.facts["inputs"] != cache.shard_digest(number):
            raise DamagedError(
                f"{folder / shard.file}: computed from other pairs than those of {cache.latents[number].file}; "
                "`sipo precompute` rebuilds it"
            )
    return references


def precompute_references(
    cache: Cache,
    network: nn.Module,
    predict: Predict,
    schedule: NoiseSchedule,
    *,
    reference: Mapping[str, Any],
    draws: int,
    seed: int,
    distribution: str = "uniform",
    proportion_empty_prompts: float = 0.0,
    batch_size: int,
    accelerator: Any = None,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    num_workers: int = 0,
    progress: bool | None = True,
) -> References:
    """Computes the reference's error for every pair at each of its fixed draws, and writes them beside the cache.

    The noisy latents and targets are those of training: the same items (:class:`sipo.cache.pairs.DrawnPairs`), the same
    calls of the schedule, in the same types. Errors are summed in float64, so that they are the exact errors of the
    prediction. What is there already is kept after a check. Every process calls this, and an error of one ends all of
    them (:mod:`sipo.processes`).

    Args:
        cache: pairs.
        network: the reference, on its device; run in evaluation mode, and put back as it was.
        predict: calls it (:meth:`sipo.families.base.Family.predict`).
        schedule: training's.
        reference: what says which network this is and how it runs (:func:`reference_marks`); JSON values. Errors of
            one reference are never taken for another's.
        draws: for each pair.
        seed: of the draws.
        distribution: of the timesteps.
        proportion_empty_prompts: share of draws without the caption, in [0, 1].
        batch_size: pairs in one forward pass, ``2 * batch_size`` samples.
        accelerator: accelerate's, if there is one: shards are dealt out to its processes.
        autocast: gives the context that predictions are made in; the accelerator's own if left out.
        num_workers: data loader processes.
        progress: as in :mod:`sipo.progress`.

    Raises:
        CacheError: the cache is damaged.
        ValueError: a number out of its range, or an error that is not finite, with its row and timestep.
        OtherProcessError: whatever ended another process.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    arguments: dict[str, Any] = {
        "reference": reference,
        "draws": draws,
        "seed": seed,
        "distribution": distribution,
        "proportion_empty_prompts": proportion_empty_prompts,
    }
    drawn = DrawnPairs(CachedPairs(cache), draws, schedule, seed, distribution, proportion_empty_prompts)
    marks = reference_fingerprint(cache, schedule, **arguments)
    folder = _folder(cache, marks)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    context = autocast or (nullcontext if accelerator is None else accelerator.autocast)
    unfinished = {"format": FORMAT, "complete": False, "fingerprint": marks}

    def begin() -> list[int]:
        """Shards of this process that are missing, damaged or of other pairs."""
        missing = [n for n in range(rank, len(cache.latents), world) if not _is_current(cache, folder, n)]
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0 and not (folder / INDEX).is_file():
            write_json(folder / INDEX, unfinished)
        return missing

    mine = everywhere(accelerator, begin)

    def compute() -> Generator[None, None, None]:
        for found in _errors_of_shards(
            drawn, mine, network, predict, schedule, batch_size, context, num_workers, progress if rank == 0 else None
        ):
            if found is not None:
                number, errors, timesteps = found
                _check_finite(cache, number, errors, timesteps)
                facts = {"pairs": len(errors), "inputs": cache.shard_digest(number)}
                write_shard(folder, shard_name(ERRORS, number), {"errors": errors, "timesteps": timesteps}, facts)
            yield

    was_training = network.training
    network.eval()
    try:
        in_rounds(accelerator, compute())
    finally:
        network.train(was_training)

    def finish() -> None:
        shards = [read_shard(folder, shard_name(ERRORS, n)) for n in range(len(cache.latents))]
        for number, shard in enumerate(shards):
            if shard is None:
                file = folder / f"{shard_name(ERRORS, number)}.json"
                raise DamagedError(
                    f"{file}: missing or damaged; `sipo precompute` rebuilds it (of several processes, all must see "
                    "one folder)"
                )
        whole = [shard.as_dict() for shard in shards if shard is not None]
        write_json(folder / INDEX, unfinished | {"complete": True, "shards": whole})
        remove_shards(folder, (ERRORS,), len(whole))
        remove_leftovers(folder)

    on_main(accelerator, finish)
    return everywhere(accelerator, lambda: open_references(cache, schedule, **arguments))


def _folder(cache: Cache, fingerprint: Mapping[str, Any]) -> Path:
    return cache.folder / FOLDER / digest(fingerprint)[:16]


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    return sum(digest(found.get(key)) != digest(wanted.get(key)) for key in {*found, *wanted})


def _is_current(cache: Cache, folder: Path, number: int) -> Shard | None:
    shard = intact_shard(folder, shard_name(ERRORS, number))
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
    """For each shard its number, errors ``[n, K, 2]`` and timesteps ``[n, K]``; ``None`` after each batch before."""
    cache, device = drawn.cached.cache, next(network.parameters()).device
    batches = {number: list(_batches(cache, drawn.draws, number, batch_size)) for number in numbers}
    loader: DataLoader[Any] = DataLoader(
        drawn,  # type: ignore[arg-type]
        batch_sampler=[batch for number in numbers for batch in batches[number]],
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        collate_fn=default_collate,
    )
    items = iter(loader)
    for number in track(numbers, "reference errors", "shards", progress):
        start, pairs = cache.shard_places(number).start * drawn.draws, len(cache.shard_places(number))
        errors = torch.empty(pairs * drawn.draws, 2, dtype=torch.float64)
        timesteps: Tensor | None = None
        # Errors stay on the device until the shard is whole, so that the host is a batch ahead of it.
        found = []
        for batch in batches[number]:
            found.append(
                (batch, *_errors(PairBatch.of_items(next(items)).to(device), network, predict, schedule, context))
            )
            yield None
        for batch, batch_errors, batch_timesteps in found:
            if timesteps is None:
                timesteps = torch.empty(len(errors), dtype=batch_timesteps.dtype)
            places = torch.tensor(batch) - start
            errors[places] = batch_errors.to("cpu", torch.float64)
            timesteps[places] = batch_timesteps.cpu()
        if timesteps is None:  # every pair of the shard was left out
            timesteps = torch.empty(0, dtype=torch.float32)
        yield number, errors.view(pairs, drawn.draws, 2), timesteps.view(pairs, drawn.draws)


def _batches(cache: Cache, draws: int, number: int, batch_size: int) -> Iterator[list[int]]:
    """Indices of a shard's items, those of one shape together."""
    places = cache.shard_places(number)
    shapes = cache.shape_of[places.start : places.stop]
    for shape in shapes.unique().tolist():
        of_shape = (places.start + (shapes == shape).nonzero()[:, 0]).tolist()
        items = [place * draws + draw for place in of_shape for draw in range(draws)]
        for start in range(0, len(items), batch_size):
            yield items[start : start + batch_size]


def _errors(
    batch: PairBatch,
    network: nn.Module,
    predict: Predict,
    schedule: NoiseSchedule,
    context: Callable[[], AbstractContextManager[Any]],
) -> tuple[Tensor, Tensor]:
    """``[B, 2]`` mean squared errors of ``B`` items with fixed draws (docs/math.md §2) and their timesteps ``[B]``."""
    assert batch.noise is not None and batch.timesteps is not None
    pairs = noisy_pairs(batch, batch.noise, batch.timesteps, schedule)
    with torch.no_grad(), context():
        prediction = predict(network, pairs.samples, pairs.timesteps, pairs.condition)
    wide = torch.float32 if prediction.device.type == "mps" else torch.float64
    # One sample at a time: a copy of a whole batch in float64 may be as large as the network.
    targets = itertools.cycle(pairs.target)  # both samples of a pair may share one
    errors = [(p.to(wide) - t.to(wide)).square().mean() for p, t in zip(prediction, targets, strict=False)]
    return torch.stack(errors).view(2, -1).T, batch.timesteps


def _check_finite(cache: Cache, number: int, errors: Tensor, timesteps: Tensor) -> None:
    wrong = (~errors.isfinite()).any(-1).nonzero()
    if len(wrong):
        pair, draw = wrong[0].tolist()
        row = int(cache.rows[cache.shard_places(number)[pair]])
        raise ValueError(
            f"{row_name(row)}: the reference's errors at timestep {timesteps[pair, draw].item()} are "
            f"{errors[pair, draw].tolist()}, expected finite numbers"
        )


def _alphas(schedule: NoiseSchedule) -> list[float]:
    alpha, _ = schedule.alpha_sigma(torch.arange(schedule.num_train_timesteps))
    values: list[float] = alpha.tolist()
    return values
