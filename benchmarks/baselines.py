"""What the pair loss is measured against, and under which names: plain torch, torch.compile, each backend of ours.

All compute the SIPO loss of ``docs/math.md`` §2-5 from the same inputs, and their gradient for the same upstream
gradient; nothing here is used by the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import BETA, LossInputs
from sipo_kernels import backends, pair_loss
from sipo_kernels.layout import pair_dtype

PUBLISHED = "torch, input dtype"
UPCAST = "torch, float32"
COMPILED = "torch.compile, float32"
AUTOTUNED = "torch.compile max-autotune, float32"
# max-autotune replays CUDA graphs, which copy inputs that are not parameters: large latents are faster without.
AUTOTUNED_NO_GRAPHS = "torch.compile max-autotune-no-cudagraphs, float32"
_COMPILE_MODES = {COMPILED: None, AUTOTUNED: "max-autotune", AUTOTUNED_NO_GRAPHS: "max-autotune-no-cudagraphs"}
OURS = "sipo "


def published(
    model_pred: Tensor,
    ref_pred: Tensor | None,
    target: Tensor,
    ratio_scale: Tensor,
    beta: float,
    ref_error: Tensor | None = None,
) -> Tensor:
    """Computes the loss as a Diffusion-DPO script does, with SIPO's weights, in the type of the inputs.

    A target that a pair shares is read where it lies: a script's ``torch.cat`` would copy it.
    """
    model_error = _mean_squares(model_pred, target)
    if ref_pred is not None:
        ref_error = _mean_squares(ref_pred, target)
    assert ref_error is not None  # one of the two is given
    ratio = torch.exp(-ratio_scale * model_error.detach())
    weight = ratio.clamp(0.9, 1.1)
    mask = (torch.minimum(*ratio.chunk(2)) >= 0.9).to(model_error.dtype)
    chosen_gap, rejected_gap = (weight * (model_error - ref_error)).chunk(2)
    return (mask * -F.logsigmoid(-0.5 * beta * (chosen_gap - rejected_gap))).mean()


def _mean_squares(pred: Tensor, target: Tensor) -> Tensor:
    """Returns ``[S]`` mean squared differences."""
    shared = target.shape != pred.shape
    difference = (pred.unflatten(0, (2, -1)) - target).flatten(0, 1) if shared else pred - target
    return difference.pow(2).mean(dim=list(range(1, pred.ndim)))


def upcast(model_pred: Tensor, ref_pred: Tensor | None, target: Tensor, *rest: Any) -> Tensor:
    """Runs :func:`published` after ``.float()`` on every prediction and the target, as careful scripts do."""
    ref = None if ref_pred is None else ref_pred.float()
    return published(model_pred.float(), ref, target.float(), *rest)


def truth(batch: LossInputs) -> tuple[Tensor, Tensor]:
    """Returns the loss, and ``model_pred``'s gradient for the batch's upstream gradient, in float64.

    What every implementation is checked with before it is timed.
    """
    model, ref, target, scale, ref_error, upstream = (None if t is None else t.detach().double() for t in batch)
    assert model is not None and target is not None and scale is not None and upstream is not None
    model.requires_grad_()
    loss = published(model, ref, target, scale, BETA, ref_error)
    (grad,) = torch.autograd.grad(loss, model, upstream)
    return loss.detach(), grad


def available(device: str) -> tuple[list[str], dict[str, str]]:
    """Returns our backends that can run on ``device``, and those that cannot: name → why.

    Triton's interpreter on a CPU is for tests and not counted as running.
    """
    names, missing = [], {}
    for name in backends.BACKENDS:
        status = backends.status(name, device)
        if name == "triton" and device == "cpu":
            missing[OURS + name] = "Triton runs on a CPU in its interpreter only, which is for tests"
        elif status.available:
            names.append(name)
        else:
            missing[OURS + name] = status.reason
    return names, missing


def implementations(batch: LossInputs, device: str, autotune: bool) -> dict[str, Callable[[], Tensor]]:
    """Returns name → a function that makes the loss of the batch. Compilation waits for the first call."""
    torch._dynamo.reset()  # every case is compiled for its own sizes, and earlier CUDA graphs give their memory back
    model, ref, target, scale, ref_error, _ = batch
    tensors = model, ref, target, scale, BETA, ref_error

    def compiled(mode: str | None) -> Callable[[], Tensor]:
        function = torch.compile(upcast, mode=mode, dynamic=False, fullgraph=True)
        return lambda: function(*tensors)

    names = [COMPILED]
    if autotune:  # CUDA graphs are a GPU's
        names += [AUTOTUNED] if device == "cpu" else [AUTOTUNED, AUTOTUNED_NO_GRAPHS]
    return {
        PUBLISHED: lambda: published(*tensors),
        UPCAST: lambda: upcast(*tensors),
        **{name: compiled(_COMPILE_MODES[name]) for name in names},
        **{OURS + name: ours(name, batch) for name in available(device)[0]},
    }


def ours(backend: str, batch: LossInputs, expected: Tensor | None = None) -> Callable[[], Tensor]:
    """The loss of the batch as :class:`sipo.SIPOLoss` has it made in training: for the last upstream gradient again.

    Args:
        backend: which one.
        batch: of one call after another.
        expected: where the last upstream gradient is remembered, to be shared by several batches.
    """
    device = batch.model_pred.device
    remembered = torch.ones((), dtype=pair_dtype(device), device=device) if expected is None else expected

    def loss() -> Tensor:
        return pair_loss(
            *batch[:3], method="sipo", beta=BETA, ratio_scale=batch.ratio_scale, ref_error=batch.ref_error,
            expected_upstream=remembered, backend=backend,
        ).loss  # fmt: skip

    return loss
