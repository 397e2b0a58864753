"""The pictures of docs/alignment.md, each from the results file alone (``--figures`` of the command)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.alignment.cells import BETAS, LONG, Cell
from benchmarks.alignment.claims import LOW_NOISE, NAMES
from benchmarks.alignment.estimates import (
    MissingCellsError,
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
from benchmarks.alignment.variants import PARTS, RELATIVES, SFT
from benchmarks.machine import caption
from sipo.files import aside
from sipo_kernels.options import METHODS

# Okabe and Ito's palette; a marker says the same once more.
STYLES = {
    "diffusion_dpo": ("#0072B2", "o"),
    "dpo_cm": ("#E69F00", "s"),
    "sipo": ("#D55E00", "D"),
    "sdpo": ("#009E73", "^"),
    SFT: ("#7f7f7f", "v"),
}
BASE = "#444444"
TIMESTEPS = (10, 30, 100, 300, 1000)
_INSIDE: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "bottom", "fontsize": 8}

plt.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "figure.dpi": 110,
    }
)

Draw = Callable[[Results], Figure]


def draw_all(content: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Draws every picture whose cells are there; yields what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(content)
    for name, draw in FIGURES.items():
        try:
            figure = draw(results)
        except MissingCellsError as missing:
            print(f"{name}: left out, {missing}")
            continue
        text = f"{caption(content['machine'])} · {len(content['cells'])} cells"
        figure.text(0.005, 0.004, text, fontsize=6.5, color="#777777")
        path = folder / f"{name}.png"
        with aside(path) as place:
            figure.savefig(place, format="png")
        plt.close(figure)
        yield path


def _over(axes: Axes, results: Results, cells: Sequence[Cell], xs: Sequence[float], what: What, method: str) -> None:
    """Draws one method's line over ``xs``, with the 95 % interval of the mean over seeds."""
    colour, marker = STYLES[method]
    estimates = [results.estimate(what, cell) for cell in cells]
    mean, half = (np.array([getattr(e, name) for e in estimates]) for name in ("mean", "half"))
    axes.plot(xs, mean, color=colour, marker=marker, label=NAMES[method], markersize=5)
    axes.fill_between(xs, mean - half, mean + half, color=colour, alpha=0.13, linewidth=0)


def _floor(axes: Axes, results: Results, task: Cell, what: What, base: float | None) -> None:
    """Draws horizontal lines for the base model and for supervised fine-tuning."""
    if base is not None:
        axes.axhline(base, color=BASE, linewidth=1, linestyle=(0, (1, 2)), label="base model")
    cell = task.like(method=SFT, beta=0.0)
    if results.has(cell):
        axes.axhline(
            results.estimate(what, cell).mean, color=STYLES[SFT][0], linewidth=1.4, linestyle="--", label=NAMES[SFT]
        )


def _methods_over_beta(axes: Axes, results: Results, title: str, what: What, label: str) -> None:
    """Draws a panel with a line for each method over β."""
    for method in METHODS:
        _over(axes, results, [Cell(method=method, beta=b) for b in BETAS], BETAS, what, method)
    axes.set(title=title, ylabel=label)


def _log_axis(axes: Axes, ticks: Sequence[float], label: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _finish(figure: Figure, title: str, axes: Axes | None = None, columns: int = 6) -> Figure:
    """Title, legend (of one of the axes) and caption get room of their own, in inches, around the axes."""
    height = figure.get_size_inches()[1]
    figure.text(0.5, 1 - 0.08 / height, title, ha="center", va="top", fontsize=12, fontweight="bold")
    top = 0.42
    if axes is not None:
        handles, labels = axes.get_legend_handles_labels()
        anchor = (0.5, 1 - 0.3 / height)
        figure.legend(handles, labels, ncols=columns, loc="upper center", bbox_to_anchor=anchor, borderaxespad=0.2)
        top = 0.68
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, 0.2 / height, 1, 1 - (top + 0.2) / height))  # type: ignore[call-arg]
    return figure


