"""Builds what a configuration names: family and schedule, data sets, network and reference, loss."""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from sipo.cache.finished import Cache
from sipo.cache.pairs import CachedPairs, DrawnPairs, split_pairs
from sipo.cache.reference_errors import FixedDraws, ReferenceErrors
from sipo.cache.weights import PLACE, weight_hashes
from sipo.data.toy import CONDITION_FOLDER, make_toy_pairs
from sipo.families import Family, get_family
from sipo.families.toy import build_toy
from sipo.families.tuning import adapter_off, freeze, frozen_copy, prepare_full, prepare_lora
from sipo.files import aside, make_folder, remove_leftovers
from sipo.loss import SIPOLoss
from sipo.processes import everywhere, from_main
from sipo.protocols import PairDataset, Predict
from sipo.recipe.config import TOY, Config, ConfigError
from sipo.schedule import DEFAULT_INFERENCE_STEPS, NoiseSchedule
from sipo.schedule.diffusers_schedulers import setting_changes, with_settings
from sipo.schedule.levels import SettingError
from sipo.training import AdapterOff, ReferenceModel, TrainingWarning, make_accelerator
from sipo.training.sharding import whole_dtype


@dataclass(frozen=True)
class RunContext:
    """A configuration, and what follows from it alone: family, paths, schedule.

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
    def predict(self) -> Predict:
        """The family's call of a network, with the guidance that the configuration tells it."""
        return partial(self.family.predict, guidance=self.config.model.guidance_scale)

    @property
    def validation_images(self) -> list[Path]:
        """Paths of ``samples.validation_images``: of the toy pairs' condition images where they say "toy"."""
        images = self.config.samples.validation_images
        if self.config.data.dataset_name != TOY:
            return [Path(image) for image in images]
        toys = sorted((Path(self.data_path) / CONDITION_FOLDER).glob("*.png"))
        # Toy pairs that another family has left in the folder may have no images: then "toy" is a file that is missing.
        named = enumerate(images)
        return [toys[number % len(toys)] if toys and image == TOY else Path(image) for number, image in named]

    @property
    def fixed_draws(self) -> FixedDraws:
        """What decides the fixed draws, where ``data.draws`` asks for some."""
        data, training = self.config.data, self.config.training
        return FixedDraws(data.draws, data.seed, training.timestep_distribution, training.proportion_empty_prompts)

    @property
    def reference_marks(self) -> dict[str, Any]:
        """What says which reference the errors are of, for the functions of ``sipo.cache.reference_errors``."""
        marks = self.config.reference_marks(whole_dtype(self.accelerator))
        return {key: value for key, value in marks.items() if key not in PLACE} | self.weight_hashes(network=True)

    def weight_hashes(self, *, network: bool, verify: bool = False) -> dict[str, str]:
        """Returns hashes of the network's files, or of the encoders' (:func:`sipo.cache.weights.weight_hashes`)."""
        options = {"network": network, "verify": verify}
        return from_main(
            self.accelerator,
            lambda: weight_hashes(self.family, self.model_path, self.config.model, self.cache, **options),
        )

    def scheduler_changes(self) -> dict[str, Any]:
        """Returns the options of the model's scheduler that the configuration overrides."""
        scheduler = self.family.load_scheduler(self.model_path, **self.config.model.hub_options)
        return setting_changes(scheduler, self.config.model.prediction_type, self.config.model.shift)

    def load_encoders(self, *, text: bool = True) -> Any:
        """Loads the pipeline without its network, on the CPU; without ``text``, also without its text encoders."""
        model, data = self.config.model, self.config.data
        types = {"dtype": getattr(torch, model.dtype), "vae_dtype": getattr(torch, data.vae_dtype)}
        options: dict[str, Any] = types | model.hub_options
        pipeline = self.family.load_encoders(self.model_path, text=text, **options)
        settings = self.config.model.prediction_type, self.config.model.shift
        pipeline.scheduler = with_settings(pipeline.scheduler, *settings)  # samples are drawn with it
        if self.config.data.enable_tiling:
            pipeline.vae.enable_tiling()
        return pipeline


def open_run(config: Config, accelerator: Accelerator | None = None) -> RunContext:
    """Checks what a configuration names, and makes toys where it asks for them.

    Raises:
        ConfigError: a family, method or number that does not fit.
        FileNotFoundError, ValueError: a model that does not exist or is not of its family.
    """
    model, data = config.model, config.data
    try:
        family = get_family(model.family)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    if data.frames > 1 and not family.video:
        raise ConfigError(f"data.frames={data.frames}: expected 1, {family.name} makes images")
    if accelerator is None:
        accelerator = make_accelerator(config.training)
    if config.differing_start is not None and accelerator.is_main_process:
        warnings.warn(config.differing_start, TrainingWarning, stacklevel=2)
    model_path, data_path = from_main(accelerator, lambda: _places(config, family))
    steps = config.loss.num_inference_steps or DEFAULT_INFERENCE_STEPS
    settings: dict[str, Any] = {"prediction_type": model.prediction_type, "shift": model.shift, **model.hub_options}
    sampled = bool(config.samples.validation_prompts)

    def load_schedule() -> NoiseSchedule:
        try:
            return family.load_schedule(model_path, steps, sampled=sampled, sizes=data.sizes, **settings)
        except SettingError as error:
            section = "loss" if error.name == "num_inference_steps" else "model"
            raise ConfigError(f"{section}.{error}") from error

    schedule = everywhere(accelerator, load_schedule)
    return RunContext(config, family, accelerator, model_path, data_path, schedule)


