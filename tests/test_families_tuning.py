"""LoRA and full tuning at toy size: the reference inside the network, and saves that diffusers loads."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sipo import SIPOLoss
from sipo.batch import PairBatch, level_argument, noisy_pairs
from sipo.data.config import DataConfig
from sipo.families import FAMILIES, get_family
from sipo.families.config import LoraConfig, ModelConfig
from sipo.families.network import evaluating
from sipo.families.tuning import adapter_off, freeze, prepare_full, prepare_lora, save_full, save_lora
from sipo.recipe.card import model_card
from sipo.recipe.config import Config, LossConfig
from sipo.schedule.diffusers_schedulers import setting_changes, with_settings
from sipo.training.config import TrainingConfig
from tests.family_cases import (
    PROMPTS,
    each_toy,
    encoders_of,
    family_of,
    folder_of,
    load_adapters,
    load_toy,
    network_input,
    network_of,
    pipeline_of,
    sample_of,
    sides_of,
)


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


def sample(toy: str, network: nn.Module) -> Tensor:
    family = family_of(toy)
    return family.sample(encoders_of(toy), network, PROMPTS[:1], seed=3, steps=2, **sample_of(family, 1))


def no_shared_tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


# ---- The reference ----


@each_toy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_base_network_bit_for_bit(toy: str, dtype: torch.dtype) -> None:
    family = family_of(toy)
    # Frozen as a reference is: torch multiplies by a weight that requires grad in another way, to other last bits.
    base = freeze(family.load_network(folder_of(toy), dtype=dtype))
    network = lora_network(toy, dtype=dtype, dropout=0.5).train()
    given = network_input(toy)
    with torch.no_grad():
        expected = family.predict(base, *given)
        before = family.predict(network.eval(), *given)
        network.train()
        with adapter_off(network):
            found = family.predict(network, *given)
        after = family.predict(network.eval(), *given)
    assert torch.equal(found, expected)
    assert not torch.equal(before, expected)
    assert torch.equal(after, before)


def test_everything_is_as_before_after_the_reference() -> None:
    network = lora_network("sd15", dropout=0.5).train()
    network.mid_block.eval()
    frozen = next(p for n, p in network.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    modes = {name: module.training for name, module in network.named_modules()}
    with adapter_off(network):
        assert not any(module.training for module in network.modules())
    with pytest.raises(RuntimeError, match="inside"), adapter_off(network):
        raise RuntimeError("inside")
    assert {name for name, p in network.named_parameters() if p.requires_grad} == trainable
    assert {name: module.training for name, module in network.named_modules()} == modes
    given = network_input("sd15")
    with torch.no_grad(), evaluating(network.modules()):
        on = get_family("sd15").predict(network, *given)
        with adapter_off(network):
            off = get_family("sd15").predict(network, *given)
        network.disable_adapters()
        with adapter_off(network):
            pass
        assert torch.equal(get_family("sd15").predict(network, *given), off)
    assert not torch.equal(on, off)
    with (
        pytest.raises(ValueError, match="UNet2DConditionModel has no adapter"),
        adapter_off(get_family("sd15").load_network(folder_of("sd15"))),
    ):
        pass


def test_the_reference_is_entered_again_and_leaves_replaced_forwards_alone() -> None:
    network = lora_network("sd15")
    given, family = network_input("sd15"), get_family("sd15")
    first, second = [module for module in network.modules() if isinstance(module, BaseTunerLayer)][:2]
    calls: list[str] = []
    plain = second.forward
    second.forward = lambda *args, **options: calls.append("hooked") or plain(*args, **options)
    off = adapter_off(network)
    with torch.no_grad(), evaluating(network.modules()):
        expected = family.predict(freeze(family.load_network(folder_of("sd15"))), *given)
        for _ in range(3):
            with off:
                assert "forward" in first.__dict__
                assert torch.equal(family.predict(network, *given), expected)
            assert "forward" not in first.__dict__ and "forward" in second.__dict__
            assert not torch.equal(family.predict(network, *given), expected)
    assert len(calls) == 6


def test_a_reference_that_cannot_be_entered_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    network = lora_network("sd15").train()
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    off = adapter_off(network)
    broken = layers[1]
    base = broken._modules.pop("base_layer")
    with pytest.raises(AttributeError, match="base_layer"), off:
        pass
    broken._modules["base_layer"] = base
    assert not any(layer._disable_adapters or "forward" in layer.__dict__ for layer in layers)
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
@each_toy
def test_the_reference_between_forward_and_backward_changes_no_gradient(toy: str, checkpointing: bool) -> None:
    family = family_of(toy)
    given = network_input(toy)
    gradients = []
    for with_reference in (False, True):
        network = lora_network(toy, gradient_checkpointing=checkpointing and with_reference).train()
        prediction = family.predict(network, *given)
        if with_reference:
            with torch.no_grad(), adapter_off(network):
                family.predict(network, *given)
        prediction.square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(name.endswith("weight") and "lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@each_toy
def test_a_step_of_the_loss_moves_the_policy_and_not_the_reference(toy: str) -> None:
    family = family_of(toy)
    schedule = family.load_schedule(folder_of(toy), sizes=[sides_of(family)])
    loss_fn = SIPOLoss(schedule, method="diffusion_dpo", beta=200.0)
    network = family.load_network(folder_of(toy))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prepare_lora(network, rank=4, target_modules=family.lora_targets)
    latents, _, condition = network_input(toy)  # a chosen sample and a rejected sample
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(latents[:1].shape, generator=generator)
    batch = PairBatch(latents[:1], latents[1:]).with_draws(noise, schedule.sample_levels(1, generator))
    pairs = noisy_pairs(batch, schedule)
    inputs, levels = (pairs.samples, pairs.timesteps, condition), level_argument(schedule, pairs.levels)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    losses, references = [], []
    for _ in range(4):
        with torch.no_grad(), adapter_off(network):
            references.append(family.predict(network, *inputs))
        out = loss_fn(family.predict(network, *inputs), references[-1], pairs.target, **levels)
        losses.append(out.loss.item())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses[3] < losses[0] - 1e-4
    assert all(torch.equal(reference, references[0]) for reference in references)


def test_samples_are_drawn_without_dropout() -> None:
    network = lora_network("sd15", dropout=0.5)
    expected = sample("sd15", network.eval())
    state = torch.get_rng_state()
    assert torch.equal(sample("sd15", network.train()), expected)
    assert torch.equal(torch.get_rng_state(), state)


# ---- What is trained ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_the_adapter_alone_in_float32(dtype: torch.dtype) -> None:
    network = get_family("wan").load_network(folder_of("wan"), dtype=dtype)
    given = network_input("wan")
    with torch.no_grad():
        before = get_family("wan").predict(network, *given)
    base = no_shared_tensors(network)
    prepare_lora(network, rank=3, alpha=6, target_modules=["to_q", "ffn.net.2"])
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * (2 + 1)  # two layers' A and B: two attentions and one feed-forward
    assert all(p.dtype == torch.float32 and 3 in p.shape and "lora_" in name for name, p in trained.items())
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in network.state_dict().items()}
    assert all(torch.equal(kept[name], tensor) and kept[name].dtype == tensor.dtype for name, tensor in base.items())
    with torch.no_grad():  # the adapter is zero at first
        assert torch.equal(get_family("wan").predict(network, *given), before)


def test_full_tuning_trains_everything_in_float32() -> None:
    network = freeze(get_family("sd15").load_network(folder_of("sd15"), dtype=torch.bfloat16))
    assert not any(p.requires_grad for p in network.parameters())
    prepare_full(network, gradient_checkpointing=True)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    assert any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"target_modules": ["to_q", "to_qq"]},
            r"target_modules: 'to_qq' is no linear .*UNet2DConditionModel, such as",
        ),
        ({"target_modules": ["attentions"]}, "target_modules: 'attentions' is no linear layer"),
        ({"target_modules": []}, r"target_modules=\[\]: expected at least one"),
        ({"rank": 0}, "rank=0: expected at least 1"),
        ({"alpha": 0.0}, "alpha=0.0: expected a finite number > 0"),
        ({"dropout": 1.0}, "dropout=1.0: expected a number >= 0 and < 1"),
    ],
)
def test_adapters_that_fit_nowhere_are_refused(options: dict[str, Any], text: str) -> None:
    network = get_family("sd15").load_network(folder_of("sd15"))
    before = [name for name, _ in network.named_parameters()]
    with pytest.raises(ValueError, match=text) as caught:
        prepare_lora(network, **({"rank": 2, "target_modules": ["to_q"]} | options))
    assert "\n" not in str(caught.value)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == before


# ---- Saving ----


@each_toy
def test_a_saved_adapter_samples_the_same_in_its_pipeline(toy: str, tmp_path: Path) -> None:
    family = family_of(toy)
    network = lora_network(toy, alpha=4.0)  # a scale of 2, which must be found again: by a power of two, to the bit
    trained = sample(toy, network)
    assert save_lora(family, network, tmp_path) == tmp_path / "pytorch_lora_weights.safetensors"
    assert sorted(os.listdir(tmp_path)) == sorted(["pytorch_lora_weights.safetensors", *family.experts[1:]])
    loaded = load_adapters(pipeline_of(toy), family, tmp_path)
    given = network_input(toy)
    with torch.no_grad():
        torch.testing.assert_close(
            family.predict(loaded, *given), family.predict(network, *given), rtol=1e-6, atol=1e-6
        )
    assert torch.equal(sample(toy, loaded), trained)
    base = family.load_network(folder_of(toy))
    assert not torch.equal(sample(toy, base), trained)


@each_toy
def test_saved_weights_sample_the_same_in_their_pipeline(toy: str, tmp_path: Path) -> None:
    family, network = load_toy(toy)
    prepare_full(network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    trained = sample(toy, network)
    for _ in range(2):  # the second time over the first
        assert save_full(family, network, tmp_path) == tmp_path / family.network
        assert sorted(os.listdir(tmp_path)) == sorted(family.networks)
    network_class = getattr(diffusers, family.network_class)
    loaded = {name: network_class.from_pretrained(tmp_path, subfolder=name) for name in family.networks}
    assert torch.equal(sample(toy, network_of(pipeline_of(toy, **loaded), family)), trained)
    assert not torch.equal(sample(toy, family.load_network(folder_of(toy))), trained)


@each_toy
def test_gathered_tensors_are_saved_in_place_of_the_networks(toy: str, tmp_path: Path) -> None:
    family = family_of(toy)
    network = lora_network(toy)
    state = {name: tensor + 1 for name, tensor in no_shared_tensors(network).items() if "lora_" in name}
    save_lora(family, network, tmp_path, state=state)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter += "lora_" in name
    loaded = load_adapters(pipeline_of(toy), family, tmp_path)
    assert torch.equal(sample(toy, loaded), sample(toy, network))

    network = family.load_network(folder_of(toy))
    state = {name: tensor * 1.01 for name, tensor in no_shared_tensors(network).items()}
    save_full(family, network, tmp_path, state=state)
    for name, part in family.networks_in(network).items():
        loaded = getattr(diffusers, family.network_class).from_pretrained(tmp_path, subfolder=name)
        assert type(loaded) is type(part)
        assert dict(loaded.config).keys() == dict(part.config).keys()
        start = f"{name}." if family.experts else ""
        assert all(torch.equal(tensor, state[start + key]) for key, tensor in loaded.state_dict().items())


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = get_family("sd15")
    network, whole = lora_network("sd15"), family.load_network(folder_of("sd15"))
    save_lora(family, network, tmp_path)
    save_full(family, whole, tmp_path)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def half(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    for save, saved in ((save_lora, network), (save_full, whole)):
        with torch.no_grad():
            next(saved.parameters()).add_(1)
        with pytest.raises(OSError, match="disk full"):
            save(family, saved, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files
    with pytest.raises(ValueError, match="has no adapter to save"):
        save_lora(family, whole, tmp_path)


# ---- The model card ----


def configuration(family: str, path: str, tuning: Any) -> Config:
    return Config(
        model=ModelConfig(family, path, tuning=tuning, lora=LoraConfig(rank=2, alpha=5.0)),
        data=DataConfig(str(Path.home() / "someone" / "pairs.jsonl"), cache="cache", sizes=[(32, 48)]),
        training=TrainingConfig(max_train_steps=10, output_dir="out"),
        loss=LossConfig(method="dpo_cm", mask_threshold=0.8),
    )


def card_of(family: str, path: str, tuning: str) -> str:
    config = configuration(family, path, tuning)
    return model_card(get_family(family), config, beta=1000.0, pairs=12, data_hash="abc123", steps=7, date="2026-01-02")


def test_the_card_says_what_was_done() -> None:
    card = card_of("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", "lora")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "preference-optimisation", "sipo", "dpo-cm", "lora"],
    }
    rows = dict(
        line.strip("| ").split(" | ", 1) for line in body.splitlines() if line.startswith("| ") and line != "| | |"
    )
    assert rows["method"] == "dpo_cm"
    assert rows["β (`beta`)"].startswith("1000: mean over elements, factor ½ inside")
    assert rows["β (`beta`)"].endswith("1 in the papers' convention")
    assert (rows["mask_threshold"], rows["clip_low"], rows["ratio"]) == ("0.8", "0.1", "posterior")
    assert (rows["pairs"], rows["hash"], rows["data"], rows["steps"]) == ("12", "abc123", "pairs.jsonl", "7")
    assert (rows["rank"], rows["alpha"], rows["date"]) == ("2", "5.0", "2026-01-02")
    assert {"torch", "diffusers", "peft", "sipo"} <= rows.keys()
    assert rows["`pytorch_lora_weights.safetensors`, here"].startswith("diffusers")
    assert rows["`sipo export RUN --format kohya`"].startswith("kohya-ss's sd-scripts")
    assert rows["`sipo export RUN --format comfyui`"].startswith("ComfyUI")
    assert str(Path.home()) not in card
    full = card_of("wan", "/srv/models/wan", "full")
    assert "base_model" not in full and "/srv" not in full and "| rank |" not in full
    assert "text-to-video" in full and "| `transformer/`, here | diffusers |" in full and "export" not in full
    cog = card_of("cogvideox", "THUDM/CogVideoX-2b", "lora")
    assert "export RUN --format comfyui" in cog and "kohya" not in cog
    experts = [card_of("wan2.2", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", tuning) for tuning in ("lora", "full")]
    file = "pytorch_lora_weights.safetensors`, here | diffusers |"
    assert f"| `{file}" in experts[0] and f"| `transformer_2/{file}" in experts[0] and "export" not in experts[0]
    assert all(f"| `{name}/`, here | diffusers |" in experts[1] for name in ("transformer", "transformer_2"))
    edit = configuration("flux-kontext", "a/b", "lora")
    edit = replace(edit, model=replace(edit.model, guidance_scale=1.0))
    text = model_card(get_family("flux-kontext"), edit, beta=1.0, pairs=12, data_hash="a", steps=7)
    assert 'pipeline_tag: "image-to-image"' in text
    assert "| guidance_scale | 1, as the network was told it |" in text and "| guidance_scale |" not in card
    assert not any("| scheduler |" in text or "pipeline.scheduler" in text for text in (card, full, cog))
    assert all("| lr_scheduler | constant |" in text for text in (card, full, cog))


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(
    ("toy", "settings", "row"),
    [
        ("sd15", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
        ("wan", {"shift": 5.0, "prediction_type": "sample"}, "prediction_type='sample', flow_shift=5.0"),
        ("sd3", {"shift": 5.0}, "shift=5.0"),
    ],
)
def test_the_cards_code_samples_as_the_run_did(
    toy: str, settings: dict[str, Any], row: str, tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a prediction type or shift that the base's own scheduler has otherwise, samples would come out wrong."""
    family, network = (
        get_family(toy),
        lora_network(toy) if tuning == "lora" else get_family(toy).load_network(folder_of(toy)),
    )
    (save_lora if tuning == "lora" else save_full)(family, network, tmp_path)
    scheduler = family.load_scheduler(folder_of(toy))
    config = configuration(toy, "toy", tuning)
    changes = setting_changes(scheduler, settings.get("prediction_type"), settings.get("shift"))
    card = model_card(family, config, beta=1.0, pairs=12, data_hash="a", steps=7, scheduler=changes)
    assert f"| scheduler | {row} |" in card
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    assert dict(names["pipeline"].scheduler.config) == dict(with_settings(scheduler, **settings).config)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("toy", FAMILIES)
def test_the_cards_code_loads_the_model(toy: str, tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = get_family(toy)
    if tuning == "lora":
        network = lora_network(toy, alpha=5.0)
        save_lora(family, network, tmp_path)
    else:
        network = family.load_network(folder_of(toy))
        with torch.no_grad():
            next(network.parameters()).mul_(1.5)
        save_full(family, network, tmp_path)
    code = card_of(toy, "toy", tuning).partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    given = network_input(toy)
    with torch.no_grad():
        found = family.predict(network_of(names["pipeline"], family), *given)
        expected = family.predict(network, *given)
    # LoRA's scale of 2.5 is rounded into the weights, so single elements may be a few units in the last place apart.
    assert (found - expected).norm() <= (1e-6 if tuning == "lora" else 0.0) * expected.norm()
