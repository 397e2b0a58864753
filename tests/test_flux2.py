"""FLUX.2's own branches against its pipelines: condition images, distilled networks, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sipo.families.network import CONDITION_LATENTS
from sipo.families.vae import as_picture
from tests.family_cases import (
    PROMPTS,
    as_uint8,
    asked,
    encoders_of,
    family_of,
    folder_of,
    load_toy,
    pipeline_of,
    sample_of,
    sampled,
    stacked,
)

EACH = pytest.mark.parametrize("toy", ["flux2", "flux2-klein"])


def image_of(height: int = 64, width: int = 96) -> Tensor:
    """The least that the pipelines take: 64 pixels a side."""
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EACH
def test_a_condition_image_is_told_as_by_the_pipeline(toy: str, dtype: torch.dtype) -> None:
    family, pipeline = family_of(toy), pipeline_of(toy).to(dtype)
    _, calls = sampled(pipeline, family, image=as_picture(image_of()))
    prompts, empty = family.encode_text(pipeline, PROMPTS[:1]), family.encode_unconditional(pipeline)
    (ours,) = family.encode_condition_image(encoders_of(toy), image_of()[None])
    for number, call in enumerate(calls):
        noisy, tokens = call.noisy(family), call.given("hidden_states")[:, 6:]
        theirs = family.unpack(tokens, (1, 16, 4, 6))
        if dtype == torch.float32:
            torch.testing.assert_close(ours[CONDITION_LATENTS][None], theirs, rtol=1e-5, atol=1e-6)
        condition = stacked(family, asked(family, calls, number, prompts, [empty]))
        with torch.no_grad():
            given = (pipeline.transformer, noisy, call.timestep[None])
            found = family.predict(*given, condition | {CONDITION_LATENTS: theirs}, guidance=3.0)
            without = family.predict(*given, condition, guidance=3.0)
        assert found.dtype == dtype and torch.equal(found, family.unpack(call.output, noisy.shape))
        assert not torch.equal(found, without)


@EACH
def test_samples_with_a_condition_image_are_the_pipelines(toy: str) -> None:
    family, network = load_toy(toy)
    options = sample_of(family) | {"images": [image_of()]}
    found = family.sample(encoders_of(toy), network, PROMPTS[:1], seed=5, steps=3, guidance=3.0, **options)
    expected, _ = sampled(pipeline_of(toy), family, image=as_picture(image_of()))
    assert ((as_uint8(expected)[0].int() - found[0].int()).abs() > 1).sum() == 0
    other, _ = sampled(pipeline_of(toy), family)
    assert not torch.equal(as_uint8(other), as_uint8(expected))


def test_a_large_condition_image_is_made_smaller_as_by_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a megapixel at most; no VAE is asked, which would take seconds."""
    family, pipeline = family_of("flux2"), pipeline_of("flux2")
    image, seen = image_of(1040, 1264), []

    def stop(self: Any, images: list[Tensor], **options: Any) -> None:
        seen.extend(images)
        raise KeyboardInterrupt

    def encode(encoders: Any, pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return torch.zeros(1)

    monkeypatch.setattr(type(pipeline), "prepare_image_latents", stop)
    with pytest.raises(KeyboardInterrupt):
        sampled(pipeline, family, image=as_picture(image))
    monkeypatch.setattr(family, "encode_pixels", encode)
    family.encode_condition_image(pipeline, image[None])
    assert seen[0].shape == (1, 3, 928, 1120) and torch.equal(seen[0], seen[1])


def changed(toy: str, folder: Path, **changes: Any) -> Path:
    """A copy of a toy with other values in its model_index.json."""
    index = Path(shutil.copytree(folder_of(toy), folder)) / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    return folder


def test_a_distilled_klein_is_sampled_without_guidance(tmp_path: Path) -> None:
    family, network = load_toy("flux2-klein")
    calls: list[int] = []
    network.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    encoders = family.load_encoders(changed("flux2-klein", tmp_path / "model", is_distilled=True))
    family.sample(encoders, network, PROMPTS[:1], seed=5, steps=2, **sample_of(family))
    assert calls == [1, 1]


def test_the_pipeline_with_cached_keys_and_values_is_refused(tmp_path: Path) -> None:
    """Its network sees the condition image at the first step only, and with another timestep."""
    folder = changed("flux2-klein", tmp_path / "model", _class_name="Flux2KleinKVPipeline")
    with pytest.raises(ValueError, match="holds a Flux2KleinKVPipeline, expected a Flux2KleinPipeline"):
        family_of("flux2-klein").load_network(folder)


def test_the_published_tokenizer_is_inside_a_processor(tmp_path: Path) -> None:
    """The toy has the tokenizer alone; the processor's chat gives the same tokens."""
    import transformers

    family, encoders = family_of("flux2"), pipeline_of("flux2")
    text = {"tokenizer": encoders.tokenizer, "chat_template": encoders.tokenizer.chat_template}
    try:
        processor = transformers.PixtralProcessor(image_processor=transformers.PixtralImageProcessor(), **text)
    except ImportError:  # torchvision is missing
        folder = changed("flux2", tmp_path / "model", tokenizer=["transformers", "PixtralProcessor"])
        with pytest.raises(ValueError, match="its tokenizer is a PixtralProcessor, expected torchvision installed"):
            family.load_encoders(folder)
        return
    encoders.register_modules(tokenizer=processor)
    encoders.save_pretrained(tmp_path / "model")
    encoders = family.load_encoders(tmp_path / "model")
    assert type(encoders.tokenizer).__name__ == "PixtralProcessor"
    with pytest.warns(UserWarning, match="^1 of 2 prompts are cut after 512 tokens$"):
        found = family.encode_text(encoders, [PROMPTS[0], "a " * 400])
    expected = family.encode_text(encoders_of("flux2"), PROMPTS[:1])
    assert torch.equal(found[0]["prompt_embeds"], expected[0]["prompt_embeds"])
