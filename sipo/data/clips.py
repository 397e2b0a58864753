"""Decodes clips as a player shows them; a damaged or incomplete clip is an error.

FFmpeg conceals damaged areas and accepts truncated files. Here both are errors, as far as the format lets a decoder
detect them. The sample aspect ratio, the display matrix and transparency are applied.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sipo.files import LFS_POINTER
from sipo.processes import is_out_of_memory

# No playlists, for which FFmpeg opens other files, nor text files that it takes for images because of their names.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc",
}

BACKGROUND = 255
"""Red, green and blue level behind transparent pixels: white, as in most image viewers."""

MAX_PIXELS = 120_000_000
"""Default limit of pixels in an image or a frame: as many as the largest cameras have; 360 MB decoded."""

_FRAMES_AT_FIRST = 128  # most frames for which memory is allocated in advance
_WIDEST_PIXEL = 4  # largest sample aspect ratio, or its inverse: beyond that a file is damaged, and takes much memory

# For transparent WebM clips: FFmpeg's own decoders drop the alpha channel, which uncovers hidden colours.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

Kind = Literal["missing", "undecodable", "large", "medium", "short", "rate", "mask", "crop"]


class MediaError(ValueError):
    """An image or a clip that cannot be used; the message is one line that names it.

    Attributes:
        kind: "missing": the file does not exist or cannot be read; "undecodable": damaged, cut short, or of an unknown
            format; "large": too many pixels; "medium": an image in place of a clip, a clip in place of an image, or
            several images in one file; "short": too few frames; "rate": too few frames per second, throughout or in
            one place; "mask": an image that cannot be an error mask; "crop": its crop cannot.
    """

    def __init__(self, kind: Kind, source: Path | bytes, problem: str) -> None:
        name = str(source) if isinstance(source, Path) else f"{len(source)} bytes in memory"
        name = name if name.isprintable() else repr(name)  # line breaks, and characters that cannot be printed
        super().__init__(f"{name}: {' '.join(problem.split())}")
        self.kind = kind


@dataclass(frozen=True)
class Media:
    """A decoded image or clip.

    Attributes:
        pixels: uint8, ``[3, H, W]`` for an image, ``[F, 3, H, W]`` for a clip: upright, transparent pixels on
            :data:`BACKGROUND`, and a clip's scaled to be square; or the output of the reader's ``transform``.
        size: (height, width) in pixels before any ``transform``.
        fps: frames per second of ``pixels``; ``None`` for an image.
        length: frames in the file, of which ``pixels`` may be the first few; 1 for an image.
        pixel_aspect: width over height of a stored pixel, according to the file. Clips are scaled by it; images are
            not, as in browsers and image viewers.
        transparent: share of ``pixels`` that are transparent in the file, wholly or partly.
        interlaced: whether any of the frames is interlaced; ``pixels`` are not deinterlaced.
    """

    pixels: Tensor
    size: tuple[int, int]
    fps: float | None = None
    length: int = 1
    pixel_aspect: Fraction = Fraction(1)
    transparent: float = 0.0
    interlaced: bool = False


class FirstFrames:
    """Selects the first ``frames`` frames.

    Selections share these attributes: ``frames``, how many frames to select; ``selected``, the PyAV frames so far, each
    of which the reader replaces by ``None`` once it has the pixels; ``done``, whether the rest need not be decoded.
    """

    def __init__(self, frames: int, decode_all: bool = False) -> None:
        self.selected: list[Any] = []
        self.frames = frames
        self.decode_all = decode_all
        self.done = frames == 0

    def offer(self, frame: Any, time: float) -> None:
        """Selects the next frame or not; ``time`` is in seconds after the first."""
        if len(self.selected) < self.frames:
            self.selected.append(frame)
        self.done = len(self.selected) >= self.frames and not self.decode_all

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        """Returns the rate of the selected frames, after the last; raises a :class:`MediaError` if one is missing."""
        if len(self.selected) < self.frames:
            raise MediaError("short", source, f"has {len(self.selected)} frames, expected {self.frames}")
        return rate


class FramesByIndex(FirstFrames):
    """Selects the frames with the given indices."""

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__(len(indices))
        self.indices = indices
        self.offered = 0

    def offer(self, frame: Any, time: float) -> None:
        if not self.done and self.offered == self.indices[len(self.selected)]:
            self.selected.append(frame)
        self.offered += 1
        self.done = len(self.selected) == len(self.indices)

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        if not self.done:
            raise MediaError("undecodable", source, f"gave {self.offered} frames, expected {length}")
        return rate * len(self.selected) / length


class FramesAtRate(FirstFrames):
    """Selects the frames nearest to the times ``0, 1/fps, 2/fps, ...``.

    A time halfway between two frames selects the earlier one, as does a time up to a twentieth of their distance later,
    because files round their times (Matroska to milliseconds).
    """

    def __init__(self, frames: int, fps: float) -> None:
        super().__init__(frames)
        self.fps = fps
        self.repeated = False
        self.last: tuple[float, Any] | None = None
        self.last_selected: Any = None
        self.gap = (0.0, 0.0)  # the longest so far: its length and its begin, in seconds

    def offer(self, frame: Any, time: float) -> None:
        if not self.done and self.last is not None:
            self.gap = max(self.gap, (time - self.last[0], self.last[0]), key=lambda gap: gap[0])
        while not self.done and (target := len(self.selected) / self.fps) <= time:
            if self.last is not None and target - self.last[0] <= 0.55 * (time - self.last[0]):
                self._select(self.last[1])
            else:
                self._select(frame)
        self.last = (time, frame)

    def _select(self, frame: Any) -> None:
        self.repeated |= frame is self.last_selected
        self.last_selected = frame
        self.selected.append(frame)
        self.done = len(self.selected) == self.frames or self.repeated

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        # The last frame is shown as long as any other, so it may be the nearest to a time after its own.
        if not self.done and self.last is not None:
            time, frame = self.last
            if len(self.selected) / self.fps - time <= 0.55 / rate and frame is not self.last_selected:
                self._select(frame)
        if self.repeated:
            length_of_gap, begin = self.gap
            problem = f"has {rate:g} frames per second"
            if rate >= self.fps or length_of_gap > 1.5 / rate:  # a variable rate, of which the mean says nothing
                problem = f"has no frame for {length_of_gap:.3g} s after {begin:.3g} s"
            raise MediaError("rate", source, f"{problem}, expected at least {self.fps:g} frames per second")
        if len(self.selected) < self.frames:
            need = f"{self.frames} at {self.fps:g} per second, which take {self.frames / self.fps:.2f} s"
            raise MediaError("short", source, f"has {length} frames in {length / rate:.2f} s, expected {need}")
        return self.fps


def read_clip(
    source: Path | bytes,
    selection: FirstFrames,
    max_pixels: int = MAX_PIXELS,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Media:
    """Decodes the frames of a ``selection``; see :func:`sipo.data.media.read_media`."""
    import av

    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size == 0:
        raise MediaError("undecodable", source, "is empty")
    try:
        try:
            # "file:", because FFmpeg takes what is before a colon for a protocol. Titles need not be UTF-8.
            file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
            opened = av.open(file, "r", options=_OPEN_OPTIONS, metadata_errors="replace")
        except (av.InvalidDataError, av.ArgumentError):  # the latter for formats that are not in the list
            problem = "is no image or clip of a known format, or is cut short"
            if first_bytes(source, len(LFS_POINTER)) == LFS_POINTER:
                problem = "is a Git LFS pointer, expected the file itself: `git lfs pull` fetches it"
            raise MediaError("undecodable", source, problem) from None
        with opened as container:
            stream = container.streams.best("video")
            # If the file ends before its first frame, the stream has no decoder.
            if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
                raise MediaError("undecodable", source, "holds no image and no clip that can be decoded")
            if any(entry.pos + entry.size > size for entry in stream.index_entries):
                raise MediaError("undecodable", source, f"is cut short at {size} bytes")
            decoder: Any = stream.codec_context
            # FFmpeg keeps the case of tag names, and calls Matroska's AlphaMode "alpha_mode".
            tags = {name.lower(): value for name, value in stream.metadata.items()}
            if tags.get("alpha_mode") == "1" and decoder.name in _ALPHA_DECODERS:
                decoder = av.CodecContext.create(_ALPHA_DECODERS[decoder.name], "r")
            check_pixels(source, stream.height, stream.width, max_pixels)
            # By default decoders conceal damage. Frames may be larger than the header says; codecs round sides up.
            decoder.options = {"err_detect": "explode", "max_pixels": str(2 * max_pixels + (1 << 16))}
            decoder.thread_count = 1  # callers decode several files at a time
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            expected = _seconds(tags.get("duration", ""))
            timed = container.format.name != "avi"  # AVI has no presentation times
            length, index, start, end = 0, 0, 0.0, 0.0
            pixels = _ClipPixels(source, selection.frames, stream.sample_aspect_ratio or Fraction(1), transform)
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise MediaError("undecodable", source, f"is damaged or cut short after {length} frames")
                length += packet.size > 0 and not packet.is_discard
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if selection.done:
                    continue
                for frame in decoder.decode(packet):
                    if frame.is_corrupt:
                        raise MediaError("undecodable", source, f"frame {index} is damaged")
                    check_pixels(source, frame.height, frame.width, max_pixels)
                    time = frame.time if timed and frame.time is not None else index / (rate or 1.0)
                    start = time if index == 0 else start
                    selection.offer(frame, time - start)
                    pixels.add(selection.selected)
                    index += 1
            if length == 0 or not rate > 0:
                raise MediaError("undecodable", source, "holds no frames, or no frame rate")
            if end < expected - 2.5 / rate:
                raise MediaError("undecodable", source, f"is cut short after {end:.2f} s of {expected:.2f} s")
            fps = selection.finish(source, length, rate)
            return pixels.media(selection.selected, fps, length)
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
        # Torch raises a RuntimeError if memory does not suffice; its other errors are not the file's fault.
        of_torch = isinstance(error, RuntimeError) and not isinstance(error, av.FFmpegError)
        if isinstance(error, MediaError) or (of_torch and not is_out_of_memory(error)):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError("undecodable", source, f"cannot be decoded: {reason}") from error


def check_pixels(source: Path | bytes, height: int, width: int, max_pixels: int) -> None:
    """Refuses an image or a clip whose header gives too many pixels."""
    if height * width > max_pixels:
        raise MediaError("large", source, f"has {height}x{width} pixels, expected at most {max_pixels} (max_pixels)")


def first_bytes(source: Path | bytes, count: int) -> bytes:
    """Returns the first ``count`` bytes of a file or an encoded image."""
    if isinstance(source, bytes):
        return source[:count]
    with source.open("rb") as file:
        return file.read(count)


def _seconds(clock: str) -> float:
    """Converts ``hh:mm:ss.fraction``, Matroska's notation of a duration, to seconds; 0 for anything else."""
    parts = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", clock)
    return 0.0 if parts is None else int(parts[1]) * 3600 + int(parts[2]) * 60 + float(parts[3])


