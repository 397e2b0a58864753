"""The public function of the pair loss, its autograd functions, and its operators with their fake implementations.

:func:`pair_loss` checks a batch (``inputs.py``), chooses a backend (``backends/``) and calls it. The backend computes
every number of docs/math.md §2 to §5 and §8, a gradient coefficient for each sample (§6) and, if it fuses the gradient
into its forward pass, the gradient for the expected upstream gradient. The backward pass returns that gradient, or
makes it again from the inputs if another upstream gradient came.

Ordinary tensors go to the backend directly (:class:`DirectPairLossFunction`). Under torch.compile, fake tensors,
tracing and tensor subclasses, the same backend runs behind the operators ``sipo::pair_loss`` and ``sipo::pair_grad``
(:class:`PairLossFunction`), whose call takes longer than a small batch.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sipo_kernels import backends
from sipo_kernels.backends.interface import Stats, empty_stats
from sipo_kernels.inputs import Inputs, check_extras, check_tensors
from sipo_kernels.layout import empty_grad, full_mask, has_lazy_bit, mask_sums
from sipo_kernels.options import LossOptions, OptionValues, Settings, make_settings, settings_of, show_options
from sipo_kernels.output import COEF_ROW, PairLossOutput, Totals, add_totals

if TYPE_CHECKING:
    from typing_extensions import Unpack

# In the order of the fields; nonfinite="raise" is left to pair_loss, and a backend skips or propagates.
_SCHEMA_TYPES = {"str": "str", "float": "float", "float | None": "float?"}
_SETTINGS_SCHEMA = ", ".join(f"{_SCHEMA_TYPES[str(f.type)]} {f.name}" for f in dataclasses.fields(Settings))
_OPS = torch.library.Library("sipo", "DEF")
_OPS.define(
    "pair_loss(Tensor model_pred, Tensor? ref_pred, Tensor target, Tensor? ratio_scale, Tensor? error_weight, "
    f"Tensor? ref_error, Tensor? error_mask, {_SETTINGS_SCHEMA}, str backend) -> "
    "(Tensor loss, Tensor samples, Tensor logits, Tensor mask)"
)
_OPS.define(
    "pair_grad(Tensor model_pred, Tensor target, Tensor coef, Tensor upstream, Tensor? error_mask, str backend) "
    "-> Tensor"
)
_TENSORS = len(Inputs._fields)


def _pair_loss_op(*args: Any) -> tuple[Tensor, ...]:
    return backends.module(args[-1]).forward(Inputs(*args[:_TENSORS]), Settings(*args[_TENSORS:-1]))[:4]


def _pair_loss_fake(*args: Any) -> tuple[Tensor, ...]:
    return empty_stats(Inputs(*args[:_TENSORS]), Settings(*args[_TENSORS:-1]), False)[:4]


def _pair_grad_op(*args: Any) -> Tensor:
    *tensors, error_mask, backend = args
    return backends.module(backend).gradient(*tensors, error_mask=error_mask)


def _pair_grad_fake(model_pred: Tensor, *_: Any) -> Tensor:
    return empty_grad(model_pred)


_OPS.impl("pair_loss", _pair_loss_op, "CompositeExplicitAutograd")
_OPS.impl("pair_grad", _pair_grad_op, "CompositeExplicitAutograd")
torch.library.register_fake("sipo::pair_loss", _pair_loss_fake, lib=_OPS)
torch.library.register_fake("sipo::pair_grad", _pair_grad_fake, lib=_OPS)

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _is_ordinary(*tensors: Tensor | None) -> bool:
    """Returns whether a backend may be called without the dispatcher: plain tensors, no tracing, no dispatch mode.

    Do not call it while compiling. Modes of ``__torch_function__`` (``torch.set_default_device``) need no operator:
    they see the torch calls that a backend makes.
    """
    if not _PLAIN.issuperset(map(type, tensors)) or is_in_torch_dispatch_mode() or torch._C._is_tracing():
        return False
    # The dispatcher gives an operator real memory in place of a lazy negative and of zeros without memory.
    return not any(tensor is not None and has_lazy_bit(tensor) for tensor in tensors)


def _refuse_tangents(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} has a tangent, and pair_loss does not support forward-mode AD: use loss.backward()"
            )


def _refuse_higher_order(upstream: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0:
        _refuse_tangents(upstream=upstream)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "pair_loss does not support double backward (create_graph=True): use sipo_kernels.reference.pair_loss"
        )


class PairLossFunction(torch.autograd.Function):
    """Calls the operators and returns the first four fields of :class:`Stats`; differentiable in ``model_pred``.

    The gradient is made in the backward pass, because a compiled graph must be functional.
    """

    @staticmethod
    def forward(ctx: Any, model_pred: Tensor, inputs: Inputs, settings: Settings, backend: str) -> tuple[Tensor, ...]:
        outputs = torch.ops.sipo.pair_loss(model_pred, *inputs[1:], *settings.values().values(), backend)
        samples = outputs[1]
        ctx.save_for_backward(model_pred, inputs.target, samples, inputs.error_mask)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_higher_order(upstream)
        if upstream is None or not ctx.needs_input_grad[0]:
            return None, None, None, None
        model_pred, target, samples, error_mask = ctx.saved_tensors
        coef = samples[COEF_ROW]
        grad = torch.ops.sipo.pair_grad(model_pred, target, coef, upstream, error_mask, ctx.backend)
        return grad, None, None, None


class _DirectCall:
    """The arguments of a direct call on its way through autograd and, after the forward, its results."""

    __slots__ = ("backend", "expected", "fuse", "inputs", "settings", "stats", "totals")

    stats: Stats

    def __init__(
        self,
        inputs: Inputs,
        settings: Settings,
        backend: str,
        fuse: bool,
        expected: Tensor | float,
        totals: Totals | None,
    ) -> None:
        self.inputs, self.settings, self.backend = inputs, settings, backend
        self.fuse, self.expected, self.totals = fuse, expected, totals

    def run(self) -> ModuleType:
        """Calls the backend, and returns it for the backward pass."""
        module = backends.module(self.backend)
        self.stats = module.forward(
            self.inputs, self.settings, with_grad=self.fuse, expected=self.expected, totals=self.totals
        )
        return module


class DirectPairLossFunction(torch.autograd.Function):
    """Calls the backend without the dispatcher; returns the loss and stores all results in the :class:`_DirectCall`.

    Autograd handles ``model_pred`` and the loss alone: each further tensor would take microseconds.
    """

    @staticmethod
    def forward(ctx: Any, model_pred: Tensor, call: _DirectCall) -> Tensor:
        ctx.module, ctx.backend = call.run(), call.backend
        ctx.save_for_backward(model_pred, call.inputs.target, call.stats.samples, call.inputs.error_mask)
        ctx.set_materialize_grads(False)
        ctx.fused_grad = call.stats.grad if call.fuse else None
        ctx.numbers = call.stats.numbers
        ctx.remembered = call.expected if isinstance(call.expected, Tensor) else None
        return call.stats.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, None]:
        _refuse_higher_order(upstream)
        if upstream is None or not ctx.needs_input_grad[0]:
            return None, None
        model_pred, target, samples, error_mask = ctx.saved_tensors
        coef = samples[COEF_ROW]
        grad, ctx.fused_grad = ctx.fused_grad, None  # handed out once: autograd may accumulate into what it is given
        if not _is_ordinary(upstream):
            del grad  # the operator makes another
            return torch.ops.sipo.pair_grad(model_pred, target, coef, upstream, error_mask, ctx.backend), None
        given = (model_pred, target, coef, upstream)
        if grad is None:
            return ctx.module.gradient(*given, error_mask=error_mask), None
        return ctx.module.mend(grad, *given, ctx.numbers, ctx.remembered, error_mask=error_mask), None


def pair_loss(
    model_pred: Tensor,
    ref_pred: Tensor | None,
    target: Tensor,
    *,
    ratio_scale: Tensor | None = None,
    error_weight: Tensor | None = None,
    ref_error: Tensor | None = None,
    error_mask: Tensor | None = None,
    expected_upstream: Tensor | float | None = None,
    totals: Totals | None = None,
    backend: str = "auto",
    options: LossOptions | None = None,
    **given: Unpack[OptionValues],
) -> PairLossOutput:
    """Computes the preference loss of ``B`` pairs, from network outputs to gradient (docs/math.md §2 to §6).

    Samples are stacked ``[chosen; rejected]`` along dimension 0, ``S = 2B``. The three large inputs may differ in
    dtype (bfloat16, float16, float32, float64) and lie in any layout; sums are accumulated in float32 or wider.

    Args:
        model_pred: ``[S, ...]`` output of the policy; the gradient flows here and has its dtype and layout.
        ref_pred: ``[S, ...]`` output of the frozen reference, or ``None`` with ``ref_error``.
        target: ``[S, ...]``, or ``[B, ...]`` if the chosen and the rejected sample share it.
        ratio_scale: ``[S]`` factor between error and log ratio (§3), ``inf`` at the terminal step. Only
            ``diffusion_dpo`` does without.
        error_weight: ``[S]`` optional weight of each sample's gap (ω(λ_t) of Diffusion-DPO).
        ref_error: ``[S]`` reference errors computed beforehand, in place of ``ref_pred``.
        error_mask: which elements count, and how much (§2): bool, or weights ≥ 0, which are read in float32.
            ``[S, ...]``, or ``[B, ...]`` if the chosen and the rejected sample share it, with 1 in place of any
            dimension after the first. Values are not checked; a weight that is not finite makes its pair not finite.
        expected_upstream: the upstream gradient that ``backward`` will bring: 1/n under accumulation, times a loss
            scale. The gradient is made for it in the forward pass; where another one comes it is made again, to the
            same bits. A number, or a 0-d float64 tensor on ``model_pred``'s device (float32 where the device has no
            float64), which the backward pass overwrites with what came, for the next call to expect. ``None`` expects
            1, and for float16, whose gradients underflow without their scale, leaves the gradient to the backward.
        totals: running sums on the device that the call's metrics and sums by noise level are added to (§8), without a
            launch of their own.
        backend: ``"auto"``, ``"eager"``, ``"triton"``, ``"native"`` or ``"cuda"``; ``SIPO_BACKEND`` sets what
            ``"auto"`` means.
        options: the options of the loss, in place of keyword arguments.
        **given: the fields of :class:`~sipo_kernels.LossOptions` by name: ``method``, ``beta``, ``ratio``, ...

    Returns:
        :class:`~sipo_kernels.PairLossOutput`; numbers are float32, or float64 if any large input is.

    Raises:
        TypeError: an input of the wrong type or dtype.
        ValueError: shapes, devices, ranges or choices that do not fit; a gradient asked of anything but
            ``model_pred``.
        RuntimeError: a named backend that cannot run here, with the reason.
        NotImplementedError: under a ``torch.func`` transform, or with an input that has a tangent (forward-mode AD).
        FloatingPointError: ``nonfinite="raise"`` and a pair that is not finite.
    """
    inputs = Inputs(model_pred, ref_pred, target, ratio_scale, error_weight, ref_error, error_mask)
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "pair_loss does not support torch.func transforms (vmap, grad, jvp): use loss.backward() on stacked pairs"
        )
    if not compiling and forward_ad._current_level >= 0:
        _refuse_tangents(**inputs._asdict())
    # check_tensors refuses a model_pred that is no batch.
    ndim = model_pred.ndim if isinstance(model_pred, Tensor) and model_pred.ndim else 4
    settings = (make_settings if compiling else settings_of)(ndim, options, given)
    check_tensors(inputs, settings)
    if error_mask is not None:
        error_mask = full_mask(error_mask, model_pred)
        inputs = inputs._replace(error_mask=error_mask)
    if expected_upstream is not None or totals is not None:
        check_extras(expected_upstream, totals, model_pred)
    selected = backends.choose(backend, model_pred.device)
    if compiling and settings.nonfinite == "raise":
        raise ValueError(
            "nonfinite='raise' reads the loss on the host and cannot be compiled: expected 'propagate' or 'skip'"
        )
    numbers: Tensor | None = None
    if not compiling and _is_ordinary(*inputs, None if totals is None else totals.pair_levels):
        needs_grad = model_pred.requires_grad and torch.is_grad_enabled()
        fuse = needs_grad and selected in backends.FUSED
        if expected_upstream is None:
            fuse, expected_upstream = fuse and model_pred.dtype != torch.float16, 1.0
        call = _DirectCall(inputs, settings, selected, fuse, expected_upstream, totals)
        if needs_grad:
            loss = DirectPairLossFunction.apply(model_pred, call)
        else:
            call.run()
            loss = call.stats.loss
        _, samples, logits, mask, _, numbers = call.stats
    else:
        loss, samples, logits, mask = PairLossFunction.apply(model_pred, inputs, settings, selected)
    clip_range = None if settings.method == "diffusion_dpo" else (1 - settings.clip_low, 1 + settings.clip_high)
    # Keyword arguments would double the time that this takes.
    output = PairLossOutput(
        loss, samples, logits, mask, clip_range, settings.loss_type, settings.skip_nonfinite, numbers
    )
    if totals is not None and numbers is None:  # no kernel has added to them
        elements = model_pred[0].numel() if error_mask is None else mask_sums(error_mask, model_pred.shape[0])
        add_totals(totals, output, elements / (settings.beta * settings.loss_scale(logits.shape[0])))
    if settings.nonfinite == "raise":
        broken = (~output.finite_pairs()).nonzero().flatten().tolist()
        if broken:
            raise FloatingPointError(f"pairs {broken} of {output.logits.shape[0]} are not finite (nonfinite='raise')")
    return output


show_options(pair_loss)
