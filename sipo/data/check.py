"""Checks a data set of pairs (``sipo data check``): what it holds, and which pairs training would skip.

Precomputing and the check both read pairs with :func:`sipo.data.load.load_pair`, so that what the check reports is what
precomputing skips.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sipo.data.load import (
    BadPairError,
    file_digest,
    format_size,
    hashed,
    is_cut,
    load_condition_image,
    load_error_mask,
    load_pair,
)
from sipo.data.media import MAX_PIXELS, Media, check_request, nearest_size
from sipo.data.readers import Format, open_pairs
from sipo.data.records import FURTHER_IMAGES, PairReader, PairRecord, new_misspelt, row_name
from sipo.files import check_output, write_aside
from sipo.progress import track

SKIPPED = {
    "row": "faulty rows",
    "index": "index shifts",
    "tie": "ties",
    "caption": "empty captions",
    "missing": "missing files",
    "undecodable": "undecodable files",
    "large": "files of too many pixels",
    "medium": "images for clips, or clips for images",
    "short": "clips too short",
    "rate": "clips of too few frames per second",
    "shape": "pairs of two shapes or frame rates",
    "identical": "chosen and rejected alike",
    "mask": "error masks that are all black, or have colours or transparent pixels",
}
"""Kinds of findings that training skips, or stops at, with their names in reports."""

LEFT_OUT = SKIPPED | {
    "condition": "rows without a condition image",
    "crop": "error masks that are all black in the crop",
    "latents": "pairs whose latents are not finite",
}
"""Kinds of pairs that a run leaves out, with their names: a check knows neither its family nor its crops."""

NOTED = {
    "key": "keys that may be misspelt, each in the first row that has it",
    "duplicate": "duplicates",
    "contradiction": "pairs that an earlier row has the other way round",
    "reused": "files that an earlier row has for another prompt",
    "shift": "suspected index shifts",
    "resolution": "pairs of two resolutions",
    "length": "pairs of two lengths",
    "enlarged": "pairs smaller than the size they are trained at",
    "cut": "condition images of which more than a tenth is cut away",
    "alpha": "pairs with transparent pixels, which are shown on white",
    "pixels": "pairs whose pixels are said not to be square",
    "interlaced": "pairs of interlaced clips",
}
"""Kinds of findings that training does not skip."""


@dataclass(frozen=True)
class PairFinding:
    """A finding in one row, counted from 0; ``kind`` is a key of :data:`SKIPPED` or :data:`NOTED`."""

    row: int
    kind: str
    text: str


@dataclass
class CheckReport:
    """The findings of a check.

    Attributes:
        pairs: rows that were checked.
        skipped: how many of them training would skip.
        findings: in the order of their rows.
        sizes: number of pairs for each size, if sizes were given.
        further_images: number of pairs that have each of :data:`sipo.data.records.FURTHER_IMAGES`. As with ``sizes``,
            those that training would skip do not count.
    """

    pairs: int = 0
    skipped: int = 0
    findings: list[PairFinding] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    further_images: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, int]:
        """Counts the findings of every kind, zeros included."""
        numbers = Counter(finding.kind for finding in self.findings)
        return {kind: numbers[kind] for kind in (*SKIPPED, *NOTED)}

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values, with rows counted from 1."""
        return {
            "pairs": self.pairs,
            "skipped": self.skipped,
            "counts": self.counts(),
            "sizes": [{"height": h, "width": w, "pairs": n} for (h, w), n in sorted(self.sizes.items())],
            "further_images": {name: self.further_images[name] for name in FURTHER_IMAGES},
            "findings": [vars(finding) | {"row": finding.row + 1} for finding in self.findings],
        }

    def describe(self, rows: int = 5) -> str:
        """Returns a table, with the first ``rows`` rows of each kind, counted from 1."""
        lines = [f"{self.pairs} pairs, of which training would skip {self.skipped}"]
        if self.findings:
            lines[0] += "; rows count from 1, as lines do in an editor"
        for title, names in (("skipped", SKIPPED), ("not skipped", NOTED)):
            for kind, name in names.items():
                findings = [finding for finding in self.findings if finding.kind == kind]
                if not findings:
                    continue
                lines.append(f"{len(findings):>8}  {name} ({title})")
                lines += [f"{'':>10}{row_name(finding.row)}: {finding.text}" for finding in findings[:rows]]
                if len(findings) > rows:
                    lines.append(f"{'':>10}and {len(findings) - rows} more")
        lines += [f"{n:>8}  pairs with {name}" for name, n in sorted(self.further_images.items())]
        lines += [f"{n:>8}  pairs at {format_size(size)}" for size, n in sorted(self.sizes.items())]
        return "\n".join(lines)


