"""Reads VideoDPO's two JSON files: a list of clips, and a list of pairs of indices into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sipo.data.records import DataError, PairRecord, bad_row, has_unpaired_surrogate, is_finite_number, states
from sipo.files import FileError, parse_json, read_text, short

METADATA, PAIRS = "metadata.json", "pair.json"


@dataclass(frozen=True)
class VideoDpoReader:
    """Reads VideoDPO's layout: ``metadata.json`` lists the clips, ``pair.json`` pairs their indices in that list.

    An item of the first is ``{"basic": {"clip_path", ...}, "misc": {"frame_caption": [prompt]}}``, of the second
    ``{"video1": chosen sample, "video2": rejected sample, "frame_caption": prompt}``. Its ``label`` is not read: the
    published lists have the chosen sample first whatever the label says, and so does the published loader.

    Indices refer to the whole list. (The published loader first drops clips of less than a second, which shifts every
    index after them.) Both clips must have the pair's caption: otherwise an index is shifted. A ``clip_path`` is
    relative to the folder. An absolute one that does not exist, as in lists from another machine, is replaced by its
    last two parts under the folder.
    """

    folder: Path

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.folder

    def state(self) -> Any:
        """Lists names, sizes, times and inodes of both lists."""
        return states(self.folder, [self.folder / name for name in (METADATA, PAIRS)])

    def __iter__(self) -> Iterator[PairRecord]:
        clips = [_clip(self.folder, item) for item in _load_list(self.folder / METADATA)]
        indices: dict[str, list[int]] = {}  # by caption
        for index, clip in enumerate(clips):
            if clip is not None:
                indices.setdefault(clip.caption, []).append(index)
        for row, item in enumerate(_load_list(self.folder / PAIRS)):
            yield _record(row, item, clips, indices)


@dataclass(frozen=True)
class _CaptionedClip:
    path: Path
    caption: str
    number: str | None
    score: float | None


def _record(row: int, item: Any, clips: list[_CaptionedClip | None], indices: dict[str, list[int]]) -> PairRecord:
    """Makes the record of one item of ``pair.json``."""
    if not isinstance(item, dict):
        return bad_row(row, f"holds {short(item)}, expected an object")
    prompt = _caption(item.get("frame_caption"))
    if prompt is None:
        return bad_row(row, f"frame_caption={short(item.get('frame_caption'))}: expected text")
    caption = " ".join(prompt.split())
    sides: list[_CaptionedClip] = []
    for key in ("video1", "video2"):
        index = item.get(key)
        if not isinstance(index, int) or isinstance(index, bool):
            return bad_row(row, f"{key}={short(index)}: expected an index into {METADATA}", prompt)
        if not 0 <= index < len(clips):
            return bad_row(row, f"{key}={index}: expected 0 to {len(clips) - 1}", prompt, "index")
        clip = clips[index]
        if clip is None:
            return bad_row(row, f"{key}={index}: that item of {METADATA} has no clip_path or frame_caption", prompt)
        if clip.caption != caption:
            text = f"{key}={index} is captioned {short(clip.caption)}, the pair {short(prompt)}"
            if caption in indices:
                nearest = min(indices[caption], key=lambda each: abs(each - index))
                text += f", which is at {nearest}: the index is off by {index - nearest:+d}"
            return bad_row(row, text, prompt, "index")
        sides.append(clip)
    chosen, rejected = sides
    if item["video1"] == item["video2"]:
        return bad_row(row, f"video1=video2={item['video1']}: expected two clips", prompt, "index")
    if chosen.number is not None and rejected.number is not None and chosen.number != rejected.number:
        text = f"video1 was made for prompt {chosen.number} and video2 for prompt {rejected.number}: expected one"
        return bad_row(row, text, prompt, "index")
    extra = {key: value for key, value in item.items() if key not in ("video1", "video2", "frame_caption")}
    return PairRecord(row, prompt, chosen.path, rejected.path, chosen.score, rejected.score, extra=extra)


def _clip(folder: Path, item: Any) -> _CaptionedClip | None:
    """Reads one item of ``metadata.json``; ``None`` if it is not as expected, so that later indices do not shift."""
    basic = item.get("basic") if isinstance(item, dict) else None
    misc = item.get("misc") if isinstance(item, dict) else None
    if not isinstance(basic, dict) or not isinstance(misc, dict):
        return None
    name, caption = basic.get("clip_path"), _caption(misc.get("frame_caption"))
    if not isinstance(name, str) or not name or has_unpaired_surrogate(name) or caption is None:
        return None
    path = folder / name
    if Path(name).is_absolute() and not os.path.exists(path):  # False for names that no file can have
        path = folder.joinpath(*Path(name).parts[-2:])
    number, score = basic.get("globalidx", basic.get("vidproidx")), basic.get("score")
    score = score if is_finite_number(score) else None
    number = str(number) if isinstance(number, (int, str)) else None
    return _CaptionedClip(path, " ".join(caption.split()), number, score)


def _caption(value: Any) -> str | None:
    """Reads a caption, given as text or as a list that starts with it; ``None`` if there is none."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) and not has_unpaired_surrogate(value) else None


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
