"""Images and clips: reads them completely or not at all and as they are shown, fits them to a size, writes them.

A file that is cut short or damaged is an error that names it. Missing parts are never filled in, neither a damaged
image with grey nor a short clip with repeated frames.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sipo.data.clips import AtRate, First, Media, MediaError, Numbered, as_stream, on_background, read_clip

# A list of formats, so that none of Pillow's rarer decoders is used (one of which starts another program).
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Brands of still images in MP4's container, which FFmpeg takes for clips of one frame.
_AVIF_OR_HEIC = (b"avif", b"heic", b"heix", b"heim", b"heis", b"mif1")
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


@dataclass(frozen=True)
class Fitted:
    """Pixels at a size for the VAE.

    Attributes:
        pixels: float32 in [-1, 1], shaped as what was fitted, at the new height and width.
        crop_top_left: (top, left) of the crop, in pixels of the resized (and mirrored) image.
        original_size: (height, width) before that: of the upright image, in square pixels.
    """

    pixels: Tensor
    crop_top_left: tuple[int, int]
    original_size: tuple[int, int]


# ---- Reading ----


def read_media(source: Path | bytes, frames: int = 1, fps: float | None = None) -> Media:
    """Decodes an image, or a clip's first frames at a rate.

    Both are read as they are shown. An image is turned by its EXIF orientation; a clip is turned or mirrored by its
    display matrix, and scaled to square pixels by its sample aspect ratio (the shorter side is enlarged). Transparent
    pixels are composited over :data:`sipo.data.clips.BACKGROUND`. An image's density and colour profile are not
    applied, and no clip is deinterlaced.

    A clip's frame ``k`` is the one nearest to the time ``k / fps`` after its first, of two equally near ones the
    earlier. The whole file is read, also after the last frame that is needed, to detect one that is cut short.

    Args:
        source: a file, or an encoded image or clip.
        frames: how many; 1 asks for an image, more for a clip.
        fps: frames per second; ``None`` takes the clip's own, frame by frame.

    Raises:
        MediaError: see there. A clip is never padded and no frame is taken twice.
        ValueError: ``frames`` or ``fps`` make no sense.
    """
    check_request(frames, fps)
    image = _read_image(source)
    if image is not None:
        if frames > 1:
            raise MediaError("medium", source, f"is an image, expected a clip of {frames} frames")
        return image
    if frames == 1:
        read_clip(source, First(1, decode_all=True))  # an error if it is no clip either
        raise MediaError("medium", source, "is a clip, expected an image (frames=1)")
    return read_clip(source, First(frames) if fps is None else AtRate(frames, fps))


def check_request(frames: int | None, fps: float | None) -> None:
    """Refuses numbers of frames and rates that no clip can be read with; ``None`` is allowed for both.

    Raises:
        ValueError: ``frames`` below 1, or ``fps`` that is not a finite number > 0.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: expected at least 1")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps={fps:g}: expected a finite number > 0")


def probe_media(source: Path | bytes) -> Media:
    """Decodes all of an image or a clip, and keeps only the first frame of a clip, ``[1, 3, H, W]``.

    Raises:
        MediaError: missing or undecodable.
    """
    return _read_image(source) or read_clip(source, First(1, decode_all=True))


def read_spaced(source: Path | bytes, count: int) -> Media:
    """Decodes an image, or ``count`` frames from the middles of equal parts of a clip; all, where it has fewer.

    Raises:
        MediaError: missing or undecodable.
    """
    image = _read_image(source)
    if image is not None:
        return image
    length = read_clip(source, First(0)).length
    indices = [int((part + 0.5) * length / count) for part in range(count)] if length > count else range(length)
    return read_clip(source, Numbered(indices))


