"""``sipo analyze RUN``: the folder of a run to a page with a verdict."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sipo.analysis import figures
from sipo.analysis.facts import TAIL, is_plain
from sipo.analysis.figures import finite
from sipo.analysis.page import Page, Picture, image, looks, video
from sipo.analysis.verdicts import Finding, judge
from sipo.diagnostics import MEANS, merge, over_bins, read_statistics
from sipo.files import FileError, parse_json, read_bytes, read_object, read_text, write_aside
from sipo.run_log import LogWarning, is_number, metrics_fault, read_log, show
from sipo.training.logs import check_output, pluck
from sipo.training.validation import no_preference
from sipo.yaml_files import read_yaml

REPORT = "report.html"
PAGE = ("<!doctype html>", "a page of `sipo analyze`")  # how it begins, and what it is

Line = dict[str, Any]
_LEAST_PAIRS = 12  # of a bin on average; wider bins where there are fewer
_BINS = (50, 25, 10, 5)
_WHOLE = -1  # in place of a prompt's number
# Settings that are reckoned with.
_NUMBERS = (
    *("loss.beta", "loss.mask_threshold", "loss.label_smoothing", "beta"),
    *("training.batch_size", "training.accumulation", "batch_size"),
)
_NAMES = ("model.family", "loss.method", "loss.link", "loss.ratio", "method")


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
        link = self.settings.get("loss.link") or "sigmoid"
        value = no_preference(link, self.settings.get("loss.label_smoothing") or 0.0)
        name = "ln 2" if link == "sigmoid" else f"{value:.3g}"
        return value, f"{name}: no preference" + (", weights of 1" if self.weighted else "")

    def findings(self) -> list[Finding]:
        """The verdict, the headline first."""
        return judge(
            self.lines,
            self.validation,
            pairs_per_step=self.pairs_per_step or 1,
            beta=self.beta,
            plain=is_plain(self.settings.get("loss.link"), self.settings.get("loss.label_smoothing"))
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
    """Reads what there is; see :func:`report_run`."""
    lines, validation = _read_metrics(folder / "metrics.jsonl")
    path = folder / "timesteps.jsonl"
    statistics = read_statistics(path) if path.exists() else []
    settings = _settings(folder)
    beta, threshold = _loss(settings)
    return RunLog(folder, lines, validation, statistics, settings, beta, threshold, _per_step(statistics, settings))


def _per_step(statistics: Sequence[Line], settings: dict[str, Any]) -> int | None:
    """Pairs of an optimiser step of all processes, or of one process where there are no statistics to say it."""
    if statistics:
        first, last = statistics[0], statistics[-1]
        pairs, steps = first["pairs"], first["step"]
        if last["step"] > steps:  # then without the first line, as a run may have had none for a while
            pairs, steps = sum(line["pairs"] for line in statistics[1:]), last["step"] - steps
        return max(1, round(pairs / steps))
    sizes = [settings[n] for n in ("training.batch_size", "training.accumulation", "batch_size") if n in settings]
    return math.prod(map(int, sizes)) if sizes else None


def _read_metrics(path: Path) -> tuple[list[Line], list[Line]]:
    if not path.exists():
        raise ValueError(f"{path.parent}: no metrics.jsonl, expected the folder of a run")
    log = read_log(path, metrics_fault)
    log.complain(path)
    kinds = [line.get("kind", "training") for line in log.lines]
    training, validation = (
        [line for line, own in zip(log.lines, kinds, strict=True) if own == kind] for kind in ("training", "validation")
    )
    if not training:
        raise ValueError(f"{path}: 0 log lines of training, expected at least one")
    return training, validation


def _settings(folder: Path) -> dict[str, Any]:
    """Flat settings of a run of ``sipo train``, or of the demo."""
    config, summary = folder / "config.yaml", folder / "summary.json"
    tree: Any = {}
    path = config if config.exists() else summary
    if config.exists():
        tree = read_yaml(config)
    elif summary.exists():
        tree = read_object(summary)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds {type(tree).__name__}, expected the run's settings")
    found = flat(tree)
    if path == summary:
        found = {name: value for name, value in found.items() if not isinstance(value, list)}
    for name in _NUMBERS:
        if found.get(name) is not None and not is_number(found[name]):
            raise ValueError(f"{path}: {name}={show(found[name])}, expected a number")
    for name in _NAMES:
        if not isinstance(found.get(name, ""), str):
            raise ValueError(f"{path}: {name}={show(found[name])}, expected a name")
    return found


def flat(tree: dict[str, Any], place: str = "") -> dict[str, Any]:
    """A tree of settings as ``section.key``."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{place}{name}.") if isinstance(value, dict) else {f"{place}{name}": value}
    return found


