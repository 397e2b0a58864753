"""``sipo train`` and ``sipo precompute``: from a configuration to weights that diffusers loads.

Downhill: :func:`prepare_data` (pixels and prompts to a cache, the reference's errors beside it), :func:`build` (the
network, what of it is trained, what it is compared with), :func:`sipo.training.train`, :func:`save`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sipo.config import TOY, Config, ConfigError, reference_kind
from sipo.data.cache import INDEX, Cache, CacheError, file_hash, open_cache
from sipo.data.media import write_image_grid, write_video
from sipo.data.pairs import CachedPairs, DrawnPairs, split
from sipo.data.precompute import CacheSummary, fingerprint, precompute_pairs
from sipo.data.readers import open_pairs
from sipo.data.references import References, open_references, precompute_references, reference_marks
from sipo.data.toy import make_toy_pairs
from sipo.families import Family, get
from sipo.families.card import model_card
from sipo.families.toy import build_toy
from sipo.families.tuning import adapter_off, prepare_full, prepare_lora, save_full, save_lora
from sipo.loss import SIPOLoss
from sipo.schedule import DEFAULT_INFERENCE_STEPS, NoiseSchedule
from sipo.training import AdapterOff, Reference, TrainingResult, gather_weights, train
from sipo.training import storage as checkpoints
from sipo.training.logs import write_aside
from sipo.training.protocols import PairDataset

SAMPLE_FPS = 8.0
"""Frames per second of the clips that validation writes where ``data.fps`` does not say."""


@dataclass(frozen=True)
class Run:
    """A configuration, and what follows from it alone.

    Attributes:
        config: as given.
        family: the model's.
        accelerator: device, processes, precision.
        model_path: ``config.model.path``, or the folder that a toy was built in.
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
    def hub(self) -> dict[str, str]:
        """Options of every ``from_pretrained``."""
        model = self.config.model
        return {key: value for key in ("revision", "variant") if (value := getattr(model, key)) is not None}

    @property
    def draws(self) -> dict[str, Any]:
        """What fixed draws, and the reference's errors at them, hang on."""
        data, training = self.config.data, self.config.training
        return {
            "draws": data.draws,
            "seed": data.seed,
            "distribution": training.timestep_distribution,
            "caption_dropout": training.caption_dropout,
        }


@dataclass(frozen=True)
class Trained:
    """How a run ended.

    Attributes:
        result: the loop's.
        weights: folder with the trained weights, their card, and how to load them.
    """

    result: TrainingResult
    weights: Path


def open_run(config: Config, accelerator: Accelerator | None = None) -> Run:
    """Checks what a configuration names, and makes toys where it asks for them.

    Raises:
        ConfigError: a family, method or number that does not fit.
        FileNotFoundError, ValueError: a model that is not there or not of its family.
    """
    training, model, data = config.training, config.model, config.data
    try:
        family = get(model.family)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    if data.frames > 1 and not family.video:
        raise ConfigError(f"data.frames={data.frames}: expected 1, {family.name} makes images")
    if accelerator is None:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision, gradient_accumulation_steps=training.accumulation
        )
    model_path, data_path = model.path, data.path
    toys = Path(f"{data.cache}-toy")
    with accelerator.main_process_first():
        if model.path == TOY:
            model_path = str(_made(toys / "model", lambda folder: build_toy(model.family, folder)))
        if data.path == TOY:
            height, width = data.sizes[0]
            size = {"height": height, "width": width, "frames": data.frames}
            data_path = str(
                _made(toys / "pairs", lambda f: make_toy_pairs(f, video=family.video, seed=data.seed, **size))
            )
    run = Run(config, family, accelerator, model_path, data_path, schedule=None)  # type: ignore[arg-type]
    steps = config.loss.num_inference_steps or DEFAULT_INFERENCE_STEPS
    return dataclasses.replace(run, schedule=family.load_schedule(model_path, steps, **run.hub))


def prepare_data(run: Run, *, verify: bool = False, progress: bool = True) -> tuple[Cache, CacheSummary | None]:
    """Opens the cache, and computes beforehand what it lacks: latents, text embeddings, the reference's errors.

    Args:
        run: of :func:`open_run`.
        verify: look at every shard and every row again, also where the cache is finished.
        progress: whether to draw progress bars.

    Returns:
        The cache, and what was done to it, if anything.

    Raises:
        CacheError: a cache of other settings.
        BadPair: a pair that cannot be used, without ``data.skip_bad``.
    """
    config, accelerator = run.config, run.accelerator
    marks, cache, summary = fingerprint(config.model, config.data), None, None
    if not verify:
        try:
            cache = open_cache(run.cache, marks)
        except CacheError:  # unfinished or damaged is mended below, and one of other settings is refused there
            cache = None
        accelerator.wait_for_everyone()  # or one process would mend what another has yet to look at
    if cache is None:
        reader = open_pairs(run.data_path, config.data.format, config.data.split, config.data.streaming)
        pipeline = run.family.load_encoders(run.model_path, dtype=getattr(torch, config.model.dtype), **run.hub)
        pipeline.to(accelerator.device)
        arguments: dict[str, Any] = {"settings": config.data, "model": config.model, "accelerator": accelerator}
        summary = precompute_pairs(reader, run.family, pipeline, run.cache, progress=progress, **arguments)
        del pipeline
        _free()
        cache = open_cache(run.cache, marks)
    if config.data.reference_errors:
        _references(run, cache, verify, progress)
    return cache, summary


