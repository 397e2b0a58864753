"""Pairs in VideoDPO's two JSON files: a list of clips, and one of pairs of places in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sipo.data.records import DataError, PairRecord, has_half
from sipo.data.rows import bad_row, is_finite_number, plain, states
from sipo.files import FileError, parse_json, read_text, short

METADATA, PAIRS = "metadata.json", "pair.json"


@dataclass(frozen=True)
class VideoDpoReader:
    """VideoDPO's layout: ``metadata.json`` lists the clips, ``pair.json`` pairs their places in that list.

    An item of the first is ``{"basic": {"clip_path", ...}, "misc": {"frame_caption": [prompt]}}``, of the second
    ``{"video1": chosen sample, "video2": rejected sample, "frame_caption": prompt}``. Its ``label`` is not read: the
    published lists have the chosen sample first whatever the label says, and so does the published loader.

    The places are those of the whole list. (The published loader drops clips of less than a second from the list
    before it counts, which shifts every place behind them.) Both clips' captions must be the pair's: this is what a
    shifted index is known by. A ``clip_path`` is relative to the folder; an absolute one that is not there, which is
    how the lists come from another machine, is looked for under the folder by its last two parts.
    """

    folder: Path

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.folder

    def state(self) -> Any:
        """Names, sizes, times and inodes of both lists."""
        return states(self.folder, [self.folder / name for name in (METADATA, PAIRS)])

    def __iter__(self) -> Iterator[PairRecord]:
        clips = [_clip(self.folder, item) for item in _load_list(self.folder / METADATA)]
        captioned: dict[str, list[int]] = {}
        for place, clip in enumerate(clips):
            if clip is not None:
                captioned.setdefault(clip.caption, []).append(place)
        for row, item in enumerate(_load_list(self.folder / PAIRS)):
            yield self._record(row, item, clips, captioned)

    def _record(
        self, row: int, item: Any, clips: list[_CaptionedClip | None], captioned: dict[str, list[int]]
    ) -> PairRecord:
        if not isinstance(item, dict):
            return bad_row(row, f"holds {short(item)}, expected an object")
        prompt = _caption(item.get("frame_caption"))
        if prompt is None:
            return bad_row(row, f"frame_caption={short(item.get('frame_caption'))}: expected text")
        found: list[_CaptionedClip] = []
        for key in ("video1", "video2"):
            place = item.get(key)
            if not isinstance(place, int) or isinstance(place, bool):
                return bad_row(row, f"{key}={short(place)}: expected a place in {METADATA}", prompt)
            if not 0 <= place < len(clips):
                return bad_row(row, f"{key}={place}: expected 0 to {len(clips) - 1}", prompt, "index")
            clip = clips[place]
            if clip is None:
                return bad_row(row, f"{key}={place}: that item of {METADATA} has no clip_path or frame_caption", prompt)
            if clip.caption != plain(prompt):
                text = f"{key}={place} is captioned {short(clip.caption)}, the pair {short(prompt)}"
                return bad_row(row, text + _nearest(captioned.get(plain(prompt), []), place), prompt, "index")
            found.append(clip)
        first, second = found
        if item["video1"] == item["video2"]:
            return bad_row(row, f"video1=video2={item['video1']}: expected two clips", prompt, "index")
        if first.number is not None and second.number is not None and first.number != second.number:
            text = f"video1 was made for prompt {first.number} and video2 for prompt {second.number}: expected one"
            return bad_row(row, text, prompt, "index")
        extra = {key: value for key, value in item.items() if key not in ("video1", "video2", "frame_caption")}
        return PairRecord(row, prompt, first.path, second.path, first.score, second.score, extra=extra)


@dataclass(frozen=True)
class _CaptionedClip:
    path: Path
    caption: str
    number: str | None
    score: float | None


def _clip(folder: Path, item: Any) -> _CaptionedClip | None:
    """One item of ``metadata.json``; ``None`` where it is not as expected, so that its place stays taken."""
    basic = item.get("basic") if isinstance(item, dict) else None
    misc = item.get("misc") if isinstance(item, dict) else None
    if not isinstance(basic, dict) or not isinstance(misc, dict):
        return None
    name, caption = basic.get("clip_path"), _caption(misc.get("frame_caption"))
    if not isinstance(name, str) or not name or has_half(name) or caption is None:
        return None
    path = folder / name
    if Path(name).is_absolute() and not os.path.exists(path):  # which is quiet about names that no file can have
        path = folder.joinpath(*Path(name).parts[-2:])
    number, score = basic.get("globalidx", basic.get("vidproidx")), basic.get("score")
    score = score if is_finite_number(score) else None
    return _CaptionedClip(path, plain(caption), str(number) if isinstance(number, (int, str)) else None, score)


def _caption(value: Any) -> str | None:
    """A caption, given as text or as a list that starts with it."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) and not has_half(value) else None


def _nearest(places: list[int], wanted: int) -> str:
    if not places:
        return ""
    place = min(places, key=lambda each: abs(each - wanted))
    return f", which is at {place}: the index is off by {wanted - place:+d}"


def _load_list(path: Path) -> list[Any]:
    try:
        value = parse_json(read_text(path), path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected VideoDPO's list") from error
    except FileError as error:
        raise DataError(str(error)) from error
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {type(value).__name__}, expected a list")
    return value
