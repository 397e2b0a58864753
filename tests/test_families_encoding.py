"""Each family's text, pixels and latents against the real pipeline's, at toy size."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from sipo.families import get_family
from sipo.families.encoding import PromptWarning
from sipo.families.packing import stack_patches
from tests.family_cases import (
    FRAMES,
    PROMPTS,
    asked,
    conditions_of,
    each_toy,
    encoders_of,
    family_of,
    folder_of,
    for_vae,
    images_of,
    pipeline_of,
    pixels_of,
    sampled,
    sides_of,
)


@each_toy
def test_text_is_what_the_pipeline_gives_its_network(toy: str) -> None:
    family = family_of(toy)
    texts = PROMPTS[:1] if family.condition_image == "required" else PROMPTS  # a pipeline that edits takes one image
    _, calls = sampled(pipeline_of(toy), family, steps=2, prompt=list(texts))
    prompts = conditions_of(toy, texts)
    conditions = [condition for number in (0, 1) for condition in asked(family, calls, number, prompts)]
    theirs = [text for call in calls[:2] for text in call.texts()]
    torch.testing.assert_close([c["prompt_embeds"] for c in conditions], theirs, rtol=1e-5, atol=1e-6)
    ours = {k: torch.stack([c[k] for c in conditions[:4]]) for k in conditions[0] if k.startswith("pooled")}
    if toy == "sdxl":
        added = calls[0].given("added_cond_kwargs")
        torch.testing.assert_close(ours["pooled_prompt_embeds"], added["text_embeds"], rtol=1e-5, atol=1e-6)
        told = family.own_condition(sides_of(family), (0, 0), sides_of(family))
        assert torch.equal(added["time_ids"], told["time_ids"].repeat(4, 1))
    elif ours:
        pooled = calls[0].given("pooled_projections")
        torch.testing.assert_close(ours["pooled_prompt_embeds"][: len(pooled)], pooled, rtol=1e-5, atol=1e-6)


@each_toy
def test_text_has_one_shape_and_differs(toy: str) -> None:
    family = family_of(toy)
    long = "word " * 900
    encoded = family.encode_text(encoders_of(toy), ["", "xy", PROMPTS[0], long], images_of(family, 4))
    lengths = {"sd15": 77, "sdxl": 77, "sd3": 77 + 256, "flux2": 512, "flux2-klein": 512, "cogvideox": 226, "wan": 512}
    lengths |= {"flux": 512, "flux-kontext": 512, "chroma": 512}
    lengths |= {"z-image": 512, "lumina2": 256, "sana": 300, "wan2.2": 512}
    lengths |= {"qwen-image": 512, "qwen-image-2.1": 4519, "qwen-image-2.1-edit": 4535}
    lengths |= {"qwen-image-edit": 3614, "qwen-image-edit-plus": 3622}  # uncut, as 2.1's
    length, width = lengths[family.name], encoded[0]["prompt_embeds"].shape[-1]
    ragged = "prompt_embeds_mask" in encoded[0]
    assert sorted({len(condition["prompt_embeds"]) for condition in encoded})[-1] == length
    assert len({len(condition["prompt_embeds"]) for condition in encoded}) == (4 if ragged else 1)
    for condition in encoded:
        if ragged:
            mask = condition.pop("prompt_embeds_mask")
            assert mask.dtype == torch.bool and mask.all() and mask.shape == condition["prompt_embeds"].shape[:1]
        assert condition["prompt_embeds"].shape[1:] == (width,)
        if not ragged:
            assert {k: v.shape for k, v in condition.items()} == {k: v.shape for k, v in encoded[0].items()}
        assert all(not t.requires_grad and t.device.type == "cpu" for t in condition.values())
    for name in encoded[0].keys() - {"image_start"}:
        assert not torch.equal(encoded[1][name], encoded[2][name])
    assert family.encode_text(encoders_of(toy), []) == []


def test_wan_text_is_zero_after_its_end() -> None:
    text = get_family("wan").encode_text(encoders_of("wan"), ["abc"])[0]["prompt_embeds"]
    assert bool((text[:4] != 0).any(1).all())  # a mark for the word's start, its letters merged or not, the end
    ends = int((text != 0).any(1).nonzero().max())
    assert 3 <= ends <= 5
    assert not text[ends + 1 :].any()


@each_toy
def test_latents_are_scaled_as_the_pipeline_decodes_them(toy: str) -> None:
    family = family_of(toy)
    pipeline = pipeline_of(toy)
    pixels = pixels_of(family, 1)
    encoders = encoders_of(toy)
    latents = family.encode_pixels(encoders, pixels)
    encoded = encoders.vae.encode(for_vae(family, pixels))
    raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    channels, length = raw.shape[1] * family.vae_patch**2, [(FRAMES - 1) // 4 + 1]
    sides = [side // family.latent_pixels for side in sides_of(family)]
    layout = {"CHW": [channels, *sides], "FCHW": [*length, channels, *sides], "CFHW": [channels, *length, *sides]}
    assert list(latents.shape) == [1, *layout[family.latent_layout]]
    assert latents.dtype == torch.float32
    # The pipeline's own decoding: no step is taken but the last, and the VAE is asked what it was given.
    given: list[Tensor] = []
    decode = pipeline.vae.decode

    def record(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(z)
        return decode(z, *args, **kwargs)

    pipeline.vae.decode = record
    pipeline.scheduler.__class__ = _still(pipeline.scheduler)
    given_latents = latents if family.vae_patch > 1 else family.pack(latents)  # FLUX.2's pipelines pack them
    decoded, _ = sampled(pipeline, family, steps=1, latents=given_latents)
    torch.testing.assert_close(given[0], raw, rtol=1e-4, atol=1e-5)
    ours = family.decode_latents(encoders, latents)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), decoded, rtol=1e-4, atol=1e-4)


def _still(scheduler: Any) -> type:
    """The scheduler's class with steps that leave the latents where they are."""

    def step(self: Any, *args: Any, generator: Any = None, eta: float = 0.0, return_dict: bool) -> tuple[Any, ...]:
        # (prediction, t, latents), and for CogVideoX's DPM scheduler (prediction, old, t, previous, latents)
        latents = next(arg for arg in reversed(args) if isinstance(arg, Tensor) and arg.ndim > 1)
        return latents, None

    return type(type(scheduler).__name__, (type(scheduler),), {"step": step, "init_noise_sigma": 1.0})


