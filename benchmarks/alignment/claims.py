"""What the results say about the methods and β: sentences with numbers, and statements that hold or do not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.alignment.cells import BETAS, Cell
from benchmarks.alignment.estimates import (
    Estimate,
    Results,
    What,
    active_at_end,
    agreement,
    chosen_gap,
    distance,
    diversity,
    estimate,
    grad_norm,
    grad_norm_spread,
    held_out,
    rejected_gap,
    reward,
)
from benchmarks.alignment.variants import SFT
from sipo.training.alarms import COLLAPSE_SHARE, DRIFT, collapsing, drifted
from sipo_kernels.options import METHODS


@dataclass(frozen=True)
class Claim:
    """A conclusion.

    Attributes:
        name: short, for comparisons.
        sentence: what was found, with its numbers.
        holds: whether the statement that ``name`` makes is true of these results.
    """

    name: str
    sentence: str
    holds: bool


DPO, SIPO = Cell(method="diffusion_dpo"), Cell(method="sipo")
NAMES = {
    "diffusion_dpo": "Diffusion-DPO",
    "dpo_cm": "DPO-C&M",
    "sipo": "SIPO",
    "sdpo": "SDPO",
    SFT: "fine-tuning on chosen samples",
}
LOW_NOISE = 63
"""Timesteps below it are those that the published work calls uninformative (docs/math.md §3)."""


def _over_beta(results: Results, what: What, method: str) -> list[Estimate]:
    return [results.estimate(what, Cell(method=method, beta=b)) for b in BETAS]


def learns(results: Results) -> Claim:
    floor = results.estimate(reward, Cell(method=SFT, beta=0.0))
    base = results.bases["digits"]["rewards"]["ink"]
    best = {m: max(_over_beta(results, reward, m), key=lambda e: e.mean) for m in METHODS}
    listed = ", ".join(f"{NAMES[m]} {e}" for m, e in best.items())
    return Claim(
        "every method goes beyond fine-tuning",
        f"From {base:+.2f} in the base model's samples, fine-tuning on the chosen samples raises the reward to "
        f"{floor}; the methods reach, each at its best β, {listed}.",
        all(e.mean - e.half > floor.mean + floor.half for e in best.values()),
    )


def sensitive(results: Results) -> Claim:
    means = {m: [e.mean for e in _over_beta(results, reward, m)] for m in METHODS}
    within = {m: max(v) - min(v) for m, v in means.items()}
    between = max(max(v[i] for v in means.values()) - min(v[i] for v in means.values()) for i in range(len(BETAS)))
    listed = ", ".join(f"{NAMES[m]} {spread:.2f}" for m, spread in within.items())
    return Claim(
        "β decides more than the method",
        f"Between the least and the greatest mean reward over β = {BETAS[0]:g} to {BETAS[-1]:g} lie: {listed}. "
        f"At one β, the methods are at most {between:.2f} apart.",
        between < min(within.values()),
    )


def agreement_needs_beta(results: Results) -> Claim:
    low, default, high = (results.estimate(agreement, SIPO.like(beta=b)) for b in (200.0, 1000.0, 5000.0))
    return Claim(
        "a small β destroys the images",
        f"SIPO's samples are read as the digit asked for in {low.plain()} of cases at β = 200, {default.plain()} at "
        f"1000 and {high.plain()} at 5000.",
        low.mean + low.half < default.mean and default.mean < high.mean,
    )


def _distance_at(results: Results, method: str, wanted: float) -> list[float]:
    """Distance to the data where a method's curve over β reaches a reward, by seed, interpolated in between."""
    cells = [results.of(Cell(method=method, beta=b)) for b in BETAS]
    out = []
    for records in zip(*cells, strict=True):
        points = sorted((reward(r), distance(r)) for r in records if not r.get("diverged"))
        rewards, distances = zip(*points, strict=True)
        if rewards[0] <= wanted <= rewards[-1]:
            out.append(float(np.interp(wanted, rewards, distances)))
    return out


def one_frontier(results: Results) -> Claim:
    wanted = 0.0
    at = {m: estimate(_distance_at(results, m, wanted)) for m in METHODS}
    listed = ", ".join(f"{NAMES[m]} {e.plain(1)}" for m, e in at.items())
    dpo = at["diffusion_dpo"]
    off_curve = [m for m, e in at.items() if abs(e.mean - dpo.mean) > e.half + dpo.half]
    return Claim(
        "all methods trade reward for distance along one curve",
        f"Where its curve over β passes a reward of {wanted:+.1f}, each method's samples are as far from the data as "
        f"the others': {listed}.",
        not off_curve,
    )


