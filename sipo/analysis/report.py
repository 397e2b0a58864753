"""Builds the report of a run, a page with a verdict, from the run's folder: ``sipo analyze RUN``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sipo.analysis import figures
from sipo.analysis.facts import TAIL, is_plain
from sipo.analysis.figures import nan_if_none
from sipo.analysis.findings import Finding
from sipo.analysis.page import BEGIN, Page, Picture
from sipo.analysis.samples import sample_pictures
from sipo.analysis.settings import in_force, loss_numbers, read_settings
from sipo.analysis.verdicts import judge
from sipo.files import check_output, write_aside
from sipo.training.log_reader import metric_values, metrics_fault, read_log
from sipo.training.statistics import MEANS, merge, over_bins, read_statistics
from sipo.training.validation import no_preference

REPORT = "report.html"
PAGE = (re.escape(BEGIN), "a page of `sipo analyze`")  # how it begins, and what it is

Line = dict[str, Any]
_LEAST_PAIRS = 12  # of a bin on average; wider bins where there are fewer
_BINS = (50, 25, 10, 5)


@dataclass(frozen=True)
class RunLog:
    """What the folder of a run says of it.

    Attributes:
        folder: the run's.
        lines, validation: of ``metrics.jsonl``.
        statistics: lines of ``timesteps.jsonl``; none where there is no such file.
        settings: flat, from ``config.yaml`` or the demo's ``summary.json``.
        beta: the loss's, if known.
        threshold: of the mask, if known; 0 for a method without one.
        pairs_per_step: of all processes; ``None`` if unknown.
    """

    folder: Path
    lines: list[Line]
    validation: list[Line]
    statistics: list[Line]
    settings: dict[str, Any]
    beta: float | None
    threshold: float | None
    pairs_per_step: int | None

    @property
    def weighted(self) -> bool:
        """Whether the loss of a pair has a weight."""
        return self.settings.get("loss.method", self.settings.get("method")) == "dpo_cm"

    def level(self) -> tuple[float, str]:
        """Loss of a pair without preference, and what it is."""
        loss_type = self.settings.get("loss.loss_type") or "sigmoid"
        value = no_preference(loss_type, self.settings.get("loss.label_smoothing") or 0.0)
        name = "ln 2" if loss_type == "sigmoid" else f"{value:.3g}"
        return value, f"{name}: no preference" + (", weights of 1" if self.weighted else "")

    def findings(self) -> list[Finding]:
        """Returns the verdict, headline first."""
        return judge(
            self.lines,
            self.validation,
            pairs_per_step=self.pairs_per_step or 1,
            beta=self.beta,
            plain=is_plain(self.settings.get("loss.loss_type"), self.settings.get("loss.label_smoothing"))
            and not (self.weighted and self.settings.get("loss.ratio") == "reference"),  # weights above 1, too
            weighted=self.weighted,
        )


def report_run(folder: Path, output: Path | None = None) -> tuple[Path, list[Finding]]:
    """Writes the report of a run.

    Args:
        folder: of the run.
        output: the page; ``report.html`` in the folder if left out.

    Returns:
        The page, and the verdict.

    Raises:
        OSError: a file that cannot be read or written.
        ValueError: a folder without a log, or a damaged one.
    """
    run = read_run(folder)
    findings = run.findings()
    output = folder / REPORT if output is None else output
    check_output(output, *PAGE)
    write_aside(output, run_page(run, findings).html())
    return output, findings


# ---- Reading ----


def read_run(folder: Path) -> RunLog:
    """Reads the files of a run that exist; see :func:`report_run`."""
    lines, validation = _read_metrics(folder / "metrics.jsonl")
    path = folder / "timesteps.jsonl"
    statistics = read_statistics(path) if path.exists() else []
    settings = read_settings(folder)
    beta, threshold = loss_numbers(settings)
    return RunLog(folder, lines, validation, statistics, settings, beta, threshold, _per_step(statistics, settings))


def _per_step(statistics: Sequence[Line], settings: dict[str, Any]) -> int | None:
    """Returns the pairs in one optimiser step of all processes, or of one process if there are no statistics."""
    if statistics:
        first, last = statistics[0], statistics[-1]
        pairs, steps = first["pairs"], first["step"]
        if last["step"] > steps:  # then without the first line, as a run may have had none for a while
            pairs, steps = sum(line["pairs"] for line in statistics[1:]), last["step"] - steps
        return max(1, round(pairs / steps))
    names = ("training.train_batch_size", "training.gradient_accumulation_steps", "batch_size")
    sizes = [int(settings[name]) for name in names if name in settings]
    return math.prod(sizes) if sizes else None


def _read_metrics(path: Path) -> tuple[list[Line], list[Line]]:
    if not path.exists():
        raise ValueError(f"{path.parent}: no metrics.jsonl, expected the folder of a run")
    log = read_log(path, metrics_fault)
    log.warn(path)
    training, validation = (
        [line for line in log.lines if line.get("kind", "training") == kind] for kind in ("training", "validation")
    )
    if not training:
        raise ValueError(f"{path}: 0 log lines of training, expected at least one")
    return training, validation


# ---- The page ----


def run_page(run: RunLog, findings: Sequence[Finding]) -> Page:
    """Builds the page of a run."""
    steps = run.lines[-1]["step"]
    if run.pairs_per_step is None:
        about = f"{steps:,} steps; pairs per step are not known, so standard errors are too large"
    else:
        about = f"{steps:,} steps, about {run.pairs_per_step * steps:,} pairs"
    if seconds := _seconds(run.lines):
        about += f"; {seconds:,.0f} s of training" if seconds < 7200 else f"; {seconds / 3600:,.1f} h of training"
    sections: list[tuple[str, str, Sequence[Picture]]] = [("Over the run", "", _curves(run))]
    if run.statistics:
        head, tail = ends(run.statistics)
        early = "step 1" if head["step"] == 1 else f"steps 1 to {head['step']}"
        remark = (
            f"Early is {early} ({head['pairs']:,} pairs), late the last fifth of the run "
            f"({tail['pairs']:,} pairs). Means over bins of noise level, from timesteps.jsonl."
        )
        sections.append(("By noise level", remark, _by_level(run, head, tail)))
    else:
        remark = (
            "This run has no timesteps.jsonl (training.timestep_statistics was off), so there is nothing to show by "
            "noise level."
        )
        sections.append(("By noise level", remark, ()))
    remark, samples = sample_pictures(run.folder, run.settings)
    if samples:
        sections.append(("Samples", remark, samples))
    name = "/".join(run.folder.resolve().parts[-2:])  # the last part alone is often "run"
    return Page(f"Report: {name}", about, findings, sections, in_force(run.settings))


def _seconds(lines: Sequence[Line]) -> float:
    """Returns the seconds of training, including those before each resume, where the clock of a line restarts."""
    clock = [second for second in metric_values(lines, "seconds") if not math.isnan(second)]
    return sum(now for now, after in pairwise([*clock, 0.0]) if after < now)


def ends(statistics: Sequence[Line]) -> tuple[Line, Line]:
    """Merges the first and the last fifth of a run into one line each, with bins wide enough for its pairs."""
    last = statistics[-1]["step"]
    head = [line for line in statistics if line["step"] <= last / TAIL] or statistics[:1]
    tail = [line for line in statistics if line["step"] > last - last / TAIL]
    first, final = merge(head), merge(tail)
    fewest = min(first["pairs"], final["pairs"])
    fits = [n for n in _BINS if first["bins"] % n == 0 and fewest >= _LEAST_PAIRS * n]
    bins = fits[0] if fits else min((n for n in _BINS if first["bins"] % n == 0), default=first["bins"])
    return regroup(first, bins), regroup(final, bins)


def regroup(line: Line, bins: int) -> Line:
    """Merges the bins of a line into fewer bins."""
    width = line["bins"] // bins
    ranges = [range(i * width, (i + 1) * width) for i in range(bins)]
    wide = line | {"bins": bins}
    for name in ("count", "nonfinite"):
        wide[name] = [sum(line[name][i] for i in r) for r in ranges]
    for name in MEANS:
        means = [over_bins(line, name, r) for r in ranges]
        wide[name] = [None if math.isnan(value) else value for value in means]
    return wide


def _curves(run: RunLog) -> list[Picture]:
    lines = run.lines
    steps = metric_values(lines, "step")

    def held_out(name: str) -> tuple[list[float], list[float], str] | None:
        values = metric_values(run.validation, f"validation/{name}")
        return None if all(map(math.isnan, values)) else (metric_values(run.validation, "step"), values, "held out")

    def get(name: str) -> list[float]:
        return metric_values(lines, name)

    def curve(title: str, named: dict[str, list[float]], label: str, caption: str, **options: Any) -> Picture:
        return Picture(title, figures.curves(steps, named, label, **options), caption)

    loss, ref = get("loss"), get("ref_mse")
    rewards = {name: get(f"rewards/{name}") for name in ("chosen", "rejected")} | {"margin": get("rewards/margins")}
    if all(map(math.isnan, rewards["chosen"])):  # of a loss that reports the margin alone
        rewards = {"": rewards["margin"]}
    wide = any(value > 5 for value in loss)  # a β far too high
    relative = {
        name: [gap / r if r else math.nan for gap, r in zip(get(f"{name}_gap"), ref, strict=True)]
        for name in ("chosen", "rejected")
    }
    return [
        curve(
            "Loss", {"training": loss}, "loss (nats per pair)",
            "Healthy: starts at the line times the share of active pairs and falls slowly; it falls as well when the "
            "mask drops pairs, which is not learning.",
            level=run.level(), points=held_out("loss"), log=wide, zero=not wide,
        ),
        curve(
            "Pairs ranked right, and pairs that take part",
            {"reward accuracy": get("rewards/accuracies"), "active": get("active_fraction")}, "share of pairs",
            "Healthy: accuracy leaves one half quickly and then climbs slowly, held-out pairs follow, and the active "
            "share stays where it was.",
            level=(0.5, "chance"), points=held_out("rewards/accuracies"), percent=True,
        ),
        curve(
            "Errors of chosen and rejected samples", relative, "gap / reference's error",
            "Healthy: chosen samples at or below 0, rejected samples above; both rising together means getting "
            "worse at everything.",
            level=(0.0, "as the reference"),
        ),
        curve(
            "Rewards", rewards, "reward margin" if "" in rewards else "reward",
            "Healthy: the margin, chosen less rejected, is positive and grows slowly to a few units; hundreds mean a "
            "beta that is too high. A falling chosen reward means getting worse at chosen samples.",
            points=held_out("rewards/margins"),
        ),
        curve(
            "Errors of policy and reference", {"policy": get("model_mse"), "reference": ref}, "mean squared error",
            "Healthy: the two stay together; a policy that leaves the reference behind is leaving the data.",
            zero=True,
        ),
        curve(
            "Gradient norm", {"": get("grad_norm")}, "norm before clipping",
            "Healthy: falls as pairs are satisfied; the band, one standard deviation of single steps, is no wider than "
            "the mean.",
            spread=get("grad_norm_std"), zero=True,
        ),
    ]  # fmt: skip


def _by_level(run: RunLog, head: Line, tail: Line) -> list[Picture]:
    def both(name: str) -> dict[str, Sequence[float | None]]:
        return {"early": head[name], "late": tail[name]}

    def error(key: str) -> list[float]:
        samples = zip(nan_if_none(tail[f"{key}_error_chosen"]), nan_if_none(tail[f"{key}_error_rejected"]), strict=True)
        return [(chosen + rejected) / 2 for chosen, rejected in samples]

    gaps = {"chosen": tail["chosen_gap"], "rejected": tail["rejected_gap"]}
    errors = {"policy": error("model"), "reference": error("ref")}
    return [
        *mask_pictures(
            tail, both("ratio"), both("active"), run.threshold,
            "Healthy: low at the clean end, near 1 over the rest, and late about where it was early.",
            "Healthy: only the cleanest levels are dropped, late as early; a late curve far below is drift.",
        ),
        gradient_coefficient(tail, "late"),
        gradient_share(tail),
        Picture(
            "Errors of chosen and rejected samples, late",
            figures.by_level(tail, gaps, "error less the reference's", origin=True),
            "Healthy: rejected samples above chosen samples at every level, chosen samples near 0.",
        ),
        Picture(
            "Errors of policy and reference, late",
            figures.by_level(tail, errors, "mean squared error", log=True),
            "Healthy: two curves that nearly coincide; where they part, the policy predicts worse than it did.",
        ),
    ]  # fmt: skip


def mask_pictures(
    line: Line, ratio: figures.Curves, active: figures.Curves, threshold: float | None, *captions: str
) -> list[Picture]:
    """Draws the importance ratio by noise level with the mask's threshold, and the share of pairs kept."""
    mask = (threshold, f"mask: pairs below {threshold:g} are left out") if threshold else None
    drawn = (
        figures.by_level(line, ratio, "mean ratio, not clipped", level=mask, zero=True),
        figures.by_level(line, active, "share of pairs", percent=True),
    )
    titles = ("Importance ratio", "Pairs that the mask lets through")
    return [Picture(*picture) for picture in zip(titles, drawn, captions, strict=True)]


