"""Each family against the real pipeline at toy size: what it hands its network, its encoders and its sampler."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sipo.families import FAMILIES, get_family
from sipo.families.encoding import PromptWarning
from sipo.families.network import inner_network, network_dtype
from sipo.families.packing import stack_patches
from sipo.families.toy import TOYS, build_toy
from sipo.schedule import NoiseSchedule, schedule_for
from sipo.schedule.levels import SettingError
from tests.data_sets import contents
from tests.family_cases import (
    FRAMES,
    PROMPTS,
    as_picture,
    as_uint8,
    asked,
    conditions_of,
    each_toy,
    encoders_of,
    family_of,
    folder_of,
    for_vae,
    images_of,
    load_toy,
    network_input,
    network_of,
    pipeline_of,
    pixels_of,
    sample_of,
    sampled,
    sides_of,
    size_of,
    stacked,
)


class Wrapper(nn.Module):
    """As DDP wraps: the network as ``module``, called through the wrapper's own forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


# ---- The network's call ----


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
            other = tensor & (torch.arange(tensor.shape[1]) < 3) if tensor.dtype == torch.bool else tensor + 1
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
    assert wrapped.calls == 1
    assert inner_network(wrapped) is network


@each_toy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_stays_in_the_networks_type(toy: str, dtype: torch.dtype) -> None:
    family, network = load_toy(toy, dtype=dtype)
    assert network_dtype(network) == dtype
    noisy, timesteps, condition = network_input(toy)
    if family.time_in_network_dtype:  # bfloat16 has these σ, and a thousand times as much, exactly
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


# ---- Text and pixels ----


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
    encoded = family.encode_text(encoders_of(toy), ["", "x", PROMPTS[0], long], images_of(family, 4))
    lengths = {"sd15": 77, "sdxl": 77, "sd3": 77 + 256, "flux2": 512, "flux2-klein": 512, "cogvideox": 226, "wan": 512}
    lengths |= {"flux": 512, "flux-kontext": 512, "chroma": 512}
    lengths |= {"z-image": 512, "lumina2": 256, "sana": 300, "wan2.2": 512}
    lengths |= {"qwen-image": 512, "qwen-image-edit": 3614, "qwen-image-edit-plus": 3622}  # uncut where it edits
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
    for name in encoded[0]:
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


# ---- Loading ----


@each_toy
def test_loads_in_parts(toy: str) -> None:
    family, network = load_toy(toy, dtype=torch.bfloat16)
    parts = family.networks_in(network)
    assert [type(part).__name__ for part in parts.values()] == [family.network_class] * len(family.networks)
    encoders = family.load_encoders(folder_of(toy), dtype=torch.bfloat16)
    assert all(encoders.components[name] is None for name in parts)
    modules = {name: m for name, m in encoders.components.items() if isinstance(m, nn.Module)}
    assert len(modules) >= 2
    for name, module in modules.items():
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
        assert next(module.parameters()).dtype == (torch.float32 if name == "vae" else torch.bfloat16)
    without = family.load_encoders(folder_of(toy), vae_dtype=torch.bfloat16, text=False)
    held = {name: m for name, m in without.components.items() if isinstance(m, nn.Module)}
    assert held.keys() == {"vae"} and held["vae"].dtype == torch.bfloat16
    whole = network_of(pipeline_of(toy), family)
    mine = network.state_dict()
    for name, tensor in whole.state_dict().items():  # diffusers keeps some of Wan's in float32
        assert torch.equal(mine[name], tensor.to(mine[name].dtype))


def test_an_image_vae_that_overflows_in_half_precision() -> None:
    encoders = get_family("sdxl").load_encoders(folder_of("sdxl"), dtype=torch.float16)
    assert (encoders.vae.dtype, encoders.text_encoder.dtype) == (torch.float32, torch.float16)
    with pytest.raises(ValueError, match="its VAE overflows in vae_dtype='float16'"):
        get_family("sdxl").load_encoders(folder_of("sdxl"), vae_dtype=torch.float16)


