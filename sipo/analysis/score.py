"""Implicit rewards of pairs by a model against its reference, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sipo.analysis.facts import accuracy_se, beyond_chance
from sipo.batch import PairBatch, collate
from sipo.families.network import evaluating
from sipo.loss import SIPOLoss
from sipo.progress import track
from sipo.protocols import PairDataset, Predict
from sipo.schedule import NoiseSchedule, schedule_for
from sipo.seeds import RandomStream, derive_seed
from sipo.training.forward import PairForward, ReferenceModel
from sipo.training.stream import batches_in_order

DRAWS = 16
"""Draws of noise and noise level for each pair."""

DECIDED = 2.0
"""A pair counts as decided when its margin is so many standard errors from 0."""

_POOL = 1 << 16  # noise levels that stand for their distribution
_FIXED = ("noise", "level", "ref_error")  # of an item with a draw of its own, in whose place ours come


@dataclass(frozen=True)
class SingleDevice:
    """Stands in for an accelerator in :class:`PairForward`, for unwrapped networks on one device.

    Attributes:
        device: where they are.
    """

    device: torch.device
    is_fsdp2: bool = False
    mixed_precision: str = "no"

    def autocast(self) -> AbstractContextManager[None]:
        """Networks compute in the types that they have."""
        return nullcontext()


@dataclass(frozen=True)
class PairScores:
    """Implicit rewards of ``N`` pairs; tensors ``[N]`` float64 on the CPU, NaN where a prediction was not finite.

    Attributes:
        chosen: reward of the chosen sample, ``−½ β`` times the mean of its ``error_gap`` over draws (docs/math.md §2,
            §5).
        rejected: likewise of the rejected sample.
        chosen_se: its standard error over draws.
        rejected_se: likewise.
        margin: ``chosen − rejected``: the mean over draws of the logit of ``diffusion_dpo``.
        margin_se: its standard error, from the differences draw by draw: both samples see the same noise.
        beta: β.
        draws: of each pair.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_se: Tensor
    rejected_se: Tensor
    margin: Tensor
    margin_se: Tensor
    beta: float
    draws: int

    def __len__(self) -> int:
        return len(self.margin)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Returns one JSON object for each pair, in the data set's order; numbers that are not finite become null."""
        names = ("chosen", "chosen_se", "rejected", "rejected_se", "margin", "margin_se")
        columns = [getattr(self, name).tolist() for name in names]
        keys = [name if name.startswith("margin") else f"reward_{name}" for name in names]
        for index, row in enumerate(zip(*columns, strict=True)):
            numbers = {key: value if math.isfinite(value) else None for key, value in zip(keys, row, strict=True)}
            yield {"index": index, **numbers}

    def summary(self) -> dict[str, Any]:
        """Returns how well the rewards agree with the labels, over the pairs whose margin is finite.

        Returns:
            ``pairs`` and ``nonfinite_pairs``; ``accuracy``, the share of margins > 0, a tie ½; ``decided``, the share
            of pairs whose margin is two standard errors from 0, ``decided_pairs``, their number, and
            ``decided_accuracy`` among these; ``margin``, the mean; each with its standard error over pairs (``_se``);
            ``beyond_chance``, whether coin flips would hardly rank so many right (the sign test). ``None`` for what
            so few pairs do not give.
        """
        finite = self.margin.isfinite()
        margin, se = self.margin[finite], self.margin_se[finite]
        right = (margin > 0).double() + 0.5 * (margin == 0).double()
        decided = margin.abs() > DECIDED * se
        accuracy, accuracy_se = _share(right)
        share, share_se = _share(decided.double())
        among, among_se = _share(right[decided])
        mean, mean_se = _mean(margin)
        return {
            "pairs": len(self),
            "nonfinite_pairs": int((~finite).sum()),
            "draws": self.draws,
            "beta": self.beta,
            "accuracy": accuracy,
            "accuracy_se": accuracy_se,
            "beyond_chance": accuracy is not None and beyond_chance(accuracy, len(right)),
            "decided": share,
            "decided_se": share_se,
            "decided_pairs": int(decided.sum()),
            "decided_accuracy": among,
            "decided_accuracy_se": among_se,
            "margin": mean,
            "margin_se": mean_se,
        }

    def describe(self) -> str:
        """Formats the summary for a terminal."""
        found = self.summary()
        lines = [f"{found['pairs']} pairs, {found['draws']} draws each, beta {found['beta']:g}"]
        if found["nonfinite_pairs"]:
            lines.append(f"{found['nonfinite_pairs']} pairs left out: a NaN or an infinity")
        whole = found["pairs"] - found["nonfinite_pairs"]
        if whole:
            chance = "more often than by chance" if found["beyond_chance"] else "no more often than chance explains"
            share = _with_error(found, "accuracy", 100, ".1f")
            lines.append(f"the chosen sample is preferred in {share} % of {whole}, {chance}")
            lines.append(f"mean margin {_with_error(found, 'margin', 1, '.4g')} (chosen less rejected)")
            share = _with_error(found, "decided", 100, ".1f")
            decided = f"{share} % are decided at {DECIDED:g} standard errors"
            if found["decided_pairs"]:
                share = _with_error(found, "decided_accuracy", 100, ".1f")
                decided += f", {share} % of these {found['decided_pairs']} for the chosen sample"
            lines.append(decided)
        return "\n".join(lines)