@each_toy
def test_latents_drawn_from_the_posterior(toy: str) -> None:
    family, encoders = family_of(toy), encoders_of(toy)
    pixels = pixels_of(family, 2)
    mode = family.encode_pixels(encoders, pixels)
    draws = [family.encode_pixels(encoders, pixels, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    encoded = encoders.vae.encode(for_vae(family, pixels))
    if not hasattr(encoded, "latent_dist"):  # SANA's VAE
        assert torch.equal(draws[0], mode) and torch.equal(draws[2], mode)
        return
    assert not torch.equal(draws[0], draws[2])
    posterior = encoded.latent_dist
    many = [family.encode_pixels(encoders, pixels, torch.Generator().manual_seed(seed)) - mode for seed in range(12)]
    spread = torch.stack(many).square().mean().sqrt()
    config = encoders.vae.config
    if family.vae_patch > 1:
        std = encoders.vae.bn.running_var.sqrt()
    else:
        std = torch.tensor(config.latents_std) if config.get("latents_std") else torch.tensor(1 / config.scaling_factor)
    ours = posterior.std if family.vae_patch == 1 else stack_patches(posterior.std, family.vae_patch)
    expected = (ours / std.reshape(1, -1, *[1] * (ours.ndim - 2))).square().mean().sqrt()
    torch.testing.assert_close(spread, expected, rtol=0.1, atol=0)


@pytest.mark.parametrize(("name", "most"), [("z-image", 512), ("lumina2", 256), ("sana", 298)])
def test_what_stands_around_a_prompt_counts_in_its_length(name: str, most: int) -> None:
    family, encoders = get_family(name), encoders_of(name)

    def length(letters: int) -> int:
        return len(family.encode_text(encoders, ["a" * letters])[0]["prompt_embeds"])

    room = family.text_options["max_sequence_length"] - length(1) + 1  # a letter is a token here
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        assert length(room) == family.text_options["max_sequence_length"]
    with pytest.warns(PromptWarning, match=f"^1 of 1 prompts are cut after {most} tokens$"):
        assert length(room + 1) == family.text_options["max_sequence_length"]


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "flux2", "flux2-klein"])
def test_prompts_that_are_cut_are_counted_in_one_warning(name: str) -> None:
    family = get_family(name)
    pipeline = family.load_encoders(folder_of(name))
    most = {"sd15": 77, "sd3": 256}.get(name, 512)
    with pytest.warns(UserWarning, match=f"^1 of 2 prompts are cut after {most} tokens$"):
        family.encode_text(pipeline, ["a " * 400, "a"])