@pytest.mark.parametrize(
    ("toy", "kind", "prediction", "shift"),
    [
        ("sd15", "discrete", "epsilon", 1),
        ("sd21", "discrete", "v_prediction", 1),
        ("sdxl", "discrete", "epsilon", 1),
        ("sd3", "flow", "flow", 3),
        ("flux-schnell", "flow", "flow", 1),
        ("z-image", "flow", "flow", 3),
        ("lumina2", "flow", "flow", 6),
        ("sana", "flow", "flow", 3),
        ("cogvideox", "discrete", "v_prediction", 1),
        ("cogvideox-2b", "discrete", "v_prediction", 1),
        ("wan", "flow", "flow", 3),
    ],
)
def test_schedule(toy: str, kind: str, prediction: str, shift: float) -> None:
    schedule = family_of(toy).load_schedule(folder_of(toy), 20)
    assert (schedule.kind, schedule.prediction_type, schedule.shift) == (kind, prediction, shift)
    assert (schedule.num_inference_steps, schedule.num_train_timesteps) == (20, 1000)
    if toy.startswith("cogvideox"):
        alpha, sigma = schedule.alpha_sigma(torch.tensor([500, 999]))
        snr = (alpha / sigma) ** 2
        assert snr[1] == 0
        other = family_of(toy).load_schedule(folder_of("cogvideox-2b" if toy == "cogvideox" else "cogvideox"))
        assert snr[0] != pytest.approx(float((other.alpha_sigma(torch.tensor([500]))[0] ** 2)[0]), rel=0.01)


def with_scheduler(toy: str, folder: Path, **changes: Any) -> Path:
    """A toy's folder with another configuration of its scheduler."""
    shutil.copytree(folder_of(toy), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return folder


def test_schedule_with_a_users_settings() -> None:
    def load(toy: str, **settings: Any) -> Any:
        return family_of(toy).load_schedule(folder_of(toy), 20, **settings)

    assert load("sd15", prediction_type="v_prediction").prediction_type == "v_prediction"
    assert load("sd3", shift=5.0).shift == 5.0
    assert load("wan", shift=5.0, prediction_type="flow_prediction", sizes=[(64, 64)]).shift == 5.0
    for toy, settings, message in (
        ("sd15", {"shift": 3.0}, "shift=3.0: leave it out, PNDMScheduler has no flow"),
        ("sd15", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction': expected 'epsilon', 'v_"),
        ("sd3", {"prediction_type": "epsilon"}, "prediction_type='epsilon': expected 'flow_prediction'"),
        ("wan", {"prediction_type": "epsilon"}, "prediction_type='epsilon': expected 'flow_prediction' or 'sample'"),
    ):
        with pytest.raises(SettingError, match="^" + re.escape(message)) as caught:
            load(toy, **settings)
        assert caught.value.name == next(iter(settings))
    assert load("sd15", prediction_type="sample").prediction_type == "sample"
    with pytest.raises(SettingError, match=r"^prediction_type='sample': expected another, PNDMScheduler cannot"):
        load("sd15", prediction_type="sample", sampled=True)


def test_dynamic_shift_goes_by_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of("sd3")
    folder = with_scheduler("sd3", tmp_path / "sd3", use_dynamic_shifting=True)
    # 4096 tokens, where diffusers' mu is 1.15
    one_shift = family.load_schedule(folder, sizes=[(1024, 1024), (2048, 512)])
    assert type(one_shift) is NoiseSchedule and one_shift.shift == pytest.approx(math.exp(1.15))
    several = [(1024, 1024), (512, 512)]
    by_size = family.load_schedule(folder, sizes=several)
    for side, mu in ((128, 1.15), (64, 1024 * 0.65 / 3840 + 0.5 - 256 * 0.65 / 3840)):
        assert schedule_for(by_size, torch.zeros(1, 16, side, side)).shift == pytest.approx(math.exp(mu))
    assert type(family.load_schedule(folder, sizes=several, shift=3.0)) is NoiseSchedule
    # what the pipeline itself makes of that size
    asked: list[float] = []
    original = diffusers.FlowMatchEulerDiscreteScheduler.set_timesteps

    @functools.wraps(original)
    def recorded(self: Any, *args: Any, mu: float | None = None, **options: Any) -> None:
        asked.append(mu if mu is not None else math.nan)
        original(self, *args, mu=mu, **options)

    monkeypatch.setattr(diffusers.FlowMatchEulerDiscreteScheduler, "set_timesteps", recorded)
    for toy in ("sd3", "z-image"):
        family, folder = family_of(toy), with_scheduler(toy, tmp_path / f"{toy} asked", use_dynamic_shifting=True)
        pipeline, network = family.load_encoders(folder), family.load_network(folder)
        family.sample(pipeline, network, ["a"], seed=0, steps=1, **size_of(family))
        shift = family.load_schedule(folder, sizes=[sides_of(family)]).shift
        assert [math.exp(mu) for mu in asked] == pytest.approx([shift], rel=1e-12)
        asked.clear()
    # Wan's pipeline has no dynamic shifting, and Lumina 2's takes the number of channels for that of tokens.
    for toy in ("wan", "lumina2"):
        folder = with_scheduler(toy, tmp_path / toy, use_dynamic_shifting=True)
        with pytest.raises(ValueError, match="use_dynamic_shifting=True: expected image_seq_len=") as caught:
            family_of(toy).load_schedule(folder, sizes=[(64, 64)])
        assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)


LEAVE_THE_LEVELS_TO_THE_SCHEDULER = ("sd3", "wan", "wan2.2", "sana")  # math.md §3 has how far off its grid is


@pytest.mark.parametrize(
    "toy",
    [toy for toy in TOYS if family_of(toy).schedule_kind == "flow" and toy not in LEAVE_THE_LEVELS_TO_THE_SCHEDULER],
)
def test_the_pipeline_visits_the_levels_of_the_schedule(toy: str) -> None:
    family, pipeline = family_of(toy), pipeline_of(toy)
    sampled(pipeline, family, steps=4)
    schedule = family.load_schedule(folder_of(toy), 4, sizes=[sides_of(family)])
    u, k = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64), schedule.shift
    levels = k * u / (1 + (k - 1) * u)
    if schedule.shift_terminal is not None:
        levels = 1 - (1 - levels) * (1 - schedule.shift_terminal) / (1 - levels[-1])
    visited = pipeline.scheduler.sigmas[:-1].double()
    torch.testing.assert_close(visited, levels, rtol=0, atol=2e-7)


