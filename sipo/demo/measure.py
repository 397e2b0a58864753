"""Measures the demo's results: how much ink, whether the digit is still readable, and the importance weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sipo.batch import PairBatch, collate, level_argument, noisy_pairs
from sipo.demo.digits import Digits, InkPairs, ink
from sipo.demo.model import predict
from sipo.loss import SIPOLoss


class SampleScores(NamedTuple):
    """Scores of a set of samples: mean pixel in [-1, 1], and the share that the judge reads as requested."""

    ink: float
    agreement: float


class DigitClassifier:
    """A classifier of real digits, which tells whether a sample still shows the digit that was asked for.

    Args:
        digits: to fit on.
        held_out: to state its own accuracy on.

    Attributes:
        accuracy: share of the held-out digits that it gets right.
    """

    def __init__(self, digits: Digits, held_out: Digits) -> None:
        from sklearn.svm import SVC

        self._classifier = SVC(C=10.0, gamma="scale")
        self._classifier.fit(digits.images.flatten(1).numpy(), digits.labels.numpy())
        self.accuracy = self._agreement(*held_out)

    def score(self, images: Tensor, classes: Tensor) -> SampleScores:
        """Scores samples ``[N, 1, 8, 8]`` that were asked to show ``classes`` ``[N]``."""
        return SampleScores(ink(images).mean().item(), self._agreement(images, classes))

    def read(self, images: Tensor) -> Tensor:
        """Digits ``[N]`` that samples ``[N, 1, 8, 8]`` show."""
        return torch.from_numpy(self._classifier.predict(images.flatten(1).numpy()))

    def _agreement(self, images: Tensor, classes: Tensor) -> float:
        return (self.read(images) == classes).double().mean().item()


@torch.no_grad()
def weight_by_timestep(
    policy: Any, reference: Any, loss_fn: SIPOLoss, pairs: InkPairs, timesteps: Tensor, seed: int, count: int = 128
) -> Tensor:
    """Measures the mean importance weight w(t) of docs/math.md §3, before clipping, on preference pairs.

    Args:
        policy: the network whose weights are asked for, in evaluation mode.
        reference: the base model.
        loss_fn: computes the log ratios, as it does in training.
        pairs: the first ``count`` of them are used, chosen and rejected samples.
        timesteps: ``[M]`` levels to measure at.
        seed: of the noise; the same noise serves all levels, which keeps the curve smooth.
        count: pairs per level.

    Returns:
        ``[M]`` float64.
    """
    generator = torch.Generator().manual_seed(seed)
    items = [pairs[i] for i in range(min(count, len(pairs)))]
    batch = PairBatch.of_items(collate(items)).to(policy.device)
    noise = torch.randn(batch.chosen.shape, generator=generator, dtype=torch.float32).to(policy.device)
    means = []
    for timestep in timesteps.tolist():
        levels = torch.full((len(items),), timestep, device=policy.device)
        noisy = noisy_pairs(batch.with_draws(noise, levels), loss_fn.schedule)
        prediction = predict(policy, noisy.samples, noisy.timesteps, noisy.condition)
        base = (
            prediction if policy is reference else predict(reference, noisy.samples, noisy.timesteps, noisy.condition)
        )
        level = level_argument(loss_fn.schedule, noisy.levels)
        log_ratio = loss_fn(prediction, base, noisy.target, **level).log_ratio
        means.append(log_ratio.double().exp().mean())
    return torch.stack(means).cpu()
