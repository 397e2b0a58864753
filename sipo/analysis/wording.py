"""Phrases for a run's numbers: the evidence and the advice in a verdict."""

from __future__ import annotations

import math

from sipo.analysis.facts import LN2, HeldOut, RunFacts, accuracy_se, pairs_to_tell


def lower_beta(f: RunFacts) -> tuple[str, ...]:
    """Advises a β at which the loss of a pair saturates earlier."""
    if math.isnan(f.saturation):
        return ("a tenth of this beta",)
    return (
        f"a beta near {rounded(f.beta * f.saturation / 0.05)}: a pair's loss then saturates at a difference of 5 % "
        f"of the reference's error, and not of {percent(f.saturation)}",
    )


def loss_evidence(f: RunFacts) -> tuple[str, ...]:
    """States the loss of a pair beside that of a policy without preference, where they can be compared."""
    if not f.plain:
        return ()
    text = f"loss of {f.pair_loss:.3f} for a pair that takes part (`loss` / `active_fraction`)"
    return (f"{text}, {most_without_preference(f)} without any preference",)


def most_without_preference(f: RunFacts) -> str:
    """Formats the loss of a pair for a policy without preference."""
    return f"at most {LN2:.3f}" if f.weighted else f"{LN2:.3f}"


def ranked_right(f: RunFacts) -> str:
    """States the share of training pairs that are ranked right."""
    return f"{share_of_pairs(f.accuracy, f.pairs)} ranked right in {step_range(f)} (`rewards/accuracies`)"


def share_of_pairs(share: float, pairs: int) -> str:
    """Formats a share of the pairs of a log, its standard error and their number."""
    return f"{percent(share)} ± {percent(accuracy_se(share, pairs))} of about {pairs:,} pairs"


def held_out_share(seen: HeldOut) -> str:
    """Formats the share of held-out pairs that are ranked right, its standard error and their number."""
    return f"{percent(seen.accuracy)} ± {percent(seen.se)} of {seen.pairs:,}"


def pairs_needed() -> str:
    """States how many held-out pairs tell an accuracy from chance."""
    return f"about {pairs_to_tell(0.6)} held-out pairs tell 60 % from chance, {pairs_to_tell(0.55)} tell 55 %"


def errors_evidence(f: RunFacts) -> str:
    """Compares the policy's error with the reference's."""
    return f"the policy's error is {times(f.grown)} the reference's (`model_mse` {f.model:.3g}, `ref_mse` {f.ref:.3g})"


def step_range(f: RunFacts) -> str:
    """Names the steps that the means are over."""
    return f"step {f.last}" if f.first == f.last else f"steps {f.first} to {f.last}"


def times(ratio: float) -> str:
    """Formats a ratio: ``1.36 times``."""
    return f"{ratio:.2f} times" if ratio < 10 else f"{ratio:.0f} times"


def percent(share: float) -> str:
    """Formats a share: ``95 %``, ``1.3 %``."""
    return f"{100 * share:.0f} %" if abs(share) >= 0.1 else f"{100 * share:.2g} %"


def rounded(value: float) -> str:
    """Rounds to one significant digit, or to two from 1 to 2."""
    digits = -math.floor(math.log10(value))
    return f"{round(value, digits + (value * 10**digits < 2)):g}" if value < 1 else f"{round(value, digits):,.0f}"
