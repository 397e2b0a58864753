"""Clips: which frames are read, and which files are refused."""

from __future__ import annotations

import math
import struct
import sys
from fractions import Fraction
from pathlib import Path
from unittest.mock import Mock

import av
import pytest
import torch
from PIL import Image
from torch import Tensor

from sipo.data.media import MediaError, probe_media, read_media, read_spaced, resize_and_crop, write_video
from tests.data_sets import clip, cut_short, damage, encode_clip, noise
from tests.media_files import STEP, counted, encode, has_avif, picture, smooth


def numbers(pixels: Tensor) -> list[int]:
    """The places of frames of :func:`counted`."""
    return [round(float(frame.float().mean()) / STEP) for frame in pixels]


# ---- Clips ----


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi"])
def test_frames_come_back_in_order_and_colour(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    pixels = clip(3, frames=24)
    write_video(path, pixels, 24.0)
    for source in (path, path.read_bytes()):
        media = read_media(source, 24)
        assert (media.fps, media.length) == (24.0, 24)
        assert (media.pixels.float() - pixels.float()).abs().max() <= 6
    first = read_media(path, 5)
    assert first.length == 24 and torch.equal(first.pixels, media.pixels[:5])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (24.0, 8.0, [0, 3, 6, 9, 12, 15]),
        (24.0, 24.0, [0, 1, 2, 3, 4, 5]),
        (24.0, 16.0, [0, 1, 3, 4, 6, 7, 9]),  # between two frames the earlier one
        (30.0, 24.0, [0, 1, 2, 4, 5, 6, 7]),  # 1.25 k, rounded
        (24000 / 1001, 24.0, [0, 1, 2, 3, 4]),  # television's 24 is meant by 24
        (8.0, 1.0, [0, 8, 16, 24, 32]),
    ],
)
def test_frames_at_a_rate(tmp_path: Path, suffix: str, rate: float, fps: float, expected: list[int]) -> None:
    path = tmp_path / f"clip.{suffix}"
    write_video(path, counted(40), rate)
    media = read_media(path, len(expected), fps)
    assert numbers(media.pixels) == expected
    assert media.fps == fps


def test_clip_too_short_names_length_and_need(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, counted(24), 24.0)
    assert numbers(read_media(path, 8, 8.0).pixels) == list(range(0, 24, 3))
    expected = r"clip.mp4: has 24 frames in 1.00 s, expected 9 at 8 per second, which take 1.12 s"
    with pytest.raises(MediaError, match=expected):
        read_media(path, 9, 8.0)
    with pytest.raises(MediaError, match=r"has 24 frames, expected 25") as caught:
        read_media(path, 25)
    assert caught.value.kind == "short"


def test_last_frame_lasts_as_long_as_any(tmp_path: Path) -> None:
    """The ninth time, 8/7 s, is later than the last frame's, 9/8 s, and nearest to it."""
    path = tmp_path / "clip.mp4"
    write_video(path, counted(10), 8.0)
    assert numbers(read_media(path, 9, 7.0).pixels) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    with pytest.raises(MediaError, match=r"has 10 frames in 1\.25 s, expected 10 at 7 per second"):
        read_media(path, 10, 7.0)


def test_no_frame_is_taken_twice(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, counted(24), 8.0)
    with pytest.raises(MediaError, match="has 8 frames per second, expected at least 12 frames") as caught:
        read_media(path, 9, 12.0)
    assert caught.value.kind == "rate"


def test_a_gap_of_a_variable_frame_rate_is_named(tmp_path: Path) -> None:
    """On average there are more frames than asked for, which is no help where there are none."""
    path = tmp_path / "clip.mkv"
    times = [50 * index + (370 if index > 7 else 0) for index in range(40)]
    encode_clip(path, counted(40), times=times)
    with pytest.raises(MediaError) as caught:
        read_media(path, 16, 10.0)
    expected = "has no frame for 0.42 s after 0.35 s, expected at least 10 frames per second"
    assert str(caught.value) == f"{path}: {expected}" and caught.value.kind == "rate"
    assert numbers(read_media(path, 4, 10.0).pixels) == [0, 2, 4, 6]  # before the gap


