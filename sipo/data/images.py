"""Decodes images as an image viewer shows them; a damaged or incomplete image is an error.

Orientation and transparency are applied, density and colour profiles are not.
"""

from __future__ import annotations

import io
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipo.data.clips import Media, MediaError, check_pixels, first_bytes, on_background
from sipo.files import FileError, check_regular

# Excludes Pillow's rarer decoders, one of which starts another program.
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Major brands of still images in MP4 containers, which FFmpeg takes for clips of one frame.
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"heim", b"heis", b"mif1")
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_STRIP = 1 << 22  # pixels converted at a time, so that an image takes memory only about twice


def read_image(source: Path | bytes, max_pixels: int) -> Media | None:
    """Reads an image; returns ``None`` if the file is not an image but may be a clip."""
    from PIL import Image, UnidentifiedImageError

    formats = _prepare_pillow(max_pixels)
    if isinstance(source, Path):
        _check_source(source)
    try:
        return _decode_image(source, formats, max_pixels)
    except MediaError:
        raise
    except UnidentifiedImageError:
        start = first_bytes(source, 12)
        brand = start[8:] if start[4:8] == b"ftyp" else b""
        if brand not in _STILL_BRANDS:
            return None
        problem = f"is AVIF or HEIC, expected {', '.join(formats[:-1])} or {formats[-1]}"
        if brand == b"avif" and "AVIF" in formats:
            problem = "cannot be decoded: AVIF that is damaged or cut short"
        raise MediaError("undecodable", source, problem) from None
    except Image.DecompressionBombError as error:  # more than twice as many pixels
        number = re.search(r"\d+", str(error))  # Pillow does not tell height and width
        has = f"{number[0]} pixels" if number else f"more than {max_pixels} pixels"
        raise MediaError("large", source, f"has {has}, expected at most {max_pixels} (max_pixels)") from error
    except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
        if isinstance(error, OSError) and error.errno is not None:  # from the file system, not from Pillow
            raise MediaError("missing", source, f"cannot be read: {error.strerror}") from error
        reason = str(error) or type(error).__name__
        if "MAX_TEXT" in reason:
            reason = "holds more than 64 MB of text"
        raise MediaError("undecodable", source, f"cannot be decoded: {reason}") from error


def _check_source(path: Path) -> None:
    """Refuses anything but a regular file, before anything opens it."""
    try:
        check_regular(path)
    except (OSError, ValueError) as error:
        problem = "no such file"  # also for names that no file can have, with a null byte or an unpaired surrogate
        if isinstance(error, FileError):
            problem = str(error).removeprefix(f"{path}: ")
        elif isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            problem = f"cannot be read: {error.strerror}"
        raise MediaError("missing", path, problem) from error


def _prepare_pillow(max_pixels: int) -> tuple[str, ...]:
    """Sets Pillow's limits, which the process shares with other packages; returns the formats to open."""
    from PIL import Image, ImageFile, PngImagePlugin

    ImageFile.LOAD_TRUNCATED_IMAGES = False  # otherwise missing parts are filled with grey
    if Image.MAX_IMAGE_PIXELS is not None:  # our own limit applies before decoding: no warning below it
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    # Image generators write all of their settings into one chunk. The limit for all text stays at 64 MB.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        from PIL import AvifImagePlugin  # since Pillow 11.3
    except ImportError:
        return _IMAGE_FORMATS
    return (*_IMAGE_FORMATS, "AVIF") if AvifImagePlugin.SUPPORTED else _IMAGE_FORMATS


def _decode_image(source: Path | bytes, formats: tuple[str, ...], max_pixels: int) -> Media | None:
    """Reads an image like :func:`read_image`, with the errors that Pillow raises."""
    from PIL import Image

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
        check_pixels(source, image.height, image.width, max_pixels)
        if getattr(image, "is_animated", False):
            if image.format in ("GIF", "AVIF"):
                return None
            if image.format != "MPO":  # its first image is the photograph
                count, kind = getattr(image, "n_frames", 2), image.format
                problem = f"holds {count} images in one {kind} file, expected one image, or a clip as GIF or video"
                raise MediaError("medium", source, problem)
        aspect = _pixel_aspect(image)
        if image.format == "PNG":
            _scale_transparent_colour(image)
        image.load()
        if image.mode in _DEEP_MODES:
            raise ValueError(f"has mode {image.mode}, expected 8 bits a channel")
        method = _orientation(image)
    upright = image if method is None else image.transpose(method)
    del image
    transparent = upright.has_transparency_data
    if transparent and upright.mode == "1":  # older Pillow drops the transparency of such an image
        key = upright.info["transparency"]
        upright = upright.convert("L")
        upright.info["transparency"] = 255 if key else 0
    pixels, share = _pixels(upright, transparent)
    return Media(pixels, (pixels.shape[-2], pixels.shape[-1]), pixel_aspect=aspect, transparent=share)


def _orientation(image: Any) -> Any:
    """Finds the ``PIL.Image.Transpose`` that turns an image upright; ``None`` if it is or EXIF is unreadable."""
    from PIL import ExifTags, Image

    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # too short, or not EXIF: viewers show such an image unchanged
        return None
    turns = Image.Transpose
    # Numbered from 1, which is upright.
    methods = (
        None,
        turns.FLIP_LEFT_RIGHT,
        turns.ROTATE_180,
        turns.FLIP_TOP_BOTTOM,
        turns.TRANSPOSE,
        turns.ROTATE_270,
        turns.TRANSVERSE,
        turns.ROTATE_90,
    )
    return methods[orientation - 1] if orientation in range(1, 9) else None


def _pixels(image: Any, transparent: bool) -> tuple[Tensor, float]:
    """Returns uint8 ``[3, H, W]`` on the background, and the share of transparent pixels."""
    pixels = torch.empty(3, image.height, image.width, dtype=torch.uint8)
    rows = max(1, _STRIP // image.width)
    hidden = 0.0
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        # RGBA also where a single colour is transparent, or some colours of a palette.
        colours = strip.convert("RGBA" if transparent else "RGB")
        flat = torch.frombuffer(bytearray(colours.tobytes()), dtype=torch.uint8)
        part = flat.view(colours.height, colours.width, -1)
        shown, share = on_background(part) if transparent else (part.permute(2, 0, 1), 0.0)
        pixels[:, top : top + colours.height] = shown
        hidden += share * colours.height
    return pixels, hidden / image.height


def _scale_transparent_colour(image: Any) -> None:
    """Scales a PNG's transparent colour to 8 bits: Pillow scales only the pixels."""
    key, stored = image.info.get("transparency"), image.tile[0][3]
    if key is None:
        return
    if stored == "RGB;16B":
        raise ValueError("has a transparent colour of 16 bits, expected an alpha channel, or 8 bits a channel")
    image.info["transparency"] = {"L;2": 85, "L;4": 17}.get(stored, 1) * key if isinstance(key, int) else key


def _pixel_aspect(image: Any) -> Fraction:
    """Returns width over height of a pixel, from an image's densities; 1 if they differ by less than 2 % (rounding)."""
    # A JPEG or PNG without a unit has no "dpi", but a ratio.
    density = image.info.get("dpi") or image.info.get("jfif_density") or image.info.get("aspect") or (1, 1)
    try:
        across, down = map(float, density)
    except ZeroDivisionError:  # a rational number of 0/0
        return Fraction(1)
    if not (0 < across < math.inf and 0 < down < math.inf) or abs(down / across - 1) < 0.02:
        return Fraction(1)
    return Fraction(down / across).limit_denominator(100)
