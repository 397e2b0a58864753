"""A finding, which is one statement of a verdict, and the order of findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["problem", "warning", "good", "note"]
_ORDER = ("problem", "warning", "good", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that holds for a run.

    Attributes:
        name: a short key: "learning", "pushing_rejected", "stalled", "drifted", "beta_high", "beta_low", "nonfinite",
            "not_learning", "cannot_tell", "memorising", "overconfident", "both_rise" or "unknown"; before training
            "mask", "beta", "clip", "spread", "differs" or "nonfinite".
        severity: "problem", "warning", "good" or "note".
        sentence: what it is, in plain language.
        evidence: the numbers it rests on, and where they are from.
        advice: what to try.
    """

    name: str
    severity: Severity
    sentence: str
    evidence: tuple[str, ...]
    advice: tuple[str, ...] = ()


def sort(findings: Sequence[Finding]) -> list[Finding]:
    """Sorts findings by severity, the most severe first; equal ones keep their order."""
    return sorted(findings, key=lambda finding: _ORDER.index(finding.severity))
