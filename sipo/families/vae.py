"""What surrounds a VAE: pixels as floats, encoding, and the mean and scale of its latents."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sipo.files import FileError


def as_floats(pixels: Tensor) -> Tensor:
    """Converts uint8 pixels to float32 in [-1, 1], with the same bits on every device; leaves floats unchanged."""
    if pixels.dtype != torch.uint8:
        return pixels
    # Divided by a tensor, because GPUs divide by a Python number through its rounded inverse.
    half = torch.full((), 127.5, dtype=torch.float32, device=pixels.device)
    return pixels.to(torch.float32).div_(half).sub_(1.0)


def as_picture(pixels: Tensor) -> Any:
    """Converts uint8 pixels ``[3, H, W]`` to an image of Pillow."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def latent_affine(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Returns mean and scale of a VAE's latents ``[N, C, ...]``: the network takes ``(latents - mean) * scale``.

    They are the running statistics of the VAE's batch norm if it has one, else the numbers of its configuration, for
    each channel or for all.
    """
    config, shape = vae.config, (1, -1, *[1] * (latents.ndim - 2))
    if hasattr(vae, "bn"):
        mean, variance = (tensor.to(latents).view(shape) for tensor in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + config.batch_norm_eps).rsqrt()
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or 0.0, scale
    return latents.new_tensor(mean).view(shape), scale / latents.new_tensor(std).view(shape)


def encode(vae: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Encodes pixels in a VAE's own type.

    Args:
        vae: a VAE of diffusers, on its device.
        pixels: floats in [-1, 1], laid out as the VAE takes them, on any device and in any type.
        generator: to draw from the posterior; ``None`` takes its mode. A VAE without a posterior needs none.

    Returns:
        Latents as the VAE gives them, float32.
    """
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        latents: Tensor = encoded.latent
    else:
        latents = posterior.mode() if generator is None else posterior.sample(generator)
    return latents.float()


class PipelineVae:
    """A VAE for a pipeline that runs in another type: encodes in its own type, and answers in the pipeline's.

    It is not a module, so that the pipeline takes device and dtype from its network.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, pixels: Tensor) -> Any:
        """Encodes pixels as the VAE's own method does; the posterior is always its mode."""
        latents = encode(self._vae, pixels, None).to(pixels.device, pixels.dtype)
        return SimpleNamespace(latents=latents)


def latent_channels(config: Mapping[str, Any]) -> Any:
    """Returns the number of channels of a VAE's latents; ``None`` if its configuration does not say."""
    return config.get("latent_channels") or config.get("z_dim")


def check_latent_affine(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses values in a VAE's ``config.json`` that :func:`latent_affine` cannot use.

    Raises:
        FileError: names the file, the key and the value.
    """
    channels = latent_channels(config)
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
