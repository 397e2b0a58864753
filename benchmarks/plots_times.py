"""Pictures of times in milliseconds: every implementation of an entry, and a whole training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.cases import Case
from benchmarks.plot_frame import Entry, implementations, paler, place, save, style, tidy


def plot_times(results: dict[str, Any], entries: list[Entry], title: str, path: Path) -> Path | None:
    """Draws median times with quartiles, a panel an entry: wall, and on a GPU the host's and the device's part."""
    if not entries:
        return None
    everything = [result for entry in entries for result in entry["results"].values()]
    kinds = [kind for kind in ("wall_ms", "host_ms", "device_ms") if any(result.get(kind) for result in everything)]
    heights = [len(entry["results"]) * (0.11 + 0.13 * len(kinds)) + 0.5 for entry in entries]
    figure, axes = plt.subplots(
        len(entries), 1, figsize=(8.6, sum(heights)), layout="constrained", squeeze=False, sharex=True,
        height_ratios=heights,
    )  # fmt: skip
    for ax, entry in zip(axes[:, 0], entries, strict=True):
        names = list(reversed(implementations([entry])))
        for row, name in enumerate(names):
            _time_bars(ax, row, name, entry["results"][name], kinds)
        ax.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4))
        ax.tick_params(axis="y", labelsize=8.5)
        ax.set_title(f"{Case.of(entry).name}, {entry['state']}", fontsize=9.5, loc="left")
        tidy(ax, "x")
        ax.margins(x=0.14)
    axes[-1, 0].set_xlabel("milliseconds")
    extra = "Medians; black: from the lower to the upper quartile."
    if len(kinds) > 1:
        extra += "\nwall: until the result is there; host: until Python goes on; device: without gaps between launches."
    return save(figure, results, path, title, extra=extra)


def _time_bars(ax: Axes, row: int, name: str, result: dict[str, Any], kinds: list[str]) -> None:
    height = 0.84 / len(kinds)
    for position, kind in enumerate(kinds):
        if time := result.get(kind):
            text = f"{time['median']:.3g}" + (f" {kind[:-3]}" if len(kinds) > 1 else "")
            color = paler(style(name)[0], (0.0, 0.45, 0.72)[position])
            _bar(ax, row + 0.42 - (position + 0.5) * height, color, time, text, height * 0.94)


def plot_step(results: dict[str, Any], path: Path) -> Path | None:
    """Draws a training step with each loss, and beside it the loss alone with its share of the step."""
    entries = results["cases"]
    if not entries:
        return None
    heights = [0.3 * len(entry["results"]) + 0.5 for entry in entries]
    figure, axes = plt.subplots(
        len(entries), 2, figsize=(11.4, sum(heights) + 0.3), layout="constrained", squeeze=False, sharey="row",
        height_ratios=heights,
    )  # fmt: skip
    for (left, right), entry in zip(axes, entries, strict=True):
        names = list(reversed(implementations([entry])))
        for row, name in enumerate(names):
            result = entry["results"][name]
            color = style(name)[0]
            _bar(left, row, color, result["wall_ms"], f"{result['wall_ms']['median']:.4g}")
            direct = result.get("direct_ms") or {}
            if time := direct.get("device_ms") or direct.get("wall_ms"):
                share = time["median"] / result["wall_ms"]["median"]
                _bar(right, row, color, time, f"{time['median']:.3g}, {100 * share:.2g} % of the step")
        left.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4))
        left.tick_params(axis="y", labelsize=8.5)
        left.set_title(f"{place(entry)}, {entry['dtype']}: the step", fontsize=9.5, loc="left")
        right.set_title("the loss alone, forward + backward, cold caches", fontsize=9.5, loc="left")
        left.margins(x=0.16)
        right.margins(x=0.5)
        tidy(left, "x")
        tidy(right, "x")
    for ax in axes[-1]:
        ax.set_xlabel("milliseconds")
    basis = "device" if results["machine"]["device_type"] == "cuda" else "wall"
    extra = f"Medians; black: from the lower to the upper quartile. The step: wall time; the loss alone: {basis} time."
    return save(figure, results, path, "What the loss costs in a training step", extra=extra)


def _bar(ax: Axes, y: float, color: Any, time: dict[str, Any], text: str, height: float = 0.66) -> None:
    """Draws a bar up to the median, a line from quartile to quartile, and a label."""
    low, high = time["quartiles"]
    ax.barh(y, time["median"], height, color=color)
    ax.plot([low, high], [y, y], color="black", linewidth=1)
    at = max(high, time["median"]), y
    ax.annotate(text, at, (4, 0), textcoords="offset points", va="center", fontsize=7.5)
