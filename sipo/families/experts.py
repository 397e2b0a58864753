"""Several networks by noise level (experts), as one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ExpertNetworks(nn.Module):
    """Two networks of one architecture: the first for high noise levels, the second for low ones.

    Each sample of a batch goes to the network that its noise level names. Both samples of a pair have one level, so
    that they go to the same network.

    Args:
        networks: the two networks by their names in the pipeline, that for high noise first.
        boundary: lowest σ of the first network's range.
    """

    def __init__(self, networks: Mapping[str, nn.Module], boundary: float) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.boundary = boundary

    @property
    def config(self) -> Any:
        """The configuration of the first network, which that of the second equals."""
        return self._first.config

    @property
    def peft_config(self) -> Any:
        """The adapters of the first network, which those of the second equal; raises AttributeError without any."""
        return self._first.peft_config

    @property
    def _first(self) -> Any:
        return next(iter(self.children()))

    @property
    def _keep_in_fp32_modules(self) -> Any:
        return getattr(self._first, "_keep_in_fp32_modules", None)

    @property
    def _supports_gradient_checkpointing(self) -> bool:
        return getattr(self._first, "_supports_gradient_checkpointing", False)

    def add_adapter(self, config: Any, name: str) -> None:
        """Adds an adapter to each network, as diffusers' networks do."""
        for network in self.children():
            network.add_adapter(config, name)  # type: ignore[operator] # diffusers' PeftAdapterMixin

    def enable_gradient_checkpointing(self) -> None:
        """Turns on gradient checkpointing in each network."""
        for network in self.children():
            network.enable_gradient_checkpointing()  # type: ignore[operator] # diffusers' ModelMixin

    def forward(self, *, timestep: Tensor, return_dict: bool = False, **inputs: Any) -> tuple[Tensor]:
        """Calls the networks as diffusers' own are called.

        Args:
            timestep: ``[N]``, σ · 1000.
            return_dict: always False.
            inputs: further arguments; tensors ``[N, ...]`` are divided among the networks.
        """
        high = timestep >= self.boundary * 1000
        whole: Tensor | None = None
        for network, mine in zip(self.children(), (high, ~high), strict=True):
            rows = mine.nonzero()[:, 0]  # waits for the device: the host decides which networks run
            if len(rows) == len(timestep):
                return network(timestep=timestep, **inputs, return_dict=False)
            if len(rows):
                part = {
                    name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == timestep.shape else value
                    for name, value in inputs.items()
                }
                output = network(timestep=timestep[rows], **part, return_dict=False)[0]
                if whole is None:
                    whole = output.new_empty(len(timestep), *output.shape[1:])
                whole = torch.index_copy(whole, 0, rows, output)
        assert whole is not None  # the two ranges cover all levels
        return (whole,)
