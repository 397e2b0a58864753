"""Locks a folder, a run's output or a cache, so that one process at a time writes to it.

    .lock    exists as long as the folder is in use; JSON: machine, process, since when, by what command

The kernel holds the lock for the process and releases it when the process ends in any way, so a killed run blocks no
other. These are POSIX record locks: unlike those of ``flock`` they are not inherited by forked workers, which may
outlive their parent, and they work across NFS. Closing any descriptor of the file releases the lock, so a folder also
counts as in use while the process that the file names is running.

Some file systems have no such locks, or keep them separately on each machine. So the holder touches the file every few
seconds, and a process on another machine that sees the file watches it for a while: as long as its times change, the
folder is in use. Clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sipo.files import FileError, check_regular, make_folder
from sipo.processes import on_main

LOCK = ".lock"
"""Name of the lock file."""

RENEWED = 10.0
"""Interval in seconds at which the holder touches the file."""

WATCHED = 60.0
"""Seconds for which the file of another machine must stay unchanged before its holder counts as dead."""

_SETTLED = 1.0  # seconds after which two machines that wrote at once read the same content
_BYTES = 4096  # maximum size of the file
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_holders: dict[tuple[int, int], tuple[int, int]] = {}  # device and inode of a folder: process and thread that hold it
_guard = threading.Lock()


class LockWarning(UserWarning):
    """Finding out whether a folder is in use takes a while."""


class LockedError(ValueError):
    """Another process is writing to the folder."""


@contextlib.contextmanager
def locked(folder: str | Path, what: str, *, accelerator: Any = None) -> Iterator[None]:
    """Holds the lock of a folder inside the context, against other processes and other threads of this one.

    A thread that holds the lock already continues.

    Args:
        folder: created if it is missing.
        what: name of the folder in messages: "training.output_dir='runs/a'".
        accelerator: for a run of several processes, all of which call this: the main one takes the lock for all.

    Raises:
        LockedError: another process holds it; says which, and what to do. Raised in every process.
        FileError: the folder cannot be created, or the lock's name is taken by something other than a file.
        OSError: no file can be written in the folder; names the file.

    Warns:
        LockWarning: it takes a minute to learn whether a process on another machine is still running.
    """
    lock = _Lock(Path(folder), what)
    if accelerator is None:
        lock.acquire()
    else:
        on_main(accelerator, lock.acquire)
    try:
        yield
    finally:
        lock.release()


class _Lock:
    """A folder's lock, which is acquired once."""

    def __init__(self, folder: Path, what: str) -> None:
        self._folder = folder
        self._path = folder / LOCK
        self._what = what
        self._file = -1
        self._own: dict[str, Any] = {}
        self._dead: dict[str, Any] = {}  # a holder on another machine that is no longer running
        self._released = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._made: list[Path] = []  # the folder and its parents, as far as they did not exist

    def acquire(self) -> None:
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        make_folder(self._folder, self._what)
        status = self._folder.stat()
        key, this = (status.st_dev, status.st_ino), (os.getpid(), threading.get_ident())
        with _guard:
            holder = _holders.get(key)
            if holder == this:
                return  # released by the call that took it
            if holder is not None and holder[0] == this[0]:
                raise LockedError(f"{self._what} is in use by another thread of this process")
            _holders[key] = this  # before the file is opened: closing it a second time would release the lock
        self._key = key
        try:
            while not self._take():
                pass
        except BaseException as error:
            with _guard:
                del _holders[key]
            self._remove_folders()
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            raise
        self._renewer.start()

    def release(self) -> None:
        if not self._own or self._own["pid"] != os.getpid():  # not taken, or taken by the parent of this forked process
            return
        self._released.set()
        self._renewer.join()  # before the file is closed, because another file may then get its descriptor
        with contextlib.suppress(OSError):
            if self._has_name() and _holder(os.pread(self._file, _BYTES, 0)) == self._own:
                self._path.unlink()
        os.close(self._file)
        self._own = {}
        self._remove_folders()
        with _guard:
            del _holders[self._key]

    def _remove_folders(self) -> None:
        """Removes the folders that were created here and are still empty: a refused command leaves nothing behind."""
        with contextlib.suppress(OSError):  # one is not empty
            for folder in self._made:
                folder.rmdir()

    def _take(self) -> bool:
        """Opens and locks the file and writes this process into it; false if that must be tried again."""
        try:
            self._file, made = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                check_regular(self._path)
                self._file, made = os.open(self._path, os.O_RDWR | os.O_NONBLOCK), False
            except FileNotFoundError as error:
                if self._path.is_symlink():
                    raise FileError(f"{self._path}: is a link to nothing, expected a file") from error
                return False
        taken = False
        try:
            taken = self._write_holder(made)
        except OSError:  # a full disk: an incomplete file would tell the next process nothing
            if made and self._has_name():
                self._path.unlink(missing_ok=True)
            raise
        finally:
            if not taken:
                os.close(self._file)
        return taken

    def _write_holder(self, made: bool) -> bool:
        kernel = self._kernel_lock()
        if not self._has_name():  # its former holder has removed it meanwhile
            return False
        holder = _holder(os.pread(self._file, _BYTES, 0))
        if not made and not holder:  # just being written, or left by a process that was killed while writing
            time.sleep(_SETTLED)
            holder = _holder(os.pread(self._file, _BYTES, 0))
        if holder and holder != self._dead:
            same = holder.get("machine") == _machine()
            if same and _started(holder.get("pid")) == holder.get("started") is not None:
                raise LockedError(self._message(holder))
            if not (same and kernel):
                self._watch(holder)
                self._dead = holder
                return False  # another process may have taken it meanwhile
        own = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "since": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
            "command": _command(),
        }
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, (json.dumps(own) + "\n").encode(), 0)
        os.fsync(self._file)
        if self._dead or not (made or kernel):  # if two machines came at once, the last to write has it
            time.sleep(_SETTLED)
            now = self._read()
            self._kernel_lock()  # reading the file has released it
            if now != own:
                raise LockedError(self._message(now))
        self._own = own
        return True

    def _kernel_lock(self) -> bool:
        """Locks the file; false if the file system has no locks.

        Raises:
            LockedError: another process has locked it.
        """
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise LockedError(self._message(self._settled())) from error
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _watch(self, holder: dict[str, Any]) -> None:
        """Waits until it is known whether a process on another machine is still running.

        Raises:
            LockedError: it is running.
        """
        holds = f"process {holder.get('pid')} on {holder.get('host')} held this lock"
        text = f"{self._what}: {holds}; waiting up to {WATCHED:g} s to see whether it is still running"
        warnings.warn(text, LockWarning, stacklevel=6)
        before, end = self._times(), time.monotonic() + WATCHED
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(RENEWED / 2, left))
            if self._times() != before:
                raise LockedError(self._message(self._read()))

    def _times(self) -> tuple[int, int]:
        """Reads the lock file's time and inode, which change when its holder renews it or ends; zeros if it is gone."""
        try:
            with self._path.open("rb") as file:  # opened, because only then does NFS ask its server
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            return 0, 0
        return status.st_mtime_ns, status.st_ino

    def _renew(self) -> None:
        while not self._released.wait(RENEWED):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def _has_name(self) -> bool:
        """Tells whether the open file still has the lock's name."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _settled(self) -> dict[str, Any]:
        """Reads who holds the lock; waits briefly for a holder that is about to write it."""
        end = time.monotonic() + 2 * _SETTLED  # the holder may itself wait that long for another one
        while not (holder := self._read()) and time.monotonic() < end:
            time.sleep(0.05)
        return holder

    def _read(self) -> dict[str, Any]:
        """Reads who holds the lock; as any closing of the file does, this releases our own lock."""
        try:
            with self._path.open("rb") as file:
                return _holder(file.read(_BYTES))
        except OSError:
            return {}

    def _message(self, holder: dict[str, Any]) -> str:
        if not holder:
            return f"{self._what} is in use by another process: wait until it has ended, or stop it"
        where = "" if holder.get("host") == socket.gethostname() else f" on {holder.get('host')}"
        since = f"since {holder.get('since')} ({holder.get('command')})"
        return (
            f"{self._what} is in use by process {holder.get('pid')}{where} {since}: wait until it has ended, or stop it"
        )


def _holder(content: bytes) -> dict[str, Any]:
    """Parses a lock file; empty if the content is incomplete."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _machine() -> str:
    """Identifies the running kernel: host names differ between containers, and stay the same after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _started(pid: Any) -> int | None:
    """Reads when a process of this machine was started, in kernel ticks; ``None`` if it is not running or not known."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # Z, X: killed, but not yet reaped
    except (OSError, ValueError, TypeError, IndexError):
        return None


def _command() -> str:
    name = Path(sys.argv[0]).name if sys.argv else ""
    text = shlex.join(["sipo" if name == "__main__.py" else name, *sys.argv[1:]])
    return text if len(text) <= 100 else f"{text[:100]}…"
