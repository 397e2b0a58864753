"""Validates on held-out pairs, and leaves the state of training unchanged."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sipo.batch import PairBatch
from sipo.loss import SIPOLoss
from sipo.protocols import PairDataset, PairLoss
from sipo.schedule import schedule_for
from sipo.seeds import RandomStream, derive_seed, preserve_random_state
from sipo.training.config import TrainingConfig
from sipo.training.forward import PairForward
from sipo.training.sharding import is_compiled, reshard, unwrapped
from sipo.training.stream import batches_in_order, pair_loader, step_levels
from sipo_kernels import pair_loss

OnValidation = Callable[[int, nn.Module], None]
"""Called with the optimiser steps done and the policy, unwrapped and in eval mode, without gradients, on every process.

Whatever it draws at random, training goes on as if it had not been called. It must leave the weights as they are. Under
FSDP2 a forward pass takes all processes.
"""

_TOTAL = "nonfinite_pairs"  # a number of pairs, where the other metrics are means over them
# Means over all pairs, of which one that is left out has 0; the others are means over the finite ones (§8).
_OVER_ALL = ("loss", "active_fraction", "no_preference_loss")


class Validation:
    """The loss and its metrics on held-out pairs, each with one draw of noise and noise level that stays the same.

    Items with draws of their own keep those. Every pair counts alike, whatever its batch and process. A pair with a NaN
    or an infinity is left out and counted, also where training lets it through (``nonfinite="propagate"``): one would
    blank the line, and here no gradient needs saving from it. ``nonfinite="raise"`` raises here as well.

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
        self.forward = _measuring(forward)
        self.config = config
        self.accelerator = accelerator
        self.batches = [] if dataset is None else batches_in_order(dataset, config.train_batch_size)
        self.levels: dict[tuple[int, ...], Tensor] = {}  # of all pairs, as if they had one size, by that size

    def __call__(self, policy: nn.Module, step: int, plain: nn.Module | None = None) -> dict[str, float]:
        """Returns means by the names of docs/math.md §8, with those that only a validation has; empty without pairs.

        Every process calls it. NaN where no pair is finite.

        Args:
            policy: wrapped as it is trained.
            step: optimiser steps done.
            plain: the network that was passed in to be trained, for the hook; the one inside ``policy`` if left out.
        """
        network = policy if is_compiled(policy) else unwrapped(policy)
        if plain is None or self.accelerator.is_fsdp2:  # which gathers weights where the compiled network is called
            plain = network
        with preserve_random_state(self.accelerator.device), torch.no_grad(), _eval(network), _eval(plain):
            metrics = self._measure(network) if self.batches else {}
            if self.hook is not None:
                self.hook(step, plain)
            reshard(network)
        return metrics

    def _levels(self, batch: PairBatch) -> Tensor:
        """Noise levels of all pairs, as if they had the size of the batch's; the draws are the same for every size."""
        size = batch.chosen.shape[-2:]
        if size not in self.levels:
            assert self.dataset is not None
            schedule = schedule_for(self.forward.schedule, batch.chosen)
            seed = derive_seed(self.config.seed, RandomStream.VALIDATION, 0)
            distribution = self.config.timestep_distribution
            self.levels[size] = step_levels(schedule, len(self.dataset), 0, seed, distribution)
        return self.levels[size]

    def _measure(self, network: nn.Module) -> dict[str, float]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = self.batches[rank::world]
        # Under FSDP2 a forward pass takes all processes: one that has run out goes along, and counts nothing.
        idle = -(-len(self.batches) // world) - len(own)
        batches = own + self.batches[:1] * idle
        loader = pair_loader(self.dataset, batches, self.config, self.accelerator.device)  # type: ignore[arg-type]
        names: list[str] = []
        sums: Tensor | None = None
        seed = derive_seed(self.config.seed, RandomStream.VALIDATION, 1)
        for number, items in enumerate(loader):
            rows = own[number] if number < len(own) else self.batches[0]
            batch = PairBatch.of_items(items)
            output, _ = self.forward(network, batch, rows, self._levels(batch)[rows], seed=seed)
            metrics = output.metrics() | _no_preference(self.forward.loss_fn, output)
            names = list(metrics)
            counted = _weighed(metrics, len(rows), skips=getattr(output, "skip_nonfinite", False))
            if number >= len(own):
                counted = torch.zeros_like(counted)
            sums = counted if sums is None else sums + counted
        assert sums is not None
        if world > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        assert isinstance(sums, Tensor)
        totals, weights = sums.tolist()
        whole = weights.pop()
        found: dict[str, float] = {}
        for name, total, weight in zip(names, totals, weights, strict=False):
            found[name] = int(total) if name == _TOTAL else total / weight if weight and whole else math.nan
        # Draws of one pair are no more evidence than the pair.
        return found | {"pairs": int(whole // getattr(self.dataset, "draws", 1))}


def _measuring(forward: PairForward) -> PairForward:
    """Copies the passes with a loss that is a mean over pairs and leaves out those that are not finite."""
    if not isinstance(forward.loss_fn, SIPOLoss):
        return forward
    loss_fn, forward = copy.copy(forward.loss_fn), copy.copy(forward)
    options = loss_fn.options
    nonfinite = "skip" if options.nonfinite == "propagate" else options.nonfinite
    loss_fn.options = dataclasses.replace(options, reduction="mean", nonfinite=nonfinite)
    forward.loss_fn = loss_fn
    return forward


def no_preference(loss_type: str = "sigmoid", label_smoothing: float = 0.0) -> float:
    """Returns the loss of a pair at a logit of 0 (docs/math.md §5): ln 2 for the sigmoid."""
    same = torch.zeros(2, 1, dtype=torch.float32)
    options: dict[str, Any] = {"loss_type": loss_type, "label_smoothing": label_smoothing, "backend": "eager"}
    return pair_loss(same, same, same, method="diffusion_dpo", beta=1.0, **options).loss.item()


def _no_preference(loss_fn: PairLoss, output: Any) -> dict[str, Tensor]:
    """Returns ``loss`` as if every logit were 0: masked pairs have none, and dpo_cm weights the others."""
    if not isinstance(loss_fn, SIPOLoss):
        return {}
    options = loss_fn.options
    weight = torch.minimum(*output.weight.chunk(2)) if options.method == "dpo_cm" else torch.ones_like(output.logits)
    each = no_preference(options.loss_type, options.label_smoothing)
    return {"no_preference_loss": each * torch.where(output.mask, weight, 0.0).mean()}


def _weighed(metrics: dict[str, Tensor], pairs: int, *, skips: bool) -> Tensor:
    """Returns ``[2, M + 1]``: metrics times the pairs that each is a mean over, and these; last the finite pairs.

    Args:
        metrics: of the batch.
        pairs: in it.
        skips: whether means are over its finite pairs, as far as :data:`_OVER_ALL` does not say otherwise.
    """
    values = torch.stack([value.detach().double() for value in metrics.values()])
    whole = pairs - metrics[_TOTAL].detach().double() if _TOTAL in metrics else values.new_tensor(float(pairs))
    weights = torch.stack(
        [
            torch.ones_like(whole) if name == _TOTAL
            else whole if skips and name not in _OVER_ALL
            else torch.full_like(whole, pairs)
            for name in metrics
        ]
    )  # fmt: skip
    finite = torch.isfinite(values)  # a batch of a loss of one's own that does not leave pairs out
    weights = torch.where(finite, weights, 0.0)
    totals = torch.where(finite, values, 0.0) * weights
    return torch.stack([torch.cat([totals, whole[None]]), torch.cat([weights, whole[None]])])


@contextmanager
def _eval(network: nn.Module) -> Iterator[None]:
    """Switches to eval mode, and restores each module's own mode afterwards."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
