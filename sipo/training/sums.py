"""Reads and writes SHA256SUMS files: hashes of what a run has written, which reveal later damage.

Trained weights have such a file beside them, which ``sha256sum --check`` reads as well. The model card is not listed,
as users edit it. A run that has ended has another one in its own folder, for its configuration, logs and
prompts; checkpoints keep their hashes themselves.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from sipo.files import FileError, file_hash, one_line, read_text, write_aside

SUMS = "SHA256SUMS"
"""Name of the file."""

CONFIG, PROMPTS = "config.yaml", "samples/prompts.json"
"""Files of a run that are hashed when it ends, beside its logs."""

LOGS = ("metrics*.jsonl", "timesteps*.jsonl")
"""Patterns of a run's logs; those of earlier runs in the folder have a number."""

_CARD = "README.md"
_READ_BACK = (".safetensors", ".json")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class ConfigWarning(UserWarning):
    """A run's ``config.yaml`` is not the one that it was trained with."""


def write_sums(folder: Path) -> None:
    """Writes the hashes of a folder of weights; call it once all other files are written."""
    _write(folder, _listed(folder))


def check_sums(folder: Path) -> bool:
    """Compares a folder of weights with the hashes that were written with it.

    Args:
        folder: of weights, as ``sipo train`` writes them or as copied from there.

    Returns:
        Whether there are hashes to compare with. Weights from elsewhere have none.

    Raises:
        FileError: names the first file that is missing, damaged, or not among those written.
    """
    if not (folder / SUMS).exists():
        return False
    sums = read_sums(folder / SUMS)
    for name, expected in sums.items():
        check_sum(folder / name, expected)
    for file in _listed(folder):
        if file.suffix in _READ_BACK and file.relative_to(folder).as_posix() not in sums:
            raise FileError(f"{file}: not in {SUMS}, expected only files that the run has written")
    return True


def write_run_sums(folder: Path) -> None:
    """Writes the hashes of a run's configuration, logs and prompts; call it when the run has ended.

    A run that continues removes them first (:func:`remove_run_sums`).
    """
    paths = [folder / CONFIG, *(path for pattern in LOGS for path in sorted(folder.glob(pattern))), folder / PROMPTS]
    _write(folder, [path for path in paths if path.exists()])


def remove_run_sums(folder: Path) -> None:
    """Removes the hashes of :func:`write_run_sums`, before the files that they belong to change."""
    (folder / SUMS).unlink(missing_ok=True)


def check_config_sum(folder: Path) -> None:
    """Compares a run's configuration with its hash in :data:`SUMS`, if there is one.

    Warns:
        ConfigWarning: the file has changed, which a user may have done on purpose.
    """
    file = folder / CONFIG
    try:
        expected = read_sums(folder / SUMS).get(CONFIG)
        same = expected is None or file_hash(file) == expected
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        text = f"{file}: cannot be compared with the one that the run was trained with: {one_line(error)}"
        warnings.warn(text, ConfigWarning, stacklevel=3)
        return
    if not same:
        text = f"{file}: has been changed since the run was trained with it; it is used as it is now"
        warnings.warn(text, ConfigWarning, stacklevel=3)


def read_sums(file: Path) -> dict[str, str]:
    """Reads a SHA256SUMS file: hashes by file name.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: it is damaged, or names a file outside its folder.
    """
    sums: dict[str, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums or not _is_below(match[2]):
            raise FileError(f"{file}: damaged, line {number} is not a SHA-256, two spaces and a file's name")
        sums[match[2]] = match[1]
    if not sums:
        raise FileError(f"{file}: damaged, it is empty")
    return sums


def check_sum(file: Path, expected: str) -> None:
    """Compares a file with its hash in :data:`SUMS`.

    Raises:
        FileError: it is missing, not readable or damaged.
    """
    try:
        found = file_hash(file)
    except OSError as error:
        raise FileError(f"{file}: {'missing' if not file.exists() else error.strerror}, {SUMS} lists it") from error
    if found != expected:
        raise FileError(f"{file}: damaged, its SHA-256 is not the one that {SUMS} states")


def _write(folder: Path, paths: Iterable[Path]) -> None:
    lines = [f"{file_hash(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    write_aside(folder / SUMS, "".join(lines), durable=True)


def _is_below(name: str) -> bool:
    """Whether a name can only be that of a file in the folder or below it."""
    return name.isprintable() and not Path(name).is_absolute() and ".." not in Path(name).parts


def _listed(folder: Path) -> list[Path]:
    """Lists the files that are hashed: all regular files in a folder and below, except the card and hidden ones."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (SUMS, _CARD)]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
