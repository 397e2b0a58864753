"""What moves the weights: the optimiser, its learning rate, and the moving average of where they have been."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sipo.training.config import TrainingConfig
from sipo.training.sharding import host_copy, like


def make_optimizer(config: TrainingConfig, parameters: Iterable[nn.Parameter], device: torch.device) -> Any:
    """The optimiser that a configuration asks for.

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
    """What the learning rate is multiplied by in optimiser step ``step``, counted from 0."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return 1.0
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return (1 + math.cos(math.pi * done)) / 2 if config.lr_scheduler == "cosine" else 1 - done


class Average:
    """Exponential moving average of the trained weights, as diffusers keeps it.

    Args:
        parameters: what is trained, by name.
        decay: what the average forgets at, once it has warmed up.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self.parameters = parameters
        self.model = EMAModel(parameters.values(), decay=decay, foreach=True)

    def update(self) -> None:
        """Takes the weights after an optimiser step."""
        self.model.step(self.parameters.values())

    def tensors(self) -> dict[str, Tensor]:
        """The average by parameter, whole and on the CPU. Every process calls it."""
        pairs = zip(self.parameters, self.model.shadow_params, strict=True)
        return {name: host_copy(tensor) for name, tensor in pairs}

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Undoes :meth:`tensors`, after ``steps`` updates."""
        for name, shadow in zip(self.parameters, self.model.shadow_params, strict=True):
            shadow.copy_(like(tensors[name], shadow))
        self.model.optimization_step = steps
