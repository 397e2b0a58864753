"""Reading and writing files: written aside and renamed, read with errors that name the file."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands for another, which Git LFS has not fetched."""

_ASIDE, _OLD = ".tmp", "old"
_LETTERS = 50  # of a name, which may have 255 bytes in all, and a letter four of them
_count = itertools.count()  # of places aside: threads may write one name, or names that begin alike

_REFUSED = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
"""How file systems without modes, or without folders that can be synced (SMB, FUSE), answer."""


class FileError(ValueError):
    """A file that is damaged or of the wrong kind; the message is one line that names it."""


def expand(path: str) -> str:
    """A path with ``~`` and environment variables (``$NAME``, ``${NAME}``) filled in, as a shell does.

    A path that exists as written is left unchanged, as is a ``$`` with no name after it.

    Raises:
        ValueError: a variable that is not set, or no such user.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
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


def check_regular(path: Path) -> os.stat_result:
    """Refuses anything but a regular file: opening a FIFO would wait for ever, and a device may have no end.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: a folder, FIFO, socket or device.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise FileError(f"{path}: is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, expected a file")
    return found


def read_bytes(path: Path) -> bytes:
    """A regular file's content.

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
    """A regular file's content in UTF-8. Errors as for :func:`read_bytes`."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 (byte {error.start})") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds. Errors as for :func:`read_bytes`."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise FileError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def parse_json(text: str, where: object = "") -> Any:
    """A JSON value, or an error of one line, whatever the text does to the parser.

    Args:
        text: to parse.
        where: named in the error; nothing, where the caller names it.

    Raises:
        FileError: it is no JSON, is nested too deeply, or holds a number of thousands of digits.
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
    """Where to write a file or a folder that then takes ``path``'s place, whole or not at all.

    The place has ``path``'s own name, so that libraries which look at the suffix may write it, in a folder of this
    process's own, so that what they write beside it goes when that folder goes. Files get the mode that the umask says.
    What a killed process leaves behind, :func:`remove_leftovers` removes.

    Args:
        path: to be written or replaced; its folder exists.
        durable: wait until content and names are on disk, so that a power cut leaves the former one or this one.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    folder = path.with_name(f".{path.name[:_LETTERS]}.{next(_count)}.{os.getpid()}{_ASIDE}")
    _clear(folder)  # of a killed process that had this one's number
    try:
        folder.mkdir()
        place = folder / path.name
        yield place
        mode = default_mode(folder)
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
        inner = error.filename is None or str(error.filename).startswith(str(folder))
        # On a full disk Python names no file; other errors name the temporary path.
        if error.errno is not None and inner:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"{path}: cannot be written ({_reason(error)})") from error  # what the file system says, too
    finally:
        _clear(folder)


def check_output(path: Path, begins: str, what: str) -> None:
    """Makes the folder of a file that :func:`write_aside` is to write after long work.

    Args:
        path: the file.
        begins: regular expression of how an earlier output of the same kind begins; that is replaced, and no other
            file.
        what: the kind, for the message.

    Raises:
        OSError: no file can be written there, or one of another kind would be lost.
        FileError: a FIFO, a socket or a device is there.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected a file to write")
    if path.exists() and check_regular(path).st_size:  # a FIFO or a device would be replaced by a file
        with path.open("rb") as file:
            if not re.match(begins.encode(), file.read(1 << 20)):
                raise FileExistsError(f"{path}: is there already and not {what}, expected a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: its folder may not be written to")


def write_aside(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Writes a file aside and renames it (:func:`aside`), so that nobody ever reads half of it.

    Args:
        path: of the file; its folder exists.
        content: text is written in UTF-8.
        durable: as for :func:`aside`.
    """
    with aside(path, durable=durable) as place:
        place.write_bytes(content.encode() if isinstance(content, str) else content)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, durable: bool = False
) -> None:
    """Writes a safetensors file aside and renames it: the same content gives the same bytes.

    Args:
        path: of the file; its folder exists.
        tensors: contiguous, on any device, sharing no memory.
        metadata: of the file.
        durable: as for :func:`aside`.

    Raises:
        OSError: it cannot be written; names the file.
    """
    from safetensors.torch import save_file

    with aside(path, durable=durable) as place:
        save_file(dict(tensors), place, metadata=dict(metadata) if metadata else None)
        if metadata and len(metadata) > 1:
            _sort_metadata(place)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes have left of :func:`aside` in a folder, and in nothing below it."""
    for path in folder.glob(f".*{_ASIDE}"):
        number = path.name.removesuffix(_ASIDE).rpartition(".")[2]
        if number.isdecimal() and not _runs(int(number)):
            _clear(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: no safetensors file, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, MemoryError) as error:
        raise FileError(f"{path}: not a sound safetensors file ({_reason(error)})") from error


def check_safetensors(path: Path) -> None:
    """Refuses a weight file whose header shows it to be damaged or something else; of the tensors, nothing is read.

    Errors as for :func:`load_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    size = check_regular(path).st_size
    with path.open("rb") as file:
        begin = file.read(64)
    reason = f"{size} bytes, cut short or damaged"
    # The length of a header may look like anything, so that what a file is otherwise is only asked where it is none.
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
    """SHA-256 of a regular file, in hexadecimal."""
    check_regular(path)
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def default_mode(folder: Path) -> int:
    """The mode that a new file gets in a folder, by the umask: safetensors' own is 0600, which no colleague can read.

    The umask can only be asked for by setting it, which would race with other threads.
    """
    probe = folder / f".mode.{os.getpid()}.{threading.get_ident()}"
    try:
        probe.touch()
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk.

    Some file systems refuse this for folders, which is no error: there is nothing else to wait for.

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
        if error.errno in _REFUSED and path.is_dir():
            return
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_all(path: Path) -> None:
    """Waits until a file, or a folder with all files and names below it, is on disk."""
    for below in sorted(path.rglob("*")) if path.is_dir() else ():
        if below.is_dir() or below.is_file():
            sync(below)
    sync(path)


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it; nothing there is as well."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _set_mode(file: Path, mode: int) -> None:
    """Sets a file's mode where it is another, and the file system has modes."""
    if stat.S_IMODE(file.stat().st_mode) == mode:
        return
    try:
        os.chmod(file, mode)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def _clear(folder: Path) -> None:
    """Removes a folder of :func:`aside`, and puts back what was moved into it if nothing has taken its place."""
    for path in folder.glob(f"{_OLD}/*"):
        if not (folder.parent / path.name).exists():
            os.replace(path, folder.parent / path.name)
    remove(folder)


def _runs(number: int) -> bool:
    """Whether a process of that number runs on this machine; true where it cannot be known."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sort_metadata(path: Path) -> None:
    """Sorts a safetensors file's metadata in place: the library writes them in an order of each process's own."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # the same characters in another order
        file.seek(8)
        file.write(text.ljust(length))


def short(value: object, limit: int = 60) -> str:
    """A value as a message shows it: ``limit`` characters of its ``repr``, however large it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, which YAML reads in hexadecimal
        return type(value).__name__
    return text if len(text) <= limit else f"{text[:limit]}…"


def one_line(message: BaseException | str, limit: int | None = None) -> str:
    """A message in one line, cut to ``limit`` characters; the type of an error that has none."""
    line = " ".join(str(message).split()) or type(message).__name__
    return line if limit is None or len(line) <= limit else f"{line[:limit]}…"


def _reason(error: BaseException) -> str:
    """The same without the file that an error of the system names."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
