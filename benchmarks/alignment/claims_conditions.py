"""What the results say about the parts of SIPO, its relatives, and other data: claims like those of ``claims.py``."""

from __future__ import annotations

from typing import Any

from benchmarks.alignment.cells import LONG, Cell
from benchmarks.alignment.claims import DPO, NAMES, SIPO, Claim
from benchmarks.alignment.estimates import Estimate, Results, active_at_end, agreement, distance, held_out, reward
from benchmarks.alignment.variants import PARTS, RELATIVES, SFT
from sipo_kernels.options import METHODS


def parts_of_sipo(results: Results) -> Claim:
    dpo, whole = (results.estimate(distance, cell) for cell in (DPO, SIPO))
    names = ("mask alone", "clipped weight alone", "weight alone", "mask by the reference")
    deltas = {n: results.difference(distance, SIPO.like(variant=n), SIPO) for n in names}
    listed = ", ".join(f"{n} {e}" for n, e in deltas.items())
    return Claim(
        "the mask does most of what SIPO does",
        f"At β = 1000 Diffusion-DPO's samples are {dpo.plain(1)} from the data, SIPO's {whole.plain(1)}; with a part "
        f"of SIPO alone, less SIPO's, seed by seed: {listed}.",
        abs(deltas["mask alone"].mean) < abs(deltas["clipped weight alone"].mean),
    )


def threshold_and_stride(results: Results) -> Claim:
    names = [name for name in PARTS if name.startswith("threshold") or name.endswith("steps")]
    cells = {name: SIPO.like(variant=name) for name in names}
    changes = {name: results.difference(reward, cell, SIPO) for name, cell in cells.items()}
    active = {name: results.estimate(active_at_end, cell).mean for name, cell in cells.items()}
    listed = ", ".join(f"{name} {active[name]:.2f}, {changes[name]}" for name in names)
    return Claim(
        "threshold and sampler steps only set how much is masked",
        f"Share of pairs active at the end, and reward less SIPO's (0.9, 50 steps): {listed}.",
        all(abs(change.mean) < 0.15 for change in changes.values()),
    )


def _changed(results: Results, **changes: Any) -> tuple[list[Estimate], str]:
    """Returns what a changed condition does to each method's reward at β = 1000, seed by seed; and the same as text."""
    found_by = {m: results.difference(reward, Cell(method=m).like(**changes), Cell(method=m)) for m in METHODS}
    return list(found_by.values()), ", ".join(f"{NAMES[m]} {e}" for m, e in found_by.items())


def on_policy(results: Results) -> Claim:
    changes, listed = _changed(results, source="base")
    return Claim(
        "pairs of the base model's own samples teach the same",
        f"The reward with pairs of base samples less that with real pairs, at β = 1000: {listed}.",
        all(abs(e.mean) < 0.15 for e in changes),
    )


def noise(results: Results) -> Claim:
    changes, listed = _changed(results, noise=0.3)
    return Claim(
        "wrong labels cost reward",
        f"With 30 % of the labels wrong, less with none, at β = 1000: {listed}.",
        all(e.mean < 0 for e in changes),
    )


def few_pairs(results: Results) -> Claim:
    changes, listed = _changed(results, fraction=0.1)
    return Claim(
        "a tenth of the pairs is enough for this reward",
        f"With 400 of the 4,000 pairs, less with all, at β = 1000: {listed}.",
        all(abs(e.mean) < 0.1 for e in changes),
    )


def slant_is_harder(results: Results) -> Claim:
    slanted = {m: Cell(method=m, reward="slant", beta=0.0 if m == SFT else 1000.0) for m in (*METHODS, SFT)}
    rows = {m: results.estimate(reward, cell) for m, cell in slanted.items()}
    base, spread = (results.bases["digits"][name]["slant"] for name in ("rewards", "real_spread"))
    ranked = results.estimate(held_out, slanted["sipo"])
    listed = ", ".join(f"{NAMES[m]} {e.mean:+.3f} ± {e.half:.3f}" for m, e in rows.items())
    return Claim(
        "slant is hardly learnt in 300 steps",
        f"With slant as the reward, whose standard deviation over real digits is {spread:.2f}, samples go from "
        f"{base:+.3f} to: {listed}. SIPO's implicit reward ranks {ranked.plain()} of held-out pairs right by it.",
        all(e.mean - base < spread for e in rows.values()),
    )


def longer(results: Results) -> Claim:
    ends, starts = (
        {m: results.estimate(agreement, Cell(method=m, length=length)) for m in ("diffusion_dpo", "sipo")}
        for length in (LONG, 1)
    )
    listed = ", ".join(f"{NAMES[m]} from {starts[m].plain()} to {ends[m].plain()}" for m in ends)
    return Claim(
        "longer training degrades the images",
        f"Between 300 and {300 * LONG:,} steps at β = 1000, the share of samples read as the digit asked for goes: "
        f"{listed}.",
        all(ends[m].mean < starts[m].mean for m in ends),
    )


def relatives(results: Results) -> Claim:
    rows = {name: DPO.like(variant=name) for name in RELATIVES}
    listed = ", ".join(
        f"{name} {results.estimate(reward, cell)} at a distance of {results.estimate(distance, cell).plain(1)}"
        for name, cell in rows.items()
    )
    safe = rows["safeguard"]
    nearer, less = (results.difference(what, safe, DPO) for what in (distance, reward))
    return Claim(
        "preserving the chosen sample keeps samples a little nearer to the data, for a little less reward",
        f"At β = 1000, where Diffusion-DPO reaches {results.estimate(reward, DPO)} at a distance of "
        f"{results.estimate(distance, DPO).plain(1)}: {listed}. Seed by seed, preserving the chosen sample changes "
        f"the distance by {nearer} and the reward by {less}.",
        nearer.mean + nearer.half < 0 and less.mean < 0,
    )


def video(results: Results) -> Claim:
    sentences, holds = [], True
    for task in ("moving-cogvideox", "moving-wan"):
        floor = results.estimate(reward, Cell(task=task, method=SFT, beta=0.0))
        base = results.bases[task]["rewards"]["ink"]
        rows = {m: results.estimate(reward, Cell(task=task, method=m)) for m in METHODS}
        listed = ", ".join(f"{NAMES[m]} {e}" for m, e in rows.items())
        sentences.append(f"{task}: from {base:+.2f}, fine-tuning {floor}, {listed}")
        holds = holds and all(e.mean - e.half > floor.mean + floor.half for e in rows.values())
    return Claim("clips are aligned as images are", f"Ink of moving digits at β = 1000: {'; '.join(sentences)}.", holds)
