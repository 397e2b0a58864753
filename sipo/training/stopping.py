"""Handles requests to stop a run, and a lack of memory."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import distributed

from sipo.processes import is_out_of_memory
from sipo.training.config import TrainingConfig, TrainingOutOfMemoryError

_ALWAYS = (signal.SIGINT, signal.SIGTERM)
# Cluster managers send these ahead of time, and a closed terminal SIGHUP; whoever handles them already keeps them.
_WARNINGS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class StopRequest:
    """Turns a signal inside the context into a request: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2.

    Ctrl-C after that stops at once. Repeating any other signal has no effect: launchers pass on to their processes what
    a cluster manager has sent to all of them. Python gives signals to its main thread alone; in another one this does
    nothing.

    Args:
        processes: of the run.

    Attributes:
        signal: what asked to stop, "" as long as nothing has.
    """

    active: ClassVar[StopRequest | None] = None

    def __init__(self, processes: int = 1) -> None:
        self.signal = ""
        more = "" if processes == 1 else ", or a step more until all processes agree,"
        self._says = f"finishing the step or validation{more} and writing a checkpoint; Ctrl-C stops at once"
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        StopRequest.active = self
        if threading.current_thread() is threading.main_thread():
            for number in (*_ALWAYS, *_WARNINGS):
                former = signal.getsignal(number)
                # nohup's wish comes first; None is not Python's to restore
                taken = former in (signal.SIG_IGN, None) or (number in _WARNINGS and former is not signal.SIG_DFL)
                if not taken:
                    self._former[number] = former
                    signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        StopRequest.active = None
        while self._former:
            number, former = self._former.popitem()
            signal.signal(number, former)

    def _catch(self, number: int, frame: object) -> None:
        if self.signal:
            if number == signal.SIGINT:
                self.__exit__()
                raise KeyboardInterrupt
            return
        self.signal = signal.Signals(number).name
        # Not print: a handler may come in the middle of another write to the same stream. The terminal or the
        # reader of a pipe may be gone, which may be why the signal came.
        with suppress(OSError):
            os.write(2, f"\n{self.signal}: {self._says}\n".encode())


def asked_to_stop() -> bool:
    """Whether this process's run was asked to stop: for what takes long between two steps and can be cut short."""
    return StopRequest.active is not None and bool(StopRequest.active.signal)


class StopAgreement:
    """Whether any process was asked to stop, the same answer in all of them.

    A process asks at the beginning of a step's last pass and reads the answer at the step's end, when it has long
    arrived: the host waits until the device has come to that pass, and no further.

    Args:
        request: this process's.
        accelerator: the run's.
    """

    def __init__(self, request: StopRequest, accelerator: Any) -> None:
        self._request = request
        self._alone = accelerator.num_processes == 1
        device = accelerator.device
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._device: Any = None if device.type == "cpu" or self._alone else torch.get_device_module(device)
        if self._device is not None:
            self._host = torch.zeros(1, dtype=torch.int32, pin_memory=True)
            self._stream, self._copied = self._device.Stream(device), self._device.Event()

    def ask(self) -> None:
        """Tells the others whether this process was asked to stop, and waits for nothing."""
        if self._alone:
            return
        self._flag.fill_(bool(self._request.signal))
        self._work: Any = distributed.all_reduce(self._flag, op=distributed.ReduceOp.MAX, async_op=True)
        if self._device is not None:
            with self._device.stream(self._stream):  # it alone waits for the others, and the pass goes on beside it
                self._work.wait()
                self._host.copy_(self._flag, non_blocking=True)
                self._copied.record()

    def answer(self) -> bool:
        """Whether a process was asked to stop before it asked; for one process, until now."""
        if self._alone:
            return bool(self._request.signal)
        if self._device is None:
            self._work.wait()
            asked = bool(self._flag)
        else:
            self._copied.synchronize()
            asked = bool(self._host)
        if asked and not self._request.signal:
            self._request.signal = "another process"
        return asked


def release_signals(worker: int) -> None:
    """Resets a data loader worker's signal handlers: signals are the main process's business.

    Cluster managers send them to every process of a job, and a worker that they ended would end the run in the middle
    of a step. The loader ends its workers itself; should one hang, the second SIGTERM ends it.
    """
    for number in (signal.SIGINT, *_WARNINGS):
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "sysv_signal"):  # a handler for one signal, which the kernel then takes away
        libc.sysv_signal(signal.SIGTERM, libc.abs)  # does nothing; one of Python's would not run during a call into C
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextmanager
def memory_advice(config: TrainingConfig, device: torch.device, step: int) -> Iterator[None]:
    """Says what to lower where the memory of ``device`` does not suffice for optimiser step ``step``.

    Raises:
        TrainingOutOfMemoryError: in place of torch's own error, which is its cause.
    """
    try:
        yield
    except RuntimeError as error:  # not MemoryError, which is not of ``device``
        if not is_out_of_memory(error):
            raise
        if config.train_batch_size > 1:
            lower = (
                f"train_batch_size={config.train_batch_size} (and raise "
                f"gradient_accumulation_steps={config.gradient_accumulation_steps} by as much)"
            )
        else:
            lower = "the samples' size"
        raise TrainingOutOfMemoryError(
            f"step {step}: out of memory on {device}; lower {lower}, or use gradient checkpointing, LoRA, mixed "
            "precision, an 8-bit optimiser, a reference in host memory, or reference errors in its place"
        ) from error
