"""Families of diffusion models that sipo can train; importing this module does not import diffusers."""

from __future__ import annotations

import difflib

from sipo.families.base import Family
from sipo.families.chroma import Chroma
from sipo.families.cogvideox import CogVideoX
from sipo.families.flux import Flux, FluxKontext
from sipo.families.flux2 import Flux2, Flux2Klein
from sipo.families.lumina2 import Lumina2
from sipo.families.network import Condition
from sipo.families.qwen_image import QwenImage, QwenImageEdit, QwenImageEditPlus
from sipo.families.qwen_image_21 import QwenImage21, QwenImage21Edit
from sipo.families.sana import Sana
from sipo.families.sd3 import StableDiffusion3
from sipo.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from sipo.families.wan import Wan, Wan22
from sipo.families.z_image import ZImage

__all__ = ["FAMILIES", "Condition", "Family", "get_family"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        StableDiffusion(),
        StableDiffusionXL(),
        StableDiffusion3(),
        Flux(),
        FluxKontext(),
        Chroma(),
        Flux2(),
        Flux2Klein(),
        QwenImage(),
        QwenImage21(),
        QwenImage21Edit(),
        QwenImageEdit(),
        QwenImageEditPlus(),
        ZImage(),
        Lumina2(),
        Sana(),
        CogVideoX(),
        Wan(),
        Wan22(),
    )
}
"""All families by their names in ``model.family`` of a configuration."""


def get_family(name: str) -> Family:
    """Returns the family of a name.

    Raises:
        ValueError: there is no such family; lists the names.
    """
    if name not in FAMILIES:
        close = difflib.get_close_matches(str(name), FAMILIES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"family={name!r}: expected one of {', '.join(FAMILIES)}{hint}")
    return FAMILIES[name]
