"""The demo's picture: samples before and after, the two scores, the training curves and the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sipo.demo.digits import CLASSES, IMAGE_SIZE, ink
from sipo.demo.measure import SampleScores
from sipo.files import aside
from sipo.training.log_reader import metric_values

BEFORE, AFTER, LIMIT, TEXT = "#8d939c", "#1f5fa8", "#b8501a", "#22262b"
_ROWS = 7
NAMES = {"sipo": "SIPO", "sdpo": "SDPO", "dpo_cm": "DPO-C&M", "diffusion_dpo": "Diffusion-DPO"}
# Behind text that a curve may cross.
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
_STYLE: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.edgecolor": BEFORE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "lines.linewidth": 1.8,
}


class ImportanceWeights(NamedTuple):
    """Mean importance weight at each of some timesteps, of the base model and of the aligned one."""

    timesteps: Sequence[int]
    base: Sequence[float]
    aligned: Sequence[float]


class DemoResult(NamedTuple):
    """Everything the picture shows; ``classes`` ``[N]`` repeat 0 to 9, samples are ``[N, 1, 8, 8]``."""

    method: str
    beta: float
    steps: int
    threshold: float | None
    classes: Tensor
    before: Tensor
    after: Tensor
    before_scores: SampleScores
    after_scores: SampleScores
    judge_accuracy: float
    history: list[dict[str, Any]]
    weights: ImportanceWeights


def draw_picture(path: Path, result: DemoResult) -> None:
    """Draws everything into one PNG, written aside and renamed."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.0, 8.8), dpi=130, facecolor="white")
        _title(figure, result)
        grids = figure.add_gridspec(1, 2, left=0.035, right=0.665, top=0.835, bottom=0.47, wspace=0.08)
        _grid(figure.add_subplot(grids[0]), result.before, "Before: base model")
        _grid(figure.add_subplot(grids[1]), result.after, "After alignment, from the same noise")
        scores = figure.add_gridspec(
            2, 1, left=0.745, right=0.975, top=0.835, bottom=0.485, height_ratios=[2.1, 1], hspace=0.95
        )
        _ink(figure.add_subplot(scores[0]), result)
        _agreement(figure.add_subplot(scores[1]), result)
        bottom = figure.add_gridspec(1, 3, left=0.06, right=0.975, top=0.355, bottom=0.075, wspace=0.26)
        _loss(figure.add_subplot(bottom[0]), result)
        _fractions(figure.add_subplot(bottom[1]), result)
        _weights(figure.add_subplot(bottom[2]), result)
        with aside(path) as place:
            figure.savefig(place, format="png", metadata={"Software": None})


def _signed(value: float) -> str:
    """Formats two decimals with a sign, and a minus as wide as the plus."""
    return f"{value:+.2f}".replace("-", "−")


def _title(figure: Figure, result: DemoResult) -> None:
    before, after = result.before_scores, result.after_scores
    figure.text(
        0.035,
        0.945,
        f"Aligned to prefer ink: mean ink {_signed(before.ink)} → {_signed(after.ink)}, "
        f"{after.agreement:.0%} still read as the digit asked for",
        fontsize=16,
        fontweight="bold",
    )
    figure.text(
        0.035,
        0.907,
        f"{NAMES.get(result.method, result.method)}, β = {result.beta:g}, {result.steps} steps on pairs of real 8×8 "
        f"scans: of two scans of one digit, the one with more ink is chosen. Scores are over {len(result.classes)} "
        "samples.",
        fontsize=11.5,
    )


