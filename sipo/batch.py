"""A batch of preference pairs, and how a network's input and target are made from it.

Training, reference errors, scoring and the demo all noise and stack pairs here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from sipo.protocols import Schedule


class BatchMode(Enum):
    """Where the random numbers and the reference's errors of a pass come from."""

    FRESH_DRAWS = "fresh draws"
    """Noise and noise levels are drawn for this pass."""
    FIXED_DRAWS = "fixed draws"
    """The items carry their own noise and noise level."""
    REFERENCE_ERRORS = "reference errors"
    """The items also carry the reference's errors at these draws, so no reference network runs."""


_DRAWN = {"noise": "noise", "level": "levels", "ref_error": "ref_error"}  # keys of items, and the fields they fill
_NEEDED = {BatchMode.FRESH_DRAWS: 0, BatchMode.FIXED_DRAWS: 2, BatchMode.REFERENCE_ERRORS: 3}  # so many of them


OF_IMAGE = "condition_"
"""What names in a condition begin with if they encode the condition image, and not the text."""


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
        levels: noise levels ``[B]``: timestep indices, or σ of a flow; ``None`` with fresh draws.
        ref_error: ``[B, 2]`` float64, chosen first; ``None`` without reference errors.
        error_mask: which elements count in the errors of both samples, bool, or their weights (docs/math.md §2):
            ``[B, ...]`` with the dimensions of ``chosen``, 1 in place of any after the first; ``None``: all do.

    Raises:
        TypeError: samples that are not floating-point tensors, or another field of the wrong type.
        ValueError: tensors that do not fit the mode, or shapes that do not fit each other. No value is read.
    """

    chosen: Tensor
    rejected: Tensor
    condition: Any = None
    own_condition: dict[str, Tensor] | None = None
    mode: BatchMode = BatchMode.FRESH_DRAWS
    noise: Tensor | None = None
    levels: Tensor | None = None
    ref_error: Tensor | None = None
    error_mask: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("chosen", "rejected", *_DRAWN.values(), "error_mask"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and (value is not None or name in ("chosen", "rejected")):
                raise TypeError(f"{name} is a {type(value).__name__}: expected a torch.Tensor")
        for name, samples in {"chosen": self.chosen, "rejected": self.rejected}.items():
            if not samples.is_floating_point():
                raise TypeError(f"{name} has dtype {samples.dtype}: expected a floating-point type")
        if not isinstance(self.own_condition, (dict, type(None))):
            kind = type(self.own_condition).__name__
            raise TypeError(f"own_condition is a {kind}: expected a dictionary of tensors")
        given = [key for key, name in _DRAWN.items() if getattr(self, name) is not None]
        needed, none = list(_DRAWN)[: _NEEDED[self.mode]], f"none of {', '.join(_DRAWN)}"
        if given != needed:
            have, wanted = (", ".join(names) or none for names in (given, needed))
            raise ValueError(f"items with {self.mode.value} have {have}: expected {wanted}")
        if self.own_condition and not isinstance(self.condition, (dict, type(None))):
            kind = type(self.condition).__name__
            raise ValueError(f"items have 'own_condition' beside a condition that is a {kind}: expected a dictionary")
        for key in (self.condition or {}).keys() & self.own_condition.keys() if self.own_condition else ():
            raise ValueError(f"{key!r} is in both 'condition' and 'own_condition': expected it in one of them")
        shape, pairs = list(self.chosen.shape), len(self.chosen)
        for name, expected in {"rejected": shape, "noise": shape, "levels": [pairs], "ref_error": [pairs, 2]}.items():
            _check_shape(name, getattr(self, name), expected)
        if self.error_mask is not None:
            _check_mask(self.error_mask, shape)
        for name, start in {"condition": [pairs], "own_condition": [pairs, 2]}.items():
            value = getattr(self, name)
            for key, tensor in value.items() if isinstance(value, dict) else [("", value)]:
                _check_shape(f"{name}[{key!r}]" if key else name, tensor, start, more=True)

    @classmethod
    def of_items(cls, items: dict[str, Any]) -> PairBatch:
        """Builds a batch from what :func:`collate` makes of items (:class:`sipo.protocols.PairDataset`).

        Raises:
            TypeError: items that are no dictionaries, or hold values of the wrong type.
            ValueError: keys that are missing or do not go together; shapes that do not.
        """
        if not isinstance(items, dict):
            raise TypeError(f"items are collated to a {type(items).__name__}: expected dictionaries with 'chosen'")
        for name in ("chosen", "rejected"):
            if name not in items:
                raise ValueError(f"an item has the keys {', '.join(items)}: expected {name!r} among them")
        mode = BatchMode.FIXED_DRAWS if "noise" in items or "level" in items else BatchMode.FRESH_DRAWS
        return cls(
            items["chosen"],
            items["rejected"],
            items.get("condition"),
            items.get("own_condition"),
            BatchMode.REFERENCE_ERRORS if "ref_error" in items else mode,
            **{name: items.get(key) for key, name in _DRAWN.items()},
            error_mask=items.get("error_mask"),
        )

    def __len__(self) -> int:
        return len(self.chosen)

    def with_draws(self, noise: Tensor, levels: Tensor) -> PairBatch:
        """Returns the pairs at fixed draws: ``noise`` shaped as ``chosen``, and ``levels`` ``[B]``."""
        return replace(self, mode=BatchMode.FIXED_DRAWS, noise=noise, levels=levels)

    def to(self, device: torch.device) -> PairBatch:
        """Copies the batch to ``device`` without waiting. Latents of half precision become float32 there.

        They are cast after the copy, so that data loader workers and the bus carry no more bytes than a cache has.
        Noisy samples and targets then keep what half precision would round away.
        """
        moved = {field.name: to_device(getattr(self, field.name), device) for field in fields(self)}
        return PairBatch(**moved | {name: _widened(moved[name]) for name in ("chosen", "rejected")})


@dataclass(frozen=True)
class NoisyPairs:
    """A network's input and target for ``B`` pairs: chosen and then rejected samples along dimension 0.

    Attributes:
        samples: at their noise levels, ``[2B, ...]``.
        levels: noise levels ``[2B]``, as the schedule draws them.
        timesteps: what the network is told of them, ``[2B]``; see :func:`network_timesteps`.
        condition: stacked likewise.
        target: ``[2B, ...]``, or ``[B, ...]`` where both samples of a pair share it.
    """

    samples: Tensor
    levels: Tensor
    timesteps: Tensor
    condition: Any
    target: Tensor


def noisy_pairs(batch: PairBatch, schedule: Schedule) -> NoisyPairs:
    """Noises and stacks pairs; both samples of a pair get the same noise and noise level (docs/math.md §1).

    Args:
        batch: with draws, on the device that the network runs on.
        schedule: gives noisy samples and the target.

    Raises:
        ValueError: a batch with fresh draws, which are still to be made; levels that the schedule does not have.
    """
    if batch.noise is None or batch.levels is None:
        raise ValueError("a batch with fresh draws has no noise: expected PairBatch.with_draws first")
    samples = torch.cat([batch.chosen, batch.rejected])
    noise, levels = _twice(batch.noise), _twice(batch.levels)
    try:
        noisy = schedule.add_noise(samples, noise, **level_argument(schedule, levels))
    except ValueError as error:  # it names the schedule's own argument
        raise ValueError(f'the items\' "level" does not fit the schedule: {error}') from error
    if schedule.prediction_type == "epsilon":
        # The target is the noise, which both share: half the memory, and half the reads in the loss.
        target = schedule.target(batch.chosen, batch.noise, **level_argument(schedule, batch.levels))
    else:
        target = schedule.target(samples, noise, **level_argument(schedule, levels))
    return NoisyPairs(noisy, levels, network_timesteps(schedule, levels), _stacked_condition(batch), target)


def level_argument(schedule: Schedule, levels: Tensor) -> dict[str, Tensor]:
    """Returns noise levels, as ``sample_levels`` draws them, by the name of the argument that takes them.

    That is ``sigmas`` for a schedule whose ``kind`` is ``"flow"``, and its loss; ``timesteps`` for any other.
    """
    return {"sigmas" if getattr(schedule, "kind", None) == "flow" else "timesteps": levels}


def network_timesteps(schedule: Any, levels: Tensor) -> Tensor:
    """Returns noise levels, as ``sample_levels`` draws them, in the units that diffusers' networks are told them in.

    Indices stay as they are. σ of a flow becomes ``σ * num_train_timesteps``, 0 to 1000 for most models, or with
    ``invert_sigmas`` ``(1 − σ) * num_train_timesteps``.
    """
    if getattr(schedule, "kind", None) != "flow":
        return levels
    return (1 - levels if getattr(schedule, "invert_sigmas", False) else levels) * schedule.num_train_timesteps


def collate(items: list[Any]) -> Any:
    """Stacks items as torch's ``default_collate`` does, after padding the ragged tensors of their conditions.

    Args:
        items: of a :class:`sipo.protocols.PairDataset`.
    """
    conditions: list[Any] = [item.get("condition") if isinstance(item, dict) else None for item in items]
    if not all(isinstance(condition, dict) for condition in conditions):
        return default_collate(items)
    lengths = {
        name: max(len(condition[name]) for condition in conditions)
        for name in conditions[0]
        if is_ragged(name, conditions[0])
    }
    return default_collate(
        [
            item | {"condition": item["condition"] | {n: padded(item["condition"][n], to) for n, to in lengths.items()}}
            for item in items
        ]
    )


def is_ragged(name: str, condition: Mapping[str, Any]) -> bool:
    """Tells whether the length of a condition's tensor differs between items.

    Such a tensor ``<name> [L, ...]`` comes with ``<name>_mask [L]``, bool. Both are stored without padding; in a batch
    they are padded to the longest, and the mask is ``False`` in the padding.
    """
    return f"{name}_mask" in condition or (name.endswith("_mask") and name.removesuffix("_mask") in condition)


def padded(tensor: Tensor, length: int, dim: int = 0) -> Tensor:
    """Appends zeros, ``False`` for booleans, until a dimension has ``length``."""
    missing = length - tensor.shape[dim]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, missing)) if missing else tensor


def counted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the mean over a sample's elements that count (docs/math.md §2), 0-d; 0 if none does.

    Args:
        values: of one sample.
        weights: of its elements, bool or floating-point, or ``None``; of a shape that broadcasts.
    """
    if weights is None:
        return values.mean()
    weights = weights.float().to(values.dtype).expand_as(values)  # the loss reads them in float32
    total = weights.sum()
    return torch.where(total == 0, 0.0, torch.where(weights == 0, 0.0, weights * values).sum() / total)


