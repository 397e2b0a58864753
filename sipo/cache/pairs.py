"""Data sets of pairs for the training loop, read from a cache: each pair once, or each at its fixed draws.

Both meet :class:`sipo.protocols.PairDataset`, open files only in the process that reads them, and may be sent to
data loader workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sipo.cache.finished import Cache
from sipo.cache.format import CacheError
from sipo.cache.reference_errors import FixedDraws, ReferenceErrors
from sipo.data.records import row_name
from sipo.families.network import Condition
from sipo.protocols import Schedule
from sipo.schedule import schedule_for
from sipo.seeds import RandomStream, derive_seed


class CachedPairs:
    """The pairs of a cache, or some of them: ``chosen``, ``rejected`` and ``condition``.

    Where there are any, items also have ``own_condition`` and ``error_mask`` (:class:`sipo.protocols.PairDataset`).
    Tensors have the type that they are stored in, so that data loader workers pass on no more bytes than the cache has;
    the training loop casts latents to float32 on the device.

    Args:
        cache: see :func:`sipo.cache.finished.open_cache`.
        rows: rows of the source to keep, in this order; ``None`` keeps all, in the cache's order.

    Attributes:
        groups: lists of indices that may share a batch, where not all may (:attr:`Cache.group_of`).

    Raises:
        ValueError: a row that is not in the cache.
    """

    groups: list[list[int]]

    def __init__(self, cache: Cache, rows: Sequence[int] | None = None) -> None:
        self.cache = cache
        if rows is None:
            self.places = torch.arange(len(cache))
        else:
            place_of = {row: place for place, row in enumerate(cache.rows.tolist())}
            missing = next((row for row in rows if row not in place_of), None)
            if missing is not None:
                raise ValueError(f"row {missing} is not in {cache.folder}, expected rows of its {len(cache)} pairs")
            self.places = torch.tensor([place_of[row] for row in rows], dtype=torch.int64)
        groups = _by_value(cache.group_of[self.places])
        if len(groups) > 1:
            self.groups = groups

    @property
    def unconditional(self) -> Condition:
        """The condition that replaces a pair's text embeddings in caption dropout.

        Raises:
            AttributeError: there is none, as text embeddings depend on the condition image.
        """
        if self.cache.text_sees_image:
            raise AttributeError(
                "unconditional: text embeddings here depend on the condition image, expected no dropout"
            )
        return self.cache.unconditional()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def rows(self) -> Tensor:
        """``[N]`` int64, the pairs' rows in the source."""
        return self.cache.rows[self.places]

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = _place(self.places, index)
        chosen, rejected, own = self.cache.pair(place)
        condition = self.cache.text(place) | self.cache.condition_image(place)
        item: dict[str, Any] = {"chosen": chosen, "rejected": rejected, "condition": condition}
        if own:
            item["own_condition"] = own
        mask = self.cache.error_mask(place)
        if mask is not None:
            item["error_mask"] = mask
        return item


class DrawnPairs:
    """Each of ``N`` pairs at ``K`` fixed draws of noise and level: item ``j`` is pair ``j // K`` at draw ``j % K``.

    An item has the keys of :class:`CachedPairs`, ``noise`` (float32), ``level`` and, with references, ``ref_error``
    (``[2]`` float64).

    Args:
        cached: the pairs.
        schedule: draws the noise levels.
        fixed: what decides the draws.
        references: the reference's errors at the same draws.

    Attributes:
        draws: ``K``.
        groups: as :class:`CachedPairs` has them, for these items.
    """

    groups: list[list[int]]

    def __init__(
        self, cached: CachedPairs, schedule: Schedule, fixed: FixedDraws, references: ReferenceErrors | None = None
    ) -> None:
        self.cached = cached
        self.schedule = schedule
        self.fixed = fixed
        self.draws = fixed.draws
        self.references = references
        if hasattr(cached, "groups"):
            every = range(self.draws)
            self.groups = [[pair * self.draws + k for pair in group for k in every] for group in cached.groups]

    @property
    def unconditional(self) -> Condition:
        """The condition that replaces a dropped caption's text embeddings."""
        return self.cached.unconditional

    def __len__(self) -> int:
        return len(self.cached) * self.draws

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair, draw = divmod(range(len(self))[index], self.draws)
        item = self.cached[pair]
        row = int(self.cached.cache.rows[self.cached.places[pair]])
        item["noise"] = self.fixed.noise(row, draw, item["chosen"].shape)
        item["level"] = self.fixed.level(row, draw, schedule_for(self.schedule, item["chosen"]))
        if self.fixed.drops_caption(row, draw):
            item["condition"] = item["condition"] | self.unconditional
        if self.references is not None:
            errors, levels = self.references.at(int(self.cached.places[pair]))
            if levels[draw] != item["level"]:
                # The same settings, and other numbers: a torch whose generators changed, or a schedule that did.
                raise CacheError(
                    f"{row_name(row)}: the reference's error was computed at noise level {levels[draw]}, expected "
                    f"this run's {item['level']}; `sipo precompute` into another cache computes it again"
                )
            item["ref_error"] = errors[draw]
        return item


def split_pairs(cached: CachedPairs, held_out: int, seed: int) -> tuple[CachedPairs, CachedPairs]:
    """Keeps pairs from training, for validation.

    All pairs of a prompt go to one side: a prompt seen in training would flatter the validation. Prompts are held
    out in a random order while their pairs still fit, so that there are ``held_out`` pairs or, where the prompts'
    sizes do not allow it, as many fewer as need be.

    Args:
        cached: all pairs.
        held_out: pairs to keep from training; 0 keeps none.
        seed: of the choice, which depends on the prompts and nothing else.

    Returns:
        Pairs for training and for validation, both in the order they had.

    Raises:
        ValueError: fewer than 0, so many that none is left to train on, or no prompt with so few pairs.
    """
    if not 0 <= held_out < len(cached):
        raise ValueError(f"held_out={held_out}: expected at least 0 and fewer than the {len(cached)} pairs there are")
    by_prompt: dict[str, list[int]] = {}
    for row, prompt in zip(cached.rows.tolist(), cached.cache.prompt_of[cached.places].tolist(), strict=True):
        key, _, _ = cached.cache.prompt_keys[prompt].partition("-")  # of the prompt, where every pair has its own
        by_prompt.setdefault(key, []).append(row)
    # Ordered by a hash of seed and prompt, so that more pairs in a later version of the data move no prompt.
    order = sorted(by_prompt, key=lambda prompt: derive_seed(seed, RandomStream.HELD_OUT, int(prompt, 16)))
    kept_out: set[int] = set()
    for prompt in order:
        if len(kept_out) + len(by_prompt[prompt]) <= held_out:
            kept_out.update(by_prompt[prompt])
    if held_out and not kept_out:
        least = min(map(len, by_prompt.values()))
        raise ValueError(f"held_out={held_out}: every prompt has {least} pairs or more, expected at least as many")
    sides: tuple[list[int], list[int]] = ([], [])
    for row in cached.rows.tolist():
        sides[row in kept_out].append(row)
    training, validation = (CachedPairs(cached.cache, rows) for rows in sides)
    return training, validation


def _by_value(values: Tensor) -> list[list[int]]:
    """Groups the indices of equal values, in the order of the values."""
    return [(values == value).nonzero()[:, 0].tolist() for value in values.unique().tolist()]


def _place(places: Tensor, index: int) -> int:
    if not -len(places) <= index < len(places):
        raise IndexError(f"pair {index}: expected an index of {len(places)} pairs")
    return int(places[index])
