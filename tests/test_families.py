"""Each family's `predict` against the calls of the network by the real pipeline, at toy size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sipo.families import get_family
from sipo.families.network import inner_network, network_dtype
from tests.family_cases import (
    PROMPTS,
    Wrapper,
    as_picture,
    as_uint8,
    asked,
    conditions_of,
    each_toy,
    encoders_of,
    family_of,
    folder_of,
    load_toy,
    network_input,
    network_of,
    pipeline_of,
    sampled,
    stacked,
)


@each_toy
def test_predict_is_the_pipelines_own_call(toy: str) -> None:
    family = family_of(toy)
    pipeline = pipeline_of(toy)
    _, calls = sampled(pipeline, family, guidance_scale=3.0)
    prompts, network = conditions_of(toy, PROMPTS[:1]), network_of(pipeline, family)
    assert len(calls) >= 3  # PNDM takes a step more, and some pipelines call once for each condition
    for number, call in enumerate(calls):
        noisy = call.noisy(family)
        timesteps = call.timestep.expand(len(noisy))
        told = torch.as_tensor(call.given("timestep", "t")).reshape(-1).expand(len(noisy))
        assert torch.equal(family.network_time(timesteps), told)
        conditions = stacked(family, asked(family, calls, number, prompts))
        if family.condition_image == "required":
            theirs = call.condition_latents(family)
            torch.testing.assert_close({name: conditions[name] for name in theirs}, theirs, rtol=1e-5, atol=1e-6)
            conditions |= theirs
        with torch.no_grad():
            found = family.predict(network, noisy, timesteps, conditions, guidance=3.0)
        expected = family.unpack(call.output, noisy.shape)
        assert found.shape == noisy.shape and torch.equal(found, -expected if family.negated else expected)


@pytest.mark.parametrize(
    "toy",
    [*("flux", "flux-schnell", "flux-kontext", "chroma", "flux2", "flux2-klein", "z-image", "lumina2", "sana")],
)
def test_predict_is_the_pipelines_own_call_in_bfloat16(toy: str) -> None:
    """Timesteps are rounded in the pipeline's order, and products are of tensors that lie as the pipeline's do."""
    family, pipeline = family_of(toy), pipeline_of(toy).to(torch.bfloat16)
    _, calls = sampled(pipeline, family, prompt=list(PROMPTS), guidance_scale=2.0)  # Z-Image's changes the list
    prompts, empty = family.encode_text(pipeline, PROMPTS), family.encode_unconditional(pipeline)
    for number, call in enumerate(calls):
        noisy = call.noisy(family)
        conditions = stacked(family, asked(family, calls, number, prompts, [empty, empty]))
        if toy == "flux-kontext":
            conditions |= call.condition_latents(family)
        with torch.no_grad():
            timesteps = call.timestep.expand(len(noisy))
            found = family.predict(pipeline.transformer, noisy, timesteps, conditions, guidance=2.0)
        expected = family.unpack(call.output, noisy.shape)
        assert found.dtype == torch.bfloat16 and torch.equal(found, -expected if family.negated else expected)


def test_kontext_edits_an_image_of_another_size() -> None:
    family, pipeline, encoders = family_of("flux-kontext"), pipeline_of("flux-kontext"), encoders_of("flux-kontext")
    image = torch.randint(256, (3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    size = {"height": 32, "width": 80}
    output, calls = sampled(pipeline, family, image=as_picture(image), max_area=32 * 80, **size)
    (text,), (encoded,) = (
        family.encode_text(encoders, PROMPTS[:1]),
        family.encode_condition_image(encoders, image[None]),
    )
    for call in calls:
        tokens = call.given("hidden_states")
        noisy, latents = family.unpack(tokens, (1, 4, 4, 10)), family.unpack(tokens[:, 2 * 5 :], (1, 4, 8, 6))
        torch.testing.assert_close(encoded["condition_latents"][None], latents, rtol=1e-5, atol=1e-6)
        condition = stacked(family, [text]) | {"condition_latents": latents}
        with torch.no_grad():
            found = family.predict(pipeline.transformer, noisy, call.timestep[None], condition, guidance=3.0)
        assert torch.equal(found, family.unpack(call.output, noisy.shape))
    ours = family.sample(
        encoders, pipeline.transformer, PROMPTS[:1], images=[image], seed=5, steps=3, guidance=3.0, **size
    )
    assert ours.shape == (1, 3, 32, 80) and (as_uint8(output).int() - ours.int()).abs().max() <= 1


@each_toy
def test_predict_depends_on_all_it_is_given(toy: str) -> None:
    family, network = load_toy(toy)
    noisy, timesteps, condition = network_input(toy)
    with torch.no_grad():
        base = family.predict(network, noisy, timesteps, condition)
        assert not torch.equal(base, family.predict(network, noisy, timesteps.flip(0), condition))
        assert not torch.equal(base, family.predict(network, noisy.flip(-1), timesteps, condition).flip(-1))
        for name, tensor in condition.items():
            other = tensor + 1
            if tensor.dtype == torch.bool:  # of the text: its end for one that has an image in it
                length = tensor.shape[1]
                other = tensor & (torch.arange(length) < (length - 3 if toy == "qwen-image-2.1-edit" else 3))
            changed = condition | {name: other}
            assert not torch.equal(base, family.predict(network, noisy, timesteps, changed)), name


@each_toy
def test_samples_of_a_batch_do_not_meet(toy: str) -> None:
    family, network = load_toy(toy)
    noisy, timesteps, condition = network_input(toy)
    with torch.no_grad():
        both = family.predict(network, noisy, timesteps, condition)
        for i in range(2):
            alone = family.predict(
                network, noisy[i : i + 1], timesteps[i : i + 1], {k: v[i : i + 1] for k, v in condition.items()}
            )
            torch.testing.assert_close(alone[0], both[i], rtol=1e-4, atol=1e-5)


@each_toy
def test_predict_calls_the_wrapper(toy: str) -> None:
    family, network = load_toy(toy)
    wrapped = Wrapper(Wrapper(network))
    given = network_input(toy)
    with torch.no_grad():
        assert torch.equal(family.predict(wrapped, *given), family.predict(network, *given))
    assert wrapped.calls == (2 if toy in ("qwen-image-2.1", "qwen-image-2.1-edit") else 1)  # for each sample
    assert inner_network(wrapped) is network


@each_toy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_stays_in_the_networks_type(toy: str, dtype: torch.dtype) -> None:
    family, network = load_toy(toy, dtype=dtype)
    assert network_dtype(network) == dtype
    noisy, timesteps, condition = network_input(toy)
    if family.takes_sigma:  # bfloat16 has these σ, and a thousand times as much, exactly
        timesteps = torch.tensor([500.0, 250.0])
    with torch.no_grad():
        rounded = {k: v.bfloat16() if v.is_floating_point() else v for k, v in condition.items()}
        low = family.predict(network, noisy.bfloat16(), timesteps, rounded)
        high = family.predict(network, noisy, timesteps, condition)
        exact = family.predict(family.load_network(folder_of(toy)), noisy, timesteps, condition)
    assert low.dtype == high.dtype == dtype
    scale = exact.std().item()
    assert (high.float() - exact).abs().max().item() < (1e-5 if dtype == torch.float32 else 0.15) * scale


@each_toy
def test_a_missing_condition_is_named(toy: str) -> None:
    family, network = load_toy(toy)
    noisy, timesteps, condition = network_input(toy)
    for name in condition:
        rest = {k: v for k, v in condition.items() if k != name}
        with pytest.raises(ValueError, match=f"expected '{name}' as well"):
            family.predict(network, noisy, timesteps, rest)
    with pytest.raises(ValueError, match=r"condition holds \[\]"):
        family.predict(network, noisy, timesteps, None)


def test_sanas_network_has_a_scale_of_its_timesteps() -> None:
    family, pipeline = get_family("sana"), pipeline_of("sana")
    pipeline.transformer.register_to_config(timestep_scale=0.5)
    _, calls = sampled(pipeline, family)
    condition = stacked(family, asked(family, calls, 0, conditions_of("sana", PROMPTS[:1])))
    time = family.network_time(calls[0].timestep.expand(2))
    inputs = family.network_inputs(pipeline.transformer.config, calls[0].noisy(family), time, condition, 1.0)
    assert torch.equal(inputs["timestep"], calls[0].given("timestep")) and not torch.equal(inputs["timestep"], time)


def test_time_ids_are_not_rounded() -> None:
    told = get_family("sdxl").own_condition((1023, 2047), (3, 5), (1024, 1000))
    assert told["time_ids"].tolist() == [1023, 2047, 3, 5, 1024, 1000]
    assert told["time_ids"].dtype == torch.float32
    network = get_family("sdxl").load_network(folder_of("sdxl"), dtype=torch.bfloat16)
    noisy, timesteps, condition = network_input("sdxl")
    seen: list[Tensor] = []
    network.add_time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr,func-returns-value]
    get_family("sdxl").predict(network, noisy, timesteps, condition | {"time_ids": told["time_ids"].repeat(2, 1)})
    assert seen[0].tolist() == told["time_ids"].tolist() * 2
