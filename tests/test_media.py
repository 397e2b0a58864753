"""Images and clips: the pixels that were written come back, and damaged files are errors that name them."""

from __future__ import annotations

import io
import math
import os
import socket
import struct
import sys
import warnings
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from sipo.data.clips import BACKGROUND
from sipo.data.media import (
    MediaError,
    fit,
    nearest_size,
    probe_media,
    read_media,
    read_spaced,
    write_image,
    write_image_grid,
    write_video,
)
from sipo.families import get
from tests.data_sets import clip, cut_short, damage, encode_clip, noise

STEP = 5
"""Grey levels between one frame of :func:`counted` and the next."""


def counted(frames: int, height: int = 16, width: int = 32) -> Tensor:
    """A clip whose frame ``i`` is grey of level ``5 i``."""
    levels = torch.arange(frames, dtype=torch.uint8) * STEP
    return levels[:, None, None, None].expand(frames, 3, height, width).contiguous()


def numbers(pixels: Tensor) -> list[int]:
    """The places of frames of :func:`counted`."""
    return [round(float(frame.float().mean()) / STEP) for frame in pixels]


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(height: int = 20, width: int = 30) -> Image.Image:
    return Image.fromarray(noise(7, height, width, 3).numpy())


def smooth(height: int = 24, width: int = 36) -> Tensor:
    """``[3, H, W]`` of gradients, which compression and scaling leave nearly as they are."""
    y = torch.linspace(20, 220, height)[:, None].expand(height, width)
    x = torch.linspace(30, 200, width)[None].expand(height, width)
    return torch.stack([y, x, (x + y) / 2]).round().to(torch.uint8)


# ---- Images ----


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_image_comes_back_exactly(tmp_path: Path, format: str) -> None:
    content = encode(picture(), format)
    path = tmp_path / "image"  # no ending: the content counts
    path.write_bytes(content)
    expected = noise(7, 20, 30, 3).permute(2, 0, 1)
    for source in (path, content):
        media = read_media(source)
        assert torch.equal(media.pixels, expected)
        assert (media.fps, media.length) == (None, 1)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_image_comes_back_nearly(format: str) -> None:
    content = encode(Image.fromarray(smooth().permute(1, 2, 0).numpy()), format, quality=95)
    assert (read_media(content).pixels.float() - smooth().float()).abs().mean() < 2.0


def test_other_modes_become_rgb() -> None:
    red = Image.new("RGB", (4, 3), (200, 10, 30))
    for image, expected in (
        (Image.new("L", (4, 3), 77), (77, 77, 77)),
        (Image.new("1", (4, 3), 1), (255, 255, 255)),
        (red.quantize(4), (200, 10, 30)),
    ):
        media = read_media(encode(image, "PNG"))
        assert torch.equal(media.pixels, torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(3, 3, 4))
        assert media.transparent == 0
    # Inks without a colour profile: what each lacks of full ink is what is left of its light.
    for ink, colour in (((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 155), (100,) * 3)):
        for format in ("JPEG", "TIFF"):
            seen = read_media(encode(Image.new("CMYK", (16, 16), ink), format)).pixels[:, 8, 8]
            assert (seen.float() - torch.tensor(colour).float()).abs().max() <= 3, (ink, format, seen)


# ---- What is transparent ----


def faded() -> Image.Image:
    """Noise, its left third opaque, its middle at alpha 128, its right third at alpha 0 (a part of which is black)."""
    pixels = torch.cat([noise(7, 6, 9, 3), torch.zeros(6, 9, 1, dtype=torch.uint8)], dim=-1)
    pixels[:, :3, 3], pixels[:, 3:6, 3] = 255, 128
    pixels[:, 8, :3] = 0
    return Image.fromarray(pixels.numpy(), "RGBA")


