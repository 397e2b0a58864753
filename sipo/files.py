"""Reads files with errors that name them, and writes files aside and renames them."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

LFS_POINTER = b"version https://git-lfs"
"""First bytes of a file that stands for another one, which Git LFS has not fetched."""

_ASIDE, _OLD = ".tmp", "old"
_LETTERS = 50  # most letters of a name that are kept: a name may have 255 bytes, and a letter four of them
_count = itertools.count()  # temporary folders: threads may write files of one name, or of names that begin alike

# Errors from file systems without modes, or without folders that can be synced (SMB, FUSE).
_UNSUPPORTED = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


class FileError(ValueError):
    """A file that is damaged or of the wrong kind; the message is one line that names it."""


def expand(path: str) -> str:
    """Expands ``~`` and environment variables (``$NAME``, ``${NAME}``) in a path, as a shell does.

    A path that exists as written is left unchanged, as is a ``$`` with no name after it.

    Raises:
        ValueError: a variable is not set, or a user does not exist.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"{path!r}: the environment variable {name} is not set")
        return os.environ[name]

    if not path.startswith("~") and "$" not in path:
        return path
    if os.path.lexists(path):
        return path
    filled = os.path.expanduser(re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, path, flags=re.ASCII))
    if filled.startswith("~") and path.startswith("~"):
        raise ValueError(f"{path!r}: no home folder of that user is known")
    return filled


def make_folder(folder: Path, name: str) -> None:
    """Makes a folder and its parents, if they do not exist; a FileError names it as ``name`` says if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{name}: {error.strerror}, expected a folder that can be written") from error


def check_regular(path: Path) -> os.stat_result:
    """Refuses anything but a regular file, and returns its status: a FIFO would block, and a device may have no end.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: it is a folder, FIFO, socket or device.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise FileError(f"{path}: is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, expected a file")
    return status


def read_bytes(path: Path) -> bytes:
    """Reads a regular file.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: it cannot be read.
    """
    try:
        check_regular(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, MemoryError) as error:
        raise FileError(f"{path}: not readable ({_reason(error)})") from error


def read_text(path: Path) -> str:
    """Reads a regular file as UTF-8. Errors as for :func:`read_bytes`."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 (byte {error.start})") from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object. Errors as for :func:`read_bytes`."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise FileError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def parse_json(text: str, where: object = "") -> Any:
    """Parses JSON; every failure of the parser is an error of one line, which begins with ``where`` if given.

    Raises:
        FileError: the text is not JSON, is nested too deeply, or has a number of thousands of digits.
    """
    before = f"{where}: " if where else ""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise FileError(f"{before}nested too deeply, expected JSON of a few levels") from error
    except (ValueError, MemoryError) as error:
        raise FileError(f"{before}not JSON ({_reason(error)})") from error


@contextmanager
def aside(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path; the file or folder written there then replaces ``path``, completely or not at all.

    It has the same name as ``path``, for libraries that read the suffix, and a temporary folder of its own, which is
    removed with everything else in it. Files get the mode that the umask gives. If the process is killed,
    :func:`remove_leftovers` removes the folder later.

    Args:
        path: file or folder to write or replace; its parent exists.
        durable: wait until content and names are on disk, so that a power cut leaves either the old or the new one.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    folder = path.with_name(f".{path.name[:_LETTERS]}.{next(_count)}.{os.getpid()}{_ASIDE}")
    _clear(folder)  # left by a killed process with the same id
    try:
        folder.mkdir()
        place = folder / path.name
        yield place
        # safetensors writes files with mode 0600, which nobody else can read. The folder's mode shows the umask, which
        # itself can only be read by setting it, in a race with other threads.
        mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
        for file in [place] if place.is_file() else sorted(place.rglob("*")):
            if file.is_file() and not file.is_symlink():
                _set_mode(file, mode)
        if durable:
            sync_all(place)
        if place.is_dir() and path.is_dir():  # a folder cannot be renamed over another
            (folder / _OLD).mkdir()
            os.replace(path, folder / _OLD / path.name)
        os.replace(place, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        # On a full disk Python names no file; other errors name the temporary path.
        if error.errno is not None and (error.filename is None or str(error.filename).startswith(str(folder))):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"{path}: cannot be written ({_reason(error)})") from error  # includes file system errors
    finally:
        _clear(folder)


def check_output(path: Path, begins: str, what: str) -> None:
    """Checks, before long work, that :func:`write_aside` can write its output, and makes the folder.

    Args:
        path: the output file.
        begins: regular expression for the first bytes of an earlier output; no other file may be replaced.
        what: kind of output, for the message.

    Raises:
        OSError: the file cannot be written, or another kind of file would be lost.
        FileError: ``path`` is a FIFO, a socket or a device.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected a file to write")
    if path.exists() and check_regular(path).st_size:  # a FIFO or a device would be replaced by a file
        with path.open("rb") as file:
            if not re.match(begins.encode(), file.read(1 << 20)):
                raise FileExistsError(f"{path}: exists already, expected a new file or {what}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: its folder may not be written to")


