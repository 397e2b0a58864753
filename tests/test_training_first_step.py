"""At the first step the policy is its reference: the figures in the log, and what is said where it is not."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sipo import NoiseSchedule
from sipo.training import AdapterOff, TrainingMismatchError, TrainingWarning, train
from sipo.training.first_step import NAMES, FirstStep
from sipo.training.log_reader import read_metrics
from sipo.training.preparation import make_accelerator
from sipo.training.stream import pair_noise
from tests.training_cases import (
    Adapted,
    Pairs,
    PlainLoss,
    fit,
    loss,
    networks,
    predict,
    same,
    settings,
    without_adapter,
)

T500 = torch.full((8,), 500)


def scaled(policy: nn.Module, factor: float) -> Any:
    """Predictions that are larger by a factor."""
    with torch.no_grad():
        for parameter in policy.outward.parameters():  # type: ignore[union-attr]
            parameter.mul_(factor)
    return policy


class Drawn(Pairs):
    """Fixed draws, with the errors there of a network."""

    def __init__(self, network: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        schedule = NoiseSchedule.discrete()
        self.noise = pair_noise(self.images[:, 0], range(24), 3, torch.Generator())
        self.timesteps = torch.arange(24) * 40 + 20
        with torch.no_grad():
            noisy = [schedule.add_noise(self.images[:, side], self.noise, self.timesteps) for side in (0, 1)]
            found = [network(x, self.timesteps, torch.arange(24) % 3) for x in noisy]
        self.errors = torch.stack([(p - self.noise).double().square().mean((1, 2, 3)) for p in found], 1) * factor

    def __getitem__(self, index: int) -> dict[str, Any]:
        own = {"noise": self.noise[index], "level": self.timesteps[index], "ref_error": self.errors[index]}
        return super().__getitem__(index) | own


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if w.category is TrainingWarning]


# ---- The figures ----


@pytest.mark.parametrize("kind", ["copy", "adapter", "bf16", "errors"])
def test_the_first_line_says_that_they_are_one(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"progress": True, "max_train_steps": 3}
    if kind == "adapter":
        options |= {"policy": Adapted(networks()[0]), "reference": AdapterOff(without_adapter)}
    elif kind == "errors":
        options |= {"reference": None, "data": Drawn(networks()[0])}
    elif kind == "bf16":
        options["mixed_precision"] = "bf16"
    _, result = fit(tmp_path, **options)
    first, *others = read_metrics(tmp_path / "metrics.jsonl")
    assert first == result.history[0] and not any(name in line for line in others for name in NAMES)
    if kind == "errors":  # in batches of another size: the last bits of float32
        assert 0 <= first["start_difference"] < 1e-6 and 0 <= first["start_logit"] < 1e-3
    else:
        assert (first["start_difference"], first["start_logit"]) == (0.0, 0.0)
    assert not said(list(recwarn))
    shown = f"step 1: policy and reference differ by {first['start_difference']:.2g}, logits by"
    assert capsys.readouterr().err.count(shown) == 1


def test_the_figures_are_the_largest_of_all_passes(tmp_path: Path) -> None:
    """A policy whose predictions are 1.5 times the reference's differs from it by one half everywhere."""
    logits: list[Tensor] = []

    class Spy(type(loss())):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            logits.append(output.logits.detach().abs().max())
            return output

    for name, options in (
        ("whole", {"train_batch_size": 12}),
        ("split", {"train_batch_size": 3, "gradient_accumulation_steps": 4}),
    ):
        logits.clear()
        policy = scaled(networks()[0], 1.5)
        with pytest.warns(TrainingWarning, match="policy and reference differ before training"):
            loss_fn = Spy(NoiseSchedule.discrete(), beta=50.0, mask_threshold=0.0)
            _, result = fit(tmp_path / name, policy=policy, loss_fn=loss_fn, max_train_steps=1, **options)
        first = result.history[0]
        assert first["start_difference"] == pytest.approx(0.5, rel=1e-5)
        assert first["start_logit"] == pytest.approx(max(logits).item(), rel=1e-6) and first["start_logit"] > 1
        assert len(logits) == options.get("gradient_accumulation_steps", 1)


