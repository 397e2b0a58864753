"""Folders of a run's checkpoints: written aside, renamed when whole, and known by size and hash ever after.

    step-00000300/
        state.json      JSON values; lists every other file with its bytes and SHA-256, and has one of itself
        *.safetensors   tensors by name

Nothing is pickled. A folder that a killed run has left behind never has a checkpoint's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipo.files import file_hash, save_tensors
from sipo.training.config import CheckpointError, TrainingWarning

FORMAT = 2
LATEST = "latest"
STATE = "state.json"

_NAME = re.compile(r"step-(\d{8,})")


def write(
    root: Path,
    step: int,
    *,
    shared: Mapping[str, dict[str, Tensor]],
    own: Callable[[Path], None],
    state: dict[str, Any],
    keep: int,
    accelerator: Any,
) -> Path:
    """Writes a checkpoint; every process calls it.

    Args:
        root: folder of the run's checkpoints, one for all processes.
        step: optimiser steps done.
        shared: tensors by file; the main process's are written.
        own: writes this process's own files into the folder it is given.
        state: JSON values; the main process's are written.
        keep: newest checkpoints to keep, 0 for all.
        accelerator: the run's.

    Returns:
        The checkpoint's folder.
    """
    final = root / f"step-{step:08d}"
    aside = root / f".{final.name}.tmp"
    if accelerator.is_main_process:
        for left in root.glob(".step-*"):  # what a run killed here left behind
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    own(aside)
    if accelerator.is_main_process:
        for name, tensors in shared.items():
            save_tensors(aside / name, tensors)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        written = sorted(aside.iterdir())
        files = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in written}
        state = {"format": FORMAT, "step": step, "files": files, **state}
        text = json.dumps(state | {"sha256": _digest(state)}, indent=1)
        (aside / STATE).write_text(text, encoding="utf-8")
        if final.exists():
            _discard(final)
        os.replace(aside, final)
        # Later ones are there where this run began before the newest: they have had their turn.
        earlier = [path for path in found(root) if step_of(path) <= step]
        for old in earlier[:-keep] if keep else []:
            _discard(old)
    accelerator.wait_for_everyone()
    return final


def found(root: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, sound or not."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def choose(source: str | Path, root: Path, accelerator: Any) -> Path:
    """The sound checkpoint to resume from; every process calls it, and one does the reading.

    Args:
        source: a checkpoint's folder, or "latest" for the newest sound one in ``root``.
        root: folder of the run's checkpoints.
        accelerator: the run's.

    Raises:
        CheckpointError: absent or damaged.

    Warns:
        TrainingWarning: "latest" passed a damaged one over.
    """
    candidates = found(root)[::-1] if source == LATEST else [Path(source)]
    if not candidates:
        raise CheckpointError(f"resume_from={LATEST!r}: no checkpoint in {root}, expected a folder step-NNNNNNNN")
    if source != LATEST and not (candidates[0] / STATE).is_file():
        raise CheckpointError(f"resume_from={str(source)!r}: no checkpoint there, expected a folder with {STATE}")
    faults: list[str] = []
    if accelerator.is_main_process:
        for folder in candidates:
            fault = damage(folder)
            if not fault:
                break
            faults.append(f"{folder}: damaged, {fault}")
    passed = len(faults)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        passed = int(broadcast(torch.tensor([passed], device=accelerator.device)).item())
    if passed == len(candidates):
        whose = faults or [f"{candidates[0]}: damaged, see the main process's error"]
        raise CheckpointError("; ".join(whose) + (", expected a sound checkpoint" if len(whose) > 1 else ""))
    for fault in faults:
        warnings.warn(f"{fault}; resuming from {candidates[passed]}", TrainingWarning, stacklevel=2)
    return candidates[passed]


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, "" if nothing is."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            return f"{STATE} holds no object"
        if state.get("format") != FORMAT:
            return f"it has format {state.get('format')!r}, expected {FORMAT}"
        if state.pop("sha256", None) != _digest(state):
            return f"{STATE} does not have the SHA-256 that it states"
        for name, entry in state["files"].items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, expected {entry['bytes']}"
            if file_hash(folder / name) != entry["sha256"]:
                return f"{name} does not have the SHA-256 that {STATE} states"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    except ValueError as error:  # not JSON, not UTF-8
        return f"{STATE} is not JSON ({' '.join(str(error).split())})"
    return ""


def _discard(folder: Path) -> None:
    """Removes a checkpoint in such an order that no half of it keeps the name."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
