"""Validation: what it measures, and that training does not notice."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sipo import NoiseSchedule
from sipo.seeds import RandomStream, derive_seed
from sipo.training import TrainingInterruptedError, storage
from sipo.training.forward import PairForward
from sipo.training.log_reader import read_metrics, step_mean
from sipo.training.stream import pair_noise, step_levels
from sipo.training.validation import Validation
from sipo_kernels import METRICS
from tests.training_cases import Pairs, Signalled, fit, loss, networks, predict, same, settings, untimed

# ---------------------------------------------------------------- validation


def test_validation_leaves_training_as_it_was(tmp_path: Path) -> None:
    looks: list[tuple[int, bool, float]] = []

    def look(step: int, policy: nn.Module) -> None:
        assert not torch.is_grad_enabled()
        looks.append((step, policy.training, torch.rand(()).item()))
        random.random()
        np.random.rand()

    options: dict[str, Any] = {"max_train_steps": 7, "dropout": 0.3}
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
        policy, other = fit(tmp_path / name, data=Pairs(augment=True), validation_steps=3, **options, **more)
        assert same(plain, policy) and policy.training
        assert untimed(one.history) == untimed(other.history)
        if "on_validation" in more:
            assert [(step, training) for step, training, _ in looks] == [(3, False), (6, False), (7, False)]
        lines = read_metrics(tmp_path / name / "metrics.jsonl", "validation")
        assert lines == other.validation and len(lines) == (3 if "validation" in more else 0)
        assert read_metrics(tmp_path / name / "metrics.jsonl") == other.history
        assert step_mean(other.history, "loss") == step_mean(one.history, "loss")


class _LookError(Exception):
    pass


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("at", [4, 6])
def test_a_look_that_fails_costs_nothing_and_is_made_up_for(tmp_path: Path, at: int, pairs: bool) -> None:
    fails, looks = True, []

    def look(step: int, policy: nn.Module) -> None:
        if fails and step == at:
            raise _LookError
        looks.append(step)

    options: dict[str, Any] = {
        "max_train_steps": 6,
        "validation_steps": 2,
        "checkpointing_steps": 2,
        "on_validation": look,
    }
    if pairs:
        options["validation"] = Pairs(4)
    with pytest.raises(_LookError):
        fit(tmp_path, **options)
    assert [path.name for path in storage.list_checkpoints(tmp_path / "checkpoints")][-1] == f"step-{at:08d}"
    fails = False
    resumed, result = fit(tmp_path, resume_from="latest", **options)
    assert looks == [2, 4, 6]
    assert [line["step"] for line in result.validation] == ([step for step in (2, 4, 6) if step >= at] if pairs else [])
    straight, _ = fit(tmp_path / "straight", **options)
    assert same(straight, resumed)
    whole = untimed(lines_of(tmp_path))
    assert whole == untimed(lines_of(tmp_path / "straight"))
    assert [line["step"] for line in whole if line.get("kind") == ("validation" if pairs else "hook")] == [2, 4, 6]
    fit(tmp_path, resume_from="latest", **options)  # of a finished run: all that was due has been done
    assert looks == [2, 4, 6, 2, 4, 6] and untimed(lines_of(tmp_path)) == whole


def test_a_stop_saves_first_and_leaves_the_validation_to_the_resumed_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_train_steps": 5, "validation_steps": 2, "validation": Pairs(4)}
    with pytest.raises(TrainingInterruptedError, match="after step 2"):
        fit(tmp_path, data=Signalled(7), **options)  # in the second step of 4 pairs
    assert [line.get("kind") for line in lines_of(tmp_path)] == [None, None]
    resumed, _ = fit(tmp_path, resume_from="latest", **options)
    straight, _ = fit(tmp_path / "straight", **options)
    assert same(straight, resumed)
    assert untimed(lines_of(tmp_path)) == untimed(lines_of(tmp_path / "straight"))


def test_a_signal_in_a_validation_stops_after_it(tmp_path: Path) -> None:
    def look(step: int, policy: nn.Module) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(TrainingInterruptedError, match="stopped by SIGUSR1 after step 2"):
        fit(tmp_path, max_train_steps=6, validation_steps=2, validation=Pairs(4), on_validation=look)
    assert not storage.damage(tmp_path / "checkpoints/step-00000002")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl", "validation")] == [2]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_validation_is_the_loss_of_every_pair_once(tmp_path: Path) -> None:
    policy, reference = networks()
    held_out = Pairs(10)
    # A learning rate of next to nothing: the policy is the one before, told apart from the reference by hand.
    with torch.no_grad():
        policy.outward.weight += 0.1
    trained, result = fit(
        tmp_path, policy=policy, validation=held_out, max_train_steps=2, validation_steps=1, learning_rate=1e-12
    )
    one, two = result.validation
    assert untimed([one | {"step": 0}]) == untimed([two | {"step": 0}])  # the same draws
    assert held_out.seen == 2 * list(range(10))  # batches of 4, 4 and 2

    schedule = NoiseSchedule.discrete()
    timesteps = step_levels(schedule, 10, 0, derive_seed(0, RandomStream.VALIDATION, 0), "uniform")
    items = [held_out[i] for i in range(10)]
    samples = torch.stack([item[name] for name in ("chosen", "rejected") for item in items])
    noise = pair_noise(samples[:10], range(10), derive_seed(0, RandomStream.VALIDATION, 1), torch.Generator())
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
    assert 0 < two["validation/rewards/accuracies"] < 1


# ---------------------------------------------------------------- pairs that are not finite


class Spoilt(Pairs):
    """Held-out pairs of which some are NaN."""

    def __init__(self, count: int, spoilt: tuple[int, ...], draws: int = 1) -> None:
        super().__init__(count)
        self.images[list(spoilt), 0] = math.nan
        self.draws = draws


def validation_of(data: Any, loss_fn: Any, accelerator: Any = None, batch_size: int = 4) -> Validation:
    accelerator = Accelerator(cpu=True) if accelerator is None else accelerator
    forward = PairForward(loss_fn, predict, networks()[1], accelerator, offload=False)
    return Validation(data, None, forward, settings(Path("unused"), train_batch_size=batch_size), accelerator)


def moved() -> nn.Module:
    """A policy that is not the reference."""
    policy, _ = networks()
    with torch.no_grad():
        policy.outward.weight += 0.1
    return policy


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_pairs_that_are_not_finite_are_left_out_and_the_others_count_alike(nonfinite: str) -> None:
    """Batches of 4, 4 and 2 pairs, with 1, 4 and 0 finite ones: as one batch of all ten."""
    spoilt = (0, 1, 3)
    options: dict[str, Any] = {"method": "sipo", "mask_threshold": 0.8}
    whole = validation_of(Spoilt(10, spoilt), loss(nonfinite="skip", **options), batch_size=10)(moved(), 1)
    assert whole["nonfinite_pairs"] == 3 and whole["pairs"] == 7 and 0 < whole["active_fraction"] < 0.7
    for size in (4, 1):
        parts = validation_of(Spoilt(10, spoilt), loss(nonfinite=nonfinite, **options), batch_size=size)(moved(), 1)
        assert parts == pytest.approx(whole, rel=1e-6), size


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_a_validation_without_a_finite_pair_claims_nothing(nonfinite: str) -> None:
    found = validation_of(Spoilt(5, (0, 1, 2, 3, 4)), loss(nonfinite=nonfinite))(moved(), 1)
    assert found.pop("nonfinite_pairs") == 5 and found.pop("pairs") == 0
    assert all(math.isnan(value) for value in found.values()) and "loss" in found


def test_pairs_that_are_not_finite_can_still_raise() -> None:
    with pytest.raises(FloatingPointError):
        validation_of(Spoilt(5, (3,)), loss(nonfinite="raise"))(moved(), 1)


class Own(NamedTuple):
    loss: torch.Tensor

    def metrics(self) -> dict[str, torch.Tensor]:
        return {"loss": self.loss.detach()}


class OwnLoss:
    """A loss of one's own, which knows nothing of pairs that are left out."""

    schedule = NoiseSchedule.discrete()

    def __call__(self, model_pred: Any, ref_pred: Any, target: Any, timesteps: Any) -> Own:
        return Own((model_pred - ref_pred).square().mean() + 0 * model_pred.sum())


