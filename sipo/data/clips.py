"""Decodes clips, completely or not at all, and as a player shows them.

FFmpeg conceals errors: it fills in damaged areas and accepts truncated files. Here both are errors, as far as the
format lets a decoder detect them. The sample aspect ratio, the display matrix and transparency are applied.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sipo.files import LFS_POINTER
from sipo.processes import is_out_of_memory

# A list of formats, so that no playlist is read, for which FFmpeg would open other files, and no text file as an image
# because of its name.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc",
}

BACKGROUND = 255
"""Level of red, green and blue behind transparent pixels: white, as in most image viewers."""

MAX_PIXELS = 120_000_000
"""Pixels that an image or a frame may have where nobody says otherwise: the largest cameras', and 360 MB decoded."""

_FRAMES_AT_FIRST = 128  # that room is made for at most

_WIDEST_PIXEL = 4  # largest sample aspect ratio, or its inverse: more is a damaged file, and would take much memory

# For transparent WebM clips: FFmpeg's own decoders drop the alpha channel, which shows the hidden colours.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

Kind = Literal["missing", "undecodable", "large", "medium", "short", "rate"]


class MediaError(ValueError):
    """An image or a clip that cannot be used, in one line that names it.

    Attributes:
        kind: "missing": no such file, or none that can be read; "undecodable": damaged, cut short, or of no known
            format; "large": of too many pixels; "medium": an image where a clip was asked for, the reverse, or several
            images in one file; "short": fewer frames than asked for; "rate": fewer frames a second than asked for, all
            along or in one place.
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
        pixels: uint8, ``[3, H, W]`` of an image, ``[F, 3, H, W]`` of a clip: upright, and transparent ones on
            :data:`BACKGROUND`. A clip's are scaled to be square. What the reader's ``transform`` made of them, if it
            was given one.
        size: (height, width) in pixels before any ``transform``.
        fps: frames per second of ``pixels``; ``None`` for an image.
        length: frames in the file, of which ``pixels`` may be the first few; 1 for an image.
        pixel_aspect: width over height of a stored pixel, as the file says. A clip has been scaled by it; an image
            has not, as browsers and image viewers do not.
        transparent: share of ``pixels`` that are transparent in the file, wholly or in part.
        interlaced: whether any of the frames is interlaced; ``pixels`` are not deinterlaced.
    """

    pixels: Tensor
    size: tuple[int, int]
    fps: float | None = None
    length: int = 1
    pixel_aspect: Fraction = Fraction(1)
    transparent: float = 0.0
    interlaced: bool = False


class Selection(Protocol):
    """Selection of a clip's frames.

    Attributes:
        picked: the PyAV frames taken so far; the reader replaces each by ``None`` once it has its pixels.
        frames: how many there are to be.
        done: whether the rest need not be decoded.
    """

    picked: list[Any]
    frames: int
    done: bool

    def offer(self, frame: Any, time: float) -> None:
        """Takes the next frame or not; ``time`` in seconds after the first."""

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        """After the last frame: the rate of what was picked, or a :class:`MediaError` for what is missing."""


class First:
    """The first ``frames`` as they come."""

    def __init__(self, frames: int, decode_all: bool = False) -> None:
        self.picked: list[Any] = []
        self.frames = frames
        self.decode_all = decode_all
        self.done = frames == 0

    def offer(self, frame: Any, time: float) -> None:
        if len(self.picked) < self.frames:
            self.picked.append(frame)
        self.done = len(self.picked) >= self.frames and not self.decode_all

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        if len(self.picked) < self.frames:
            raise MediaError("short", source, f"has {len(self.picked)} frames, expected {self.frames}")
        return rate


