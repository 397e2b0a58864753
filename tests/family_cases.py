"""Toy pipelines for the families' tests: built once a session, and what the real pipeline's calls look like."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor

from sipo.batch import network_timesteps
from sipo.families import Condition, Family, get_family
from sipo.families.toy import TOYS, build_toy

PROMPTS = ["a cat on the roof", "The thin red line, twice"]
each_toy = pytest.mark.parametrize("toy", list(TOYS))
HEIGHT, WIDTH, FRAMES = 32, 48, 9  # not square, so that no two sides can be mixed up

_FOLDER = tempfile.TemporaryDirectory()


def family_of(toy: str) -> Family:
    return get_family(TOYS[toy].family)


def size_of(family: Family) -> dict[str, int]:
    return {"height": HEIGHT, "width": WIDTH, "frames": FRAMES if family.video else 1}


@functools.cache
def folder_of(toy: str) -> Path:
    return build_toy(toy, Path(_FOLDER.name) / toy)


@functools.cache
def encoders_of(toy: str) -> Any:
    """The pipeline without its network; shared between tests, which leave it as it is."""
    return family_of(toy).load_encoders(folder_of(toy))


def load_toy(toy: str, **options: Any) -> tuple[Family, Any]:
    """Returns the family and a network of its own."""
    return family_of(toy), family_of(toy).load_network(folder_of(toy), **options)


def pipeline_of(toy: str, **components: Any) -> Any:
    """The whole pipeline, loaded as a user does."""
    pipeline = getattr(diffusers, family_of(toy).pipeline_class).from_pretrained(folder_of(toy), **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels_of(family: Family, n: int = 2, seed: int = 0) -> Tensor:
    """Random pixels in [-1, 1]."""
    shape = (n, FRAMES, 3, HEIGHT, WIDTH) if family.video else (n, 3, HEIGHT, WIDTH)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def stacked(family: Family, conditions: list[Condition], own: bool = True) -> Condition:
    """Conditions of several samples as one batch, with what the network is told beside the prompt."""
    told = family.own_condition((HEIGHT, WIDTH), (0, 0), (HEIGHT, WIDTH)) if own else {}
    return {name: torch.stack([(c | told)[name] for c in conditions]) for name in conditions[0] | told}


def network_input(toy: str, n: int = 2) -> tuple[Tensor, Tensor, Condition]:
    """Noisy latents, timesteps and condition to call ``predict`` with."""
    family = family_of(toy)
    latents = family.encode_pixels(encoders_of(toy), pixels_of(family, n))
    generator = torch.Generator().manual_seed(1)
    schedule = family.load_schedule(folder_of(toy))
    timesteps = network_timesteps(schedule, schedule.sample_levels(n, generator))
    noisy = latents + torch.randn(latents.shape, generator=generator)
    return noisy, timesteps, stacked(family, family.encode_text(encoders_of(toy), PROMPTS[:n]))


class Call(NamedTuple):
    """One call of the network by the real pipeline."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def given(self, name: str, position: int | None = None) -> Any:
        return self.args[position] if position is not None and len(self.args) > position else self.kwargs[name]


def sampled(pipeline: Any, family: Family, steps: int = 3, seed: int = 5, **options: Any) -> tuple[Any, list[Call]]:
    """What the real pipeline samples with guidance, and how it called the network meanwhile."""
    calls: list[Call] = []
    network = getattr(pipeline, family.network)

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call(args, kwargs, output[0].clone()))

    hook = network.register_forward_hook(record, with_kwargs=True)
    try:
        size = {"height": HEIGHT, "width": WIDTH} | ({"num_frames": FRAMES} if family.video else {})
        arguments: dict[str, Any] = {
            "prompt": PROMPTS[0],
            "guidance_scale": 3.0,
            "num_inference_steps": steps,
            "output_type": "pt",
            "generator": torch.Generator().manual_seed(seed),
            "return_dict": False,
        }
        output = pipeline(**(arguments | size | options))[0]
    finally:
        hook.remove()
    return output, calls


def as_uint8(pixels: Tensor) -> Tensor:
    return pixels.float().mul(255).round().to(torch.uint8)