def test_a_number_out_of_range_is_the_users_or_the_files(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^num_inference_steps=1001: expected an integer in \[1, 1000\]") as caught:
        family_of("sd15").load_schedule(folder_of("sd15"), 1001)
    assert caught.value.name == "num_inference_steps"
    folder = with_scheduler("sd3", tmp_path / "sd3", shift=-1.0)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(folder))}: shift=-1\.0: expected a finite number > 0$"
    ) as file:
        family_of("sd3").load_schedule(folder)
    assert type(file.value) is ValueError


def test_schedulers_that_cannot_be_used_are_named_in_one_line(tmp_path: Path) -> None:
    folder = with_scheduler("sd3", tmp_path / "sd3", invert_sigmas=True)
    with pytest.raises(ValueError, match="DiscreteScheduler has invert_sigmas=True, expected a model without"):
        family_of("sd3").load_schedule(folder)
    folder = with_scheduler("sd15", tmp_path / "sd15")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name, message in (
        ("EDMEulerScheduler", "scheduler EDMEulerScheduler is not modelled, its samples are"),
        ("DPMSolverSDEScheduler", "torchsde"),
    ):
        index["scheduler"] = ["diffusers", name]
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        if name == "DPMSolverSDEScheduler" and not hasattr(diffusers.DPMSolverSDEScheduler, "_backends"):
            continue  # torchsde is there
        with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}: .*{message}") as caught:
            family_of("sd15").load_schedule(folder)
        assert "\n" not in str(caught.value)