class Numbered:
    """Those at certain places."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.picked: list[Any] = []
        self.indices = indices
        self.frames = len(indices)
        self.seen = 0
        self.done = False

    def offer(self, frame: Any, time: float) -> None:
        if not self.done and self.seen == self.indices[len(self.picked)]:
            self.picked.append(frame)
        self.seen += 1
        self.done = len(self.picked) == len(self.indices)

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        if not self.done:
            raise MediaError("undecodable", source, f"gave {self.seen} frames, expected {length}")
        return rate * len(self.picked) / length


class AtRate:
    """Those nearest to the times ``0, 1/fps, 2/fps, ...``.

    A time halfway between two frames takes the earlier one, and so does one up to a twentieth of their distance later,
    because files round their times (Matroska to milliseconds).
    """

    def __init__(self, frames: int, fps: float) -> None:
        self.picked: list[Any] = []
        self.frames = frames
        self.fps = fps
        self.done = False
        self.repeated = False
        self.last: tuple[float, Any] | None = None
        self.taken: Any = None
        self.gap = (0.0, 0.0)  # the longest so far: its length and where it begins, in seconds

    def offer(self, frame: Any, time: float) -> None:
        if not self.done and self.last is not None:
            self.gap = max(self.gap, (time - self.last[0], self.last[0]), key=lambda gap: gap[0])
        while not self.done and (target := len(self.picked) / self.fps) <= time:
            if self.last is not None and target - self.last[0] <= 0.55 * (time - self.last[0]):
                self._take(self.last[1])
            else:
                self._take(frame)
        self.last = (time, frame)

    def _take(self, frame: Any) -> None:
        self.repeated |= frame is self.taken
        self.taken = frame
        self.picked.append(frame)
        self.done = len(self.picked) == self.frames or self.repeated

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        # The last frame is shown as long as any other, so that it may be the nearest to a time after its own.
        if not self.done and self.last is not None:
            time, frame = self.last
            if len(self.picked) / self.fps - time <= 0.55 / rate and frame is not self.taken:
                self._take(frame)
        if self.repeated:
            length_of_gap, begin = self.gap
            found = f"has {rate:g} frames per second"
            if rate >= self.fps or length_of_gap > 1.5 / rate:  # of variable rate: the mean says nothing about it
                found = f"has no frame for {length_of_gap:.3g} s after {begin:.3g} s"
            raise MediaError("rate", source, f"{found}, expected at least {self.fps:g} frames per second")
        if len(self.picked) < self.frames:
            need = f"{self.frames} at {self.fps:g} per second, which take {self.frames / self.fps:.2f} s"
            raise MediaError("short", source, f"has {length} frames in {length / rate:.2f} s, expected {need}")
        return self.fps


def read_clip(
    source: Path | bytes,
    selection: Selection,
    max_pixels: int = MAX_PIXELS,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Media:
    """Decodes the frames that ``selection`` takes; see :func:`sipo.data.media.read_media`."""
    import av

    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size == 0:
        raise MediaError("undecodable", source, "is empty")
    try:
        try:
            # "file:", as what stands before a colon in a name is a protocol to FFmpeg. Titles need not be UTF-8.
            place = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
            opened = av.open(place, "r", options=_OPEN_OPTIONS, metadata_errors="replace")
        except (av.InvalidDataError, av.ArgumentError):  # the latter for formats that are not in the list
            problem = "is no image or clip of a known format, or is cut short"
            if _begins_with(source, LFS_POINTER):
                problem = "is a Git LFS pointer, expected the file itself: `git lfs pull` fetches it"
            raise MediaError("undecodable", source, problem) from None
        with opened as container:
            stream = container.streams.best("video")
            # Where the file ends before its first frame, there is a stream without a decoder.
            if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
                raise MediaError("undecodable", source, "holds no image and no clip that can be decoded")
            if any(entry.pos + entry.size > size for entry in stream.index_entries):
                raise MediaError("undecodable", source, f"is cut short at {size} bytes")
            # By default decoders conceal damaged areas. One thread: callers decode several files at a time.
            decoder: Any = stream.codec_context
            # FFmpeg gives a tag's name as it is written, and Matroska's own AlphaMode as "alpha_mode".
            tags = {name.lower(): value for name, value in stream.metadata.items()}
            if tags.get("alpha_mode") == "1" and decoder.name in _ALPHA_DECODERS:
                decoder = av.CodecContext.create(_ALPHA_DECODERS[decoder.name], "r")
            check_pixels(source, stream.height, stream.width, max_pixels)
            # A stream may have larger frames than the file's header says. Codecs round sides up, hence twice.
            decoder.options = {"err_detect": "explode", "max_pixels": str(2 * max_pixels + (1 << 16))}
            decoder.thread_count = 1
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            expected = _seconds(tags.get("duration", ""))
            timed = container.format.name != "avi"  # AVI has decoding times alone
            length, index, start, end = 0, 0, 0.0, 0.0
            shown = _Shown(source, selection.frames, stream.sample_aspect_ratio or Fraction(1), transform)
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
                    shown.take(selection.picked)
                    index += 1
            if length == 0 or not rate > 0:
                raise MediaError("undecodable", source, "holds no frames, or no frame rate")
            if end < expected - 2.5 / rate:
                raise MediaError("undecodable", source, f"is cut short after {end:.2f} s of {expected:.2f} s")
            fps = selection.finish(source, length, rate)
            return shown.media(selection.picked, fps, length)
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
        # Of torch where memory does not suffice; its other errors are no fault of the file.
        ours = isinstance(error, RuntimeError) and not isinstance(error, av.FFmpegError)
        if isinstance(error, MediaError) or (ours and not is_out_of_memory(error)):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError("undecodable", source, f"cannot be decoded: {reason}") from error


def check_pixels(source: Path | bytes, height: int, width: int, max_pixels: int) -> None:
    """Refuses what is too large to be decoded, by its header."""
    if height * width > max_pixels:
        raise MediaError("large", source, f"has {height}x{width} pixels, expected at most {max_pixels} (max_pixels)")


def _begins_with(source: Path | bytes, start: bytes) -> bool:
    if isinstance(source, bytes):
        return source.startswith(start)
    with source.open("rb") as file:
        return file.read(len(start)) == start


def _seconds(clock: str) -> float:
    """Seconds of ``hh:mm:ss.fraction``, Matroska's notation of a stream's duration; 0 for anything else."""
    parts = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", clock)
    return 0.0 if parts is None else int(parts[1]) * 3600 + int(parts[2]) * 60 + float(parts[3])


# ---- From frames to pixels ----


class _Shown:
    """Makes pixels of selected frames, each at once: a whole clip as it is stored may take gigabytes."""

    def __init__(
        self, source: Path | bytes, frames: int, aspect: Fraction, transform: Callable[[Tensor], Tensor] | None
    ) -> None:
        if not 1 / _WIDEST_PIXEL <= aspect <= _WIDEST_PIXEL:
            shape, widest = f"{aspect.numerator}:{aspect.denominator}", _WIDEST_PIXEL
            raise MediaError(
                "undecodable", source, f"has pixels of {shape}, expected between 1:{widest} and {widest}:1"
            )
        self.source = source
        self.room = min(frames, _FRAMES_AT_FIRST)
        self.aspect = aspect
        self.transform = transform
        self.size: tuple[int, int] | None = None
        self.pixels = torch.empty(0, 3, 0, 0, dtype=torch.uint8)  # [n, ...] for as many frames and more
        self.shares: list[float] = []  # of transparent pixels, by frame
        self.interlaced = False

    def take(self, picked: list[Any]) -> None:
        """Makes pixels of the frames that were selected since the last call, and lets these go."""
        for index in range(len(self.shares), len(picked)):
            pixels, picked[index] = self._pixels(picked[index]), None
            if index == 0:
                self.pixels = torch.empty(self.room, *pixels.shape, dtype=torch.uint8)
            elif index == len(self.pixels):
                self.pixels = torch.cat([self.pixels, torch.empty_like(self.pixels)])
            self.pixels[index] = pixels  # all in one place: between frames that are let go, memory would have holes

    def _pixels(self, frame: Any) -> Tensor:
        colours, share = _rgb(frame, self.aspect)
        colours = _upright(self.source, colours, frame)
        size = (colours.shape[-2], colours.shape[-1])
        if size != (self.size or size):
            raise MediaError("undecodable", self.source, "changes its size between frames, expected one size")
        self.size = size
        self.shares.append(share)
        self.interlaced |= frame.interlaced_frame
        return colours if self.transform is None else self.transform(colours)

    def media(self, picked: list[Any], fps: float, length: int) -> Media:
        """Returns all selected frames."""
        self.take(picked)
        count = len(self.shares)
        transparent = sum(share / count for share in self.shares)
        pixels = self.pixels[:count]
        return Media(pixels, self.size or (0, 0), fps, length, self.aspect, transparent, self.interlaced)


def _rgb(frame: Any, aspect: Fraction) -> tuple[Tensor, float]:
    """A decoded frame of square pixels, ``[3, H, W]`` uint8, and the share of transparent ones.

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

    # frame.side_data is one that the frame keeps and that refers to the frame: its memory would wait for the collector.
    found = [data for data in SideDataContainer(frame) if data.type.name == "DISPLAYMATRIX"]  # type: ignore[call-arg]
    if not found:
        return pixels
    # x' = a x + c y and y' = b x + d y, with y downwards: a 3x3 matrix whose third column is not needed.
    a, b, _, c, d = torch.frombuffer(bytearray(found[0]), dtype=torch.int32)[:5].tolist()
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
        uint8 ``[3, H, W]``, and the share of pixels that are not opaque. Opaque ones keep their bits.
    """
    colours, alpha = rgba.permute(2, 0, 1).split([3, 1])
    opaque = alpha == 255
    if opaque.all():
        return colours, 0.0
    weight = alpha.int()
    mixed = (colours.int() * weight + BACKGROUND * (255 - weight) + 127).div(255, rounding_mode="floor")
    return mixed.to(torch.uint8), 1.0 - float(opaque.float().mean())
