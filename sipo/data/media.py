"""Images and clips: reads them completely or not at all and as they are shown, fits them to a size, writes them.

A file that is cut short or damaged is an error that names it. Missing parts are never filled in, neither a damaged
image with grey nor a short clip with repeated frames.
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

from sipo.data.clips import MAX_PIXELS, AtRate, First, Media, MediaError, Numbered, read_clip
from sipo.data.images import read_image
from sipo.files import aside


@dataclass(frozen=True)
class Fitted:
    """Pixels at a size for the VAE.

    Attributes:
        pixels: uint8, shaped as what was fitted, at the new height and width.
        crop_top_left: (top, left) of the crop, in pixels of the resized (and mirrored) image.
        original_size: (height, width) before that: of the upright image, in square pixels.
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
    applied, EXIF data that cannot be read are passed over, and no clip is deinterlaced.

    A clip's frame ``k`` is the one nearest to the time ``k / fps`` after its first, of two equally near ones the
    earlier. The whole file is read, also after the last frame that is needed, to detect one that is cut short.

    Args:
        source: a file, or an encoded image or clip.
        frames: how many; 1 asks for an image, more for a clip.
        fps: frames per second; ``None`` takes the clip's own, frame by frame.
        max_pixels: of an image or a frame; larger ones are refused before anything is decoded.
        transform: makes of an image, or of each frame as soon as it is decoded, what is kept of it: both uint8, the
            former ``[3, H, W]``. So a clip is never in memory at the size that it is stored in.

    Raises:
        MediaError: see there. A clip is never padded and no frame is taken twice.
        ValueError: ``frames``, ``fps`` or ``max_pixels`` make no sense.
    """
    check_request(frames, fps, max_pixels)
    image = read_image(source, max_pixels)
    if image is not None:
        if frames > 1:
            raise MediaError("medium", source, f"is an image, expected a clip of {frames} frames")
        return image if transform is None else replace(image, pixels=transform(image.pixels))
    if frames == 1:
        read_clip(source, First(1, decode_all=True), max_pixels)  # an error if it is no clip either
        raise MediaError("medium", source, "is a clip, expected an image")
    return read_clip(source, First(frames) if fps is None else AtRate(frames, fps), max_pixels, transform)


def check_request(frames: int | None, fps: float | None, max_pixels: int = MAX_PIXELS) -> None:
    """Refuses numbers of frames, rates and limits that nothing can be read with; ``None`` is allowed for the first two.

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
    """Decodes all of an image or a clip, and keeps only the first frame of a clip, ``[1, 3, H, W]``.

    Raises:
        MediaError: missing, undecodable or too large.
    """
    return read_image(source, max_pixels) or read_clip(source, First(1, decode_all=True), max_pixels)


def read_spaced(source: Path | bytes, count: int, *, max_pixels: int = MAX_PIXELS) -> Media:
    """Decodes an image, or ``count`` frames from the middles of equal parts of a clip; all, where it has fewer.

    Raises:
        MediaError: missing, undecodable or too large.
    """
    image = read_image(source, max_pixels)
    if image is not None:
        return image
    length = read_clip(source, First(0), max_pixels).length
    indices = [int((part + 0.5) * length / count) for part in range(count)] if length > count else range(length)
    return read_clip(source, Numbered(indices), max_pixels)


# ---- Fitting ----


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Finds the size nearest in aspect ratio, then in area; the first of equals."""

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
) -> Fitted:
    """Scales to the smallest size that covers the target (bicubic, antialiased, rounded), and crops the rest.

    Args:
        pixels: uint8, ``[3, H, W]`` or ``[F, 3, H, W]``; all frames alike.
        height: wanted, in pixels.
        width: wanted, in pixels.
        center_crop: crop around the center; else at a random place. At most one side is larger than the target.
        flip: mirror left and right, before cropping.
        generator: for a random crop; on the CPU.
    """
    original = (pixels.shape[-2], pixels.shape[-1])
    scale = max(height / original[0], width / original[1])
    covering = (max(height, round(original[0] * scale)), max(width, round(original[1] * scale)))
    over = (covering[0] - height, covering[1] - width)
    if center_crop:
        top, left = over[0] // 2, over[1] // 2
    else:
        top, left = (int(torch.randint(each + 1, (), generator=generator)) for each in over)
    cut = (slice(top, top + height), slice(left, left + width))
    values = pixels.flip(-1) if flip else pixels
    if covering == original:
        return Fitted(values[..., cut[0], cut[1]].contiguous(), (top, left), original)
    fitted = torch.empty(*values.shape[:-2], height, width, dtype=torch.uint8)
    # One colour of one frame at a time, which takes less memory as floats, and half the time.
    for source, target in zip(values.flatten(0, -3), fitted.flatten(0, -3), strict=True):
        plane = source.to(torch.float32)[None, None]
        plane = F.interpolate(plane, covering, mode="bicubic", antialias=True, align_corners=False)[0, 0]
        target.copy_(plane[cut].round().clamp_(0.0, 255.0))
    return Fitted(fitted, (top, left), original)


# ---- Writing ----


def write_image(path: str | Path, pixels: Tensor) -> None:
    """Writes ``[3, H, W]`` uint8 in the format of the path's ending, aside and renamed."""
    from PIL import Image

    _check_pixels(pixels, 3)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with aside(Path(path)) as place:
        image.save(place)


def write_image_grid(path: str | Path, images: Tensor, columns: int | None = None, gap: int = 2) -> None:
    """Writes ``[N, 3, H, W]`` uint8 as one image, row by row, with white between.

    Args:
        path: its ending gives the format.
        images: at least one.
        columns: images side by side; ``None`` makes the grid about square.
        gap: pixels between two.
    """
    _check_pixels(images, 4)
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    grid = torch.full((3, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    write_image(path, grid)


def split_image_grid(path: str | Path, count: int, height: int, width: int, gap: int = 2) -> list[Any]:
    """The ``count`` images, as Pillow has them, of a file that :func:`write_image_grid` has written about square.

    Raises:
        OSError, ValueError: not readable, or not of the size that so many images have.
    """
    from PIL import Image

    if count < 1:
        raise ValueError(f"{path}: expected at least 1 image in it")
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    expected = columns * (width + gap) - gap, rows * (height + gap) - gap
    with Image.open(path) as grid:
        if grid.size != expected:
            raise ValueError(f"{path}: {grid.width}x{grid.height} pixels, expected {expected[0]}x{expected[1]}")
        corners = [((i % columns) * (width + gap), (i // columns) * (height + gap)) for i in range(count)]
        return [grid.crop((left, top, left + width, top + height)) for left, top in corners]


def write_video(path: str | Path, frames: Tensor, fps: float, crf: int = 18) -> None:
    """Writes ``[F, 3, H, W]`` uint8 as H.264 in the container of the path's ending, aside and renamed.

    The same frames give the same bytes (with the same FFmpeg): one thread, no date.

    Args:
        path: ends in ``.mp4`` or another container's name.
        frames: of even height and width, which 4:2:0 colour needs.
        fps: frames per second.
        crf: x264's quality, lower is better.
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
        stream.codec_context.thread_count = 1
        # Without x264's "macroblock tree", with which small frames differ from run to run.
        stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}
        for pixels in frames.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _check_pixels(pixels: Tensor, dimensions: int) -> None:
    shape = "[3, H, W]" if dimensions == 3 else "[N, 3, H, W]"
    if pixels.dtype != torch.uint8 or pixels.ndim != dimensions or pixels.shape[-3] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}, expected torch.uint8 {shape}")
