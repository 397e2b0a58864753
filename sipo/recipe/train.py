"""``sipo train``: from a configuration to saved weights and their card."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from sipo.cache.finished import Cache
from sipo.cache.weights import PLACE
from sipo.families.tuning import save_full, save_lora
from sipo.files import write_aside
from sipo.locks import locked
from sipo.loss import SIPOLoss
from sipo.processes import from_main, on_main
from sipo.progress import say
from sipo.recipe.build import RunContext, build, datasets, make_loss, open_run
from sipo.recipe.card import model_card
from sipo.recipe.config import Config, ConfigError
from sipo.recipe.preflight import check_run
from sipo.recipe.prepare_data import prepare_data
from sipo.recipe.sampling import ValidationSamples
from sipo.training import TrainingConfig, TrainingResult, gather_weights, is_sharded, make_accelerator, storage, train
from sipo.training.config import CheckpointError
from sipo.training.first_step import Mismatch
from sipo.training.log import check_logs, set_aside_logs
from sipo.training.run_folder import WEIGHTS, earlier_run, remove_run
from sipo.training.sums import SUMS, remove_run_sums, write_run_sums, write_sums
from sipo.training.trackers import running_trackers

TRAINED_ON = "trained_on.json"
"""File beside the trained weights: hashes of the data and of the network trained from, and what pairs were held out."""


@dataclass(frozen=True)
class TrainedRun:
    """The result of :func:`run_training`.

    Attributes:
        result: the loop's.
        weights: folder with the trained weights, their card, and how to load them.
    """

    result: TrainingResult
    weights: Path


def run_training(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accelerator: Accelerator | None = None,
    on_start: Callable[[], None] | None = None,
) -> TrainedRun:
    """Runs ``sipo train``: prepares the data, trains, and saves the weights with their card.

    Args:
        config: the run.
        resume: continue from the newest sound checkpoint in ``training.output_dir``, or start where there is none yet.
        overwrite: remove the run that ``training.output_dir`` holds, once everything is ready to train.
        accelerator: made from the configuration if left out.
        on_start: called on every process once the folder and the settings have been accepted.

    Returns:
        What the loop returned, and where the weights are.

    Raises:
        LockedError: another process is training into ``training.output_dir``.
        ValueError: both ``resume`` and ``overwrite``.
        ConfigError: settings that do not fit; a folder that holds another run.
        CacheError, BadPairError, DataError: from the data.
        CheckpointError, TrainingAlarmError, TrainingDivergedError, TrainingInterruptedError, TrainingMismatchError,
            TrainingOutOfMemoryError: from the loop.
    """
    if resume and overwrite:
        raise ValueError("resume=True, overwrite=True: expected one of them at most")
    training = config.training
    if accelerator is None:
        accelerator = make_accelerator(training)
    with locked(training.folder, f"training.output_dir={str(training.output_dir)!r}", accelerator=accelerator):
        # Whatever can be refused is refused first: encoding the data may take days.
        resuming = from_main(accelerator, lambda: _check_folder(training, resume, overwrite))
        run = open_run(config, accelerator)
        check_run(run, "train", resume=resuming)
        if on_start is not None:
            on_start()
        loss_fn = make_loss(run)

        cache, references, _ = prepare_data(run, refuse_changes=resuming, progress=training.progress)
        pairs, held_out = datasets(run, cache, references)

        sampled = config.samples.validation_prompts and (training.validation_steps or not resuming)
        # Before the networks are loaded, as its text encoders are freed again.
        draw_samples = ValidationSamples(run) if sampled else None
        network, reference = build(run)

        with contextlib.ExitStack() as stack:
            if not resuming:
                on_main(accelerator, lambda: _clear_folder(training, overwrite))
                _write_config(run)
                if draw_samples is not None:
                    # Started here, so that they have the samples from before training too.
                    stack.enter_context(running_trackers(accelerator, training))
                    draw_samples(0, network.to(accelerator.device))
            with _naming_sections():
                result = train(
                    network,
                    reference,
                    loss_fn,
                    pairs,
                    run.predict,
                    training,
                    accelerator=accelerator,
                    resume_from=storage.LATEST if resuming else None,
                    validation=held_out if training.validation_steps else None,
                    on_validation=draw_samples if training.validation_steps else None,
                    offload_reference=config.model.reference_offload,
                    identity=_identity(run, f"{len(cache)} pairs, {cache.content_hash()}"),
                    mismatch=_mismatch(config, network),
                )
        if resuming:
            _write_config(run)  # only now is it known to belong to the run in the folder

        number = len(pairs) // max(1, config.data.draws)
        weights = save_weights(run, network, result, loss_fn, pairs=number, origin=trained_on(run, cache))
        on_main(accelerator, lambda: write_run_sums(training.folder))
        return TrainedRun(result, weights)


def trained_on(run: RunContext, cache: Cache) -> dict[str, Any]:
    """Returns JSON values that are equal for two runs if they hold out the same pairs and train the same network."""
    data = run.config.data
    split = {"data.held_out": data.held_out, "data.seed": data.seed}
    return {"data": cache.content_hash(), **split, "network": run.weight_hashes(network=True)}


def _check_folder(training: TrainingConfig, resume: bool, overwrite: bool = False) -> bool:
    """Returns whether the folder has checkpoints to continue from.

    Raises:
        ConfigError: it holds a run, which is neither to be resumed nor to be overwritten; or weights alone that no run
            has written, and that are to be overwritten.
    """
    found = earlier_run(training)
    if overwrite and found.weights and not (found.checkpoints or found.log or (found.weights / SUMS).exists()):
        raise ConfigError(
            f"training.output_dir={str(training.output_dir)!r}: {found.weights} has no {SUMS}, so no run has written "
            "it, and --overwrite does not remove it; expected another training.output_dir"
        )
    if overwrite or not found:
        return False
    if resume and found.checkpoints:
        return True
    held = f"training.output_dir={str(training.output_dir)!r} holds a run already ({found}): "
    others = "--overwrite replaces it, another training.output_dir keeps it"
    if found.checkpoints:
        raise ConfigError(f"{held}--resume continues it, {others}")
    if found.weights:
        raise ConfigError(f"{held}it has no checkpoint to continue from; {others}")
    if not resume:
        raise ConfigError(f"{held}it has no checkpoint yet; --resume starts it over and keeps its log, {others}")
    return False


def _clear_folder(training: TrainingConfig, overwrite: bool) -> None:
    """Prepares the folder for a run that starts: removes an earlier run if asked to, else renames its log."""
    if not overwrite:
        set_aside_logs(check_logs(training))
    elif removed := remove_run(training):
        say(f"{training.folder}: --overwrite removed the run that was here ({', '.join(removed)})")


@contextlib.contextmanager
def _naming_sections() -> Iterator[None]:
    """Adds the section to the names of settings in the loop's errors, as in the configuration."""
    try:
        yield
    except ValueError as error:
        if type(error) not in (CheckpointError, ValueError):
            raise
        names = "|".join(field.name for field in dataclasses.fields(TrainingConfig))
        raise type(error)(re.sub(rf"(^|: made with )(?=({names})[=[])", r"\1training.", str(error), count=1)) from error


