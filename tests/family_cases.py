"""Toy pipelines for the families' tests: built once a session, and what the real pipeline's calls look like."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from sipo.batch import collate, network_timesteps
from sipo.families import Condition, Family, get_family
from sipo.families.experts import ExpertNetworks
from sipo.families.network import CONDITION_LATENTS
from sipo.families.toy import TOYS, build_toy
from sipo.families.tuning import lora_file, prepare_lora
from sipo.families.vae import as_picture

PROMPTS = ["a cat on the roof", "The thin red line, twice"]
QWEN_IMAGE_EDIT = {"qwen-image-edit": "edit", "qwen-image-edit-plus": "edit_plus"}
QWEN_IMAGE_21 = ("qwen-image-2.1", "qwen-image-2.1-edit")
SAMPLED: dict[str, dict[str, Any]] = {  # further arguments of a pipeline
    "sana": {"use_resolution_binning": False},
    "flux-kontext": {"max_area": 32 * 48, "_auto_resize": False},
    **{family: {"negative_prompt": " "} for family in ("qwen-image", *QWEN_IMAGE_EDIT)},
    **{
        family: {"negative_prompt": " ", "use_kv_cache": False, "output_resolution": (64 * 96) ** 0.5}
        for family in QWEN_IMAGE_21
    },
}
each_toy = pytest.mark.parametrize("toy", list(TOYS))
FRAMES = 9

_FOLDER = tempfile.TemporaryDirectory()


def _toy_dimensions(area: int, ratio: float) -> tuple[int, int]:
    width = math.sqrt(32 * 48 * ratio)
    return round(width / 16) * 16, round(width / ratio / 16) * 16


# Qwen-Image's pipelines enlarge the image that they edit to about a million pixels, which would take seconds.
for _name, _more in (("edit", (None,)), ("edit_plus", ())):
    importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{_name}").calculate_dimensions = (
        lambda area, ratio, more=_more: (*_toy_dimensions(area, ratio), *more)
    )


def family_of(toy: str) -> Family:
    return get_family(TOYS[toy].family)


def sides_of(family: Family) -> tuple[int, int]:
    """Height and width in pixels: not square, so that no two sides can be mixed up."""
    side = max(16, family.side_multiple)
    return 2 * side, 3 * side


def size_of(family: Family) -> dict[str, int]:
    height, width = sides_of(family)
    return {"height": height, "width": width, "frames": FRAMES if family.video else 1}


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


def lora_network(toy: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A network with an adapter that is not zero."""
    family, network = load_toy(toy, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        arguments: dict[str, Any] = {"rank": 2, "target_modules": family.lora_targets}
        prepare_lora(network, **(arguments | options))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    return network


def pipeline_of(toy: str, **components: Any) -> Any:
    """The whole pipeline, loaded as a user does."""
    pipeline = getattr(diffusers, family_of(toy).pipeline_class).from_pretrained(folder_of(toy), **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def network_of(pipeline: Any, family: Family) -> Any:
    """What the family makes of a whole pipeline's network or networks."""
    parts = {name: getattr(pipeline, name) for name in family.networks}
    return ExpertNetworks(parts, pipeline.config.boundary_ratio) if family.experts else parts[family.network]


def load_adapters(pipeline: Any, family: Family, folder: Path) -> Any:
    """Loads a saved adapter into a whole pipeline; returns what the family makes of its network or networks."""
    for name in family.networks:
        options = {} if name == family.network else {f"load_into_{name}": True}
        file = lora_file(family, folder, name)
        pipeline.load_lora_weights(file.parent, weight_name=file.name, **options)
    return network_of(pipeline, family)


def pixels_of(family: Family, n: int = 2, seed: int = 0) -> Tensor:
    """Random pixels in [-1, 1]."""
    shape = (n, FRAMES, 3, *sides_of(family)) if family.video else (n, 3, *sides_of(family))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def for_vae(family: Family, pixels: Tensor) -> Tensor:
    """Pixels as the family's VAE takes them."""
    if family.name in QWEN_IMAGE_21:  # with opacity
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    return pixels.transpose(1, 2) if family.video else pixels[:, :, None] if family.vae_frames else pixels


def images_of(family: Family, n: int = 2) -> list[Tensor] | None:
    """Random images to edit, ``[3, H, W]`` uint8, for a family that needs them."""
    if family.condition_image != "required":
        return None
    generator = torch.Generator().manual_seed(2)
    size = (3, *sides_of(family))
    return [torch.randint(256, size, dtype=torch.uint8, generator=generator) for _ in range(n)]


def sample_of(family: Family, n: int = 2) -> dict[str, Any]:
    """Size and images to call ``sample`` with."""
    return {**size_of(family), "images": images_of(family, n)}


def conditions_of(toy: str, prompts: list[str]) -> list[Condition]:
    """What the network is told of each prompt, and of its image."""
    family, encoders = family_of(toy), encoders_of(toy)
    images = images_of(family, len(prompts))
    texts = family.encode_text(encoders, prompts, images)
    latents = family.encode_condition_image(encoders, torch.stack(images)) if images else [{}] * len(texts)
    return [text | image for text, image in zip(texts, latents, strict=True)]


def stacked(family: Family, conditions: list[Condition], own: bool = True) -> Condition:
    """Conditions of several samples as one batch, with what the network is told beside the prompt."""
    told = family.own_condition(sides_of(family), (0, 0), sides_of(family)) if own else {}
    batch: Condition = collate([{"condition": condition | told} for condition in conditions])["condition"]
    return batch


def network_input(toy: str, n: int = 2) -> tuple[Tensor, Tensor, Condition]:
    """Noisy latents, timesteps and condition to call ``predict`` with."""
    family = family_of(toy)
    latents = family.encode_pixels(encoders_of(toy), pixels_of(family, n))
    generator = torch.Generator().manual_seed(1)
    schedule = family.load_schedule(folder_of(toy), sizes=[sides_of(family)])
    timesteps = network_timesteps(schedule, schedule.sample_levels(n, generator))
    noisy = latents + torch.randn(latents.shape, generator=generator)
    return noisy, timesteps, stacked(family, conditions_of(toy, PROMPTS[:n]))


class Call(NamedTuple):
    """One call of the network by the real pipeline: its arguments by name, and the scheduler's timestep."""

    arguments: dict[str, Any]
    output: Any
    timestep: Tensor

    def given(self, *names: str) -> Any:
        """The argument of the first of these names that there is: networks differ in theirs."""
        return next((self.arguments[name] for name in names if self.arguments.get(name) is not None), None)

    def noisy(self, family: Family) -> Tensor:
        """The latents that the network was given."""
        latents = self.given("sample", "hidden_states", "x")
        if isinstance(latents, list):
            return torch.stack(latents).squeeze(2)
        if family.token_side is None:
            return latents
        shape = family.latent_shape(encoders_of(family.name), **size_of(family))
        return family.unpack(latents, (len(latents), *shape))

    def condition_latents(self, family: Family) -> dict[str, Tensor]:
        """The latents of the image to edit, as the pipeline encoded them."""
        noisy = self.noisy(family)
        tokens, length = self.given("hidden_states"), family.pack(noisy).shape[1]
        tokens = tokens[:, :-length] if family.name in QWEN_IMAGE_21 else tokens[:, length:]
        return {CONDITION_LATENTS: family.unpack(tokens, noisy.shape)}

    def texts(self) -> list[Tensor]:
        """The embeddings of each text, without padding."""
        texts = self.given("encoder_hidden_states", "cap_feats")
        mask = self.given("encoder_attention_mask", "encoder_hidden_states_mask")
        return list(texts) if mask is None else [rows[kept.bool()] for rows, kept in zip(texts, mask, strict=True)]


def asked(
    family: Family,
    calls: list[Call],
    number: int,
    prompts: list[Condition],
    unconditional: list[Condition] | None = None,
) -> list[Condition]:
    """The conditions that a call has rows for: one for each prompt, unconditional ones, or both."""
    if unconditional is None:
        unconditional = conditions_of(family.name, [family.negative_prompt or ""] * len(prompts))
        if not family.text_sees_image:  # some have an instruction before each prompt, but not before the negative one
            unconditional = [each | family.encode_unconditional(encoders_of(family.name)) for each in unconditional]
    if len(calls[number].noisy(family)) == len(prompts):  # prompts first
        alike = [i for i, call in enumerate(calls) if torch.equal(call.timestep, calls[number].timestep)]
        return unconditional if number == alike[0] + 1 else prompts
    return prompts + unconditional if family.name == "z-image" else unconditional + prompts


def sampled(pipeline: Any, family: Family, steps: int = 3, seed: int = 5, **options: Any) -> tuple[Any, list[Call]]:
    """What the real pipeline samples with guidance, and how it called the network meanwhile."""
    calls: list[tuple[dict[str, Any], Any]] = []
    images = images_of(family)
    networks = [getattr(pipeline, name) for name in family.networks]
    names = list(inspect.signature(networks[0].forward).parameters)

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        kept = output[0].clone() if isinstance(output[0], Tensor) else [each.clone() for each in output[0]]
        calls.append((dict(zip(names, args, strict=False)) | kwargs, kept))

    hooks = [network.register_forward_hook(record, with_kwargs=True) for network in networks]
    try:
        height, width = sides_of(family)
        size = {"height": height, "width": width} | ({"num_frames": FRAMES} if family.video else {})
        arguments: dict[str, Any] = {
            "prompt": PROMPTS[0],
            "guidance_scale": 3.0,
            **({"image": as_picture(images[0])} if images else {}),
            "num_inference_steps": steps,
            "output_type": "pt",
            "generator": torch.Generator().manual_seed(seed),
            "return_dict": False,
        }
        arguments |= size | SAMPLED.get(family.name, {}) | options
        if family.name.startswith("qwen-image"):
            arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
            if isinstance(arguments["prompt"], list):
                arguments["negative_prompt"] = [" "] * len(arguments["prompt"])
        output = pipeline(**arguments)[0]
    finally:
        for hook in hooks:
            hook.remove()
    if family.name in QWEN_IMAGE_21:  # with opacity: seen over white
        output = output[:, :3] * output[:, 3:] + 1 - output[:, 3:]
    timesteps = pipeline.scheduler.timesteps
    per_step = len(calls) // len(timesteps)
    return output, [Call(*call, timesteps[i // per_step]) for i, call in enumerate(calls)]


def as_uint8(pixels: Tensor) -> Tensor:
    return pixels.float().mul(255).round().to(torch.uint8)


class Wrapper(nn.Module):
    """As DDP wraps: the network as ``module``, called through the wrapper's own forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


def sample(toy: str, network: nn.Module) -> Tensor:
    family = family_of(toy)
    return family.sample(encoders_of(toy), network, PROMPTS[:1], seed=3, steps=2, **sample_of(family, 1))


def no_shared_tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def predictions(toy: str, network: Any) -> Tensor:
    with torch.no_grad():
        return family_of(toy).predict(network.eval(), *network_input(toy))


def metadata_of(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return dict(json.loads(opened.metadata()["lora_adapter_metadata"]))
