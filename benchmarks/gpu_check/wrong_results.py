"""Backends whose results are wrong on purpose: gradients, what becomes of the upstream gradient, numbers and sums."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sipo_kernels import METRICS, Totals
from sipo_kernels.backends.interface import Stats
from sipo_kernels.inputs import Inputs
from sipo_kernels.layout import dense_sample_strides
from sipo_kernels.options import Settings
from sipo_kernels.output import COEF_ROW

FAULTS: dict[str, type[Faulty]] = {}
# Faults that plain torch cannot have: it makes no gradient in the forward pass, nor metrics and sums in a kernel.
OF_FUSED: set[str] = set()


class Faulty:
    """A backend's module with one fault; subclasses name theirs, this class has none."""

    def __init_subclass__(cls, fault: str = "", fused: bool = False) -> None:
        if fault:
            FAULTS[fault] = cls
        if fused:
            OF_FUSED.add(fault)

    def __init__(self, module: Any) -> None:
        self.real = module

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        """Runs forward with ``options`` with_grad, expected and totals, as far as they are given."""
        return self.changed(self.real.forward(inputs, settings, **options), inputs)

    def changed(self, stats: Stats, inputs: Inputs) -> Stats:
        """Returns the results of the forward pass with the fault."""
        return stats

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, **mask: Any) -> Tensor:
        return self.real.gradient(model, target, coef, upstream, **mask)

    def mend(self, grad: Tensor, model: Tensor, target: Tensor, *rest: Any, **mask: Any) -> Tensor:
        """Corrects the gradient; ``rest`` is coef, upstream, numbers and what is remembered."""
        return self.real.mend(grad, model, target, *rest, **mask)


def made_for(numbers: Tensor, upstream: Tensor) -> bool:
    """Whether a gradient beside these numbers was made for what came. Reads both: not for what must not wait."""
    return bool((upstream == numbers[-1]).all())


class _Gradient(Faulty):
    """A fault in the gradient alone, wherever it comes from: :meth:`spoil` gets each one once."""

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        raise NotImplementedError

    def changed(self, stats: Stats, inputs: Inputs) -> Stats:
        if stats.grad.numel() == 0:
            return stats
        return stats._replace(grad=self.spoil(stats.grad, inputs.model_pred, inputs.target, stats.samples[COEF_ROW]))

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, **mask: Any) -> Tensor:
        return self.spoil(super().gradient(model, target, coef, upstream, **mask), model, target, coef)

    def mend(self, grad: Tensor, model: Tensor, target: Tensor, *rest: Any, **mask: Any) -> Tensor:
        coef, upstream, numbers = rest[:3]
        mended = super().mend(grad, model, target, *rest, **mask)
        return mended if made_for(numbers, upstream) else self.spoil(mended, model, target, coef)


class ScaledGradient(Faulty, fault="scaled gradient"):
    """A thousandth too large, before it is rounded."""

    def changed(self, stats: Stats, inputs: Inputs) -> Stats:
        stats.samples[COEF_ROW] *= 1.001
        if stats.grad.numel() and stats.numbers is not None:
            coef, upstream = stats.samples[COEF_ROW], stats.numbers[-1].clone()
            grad = self.real.gradient(inputs.model_pred, inputs.target, coef, upstream, error_mask=inputs.error_mask)
            stats = stats._replace(grad=grad)
        return stats


class ErrorMaskIgnored(Faulty, fault="error mask ignored"):
    """As if every element counted."""

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        return super().forward(inputs._replace(error_mask=None), settings, **options)

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, **mask: Any) -> Tensor:
        return super().gradient(model, target, coef, upstream)

    def mend(self, grad: Tensor, model: Tensor, target: Tensor, *rest: Any, **mask: Any) -> Tensor:
        return super().mend(grad, model, target, *rest)


class UnwrittenElement(_Gradient, fault="unwritten element"):
    """The last element holds what the memory held."""

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        unwritten = torch.empty_like(grad)
        grad[(-1,) * grad.ndim] = unwritten.flatten()[-1]
        return grad


class StorageOrder(_Gradient, fault="gradient in storage order"):
    """Values in the order of indices, where the layout's own order is due."""

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        if dense_sample_strides(grad) is None or grad.is_contiguous() or grad.ndim < 2:
            return grad
        in_order = torch.empty_like(grad)
        in_order.as_strided((grad.numel(),), (1,)).copy_(grad.reshape(-1))
        return in_order


