"""What all pictures share: colours, title, legend and caption that do not touch, and reading results files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks.baselines import AUTOTUNED, AUTOTUNED_NO_GRAPHS, COMPILED, PUBLISHED, UPCAST
from benchmarks.cases import Case, count
from benchmarks.compare import key as entry_key
from benchmarks.machine import caption, disturbed

# Okabe and Ito's palette, told apart by the colour-blind; markers tell the same a second time.
STYLES = {
    PUBLISHED: ("#7f7f7f", "v"),
    UPCAST: ("#E69F00", "s"),
    COMPILED: ("#56B4E9", "D"),
    AUTOTUNED: ("#0072B2", "P"),
    AUTOTUNED_NO_GRAPHS: ("#003a5c", "X"),
    "sipo eager": ("#CC79A7", "^"),
    "sipo native": ("#009E73", "o"),
    "sipo triton": ("#D55E00", "h"),
    "sipo cuda": ("#009E73", "o"),
}
OTHER_STYLE = ("#444444", "*")
# Inches: what the title, a row of the legend and a line of the caption take.
TITLE, LEGEND_ROW, CAPTION_LINE, MARGIN = 0.42, 0.21, 0.16, 0.1

Entry = dict[str, Any]


def load(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Loads results files by stem; files of one kind and device become one, under the first one's stem and machine.

    Where two have the same entry, the later file's counts.
    """
    merged: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for path in paths:
        results = json.loads(path.read_text(encoding="utf-8"))
        _, whole = merged.setdefault((results["kind"], results["machine"]["device"]), (path.stem, results))
        if whole is not results:
            entries = {entry_key(entry): entry for entry in whole["cases"] + results["cases"]}
            whole["cases"] = list(entries.values())
            whole["complete"] = whole.get("complete", True) and results.get("complete", True)
    yield from merged.values()


def pick(results: dict[str, Any], **fields: Any) -> list[Entry]:
    """Returns the entries whose fields have these values."""
    return [entry for entry in results["cases"] if all(entry.get(key) == value for key, value in fields.items())]


def implementations(entries: list[Entry]) -> list[str]:
    """Returns all that occur, in the order of ``STYLES``."""
    names = {name for entry in entries for name in entry["results"]}
    return [name for name in STYLES if name in names] + sorted(names - set(STYLES))


def style(name: str) -> tuple[str, str]:
    """Returns the colour and marker of an implementation."""
    return STYLES.get(name, OTHER_STYLE)


def paler(color: str, share: float) -> tuple[float, ...]:
    """Mixes ``color`` with that share of white."""
    return tuple(part + (1 - part) * share for part in to_rgb(color))


def copy_of(results: dict[str, Any]) -> float:
    """Returns the run's median copy bandwidth, GB/s."""
    return float(results["copy_bandwidth_gb_s"]["median"])


def place(entry: Entry) -> str:
    """Formats a case's place: ``"SDXL, 4 pairs"``."""
    return f"{entry['label']}, {count(entry['pairs'])}" if entry.get("pairs") else str(entry["label"])


def described(entry: Entry) -> str:
    """Formats a case: ``"SDXL, 4 pairs, bfloat16, float32 target, upstream 1/8"``."""
    case = Case.of(entry)
    return case.name.removesuffix(f", {case.mode}")


def tidy(ax: Axes, axis: Literal["both", "x", "y"] = "both") -> None:
    """A light grid behind the data, no box."""
    ax.grid(axis=axis, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def save(
    figure: Figure,
    results: dict[str, Any],
    path: Path,
    title: str,
    handles: Sequence[Any] = (),
    extra: str = "",
    columns: int = 3,
) -> Path:
    """Sets title, legend and caption around the axes, each in space of its own, and writes the picture.

    Args:
        figure: made with ``layout="constrained"``; grows by what is set around the axes.
        results: the results file, which the caption's line about machine, versions and date comes from.
        path: where the PNG goes.
        title: the subject.
        handles: the legend's entries, labelled.
        extra: what else the reader has to know, a line.
        columns: of the legend.
    """
    lines = [caption(results["machine"])] + ([extra] if extra else [])
    if busy := disturbed(results["cases"]):
        lines.append(f"Other processes were busy on this machine during {busy} of {len(results['cases'])} entries.")
    if not results.get("complete", True):
        lines.append("The run was cut off: what is missing here was not measured.")
    rows = -(-len(handles) // columns)
    top, bottom = TITLE + rows * LEGEND_ROW + MARGIN * bool(rows), len(lines) * CAPTION_LINE + 2 * MARGIN
    width, height = figure.get_size_inches()
    height += top + bottom
    figure.set_size_inches(width, height)
    engine = figure.get_layout_engine()
    assert engine is not None  # layout="constrained"
    engine.set(rect=(0, bottom / height, 1, 1 - (top + bottom) / height))  # type: ignore[call-arg]
    figure.text(0.5, 1 - MARGIN / height, title, ha="center", va="top", fontsize=12)
    if rows:
        figure.legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1 - TITLE / height), ncols=columns,
            frameon=False, fontsize=8.5, borderaxespad=0,
        )  # fmt: skip
    figure.text(0.01, MARGIN / height, "\n".join(lines), ha="left", va="bottom", fontsize=8, color="#444444")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
