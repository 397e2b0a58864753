"""Prepares training: refuses what cannot be trained, and hands policy and optimiser to accelerate."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

from sipo.protocols import PairDataset
from sipo.training.config import TrainingConfig
from sipo.training.forward import ReferenceModel
from sipo.training.sharding import is_sharded, unwrapped

_PLAIN = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU")


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Makes the accelerator that a configuration asks for.

    Raises:
        ValueError: float16 on a CPU.
    """
    # The microsecond makes it differ from accelerate's default, which is not passed on, whatever torch's own is.
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout, microseconds=1))
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        kwargs_handlers=[timeout],
    )
    _check_precision(accelerator)
    return accelerator


def _check_precision(accelerator: Accelerator) -> None:
    """Refuses float16 on a CPU, where accelerate would silently compute in float32."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("training.mixed_precision='fp16': expected 'bf16' or 'no' on a CPU")


def check_setup(
    policy: nn.Module,
    reference: ReferenceModel,
    dataset: PairDataset,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> None:
    """Refuses what cannot be trained.

    Raises:
        ValueError: in one line that says what was expected.
    """
    if policy is reference:
        raise ValueError("policy and reference are one module, expected a frozen copy as the reference")
    if not any(p.requires_grad for p in policy.parameters()):
        raise ValueError("the policy has no parameter with requires_grad=True, expected something to train")
    if len(dataset) == 0:
        raise ValueError("the data set holds 0 pairs, expected at least 1")
    if config.proportion_empty_prompts and getattr(dataset, "unconditional", None) is None:
        raise ValueError(
            f"proportion_empty_prompts={config.proportion_empty_prompts}: expected a data set with 'unconditional'"
        )
    check_config(config, accelerator)


def check_config(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Refuses settings that this accelerator cannot train with, before there is a model or data.

    Raises:
        ValueError: in one line that says what was expected.
    """
    kind = accelerator.distributed_type.value
    if kind not in _PLAIN and not is_sharded(accelerator):
        raise ValueError(f"distributed_type={kind!r}: expected one device, plain data parallelism or FSDP2")
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        found = accelerator.gradient_accumulation_steps
        raise ValueError(
            f"gradient_accumulation_steps={found}: expected "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )
    _check_precision(accelerator)


def prepare(policy: nn.Module, optimizer: Any, config: TrainingConfig, accelerator: Accelerator) -> tuple[Any, Any]:
    """Hands policy and optimiser to accelerate, and gives the policy its own forward back.

    For mixed precision accelerate puts a forward in its place that casts the prediction to float32: a copy of it that
    the loss has no use for. Autocast is the loop's.
    """
    precision = accelerator.state.fsdp_plugin.mixed_precision_policy if accelerator.is_fsdp2 else None
    if precision is not None:
        # FSDP2 would round a flow's timesteps to bfloat16 on their way in. Autocast sees to what has to be cast.
        accelerator.state.fsdp_plugin.mixed_precision_policy = replace(precision, cast_forward_inputs=False)
    before = policy, unwrapped(policy)  # the caller may have compiled it
    own_forward = [network.__dict__.get("forward") for network in before]
    prepared, optimizer = accelerator.prepare(policy, optimizer)
    # Where parts of a network are compiled, what is called is another one made of its parts.
    for network in (*before, unwrapped(prepared)):
        # The last, or a second run with this policy would not be prepared.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            network.__dict__.pop(name, None)
    for network, forward in zip(before, own_forward, strict=True):
        if forward is not None:
            network.__dict__["forward"] = forward
    if accelerator.scaler is None:
        # Without a loss scaler accelerate's wrapper adds nothing but a search for packages at every step.
        optimizer = optimizer.optimizer
    return prepared, optimizer