class WanderingGradient(_Gradient, fault="wandering gradient"):
    """One element moves by one unit in the last place from call to call."""

    calls = 0

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        type(self).calls += 1
        if type(self).calls % 4 == 0:
            first = (0,) * grad.ndim
            grad[first] = torch.nextafter(grad[first], torch.full_like(grad[first], 1e4))
        return grad


class MaskedPairsLeak(_Gradient, fault="masked pairs leak"):
    """A masked pair gets 0 · (its elements) in place of 0, which is NaN where one of them is not finite."""

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        masked = (coef == 0).reshape(-1, *[1] * (model.ndim - 1))
        grad.copy_(torch.where(masked, 0 * model.detach().to(grad.dtype), grad))
        return grad


class NanLeaks(_Gradient, fault="NaN leaks"):
    """One sum over the whole batch in every pair's gradient: nothing but where something is not finite."""

    def spoil(self, grad: Tensor, model: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        nothing = 0 * (model.detach().double().sum() + target.double().sum())
        return grad.add_(nothing.to(grad.dtype))


class TwiceHandedOut(Faulty, fault="gradient handed out twice"):
    """The second backward gets the tensor that the first one handed out."""

    last: Tensor | None = None

    def changed(self, stats: Stats, inputs: Inputs) -> Stats:
        type(self).last = stats.grad if stats.grad.numel() else None
        return stats

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, **mask: Any) -> Tensor:
        kept = type(self).last
        if kept is not None and kept.shape == model.shape:
            return kept
        type(self).last = super().gradient(model, target, coef, upstream, **mask)
        return type(self).last  # type: ignore[return-value]


# ---- The upstream gradient -------------------------------------------------------------------------------------------


class UpstreamIgnored(Faulty, fault="upstream ignored"):
    """As if every upstream gradient were 1."""

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        return super().forward(inputs, settings, **{**options, "expected": 1.0})

    def gradient(self, model: Tensor, target: Tensor, coef: Tensor, upstream: Tensor, **mask: Any) -> Tensor:
        return super().gradient(model, target, coef, torch.ones_like(upstream), **mask)

    def mend(self, grad: Tensor, *rest: Any, **mask: Any) -> Tensor:
        return grad


class ExpectationIgnored(Faulty, fault="expectation ignored", fused=True):
    """The gradient is made for 1, and said to be for what was expected."""

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        expected = options.pop("expected", 1.0)
        stats = super().forward(inputs, settings, **options)
        if stats.numbers is not None:
            stats.numbers[-1] = expected
        return stats


class MendSkipped(Faulty, fault="mend skipped", fused=True):
    """The gradient that the forward pass made is handed out whatever came."""

    def mend(self, grad: Tensor, *rest: Any, **mask: Any) -> Tensor:
        *_, upstream, _, remembered = rest
        if remembered is not None:
            remembered.copy_(upstream.flatten()[0])
        return grad


