"""Backends that are wrong on purpose, and the self-test: every check must catch the faults that it names.

A fault wraps a backend's module where ``pair_loss.py`` looks it up, so that everything above it runs as it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_check.context import CHECKS, Context, NotRun
from sipo_kernels import backends
from sipo_kernels.contract import Stats, dense_sample_strides

# Rows of Stats.samples: see contract.py.
COEF = 5


class Faulty:
    """A backend's module with one thing wrong; by itself, nothing is."""

    def __init__(self, module: Any) -> None:
        self.real = module

    def forward(
        self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, with_grad: bool, settings: Any
    ) -> Stats:
        return self.real.forward(model, ref, target, *numbers, settings, with_grad)

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
        return self.real.gradient(model, target, coef, upstream)

    def mend(self, fused: Tensor, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
        return self.real.mend(fused, model, target, coef, upstream)


class _Gradient(Faulty):
    """A fault in the gradient alone, wherever it comes from: :meth:`spoil` gets each one once."""

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        stats = super().forward(model, ref, target, *numbers, **options)
        if not options["with_grad"] or stats.grad.numel() == 0:
            return stats
        return stats._replace(grad=self.spoil(stats.grad, model, target, stats.samples[COEF]))

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
        return self.spoil(super().gradient(model, target, coef, upstream), model, target, coef)

    def mend(self, fused: Tensor, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
        found = super().mend(fused, model, target, coef, upstream)
        return found if found is fused else self.spoil(found, model, target, coef)


class ScaledGradient(Faulty):
    """A thousandth too large, before it is rounded."""

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        stats = super().forward(model, ref, target, *numbers, **options)
        stats.samples[COEF] *= 1.001
        if options["with_grad"] and stats.grad.numel():
            one = torch.ones(1, dtype=stats.loss.dtype, device=model.device).reshape(())
            stats = stats._replace(grad=self.real.gradient(model, target, stats.samples[COEF], one))
        return stats


class UnwrittenElement(_Gradient):
    """The last element holds what the memory held."""

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        found = torch.empty_like(grad)
        last = found.flatten()[-1].clone()
        found.copy_(grad)
        found[(-1,) * found.ndim] = last
        return found


class StorageOrder(_Gradient):
    """Values in the order of indices, where the layout's own order is due."""

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        if dense_sample_strides(grad) is None or grad.is_contiguous() or grad.ndim < 2:
            return grad
        plain = grad.contiguous()
        found = torch.empty_like(grad)
        found.as_strided((grad.numel(),), (1,)).copy_(plain.reshape(-1))
        return found


class WanderingGradient(_Gradient):
    """One element moves by one unit in the last place from call to call."""

    calls = 0

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        type(self).calls += 1
        if type(self).calls % 4 == 0:
            first = (0,) * grad.ndim
            grad[first] = torch.nextafter(grad[first], torch.full_like(grad[first], 1e4))
        return grad


class MaskedPairsLeak(_Gradient):
    """A masked pair gets 0 · (its elements) in place of 0, which is NaN where one of them is not finite."""

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        masked = (coef == 0).reshape(-1, *[1] * (model.ndim - 1))
        grad.copy_(torch.where(masked, 0 * model.detach().to(grad.dtype), grad))
        return grad


class NanLeaks(_Gradient):
    """One sum over the whole batch in every pair's gradient: nothing but where something is not finite."""

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        nothing = 0 * (model.detach().double().sum() + target.double().sum())
        return grad.add_(nothing.to(grad.dtype))


class TwiceHandedOut(Faulty):
    """The second backward gets the tensor that the first one handed out."""

    last: Tensor | None = None

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        stats = super().forward(model, ref, target, *numbers, **options)
        type(self).last = stats.grad if stats.grad.numel() else None
        return stats

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
        kept = type(self).last
        if kept is not None and kept.shape == model.shape:
            return kept
        type(self).last = super().gradient(model, target, coef, upstream)
        return type(self).last  # type: ignore[return-value]


class UpstreamIgnored(Faulty):
    """As if every upstream gradient were 1."""

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
        return super().gradient(model, target, coef, torch.ones_like(upstream))

    def mend(self, fused: Tensor, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
        return fused


class ShiftedLogits(Faulty):
    """Logits, and the loss with them, off by 1e-3."""

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        stats = super().forward(model, ref, target, *numbers, **options)
        return stats._replace(logits=stats.logits * 1.001 + 1e-3)


class WanderingLogits(Faulty):
    """The last logit moves by one unit in the last place from call to call."""

    calls = 0

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        stats = super().forward(model, ref, target, *numbers, **options)
        type(self).calls += 1
        if type(self).calls % 4 == 0:
            stats.logits[-1] = torch.nextafter(stats.logits[-1], torch.full_like(stats.logits[-1], 1e4))
        return stats


class SkipIgnored(Faulty):
    """``nonfinite="skip"`` does nothing."""

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        options["settings"] = options["settings"]._replace(skip_nonfinite=False)
        return super().forward(model, ref, target, *numbers, **options)


class MaskIgnored(Faulty):
    """``mask_threshold`` does nothing."""

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        options["settings"] = options["settings"]._replace(mask_threshold=0.0)
        return super().forward(model, ref, target, *numbers, **options)


class AllocatesACopy(Faulty):
    """A copy of the policy's output is alive beside the gradient."""

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
        copy = model.clone()
        return super().gradient(copy, target, coef, upstream)

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        copy = model.detach().clone()
        stats = super().forward(copy, ref, target, *numbers, **options)
        return stats


class LaunchesAgain(Faulty):
    """The same forward four times over."""

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        for _ in range(3):
            super().forward(model, ref, target, *numbers, **options)
        return super().forward(model, ref, target, *numbers, **options)


class ReadsOnTheHost(Faulty):
    """A look at the loss, once it is made."""

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        stats = super().forward(model, ref, target, *numbers, **options)
        stats.loss.sum().item()
        return stats


class WaitsForTheDevice(Faulty):
    """Waits in a way that torch's own watch does not see, as a library of ours could."""

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        stats = super().forward(model, ref, target, *numbers, **options)
        torch.cuda.current_stream().synchronize()
        return stats


class FrozenInputs(Faulty):
    """Works on what the inputs of this shape were when they were first seen."""

    seen: ClassVar[dict[int, Tensor]] = {}

    def _first(self, tensor: Tensor) -> Tensor:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.seen[tensor.data_ptr()]
        return self.seen.setdefault(tensor.data_ptr(), tensor.detach().clone())

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        return super().forward(self._first(model), ref, self._first(target), *numbers, **options)

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
        return super().gradient(self._first(model), self._first(target), coef, upstream)


class AnotherStream(Faulty):
    """Works in a stream of its own, which nobody waits for."""

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor) -> Tensor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            return super().gradient(model, target, coef, upstream)

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            return super().forward(model, ref, target, *numbers, **options)


class Crashes(Faulty):
    """Ends the process, as an access through a wild pointer does."""

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)
        return super().forward(model, ref, target, *numbers, **options)


class Hangs(Faulty):
    """Does not come back."""

    def forward(self, model: Tensor, ref: Tensor | None, target: Tensor, *numbers: Any, **options: Any) -> Stats:
        time.sleep(3600)
        return super().forward(model, ref, target, *numbers, **options)


FAULTS: dict[str, type[Faulty]] = {
    "scaled gradient": ScaledGradient,
    "unwritten element": UnwrittenElement,
    "gradient in storage order": StorageOrder,
    "wandering gradient": WanderingGradient,
    "masked pairs leak": MaskedPairsLeak,
    "NaN leaks": NanLeaks,
    "gradient handed out twice": TwiceHandedOut,
    "upstream ignored": UpstreamIgnored,
    "shifted logits": ShiftedLogits,
    "wandering logits": WanderingLogits,
    "skip ignored": SkipIgnored,
    "mask ignored": MaskIgnored,
    "allocates a copy": AllocatesACopy,
    "launches again": LaunchesAgain,
    "reads on the host": ReadsOnTheHost,
    "waits for the device": WaitsForTheDevice,
    "frozen inputs": FrozenInputs,
    "another stream": AnotherStream,
    # For the processes around the checks, and named by none of them.
    "crashes": Crashes,
    "hangs": Hangs,
}


@contextlib.contextmanager
def injected(name: str) -> Iterator[None]:
    """Every backend has fault ``name`` meanwhile."""
    kind, real = FAULTS[name], backends.module
    for attribute in ("calls", "last", "seen"):  # what a fault remembers between calls starts afresh
        if hasattr(kind, attribute):
            setattr(kind, attribute, type(getattr(kind, attribute))())

    def module(backend: str) -> Any:
        faulty = kind(real(backend))

        def forward(*args: Any) -> Stats:
            *tensors, settings, with_grad = args
            return faulty.forward(*tensors, settings=settings, with_grad=with_grad)

        return SimpleNamespace(forward=forward, gradient=faulty.gradient, mend=faulty.mend)

    backends.module = module
    try:
        yield
    finally:
        backends.module = real


class SelfTestRow(NamedTuple):
    """One check with one fault: ``"caught"``, ``"missed"``, ``"not run"`` (without one: ``"passes"``); what it said."""

    check: str
    fault: str
    outcome: str
    said: str


def try_check(name: str, context: Context, fault: str | None) -> SelfTestRow:
    """Runs a check on a backend with a fault (or without: a check must pass before its failures mean anything)."""
    if CHECKS[name].needs_gpu and not context.on_gpu:
        return SelfTestRow(name, fault or "", "not run", "needs a GPU")
    try:
        with injected(fault) if fault else contextlib.nullcontext():
            CHECKS[name].run(context)
    except AssertionError as said:
        return SelfTestRow(name, fault or "", "caught" if fault else "missed", str(said))
    except NotRun as why:
        return SelfTestRow(name, fault or "", "not run", str(why))
    return SelfTestRow(name, fault or "", "missed" if fault else "passes", "")


def self_test(backend: str, device: str, report: Callable[[SelfTestRow], None]) -> bool:
    """Every check without a fault and with each fault that it names, quickly; whether all is as it should be."""
    good = True
    for name, check in CHECKS.items():
        for fault in (None, *check.faults):
            try:
                row = try_check(name, Context(backend, device, quick=True), fault)
            except Exception as error:  # a fault must end in a failed comparison, not in an accident
                row = SelfTestRow(name, fault or "", "missed", f"{type(error).__name__}: {error}")
            good = good and row.outcome != "missed"
            report(row)
    return good