def on_white(image: Image.Image) -> Tensor:
    """``[3, H, W]`` float64: the definition of "over" with a white background."""
    value = torch.frombuffer(bytearray(image.convert("RGBA").tobytes()), dtype=torch.uint8).double()
    colour, alpha = value.view(image.height, image.width, 4).permute(2, 0, 1).split([3, 1])
    return alpha / 255 * colour + (1 - alpha / 255) * 255


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_are_shown_on_white(format: str) -> None:
    image = faded()
    options = {"WEBP": {"lossless": True, "exact": True}}.get(format, {})
    media = read_media(encode(image, format, **options))
    assert (media.pixels - on_white(image)).abs().max() <= 0.5
    assert torch.equal(media.pixels[:, :, 6:].unique(), torch.tensor([255])) and BACKGROUND == 255
    assert torch.equal(media.pixels[:, :, :3], noise(7, 6, 9, 3).permute(2, 0, 1)[:, :, :3])
    assert media.transparent == pytest.approx(2 / 3)


def test_every_kind_of_transparency_counts() -> None:
    """A palette's, one transparent colour's, grey with alpha, and what a turned image has."""
    red = Image.new("RGB", (4, 3), (200, 10, 30))
    red.paste((0, 0, 0), (0, 0, 2, 3))
    palette = red.quantize(2, dither=Image.Dither.NONE)
    colours = palette.getpalette() or []
    alphas = bytes(0 if colours[3 * index] == 0 else 255 for index in range(2))
    grey = Image.new("LA", (4, 3), (90, 255))
    grey.paste((90, 0), (0, 0, 2, 3))
    exif = Image.Exif()
    exif[0x0112] = 2  # mirrored
    kinds: dict[str, tuple[bytes, tuple[int, int, int]]] = {
        "palette": (encode(palette, "PNG", transparency=alphas), (200, 10, 30)),
        "gif": (encode(palette, "GIF", transparency=alphas.index(0)), (200, 10, 30)),
        "one colour": (encode(red, "PNG", transparency=(0, 0, 0)), (200, 10, 30)),
        "one grey": (encode(red.convert("L"), "PNG", transparency=0), (69, 69, 69)),
        "grey": (encode(grey, "PNG"), (90, 90, 90)),
        "turned": (encode(grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG", exif=exif), (90, 90, 90)),
    }
    for name, (content, colour) in kinds.items():
        media = read_media(content)
        assert torch.equal(media.pixels[:, :, :2].unique(), torch.tensor([255])), name
        assert media.pixels[:, 0, 3].tolist() == list(colour), name
        assert media.transparent == 0.5, name


def test_an_alpha_channel_that_hides_nothing_changes_nothing() -> None:
    image = picture()
    image.putalpha(255)
    media = read_media(encode(image, "PNG"))
    assert torch.equal(media.pixels, noise(7, 20, 30, 3).permute(2, 0, 1)) and media.transparent == 0


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix", "tags", "rounding"),
    [
        ("ffv1", "bgra", "mkv", {}, 0.5),
        ("qtrle", "argb", "mov", {}, 0.5),
        ("png", "rgba", "mov", {}, 0.5),
        ("prores_ks", "yuva444p10le", "mov", {}, 6),
        ("libvpx", "yuva420p", "webm", {}, 6),
        ("libvpx-vp9", "yuva420p", "webm", {}, 6),
        # As `ffmpeg -metadata:s:v alpha_mode=1` and `ffmpeg -c copy` write it: as a tag, which is read as ALPHA_MODE.
        ("libvpx", "yuva420p", "mkv", {"alpha_mode": "1"}, 6),
        ("libvpx-vp9", "yuva420p", "webm", {"ALPHA_MODE": "1"}, 6),
    ],
)
def test_transparent_clips_are_shown_on_white(
    tmp_path: Path, codec: str, pix_fmt: str, suffix: str, tags: dict[str, str], rounding: float
) -> None:
    pixels = torch.cat([clip(3, frames=3, height=16, width=48), torch.zeros(3, 1, 16, 48, dtype=torch.uint8)], dim=1)
    pixels[:, 3, :, :16], pixels[:, 3, :, 16:32] = 255, 128
    path = tmp_path / f"clip.{suffix}"
    encode_clip(path, pixels, codec=codec, pix_fmt=pix_fmt, tags=tags)
    alpha = pixels[:, 3:].double() / 255
    expected = alpha * pixels[:, :3] + (1 - alpha) * 255
    media = read_media(path, 3)
    # Not at the edges, where a codec that is not lossless mixes both sides.
    inside = torch.cat([torch.arange(start + 4, start + 12) for start in (0, 16, 32)])
    assert (media.pixels - expected)[..., inside].abs().max() <= rounding
    assert media.transparent == pytest.approx(2 / 3, abs=0.05)
    assert read_spaced(path, 1).transparent == probe_media(path).transparent == pytest.approx(2 / 3, abs=0.05)


def test_transparent_gif_is_shown_on_white() -> None:
    frames = [faded().point(lambda level: 255 if level > 200 else 0) for _ in range(2)]
    frames[1].paste((255, 0, 0, 255), (0, 0, 3, 6))
    media = read_media(encode(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2), 2)
    assert torch.equal(media.pixels[:, :, :, 3:].unique(), torch.tensor([255]))
    assert media.pixels[1, :, 0, 0].tolist() == [255, 0, 0] and media.transparent == pytest.approx(2 / 3)


# ---- How an image is to be shown ----


ORIENTED = {
    1: lambda image: image,
    2: lambda image: image.flip(-1),
    3: lambda image: image.flip(-1, -2),
    4: lambda image: image.flip(-2),
    5: lambda image: image.transpose(-1, -2),
    6: lambda image: torch.rot90(image, -1, (-2, -1)),
    7: lambda image: image.transpose(-1, -2).flip(-1, -2),
    8: lambda image: torch.rot90(image, 1, (-2, -1)),
}
"""What each value of EXIF's orientation asks a viewer to do."""


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_image_is_turned_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    turned = read_media(encode(picture(), format, exif=exif, **options)).pixels
    expected = ORIENTED[orientation](noise(7, 20, 30, 3).permute(2, 0, 1))
    assert turned.shape == expected.shape
    assert (turned.float() - expected.float()).abs().max() <= (4 if format == "JPEG" else 0)  # rounded as Y'CbCr
    # SDXL is told the size that the image is shown at.
    assert fit(turned, 16, 16).original_size == ((20, 30) if orientation < 5 else (30, 20))


def test_sdxl_is_told_sizes_and_crops_of_the_upright_image() -> None:
    """20x30 is shown as 30x20 and covers 16x16 as 24x16, of which 4 rows go at the top and 4 at the bottom."""
    exif = Image.Exif()
    exif[0x0112] = 6
    fitted = fit(read_media(encode(picture(), "PNG", exif=exif)).pixels, 16, 16)
    own = get("sdxl").own_condition(fitted.original_size, fitted.crop_top_left, (16, 16))
    assert own["time_ids"].tolist() == [30, 20, 4, 0, 16, 16]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP"])
def test_density_of_an_image_is_told_and_not_followed(format: str) -> None:
    """Browsers, Pillow and every training script take an image's pixels as square."""
    media = read_media(encode(picture(), format, dpi=(72, 144)))
    assert media.pixels.shape == (3, 20, 30)
    assert media.pixel_aspect == pytest.approx(2.0, rel=0.01)
    for density in ((72, 72), (300, 299)):
        assert read_media(encode(picture(), format, dpi=density)).pixel_aspect == 1
    assert read_media(encode(picture(), format)).pixel_aspect == 1


def test_density_without_a_unit() -> None:
    """A JPEG, or a PNG, whose two densities say their ratio alone."""
    jpeg = bytearray(encode(picture(), "JPEG"))
    place = jpeg.index(b"JFIF\x00") + 7
    jpeg[place : place + 5] = struct.pack(">BHH", 0, 3, 4)
    assert read_media(bytes(jpeg)).pixel_aspect == pytest.approx(4 / 3)
    jpeg[place : place + 5] = struct.pack(">BHH", 0, 0, 4)  # senseless
    assert read_media(bytes(jpeg)).pixel_aspect == 1
    tiff = encode(picture(), "TIFF", dpi=(72, 144))
    without = tiff.replace(struct.pack("<II", 144, 1), bytes(8))  # 0/0
    assert without != tiff and read_media(without).pixel_aspect == 1


def test_first_image_of_a_camera_s_file_is_the_picture() -> None:
    """MPO: a JPEG with a preview, or a second eye's view, behind it."""
    photo = Image.fromarray(smooth().permute(1, 2, 0).numpy())
    content = encode(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], quality=95)
    assert (read_media(content).pixels.float() - smooth().float()).abs().mean() < 2.0


