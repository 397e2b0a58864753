"""Pictures of results files, from nothing but the files: ``python -m benchmarks.plots [results.json ...]``.

Without arguments, of every kernel, sweep and step file in ``benchmarks/results``. Files of one kind and one device are
drawn together. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatterMathtext, LogLocator, NullLocator

from benchmarks.baselines import AUTOTUNED, AUTOTUNED_NO_GRAPHS, COMPILED, UPCAST
from benchmarks.cases import BOTH, DTYPES, FORWARD, TARGET, TRAINED, UPSTREAM, Case, headline_cases
from benchmarks.kernel_summary import STATES as SUMMARY_STATES
from benchmarks.plot_frame import (
    Entry,
    copy_of,
    described,
    implementations,
    load,
    paler,
    pick,
    place,
    save,
    style,
    tidy,
)
from benchmarks.plots_times import plot_step, plot_times
from benchmarks.timing import RESULTS

# What ours is compared with: name, the baselines of which the fastest counts, colour.
RIVALS = {
    "torch": ("torch, float32", (UPCAST,), style(UPCAST)[0]),
    "compile": ("torch.compile", (COMPILED,), style(COMPILED)[0]),
    "autotune": ("torch.compile max-autotune (the faster of with and without CUDA graphs)",
                 (AUTOTUNED, AUTOTUNED_NO_GRAPHS), style(AUTOTUNED)[0]),
}  # fmt: skip
LOSS = "#b3123f"
PANELS = {"cold": "cold caches", "in turn": "in turn (caches as another implementation left them)"}
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


# ---------------------------------------------------------------- kernel


def ratios(entry: Entry, auto: str) -> dict[str, tuple[float, bool]]:
    """Returns how many times as fast as each of ``RIVALS`` ours is, and whether the difference shows.

    By the medians of wall time; below 1 ours is slower. It does not show where the quartiles overlap.
    """
    walls = {name: result["wall_ms"] for name, result in entry["results"].items()}
    against = {}
    for rival, (_, names, _) in RIVALS.items():
        measured = [walls[name] for name in names if name in walls]
        if measured and auto in walls:
            best, ours = min(measured, key=lambda wall: float(wall["median"])), walls[auto]
            shows = best["quartiles"][0] > ours["quartiles"][1] or ours["quartiles"][0] > best["quartiles"][1]
            against[rival] = best["median"] / ours["median"], shows
    return against


def plot_headline(results: dict[str, Any], path: Path) -> Path | None:
    """Draws bars for each case that is quoted, forward + backward, cold beside in turn; slower ones in red."""
    wanted = [case for group in headline_cases().values() for case in group]
    entries = {(Case.of(entry), entry["state"]): entry for entry in results["cases"]}
    panels = {
        PANELS[state]: {
            described(entries[case, state]): entries[case, state] for case in wanted if (case, state) in entries
        }
        for state in SUMMARY_STATES
    }
    rows = [described(case.fields()) for case in wanted]
    title = f"How fast the pair loss is where training calls it: {results['auto']}, forward + backward"
    return _speedups(results, panels, rows, path, title)


def plot_speedup(results: dict[str, Any], dtype: str, state: str, path: Path) -> Path | None:
    """The same for tensors of one type and an upstream gradient of 1, by model and number of pairs, both modes."""
    plain = {"dtype": dtype, "target": dtype, "shared_target": False, "ref_error": False, "upstream": 1.0}
    panels = {
        mode.replace("+", " + "): {place(entry): entry for entry in pick(results, mode=mode, state=state, **plain)}
        for mode in (BOTH, FORWARD)
    }
    order = {
        label: (entry["pairs"], entry["elements"]) for entries in panels.values() for label, entry in entries.items()
    }
    rows = sorted(order, key=lambda label: order[label])
    title = f"How fast the pair loss is: {results['auto']}, {dtype}, upstream gradient 1, {state} caches"
    return _speedups(results, panels, rows, path, title)


def _speedups(
    results: dict[str, Any], panels: dict[str, dict[str, Entry]], rows: list[str], path: Path, title: str
) -> Path | None:
    """Draws panels of bars: title → label of a row → entry. ``rows`` from top to bottom; rows without an entry go."""
    auto = results["auto"]
    panels = {name: entries for name, entries in panels.items() if entries}
    every = [ratios(entry, auto) for entries in panels.values() for entry in entries.values()]
    numbers = [ratio for rivals in every for ratio, _ in rivals.values()]
    if not numbers:
        return None
    shown = [rival for rival in RIVALS if any(rival in rivals for rivals in every)]
    rows = [label for label in reversed(rows) if any(label in entries for entries in panels.values())]
    width, height = 5.0 * len(panels) + 0.065 * max(map(len, rows)), (0.14 + 0.15 * len(shown)) * len(rows) + 0.9
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, height), sharey=True, sharex=True, layout="constrained", squeeze=False
    )
    for ax, (name, entries) in zip(axes[0], panels.items(), strict=True):
        for label, entry in entries.items():
            _speedup_bars(ax, rows.index(label), ratios(entry, auto), shown)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("times as fast (wall time, medians)")
        tidy(ax, "x")
    left, right = min(0.6, 0.8 * min(numbers)), max(3.0, 1.9 * max(numbers))
    ticks = [tick for tick in TICKS if left < tick < right]
    axes[0][0].set(xscale="log", xlim=(left, right), ylim=(-0.6, len(rows) - 0.4), yticks=range(len(rows)))
    axes[0][0].set_yticklabels(rows, fontsize=8.5)
    axes[0][0].xaxis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
    axes[0][0].xaxis.set_major_formatter(lambda tick, _: f"{tick:g}×")
    axes[0][0].xaxis.set_minor_locator(NullLocator())
    handles = [Patch(color=RIVALS[rival][2], label=f"against {RIVALS[rival][0]}") for rival in shown]
    handles.append(Patch(facecolor="white", hatch="////", edgecolor=LOSS, label="ours is slower"))
    extra = "≈, pale: the quartiles overlap. A baseline that was not measured for a case has no bar."
    return save(figure, results, path, title, handles, extra, 2)


def _speedup_bars(ax: Axes, row: int, against: dict[str, tuple[float, bool]], shown: list[str]) -> None:
    height = 0.84 / len(shown)
    for position, rival in enumerate(shown):
        if rival not in against:
            continue
        ratio, shows = against[rival]
        y, lost = row + 0.42 - (position + 0.5) * height, ratio < 1
        edge = {"hatch": "//////", "edgecolor": LOSS} if lost else {"edgecolor": "white", "linewidth": 0.4}
        ax.barh(y, ratio - 1, height, left=1, color=paler(RIVALS[rival][2], 0.0 if shows else 0.6), **edge)
        text = "" if shows else "≈"
        text += f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"
        ax.annotate(
            f"{text} (slower)" if lost else text, (max(ratio, 1), y), (3, 0), textcoords="offset points", va="center",
            fontsize=7, color=LOSS if lost else "black", fontweight="bold" if lost else "normal",
        )  # fmt: skip


def plot_bandwidth(results: dict[str, Any], state: str, path: Path) -> Path | None:
    """Draws bytes that have to move against bytes a second, under the machine's copy bandwidth."""
    modes = [mode for mode in (BOTH, FORWARD) if pick(results, mode=mode, state=state)]
    if not modes:
        return None
    figure, axes = plt.subplots(
        1, len(modes), figsize=(5.4 * len(modes) + 0.6, 4.2), sharey=True, layout="constrained", squeeze=False
    )
    names = implementations(pick(results, state=state))
    for ax, mode in zip(axes[0], modes, strict=True):
        for name in names:
            for dtype, filled in (("bfloat16", True), ("float32", False)):
                points = [
                    (entry["floor_bytes"] / 1e6, entry["results"][name]["gb_s"])
                    for entry in pick(results, mode=mode, state=state, dtype=dtype)
                    if name in entry["results"]
                ]
                if points:
                    color, marker = style(name)
                    x, y = zip(*points, strict=True)
                    face = color if filled else "none"
                    ax.scatter(x, y, s=26, marker=marker, facecolor=face, edgecolor=color, linewidth=1.1, alpha=0.9)
        ax.axhline(copy_of(results), color="black", linewidth=1, linestyle="--")
        ax.annotate(
            f"copy: {copy_of(results):,{'.3g' if copy_of(results) < 100 else '.0f'}} GB/s",
            (0.02, copy_of(results)), (0, 3), textcoords="offset points", xycoords=("axes fraction", "data"),
            fontsize=8.5,
        )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="fewest bytes to move, MB")
        ax.set_title(mode.replace("+", " + "), fontsize=10)
        tidy(ax)
    axes[0][0].set_ylabel("those bytes over the measured time, GB/s")
    basis = "device" if results["machine"]["device_type"] == "cuda" else "wall"
    extra = (
        "Bytes: inputs read once, gradient written once. "
        f"Medians of {basis} time. Filled: predictions in bfloat16, hollow: float32."
    )
    if FORWARD in modes:
        extra += "\nA copy writes as much as it reads; the forward only reads, and may exceed it."
    title = f"How near the pair loss comes to memory bandwidth: {state} caches"
    return save(figure, results, path, title, _markers(names), extra)


