"""Qwen-Image 2.1's own branches: a call for each sample, opacity, its sampler's cache, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sipo.data.records import PairRecord
from sipo.families import get_family
from sipo.families.lora_files import check_format
from sipo.families.network import CONDITION_LATENTS, PROMPT, PROMPT_MASK
from sipo.families.tuning import lora_file, save_lora
from tests.family_cases import (
    PROMPTS,
    QWEN_IMAGE_21,
    Call,
    as_picture,
    as_uint8,
    conditions_of,
    encoders_of,
    family_of,
    folder_of,
    images_of,
    load_toy,
    lora_network,
    network_input,
    pipeline_of,
    pixels_of,
    sample_of,
    sampled,
    size_of,
    stacked,
)
from tests.small_family import Records, build

TOY, EDIT = QWEN_IMAGE_21
FAMILY = get_family(TOY)
EACH = pytest.mark.parametrize("toy", QWEN_IMAGE_21)


def calls_in(network: Any) -> list[dict[str, Any]]:
    """The arguments of the network's calls from here on."""
    calls: list[dict[str, Any]] = []
    network.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_is_called_as_the_pipeline_calls_it_alone(toy: str, dtype: torch.dtype) -> None:
    """Each prompt's prediction in a batch has the bits of the pipeline's own call for this prompt."""
    family, pipeline = family_of(toy), pipeline_of(toy).to(dtype)
    alone: list[Call] = []
    for seed, (prompt, image) in enumerate(zip(PROMPTS, images_of(family) or [None, None], strict=True)):
        edited = {} if image is None else {"image": as_picture(image)}
        _, calls = sampled(pipeline, family, seed=seed, prompt=prompt, **edited)  # with a negative prompt: two a step
        alone += calls
    more = 0 if toy == TOY else len("<image1>") + 1 + 6 + 1  # the image's tokens between its marks
    lengths = [len(call.given("encoder_hidden_states")[0]) for call in alone]
    assert len(alone) == 12 and set(lengths) == {20 + more, 36 + more, 43 + more}
    batch = stacked(family, [condition_in(call, toy) for call in alone])
    noisy, timesteps = torch.cat([call.noisy(family) for call in alone]), torch.stack([call.timestep for call in alone])
    ours = calls_in(pipeline.transformer)
    with torch.no_grad():
        found = family.predict(pipeline.transformer, noisy, timesteps, batch)
    assert found.dtype == dtype and len(ours) == len(alone)
    for row, told, call in zip(found, ours, alone, strict=True):
        assert torch.equal(row[None], family.unpack(call.output, (1, *row.shape)))
        theirs = {name: value for name, value in call.arguments.items() if name in told or value not in (None, {})}
        assert told.keys() == theirs.keys()
        assert all(torch.equal(told[k], v) if isinstance(v, Tensor) else told[k] == v for k, v in theirs.items())


def condition_in(call: Call, toy: str) -> dict[str, Tensor]:
    """What the network was told in a call of the pipeline."""
    text = call.given("encoder_hidden_states")[0]
    told = {PROMPT: text, PROMPT_MASK: torch.ones(len(text)).bool()}
    if toy == TOY:
        return told
    (latents,) = call.condition_latents(family_of(toy))[CONDITION_LATENTS]
    return told | {CONDITION_LATENTS: latents, "image_start": call.given("img_mask")[0].nonzero()[0]}


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prediction_does_not_depend_on_its_batch(toy: str, dtype: torch.dtype) -> None:
    family, network = load_toy(toy, dtype=dtype)
    noisy, timesteps, condition = network_input(toy)
    order = [1, 0, 1]
    with torch.no_grad():
        both = family.predict(network, noisy, timesteps, condition)
        more = family.predict(network, noisy[order], timesteps[order], {k: v[order] for k, v in condition.items()})
        assert torch.equal(more, both[order])
        for i in range(2):
            rows, length = slice(i, i + 1), int(condition[PROMPT_MASK][i].sum())
            own = {name: tensor[rows] for name, tensor in condition.items()}
            own |= {name: own[name][:, :length] for name in (PROMPT, PROMPT_MASK)}  # without padding
            assert torch.equal(family.predict(network, noisy[rows], timesteps[rows], own), both[rows])
    assert not torch.equal(both[0], both[1])