def png(depth: int, colour_type: int, row: bytes, width: int, transparency: bytes = b"") -> bytes:
    """One row of pixels of a depth that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparency), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, held in chunks:
        if held or kind == b"IEND":
            content += struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))
    return content


def test_sixteen_bits_of_a_colour_become_eight() -> None:
    """The upper eight of each, as viewers show them."""
    for colour_type, values in ((2, (0x1234, 0xFF00, 0x80FF)), (6, (0x1234, 0xFF00, 0x80FF, 0xFFFF))):
        content = png(16, colour_type, struct.pack(f">{len(values)}H", *values) * 2, 2)
        assert read_media(content).pixels[:, 0, 1].tolist() == [0x12, 0xFF, 0x80]


@pytest.mark.parametrize(
    ("depth", "row", "width"),
    [(1, b"\x40", 2), (2, b"\x1b", 4), (4, bytes(range(0x01, 0x100, 0x22)), 16)],
    ids=["1", "2", "4"],
)
def test_a_transparent_grey_of_few_bits(depth: int, row: bytes, width: int) -> None:
    """It is named in the file's own bits, and not in the eight that come of them."""
    for key in range(width):
        expected = [255 * level // (width - 1) for level in range(width)]
        expected[key] = 255
        media = read_media(png(depth, 0, row, width, struct.pack(">H", key)))
        assert media.pixels[:, 0].tolist() == 3 * [expected] and media.transparent == pytest.approx(1 / width)


@pytest.mark.parametrize("key", [(0xC8FF, 0x10FF, 0x00FF), (0, 0, 0)])
def test_a_transparent_colour_of_sixteen_bits_is_refused(key: tuple[int, int, int]) -> None:
    """Of eight bits, colours that are not it would be transparent with it, or it would not be."""
    row = struct.pack(">6H", 0xC8FF, 0x10FF, 0x00FF, 0, 0, 0xFF)
    with pytest.raises(MediaError, match="has a transparent colour of 16 bits, expected an alpha channel") as caught:
        read_media(png(16, 2, row, 2, struct.pack(">3H", *key)))
    assert caught.value.kind == "undecodable"


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("frames", [1, 2])
def test_several_images_in_one_file_are_refused_by_name(format: str, frames: int) -> None:
    content = encode(picture(), format, save_all=True, append_images=[Image.new("RGB", (30, 20))])
    with pytest.raises(MediaError, match=f"holds 2 images in one {format} file, expected one image") as caught:
        read_media(content, frames)
    assert caught.value.kind == "medium"


def test_deep_image_is_refused() -> None:
    content = encode(Image.new("I;16", (4, 4), 40000), "PNG")
    with pytest.raises(MediaError, match=r"bytes in memory: .*mode I;16, expected 8 bits") as caught:
        read_media(content)
    assert caught.value.kind == "undecodable"


def has_avif() -> bool:
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return False
    return AvifImagePlugin.SUPPORTED


@pytest.mark.skipif(not has_avif(), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif_is_an_image(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(smooth().permute(1, 2, 0).numpy())
    path = tmp_path / "image.avif"
    path.write_bytes(encode(image, "AVIF", quality=95, exif=exif))
    expected = smooth() if orientation == 1 else torch.rot90(smooth(), -1, (1, 2))
    for read in (read_media, probe_media, lambda source: read_spaced(source, 2)):
        media = read(path)
        assert media.pixels.shape == expected.shape and media.fps is None
        assert (media.pixels.float() - expected.float()).abs().mean() < 2.0
    with pytest.raises(MediaError, match="is an image, expected a clip of 3 frames"):
        read_media(path, 3)
    image.putalpha(0)
    assert read_media(encode(image, "AVIF", quality=95)).transparent == 1.0
    cut_short(path)
    with pytest.raises(MediaError, match=r"image\.avif: cannot be decoded: "):
        read_media(path)


def png_chunks(content: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with further chunks behind its header."""
    more = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return content[:33] + b"".join(more) + content[33:]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"", b"MM", b"Exif", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\x01\x12"])
def test_exif_that_cannot_be_read_is_passed_over(exif: bytes) -> None:
    content = encode(picture(), "PNG")
    media = read_media(png_chunks(content, (b"eXIf", exif)))
    assert torch.equal(media.pixels, read_media(content).pixels)


def test_long_text_in_a_png_is_no_fault_and_too_much_is_one_line() -> None:
    """Image generators store their settings in it, with images in these."""
    content = encode(picture(), "PNG")
    text = b"workflow\0\0" + zlib.compress(bytes(3 << 20))
    assert torch.equal(read_media(png_chunks(content, (b"zTXt", text))).pixels, read_media(content).pixels)
    for name, data in (
        (b"zTXt", b"bomb\0\0" + zlib.compress(bytes(65 << 20), 1)),
        (b"iTXt", b"bomb\0\1\0\0\0" + zlib.compress(bytes(65 << 20), 1)),
    ):
        with pytest.raises(MediaError, match=r"memory: cannot be decoded: holds more than 64 MB of text$") as caught:
            read_media(png_chunks(content, (name, data)))
        assert caught.value.kind == "undecodable"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_an_image_of_more_pixels_than_allowed_is_not_decoded(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    content = encode(picture(), format)
    assert read_media(content, max_pixels=600).pixels.shape == (3, 20, 30)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    for read in (read_media, probe_media, lambda source, **limit: read_spaced(source, 2, **limit)):
        with pytest.raises(MediaError, match=r"has 20x30 pixels, expected at most 599 \(max_pixels\)$") as caught:
            read(content, max_pixels=599)
        assert caught.value.kind == "large"


def test_our_limit_of_pixels_counts_and_not_pillow_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which warns above 89 million, and refuses twice as many, whatever the key says."""
    content = encode(picture(), "PNG")
    for side, message in (
        (12_000, "has 12000x12000 pixels, expected at most 120000000"),
        (60_000, "has 3600000000 pixels, expected at most 120000000"),
    ):
        header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
        large = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
        with warnings.catch_warnings(), pytest.raises(MediaError, match=f"{message} \\(max_pixels\\)$") as caught:
            warnings.simplefilter("ignore")
            read_media(large)
        assert caught.value.kind == "large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_media(content, max_pixels=600).pixels.shape == (3, 20, 30)


def test_a_tall_image_is_converted_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result, for every kind of image."""
    palette = picture().quantize(7)
    images = [picture(), faded(), palette, picture().convert("CMYK"), picture().convert("LA"), picture().convert("1")]
    contents = [encode(image, "TIFF") for image in images] + [encode(palette, "PNG", transparency=3)]
    whole = [read_media(content) for content in contents]
    monkeypatch.setattr("sipo.data.images._STRIP", 70)
    for content, expected in zip(contents, whole, strict=True):
        media = read_media(content)
        assert torch.equal(media.pixels, expected.pixels)
        assert media.transparent == pytest.approx(expected.transparent)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_image_cut_short_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, share: float
) -> None:
    # Another package has asked Pillow to be content with half an image.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / "image.png"
    path.write_bytes(encode(picture(), format))
    cut_short(path, share)
    with pytest.raises(MediaError, match=r"^\S*image\.png: [^\n]*$") as caught:
        read_media(path)
    assert caught.value.kind == "undecodable"


@pytest.mark.parametrize(("format", "end"), [("PNG", 12), ("GIF", 2)])
def test_an_image_that_lacks_only_what_follows_its_pixels_is_whole(format: str, end: int) -> None:
    content = encode(picture(), format)
    assert torch.equal(read_media(content[:-end]).pixels, read_media(content).pixels)
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_media(content[: -2 * end - 40])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_damaged_png_is_an_error(tmp_path: Path, share: float) -> None:
    path = tmp_path / "image.png"
    write_image(path, noise(1, 3, 64, 64))
    damage(path, share, count=1)
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_media(path)


def test_missing_file(tmp_path: Path) -> None:
    for read in (read_media, probe_media):
        with pytest.raises(MediaError, match=r"none\.png: no such file$") as caught:
            read(tmp_path / "none.png")
        assert caught.value.kind == "missing"


@pytest.mark.parametrize("what", ["a folder", "a FIFO", "a socket", "a device", "a loop"])
def test_what_is_no_regular_file_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Opening a FIFO would wait for ever for somebody to write to it."""
    path = tmp_path / "image.png"
    if what == "a folder":
        path.mkdir()
    elif what == "a FIFO":
        os.mkfifo(path)
    elif what == "a socket":
        monkeypatch.chdir(tmp_path)  # a socket's path may have about a hundred characters
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        path.symlink_to("/dev/zero" if what == "a device" else path.name)
    problem = f"is {what}, expected a file"
    if what == "a loop":
        problem = "cannot be read: Too many levels of symbolic links"
    for read in (read_media, probe_media, lambda source: read_spaced(source, 2)):
        with pytest.raises(MediaError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: {problem}" and caught.value.kind == "missing"


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "a/" * 2500 + "b.png", "nul\0.png"], ids=["name", "path", "null"])
def test_a_path_that_no_file_can_have_is_a_missing_file(tmp_path: Path, name: str) -> None:
    for read in (read_media, probe_media):
        with pytest.raises(MediaError, match=r"(cannot be read: File name too long|no such file)$") as caught:
            read(tmp_path / name)
        assert caught.value.kind == "missing" and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["two\nlines.png", "two\u2028lines.png", "half\ud800.png"])
def test_names_that_cannot_be_printed_are_escaped(name: str) -> None:
    with pytest.raises(MediaError) as caught:
        read_media(Path(name))
    assert str(caught.value) == f"{name!r}: no such file" and str(caught.value).isprintable()


def test_a_file_that_may_not_be_read_is_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path / "image.png"))

    write_image(tmp_path / "image.png", noise(1, 3, 8, 8))
    for place in ("PIL.Image.open", "pathlib.Path.stat"):
        with monkeypatch.context() as patch:
            patch.setattr(place, refuse)
            with pytest.raises(MediaError, match=r"image\.png: cannot be read: Permission denied$") as caught:
                read_media(tmp_path / "image.png")
        assert caught.value.kind == "missing"


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

    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr("sipo.data.clips._rgb", fail)
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
        assert fit(media.pixels, 40, 40).original_size == shown


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