def _markers(names: list[str], line: Literal["-", "none"] = "none") -> list[Line2D]:
    """Returns the legend's entries for implementations."""
    return [
        Line2D([], [], color=style(name)[0], marker=style(name)[1], markersize=5.5, linestyle=line, label=name)
        for name in names
    ]


def plot_memory(results: dict[str, Any], path: Path) -> Path | None:
    """Draws memory beyond the inputs at the peak of one call, against the gradient's own: largest first."""
    training = {"dtype": TRAINED, "target": TARGET, "ref_error": False, "upstream": UPSTREAM, "mode": BOTH}
    entries = sorted(pick(results, state="cold", **training), key=lambda entry: -int(entry["elements"]))
    extras = {name: [entry["results"].get(name, {}).get("extra_mb") for entry in entries]
              for name in implementations(entries)}  # fmt: skip
    measured = [name for name, values in extras.items() if any(value is not None for value in values)]
    if not measured:
        return None
    figure, ax = plt.subplots(figsize=(10.6, 0.4 * len(entries) + 0.8), layout="constrained")
    for name in measured:
        color, marker = style(name)
        points = [(value, row) for row, value in enumerate(extras[name]) if value]  # 0 has no place on the axis
        if points:
            x, y = zip(*points, strict=True)
            ax.scatter(x, y, s=46, marker=marker, color=color, zorder=3, alpha=0.9)
    for row, entry in enumerate(entries):
        gradient = entry["elements"] * DTYPES[entry["dtype"]].itemsize / 1e6
        ax.plot([gradient, gradient], [row - 0.34, row + 0.34], color="black", linewidth=1.4, zorder=2)
    ax.set_yticks(range(len(entries)), [described(entry) for entry in entries])
    ax.tick_params(axis="y", labelsize=8.5)
    ax.set(xscale="log", xlabel="memory beyond the inputs, MB", ylim=(-0.6, len(entries) - 0.4))
    tidy(ax, "x")
    extra = "Peak of torch's allocations during one call, minus what was there before."
    if AUTOTUNED in implementations(entries) and AUTOTUNED not in measured:
        extra += " A CUDA graph's own pool is not counted, nor shown."
    handles = [*_markers(measured), Line2D([], [], color="black", linewidth=1.4, label="the gradient itself")]
    title = "Peak memory of the pair loss: forward + backward"
    return save(figure, results, path, title, handles, extra)


