"""What a configuration opens: the model's family, the data, the network and what it is compared with, the loss.

:func:`prepare_data` is ``sipo precompute``; ``train.py`` puts all of it together.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from sipo.cache.format import Cache, CacheError, OtherSettingsError, open_cache, other_path, pairs_are_whole
from sipo.cache.pairs import CachedPairs, DrawnPairs, split
from sipo.cache.precompute import fingerprint, precompute_pairs
from sipo.cache.reference_errors import References, open_references, precompute_references, reference_marks
from sipo.cache.savings import Cost
from sipo.cache.summary import CacheSummary
from sipo.cache.weights import PLACE, weight_hashes
from sipo.data.readers import open_pairs
from sipo.data.records import DataError, PairReader
from sipo.data.toy import make_toy_pairs
from sipo.families import Family, get
from sipo.families.config import ModelConfig
from sipo.families.toy import build_toy
from sipo.families.tuning import adapter_off, freeze, frozen_copy, prepare_full, prepare_lora
from sipo.files import aside, remove_leftovers
from sipo.locks import locked
from sipo.loss import SIPOLoss
from sipo.processes import everywhere, from_main, gathered, on_main
from sipo.progress import say
from sipo.protocols import PairDataset
from sipo.recipe.config import (
    TOY,
    Config,
    ConfigError,
    differing_types,
    policy_dtype,
    reference_dtype,
    reference_kind,
)
from sipo.schedule import DEFAULT_INFERENCE_STEPS, NoiseSchedule
from sipo.schedule.diffusers_schedulers import SettingError, setting_changes, with_settings
from sipo.training import AdapterOff, ReferenceModel, TrainingWarning, make_accelerator
from sipo.training.sharding import round_whole, whole_dtype


@dataclass(frozen=True)
class RunContext:
    """A configuration, and what follows from it alone.

    Attributes:
        config: as given.
        family: the model's.
        accelerator: device, processes, precision.
        model_path: ``config.model.pretrained_model_name_or_path``, or the folder that a toy was built in.
        data_path: likewise.
        schedule: the noise schedule trained with.
    """

    config: Config
    family: Family
    accelerator: Accelerator
    model_path: str
    data_path: str
    schedule: NoiseSchedule

    @property
    def cache(self) -> Path:
        """Folder of latents, text embeddings and reference errors."""
        return Path(self.config.data.cache)

    @property
    def draws(self) -> dict[str, Any]:
        """What fixed draws, and the reference's errors at them, hang on."""
        data, training = self.config.data, self.config.training
        return {
            "draws": data.draws,
            "seed": data.seed,
            "distribution": training.timestep_distribution,
            "proportion_empty_prompts": training.proportion_empty_prompts,
        }

    @property
    def references(self) -> dict[str, Any]:
        """What says which reference errors these are, for the functions of ``sipo.cache.reference_errors``."""
        marks = reference_marks(self.config, whole_dtype(self.accelerator))
        marks = {key: value for key, value in marks.items() if key not in PLACE} | self.weights(network=True)
        return {"reference": marks, **self.draws}

    def weights(self, *, network: bool, verify: bool = False) -> dict[str, str]:
        """Hashes of the files of the network, or of what encodes (:func:`sipo.cache.weights.weight_hashes`)."""
        options = {"network": network, "verify": verify}
        return from_main(
            self.accelerator,
            lambda: weight_hashes(self.family, self.model_path, self.config.model, self.cache, **options),
        )

    def scheduler_changes(self) -> dict[str, Any]:
        """Options of the model's scheduler that the configuration sets otherwise."""
        scheduler = self.family.load_scheduler(self.model_path, **hub_options(self.config.model))
        return setting_changes(scheduler, self.config.model.prediction_type, self.config.model.shift)

    def load_encoders(self, *, text: bool = True) -> Any:
        """The pipeline without its network, on the CPU; without ``text``, without its text encoders as well."""
        model, data = self.config.model, self.config.data
        types = {"dtype": getattr(torch, model.dtype), "vae_dtype": getattr(torch, data.vae_dtype)}
        options: dict[str, Any] = types | hub_options(model)
        pipeline = self.family.load_encoders(self.model_path, text=text, **options)
        settings = self.config.model.prediction_type, self.config.model.shift
        pipeline.scheduler = with_settings(pipeline.scheduler, *settings)  # samples are drawn with it
        if self.config.data.enable_tiling:
            pipeline.vae.enable_tiling()
        return pipeline


