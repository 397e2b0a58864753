"""How files are written and read: whole or not at all, on disk when they should be, with the umask's mode."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sipo import files
from sipo.files import FileError

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder_of_two(place: Path) -> None:
    """As diffusers writes a network: safetensors' files are 0600 whatever the umask says."""
    place.mkdir()
    save_file(TENSORS, place / "a.safetensors")
    os.chmod(place / "a.safetensors", 0o600)
    (place / "config.json").write_text("{}")


def test_files_get_the_mode_that_the_umask_says(tmp_path: Path, umask: int) -> None:
    files.save_tensors(tmp_path / "a.safetensors", TENSORS)
    files.write_aside(tmp_path / "a.json", "{}")
    with files.aside(tmp_path / "network") as place:
        folder_of_two(place)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4 and {mode(path) for path in written} == {0o666 & ~umask}
    assert mode(tmp_path / "network") == 0o777 & ~umask


def test_a_folder_takes_the_former_ones_place(tmp_path: Path) -> None:
    for number in (1, 2):
        with files.aside(tmp_path / "network") as place:
            folder_of_two(place)
            (place / f"{number}").touch()
    assert names(tmp_path) == ["network"] and names(tmp_path / "network") == ["2", "a.safetensors", "config.json"]


@pytest.mark.parametrize("there", [True, False])
def test_an_error_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    def failing() -> None:
        with files.aside(tmp_path / "network") as place:
            folder_of_two(place)
            raise KeyError

    if there:
        with files.aside(tmp_path / "network") as place:
            folder_of_two(place)
    with pytest.raises(KeyError):
        failing()
    assert names(tmp_path) == ["network"] * there


def test_a_folder_that_cannot_be_put_in_place_leaves_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with files.aside(tmp_path / "network") as place:
        folder_of_two(place)
    former, count = os.replace, 0

    def failing(*paths: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:  # the former folder has been moved away
            raise OSError("no")
        former(*paths)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"), files.aside(tmp_path / "network") as place:
        place.mkdir()
    assert names(tmp_path) == ["network"] and len(names(tmp_path / "network")) == 2


def _killed(work: Callable[[], object]) -> int:
    """The number of a process that was killed as it did the work."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return child


def kill(*args: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_leftovers_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    def write() -> None:
        with files.aside(tmp_path / "weights.safetensors") as place:
            (place.parent / ".tmpA1b2C3").touch()  # as safetensors names what it is writing
            kill()

    def replace() -> None:
        os.replace = lambda a, b, f=os.replace: (f(a, b), kill())  # type: ignore[assignment] # after the first
        with files.aside(tmp_path / "network") as place:
            folder_of_two(place)

    with files.aside(tmp_path / "network") as place:
        folder_of_two(place)
    dead = [_killed(write), _killed(replace)]
    beginnings = [name.rpartition(".tmp")[0] for name in names(tmp_path)]
    left = sorted((name.rsplit(".", 2)[0], int(name.rsplit(".", 1)[1])) for name in beginnings)
    assert left == [(".network", dead[1]), (".weights.safetensors", dead[0])]
    (tmp_path / f".other.{os.getppid()}.tmp").mkdir()  # of a process that runs
    (tmp_path / ".mine.tmp").touch()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([".mine.tmp", f".other.{os.getppid()}.tmp", "network"])
    assert names(tmp_path / "network") == ["a.safetensors", "config.json"]  # put back


def test_long_names_are_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 125 + ".json")  # 255 bytes
    files.write_aside(path, "x")
    assert path.read_text() == "x" and names(tmp_path) == [path.name]


def test_durable_files_are_on_disk_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content and names within, then the rename, then the name itself."""
    done: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    with files.aside(tmp_path / "network", durable=True) as place:
        folder_of_two(place)
    assert done == ["a.safetensors", "config.json", "network", "rename", tmp_path.name]
    done.clear()
    files.save_tensors(tmp_path / "a.safetensors", TENSORS, durable=True)
    assert done == ["a.safetensors", "rename", tmp_path.name]
    done.clear()
    files.write_aside(tmp_path / "a.json", "{}")
    assert done == ["rename"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM])
def test_file_systems_without_modes_and_without_syncing_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """SMB and FUSE: what they refuse is left out."""
    synced, fsync = [], os.fsync

    def sync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        synced.append(handle)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "chmod", Mock(side_effect=OSError(number, os.strerror(number))))
    with files.aside(tmp_path / "network", durable=True) as place:
        place.mkdir()
        (place / "a").touch(0o600)
    assert names(tmp_path / "network") == ["a"] and len(synced) == 1


