"""Conversions around a VAE: pixels to floats, and the mean and scale of its latents."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sipo.files import FileError

LATENT_PIXELS = 8
"""Height and width of one latent in pixels, for the VAE of every family."""


def as_floats(pixels: Tensor) -> Tensor:
    """Converts uint8 pixels to float32 in [-1, 1], with the same bits on every device; leaves floats unchanged."""
    if pixels.dtype != torch.uint8:
        return pixels
    # Divided by a tensor, because GPUs divide by a Python number through its rounded inverse.
    half = torch.full((), 127.5, dtype=torch.float32, device=pixels.device)
    return pixels.to(torch.float32).div_(half).sub_(1.0)


def latent_affine(config: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Returns mean and scale of a VAE's latents ``[N, C, ...]``: the network takes ``(latents - mean) * scale``."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or 0.0, scale
    shape = (1, -1, *[1] * (latents.ndim - 2))
    return latents.new_tensor(mean).view(shape), scale / latents.new_tensor(std).view(shape)


def check_latent_affine(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses values in a VAE's ``config.json`` that :func:`latent_affine` cannot use.

    Raises:
        FileError: names the file, the key and the value.
    """
    channels = config.get("latent_channels") or config.get("z_dim")
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if values is None:
            continue
        positive = name == "latents_std"
        sound = isinstance(values, list) and all(_fits_float32(value, positive) for value in values)
        if not sound or (isinstance(channels, int) and len(values) != channels):
            kind = "positive numbers" if positive else "finite numbers"
            shown = reprlib.repr(values)
            raise FileError(f"{file}: {name}={shown}, expected {kind}, one for each of {channels} channels")
    for name, positive in (("scaling_factor", True), ("shift_factor", False)):
        # Without the key, diffusers uses the default of the class. shift_factor may be null.
        value = config.get(name, 1.0)
        if not (_fits_float32(value, positive) or (value is None and not positive)):
            kind = "a positive number" if positive else "a finite number"
            raise FileError(f"{file}: {name}={reprlib.repr(value)}, expected {kind}")


def _fits_float32(value: Any, positive: bool) -> bool:
    """Tells whether a value is a finite number in float32, and above 0 if ``positive``."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= torch.finfo(torch.float32).max and (value > 0 or not positive)
