"""Makes a small data set whose preference is visible: saturated colours are preferred to washed-out ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sipo.data.media import write_image, write_video
from sipo.data.readers import write_jsonl
from sipo.data.records import PairRecord

FPS = 8.0
"""Frames per second of the clips."""

CONDITION_FOLDER = "condition"
"""Folder of the condition images beside the JSONL file."""

_COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.2),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.9, 0.8, 0.1),
    "purple": (0.6, 0.1, 0.8),
    "cyan": (0.1, 0.8, 0.9),
}
_SHAPES = ("disc", "square")
_WASHED_OUT = 0.35  # share of the saturation that the rejected sample keeps


def make_toy_pairs(
    folder: str | Path,
    *,
    video: bool,
    pairs: int = 32,
    seed: int = 0,
    height: int = 32,
    width: int = 32,
    frames: int = 9,
    condition_image: Literal["none", "optional", "required"] = "none",
) -> Path:
    """Writes PNG images, or MP4 clips at 8 frames per second, and a JSONL file that pairs them.

    Both samples of a pair show the same shape in the same place (in clips it moves), the rejected one with little
    colour. The same arguments give the same files, so that several processes may write them at once.

    Args:
        folder: created if it is missing.
        video: whether to make clips instead of images.
        pairs: number of pairs.
        seed: of places and colours.
        height, width: in pixels; even for clips.
        frames: number of frames of a clip.
        condition_image: as a family has it: "required" adds the image without its colour to every pair, as the image
            that both samples are edits of, and "optional" to every second one.

    Returns:
        The path of the JSONL file.
    """
    folder = Path(folder)
    generator = torch.Generator().manual_seed(seed)
    records = []
    for row in range(pairs):
        colour = list(_COLOURS)[int(torch.randint(len(_COLOURS), (), generator=generator))]
        shape = _SHAPES[int(torch.randint(len(_SHAPES), (), generator=generator))]
        clip = _clip(shape, _COLOURS[colour], frames if video else 1, height, width, generator)
        grey = clip.mean(1, keepdim=True)
        washed = grey + _WASHED_OUT * (clip - grey)
        paths = {side: folder / side / f"{row:05d}.{'mp4' if video else 'png'}" for side in ("chosen", "rejected")}
        for side, pixels in (("chosen", clip), ("rejected", washed)):
            eight_bit = pixels.mul(255.0).round().clamp(0.0, 255.0).to(torch.uint8)
            if video:
                write_video(paths[side], eight_bit, FPS)
            else:
                write_image(paths[side], eight_bit[0])
        motion = " moving to the right" if video else ""
        record = PairRecord(row, f"a {colour} {shape}{motion}", paths["chosen"], paths["rejected"])
        if condition_image == "required" or (condition_image == "optional" and row % 2):
            path = folder / CONDITION_FOLDER / f"{row:05d}.png"
            write_image(path, grey[0].expand(3, -1, -1).mul(255.0).round().to(torch.uint8))
            record = replace(record, prompt=f"make the {shape} {colour}{motion}", condition_image=path)
        records.append(record)
    path = folder / "pairs.jsonl"
    write_jsonl(records, path)
    return path


def _clip(
    shape: str, colour: tuple[float, float, float], frames: int, height: int, width: int, generator: torch.Generator
) -> Tensor:
    """Draws ``[frames, 3, height, width]`` in [0, 1]: the shape on a slightly uneven dark background."""
    top, left, size = torch.rand(3, generator=generator, dtype=torch.float32).tolist()
    radius = (0.18 + 0.12 * size) * min(height, width)
    y = torch.arange(height, dtype=torch.float32)[:, None] + 0.5 - (radius + top * (height - 2 * radius))
    travel = torch.linspace(0.0, 0.25 * width, frames, dtype=torch.float32)[:, None, None]
    x = torch.arange(width, dtype=torch.float32)[None] + 0.5 - (radius + left * (0.75 * width - 2 * radius) + travel)
    distance = (x.square() + y.square()).sqrt() if shape == "disc" else torch.maximum(x.abs(), y.abs())
    inside = (radius - distance + 0.5).clamp(0.0, 1.0)[:, None]
    ground = 0.15 + 0.02 * torch.randn(3, height, width, generator=generator, dtype=torch.float32)
    return (inside * torch.tensor(colour, dtype=torch.float32)[:, None, None] + (1.0 - inside) * ground).clamp(0.0, 1.0)