def check_pairs(
    reader: PairReader | Iterable[PairRecord],
    *,
    frames: int | None = None,
    fps: float | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    limit: int | None = None,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: bool | None = None,
) -> CheckReport:
    """Reads and decodes every pair.

    A duplicate has the prompt and both files' contents of an earlier row; a contradiction has these files swapped. A
    file that an earlier row has under another prompt is listed as well: it was made for at most one of them. Rows with
    different condition images count as rows with different prompts. Rows with different error masks are no duplicates.

    In VideoDPO's lists, captions reveal an index shift. Other sources have only file names, and a shift is suspected
    only if these are inconsistent: chosen and rejected have the same number in all but a few rows (a tenth), or in all
    but one stretch of rows with a single offset. At least ten rows must be so numbered. Names that count from 1 or
    leave out numbers are no evidence: filtered rows look the same.

    Args:
        reader: as :func:`sipo.data.readers.open_pairs` returns it.
        frames, fps: as for :func:`load_pair`.
        sizes: heights and widths to train at; pairs are counted by them, and smaller ones listed.
        limit: check at most this many rows, from the first.
        max_pixels: of an image or a frame; larger ones are skipped.
        workers: threads that decode; ``None`` takes one per core, four at most. Twice as many pairs are in memory.
        progress: as in :mod:`sipo.progress`.

    Raises:
        ValueError: ``frames``, ``fps``, ``limit`` or ``max_pixels`` is out of range.
    """
    check_request(frames, fps, max_pixels)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1")
    report = CheckReport()
    notes, misspelt = _Notes(), set[str]()
    examine = partial(_examine, frames=frames, fps=fps, sizes=sizes, max_pixels=max_pixels)
    for record, examined in _examine_all(islice(reader, limit), examine, workers, progress):
        report.pairs += 1
        report.findings += [PairFinding(record.row, "key", text) for text in new_misspelt(record, misspelt)]
        if examined.bad is not None:
            report.skipped += 1
            report.findings.append(PairFinding(record.row, examined.bad.kind, str(examined.bad)))
            continue
        if examined.size is not None:
            report.sizes[examined.size] += 1
        report.further_images.update(record.sources.keys() & FURTHER_IMAGES)
        for kind, text in (*examined.notes, *notes.add(record, examined.digests)):
            report.findings.append(PairFinding(record.row, kind, text))
    report.findings += notes.shifts()
    report.findings.sort(key=lambda finding: finding.row)
    return report


def run_check(
    path: str | Path,
    format: Format = "auto",
    split: str = "train",
    *,
    streaming: bool = False,
    json_file: str | Path | None = None,
    rows: int = 5,
    progress: bool | None = True,
    **options: Any,
) -> int:
    """Runs ``sipo data check PATH``: prints the report, and writes it to ``json_file`` if there is one.

    ``options`` are those of :func:`check_pairs`, which may raise a ValueError for them.

    Returns:
        Exit status: 0 if training would skip nothing, else 1.

    Raises:
        DataError: the data set cannot be read at all.
        OSError: ``json_file`` exists and is not such a report.
    """
    if json_file is not None:
        check_output(Path(json_file), r'\{\n "pairs": ', "a report of `sipo data check`")
    reader = open_pairs(path, format, split, streaming)
    report = check_pairs(reader, progress=progress, **options)
    if json_file is not None:
        write_aside(Path(json_file), json.dumps(report.as_dict(), indent=1) + "\n")
    print(report.describe(rows))
    return 1 if report.skipped else 0


# ---- One row ----


@dataclass(frozen=True)
class _Examined:
    bad: BadPairError | None = None
    notes: tuple[tuple[str, str], ...] = ()
    digests: dict[str, bytes] = field(default_factory=dict)
    size: tuple[int, int] | None = None


def _examine(
    record: PairRecord,
    frames: int | None,
    fps: float | None,
    sizes: Sequence[tuple[int, int]] | None,
    max_pixels: int,
) -> _Examined:
    """Loads one pair with its further images, and collects the findings that need no other row."""
    try:
        # Hashes suffice to compare both samples: no clip need be in memory.
        transform = None if frames is None else hashed
        chosen, rejected = load_pair(record, frames=frames, fps=fps, max_pixels=max_pixels, transform=transform)
        condition = load_condition_image(record, max_pixels=max_pixels)
        load_error_mask(record, chosen, max_pixels=max_pixels)
        digests = {name: file_digest(source) for name, source in record.sources.items()}
    except BadPairError as error:
        return _Examined(error)
    notes = []
    shapes = [chosen.size, rejected.size]
    if shapes[0] != shapes[1]:
        notes.append(("resolution", f"chosen is {format_size(shapes[0])} and rejected {format_size(shapes[1])}"))
    if chosen.length != rejected.length:
        notes.append(("length", f"chosen has {chosen.length} frames and rejected {rejected.length}"))
    size = nearest_size(*shapes[0], sizes) if sizes else None
    if size is not None and any(height < size[0] or width < size[1] for height, width in shapes):
        notes.append(("enlarged", f"{format_size(min(shapes))} is enlarged to {format_size(size)}"))
    sides = {"chosen": chosen, "rejected": rejected}
    if condition is not None:
        sides["condition_image"] = condition
        if is_cut(condition, chosen):
            text = f"condition_image is {format_size(condition.size)} and chosen {format_size(shapes[0])}"
            notes.append(("cut", text))
    notes += _notes_on_files(sides)
    return _Examined(None, tuple(notes), digests, size)