class PreparedData(NamedTuple):
    """What :func:`prepare_data` leaves.

    Attributes:
        cache: latents and text embeddings.
        references: the reference's errors, where the configuration asks for them.
        summary: what was done to the cache, if anything.
    """

    cache: Cache
    references: References | None
    summary: CacheSummary | None


def open_run(config: Config, accelerator: Accelerator | None = None) -> RunContext:
    """Checks what a configuration names, and makes toys where it asks for them.

    Raises:
        ConfigError: a family, method or number that does not fit.
        FileNotFoundError, ValueError: a model that is not there or not of its family.
    """
    model, data = config.model, config.data
    try:
        family = get(model.family)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    if data.frames > 1 and not family.video:
        raise ConfigError(f"data.frames={data.frames}: expected 1, {family.name} makes images")
    if accelerator is None:
        accelerator = make_accelerator(config.training)
    types = differing_types(config)
    if types is not None and reference_kind(config) != "adapter_off" and accelerator.is_main_process:
        warnings.warn(types, TrainingWarning, stacklevel=2)
    model_path, data_path = from_main(accelerator, lambda: _places(config, family))
    steps = config.loss.num_inference_steps or DEFAULT_INFERENCE_STEPS
    settings: dict[str, Any] = {"prediction_type": model.prediction_type, "shift": model.shift, **hub_options(model)}
    sampled = bool(config.samples.validation_prompts)

    def load_schedule() -> NoiseSchedule:
        try:
            return family.load_schedule(model_path, steps, sampled=sampled, sizes=data.sizes, **settings)
        except SettingError as error:
            raise ConfigError(f"model.{error}") from error

    schedule = everywhere(accelerator, load_schedule)
    return RunContext(config, family, accelerator, model_path, data_path, schedule)


def _places(config: Config, family: Family) -> tuple[str, str]:
    """Where the model and the pairs are; makes toys where the configuration asks for them."""
    model, data = config.model, config.data
    model_path, data_path = model.pretrained_model_name_or_path, data.dataset_name
    if model.pretrained_model_name_or_path == TOY:
        model_path = str(_made(Path(model_folder(config)), lambda folder: build_toy(model.family, folder)))
    if data.dataset_name == TOY:
        (height, width), folder = data.sizes[0], Path(f"{data.cache}-toy") / "pairs"
        options: dict[str, Any] = {"height": height, "width": width, "frames": data.frames, "seed": data.seed}
        data_path = str(_made(folder, lambda f: make_toy_pairs(f, video=family.video, **options)))
    return model_path, data_path


def model_folder(config: Config) -> str:
    """``config.model.pretrained_model_name_or_path``, or the folder that a toy is built in."""
    return (
        str(Path(f"{config.data.cache}-toy") / "model")
        if config.model.pretrained_model_name_or_path == TOY
        else config.model.pretrained_model_name_or_path
    )