@each_toy
def test_wrong_folders_are_named_in_one_line(toy: str, tmp_path: Path) -> None:
    family = family_of(toy)
    other = folder_of("sd15" if family.pipeline_class == "WanPipeline" else "wan")
    cases: list[tuple[Path, type[Exception], str]] = [
        (tmp_path / "absent", FileNotFoundError, "no such folder"),
        (tmp_path, FileNotFoundError, "model_index.json"),
        (other, ValueError, f"expected a {family.pipeline_class}"),
    ]
    for path, kind, text in cases:
        for load in (family.load_network, family.load_encoders, family.load_schedule):
            with pytest.raises(kind, match=text) as caught:
                load(path)
            message = str(caught.value)
            assert str(path) in message and "\n" not in message
    for path_text in ("./absent", "of/three/parts", "~/absent"):  # no hub is asked
        with pytest.raises(FileNotFoundError, match="no such folder"):
            family.load_network(path_text)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(folder_of("sd15"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    network = get_family("sd15").load_network(folder)
    torch.save(network.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors") as caught:
        get_family("sd15").load_network(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("toy", "file", "changes", "text"),
    [
        (
            "wan",
            "model_index.json",
            {"boundary_ratio": 0.9},
            "boundary_ratio=0.9, expected none; family 'wan2.2' takes it",
        ),
        (
            "wan2.2",
            "model_index.json",
            {"boundary_ratio": None},
            "boundary_ratio=None, expected .*; family 'wan' takes",
        ),
        (
            "wan2.2",
            "model_index.json",
            {"boundary_ratio": "0.9"},
            r"boundary_ratio='0.9', expected a number in \(0, 1\)",
        ),
        ("wan2.2", "model_index.json", {"boundary_ratio": 1.5}, r"boundary_ratio=1.5, expected a number in \(0, 1\)"),
        ("wan2.2", "model_index.json", {"boundary_ratio": None, "expand_timesteps": True}, "a Wan 2.2 5B: expected"),
        ("cogvideox", "transformer/config.json", {"in_channels": 8}, "takes 8 channels and gives 4"),
        ("cogvideox", "transformer/config.json", {"patch_size_t": 2}, "patch_size_t=2, a CogVideoX 1.5"),
        ("sd3", "scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "has 500 timesteps, expected 1000"),
        (
            "sd3",
            "model_index.json",
            {"text_encoder_3": [None, None]},
            "has no text_encoder_3, expected a pipeline with T5",
        ),
        ("flux", "model_index.json", {"_class_name": "FluxKontextPipeline"}, "family 'flux-kontext' takes it"),
        ("flux2", "model_index.json", {"_class_name": "Flux2KleinPipeline"}, "; family 'flux2-klein' takes it"),
        ("flux2-klein", "model_index.json", {"_class_name": "FluxPipeline"}, "; family 'flux' takes it"),
        ("flux", "transformer/config.json", {"in_channels": 32, "out_channels": 16}, "takes 32 channels and gives 16"),
        ("chroma", "scheduler/scheduler_config.json", {"use_beta_sigmas": True}, "has use_beta_sigmas=True: expected"),
        (
            "z-image",
            "model_index.json",
            {"_class_name": "ZImageOmniPipeline"},
            "holds a ZImageOmniPipeline, expected a",
        ),
        ("sana", "model_index.json", {"_class_name": "SanaSprintPipeline"}, "holds a SanaSprintPipeline, expected a"),
        ("sana", "transformer/config.json", {"out_channels": 8}, "takes 4 channels and gives 8"),
        ("lumina2", "model_index.json", {"_class_name": "ZImagePipeline"}, "; family 'z-image' takes it"),
        ("sd15", "model_index.json", {"scheduler": ["elsewhere", "Mine"]}, "its scheduler is 'Mine'"),
    ],
)
def test_relatives_of_a_family_are_refused(
    toy: str, file: str, changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    family = family_of(toy)
    folder = tmp_path / toy
    shutil.copytree(folder_of(toy), folder)
    config = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(config | changes), encoding="utf-8")
    if file.startswith("transformer"):  # weights that fit
        network_class = getattr(diffusers, family.network_class)
        network_class.from_config(network_class.load_config(folder, subfolder="transformer")).save_pretrained(
            folder / "transformer"
        )
    with pytest.raises(ValueError, match=text):
        family.load_schedule(folder) if "scheduler" in text + file or toy == "sd3" else family.load_network(folder)


@pytest.mark.parametrize(
    ("toy", "size", "nearest"),
    [
        ("sd15", (512, 500, 1), "height=512, width=496, frames=1"),
        ("sdxl", (1024, 1024, 2), "height=1024, width=1024, frames=1"),
        ("sd3", (1000, 1024, 1), "height=992, width=1024, frames=1"),
        ("flux", (1024, 1016, 1), "height=1024, width=1024, frames=1"),
        ("flux2", (1024, 1016, 1), "height=1024, width=1024, frames=1"),
        ("sana", (1000, 1024, 1), "height=992, width=1024, frames=1"),
        ("cogvideox", (480, 720, 48), "height=480, width=720, frames=49"),
        ("wan", (480, 830, 81), "height=480, width=832, frames=81"),
        ("wan", (3, 832, 0), "height=16, width=832, frames=1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(toy: str, size: tuple[int, int, int], nearest: str) -> None:
    with pytest.raises(ValueError, match=f"the nearest is {nearest}"):
        family_of(toy).check_size(*size)
    good = [int(part.partition("=")[2]) for part in nearest.split(", ")]
    family_of(toy).check_size(*good)


def test_families_by_name() -> None:
    assert [get_family(name).name for name in FAMILIES] == list(FAMILIES)
    with pytest.raises(ValueError, match=r"family='sd1.5': expected one of sd15, .*did you mean 'sd15'"):
        get_family("sd1.5")


# ---- Sampling and the toys themselves ----


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
