"""LoRA and full tuning at toy size: the reference inside the network, and what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from peft.tuners.tuners_utils import BaseTunerLayer

from sipo import SIPOLoss
from sipo.batch import PairBatch, level_argument, noisy_pairs
from sipo.families import get_family
from sipo.families.network import evaluating
from sipo.families.tuning import adapter_off, freeze, prepare_full, prepare_lora
from sipo.training.sharding import plain_name
from tests.family_cases import (
    each_toy,
    family_of,
    folder_of,
    load_toy,
    lora_network,
    network_input,
    no_shared_tensors,
    sample,
    sides_of,
)

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


@pytest.mark.parametrize("toy", ["sd3", "flux", "qwen-image", "qwen-image-edit", "qwen-image-2.1", "wan"])
@pytest.mark.parametrize("lora", [False, True])
def test_every_weight_gets_a_gradient_but_those_that_are_kept_from_ddp(toy: str, lora: bool) -> None:
    """Several processes would wait for one that gets none."""
    family, network = load_toy(toy)
    if lora:
        layers = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
        prepare_lora(network, rank=1, target_modules=layers)
    else:
        prepare_full(network)
    family.keep_unread_from_ddp(network)
    family.predict(network, *network_input(toy)).square().mean().backward()
    kept = getattr(network, "_ddp_params_and_buffers_to_ignore", [])
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert {name for name, p in trained.items() if p.grad is None} == trained.keys() & set(kept)
    regions = compile_regions(network, backend="eager")
    without = {plain_name(name) for name, p in trained.items() if p.grad is None}
    names = {name for name, _ in regions.named_parameters() if plain_name(name) in without}
    assert names <= set(getattr(regions, "_ddp_params_and_buffers_to_ignore", []))


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