# ---- Fitting ----


def test_fit_at_the_same_size_changes_nothing() -> None:
    pixels = noise(2, 3, 16, 24)
    fitted = fit(pixels, 16, 24)
    assert torch.equal(fitted.pixels, pixels)
    assert (fitted.crop_top_left, fitted.original_size) == ((0, 0), (16, 24))
    mirrored = fit(pixels, 16, 24, flip=True)
    assert torch.equal(mirrored.pixels, fitted.pixels.flip(-1))


def test_fit_crops_the_middle_without_distortion() -> None:
    """Covering 32x32 takes 16x24 to 32x48; 16 columns are over."""
    pixels = smooth(16, 24)
    fitted = fit(pixels, 32, 32)
    assert fitted.pixels.shape == (3, 32, 32) and fitted.pixels.dtype == torch.uint8
    assert (fitted.crop_top_left, fitted.original_size) == ((0, 8), (16, 24))
    wide = fit(pixels, 32, 48).pixels
    assert torch.equal(fitted.pixels, wide[..., 8:40])
    # Bicubic scaling keeps a gradient a gradient.
    expected = torch.linspace(30, 200, 24)
    assert wide[1].float().mean(0)[2:-2:2].sub(expected[1:-1]).abs().max() < 5


def test_fit_is_antialiased() -> None:
    """Stripes as narrow as a pixel become their mean, and no coarser stripes."""
    stripes = torch.zeros(3, 64, 66, dtype=torch.uint8)
    stripes[..., ::2] = 200
    small = fit(stripes, 16, 16).pixels
    assert (small.int() - 100).abs().max() < 25
    moving = fit(stripes.expand(4, 3, 64, 66), 16, 16).pixels
    assert torch.equal(moving, small.expand(4, 3, 16, 16))


