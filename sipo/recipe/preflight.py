"""Checks of a configuration that need no data.

Encoding may take days. Whatever the loop, the loss or a library would refuse afterwards is refused before it, in one
line that names the key.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from sipo.data.media import MediaError, read_media
from sipo.families.tuning import check_targets
from sipo.files import short
from sipo.processes import everywhere
from sipo.recipe.build import RunContext, make_loss
from sipo.recipe.config import TOY, ConfigError
from sipo.schedule.diffusers_schedulers import with_settings
from sipo.training import TrainingConfig, TrainingWarning
from sipo.training.optimization import check_optimizer
from sipo.training.preparation import check_config
from sipo.training.trackers import check_trackers
from sipo_kernels import backends

Work = Literal["train", "precompute", "analyze"]


def check_run(run: RunContext, work: Work, *, resume: bool = False) -> None:
    """Checks everything about a configuration that needs no data.

    Args:
        run: of :func:`sipo.recipe.build.open_run`, which has checked the schedule. Every process calls this.
        work: what it is opened for. What other work on this machine needs and lacks, as packages and the loss's backend
            in "precompute", is a warning.
        resume: whether the run continues from a checkpoint.

    Raises:
        ConfigError: names the key, its value, and what was expected.
        FileNotFoundError, ValueError: weights that do not exist, or that are not read here (``model_files.py``).
    """
    everywhere(run.accelerator, lambda: _check_all(run, work, resume))


def _check_all(run: RunContext, work: Work, resume: bool) -> None:
    _check_training(run, resume)
    for check, needed in _CHECKS:
        try:
            check(run)
        except ConfigError as error:
            if work in needed:
                raise
            if run.accelerator.is_main_process:
                warnings.warn(f"{error}; `sipo train` would stop here", TrainingWarning, stacklevel=2)
    _check_files(run, work)


def _check_training(run: RunContext, resume: bool) -> None:
    """Checks the loop's settings against each other and against how its processes communicate."""
    training, data, samples = run.config.training, run.config.data, run.config.samples
    _named(lambda: check_config(training, run.accelerator))
    if training.validation_steps and not data.held_out and not samples.validation_prompts:
        raise ConfigError(
            f"training.validation_steps={training.validation_steps}: expected data.held_out > 0, or "
            "samples.validation_prompts"
        )
    if data.max_pairs is not None and data.held_out >= data.max_pairs:
        raise ConfigError(f"data.held_out={data.held_out}: expected fewer than data.max_pairs={data.max_pairs}")
    if training.timestep_sampling == "informative" and data.draws:
        raise ConfigError("training.timestep_sampling='informative': expected data.draws=0, fixed draws have theirs")
    share = training.proportion_empty_prompts
    if share and run.family.text_sees_image:
        why = f"text embeddings of family {run.family.name!r} depend on the condition image"
        raise ConfigError(f"training.proportion_empty_prompts={share}: expected 0, {why}")


def _check_condition_images(run: RunContext) -> None:
    """Checks the images that validation's samples are edits of."""
    family, samples = run.family, run.config.samples
    images, prompts = samples.validation_images, len(samples.validation_prompts)
    numbers, expected = {
        "none": ([0], f"none, family {family.name!r} takes no condition images"),
        "optional": ([0, prompts], f"none, or one for each of {prompts} samples.validation_prompts"),
        "required": ([prompts], f"one for each of {prompts} samples.validation_prompts"),
    }[family.condition_image]
    if len(images) not in numbers:
        raise ConfigError(f"samples.validation_images={short(images)}: expected {expected}")
    if images and min(run.config.data.sizes[0]) < family.least_image_side:  # they are scaled to it
        expected = f"at least {family.least_image_side} pixels a side, to sample with samples.validation_images"
        raise ConfigError(f"data.sizes={[list(size) for size in run.config.data.sizes]}: expected {expected}")
    try:
        for path in run.validation_images:
            read_media(path, max_pixels=run.config.data.max_pixels)
    except MediaError as error:
        alone = path == Path(TOY) and run.config.data.dataset_name != TOY
        hint = "; 'toy' goes with data.dataset_name: toy" if alone else ""
        raise ConfigError(f"samples.validation_images: {error}{hint}") from error


def _check_processes(run: RunContext) -> None:
    if run.family.experts and run.accelerator.num_processes > 1:
        # A step that draws one network's levels alone leaves the other without gradients, for which DDP would wait.
        raise ConfigError(f"model.family={run.family.name!r}: expected one process, it trains several networks")


def _check_optimizer(run: RunContext) -> None:
    _named(lambda: check_optimizer(run.config.training))


def _check_trackers(run: RunContext) -> None:
    _named(lambda: check_trackers(run.config.training))