class MendScales(Faulty, fault="mend scales", fused=True):
    """What was made for another upstream gradient, and rounded, is scaled and rounded again."""

    def mend(self, grad: Tensor, model: Tensor, target: Tensor, *rest: Any, **mask: Any) -> Tensor:
        coef, upstream, numbers, _ = rest
        rounded = grad.clone()
        mended = super().mend(grad, model, target, *rest, **mask)
        if made_for(numbers, upstream) or not bool(torch.isfinite(upstream / numbers[-1]).all()):
            return mended
        factor = (upstream / numbers[-1]).expand(len(coef) // 2).repeat(2)
        return mended.copy_(rounded * factor.reshape(-1, *[1] * (rounded.ndim - 1)))


class MendsOnePair(Faulty, fault="mend mixes pairs", fused=True):
    """Where pairs have upstream gradients of their own, the last one's comes to all that differ."""

    def mend(self, grad: Tensor, model: Tensor, target: Tensor, *rest: Any, **mask: Any) -> Tensor:
        coef, upstream, numbers, remembered = rest
        if upstream.ndim:
            upstream = upstream[-1:].expand(upstream.shape)
        return super().mend(grad, model, target, coef, upstream, numbers, remembered, **mask)


class MendsBeside(Faulty, fault="mend beside", fused=True):
    """A second gradient is made beside the first."""

    def mend(self, grad: Tensor, model: Tensor, target: Tensor, *rest: Any, **mask: Any) -> Tensor:
        coef, upstream, numbers, _ = rest
        return grad if made_for(numbers, upstream) else self.real.gradient(model, target, coef, upstream, **mask)


class NothingRemembered(Faulty, fault="nothing remembered", fused=True):
    """What came is not kept for the next call."""

    def mend(self, grad: Tensor, model: Tensor, target: Tensor, *rest: Any, **mask: Any) -> Tensor:
        coef, upstream, numbers, _ = rest
        return super().mend(grad, model, target, coef, upstream, numbers, None, **mask)


class InfinityRemembered(Faulty, fault="infinity remembered", fused=True):
    """What came is kept whatever it is."""

    def mend(self, grad: Tensor, *rest: Any, **mask: Any) -> Tensor:
        mended = super().mend(grad, *rest, **mask)
        *_, upstream, _, remembered = rest
        if remembered is not None:
            remembered.copy_(upstream.flatten()[0])
        return mended


# ---- Numbers ---------------------------------------------------------------------------------------------------------


class ShiftedLogits(Faulty, fault="shifted logits"):
    """Logits, and the loss with them, off by 1e-3."""

    def changed(self, stats: Stats, inputs: Inputs) -> Stats:
        return stats._replace(logits=stats.logits * 1.001 + 1e-3)


class WanderingLogits(Faulty, fault="wandering logits"):
    """The last logit moves by one unit in the last place from call to call."""

    calls = 0

    def changed(self, stats: Stats, inputs: Inputs) -> Stats:
        type(self).calls += 1
        if type(self).calls % 4 == 0:
            stats.logits[-1] = torch.nextafter(stats.logits[-1], torch.full_like(stats.logits[-1], 1e4))
        return stats


class WrongMetrics(Faulty, fault="wrong metrics", fused=True):
    """One metric in another one's place."""

    def changed(self, stats: Stats, inputs: Inputs) -> Stats:
        if stats.numbers is not None:
            chosen, rejected = METRICS.index("chosen_gap"), METRICS.index("rejected_gap")
            stats.numbers[[chosen, rejected]] = stats.numbers[[rejected, chosen]]
        return stats


class _Sums(Faulty):
    """A fault in what a call adds to its totals, and in nothing else."""

    def spoil(self, before: Totals, after: Totals) -> None:
        """Changes the sums ``after``, in place."""
        raise NotImplementedError

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        totals = options.get("totals")
        if totals is None:
            return super().forward(inputs, settings, **options)
        metrics, levels = (None if sums is None else sums.clone() for sums in totals[:2])
        before = totals._replace(metrics=metrics, levels=levels)
        stats = super().forward(inputs, settings, **options)
        self.spoil(before, totals)
        return stats


class TotalsNotAdded(_Sums, fault="totals not added", fused=True):
    """Sums begin again at each call."""

    def spoil(self, before: Totals, after: Totals) -> None:
        for old, new in zip(before[:2], after[:2], strict=True):
            if old is not None and new is not None:
                new -= old


class TotalsTwice(_Sums, fault="totals twice", fused=True):
    """Each call's numbers are added twice."""

    def spoil(self, before: Totals, after: Totals) -> None:
        for old, new in zip(before[:2], after[:2], strict=True):
            if old is not None and new is not None:
                new += new - old


class NeighboursBin(_Sums, fault="neighbour's bin", fused=True):
    """What belongs into a bin of noise levels is added to the next one."""

    def spoil(self, before: Totals, after: Totals) -> None:
        if before.levels is not None and after.levels is not None:
            after.levels.copy_(before.levels + (after.levels - before.levels).roll(1, 1))


class WanderingTotals(_Sums, fault="wandering totals", fused=True):
    """A sum moves by one unit in the last place from call to call."""

    calls = 0

    def spoil(self, before: Totals, after: Totals) -> None:
        type(self).calls += 1
        if after.metrics is not None and type(self).calls % 4 == 0:
            after.metrics[0, 0] = torch.nextafter(after.metrics[0, 0], torch.full_like(after.metrics[0, 0], 1e4))


class SkipIgnored(Faulty, fault="skip ignored"):
    """``nonfinite="skip"`` does nothing."""

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        return super().forward(inputs, dataclasses.replace(settings, nonfinite="propagate"), **options)


class MaskIgnored(Faulty, fault="mask ignored"):
    """``mask_threshold`` does nothing."""

    def forward(self, inputs: Inputs, settings: Settings, **options: Any) -> Stats:
        return super().forward(inputs, dataclasses.replace(settings, mask_threshold=0.0), **options)
