"""Reads a results file: numbers of each cell, their means over seeds, and the intervals of those."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.alignment.cells import Cell

# Two-sided 95 % points of Student's t, by degrees of freedom.
_T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

What = Callable[[dict[str, Any]], float]


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with half the width of its 95 % confidence interval (Student's t); NaN with one seed."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half:.2f}"

    def percent(self) -> str:
        """Formats the estimate in per cent."""
        return f"{100 * self.mean:.0f} ± {100 * self.half:.0f} %"

    def plain(self, digits: int = 2) -> str:
        """Formats the estimate without a sign."""
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


class MissingCellsError(Exception):
    """Cells that a claim needs and the results lack."""


class Results:
    """Measurements by cell.

    Args:
        results: content of a results file.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self.bases = results["bases"]
        self.records: dict[Cell, list[dict[str, Any]]] = {}
        for record in results["cells"]:
            self.records.setdefault(Cell.of(record).like(seed=0), []).append(record)

    def of(self, cell: Cell) -> list[dict[str, Any]]:
        """Returns the records of a cell's seeds.

        Raises:
            MissingCellsError: fewer than three.
        """
        found = self.records.get(cell.like(seed=0), [])
        if len(found) < 3:
            raise MissingCellsError(f"{cell.key}: {len(found)} seeds, expected at least 3")
        return sorted(found, key=lambda record: record["seed"])

    def values(self, what: What, cell: Cell) -> list[float]:
        """Returns a number of each seed that did not diverge."""
        return [what(record) for record in self.of(cell) if not record.get("diverged")]

    def estimate(self, what: What, cell: Cell) -> Estimate:
        """Returns the mean and interval over seeds."""
        return estimate(self.values(what, cell))

    def difference(self, what: What, a: Cell, b: Cell) -> Estimate:
        """Returns the difference of two cells, paired by seed: they share pairs, noise and initial noise."""
        first, second = ({r["seed"]: what(r) for r in self.of(c) if not r.get("diverged")} for c in (a, b))
        return estimate([first[seed] - second[seed] for seed in first.keys() & second.keys()])

    def has(self, cell: Cell) -> bool:
        """Whether there are three seeds of it."""
        return len(self.records.get(cell.like(seed=0), [])) >= 3


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of independent values, with its interval."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    spread = float(np.std(values, ddof=1)) if n > 1 else math.nan
    return Estimate(float(np.mean(values)), _T95[min(n, len(_T95)) - 1] * spread / math.sqrt(n), n)


def reward(record: dict[str, Any]) -> float:
    """Returns the mean of the reward that was trained for, over the samples."""
    return float(record["rewards"][record["reward"]])


def agreement(record: dict[str, Any]) -> float:
    """Returns the share of samples that are read as the class asked for."""
    return float(record["agreement"])


def distance(record: dict[str, Any]) -> float:
    """Returns the Fréchet distance to the real data."""
    return float(record["distance"])


def diversity(record: dict[str, Any]) -> float:
    """Returns the mean distance within a class, relative to that of the real data."""
    return float(record["diversity"])


def held_out(record: dict[str, Any]) -> float:
    """Returns the implicit preference accuracy on held-out real pairs, by the reward trained for."""
    return float(record["accuracy"]["data"][record["reward"]])


def active_at_end(record: dict[str, Any]) -> float:
    """Returns the share of pairs that still train, over the last 50 steps."""
    return float(np.mean(record["curve"]["active_fraction"][-5:]))


def grad_norm(record: dict[str, Any]) -> float:
    """Returns the mean norm of the gradient before clipping, over the second half of the run."""
    return float(record["grad_norm"]["mean"])


def grad_norm_spread(record: dict[str, Any]) -> float:
    """Returns the standard deviation of the gradient's norm over steps, as a share of the mean."""
    return float(record["grad_norm"]["std"] / record["grad_norm"]["mean"])


def chosen_gap(record: dict[str, Any]) -> float:
    """Returns how much larger than the reference's the chosen samples' error is at the end, as a share of it."""
    return float(record["end"]["chosen_gap"] / record["end"]["ref_mse"])


def rejected_gap(record: dict[str, Any]) -> float:
    """Returns the same share for the rejected samples."""
    return float(record["end"]["rejected_gap"] / record["end"]["ref_mse"])