def _places(config: Config, family: Family) -> tuple[str, str]:
    """Returns where the model and the pairs are; makes toys if the configuration asks for them."""
    model, data = config.model, config.data
    model_path, data_path = model.pretrained_model_name_or_path, data.dataset_name
    if model.pretrained_model_name_or_path == TOY:
        model_path = str(_made(Path(model_folder(config)), lambda folder: build_toy(model.family, folder)))
    if data.dataset_name == TOY:
        (height, width), folder = data.sizes[0], Path(f"{data.cache}-toy") / "pairs"
        options: dict[str, Any] = {"height": height, "width": width, "frames": data.frames, "seed": data.seed}
        need = family.condition_image
        data_path = str(_made(folder, lambda f: make_toy_pairs(f, video=family.video, condition_image=need, **options)))
    return model_path, data_path


def model_folder(config: Config) -> str:
    """Returns ``config.model.pretrained_model_name_or_path``, or the folder that a toy is built in."""
    return (
        str(Path(f"{config.data.cache}-toy") / "model")
        if config.model.pretrained_model_name_or_path == TOY
        else config.model.pretrained_model_name_or_path
    )


def datasets(
    run: RunContext, cache: Cache, references: ReferenceErrors | None
) -> tuple[PairDataset, PairDataset | None]:
    """Returns the pairs to train on and, with ``data.held_out``, those to validate on."""
    config = run.config
    try:
        training, held_out = split_pairs(CachedPairs(cache), config.data.held_out, config.data.seed)
    except ValueError as error:
        raise ConfigError(f"data.{error}") from error
    if not config.data.draws:
        return training, held_out if len(held_out) else None
    if config.reference_kind != "errors":  # computed or not, a network is the reference
        references = None
    drawn = [
        DrawnPairs(pairs, run.schedule, run.fixed_draws, references) if len(pairs) else None
        for pairs in (training, held_out)
    ]
    assert drawn[0] is not None  # split_pairs leaves some
    return drawn[0], drawn[1]


def build(run: RunContext) -> tuple[nn.Module, ReferenceModel]:
    """Builds the network, with the part that is trained, and the reference."""
    config, family = run.config, run.family
    model, kind = config.model, config.reference_kind
    lora = model.tuning == "lora"
    torch.manual_seed(config.training.seed)  # LoRA's first factors are drawn
    network = _load_network(run, config.policy_dtype)
    reference = frozen_reference(run, network) if kind == "copy" else None
    checkpointing = model.gradient_checkpointing
    if not lora:
        prepare_full(network, gradient_checkpointing=checkpointing)
        family.keep_unread_from_ddp(network)
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
    family.keep_unread_from_ddp(network)
    return network, AdapterOff(adapter_off) if kind == "adapter_off" else reference


def frozen_reference(run: RunContext, network: nn.Module | None = None) -> nn.Module:
    """Builds a network that predicts what the policy does before training, in ``model.reference_dtype``, on the CPU.

    Args:
        run: of :func:`open_run`.
        network: the policy's, before adapters are put into it; loaded if left out.
    """
    ours, theirs = run.config.policy_dtype, run.config.reference_dtype
    if run.config.differing_types is not None:  # it cannot predict the same: at least it is what diffusers makes of it
        return freeze(_load_network(run, theirs))
    if network is None and theirs == ours:
        return freeze(_load_network(run, ours))
    network = _load_network(run, ours) if network is None else network
    return frozen_copy(network, None if theirs == ours else getattr(torch, theirs))


def _load_network(run: RunContext, dtype: str) -> nn.Module:
    return run.family.load_network(run.model_path, dtype=getattr(torch, dtype), **run.config.model.hub_options)


def make_loss(run: RunContext) -> SIPOLoss:
    """Makes the loss of the configuration."""
    return SIPOLoss(run.schedule, backend=run.config.loss.backend, options=run.config.loss)


def loss_beta(run: RunContext, loss_fn: SIPOLoss) -> float:
    """Returns the loss's β: the configured one, or the method's default for the family's images or videos."""
    return loss_fn.options.beta_for(5 if run.family.video else 4)


def _made(folder: Path, make: Any) -> Any:
    """Has ``make`` fill a folder unless it exists; the folder appears only when it is complete."""
    if not folder.exists():
        make_folder(folder.parent, str(folder.parent))
        remove_leftovers(folder.parent)
        with aside(folder) as place:
            make(place)
    return folder


def free_memory() -> None:
    """Frees the memory of a network that is no longer needed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