def prepare_data(
    run: RunContext,
    *,
    repair: bool = False,
    verify: bool = False,
    refuse_changes: bool = False,
    progress: bool | None = True,
) -> PreparedData:
    """Computes what the cache lacks, or what no longer agrees with the source: latents, text, reference errors.

    A line says what has changed since, one how many pairs are left out, and one what is used without having been
    compared, as its source is missing.

    Args:
        run: of :func:`open_run`.
        repair: read every shard, also where the cache is finished, and write those anew that are damaged.
        verify: read every file of the source and of the model, also where size, times and inode are as they were.
        refuse_changes: an error at the first change, before anything is encoded anew.
        progress: as in :mod:`sipo.progress`.

    Returns:
        The data, and what was done to it, if it could be compared.

    Raises:
        CacheError: a cache of other settings or weights; a change, where they are refused.
        BadPairError: a pair that cannot be used, without ``data.skip_bad``.
        DataError: no source, and no finished cache of it.
    """
    config, accelerator = run.config, run.accelerator
    on_main(accelerator, lambda: run.cache.mkdir(parents=True, exist_ok=True))
    weights = run.weights(network=False, verify=verify)
    if verify and config.data.reference_errors:
        run.weights(network=True, verify=True)
    marks, summary = fingerprint(config.model, config.data, weights), None
    whole = from_main(accelerator, lambda: pairs_are_whole(run.cache, marks))
    reader, missing = _open_source(run, ask=whole)
    if missing and (verify or not whole):
        raise DataError(missing)
    said = [f"could not be compared with its pairs, the encoded data is used unchanged: {missing}"]
    if reader is not None:
        summary = precompute_pairs(
            reader,
            run.family,
            lambda: run.load_encoders().to(accelerator.device),
            run.cache,
            settings=config.data,
            model=config.model,
            weights=weights,
            check_hashes=repair or not whole,
            verify=verify,
            refuse_changes=refuse_changes,
            accelerator=accelerator,
            on_cost=lambda cost: _say_cost(run, cost),
            progress=progress,
        )
        summary = _of_all(summary, accelerator)
        said = summary.news()
    free_memory()
    cache = everywhere(accelerator, lambda: open_cache(run.cache, marks))
    if cache.path != config.data.dataset_name:
        raise other_path(run.cache, cache.path, config.data.dataset_name, f"which cannot be read ({missing})")
    if cache.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in cache.skipped.items())
        number = sum(cache.skipped.values())
        said.append(f"{number} of {number + len(cache)} pairs cannot be used and are left out: {reasons}")
    if accelerator.is_main_process:
        for line in said:
            say(f"{run.cache}: {line}")
    references = None
    if config.data.reference_errors:
        references = _references(run, cache, repair, refuse_changes, progress)
    return PreparedData(cache, references, summary)


def _say_cost(run: RunContext, cost: Cost) -> None:
    """Says what encoding costs and what of it training will not use; refuses what cannot be trained with or stored."""
    data, training = run.config.data, run.config.training
    free = shutil.disk_usage(run.cache).free
    draws = data.draws if data.reference_errors else 0
    try:
        cost.check(free)
    except ValueError as error:
        raise CacheError(f"{run.cache}: {error}") from error
    pairs = cost.there + (cost.pairs or 0)
    if cost.exact and 0 < pairs <= data.held_out:
        raise ConfigError(f"data.held_out={data.held_out}: expected fewer than the {pairs} pairs there are")
    say(f"{run.cache}: {cost.describe(free, draws)}")
    seen = (
        training.max_train_steps
        * training.train_batch_size
        * training.gradient_accumulation_steps
        * run.accelerator.num_processes
    )
    unused = cost.unused(draws=draws, held_out=data.held_out, seen=seen)
    if unused:
        say(f"{run.cache}: {training.max_train_steps} steps of {seen // training.max_train_steps} pairs: {unused}")


def _open_source(run: RunContext, ask: bool) -> tuple[PairReader | None, str]:
    """The pairs, or why there are none; the same in every process.

    Args:
        run: of :func:`open_run`.
        ask: whether they must be able to say that they have not changed, as a hub that is out of reach is not.
    """
    data = run.config.data

    def look() -> tuple[PairReader | None, str]:
        try:
            reader = open_pairs(run.data_path, data.format, data.dataset_split_name, data.streaming)
            if ask:
                getattr(reader, "state", str)()
        except DataError as error:
            return None, str(error)
        return reader, ""

    reader, missing = everywhere(run.accelerator, look)
    missing = next(filter(None, gathered(run.accelerator, missing)), "")
    return (None, missing) if missing else (reader, "")


def _of_all(summary: CacheSummary, accelerator: Accelerator) -> CacheSummary:
    """What all processes have done to the cache, each with shards of its own."""
    everyone = gathered(accelerator, summary)
    return dataclasses.replace(
        summary,
        written=sum(each.written for each in everyone),
        kept=sum(each.kept for each in everyone),
        texts=sum(each.texts for each in everyone),
        absent=sum(each.absent for each in everyone),
        changes=[change for each in everyone for change in each.changes],
    )


