"""What went wrong is one line where a user can do something about it, and a traceback where it is a mistake of ours."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pty
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors
import torch
from torch.utils.data import DataLoader, Dataset

from sipo import cli
from sipo.cache.format import CacheError
from sipo.cli import errors as cli_errors
from sipo.data.config import DataConfig
from sipo.families import loading, tuning
from sipo.families.config import ModelConfig
from sipo.locks import LockWarning
from sipo.processes import OtherProcessError
from sipo.recipe.config import Config
from sipo.training import TrainingConfig, TrainingDivergedError, TrainingInterruptedError


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise CacheError("latents-00000.safetensors: damaged: twice")


def loader_error() -> Exception:
    """As it comes from a loader's process: with a traceback in its message."""
    with pytest.raises(CacheError) as caught:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert "Original Traceback" in str(caught.value)
    return caught.value


def network_error() -> Exception:
    """Of a library whose classes have nothing in common with Python's own."""
    return type("ReadTimeout", (Exception,), {"__module__": "httpx"})("The read operation\ntimed out")  # type: ignore[no-any-return]


NO_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12"

ONE_LINE = [
    (lambda: safetensors.SafetensorError("Error while\ndeserializing"), "safetensors: Error while deserializing"),
    (lambda: OSError(28, "No space left on device", "cache/x"), "sipo: error: cache/x: No space left on device\n"),
    (lambda: OSError(18, "Cross-device link", "a", None, "b"), "sipo: error: a -> b: Cross-device link\n"),
    (
        lambda: MemoryError("could not allocate 9 GB"),
        "out of memory on the host; lower training.dataloader_num_workers",
    ),
    (MemoryError, "out of memory on the host; lower training.dataloader_num_workers"),
    (
        lambda: RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] {NO_HOST_MEMORY}"),
        "out of memory on the host; lower "
        "training.dataloader_num_workers, data.sizes or data.frames, or use smaller files: [enforce fail",
    ),
    (
        lambda: torch.OutOfMemoryError("CUDA out of memory"),
        "out of memory; lower training.train_batch_size or data.sizes",
    ),
    (lambda: RecursionError("maximum recursion depth exceeded"), "the input is nested too deeply"),
    (lambda: OtherProcessError("process 1: row 3 is bad"), "process 1: row 3 is bad"),
    (lambda: TrainingDivergedError("step 3"), "step 3"),
    (lambda: torch.distributed.DistNetworkError("timed out"), "the connection to the other processes is lost"),
    (loader_error, "latents-00000.safetensors: damaged: twice"),
    (network_error, "network: The read operation timed out"),
    (lambda: BrokenPipeError(32, "Broken pipe"), "[Errno 32] Broken pipe"),  # to another program, and not to a reader
    (
        lambda: RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        "lower training.dataloader_num_workers",
    ),
]