@pytest.mark.parametrize("name", ["scene:1.mp4", "concat:a.mp4", "http:a.mp4", "-i.mp4", "100%d.mp4", "a?b#c.mp4"])
def test_no_part_of_a_clip_s_name_means_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Before a colon FFmpeg expects a protocol."""
    write_video(tmp_path / "clip.mp4", counted(5), 8.0)
    (tmp_path / "clip.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers(read_media(Path(name), 5).pixels) == list(range(5))


def test_a_title_that_is_not_utf8_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    encode_clip(path, counted(5), tags={"title": "a title of some length"})
    path.write_bytes(path.read_bytes().replace(b"a title", b"\xe4 title"))
    assert numbers(read_media(path, 5).pixels) == list(range(5))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
        (MemoryError(), "MemoryError"),
        (av.error.NotImplementedError(1, "Not yet implemented"), "Not yet implemented"),
        (RuntimeError("a mistake of ours"), None),
    ],
)
def test_memory_that_does_not_suffice_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str | None
) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, counted(5), 8.0)
    monkeypatch.setattr("sipo.data.clips._rgb", Mock(side_effect=error))
    with pytest.raises(RuntimeError if reason is None else MediaError) as caught:
        read_media(path, 5)
    assert reason is None or str(caught.value) == f"{path}: cannot be decoded: {reason}"


def test_a_frame_of_more_pixels_than_allowed_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, counted(5), 8.0)
    assert read_media(path, 5, max_pixels=16 * 32).length == 5
    for read in (lambda: read_media(path, 5, max_pixels=511), lambda: read_spaced(path, 2, max_pixels=511)):
        with pytest.raises(MediaError, match=r"has 16x32 pixels, expected at most 511 \(max_pixels\)$") as caught:
            read()
        assert caught.value.kind == "large"


def test_clip_for_image_and_image_for_clip(tmp_path: Path) -> None:
    moving, still = tmp_path / "clip.mp4", tmp_path / "image.mp4"
    write_video(moving, counted(5), 8.0)
    still.write_bytes(encode(picture(), "PNG"))
    animated = encode(picture(), "GIF", save_all=True, append_images=[Image.new("RGB", (30, 20))])
    for source, frames in ((moving, 1), (animated, 1), (still, 5)):
        with pytest.raises(MediaError) as caught:
            read_media(source, frames)
        assert caught.value.kind == "medium"
    assert read_media(animated, 2).pixels.shape == (2, 3, 20, 30)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("frames", [2, 24])
@pytest.mark.parametrize("layout", ["mp4", "faststart", "mkv", "avi"])
def test_clip_cut_short_is_an_error(tmp_path: Path, layout: str, frames: int, share: float) -> None:
    """Also behind the frames that are wanted, and where the index comes first and is whole."""
    path = tmp_path / f"clip.{'mp4' if layout == 'faststart' else layout}"
    write_video(path, clip(5, frames=24), 24.0)
    if layout == "faststart":
        to_faststart(path)
    assert read_media(path, frames).length == 24
    cut_short(path, share)
    with pytest.raises(MediaError, match=r"^\S*clip\.\w+: [^\n]*$") as caught:
        read_media(path, frames)
    assert caught.value.kind == "undecodable"


def to_faststart(path: Path) -> None:
    """Moves the index of an MP4 file to its front."""
    target = path.with_name("moved.mp4")
    with av.open(str(path)) as old, av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    target.replace(path)


def test_clip_cut_short_between_two_frames_is_an_error(tmp_path: Path) -> None:
    """What is there is whole: only the index tells that there should be more."""
    path = tmp_path / "clip.mp4"
    write_video(path, clip(5, frames=24), 24.0)
    to_faststart(path)
    with av.open(str(path)) as container:
        ends = sorted((packet.pos or 0) + packet.size for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[: ends[12]])
    with pytest.raises(MediaError, match=r"is cut short at \d+ bytes") as caught:
        read_media(path, 4)
    assert caught.value.kind == "undecodable"


def test_avi_with_reordered_frames(tmp_path: Path) -> None:
    """AVI stores the order of decoding alone; a frame's time there is not when it is shown."""
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 16, 32, "yuv420p"
        stream.options = {"bf": "3", "x264-params": "b-adapt=0:scenecut=0:weightp=0"}
        for frame in counted(24).permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times != sorted(times)
    assert numbers(read_media(path, 8, 8.0).pixels) == list(range(0, 24, 3))


