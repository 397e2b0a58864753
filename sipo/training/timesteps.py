"""Draws noise levels at which the mask keeps pairs (docs/math.md §4).

The mask drops a pair whose smaller importance ratio is below a threshold, which depends above all on the noise level.
So the run keeps the mean of that ratio for each bin of noise levels, and skips bins whose mean is below the threshold.
Only :data:`EXPLORATION` of the pairs still draw from all bins, so that a bin that recovers is noticed. If every bin
would be skipped, none is.

Skipped pairs would have had a gradient of zero. The gradient's direction therefore stays the same on average; its
length grows, because the loss is a mean over more pairs that take part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sipo.protocols import PairLoss, Schedule
from sipo.seeds import RandomStream, derive_seed
from sipo.training.statistics import NoiseBins
from sipo.training.stream import step_levels
from sipo_kernels import LossOptions

BINS = 100
"""Number of bins, of equal width over the schedule's noise levels."""

EXPLORATION = 0.05
"""Share of pairs whose noise level is drawn from all bins."""

LEAST_PAIRS = 8
"""Pairs that a bin must have had before it can be skipped; a skipped bin is judged by the last so many."""

MEMORY = 64
"""Pairs, roughly, in the running mean of a sampled bin: ratios change as the policy does."""

_ROUNDS = 32  # draws for a pair, of which the first in a sampled bin is taken


class InformativeTimesteps:
    """Draws noise levels from the bins whose running mean of the importance ratio is above the threshold.

    The sums since the last log line stay on the device. They are read together with the next log line, and only that
    read changes the means, so draws depend only on checkpointed state.

    Args:
        loss_fn: of a method that masks.
        device: of the sums.
        seed: of the draws.
        distribution: as the schedule's ``sample_levels`` takes it.

    Raises:
        ValueError: the loss has no mask, or its schedule no range of noise levels.
    """

    def __init__(self, loss_fn: PairLoss, device: torch.device, seed: int, distribution: str) -> None:
        schedule: Any = loss_fn.schedule
        options = getattr(loss_fn, "options", None)
        self.threshold = 0.0
        if isinstance(options, LossOptions) and options.method != "diffusion_dpo":
            self.threshold = options.mask_threshold
        if self.threshold <= 0:
            raise ValueError("timestep_sampling='informative': expected a loss with a mask, this one drops no pairs")
        noise_bins = NoiseBins.of(schedule, BINS)
        if noise_bins is None:
            kind = getattr(schedule, "kind", None)
            raise ValueError(f"timestep_sampling='informative': schedule.kind={kind!r}, expected discrete or flow")
        self.bin_of = noise_bins
        self.bins = noise_bins.bins
        self.seed = seed
        self.distribution = distribution
        self.window = torch.zeros(2, self.bins, dtype=torch.float32, device=device)  # sums of ratios, counts of pairs
        self.numbers = torch.arange(self.bins, device=device)[:, None]
        self.means = [0.0] * self.bins
        self.counts = [0.0] * self.bins

    def sample(self, schedule: Schedule, n: int, step: int) -> Tensor:
        """Draws the noise levels of all ``n`` pairs of an optimiser step; ``[n]`` on the CPU."""
        skipped = torch.tensor(self._skipped())
        if not skipped.any():
            return step_levels(schedule, n, step, self.seed, self.distribution)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, RandomStream.LEVELS, step))
        drawn = schedule.sample_levels(_ROUNDS * n, generator, distribution=self.distribution)
        drawn = drawn.view(_ROUNDS, n)
        taken = ~skipped[self.bin_of(drawn)]
        taken[0] |= torch.rand(n, generator=generator, dtype=torch.float32) < EXPLORATION
        first = taken.int().argmax(dim=0, keepdim=True)  # 0 where none is taken
        return drawn.gather(0, first)[0]

    def add(self, levels: Tensor, output: Any) -> None:
        """Adds one pass's ratios, without waiting for the device.

        Args:
            levels: ``[B]`` on the device.
            output: has ``log_ratio`` ``[2B]``, as :class:`sipo_kernels.PairLossOutput`.
        """
        ratio = torch.minimum(*output.log_ratio.detach().float().chunk(2)).exp()
        hits = (self.numbers == self.bin_of(levels)) & torch.isfinite(ratio)
        self.window += torch.stack([torch.where(hits, ratio, 0.0).sum(dim=1), hits.sum(dim=1)])

    def absorb(self, window: list[float]) -> None:
        """Updates the means by a window that was read and summed over processes, and starts a new window.

        Args:
            window: :attr:`window`, flattened.
        """
        for i in range(self.bins):
            total, count = window[i], window[self.bins + i]
            if count:
                self.counts[i] = min(self.counts[i] + count, MEMORY)
                self.means[i] += min(1.0, count / self.counts[i]) * (total / count - self.means[i])
                if self.means[i] < self.threshold:  # few pairs from here on, so each must count
                    self.counts[i] = min(self.counts[i], LEAST_PAIRS)
        self.window.zero_()

    @property
    def share(self) -> float:
        """Share of bins that are sampled."""
        return 1 - sum(self._skipped()) / self.bins

    def progress(self) -> dict[str, list[float]]:
        """Returns the means and counts as JSON values."""
        return {"means": self.means, "counts": self.counts}

    def restore(self, progress: dict[str, list[float]], window: Tensor) -> None:
        """Restores what :meth:`progress` returned, and :attr:`window`.

        Raises:
            ValueError: another number of bins, or values that are not numbers.
        """
        means, counts = list(progress["means"]), list(progress["counts"])
        if len(means) != self.bins or len(counts) != self.bins or window.shape != self.window.shape:
            raise ValueError(f"statistics of {len(means)} bins of noise levels, expected {self.bins}")
        if not all(isinstance(value, (int, float)) for value in (*means, *counts)):
            raise ValueError("statistics of noise levels are not numbers")
        self.means, self.counts = means, counts
        self.window = window.to(self.window.device)

    def _skipped(self) -> list[bool]:
        """Tells for each bin whether it is skipped; none is if all would be."""
        low = [n >= LEAST_PAIRS and mean < self.threshold for n, mean in zip(self.counts, self.means, strict=True)]
        return low if not all(low) else [False] * self.bins
