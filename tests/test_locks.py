"""One writer for each folder: two at once, killed holders, other machines, forks, file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from sipo import cli, locks
from sipo.files import FileError
from sipo.locks import LOCK, LockedError, locked

WHAT = "training.output_dir='runs/a'"


@contextmanager
def holder(folder: Path, end: int = signal.SIGKILL) -> Iterator[int]:
    """A process that holds the folder's lock; ended afterwards."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(folder, WHAT):
            os.write(told, b"x")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"x"
        yield child
    finally:
        os.close(ready)
        os.close(told)
        os.kill(child, end)
        os.waitpid(child, 0)


def refused(folder: Path) -> str:
    with pytest.raises(LockedError) as caught, locked(folder, WHAT):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def there(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / LOCK).read_text())
    return content


def test_a_folder_is_locked_for_a_while_and_nothing_stays(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with locked(folder, WHAT):
        assert (folder / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []  # the folders were made for the lock alone
    with locked(folder, WHAT):
        (folder / "written").touch()
    assert [path.name for path in folder.iterdir()] == ["written"]
    with locked(tmp_path / "new", WHAT):
        pass
    assert folder.is_dir()


def test_a_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as pid:
        held = there(tmp_path)
        message = refused(tmp_path)
        assert held["pid"] == pid and held["host"] and held["started"]
        assert message.startswith(f"{WHAT} is in use by process {pid} since {held['since']} (")
        assert message.endswith("): wait until it has ended, or stop it")
        assert there(tmp_path) == held


def test_a_second_process_waits_until_it_is_told_who_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder has locked the file and not yet written to it, for two processes that start at once."""
    with holder(tmp_path) as pid:
        content = (tmp_path / LOCK).read_bytes()
        (tmp_path / LOCK).write_bytes(b"")
        monkeypatch.setattr(locks.time, "sleep", lambda seconds: (tmp_path / LOCK).write_bytes(content))
        assert f"by process {pid} since " in refused(tmp_path)
        monkeypatch.setattr(locks, "_SETTLED", 0.02)
        (tmp_path / LOCK).write_bytes(b"")
        monkeypatch.setattr(locks.time, "sleep", lambda seconds: None)
        assert " by another process: " in refused(tmp_path)


def test_a_folder_that_cannot_be_made_is_named_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for folder, reason in ((tmp_path / "a", "File exists"), (tmp_path / "a" / "b", "Not a directory")):
        with (
            pytest.raises(FileError, match=rf"^{WHAT}: {reason}, expected a folder that can be written$"),
            locked(folder, WHAT),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_killed_holders_lock_is_taken_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path):
        pass
    assert (tmp_path / LOCK).is_file()  # SIGKILL leaves it
    monkeypatch.setattr(locks.time, "sleep", None)  # called for no wait
    with locked(tmp_path, WHAT):
        assert there(tmp_path)["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_killed_holders_workers_do_not_keep_it(tmp_path: Path) -> None:
    """A forked worker outlives its parent; nor does it let go of the lock when it ends before."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(KeyError), locked(tmp_path, WHAT):
            worker = os.fork()
            if worker == 0:
                os.write(told, f"{os.getpid()}\n".encode())
                time.sleep(60)
                os._exit(0)
            short = os.fork()
            if short == 0:
                raise KeyError  # leaves the block
            os.waitpid(short, 0)
            os.write(told, b"x")
            time.sleep(60)
        os._exit(0)
    text = b""
    while not text.endswith(b"x"):
        text += os.read(ready, 100)
    worker = int(text.split(b"\n")[0])
    try:
        assert f"by process {child}" in refused(tmp_path)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with locked(tmp_path, WHAT):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(ready)
        os.close(told)


def test_a_thread_may_enter_again_and_another_may_not(tmp_path: Path) -> None:
    messages: list[str] = []
    with locked(tmp_path, WHAT):
        with locked(tmp_path / "." / "", WHAT):
            pass
        assert (tmp_path / LOCK).is_file()
        thread = threading.Thread(target=lambda: messages.append(refused(tmp_path)))
        thread.start()
        thread.join()
    assert messages == [f"{WHAT} is in use by another thread of this process"]
    with locked(tmp_path, WHAT):  # free again
        pass


def test_an_error_inside_lets_go(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path, WHAT):
            raise KeyError
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "train --resume", "demo"])
def test_a_command_ends_before_it_does_anything(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sipo.recipe.train.open_run", None)
    monkeypatch.setattr("sipo.demo.main.load_base", None)
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(
        "model: {family: sd15, pretrained_model_name_or_path: toy}\n"
        f"data: {{dataset_name: toy, cache: {tmp_path / 'cache'}, sizes: [[16, 16]]}}\n"
        f"training: {{output_dir: {run}, max_train_steps: 1, mixed_precision: 'no'}}\n"
    )
    words = ["--output", str(run)] if command == "demo" else [str(config)]
    with holder(run) as pid:
        assert cli.main([*command.split(), *words]) == 2
        error = capsys.readouterr().err
        name = "output" if command == "demo" else "training.output_dir"
        assert error.startswith(f"sipo: error: {name}='{run}' is in use by process {pid} since ")
        assert error.count("\n") == 1 and [path.name for path in run.iterdir()] == [LOCK]


def test_a_refused_command_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {family: sd15, pretrained_model_name_or_path: nowhere/at-all}\n"
        f"data: {{dataset_name: {tmp_path / 'none'}, cache: {tmp_path / 'cache'}, sizes: [[16, 16]]}}\n"
        f"training: {{output_dir: {tmp_path / 'runs' / 'a'}, max_train_steps: 1, mixed_precision: 'no'}}\n"
    )
    assert cli.main(["train", str(config)]) == 2
    assert capsys.readouterr().err.startswith("sipo: error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "is a FIFO, expected a file"),
    "folder": (Path.mkdir, "is a folder, expected a file"),
    "link": (lambda path: path.symlink_to("nowhere"), "is a link to nothing, expected a file"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_something_else_of_the_locks_name_is_refused(tmp_path: Path, kind: str) -> None:
    make, message = PLACES[kind]
    make(tmp_path / LOCK)
    with pytest.raises(FileError, match=f"^{tmp_path / LOCK}: {message}$"), locked(tmp_path, WHAT):
        pass
    assert os.path.lexists(tmp_path / LOCK)


def test_a_full_disk_names_the_file_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(OSError, match="No space left on device") as caught, locked(folder, WHAT):
            pass
    assert caught.value.filename == str(folder / LOCK) and not folder.exists()
    with locked(folder, WHAT):
        pass


def test_nothing_renews_a_lock_that_was_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptor may belong to another file by then; a release does not wait for the next renewal."""
    renewing, leaving, done = threading.Event(), threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        monkeypatch.setattr(locks, "RENEWED", 3600.0)
        renewing.set()
        assert leaving.wait(20)
        time.sleep(0.1)
        done.set()

    monkeypatch.setattr(os, "utime", slow)
    monkeypatch.setattr(locks, "RENEWED", 0.001)
    with locked(tmp_path, WHAT):
        assert renewing.wait(20)
        leaving.set()
    assert done.is_set()


# ---------------------------------------------------------------- where the kernel's lock says nothing


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RENEWED", 0.02), ("WATCHED", 0.15), ("_SETTLED", 0.02)):
        monkeypatch.setattr(locks, name, seconds)


def other_machine(folder: Path, **changes: Any) -> dict[str, Any]:
    """What a process on another machine has written there."""
    other = {"host": "node7", "machine": "another", "pid": 4711, "started": 1, "since": "yesterday", "command": "sipo"}
    (folder / LOCK).write_text(json.dumps(other | changes))
    return other


def test_another_machines_holder_is_watched_and_taken_over_where_it_is_dead(tmp_path: Path, quick: None) -> None:
    other_machine(tmp_path)
    warned = pytest.warns(
        UserWarning, match=r"process 4711 on node7 held this lock; waiting up to 0\.15 s to see whether"
    )
    with warned, locked(tmp_path, WHAT):
        assert there(tmp_path)["pid"] == os.getpid()


@pytest.mark.filterwarnings("ignore:.*held this lock")
def test_another_machines_holder_that_renews_it_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, now = other_machine(tmp_path), 1000.0

    def sleep(seconds: float) -> None:
        """The holder renews it ten seconds after its start, and time passes at once."""
        nonlocal now
        if now < 1000 + locks.RENEWED <= now + seconds:
            os.utime(tmp_path / LOCK, (now, now))
        now += seconds

    monkeypatch.setattr(locks, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now))
    assert refused(tmp_path).startswith(f"{WHAT} is in use by process 4711 on node7 since yesterday (sipo): ")
    assert there(tmp_path) == held and now == 1000 + locks.RENEWED


def test_the_holder_renews_it(tmp_path: Path, quick: None) -> None:
    with locked(tmp_path, WHAT):
        os.utime(tmp_path / LOCK, (0, 0))
        end = time.monotonic() + 10
        while os.stat(tmp_path / LOCK).st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.mark.filterwarnings("ignore:.*held this lock")
def test_of_two_machines_that_come_at_once_the_last_to_write_has_it(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have watched a dead holder's file, and each has a kernel that locks it."""
    other_machine(tmp_path)

    def both(seconds: float) -> None:
        if seconds == locks._SETTLED:
            other_machine(tmp_path, pid=4712)

    monkeypatch.setattr(locks.time, "sleep", both)
    assert "process 4712 on node7" in refused(tmp_path)
    assert there(tmp_path)["pid"] == 4712


@pytest.mark.filterwarnings("ignore:.*held this lock")
def test_a_file_system_without_locks(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(errno.ENOLCK, "no locks available")))
    with holder(tmp_path) as pid:
        assert f"by process {pid} since" in refused(tmp_path)
        assert there(tmp_path)["pid"] == pid
    with locked(tmp_path, WHAT):  # it was killed, and was on this machine, perhaps in another container: watched
        assert there(tmp_path)["pid"] == os.getpid()


def test_a_process_that_lost_the_kernels_lock_still_counts(tmp_path: Path) -> None:
    """Whatever closes the file once, in the process that holds it, unlocks it."""
    with locked(tmp_path, WHAT):
        (tmp_path / LOCK).read_text()
        child = os.fork()
        if child == 0:
            try:
                with locked(tmp_path, WHAT):
                    os._exit(1)
            except LockedError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 5000, b'{"pid": [], "machine": 1e999}'])
def test_whatever_the_file_holds_a_process_that_died_is_no_hindrance(
    tmp_path: Path, quick: None, content: bytes
) -> None:
    (tmp_path / LOCK).write_bytes(content)
    warned = pytest.warns(UserWarning) if content.startswith(b'{"') else nullcontext()
    with warned, locked(tmp_path, WHAT):
        assert there(tmp_path)["pid"] == os.getpid()
