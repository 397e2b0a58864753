"""The content of a checkpoint: tensors in safetensors, everything else in JSON, nothing pickled.

    state.json                 step, the run's identity, optimiser settings, loss scale, timestep statistics
    model.safetensors          the policy's trainable parameters and its buffers, under their own names
    ema.safetensors            their moving average, where the run keeps one
    optimizer.safetensors      the optimiser's tensors, as <parameter number>.<name>, and .<name> again where nested
    process-00000.safetensors  one per process: generator states, and sums since the last log line

Under FSDP2 the tensors are gathered first, so that the files are the same. How a checkpoint is written, found and
checked is in ``storage.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sipo.cache.weights import is_weights, weights_change
from sipo.files import check_safetensors, load_tensors, one_line, save_tensors, short
from sipo.loss import SIPOLoss
from sipo.processes import everywhere, is_collective, is_out_of_memory
from sipo.protocols import PairDataset, PairLoss
from sipo.seeds import get_random_state, set_random_state
from sipo.training import sharding, storage
from sipo.training.config import CheckpointError, TrainingConfig
from sipo.training.optimization import Average

_MODEL, _OPTIMIZER, _AVERAGE = "model.safetensors", "optimizer.safetensors", "ema.safetensors"


def save_checkpoint(
    root: Path,
    *,
    step: int,
    identity: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    window: dict[str, Tensor],
    progress: dict[str, Any],
    keep: int | None,
    accelerator: Any,
) -> Path:
    """Writes a checkpoint; every process calls it.

    Args:
        root: folder of the run's checkpoints.
        step: optimiser steps done.
        identity: what a resumed run must have in common with this one; JSON values.
        model: the policy, unwrapped.
        optimizer: as accelerate prepared it.
        average: of the policy's weights.
        window: this process's sums since the last log line.
        progress: further JSON values, handed on by :func:`load_checkpoint`.
        keep: newest checkpoints to keep; ``None`` or 0 for all.
        accelerator: the run's.

    Returns:
        The checkpoint's folder.

    Raises:
        TypeError: the optimiser holds a value that is neither a tensor nor JSON.
    """
    main = accelerator.is_main_process
    shared = {_MODEL: sharding.gather_weights(model, keep=main)}
    shared[_OPTIMIZER], settings = _flatten(sharding.gather_optimizer(optimizer, keep=main))
    if average is not None:
        shared[_AVERAGE] = average.tensors()
    name = _process(accelerator.process_index)
    return storage.write(
        root,
        step,
        shared=shared,
        own=lambda folder: _save_process(folder / name, window, accelerator.device),
        state={
            "identity": identity,
            "progress": progress,
            "optimizer": settings,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        },
        keep=keep,
        accelerator=accelerator,
    )


def load_checkpoint(
    source: str | Path,
    root: Path,
    *,
    identity: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    restore: Callable[[dict[str, Tensor], dict[str, Any]], None],
    accelerator: Any,
) -> int:
    """Restores a checkpoint in place: weights, their average, optimiser, loss scale and random generators.

    Args:
        source: a checkpoint's folder, or "latest" for the newest sound one in ``root``.
        root: folder of the run's checkpoints.
        identity: of the resuming run; must equal the checkpoint's.
        model: the policy, unwrapped.
        optimizer: as accelerate prepared it.
        average: of the policy's weights.
        restore: takes this process's ``window`` and the ``progress`` that were saved.
        accelerator: the run's.

    Returns:
        Steps done.

    Raises:
        CheckpointError: absent, damaged, or of another run.
    """
    folder = storage.choose_checkpoint(source, root, accelerator)

    def read() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        with reading(folder):
            state = storage.read_state(folder)
            _check_state(state)
            for name in (_MODEL, _OPTIMIZER, _process(accelerator.process_index), *([_AVERAGE] if average else [])):
                if name not in state["files"]:
                    raise ValueError(f"{storage.STATE}: no {name} among its files")
            _check_identity(folder, state["identity"], identity)
            weights = load_tensors(folder / _MODEL)
            _check_model(folder, weights, model)
            _check_groups(folder, state["optimizer"], optimizer)
            moments = _unflatten(load_tensors(folder / _OPTIMIZER), state["optimizer"])
            averaged = load_tensors(folder / _AVERAGE) if average is not None else {}
            if average is not None and averaged.keys() != average.parameters.keys():
                raise ValueError(f"{_AVERAGE} has other names than the policy's weights")
            window = _load_process(folder / _process(accelerator.process_index), accelerator.device)
        return state, weights, moments, averaged, window

    state, weights, moments, averaged, window = everywhere(accelerator, read)
    step: int = state["step"]
    with reading(folder):
        sharding.load_weights(model, weights)
        sharding.load_optimizer(optimizer, moments)
        if average is not None:
            average.load(averaged, step)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        restore(window, state["progress"])
    return step


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns errors raised while a checkpoint's content is used into one line about the checkpoint.

    Raises:
        CheckpointError: in place of any error but its own, and those that say nothing of the checkpoint: of memory, of
            a disk or of communication between processes.
    """
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: {Path(str(error.filename)).name} is missing") from error
    except Exception as error:  # the files are as they were written, and what was written may be anything
        if isinstance(error, OSError) or is_out_of_memory(error) or is_collective(error):
            raise
        reason = one_line(error).removeprefix(f"{folder}{os.sep}")
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{folder}: does not fit this run ({name}{reason})") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns a checkpoint's weights for use: the moving average if it has one, otherwise the weights.

    Raises:
        CheckpointError: not a complete checkpoint.
    """
    with reading(folder):
        return load_tensors(folder / (_AVERAGE if (folder / _AVERAGE).is_file() else _MODEL))


def run_identity(config: TrainingConfig, loss_fn: PairLoss, dataset: PairDataset, processes: int) -> dict[str, Any]:
    """Returns what a resumed run must share with the one that it continues, as JSON values by name."""
    loss: Any = repr(loss_fn) if isinstance(loss_fn, nn.Module) else type(loss_fn).__name__
    if isinstance(loss_fn, SIPOLoss):
        loss = loss_fn.settings()
    return config.identity() | {
        "dataset_length": len(dataset),
        "groups": [len(group) for group in getattr(dataset, "groups", None) or ()],
        "processes": processes,
        "loss": loss,
    }


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits an optimiser's state into tensors by name and JSON settings."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}

    def part(key: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, dict):  # bitsandbytes keeps what belongs to its 8 bits one level down
            for name, inner in value.items():
                part(f"{key}.{name}", inner)
        else:
            scalars[key] = value

    for number, values in state["state"].items():
        part(str(number), values)
    settings = {"groups": state["param_groups"], "scalars": scalars}
    try:
        json.dumps(settings)
    except TypeError as error:
        raise TypeError(f"the optimiser cannot be saved: {error}, expected tensors and plain numbers") from error
    return tensors, settings


def _unflatten(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**settings["scalars"], **tensors}.items():
        number, *path, name = key.split(".")
        place = state.setdefault(int(number), {})
        for step in path:
            place = place.setdefault(step, {})
        place[name] = value
    # JSON has no tuples (AdamW's betas).
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in settings["groups"]
    ]
    return {"state": state, "param_groups": groups}


def _check_state(state: dict[str, Any]) -> None:
    """Refuses values of other types than :func:`save_checkpoint` writes; those who use a value check the rest."""
    step, progress, settings = (state.get(name) for name in ("step", "progress", "optimizer"))
    sound = {
        "step": type(step) is int and 0 <= step < 10**12,
        "identity": isinstance(state.get("identity"), dict),
        "progress": isinstance(progress, dict)
        and isinstance(progress.get("alarms"), dict)
        and all(type(count) is int for count in (*progress["alarms"].values(), progress.get("skipped"))),
        "optimizer": isinstance(settings, dict)
        and isinstance(settings.get("scalars"), dict)
        and isinstance(settings.get("groups"), list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in settings["groups"]),
        "scaler": state.get("scaler", 0) is None or isinstance(state.get("scaler"), dict),
    }
    for name, right in sound.items():
        if not right:
            raise ValueError(f"{storage.STATE}: {name} is missing or has an invalid value")


def _check_identity(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        was, now = saved.get(name), wanted.get(name)
        if was == now:
            continue
        if name == "data":
            raise CheckpointError(
                f"{folder}: the data has changed since this checkpoint ({was}; now {now}): expected the data that the "
                "run has been trained on; another training.output_dir starts over with this"
            )
        if is_weights(name):
            raise CheckpointError(f"{folder}: trained from other weights: {weights_change(name, was, now)}")
        raise CheckpointError(f"{folder}: made with {_difference(name, was, now)}")


def _difference(name: str, was: Any, now: Any) -> str:
    """Finds the first part in which two settings differ, however deep it is; returns its two values."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            if key not in was or key not in now or was[key] != now[key]:
                return _difference(f"{name}.{key}", was.get(key), now.get(key))
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for number, pair in enumerate(zip(was, now, strict=True)):
            if pair[0] != pair[1]:
                return _difference(f"{name}[{number}]", *pair)
    shown = ["the method's own default" if name == "loss.beta" and v is None else short(v, 80) for v in (was, now)]
    return f"{name}={shown[0]}, expected this run's {shown[1]}"