def sipo_goes_further(results: Results) -> Claim:
    by_beta = {b: results.difference(reward, SIPO.like(beta=b), DPO.like(beta=b)) for b in BETAS}
    listed = ", ".join(f"{e} at {b:g}" for b, e in by_beta.items())
    middle = by_beta[1000.0]
    return Claim(
        "SIPO goes further than Diffusion-DPO at one β of 1000",
        f"SIPO's reward less Diffusion-DPO's, seed by seed, for each β: {listed}.",
        middle.mean - middle.half > 0,
    )


def _below(levels: Sequence[float], values: Any, bound: float) -> float:
    """Share of the integral over uniform timesteps that lies below a level; the curve is linear between levels."""
    fine = np.linspace(levels[0], levels[-1], 4000)
    curve = np.interp(fine, levels, np.asarray(values, dtype=float))
    return float(curve[fine < bound].sum() / curve.sum())


def variance_at_low_noise(results: Results) -> Claim:
    records = results.of(DPO)
    levels = records[0]["probe_base"]["levels"]
    at_base = estimate([_below(levels, r["probe_base"]["variance"]["diffusion_dpo"], LOW_NOISE) for r in records])
    later = estimate([_below(levels, r["probe"]["variance"]["diffusion_dpo"], LOW_NOISE) for r in records])

    def removed(where: str, method: str) -> Estimate:
        shares = []
        for r in records:
            plain, masked = (np.interp(np.linspace(levels[0], levels[-1], 4000), levels, r[where]["variance"][m])
                             for m in ("diffusion_dpo", method))  # fmt: skip
            shares.append(1 - float(masked.sum() / plain.sum()))
        return estimate(shares)

    masked = removed("probe_base", "sipo")
    share = LOW_NOISE / 1000
    return Claim(
        "the gradient's variance is concentrated at low noise",
        f"The timesteps below {LOW_NOISE}, {100 * share:.0f} % of them, hold {at_base.percent()} of the variance of "
        f"Diffusion-DPO's gradient at the base model ({later.percent()} after training at β = 1000); SIPO's clip and "
        f"mask take {masked.percent()} of the whole variance away at the base model.",
        at_base.mean - at_base.half > 2 * share,
    )


def low_noise_teaches_least(results: Results) -> Claim:
    records = results.of(DPO)
    levels = records[0]["probe_base"]["levels"]

    def worth(low: float, high: float) -> Estimate:
        chosen = [i for i, level in enumerate(levels) if low <= level < high]
        by_seed = []
        for record in records:
            variance, signal = (record["probe_base"][name]["diffusion_dpo"] for name in ("variance", "signal"))
            by_seed.append(sum(signal[i] for i in chosen) / sum(variance[i] for i in chosen))
        return estimate(by_seed)

    low, high = worth(0, LOW_NOISE), worth(250, 1001)
    return Claim(
        "low noise teaches least for its variance",
        f"The squared norm of the mean gradient is {low.plain()} of a batch's variance below t = {LOW_NOISE} and "
        f"{high.plain()} of it above t = 250, at the base model.",
        low.mean + low.half < high.mean - high.half,
    )


def mask_stops_training(results: Results) -> Claim:
    ends = {b: results.estimate(active_at_end, SIPO.like(beta=b)) for b in BETAS}
    listed = ", ".join(f"{e.plain()} at {b:g}" for b, e in ends.items())
    return Claim(
        "at β = 20 the mask has stopped most pairs by the end",
        f"The share of pairs that SIPO still trains on at the end, by β: {listed}.",
        ends[20.0].mean + ends[20.0].half < 0.5 and ends[5000.0].mean > 0.9,
    )


def smaller_not_steadier(results: Results) -> Claim:
    norms, spreads = (
        [results.estimate(what, c).plain() for c in (DPO, SIPO)] for what in (grad_norm, grad_norm_spread)
    )
    change = results.difference(lambda r: math.log(grad_norm(r)), SIPO, DPO)
    steadier = results.difference(grad_norm_spread, SIPO, DPO)
    return Claim(
        "the mask makes the gradient smaller, not steadier",
        f"At β = 1000 the gradient's norm is {norms[0]} with Diffusion-DPO and {norms[1]} with SIPO; its standard "
        f"deviation over steps, as a share of that, {spreads[0]} and {spreads[1]}.",
        change.mean + change.half < 0 and steadier.mean + steadier.half > 0,
    )