def _read_image(source: Path | bytes) -> Media | None:
    """An image, or ``None`` where the file is not an image but may be a clip."""
    from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

    # Another package may have set it: the missing part of a damaged image would be grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        if isinstance(source, Path) and not source.is_file():
            raise MediaError("missing", source, "no such file")
        image = Image.open(as_stream(source), formats=_IMAGE_FORMATS)
    except UnidentifiedImageError:
        if _brand(source) in _AVIF_OR_HEIC:
            expected = f"expected {', '.join(_IMAGE_FORMATS[:-1])} or {_IMAGE_FORMATS[-1]}"
            raise MediaError("undecodable", source, f"is AVIF or HEIC, {expected}") from None
        return None
    except (OSError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the file system, not from Pillow
            raise MediaError("missing", source, f"cannot be read: {error.strerror}") from error
        raise MediaError("undecodable", source, f"cannot be decoded: {error}") from error
    try:
        with image:
            count = getattr(image, "n_frames", 1)
            if count > 1 and image.format == "GIF":
                return None
            if count > 1 and image.format != "MPO":  # its first image is the photograph
                raise MediaError(
                    "medium",
                    source,
                    f"holds {count} images in one {image.format} file, expected one image, or a clip as GIF or video",
                )
            aspect = _pixel_aspect(image)
            if image.format == "PNG":
                _scale_transparent_colour(image)
            image.load()
            if image.mode in _DEEP_MODES:
                raise ValueError(f"has mode {image.mode}, expected 8 bits a channel")
            upright = ImageOps.exif_transpose(image)
            transparent = upright.has_transparency_data
            if transparent and upright.mode == "1":  # older Pillow keeps no transparency of such an image
                key = upright.info["transparency"]
                upright = upright.convert("L")
                upright.info["transparency"] = 255 if key else 0
            # RGBA also where a single colour is transparent, or some colours of a palette.
            colours = upright.convert("RGBA" if transparent else "RGB")
    except MediaError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
        raise MediaError("undecodable", source, f"cannot be decoded: {error}") from error
    flat = torch.frombuffer(bytearray(colours.tobytes()), dtype=torch.uint8)
    pixels = flat.view(colours.height, colours.width, -1)
    pixels, share = on_background(pixels) if transparent else (pixels.permute(2, 0, 1), 0.0)
    return Media(pixels.contiguous(), pixel_aspect=aspect, transparent=share)


def _brand(source: Path | bytes) -> bytes:
    """The major brand of a file in MP4's container; empty for other files."""
    start = source[:12] if isinstance(source, bytes) else b""
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(12)
    return start[8:] if start[4:8] == b"ftyp" else b""


def _scale_transparent_colour(image: Any) -> None:
    """Scales a PNG's transparent colour to 8 bits, as Pillow does with the pixels, but not with this colour."""
    key, stored = image.info.get("transparency"), image.tile[0][3]
    if key is None:
        return
    if stored == "RGB;16B":
        raise ValueError("has a transparent colour of 16 bits, expected an alpha channel, or 8 bits a channel")
    image.info["transparency"] = {"L;2": 85, "L;4": 17}.get(stored, 1) * key if isinstance(key, int) else key


def _pixel_aspect(image: Any) -> Fraction:
    """Width over height of a pixel, from an image's densities; 1 where they differ by less than 2 % (rounding)."""
    # A JPEG or PNG without a unit has no "dpi", but a ratio.
    density = image.info.get("dpi") or image.info.get("jfif_density") or image.info.get("aspect") or (1, 1)
    try:
        across, down = map(float, density)
    except ZeroDivisionError:  # a rational number of 0/0
        return Fraction(1)
    if not (0 < across < math.inf and 0 < down < math.inf) or abs(down / across - 1) < 0.02:
        return Fraction(1)
    return Fraction(down / across).limit_denominator(100)


# ---- Fitting ----


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size nearest in aspect ratio, and among equals in area; the first of equals."""

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        # Computed from integers, so that sizes of one ratio give exactly equal values.
        ratio = (size[0] * width) / (size[1] * height)
        return abs(math.log(ratio)), abs(math.log((size[0] * size[1]) / (height * width)))

    return min(sizes, key=distance)


def fit(
    pixels: Tensor,
    height: int,
    width: int,
    *,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> Fitted:
    """Scales to the smallest size that covers the target (bicubic, antialiased), and crops the rest.

    Args:
        pixels: uint8, ``[3, H, W]`` or ``[F, 3, H, W]``; all frames alike.
        height: wanted, in pixels.
        width: wanted, in pixels.
        crop: position of the crop; at most one side is larger than the target.
        flip: mirror left and right, before cropping.
        generator: for a random crop; on the CPU.
    """
    if crop not in ("center", "random"):
        raise ValueError(f"crop={crop!r}: expected 'center' or 'random'")
    original = (pixels.shape[-2], pixels.shape[-1])
    scale = max(height / original[0], width / original[1])
    covering = (max(height, round(original[0] * scale)), max(width, round(original[1] * scale)))
    values = pixels.to(torch.float32)
    if flip:
        values = values.flip(-1)
    if covering != original:
        frames = values if values.ndim == 4 else values[None]
        frames = F.interpolate(frames, covering, mode="bicubic", antialias=True, align_corners=False)
        values = (frames if values.ndim == 4 else frames[0]).clamp_(0.0, 255.0)
    over = (covering[0] - height, covering[1] - width)
    if crop == "random":
        top, left = (int(torch.randint(each + 1, (), generator=generator)) for each in over)
    else:
        top, left = over[0] // 2, over[1] // 2
    values = values[..., top : top + height, left : left + width]
    return Fitted((values / 127.5 - 1.0).contiguous(), (top, left), original)


# ---- Writing ----


def write_image(path: str | Path, pixels: Tensor) -> None:
    """Writes ``[3, H, W]`` uint8 in the format of the path's ending, aside and renamed."""
    from PIL import Image

    _check_pixels(pixels, 3)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    with _aside(Path(path)) as aside:
        image.save(aside)


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
    with _aside(path) as aside, av.open(str(aside), "w") as container:
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


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A temporary path with the same suffix; renamed on success, removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