def test_fit_rounds_once() -> None:
    """To the nearest level of what floats give for the whole clip: rounding between the two directions would show."""
    pixels = noise(7, 2, 3, 37, 53)
    exact = torch.nn.functional.interpolate(
        pixels.double(), (16, 23), mode="bicubic", antialias=True, align_corners=False
    )
    found = fit(pixels, 16, 16).pixels
    assert ((found - exact[..., 3:19].clamp(0, 255)).abs() < 0.5001).all()


def test_random_crops_follow_the_generator() -> None:
    pixels = noise(3, 3, 16, 40)
    seen = set()
    for seed in range(40):
        fitted = fit(pixels, 16, 16, center_crop=False, generator=torch.Generator().manual_seed(seed))
        again = fit(pixels, 16, 16, center_crop=False, generator=torch.Generator().manual_seed(seed))
        top, left = fitted.crop_top_left
        assert fitted.crop_top_left == again.crop_top_left and top == 0 and 0 <= left <= 24
        assert torch.equal(fitted.pixels, pixels[..., left : left + 16])
        seen.add(left)
    assert len(seen) > 15 and min(seen) < 4 and max(seen) > 20


def test_flip_comes_before_the_crop() -> None:
    pixels = noise(4, 3, 16, 40)
    fitted = fit(pixels, 16, 16, center_crop=False, flip=True, generator=torch.Generator().manual_seed(0))
    left = fitted.crop_top_left[1]
    assert torch.equal(fitted.pixels, pixels.flip(-1)[..., left : left + 16])


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (512, 512, (512, 512)),
        (500, 500, (512, 512)),
        (2000, 2000, (1024, 1024)),
        (600, 900, (512, 768)),
        (900, 600, (768, 512)),
        (100, 1000, (512, 768)),
    ],
)
def test_nearest_size(height: int, width: int, expected: tuple[int, int]) -> None:
    sizes = [(512, 512), (1024, 1024), (512, 768), (768, 512)]
    assert nearest_size(height, width, sizes) == expected


