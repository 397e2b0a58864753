"""A run that is asked to stop, and one that runs out of memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sipo.training import TrainingInterrupted, TrainingOutOfMemory
from tests.training_cases import Pairs, fit, fresh_accelerate, same

__all__ = ["fresh_accelerate"]  # a fixture that every test here runs in


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_the_run_resume(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    class Asking(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if len(self.seen) == 9:  # in the third step of 4 pairs
                os.kill(os.getpid(), number)
            return super().__getitem__(index)

    straight, _ = fit(tmp_path / "straight", steps=6)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match=rf"stopped by {number.name} after step 3; resume with") as caught:
        fit(tmp_path, data=Asking(), steps=6)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    stopped = caught.value
    assert (stopped.step, stopped.signal) == (3, number.name)
    assert stopped.checkpoint == tmp_path / "checkpoints/step-00000003" and str(stopped.checkpoint) in str(stopped)
    assert f"{number.name}: finishing the step and writing a checkpoint" in capfd.readouterr().err
    resumed, result = fit(tmp_path, steps=6, resume_from=stopped.checkpoint)
    assert [line["step"] for line in result.history] == [4, 5, 6]
    assert same(straight, resumed)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    class Insisting(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if len(self.seen) in (9, 10):
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    data = Insisting()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, data=data, steps=6)
    assert len(data.seen) == 10 and not (tmp_path / "checkpoints").exists()


def test_a_signal_in_the_last_step_is_no_interruption(tmp_path: Path) -> None:
    class Late(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if len(self.seen) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    _, result = fit(tmp_path, data=Late(), steps=2)
    assert result.steps == 2 and result.checkpoint is None


@pytest.mark.parametrize("own", [True, False])
def test_out_of_memory_says_what_to_lower(tmp_path: Path, own: bool) -> None:
    def hungry(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        if own:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")
        return noisy.new_empty(1 << 60)

    message = (
        r"step 1: out of memory on cpu; lower batch_size=4 \(and raise accumulation=2 by as much\), or use gradient"
    )
    with pytest.raises(TrainingOutOfMemory, match=message) as caught:
        fit(tmp_path, predict=hungry, accumulation=2)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError) and "allocate" in str(caught.value.__cause__)


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    def broken(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        raise RuntimeError("the sizes do not match")

    with pytest.raises(RuntimeError, match="the sizes do not match"):
        fit(tmp_path, predict=broken)


def test_workers_read_the_same_pairs_and_leave_ctrl_c_to_the_main_process(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path / "a", steps=4)
    worked, _ = fit(tmp_path / "b", steps=4, num_workers=2, validation=Pairs(6), validate_every=2)
    assert same(plain, worked)