def test_a_batch_that_a_loss_cannot_measure_does_not_blank_the_line() -> None:
    found = validation_of(Spoilt(10, (5,)), OwnLoss())(moved(), 1)
    assert found["loss"] > 0 and found.keys() == {"loss", "pairs"}
    one, two = (validation_of(Spoilt(10, spoilt), OwnLoss())(moved(), 1)["loss"] for spoilt in (range(4, 10), range(8)))
    assert found["loss"] == pytest.approx((4 * one + 2 * two) / 6, rel=1e-6)


class OneOfTwo:
    """An accelerator's part of one process of two; sums are added up by hand."""

    def __init__(self, rank: int, sums: list[torch.Tensor]) -> None:
        self.inner, self.process_index, self.num_processes = Accelerator(cpu=True), rank, 2
        self.sums = sums

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        self.sums.append(tensor)
        return sum(self.sums[:2]) if len(self.sums) > 1 else tensor


def test_processes_with_different_numbers_of_finite_pairs_count_them_alike() -> None:
    spoilt, found, sums = (0, 1, 2, 9), {}, []
    for rank in (0, 1):
        found = validation_of(Spoilt(10, spoilt), loss(nonfinite="skip"), OneOfTwo(rank, sums))(moved(), 1)
    alone = validation_of(Spoilt(10, spoilt), loss(nonfinite="skip"))(moved(), 1)
    assert found == pytest.approx(alone, rel=1e-9) and alone["pairs"] == 6


