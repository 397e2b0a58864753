"""Saved adapters and weights at toy size: the real pipeline loads them and samples the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from sipo.families import get_family
from sipo.families.tuning import prepare_full, save_full, save_lora
from tests.family_cases import (
    each_toy,
    family_of,
    folder_of,
    load_adapters,
    load_toy,
    lora_network,
    network_input,
    network_of,
    no_shared_tensors,
    pipeline_of,
    sample,
)


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
