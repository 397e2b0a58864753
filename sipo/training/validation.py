"""A look at held-out pairs, from which training cannot tell that anybody looked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sipo.training import randomness
from sipo.training.config import TrainingConfig
from sipo.training.data import step_timesteps
from sipo.training.forward import PairForward
from sipo.training.protocols import PairDataset
from sipo.training.randomness import VALIDATION, derive_seed
from sipo.training.sharded import reshard
from sipo.training.stopping import release_signals

OnValidation = Callable[[int, nn.Module], None]
"""Called with the optimiser steps done and the policy, unwrapped and in eval mode, without gradients, on every process.

Whatever it draws at random, training goes on as if it had not been called. It must leave the weights as they are. Under
FSDP2 and ZeRO-3 a forward pass takes all processes.
"""

_TOTAL = "nonfinite_pairs"  # a number of pairs, where the other metrics are means over them


class Validation:
    """The loss and its metrics on held-out pairs, each with one draw of noise and timestep that stays the same.

    Items with draws of their own keep those. Every pair counts alike, whatever its batch.

    Args:
        dataset: the pairs; none to run the hook alone.
        hook: see :data:`OnValidation`.
        forward: the run's.
        config: the run's.
        accelerator: the run's.
    """

    def __init__(
        self,
        dataset: PairDataset | None,
        hook: OnValidation | None,
        forward: PairForward,
        config: TrainingConfig,
        accelerator: Accelerator,
    ) -> None:
        self.dataset = dataset
        self.hook = hook
        self.forward = forward
        self.config = config
        self.accelerator = accelerator
        self.timesteps = torch.empty(0)
        self.batches: list[list[int]] = []
        if dataset is not None:
            seed = derive_seed(config.seed, VALIDATION, 0)
            distribution = config.timestep_distribution
            self.timesteps = step_timesteps(forward.schedule, len(dataset), 0, seed, distribution)
            groups = getattr(dataset, "groups", None) or [range(len(dataset))]
            size = config.batch_size
            self.batches = [list(group[i : i + size]) for group in groups for i in range(0, len(group), size)]

    def __call__(self, policy: nn.Module, step: int) -> dict[str, float]:
        """Means over all pairs, by the names of docs/math.md §8; empty without pairs. Every process calls it."""
        network = self.accelerator.unwrap_model(policy)
        with randomness.kept(self.accelerator.device), torch.no_grad(), _eval(network):
            metrics = self._measure(network) if self.batches else {}
            if self.hook is not None:
                self.hook(step, network)
            reshard(network)
        return metrics

    def _measure(self, network: nn.Module) -> dict[str, float]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = self.batches[rank::world]
        # Under FSDP2 a forward pass takes all processes: one that has run out goes along, and counts nothing.
        idle = -(-len(self.batches) // world) - len(own)
        loader: DataLoader[Any] = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=own + self.batches[:1] * idle,
            num_workers=self.config.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=release_signals,
        )
        sums: Tensor | None = None
        names: list[str] = []
        seed = derive_seed(self.config.seed, VALIDATION, 1)
        for number, batch in enumerate(loader):
            rows = own[number] if number < len(own) else self.batches[0]
            output, _ = self.forward(network, batch, rows, self.timesteps[rows], seed=seed)
            metrics = output.metrics()
            names = list(metrics)
            values = [metrics[n].detach().double() * (1 if n == _TOTAL else len(rows)) for n in names]
            counted = torch.stack([*values, torch.tensor(float(len(rows)), device=values[0].device).double()])
            if number >= len(own):
                counted = torch.zeros_like(counted)
            sums = counted if sums is None else sums + counted
        assert sums is not None
        if world > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        assert isinstance(sums, Tensor)
        *totals, pairs = sums.tolist()
        return {n: int(t) if n == _TOTAL else t / pairs for n, t in zip(names, totals, strict=True)}


@contextmanager
def _eval(network: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each module's own mode again."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