# ---------------------------------------------------------------- what it is compared with


@pytest.mark.parametrize("method", ["diffusion_dpo", "dpo_cm", "sipo", "sdpo"])
@pytest.mark.parametrize(
    "relative",
    [
        {},
        {"label_smoothing": 0.2},
        {"loss_type": "ipo"},
        {"loss_type": "hinge"},
        {"loss_type": "dmpo", "label_smoothing": 0.1},
    ],
    ids=lambda relative: relative.get("loss_type", "sigmoid"),
)
def test_the_loss_of_no_preference_is_that_of_the_reference_itself(method: str, relative: dict[str, Any]) -> None:
    loss_fn = loss(method=method, mask_threshold=0.8, **relative)
    policy, _ = networks()  # equal to the reference: every logit is 0
    found = validation_of(Pairs(10), loss_fn)(policy, 1)
    assert found["no_preference_loss"] == pytest.approx(found["loss"], rel=1e-6) and found["loss"] > 0
    each = {"sigmoid": math.log(2), "ipo": 0.25, "hinge": 1.0, "dmpo": -math.log(2 * math.sqrt(0.1 * 0.9))}
    value = each[relative.get("loss_type", "sigmoid")] * found["active_fraction"]
    if method == "dpo_cm":  # weights between 0.9 and 1
        assert 0.9 * value <= found["loss"] < value
    else:
        assert found["loss"] == pytest.approx(value, rel=1e-6)
    assert (found["active_fraction"] < 1) == (method != "diffusion_dpo")
    other = validation_of(Pairs(10), loss_fn)(moved(), 1)
    assert other["loss"] != pytest.approx(other["no_preference_loss"], rel=1e-3)


def test_a_sum_over_pairs_is_validated_as_a_mean_and_draws_of_a_pair_are_one_pair() -> None:
    mean, total = (validation_of(Pairs(10), loss(reduction=name))(moved(), 1) for name in ("mean", "sum"))
    assert mean == total and mean["pairs"] == 10
    assert validation_of(Spoilt(10, (), draws=5), loss())(moved(), 1)["pairs"] == 2


def test_the_log_of_training_counts_finite_pairs_alike_too(tmp_path: Path) -> None:
    """One pass of four pairs, or four passes of one: a pass without a finite pair is not one with an accuracy of 0."""
    logs = []
    for size in (4, 2, 1):
        options: dict[str, Any] = {
            "train_batch_size": size,
            "gradient_accumulation_steps": 4 // size,
            "max_train_steps": 1,
            "alarms": "off",
        }
        loss_fn = loss(nonfinite="skip", mask_threshold=0.8)
        _, result = fit(tmp_path / str(size), policy=moved(), data=Spoilt(4, (1, 3)), loss_fn=loss_fn, **options)
        logs.append(result.history[0])
    for line in logs[1:]:
        for name in METRICS:
            assert line[name] == pytest.approx(logs[0][name], rel=1e-5), name
    assert logs[0]["nonfinite_pairs"] == 2 and logs[0]["model_mse"] > 0