def test_gradients_of_a_batch_are_those_of_its_samples_with_checkpointing_too() -> None:
    noisy, timesteps, condition = network_input(TOY)

    def gradients(rows: slice, checkpointing: bool) -> Tensor:
        network = lora_network(TOY).train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        given = noisy[rows], timesteps[rows], {name: tensor[rows] for name, tensor in condition.items()}
        FAMILY.predict(network, *given).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])

    both = gradients(slice(2), checkpointing=False)
    assert both.norm() > 1e-3 and torch.equal(gradients(slice(2), checkpointing=True), both)
    apart = gradients(slice(1), checkpointing=False) + gradients(slice(1, 2), checkpointing=False)
    torch.testing.assert_close(apart, both, rtol=1e-4, atol=1e-6 * float(both.abs().max()))


@EACH
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_with_an_adapter_are_the_pipelines_with_its_cache(
    toy: str, guidance: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The pipeline's default; whether the cache is on changes rounding."""
    family, network = family_of(toy), lora_network(toy)
    calls = calls_in(network)
    encoders = encoders_of(toy)
    caplog.clear()
    sample: dict[str, Any] = {"seed": 5, "steps": 3, "guidance": guidance, **sample_of(family, 1)}
    found = family.sample(encoders, network, PROMPTS[:1], **sample)
    assert not caplog.records  # of a negative prompt that is not used
    modes = [call["kv_cache_mode"] for call in calls]
    assert modes == [mode for mode in ("extract", "cached", "cached") for _ in range(1 if guidance == 1 else 2)]
    pipeline = pipeline_of(toy)
    save_lora(family, network, tmp_path)
    file = lora_file(family, tmp_path, family.network)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    expected, _ = sampled(pipeline, family, guidance_scale=guidance, use_kv_cache=True)
    assert torch.equal(as_uint8(expected), found)
    plain, _ = sampled(pipeline_of(toy), family, guidance_scale=guidance)
    assert not torch.equal(as_uint8(plain), found)


def test_an_image_of_another_shape_is_edited_at_its_own_size() -> None:
    family, pipeline = family_of(EDIT), pipeline_of(EDIT)
    (image, *_) = images_of(family) or []
    image = image.transpose(1, 2)[:, :, :32]  # 96 x 32 pixels
    _, calls = sampled(pipeline, family, image=as_picture(image), output_resolution=(96 * 32) ** 0.5)
    ours = calls_in(pipeline.transformer)
    family.sample(
        encoders_of(EDIT),
        pipeline.transformer,
        PROMPTS[:1],
        images=[image],
        seed=5,
        steps=3,
        guidance=3.0,
        **size_of(family),
    )
    assert ours[0]["img_shapes"] == calls[0].given("img_shapes") == [[(1, 6, 2), (1, 4, 6)]]
    for name in ("hidden_states", "encoder_hidden_states", "img_mask"):
        torch.testing.assert_close(ours[0][name], calls[0].given(name), rtol=1e-5, atol=1e-5)


def test_an_image_that_the_text_encoder_would_see_at_another_size_is_refused(tmp_path: Path) -> None:
    family, encoders = family_of(EDIT), encoders_of(EDIT)
    broken = PairRecord(0, "a", b"", b"", condition_image=b"")
    for height, width in ((64, 320), (64, 80)):
        sides = "sides that are multiples of 32, and 1024 to 16384 pixels in all"
        expected = f"a condition image of {height} x {width} pixels: expected {sides}"
        with pytest.raises(ValueError, match=expected):
            family.encode_text(encoders, ["a"], [torch.zeros(3, height, width, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="64 x 320 pixels: expected sides"):  # before the pair is decoded
        build(tmp_path, Records([broken]), encoders, family=family, sizes=[(64, 96), (64, 320)])
    with pytest.raises(ValueError, match=f"images=None: expected one for each prompt, the text encoder of {EDIT}"):
        family.encode_text(encoders, ["a"])


def test_images_are_opaque_and_samples_are_laid_over_white(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders, given = encoders_of(TOY), []
    encode = encoders.vae.encode
    monkeypatch.setattr(encoders.vae, "encode", lambda pixels: given.append(pixels) or encode(pixels))
    pixels = pixels_of(FAMILY)
    latents = FAMILY.encode_pixels(encoders, pixels)
    as_bytes = (pixels * 127.5 + 127.5).round().to(torch.uint8)
    FAMILY.encode_pixels(encoders, as_bytes)
    for seen in given:
        assert seen.shape == (2, 4, 1, 64, 96) and bool((seen[:, 3] == 1).all())
    assert torch.equal(given[0][:, :3, 0], pixels)
    assert torch.equal((given[1][:, :3, 0] * 127.5 + 127.5).round().to(torch.uint8), as_bytes)
    decoded = torch.zeros(2, 4, 1, 1, 3)
    decoded[:, :3], decoded[:, 3, 0, 0] = -0.5, torch.tensor([1.0, -1.0, 0.0])  # opaque, transparent, half of it
    monkeypatch.setattr(encoders.vae, "decode", lambda latents, return_dict: (decoded,))
    assert FAMILY.decode_latents(encoders, latents).tolist() == [[[[-0.5, 1.0, 0.25]]] * 3] * 2


def test_a_text_is_that_of_the_prompt_alone() -> None:
    both = conditions_of(TOY, [*PROMPTS, ""])
    for prompt, ours in zip([*PROMPTS, " "], both, strict=True):
        theirs, mask, images = encoders_of(TOY).encode_prompt(prompt, device="cpu")
        assert mask is None and not images.any() and torch.equal(ours[PROMPT], theirs[0])


def copied(folder: Path, **changes: Any) -> Path:
    """The toy's folder with another index."""
    shutil.copytree(folder_of(TOY), folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    return folder


def test_a_sampler_with_noise_levels_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model", sample_sigmas=[1.0, 0.5])
    for load in (FAMILY.load_network, FAMILY.load_encoders, FAMILY.load_schedule):
        with pytest.raises(ValueError, match=r"^[^\n]*: has sample_sigmas=\[1.0, 0.5\], noise levels of its") as caught:
            load(folder)
        assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)


def test_the_published_processor_is_refused_without_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tmp_path / "model", processor=["transformers", "Qwen3VLProcessor"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"its processor is a Qwen3VLProcessor, expected torchvision installed$"):
        FAMILY.fetch(folder, network=False)


def test_networks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model")
    file = folder / "transformer" / "config.json"
    for changes, text in (
        ({"patch_size": 2}, "its transformer takes 64 channels and gives 256, expected as many as it takes"),
        ({"context_in_dim": 48}, "its transformer has context_in_dim=48, expected 32,"),
        ({"in_channels": 16, "out_channels": 16}, "its transformer takes 16 channels, expected 64,"),
    ):
        shutil.copy(folder_of(TOY) / "transformer" / "config.json", file)
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with pytest.raises(ValueError, match=re.escape(f"{folder}: {text}")):
            FAMILY.empty_network(folder)


def test_sizes_and_formats_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32 pixels and 1 frame; the nearest is height=1024, width=992"):
        FAMILY.check_size(1040, 1000, 1)
    FAMILY.check_size(1024, 992, 1)
    for format in ("kohya", "comfyui"):
        with pytest.raises(ValueError, match=r"no LoRA of qwen-image-2\.1 is read in it, expected diffusers$"):
            check_format(FAMILY, format)
