"""What a run's log says about it, in plain language: pure functions from log lines to findings.

The rules use numbers that mean the same at every β, model and data set: errors relative to the reference's, and the
loss relative to what the ranking would be worth (:attr:`RunFacts.earned`). They are means over the last fifth of the
run, with standard errors from the number of pairs or from the scatter of the lines. Training pairs cannot show that
what is learnt holds for other pairs; only held-out pairs can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from sipo.analysis.facts import LN2, SURE, HeldOut, RunFacts, gather, held_out, pairs_to_tell
from sipo.analysis.findings import Finding, sort
from sipo.analysis.wording import (
    errors_evidence,
    held_out_share,
    loss_evidence,
    lower_beta,
    most_without_preference,
    pairs_needed,
    percent,
    ranked_right,
    rounded,
    share_of_pairs,
    step_range,
    times,
)
from sipo.training.alarms import collapsing, drifted, stalled

HARDLY_EARNED = 0.25
"""Below this share of what its ranking is worth, the loss has hardly begun to fall."""

HARDLY_MOVED = 0.05
"""Chosen and rejected sample told apart by less than this share of the reference's error."""

LOOSE = 0.5
"""A β whose loss saturates only where errors differ by more than this share of the reference's limits nothing."""

FAR = 2.0
"""With such a β, an error of so many times the reference's is on its way out."""

_UNKNOWN = Finding(
    "unknown",
    "note",
    "Nothing can be said: the log does not have the numbers of a preference loss.",
    ("`loss`, `rewards/accuracies` and `ref_mse` are wanted (docs/math.md §8), as `sipo.SIPOLoss` reports them",),
)


def judge(
    lines: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]] = (),
    *,
    pairs_per_step: int = 1,
    beta: float | None = None,
    plain: bool = True,
    weighted: bool = False,
) -> list[Finding]:
    """Returns all findings on a run, headline first.

    Args:
        lines: training lines of ``metrics.jsonl``, at least one.
        validation: its validation lines, of which the last is judged.
        pairs_per_step, beta, plain, weighted: as for :func:`gather`.

    Raises:
        ValueError: no lines.
    """
    facts = gather(lines, pairs_per_step=pairs_per_step, beta=beta, plain=plain, weighted=weighted)
    if math.isnan(facts.accuracy + facts.loss + facts.ref):
        return [_nonfinite(facts) or _UNKNOWN]
    rules: tuple[Callable[[RunFacts], Finding | None], ...] = (
        _nonfinite,
        _stalled,
        _beta_low,
        _pushing_rejected,
        _beta_high,
        _not_learning,
        _drifted,
    )
    findings = [finding for rule in rules if (finding := rule(facts)) is not None]
    named = {finding.name for finding in findings}
    if named & {"stalled", "beta_low", "pushing_rejected"}:
        findings = [finding for finding in findings if finding.name != "drifted"]  # says no more than they do
    if not named - {"nonfinite", "drifted"}:
        if facts.ranks:
            findings.append(_held_out(facts, held_out(validation)))
        findings += [note] if (note := _both_rise(facts)) else []
    return sort(findings)


# ---- The rules; each cites its numbers ----


def _nonfinite(f: RunFacts) -> Finding | None:
    if not f.broken_pairs and not f.broken_steps:
        return None
    share = f.broken_pairs / max(1, f.all_pairs)
    blind = math.isnan(f.loss)
    evidence = [
        f"{f.broken_pairs} pairs with a NaN or an infinity (`nonfinite_pairs`), "
        f"{f.broken_steps} of {f.all_steps} steps with such a gradient (`nonfinite_steps`)"
    ]
    if blind:
        evidence.append("the last log lines have no finite loss")
    serious = blind or f.broken_steps > 0 or share > 0.01
    return Finding(
        "nonfinite",
        "problem" if serious else "warning",
        "Non-finite pairs: some predictions or latents hold a NaN or an infinity"
        + (", and steps were lost to them." if f.broken_steps else "; the loss leaves them out."),
        tuple(evidence),
        (
            "`sipo data check` finds files that cannot be decoded; look at the latents of the pairs in question",
            "bf16 in place of fp16, or float32, in training.mixed_precision and model.dtype",
            "loss.nonfinite=skip leaves such pairs out, once you know why they are there",
        ),
    )


def _stalled(f: RunFacts) -> Finding | None:
    if not stalled(f.active):
        return None
    evidence = (
        f"{share_of_pairs(f.active, f.pairs)} take part in {step_range(f)}, "
        f"{share_of_pairs(f.start_active, f.start_pairs)} did at the start (`active_fraction`)",
        errors_evidence(f),
    )
    if stalled(f.start_active / 2):
        return Finding(
            "stalled",
            "problem",
            "The mask has dropped nearly every pair from the start: hardly anything is trained.",
            evidence,
            (
                "lower loss.mask_threshold, or 0 to see what happens without a mask",
                "more steps in loss.num_inference_steps: smaller steps have ratios nearer to 1 (docs/math.md §3)",
                "see `sipo analyze CONFIG.yaml`: which noise levels the mask leaves over",
            ),
        )
    return Finding(
        "stalled",
        "problem",
        "The policy has drifted and the mask has stopped training: nearly no pair is near enough to it to count. "
        "The loss looks splendid only because masked pairs count 0.",
        evidence,
        (
            "start again from the reference, or from a checkpoint before active_fraction fell",
            "a lower learning rate (a fifth), or a larger beta (ten times)",
            "fewer steps",
        ),
    )


