"""The model card: what it says of a run, and its code, which loads the model and samples as the run did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sipo.data.config import DataConfig
from sipo.families import FAMILIES, get_family
from sipo.families.config import LoraConfig, ModelConfig
from sipo.families.tuning import save_full, save_lora
from sipo.recipe.card import model_card
from sipo.recipe.config import Config, LossConfig
from sipo.schedule.diffusers_schedulers import setting_changes, with_settings
from sipo.training.config import TrainingConfig
from tests.family_cases import (
    folder_of,
    lora_network,
    network_input,
    network_of,
)


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
    scripts = {"lumina2": "sd-scripts", "wan": "musubi-tuner", "flux2": "musubi-tuner", "qwen-image": "musubi-tuner"}
    for name, tool in scripts.items():
        assert f"| `sipo export RUN --format kohya` | kohya-ss's {tool}, and tools" in card_of(name, "a/b", "lora")
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
