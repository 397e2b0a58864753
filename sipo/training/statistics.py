"""Statistics of a run by noise level (docs/math.md §8).

Sums are kept on the device, by bin of noise level, and read with a log line. A line of ``timesteps.jsonl`` is one JSON
object, which :func:`read_statistics` reads and :func:`merge` combines with others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sipo.training.log_reader import is_count, is_number, read_log, show
from sipo_kernels import STATISTICS, LossOptions, Totals
from sipo_kernels.output import add_levels, level_bins

BINS = 50
"""Bins of equal width over the schedule's noise levels."""

MEANS = STATISTICS[2:]
"""Names of the means over a bin's pairs; the table in docs/math.md §8 says what each is."""

_FIELDS = ("model_error", "ref_error", "error_gap", "log_ratio", "weight", "mask", "logits", "coef")
_DIGITS = 6  # that a line is written with: float32 has seven, and a line has hundreds of numbers


class NoiseBins(NamedTuple):
    """Equal-width bins over a schedule's noise levels.

    Attributes:
        kind: "discrete" or "flow".
        levels: number of training steps of a discrete schedule; 1 for a flow, whose σ is in (0, 1].
        bins: how many there are.
    """

    kind: str
    levels: int
    bins: int

    @classmethod
    def of(cls, schedule: Any, most: int) -> NoiseBins | None:
        """Makes at most ``most`` bins, one a training step if those are fewer; ``None`` for an unknown schedule."""
        kind = getattr(schedule, "kind", None)
        if kind not in ("discrete", "flow"):
            return None
        steps = int(schedule.num_train_timesteps)
        return cls(kind, steps if kind == "discrete" else 1, min(most, steps))

    def __call__(self, levels: Tensor) -> Tensor:
        """Returns the bin of each noise level, int64."""
        return level_bins(levels, self.bins, self.levels)


class TimestepStatistics:
    """Sums over the pairs since the last log line, by bin of noise level, on the device.

    Nothing here waits for the device: :attr:`window` is read and summed over processes by whoever reads the log line's
    metrics, and :meth:`take` makes a line of what was read.

    Args:
        loss_fn: the run's; its β and reduction are what the gradient's coefficients are made free of.
        bins: of its schedule.
        device: where the sums live.
    """

    def __init__(self, loss_fn: Any, bins: NoiseBins, device: torch.device) -> None:
        self.loss_fn = loss_fn
        self.bins = bins
        self.window = torch.zeros(len(STATISTICS), bins.bins, dtype=torch.float32, device=device)

    @classmethod
    def of(cls, loss_fn: Any, device: torch.device) -> TimestepStatistics | None:
        """Makes the statistics of a loss; ``None`` if its schedule has no known range of noise levels."""
        bins = NoiseBins.of(loss_fn.schedule, BINS)
        return None if bins is None else cls(loss_fn, bins, device)

    def totals(self, metrics: Tensor | None = None) -> Totals:
        """The object to which a loss that takes ``totals`` adds a pass, without the pass's noise levels.

        Args:
            metrics: of :class:`sipo_kernels.Totals`, to be added to along with the window.
        """
        return Totals(metrics, self.window, top=float(self.bins.levels))

    @torch.no_grad()
    def add(self, levels: Tensor, output: Any, shape: Sequence[int]) -> None:
        """Adds one pass of ``B`` pairs, for a loss that does not take ``totals``.

        In its coefficients D counts every element, whatever an ``error_mask`` leaves out.

        Args:
            levels: ``[B]`` on the device.
            output: as :class:`sipo_kernels.PairLossOutput`; one without its fields adds nothing.
            shape: of the chosen samples, ``[B, ...]``.
        """
        if all(hasattr(output, name) for name in _FIELDS):
            add_levels(self.window, self.bins(levels), output, self._coef_unit(shape))

    def _coef_unit(self, shape: Sequence[int]) -> float:
        """Returns D·B/β, which turns the chosen sample's coefficient (docs/math.md §6) into ``a·c·b·mask·σ(−z)``."""
        pairs, *sample = shape
        options = getattr(self.loss_fn, "options", None)
        if not isinstance(options, LossOptions):  # of such a loss β is not known, and counts as 1
            return float(math.prod(sample) * pairs)
        return math.prod(sample) * (pairs if options.reduction == "mean" else 1) / options.beta_for(len(shape))

    def restore(self, window: Tensor) -> None:
        """Puts back :attr:`window` from a checkpoint.

        Raises:
            ValueError: of other bins.
        """
        if window.shape != self.window.shape:
            raise ValueError(f"window.statistics has shape {[*window.shape]}, expected this run's")
        self.window = window.to(self.window.device)

    def take(self, step: int, sums: Sequence[float]) -> dict[str, Any] | None:
        """Makes a line of a window that was read and summed over processes, and starts a new one.

        Args:
            step: of the log line.
            sums: :attr:`window`, flattened.

        Returns:
            The line, JSON values; ``None`` where no pair was added.
        """
        self.window.zero_()
        n = self.bins.bins
        count, left_out, *rows = (sums[i : i + n] for i in range(0, len(sums), n))
        pairs = int(sum(count) + sum(left_out))
        if not pairs:
            return None
        line = {"step": step, **self.bins._asdict(), "pairs": pairs}
        line |= {"count": [int(c) for c in count], "nonfinite": [int(c) for c in left_out]}
        for name, row in zip(MEANS, rows, strict=True):
            line[name] = [float(f"{x / c:.{_DIGITS}g}") if c else None for x, c in zip(row, count, strict=True)]
        return line