def in_force(settings: dict[str, Any]) -> dict[str, Any]:
    """Flat settings with the numbers that a default stands for."""
    from sipo.families import get
    from sipo.schedule import DEFAULT_INFERENCE_STEPS

    if "loss.method" not in settings or "model.family" not in settings:
        return settings
    numbers = {
        "model.lora.alpha": settings.get("model.lora.rank"),
        "loss.beta": _loss(settings)[0],
        "loss.num_inference_steps": DEFAULT_INFERENCE_STEPS,
        "samples.guidance": get(settings["model.family"]).guidance,
    }
    unset = {name: value for name, value in numbers.items() if name in settings and settings[name] is None}
    return settings | {name: f"{value:g} (default)" for name, value in unset.items() if is_number(value)}


def _loss(settings: dict[str, Any]) -> tuple[float | None, float | None]:
    """β and the mask's threshold, where the settings say them or say what their defaults hang on."""
    from sipo.families import get
    from sipo.loss import SIPOLoss
    from sipo.schedule import NoiseSchedule

    method = settings.get("loss.method", settings.get("method"))
    if method is None:
        return None, None
    loss_fn = SIPOLoss(NoiseSchedule.discrete(), method=method)
    beta = settings.get("loss.beta", settings.get("beta"))
    if beta is None and "model.family" in settings:
        beta = loss_fn.default_beta(5 if get(settings["model.family"]).video else 4)
    threshold = settings.get("loss.mask_threshold", loss_fn.mask_threshold)
    return beta, 0.0 if method == "diffusion_dpo" else threshold


# ---- The page ----


def run_page(run: RunLog, findings: Sequence[Finding]) -> Page:
    """The page of a run."""
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
            "This run has no timesteps.jsonl (it was made before there was one, or with training.timestep_statistics "
            "off), so that nothing can be said by noise level."
        )
        sections.append(("By noise level", remark, ()))
    remark, samples = _samples(run)
    if samples:
        sections.append(("Samples", remark, samples))
    name = "/".join(run.folder.resolve().parts[-2:])  # the last part alone is often "run"
    return Page(f"Report: {name}", about, findings, sections, in_force(run.settings))


def _seconds(lines: Sequence[Line]) -> float:
    """Of training, those before each resume included: the clock of a line starts anew there."""
    clock = [second for second in pluck(lines, "seconds") if not math.isnan(second)]
    return sum(now for now, after in pairwise([*clock, 0.0]) if after < now)


def ends(statistics: Sequence[Line]) -> tuple[Line, Line]:
    """The lines of the first and of the last fifth of a run, each as one, in bins wide enough for its pairs."""
    last = statistics[-1]["step"]
    head = [line for line in statistics if line["step"] <= last / TAIL] or statistics[:1]
    tail = [line for line in statistics if line["step"] > last - last / TAIL]
    first, final = merge(head), merge(tail)
    fewest = min(first["pairs"], final["pairs"])
    fits = [n for n in _BINS if first["bins"] % n == 0 and fewest >= _LEAST_PAIRS * n]
    bins = fits[0] if fits else min((n for n in _BINS if first["bins"] % n == 0), default=first["bins"])
    return regroup(first, bins), regroup(final, bins)


