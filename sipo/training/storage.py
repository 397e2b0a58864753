"""Folders of a run's checkpoints: they appear only when complete, and are checked by size and hash.

    step-00000300/
        state.json      JSON values; lists every other file with its bytes and SHA-256, and has one of itself
        *.safetensors   tensors by name

Nothing is pickled. A folder that a killed run has left behind never has a checkpoint's name, and a power cut leaves a
checkpoint whole or not at all: its files are on disk before it gets its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sipo.files import (
    FileError,
    check_regular,
    file_hash,
    one_line,
    read_object,
    remove,
    remove_leftovers,
    save_tensors,
    short,
    sync,
    sync_all,
    write_aside,
)
from sipo.processes import everywhere, from_main, on_main
from sipo.training.config import CheckpointError, TrainingWarning

FORMAT = 3
LATEST = "latest"
STATE = "state.json"

_NAME = re.compile(r"step-\d{8,18}")
_FILE = re.compile(r"[\w-]+\.safetensors")


def write(
    root: Path,
    step: int,
    *,
    shared: Mapping[str, dict[str, Tensor]],
    own: Callable[[Path], None],
    state: dict[str, Any],
    keep: int | None,
    accelerator: Any,
) -> Path:
    """Writes a checkpoint and returns its folder; every process calls it.

    Args:
        root: folder of the run's checkpoints, one for all processes.
        step: optimiser steps done.
        shared: tensors by file; the main process's are written.
        own: writes this process's own files into the folder it is given.
        state: JSON values; the main process's are written.
        keep: newest checkpoints to keep; ``None`` or 0 for all.
        accelerator: the run's.

    Raises:
        OSError: it cannot be written, for lack of room for instance; the former ones are as they were.
    """
    final = root / f"step-{step:08d}"
    aside, former = root / f".{final.name}.tmp", root / f".{final.name}.old"

    def begin() -> None:
        if not root.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            for parent in list(root.parents)[:2]:  # the names of the folder and of the run's, which may be as new
                sync(parent)
        _clear(root)
        aside.mkdir()

    def write_own() -> None:
        own(aside)
        if accelerator.is_main_process:
            for name, tensors in shared.items():
                save_tensors(aside / name, tensors)

    def end() -> None:
        written = sorted(aside.iterdir())
        files = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in written}
        content = {"format": FORMAT, "step": step, "files": files, **state}
        write_aside(aside / STATE, json.dumps(content | {"sha256": _digest(content)}, indent=1))
        sync_all(aside)
        if final.exists():  # one of the two keeps the name, or :func:`_clear` gives it back
            os.replace(final, former)
        os.replace(aside, final)
        sync(root)
        remove(former)
        # Later ones exist where this run began before the newest; they are not counted.
        earlier = [path for path in list_checkpoints(root) if step_of(path) <= step]
        for old in earlier[:-keep] if keep else []:
            _discard(old)

    try:
        on_main(accelerator, begin)
        everywhere(accelerator, write_own)
        on_main(accelerator, end)
    except Exception as error:
        if accelerator.is_main_process:  # half a checkpoint would keep a full disk full
            _clear(root)
        if isinstance(error, OSError) and str(aside) in str(error):
            text = str(error.filename or error).replace(str(aside), str(final))
            raise (OSError(error.errno, error.strerror, text) if error.filename else OSError(text)) from error
        raise
    return final


def clear(folder: Path) -> None:
    """Removes what killed runs left in a run's folder; no other run may be writing there.

    A checkpoint that was about to be replaced gets its name back.
    """
    remove_leftovers(folder)
    for below in sorted(folder.glob("*/")):
        remove_leftovers(below)
    _clear(folder / "checkpoints")


def _clear(root: Path) -> None:
    for left in root.glob(".step-*"):
        name = root / left.name.removeprefix(".").removesuffix(".old")
        if left.suffix == ".old" and _NAME.fullmatch(name.name) and not name.exists():
            os.replace(left, name)  # whole: the process was killed before another took its place
        else:
            remove(left)


def list_checkpoints(root: Path) -> list[Path]:
    """Lists the checkpoints in a folder, oldest first, sound or damaged."""
    return sorted((path for path in root.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """Returns the step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def choose_checkpoint(source: str | Path, root: Path, accelerator: Any) -> Path:
    """Chooses the sound checkpoint to resume from; every process calls it, and one of them reads.

    Args:
        source: a checkpoint's folder, or "latest" for the newest sound one in ``root``.
        root: folder of the run's checkpoints.
        accelerator: the run's.

    Raises:
        CheckpointError: absent or damaged.

    Warns:
        TrainingWarning: "latest" passed a damaged one over.
    """

    def newest_sound() -> Path:
        candidates = list_checkpoints(root)[::-1] if source == LATEST else [Path(source)]
        if not candidates:
            raise CheckpointError(f"resume_from={LATEST!r}: no checkpoint in {root}, expected a folder step-NNNNNNNN")
        if source != LATEST and not (candidates[0] / STATE).is_file():
            raise CheckpointError(f"resume_from={str(source)!r}: no checkpoint there, expected a folder with {STATE}")
        faults: list[str] = []
        for folder in candidates:
            fault = damage(folder)
            if not fault:
                for message in faults:
                    warnings.warn(f"{message}; resuming from {folder}", TrainingWarning, stacklevel=2)
                return folder
            faults.append(f"{folder}: damaged, {fault}")
        raise CheckpointError("; ".join(faults) + (", expected a sound checkpoint" if len(faults) > 1 else ""))

    return from_main(accelerator, newest_sound)


def damage(folder: Path) -> str:
    """Describes what is wrong with a checkpoint's files; "" if nothing is."""
    try:
        files = read_state(folder)["files"]
        for name, entry in files.items():
            file = folder / name
            size = check_regular(file).st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, expected {entry['bytes']}"
            if file_hash(file) != entry["sha256"]:
                return f"{name} does not have the SHA-256 that {STATE} states"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    except ValueError as error:
        return one_line(error).removeprefix(f"{folder}{os.sep}")
    return ""


def read_state(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's ``state.json``, if it is as it was written.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: damaged, or of another version.
    """
    file = folder / STATE
    state = read_object(file)
    if state.get("format") != FORMAT:
        raise FileError(f"{file}: format {short(state.get('format'))}, expected {FORMAT}")
    try:
        sound = state.pop("sha256", None) == _digest(state)
    except RecursionError as error:
        raise FileError(f"{file}: nested too deeply") from error
    if not sound:
        raise FileError(f"{file} does not have the SHA-256 that it states")
    files = state.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise FileError(f"{file}: files={short(files)}, expected the bytes and SHA-256 of each file by its name")
    return state


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"} or not _FILE.fullmatch(name):
        return False
    return type(entry["bytes"]) is int and isinstance(entry["sha256"], str)


def _discard(folder: Path) -> None:
    """Removes a checkpoint in such an order that no incomplete one keeps its name."""
    aside = folder.with_name(f".{folder.name}.tmp")
    remove(aside)
    os.replace(folder, aside)
    remove(aside)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