def _check_loss(run: RunContext) -> None:
    make_loss(run)


def _check_backend(run: RunContext) -> None:
    backend = run.config.loss.backend
    try:
        backends.choose(backend, run.accelerator.device)
    except (ValueError, RuntimeError) as error:  # SIPO_BACKEND's name is in the message
        raise ConfigError(f"loss.{error}" if str(error).startswith("backend=") else str(error)) from error


def _check_distribution(run: RunContext) -> None:
    try:
        run.schedule.sample_levels(1, distribution=run.config.training.timestep_distribution)
    except ValueError as error:
        raise ConfigError(f"training.timestep_{error}") from error


def _check_sampler(run: RunContext) -> None:
    """Checks the sampler's steps: schedulers raise an error for what they cannot do when the steps are set."""
    samples, model = run.config.samples, run.config.model
    if not samples.validation_prompts:
        return
    own = run.family.load_scheduler(run.model_path, **model.hub_options)
    scheduler = with_settings(own, model.prediction_type, model.shift)
    most = getattr(scheduler.config, "num_train_timesteps", None)
    if run.schedule.kind == "discrete" and most is not None and samples.num_inference_steps > most:
        raise ConfigError(
            f"samples.num_inference_steps={samples.num_inference_steps}: expected at most {most}, as the model has "
            "timesteps"
        )
    terminal = getattr(scheduler.config, "shift_terminal", None)
    if terminal and samples.num_inference_steps < 2:  # diffusers divides 0 by 0 there, without an error
        raise ConfigError(
            f"samples.num_inference_steps={samples.num_inference_steps}: expected at least 2, with the scheduler's "
            f"shift_terminal={terminal}"
        )
    shifted = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
    try:
        type(scheduler).from_config(scheduler.config).set_timesteps(samples.num_inference_steps, **shifted)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ConfigError(
            f"samples.num_inference_steps={samples.num_inference_steps}: expected another number, "
            f"{type(scheduler).__name__} says: {error}"
        ) from error


def _check_network(run: RunContext) -> None:
    """Checks sizes, LoRA's targets and checkpointing against the network's configuration; reads no weights."""
    config, family = run.config, run.family
    model, data = config.model, config.data
    network: Any = family.empty_network(run.model_path, **model.hub_options)
    for height, width in data.sizes:
        try:
            family.check_size(height, width, data.frames)
            family.check_network_size(network.config, height, width, data.frames)
        except ValueError as error:
            sizes = [list(size) for size in data.sizes]
            raise ConfigError(f"data.sizes={sizes}: {error}") from error
    if model.tuning == "lora":
        try:
            targets = model.lora.target_modules
            check_targets(network, family.lora_targets if targets is None else targets)
        except ValueError as error:
            raise ConfigError(f"model.lora.{error}") from error
    if model.guidance_scale is not None and not getattr(network.config, "guidance_embeds", False):
        raise ConfigError(
            f"model.guidance_scale={model.guidance_scale}: leave it out, the network has no guidance embedding"
        )
    if model.gradient_checkpointing and not getattr(network, "_supports_gradient_checkpointing", False):
        raise ConfigError(f"model.gradient_checkpointing=True: expected False, {family.network_class} has none")


def _check_files(run: RunContext, work: Work) -> None:
    """Checks that weights exist, in safetensors; downloads a hub's, and the network's only if it is needed."""
    options = run.config.model.hub_options
    run.family.fetch(run.model_path, network=False, **options)
    if work != "precompute" or run.config.data.reference_errors or Path(run.model_path).is_dir():
        run.family.fetch(run.model_path, network=True, **options)


_ALL: tuple[Work, ...] = ("train", "precompute", "analyze")

# Each check, and the work that cannot be done where it fails.
_CHECKS: tuple[tuple[Callable[[RunContext], None], tuple[Work, ...]], ...] = (
    (_check_condition_images, ("train",)),
    (_check_processes, ("train",)),
    (_check_optimizer, ("train",)),
    (_check_trackers, ("train",)),
    (_check_loss, _ALL),
    (_check_backend, ("train", "analyze")),
    (_check_distribution, _ALL),
    (_check_sampler, _ALL),
    (_check_network, _ALL),
)


def _named(check: Callable[[], Any]) -> None:
    """Puts the section before the name of a setting with which the loop's own messages begin."""
    try:
        check()
    except (ValueError, ImportError) as error:
        (name, _, _), text = str(error).partition("="), str(error)
        if name == "resume_from":
            text = f"--resume: {text.partition(': ')[2]}"
        known = {field.name for field in dataclasses.fields(TrainingConfig)}
        raise ConfigError(f"training.{text}" if name in known else text) from error