def regroup(line: Line, bins: int) -> Line:
    """A line in fewer bins."""
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
    steps = pluck(lines, "step")

    def held_out(name: str) -> tuple[list[float], list[float], str] | None:
        values = pluck(run.validation, f"validation/{name}")
        if not any(not math.isnan(value) for value in values):
            return None
        return pluck(run.validation, "step"), values, "held out"

    def get(name: str) -> list[float]:
        return pluck(lines, name)

    loss, margin = get("loss"), get("reward_margin")
    spans = [value for value in loss if not math.isnan(value)] or [0.0]
    wide = max(spans) > 5  # a β far too high
    relative = {
        name: [g / r if r else math.nan for g, r in zip(get(key), get("ref_mse"), strict=True)]
        for name, key in (("winners", "win_gap"), ("losers", "lose_gap"))
    }
    return [
        Picture(
            "Loss",
            figures.curves(
                steps,
                {"training": loss},
                "loss (nats per pair)",
                level=run.level(),
                points=held_out("loss"),
                log=wide,
                zero=not wide,
            ),
            "Healthy: starts at the line times the share of active pairs and falls slowly; it falls as well when the "
            "mask drops pairs, which is not learning.",
        ),
        Picture(
            "Pairs ranked right, and pairs that take part",
            figures.curves(
                steps,
                {"implicit accuracy": get("implicit_acc"), "active": get("active_fraction")},
                "share of pairs",
                level=(0.5, "chance"),
                points=held_out("implicit_acc"),
                percent=True,
            ),
            "Healthy: accuracy leaves one half quickly and then climbs slowly, held-out pairs follow, and the active "
            "share stays where it was.",
        ),
        Picture(
            "Errors of winners and losers",
            figures.curves(steps, relative, "gap / reference's error", level=(0.0, "as the reference")),
            "Healthy: winners at or below 0, losers above; both rising together means getting worse at everything.",
        ),
        Picture(
            "Reward margin",
            figures.curves(steps, {"": margin}, "mean logit", points=held_out("reward_margin")),
            "Healthy: positive, and growing slowly to a few units; hundreds mean a beta that is too high.",
        ),
        Picture(
            "Errors of policy and reference",
            figures.curves(
                steps, {"policy": get("model_mse"), "reference": get("ref_mse")}, "mean squared error", zero=True
            ),
            "Healthy: the two stay together; a policy that leaves the reference behind is leaving the data.",
        ),
        Picture(
            "Gradient norm",
            figures.curves(
                steps, {"": get("grad_norm")}, "norm before clipping", spread=get("grad_norm_std"), zero=True
            ),
            "Healthy: falls as pairs are satisfied; the band, one standard deviation of single steps, is no wider than "
            "the mean.",
        ),
    ]


def _by_level(run: RunLog, head: Line, tail: Line) -> list[Picture]:
    def both(name: str) -> dict[str, tuple[Line, Sequence[float]]]:
        return {"early": (head, finite(head[name])), "late": (tail, finite(tail[name]))}

    mask = (run.threshold, f"mask: pairs below {run.threshold:g} are left out") if run.threshold else None
    gaps = {"winners": (tail, finite(tail["win_gap"])), "losers": (tail, finite(tail["lose_gap"]))}
    errors = {
        name: (
            tail,
            [
                (winner + loser) / 2
                for winner, loser in zip(
                    finite(tail[f"{key}_error_winner"]), finite(tail[f"{key}_error_loser"]), strict=True
                )
            ],
        )
        for name, key in (("policy", "model"), ("reference", "ref"))
    }
    return [
        Picture(
            "Importance ratio",
            figures.by_level(tail, both("ratio"), "mean ratio, not clipped", level=mask, zero=True),
            "Healthy: low at the clean end, near 1 over the rest, and late about where it was early.",
        ),
        Picture(
            "Pairs that the mask lets through",
            figures.by_level(tail, both("active"), "share of pairs", percent=True),
            "Healthy: only the cleanest levels are dropped, late as early; a late curve far below is drift.",
        ),
        gradient_coefficient(tail, "late"),
        gradient_share(tail),
        Picture(
            "Errors of winners and losers, late",
            figures.by_level(tail, gaps, "error less the reference's", origin=True),
            "Healthy: losers above winners at every level, winners near 0.",
        ),
        Picture(
            "Errors of policy and reference, late",
            figures.by_level(tail, errors, "mean squared error", log=True),
            "Healthy: two curves that nearly coincide; where they part, the policy predicts worse than it did.",
        ),
    ]


def gradient_coefficient(line: Line, when: str) -> Picture:
    """Mean of the gradient's coefficient by noise level, and its spread."""
    mean, square = finite(line["coef"]), finite(line["coef_sq"])
    spread = [math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, square, strict=True)]
    return Picture(
        f"Gradient's coefficient, {when}",
        figures.by_level(line, {"": (line, mean)}, "coefficient of the winner", spread=spread, zero=True),
        "Healthy: about ½ at the start, falling as pairs are satisfied, and not 0 where there is something to learn; "
        "the band is one standard deviation over pairs.",
    )