def _references(run: RunContext, cache: Cache, repair: bool, refuse_changes: bool, progress: bool | None) -> References:
    """The reference's errors at every draw, computed where they are not there yet."""
    config, accelerator = run.config, run.accelerator
    which = run.references

    def there() -> References | None:
        try:
            return open_references(cache, run.schedule, **which)
        except OtherSettingsError as error:
            if refuse_changes:  # those of the run are there, and this run's are others
                raise ConfigError(str(error)) from error
        except CacheError:
            pass
        return None

    found = None if repair else everywhere(accelerator, there)
    if all(gathered(accelerator, found is not None)) and found is not None:
        return found
    with locked(run.cache, f"data.cache={str(run.cache)!r}", accelerator=accelerator):
        network = round_whole(frozen_reference(run), accelerator).to(accelerator.device)
        found = precompute_references(
            cache,
            network,
            run.family.predict,
            run.schedule,
            **which,
            batch_size=config.training.train_batch_size,
            accelerator=accelerator,
            num_workers=config.training.dataloader_num_workers,
            progress=progress,
        )
    del network
    free_memory()
    return found


def datasets(run: RunContext, cache: Cache, references: References | None) -> tuple[PairDataset, PairDataset | None]:
    """Pairs to train on and, with ``data.held_out``, to validate on."""
    config = run.config
    try:
        training, held_out = split(CachedPairs(cache), config.data.held_out, config.data.seed)
    except ValueError as error:
        raise ConfigError(f"data.{error}") from error
    if not config.data.draws:
        return training, held_out if len(held_out) else None
    if reference_kind(config) != "errors":  # computed or not, a network is the reference
        references = None
    options: dict[str, Any] = {**run.draws, "references": references}
    drawn = [
        DrawnPairs(pairs, schedule=run.schedule, **options) if len(pairs) else None for pairs in (training, held_out)
    ]
    assert drawn[0] is not None  # split leaves some
    return drawn[0], drawn[1]


def build(run: RunContext) -> tuple[nn.Module, ReferenceModel]:
    """The network with what of it is trained, and the reference."""
    config, family = run.config, run.family
    model, kind = config.model, reference_kind(config)
    lora = model.tuning == "lora"
    torch.manual_seed(config.training.seed)  # LoRA's first factors are drawn
    network = _load_network(run, policy_dtype(config))
    reference = frozen_reference(run, network) if kind == "copy" else None
    checkpointing = model.gradient_checkpointing
    if not lora:
        prepare_full(network, gradient_checkpointing=checkpointing)
        return network, reference
    try:
        prepare_lora(
            network,
            rank=model.lora.rank,
            alpha=model.lora.alpha,
            dropout=model.lora.dropout,
            target_modules=model.lora.target_modules or family.lora_targets,
            gradient_checkpointing=checkpointing,
        )
    except ValueError as error:
        raise ConfigError(f"model.lora.{error}") from error
    return network, AdapterOff(adapter_off) if kind == "adapter_off" else reference


def frozen_reference(run: RunContext, network: nn.Module | None = None) -> nn.Module:
    """A network that predicts what the policy does before training, in ``model.reference_dtype``, on the CPU.

    Args:
        run: of :func:`open_run`.
        network: the policy's, before adapters are put into it; loaded if left out.
    """
    ours, theirs = policy_dtype(run.config), reference_dtype(run.config)
    if differing_types(run.config) is not None:  # it cannot predict the same: at least it is what diffusers makes of it
        return freeze(_load_network(run, theirs))
    if network is None and theirs == ours:
        return freeze(_load_network(run, ours))
    network = _load_network(run, ours) if network is None else network
    return frozen_copy(network, None if theirs == ours else getattr(torch, theirs))


def _load_network(run: RunContext, dtype: str) -> nn.Module:
    return run.family.load_network(run.model_path, dtype=getattr(torch, dtype), **hub_options(run.config.model))


def make_loss(run: RunContext) -> SIPOLoss:
    """Makes the loss of the configuration."""
    return SIPOLoss(run.schedule, backend=run.config.loss.backend, options=run.config.loss)


def loss_beta(run: RunContext, loss_fn: SIPOLoss) -> float:
    """The loss's β: the configured one, or the method's own for the family's images or videos."""
    return loss_fn.options.beta_for(5 if run.family.video else 4)


def hub_options(model: ModelConfig) -> dict[str, str]:
    """Options of every ``from_pretrained``."""
    return {key: value for key in ("revision", "variant") if (value := getattr(model, key)) is not None}


def _made(folder: Path, make: Any) -> Any:
    """What ``make`` makes in a folder, made once: aside, and renamed when it is whole."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        with aside(folder) as place:
            make(place)
    return folder


def free_memory() -> None:
    """Gives back what a network that is no longer needed held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