def to_device(value: Any, device: torch.device) -> Any:
    """Moves a tensor or a dictionary of tensors without waiting; anything else passes through."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def _stacked_condition(batch: PairBatch) -> Any:
    """Stacks the condition: what both samples share is repeated, what each has of its own follows."""
    condition = _twice(batch.condition)
    if batch.own_condition is None:
        return condition
    return (condition or {}) | {name: own.transpose(0, 1).flatten(0, 1) for name, own in batch.own_condition.items()}


def _widened(latents: Tensor) -> Tensor:
    """Casts half precision to float32; other types stay."""
    return latents.float() if latents.is_floating_point() and latents.element_size() < 4 else latents


def _twice(value: Any) -> Any:
    """Stacks a tensor, or each tensor of a dictionary, on itself."""
    if isinstance(value, Tensor):
        return torch.cat([value, value])
    if isinstance(value, dict):
        return {key: _twice(item) for key, item in value.items()}
    return value


def _check_mask(mask: Tensor, shape: list[int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"error_mask has dtype {mask.dtype}: expected bool or a floating-point type")
    fits = mask.ndim == len(shape) and all(have in (1, want) for have, want in zip(mask.shape, shape, strict=True))
    if not fits or len(mask) != shape[0]:
        raise ValueError(
            f"error_mask has shape {list(mask.shape)}: expected {shape}, with 1 in place of any dimension but the first"
        )


def _check_shape(name: str, value: Any, expected: list[int], more: bool = False) -> None:
    """Refuses a tensor of another shape; with ``more``, dimensions may follow."""
    if isinstance(value, Tensor) and list(value.shape[: len(expected)] if more else value.shape) != expected:
        dots = ", ..." if more else ""
        raise ValueError(f"{name} has shape {list(value.shape)}: expected [{', '.join(map(str, expected))}{dots}]")
