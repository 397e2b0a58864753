"""Families of diffusion models that can be aligned. diffusers is imported by what is called, not here."""

from __future__ import annotations

import difflib

from sipo.families.base import Family
from sipo.families.cogvideox import CogVideoX
from sipo.families.network import Condition
from sipo.families.sd3 import StableDiffusion3
from sipo.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from sipo.families.wan import Wan

__all__ = ["FAMILIES", "Condition", "Family", "get"]

FAMILIES: dict[str, Family] = {
    family.name: family for family in (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), CogVideoX(), Wan())
}
"""Every family under the name that a configuration's ``model.family`` has."""


def get(name: str) -> Family:
    """The family of a name.

    Raises:
        ValueError: no such family; names those there are.
    """
    if name not in FAMILIES:
        close = difflib.get_close_matches(str(name), FAMILIES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"family={name!r}: expected one of {', '.join(FAMILIES)}{hint}")
    return FAMILIES[name]
