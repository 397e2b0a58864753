"""Measures a model and its data before training: statistics by noise level, the verdict on them and the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sipo.analysis import figures
from sipo.analysis.facts import is_plain, saturation
from sipo.analysis.figures import nan_if_none
from sipo.analysis.findings import Finding, sort
from sipo.analysis.page import Page, Picture
from sipo.analysis.report import gradient_coefficient, gradient_share, mask_pictures
from sipo.analysis.verdicts import LOOSE
from sipo.analysis.wording import percent
from sipo.batch import PairBatch, collate
from sipo.families.network import evaluating
from sipo.protocols import PairDataset
from sipo.schedule import NoiseSchedule, schedule_for
from sipo.training.forward import PairForward
from sipo.training.statistics import NoiseBins, TimestepStatistics
from sipo.training.stream import batches_in_order, step_levels

PAIRS, LEVELS = 32, 50

SHORT = 0.001
"""A β whose loss saturates where errors differ by less than this share of the reference's hardly moves the policy."""

_DRAWN = 1 << 16  # draws that say how often each level comes in training


@dataclass(frozen=True)
class UntrainedFacts:
    """The untrained policy over the data, by noise level.

    Attributes:
        line: statistics as :mod:`sipo.training.statistics` writes them, over an even grid.
        drawn: share of training's draws in each bin.
        highest: the highest noise level at which the mask dropped a pair; ``None`` where it dropped none.
        beta: the loss's.
        threshold: of the mask; 0 for a method without one.
        plain: whether the loss is the sigmoid's without smoothing; of a relative's nothing is said about β.
    """

    line: dict[str, Any]
    drawn: list[float]
    highest: float | None
    beta: float
    threshold: float
    plain: bool = True

    def mean(self, name: str) -> float:
        """Returns the mean over the noise levels of training, not over the grid."""
        found = [(d, v) for d, v in zip(self.drawn, nan_if_none(self.line[name]), strict=True) if not math.isnan(v)]
        total = sum(d for d, _ in found)
        return math.fsum(d * v for d, v in found) / total if total else math.nan


