"""Pairs with an error_mask, from items to training, reference errors and rewards: as if the rest were cut off."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sipo import NoiseSchedule, SIPOLoss
from sipo.analysis.score import score_pairs
from sipo.batch import PairBatch, collate, counted_mean
from sipo.cache.precompute_errors import _errors
from sipo.training.first_step import FirstStep
from sipo.training.forward import PairForward
from tests.training_cases import Pairs

FLOW = NoiseSchedule.flow(3.0)
EPSILON = NoiseSchedule.discrete()


class Pointwise(nn.Module):
    """Each element of the prediction follows from the same element of the input, so cutting changes no other."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.value * noisy + 1e-4 * timesteps[:, None, None, None]


def predict(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
    return module(noisy, timesteps)


def items(schedule: NoiseSchedule, cut: bool, mask: Any, rest: float = math.nan) -> list[dict[str, Any]]:
    """Three pairs at fixed draws of ``[1, 4, 6]``, of which the last two columns are ``rest``; or without these."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for level in schedule.sample_levels(3, generator):
        chosen, rejected, noise = torch.randn(3, 1, 4, 6, generator=generator)
        chosen[:, :, 4:], rejected[:, :, 4:] = rest, -rest
        item = {"chosen": chosen, "rejected": rejected, "noise": noise}
        if cut:
            item = {name: value[:, :, :4] for name, value in item.items()}
        found.append(item | {"level": level} | ({} if cut else {"error_mask": mask}))
    return found


MASK = torch.tensor([[[1.0, 1, 1, 1, 0, 0]]])  # broadcast over the rows
MASKS = [MASK.bool(), MASK.expand(1, 4, 6).bool(), MASK.double(), 0.25 * MASK.bfloat16()]


def batch(schedule: NoiseSchedule, cut: bool, mask: Any = MASK, rest: float = math.nan) -> PairBatch:
    return PairBatch.of_items(collate(items(schedule, cut, mask, rest)))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", [FLOW, EPSILON], ids=["flow", "epsilon"])
def test_the_loss_is_that_of_the_elements_that_count(schedule: NoiseSchedule, mask: Tensor) -> None:
    results = []
    for cut in (False, True):
        policy, reference = Pointwise(0.3), Pointwise(0.2)
        forward = PairForward(SIPOLoss(schedule, beta=20.0), predict, reference, Accelerator(cpu=True), offload=False)
        pairs = batch(schedule, cut, mask, rest=1e3)  # NaN would come into the gradient through the network
        output, _ = forward(policy, pairs, [0, 1, 2], torch.empty(0), seed=0)
        output.loss.backward()
        results.append([output.loss, output.error_gap, output.model_error, policy.value.grad])  # type: ignore[attr-defined]
    for masked, whole in zip(*results, strict=True):
        torch.testing.assert_close(masked, whole, rtol=1e-6, atol=1e-8)
    assert results[0][3].abs() > 0


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("schedule", [FLOW, EPSILON], ids=["flow", "epsilon"])
def test_reference_errors_are_those_of_the_elements_that_count(schedule: NoiseSchedule, mask: Tensor) -> None:
    """And training with them starts where the policy is the reference."""
    network = Pointwise(0.3)
    pairs = batch(schedule, False, mask)
    errors, levels = _errors(pairs, network, predict, schedule, torch.no_grad)
    whole, of_whole = _errors(batch(schedule, True), network, predict, schedule, torch.no_grad)
    torch.testing.assert_close(errors, whole, rtol=1e-12, atol=0)
    assert torch.equal(levels, of_whole) and errors.shape == (3, 2)
    given = [item | {"ref_error": error} for item, error in zip(items(schedule, False, mask), errors, strict=True)]
    accelerator = Accelerator(cpu=True)
    forward = PairForward(SIPOLoss(schedule, beta=20.0), predict, None, accelerator, offload=False)
    forward.first = FirstStep(accelerator)
    output, _ = forward(network, PairBatch.of_items(collate(given)), [0, 1, 2], torch.empty(0), seed=0)
    assert output.logits.abs().max() < 1e-5  # type: ignore[attr-defined]
    found = forward.first.read()
    assert 0 <= found["start_difference"] < 1e-6 and found["start_logit"] < 1e-5


def test_the_first_step_looks_at_the_elements_that_count() -> None:
    first = FirstStep(Accelerator(cpu=True))
    policy, reference = Pointwise(0.3), Pointwise(0.3)
    forward = PairForward(SIPOLoss(FLOW, beta=20.0), predict, reference, first.accelerator, offload=False)
    forward.first = first
    forward(policy, batch(FLOW, False), [0, 1, 2], torch.empty(0), seed=0)
    assert first.read() == {"start_difference": 0.0, "start_logit": 0.0}


def test_rewards_are_those_of_the_elements_that_count() -> None:
    """A network that predicts x0 = c, and a reference that predicts 0: the gap is c² − 2c·mean(x0)."""

    class Masked(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            mask = torch.zeros(1, 1, 4)
            mask[0, 0, 1:3] = torch.tensor([1.0, 3.0])
            for name in ("chosen", "rejected"):
                item[name] = torch.where(mask == 0, math.nan, item[name])
            return item | {"error_mask": mask}

    class Constant(Pointwise):
        def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.value.expand_as(noisy)

    pairs, c = Masked(5), 0.3
    schedule = NoiseSchedule.discrete(prediction_type="sample")
    scores = score_pairs(Constant(c), Constant(0.0), schedule, pairs, predict, beta=30.0, draws=2)
    means = (0.25 * pairs.images[..., 1] + 0.75 * pairs.images[..., 2]).double().mean((2, 3))
    for found, mean in zip((scores.chosen, scores.rejected), means.unbind(1), strict=True):
        torch.testing.assert_close(found, -15.0 * (c * c - 2 * c * mean), rtol=1e-5, atol=1e-5)


def test_the_mean_over_what_counts() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    assert counted_mean(values[:1], None) == 1.5
    assert counted_mean(values, torch.tensor([[True, False]])) == 2.0
    assert counted_mean(values, torch.tensor([[1.0, 3.0], [4.0, 0.0]])) == pytest.approx(19 / 8)
    assert counted_mean(values, torch.zeros(1, 1)) == 0