def test_damaged_clip_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, clip(5, frames=24, height=64, width=64), 24.0)
    damage(path, 0.5)
    with pytest.raises(MediaError, match=r"cannot be decoded|damaged"):
        read_media(path, 24)


def test_text_and_playlists_are_no_clips(tmp_path: Path) -> None:
    """A playlist would have FFmpeg open whatever it names."""
    write_video(tmp_path / "clip.mp4", counted(5), 8.0)
    for name, text in (
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile clip.mp4\n"),
        ("note.txt", "no picture"),
        ("note.png", "no picture"),
    ):
        (tmp_path / name).write_text(text)
        for frames in (1, 2):
            with pytest.raises(MediaError) as caught:
                read_media(tmp_path / name, frames)
            assert caught.value.kind == "undecodable"


@pytest.mark.parametrize("brand", ["avif", "heic", "heix", "mif1"])
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("avif", [False, True])
def test_avif_and_heic_are_named(monkeypatch: pytest.MonkeyPatch, brand: str, frames: int, avif: bool) -> None:
    """Both are images in a container of clips, and older Pillow reads neither."""
    content = struct.pack(">I4s4sI4s", 20, b"ftyp", brand.encode(), 0, b"miaf") + bytes(100)
    if not avif:
        monkeypatch.setitem(sys.modules, "PIL.AvifImagePlugin", None)
        monkeypatch.delattr("PIL.AvifImagePlugin", raising=False)
    elif not has_avif():
        pytest.skip("this Pillow reads no AVIF")
    problem = r"is AVIF or HEIC, expected JPEG, PNG, .* or (PPM|AVIF)"
    if avif and brand == "avif":
        problem = "cannot be decoded: AVIF that is damaged or cut short"
    with pytest.raises(MediaError, match=f"bytes in memory: {problem}$") as caught:
        read_media(content, frames)
    assert caught.value.kind == "undecodable"


def test_what_is_no_image_and_no_clip_is_told_without_codes(tmp_path: Path) -> None:
    path = tmp_path / "file.png"
    tga, unknown = encode(picture(), "TGA"), "is no image or clip of a known format, or is cut short"
    write_video(tmp_path / "clip.mp4", counted(5), 8.0)
    cut = (tmp_path / "clip.mp4").read_bytes()[:100]  # its index comes last
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n"
    lfs = "is a Git LFS pointer, expected the file itself: `git lfs pull` fetches it"
    cases = ((b"", "is empty"), (b"no picture", unknown), (tga, unknown), (cut, unknown), (pointer, lfs))
    for content, message in cases:
        path.write_bytes(content)
        for read in (read_media, probe_media, lambda source: read_spaced(source, 2)):
            with pytest.raises(MediaError) as caught:
                read(path)
            assert str(caught.value) == f"{path}: {message}" and caught.value.kind == "undecodable"
    write_video(path.with_suffix(".mp4"), clip(5, frames=24, height=64, width=64), 24.0)
    damage(path.with_suffix(".mp4"), 0.5)
    with pytest.raises(MediaError, match=r"file\.mp4: cannot be decoded: Invalid data found when processing input$"):
        read_media(path.with_suffix(".mp4"), 24)


