"""Qwen-Image's own branches against its pipelines: masks, condition images of another size, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sipo.families import get_family
from sipo.families.network import PROMPT, PROMPT_MASK
from tests.family_cases import (
    PROMPTS,
    Call,
    as_picture,
    encoders_of,
    family_of,
    folder_of,
    images_of,
    pipeline_of,
    sampled,
)

EDITING = ["qwen-image-edit", "qwen-image-edit-plus", "qwen-image-edit-2511"]


def predicted(toy: str, pipeline: Any, call: Call, **condition: Tensor) -> Tensor:
    """What ``predict`` makes of a call's own text, latents and timestep."""
    text, mask = call.given("encoder_hidden_states"), call.given("encoder_hidden_states_mask")
    mask = torch.ones(text.shape[:2]) if mask is None else mask
    noisy = call.noisy(family_of(toy))
    told = {PROMPT: text, PROMPT_MASK: mask.bool(), **condition}
    with torch.no_grad():
        return family_of(toy).predict(pipeline.transformer, noisy, call.timestep.expand(len(noisy)), told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_different_lengths_are_the_pipelines_own_call(dtype: torch.dtype) -> None:
    pipeline, family = pipeline_of("qwen-image").to(dtype), get_family("qwen-image")
    _, calls = sampled(pipeline, family, prompt=list(PROMPTS))
    masks = [call.given("encoder_hidden_states_mask") for call in calls]
    assert [mask is None for mask in masks] == [False, True] * 3  # the negative prompts are of one length
    assert masks[0].sum(1).tolist() == [18, 21]
    for call in calls:
        found = predicted("qwen-image", pipeline, call)
        assert found.dtype == dtype and torch.equal(found, family.unpack(call.output, found.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("toy", EDITING)
def test_an_image_of_another_shape_is_the_pipelines_own_call(toy: str, dtype: torch.dtype) -> None:
    pipeline, family = pipeline_of(toy).to(dtype), family_of(toy)
    (image, *_) = images_of(family) or []
    _, calls = sampled(pipeline, family, image=as_picture(image.transpose(1, 2)))
    for call in calls:
        assert call.given("img_shapes") == [[(1, 2, 3), (1, 3, 2)]]
        tokens = call.given("hidden_states")[:, 6:]
        condition = family.unpack(tokens, (1, 16, 6, 4))
        found = predicted(toy, pipeline, call, condition_latents=condition)
        assert found.dtype == dtype and torch.equal(found, family.unpack(call.output, found.shape))
        other = predicted(toy, pipeline, call, condition_latents=condition.flip(-1))
        assert not torch.equal(found, other)


@pytest.mark.parametrize("toy", ["qwen-image", *EDITING[:2]])
def test_a_text_does_not_depend_on_those_beside_it(toy: str) -> None:
    family, encoders = family_of(toy), encoders_of(toy)
    images = images_of(family)
    both = family.encode_text(encoders, PROMPTS, images)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = family.encode_text(encoders, [prompt], None if images is None else images[i : i + 1])
        assert torch.equal(alone[PROMPT], both[i][PROMPT])
    if images:  # the text encoder sees the image
        (other,) = family.encode_text(encoders, PROMPTS[:1], images[1:])
        assert not torch.equal(other[PROMPT], both[0][PROMPT])
        with pytest.raises(ValueError, match=f"images=None: expected one for each prompt, the text encoder of {toy}"):
            family.encode_text(encoders, PROMPTS)


@pytest.mark.parametrize(("toy", "area"), [("qwen-image-edit", 1024**2), ("qwen-image-edit-plus", 384**2)])
def test_the_text_encoder_sees_what_the_pipeline_shows_it(toy: str, area: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, family = pipeline_of(toy), family_of(toy)
    (image, *_) = images_of(family) or []
    module = sys.modules[type(pipeline).__module__]
    asked: list[tuple[int, float]] = []
    rule, process = module.calculate_dimensions, type(pipeline.processor).__call__
    shown: list[Any] = []

    def recorded(self: Any, *args: Any, images: Any, **options: Any) -> Any:
        shown.append(images[0] if isinstance(images, list) else images)
        return process(self, *args, images=images, **options)

    monkeypatch.setattr(module, "calculate_dimensions", lambda *given: asked.append(given) or rule(*given))
    monkeypatch.setattr(type(pipeline.processor), "__call__", recorded)
    sampled(pipeline, family, steps=2, image=as_picture(image))
    pipelines, asked[:] = set(asked), []
    family.encode_text(pipeline, PROMPTS[:1], [image])
    assert asked == [(area, 1.5)] and asked[0] in pipelines
    assert len(shown) == 3 and all(picture.tobytes() == shown[0].tobytes() for picture in shown)


@pytest.mark.parametrize(("toy", "cut"), [("qwen-image", 34), *((toy, 64) for toy in EDITING)])
def test_the_toys_tokenizer_has_the_words_of_the_template_that_is_cut(toy: str, cut: int) -> None:
    """As the published tokenizer has: the pipelines cut off so many tokens, up to where the user's text begins."""
    pipeline = encoders_of(toy)
    start = pipeline.prompt_template_encode.partition("<|im_start|>user\n")
    assert len(pipeline.tokenizer(start[0] + start[1]).input_ids) == cut == pipeline.prompt_template_encode_start_idx


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"guidance_embeds": True}, "its transformer has guidance_embeds=True, expected a Qwen-Image without it"),
        ({"use_layer3d_rope": True}, "its transformer has use_layer3d_rope=True, expected a Qwen-Image without it"),
        ({"in_channels": 68}, "its transformer takes 68 channels and gives 64, expected as many as it takes"),
    ],
)
def test_networks_of_relatives_are_refused(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("qwen-image"), tmp_path / "model")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=text) as caught:
        get_family("qwen-image").empty_network(folder)
    assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)


def test_pipelines_of_relatives_are_named_with_their_family() -> None:
    with pytest.raises(ValueError, match=r"holds a QwenImageEditPipeline, .* family 'qwen-image-edit' takes it"):
        get_family("qwen-image").load_network(folder_of("qwen-image-edit"))
    with pytest.raises(ValueError, match=r"holds a QwenImagePipeline, .* family 'qwen-image' takes it"):
        get_family("qwen-image-edit-plus").load_schedule(folder_of("qwen-image"))


def test_a_processor_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("qwen-image-edit"), tmp_path / "model")
    (folder / "processor" / "tokenizer.json").unlink()
    expected = "has no vocabulary, expected tokenizer.json or vocab.json and merges.txt of a PaddleOCRVLProcessor"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / 'processor'}: {expected}")):
        get_family("qwen-image-edit").load_encoders(folder)


def test_a_processor_that_needs_torchvision_is_refused_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(folder_of("qwen-image-edit"), tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("PaddleOCRVLProcessor", "Qwen2VLProcessor"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"its processor is a Qwen2VLProcessor, expected torchvision installed$"):
        get_family("qwen-image-edit").fetch(folder, network=False)