def _references(run: Run, cache: Cache, verify: bool, progress: bool) -> References:
    """The reference's errors at every draw, computed where they are not there yet."""
    config, accelerator = run.config, run.accelerator
    marks = reference_marks(config.model, config.training.mixed_precision)
    arguments: dict[str, Any] = {"reference": marks, **run.draws, "dtype": torch.float32}
    if not verify:
        with contextlib.suppress(CacheError):
            found = open_references(cache, run.schedule, **arguments)
            accelerator.wait_for_everyone()
            return found
        accelerator.wait_for_everyone()
    dtype = getattr(torch, config.model.reference_dtype or config.model.dtype)
    network = run.family.load_network(run.model_path, dtype=dtype, **run.hub).to(accelerator.device)
    found = precompute_references(
        cache,
        network.requires_grad_(False),
        run.family.predict,
        run.schedule,
        **arguments,
        batch_size=config.training.batch_size,
        accelerator=accelerator,
        num_workers=config.training.num_workers,
        progress=progress,
    )
    del network
    _free()
    return found


def datasets(run: Run, cache: Cache) -> tuple[PairDataset, PairDataset | None]:
    """Pairs to train on and, with ``data.held_out``, to validate on.

    Items are float32: noisy latents and targets keep what half precision would round away, and the network takes them
    in its own type.
    """
    config = run.config
    try:
        training, held_out = split(CachedPairs(cache, dtype=torch.float32), config.data.held_out, config.data.seed)
    except ValueError as error:
        raise ConfigError(f"data.{error}") from error
    if not config.data.draws:
        return training, held_out if len(held_out) else None
    references = None
    if reference_kind(config) == "errors":
        marks = reference_marks(config.model, config.training.mixed_precision)
        references = open_references(cache, run.schedule, reference=marks, **run.draws, dtype=torch.float32)
    options: dict[str, Any] = {**run.draws, "references": references}
    drawn = [
        DrawnPairs(pairs, schedule=run.schedule, **options) if len(pairs) else None for pairs in (training, held_out)
    ]
    assert drawn[0] is not None  # split leaves some
    return drawn[0], drawn[1]


def build(run: Run) -> tuple[nn.Module, Reference]:
    """The network with what of it is trained, and the reference."""
    config, family = run.config, run.family
    model, kind = config.model, reference_kind(config)
    lora = model.tuning == "lora"
    torch.manual_seed(config.training.seed)  # LoRA's first factors are drawn
    dtype = getattr(torch, model.dtype) if lora else torch.float32
    network = family.load_network(run.model_path, dtype=dtype, **run.hub)
    reference: Reference = None
    if kind == "copy":
        reference = copy.deepcopy(network).to(getattr(torch, model.reference_dtype or model.dtype))
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