SHOWN = {
    (1, 0, 0, 1): lambda frames: frames,
    (0, -1, 1, 0): lambda frames: torch.rot90(frames, 1, (-2, -1)),
    (-1, 0, 0, -1): lambda frames: frames.flip(-1, -2),
    (0, 1, -1, 0): lambda frames: torch.rot90(frames, -1, (-2, -1)),
    (-1, 0, 0, 1): lambda frames: frames.flip(-1),
    (1, 0, 0, -1): lambda frames: frames.flip(-2),
    (0, 1, 1, 0): lambda frames: frames.transpose(-1, -2),
    (0, -1, -1, 0): lambda frames: frames.transpose(-1, -2).flip(-1, -2),
}
"""What each display matrix ``(a, b, c, d)`` asks a player to do: ``x' = a x + c y``, ``y' = b x + d y``."""


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("matrix", SHOWN)
def test_turned_clip_is_turned_upright(tmp_path: Path, suffix: str, matrix: tuple[int, int, int, int]) -> None:
    """A mirrored one (front cameras) is not turned by 180 degrees."""
    pixels = smooth(16, 32).expand(3, 3, 16, 32).contiguous()
    path = tmp_path / f"clip.{suffix}"
    encode_clip(path, pixels, matrix=matrix)
    expected = SHOWN[matrix](pixels)
    for media in (read_media(path, 3), read_spaced(path, 3)):
        assert media.pixels.shape == expected.shape
        assert (media.pixels.float() - expected.float()).abs().mean() < 3.0
    assert probe_media(path).pixels.shape[-2:] == expected.shape[-2:]


def test_clip_turned_by_a_few_degrees_is_refused(tmp_path: Path) -> None:
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    encode_clip(tmp_path / "clip.mp4", clip(1), matrix=(cos, -sin, sin, cos))
    with pytest.raises(MediaError, match=r"clip\.mp4: is turned by 30 degrees, expected a multiple of 90") as caught:
        read_media(tmp_path / "clip.mp4", 3)
    assert caught.value.kind == "undecodable"


def framed(height: int, width: int, top: int, left: int, tall: int, wide: int) -> Tensor:
    """``[3, 3, height, width]``: a white rectangle on black."""
    pixels = torch.zeros(3, 3, height, width, dtype=torch.uint8)
    pixels[..., top : top + tall, left : left + wide] = 255
    return pixels


def rectangle(pixels: Tensor) -> tuple[float, float]:
    """Height and width of the white rectangle of :func:`framed`, in pixels, to a part of one."""
    light = pixels[0].float().mean(0) / 255
    return float(light.max(1).values.sum()), float(light.max(0).values.sum())


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi", "ts"])
def test_pixels_that_are_not_square_are_scaled_to_display_size(tmp_path: Path, suffix: str) -> None:
    """A square that is stored as 48 rows of 36 columns of 4:3, or as 36 rows of 48 columns of 3:4, is shown square."""
    path = tmp_path / f"clip.{suffix}"
    for aspect, stored, shown in (
        (Fraction(4, 3), framed(60, 60, 6, 12, 48, 36), (60, 80)),
        (Fraction(3, 4), framed(60, 64, 12, 8, 36, 48), (80, 64)),
    ):
        encode_clip(path, stored, aspect=aspect)
        for media in (read_media(path, 3), read_media(path, 2, 4.0), read_spaced(path, 2), probe_media(path)):
            assert media.pixels.shape[-2:] == shown and media.pixel_aspect == aspect
            assert rectangle(media.pixels) == pytest.approx((48, 48), abs=1.5)
        assert resize_and_crop(media.pixels, 40, 40).original_size == shown


def test_turned_pixels_that_are_not_square(tmp_path: Path) -> None:
    """The shape of a pixel is that of the stored frame: it is scaled first and turned then."""
    path = tmp_path / "clip.mp4"
    encode_clip(path, framed(60, 60, 6, 12, 48, 36), aspect=Fraction(4, 3), matrix=(0, -1, 1, 0))
    media = read_media(path, 3)
    assert media.pixels.shape == (3, 3, 80, 60)
    assert rectangle(media.pixels) == pytest.approx((48, 48), abs=1.5)


def test_square_pixels_come_back_as_they_are_decoded(tmp_path: Path) -> None:
    """Said to be square, nothing said, and a ratio that is less than half a pixel off: the same bits."""
    pixels = noise(1, 3, 3, 16, 32)
    found = []
    for name, aspect in (("none", None), ("one", Fraction(1)), ("near", Fraction(1000, 1001))):
        encode_clip(tmp_path / f"{name}.mp4", pixels, aspect=aspect)
        found.append(read_media(tmp_path / f"{name}.mp4", 3))
        assert found[-1].pixel_aspect == (aspect or 1)
    assert torch.equal(found[0].pixels, found[1].pixels) and torch.equal(found[0].pixels, found[2].pixels)