def beta(results: Results) -> Figure:
    """Draws every method over β: what is gained, and what it costs."""
    base = results.bases["digits"]
    panels = (
        ("True reward: mean ink", reward, base["rewards"]["ink"], "mean pixel, −1 to 1"),
        ("Read as the digit asked for", agreement, base["agreement"], "share of samples"),
        ("Distance to the real digits", distance, base["distance"], "Fréchet distance, 16 components"),
        ("Diversity within a digit", diversity, base["diversity"], "of the real digits'"),
        ("Held-out preferences ranked right", held_out, None, "share of pairs"),
        ("Pairs that still train, at the end", active_at_end, None, "active fraction"),
    )
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.8), sharex=True, layout="constrained")
    for axes, (title, what, floor, label) in zip(grid.flat, panels, strict=True):
        _methods_over_beta(axes, results, title, what, label)
        _floor(axes, results, Cell(), what, floor)
        _log_axis(axes, BETAS, "β" if axes in grid[1] else "")
    return _finish(
        figure, "Digits that prefer ink: 300 steps of 16 pairs, mean of the seeds with its 95 % interval", grid[0, 0]
    )


def frontier(results: Results) -> Figure:
    """Draws the reward gained against its cost: each method's points over β, to see whether they are one curve."""
    tasks = [Cell()] + [Cell(task=name) for name in ("moving-cogvideox", "moving-wan")]
    tasks = [task for task in tasks if all(results.has(task.like(method=m, beta=b)) for m in METHODS for b in BETAS)]
    if not tasks:
        raise MissingCellsError("no task with all methods and β")
    figure, grid = plt.subplots(
        len(tasks), 2, figsize=(11, 3.9 * len(tasks) + 0.9), squeeze=False, layout="constrained"
    )
    for row, task in zip(grid, tasks, strict=True):
        start = results.bases[task.task]
        for axes, (what, label) in zip(
            row, ((distance, "Fréchet distance to the data"), (diversity, "diversity")), strict=True
        ):
            for method in (*METHODS, SFT):
                cells = [task.like(method=method, beta=b) for b in (BETAS if method != SFT else (0.0,))]
                x, y = ([results.estimate(of, cell) for cell in cells if results.has(cell)] for of in (reward, what))
                colour, marker = STYLES[method]
                points = [[getattr(e, name) for e in es] for es in (x, y) for name in ("mean", "half")]
                axes.errorbar(
                    points[0], points[2], xerr=points[1], yerr=points[3], color=colour, marker=marker, markersize=5,
                    linewidth=1.2, elinewidth=0.6, label=NAMES[method],
                )  # fmt: skip
                if method == "diffusion_dpo":
                    for b, ex, ey in zip(BETAS, x, y, strict=True):
                        axes.annotate(f"{b:g}", (ex.mean, ey.mean), (7, -10), textcoords="offset points", fontsize=8)
            axes.plot(start["rewards"][task.reward], start[what.__name__], "*", color=BASE, markersize=11, label="base")
            axes.set(title=task.task, xlabel=f"true reward: mean {task.reward}", ylabel=label)
    return _finish(figure, "Reward gained, and what it costs (numbers: β of Diffusion-DPO)", grid[0, 0])


def gradient(results: Results) -> Figure:
    """Draws where the variance of the weights' gradient sits, what it is worth, and what clip and mask take away."""
    records = results.of(Cell(method="diffusion_dpo"))
    levels = records[0]["probe"]["levels"]
    figure, grid = plt.subplots(1, 3, figsize=(12.5, 4.3), layout="constrained")

    def line(axes: Axes, values: Any, colour: str, label: str, style: str = "-") -> None:
        axes.plot(levels, values.mean(0), style, color=colour, marker="o", markersize=3.5, label=label)
        axes.fill_between(levels, values.min(0), values.max(0), color=colour, alpha=0.13, linewidth=0)

    def of(where: str, what: str, method: str) -> Any:
        return np.array([record[where][what][method] for record in records])

    dpo, sipo = STYLES["diffusion_dpo"][0], STYLES["sipo"][0]
    line(grid[0], of("probe_base", "variance", "diffusion_dpo"), dpo, "Diffusion-DPO")
    line(grid[0], of("probe_base", "variance", "sipo"), sipo, "SIPO (DPO-C&M and SDPO: the same within 1 %)")
    grid[0].set(title="Variance, at the base model", ylabel="variance of a batch's gradient / β²")
    signal = of("probe_base", "signal", "diffusion_dpo") / of("probe_base", "variance", "diffusion_dpo")
    line(grid[1], signal, dpo, "")
    grid[1].set(title="What it teaches, for its noise", ylabel="‖mean gradient‖² / variance", yscale="log")
    line(grid[2], of("probe_base", "active", "sipo"), sipo, "")
    line(grid[2], of("probe", "active", "sipo"), sipo, "", "--")
    grid[2].set(title="Pairs that the mask lets through", ylabel="share of pairs")
    grid[2].annotate("dashed: for the weights after\n300 steps of Diffusion-DPO", (0.97, 0.05), **_INSIDE)
    for axes in grid:
        axes.axvline(LOW_NOISE, color=BASE, linewidth=0.8, linestyle=(0, (1, 3)))
        _log_axis(axes, TIMESTEPS, "timestep t")
    return _finish(figure, "Low noise makes the gradient noisy and teaches least, and there the mask closes", grid[0])


