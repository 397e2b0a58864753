"""Each family's samples against the real pipeline's, and the toy pipelines themselves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from sipo.families.toy import build_toy
from tests.data_sets import contents
from tests.family_cases import (
    PROMPTS,
    Wrapper,
    as_picture,
    as_uint8,
    each_toy,
    encoders_of,
    family_of,
    folder_of,
    images_of,
    load_toy,
    pipeline_of,
    sample_of,
    sampled,
    size_of,
)


@each_toy
def test_samples_are_the_pipelines(toy: str) -> None:
    family = family_of(toy)
    network = family.load_network(folder_of(toy)).train()
    state, scheduler = torch.get_rng_state(), repr(vars(encoders_of(toy).scheduler))
    found = family.sample(
        encoders_of(toy), Wrapper(network), PROMPTS, seed=5, steps=3, guidance=3.0, **sample_of(family)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in network.modules())
    assert repr(vars(encoders_of(toy).scheduler)) == scheduler
    assert encoders_of(toy).components[family.network] is None
    assert encoders_of(toy).text_encoder is not None
    for i, prompt in enumerate(PROMPTS):
        image = {"image": as_picture(images[i])} if (images := images_of(family)) else {}
        expected, _ = sampled(pipeline_of(toy), family, seed=5 + i, prompt=prompt, **image)
        difference = (as_uint8(expected)[0].int() - found[i].int()).abs()
        assert difference.max() <= 1  # one rounding of a half
        assert (difference > 0).float().mean() < 0.001
    assert found[0].float().std() > 1


@each_toy
def test_samples_without_guidance(toy: str) -> None:
    family, network = load_toy(toy)
    calls: list[int] = []
    for part in family.networks_in(network).values():
        part.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    none = 0.0 if family.name == "z-image" else 1.0
    found = family.sample(
        encoders_of(toy), network, PROMPTS[:1], seed=5, steps=2, guidance=none, **sample_of(family, 1)
    )
    assert set(calls) == {1} and len(calls) in (2, 3)  # no second half, no second call
    expected, _ = sampled(pipeline_of(toy), family, steps=2, guidance_scale=none)
    assert ((as_uint8(expected)[0].int() - found[0].int()).abs() > 1).sum() == 0
    assert family.sample(encoders_of(toy), network, [], seed=5, **size_of(family)).numel() == 0


@each_toy
def test_samples_with_encoders_of_another_type(toy: str) -> None:
    family, network = load_toy(toy)
    encoders = family.load_encoders(folder_of(toy), dtype=torch.bfloat16)
    found = family.sample(encoders, network, PROMPTS[:1], seed=5, steps=2, **sample_of(family, 1))
    exact = family.sample(encoders_of(toy), network, PROMPTS[:1], seed=5, steps=2, **sample_of(family, 1))
    assert found.dtype == torch.uint8 and found.shape == exact.shape
    assert (found.float() - exact.float()).abs().mean() < 0.25 * exact.float().std()


def test_a_sampler_that_draws_noise_has_the_samples_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline passes the scheduler no generator."""
    family, network = load_toy("flux-schnell")
    pipeline = family.load_encoders(folder_of("flux-schnell"))
    plain = pipeline.scheduler
    pipeline.scheduler = type(plain).from_config(plain.config, stochastic_sampling=True)

    def sample(pipeline: Any, seed: int) -> torch.Tensor:
        return family.sample(pipeline, network, PROMPTS[:1], seed=seed, steps=2, **sample_of(family, 1))

    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", lambda seed, plain=torch.manual_seed: seeds.append(seed) or plain(seed))
    state = torch.get_rng_state()
    first = sample(pipeline, 5)
    assert len(seeds) == 1 and seeds != [5]  # that of the first latents
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(first, sample(pipeline, 5)) and not torch.equal(first, sample(pipeline, 6))
    assert not torch.equal(first, sample(encoders_of("flux-schnell"), 5))


@each_toy
def test_toys_are_small_and_repeatable(toy: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    start = time.perf_counter()
    again = build_toy(toy, tmp_path / "again")
    assert time.perf_counter() - start < 20  # a second or two on an idle machine
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(again) == contents(folder_of(toy))
    other = contents(build_toy(toy, tmp_path / "again", seed=1))
    assert other.keys() == contents(again).keys()
    assert {name for name, text in other.items() if text != contents(folder_of(toy))[name]} == {
        name for name in other if name.endswith("model.safetensors")
    }
    assert sum(file.stat().st_size for file in again.rglob("*") if file.is_file()) < 8e6
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert type(diffusers.DiffusionPipeline.from_pretrained(again)).__name__ == family_of(toy).pipeline_class


def test_unknown_toy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="toy='nothing': expected one of sd15"):
        build_toy("nothing", tmp_path / "nothing")