def write_aside(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Writes a file aside and renames it (:func:`aside`), so that nobody reads an incomplete one; text is in UTF-8."""
    with aside(path, durable=durable) as place:
        place.write_bytes(content.encode() if isinstance(content, str) else content)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, durable: bool = False
) -> None:
    """Writes a safetensors file with :func:`aside`: the same content gives the same bytes.

    Tensors are contiguous, on any device, and share no memory.

    Raises:
        OSError: it cannot be written; names the file.
    """
    from safetensors.torch import save_file

    with aside(path, durable=durable) as place:
        save_file(dict(tensors), place, metadata=dict(metadata) if metadata else None)
        if metadata and len(metadata) > 1:
            _sort_metadata(place)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary folders of :func:`aside` that killed processes left in a folder, not those below it."""
    for path in folder.glob(f".*{_ASIDE}"):
        number = path.name.removesuffix(_ASIDE).rpartition(".")[2]
        if number.isdecimal() and not _runs(int(number)):
            _clear(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file into tensors on the CPU.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: it is not a safetensors file, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, MemoryError) as error:
        raise FileError(f"{path}: not a sound safetensors file ({_reason(error)})") from error


def check_safetensors(path: Path) -> None:
    """Refuses a weight file that is damaged or not safetensors, by its header: no tensor is read.

    Errors as for :func:`load_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    size = check_regular(path).st_size
    with path.open("rb") as file:
        begin = file.read(64)
    reason = f"{size} bytes, cut short or damaged"
    # The header's length may have any bytes, so other kinds of files are recognised only if there is no header.
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= size - 8:
        try:
            with safe_open(path, "pt"):
                return
        except (OSError, SafetensorError, MemoryError) as error:
            reason = _reason(error)
    if begin.startswith(LFS_POINTER):
        raise FileError(f"{path}: is a Git LFS pointer, expected the weights themselves: `git lfs pull` fetches them")
    if begin[8:9] != b"{" and (begin[:2] == b"PK" or begin[:1] == b"\x80"):
        raise FileError(f"{path}: is a pickle, which is not read here, expected safetensors")
    raise FileError(f"{path}: not a sound safetensors file ({reason})")


def file_hash(path: Path) -> str:
    """Computes the SHA-256 of a regular file, in hexadecimal."""
    check_regular(path)
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk.

    Some file systems cannot sync folders, which is not an error.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in _UNSUPPORTED and path.is_dir():
            return
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_all(path: Path) -> None:
    """Waits until a file, or a folder with everything below it, is on disk."""
    for below in sorted(path.rglob("*")) if path.is_dir() else ():
        if below.is_dir() or below.is_file():
            sync(below)
    sync(path)


def remove(path: Path) -> None:
    """Removes a file, or a folder with everything in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _set_mode(file: Path, mode: int) -> None:
    """Sets a file's mode if it differs and the file system has modes."""
    if stat.S_IMODE(file.stat().st_mode) == mode:
        return
    try:
        os.chmod(file, mode)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _clear(folder: Path) -> None:
    """Removes a temporary folder, and restores what :func:`aside` moved into it if nothing has replaced that."""
    for path in folder.glob(f"{_OLD}/*"):
        if not (folder.parent / path.name).exists():
            os.replace(path, folder.parent / path.name)
    remove(folder)


def _runs(number: int) -> bool:
    """Tells whether a process with that id runs on this machine; true if this cannot be determined."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sort_metadata(path: Path) -> None:
    """Sorts a safetensors file's metadata in place: the library writes them in an order that varies by process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # the same characters in another order
        file.seek(8)
        file.write(text.ljust(length))


def short(value: object, limit: int = 60) -> str:
    """Formats a value for a message: at most ``limit`` characters of its ``repr``."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, which YAML reads in hexadecimal
        return type(value).__name__
    return text if len(text) <= limit else f"{text[:limit]}…"


def one_line(message: BaseException | str, limit: int | None = None) -> str:
    """Returns a message in one line of at most ``limit`` characters; the type of an error that has none."""
    line = " ".join(str(message).split()) or type(message).__name__
    return line if limit is None or len(line) <= limit else f"{line[:limit]}…"


def _reason(error: BaseException) -> str:
    """Returns an error's message in one line, without the file that a system error names."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