def _beta_low(f: RunFacts) -> Finding | None:
    if not (f.grown > FAR and f.saturation > LOOSE):
        return None
    return Finding(
        "beta_low",
        "problem",
        "Beta is too low: the policy has gone far from the reference, and the loss has not saturated.",
        (
            f"at beta = {f.beta:.4g} the loss of a pair saturates (its gradient falls to a tenth) where the errors of "
            f"its two samples differ by {times(f.saturation)} the reference's error",
            errors_evidence(f),
            f"the mean logit is {f.margin:.2f} (`rewards/margins`)",
        ),
        (
            f"a beta near {rounded(f.beta * f.saturation / 0.05)}, at which 5 % of the reference's error are enough",
            "a lower learning rate alone only slows this down",
        ),
    )


def _pushing_rejected(f: RunFacts) -> Finding | None:
    chosen = f.ref + f.chosen_gap  # the reference's error is about the same for both samples
    if not collapsing(f.chosen_gap, f.rejected_gap, f.ref) or f.chosen_gap < SURE * f.chosen_gap_se:
        return None
    rejected = (
        f"rejected samples' error {times((f.ref + f.rejected_gap) / f.ref)} (`rejected_gap` {f.rejected_gap:+.3g})"
    )
    if f.rejected_gap > f.chosen_gap:
        sentence = (
            "The rejected samples are only pushed down: the policy gets worse at chosen samples too, and at rejected "
            "samples a little more."
        )
        rejected += f": {percent(f.chosen_gap / f.rejected_gap)} of that is shared with the chosen samples"
    else:
        sentence = (
            "The policy gets worse at chosen samples by no less than at rejected samples: it does not learn the "
            "preference."
        )
    return Finding(
        "pushing_rejected",
        "problem",
        f"{sentence} It ranks {share_of_pairs(f.accuracy, f.pairs)} right that way, and samples pay for it.",
        (
            f"chosen samples' error {times(chosen / f.ref)} the reference's (`chosen_gap` {f.chosen_gap:+.3g}, "
            f"`ref_mse` {f.ref:.3g})",
            rejected,
        ),
        (
            "an earlier checkpoint: where chosen_gap was still near 0",
            "a lower learning rate (a fifth)",
            "a larger beta, or a method with a mask (`sipo`)",
        ),
    )


def _beta_high(f: RunFacts) -> Finding | None:
    if not f.ranks or stalled(f.active):
        return None
    calibration = f"{share_of_pairs(f.accuracy, f.pairs)} are ranked right in {step_range(f)} (`rewards/accuracies`)"
    if f.pair_loss - SURE * f.loss_se / f.active > LN2:
        moved = "hardly moves" if f.separation < HARDLY_MOVED else "moves"
        return Finding(
            "beta_high",
            "problem",
            f"Beta is too high: the policy {moved}, yet is wholly sure of every pair, and those ranked wrong cost more "
            "than the others earn.",
            (
                f"loss of {f.pair_loss:.3g} for a pair that takes part (`loss` / `active_fraction`), although "
                f"{calibration}: preferring nothing would cost {most_without_preference(f)}",
                f"a mean logit of {f.margin:.3g} from errors that differ by {percent(f.separation)} of the reference's",
            ),
            lower_beta(f) + (() if f.separation < HARDLY_MOVED else ("and a lower learning rate",)),
        )
    if f.pair_loss < 0.05 and 0 < f.separation < HARDLY_MOVED:
        return Finding(
            "beta_high",
            "problem",
            "Beta is too high for these pairs: the loss is satisfied, and the policy has hardly moved.",
            (
                f"loss of {f.pair_loss:.2g} for a pair that takes part, {calibration}",
                f"errors of chosen and rejected sample differ by {percent(f.separation)} of the reference's",
            ),
            lower_beta(f),
        )
    return None


