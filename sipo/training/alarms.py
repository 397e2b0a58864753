"""The alarms of training: rules over a log line that say when a run goes wrong (docs/math.md §8).

The rules are functions of numbers alone, so that a report judges a run by the thresholds that its training used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

ALARM_LINES = 3
"""Log lines in a row that a rule must hold for before its alarm goes off."""
LOW_ACTIVE_FRACTION = 0.1
"""Below this share of pairs that take part, training has in effect stopped."""
DRIFT = 4.0
"""Times the reference's error: above it the policy has left the data.

In the study of docs/alignment.md no run whose samples were read as asked for nine times in ten came to 3 times, and
every run that was read right less than seven times in ten was above 4.
"""
COLLAPSE_GROWTH = 0.5
"""Times the reference's error: until the chosen sample's error has grown by more, its growth says nothing."""
COLLAPSE_SHARE = 0.85
"""Times the growth of the rejected sample's error: where the chosen sample's grows by more, little of it is preference.

In the same study no good run had more than 0.84.
"""


def stalled(active_fraction: float) -> bool:
    """Whether the mask drops nearly every pair, which in effect stops training."""
    return active_fraction < LOW_ACTIVE_FRACTION


def drifted(model_mse: float, ref_mse: float) -> bool:
    """Whether the policy's error exceeds ``DRIFT`` times the reference's."""
    return model_mse > DRIFT * ref_mse


def collapsing(chosen_gap: float, rejected_gap: float, ref_mse: float) -> bool:
    """Whether the preference is learnt by getting worse at chosen samples nearly as much as at rejected samples."""
    return chosen_gap > COLLAPSE_GROWTH * ref_mse and chosen_gap > COLLAPSE_SHARE * rejected_gap


class _Alarm(NamedTuple):
    """A rule over a log line's metrics, and its message once it has held for a while: numbers, meaning, remedy."""

    rule: Callable[..., bool]
    needs: tuple[str, ...]
    message: str


_ALARMS = {
    "stalled": _Alarm(
        stalled,
        ("active_fraction",),
        f"active_fraction {{:.3f}} has stayed under {LOW_ACTIVE_FRACTION} for {ALARM_LINES} log lines, so few pairs "
        "train the model; a lower learning rate or a larger beta keeps it nearer to the reference, and where it was so "
        "from the first line on, mask_threshold is too high",
    ),
    "drift": _Alarm(
        drifted,
        ("model_mse", "ref_mse"),
        f"model_mse {{:.4g}} has stayed over {DRIFT:g} times ref_mse {{:.4g}} for {ALARM_LINES} log lines, so the "
        "policy has left the data; go back to an earlier checkpoint with a lower learning rate or a larger beta",
    ),
    "collapse": _Alarm(
        collapsing,
        ("chosen_gap", "rejected_gap", "ref_mse"),
        f"chosen_gap {{:.4g}} has stayed over {COLLAPSE_SHARE:g} times rejected_gap {{:.4g}} and over "
        f"{COLLAPSE_GROWTH:g} times ref_mse {{:.4g}} for {ALARM_LINES} log lines, so the model gets worse at chosen "
        "samples nearly as much as at rejected samples; stop earlier, lower the learning rate or raise beta",
    ),
}


class AlarmWatch:
    """Reports, once per episode, what goes wrong in a run for several log lines in a row.

    Attributes:
        lines: log lines in a row that each alarm's rule has held for; JSON values, for a checkpoint.
    """

    def __init__(self) -> None:
        self.lines = dict.fromkeys(_ALARMS, 0)

    def update(self, metrics: dict[str, Any]) -> list[str]:
        """Takes one log line's metrics; returns, for each alarm that they set off, a line that begins with its name.

        A line without the numbers that a rule needs, or with NaN (no finite value in the window), counts neither way.
        """
        messages = []
        for name, alarm in _ALARMS.items():
            numbers = [float(metrics.get(need, math.nan)) for need in alarm.needs]
            if any(map(math.isnan, numbers)):
                continue
            self.lines[name] = self.lines[name] + 1 if alarm.rule(*numbers) else 0
            if self.lines[name] == ALARM_LINES:
                messages.append(f"{name}: {alarm.message.format(*numbers)}")
        return messages
