"""A batch of preference pairs, and how a network's input and target are made from it.

Training, reference errors, scoring and the demo all noise and stack pairs here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from sipo.protocols import Schedule


class BatchMode(Enum):
    """Where the random numbers and the reference's errors of a pass come from."""

    FRESH_DRAWS = "fresh draws"
    """Noise and timesteps are drawn for this pass."""
    FIXED_DRAWS = "fixed draws"
    """The items carry their own noise and timesteps."""
    REFERENCE_ERRORS = "reference errors"
    """The items also carry the reference's errors at these draws, so no reference network runs."""


@dataclass(frozen=True)
class PairBatch:
    """``B`` preference pairs.

    Attributes:
        chosen: preferred samples, ``[B, ...]``.
        rejected: the other samples, shaped likewise.
        condition: what both samples of a pair share: a tensor ``[B, ...]``, a dictionary of tensors, or ``None``.
        own_condition: what differs between them: tensors ``[B, 2, ...]`` by name, chosen first; or ``None``.
        mode: where random numbers and reference errors come from; it decides which of the next three are set.
        noise: shaped as ``chosen``; ``None`` with fresh draws.
        timesteps: ``[B]``; ``None`` with fresh draws.
        ref_error: ``[B, 2]`` float64, chosen first; ``None`` without reference errors.
    """

    chosen: Tensor
    rejected: Tensor
    condition: Any = None
    own_condition: dict[str, Tensor] | None = None
    mode: BatchMode = BatchMode.FRESH_DRAWS
    noise: Tensor | None = None
    timesteps: Tensor | None = None
    ref_error: Tensor | None = None

    @classmethod
    def of_items(cls, items: dict[str, Any]) -> PairBatch:
        """Builds a batch from what ``default_collate`` makes of items (:class:`sipo.protocols.PairDataset`).

        Raises:
            ValueError: keys that are missing or do not go together.
        """
        for name in ("chosen", "rejected"):
            if name not in items:
                raise ValueError(f"an item has the keys {', '.join(items)}: expected {name!r} among them")
        if ("noise" in items) != ("timestep" in items):
            raise ValueError("items have one of 'noise' and 'timestep': expected both, or none for draws of the run")
        if "ref_error" in items and "noise" not in items:
            raise ValueError("items have 'ref_error' without 'noise' and 'timestep': expected the draw that it is for")
        condition = items.get("condition")
        if "own_condition" in items and not isinstance(condition, (dict, type(None))):
            kind = type(condition).__name__
            raise ValueError(f"items have 'own_condition' beside a condition that is a {kind}: expected a dictionary")
        mode = BatchMode.FRESH_DRAWS
        if "noise" in items:
            mode = BatchMode.REFERENCE_ERRORS if "ref_error" in items else BatchMode.FIXED_DRAWS
        return cls(
            items["chosen"],
            items["rejected"],
            condition,
            items.get("own_condition"),
            mode,
            items.get("noise"),
            items.get("timestep"),
            items.get("ref_error"),
        )

    def __len__(self) -> int:
        return len(self.chosen)

    def to(self, device: torch.device) -> PairBatch:
        """The batch on ``device``; copies do not wait. Latents of half precision become float32 there.

        They are cast after the copy, so that data loader workers and the bus carry no more bytes than a cache has.
        Noisy samples and targets then keep what half precision would round away.
        """
        return PairBatch(
            _widened(to_device(self.chosen, device)),
            _widened(to_device(self.rejected, device)),
            to_device(self.condition, device),
            to_device(self.own_condition, device),
            self.mode,
            to_device(self.noise, device),
            to_device(self.timesteps, device),
            to_device(self.ref_error, device),
        )


@dataclass(frozen=True)
class NoisyPairs:
    """A network's input and target for ``B`` pairs: chosen and then rejected samples along dimension 0.

    Attributes:
        samples: at their noise levels, ``[2B, ...]``.
        timesteps: ``[2B]``.
        condition: stacked likewise.
        target: ``[2B, ...]``, or ``[B, ...]`` where both samples of a pair share it.
    """

    samples: Tensor
    timesteps: Tensor
    condition: Any
    target: Tensor


def noisy_pairs(batch: PairBatch, noise: Tensor, timesteps: Tensor, schedule: Schedule) -> NoisyPairs:
    """Noises and stacks pairs; both samples of a pair get the same noise and timestep (docs/math.md §1).

    Args:
        batch: on the device that the network runs on.
        noise: shaped as ``batch.chosen``, on the same device.
        timesteps: ``[B]``, on the same device, as the schedule draws them: σ for a flow.
        schedule: gives noisy samples and the target.
    """
    samples = torch.cat([batch.chosen, batch.rejected])
    both_noise, both_timesteps = _twice(noise), _twice(timesteps)
    if schedule.prediction_type == "epsilon":
        # The target is the noise, which both share: half the memory, and half the reads in the loss.
        target = schedule.target(batch.chosen, noise, **level_argument(schedule, timesteps))
    else:
        target = schedule.target(samples, both_noise, **level_argument(schedule, both_timesteps))
    noisy = schedule.add_noise(samples, both_noise, **level_argument(schedule, both_timesteps))
    return NoisyPairs(noisy, both_timesteps, _stacked_condition(batch), target)


def level_argument(schedule: Schedule, drawn: Tensor) -> dict[str, Tensor]:
    """Returns noise levels, as ``sample_timesteps`` draws them, by the name of the argument that takes them.

    That is ``sigmas`` for a schedule whose ``kind`` is ``"flow"``, and its loss; ``timesteps`` for any other.
    """
    return {"sigmas" if getattr(schedule, "kind", None) == "flow" else "timesteps": drawn}


def to_device(value: Any, device: torch.device) -> Any:
    """Moves a tensor or a dictionary of tensors without waiting; anything else passes through."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def _stacked_condition(batch: PairBatch) -> Any:
    """What both samples share, twice, and what each has of its own."""
    condition = _twice(batch.condition)
    if batch.own_condition is None:
        return condition
    return (condition or {}) | {name: own.transpose(0, 1).flatten(0, 1) for name, own in batch.own_condition.items()}


def _widened(latents: Tensor) -> Tensor:
    """Half precision in float32; other types as they are."""
    return latents.float() if latents.is_floating_point() and latents.element_size() < 4 else latents


def _twice(value: Any) -> Any:
    """A tensor, or each tensor of a dictionary, stacked on itself."""
    if isinstance(value, Tensor):
        return torch.cat([value, value])
    if isinstance(value, dict):
        return {key: _twice(item) for key, item in value.items()}
    return value
