"""Reads images and clips as they are shown, resizes them, and writes them.

A damaged or incomplete file is an error that names it. Missing parts are never filled in, neither a damaged image with
grey nor a short clip with repeated frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sipo.data.clips import MAX_PIXELS, FirstFrames, FramesAtRate, FramesByIndex, Media, MediaError, read_clip
from sipo.data.images import read_image
from sipo.files import aside

_GAP = 2  # pixels between the images of a grid


@dataclass(frozen=True)
class FittedPixels:
    """Pixels that were resized and cropped for the VAE.

    Attributes:
        pixels: uint8, with the new height and width; the other dimensions are unchanged.
        crop_top_left: (top, left) of the crop, in pixels of the resized (and mirrored) image.
        original_size: (height, width) of the upright image before resizing, in square pixels.
    """

    pixels: Tensor
    crop_top_left: tuple[int, int]
    original_size: tuple[int, int]


# ---- Reading ----


def read_media(
    source: Path | bytes,
    frames: int = 1,
    fps: float | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Media:
    """Decodes an image, or a clip's first frames at a rate.

    Both are read as they are shown. An image is turned by its EXIF orientation; a clip is turned or mirrored by its
    display matrix, and scaled to square pixels by its sample aspect ratio (the shorter side is enlarged). Transparent
    pixels are composited over :data:`sipo.data.clips.BACKGROUND`. An image's density and colour profile are not
    applied, unreadable EXIF data are ignored, and no clip is deinterlaced.

    A clip's frame ``k`` is the one nearest to the time ``k / fps`` after its first; of two equally near ones it is the
    earlier. The whole file is read, even after the last frame that is needed, to detect one that is cut short.

    Args:
        source: a file, or an encoded image or clip.
        frames: number of frames; 1 reads an image, more read a clip.
        fps: frames per second; ``None`` takes the clip's own, frame by frame.
        max_pixels: of an image or a frame; larger ones are refused before anything is decoded.
        transform: applied to an image, or to each frame as soon as it is decoded, so that a clip is never in memory at
            its stored size. Takes uint8 ``[3, H, W]`` and returns uint8.

    Raises:
        MediaError: the file cannot be used. A clip is never padded, and no frame is used twice.
        ValueError: ``frames``, ``fps`` or ``max_pixels`` is out of range.
    """
    check_request(frames, fps, max_pixels)
    image = read_image(source, max_pixels)
    if image is not None:
        if frames > 1:
            raise MediaError("medium", source, f"is an image, expected a clip of {frames} frames")
        return image if transform is None else replace(image, pixels=transform(image.pixels))
    if frames == 1:
        read_clip(source, FirstFrames(1, decode_all=True), max_pixels)  # raises if it is not a clip either
        raise MediaError("medium", source, "is a clip, expected an image")
    return read_clip(source, FirstFrames(frames) if fps is None else FramesAtRate(frames, fps), max_pixels, transform)


def check_request(frames: int | None, fps: float | None, max_pixels: int = MAX_PIXELS) -> None:
    """Refuses numbers of frames, rates and limits that are out of range; the first two may be ``None``.

    Raises:
        ValueError: ``frames`` or ``max_pixels`` below 1, or ``fps`` that is not a finite number > 0.
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels={max_pixels}: expected at least 1")
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: expected at least 1")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps={fps:g}: expected a finite number > 0")


