"""Decoding clips, whole or not at all.

FFmpeg would rather show something than stop: it fills in what a damaged area held, and takes a file that is cut short
for one that ends. Here both are errors, as far as a file's format lets a decoder know.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

# Named, so that nothing is taken for a playlist, which would have FFmpeg open what stands in it, nor a text, for its
# name's sake, for a picture.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc",
}

Kind = Literal["missing", "undecodable", "medium", "short", "rate"]


class MediaError(ValueError):
    """An image or a clip that cannot be used, in one line that names it.

    Attributes:
        kind: "missing": no such file; "undecodable": damaged, cut short, or of no known format; "medium": an image
            where a clip was asked for, or the reverse; "short": fewer frames than asked for; "rate": fewer frames a
            second than asked for.
    """

    def __init__(self, kind: Kind, source: Path | bytes, problem: str) -> None:
        name = str(source) if isinstance(source, Path) else f"{len(source)} bytes in memory"
        super().__init__(f"{name}: {' '.join(problem.split())}")
        self.kind = kind


@dataclass(frozen=True)
class Media:
    """A decoded image or clip.

    Attributes:
        pixels: uint8, ``[3, H, W]`` of an image, ``[F, 3, H, W]`` of a clip.
        fps: frames per second of ``pixels``; ``None`` for an image.
        length: frames in the file, of which ``pixels`` may be the first few; 1 for an image.
    """

    pixels: Tensor
    fps: float | None = None
    length: int = 1


class Selection(Protocol):
    """Which of a clip's frames are wanted.

    Attributes:
        picked: those taken so far, ``[3, H, W]`` each.
        done: whether the rest need not be decoded.
    """

    picked: list[Tensor]
    done: bool

    def offer(self, frame: Any, time: float) -> None:
        """Takes the next frame or not; ``time`` in seconds after the first."""

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        """After the last frame: the rate of what was picked, or a :class:`MediaError` for what is missing."""


class First:
    """The first ``frames`` as they come."""

    def __init__(self, frames: int, decode_all: bool = False) -> None:
        self.picked: list[Tensor] = []
        self.frames = frames
        self.decode_all = decode_all
        self.done = frames == 0

    def offer(self, frame: Any, time: float) -> None:
        if len(self.picked) < self.frames:
            self.picked.append(_rgb(frame))
        self.done = len(self.picked) >= self.frames and not self.decode_all

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        if len(self.picked) < self.frames:
            raise MediaError("short", source, f"has {len(self.picked)} frames, expected {self.frames}")
        return rate


class Numbered:
    """Those at certain places."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.picked: list[Tensor] = []
        self.indices = indices
        self.seen = 0
        self.done = False

    def offer(self, frame: Any, time: float) -> None:
        if not self.done and self.seen == self.indices[len(self.picked)]:
            self.picked.append(_rgb(frame))
        self.seen += 1
        self.done = len(self.picked) == len(self.indices)

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        if not self.done:
            raise MediaError("undecodable", source, f"gave {self.seen} frames, expected {length}")
        return rate * len(self.picked) / length


class AtRate:
    """Those nearest to the times ``0, 1/fps, 2/fps, ...``.

    A time in the midst between two frames takes the earlier one, and so does one up to a twentieth of their distance
    later: files round their times, to milliseconds in Matroska's case.
    """

    def __init__(self, frames: int, fps: float) -> None:
        self.picked: list[Tensor] = []
        self.frames = frames
        self.fps = fps
        self.done = False
        self.repeated = False
        self.last: tuple[float, Any] | None = None
        self.taken: Any = None

    def offer(self, frame: Any, time: float) -> None:
        while not self.done and (target := len(self.picked) / self.fps) <= time:
            if self.last is not None and target - self.last[0] <= 0.55 * (time - self.last[0]):
                self._take(self.last[1])
            else:
                self._take(frame)
        self.last = (time, frame)

    def _take(self, frame: Any) -> None:
        self.repeated |= frame is self.taken
        self.taken = frame
        self.picked.append(_rgb(frame))
        self.done = len(self.picked) == self.frames or self.repeated

    def finish(self, source: Path | bytes, length: int, rate: float) -> float:
        # The last frame is there for as long as any other: it may be the nearest to a time after its own.
        if not self.done and self.last is not None:
            time, frame = self.last
            if len(self.picked) / self.fps - time <= 0.55 / rate and frame is not self.taken:
                self._take(frame)
        if self.repeated:
            raise MediaError("rate", source, f"has {rate:g} frames per second, expected at least fps={self.fps:g}")
        if len(self.picked) < self.frames:
            need = f"{self.frames} at fps={self.fps:g}, which take {self.frames / self.fps:.2f} s"
            raise MediaError("short", source, f"has {length} frames in {length / rate:.2f} s, expected {need}")
        return self.fps


def read_clip(source: Path | bytes, selection: Selection) -> Media:
    import av

    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    try:
        with av.open(as_stream(source), options=_OPEN_OPTIONS) as container:
            stream = container.streams.best("video")
            # Where the first frame is cut off already, there is a stream and nothing to decode it with.
            if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
                raise MediaError("undecodable", source, "holds no image and no clip that can be decoded")
            if any(entry.pos + entry.size > size for entry in stream.index_entries):
                raise MediaError("undecodable", source, f"is cut short at {size} bytes")
            # Decoders would rather guess what a damaged area held. One thread: callers decode in several.
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = 1
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            expected = _seconds(stream.metadata.get("DURATION", ""))
            timed = container.format.name != "avi"  # which has no times but those of decoding
            length, index, start, end = 0, 0, 0.0, 0.0
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise MediaError("undecodable", source, f"is damaged or cut short after {length} frames")
                length += packet.size > 0 and not packet.is_discard
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if selection.done:
                    continue
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise MediaError("undecodable", source, f"frame {index} is damaged")
                    time = frame.time if timed and frame.time is not None else index / (rate or 1.0)
                    start = time if index == 0 else start
                    selection.offer(frame, time - start)
                    index += 1
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError("undecodable", source, f"cannot be decoded: {error}") from error
    if length == 0 or not rate > 0:
        raise MediaError("undecodable", source, "holds no frames, or no frame rate")
    if end < expected - 2.5 / rate:
        raise MediaError("undecodable", source, f"is cut short after {end:.2f} s of {expected:.2f} s")
    fps = selection.finish(source, length, rate)
    if not selection.picked:
        return Media(torch.empty(0, 3, 0, 0, dtype=torch.uint8), fps, length)
    if len({pixels.shape for pixels in selection.picked}) > 1:
        raise MediaError("undecodable", source, "changes its size on the way, expected frames of one size")
    return Media(torch.stack(selection.picked), fps, length)


def _seconds(clock: str) -> float:
    """``hh:mm:ss.fraction``, as Matroska says how long a stream is; 0 for anything else."""
    parts = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", clock)
    return 0.0 if parts is None else int(parts[1]) * 3600 + int(parts[2]) * 60 + float(parts[3])


def _rgb(frame: Any) -> Tensor:
    """A decoded frame as ``[3, H, W]`` uint8, turned as the file says (phones film sideways)."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(pixels, round(frame.rotation / 90) % 4, dims=(-2, -1)).contiguous()


def as_stream(source: Path | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)
