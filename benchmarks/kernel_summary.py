"""What a kernel results file says in a few numbers: how many times as fast as torch.compile the pair loss is.

From the file alone, so that a page that quotes it can be held to it. ``python -m benchmarks.kernel --summary FILE``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.baselines import COMPILED, UPCAST
from benchmarks.cases import TRAINED, Case, count, fraction, headline_cases

# Caches before each call (timing.py): as a network's pass leaves them, and as another implementation leaves them.
STATES = ("cold", "in turn")


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Returns ratios of the headline cases, forward + backward, by the medians of wall time; below 1 ours is slower.

    Args:
        results: a kernel results file.

    Returns:
        Group → state → ``{"compile": {case: ratio}, "torch": {case: ratio}, "geometric_mean", "smallest", "missing"}``:
        ratios to torch.compile, whose mean and smallest follow, and to plain torch in float32; ``missing`` names the
        cases that the file does not have.
    """
    return {
        group: {state: _of_group(results, cases, state) for state in STATES}
        for group, cases in headline_cases().items()
    }


def _of_group(results: dict[str, Any], cases: Sequence[Case], state: str) -> dict[str, Any]:
    by_rival: dict[str, dict[str, float]] = {"compile": {}, "torch": {}}
    missing = []
    entries = {Case.of(entry): entry for entry in results["cases"] if entry["state"] == state}
    for case in cases:
        timed = entries.get(case, {}).get("results", {})
        ours = timed.get(results["auto"])
        if ours is None or COMPILED not in timed:
            missing.append(case.name)
            continue
        for rival, name in (("compile", COMPILED), ("torch", UPCAST)):
            if name in timed:
                by_rival[rival][case.name] = timed[name]["wall_ms"]["median"] / ours["wall_ms"]["median"]
    ratios = list(by_rival["compile"].values())
    return {
        **by_rival,
        "geometric_mean": statistics.geometric_mean(ratios) if ratios else None,
        "smallest": min(ratios, default=None),
        "missing": missing,
    }


def table(results: dict[str, Any]) -> str:
    """Formats the headline cases as README.md quotes them: Markdown, a row for each, times *cold* / *in turn*."""
    entries = {(Case.of(entry), entry["state"]): entry["results"] for entry in results["cases"]}
    lines = [
        "| batch | target | upstream | torch.compile, ms | ours, ms | as fast as torch.compile | as torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(case for group in headline_cases().values() for case in group):
        measured = [entries.get((case, state), {}) for state in STATES]
        names = (COMPILED, results["auto"], UPCAST)
        compiled, ours, plain = (
            [timed[name]["wall_ms"]["median"] if name in timed else None for timed in measured] for name in names
        )
        if ours[0] is None:
            continue
        ratios = [_cell(_ratios(rival, ours), "×", lost=True) for rival in (compiled, plain)]
        batch = f"{case.label}, {count(case.pairs)} `{list(case.shape)}`"
        cells = [batch, _target(case), fraction(case.upstream), _cell(compiled), _cell(ours), *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _target(case: Case) -> str:
    """Describes a target: ``"float32, shared, errors given"``."""
    given = [case.target] + ["shared"] * case.shared_target + ["errors given"] * case.ref_error
    return ", ".join(given) + ("" if case.dtype == TRAINED else f" (predictions {case.dtype})")


def _ratios(rival: Sequence[float | None], ours: Sequence[float | None]) -> list[float | None]:
    return [a / b if a is not None and b is not None else None for a, b in zip(rival, ours, strict=True)]


def _cell(values: Sequence[float | None], unit: str = "", lost: bool = False) -> str:
    """Formats a cell: ``"0.47 / 0.15"``; a dash if a state was not measured, bold if a ratio is below 1."""
    texts = []
    for value in values:
        text = "–" if value is None else f"{value:.2f}{unit}" if value < 10 else f"{value:.3g}{unit}"
        texts.append(f"**{text}**" if lost and value is not None and value < 1 else text)
    return " / ".join(texts)


def print_summary(results: dict[str, Any]) -> None:
    """The same as text."""
    print(f"\n{results['auto']}: times as fast as torch.compile (and as plain torch), forward + backward, wall time")
    for group, states in summarize(results).items():
        for state, numbers in states.items():
            ratios, plain, missing = (numbers[name] for name in ("compile", "torch", "missing"))
            print(f"{group}, {state}:{'' if ratios else ' not measured'}")
            for name, ratio in ratios.items():
                torch = f" ({plain[name]:.2f})" if name in plain else ""
                print(f"  {ratio:6.2f}{torch:10}  {name}{'   SLOWER' if ratio < 1 else ''}")
            if ratios:
                print(f"  {numbers['geometric_mean']:6.2f} geometric mean of {len(ratios)}, ", end="")
                print(f"smallest {numbers['smallest']:.2f}")
                if missing:
                    print(f"  not measured: {len(missing)}, e.g. {missing[0]}")