def gradient_share(line: Line, weights: Sequence[float] | None = None) -> Picture:
    """Which noise levels the gradient comes from, beside how often they are drawn.

    Args:
        line: the statistics.
        weights: how often each bin is drawn; the line's counts if left out.
    """
    counts = line["count"] if weights is None else weights
    drawn = [c / (sum(counts) or 1) for c in counts]
    squares = [d * g if d and not math.isnan(g) else 0.0 for d, g in zip(drawn, finite(line["grad_sq"]), strict=True)]
    total = sum(squares) or 1.0
    named = {"of the squared gradient": [s / total for s in squares], "of the pairs": drawn}
    return Picture(
        "Where the gradient comes from",
        figures.shares(line, named, "share"),
        "Healthy: spread over many levels; a few bars that hold nearly all of it mean that the rest teaches little.",
    )


def _samples(run: RunLog) -> tuple[str, list[Picture]]:
    """The first and the last samples of a run by prompt, with a remark; and the demo's picture."""
    pictures: list[Picture] = []
    prompts = _prompts(run)
    found = _looks(run.folder / "samples", len(prompts), run.settings.get("data.sizes"))
    for number, prompt in enumerate(prompts):
        cells = [(look[number], f"step {step:,}") for step, look in found.items() if number in look]
        if cells:
            pictures.append(Picture(prompt or "(an empty prompt)", looks(cells), kind="sample"))
    remark = "Each prompt with the same noise at both steps." if pictures else ""
    for step, look in found.items():
        if _WHOLE in look:
            pictures.append(Picture(f"Step {step:,}", look[_WHOLE], "Which prompts these are of is not known."))
    path = run.folder / "demo.png"
    if path.is_file():
        content = image(path.read_bytes(), "the demo's picture")
        pictures.append(Picture("The demo", content, "Samples before and after, and what was measured."))
    return remark, pictures


def _prompts(run: RunLog) -> list[str]:
    """In the order of the samples; a run from before they were written beside them has them in its configuration."""
    path = run.folder / "samples" / "prompts.json"
    prompts = run.settings.get("samples.prompts")
    try:
        prompts = parse_json(read_text(path), path)
    except FileNotFoundError:
        pass
    except FileError as error:
        warnings.warn(f"{error}; the configuration's samples.prompts are shown", LogWarning, stacklevel=2)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        return []
    return prompts


def _looks(folder: Path, count: int, sizes: Any) -> dict[int, dict[int, str]]:
    """What a page shows of the first and of the last samples, by step and number of the prompt.

    A damaged file is warned of and left out. An image that is not one of ``count`` samples of the first of
    ``sizes`` is shown whole.
    """
    from PIL import Image

    files: dict[int, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("step-*")):
        if named := re.fullmatch(r"step-(\d{1,12})(?:-(\d{1,6})\.mp4|\.png)", path.name):
            files.setdefault(int(named[1]), []).append((int(named[2] or 0), path))
    steps = sorted(files)
    found: dict[int, dict[int, str]] = {}
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
        name, found[step] = f"sample at step {step:,}", {}
        for number, path in files[step]:
            try:
                data = read_bytes(path)
                if path.suffix == ".mp4":
                    found[step][number] = video(data, name)
                else:
                    found[step] |= {i: image(cell, name) for i, cell in _cells(path, data, count, sizes)}
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
                warnings.warn(f"{path}: samples left out ({error})", LogWarning, stacklevel=2)
    return found


def _cells(path: Path, data: bytes, count: int, sizes: Any) -> list[tuple[int, bytes]]:
    """The samples in an image, each as a PNG, by number of the prompt; one that has others is whole.

    Raises:
        OSError, ValueError, SyntaxError: it is not readable.
    """
    from PIL import Image

    from sipo.data.media import split_image_grid

    try:
        height, width = map(int, sizes[0])
        cells = split_image_grid(path, count, height, width)
    except (ValueError, TypeError, LookupError):  # of other prompts; no sizes, or none that can be
        with Image.open(path) as whole:
            whole.load()
        return [(_WHOLE, data)]
    return [(number, _png(cell)) for number, cell in enumerate(cells)]


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
