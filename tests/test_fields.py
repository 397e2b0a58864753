"""Types and ranges of the fields of every section of a configuration, where it is made in Python."""

from __future__ import annotations

from typing import Any

import pytest

from sipo.data.config import DataConfig
from sipo.families.config import LoraConfig, ModelConfig
from sipo.recipe.config import Config, ConfigError, LossConfig, SampleConfig
from sipo.training.config import TrainingConfig

LEAST: dict[type, tuple[str, ...]] = {ModelConfig: ("sd15", "path"), DataConfig: ("pairs.jsonl", "cache")}


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (ModelConfig, "tuning", "half", "tuning='half': expected one of lora, full"),
        (
            ModelConfig,
            "reference_dtype",
            "int8",
            "reference_dtype='int8': expected one of float32, bfloat16, float16, ",
        ),
        (ModelConfig, "gradient_checkpointing", "no", "gradient_checkpointing='no': expected True or False"),
        (ModelConfig, "lora", {"rank": 4}, "lora={'rank': 4}: expected a LoraConfig"),
        (ModelConfig, "revision", 3, "revision=3: expected a string or None"),
        (LoraConfig, "rank", 0, "rank=0: expected at least 1"),
        (LoraConfig, "alpha", "8", "alpha='8': expected a number or None"),
        (LoraConfig, "target_modules", "to_q", "target_modules='to_q': expected a list of strings or None"),
        (LoraConfig, "target_modules", ["to_q", 1], "target_modules=['to_q', 1]: expected a list of strings or None"),
        (DataConfig, "sizes", [(64, 64, 3)], "sizes=[(64, 64, 3)]: expected a list of lists of 2 integers"),
        (DataConfig, "sizes", [(64, 64.5)], "sizes=[(64, 64.5)]: expected a list of lists of 2 integers"),
        (DataConfig, "fps", True, "fps=True: expected a number or None"),
        (DataConfig, "num_workers", 0, "num_workers=0: expected at least 1"),
        (LossConfig, "num_inference_steps", 0, "num_inference_steps=0: expected at least 1"),
        (LossConfig, "num_inference_steps", 2.0, "num_inference_steps=2.0: expected an integer or None"),
        (SampleConfig, "validation_prompts", "a cat", "validation_prompts='a cat': expected a list of strings"),
        (SampleConfig, "guidance_scale", float("inf"), "guidance_scale=inf: expected a finite number >= 0"),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_named(kind: type, name: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        kind(*LEAST.get(kind, ()), **{name: value})
    assert str(caught.value).startswith(message)


def test_a_whole_configuration_is_checked_too() -> None:
    model, data = ModelConfig("sd15", "path", dtype="float16"), DataConfig("pairs.jsonl", "cache")
    with pytest.raises(TypeError, match=r"^data='pairs.jsonl': expected a DataConfig$"):
        Config(model, "pairs.jsonl", TrainingConfig(1, "out"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"training.mixed_precision='bf16': expected at most one half-precision type"):
        Config(model, data, TrainingConfig(1, "out", mixed_precision="bf16"))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (LoraConfig, {"rank": 1, "alpha": 8, "dropout": 0, "target_modules": ("to_q", "to_k")}),
        (DataConfig, {"sizes": ((64, 96), [96, 64]), "fps": 8, "num_workers": None, "draws": 0}),
        (SampleConfig, {"validation_prompts": [], "guidance_scale": 0}),
    ],
)
def test_what_fits_is_kept_as_it_is(kind: type, values: dict[str, Any]) -> None:
    made = kind(*LEAST.get(kind, ()), **values)
    assert {name: getattr(made, name) for name in values} == values