def _notes_on_files(sides: dict[str, Media]) -> Iterator[tuple[str, str]]:
    """Lists transparency, pixel aspect ratios other than 1 and interlacing."""
    texts: dict[str, list[str]] = {}
    for name, side in sides.items():
        if side.transparent:
            texts.setdefault("alpha", []).append(f"{_percent(side.transparent)} of {name} is transparent")
        if side.pixel_aspect != 1:
            ratio = f"{side.pixel_aspect.numerator}:{side.pixel_aspect.denominator}"
            done = "taken as square" if side.fps is None else f"scaled to {format_size(side.size)}"
            texts.setdefault("pixels", []).append(f"{name} has pixels of {ratio}, {done}")
        if side.interlaced:
            text = f"{name} is interlaced: each frame mixes lines from two points in time"
            texts.setdefault("interlaced", []).append(text)
    return ((kind, "; ".join(parts)) for kind, parts in texts.items())


def _examine_all(
    records: Iterable[PairRecord],
    examine: Callable[[PairRecord], _Examined],
    workers: int | None,
    progress: bool | None,
) -> Iterator[tuple[PairRecord, _Examined]]:
    """Examines records in order, in threads: Pillow, FFmpeg and hashlib release the interpreter's lock."""
    workers = workers or min(4, os.cpu_count() or 1)
    waiting: deque[tuple[PairRecord, Future[_Examined]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for record in track(records, "checking", "pairs", progress):
            waiting.append((record, pool.submit(examine, record)))
            if len(waiting) > 2 * workers:
                record, future = waiting.popleft()
                yield record, future.result()
        for record, future in waiting:
            yield record, future.result()


def _percent(share: float) -> str:
    """Formats a share above 0; less than 1 is never shown as 100%, nor anything as 0%."""
    if share < 0.01:
        return "less than 1%"
    return "more than 99%" if 0.99 < share < 1 else f"{share:.0%}"


# ---- One row beside the others ----


class _Notes:
    """Findings from comparing rows. Takes a few hundred bytes a row: less than 1 GB for a million."""

    def __init__(self) -> None:
        self._pairs: dict[bytes, int] = {}
        self._files: dict[bytes, tuple[int, bytes]] = {}
        self._numbers: dict[tuple[str, int], list[tuple[int, int, int]]] = {}

    def add(self, record: PairRecord, digests: dict[str, bytes]) -> Iterator[tuple[str, str]]:
        """Adds a row; yields what it has in common with earlier rows."""
        chosen, rejected = digests["chosen"], digests["rejected"]
        text = record.prompt.encode() + digests.get("condition_image", b"")
        prompt = hashlib.blake2b(text, digest_size=16).digest()
        start = prompt + digests.get("error_mask", b"")
        same, swapped = start + chosen + rejected, start + rejected + chosen
        if same in self._pairs:
            yield "duplicate", f"is {row_name(self._pairs[same])} again"
        elif swapped in self._pairs:
            yield "contradiction", f"is {row_name(self._pairs[swapped])} with chosen and rejected swapped"
        self._pairs.setdefault(same, record.row)
        for name, digest in (("chosen", chosen), ("rejected", rejected)):
            row, other = self._files.setdefault(digest, (record.row, prompt))
            if other != prompt:
                yield "reused", f"{name} is a file of {row_name(row)}, whose prompt is another"
        if isinstance(record.chosen, Path) and isinstance(record.rejected, Path):
            parts = [re.split(r"(\d+)", path.stem) for path in (record.chosen, record.rejected)]
            if parts[0][::2] == parts[1][::2]:
                for place in range(1, len(parts[0]), 2):
                    numbers = (record.row, int(parts[0][place]), int(parts[1][place]))
                    self._numbers.setdefault(("#".join(parts[0][::2]), place), []).append(numbers)

    def shifts(self) -> list[PairFinding]:
        """Lists suspected index shifts, see :func:`check_pairs`."""
        suspected: dict[int, PairFinding] = {}
        for rows in self._numbers.values():
            unequal = [(row, chosen, rejected) for row, chosen, rejected in rows if chosen != rejected]
            # A number that hardly changes from row to row is a version or a seed, not an index.
            if len(rows) < 10 or len({chosen for _, chosen, _ in rows}) < max(5, len(rows) / 10):
                continue
            if len(unequal) > len(rows) / 10 and not _one_stretch([b - a for _, a, b in rows]):
                continue
            agree = len(rows) - len(unequal)
            for row, chosen, rejected in unequal:
                text = f"chosen is number {chosen} and rejected {rejected}, in {agree} rows they agree"
                suspected.setdefault(row, PairFinding(row, "shift", text))
        return list(suspected.values())


def _one_stretch(offsets: Sequence[int]) -> bool:
    """Tells whether all offsets are 0 except one unbroken stretch, at most half of them, with one other offset."""
    places = [place for place, offset in enumerate(offsets) if offset]
    unbroken = places[-1] - places[0] + 1 == len(places)
    return unbroken and len({offsets[place] for place in places}) == 1 and len(places) <= len(offsets) / 2
