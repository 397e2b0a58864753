"""The demo's real data: the 8x8 scanned digits that scikit-learn ships, and preference pairs made from them.

Everything is a function of the data and a seed, so two runs see the same images and the same pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = 10
"""Digit classes, 0 to 9."""

IMAGE_SIZE = 8
"""Height and width of a digit, in pixels."""

_HELD_OUT_EVERY = 5


class Digits(NamedTuple):
    """Digits: ``images`` ``[N, ...]`` float32 in [-1, 1] (1 is full ink), ``labels`` ``[N]`` int64.

    The demo's images are ``[N, 1, 8, 8]``.
    """

    images: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """Loads the 1,797 digits from scikit-learn's own copy and splits them.

    Every fifth image is held out: neither the base model nor the pairs nor the classifier that judges the
    samples ever sees those, so the classifier's accuracy on them is an honest one.

    Returns:
        The 1,437 digits to learn from and the 360 held out.
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    # The scans hold counts of dark pixels in 4x4 blocks, 0 to 16.
    images = torch.from_numpy(bunch.images).float().div(8.0).sub(1.0).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(labels)) % _HELD_OUT_EVERY == 0
    return Digits(images[~held_out], labels[~held_out]), Digits(images[held_out], labels[held_out])


def ink(images: Tensor) -> Tensor:
    """Returns the mean pixel of each image, the demo's reward: -1 is blank paper, +1 is solid ink.

    Args:
        images: ``[N, ...]`` in [-1, 1].

    Returns:
        ``[N]`` in the images' type.
    """
    return images.flatten(1).mean(dim=1)


def draw_pairs(digits: Digits, rewards: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws pairs of images of one class and of different reward.

    Args:
        digits: the images.
        rewards: of each image, ``[N]``.
        count: pairs to draw.
        generator: of the draws.

    Returns:
        ``[count, 2]`` int64: the rows of the chosen images, which have the higher reward, and of the rejected ones.
    """
    by_class = [torch.nonzero(digits.labels == c).flatten() for c in range(CLASSES)]
    usable = [members for members in by_class if len(rewards[members].unique()) > 1]
    drawn = torch.randint(len(usable), (count,), generator=generator)
    pairs = torch.empty(count, 2, dtype=torch.long)
    for number, members in enumerate(usable):
        rows = torch.nonzero(drawn == number).flatten()
        # Any pair of equal reward has no chosen sample; drawing again keeps the others' odds unchanged.
        while len(rows):
            picks = members[torch.randint(len(members), (len(rows), 2), generator=generator)]
            pairs[rows] = picks
            rows = rows[rewards[picks[:, 0]] == rewards[picks[:, 1]]]
    swap = rewards[pairs[:, 0]] < rewards[pairs[:, 1]]
    pairs[swap] = pairs[swap].flip(1)
    return pairs


class DigitPairs(Dataset[dict[str, Tensor]]):
    """Preference pairs of images.

    Item ``i`` is ``{"chosen": image, "rejected": image, "condition": 0-d int64 class}``.

    Args:
        digits: the images.
        pairs: rows of the chosen and of the rejected images, ``[N, 2]``.
    """

    def __init__(self, digits: Digits, pairs: Tensor) -> None:
        self.pairs, self._digits = pairs, digits

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chosen, rejected = self.pairs[index]
        images, labels = self._digits
        return {"chosen": images[chosen], "rejected": images[rejected], "condition": labels[chosen]}


class InkPairs(DigitPairs):
    """Preference pairs: of two different digits of one class, the one with more ink is chosen."""

    def __init__(self, digits: Digits, count: int = 10_000, seed: int = 0) -> None:
        super().__init__(digits, draw_pairs(digits, ink(digits.images), count, torch.Generator().manual_seed(seed)))