def measure_untrained(
    policy: nn.Module,
    forward: PairForward,
    dataset: PairDataset,
    *,
    beta: float,
    pairs: int,
    levels: int,
    batch_size: int,
    seed: int,
    distribution: str,
) -> UntrainedFacts:
    """Measures the untrained policy against its reference at every noise level, without updating it.

    Args:
        policy: network on its device, run in evaluation mode and restored to its previous mode.
        forward: computes the loss, a :class:`sipo.SIPOLoss`, and holds the reference.
        dataset: the training pairs.
        beta: β of the loss, for the report.
        pairs: number of pairs to measure, taken from the start of ``dataset``.
        levels: number of noise levels, spaced evenly over the schedule.
        batch_size: pairs in one forward pass.
        seed: of the noise and of the noise levels that training would draw.
        distribution: of the noise levels in training.
    """
    loss_fn: Any = forward.loss_fn
    device = forward.device
    bins = NoiseBins.of(loss_fn.schedule, levels)
    assert bins is not None  # every family's schedule has a known kind
    statistics = TimestepStatistics(loss_fn, bins, device)
    batches = batches_in_order(dataset, batch_size, pairs)
    count = sum(map(len, batches))
    pairs_of: Counter[NoiseSchedule] = Counter()  # by the schedule of their size
    highest = torch.zeros((), dtype=torch.float32, device=device)
    dropped = torch.zeros((), dtype=torch.bool, device=device)
    with torch.no_grad(), evaluating(policy.modules()):
        for rows in batches:
            batch = PairBatch.of_items(collate([dataset[row] for row in rows]))
            pairs_of[schedule_for(loss_fn.schedule, batch.chosen)] += len(rows)
            for level in range(bins.bins):
                noise_levels = _within(bins, level, rows, count)
                positions = [row * bins.bins + level for row in rows]
                output, on_device = forward(
                    policy, batch, positions, noise_levels, seed=seed, totals=statistics.totals()
                )
                out = ~output.mask & output.logits.isfinite()  # type: ignore[attr-defined]
                highest = torch.maximum(highest, torch.where(out, on_device, 0).max())
                dropped |= out.any()
    line = statistics.take(0, statistics.window.flatten().tolist())
    assert line is not None
    drawn = torch.cat([step_levels(each, _DRAWN * n // count, 0, seed, distribution) for each, n in pairs_of.items()])
    return UntrainedFacts(
        line=line,
        drawn=(torch.bincount(bins(drawn), minlength=bins.bins) / len(drawn)).tolist(),
        highest=highest.item() if dropped else None,
        beta=beta,
        threshold=0.0 if loss_fn.options.method == "diffusion_dpo" else loss_fn.options.mask_threshold,
        plain=is_plain(loss_fn.options.loss_type, loss_fn.options.label_smoothing),
    )


def _within(bins: NoiseBins, level: int, rows: Sequence[int], pairs: int) -> Tensor:
    """Spreads noise levels evenly over a bin, from pair to pair."""
    offsets = torch.tensor([(row % pairs + 0.5) / pairs for row in rows], dtype=torch.float64)
    levels = (level + offsets) * bins.levels / bins.bins
    return levels.long() if bins.kind == "discrete" else levels.float()


# ---- What it says ----


def judge_untrained(found: UntrainedFacts) -> list[Finding]:
    """Returns the findings on a run before its first step, headline first."""
    rules: Sequence[Callable[[UntrainedFacts], Finding | None]] = (
        _nonfinite,
        _mask,
        _differs,
        _saturation,
        _clip,
        _spread,
    )
    if not sum(found.line["count"]):  # nothing else has a number
        rules = rules[:1]
    return sort([finding for rule in rules if (finding := rule(found)) is not None])


def _level(found: UntrainedFacts, level: float) -> str:
    return f"t = {level:.0f}" if found.line["kind"] == "discrete" else f"σ = {level:.3g}"


def _mask(found: UntrainedFacts) -> Finding | None:
    if not found.threshold:
        return None
    share = 1 - found.mean("active")
    evidence = (
        f"the smaller importance ratio of a pair is under {found.threshold:g} there (`loss.mask_threshold`), over "
        f"{found.line['pairs']:,} draws, weighted as training draws noise levels",
    )
    if found.highest is None:
        return Finding("mask", "note", "The mask drops no draws at the start.", evidence)
    where = f"all at or below {_level(found, found.highest)}"
    if found.highest > 0.9 * found.line["levels"]:
        where = "up to the highest noise levels"
    sentence = f"The mask drops {percent(share)} of draws at the start, {where}."
    if share <= 0.5:
        return Finding("mask", "note", sentence, evidence)
    advice = (
        "a lower loss.mask_threshold, or more loss.num_inference_steps: smaller steps have ratios nearer to 1",
        "training.timestep_sampling=informative spends no passes on levels that are dropped",
    )
    return Finding("mask", "problem" if share > 0.9 else "warning", sentence, evidence, advice)


def _saturation(found: UntrainedFacts) -> Finding | None:
    if not found.plain:
        return None
    ref = (found.mean("ref_error_chosen") + found.mean("ref_error_rejected")) / 2
    share = saturation(found.beta, ref)
    sentence = (
        f"At beta = {found.beta:g} the loss of a pair saturates where its two errors differ by {percent(share)} of the "
        "reference's."
    )
    evidence = (f"the reference's error is {ref:.3g} on average (`ref_mse`), and a logit is beta/2 times a difference",)
    if share > LOOSE:
        advice: tuple[str, ...] = (
            "a larger beta, or a low learning rate and few steps: nothing else will hold the policy",
        )
    elif share < SHORT:
        advice = ("a smaller beta, if the loss rises above ln 2 in training",)
    else:
        return Finding("beta", "note", sentence, evidence)
    return Finding("beta", "warning", sentence, evidence, advice)


def _clip(found: UntrainedFacts) -> Finding | None:
    if not found.threshold:
        return None
    share = found.mean("clipped")
    sentence = f"{percent(share)} of the weights are clipped at the start."
    return Finding("clip", "note", sentence, (f"the mean weight is {found.mean('weight'):.3f} (`weight_mean`)",))


def _spread(found: UntrainedFacts) -> Finding | None:
    shares = [d * g for d, g in zip(found.drawn, nan_if_none(found.line["grad_sq"]), strict=True) if not math.isnan(g)]
    total = sum(shares)
    if not total:
        return None
    most, held = 0, 0.0
    for share in sorted(shares, reverse=True):
        most, held = most + 1, held + share
        if held >= total / 2:
            break
    sentence = f"Half of the squared gradient comes from {percent(most / len(shares))} of the noise levels."
    return Finding("spread", "note", sentence, ("at the outputs, before the network's own weights (docs/math.md §6)",))


def _differs(found: UntrainedFacts) -> Finding | None:
    rms = math.sqrt(max(0.0, found.mean("logits_sq")))
    if not rms > 0.1:
        return None
    return Finding(
        "differs",
        "warning",
        "The policy is not the reference before the first step: their predictions differ.",
        (f"logits of {rms:.3g} (root of their mean square), where 0 is expected",),
        ("the same dtype for both (model.reference_dtype, training.mixed_precision), or a smaller beta",),
    )


def _nonfinite(found: UntrainedFacts) -> Finding | None:
    broken = sum(found.line["nonfinite"])
    if not broken:
        return None
    return Finding(
        "nonfinite",
        "problem",
        "Non-finite pairs before the first step: some predictions or latents hold a NaN or an infinity.",
        (f"{broken} of {found.line['pairs']:,} draws",),
        ("look at these pairs with `sipo data check`, and at the types in model.dtype and training.mixed_precision",),
    )


def untrained_page(
    family: str, method: str, found: UntrainedFacts, findings: Sequence[Finding], settings: dict[str, Any]
) -> Page:
    """Builds the page on a model and its data before training.

    Args:
        family, method: names of the model's family and of the loss's method.
        found, findings: what was measured, and the verdict.
        settings: flat settings to list on the page.
    """
    line = found.line
    about = (
        f"No training: {line['pairs'] // line['bins']} pairs at {line['bins']} noise levels each, policy = reference. "
        f"{method}, beta = {found.beta:g}."
    )
    errors = {name: line[f"ref_error_{name}"] for name in ("chosen", "rejected")}
    pictures = [
        *mask_pictures(
            line, {"": line["ratio"]}, {"": line["active"]}, found.threshold,
            "Healthy: low at the clean end alone, and near 1 over the rest.",
            "Healthy: only the cleanest levels are dropped.",
        ),
        Picture(
            "Weights that are clipped",
            figures.by_level(line, {"": line["clipped"]}, "share of samples", percent=True),
            "Healthy: those that the mask drops, and few others.",
        ),
        Picture(
            "The reference's error",
            figures.by_level(line, errors, "mean squared error", log=True),
            "Healthy: chosen and rejected samples alike; a level with a far larger error has a far larger gradient.",
        ),
        gradient_coefficient(line, "at the start"),
        gradient_share(line, found.drawn),
    ]  # fmt: skip
    return Page(
        f"Report: {family} before training",
        about,
        findings,
        [("By noise level", "Means over an even grid of noise levels.", pictures)],
        settings,
    )