def probe_media(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Media:
    """Decodes a whole image or clip, and keeps only the first frame of a clip, ``[1, 3, H, W]``.

    Raises:
        MediaError: missing, undecodable or too large.
    """
    return read_image(source, max_pixels) or read_clip(source, FirstFrames(1, decode_all=True), max_pixels)


def read_spaced(source: Path | bytes, count: int, *, max_pixels: int = MAX_PIXELS) -> Media:
    """Decodes an image, or ``count`` frames from the middles of equal parts of a clip; all frames if it has fewer.

    Raises:
        MediaError: missing, undecodable or too large.
    """
    image = read_image(source, max_pixels)
    if image is not None:
        return image
    length = read_clip(source, FirstFrames(0), max_pixels).length
    indices = [int((part + 0.5) * length / count) for part in range(count)] if length > count else range(length)
    return read_clip(source, FramesByIndex(indices), max_pixels)


# ---- Fitting ----


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Finds the size nearest in aspect ratio, then in area; the first of several equally near."""

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        # Computed from integers, so that sizes of one ratio give exactly equal values.
        ratio = (size[0] * width) / (size[1] * height)
        return abs(math.log(ratio)), abs(math.log((size[0] * size[1]) / (height * width)))

    return min(sizes, key=distance)


def resize_and_crop(
    pixels: Tensor,
    height: int,
    width: int,
    *,
    center_crop: bool = True,
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> FittedPixels:
    """Resizes to the smallest size that covers the target (bicubic, antialiased, rounded), and crops to the target.

    Args:
        pixels: uint8, ``[3, H, W]`` or ``[F, 3, H, W]``; all frames are cropped alike.
        height, width: the target, in pixels.
        center_crop: crop around the center; else at a random place. At most one side is larger than the target.
        flip: swap left and right, before cropping.
        generator: for a random crop; on the CPU. In one state, it cuts images of one aspect ratio alike.
    """
    original = (pixels.shape[-2], pixels.shape[-1])
    scale = max(height / original[0], width / original[1])
    covering = (max(height, round(original[0] * scale)), max(width, round(original[1] * scale)))
    over = (covering[0] - height, covering[1] - width)
    if center_crop:
        top, left = over[0] // 2, over[1] // 2
    else:
        # As a share of the range, so that images whose scaled sizes differ by a pixel are cut at most a pixel apart.
        shares = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        top, left = (int(share * (each + 1)) for share, each in zip(shares, over, strict=True))
    cut = (slice(top, top + height), slice(left, left + width))
    values = pixels.flip(-1) if flip else pixels
    if covering == original:
        return FittedPixels(values[..., cut[0], cut[1]].contiguous(), (top, left), original)
    fitted = torch.empty(*values.shape[:-2], height, width, dtype=torch.uint8)
    # One colour of one frame at a time: less memory for floats, and half the time.
    for source, target in zip(values.flatten(0, -3), fitted.flatten(0, -3), strict=True):
        plane = source.to(torch.float32)[None, None]
        plane = F.interpolate(plane, covering, mode="bicubic", antialias=True, align_corners=False)[0, 0]
        target.copy_(plane[cut].round().clamp_(0.0, 255.0))
    return FittedPixels(fitted, (top, left), original)


# ---- Writing ----


def write_image(path: str | Path, pixels: Tensor) -> None:
    """Writes ``[3, H, W]`` uint8 in the format of the path's ending, aside and renamed."""
    from PIL import Image

    _check_pixels(pixels, 3)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with aside(Path(path)) as place:
        image.save(place)


def write_image_grid(path: str | Path, images: Tensor) -> None:
    """Writes ``[N, 3, H, W]`` uint8, N at least 1, as one about square image, row by row, with white gaps."""
    _check_pixels(images, 4)
    count, _, height, width = images.shape
    size, corners = _grid(count, height, width)
    grid = torch.full((3, size[1], size[0]), 255, dtype=torch.uint8)
    for image, (left, top) in zip(images, corners, strict=True):
        grid[:, top : top + height, left : left + width] = image
    write_image(path, grid)


def split_image_grid(path: str | Path, count: int, height: int, width: int) -> list[Any]:
    """Reads the ``count`` images in a file of :func:`write_image_grid`, as Pillow images.

    Raises:
        OSError, ValueError: not readable, or not of the size that so many images have.
    """
    from PIL import Image

    if count < 1:
        raise ValueError(f"{path}: expected at least 1 image in it")
    expected, corners = _grid(count, height, width)
    with Image.open(path) as grid:
        if grid.size != expected:
            raise ValueError(f"{path}: {grid.width}x{grid.height} pixels, expected {expected[0]}x{expected[1]}")
        return [grid.crop((left, top, left + width, top + height)) for left, top in corners]


def _grid(count: int, height: int, width: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Lays out a grid of images: its (width, height), and (left, top) of each image."""
    columns = math.ceil(math.sqrt(count))
    across, down = width + _GAP, height + _GAP
    corners = [((index % columns) * across, (index // columns) * down) for index in range(count)]
    return (columns * across - _GAP, math.ceil(count / columns) * down - _GAP), corners


def write_video(path: str | Path, frames: Tensor, fps: float) -> None:
    """Writes ``[F, 3, H, W]`` uint8 as H.264 in the container of the path's ending, aside and renamed.

    Height and width are even, as 4:2:0 colour needs. The same frames give the same bytes (with the same FFmpeg).
    """
    import av

    _check_pixels(frames, 4)
    height, width = frames.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"frames are {height}x{width}, expected even sides")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as place, av.open(f"file:{place}", "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # One thread, and no "macroblock tree": otherwise frames differ from run to run.
        stream.codec_context.thread_count = 1
        stream.options = {"crf": "18", "x264-params": "mbtree=0"}
        for pixels in frames.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _check_pixels(pixels: Tensor, dimensions: int) -> None:
    shape = "[3, H, W]" if dimensions == 3 else "[N, 3, H, W]"
    if pixels.dtype != torch.uint8 or pixels.ndim != dimensions or pixels.shape[-3] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}, expected torch.uint8 {shape}")