def _check_model(folder: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    wanted = sharding.trained(model)
    for name in sorted(weights.keys() ^ wanted.keys()):
        holder, other = ("checkpoint", "policy") if name in weights else ("policy", "checkpoint")
        raise CheckpointError(f"{folder}: {name!r} is in the {holder} and not in the {other}, expected one model")
    for name, tensor in wanted.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{list(weights[name].shape)} in the checkpoint, {list(tensor.shape)} in the policy"
            raise CheckpointError(f"{folder}: {name!r} is {shapes}, expected one shape")


def _check_groups(folder: Path, settings: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    saved = [len(group["params"]) for group in settings["groups"]]
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if saved != wanted:
        raise CheckpointError(f"{folder}: optimiser groups of {saved} parameters, expected {wanted}")
    for was, now in zip(settings["groups"], optimizer.param_groups, strict=True):
        for name, value in now.items():
            if name != "params" and _kind(was.get(name)) != _kind(value):
                found = f"{name}={short(was.get(name), 80)}"
                raise CheckpointError(f"{folder}: an optimiser group has {found}, expected one like {short(value, 80)}")


def _kind(value: Any) -> str:
    """Names the kind of a setting, as far as JSON keeps it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_kind, value))}]"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "a number" if number else type(value).__name__


def _process(index: int) -> str:
    return f"process-{index:05d}.safetensors"


def _save_process(path: Path, window: dict[str, Tensor], device: torch.device) -> None:
    tensors, text = get_random_state(device)
    tensors.update({f"window.{name}": sharding.host_copy(tensor) for name, tensor in window.items()})
    save_tensors(path, tensors, {"host_rng": text})


def _load_process(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Restores the generators and returns the window's tensors."""
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["host_rng"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    set_random_state(tensors, text, device)
    return {name.removeprefix("window."): t for name, t in tensors.items() if name.startswith("window.")}
