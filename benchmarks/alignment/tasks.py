"""What is aligned: real images or clips, a base model of them, rewards that are known exactly, and preference pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sipo.demo import measure as demo_measure
from sipo.demo import model as demo_model
from sipo.demo.digits import CLASSES, DigitPairs, Digits, draw_pairs, ink, load_digits
from sipo.files import load_tensors, save_tensors
from sipo.protocols import Predict

PAIRS = 4_000
"""Distinct pairs of a full data set; a run of 300 steps of 16 pairs sees each 1.2 times."""

BASE_SAMPLES = 1_500
"""Samples of the base model that on-policy pairs are made of."""

Reward = Callable[[Tensor], Tensor]


class SampleJudge(Protocol):
    """Reads samples, and says where they lie: fitted on the real training data.

    Attributes:
        accuracy: share of held-out real ones that it reads right.
    """

    accuracy: float

    def read(self, images: Tensor) -> Tensor:
        """Classes ``[N]``."""

    def features(self, images: Tensor) -> Any:
        """``[N, d]`` float64, for distances between sets."""


@dataclass(frozen=True)
class Task:
    """Everything about a task but its method.

    Attributes:
        name: in results files.
        data: the real data: to learn from, and held out.
        load_base: the base model (evaluation mode) and its diffusers scheduler.
        predict: calls the network.
        sample: ``(model, scheduler, classes [N], seed) -> [N, ...]`` on the CPU; one seed, one initial noise.
        rewards: by name; ``[N, ...] -> [N]``, higher is better.
        judge: reads samples.
        steps: optimiser steps of a run.
        batch_size: pairs of a step.
        learning_rate: of AdamW, for every method and β.
        samples: drawn to measure a model.
        distribution: of noise levels, as the base model was trained and the schedule's ``sample_levels`` takes it.
    """

    name: str
    data: Callable[[], tuple[Digits, Digits]]
    load_base: Callable[[], tuple[nn.Module, Any]]
    predict: Predict
    sample: Callable[[Any, Any, Tensor, int], Tensor]
    rewards: dict[str, Reward]
    judge: Callable[[], SampleJudge]
    steps: int
    batch_size: int
    learning_rate: float
    samples: int
    distribution: str = "uniform"


def slant(images: Tensor) -> Tensor:
    """Returns how far digits lean to the right: the shear of their ink, in columns per row upwards.

    Covariance of a pixel's column and height over the variance of its height, weighted by ink.

    Args:
        images: ``[N, 1, H, W]`` in [-1, 1].

    Returns:
        ``[N]``; 0 for an upright stroke, and for blank paper.
    """
    weight = (images[:, 0].double() + 1) / 2
    height, width = weight.shape[1:]
    up = -torch.arange(height, dtype=torch.float64)[:, None]
    right = torch.arange(width, dtype=torch.float64)[None, :]
    total = weight.sum((1, 2)).clamp(min=1e-9)
    mean_up = (weight * up).sum((1, 2)) / total
    mean_right = (weight * right).sum((1, 2)) / total
    du, dr = up - mean_up[:, None, None], right - mean_right[:, None, None]
    covariance, variance = (weight * du * dr).sum((1, 2)), (weight * du * du).sum((1, 2))
    return (covariance / variance.clamp(min=1e-9)).to(images.dtype)


class DigitJudge:
    """The demo's classifier of real digits, with the first principal components of the pixels as features."""

    _COMPONENTS = 16

    def __init__(self) -> None:
        from sklearn.decomposition import PCA

        digits, held_out = load_digits()
        self._judge = demo_measure.DigitClassifier(digits, held_out)
        self.accuracy = self._judge.accuracy
        self._pca = PCA(self._COMPONENTS, random_state=0).fit(digits.images.flatten(1).double().numpy())

    def read(self, images: Tensor) -> Tensor:
        return self._judge.read(images)

    def features(self, images: Tensor) -> Any:
        return self._pca.transform(images.flatten(1).double().numpy())


