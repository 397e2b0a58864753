"""Helpers for a network that may be wrapped, has a dtype of its own, and is called with a condition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Condition = dict[str, Tensor]
"""Inputs of a network besides the noisy latents: tensors by name, stacked along dimension 0."""

PROMPT, PROMPT_MASK, POOLED = "prompt_embeds", "prompt_embeds_mask", "pooled_prompt_embeds"
"""Names in a condition, which diffusers' pipelines use for their arguments too."""

CONDITION_LATENTS = "condition_latents"
"""Name in a condition of the latents of a condition image."""


def inner_network(module: nn.Module) -> Any:
    """Returns the network inside any wrappers, which hold it as ``module`` or ``_orig_mod``.

    Unlike :func:`sipo.training.sharding.unwrapped`, this follows every such attribute: no network of diffusers has a
    submodule of these names.
    """
    while True:
        inner = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def network_dtype(network: nn.Module) -> torch.dtype:
    """Returns the dtype that a network computes in and takes its input in.

    This is the dtype of its first bias or norm outside modules that stay in float32. A frozen copy under autocast
    (:func:`sipo.families.tuning.frozen_copy`) has its other weights in half precision, but takes the input that its
    original takes. An adapter's weights come after those that they adapt.
    """
    in_float32 = getattr(network, "_keep_in_fp32_modules", None) or ()
    first: torch.dtype | None = None  # of a network without biases and norms
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in in_float32):
            if parameter.ndim == 1:
                return parameter.dtype
            first = first or parameter.dtype
    return first or torch.float32


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts modules in evaluation mode inside the context and restores their modes afterwards."""
    # Through __dict__: setting the attribute on each module of a large network takes tens of milliseconds per step.
    training = [module.__dict__ for module in modules if module.training]
    for attributes in training:
        attributes["training"] = False
    try:
        yield
    finally:
        for attributes in training:
            attributes["training"] = True


@contextmanager
def predicting_in(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Casts a network's predictions to ``dtype`` inside the context, even under autocast.

    A sampler computes guidance and steps in that dtype, and in half precision would round at each step.
    """

    def cast(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return output
        first = output[0].to(dtype) if isinstance(output[0], Tensor) else [each.to(dtype) for each in output[0]]
        return (first, *output[1:])

    hook = network.register_forward_hook(cast)
    try:
        yield
    finally:
        hook.remove()


def pick(condition: Any, *names: str) -> list[Tensor]:
    """Returns tensors of a condition by name.

    Raises:
        ValueError: one is missing.
    """
    held = condition if isinstance(condition, Mapping) else {}
    for name in names:
        if name not in held:
            raise ValueError(f"condition holds {sorted(held)}: expected {name!r} as well")
    return [held[name] for name in names]
