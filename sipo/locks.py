"""One process at a time writes to a folder: a run's output, a cache.

    .lock    there as long as the folder is in use; JSON: machine, process, since when, by what command

The kernel holds the lock for the process and releases it however the process ends, so a killed run blocks no other.
These are POSIX record locks: unlike those of ``flock`` they are not handed down to forked workers, which
may outlive their parent, and NFS takes them to the server. Closing any descriptor of the file releases the lock,
so the process that the file names also counts as there as long as it runs.

Some file systems have no such locks, or have each machine's apart. So the holder touches the file every few seconds,
and a process on another machine that finds it there watches it for a while: as long as the file's times change, the
folder is in use. No clock is compared with another's.
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

from sipo.files import FileError, check_regular
from sipo.processes import on_main

LOCK = ".lock"
"""Name of the file."""

RENEWED = 10.0
"""Seconds after which the holder touches the file again."""

WATCHED = 60.0
"""Seconds for which another machine's file must stay as it is until its holder counts as dead."""

_SETTLED = 1.0  # seconds after which what two machines have written at once is the same for both
_BYTES = 4096  # that the file has at most
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_here: dict[
    tuple[int, int], tuple[int, int]
] = {}  # by device and inode of a folder, the process and thread that has it
_guard = threading.Lock()


class LockWarning(UserWarning):
    """It takes a while to find out whether a folder is in use."""


class LockedError(ValueError):
    """A folder that another process is writing to."""


@contextlib.contextmanager
def locked(folder: str | Path, what: str, *, accelerator: Any = None) -> Iterator[None]:
    """Inside, no other process writes to a folder, nor does another thread of this one, if all of them ask here.

    A thread that has the folder already goes on.

    Args:
        folder: created if it is missing.
        what: names the folder in the message: "training.output_dir='runs/a'".
        accelerator: of a run of several processes, all of which call this: the main one takes the lock for all.

    Raises:
        LockedError: another process has it; says which, and what to do. In every process alike.
        FileError: the folder cannot be made; something else than a file has the lock's name.
        OSError: no file can be written in the folder; names the file.

    Warns:
        LockWarning: it takes a minute to learn whether a process on another machine is still there.
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
    """A folder's lock, taken once."""

    def __init__(self, folder: Path, what: str) -> None:
        self._folder = folder
        self._path = folder / LOCK
        self._what = what
        self._file = -1
        self._own: dict[str, Any] = {}
        self._dead: dict[str, Any] = {}  # a holder on another machine that is no longer there
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._made: list[Path] = []  # the folder and those above it, as far as they were not there

    def acquire(self) -> None:
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{self._what}: {error.strerror}, expected a folder that can be written") from error
        found = self._folder.stat()
        key, me = (found.st_dev, found.st_ino), (os.getpid(), threading.get_ident())
        with _guard:
            there = _here.get(key)
            if there == me:
                return  # released by the call that took it
            if there is not None and there[0] == me[0]:
                raise LockedError(f"{self._what} is in use by another thread of this process")
            _here[key] = me  # before the file is opened: closing it once more would unlock it
        self._key = key
        try:
            while not self._take():
                pass
        except BaseException as error:
            with _guard:
                del _here[key]
            self._remove_folders()
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            raise
        self._renewer.start()

    def release(self) -> None:
        if not self._own or self._own["pid"] != os.getpid():  # not taken, or by the process that this was forked from
            return
        self._stop.set()
        self._renewer.join()  # it touches the file, whose number another file may have once it is closed
        with contextlib.suppress(OSError):
            if self._is_there() and _holder(os.pread(self._file, _BYTES, 0)) == self._own:
                self._path.unlink()
        os.close(self._file)
        self._own = {}
        self._remove_folders()
        with _guard:
            del _here[self._key]

    def _remove_folders(self) -> None:
        """Removes the folders that were made here and are still empty: a refused command leaves nothing behind."""
        with contextlib.suppress(OSError):  # one holds something
            for folder in self._made:
                folder.rmdir()

    def _take(self) -> bool:
        """Opens and locks the file and writes this process down; false where that is to be tried again."""
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
            taken = self._write_down(made)
        except OSError:  # a full disk: half a file would tell the next process nothing
            if made and self._is_there():
                self._path.unlink(missing_ok=True)
            raise
        finally:
            if not taken:
                os.close(self._file)
        return taken

    def _write_down(self, made: bool) -> bool:
        kernel = self._kernel_lock()
        if not self._is_there():  # whoever had it has removed it meanwhile
            return False
        holder = _holder(os.pread(self._file, _BYTES, 0))
        if not made and not holder:  # just being written, or left by a process that was killed then
            time.sleep(_SETTLED)
            holder = _holder(os.pread(self._file, _BYTES, 0))
        if holder and holder != self._dead:
            same = holder.get("machine") == _machine()
            if same and _started(holder.get("pid")) == holder.get("started") is not None:
                raise LockedError(self._message(holder))
            if not (same and kernel):
                self._watch(holder)
                self._dead = holder
                return False  # another process may have come meanwhile
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
        if self._dead or not (made or kernel):  # of two machines that came at once, the last to write has it
            time.sleep(_SETTLED)
            now = self._read()
            self._kernel_lock()  # which reading the file has undone
            if now != own:
                raise LockedError(self._message(now))
        self._own = own
        return True

    def _kernel_lock(self) -> bool:
        """Locks the file; false where the file system has no locks.

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
        """Waits until it is known whether a process on another machine is still there.

        Raises:
            LockedError: it is.
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
        """Time and inode of the lock file, which change when its holder renews it or ends; zeros if there is none."""
        try:
            with self._path.open("rb") as file:  # opened, since NFS asks its server only then
                found = os.fstat(file.fileno())
        except FileNotFoundError:
            return 0, 0
        return found.st_mtime_ns, found.st_ino

    def _renew(self) -> None:
        while not self._stop.wait(RENEWED):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def _is_there(self) -> bool:
        """Whether the file that is open still has its name."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _settled(self) -> dict[str, Any]:
        """Reads who holds the lock; waits briefly for a holder that is about to write it."""
        end = time.monotonic() + 2 * _SETTLED  # it may first wait that long for another one
        while not (holder := self._read()) and time.monotonic() < end:
            time.sleep(0.05)
        return holder

    def _read(self) -> dict[str, Any]:
        """Reads who holds the lock, from the file itself; releases a lock of ours, as closing a file does."""
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
    """What a lock file says; empty where it says nothing, or is only half written."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _machine() -> str:
    """Tells kernels apart: containers on one machine have several host names, and a machine that restarted the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _started(pid: Any) -> int | None:
    """When a process of this machine has started, in the kernel's own units; ``None`` where none runs or says so."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # killed, and not yet noticed by its parent
    except (OSError, ValueError, TypeError, IndexError):
        return None


def _command() -> str:
    name = Path(sys.argv[0]).name if sys.argv else ""
    text = shlex.join(["sipo" if name == "__main__.py" else name, *sys.argv[1:]])
    return text if len(text) <= 100 else f"{text[:100]}…"
