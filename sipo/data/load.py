"""Loads a pair, and decides whether it can be used in training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sipo.data.media import MAX_PIXELS, Media, MediaError, probe_media, read_media
from sipo.data.records import PairRecord

RATIO_TOLERANCE = 0.02
"""Relative difference up to which aspect ratios count as equal: sizes are rounded to multiples that models require."""

CUT_TOLERANCE = 0.1
"""Share of a condition image's area that may be cut away, so that it has the shape of its samples, unremarked."""

_RATE_TOLERANCE = 0.01
_GREY_TOLERANCE = 8  # between an error mask's colours: JPEG rounds


class BadPairError(ValueError):
    """A pair that cannot be used in training; the message is one line.

    Attributes:
        kind: a key of :data:`sipo.data.check.SKIPPED`, or "crop" for what only the crop shows.
    """

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


def load_pair(
    record: PairRecord,
    *,
    frames: int | None = 1,
    fps: float | None = None,
    max_pixels: int = MAX_PIXELS,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Media, Media]:
    """Decodes both samples of a pair.

    Args:
        record: from a reader.
        frames: number of frames of a clip; 1 for images; ``None`` accepts both, decodes whole files, and keeps only
            first frames.
        fps: rate that clips are read at; ``None`` takes each file's own.
        max_pixels: of an image or a frame.
        transform: as for :func:`sipo.data.media.read_media`, applied to the chosen sample first; not without
            ``frames``.

    Returns:
        The chosen sample and the rejected one. They may differ in resolution, not in aspect ratio.

    Raises:
        BadPairError: faulty row, tie, empty caption, missing or undecodable file, clip too short, different aspect
            ratios or (without ``fps``) frame rates, or twice the same picture.
    """
    if record.problem:
        raise BadPairError(record.problem_kind, record.problem)
    if record.tie:
        raise BadPairError("tie", "neither is preferred")
    if not record.prompt.strip():
        raise BadPairError("caption", "the caption is empty")
    chosen, rejected = _read_samples(record, frames, fps, max_pixels, transform)
    if (chosen.fps is None) != (rejected.fps is None):
        raise BadPairError("medium", "one is an image and the other a clip")
    _check_shape("rejected", rejected, chosen)
    if fps is None and chosen.fps and rejected.fps and abs(chosen.fps / rejected.fps - 1.0) > _RATE_TOLERANCE:
        raise BadPairError("shape", f"chosen has {chosen.fps:g} frames per second and rejected {rejected.fps:g}")
    alike = chosen.length == rejected.length and torch.equal(chosen.pixels, rejected.pixels)
    if alike and frames is None and chosen.fps is not None:
        # Both clips may start from one image, and only first frames were kept.
        alike = file_digest(record.chosen) == file_digest(record.rejected)
    elif alike and transform is not None:  # the samples may differ where the transform makes them equal
        one, other = _read_samples(record, frames, fps, max_pixels, hashed)
        alike = torch.equal(one.pixels, other.pixels)
    if alike:
        shown = ", with transparent pixels shown on white" if chosen.transparent or rejected.transparent else ""
        raise BadPairError("identical", f"chosen and rejected are the same{shown}")
    return chosen, rejected


def load_condition_image(
    record: PairRecord, *, max_pixels: int = MAX_PIXELS, transform: Callable[[Tensor], Tensor] | None = None
) -> Media | None:
    """Decodes the image that both samples of a pair are edits of; ``None`` if there is none.

    Args:
        record: from a reader.
        max_pixels: of the image.
        transform: as for :func:`sipo.data.media.read_media`.

    Raises:
        BadPairError: missing or undecodable, a clip, or of too many pixels.
    """
    if record.condition_image is None:
        return None
    try:
        return read_media(record.condition_image, max_pixels=max_pixels, transform=transform)
    except MediaError as error:
        raise BadPairError(error.kind, f"condition_image: {error}") from error


def is_cut(condition_image: Media, chosen: Media) -> bool:
    """Tells whether a condition image loses much of its area where it is given its samples' shape."""
    return _ratio_difference(condition_image.size, chosen.size) > -math.log1p(-CUT_TOLERANCE)


def load_error_mask(
    record: PairRecord,
    chosen: Media,
    *,
    max_pixels: int = MAX_PIXELS,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """Decodes the image that says where a pair's errors count; ``None`` if there is none.

    Args:
        record: from a reader.
        chosen: the chosen sample, whose shape it must have.
        max_pixels: of the image.
        transform: as for :func:`sipo.data.media.read_media`.

    Returns:
        uint8 ``[H, W]``: 255 where errors count, 0 where they do not.

    Raises:
        BadPairError: missing or undecodable, a clip, or of too many pixels; of another aspect ratio than the sample;
            with colours or transparent pixels; black throughout, or in the crop.
    """
    source = record.error_mask
    if source is None:
        return None
    try:
        mask = read_media(source, max_pixels=max_pixels, transform=transform)
        _check_shape("error_mask", mask, chosen)
        least, most = mask.pixels.aminmax(dim=0)
        if mask.transparent or (most - least).max() > _GREY_TOLERANCE:
            what = "transparent pixels" if mask.transparent else "colours"
            raise MediaError("mask", source, f"has {what}, expected white where errors count, else black or grey")
        if not most.any():
            black = transform is None or not read_media(source, max_pixels=max_pixels).pixels.any()
            where = "" if black else " in the crop that is trained on"
            problem = f"is all black{where}, expected white where errors count"
            raise MediaError("mask" if black else "crop", source, problem)
    except MediaError as error:
        raise BadPairError(error.kind, f"error_mask: {error}") from error
    return most


def _check_shape(name: str, image: Media, chosen: Media) -> None:
    if _ratio_difference(image.size, chosen.size) > math.log1p(RATIO_TOLERANCE):
        raise BadPairError(
            "shape",
            f"chosen is {format_size(chosen.size)} and {name} {format_size(image.size)}, expected one aspect ratio",
        )


def _ratio_difference(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Compares aspect ratios by the logarithm of their quotient."""
    return abs(math.log(one[0] * other[1] / (one[1] * other[0])))


def _read_samples(
    record: PairRecord,
    frames: int | None,
    fps: float | None,
    max_pixels: int,
    transform: Callable[[Tensor], Tensor] | None,
) -> list[Media]:
    samples = []
    for name, source in (("chosen", record.chosen), ("rejected", record.rejected)):
        try:
            if frames is None:
                samples.append(probe_media(source, max_pixels=max_pixels))
            else:
                samples.append(read_media(source, frames, fps, max_pixels=max_pixels, transform=transform))
        except MediaError as error:
            raise BadPairError(error.kind, f"{name}: {error}") from error
    return samples


def hashed(pixels: Tensor) -> Tensor:
    """Hashes shape and pixels of an image or a frame to ``[32]`` uint8, as a ``transform`` for comparison."""
    state = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    state.update(pixels.contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(state.digest()), dtype=torch.uint8)


def file_digest(source: Path | bytes) -> bytes:
    """Hashes a file, or an encoded image's bytes, to 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, bytes):
        digest.update(source)
        return digest.digest()
    try:
        with source.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:  # the file was decoded a moment ago, but was removed since
        raise BadPairError("missing", f"{source}: cannot be read: {error.strerror}") from error
    return digest.digest()


def format_size(size: tuple[int, ...]) -> str:
    """Formats a size for a message: ``480x720``."""
    return f"{size[0]}x{size[1]}"