def _grid(axes: Axes, images: Tensor, title: str) -> None:
    """Arranges the digits 0 to 9 in rows, dark ink on light paper, with one pixel between samples."""
    rows = min(_ROWS, len(images) // CLASSES)
    cell = IMAGE_SIZE + 1
    sheet = np.full((rows * cell + 1, CLASSES * cell + 1), np.nan)
    for i in range(rows * CLASSES):
        y, x = divmod(i, CLASSES)
        sheet[y * cell + 1 : (y + 1) * cell, x * cell + 1 : (x + 1) * cell] = images[i, 0].numpy()
    axes.imshow(sheet, cmap="gray_r", vmin=-1.0, vmax=1.0, interpolation="nearest")
    axes.set_anchor("N")
    axes.set_title(title)
    axes.set_xticks([x * cell + cell / 2 for x in range(CLASSES)], [str(x) for x in range(CLASSES)])
    axes.set_yticks([])
    axes.set_xlabel("digit asked for")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _ink(axes: Axes, result: DemoResult) -> None:
    values = [ink(images).numpy() for images in (result.before, result.after)]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    bins = np.linspace(low, high, 36)
    scores = (result.before_scores, result.after_scores)
    tallest = max(np.histogram(value, bins)[0].max() for value in values)
    # Labels sit over their own histograms; means too close for that share one line of text, left and right.
    apart = abs(scores[1].ink - scores[0].ink) > 0.3 * (high - low)
    sides = ("center", "center") if apart else ("right", "left")
    if not apart and scores[0].ink > scores[1].ink:
        sides = ("left", "right")
    for value, colour, name, score, side in zip(
        values, (BEFORE, AFTER), ("before", "after"), scores, sides, strict=True
    ):
        axes.hist(value, bins=bins.tolist(), color=colour, alpha=0.6)
        axes.plot([score.ink, score.ink], [0, tallest * 1.06], color=colour, linewidth=1.4)
        label = f" {name} {_signed(score.ink)} "
        axes.text(score.ink, tallest * 1.1, label, color=colour, ha=side, va="bottom", fontweight="bold")
    margin = 0.14 * (high - low)  # room for a label beside its line
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(0, tallest * 1.32)
    axes.set_title("Reward: ink of each sample")
    axes.set_xlabel("mean pixel (−1 blank, +1 solid ink)")
    axes.set_ylabel("samples")


def _agreement(axes: Axes, result: DemoResult) -> None:
    values = [result.after_scores.agreement, result.before_scores.agreement]
    bars = axes.barh(["after", "before"], values, color=[AFTER, BEFORE], height=0.62)
    axes.bar_label(bars, labels=[f"{v:.1%}" for v in values], padding=4)
    axes.set_xlim(0, 1.2)
    axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.tick_params(axis="y", length=0)
    axes.set_title("Read as the digit asked for")
    axes.set_xlabel(f"judge: {result.judge_accuracy:.1%} right on held-out scans")


def _loss(axes: Axes, result: DemoResult) -> None:
    steps = metric_values(result.history, "step")
    axes.plot(steps, metric_values(result.history, "loss"), color=AFTER)
    axes.axhline(np.log(2), color=BEFORE, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.text(steps[-1], np.log(2), "ln 2: no preference yet", ha="right", va="bottom", fontsize=9.5, bbox=_PAPER)
    axes.set_ylim(0, max(0.78, np.nanmax(metric_values(result.history, "loss")) * 1.1))
    axes.set_title("Training loss")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per pair)")


def _fractions(axes: Axes, result: DemoResult) -> None:
    steps = metric_values(result.history, "step")
    axes.plot(steps, metric_values(result.history, "rewards/accuracies"), color=AFTER, label="reward accuracy")
    axes.plot(steps, metric_values(result.history, "active_fraction"), color=LIMIT, label="active pairs")
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_title("Pairs ranked right, and pairs that train")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("share of pairs")
    axes.legend(frameon=False, loc="lower right")


def _weights(axes: Axes, result: DemoResult) -> None:
    weights = result.weights
    axes.plot(weights.timesteps, weights.base, color=BEFORE, linewidth=3.4, label="base model")
    axes.plot(weights.timesteps, weights.aligned, color=AFTER, label="aligned model")
    axes.set_xscale("log")
    ticks = [t for t in (20, 50, 100, 200, 500, 1000) if t <= max(weights.timesteps) * 1.05]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    if result.threshold is not None:
        axes.axhline(result.threshold, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 3)))
        label = f"{result.threshold:g}: pairs below are left out"
        axes.text(
            max(weights.timesteps), result.threshold - 0.02, label, ha="right", va="top", color=LIMIT, fontsize=9.5
        )
    axes.set_ylim(0, 1.05)
    axes.set_title("Mean importance weight by noise level")
    axes.set_xlabel("timestep t, log scale (0 clean, 1000 noise)")
    axes.set_ylabel("mean weight w(t), unclipped")
    axes.legend(frameon=False, loc="lower right")
