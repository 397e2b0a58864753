"""A run that is asked to stop, and one that runs out of memory."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from sipo.training import TrainingInterruptedError, TrainingOutOfMemoryError, stopping, storage
from sipo.training.stopping import StopAgreement, StopRequest, release_signals
from tests.training_cases import Pairs, Signalled, fit, same

# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize("number", [getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "USR1", "USR2")])
def test_a_signal_lets_the_step_finish_and_the_run_resume(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    class Asking(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if len(self.seen) == 9:  # in the third step of 4 pairs
                os.kill(os.getpid(), number)
            return super().__getitem__(index)

    straight, _ = fit(tmp_path / "straight", max_train_steps=6)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(number)
    with pytest.raises(
        TrainingInterruptedError, match=rf"stopped by {number.name} after step 3; resume with"
    ) as caught:
        fit(tmp_path, data=Asking(), max_train_steps=6)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(number))
    stopped = caught.value
    assert (stopped.step, stopped.signal) == (3, number.name)
    assert stopped.checkpoint == tmp_path / "checkpoints/step-00000003" and str(stopped.checkpoint) in str(stopped)
    said = f"\n{number.name}: finishing the step or validation and writing a checkpoint; Ctrl-C stops at once\n"
    assert said in capfd.readouterr().err
    resumed, result = fit(tmp_path, max_train_steps=6, resume_from=stopped.checkpoint)
    assert [line["step"] for line in result.history] == [4, 5, 6]
    assert same(straight, resumed)


@pytest.mark.parametrize("end", ["pipe", "terminal"])
def test_a_stop_that_nobody_can_be_told_of_still_writes_a_checkpoint(tmp_path: Path, end: str) -> None:
    """As with `2>&1 | tee log`, where Ctrl-C ends `tee` too, and where the terminal was closed."""

    class Asking(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if len(self.seen) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    gone, writer = os.pipe() if end == "pipe" else pty.openpty()
    os.close(gone)
    kept = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    try:
        with pytest.raises(TrainingInterruptedError, match="stopped by SIGINT after step 2"):
            fit(tmp_path, data=Asking(), max_train_steps=6)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    assert not storage.damage(tmp_path / "checkpoints/step-00000002")


def test_a_signal_that_comes_twice_is_one_request(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # A cluster manager sends it to all processes of a job, and the launcher passes on the one that it got.
    with pytest.raises(TrainingInterruptedError, match="stopped by SIGTERM after step 2"):
        fit(tmp_path, data=Signalled(5, 6), max_train_steps=6)
    assert capfd.readouterr().err.count("SIGTERM") == 1
    assert not storage.damage(tmp_path / "checkpoints/step-00000002")


def test_signals_that_somebody_handles_or_ignores_stay_theirs(tmp_path: Path) -> None:
    seen: list[int] = []

    class Warned(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if len(self.seen) == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGHUP)
            return super().__getitem__(index)

    former = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        _, result = fit(tmp_path, data=Warned(), max_train_steps=3)
    finally:
        signal.signal(signal.SIGUSR1, former)
        signal.signal(signal.SIGHUP, ignored)
    assert result.steps == 3 and seen == [signal.SIGUSR1]


def test_what_is_said_of_a_signal_holds_for_several_processes() -> None:
    assert StopRequest(2)._says == (
        "finishing the step or validation, or a step more until all processes agree, and writing a checkpoint; "
        "Ctrl-C stops at once"
    )


def test_on_a_device_the_host_waits_for_the_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch.cuda: its side stream waits for the others, and nothing reads the device."""
    did: list[str] = []
    other = [False]

    class Stream:
        def __init__(self, device: Any) -> None:
            pass

    class Event:
        def record(self) -> None:
            did.append("record")

        def synchronize(self) -> None:
            did.append("synchronize")

    @contextlib.contextmanager
    def stream(which: Stream) -> Iterator[None]:
        did.append("side stream")
        yield
        did.append("main stream")

    def all_reduce(flag: Tensor, *, op: Any, async_op: bool) -> Any:
        assert op is torch.distributed.ReduceOp.MAX and async_op
        did.append("reduce")
        flag |= other[0]
        return SimpleNamespace(wait=lambda: did.append("wait"))

    def zeros(number: int, **options: Any) -> Tensor:
        assert options.pop("pin_memory", False) or options.pop("device").type == "cuda"
        return torch.full((number,), 0, **options)

    monkeypatch.setattr(stopping.torch, "zeros", zeros)
    device_module = SimpleNamespace(Stream=Stream, Event=Event, stream=stream)
    monkeypatch.setattr(stopping.torch, "get_device_module", lambda device: device_module)
    monkeypatch.setattr(stopping.distributed, "all_reduce", all_reduce)
    request = StopRequest(2)
    agreement = StopAgreement(request, SimpleNamespace(num_processes=2, device=torch.device("cuda")))
    for asked in (False, True):
        other[0] = asked
        did.clear()
        agreement.ask()
        assert did == ["reduce", "side stream", "wait", "record", "main stream"]
        assert agreement.answer() is asked and did[5:] == ["synchronize"]
    assert request.signal == "another process"


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    class Insisting(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if len(self.seen) in (9, 10):
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    data = Insisting()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, data=data, max_train_steps=6)
    assert len(data.seen) == 10 and not (tmp_path / "checkpoints").exists()


