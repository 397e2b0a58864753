"""The optimiser, its learning rate, its step and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sipo.training.config import TrainingConfig
from sipo.training.measurements import Measurements
from sipo.training.sharding import host_copy, local_part, plain_name, shard_like, whole

ASKED = ("cpu",)
"""Devices where a number is read at each step, since reading takes no synchronisation there. Tests empty it."""


def make_optimizer(config: TrainingConfig, parameters: Iterable[nn.Parameter], device: torch.device) -> Any:
    """Makes the optimiser that a configuration asks for.

    Raises:
        ImportError: one of bitsandbytes', which is not installed.
    """
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=device.type in ("cpu", "cuda"), **options)
    check_optimizer(config)
    import bitsandbytes

    kinds = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
    return getattr(bitsandbytes.optim, kinds[config.optimizer])(parameters, **options)


def check_optimizer(config: TrainingConfig) -> None:
    """Refuses an optimiser whose package is missing. Errors as for :func:`make_optimizer`."""
    if config.optimizer == "adamw":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"optimizer={config.optimizer!r}: bitsandbytes is not installed, expected "
            "`pip install bitsandbytes`, or optimizer='adamw'"
        ) from error


def rate_factor(config: TrainingConfig, step: int) -> float:
    """Returns the factor of the learning rate in optimiser step ``step``, counted from 0."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler.startswith("constant"):
        return 1.0
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return (1 + math.cos(math.pi * done)) / 2 if config.lr_scheduler == "cosine" else 1 - done


class WeightUpdates:
    """Applies accumulated gradients to the policy's weights, and keeps their moving average.

    A step whose gradient is not finite counts as one with a gradient of zero: nothing broken reaches the weights or the
    optimiser's moments. The choice is made on the device.

    Attributes:
        average: of the weights, with ``use_ema``.

    Args:
        network: the policy, unwrapped, after accelerate has prepared it: FSDP2 replaces its parameters.
        optimizer: as accelerate prepared it.
        config: the run's.
        accelerator: the run's.
    """

    def __init__(self, network: nn.Module, optimizer: Any, config: TrainingConfig, accelerator: Any) -> None:
        self._config = config
        self._accelerator = accelerator
        self._optimizer = optimizer
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        names = {plain_name(n): p for n, p in network.named_parameters() if p.requires_grad}
        self._parameters = list(names.values())
        self.average = Average(names, config.ema_decay) if config.use_ema else None

    def set_rate(self, step: int) -> float:
        """Sets and returns the learning rate of a step: a function of the step alone, so no scheduler is saved."""
        factor = rate_factor(self._config, step)
        for group, base in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor
        return float(self._base_rates[0]) * factor

    def apply(self, measured: Measurements, *, gradient: bool) -> None:
        """Clips and applies the accumulated gradient.

        Args:
            measured: counts the step.
            gradient: whether any backward pass has run since the last step.
        """
        if not gradient:  # a gradient of zero is not the same as none: moments and weight decay go on
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
        limit = math.inf if self._config.max_grad_norm is None else self._config.max_grad_norm
        norm: Any = self._accelerator.clip_grad_norm_(self._parameters, limit)
        broken = ~measured.add_step(whole(norm))
        if self._accelerator.device.type not in ASKED or broken:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    local_part(parameter.grad).masked_fill_(broken, 0.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.average is not None:
            self.average.update()


class Average:
    """Exponential moving average of the trained weights, as diffusers keeps it.

    Args:
        parameters: what is trained, by name.
        decay: share of the average that a step keeps, once it has warmed up.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self.parameters = parameters
        self.model = EMAModel(parameters.values(), decay=decay, foreach=True)

    def update(self) -> None:
        """Adds the weights after an optimiser step."""
        self.model.step(self.parameters.values())

    def tensors(self) -> dict[str, Tensor]:
        """Returns the average by parameter, whole and on the CPU. Every process calls it."""
        pairs = zip(self.parameters, self.model.shadow_params, strict=True)
        return {name: host_copy(tensor) for name, tensor in pairs}

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Undoes :meth:`tensors`, after ``steps`` updates."""
        for name, shadow in zip(self.parameters, self.model.shadow_params, strict=True):
            shadow.copy_(shard_like(tensors[name], shadow))
        self.model.optimization_step = steps
