"""Makes pairs from a scorer's preferences (``sipo label``); Diffusion-DPO calls this AI feedback."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sipo.data.media import MAX_PIXELS, MediaError, check_request, read_spaced
from sipo.data.readers import read_lines, write_jsonl
from sipo.data.records import (
    FURTHER_IMAGES,
    DataError,
    PairRecord,
    check_data_file,
    has_unpaired_surrogate,
    row_name,
)
from sipo.data.scorers import AestheticScorer, ClipScorer, Scorer, ScorerError, load_function
from sipo.files import check_output, short
from sipo.progress import track

Choice = Literal["best-worst", "all"]


@dataclass
class LabelSummary:
    """The result of labelling a data set.

    Attributes:
        rows: number of rows in the source.
        pairs: number of pairs written.
        below_margin: number of pairs left out because their scores are equal or differ by less than the margin.
        skipped: rows left out, counted from 1, each with the reason.
    """

    rows: int = 0
    pairs: int = 0
    below_margin: int = 0
    skipped: list[str] = field(default_factory=list)

    def describe(self, rows: int = 5) -> str:
        """Returns the counts, and the first ``rows`` rows that were left out."""
        lines = [f"{self.pairs} pairs of {self.rows} rows, {self.below_margin} left out below the margin"]
        if self.skipped:
            lines.append(f"{len(self.skipped)} rows skipped; they count from 1, as lines do in an editor")
            lines += [f"  {text}" for text in self.skipped[:rows]]
        return "\n".join(lines)


def label(
    source: str | Path,
    output: str | Path,
    scorer: Scorer,
    *,
    pairs: Choice = "best-worst",
    min_margin: float = 0.0,
    frames: int = 8,
    batch_size: int = 16,
    max_pixels: int = MAX_PIXELS,
    skip_bad: bool = False,
    progress: bool | None = None,
    skip_option: str = "skip_bad=True",
) -> LabelSummary:
    """Scores candidates and writes pairs of them as JSONL with both scores, aside and renamed.

    Args:
        source: JSONL with ``prompt`` and ``candidates``, a list of two paths or more, in each line; or with ``prompt``,
            ``chosen`` and ``rejected``, which are scored again. Paths are relative to the file.
            ``condition_image``, ``error_mask`` and further keys are kept.
        output: the JSONL file to write. The output of an earlier labelling is replaced, any other file is not.
        scorer: see :mod:`sipo.data.scorers`.
        pairs: "best-worst": one pair for each prompt, of the highest and the lowest score. "all": a pair of every two
            candidates.
        min_margin: pairs whose scores differ by less are left out, as are all pairs of equal scores.
        frames: number of evenly spaced frames by which a clip is scored.
        batch_size: number of candidates in one call of the scorer.
        max_pixels: of a candidate or a frame of it; larger ones cannot be scored.
        skip_bad: leave out rows that cannot be scored, and list them; ``False`` stops at the first.
        progress: as in :mod:`sipo.progress`.
        skip_option: name of ``skip_bad`` in errors.

    Raises:
        DataError: the source, or without ``skip_bad`` one of its rows, cannot be used.
        FileError: ``output`` is a FIFO, a socket or a device.
        OSError: ``output`` cannot be written, or is the source or another file that would be lost.
        ScorerError: the scorer did not return one finite number for each image.
    """
    if pairs not in ("best-worst", "all"):
        raise ValueError(f"pairs={pairs!r}: expected 'best-worst' or 'all'")
    if not 0.0 <= min_margin < math.inf:
        raise ValueError(f"min_margin={min_margin}: expected a number of at least 0")
    for name, value in (("frames", frames), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    check_request(None, None, max_pixels)
    _check_output(Path(source), Path(output))
    summary = LabelSummary()

    def skip(row: int, problem: str) -> None:
        if not skip_bad:
            raise DataError(f"{row_name(row)}: {problem} (rows count from 1; {skip_option} leaves such rows out)")
        summary.skipped.append(f"{row_name(row)}: {problem}")

    def read(path: Path) -> Tensor | MediaError:
        try:
            return read_spaced(path, frames, max_pixels=max_pixels).pixels
        except MediaError as error:
            return error

    rows = track(_rows(Path(source), summary, skip), "labelling", "rows", progress)
    scored = _score(rows, scorer, read, batch_size, skip)
    write_jsonl((pair for row in scored for pair in _pairs(row, pairs, min_margin, summary)), output)
    return summary


def run_label(
    source: str | Path,
    output: str | Path,
    *,
    clip: str | None = None,
    aesthetic: str | Path | None = None,
    function: str | None = None,
    processor: str | None = None,
    activation: Literal["none", "relu"] = "none",
    device: str = "cpu",
    progress: bool | None = True,
    **options: Any,
) -> int:
    """Runs ``sipo label SOURCE OUTPUT`` with one scorer: ``clip``, ``clip`` and ``aesthetic``, or ``function``.

    Prints the summary; ``options`` are those of :func:`label`.

    Returns:
        Exit status 0.

    Raises:
        ValueError: as :func:`label`; or not exactly one scorer is named. Source and output are checked first.
    """
    scorer: Scorer
    if (clip is None) == (function is None):
        raise ValueError("expected a scorer: either --clip (with or without --aesthetic) or --function")
    check_data_file(Path(source))  # before a model is loaded
    _check_output(Path(source), Path(output))
    if function is not None:
        if aesthetic is not None:
            raise ValueError(f"--aesthetic {aesthetic}: expected --clip beside it, the model whose embeddings it rates")
        scorer = load_function(function)
    elif aesthetic is not None:
        scorer = AestheticScorer(str(clip), aesthetic, processor=processor, activation=activation, device=device)
    else:
        scorer = ClipScorer(str(clip), processor=processor, device=device)
    print(label(source, output, scorer, progress=progress, skip_option="--skip-bad", **options).describe())
    return 0


def _check_output(source: Path, output: Path) -> None:
    """Refuses an output that cannot be written, before anything is scored."""
    if output.exists() and source.exists() and output.samefile(source):
        raise FileExistsError(f"{output}: is the source, expected a new file")
    check_output(output, r'\{"prompt": .*"chosen_score": ', "pairs of `sipo label`")


# ---- Rows ----


@dataclass
class _Row:
    row: int
    prompt: str
    candidates: list[Path]
    images: dict[str, Path]  # beside the candidates
    extra: dict[str, Any]
    scores: list[float] = field(default_factory=list)
    problem: str = ""


def _rows(source: Path, summary: LabelSummary, skip: Callable[[int, str], None]) -> Iterator[_Row]:
    known = ("prompt", "candidates", "chosen", "rejected", *FURTHER_IMAGES, "chosen_score", "rejected_score")
    for row, value in read_lines(source):
        summary.rows += 1
        if isinstance(value, str):
            skip(row, value)
            continue
        prompt, names = value.get("prompt"), value.get("candidates", [value.get("chosen"), value.get("rejected")])
        images = {key: value[key] for key in FURTHER_IMAGES if value.get(key) is not None}
        wrong = [key for key, path in images.items() if not isinstance(path, str) or not path]
        if not isinstance(prompt, str) or not prompt.strip() or has_unpaired_surrogate(prompt):
            skip(row, f"prompt={short(prompt)}: expected text")
        elif not isinstance(names, list) or len(names) < 2 or not all(isinstance(each, str) and each for each in names):
            skip(row, "expected 'candidates', a list of two paths or more, or 'chosen' and 'rejected'")
        elif wrong:
            skip(row, f"{wrong[0]}={short(images[wrong[0]])}: expected a path")
        else:
            extra = {key: item for key, item in value.items() if key not in known}
            candidates = [source.parent / name for name in names]
            yield _Row(row, prompt, candidates, {key: source.parent / path for key, path in images.items()}, extra)


def _score(
    rows: Iterable[_Row],
    scorer: Scorer,
    read: Callable[[Path], Tensor | MediaError],
    batch_size: int,
    skip: Callable[[int, str], None],
) -> Iterator[_Row]:
    """Yields the rows in order, once all of their candidates are scored; a batch may span rows."""
    waiting: list[_Row] = []

    def candidates() -> Iterator[tuple[_Row, Path]]:
        for row in rows:
            waiting.append(row)
            yield from ((row, path) for path in row.candidates)

    remaining = candidates()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        while batch := list(islice(remaining, batch_size)):
            good: list[tuple[_Row, Tensor]] = []
            for (row, _), pixels in zip(batch, pool.map(read, [path for _, path in batch]), strict=True):
                if isinstance(pixels, Tensor):
                    good.append((row, pixels))
                elif not row.problem:
                    row.problem = str(pixels)
                    skip(row.row, row.problem)
            if good:
                scores = _numbers(scorer([pixels for _, pixels in good], [row.prompt for row, _ in good]), len(good))
                for (row, _), score in zip(good, scores, strict=True):
                    row.scores.append(score)
            # A row waits for candidates in the next batch, unless it has a problem.
            while waiting and (waiting[0].problem or len(waiting[0].scores) == len(waiting[0].candidates)):
                row = waiting.pop(0)
                if not row.problem:
                    yield row


def _numbers(scores: Any, count: int) -> list[float]:
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise ScorerError(f"the scorer returned {type(scores).__name__}, expected numbers: {error}") from error
    if len(numbers) != count:
        raise ScorerError(f"the scorer returned {len(numbers)} scores, expected {count}")
    for number in numbers:
        if not math.isfinite(number):
            raise ScorerError(f"the scorer returned {number}, expected a finite number")
    return numbers


def _pairs(row: _Row, pairs: Choice, min_margin: float, summary: LabelSummary) -> Iterator[PairRecord]:
    """Yields a row's pairs, best candidates first; pairs of equal scores are left out."""
    order = sorted(range(len(row.scores)), key=lambda index: -row.scores[index])
    for best, worst in [(order[0], order[-1])] if pairs == "best-worst" else combinations(order, 2):
        margin = row.scores[best] - row.scores[worst]
        if margin <= 0.0 or margin < min_margin:
            summary.below_margin += 1
            continue
        summary.pairs += 1
        chosen, rejected = row.candidates[best], row.candidates[worst]
        scores = (row.scores[best], row.scores[worst])
        yield PairRecord(row.row, row.prompt, chosen, rejected, *scores, extra=row.extra, **row.images)  # type: ignore[arg-type]
