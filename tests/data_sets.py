"""Data sets of pairs made on the spot: clean ones, and ones with every fault planted in a row of its own."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipo.data.media import write_image, write_video

Planted = dict[int, str]
"""Kind of finding by row."""

CLEAN_ROWS = 40


def noise(seed: int, *shape: int) -> Tensor:
    """Random uint8 pixels."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def clip(seed: int, frames: int = 6, height: int = 16, width: int = 16) -> Tensor:
    """``[frames, 3, height, width]`` uint8: flat colours, each frame another."""
    return noise(seed, frames, 3, 1, 1).expand(frames, 3, height, width).contiguous()


def write_lines(path: Path, lines: list[Mapping[str, Any] | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_bit(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut_short(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def damage(path: Path, share: float = 0.6, count: int = 40) -> None:
    """Turns over every bit of some bytes in the midst of a file."""
    content = bytearray(path.read_bytes())
    start = int(len(content) * share)
    for place in range(start, min(start + count, len(content))):
        content[place] ^= 0xFF
    path.write_bytes(content)


def encode_clip(
    path: Path,
    pixels: Tensor,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    aspect: Fraction | None = None,
    matrix: tuple[float, float, float, float] | None = None,
    times: Sequence[int] | None = None,
    options: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Writes ``[F, C, H, W]`` uint8 (4 channels: with alpha) at 8 frames a second as :func:`write_video` never would.

    Args:
        path: its ending gives the container.
        pixels: the stored frames.
        codec: FFmpeg's name.
        pix_fmt: stored pixel format.
        aspect: sample aspect ratio: width over height of a pixel.
        matrix: of MP4 and MOV, ``(a, b, c, d)``: a pixel is shown at ``x' = a x + c y`` and ``y' = b x + d y``.
        times: when each frame is shown, in milliseconds.
        options: the encoder's.
        tags: the stream's metadata.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[-2:], pix_fmt
        usual = {"libx264": {"crf": "5"}, "libvpx": {"auto-alt-ref": "0"}}  # the latter where there is an alpha channel
        stream.options = dict(options or usual.get(codec, {}))
        stream.metadata.update(tags or {})
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        layout = "rgba" if pixels.shape[1] == 4 else "rgb24"
        for index, array in enumerate(pixels.permute(0, 2, 3, 1).contiguous().numpy()):
            frame = av.VideoFrame.from_ndarray(array, format=layout)
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if matrix is not None:
        # By hand, for PyAV learnt it late: nine numbers at a fixed place in the track's header.
        content = bytearray(path.read_bytes())
        a, b, c, d = (round(value * 65536) for value in matrix)
        struct.pack_into(">9i", content, content.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(content)


class Builder:
    """Rows of a JSONL set: ``win/000007.png`` and ``lose/000007.png`` for row 7."""

    def __init__(self, folder: Path, suffix: str = ".png", rows: int = 0) -> None:
        self.folder = folder
        self.suffix = suffix
        self.lines: list[Mapping[str, Any] | str] = []
        self.planted: Planted = {}
        for _ in range(rows):
            self.add()

    def paths(self, row: int) -> tuple[Path, Path]:
        return tuple(self.folder / side / f"{row:06d}{self.suffix}" for side in ("win", "lose"))  # type: ignore[return-value]

    def pixels(self, seed: int) -> Tensor:
        return noise(seed, 3, 16, 24) if self.suffix != ".mp4" else clip(seed)

    def write(self, path: Path, pixels: Tensor, fps: float = 8.0) -> None:
        if pixels.ndim == 4:
            write_video(path, pixels, fps)
        else:
            write_image(path, pixels)

    def add(self, kind: str = "", **keys: Any) -> tuple[Path, Path]:
        """A row whose files are good; what is wrong with it goes into ``keys`` or is done to the files."""
        row = len(self.lines)
        chosen, rejected = self.paths(row)
        self.write(chosen, self.pixels(2 * row))
        self.write(rejected, self.pixels(2 * row + 1))
        value = {
            "prompt": f"prompt {row}",
            "chosen": str(chosen.relative_to(self.folder)),
            "rejected": str(rejected.relative_to(self.folder)),
        }
        self.lines.append({key: item for key, item in (value | keys).items() if item is not None})
        if kind:
            self.planted[row] = kind
        return chosen, rejected

    def add_line(self, kind: str, line: str) -> None:
        self.planted[len(self.lines)] = kind
        self.lines.append(line)

    def save(self) -> Path:
        return write_lines(self.folder / "pairs.jsonl", self.lines)


def faulty_images(folder: Path) -> Builder:
    """Every fault that a JSONL set of images can have, behind clean rows."""
    builder = Builder(folder, rows=CLEAN_ROWS)
    builder.add_line("row", '{"prompt": "a", "chosen": ')
    builder.add_line("row", '["prompt", "chosen", "rejected"]')
    builder.add("row", prompt="\ud800")
    builder.add("row", rejected=None)
    builder.add("row", prompt=None)
    builder.add("row", chosen=7)
    builder.add("row", chosen="")
    builder.add("row", chosen_score="high", rejected_score=1.0)
    builder.add("row", chosen_score=1.0, rejected_score=2.0)
    builder.add("row", chosen_score=int("9" * 400), rejected_score=1)
    builder.add_line("row", '{"prompt": "a", "chosen": ' + "[" * 100_000)
    builder.add("tie", chosen_score=2, rejected_score=2)
    builder.add("caption", prompt=" \n")
    builder.add("missing")[1].unlink()
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        chosen, _ = builder.add("missing")
        chosen.unlink()
        make(chosen)
    cut_short(builder.add("undecodable")[0])
    damage(builder.add("undecodable")[1])
    builder.add("undecodable")[0].write_bytes(b"")
    builder.add("undecodable")[1].write_text("not an image")
    # A JPEG that is cut short, under a PNG's name: the content counts.
    chosen, _ = builder.add("undecodable")
    write_image(chosen.with_suffix(".jpg"), builder.pixels(999))
    chosen.with_suffix(".jpg").replace(chosen)
    cut_short(chosen)
    _, rejected = builder.add("shape")
    write_image(rejected, noise(1000, 3, 24, 16))
    _, rejected = builder.add("resolution")
    write_image(rejected, noise(1001, 3, 32, 48))
    shutil.copy(*builder.add("identical"))
    chosen, rejected = builder.add("duplicate", prompt="prompt 3")
    for source, copy in zip(builder.paths(3), (chosen, rejected), strict=True):
        shutil.copy(source, copy)
    chosen, rejected = builder.add("contradiction", prompt="prompt 4")
    for source, copy in zip(builder.paths(4), (rejected, chosen), strict=True):
        shutil.copy(source, copy)
    shutil.copy(builder.paths(5)[0], builder.add("reused")[0])
    chosen, _ = builder.add("medium")
    write_video(chosen.with_suffix(".mp4"), clip(1002), 8.0)
    chosen.with_suffix(".mp4").replace(chosen)
    _, rejected = builder.add("shift", rejected="lose/900001.png")
    rejected.replace(rejected.with_name("900001.png"))
    chosen, _ = builder.add("alpha")
    write_rgba(chosen, noise(1003, 4, 16, 24))
    _, rejected = builder.add("pixels")
    set_density(rejected, 96, 72)
    write_image(folder / "black.png", torch.zeros(3, 8, 12, dtype=torch.uint8))
    builder.add("mask", error_mask="black.png")
    builder.add("mask", error_mask="win/000000.png")  # a photograph
    write_image(folder / "white.png", torch.full((3, 8, 8), 255, dtype=torch.uint8))
    builder.add("shape", error_mask="white.png")
    builder.add("missing", error_mask="none.png")
    builder.add("key", Error_masks="white.png")
    builder.add("missing", chosen="long" * 100 + ".png")  # no system has files of such names
    builder.lines.append("")  # a line of its own, and no row
    builder.add()
    return builder


def faulty_clips(folder: Path) -> Builder:
    """Every fault that a JSONL set of clips can have when 6 frames are wanted at the files' own rate."""
    builder = Builder(folder, ".mp4", rows=12)
    builder.add("missing")[0].unlink()
    cut_short(builder.add("undecodable")[0])
    builder.add("undecodable")[1].write_bytes(b"\x00\x00\x00\x20ftypisom")
    chosen, _ = builder.add("short")
    write_video(chosen, clip(2000, frames=5), 8.0)
    _, rejected = builder.add("shape")
    write_video(rejected, clip(2001), 16.0)
    _, rejected = builder.add("shape")
    write_video(rejected, clip(2002, height=32), 8.0)
    _, rejected = builder.add("resolution")
    write_video(rejected, clip(2003, height=32, width=32), 8.0)
    _, rejected = builder.add("length")
    write_video(rejected, clip(2004, frames=9), 8.0)
    chosen, _ = builder.add("medium")
    write_image(chosen.with_suffix(".png"), noise(2005, 3, 16, 16))
    chosen.with_suffix(".png").replace(chosen)
    shutil.copy(*builder.add("identical"))
    builder.add("caption", prompt="")
    chosen, _ = builder.add("pixels")  # shown as 16x16, which the other one is
    encode_clip(chosen, clip(2006, width=12), aspect=Fraction(4, 3))
    _, rejected = builder.add("interlaced")
    encode_clip(rejected, clip(2007), options={"flags": "+ildct+ilme", "x264-params": "tff=1"})
    chosen, _ = builder.add("alpha")
    transparent = torch.cat([clip(2008), noise(2009, 6, 1, 16, 16)], dim=1)
    encode_clip(chosen.with_suffix(".mkv"), transparent, codec="ffv1", pix_fmt="bgra")
    chosen.with_suffix(".mkv").replace(chosen)
    return builder


def write_rgba(path: Path, pixels: Tensor) -> None:
    """Writes ``[4, H, W]`` uint8 as a PNG with an alpha channel."""
    from PIL import Image

    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy(), "RGBA").save(path, "PNG")


def set_density(path: Path, across: int, down: int) -> None:
    """Makes an image say how many of its pixels go to an inch."""
    from PIL import Image

    with Image.open(path) as image:
        image.save(path, dpi=(across, down))


def encoded(pixels: Tensor, folder: Path, suffix: str = ".jpg") -> bytes:
    """An image file's bytes."""
    path = folder / f"encoded{suffix}"
    write_image(path, pixels)
    return path.read_bytes()


class PickapicBuilder:
    """Rows under Pick-a-Pic's columns; the first image is preferred in every other row."""

    def __init__(self, folder: Path, rows: int = 0) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.planted: Planted = {}
        for _ in range(rows):
            self.add()

    def add(self, kind: str = "", **columns: Any) -> dict[str, Any]:
        row = len(self.rows)
        value = {
            "are_different": True,
            "best_image_uid": f"{row}-{row % 2}",
            "caption": f"prompt {row}",
            "has_label": True,
            "image_0_uid": f"{row}-0",
            "image_1_uid": f"{row}-1",
            "jpg_0": encoded(noise(2 * row, 3, 16, 24), self.folder),
            "jpg_1": encoded(noise(2 * row + 1, 3, 16, 24), self.folder),
            "label_0": 1.0 - row % 2,
            "label_1": 0.0 + row % 2,
            "ranking_id": row,
        } | columns
        self.rows.append(value)
        if kind:
            self.planted[row] = kind
        return value

    def save(self, path: Path) -> Path:
        from datasets import Dataset

        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(self.rows).to_parquet(str(path))
        return path


def faulty_pickapic(folder: Path) -> PickapicBuilder:
    folder.mkdir(parents=True, exist_ok=True)
    builder = PickapicBuilder(folder, 6)
    builder.add("row", has_label=False)
    builder.add("row", label_0=None, label_1=None)
    builder.add("row", label_0=1.0, label_1=1.0)
    builder.add("row", label_0=0.0, label_1=0.0)
    builder.add("row", label_0=-1.0, label_1=2.0)
    builder.add("row", best_image_uid="somebody-else")
    builder.add("row", label_0=1.0, label_1=0.0, best_image_uid=f"{len(builder.rows)}-1")
    builder.add("row", label_0=0.5, label_1=0.5)  # the uid still names a chosen sample
    builder.add("row", are_different=False)
    builder.add("row", jpg_0=b"")
    builder.add("row", jpg_1=None)
    builder.add("row", caption=None)
    builder.add("tie", label_0=0.5, label_1=0.5, best_image_uid="tie")
    builder.add("caption", caption="")
    whole = encoded(noise(3000, 3, 16, 24), folder)
    builder.add("undecodable", jpg_1=whole[: len(whole) // 2])
    builder.add("undecodable", jpg_0=b"not an image")
    builder.add("shape", jpg_0=encoded(noise(3001, 3, 24, 16), folder))
    builder.add("resolution", jpg_0=encoded(noise(3002, 3, 32, 48), folder))
    builder.add("identical", jpg_0=whole, jpg_1=whole)
    same = builder.rows[0]
    columns = {name: same[name] for name in ("caption", "jpg_0", "jpg_1", "label_0", "label_1")}
    builder.add("duplicate", **columns, best_image_uid=f"{len(builder.rows)}-0")
    swapped = columns | {"label_0": 0.0, "label_1": 1.0}
    builder.add("contradiction", **swapped, best_image_uid=f"{len(builder.rows)}-1")
    builder.add("reused", jpg_0=builder.rows[1]["jpg_0"])
    builder.add()
    return builder


class VideoDpoBuilder:
    """VideoDPO's two lists: clip ``2k`` is pair ``k``'s chosen sample and ``2k + 1`` its rejected sample."""

    def __init__(self, folder: Path, pairs: int = 0) -> None:
        self.folder = folder
        self.clips: list[Any] = []
        self.pairs: list[Any] = []
        self.planted: Planted = {}
        for _ in range(pairs):
            self.add()

    def add(self, kind: str = "", **keys: Any) -> tuple[Path, Path]:
        number = len(self.clips) // 2
        prompt = f"prompt {number}"
        paths = []
        for index, side in enumerate(("winvideos", "losevideos")):
            name = f"{side}/{number:06d}.mp4"
            write_video(self.folder / name, clip(2 * number + index), 8.0)
            paths.append(self.folder / name)
            basic = {"clip_duration": 1.6, "clip_path": name, "globalidx": number}
            self.clips.append({"basic": basic, "misc": {"frame_caption": [prompt]}})
        pair = {"video1": 2 * number, "video2": 2 * number + 1, "label": 0, "frame_caption": prompt}
        self.add_pair(kind, pair | keys)
        return paths[0], paths[1]

    def add_pair(self, kind: str, pair: Any) -> None:
        if kind:
            self.planted[len(self.pairs)] = kind
        self.pairs.append(pair)

    def save(self) -> Path:
        (self.folder / "metadata.json").write_text(json.dumps(self.clips))
        (self.folder / "pair.json").write_text(json.dumps(self.pairs))
        return self.folder


def faulty_videodpo(folder: Path) -> VideoDpoBuilder:
    builder = VideoDpoBuilder(folder, 6)
    builder.add("index", video1=1000)
    builder.add("index", video2=-1)
    builder.add("index", video1=2, video2=3)  # another pair's clips: shifted
    builder.add("index", video1=2 * 9 + 1)  # the rejected sample twice
    builder.add("row", video1="18")
    builder.add("row", frame_caption=7)
    builder.add("row")
    del builder.clips[-1]["basic"]["clip_path"]
    builder.add("index")
    builder.clips[-1]["basic"]["globalidx"] = 5  # captions agree, numbers do not
    builder.add_pair("row", [0, 1])
    builder.add("caption", frame_caption="  ")
    builder.clips[-1]["misc"]["frame_caption"] = builder.clips[-2]["misc"]["frame_caption"] = [""]
    builder.add("missing")[0].unlink()
    cut_short(builder.add("undecodable")[1])
    chosen, _ = builder.add("short")
    write_video(chosen, clip(4000, frames=4), 8.0)
    builder.add_pair("duplicate", dict(builder.pairs[0]))
    builder.add_pair("contradiction", builder.pairs[1] | {"video1": 3, "video2": 2})
    builder.add(frame_caption=[f"prompt  {len(builder.clips) // 2}"])  # a list, and another space: the same caption
    return builder
