"""``sipo verify``: whether what a run has written is still what it wrote.

Beside trained weights lies ``SHA256SUMS``, which ``sha256sum --check`` reads as well. The model card is not in it: it
is there to be edited. A run that has ended has another one in its own folder, for its configuration, logs and prompts.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from sipo.files import FileError, file_hash, one_line, parse_json, read_text, write_aside

SUMS = "SHA256SUMS"
"""File in a folder of weights: a line for each other file that is read back. In a run's folder: see :func:`end_run`."""

_LOGS = ("metrics*.jsonl", "timesteps*.jsonl")  # earlier runs' have a number
_CONFIG, _PROMPTS = "config.yaml", "samples/prompts.json"
_CARD = "README.md"
_READ_BACK = (".safetensors", ".json")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class ConfigWarning(UserWarning):
    """A run's ``config.yaml`` is not the one that it was trained with."""


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
    """Looks at everything that a run reads back, and compares it with hashes. Nothing is changed.

    Configuration, logs and prompts have hashes once the run has ended; until then they are only read.

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
    logs = [path for pattern in _LOGS for path in sorted(folder.glob(pattern))]
    found: list[tuple[Path, Callable[[Path], str]]] = [(folder / _CONFIG, _config)]
    root = folder / "checkpoints"
    found += [(root, _check_folder)] if root.exists() and not root.is_dir() else []
    found += [(path, _checkpoint) for path in storage.found(root)]
    found += [(path, _log) for path in logs]
    found += [(folder / _PROMPTS, _prompts), (folder / "weights", _weights)]
    found = [(path, look) for path, look in found if path.exists()]
    ended = (folder / SUMS).exists()
    if not found and ended:
        return [_item(folder, _weights)]
    if not found:
        raise FileNotFoundError(f"{folder}: no config.yaml, checkpoints, logs or weights, expected the folder of a run")
    try:
        sums = _read_sums(folder / SUMS) if ended else None
    except (OSError, ValueError) as error:
        items = [Item(folder / SUMS, one_line(error))]
        return [*items, *(_item(path, look) for path, look in found)]
    hashed = {path for path, look in found if look in (_config, _log, _prompts)}
    items = [_item(path, look, folder, sums) if path in hashed else _item(path, look) for path, look in found]
    lost = [folder / name for name in sums or () if folder / name not in hashed]
    return [*items, *(Item(path, f"missing, {SUMS} lists it") for path in lost)]


def _item(
    path: Path, look: Callable[[Path], str], folder: Path | None = None, sums: Mapping[str, str] | None = None
) -> Item:
    """What ``look`` says of a file; of one in a run's ``folder``, whether its hash is that of ``sums`` too."""
    try:
        note = look(path)
        if folder is not None and sums is not None:
            name = path.relative_to(folder).as_posix()
            if name not in sums:
                raise FileError(f"{path}: not in {SUMS}, expected only files that the run has written")
            _compare(path, sums[name])
    except (OSError, ValueError) as error:
        return Item(path, one_line(error))
    unknown = "" if folder is None or sums is not None else "no hash: the run has not ended"
    return Item(path, "", "; ".join(filter(None, (note, unknown))))


def _config(file: Path) -> str:
    from sipo.recipe import config

    config.load(file)
    return ""


def _checkpoint(folder: Path) -> str:
    from sipo.training import storage

    if fault := storage.damage(folder):
        raise FileError(fault)
    return ""


def _log(file: Path) -> str:
    from sipo.training.log_reader import metrics_fault, read_log
    from sipo.training.statistics import statistics_fault

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
    if not check_weights(folder):
        raise FileError(f"no {SUMS} (an older version's run, or one interrupted while writing)")
    return f"{len(_read_sums(folder / SUMS))} files"


def write_sums(folder: Path) -> None:
    """Writes the hashes of a folder's files beside them; the last file to be written there."""
    _write_sums(folder, _files(folder))


def end_run(folder: Path) -> None:
    """Writes the hashes of a run's configuration, logs and prompts; for when nothing more will be written there.

    Checkpoints and weights have hashes of their own. A run that goes on removes these (:func:`begin_run`).
    """
    paths = [folder / _CONFIG, *(path for pattern in _LOGS for path in sorted(folder.glob(pattern))), folder / _PROMPTS]
    _write_sums(folder, [path for path in paths if path.exists()])


def begin_run(folder: Path) -> None:
    """Removes the hashes that :func:`end_run` has written, before what they are of is changed."""
    (folder / SUMS).unlink(missing_ok=True)


def check_config(folder: Path) -> None:
    """Compares a run's configuration with the hash that :func:`end_run` has written, if there is one.

    Warns:
        ConfigWarning: it is another one; a user may edit it on purpose.
    """
    file = folder / _CONFIG
    try:
        expected = _read_sums(folder / SUMS).get(_CONFIG)
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


def _write_sums(folder: Path, paths: Iterable[Path]) -> None:
    lines = [f"{file_hash(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
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
        _compare(folder / name, expected)
    for file in _files(folder):
        if file.suffix in _READ_BACK and file.relative_to(folder).as_posix() not in sums:
            raise FileError(f"{file}: not in {SUMS}, expected only files that the run has written")
    return True


def _compare(file: Path, expected: str) -> None:
    try:
        found = file_hash(file)
    except OSError as error:
        raise FileError(f"{file}: {'missing' if not file.exists() else error.strerror}, {SUMS} lists it") from error
    if found != expected:
        raise FileError(f"{file}: damaged, its SHA-256 is not the one that {SUMS} states")


def _read_sums(file: Path) -> dict[str, str]:
    sums: dict[str, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums or not _is_below(match[2]):
            raise FileError(f"{file}: damaged, line {number} is not a SHA-256, two spaces and a file's name")
        sums[match[2]] = match[1]
    if not sums:
        raise FileError(f"{file}: damaged, it is empty")
    return sums


def _is_below(name: str) -> bool:
    """Whether a name can only be that of a file in the folder or below it."""
    return name.isprintable() and not Path(name).is_absolute() and ".." not in Path(name).parts


def _files(folder: Path) -> list[Path]:
    """What is compared: every regular file of a folder and those below it that is no card, and not hidden."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (SUMS, _CARD)]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