def score_pairs(
    policy: nn.Module,
    reference: ReferenceModel,
    schedule: NoiseSchedule,
    dataset: PairDataset,
    predict: Predict,
    *,
    beta: float,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 16,
    distribution: str = "uniform",
    accelerator: Any = None,
    progress: bool | None = None,
) -> PairScores:
    """Computes implicit rewards of every pair of a data set (docs/math.md §2, §5), each over ``draws`` draws.

    A pair's levels are stratified: two from each of ``draws / 2`` equally likely parts of the distribution, so that
    fewer draws do than at random, and that each part says by itself how far its two are apart. Both samples of a
    pair share level and noise. The draws of a pair follow from the seed and its index alone, also where an item has
    draws of its own.

    Args:
        policy: the network, on its device; run in evaluation mode, and put back as it was.
        reference: a frozen copy, or ``AdapterOff``; a copy is moved to the policy's device and frozen.
        schedule: the noise schedule that the policy was trained with.
        dataset: the pairs; chosen samples are those that are preferred.
        predict: calls a network.
        beta: β, which scales rewards and their errors and moves no accuracy.
        draws: an even number.
        seed: of levels and noise.
        batch_size: pairs in one forward pass, ``2 * batch_size`` samples.
        distribution: of the levels, as ``schedule.sample_levels`` takes it; training's.
        accelerator: for mixed precision and wrapped networks; none for networks as they are.
        progress: as in :mod:`sipo.progress`.

    Returns:
        The rewards. The same arguments give the same numbers; another ``batch_size`` the same but for rounding.

    Raises:
        ValueError: a number out of its range, no pairs, or no reference.
    """
    if draws < 2 or draws % 2:
        raise ValueError(f"draws={draws}: expected an even number, at least 2")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    if len(dataset) == 0:
        raise ValueError("the data set holds 0 pairs, expected at least 1")
    if reference is None:
        raise ValueError("reference=None: expected a network, or AdapterOff")
    device = next(policy.parameters()).device
    loss_fn = SIPOLoss(schedule, method="diffusion_dpo", beta=beta)
    accelerator = SingleDevice(device) if accelerator is None else accelerator
    forward = PairForward(loss_fn, predict, reference, accelerator, offload=False)
    batches = batches_in_order(dataset, batch_size)
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=lambda items: collate([_without(item, _FIXED) for item in items]),
    )
    levels: dict[NoiseSchedule, Tensor] = {}  # by the schedule of a size
    noise_seed = derive_seed(seed, RandomStream.SCORE_NOISE, 0)
    gaps = torch.empty(2, draws, len(dataset), dtype=torch.float64)  # chosen samples' and rejected samples'
    with torch.no_grad(), evaluating(policy.modules()):
        for rows, batch in zip(batches, track(loader, "scoring", "batches", progress), strict=True):
            pairs, found = PairBatch.of_items(batch), []
            own = schedule_for(schedule, pairs.chosen)
            if own not in levels:
                levels[own] = _stratified(own, len(dataset), draws, seed, distribution)
            for draw in range(draws):
                positions = [row * draws + draw for row in rows]
                output, _ = forward(policy, pairs, positions, levels[own][draw, rows], seed=noise_seed)
                found.append(output.error_gap.double().view(2, -1))  # type: ignore[attr-defined]
            gaps[:, :, rows] = torch.stack(found, dim=1).cpu()  # one wait for the device a batch
    chosen, rejected = -0.5 * beta * gaps
    (c, c_se), (r, r_se), (m, m_se) = (_over_draws(rewards) for rewards in (chosen, rejected, chosen - rejected))
    return PairScores(c, r, c_se, r_se, m, m_se, beta, draws)


def _over_draws(values: Tensor) -> tuple[Tensor, Tensor]:
    """Averages over draws ``[K, N]``, rows ``2i`` and ``2i + 1`` from one stratum; returns mean and standard error.

    The two of a stratum are independent, so their squared difference is twice its variance, without bias. The variance
    over all draws would count what stratification has taken out: how the mean moves with the level.
    """
    differences = values[0::2] - values[1::2]
    return values.mean(dim=0), differences.square().sum(dim=0).sqrt() / len(values)


def _stratified(schedule: NoiseSchedule, pairs: int, draws: int, seed: int, distribution: str) -> Tensor:
    """Draws noise levels ``[draws, pairs]``, rows ``2i`` and ``2i + 1`` from part ``i`` of the sorted distribution."""
    generator = torch.Generator().manual_seed(derive_seed(seed, RandomStream.SCORE_LEVELS, 0))
    # A large sample sorted and cut stands for the quantiles of any distribution that the schedule has.
    strata = draws // 2
    size = max(_POOL // strata, 64)
    pool = schedule.sample_levels(size * strata, generator, distribution=distribution).sort().values
    picks = torch.empty(strata, 2, pairs, dtype=torch.int64)
    for pair in range(pairs):
        generator.manual_seed(derive_seed(seed, RandomStream.SCORE_PICKS, pair))
        picks[:, :, pair] = torch.randint(size, (strata, 2), generator=generator)
    starts = torch.arange(strata)[:, None, None] * size
    return pool[starts + picks].view(draws, pairs)


def _without(item: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in names}


def _mean(values: Tensor) -> tuple[float | None, float | None]:
    """Returns the mean of ``[N]`` numbers and its standard error; ``None`` if there are too few."""
    n = len(values)
    if n == 0:
        return None, None
    return values.mean().item(), None if n == 1 else values.std().item() / math.sqrt(n)


def _share(values: Tensor) -> tuple[float | None, float | None]:
    """Returns mean and standard error of ``[N]`` numbers from 0 to 1; the error is above 0 even if all are equal."""
    if len(values) == 0:
        return None, None
    share = values.mean().item()
    return share, accuracy_se(share, len(values))


def _with_error(found: dict[str, Any], name: str, scale: float, form: str) -> str:
    se = found[f"{name}_se"]
    return f"{scale * found[name]:{form}}" + ("" if se is None else f" ± {scale * se:{form}}")