def test_senseless_shape_of_a_pixel_is_refused(tmp_path: Path) -> None:
    """Before a frame of that size is made."""
    encode_clip(tmp_path / "clip.mp4", clip(1), aspect=Fraction(1, 10))
    with pytest.raises(MediaError, match=r"has pixels of 1:10, expected between 1:4 and 4:1") as caught:
        read_media(tmp_path / "clip.mp4", 3)
    assert caught.value.kind == "undecodable"


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_at_a_rate_follow_their_times(tmp_path: Path, suffix: str) -> None:
    """Phones record at a rate that varies; the number of a frame says nothing about its time."""
    path = tmp_path / f"clip.{suffix}"
    encode_clip(path, counted(6), times=[0, 100, 150, 900, 1000, 2000])
    assert numbers(read_media(path, 3, 1.0).pixels) == [0, 4, 5]
    assert numbers(read_media(path, 3, 2.0).pixels) == [0, 2, 4]
    assert numbers(read_media(path, 6).pixels) == list(range(6))


def test_interlaced_clip_is_told(tmp_path: Path) -> None:
    encode_clip(tmp_path / "clip.mp4", clip(1), options={"flags": "+ildct+ilme", "x264-params": "tff=1"})
    assert read_media(tmp_path / "clip.mp4", 6).interlaced
    encode_clip(tmp_path / "clip.mp4", clip(1))
    assert not read_media(tmp_path / "clip.mp4", 6).interlaced


@pytest.mark.parametrize(
    ("space", "red", "blue"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (2, 0.299, 0.114), (9, 0.2627, 0.0593)]
)
@pytest.mark.parametrize("full", [False, True])
def test_colours_follow_the_matrix_and_range_that_a_clip_names(
    tmp_path: Path, space: int, red: float, blue: float, full: bool
) -> None:
    """BT.709, BT.601, unspecified and BT.2020, by the definition of Y'CbCr."""
    colour = torch.tensor([200.0, 40.0, 90.0])
    luma = red * colour[0] + (1 - red - blue) * colour[1] + blue * colour[2]
    chroma = [(colour[2] - luma) / (2 - 2 * blue), (colour[0] - luma) / (2 - 2 * red)]
    levels = [luma, *chroma] if full else [16 + luma * 219 / 255, *(each * 224 / 255 for each in chroma)]
    planes = [torch.full((16, 32), levels[0]), *(torch.full((4, 32), 128 + level) for level in levels[1:])]
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.options = 16, 32, {"crf": "1"}
        stream.pix_fmt = "yuvj420p" if full else "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 1 + full
        frame = av.VideoFrame.from_ndarray(torch.cat(planes).round().to(torch.uint8).numpy(), format=stream.pix_fmt)
        frame.colorspace, frame.color_range = space, 1 + full
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert (probe_media(path).pixels[0, :, 8, 16].float() - colour).abs().max() <= 3


def test_spaced_frames_and_probe(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, counted(24), 12.0)
    spaced = read_spaced(path, 4)
    assert numbers(spaced.pixels) == [3, 9, 15, 21]
    assert spaced.fps == pytest.approx(2.0)
    assert numbers(read_spaced(path, 1).pixels) == [12]
    assert numbers(read_spaced(path, 100).pixels) == list(range(24))
    probed = probe_media(path)
    assert numbers(probed.pixels) == [0] and (probed.fps, probed.length) == (12.0, 24)
    image = encode(picture(), "PNG")
    assert torch.equal(read_spaced(image, 4).pixels, probe_media(image).pixels)


@pytest.mark.parametrize(("frames", "fps"), [(0, None), (2, 0.0), (2, -1.0), (2, float("nan")), (2, float("inf"))])
def test_senseless_requests(frames: int, fps: float | None) -> None:
    with pytest.raises(ValueError, match="expected"):
        read_media(b"", frames, fps)
