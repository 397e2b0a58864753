"""A run's final state in a few numbers, and what follows from them at every β, model and data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sipo.training.log_reader import metric_values

LN2 = math.log(2)

TAIL = 5
"""The last ``1 / TAIL`` of the steps are what a run is judged by."""

SURE = 2.0
"""Standard errors that a number has to be away from a bound to be beyond it."""

CHANCE = 0.025
"""Coin flips are called a success this often at most: one side of a 95 % interval."""

SATURATED = math.log(9)
"""The logit at which the loss of a pair is called saturated: its gradient has fallen to a tenth."""


@dataclass(frozen=True)
class RunFacts:
    """A run's final state in a few numbers (docs/math.md §8): means over its last steps, NaN where a log has none.

    Attributes:
        first, last: steps that the means are over.
        pairs: pairs in them, at least; what standard errors over pairs count.
        loss, accuracy, margin, active, model, ref, chosen_gap, rejected_gap: ``loss`` and so on.
        accuracy_se: of ``accuracy``, over pairs.
        loss_se, chosen_gap_se: of ``loss`` and ``chosen_gap``, from the scatter of the lines.
        start_active: ``active_fraction`` of the first line.
        start_pairs: pairs of the first line, at least.
        beta: as given, else estimated from logits and gaps; NaN without either.
        broken_pairs, broken_steps: non-finite ones, over the whole run.
        all_pairs, all_steps: of the whole run; ``all_pairs`` at least.
        plain: whether the loss is the sigmoid's without smoothing (docs/math.md §5); a relative's is not compared with
            ln 2.
        weighted: whether the loss of a pair has a weight, as with ``dpo_cm``: then ln 2 is the most that a pair costs
            without preference, and how much less is not in the log.
    """

    first: int
    last: int
    pairs: int
    loss: float
    accuracy: float
    margin: float
    active: float
    model: float
    ref: float
    chosen_gap: float
    rejected_gap: float
    accuracy_se: float
    loss_se: float
    chosen_gap_se: float
    start_active: float
    start_pairs: int
    beta: float
    broken_pairs: int
    broken_steps: int
    all_pairs: int
    all_steps: int
    plain: bool
    weighted: bool

    @property
    def pair_loss(self) -> float:
        """Loss of a pair that takes part; ln 2 for a policy that prefers nothing, less where pairs are weighted."""
        return self.loss / self.active if self.active > 0 and self.plain else math.nan

    @property
    def earned(self) -> float:
        """How much of the loss reduction that the ranking makes possible has been reached.

        With a share ``p`` of pairs ranked right, logits of the right size bring the loss from ln 2 down to the entropy
        of ``p`` and, where they know which pairs are doubtful, below it. 1: logits that are as large as they should be.
        Near 0: far too small. Below 0: too large, as the pairs that are ranked wrong cost more than the others earn.
        """
        if self.weighted:
            return math.nan
        p = self.accuracy
        worth = LN2 + p * math.log(p) + (1 - p) * math.log1p(-p) if 0 < p < 1 else LN2
        return (LN2 - self.pair_loss) / worth if worth > 0 else math.nan

    @property
    def separation(self) -> float:
        """How far chosen and rejected samples have been told apart, as a share of the reference's error."""
        return (self.rejected_gap - self.chosen_gap) / self.ref if self.ref > 0 else math.nan

    @property
    def saturation(self) -> float:
        """How far apart they have to be for the loss to saturate, as a share of the reference's error."""
        return saturation(self.beta, self.ref) if self.plain else math.nan

    @property
    def grown(self) -> float:
        """The policy's error over the reference's."""
        return self.model / self.ref if self.ref > 0 else math.nan

    @property
    def ranks(self) -> bool:
        """Whether more than half of the pairs are ranked right, beyond chance."""
        return self.accuracy - 0.5 > SURE * self.accuracy_se