# ---------------------------------------------------------------- sweep


def plot_sweep(results: dict[str, Any], dtype: str, path: Path) -> Path | None:
    """Draws time, and share of the copy bandwidth, by size; cold and warm caches side by side."""
    states = [state for state in ("cold", "warm") if pick(results, dtype=dtype, state=state)]
    if not states:
        return None
    figure, axes = plt.subplots(
        2, len(states), figsize=(5.4 * len(states) + 0.6, 7), sharex=True, sharey="row", layout="constrained",
        squeeze=False,
    )  # fmt: skip
    names = implementations(pick(results, dtype=dtype))
    least = []
    for (top, bottom), state in zip(axes.T, states, strict=True):
        entries = sorted(pick(results, dtype=dtype, state=state), key=lambda entry: int(entry["elements"]))
        for name in names:
            color, marker = style(name)
            timed = [(entry["elements"], entry["results"][name]) for entry in entries if name in entry["results"]]
            if not timed:
                continue
            sizes = [size for size, _ in timed]
            walls = [result["wall_ms"]["median"] for _, result in timed]
            low, high = zip(*(result["wall_ms"]["quartiles"] for _, result in timed), strict=True)
            least.append(min(walls))
            top.plot(sizes, walls, color=color, marker=marker, markersize=4, linewidth=1.3)
            top.fill_between(sizes, low, high, color=color, alpha=0.18, linewidth=0)
            share = [100 * result["of_copy"] for _, result in timed]
            bottom.plot(sizes, share, color=color, marker=marker, markersize=4, linewidth=1.3)
        sizes = [entry["elements"] for entry in entries]
        top.plot(sizes, [entry["floor_ms"] for entry in entries], "k--", linewidth=1)
        bottom.axhline(100, color="black", linestyle="--", linewidth=1)
        top.set_title(f"{state} caches", fontsize=10)
        bottom.set_xlabel("elements of the stacked predictions (4 pairs)")
        tidy(top)
        tidy(bottom)
    ax = axes[0][0]
    ax.set(xscale="log", yscale="log", ylabel="wall time, ms (band: quartiles)")
    ax.set_ylim(bottom=0.3 * min(least))
    ax.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    ax.xaxis.set_major_formatter(LogFormatterMathtext(base=2))
    ax.xaxis.set_minor_locator(NullLocator())
    basis = "device" if results["machine"]["device_type"] == "cuda" else "wall"
    axes[1][0].set_ylabel(f"fewest bytes over {basis} time,\n% of copy bandwidth ({copy_of(results):,.0f} GB/s)")
    axes[1][0].set_ylim(bottom=0)
    handles = _markers(names, "-")
    handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="floor: copy bandwidth"))
    types = Case.of(pick(results, dtype=dtype)[0]).types
    title = f"Where overhead ends and bandwidth begins: forward + backward, {types}"
    extra = "Inputs of more than four times the caches are cold at every call, and not measured warm."
    return save(figure, results, path, title, handles, extra)


