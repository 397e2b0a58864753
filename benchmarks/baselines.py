"""What the pair loss is measured against, and under which names: plain torch, torch.compile, each backend of ours.

All compute the SIPO loss of ``docs/math.md`` §2-5 from the same inputs; nothing here is used by the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import BETA
from sipo_kernels import backends, pair_loss

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

PUBLISHED = "torch, input dtype"
UPCAST = "torch, float32"
COMPILED = "torch.compile, float32"
AUTOTUNED = "torch.compile max-autotune, float32"
# max-autotune replays CUDA graphs, which copy inputs that are not parameters: large latents are quicker without.
AUTOTUNED_NO_GRAPHS = "torch.compile max-autotune-no-cudagraphs, float32"
_COMPILE_MODES = {COMPILED: None, AUTOTUNED: "max-autotune", AUTOTUNED_NO_GRAPHS: "max-autotune-no-cudagraphs"}
OURS = "sipo "


def published(model_pred: Tensor, ref_pred: Tensor, target: Tensor, ratio_scale: Tensor, beta: float) -> Tensor:
    """The loss block of a Diffusion-DPO script with SIPO's weights, in whatever type the inputs have."""
    dims = list(range(1, model_pred.ndim))
    model_error = (model_pred - target).pow(2).mean(dim=dims)
    ref_error = (ref_pred - target).pow(2).mean(dim=dims)
    ratio = torch.exp(-ratio_scale * model_error.detach())
    weight = ratio.clamp(0.9, 1.1)
    ratio_w, ratio_l = ratio.chunk(2)
    mask = (torch.minimum(ratio_w, ratio_l) >= 0.9).to(model_error.dtype)
    gap_w, gap_l = (weight * (model_error - ref_error)).chunk(2)
    return (mask * -F.logsigmoid(-0.5 * beta * (gap_w - gap_l))).mean()


def upcast(model_pred: Tensor, ref_pred: Tensor, target: Tensor, ratio_scale: Tensor, beta: float) -> Tensor:
    """:func:`published` after ``.float()`` on every input, as careful scripts do."""
    return published(model_pred.float(), ref_pred.float(), target.float(), ratio_scale, beta)


def truth(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Loss and ``model_pred``'s gradient in float64: what every implementation is checked with before it is timed."""
    model, ref, target, scale = (t.detach().double() for t in inputs)
    model.requires_grad_()
    loss = published(model, ref, target, scale, BETA)
    (grad,) = torch.autograd.grad(loss, model)
    return loss.detach(), grad


def compiled_names(device: str, autotune: bool) -> list[str]:
    """Names of torch.compile's variants; CUDA graphs are a GPU's."""
    names = [COMPILED]
    if autotune:
        names += [AUTOTUNED] if device == "cpu" else [AUTOTUNED, AUTOTUNED_NO_GRAPHS]
    return names


def available(device: str) -> tuple[list[str], dict[str, str]]:
    """Our backends that can run on ``device``, and those that cannot: name → why.

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


def implementations(inputs: Inputs, device: str, autotune: bool) -> dict[str, Callable[[], Tensor]]:
    """Name → a function that makes the loss of the batch. Compilation waits for the first call."""
    torch._dynamo.reset()  # every case is compiled for its own sizes, and earlier CUDA graphs give their memory back
    model, ref, target, scale = inputs

    def compiled(mode: str | None) -> Callable[[], Tensor]:
        function = torch.compile(upcast, mode=mode, dynamic=False, fullgraph=True)
        return lambda: function(model, ref, target, scale, BETA)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: pair_loss(model, ref, target, method="sipo", beta=BETA, ratio_scale=scale, backend=backend).loss

    found: dict[str, Callable[[], Tensor]] = {
        PUBLISHED: lambda: published(model, ref, target, scale, BETA),
        UPCAST: lambda: upcast(model, ref, target, scale, BETA),
    }
    found.update({name: compiled(_COMPILE_MODES[name]) for name in compiled_names(device, autotune)})
    found.update({OURS + name: ours(name) for name in available(device)[0]})
    return found