def training(results: Results) -> Figure:
    """Draws the gradient's norm and its spread, and what becomes of the errors."""
    panels = (
        ("Norm of the gradient / β", lambda r: grad_norm(r) / r["beta"], "before clipping"),
        ("Its spread over steps", grad_norm_spread, "standard deviation / mean"),
        ("Rise of the chosen samples' error", chosen_gap, "share of the reference's"),
        ("Rise of the rejected samples' error", rejected_gap, "share of the reference's"),
    )
    figure, grid = plt.subplots(1, 4, figsize=(14, 3.9), layout="constrained")
    for axes, (title, what, label) in zip(grid, panels, strict=True):
        _methods_over_beta(axes, results, title, what, label)
        if what is not grad_norm_spread:
            axes.set_yscale("log")
        _log_axis(axes, BETAS, "β")  # minor ticks go from both axes
    return _finish(figure, "In training: digits, ink, the last half of 300 steps", grid[0])


def weights(results: Results) -> Figure:
    """Draws importance weights by timestep, for pairs from the data and from the base model, before and after."""

    def line(axes: Axes, cell: Cell, window: str, colour: str, label: str, style: str = "-") -> None:
        bins = [[np.nan if x is None else x for x in r["timesteps"][window]["ratio"]] for r in results.of(cell)]
        at = (np.arange(len(bins[0])) + 0.5) / len(bins[0]) * 1000
        axes.plot(at, np.nanmean(np.array(bins), 0), style, color=colour, label=label, linewidth=1.8)

    figure, grid = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    line(grid[0], Cell(method="diffusion_dpo"), "early", "#0072B2", "pairs of real images")
    line(grid[0], Cell(method="diffusion_dpo", source="base"), "early", "#D55E00", "pairs of base samples", "--")
    grid[0].set_title("First third of Diffusion-DPO, β = 1000")
    grid[0].set_ylabel("mean importance ratio, unclipped")
    colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.85, len(BETAS)))
    for b, colour in zip(BETAS, colours, strict=True):
        line(grid[1], Cell(method="sipo", beta=b), "late", colour, f"β = {b:g}")
    grid[1].set_title("Last third of SIPO, real images")
    for axes in grid:
        axes.axhline(0.9, color=BASE, linewidth=1, linestyle=(0, (1, 2)))
        _log_axis(axes, TIMESTEPS, "timestep t")
        axes.legend(loc="lower right")
    grid[0].annotate("0.9: pairs below are masked", (100, 0.875), fontsize=8, va="top")
    return _finish(figure, "Importance weights by timestep, and how training moves them")


def _comparison(results: Results, rows: Sequence[tuple[str, Cell]], against: Cell, title: str) -> Figure:
    """Draws what each row has more or less than one of them, seed by seed, with the interval of the mean difference."""
    rows = [row for row in rows if results.has(row[1])]
    if len(rows) < 3:
        raise MissingCellsError(f"{title}: {len(rows)} rows, expected at least 3")
    panels = (
        ("true reward", reward),
        ("agreement", agreement),
        ("distance to the data", distance),
        ("active at the end", active_at_end),
    )
    figure, grid = plt.subplots(1, len(panels), figsize=(13, 1.7 + 0.3 * len(rows)), sharey=True, layout="constrained")
    for axes, (label, what) in zip(grid, panels, strict=True):
        start = results.estimate(what, against)
        for y, (_, cell) in enumerate(rows):
            e = results.difference(what, cell, against)
            colour = STYLES[cell.method][0] if not cell.variant else "#333333"
            axes.errorbar(e.mean, y, xerr=e.half, fmt="o", color=colour, capsize=2, markersize=5)
        axes.axvline(0, color=STYLES[against.method][0], linewidth=1, alpha=0.6)
        axes.set_title(label)
        axes.set_xlabel(f"less {NAMES[against.method]}'s {start.mean:.2f}")
        axes.grid(axis="y", alpha=0.15)
    grid[0].set_yticks(range(len(rows)), [name for name, _ in rows])
    grid[0].set_ylim(len(rows) - 0.5, -0.5)
    return _finish(figure, title)


