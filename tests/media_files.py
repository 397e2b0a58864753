"""Files of images and clips for tests of the media."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tests.data_sets import noise

STEP = 5


def counted(frames: int, height: int = 16, width: int = 32) -> Tensor:
    """A clip whose frame ``i`` is grey of level ``5 i``."""
    levels = torch.arange(frames, dtype=torch.uint8) * STEP
    return levels[:, None, None, None].expand(frames, 3, height, width).contiguous()


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


def has_avif() -> bool:
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return False
    return AvifImagePlugin.SUPPORTED
