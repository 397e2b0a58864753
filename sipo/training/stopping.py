"""A run that is asked to stop, and one that runs out of memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sipo.training.config import TrainingConfig, TrainingOutOfMemory

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM inside the context into a request; a second one stops at once.

    Python gives signals to its main thread alone; in another one this does nothing.

    Attributes:
        signal: what asked to stop, "" as long as nothing has.
    """

    def __init__(self) -> None:
        self.signal = ""
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                former = signal.getsignal(number)
                if former not in (signal.SIG_IGN, None):  # nohup's wish comes first; None is not Python's to restore
                    self._former[number] = former
                    signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        while self._former:
            number, former = self._former.popitem()
            signal.signal(number, former)

    def _catch(self, number: int, frame: object) -> None:
        if self.signal:
            self.__exit__()
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        # Not print: a handler may come in the middle of another write to the same stream.
        os.write(2, f"\n{self.signal}: finishing the step and writing a checkpoint; again to stop at once\n".encode())


def release_signals(worker: int) -> None:
    """For a data loader's worker: Ctrl-C is the main process's business, SIGTERM ends the worker as ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def memory_advice(config: TrainingConfig, device: torch.device, step: int) -> Iterator[None]:
    """Says what to lower where the memory of ``device`` does not suffice for optimiser step ``step``.

    Raises:
        TrainingOutOfMemory: in place of torch's own error, which is its cause.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        if config.batch_size > 1:
            lower = f"batch_size={config.batch_size} (and raise accumulation={config.accumulation} by as much)"
        else:
            lower = "the samples' size"
        raise TrainingOutOfMemory(
            f"step {step}: out of memory on {device}; lower {lower}, or use gradient checkpointing, LoRA, mixed "
            "precision, an 8-bit optimiser, a reference in host memory, or reference errors in its place"
        ) from error
