"""Builds small pipelines of every family with random weights, from the real classes.

For tests and examples: nothing is downloaded, a network's forward takes milliseconds, and an image of 32x32 pixels has
a few latents. Text encoders, VAE and network have the same parts, scaling and schedules as the full-size ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sipo.families.toy import (
    flux2_toys,
    flux_toys,
    lumina2_toys,
    qwen_image_toys,
    sana_toys,
    stable_diffusion_toys,
    video_toys,
    z_image_toys,
)
from sipo.files import aside


class Toy(NamedTuple):
    """A small pipeline: the name of its family, and the function that builds it."""

    family: str
    build: Callable[[], Any]


TOYS: dict[str, Toy] = {
    "sd15": Toy("sd15", stable_diffusion_toys.sd15),
    "sd21": Toy("sd15", stable_diffusion_toys.sd21),
    "sdxl": Toy("sdxl", stable_diffusion_toys.sdxl),
    "sd3": Toy("sd3", stable_diffusion_toys.sd3),
    "flux": Toy("flux", flux_toys.dev),
    "flux-schnell": Toy("flux", flux_toys.schnell),
    "flux-kontext": Toy("flux-kontext", flux_toys.kontext),
    "chroma": Toy("chroma", flux_toys.chroma),
    "flux2": Toy("flux2", flux2_toys.dev),
    "flux2-klein": Toy("flux2-klein", flux2_toys.klein),
    "qwen-image": Toy("qwen-image", qwen_image_toys.qwen_image),
    "qwen-image-2.1": Toy("qwen-image-2.1", qwen_image_toys.qwen_image_21),
    "qwen-image-2.1-edit": Toy("qwen-image-2.1-edit", qwen_image_toys.qwen_image_21),
    "qwen-image-edit": Toy("qwen-image-edit", qwen_image_toys.qwen_image_edit),
    "qwen-image-edit-plus": Toy("qwen-image-edit-plus", qwen_image_toys.qwen_image_edit_plus),
    "qwen-image-edit-2511": Toy("qwen-image-edit-plus", lambda: qwen_image_toys.qwen_image_edit_plus(zero_cond_t=True)),
    "z-image": Toy("z-image", z_image_toys.z_image),
    "lumina2": Toy("lumina2", lumina2_toys.lumina2),
    "sana": Toy("sana", sana_toys.sana),
    "cogvideox": Toy("cogvideox", video_toys.cogvideox),
    "cogvideox-2b": Toy("cogvideox", lambda: video_toys.cogvideox(rotary=False)),
    "wan": Toy("wan", video_toys.wan),
    "wan2.2": Toy("wan2.2", lambda: video_toys.wan(experts=True)),
}
"""All toys by name. A family's first toy has the family's name; others are variants that differ in their parts."""


def build_toy(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Writes a family's toy pipeline with random weights, in diffusers' layout.

    Args:
        name: a key of :data:`TOYS`.
        folder: output folder; replaced if it exists.
        seed: seed of the weights. The same name and seed give the same bytes; torch's generators are not changed.

    Returns:
        ``folder``.

    Raises:
        ValueError: the name is not known.
    """
    if name not in TOYS:
        raise ValueError(f"toy={name!r}: expected one of {', '.join(TOYS)}")
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = TOYS[name].build()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with aside(folder) as place:
        pipeline.save_pretrained(place, safe_serialization=True)
    return folder