def test_of_errors_the_figure_is_what_the_predictions_differ_by_at_least(tmp_path: Path) -> None:
    network, _ = networks()
    for factor, found in ((1.0, 0.0), (4.0, None)):
        data = Drawn(network, factor)
        first = FirstStep(Accelerator(cpu=True))
        with torch.no_grad():
            noisy = NoiseSchedule.discrete().add_noise(data.images[:, 0], data.noise, data.timesteps)
            predicted = network(noisy, data.timesteps, torch.arange(24) % 3)
        first.add(predicted, data.errors[:, 0], data.noise, None, errors=True)
        size = predicted.square().mean((1, 2, 3)).sqrt()
        # Four times the error has twice the root: half of it is what is missing.
        expected = (data.errors[:, 0].sqrt() / 2 / size).max().item() if found is None else found
        assert first.read()["start_difference"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_resumed_run_has_moved_and_is_not_measured(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    fit(tmp_path, max_train_steps=2, checkpointing_steps=2)
    policy, result = fit(tmp_path, max_train_steps=4, checkpointing_steps=2, resume_from="latest", learning_rate=1e-2)
    assert [line["step"] for line in result.history] == [3, 4] and not same(policy, networks()[1])
    assert not any(name in line for line in result.history for name in NAMES) and not said(list(recwarn))


def test_a_loss_without_logits_has_none_in_the_log(tmp_path: Path) -> None:
    _, result = fit(tmp_path, loss_fn=PlainLoss(), max_train_steps=1)
    assert result.history[0]["start_difference"] == 0.0 and result.history[0]["start_logit"] is None


def with_logits(*values: float) -> Any:
    return SimpleNamespace(logits=torch.tensor(values))


def test_a_pair_that_is_not_finite_hides_no_other() -> None:
    prediction, reference, target = torch.ones(4, 3), torch.full((4, 3), 2.0), torch.zeros(2, 3)
    prediction[0, 0] = torch.nan
    reference[1, 2] = torch.inf
    first = FirstStep(Accelerator(cpu=True))
    for logits in ((math.nan, 3.0), (math.nan, math.inf), (-math.inf, -2.0)):  # of three passes
        first.add(prediction, reference, target, with_logits(*logits), errors=False)
    assert first.read() == {"start_difference": 0.5, "start_logit": 3.0}


def test_where_nothing_is_finite_it_is_said(tmp_path: Path) -> None:
    policy, reference = networks()
    with torch.no_grad():
        next(reference.parameters()).fill_(math.nan)
    with pytest.warns(TrainingWarning, match="step 1: policy and reference cannot be compared .* no sample is finite"):
        _, result = fit(tmp_path, policy=policy, reference=reference, max_train_steps=1)
    first = result.history[0]
    assert first["start_difference"] is None and first["start_logit"] is None


# ---- What is said ----


@pytest.mark.parametrize("kind", ["copy", "errors"])
def test_a_run_from_the_same_weights_stops_before_anything_moves(tmp_path: Path, kind: str) -> None:
    policy, reference = networks()
    data: Any = Drawn(reference) if kind == "errors" else Pairs()
    scaled(policy, 1.05)
    before = copy.deepcopy(policy)
    arguments = (policy, None if kind == "errors" else reference, loss(), data, predict)
    cpu = Accelerator(cpu=True)
    with pytest.raises(
        TrainingMismatchError, match=r"^step 1: policy and reference differ before training: "
    ) as caught:
        train(*arguments, settings(tmp_path, checkpointing_steps=1), accelerator=cpu, mismatch="raise")
    message = str(caught.value)
    assert "\n" not in message and message.endswith("; alarms='off' trains anyway")
    assert ("errors of other weights or draws" in message) == (kind == "errors")
    assert same(policy, before) and read_metrics(tmp_path / "metrics.jsonl") == []
    assert not (tmp_path / "checkpoints").exists()
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        train(*arguments, settings(tmp_path, alarms="off", max_train_steps=1), accelerator=cpu, mismatch="raise")
    assert not said(recorded)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["start_difference"] > 1e-3


def test_dropout_is_warned_about_and_trained_with(tmp_path: Path) -> None:
    with pytest.warns(TrainingWarning, match="step 1: policy and reference differ .*dropout") as caught:
        _, result = fit(tmp_path, dropout=0.3, max_train_steps=2)
    assert len(said(list(caught))) == 1 and len(result.history) == 2
    assert result.history[0]["start_difference"] > 0.1


@pytest.mark.parametrize(
    ("precision", "dtype", "difference", "beyond"),
    [
        ("no", torch.float32, 1e-6, False),
        ("no", torch.float32, 1e-3, True),
        ("bf16", torch.float32, 1e-2, False),  # a network whose last operator gives float32, under autocast
        ("bf16", torch.bfloat16, 1e-2, False),
        ("bf16", torch.bfloat16, 0.1, True),
        ("no", torch.float16, 1e-3, False),
        ("no", torch.float16, 1e-2, True),
    ],
)
def test_what_rounding_explains_follows_from_the_types(
    precision: str, dtype: torch.dtype, difference: float, beyond: bool
) -> None:
    first, same_pass = FirstStep(Accelerator(cpu=True, mixed_precision=precision)), torch.ones(2, 8, dtype=dtype)
    first.add(same_pass, same_pass, torch.zeros(1, 8), None, errors=False)
    found = first.read() | {"start_difference": difference}
    assert first.judge(found)[0] is beyond
    errors = torch.ones(2, dtype=torch.float64)
    first.limit = 0.0
    first.add(same_pass, errors, torch.zeros(1, 8), None, errors=True)
    assert first.judge(found | {"start_difference": difference / 4})[0] is beyond


def test_logits_that_rounding_moves_are_warned_about(tmp_path: Path) -> None:
    # bfloat16 for the copy alone: explained, and still a logit that means nothing.
    policy, reference = networks()
    reference.to(torch.bfloat16)

    def cast(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        dtype = next(module.parameters()).dtype
        return module(noisy.to(dtype), timesteps.to(dtype), condition["class"])

    for beta, warned in ((5000.0, True), (0.1, False)):
        with warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            arguments = (copy.deepcopy(policy), reference, loss(beta=beta), Pairs(), cast)
            folder = tmp_path / str(beta)
            result = train(
                *arguments, settings(folder, max_train_steps=1), accelerator=Accelerator(cpu=True), mismatch="raise"
            )
        first = result.history[0]
        assert 1e-4 < first["start_difference"] < 0.03 and (first["start_logit"] > 0.1) is warned
        assert [text.startswith("step 1: policy and reference round differently") for text in said(recorded)] == (
            [True] if warned else []
        )


def test_wrong_reference_errors_are_warned_about_by_their_logits() -> None:
    """In bfloat16 a difference below that of rounding is a logit of several at a large beta."""
    torch.manual_seed(0)
    prediction = torch.randn(8, 4, 32, 32).bfloat16()
    target = prediction.float() + 0.3 * torch.randn(prediction.shape)
    right = (prediction.float() - target).square().mean((1, 2, 3))
    for factor, logit, warned in ((1.0, 1e-3, False), (1.03, 5.0, True)):
        errors = right.clone()
        errors[:4] *= factor  # the chosen samples'
        output = loss(method="diffusion_dpo", beta=5000.0)(prediction, None, target, T500, ref_error=errors)
        first = FirstStep(Accelerator(cpu=True))
        first.add(prediction, errors, target, output, errors=True)
        found = first.read()
        beyond, message = first.judge(found)
        assert not beyond and (found["start_logit"] > logit) is warned
        assert (message is not None) is warned
        if message is not None:
            assert "the errors imply that predictions differ by at least 0.004" in message and "logit is 6." in message
            assert "errors of other weights or draws" in message


# ---- Types that accelerate decides about ----


def test_float16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    # accelerate takes it and computes in float32.
    message = r"training.mixed_precision='fp16': expected 'bf16' or 'no' on a CPU"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, mixed_precision="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=message):
            make_accelerator(settings(tmp_path, mixed_precision="fp16"))