def _not_learning(f: RunFacts) -> Finding | None:
    advice: tuple[str, ...] = (
        "a higher learning rate (ten times), or more steps",
        "training.lr_warmup_steps that ends long before the run does",
    )
    if math.isnan(f.accuracy) or stalled(f.active):
        return None  # other findings say why
    ranking = ranked_right(f)
    if not f.ranks:
        few = f.accuracy_se > 0.05
        if f.grown > FAR:
            advice = ("a lower learning rate (a fifth): the policy has moved, and not towards the preference",)
        return Finding(
            "not_learning",
            "warning" if few else "problem",
            "Too few pairs to tell whether it learns."
            if few
            else "Not learning: pairs are ranked no better than by chance.",
            (ranking, *loss_evidence(f)),
            ("look again after more steps",)
            if few
            else (*advice, "see that chosen and rejected are not mixed up in the data"),
        )
    if abs(f.earned) < HARDLY_EARNED and f.separation < HARDLY_MOVED and not drifted(f.model, f.ref):
        return Finding(
            "not_learning",
            "warning",
            "Hardly learning yet: the ranking has the right sign, by a hair, and the policy has not moved.",
            (
                f"{ranking}, but with a mean logit of {f.margin:.2g}: the loss has fallen from {LN2:.3f} to "
                f"{f.pair_loss:.3f} for a pair that takes part, {percent(f.earned)} of what this ranking is worth",
                f"errors of chosen and rejected sample differ by {percent(f.separation)} of the reference's",
            ),
            advice,
        )
    return None


def _drifted(f: RunFacts) -> Finding | None:
    if not drifted(f.model, f.ref):
        return None
    return Finding(
        "drifted",
        "warning",
        "The policy has drifted away from the reference.",
        (errors_evidence(f),),
        ("a lower learning rate, a larger beta, or fewer steps",),
    )


def _held_out(f: RunFacts, seen: HeldOut | None) -> Finding:
    """Returns what held-out pairs show about a policy that ranks its training pairs correctly."""
    training = (
        f"training pairs: {ranked_right(f)}",
        *loss_evidence(f),
        f"{share_of_pairs(f.active, f.pairs)} take part; {errors_evidence(f)}",
    )
    if seen is None:
        return Finding(
            "cannot_tell",
            "note",
            "Cannot tell whether it learns: no held-out pairs were measured. It ranks those that it trains on, and so "
            "does a policy that learns them by heart.",
            training,
            ("data.held_out and training.validation_steps: such pairs are measured and not trained on", pairs_needed()),
        )
    ranking = (
        f"held-out pairs: {held_out_share(seen)} ranked right at step {seen.step} (`validation/rewards/accuracies`)"
    )
    loss = f"their loss is {seen.loss:.3f} for a pair that takes part, {seen.no_preference:.3f} without any preference"
    evidence = (ranking, *(() if math.isnan(seen.loss + seen.no_preference) else (loss,)), *training)
    if not seen.ranks:
        if f.accuracy - seen.accuracy >= SURE * math.hypot(seen.se, f.accuracy_se):
            return Finding(
                "memorising",
                "problem",
                "Only the pairs that it trains on are learnt: held-out ones are ranked worse, no better than chance "
                "explains.",
                evidence,
                ("more pairs, or fewer steps", "see whether the preferences follow anything that can be seen"),
            )
        if seen.accuracy > 0.51:  # below, it would be a number that nobody has
            more = f"{pairs_needed()}; {percent(seen.accuracy)} would take about {pairs_to_tell(seen.accuracy):,}"
        else:
            more = pairs_needed()
        return Finding(
            "cannot_tell",
            "note",
            f"Cannot tell whether it learns: {seen.pairs:,} held-out pairs, ranked no better than chance explains.",
            evidence,
            (more,),
        )
    if math.isnan(seen.loss + seen.no_preference):
        return Finding(
            "cannot_tell",
            "note",
            f"Cannot tell whether it learns: {seen.pairs:,} held-out pairs are ranked right beyond chance, and what a "
            "policy without preference would lose on them is not in the log.",
            evidence,
            ("`no_preference_loss` among the metrics of a loss of your own (docs/math.md §8)",),
        )
    if not seen.loss < seen.no_preference:
        return Finding(
            "overconfident",
            "warning",
            "Too sure of held-out pairs: they are ranked right beyond chance, yet those ranked wrong cost more than "
            "the others earn.",
            evidence,
            ("fewer steps, or an earlier checkpoint", "a lower learning rate", "more pairs"),
        )
    near = ", and the policy is near the reference" if f.grown < 1 + 2 * HARDLY_MOVED else ""
    sentence = f"Learning: held-out pairs are ranked right beyond chance{near}."
    return Finding("learning", "good", sentence, evidence)


def _both_rise(f: RunFacts) -> Finding | None:
    if not (f.chosen_gap > SURE * f.chosen_gap_se and f.chosen_gap > HARDLY_MOVED * f.ref and f.rejected_gap > 0):
        return None
    return Finding(
        "both_rise",
        "note",
        "The policy gets somewhat worse at chosen samples too, and at rejected samples more: watch chosen_gap, and "
        "look at samples.",
        (
            f"chosen samples' error {times((f.ref + f.chosen_gap) / f.ref)} the reference's "
            f"(`chosen_gap` {f.chosen_gap:+.3g}), rejected samples' {times((f.ref + f.rejected_gap) / f.ref)} "
            f"(`rejected_gap` {f.rejected_gap:+.3g})",
        ),
        ("if samples get worse: stop earlier, or a lower learning rate",),
    )