def _mismatch(config: Config, network: nn.Module) -> Mismatch:
    """Returns what to do if policy and reference differ at the start: an error, unless types or dropout explain it."""
    # An adapter's own dropout changes nothing at first, as its second factor is 0.
    dropout = any(isinstance(m, nn.Dropout) and m.p > 0 and "lora_" not in n for n, m in network.named_modules())
    return "warn" if config.differing_start or dropout else "raise"


def _identity(run: RunContext, data: str) -> dict[str, Any]:
    """Returns what a resumed run must share with the one it continues, beside the loop's own settings."""
    config = run.config
    free = ("gradient_checkpointing", "reference_offload", *PLACE)
    model = {f"model.{name}": value for name, value in config.as_dict()["model"].items() if name not in free}
    # In which type the reference is held makes no other run of one that predicts as the policy does.
    model["model.reference_dtype"] = config.model.reference_dtype if config.differing_start else "as the policy's"
    weights = {f"model.{name}": value for name, value in run.weight_hashes(network=True).items()}
    draws = {f"data.{name}": getattr(config.data, name) for name in ("draws", "held_out", "seed")}
    return {**model, **weights, **draws, "model.reference": config.reference_kind, "data": data}


def _write_config(run: RunContext) -> None:
    """Writes the configuration to the run's folder."""
    import yaml

    def write() -> None:
        folder = run.config.training.folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_run_sums(folder)
        write_aside(folder / "config.yaml", yaml.safe_dump(run.config.as_dict(), sort_keys=False, allow_unicode=True))

    on_main(run.accelerator, write)


def save_weights(
    run: RunContext,
    network: nn.Module,
    result: TrainingResult,
    loss_fn: SIPOLoss,
    *,
    pairs: int,
    origin: dict[str, Any],
) -> Path:
    """Writes the trained weights (their moving average, where one was kept), their card and their hashes.

    Every process calls it.

    Args:
        run: of :func:`sipo.recipe.build.open_run`.
        network: trained.
        result: of the loop.
        loss_fn: trained with.
        pairs: trained on.
        origin: of :func:`trained_on`.

    Returns:
        ``<output_dir>/weights``: for LoRA what ``pipeline.load_lora_weights`` takes, else the network's folder.
    """
    config, family, accelerator = run.config, run.family, run.accelerator
    folder = config.training.folder / WEIGHTS
    state: dict[str, Tensor] | None = result.ema
    if state is None and is_sharded(accelerator):
        state = gather_weights(network, keep=accelerator.is_main_process)
    beta = loss_fn.options.beta_for(5 if family.video else 4)
    options: dict[str, Any] = {"pairs": pairs, "data_hash": origin["data"], "steps": result.steps}

    def write() -> None:
        writer = save_lora if config.model.tuning == "lora" else save_full
        whole = state
        if whole is not None and writer is save_full:
            whole = {**network.state_dict(), **whole}
        (folder / SUMS).unlink(missing_ok=True)  # of an earlier, shorter run: it is written last
        writer(family, network, folder, state=whole)
        card = model_card(family, config, beta=beta, scheduler=run.scheduler_changes(), **options)
        write_aside(folder / "README.md", card)
        write_aside(folder / TRAINED_ON, json.dumps(origin, indent=1) + "\n", durable=True)
        write_sums(folder)

    on_main(accelerator, write)
    return folder