# ---- From frames to pixels ----


class _ClipPixels:
    """Converts frames to pixels as soon as they are selected: a whole clip at its stored size may take gigabytes."""

    def __init__(
        self, source: Path | bytes, frames: int, aspect: Fraction, transform: Callable[[Tensor], Tensor] | None
    ) -> None:
        if not 1 / _WIDEST_PIXEL <= aspect <= _WIDEST_PIXEL:
            shape, widest = f"{aspect.numerator}:{aspect.denominator}", _WIDEST_PIXEL
            raise MediaError(
                "undecodable", source, f"has pixels of {shape}, expected between 1:{widest} and {widest}:1"
            )
        self.source = source
        self.capacity = min(frames, _FRAMES_AT_FIRST)
        self.aspect = aspect
        self.transform = transform
        self.size: tuple[int, int] | None = None
        self.pixels = torch.empty(0, 3, 0, 0, dtype=torch.uint8)  # [at least the number of frames, ...]
        self.transparent: list[float] = []  # share of transparent pixels, by frame
        self.interlaced = False

    def add(self, selected: list[Any]) -> None:
        """Converts the frames that were selected since the last call, and replaces them by ``None``."""
        for index in range(len(self.transparent), len(selected)):
            pixels, selected[index] = self._pixels(selected[index]), None
            if index == 0:
                self.pixels = torch.empty(self.capacity, *pixels.shape, dtype=torch.uint8)
            elif index == len(self.pixels):
                self.pixels = torch.cat([self.pixels, torch.empty_like(self.pixels)])
            self.pixels[index] = pixels  # one allocation: frames freed one by one would fragment memory

    def _pixels(self, frame: Any) -> Tensor:
        colours, share = _rgb(frame, self.aspect)
        colours = _upright(self.source, colours, frame)
        size = (colours.shape[-2], colours.shape[-1])
        if size != (self.size or size):
            raise MediaError("undecodable", self.source, "changes its size between frames, expected one size")
        self.size = size
        self.transparent.append(share)
        self.interlaced |= frame.interlaced_frame
        return colours if self.transform is None else self.transform(colours)

    def media(self, selected: list[Any], fps: float, length: int) -> Media:
        """Returns all selected frames."""
        self.add(selected)
        count = len(self.transparent)
        transparent = sum(share / count for share in self.transparent)
        return Media(self.pixels[:count], self.size or (0, 0), fps, length, self.aspect, transparent, self.interlaced)


