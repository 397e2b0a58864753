"""What long work prints: a bar on a terminal, whose numbers come before its bar, and plain lines everywhere else."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

from sipo import progress
from sipo.progress import Meter, StepProgress, track
from tests.training_cases import Pairs, PlainLoss, fit

NUMBERS = r"loss \d\.\d{3}, accuracy \d\.\d{3}, active \d\.\d{3}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the time that progress goes by."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


@contextlib.contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Standard error is a terminal; what it got, when all is done."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    got: list[str] = []
    with os.fdopen(slave, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield lambda: "".join(got)
        stream.flush()
        os.set_blocking(master, False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(master, 1 << 16):
                got.append(data.decode())
        monkeypatch.undo()
    os.close(master)


def test_a_run_into_a_file_prints_a_plain_line_for_each_log_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a bar asked for and none to be had, and with no bar asked for."""
    for wanted in (True, False):
        folder = tmp_path / str(wanted)
        fit(folder, max_train_steps=5, logging_steps=2, progress=wanted, validation_steps=5, validation=Pairs(count=6))
        first, *lines = capsys.readouterr().err.split("\n")
        assert re.fullmatch(r"step 1: policy and reference differ by 0, logits by 0", first)
        for step in (1, 2, 4, 5):
            line = rf"step {step}/5, {NUMBERS}, [\d.e-]+ s/step, 00:0\d left"
            assert re.fullmatch(line, lines.pop(0))
        assert re.fullmatch(rf"step 5/5, held out: {NUMBERS}", lines.pop(0))
        assert lines == [""]


def test_a_run_that_is_to_print_nothing_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, max_train_steps=3, progress=None)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(TypeError, match="progress='bar': expected True, False or None"):
        fit(tmp_path, progress="bar")


def test_numbers_that_a_loss_does_not_have_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, max_train_steps=1, progress=False, loss_fn=PlainLoss(), timestep_statistics=False)
    line = r"step 1/1, loss \d+\.\d{3}, active 1\.000, [\d.e-]+ s/step, 00:00 left\n$"
    assert re.search(line, capsys.readouterr().err)


def test_seconds_a_step_and_time_left(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    """The first step warms up: it is left out of the estimate as soon as there is another."""
    steps = StepProgress(False, 1000, first=100)
    for step, seconds in ((101, 60.0), (110, 9.0), (120, 50.0)):
        clock(seconds)
        steps.show(step, "loss 0.7")
    assert capsys.readouterr().err.splitlines() == [
        "step 101/1000, loss 0.7, 60 s/step, 14:59:00 left",
        "step 110/1000, loss 0.7, 1 s/step, 14:50 left",  # 890 steps of 1 s
        "step 120/1000, loss 0.7, 5 s/step, 45:32 left",  # 880 steps of 59 s / 19
    ]


def test_other_work_prints_a_line_now_and_then_and_short_work_none(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for item in track(range(10), "checking", "pairs", False):
        clock(1.0 if item < 2 else 10.0)
    assert capsys.readouterr().err.splitlines() == [
        "checking: 5/10 pairs, 0.156 pairs/s, 00:32 left",
        "checking: 8/10 pairs, 0.129 pairs/s, 00:15 left",
        "checking: 10/10 pairs, 0.122 pairs/s, 00:00 left",
    ]
    with Meter("precompute", "pairs", True) as meter:  # no terminal here, and nobody knows how many
        clock(31.0)
        meter.update(62)
    assert capsys.readouterr().err == "precompute: 62 pairs, 2 pairs/s\n"
    for wanted, seconds in ((False, 1.0), (None, 1000.0)):
        assert list(track((clock(seconds) for _ in range(3)), "labelling", "rows", wanted)) == [None] * 3
    assert capsys.readouterr().err == ""


def test_what_cannot_be_printed_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Full())
    results = [fit(tmp_path / str(wanted), max_train_steps=2, progress=wanted)[1] for wanted in (False, True)]
    monkeypatch.undo()
    assert [line["step"] for result in results for line in result.history] == [1, 2, 1, 2]
    with ThreadPoolExecutor(1) as other:  # another thread's bar would wait for ever for a lock that is still held
        held = other.submit(lambda: [not lock.acquire(False) or lock.release() for lock in tqdm.get_lock().locks])
        assert not any(held.result())


@pytest.mark.parametrize(("columns", "left", "bar"), [(140, True, True), (56, True, False), (44, False, False)])
def test_on_a_terminal_the_bar_yields_to_the_numbers(
    columns: int, left: bool, bar: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(columns, monkeypatch) as shown:
        fit(tmp_path, max_train_steps=3, progress=True)
    assert "step 1: policy and reference differ by 0, logits by 0" in shown()
    last = [text for text in re.split(r"[\r\n]+", shown()) if text.strip()][-1]
    assert re.match(r"step 3/3, loss \d\.\d{3}, accuracy \d\.\d{3}", last) and len(last) <= columns
    whole = re.search(r", 00:00 left, +[\d.]+s/step, active \d\.\d{3} \|██", last)
    assert ("00:00 left" in last, bool(whole)) == (left, bar)


def test_the_bar_of_other_work_yields_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, bar in ((100, True), (32, False)):
        with terminal(columns, monkeypatch) as shown:
            meter: Any = Meter("checking", "pairs", True, 4)
            meter._bar.delay = 0
            meter.update(4)
            time.sleep(0.01)
            meter.close()
        last = [text for text in re.split(r"[\r\n]+", shown()) if text.strip()][-1]
        assert last.startswith("checking: 4/4 pairs, 00:00 left") and ("|██" in last) == bar


def test_lines_take_no_lock_that_killed_processes_keep(capsys: pytest.CaptureFixture[str]) -> None:
    """tqdm's lock is shared with forked processes: one that is killed while it prints would stop all others."""
    lock = tqdm.get_lock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lock), "acquire", lambda *_: pytest.fail("takes tqdm's lock"))
        progress.say("a line")
    assert capsys.readouterr().err == "a line\n"