# ---- Reading ----


def read_statistics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the sound lines of ``timesteps.jsonl``, in order, all over the same bins; warns of the others.

    A last line without its end is left out: a running process is writing it, or one was killed there.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: no regular file.
        OSError: it cannot be read.
    """
    log = read_log(path, statistics_fault)
    bins = [NoiseBins(*(line[name] for name in NoiseBins._fields)) for line in log.lines]
    usual = Counter(bins).most_common(1)[0][0] if bins else None
    strays = [f"step {line['step']} (other bins)" for line, own in zip(log.lines, bins, strict=True) if own != usual]
    log._replace(damage=log.damage + strays).warn(Path(path))
    return [line for line, own in zip(log.lines, bins, strict=True) if own == usual]


def statistics_fault(line: dict[str, Any]) -> str:
    """Returns what is wrong with a line of ``timesteps.jsonl``; "" if nothing is."""
    for name in (*NoiseBins._fields, "pairs", "count", "nonfinite", *MEANS):
        if name not in line:
            return f"no {name}"
    kind, bins = line["kind"], line["bins"]
    if kind not in ("discrete", "flow"):
        return f"kind={show(kind)}, expected discrete or flow"
    for name in ("levels", "bins"):
        if not is_count(line[name], 1):
            return f"{name}={show(line[name])}, expected an integer of at least 1"
    if not is_count(line["pairs"]):
        return f"pairs={show(line['pairs'])}, expected a count"
    for name in ("count", "nonfinite", *MEANS):
        values = line[name]
        if not isinstance(values, list) or len(values) != bins:
            return f"{name}={show(values)}, expected {bins} values"
    for name in ("count", "nonfinite"):
        if not all(map(is_count, line[name])):
            return f"{name}: expected counts"
    for name in MEANS:
        for count, value in zip(line["count"], line[name], strict=True):
            if not (is_number(value) if count else value is None):
                return f"{name}: {show(value)} of {count} pairs, expected a finite number, and null of none"
    return ""


def merge(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merges lines into one, each bin's means weighted by its counts; the step is the last line's.

    Raises:
        ValueError: no lines, or lines over different bins.
    """
    if not lines:
        raise ValueError("0 lines: expected at least one to merge")
    first = lines[0]
    for line in lines:
        for name in NoiseBins._fields:
            if line[name] != first[name]:
                raise ValueError(f"{name}={line[name]!r} in a line: expected {first[name]!r} as in the first")
    merged = {"step": lines[-1]["step"], **{name: first[name] for name in NoiseBins._fields}}
    merged["pairs"] = sum(line["pairs"] for line in lines)
    for name in ("count", "nonfinite"):
        merged[name] = [sum(counts) for counts in zip(*(line[name] for line in lines), strict=True)]
    for name in MEANS:
        merged[name] = []
        for i, count in enumerate(merged["count"]):
            total = math.fsum(line["count"][i] * line[name][i] for line in lines if line["count"][i])
            merged[name].append(total / count if count else None)
    return merged


def over_bins(line: dict[str, Any], name: str, bins: range | None = None) -> float:
    """Averages ``name`` over the pairs of some bins of a line, or of all; NaN if they have none."""
    wanted = range(line["bins"]) if bins is None else bins
    count = sum(line["count"][i] for i in wanted)
    total = math.fsum(line["count"][i] * line[name][i] for i in wanted if line["count"][i])
    return total / count if count else math.nan


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Returns a line's numbers for trackers: for the lowest and highest tenth of noise levels and the rest.

    Returns:
        ``active_<part>``, the share of the part's pairs that take part, and ``grad_sq_share_<part>``, the part's share
        of the sum of squared gradients; without those that no pair speaks for.
    """
    n = line["bins"]
    tenth = math.ceil(n / 10)
    parts = {"low": range(tenth), "middle": range(tenth, n - tenth), "high": range(max(tenth, n - tenth), n)}
    total = over_bins(line, "grad_sq") * sum(line["count"])
    found = {}
    for part, bins in parts.items():
        count = sum(line["count"][i] for i in bins)
        found[f"active_{part}"] = over_bins(line, "active", bins)
        found[f"grad_sq_share_{part}"] = over_bins(line, "grad_sq", bins) * count / total if total else math.nan
    return {name: value for name, value in found.items() if not math.isnan(value)}