def gather(
    lines: Sequence[dict[str, Any]],
    *,
    pairs_per_step: int = 1,
    beta: float | None = None,
    plain: bool = True,
    weighted: bool = False,
) -> RunFacts:
    """Gathers the facts of a run.

    Args:
        lines: training lines of ``metrics.jsonl``, at least one.
        pairs_per_step: of all processes; 1 where it is not known, which makes standard errors too large.
        beta: the loss's, where it is known.
        plain: whether the loss has no other loss type than the sigmoid's, and that without smoothing.
        weighted: whether the loss of a pair has a weight of at most 1.

    Raises:
        ValueError: no lines.
    """
    if not lines:
        raise ValueError("0 log lines: expected at least one")
    steps = [int(line["step"]) for line in lines]
    since = [step - before for step, before in zip(steps, [0, *steps], strict=False)]
    start = steps[-1] - steps[-1] / TAIL
    # At least three lines, where there are so many, for a scatter.
    begin = min(next(i for i, step in enumerate(steps) if step > start), max(0, len(steps) - 3))
    tail, weights = lines[begin:], since[begin:]
    covered = sum(weights)

    def mean(name: str) -> tuple[float, float]:
        found = [(v, w) for v, w in zip(metric_values(tail, name), weights, strict=True) if not math.isnan(v)]
        total = sum(w for _, w in found)
        if not total:
            return math.nan, math.nan
        center = math.fsum(v * w for v, w in found) / total
        if len(found) < 2:
            return center, math.nan
        scatter = math.fsum((w / total) ** 2 * (v - center) ** 2 for v, w in found)
        return center, math.sqrt(scatter * len(found) / (len(found) - 1))

    pairs = covered * pairs_per_step
    masks = any("active_fraction" in line for line in lines)  # a loss of one's own that drops no pairs need not say so
    accuracy, _ = mean("rewards/accuracies")
    (loss, loss_se), (chosen_gap, chosen_gap_se), (rejected_gap, _), (margin, _) = map(
        mean, ("loss", "chosen_gap", "rejected_gap", "rewards/margins")
    )
    if beta is None:
        beta = 2 * margin / (rejected_gap - chosen_gap) if rejected_gap > chosen_gap and margin > 0 else math.nan
    return RunFacts(
        first=steps[begin - 1] + 1 if begin else 1,
        last=steps[-1],
        pairs=pairs,
        loss=loss,
        accuracy=accuracy,
        margin=margin,
        active=mean("active_fraction")[0] if masks else 1.0,
        model=mean("model_mse")[0],
        ref=mean("ref_mse")[0],
        chosen_gap=chosen_gap,
        rejected_gap=rejected_gap,
        accuracy_se=accuracy_se(accuracy, pairs),
        loss_se=0.0 if math.isnan(loss_se) else loss_se,
        chosen_gap_se=0.0 if math.isnan(chosen_gap_se) else chosen_gap_se,
        start_active=metric_values(lines, "active_fraction")[0] if masks else 1.0,
        start_pairs=since[0] * pairs_per_step,
        beta=beta,
        broken_pairs=sum(int(line.get("nonfinite_pairs") or 0) for line in lines),
        broken_steps=sum(int(line.get("nonfinite_steps") or 0) for line in lines),
        all_pairs=steps[-1] * pairs_per_step,
        all_steps=steps[-1],
        plain=plain,
        weighted=weighted,
    )


@dataclass(frozen=True)
class HeldOut:
    """Results of one validation, on pairs held out from training.

    Attributes:
        step: of the run.
        pairs: that it is over, all finite; draws of one pair are one.
        accuracy: share ranked right.
        loss: of a pair that takes part, NaN where the log has none.
        no_preference: the same for a policy whose every logit is 0, NaN where the log has none.
    """

    step: int
    pairs: int
    accuracy: float
    loss: float
    no_preference: float

    @property
    def se(self) -> float:
        """Standard error of ``accuracy`` over pairs."""
        return accuracy_se(self.accuracy, self.pairs)

    @property
    def ranks(self) -> bool:
        """Whether more pairs are ranked right than coin flips would rank."""
        return beyond_chance(self.accuracy, self.pairs)


