"""LoRA files: every reader finds every layer, at the strength that it was trained at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sipo.families import get
from sipo.families.tuning import load_saved, prepare_lora, save_lora
from tests.family_cases import TOYS, family_of, folder_of, network_input, pipeline_of
from tests.test_families_tuning import lora_network

each_toy = pytest.mark.parametrize("toy", TOYS)

ALPHA = 5.0  # of rank 2 or 3: neither a scale of 1 nor one that floating point has exactly

# The fields of peft 0.17.1's LoraConfig: https://github.com/huggingface/peft/blob/v0.17.1/src/peft/tuners/lora/config.py
# with those of PeftConfig and PeftConfigMixin. That release refuses a file's metadata if it has any other.
PEFT_0_17 = set(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layer_replication layers_pattern layers_to_transform loftq_config lora_alpha
    lora_bias lora_dropout megatron_config megatron_core modules_to_save peft_type qalora_group_size r rank_pattern
    revision runtime_config target_modules target_parameters task_type trainable_token_indices use_dora use_qalora
    use_rslora
    """.split()
)


def predictions(toy: str, network: Any) -> Tensor:
    with torch.no_grad():
        return family_of(toy).predict(network.eval(), *network_input(toy))


def metadata_of(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return dict(json.loads(opened.metadata()["lora_adapter_metadata"]))


# ---- What a run saves ----


@each_toy
def test_a_saved_adapter_counts_the_same_with_and_without_its_metadata(toy: str, tmp_path: Path) -> None:
    family, network = family_of(toy), lora_network(toy, rank=3, alpha=ALPHA)
    file = save_lora(family, network, tmp_path)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(file), bare)  # as a reader sees it that knows nothing of metadata
    expected = predictions(toy, network)
    for name in (file.name, bare.name):
        pipeline = pipeline_of(toy)
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        found = predictions(toy, getattr(pipeline, family.network))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    network.disable_adapters()
    assert (predictions(toy, network) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_metadata_has_only_what_old_peft_knows(dropout: float, tmp_path: Path) -> None:
    network = lora_network("wan", alpha=ALPHA, dropout=dropout, target_modules=["to_v", "ffn.net.2", "to_k"])
    found = metadata_of(save_lora(get("wan"), network, tmp_path))
    assert {name.removeprefix("transformer.") for name in found} <= PEFT_0_17
    assert found == {
        "transformer.r": 2,
        "transformer.lora_alpha": 2,  # alpha / rank is in the weights
        "transformer.target_modules": ["ffn.net.2", "to_k", "to_v"],
        **({"transformer.lora_dropout": dropout} if dropout else {}),
    }