def test_a_signal_in_the_last_step_is_no_interruption(tmp_path: Path) -> None:
    _, result = fit(tmp_path, data=Signalled(7), max_train_steps=2, validation=Pairs(4), validation_steps=2)
    assert result.steps == 2 and [line["step"] for line in result.validation] == [2]
    # Promised, and what a kill before the weights are written leaves.
    assert result.checkpoint == tmp_path / "checkpoints/step-00000002" and not storage.damage(result.checkpoint)


def test_a_signal_to_workers_does_not_end_the_run(tmp_path: Path) -> None:
    class Struck(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if len(self.seen) == 3:
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
                    os.kill(os.getpid(), number)
            return super().__getitem__(index)

    plain, _ = fit(tmp_path / "a", max_train_steps=4)
    struck, _ = fit(tmp_path / "b", max_train_steps=4, dataloader_num_workers=1, data=Struck())
    assert same(plain, struck)


def test_a_worker_that_hangs_is_ended_by_the_second_sigterm() -> None:
    """Also outside of Python, where no handler of Python's can run."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        release_signals(0)
        os.write(told, b"x")
        sum(range(10**15))  # one call into C, for weeks
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"x"
        time.sleep(0.2)  # until it is there
        os.kill(child, signal.SIGTERM)
        time.sleep(0.2)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)  # the first is a cluster manager's, and the worker goes on
        os.kill(child, signal.SIGTERM)
        until, ended, status = time.monotonic() + 10, 0, 0
        while not ended and time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        assert ended == child and os.WTERMSIG(status) == signal.SIGTERM
    finally:
        os.close(ready)
        os.close(told)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("own", [True, False])
def test_out_of_memory_says_what_to_lower(tmp_path: Path, own: bool) -> None:
    def hungry(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        if own:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")
        return noisy.new_empty(1 << 60)

    message = r"step 1: out of memory on cpu; lower train_batch_size=4 "
    message += r"\(and raise gradient_accumulation_steps=2 by as much\), or use gradient"
    with pytest.raises(TrainingOutOfMemoryError, match=message) as caught:
        fit(tmp_path, predict=hungry, gradient_accumulation_steps=2)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError) and "allocate" in str(caught.value.__cause__)


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the sizes do not match"):
        fit(tmp_path, predict=Mock(side_effect=RuntimeError("the sizes do not match")))


def test_workers_read_the_same_pairs_and_leave_ctrl_c_to_the_main_process(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path / "a", max_train_steps=4)
    worked, _ = fit(
        tmp_path / "b", max_train_steps=4, dataloader_num_workers=2, validation=Pairs(6), validation_steps=2
    )
    assert same(plain, worked)