def gradient_coefficient(line: Line, when: str) -> Picture:
    """Draws the mean of the gradient's coefficient by noise level, and its spread."""
    mean, square = nan_if_none(line["coef"]), nan_if_none(line["coef_sq"])
    spread = [math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, square, strict=True)]
    return Picture(
        f"Gradient's coefficient, {when}",
        figures.by_level(line, {"": mean}, "coefficient of the chosen sample", spread=spread, zero=True),
        "Healthy: about ½ at the start, falling as pairs are satisfied, and not 0 where there is something to learn; "
        "the band is one standard deviation over pairs.",
    )


def gradient_share(line: Line, weights: Sequence[float] | None = None) -> Picture:
    """Draws how much each noise level contributes to the gradient, and how often it is drawn.

    Args:
        line: the statistics.
        weights: how often each bin is drawn; the line's counts if left out.
    """
    counts = line["count"] if weights is None else weights
    drawn = [c / (sum(counts) or 1) for c in counts]
    squares = [
        d * g if d and not math.isnan(g) else 0.0 for d, g in zip(drawn, nan_if_none(line["grad_sq"]), strict=True)
    ]
    total = sum(squares) or 1.0
    named = {"of the squared gradient": [s / total for s in squares], "of the pairs": drawn}
    return Picture(
        "Where the gradient comes from",
        figures.shares(line, named, "share"),
        "Healthy: spread over many levels; a few bars that hold nearly all of it mean that the rest teaches little.",
    )