def test_a_file_that_cannot_be_synced_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    for path in (tmp_path, tmp_path / "a"):
        with pytest.raises(OSError, match="Input/output error") as caught:
            files.sync(path)
        assert caught.value.filename == str(path)


def test_a_mode_that_is_right_is_not_set_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(os, "chmod", lambda *args: calls.append(args))
    files.write_aside(tmp_path / "a", "x")
    assert calls == []


@pytest.mark.parametrize("same", [True, False])
def test_threads_may_write_one_name_and_names_that_begin_alike(tmp_path: Path, same: bool) -> None:
    ready = threading.Barrier(2)

    def write(end: str) -> None:
        with files.aside(tmp_path / ("a" * 60 + end)) as place:
            ready.wait(20)
            place.write_text(end)
            ready.wait(20)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(write, "1" if same else end) for end in ("1", "2")]:
            future.result(60)
    assert names(tmp_path) == ["a" * 60 + end for end in ("1" if same else "12")]


def test_metadata_are_in_order_and_tensors_as_they_were(tmp_path: Path) -> None:
    metadata = {name: f'"{name}" ü\n' for name in "zyxwabcd"}
    contents = set()
    for order in (list(metadata), sorted(metadata)):
        for _ in range(3):  # safetensors would have an order of its own each time
            files.save_tensors(tmp_path / "a.safetensors", TENSORS, {name: metadata[name] for name in order})
            contents.add((tmp_path / "a.safetensors").read_bytes())
    assert len(contents) == 1
    (content,) = contents
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(metadata)
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert opened.metadata() == metadata
    loaded = files.load_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def _network(path: Path) -> None:
    with files.aside(path) as place:
        place.mkdir()
        save_file({"a": torch.ones(1000)}, place / "model.safetensors")


FULL: dict[str, Callable[[Path], object]] = {
    "tensors": lambda path: files.save_tensors(path, {"a": torch.ones(1000)}),
    "text": lambda path: files.write_aside(path, "x" * 1000),
    "folder": _network,
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_names_the_file(tmp_path: Path, what: str) -> None:
    """A limit on the size of files stands in for a disk without room."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            FULL[what](tmp_path / "written")
        except OSError as error:
            os.write(told, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(told)
    message = os.read(ready, 1000).decode()
    os.close(ready)
    assert str(tmp_path / "written") in message and "large" in message and "\n" not in message
    assert ".tmp" not in message and names(tmp_path) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "a.json"
    with pytest.raises(FileNotFoundError) as caught:
        files.write_aside(path, "{}")
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{path}'"


# ---------------------------------------------------------------- reading

PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "is a folder, expected a file"),
    "FIFO": (os.mkfifo, "is a FIFO, expected a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a file"),
    "loop": (lambda path: path.symlink_to(path), "not readable (Too many levels of symbolic links)"),
}
TEXTS: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 (byte 7)"),
    "empty": (b"", "not JSON ("),
    "nested": (b"[" * 100_000, "nested too deeply, expected JSON of a few levels"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON ("),
    "list": (b"[1]", "holds list, expected a JSON object"),
    "NUL": (b"\0", "not JSON ("),
}


def put(path: Path, what: str, contents: dict[str, tuple[bytes, str]]) -> str:
    """Puts a case of ``PLACES`` or of ``contents`` at a path; returns how the message about it begins."""
    if what in PLACES:
        make, message = PLACES[what]
        make(path)
    else:
        content, message = contents[what]
        path.write_bytes(content)
    return message


@pytest.mark.parametrize("what", [*PLACES, *TEXTS])
def test_what_is_no_json_file_is_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "state.json"
    message = put(path, what, TEXTS)
    started = time.monotonic()
    with pytest.raises(FileError) as caught:
        files.read_object(path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)
    assert time.monotonic() - started < 5


WEIGHTS: dict[str, tuple[bytes, str]] = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer, expected"),
    "pickle": (b"\x80\x02}q\x00.", "is a pickle, which is not read here, expected safetensors"),
    "zip": (b"PK\x03\x04" + bytes(100), "is a pickle, which is not read here, expected safetensors"),
    "empty": (b"", "not a sound safetensors file (0 bytes, cut short or damaged)"),
    "cut": (bytes([200, 0, 0, 0, 0, 0, 0, 0]) + b"{", "not a sound safetensors file ("),
    "header": (bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{x", "not a sound safetensors file ("),
}


@pytest.mark.parametrize("what", [*sorted(PLACES.keys() - {"loop"}), *WEIGHTS])
def test_what_is_no_safetensors_file_is_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.safetensors"
    message = put(path, what, WEIGHTS)
    with pytest.raises(FileError) as caught:
        files.load_tensors(path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)