def draw(stem: str, results: dict[str, Any], folder: Path) -> list[Path]:
    """All pictures of one results file."""
    made: list[Path | None] = []
    dtypes = list(dict.fromkeys(entry.get("dtype", "") for entry in results["cases"]))
    if results["kind"] == "kernel":
        made.append(plot_headline(results, folder / f"{stem}-headline.png"))
        made += [plot_speedup(results, dtype, "cold", folder / f"{stem}-speedup-{dtype}-cold.png") for dtype in dtypes]
        made.append(plot_bandwidth(results, "cold", folder / f"{stem}-bandwidth.png"))
        made.append(plot_memory(results, folder / f"{stem}-memory.png"))
        training = {"target": TARGET, "shared_target": False, "ref_error": False, "upstream": UPSTREAM, "mode": BOTH}
        small = pick(results, label="SD1.5", pairs=1, dtype=TRAINED, **training)
        title = "One SD1.5 pair, where all is overhead"
        made.append(plot_times(results, small, title, folder / f"{stem}-one-pair.png"))
    elif results["kind"] == "sweep":
        made += [plot_sweep(results, dtype, folder / f"{stem}-{dtype}.png") for dtype in dtypes]
    elif results["kind"] == "step":
        made.append(plot_step(results, folder / f"{stem}.png"))
    return [path for path in made if path]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="default: all in benchmarks/results")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the pictures (default %(default)s)")
    args = parser.parse_args(argv)
    matplotlib.use("Agg")
    kinds = ("kernel", "sweep", "step")
    paths = args.results or sorted(path for kind in kinds for path in RESULTS.glob(f"{kind}-*.json"))
    if not paths:
        print("no results files: run python -m benchmarks.kernel or benchmarks.sweep first")
    for stem, results in load(paths):
        for path in draw(stem, results, args.output):
            print(path)


if __name__ == "__main__":
    main()
