"""Figures of a report, as SVG to be put into a page: text in the page's own font, colours that follow its theme.

Every function takes plain lists and returns a figure's SVG; what healthy looks like is said beside them, in report.py.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Stand-ins that become the page's own colours, so that light and dark both read well.
_INK, _GRID = "#010203", "#040506"
# Okabe and Ito's blue, vermilion and green, told apart by the colour-blind, and legible on white and on black.
MAIN, OTHER, THIRD = "#2f7fc1", "#d9692a", "#1f9e77"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sipo",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_SIZE = (5.4, 2.9)  # inches

Curves = Mapping[str, Sequence[float | None]]


def draw(paint: Callable[[Any], None]) -> str:
    """Returns an SVG of what ``paint`` draws on matplotlib's axes; the same ``paint`` gives the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            # Above the axes, where no curve can cross it.
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), borderaxespad=0, columnspacing=1.4)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """Strips an SVG for a page: no file header, no size in points, no names that other figures also have."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    for name in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {name}="[^"]*"', r"\1", svg, count=1)
    # Fonts are the page's.
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    return svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)")


# ---- Over steps ----


def curves(
    steps: Sequence[float],
    named: Mapping[str, Sequence[float]],
    label: str,
    *,
    level: tuple[float, str] | None = None,
    spread: Sequence[float] | None = None,
    points: tuple[Sequence[float], Sequence[float], str] | None = None,
    percent: bool = False,
    log: bool = False,
    zero: bool = False,
) -> str:
    """Draws curves over optimiser steps.

    Args:
        steps: of the lines.
        named: name and values of each curve, NaN where there is none; none has one without a name.
        label: of the vertical axis.
        level: height and name of a horizontal line that they are to be read against.
        spread: standard deviation around the first curve.
        points: steps, values and name of what was measured now and then.
        percent: whether values are shares from 0 to 1.
        log: whether the vertical axis is logarithmic.
        zero: whether it starts at 0.
    """

    from matplotlib.ticker import MaxNLocator

    def paint(axes: Any) -> None:
        for (name, values), color in zip(named.items(), (MAIN, OTHER, THIRD), strict=False):
            mark = {"marker": "o", "markersize": 4} if len(steps) < 3 else {}
            axes.plot(steps, values, color=color, label=name or "_", **mark)
        if spread is not None:
            _shade(axes, steps, next(iter(named.values())), spread)
        if points is not None:
            axes.plot(points[0], points[1], "D", color=THIRD, markersize=5, label=points[2])
        _heights(axes, level, percent=percent, log=log, zero=zero)
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)

    return draw(paint)


def _shade(axes: Any, places: Sequence[float], means: Sequence[float], spread: Sequence[float]) -> None:
    low = [max(a - s, 0.0) for a, s in zip(means, spread, strict=True)]
    high = [a + s for a, s in zip(means, spread, strict=True)]
    axes.fill_between(places, low, high, color=MAIN, alpha=0.2, linewidth=0)


def _heights(axes: Any, level: tuple[float, str] | None, *, percent: bool, log: bool, zero: bool) -> None:
    """Sets up the vertical axis once everything is drawn, and labels the reference level."""
    # Where nothing is above 0, which includes a run of NaN, matplotlib refuses a logarithmic axis.
    heights = [y for line in axes.get_lines() for y in line.get_ydata() if y > 0]
    if log and heights and max(heights) > 10 * min(heights):  # over less, a linear axis has plainer labels
        _logarithmic(axes, max(heights) / min(heights))
    elif percent:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    elif zero:
        axes.set_ylim(bottom=0, top=None if level is None else max(axes.get_ylim()[1], 1.15 * level[0]))
    if not percent:
        _plain_labels(axes)
    if level is not None:
        axes.axhline(level[0], color=_INK, linewidth=1, linestyle=(0, (4, 3)), label=level[1])


def _logarithmic(axes: Any, ratio: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 1000 else (1,)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_labels(axes: Any) -> None:
    """Labels of the vertical axis are numbers as they are written, with no factor or offset beside the axis."""
    low, high = axes.get_ylim()
    largest = max(abs(low), abs(high))
    if axes.get_yscale() == "log" or not 1e-4 <= largest < 1e6:
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
    else:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)


def number(value: float) -> str:
    """Formats a number for an axis: ``0.0025``, ``1,000,000``, ``2.5·10⁻⁷``."""
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if float(mantissa) == 1 else f"{float(mantissa):g}·10{raised}"


# ---- By noise level ----


def by_level(
    line: dict[str, Any],
    named: Curves,
    label: str,
    *,
    level: tuple[float, str] | None = None,
    spread: Sequence[float] | None = None,
    percent: bool = False,
    log: bool = False,
    zero: bool = False,
    origin: bool = False,
) -> str:
    """Draws curves over noise levels, from lines of :mod:`sipo.training.statistics`.

    Args:
        line: says what noise levels there are.
        named: name of each curve, and its values by bin, NaN or ``None`` where there is none.
        label: of the vertical axis.
        level, spread, percent, log, zero: as for :func:`curves`.
        origin: whether to draw a line at 0.
    """

    def paint(axes: Any) -> None:
        for (name, values), color in zip(named.items(), (MAIN, OTHER), strict=False):
            axes.plot(centers(line), nan_if_none(values), color=color, marker="o", markersize=3, label=name or "_")
            if spread is not None and color == MAIN:
                _shade(axes, centers(line), nan_if_none(values), spread)
        _levels(axes, line)
        if origin:
            axes.axhline(0, color=_INK, linewidth=0.8)
        _heights(axes, level, percent=percent, log=log, zero=zero)
        axes.set_ylabel(label)

    return draw(paint)


def shares(line: dict[str, Any], named: Mapping[str, Sequence[float]], label: str) -> str:
    """Draws two shares by noise level as overlapping bars."""

    def paint(axes: Any) -> None:
        width = line["levels"] / line["bins"]
        for (name, values), color, wide in zip(named.items(), (MAIN, OTHER), (0.92, 0.4), strict=False):
            axes.bar(centers(line), values, width=wide * width, color=color, label=name, linewidth=0)
        _levels(axes, line)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(label)

    return draw(paint)


def centers(line: dict[str, Any]) -> list[float]:
    """Returns the middle of each bin in the schedule's own levels: timesteps, or σ."""
    return [(i + 0.5) * line["levels"] / line["bins"] for i in range(line["bins"])]


def _levels(axes: Any, line: dict[str, Any]) -> None:
    top = line["levels"]
    axes.set_xlim(-0.02 * top, 1.02 * top)
    discrete = line["kind"] == "discrete"
    axes.set_xlabel(f"timestep t (0 clean, {top} noise)" if discrete else "σ (0 clean, 1 noise)")


def nan_if_none(values: Sequence[float | None]) -> list[float]:
    """Returns NaN for ``None``."""
    return [math.nan if value is None else float(value) for value in values]
