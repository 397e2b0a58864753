"""``sipo train``: a run from its configuration to saved weights and their card."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from sipo.cache.format import Cache
from sipo.cache.weights import PLACE
from sipo.families.tuning import save_full, save_lora
from sipo.files import write_aside
from sipo.locks import locked
from sipo.loss import SIPOLoss
from sipo.processes import from_main, on_main
from sipo.recipe.build import RunContext, build, datasets, make_loss, open_run, prepare_data
from sipo.recipe.card import model_card
from sipo.recipe.config import Config, ConfigError, differing_types, reference_kind
from sipo.recipe.preflight import check_run
from sipo.recipe.sampling import ValidationSamples
from sipo.training import TrainingConfig, TrainingResult, gather_weights, is_sharded, make_accelerator, train
from sipo.training import storage as checkpoints
from sipo.training.config import CheckpointError
from sipo.training.first_step import Mismatch
from sipo.training.log import check_logs
from sipo.training.sums import SUMS, remove_run_sums, write_run_sums, write_sums

WEIGHTS = "weights"
"""Folder in ``training.output_dir`` that a run's trained weights are written to, once it has ended."""

TRAINED_ON = "trained_on.json"
"""File in it: hashes of the data and of the network trained from, and what decides which pairs were held out."""


@dataclass(frozen=True)
class TrainedRun:
    """How a run ended.

    Attributes:
        result: the loop's.
        weights: folder with the trained weights, their card, and how to load them.
    """

    result: TrainingResult
    weights: Path


def run_training(config: Config, *, resume: bool = False, accelerator: Accelerator | None = None) -> TrainedRun:
    """A whole run of ``sipo train``.

    Args:
        config: the run.
        resume: go on from the newest sound checkpoint in ``training.output_dir``, or start where there is none yet.
        accelerator: made from the configuration if left out.

    Returns:
        Where the weights are.

    Raises:
        LockedError: another process is training into ``training.output_dir``.
        ConfigError: what does not fit; a folder that holds another run.
        CacheError, BadPairError, DataError: of the data.
        CheckpointError, TrainingAlarmError, TrainingDivergedError, TrainingInterruptedError, TrainingMismatchError,
        TrainingOutOfMemoryError: of
            the loop.
    """
    training = config.training
    if accelerator is None:
        accelerator = make_accelerator(training)
    with locked(training.folder, f"training.output_dir={str(training.output_dir)!r}", accelerator=accelerator):
        return _run_training(config, resume, accelerator)


def _run_training(config: Config, resume: bool, accelerator: Accelerator) -> TrainedRun:
    training = config.training
    there = from_main(accelerator, lambda: _check_folder(training, resume))
    run = open_run(config, accelerator)
    check_run(run, "train", resume=there)
    loss_fn = make_loss(run)
    if not there:
        _write_config(run)
    cache, references, _ = prepare_data(run, refuse_changes=there, progress=training.progress)
    data_hash = cache.content_hash()
    pairs, held_out = datasets(run, cache, references)
    sampled = config.samples.validation_prompts and (training.validation_steps or not there)
    look = ValidationSamples(run) if sampled else None  # before the networks: its text encoders are gone again
    network, reference = build(run)
    if look is not None and not there:
        look(0, network.to(run.accelerator.device))
    validate = held_out if training.validation_steps else None
    with _named():
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
            on_validation=look if training.validation_steps else None,
            offload_reference=config.model.reference_offload,
            identity=_identity(run, f"{len(cache)} pairs, {data_hash}"),
            mismatch=_mismatch(config, network),
        )
    if there:
        _write_config(run)  # only now is it known to belong to the run that was there
    number = len(pairs) // max(1, config.data.draws)
    origin = trained_on(run, cache)
    weights = save(run, network, result, loss_fn, pairs=number, origin=origin)
    on_main(run.accelerator, lambda: write_run_sums(training.folder))
    return TrainedRun(result, weights)


def trained_on(run: RunContext, cache: Cache) -> dict[str, Any]:
    """JSON values: of two runs with the same ones, the same pairs are held out and the same network is trained."""
    data = run.config.data
    split = {"data.held_out": data.held_out, "data.seed": data.seed}
    return {"data": cache.content_hash(), **split, "network": run.weights(network=True)}


def _check_folder(training: TrainingConfig, resume: bool) -> bool:
    """Whether the folder has checkpoints to go on from; a run in it that would be overwritten is refused."""
    checkpoints.clear(training.folder)  # which may give a checkpoint its name back
    saved = checkpoints.found(training.checkpoints)
    log, weights = training.metrics_path, training.folder / WEIGHTS
    logged, finished = log in check_logs(training) and log.stat().st_size > 0, weights.exists()
    if (saved and resume) or not (saved or logged or finished):
        return bool(saved)
    names = [f"{training.checkpoints.name}/{saved[-1].name}"] if saved else []
    names += [path.name for path, there in ((log, logged), (weights, finished)) if there]
    held = f"training.output_dir={str(training.output_dir)!r} holds a run already ({', '.join(names)}): "
    if saved:
        raise ConfigError(f"{held}--resume goes on with it, another training.output_dir starts anew")
    if finished:
        expected = "expected another training.output_dir, or this folder deleted"
        raise ConfigError(f"{held}it has no checkpoint to go on from, {expected}")
    if not resume:
        raise ConfigError(
            f"{held}it has no checkpoint yet, --resume starts it over and keeps the log that is there, another "
            "training.output_dir leaves all as it is"
        )
    return False


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Inside, a checkpoint of other settings names the loop's as the configuration does, by section and key."""
    try:
        yield
    except CheckpointError as error:
        names = "|".join(field.name for field in dataclasses.fields(TrainingConfig))
        text = re.sub(rf": made with (?=({names})\b)", ": made with training.", str(error), count=1)
        raise CheckpointError(text) from error


def _mismatch(config: Config, network: nn.Module) -> Mismatch:
    """Policy and reference have the same weights: where nothing else that is known sets them apart, they are equal."""
    types = reference_kind(config) != "adapter_off" and differing_types(config) is not None
    # An adapter's own dropout changes nothing at first, as its second factor is 0.
    dropout = any(isinstance(m, nn.Dropout) and m.p > 0 and "lora_" not in n for n, m in network.named_modules())
    return "warn" if types or dropout else "raise"


def _identity(run: RunContext, data: str) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from, beside the loop's own settings."""
    config = run.config
    free = ("gradient_checkpointing", "reference_offload", *PLACE)
    model = {f"model.{name}": value for name, value in config.as_dict()["model"].items() if name not in free}
    # In which type the reference is held makes no other run of one that predicts as the policy does.
    same = reference_kind(config) == "adapter_off" or differing_types(config) is None
    model["model.reference_dtype"] = "as the policy's" if same else config.model.reference_dtype
    weights = {f"model.{name}": value for name, value in run.weights(network=True).items()}
    draws = {f"data.{name}": getattr(config.data, name) for name in ("draws", "held_out", "seed")}
    return {**model, **weights, **draws, "model.reference": reference_kind(config), "data": data}


def _write_config(run: RunContext) -> None:
    """Keeps the configuration beside what came of it."""
    import yaml

    def write() -> None:
        folder = run.config.training.folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_run_sums(folder)
        write_aside(folder / "config.yaml", yaml.safe_dump(run.config.as_dict(), sort_keys=False, allow_unicode=True))

    on_main(run.accelerator, write)


def save(
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