def parts(results: Results) -> Figure:
    """Draws which parts of SIPO do the work."""
    sipo = Cell()
    rows = [("Diffusion-DPO", sipo.like(method="diffusion_dpo")), ("SIPO", sipo)]
    rows += [(part, sipo.like(variant=part)) for part in PARTS if part != "ratio to the reference"]
    rows += [("DPO-C&M", sipo.like(method="dpo_cm")), ("SDPO", sipo.like(method="sdpo"))]
    return _comparison(
        results, rows, sipo, "Parts of SIPO: digits, ink, β = 1000; differences seed by seed with their 95 % interval"
    )


def relatives(results: Results) -> Figure:
    """Draws the relatives beside the methods."""
    dpo = Cell(method="diffusion_dpo")
    rows = [(NAMES[method], dpo.like(method=method)) for method in METHODS]
    rows += [(name, dpo.like(variant=name)) for name in RELATIVES]
    return _comparison(
        results, rows, dpo, "Relatives, on Diffusion-DPO: digits, ink, β = 1000; differences seed by seed"
    )


def conditions(results: Results) -> Figure:
    """Draws wrong labels, fewer pairs, longer training."""
    panels: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = [
        ("Wrong labels", [("0", {}), ("10 %", {"noise": 0.1}), ("30 %", {"noise": 0.3})]),
        ("Pairs", [("400", {"fraction": 0.1}), ("2,000", {"fraction": 0.5}), ("4,000", {})]),
        ("Steps", [("300", {}), (f"{300 * LONG:,}", {"length": LONG})]),
    ]
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")
    drawn = 0
    for column, (title, settings) in enumerate(panels):
        for row, (what, label) in enumerate(((reward, "true reward"), (distance, "distance to the data"))):
            for method in METHODS:
                cells = [(name, Cell(method=method, **changes)) for name, changes in settings]
                cells = [(name, cell) for name, cell in cells if results.has(cell)]
                if len(cells) > 1:
                    _over(grid[row, column], results, [c for _, c in cells], range(len(cells)), what, method)
                    grid[row, column].set_xticks(range(len(cells)), [name for name, _ in cells])
                    drawn += 1
            grid[row, column].set_ylabel(label)
        grid[0, column].set_title(title)
    if not drawn:
        raise MissingCellsError("no cells with wrong labels, fewer pairs or more steps")
    return _finish(figure, "Wrong labels, fewer pairs, longer training: digits and ink, β = 1000", grid[0, 0])


def transfer(results: Results) -> Figure:
    """Draws what the implicit reward knows: accuracy on held-out pairs of each source, by each reward."""
    rows = [Cell(method=m, source=s, reward=r) for s in ("data", "base") for r in ("ink", "slant") for m in METHODS]
    rows = [cell for cell in rows if results.has(cell)]
    columns = [(source, name) for source in ("data", "base") for name in ("ink", "slant")]
    runs = [results.of(cell) for cell in rows]
    values = np.array([[estimate([r["accuracy"][s][n] for r in each]).mean for s, n in columns] for each in runs])
    figure, axes = plt.subplots(figsize=(7.6, 1.7 + 0.34 * len(rows)), layout="constrained")
    axes.imshow(values, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        color = "white" if abs(value - 0.5) > 0.3 else "black"
        axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=color)
    source = {"data": "real", "base": "base samples"}
    axes.set_xticks(range(len(columns)), [f"{source[s]}, by {name}" for s, name in columns], fontsize=8)
    labels = [f"{NAMES[c.method]}, {c.reward} of {source[c.source]}" for c in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    return _finish(figure, "Held-out pairs that the implicit reward ranks right, β = 1000")


FIGURES: dict[str, Draw] = {
    "beta": beta,
    "frontier": frontier,
    "gradient": gradient,
    "training": training,
    "weights": weights,
    "parts": parts,
    "relatives": relatives,
    "conditions": conditions,
    "transfer": transfer,
}