def _rgb(frame: Any, aspect: Fraction) -> tuple[Tensor, float]:
    """Converts a decoded frame to square pixels, ``[3, H, W]`` uint8; also returns the share of transparent ones.

    The shorter side is enlarged, as in players, so that no resolution is lost.
    """
    size = (frame.height, max(1, round(frame.width * aspect)))
    if aspect < 1:
        size = (max(1, round(frame.height / aspect)), frame.width)
    scaling: dict[str, Any] = {}
    if size != (frame.height, frame.width):
        scaling = {"height": size[0], "width": size[1], "interpolation": "BICUBIC"}
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        return on_background(torch.from_numpy(frame.to_ndarray(format="rgba", **scaling)))
    return torch.from_numpy(frame.to_ndarray(format="rgb24", **scaling)).permute(2, 0, 1), 0.0


def _upright(source: Path | bytes, pixels: Tensor, frame: Any) -> Tensor:
    """Applies the display matrix: phones record sideways, and their front cameras mirrored."""
    from av.sidedata.sidedata import SideDataContainer

    # Not frame.side_data: the frame and that container refer to each other, so that only the collector frees them.
    matrices = [data for data in SideDataContainer(frame) if data.type.name == "DISPLAYMATRIX"]  # type: ignore[call-arg]
    if not matrices:
        return pixels
    # x' = a x + c y and y' = b x + d y, with y downwards: a 3x3 matrix whose third column is not needed.
    a, b, _, c, d = torch.frombuffer(bytearray(matrices[0]), dtype=torch.int32)[:5].tolist()
    degrees = math.degrees(math.atan2(-b, a))
    if abs(degrees - 90 * round(degrees / 90)) > 1:
        raise MediaError("undecodable", source, f"is turned by {degrees:.0f} degrees, expected a multiple of 90")
    across, down = a, d
    if abs(a) < abs(b):
        pixels, across, down = pixels.transpose(-2, -1), c, b
    return pixels.flip([axis for axis, sign in ((-1, across), (-2, down)) if sign < 0])


def on_background(rgba: Tensor) -> tuple[Tensor, float]:
    """Composites an image over :data:`BACKGROUND`.

    Args:
        rgba: uint8, ``[H, W, 4]``; colours not multiplied by alpha.

    Returns:
        uint8 ``[3, H, W]``, and the share of pixels that are not opaque. Opaque pixels stay bit-identical.
    """
    colours, alpha = rgba.permute(2, 0, 1).split([3, 1])
    opaque = alpha == 255
    if opaque.all():
        return colours, 0.0
    weight = alpha.int()
    mixed = (colours.int() * weight + BACKGROUND * (255 - weight) + 127).div(255, rounding_mode="floor")
    return mixed.to(torch.uint8), 1.0 - float(opaque.float().mean())
