"""``sipo verify``: checks whether the files of a run are still as the run wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from sipo.files import FileError, one_line, parse_json, read_text
from sipo.recipe.config import load_config
from sipo.training import storage
from sipo.training.log_reader import metrics_fault, read_log
from sipo.training.statistics import statistics_fault
from sipo.training.sums import CONFIG, LOGS, PROMPTS, SUMS, check_sum, check_sums, read_sums


class VerifiedPath(NamedTuple):
    """A file or folder that a run has written, and whether it is sound.

    Attributes:
        path: the file or folder.
        fault: what is wrong with it, "" if nothing is.
        note: what else is known of it.
    """

    path: Path
    fault: str
    note: str = ""

    def describe(self) -> str:
        """Formats the result as a line for a terminal."""
        if self.fault:
            fault = self.fault if str(self.path) in self.fault else f"{self.path}: {self.fault}"
            return f"damaged  {fault.replace(': damaged, ', ': ', 1)}"
        return f"ok       {self.path}{f' ({self.note})' if self.note else ''}"


def verify_run(folder: Path) -> list[VerifiedPath]:
    """Reads everything that a run reads back, and compares it with its hashes. Nothing is changed.

    Configuration, logs and prompts have hashes once the run has ended; until then they are only read.

    Args:
        folder: of a run of ``sipo train`` or :func:`sipo.training.train`; or a folder of weights alone.

    Returns:
        What was found, in the order in which a run writes it.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that a run writes.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected the folder of a run")
    root = folder / "checkpoints"
    checks: list[tuple[Path, Callable[[Path], str]]] = [
        (folder / CONFIG, _config),
        *([(root, _check_folder)] if root.exists() and not root.is_dir() else []),
        *((path, _checkpoint) for path in storage.list_checkpoints(root)),
        *((path, _log) for pattern in LOGS for path in sorted(folder.glob(pattern))),
        (folder / PROMPTS, _prompts),
        (folder / "weights", _weights),
    ]
    checks = [(path, check) for path, check in checks if path.exists()]
    ended = (folder / SUMS).exists()
    if not checks and ended:
        return [_verified(folder, _weights)]
    if not checks:
        raise FileNotFoundError(f"{folder}: no config.yaml, checkpoints, logs or weights, expected the folder of a run")
    try:
        sums = read_sums(folder / SUMS) if ended else None
    except (OSError, ValueError) as error:
        items = [VerifiedPath(folder / SUMS, one_line(error))]
        return [*items, *(_verified(path, check) for path, check in checks)]
    hashed = {path for path, check in checks if check in (_config, _log, _prompts)}
    items = [
        _verified(path, check, folder, sums) if path in hashed else _verified(path, check) for path, check in checks
    ]
    lost = [folder / name for name in sums or () if folder / name not in hashed]
    return [*items, *(VerifiedPath(path, f"missing, {SUMS} lists it") for path in lost)]


def _verified(
    path: Path, check: Callable[[Path], str], folder: Path | None = None, sums: Mapping[str, str] | None = None
) -> VerifiedPath:
    """Returns what ``check`` finds wrong with a file; in a run's ``folder``, also compares its hash with ``sums``."""
    try:
        note = check(path)
        if folder is not None and sums is not None:
            name = path.relative_to(folder).as_posix()
            if name not in sums:
                raise FileError(f"{path}: not in {SUMS}, expected only files that the run has written")
            check_sum(path, sums[name])
    except (OSError, ValueError) as error:
        return VerifiedPath(path, one_line(error))
    unknown = "" if folder is None or sums is not None else "no hash: written when a run of sipo train ends"
    return VerifiedPath(path, "", "; ".join(filter(None, (note, unknown))))


def _config(file: Path) -> str:
    load_config(file)
    return ""


def _checkpoint(folder: Path) -> str:
    if fault := storage.damage(folder):
        raise FileError(fault)
    return ""


def _log(file: Path) -> str:
    log = read_log(file, metrics_fault if file.name.startswith("metrics") else statistics_fault)
    if log.damage:
        raise FileError(f"{len(log.damage)} of {len(log.damage) + len(log.lines)} lines: {log.damage[0]}")
    return f"{len(log.lines)} lines"


def _prompts(file: Path) -> str:
    parse_json(read_text(file), file)
    return ""


def _check_folder(folder: Path) -> str:
    if not folder.is_dir():
        raise FileError(f"{folder}: is a file, expected a folder")
    return ""


def _weights(folder: Path) -> str:
    _check_folder(folder)
    if not check_sums(folder):
        raise FileError(f"no {SUMS} (the run was interrupted while it wrote the weights)")
    return f"{len(read_sums(folder / SUMS))} files"