DIGITS = Task(
    name="digits",
    data=functools.cache(load_digits),
    load_base=demo_model.load_base,
    predict=demo_model.predict,
    sample=demo_model.sample,
    rewards={"ink": ink, "slant": slant},
    judge=functools.cache(DigitJudge),
    steps=300,
    batch_size=16,
    learning_rate=2e-5,
    samples=400,
)


@functools.cache
def get(name: str) -> Task:
    """Returns a task by its name: "digits", "moving-cogvideox" or "moving-wan".

    Raises:
        ValueError: another name.
    """
    if name == DIGITS.name:
        return DIGITS
    from benchmarks.alignment import moving_digits
    from benchmarks.alignment.train_moving_digits import DISTRIBUTION

    kind = name.removeprefix("moving-")
    if kind not in moving_digits.KINDS or kind == name:
        known = ", ".join(f"moving-{kind}" for kind in moving_digits.KINDS)
        raise ValueError(f"task={name!r}: expected one of {DIGITS.name}, {known}")

    return Task(
        name=name,
        data=lambda: moving_digits.load_moving(kind),
        load_base=lambda: moving_digits.load_base(kind),
        predict=moving_digits.predict(kind),
        sample=moving_digits.sample,
        rewards={"ink": moving_digits.ink, "smoothness": moving_digits.smoothness},
        judge=functools.cache(lambda: moving_digits.ClipJudge(*moving_digits.load_moving(kind))),
        steps=150,
        batch_size=16,
        learning_rate={"cogvideox": 5e-5, "wan": 1e-4}[kind],
        samples=200,
        distribution=DISTRIBUTION[kind],
    )


class RewardPairs(DigitPairs):
    """Preference pairs: of two images of one class, the one with the higher reward wins.

    Args:
        images: to pair up.
        reward: decides.
        count: pairs to draw.
        noise: share of pairs whose chosen and rejected sample are exchanged.
        fraction: share of the pairs that is kept: the first ones.
        seed: of all draws.
    """

    def __init__(
        self, images: Digits, reward: Reward, *, count: int, noise: float = 0.0, fraction: float = 1.0, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        pairs = draw_pairs(images, reward(images.images), count, generator)
        wrong = torch.rand(count, generator=generator) < noise
        pairs[wrong] = pairs[wrong].flip(1)
        super().__init__(images, pairs[: max(1, round(fraction * count))])


def base_samples(task: Task, cache: Path, count: int = BASE_SAMPLES) -> tuple[Digits, Digits]:
    """Draws samples of the base model, four fifths for learning, one fifth held out; kept in ``cache``."""
    path = cache / f"{task.name}-{count}.safetensors"
    if not path.exists():
        model, scheduler = task.load_base()
        classes = torch.arange(count) % CLASSES
        images = task.sample(model, scheduler, classes, 10_000)  # a seed that no measurement uses
        cache.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"images": images.contiguous(), "labels": classes})
    found = load_tensors(path)
    images, labels, first = found["images"], found["labels"], count - count // 5
    return Digits(images[:first], labels[:first]), Digits(images[first:], labels[first:])


def frechet_distance(a: Any, b: Any) -> float:
    """Computes the squared Fréchet distance of two sets ``[N, d]``: of Gaussians with their means and covariances."""
    difference = a.mean(0) - b.mean(0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # trace of (AB)^½ by the eigenvalues of a symmetric matrix: A^½ B A^½
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ second @ root)
    return float(difference @ difference + np.trace(first) + np.trace(second) - 2 * np.sqrt(mixed.clip(min=0)).sum())


def spread_within(features: Any, classes: Tensor) -> float:
    """Returns the mean distance of two samples of one class, over classes."""
    means = []
    for c in range(CLASSES):
        own = torch.from_numpy(np.asarray(features)[(classes == c).numpy()])
        if len(own) > 1:
            means.append(torch.pdist(own).mean().item())
    return float(np.mean(means))