# ---- Writing ----


def test_grid_has_every_image_in_its_place(tmp_path: Path) -> None:
    images = noise(5, 5, 3, 6, 8)
    write_image_grid(tmp_path / "deep" / "grid.png", images, columns=3, gap=2)
    grid = read_media(tmp_path / "deep" / "grid.png").pixels
    assert grid.shape == (3, 2 * 8 - 2, 3 * 10 - 2)
    for index, image in enumerate(images):
        top, left = index // 3 * 8, index % 3 * 10
        assert torch.equal(grid[:, top : top + 6, left : left + 8], image)
    assert (grid[:, 8:, 20:] == 255).all() and (grid[:, 6:8] == 255).all()


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, counted(4), 8.0)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="frames are 5x6, expected even sides"):
        write_video(path, noise(1, 4, 3, 5, 6), 8.0)
    for pixels in (noise(1, 3, 4, 4), noise(1, 2, 3, 4, 4).float(), noise(1, 0, 3, 4, 4), noise(1, 2, 4, 4, 3)):
        with pytest.raises(ValueError, match=r"expected torch\.uint8"):
            write_video(path, pixels, 8.0)
    with pytest.raises(ValueError, match=r"expected torch.uint8 \[3, H, W\]"):
        write_image(path, noise(1, 1, 3, 4, 4))
    with pytest.raises(av.FFmpegError):
        write_video(path, noise(1, 4, 3, 16, 16), 8.0, crf=-100000)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["clip.mp4"]
