"""Validation: what it measures, and that training does not notice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sipo import NoiseSchedule
from sipo.training.data import pair_noise, step_timesteps
from sipo.training.logs import read_lines, step_mean
from sipo.training.randomness import VALIDATION, derive_seed
from tests.training_cases import Pairs, fit, fresh_accelerate, loss, networks, predict, same, untimed

__all__ = ["fresh_accelerate"]  # a fixture that every test here runs in


# ---------------------------------------------------------------- validation


def test_validation_leaves_training_as_it_was(tmp_path: Path) -> None:
    looks: list[tuple[int, bool, float]] = []

    def look(step: int, policy: nn.Module) -> None:
        assert not torch.is_grad_enabled()
        looks.append((step, policy.training, torch.rand(()).item()))
        random.random()
        np.random.rand()

    options: dict[str, Any] = {"steps": 7, "dropout": 0.3}
    plain, one = fit(tmp_path / "plain", data=Pairs(augment=True), **options)
    for name, more in (
        ("pairs", {"validation": Pairs(10, augment=True)}),
        ("both", {"validation": Pairs(10, augment=True), "on_validation": look}),
        ("hook", {"on_validation": look}),
    ):
        looks.clear()
        random.seed(1)
        np.random.seed(1)
        plain, one = fit(tmp_path / name / "without", data=Pairs(augment=True), **options)
        random.seed(1)
        np.random.seed(1)
        policy, other = fit(tmp_path / name, data=Pairs(augment=True), validate_every=3, **options, **more)
        assert same(plain, policy) and policy.training
        assert untimed(one.history) == untimed(other.history)
        if "on_validation" in more:
            assert [(step, training) for step, training, _ in looks] == [(3, False), (6, False), (7, False)]
        lines = read_lines(tmp_path / name / "metrics.jsonl", "validation")
        assert lines == other.validation and len(lines) == (3 if "validation" in more else 0)
        assert read_lines(tmp_path / name / "metrics.jsonl") == other.history
        assert step_mean(other.history, "loss") == step_mean(one.history, "loss")


def test_validation_is_the_loss_of_every_pair_once(tmp_path: Path) -> None:
    policy, reference = networks()
    held_out = Pairs(10)
    # A learning rate of next to nothing: the policy is the one before, told apart from the reference by hand.
    with torch.no_grad():
        policy.outward.weight += 0.1
    trained, result = fit(tmp_path, policy=policy, validation=held_out, steps=2, validate_every=1, learning_rate=1e-12)
    one, two = result.validation
    assert untimed([one | {"step": 0}]) == untimed([two | {"step": 0}])  # the same draws
    assert held_out.seen == 2 * list(range(10))  # batches of 4, 4 and 2

    schedule = NoiseSchedule.discrete()
    timesteps = step_timesteps(schedule, 10, 0, derive_seed(0, VALIDATION, 0), "uniform")
    items = [held_out[i] for i in range(10)]
    samples = torch.stack([item[half] for half in ("winner", "loser") for item in items])
    noise = pair_noise(samples[:10], range(10), derive_seed(0, VALIDATION, 1), torch.Generator())
    noisy = schedule.add_noise(samples, noise.repeat(2, 1, 1, 1), timesteps.repeat(2))
    condition = {"class": torch.stack([item["condition"]["class"] for item in items]).repeat(2)}
    with torch.no_grad():
        out = loss()(
            predict(trained, noisy, timesteps.repeat(2), condition),
            predict(reference, noisy, timesteps.repeat(2), condition),
            noise,
            timesteps.repeat(2),
        )
    for name, value in out.metrics().items():
        assert two[f"validation/{name}"] == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
    assert 0 < two["validation/implicit_acc"] < 1
