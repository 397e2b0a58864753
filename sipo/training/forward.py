"""One forward pass: from a batch of pairs to its loss, with a reference network or stored reference errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sipo.batch import BatchMode, PairBatch, level_argument, noisy_pairs, to_device
from sipo.protocols import PairLoss, PairLossResult, Predict, Schedule
from sipo.training.first_step import FirstStep
from sipo.training.sharding import is_compiled, round_whole, unwrapped
from sipo.training.stream import pair_noise
from sipo_kernels import Totals


@dataclass(frozen=True)
class AdapterOff:
    """The reference that is the policy itself without its adapters (LoRA): no second network.

    Attributes:
        switch: called with the policy, unwrapped; inside the context that it returns, the policy computes what it did
            before training, dropout off. ``sipo.families.tuning.adapter_off`` is one. A context with a true attribute
            ``reusable`` is made once and entered at each pass; any other is made for each pass.
    """

    switch: Callable[[nn.Module], AbstractContextManager[Any]]


ReferenceModel = nn.Module | AdapterOff | None
"""A frozen copy of the policy; the policy without its adapters; or none, where items carry ``"ref_error"``."""


class PairForward:
    """Computes the loss of a batch of ``B`` pairs, chosen and rejected samples stacked (docs/math.md §1).

    Args:
        loss_fn: the loss, with its schedule.
        predict: calls a network.
        reference: see :data:`ReferenceModel`; moved to the accelerator's device and frozen; where FSDP2 rounds all of
            the policy's weights, its weights are rounded too.
        offload: keep a frozen copy in host memory while it is not running.
        accelerator: the run's.
    """

    def __init__(
        self,
        loss_fn: PairLoss,
        predict: Predict,
        reference: ReferenceModel,
        accelerator: Accelerator,
        *,
        offload: bool,
    ) -> None:
        self.loss_fn = loss_fn
        self.schedule: Schedule = loss_fn.schedule
        self.predict = predict
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.generator = torch.Generator(self.device)
        self.reference = reference
        self.first: FirstStep | None = None  # while a run is in its first step
        self.wrapped: nn.Module | None = None
        self.network: nn.Module  # the one inside ``wrapped``
        self.off: AbstractContextManager[Any] | None = None
        # Without mixed precision there is nothing to switch, and asking accelerate takes longer than the loss.
        self.autocast = nullcontext if accelerator.mixed_precision == "no" else accelerator.autocast
        self.offloaded: list[tuple[Tensor, Tensor]] = []
        if isinstance(reference, nn.Module):
            reference.requires_grad_(False).eval()
            round_whole(reference, accelerator)
            if offload:
                self.offloaded = _to_host(reference, pin=self.device.type == "cuda")
            else:
                reference.to(self.device)

    def __call__(
        self,
        policy: nn.Module,
        batch: PairBatch,
        positions: Sequence[int],
        levels: Tensor,
        *,
        seed: int,
        totals: Totals | None = None,
    ) -> tuple[PairLossResult, Tensor]:
        """Returns the loss, and the noise levels ``[B]`` that it is for, on the device.

        Args:
            policy: the network, wrapped as it is trained.
            batch: the pairs, on the host.
            positions: the pairs' places in the stream, for their noise. Used for fresh draws only, as are the next
                two.
            levels: noise levels ``[B]``, as the schedule draws them.
            seed: of the noise.
            totals: for a loss that takes them; the noise levels are filled in.

        Raises:
            ValueError: a batch with reference errors beside a reference, or without either.
        """
        if batch.mode is BatchMode.REFERENCE_ERRORS and self.reference is not None:
            raise ValueError("items have 'ref_error' and a reference was given: expected one of them")
        if batch.mode is not BatchMode.REFERENCE_ERRORS and self.reference is None:
            raise ValueError("reference=None: expected 'ref_error' in the items, or a reference")
        batch = batch.to(self.device)
        if batch.mode is BatchMode.FRESH_DRAWS:
            noise = pair_noise(batch.chosen, positions, seed, self.generator)
            batch = batch.with_draws(noise, to_device(levels, self.device))
        pairs = noisy_pairs(batch, self.schedule)
        levels = pairs.levels[: len(batch)]

        loss: Any = self.loss_fn  # these arguments are only for losses that take them
        options: dict[str, Any] = {} if totals is None else {"totals": totals._replace(pair_levels=levels)}
        options |= {} if batch.error_mask is None else {"error_mask": batch.error_mask}
        options |= level_argument(self.schedule, pairs.levels)
        ref_pred: Tensor | None = None
        if batch.ref_error is not None:
            reference = options["ref_error"] = batch.ref_error.transpose(0, 1).reshape(-1)
        else:
            # A context of its own, so that the policy gets no weights from autocast's cache that were cast without
            # gradients.
            with torch.no_grad(), self.autocast(), self._reference(policy) as network:
                reference = ref_pred = self.predict(network, pairs.samples, pairs.timesteps, pairs.condition)
        with self.autocast():
            model_pred = self.predict(policy, pairs.samples, pairs.timesteps, pairs.condition)
        output = loss(model_pred, ref_pred, pairs.target, **options)
        if self.first is not None:
            self.first.add(model_pred, reference, pairs.target, output, batch.error_mask, errors=ref_pred is None)
        return output, levels

    @contextmanager
    def _reference(self, policy: nn.Module) -> Iterator[nn.Module]:
        if isinstance(self.reference, AdapterOff):
            if policy is not self.wrapped:
                self.wrapped, self.network, self.off = policy, unwrapped(policy), None
            off = self.off or self.reference.switch(self.network)
            if getattr(off, "reusable", False):
                self.off = off
            with off:
                # A compiled policy rounds otherwise than the network in it: the reference must not.
                yield policy if is_compiled(policy) else self.network
        elif self.reference is not None:
            for tensor, host in self.offloaded:
                tensor.data = host.to(self.device, non_blocking=True)
            try:
                yield self.reference
            finally:
                for tensor, host in self.offloaded:
                    tensor.data = host


def _to_host(module: nn.Module, pin: bool) -> list[tuple[Tensor, Tensor]]:
    """Moves a module's tensors to host memory; returns each with its value there, to be copied from at each pass."""
    pairs = []
    for tensor in chain(module.parameters(), module.buffers()):
        host = tensor.data.cpu()
        tensor.data = host.pin_memory() if pin else host
        pairs.append((tensor, tensor.data))
    return pairs