def held_out(validation: Sequence[dict[str, Any]]) -> HeldOut | None:
    """Returns the last validation of a run; not its best one, as the best of many is good by luck.

    ``None`` where the log has none, or none of a finite pair.
    """
    if not validation:
        return None
    line = validation[-1]
    names = ("pairs", "rewards/accuracies", "loss", "no_preference_loss", "active_fraction")
    pairs, accuracy, loss, without, active = (metric_values([line], f"validation/{name}")[0] for name in names)
    if math.isnan(accuracy) or not pairs >= 1:
        return None
    active = 1.0 if math.isnan(active) else active or math.nan  # a loss of one's own that drops no pairs
    return HeldOut(int(line["step"]), int(pairs), accuracy, loss / active, without / active)


def describe_held_out(validation: Sequence[dict[str, Any]]) -> str:
    """Describes the last validation in one line."""
    seen = held_out(validation)
    if seen is None:
        return "no pair is finite"
    chance = "more than by chance" if seen.ranks else "no more than chance explains"
    loss = metric_values(validation[-1:], "validation/loss")[0]
    share = f"{100 * seen.accuracy:.1f} ± {100 * seen.se:.1f} % of {seen.pairs:,} pairs"
    return f"loss {loss:.4f}, {share} ranked right, {chance}"


def accuracy_se(accuracy: float, pairs: int) -> float:
    """Returns the standard error of a share of pairs."""
    # One pair more of each kind: not even an accuracy of 1 is certain.
    smooth = (accuracy * pairs + 1) / (pairs + 2)
    return math.sqrt(smooth * (1 - smooth) / pairs)


def beyond_chance(accuracy: float, pairs: int) -> bool:
    """Whether more pairs are ranked right than chance explains: the one-sided sign test.

    By the binomial distribution itself, so that coin flips pass in :data:`CHANCE` of cases at most, whatever the number
    of pairs and however near to 1 the accuracy. Two standard errors, or a Wilson interval, let through up to 3.8 % of
    them at 16 pairs, and 3.5 % at 8. It is the same as that a Clopper-Pearson interval of 95 % lies above one half.

    Args:
        accuracy: share of pairs; half a pair, as a tie counts, is none here.
        pairs: independent ones.
    """
    right = math.floor(accuracy * pairs + 1e-6)  # a mean of so many is off by rounding
    if 2 * right <= pairs:
        return False
    whole = math.lgamma(pairs + 1) - pairs * LN2
    total = 0.0
    for k in range(right, pairs + 1):  # terms fall throughout, so that of billions of pairs a few are enough
        term = math.exp(whole - math.lgamma(k + 1) - math.lgamma(pairs - k + 1))
        total += term
        if total > CHANCE or term < 1e-15:
            break
    return total <= CHANCE


def pairs_to_tell(accuracy: float) -> int:
    """Estimates how many pairs tell an accuracy above one half from chance, to two digits."""
    margin = accuracy - 0.5
    # Two standard errors of chance, and the pair and a half by which whole pairs may fall short.
    pairs = ((1 + math.sqrt(1 + 6 * margin)) / (2 * margin)) ** 2
    unit = 10 ** max(0, math.floor(math.log10(pairs)) - 1)
    return math.ceil(pairs / unit) * unit


def is_plain(loss_type: str | None, label_smoothing: float | None) -> bool:
    """Whether a loss is the sigmoid's (the default) without smoothing (docs/math.md §5)."""
    return loss_type in (None, "sigmoid") and not label_smoothing


def saturation(beta: float, ref: float) -> float:
    """Returns how far apart a pair's two errors are where its loss saturates, as a share of the reference's error."""
    return 2 * SATURATED / (beta * ref) if beta * ref > 0 else math.nan