@pytest.mark.parametrize(("make", "message"), ONE_LINE, ids=[message[:30] for _, message in ONE_LINE])
def test_what_a_user_can_mend_is_one_line(
    make: Callable[[], Exception], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sipo.data.check.run_check", Mock(side_effect=make()))
    assert cli.main(["data", "check", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sipo: error: ") and error.count("\n") == 1
    assert message in error and "Traceback" not in error


def test_prompts_that_are_too_long_are_not_printed_one_by_one() -> None:
    from diffusers.utils import logging

    before = logging.get_verbosity()
    try:
        logging.set_verbosity_warning()
        cli_errors._quieten()
        assert logging.get_verbosity() == logging.ERROR
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError(NO_HOST_MEMORY), MemoryError()])
@pytest.mark.parametrize("reading", [loading._naming_path, tuning._naming_file])
def test_a_lack_of_memory_is_no_fault_of_the_file_that_is_read(reading: Any, error: Exception) -> None:
    with pytest.raises(type(error)), reading(Path("model.safetensors")):
        raise error


@pytest.mark.parametrize(
    "mistake", [AssertionError("x"), AttributeError("x"), KeyError("x"), TypeError("x"), RuntimeError("shapes differ")]
)
def test_mistakes_of_ours_keep_their_traceback(mistake: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sipo.data.check.run_check", Mock(side_effect=mistake))
    with pytest.raises(type(mistake)):
        cli.main(["data", "check", "nowhere"])


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sipo.data.check.run_check", Mock(side_effect=KeyboardInterrupt()))
    assert cli.main(["data", "check", "nowhere"]) == 130
    assert capsys.readouterr().err == "sipo: interrupted\n"


def test_demo_and_reports_have_the_same_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sipo.demo.main.run_demo", "sipo.analysis.report.report_run"):
        monkeypatch.setattr(name, Mock(side_effect=safetensors.SafetensorError("damaged")))
    for command in (["demo"], ["analyze", str(tmp_path)]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err == "sipo: error: safetensors: damaged\n"


# ---- Packages of other versions ----


def test_a_package_that_is_too_old_is_named_with_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.9", "av>=17; extra == 'train'"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "14.2.0" if name == "av" else real(name))
    assert cli.main(["data", "check", "nowhere"]) == 2
    expected = "sipo: error: this needs av>=17 (14.2.0 is installed): pip install 'sipo[train]'\n"
    assert capsys.readouterr().err == expected


def test_where_sipo_is_not_installed_any_version_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    for name in ("requires", "version"):
        monkeypatch.setattr(importlib.metadata, name, nothing)
    assert cli_errors.missing_packages({"torch": "torch", "not_there": "not-there"}) == "not-there"


def test_a_module_of_another_distribution_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pillow-simd's PIL, which no distribution called pillow has installed."""
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["no-such-pillow>=11"])
    assert cli_errors.missing_packages({"PIL": "no-such-pillow"}) == ""


# ---- Nobody reads what is printed ----


@contextlib.contextmanager
def unread(*names: str, terminal: bool = False) -> Iterator[None]:
    """Standard output, or the streams of these names, are a pipe whose reader has gone, or a closed terminal."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    before = {name: getattr(sys, name) for name in names or ("stdout",)}
    for name in before:
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, former in before.items():
            setattr(sys, name, former)
    stream.close()  # which writes what is left, as the interpreter does at its end: now to nowhere


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_gone_ends_a_command_quietly(
    lines: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether what is printed still fits into the stream's buffer or not."""

    def check(*args: Any, **options: Any) -> int:
        for number in range(lines):
            print(number)
        return 0

    monkeypatch.setattr("sipo.data.check.run_check", check)
    with unread():
        assert cli.main(["data", "check", "nowhere"]) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("streams", [("stderr",), ("stdout", "stderr")])
@pytest.mark.parametrize("status", [2, 130, 0])
def test_a_status_stays_where_nobody_can_be_told(
    status: int, streams: tuple[str, ...], terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*args: Any, **options: Any) -> int:
        warnings.warn("something", LockWarning, stacklevel=2)
        if status == 2:
            raise CacheError("damaged")
        if status == 130:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr("sipo.data.check.run_check", check)
    with unread(*streams, terminal=terminal):
        assert cli.main(["data", "check", "nowhere"]) == status


def test_a_run_that_stops_keeps_its_status_where_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingConfig(max_train_steps=1, output_dir="nowhere")
    config = Config(
        ModelConfig(family="sd15", pretrained_model_name_or_path="nowhere"),
        DataConfig(dataset_name="nowhere", cache="nowhere"),
        training,
    )
    stopped = TrainingInterruptedError(3, Path("nowhere"), "SIGINT")
    monkeypatch.setattr("sipo.recipe.config.load_config", lambda *_: config)
    monkeypatch.setattr("sipo.recipe.train.run_training", Mock(side_effect=stopped))
    with unread("stderr"):
        assert cli.main(["train", "config.yaml"]) == 130


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_that_nobody_reads_is_no_traceback(argument: str, capfd: pytest.CaptureFixture[str]) -> None:
    with unread():
        assert cli.main([argument]) == 141
    assert capfd.readouterr().err == ""


def test_a_process_whose_output_nobody_reads_ends_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sipo", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # argparse passes over what it cannot write
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
    process.stderr.close()


@pytest.mark.parametrize("arguments", [["--debug", "verify"], ["verify", "--debug"], ["verify"]])
def test_debug_shows_the_traceback_that_a_one_line_error_hides(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sipo.recipe.verify.verify_run", Mock(side_effect=CacheError("damaged")))
    assert cli.main([*arguments, "nowhere"]) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert last == "sipo: error: damaged"
    if "--debug" not in arguments:
        assert not before
        return
    assert before[0] == "Traceback (most recent call last):" and before[-1] == "sipo.cache.format.CacheError: damaged"
    assert any(line.endswith("in _verify") for line in before)
    assert not any("CommandError" in line for line in before)


def test_debug_before_a_command_within_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("sipo.data.check.run_check", lambda **options: seen.append(options) or 0)
    for arguments in (["--debug", "data", "check"], ["data", "--debug", "check"], ["data", "check", "--debug"]):
        assert cli.main([*arguments, "nowhere"]) == 0
    assert all("debug" not in options for options in seen) and len(seen) == 3


# ---- Paths ----


def test_home_and_environment_are_filled_in_in_every_argument_that_is_a_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/folder/of/someone")
    monkeypatch.setenv("SIPO_TEST", "/data")
    commands: dict[str, list[str]] = {
        "train ~/a": ["config"],
        "precompute ~/a": ["config"],
        "export ~/a --format kohya --output $SIPO_TEST/a": ["target", "output"],
        "data check ~/a --json $SIPO_TEST/a": ["path", "json"],
        "label ~/a $SIPO_TEST/a --clip ~/a --processor ~/a --aesthetic ${SIPO_TEST}/a": [
            *("source", "output", "clip", "processor", "aesthetic")
        ],
        "analyze ~/a --output $SIPO_TEST/a": ["target", "output"],
        "score ~/a --weights ~/a --output $SIPO_TEST/a": ["target", "weights", "output"],
        "verify ~/a": ["target"],
        "demo --output ~/a": ["output"],
    }
    parser = cli._parser()
    for command, names in commands.items():
        options = parser.parse_args(command.split())
        assert {str(getattr(options, name)) for name in names} <= {"/folder/of/someone/a", "/data/a"}, command
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(command.replace("~/a", "$SIPO_UNSET/a").split())
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "'$SIPO_UNSET/a': the environment variable SIPO_UNSET is not set" in error