def chosen_get_worse(results: Results) -> Claim:
    chosen, rejected = (
        [results.estimate(what, SIPO.like(beta=b)) for b in BETAS] for what in (chosen_gap, rejected_gap)
    )
    rows = list(zip(BETAS, chosen, rejected, strict=True))
    listed = ", ".join(f"{chosen.mean:+.2f} and {rejected.mean:+.2f} at {b:g}" for b, chosen, rejected in rows)
    every = [results.estimate(chosen_gap, Cell(method=m, beta=b)) for m in METHODS for b in BETAS if b <= 5000]
    return Claim(
        "chosen samples get worse with every method, and rejected samples more",
        "The errors of chosen and rejected samples at the end less the reference's, as shares of it, for SIPO by "
        f"β: {listed}.",
        all(e.mean > 0 for e in every) and all(chosen.mean < rejected.mean for _, chosen, rejected in rows),
    )


def alarms_tell(results: Results) -> Claim:
    good: list[tuple[bool, float, float]] = []
    broken: list[tuple[bool, float, float]] = []
    for method, b in itertools.product(METHODS, BETAS):
        for record in results.of(Cell(method=method, beta=b)):
            end = record["end"]
            alarm = drifted(end["model_mse"], end["ref_mse"]) or collapsing(
                end["chosen_gap"], end["rejected_gap"], end["ref_mse"]
            )
            place = good if record["agreement"] >= 0.9 else broken if record["agreement"] < 0.7 else []
            place.append((alarm, end["model_mse"] / end["ref_mse"], end["chosen_gap"] / end["rejected_gap"]))
    largest, shared = (max(row[i] for row in good) for i in (1, 2))
    return Claim(
        "the alarms of drift and collapse tell broken runs from good ones",
        f"Of the {len(good)} runs whose samples are read as asked for in at least nine of ten cases, "
        f"{sum(row[0] for row in good)} end with model_mse over {DRIFT:g} times ref_mse or chosen_gap over "
        f"{COLLAPSE_SHARE:g} times rejected_gap (their largest are {largest:.1f} and {shared:.2f}); of the "
        f"{len(broken)} where it is under seven of ten, {sum(row[0] for row in broken)} do.",
        not any(row[0] for row in good) and all(row[0] for row in broken),
    )


def implicit_reward_knows(results: Results) -> Claim:
    own = {m: results.estimate(held_out, Cell(method=m)) for m in METHODS}
    base = {m: results.estimate(lambda r: float(r["accuracy"]["base"]["ink"]), Cell(method=m)) for m in METHODS}
    other = {m: results.estimate(lambda r: float(r["accuracy"]["data"]["slant"]), Cell(method=m)) for m in METHODS}

    def listed(table: dict[str, Estimate]) -> str:
        return f"{min(e.mean for e in table.values()):.2f} to {max(e.mean for e in table.values()):.2f}"

    return Claim(
        "the implicit reward ranks held-out pairs by the reward trained for, and no other",
        f"At β = 1000 the models rank {listed(own)} of held-out real pairs right by ink, {listed(base)} of pairs of "
        f"the base model's samples, and {listed(other)} by slant, which they were not trained for.",
        all(e.mean > 0.8 for e in (*own.values(), *base.values()))
        and all(abs(e.mean - 0.5) < 0.15 for e in other.values()),
    )


def diversity_for_reward(results: Results) -> Claim:
    cells = [Cell(method=m, beta=b) for m in METHODS for b in BETAS]
    x = [results.estimate(reward, c).mean for c in cells]
    y = [results.estimate(diversity, c).mean for c in cells]
    correlation = float(np.corrcoef(x, y)[0, 1])
    return Claim(
        "reward is paid for in diversity",
        f"Over all methods and β, mean reward and diversity within a digit correlate at {correlation:.2f}: from "
        f"{max(y):.2f} of the real digits' diversity at a reward of {min(x):+.2f} to {min(y):.2f} at the highest.",
        correlation < -0.8,
    )
