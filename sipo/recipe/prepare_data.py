"""``sipo precompute``: latents, text embeddings and the reference's errors that a configuration needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sipo.cache.finished import Cache, open_cache
from sipo.cache.format import CacheError, OtherSettingsError
from sipo.cache.index import other_path, pairs_are_whole, pairs_fingerprint
from sipo.cache.precompute import CacheSummary, precompute_pairs
from sipo.cache.precompute_errors import precompute_reference_errors
from sipo.cache.reference_errors import ReferenceErrors, open_reference_errors
from sipo.cache.savings import Cost
from sipo.cache.source import Tally, shard_sources
from sipo.data.check import LEFT_OUT
from sipo.data.readers import open_pairs
from sipo.data.records import DataError, PairReader, row_name
from sipo.files import make_folder
from sipo.locks import locked
from sipo.processes import everywhere, from_all, from_main, on_main
from sipo.progress import say
from sipo.recipe.build import RunContext, free_memory, frozen_reference
from sipo.recipe.config import ConfigError
from sipo.training.sharding import round_whole


class PreparedData(NamedTuple):
    """The result of :func:`prepare_data`.

    Attributes:
        cache: latents and text embeddings.
        references: the reference's errors, where the configuration asks for them.
        summary: what was done to the cache, if anything.
    """

    cache: Cache
    references: ReferenceErrors | None
    summary: CacheSummary | None


def prepare_data(
    run: RunContext,
    *,
    repair: bool = False,
    verify: bool = False,
    refuse_changes: bool = False,
    progress: bool | None = True,
) -> PreparedData:
    """Computes what the cache lacks, or what no longer agrees with the source: latents, text, reference errors.

    A line says what has changed since, one how many pairs have a condition image or an error mask if any were encoded,
    one how many are left out, and one what is used without having been compared, as its source is missing.

    Args:
        run: of :func:`open_run`.
        repair: read every shard, also where the cache is finished, and write damaged ones again.
        verify: read every file of the source and of the model, also where size, times and inode are as they were.
        refuse_changes: an error at the first change, before anything is encoded again.
        progress: as in :mod:`sipo.progress`.

    Returns:
        The data, and what was done to it, if it could be compared.

    Raises:
        CacheError: a cache of other settings or weights; a change, where they are refused.
        BadPairError: a pair that cannot be used, without ``data.skip_bad``.
        DataError: no source, and no finished cache of it.
        ConfigError: ``loss.safeguard`` beside error masks; ``data.held_out`` of all pairs.
    """
    config, accelerator = run.config, run.accelerator
    on_main(accelerator, lambda: make_folder(run.cache, f"data.cache={config.data.cache!r}"))
    weights = run.weight_hashes(network=False, verify=verify)
    if verify and config.data.reference_errors:
        run.weight_hashes(network=True, verify=True)
    fingerprint, summary = pairs_fingerprint(config.model, config.data, weights), None
    whole = from_main(accelerator, lambda: pairs_are_whole(run.cache, fingerprint))
    reader, missing = _open_source(run, ask=whole)
    if missing and (verify or not whole):
        raise DataError(missing)
    said = [f"could not be compared with its pairs, the encoded data is used unchanged: {missing}"]
    if reader is not None:
        everywhere(accelerator, lambda: _check_masks(run, _masked_rows(run, reader)))
        summary = precompute_pairs(
            reader,
            run.family,
            lambda: run.load_encoders().to(accelerator.device),
            run.cache,
            settings=config.data,
            fingerprint=fingerprint,
            check_hashes=repair or not whole,
            verify=verify,
            refuse_changes=refuse_changes,
            accelerator=accelerator,
            on_cost=lambda cost: _say_cost(run, cost),
            progress=progress,
        )
        said = summary.news()
    free_memory()
    cache = everywhere(accelerator, lambda: open_cache(run.cache, fingerprint))
    if cache.path != config.data.dataset_name:
        raise other_path(run.cache, cache.path, config.data.dataset_name, f"which cannot be read ({missing})")
    _check_masks(run, cache.rows[cache.masked].tolist())  # here too: the source may be gone
    if summary is not None and summary.written:
        images = {"a condition image": cache.with_image, "an error mask": cache.masked}
        said += [f"{int(has.sum())} of {len(cache)} pairs have {what}" for what, has in images.items() if has.any()]
    if cache.skipped:
        reasons = "; ".join(f"{LEFT_OUT.get(kind, kind)}: {count}" for kind, count in cache.skipped.items())
        number = sum(cache.skipped.values())
        said.append(f"{number} of {number + len(cache)} pairs cannot be used and are left out ({reasons})")
    if accelerator.is_main_process:
        for line in said:
            say(f"{run.cache}: {line}")
    references = None
    if config.data.reference_errors:
        references = _references(run, cache, repair, refuse_changes, progress)
    return PreparedData(cache, references, summary)


def _check_masks(run: RunContext, masked_rows: Iterable[int]) -> None:
    """Refuses error masks beside ``loss.safeguard``: those from files have weights (docs/math.md §6, relatives)."""
    safeguard = run.config.loss.safeguard
    row = None if safeguard is None else next(iter(masked_rows), None)
    if row is not None:
        where = f"{run.config.data.dataset_name}: {row_name(row)}"
        raise ConfigError(f"loss.safeguard={safeguard}: expected null, {where} has an error_mask")


def _masked_rows(run: RunContext, reader: PairReader) -> Iterator[int]:
    if getattr(reader, "root", None) is not None:  # only rows of paths have masks
        for source in shard_sources(reader, run.family, run.config.data, Tally()):
            yield from (record.row for record in source.records if record.error_mask is not None)


def _say_cost(run: RunContext, cost: Cost) -> None:
    """Prints what encoding costs and what training will not use; refuses what cannot be trained with or stored."""
    data, training = run.config.data, run.config.training
    free = shutil.disk_usage(run.cache).free
    draws = data.draws if data.reference_errors else 0
    try:
        cost.check(free)
    except ValueError as error:
        raise CacheError(f"{run.cache}: {error}") from error
    pairs = cost.encoded + (cost.pairs or 0)
    if cost.exact and 0 < pairs <= data.held_out:
        raise ConfigError(f"data.held_out={data.held_out}: expected fewer than the {pairs} pairs there are")
    say(f"{run.cache}: {cost.describe(free, draws)}")
    in_step = training.pairs_in_step(run.accelerator.num_processes)
    seen = training.max_train_steps * in_step
    unused = cost.unused(draws=draws, held_out=data.held_out, seen=seen)
    if unused:
        say(f"{run.cache}: {training.max_train_steps} steps of {in_step} pairs: {unused}")


def _open_source(run: RunContext, ask: bool) -> tuple[PairReader | None, str]:
    """Opens the pairs, or returns why there are none; the same in every process.

    Args:
        run: of :func:`open_run`.
        ask: whether they must be able to say that they have not changed, as a hub that is out of reach is not.
    """
    data = run.config.data

    readers: list[PairReader] = []

    def missing() -> str:
        try:
            reader = open_pairs(run.data_path, data.format, data.dataset_split_name, data.streaming)
            if ask:
                getattr(reader, "state", str)()
        except DataError as error:
            return str(error)
        readers.append(reader)
        return ""

    reason = next(filter(None, from_all(run.accelerator, missing)), "")
    return (None, reason) if reason else (readers[0], "")


def _references(
    run: RunContext, cache: Cache, repair: bool, refuse_changes: bool, progress: bool | None
) -> ReferenceErrors:
    """Opens the reference's errors at every draw, and computes those that do not exist yet."""
    config, accelerator = run.config, run.accelerator
    fixed, reference = run.fixed_draws, run.reference_marks
    found: ReferenceErrors | None = None

    def is_computed() -> bool:
        nonlocal found
        try:
            found = open_reference_errors(cache, run.schedule, fixed, reference)
        except OtherSettingsError as error:
            if refuse_changes:  # the run's own exist, and are others than this run's
                raise ConfigError(str(error)) from error
        except CacheError:
            pass
        return found is not None

    if not repair and all(from_all(accelerator, is_computed)) and found is not None:
        return found
    with locked(run.cache, f"data.cache={str(run.cache)!r}", accelerator=accelerator):
        network = round_whole(frozen_reference(run), accelerator).to(accelerator.device)
        found = precompute_reference_errors(
            cache,
            network,
            run.predict,
            run.schedule,
            fixed,
            reference,
            batch_size=config.training.train_batch_size,
            accelerator=accelerator,
            num_workers=config.training.dataloader_num_workers,
            progress=progress,
        )
    del network
    free_memory()
    return found
