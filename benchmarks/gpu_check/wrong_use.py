"""Backends that misuse their device on purpose: memory, launches, waiting, graphs, streams; or end their process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.gpu_check.wrong_results import Faulty, made_for
from sipo_kernels.backends.interface import Stats
from sipo_kernels.inputs import Inputs
from sipo_kernels.options import Settings


class AllocatesACopy(Faulty, fault="allocates a copy"):
    """A copy of the policy's output is alive beside the gradient."""

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, **mask: Any) -> Tensor:
        copy = model.clone()
        return super().gradient(copy, target, coef, upstream, **mask)

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        copy = inputs.model_pred.detach().clone()
        return super().forward(inputs._replace(model_pred=copy), settings, **options)


class LaunchesAgain(Faulty, fault="launches again"):
    """The same forward four times over."""

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        for _ in range(3):
            super().forward(inputs, settings, **options)
        return super().forward(inputs, settings, **options)


class SumsInTorch(Faulty, fault="sums in torch", fused=True):
    """Totals in operations of torch's own, after the kernel."""

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        totals = options.pop("totals", None)
        stats = super().forward(inputs, settings, **options)
        if totals is not None and totals.metrics is not None and stats.numbers is not None:
            totals.metrics[0] += stats.numbers[:-1]
            totals.metrics[1] += 1
        return stats


class ReadsOnTheHost(Faulty, fault="reads on the host"):
    """Reads the loss once it is made."""

    def changed(self, stats: Stats, inputs: Inputs) -> Stats:
        stats.loss.sum().item()
        return stats


class ComparesOnTheHost(Faulty, fault="compares on the host", fused=True):
    """Whether to mend is decided by the host, which waits for both numbers."""

    def mend(self, grad: Tensor, *rest: Any, **mask: Any) -> Tensor:
        *_, upstream, numbers, _ = rest
        return grad if made_for(numbers, upstream) else super().mend(grad, *rest, **mask)


class WaitsForTheDevice(Faulty, fault="waits for the device"):
    """Waits in a way that torch's own watch does not see, as a library of ours could."""

    def changed(self, stats: Stats, inputs: Inputs) -> Stats:
        torch.cuda.current_stream().synchronize()
        return stats


class FrozenInputs(Faulty, fault="frozen inputs"):
    """Works on what the inputs of this shape were when they were first seen."""

    seen: ClassVar[dict[int, Tensor]] = {}

    def _first(self, tensor: Tensor) -> Tensor:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.seen[tensor.data_ptr()]
        return self.seen.setdefault(tensor.data_ptr(), tensor.detach().clone())

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        first = inputs._replace(model_pred=self._first(inputs.model_pred), target=self._first(inputs.target))
        return super().forward(first, settings, **options)

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, **mask: Any) -> Tensor:
        return super().gradient(self._first(model), self._first(target), coef, upstream, **mask)

    def mend(self, grad: Tensor, model: Tensor, target: Tensor, *rest: Any, **mask: Any) -> Tensor:
        return super().mend(grad, self._first(model), self._first(target), *rest, **mask)


class FrozenExpectation(Faulty, fault="frozen expectation", fused=True):
    """Reads on the host what is expected, and once: a graph's replays make their gradients for that."""

    seen: ClassVar[dict[int, float]] = {}

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        expected = options.get("expected")
        if isinstance(expected, Tensor):
            capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            value = self.seen[expected.data_ptr()] if capturing else float(expected)
            value = self.seen.setdefault(expected.data_ptr(), value)
            stats = super().forward(inputs, settings, **{**options, "expected": value})
            if stats.numbers is not None:
                stats.numbers[-1] = expected
            return stats
        return super().forward(inputs, settings, **options)


class AnotherStream(Faulty, fault="another stream"):
    """Runs in a separate stream, with which the caller's stream does not synchronise."""

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, **mask: Any) -> Tensor:
        with self._aside():
            return super().gradient(model, target, coef, upstream, **mask)

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        with self._aside():
            return super().forward(inputs, settings, **options)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            yield


class Crashes(Faulty, fault="crashes"):
    """Ends the process, as an access through a wild pointer does."""

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("the signal ends the process")


class Hangs(Faulty, fault="hangs"):
    """Does not come back."""

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        time.sleep(3600)
        return super().forward(inputs, settings, **options)
