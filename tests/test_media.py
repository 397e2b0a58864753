"""Images and clips: the pixels that were written come back, and damaged files are errors that name them."""

from __future__ import annotations

import os
import socket
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import av
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from sipo.data.clips import BACKGROUND
from sipo.data.media import (
    MediaError,
    nearest_size,
    probe_media,
    read_media,
    read_spaced,
    resize_and_crop,
    write_image,
    write_image_grid,
    write_video,
)
from sipo.families import get_family
from tests.data_sets import clip, cut_short, damage, encode_clip, noise
from tests.media_files import counted, encode, has_avif, picture, smooth

"""Grey levels between one frame of :func:`counted` and the next."""


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
    assert resize_and_crop(turned, 16, 16).original_size == ((20, 30) if orientation < 5 else (30, 20))


def test_sdxl_is_told_sizes_and_crops_of_the_upright_image() -> None:
    """20x30 is shown as 30x20 and covers 16x16 as 24x16, of which 4 rows go at the top and 4 at the bottom."""
    exif = Image.Exif()
    exif[0x0112] = 6
    fitted = resize_and_crop(read_media(encode(picture(), "PNG", exif=exif)).pixels, 16, 16)
    own = get_family("sdxl").own_condition(fitted.original_size, fitted.crop_top_left, (16, 16))
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
    refused = PermissionError(13, "Permission denied", str(tmp_path / "image.png"))
    write_image(tmp_path / "image.png", noise(1, 3, 8, 8))
    for place in ("PIL.Image.open", "pathlib.Path.stat"):
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=refused))
            with pytest.raises(MediaError, match=r"image\.png: cannot be read: Permission denied$") as caught:
                read_media(tmp_path / "image.png")
        assert caught.value.kind == "missing"


# ---- Fitting ----


def test_fit_at_the_same_size_changes_nothing() -> None:
    pixels = noise(2, 3, 16, 24)
    fitted = resize_and_crop(pixels, 16, 24)
    assert torch.equal(fitted.pixels, pixels)
    assert (fitted.crop_top_left, fitted.original_size) == ((0, 0), (16, 24))
    mirrored = resize_and_crop(pixels, 16, 24, flip=True)
    assert torch.equal(mirrored.pixels, fitted.pixels.flip(-1))


def test_fit_crops_the_middle_without_distortion() -> None:
    """Covering 32x32 takes 16x24 to 32x48; 16 columns are over."""
    pixels = smooth(16, 24)
    fitted = resize_and_crop(pixels, 32, 32)
    assert fitted.pixels.shape == (3, 32, 32) and fitted.pixels.dtype == torch.uint8
    assert (fitted.crop_top_left, fitted.original_size) == ((0, 8), (16, 24))
    wide = resize_and_crop(pixels, 32, 48).pixels
    assert torch.equal(fitted.pixels, wide[..., 8:40])
    # Bicubic scaling keeps a gradient a gradient.
    expected = torch.linspace(30, 200, 24)
    assert wide[1].float().mean(0)[2:-2:2].sub(expected[1:-1]).abs().max() < 5


def test_fit_is_antialiased() -> None:
    """Stripes as narrow as a pixel become their mean, and no coarser stripes."""
    stripes = torch.zeros(3, 64, 66, dtype=torch.uint8)
    stripes[..., ::2] = 200
    small = resize_and_crop(stripes, 16, 16).pixels
    assert (small.int() - 100).abs().max() < 25
    moving = resize_and_crop(stripes.expand(4, 3, 64, 66), 16, 16).pixels
    assert torch.equal(moving, small.expand(4, 3, 16, 16))


def test_fit_rounds_once() -> None:
    """To the nearest level of what floats give for the whole clip: rounding between the two directions would show."""
    pixels = noise(7, 2, 3, 37, 53)
    exact = torch.nn.functional.interpolate(
        pixels.double(), (16, 23), mode="bicubic", antialias=True, align_corners=False
    )
    found = resize_and_crop(pixels, 16, 16).pixels
    assert ((found - exact[..., 3:19].clamp(0, 255)).abs() < 0.5001).all()


@pytest.mark.parametrize("size", [(43, 64), (63, 95), (85, 128)])
def test_images_of_one_shape_in_other_sizes_are_cropped_at_the_same_place(size: tuple[int, int]) -> None:
    """As a pair's samples, condition image and error mask may be: rounding makes them differ by a pixel."""
    for seed in range(20):
        lefts = []
        for height, width in ((64, 96), size):
            generator = torch.Generator().manual_seed(seed)
            pixels = torch.zeros(3, height, width, dtype=torch.uint8)
            fitted = resize_and_crop(pixels, 64, 64, center_crop=False, generator=generator)
            lefts.append(fitted.crop_top_left[1])
        assert abs(lefts[0] - lefts[1]) <= 1


def test_random_crops_follow_the_generator() -> None:
    pixels = noise(3, 3, 16, 40)
    seen = set()
    for seed in range(40):
        fitted = resize_and_crop(pixels, 16, 16, center_crop=False, generator=torch.Generator().manual_seed(seed))
        again = resize_and_crop(pixels, 16, 16, center_crop=False, generator=torch.Generator().manual_seed(seed))
        top, left = fitted.crop_top_left
        assert fitted.crop_top_left == again.crop_top_left and top == 0 and 0 <= left <= 24
        assert torch.equal(fitted.pixels, pixels[..., left : left + 16])
        seen.add(left)
    assert len(seen) > 15 and min(seen) < 4 and max(seen) > 20


def test_flip_comes_before_the_crop() -> None:
    pixels = noise(4, 3, 16, 40)
    fitted = resize_and_crop(pixels, 16, 16, center_crop=False, flip=True, generator=torch.Generator().manual_seed(0))
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
    write_image_grid(tmp_path / "deep" / "grid.png", images)
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
        write_video(path, noise(1, 4, 3, 16, 16), -8.0)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["clip.mp4"]