def make_loss(run: Run) -> SIPOLoss:
    """The configured loss.

    Raises:
        ConfigError: a setting outside its range.
    """
    options = dataclasses.asdict(run.config.loss)
    del options["num_inference_steps"]  # in the schedule already
    try:
        return SIPOLoss(run.schedule, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss.{error}") from error


def run_training(config: Config, *, resume: bool = False, accelerator: Accelerator | None = None) -> Trained:
    """A whole run of ``sipo train``.

    Args:
        config: the run.
        resume: go on from the newest sound checkpoint in ``training.output_dir``, or start where there is none.
        accelerator: made from the configuration if left out.

    Returns:
        Where the weights are.

    Raises:
        ConfigError: what does not fit; a folder that holds another run.
        CacheError, BadPair, DataError: of the data.
        CheckpointError, TrainingDiverged, TrainingInterrupted, TrainingOutOfMemory: of the loop.
    """
    training = config.training
    there = bool(checkpoints.found(training.checkpoints))
    if there and not resume:
        raise ConfigError(
            f"training.output_dir={str(training.output_dir)!r} holds a run already: --resume goes on with it, "
            "another folder starts anew"
        )
    run = open_run(config, accelerator)
    loss_fn = make_loss(run)
    _check_before_data(run)
    if not there:
        _write_config(run)
    cache, _ = prepare_data(run, progress=training.progress)
    pairs, held_out = datasets(run, cache)
    network, reference = build(run)
    look = Look(run) if config.samples.prompts else None
    if look is not None and not there:
        look(0, network.to(run.accelerator.device))
    validate = held_out if training.validate_every else None
    result = train(
        network,
        reference,
        loss_fn,
        pairs,
        run.family.predict,
        training,
        accelerator=run.accelerator,
        resume_from=checkpoints.LATEST if there else None,
        validation=validate,
        on_validation=look if training.validate_every else None,
        offload_reference=config.model.reference_offload,
        identity=_identity(config, cache),
    )
    if there:
        _write_config(run)  # only now is it known to belong to the run that was there
    return Trained(result, save(run, network, result, cache, loss_fn, len(pairs) // max(1, config.data.draws)))


def _identity(config: Config, cache: Cache) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from, beside the loop's own settings."""
    free = ("gradient_checkpointing", "reference_offload")
    model = {f"model.{name}": value for name, value in config.as_dict()["model"].items() if name not in free}
    draws = {f"data.{name}": getattr(config.data, name) for name in ("draws", "held_out", "seed")}
    return {**model, **draws, "model.reference": reference_kind(config), "data": file_hash(cache.folder / INDEX)}


def _write_config(run: Run) -> None:
    """Keeps the configuration beside what came of it."""
    import yaml

    if run.accelerator.is_main_process:
        folder = run.config.training.folder
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / "config.yaml", yaml.safe_dump(run.config.as_dict(), sort_keys=False))


def _check_before_data(run: Run) -> None:
    """What :func:`sipo.training.train` would refuse after the data has been computed, refused before."""
    config = run.config
    if config.training.validate_every and not config.data.held_out and not config.samples.prompts:
        every = config.training.validate_every
        raise ConfigError(f"training.validate_every={every}: expected data.held_out > 0, or samples.prompts")
    if config.training.timestep_sampling == "informative" and config.data.draws:
        raise ConfigError("training.timestep_sampling='informative': expected data.draws=0, fixed draws have theirs")
    try:
        run.schedule.sample_timesteps(1, distribution=config.training.timestep_distribution)
    except ValueError as error:
        raise ConfigError(f"training.timestep_{error}") from error


class Look:
    """Draws samples from fixed prompts and seeds: ``samples/step-00000100.png``, or an mp4 for each prompt.

    The encoders wait in host memory between looks.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder = run.config.training.folder / "samples"
        self.drawn = not run.accelerator.is_fsdp2 and run.accelerator.distributed_type.value != "DEEPSPEED"
        self.pipeline: Any = None
        if run.accelerator.is_main_process and self.drawn:
            dtype = getattr(torch, run.config.model.dtype)
            self.pipeline = run.family.load_encoders(run.model_path, dtype=dtype, **run.hub)

    def __call__(self, step: int, policy: nn.Module) -> None:
        """Samples on the main process; a sharded network cannot be sampled by one process alone, and is not."""
        if self.pipeline is None:
            return
        data, samples = self.run.config.data, self.run.config.samples
        height, width = data.sizes[0]
        self.pipeline.to(self.run.accelerator.device)
        drawn = self.run.family.sample(
            self.pipeline,
            policy,
            samples.prompts,
            seed=samples.seed,
            height=height,
            width=width,
            frames=data.frames,
            steps=samples.steps,
            guidance=samples.guidance,
        )
        self.pipeline.to("cpu")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.run.family.video:
            write_image_grid(self.folder / f"step-{step:08d}.png", drawn)
            return
        for number, clip in enumerate(drawn):
            write_video(self.folder / f"step-{step:08d}-{number}.mp4", clip, data.fps or SAMPLE_FPS)


def save(run: Run, network: nn.Module, result: TrainingResult, cache: Cache, loss_fn: SIPOLoss, pairs: int) -> Path:
    """Writes the trained weights (their moving average, where one was kept) and their card; every process calls it.

    Returns:
        ``<output_dir>/weights``: for LoRA what ``pipeline.load_lora_weights`` takes, else the network's folder.
    """
    config, family, accelerator = run.config, run.family, run.accelerator
    folder = config.training.folder / "weights"
    main = accelerator.is_main_process
    state: dict[str, Tensor] | None = result.ema
    sharded = accelerator.is_fsdp2 or accelerator.distributed_type.value == "DEEPSPEED"
    if state is None and sharded:
        state = gather_weights(network, keep=main)
    if main:
        writer = save_lora if config.model.tuning == "lora" else save_full
        if state is not None and writer is save_full:
            state = {**network.state_dict(), **state}
        writer(family, network, folder, state=state)
        beta = loss_fn.default_beta(5 if family.video else 4) if loss_fn.beta is None else loss_fn.beta
        data_hash = file_hash(cache.folder / INDEX)
        card = model_card(family, config, beta=beta, pairs=pairs, data_hash=data_hash, steps=result.steps)
        write_aside(folder / "README.md", card)
    accelerator.wait_for_everyone()
    return folder


def _made(folder: Path, make: Any) -> Any:
    """What ``make`` makes in a folder, made once: aside, and renamed when it is whole."""
    if not folder.exists():
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        make(aside)
        os.replace(aside, folder)
    return folder


def _free() -> None:
    """Gives back what a network that is no longer needed held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
