"""A data set on disk that tests change after it was encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sipo.data.media import write_image
from tests.data_sets import noise

Lines = list[dict[str, Any]]


def make_pairs(folder: Path, pairs: int = 6) -> Path:
    """Files of one size, in two folders under the same names, and of times that a clock of milliseconds can tell."""
    lines = []
    for row in range(pairs):
        names = [f"{side}/{row}.bmp" for side in "ab"]
        for side, name in enumerate(names):
            write_image(folder / name, noise(2 * row + side, 3, 32, 32))
        lines.append({"prompt": f"prompt {row // 2}", "chosen": names[0], "rejected": names[1]})
    return write(folder / "pairs.jsonl", lines)


def read(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def written_at(cache: Path) -> dict[str, int]:
    """Every file of latents and text, by when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(cache.glob("*-0*.safetensors"))}


def changed(before: dict[str, int], cache: Path) -> list[str]:
    """Files that were written since."""
    return [name.removesuffix(".safetensors") for name, at in written_at(cache).items() if before.get(name) != at]


def swap(lines: Lines) -> None:
    lines[3]["chosen"], lines[3]["rejected"] = lines[3]["rejected"], lines[3]["chosen"]


def drop(lines: Lines) -> None:
    del lines[5]
