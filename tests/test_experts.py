"""Several networks by noise level: each sample goes to the network that its level names."""

from __future__ import annotations

import pytest
import torch

from sipo.families import get_family
from sipo.families.experts import ExpertNetworks
from sipo.families.tuning import prepare_lora
from tests.family_cases import folder_of, load_toy, network_input

BOUNDARY = 875.0  # of the toy, and of the published model


def test_each_sample_goes_to_the_network_that_its_level_names() -> None:
    family, experts = load_toy("wan2.2")
    assert isinstance(experts, ExpertNetworks) and experts.boundary == BOUNDARY / 1000
    high, low = (get_family("wan").predict(part, *_input([900.0, 100.0])) for part in experts.children())
    assert not torch.allclose(high, low)
    for timesteps, networks in (
        ([900.0, 100.0], [high, low]),
        ([100.0, 900.0], None),
        ([BOUNDARY, BOUNDARY - 1], None),
    ):
        noisy, told, condition = _input(timesteps)
        with torch.no_grad():
            found = family.predict(experts, noisy, told, condition)
            parts = list(experts.children())
            for i in range(2):
                mine = parts[0 if timesteps[i] >= BOUNDARY else 1]
                one = {name: tensor[i : i + 1] for name, tensor in condition.items()}
                expected = get_family("wan").predict(mine, noisy[i : i + 1], told[i : i + 1], one)
                torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-5, atol=1e-5)
        if networks is not None:
            for i, expected in enumerate(networks):
                torch.testing.assert_close(found[i], expected[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("timesteps", "trained"), [([900.0, 880.0], [0]), ([10.0, 20.0], [1]), ([900.0, 20.0], [0, 1])]
)
def test_only_networks_that_a_batch_reaches_get_gradients(timesteps: list[float], trained: list[int]) -> None:
    family, experts = load_toy("wan2.2")
    prepare_lora(experts, rank=2, target_modules=family.lora_targets)
    family.predict(experts, *_input(timesteps)).square().mean().backward()
    reached = [any(p.grad is not None for p in part.parameters()) for part in experts.children()]
    assert reached == [number in trained for number in range(2)]
    assert not any(p.grad is not None for p in experts.parameters() if not p.requires_grad)


def test_both_networks_are_loaded_and_named() -> None:
    family = get_family("wan2.2")
    empty = family.empty_network(folder_of("wan2.2"))
    assert [name for name, _ in empty.named_children()] == ["transformer", "transformer_2"] == list(family.networks)
    _, experts = load_toy("wan2.2")
    first, second = (dict(part.named_parameters()) for part in experts.children())
    assert first.keys() == second.keys() and not torch.equal(first["proj_out.weight"], second["proj_out.weight"])


def _input(timesteps: list[float]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    noisy, _, condition = network_input("wan2.2")
    return noisy, torch.tensor(timesteps), condition
