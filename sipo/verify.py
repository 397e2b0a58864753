"""``sipo verify``: whether what a run has written is still what it wrote.

Beside trained weights lies ``SHA256SUMS``, which ``sha256sum --check`` reads as well. The model card is not in it: it
is there to be edited.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sipo.files import FileError, file_hash, read_text, write_aside

SUMS = "SHA256SUMS"
"""File in a folder of weights: a line for each other file that is read back."""

_CARD = "README.md"
_READ_BACK = (".safetensors", ".json")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class Item(NamedTuple):
    """Something that a run has written.

    Attributes:
        path: file or folder.
        fault: what is wrong with it, "" if nothing is.
        note: what is known of it besides.
    """

    path: Path
    fault: str
    note: str = ""

    def describe(self) -> str:
        """A line for a terminal."""
        if self.fault:
            return f"damaged  {self.fault if str(self.path) in self.fault else f'{self.path}: {self.fault}'}"
        return f"ok       {self.path}{f' ({self.note})' if self.note else ''}"


def verify_run(folder: Path) -> list[Item]:
    """Looks at everything that a run reads back: configuration, checkpoints, logs, weights. Nothing is changed.

    Args:
        folder: of a run of ``sipo train`` or :func:`sipo.training.train`; or a folder of weights alone.

    Returns:
        What was found, in the order in which a run writes it.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that a run writes.
    """
    from sipo.training import storage

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected the folder of a run")
    if (folder / SUMS).exists():
        return [_item(folder, _weights)]
    found: list[tuple[Path, Callable[[Path], str]]] = [(folder / "config.yaml", _config)]
    found += [(path, _checkpoint) for path in storage.found(folder / "checkpoints")]
    found += [(path, _log) for name in ("metrics", "timesteps") for path in sorted(folder.glob(f"{name}*.jsonl"))]
    found += [(folder / "weights", _weights)]
    items = [_item(path, look) for path, look in found if path.exists()]
    if not items:
        raise FileNotFoundError(f"{folder}: no config.yaml, checkpoints, logs or weights, expected the folder of a run")
    return items


def _item(path: Path, look: Callable[[Path], str]) -> Item:
    try:
        return Item(path, "", look(path))
    except (OSError, ValueError) as error:
        return Item(path, " ".join(str(error).split()))


def _config(file: Path) -> str:
    from sipo import config

    config.load(file)
    return ""


def _checkpoint(folder: Path) -> str:
    from sipo.training import storage

    if fault := storage.damage(folder):
        raise FileError(fault)
    return ""


def _log(file: Path) -> str:
    from sipo.diagnostics import statistics_fault
    from sipo.run_log import metrics_fault, read_log

    log = read_log(file, metrics_fault if file.name.startswith("metrics") else statistics_fault)
    if log.damage:
        raise FileError(f"{len(log.damage)} of {len(log.damage) + len(log.lines)} lines: {log.damage[0]}")
    return f"{len(log.lines)} lines"


def _weights(folder: Path) -> str:
    if not check_weights(folder):
        raise FileError(f"no {SUMS}: the run was ended while it wrote them, --resume writes them anew")
    return f"{len(_read_sums(folder / SUMS))} files"


def write_sums(folder: Path) -> None:
    """Writes the hashes of a folder's files beside them; the last file to be written there."""
    lines = [f"{file_hash(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    write_aside(folder / SUMS, "".join(lines), durable=True)


def check_weights(folder: Path) -> bool:
    """Compares trained weights, and what lies beside them, with the hashes that they were written with.

    Args:
        folder: of weights, as ``sipo train`` writes them or as copied from there.

    Returns:
        Whether there are hashes to compare with. Weights of another origin have none.

    Raises:
        FileError: names the first file that is missing, damaged, or not among those written.
    """
    if not (folder / SUMS).exists():
        return False
    sums = _read_sums(folder / SUMS)
    for name, expected in sums.items():
        file = folder / name
        try:
            found = file_hash(file)
        except OSError as error:
            raise FileError(f"{file}: {'missing' if not file.exists() else error.strerror}, {SUMS} lists it") from error
        if found != expected:
            raise FileError(f"{file}: damaged, its SHA-256 is not the one that {SUMS} states")
    for file in _files(folder):
        if file.suffix in _READ_BACK and file.relative_to(folder).as_posix() not in sums:
            raise FileError(f"{file}: not in {SUMS}, expected only files that the run has written")
    return True


def _read_sums(file: Path) -> dict[str, str]:
    sums: dict[str, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or not match[2].isprintable() or match[2] in sums or ".." in Path(match[2]).parts:
            raise FileError(f"{file}: damaged, line {number} is not a SHA-256, two spaces and a file's name")
        sums[match[2]] = match[1]
    if not sums:
        raise FileError(f"{file}: damaged, it is empty")
    return sums


def _files(folder: Path) -> list[Path]:
    """What is compared: every regular file of a folder and those below it that is no card, and not hidden."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (SUMS, _CARD)]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
