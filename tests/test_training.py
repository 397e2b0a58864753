"""The training loop: what it computes, how it stops, what it says and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sipo import NoiseSchedule, SIPOLoss
from sipo.training import TrainingConfig, TrainingDivergedError, TrainingWarning, optimization
from sipo.training.log_reader import read_metrics, step_mean
from sipo.training.measurements import MetricWindow
from sipo.training.stream import StreamSampler, pair_noise, step_levels
from tests.training_cases import Broken, Pairs, PlainLoss, events_in, fit, loss, networks, same, settings

LN2 = math.log(2.0)


# ---------------------------------------------------------------- what a run computes


def test_first_step_is_ln_2_times_the_active_share(tmp_path: Path) -> None:
    # Random weights against a mask in the middle of their ratios: some pairs active, some not.
    _, result = fit(tmp_path, loss_fn=loss(mask_threshold=0.9), train_batch_size=24, max_train_steps=1)
    first = result.history[0]
    assert 0 < first["active_fraction"] < 1
    assert first["loss"] == pytest.approx(first["active_fraction"] * LN2, rel=1e-6)
    assert (first["rewards/margins"], first["rewards/accuracies"], first["chosen_gap"]) == (0.0, 0.5, 0.0)
    assert first["grad_norm"] > 1e-3


def test_training_prefers_the_chosen_and_leaves_the_reference_alone(tmp_path: Path) -> None:
    policy, reference = networks()
    untouched = copy.deepcopy(reference)
    options = {"max_train_steps": 60, "train_batch_size": 8, "logging_steps": 20}
    _, result = fit(tmp_path, policy=policy, reference=reference, **options)
    assert same(reference, untouched) and not reference.training
    assert [line["step"] for line in result.history] == [1, 20, 40, 60]
    assert result.history[-1]["loss"] < 0.8 * LN2
    assert result.history[-1]["rewards/accuracies"] > 0.7
    assert read_metrics(result.metrics_path) == result.history


def test_one_step_is_that_of_plain_autograd(tmp_path: Path) -> None:
    policy, result = fit(tmp_path, max_train_steps=1, train_batch_size=5, max_grad_norm=None)
    by_hand, reference = networks()
    data, schedule, seed = Pairs(), NoiseSchedule.discrete(), 0
    rows = next(iter(StreamSampler(len(data), 5, seed, 0, 1)))
    items = [data[i] for i in rows]
    samples = torch.stack([item[name] for name in ("chosen", "rejected") for item in items])
    classes = torch.stack([item["condition"]["class"] for item in items]).repeat(2)
    noise = pair_noise(samples[:5], range(5), seed, torch.Generator()).repeat(2, 1, 1, 1)
    timesteps = step_levels(schedule, 5, 0, seed, "uniform").repeat(2)
    noisy = schedule.add_noise(samples, noise, timesteps)
    out = loss()(by_hand(noisy, timesteps, classes), reference(noisy, timesteps, classes).detach(), noise, timesteps)
    out.loss.backward()
    norm = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm()
    assert result.history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=1e-2).step()
    for got, expected in zip(policy.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_accumulation_is_one_large_step(tmp_path: Path) -> None:
    whole_data, split_data = Pairs(), Pairs()
    # Plain descent: AdamW's first steps would blow rounding up wherever a gradient is near 0.
    runs = []
    for name, data, batch, accumulation in (("whole", whole_data, 8, 1), ("split", split_data, 4, 2)):
        policy, _ = networks()
        options = {"max_train_steps": 5, "train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        _, result = fit(tmp_path / name, policy=policy, data=data, optimizer=optimizer, **options)
        runs.append((policy, result.history))
    assert whole_data.seen == split_data.seen and len(whole_data.seen) == 40
    (whole, whole_lines), (split, split_lines) = runs
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(whole_lines, split_lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    policy, before = networks()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    _, result = fit(tmp_path, policy=policy, optimizer=optimizer, max_train_steps=1, max_grad_norm=0.25)
    assert result.history[0]["grad_norm"] > 0.25
    moved = [a - b for a, b in zip(policy.parameters(), before.parameters(), strict=True)]
    assert torch.stack([m.norm() for m in moved]).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_the_learning_rate_warms_up(tmp_path: Path) -> None:
    _, result = fit(
        tmp_path, max_train_steps=5, lr_scheduler="constant_with_warmup", lr_warmup_steps=4, learning_rate=8e-3
    )
    assert [line["learning_rate"] for line in result.history] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 8e-3])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pairs_share_noise_timestep_and_where_they_may_the_target(tmp_path: Path, prediction: str) -> None:
    calls: list[tuple[Tensor, ...]] = []

    class Spy(SIPOLoss):
        def forward(self, model_pred: Tensor, ref_pred: Tensor, target: Tensor, timesteps: Tensor) -> Any:  # type: ignore[override]
            calls.append((model_pred, target, timesteps))
            return super().forward(model_pred, ref_pred, target, timesteps)

    schedule = NoiseSchedule.discrete(prediction_type=prediction)
    data = Pairs()
    fit(tmp_path, loss_fn=Spy(schedule, beta=1.0), data=data, max_train_steps=1)
    model_pred, target, timesteps = calls[0]
    assert model_pred.shape == (8, 1, 4, 4)
    assert torch.equal(timesteps[:4], timesteps[4:])
    noise = pair_noise(torch.zeros(4, 1, 4, 4), range(4), 0, torch.Generator())
    if prediction == "epsilon":
        assert torch.equal(target, noise)
    else:
        images = torch.cat([data.images[data.seen, 0], data.images[data.seen, 1]])
        torch.testing.assert_close(target, schedule.target(images, noise.repeat(2, 1, 1, 1), timesteps))


def test_bf16_starts_at_ln_2_and_hands_the_policy_back_as_it_was(tmp_path: Path) -> None:
    given: list[torch.dtype] = []

    class Spy(SIPOLoss):
        def forward(self, model_pred: Tensor, ref_pred: Tensor, target: Tensor, timesteps: Tensor) -> Any:  # type: ignore[override]
            given.extend([model_pred.dtype, ref_pred.dtype])
            return super().forward(model_pred, ref_pred, target, timesteps)

    loss_fn = Spy(NoiseSchedule.discrete(), beta=50.0, mask_threshold=0.0)
    policy, result = fit(tmp_path, loss_fn=loss_fn, mixed_precision="bf16", max_train_steps=2)
    assert result.history[0]["loss"] == pytest.approx(LN2, rel=1e-6)
    assert result.history[1]["loss"] != result.history[0]["loss"]
    # No copy in float32 stands between the network and the loss.
    assert given == [torch.bfloat16] * 4
    assert "forward" not in policy.__dict__ and policy.outward.weight.dtype == torch.float32
    out = policy(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert out.dtype == torch.float32


def test_the_host_reads_nothing_between_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "ASKED", ())  # as on a GPU

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []
    for steps in (4, 24):
        with Reads() as reads:
            torch.ones(()).item()
            assert reads.count == 1  # the mode does see reads
            _, result = fit(tmp_path / str(steps), loss_fn=PlainLoss(), max_train_steps=steps, logging_steps=100)
        counts.append(reads.count)
        assert [line["step"] for line in result.history] == [1, steps]
    assert counts[0] == counts[1]
    # A protocol met by hand trains as well: this loss is an ordinary regression.
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]


# ---------------------------------------------------------------- steps that break


@pytest.mark.parametrize(("log_every", "stops_at"), [(1, 3), (2, 4)])
def test_a_run_of_broken_steps_ends_it_and_leaves_the_weights(tmp_path: Path, log_every: int, stops_at: int) -> None:
    policy, _ = networks()
    before = copy.deepcopy(policy)
    with pytest.raises(TrainingDivergedError, match=rf"^step {stops_at}: {stops_at} optimiser steps in a row .*=3; "):
        fit(
            tmp_path,
            policy=policy,
            data=Broken(),
            max_train_steps=50,
            logging_steps=log_every,
            max_nonfinite_steps=3,
            adam_weight_decay=0.0,
        )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["step"] == stops_at
    assert sum(line["nonfinite_steps"] for line in lines) == stops_at
    assert lines[-1]["loss"] is None and lines[-1]["grad_norm"] is None
    assert same(policy, before)


@pytest.mark.parametrize("asked", [(), ("cpu",)], ids=["on the device", "asked"])
def test_a_broken_step_moves_nothing_and_training_goes_on(
    tmp_path: Path, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "ASKED", asked)
    policy, _ = networks()
    # Without momentum a step without gradient is no step at all: steps 2 and 5 never happened.
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    options = {"max_train_steps": 6, "logging_steps": 3, "max_nonfinite_steps": 2}
    _, result = fit(tmp_path, policy=policy, data=Broken((2, 5)), optimizer=optimizer, **options)
    assert [line["nonfinite_steps"] for line in result.history] == [0, 1, 1]
    assert all(math.isfinite(line["loss"]) for line in result.history)
    assert all(p.isfinite().all() for p in policy.parameters())
    assert not same(policy, networks()[0])


def test_rows_of_broken_steps_are_counted_across_log_lines() -> None:
    window = MetricWindow(torch.device("cpu"))
    accelerator = Accelerator(cpu=True)
    rows = []
    for chunk in ([1.0, math.nan], [math.nan, math.inf, 2.0], [4.0]):
        for norm in chunk:
            window.add({"loss": torch.tensor(norm)})
            window.add_step(torch.tensor(norm))
        metrics, row, extra = window.read(accelerator, torch.tensor([float(len(chunk)), 0.5]))
        assert extra == [len(chunk), 0.5]
        rows.append((row, metrics["nonfinite_steps"], metrics["grad_norm"], metrics["loss"]))
    assert rows == [(1, 1, 1.0, 1.0), (3, 2, 2.0, 2.0), (0, 0, 4.0, 4.0)]


# ---------------------------------------------------------------- what it says


def test_few_active_pairs_are_warned_about_once(tmp_path: Path) -> None:
    # A posterior ratio is below 1 wherever there is an error, so a threshold of 1 masks every pair.
    with pytest.warns(TrainingWarning, match="step 3: stalled: active_fraction 0.000 has stayed under 0.1") as caught:
        _, result = fit(tmp_path, loss_fn=loss(mask_threshold=1.0), max_train_steps=8)
    assert len([w for w in caught if w.category is TrainingWarning]) == 1
    assert [line["loss"] for line in result.history] == [0.0] * 8


def test_tensorboard_and_standard_error_have_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    _, result = fit(tmp_path, max_train_steps=3, report_to="tensorboard", progress=True)
    events = events_in(tmp_path)
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in result.history]
    said = capfd.readouterr().err
    last = result.history[-1]
    assert f"step 3/3, loss {last['loss']:.3f}, accuracy {last['rewards/accuracies']:.3f}, active 1.000," in said


def test_means_over_a_run_weigh_lines_by_their_steps() -> None:
    history = [{"step": 1, "x": 5.0}, {"step": 10, "x": 1.0}, {"step": 12, "x": None}]
    assert step_mean(history, "x") == pytest.approx((5.0 + 9 * 1.0) / 10)


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps=0: expected at least 1"),
        ({"train_batch_size": 2.5}, "train_batch_size=2.5: expected an integer"),
        ({"seed": -1}, "seed=-1: expected at least 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan: expected a finite number > 0"),
        ({"adam_weight_decay": -1}, "adam_weight_decay=-1: expected a finite number >= 0"),
        ({"max_grad_norm": 0}, "max_grad_norm=0: expected a finite number > 0"),
        ({"max_grad_norm": "1"}, "max_grad_norm='1': expected a number or None"),
        ({"ema_decay": 1.0}, "ema_decay=1.0: expected a number >= 0 and < 1"),
        ({"adam_beta1": 1.5}, "adam_beta1=1.5: expected a number >= 0 and < 1"),
        ({"adam_beta2": "0.9"}, "adam_beta2='0.9': expected a number"),
        ({"adam_epsilon": 0.0}, "adam_epsilon=0.0: expected a finite number > 0"),
        ({"proportion_empty_prompts": -0.1}, "proportion_empty_prompts=-0.1: expected a number >= 0 and < 1"),
        ({"optimizer": "sgd"}, "optimizer='sgd': expected one of adamw, adamw8bit, paged_adamw8bit"),
        (
            {"lr_scheduler": "step"},
            "lr_scheduler='step': expected one of constant, constant_with_warmup, cosine, linear",
        ),
        (
            {"lr_warmup_steps": 2},
            "lr_warmup_steps=2: expected 0 with lr_scheduler='constant', .*'constant_with_warmup' has one",
        ),
        ({"timestep_sampling": "some"}, "timestep_sampling='some': expected one of all, informative"),
        ({"report_to": True}, "report_to=True: expected a string or a list of strings"),
        ({"report_to": ["wandb", 1]}, r"report_to=\['wandb', 1\]: expected a string or a list of strings"),
        ({"ddp_timeout": 0}, "ddp_timeout=0: expected at least 1"),
        ({"ddp_timeout": 10**15}, "ddp_timeout=1000000000000000: expected at most 1000000000 seconds"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8': expected one of no, bf16, fp16"),
        ({"logging_steps": True}, "logging_steps=True: expected an integer"),
        ({"use_ema": "no"}, "use_ema='no': expected True or False"),
        ({"skip_inactive": 1}, "skip_inactive=1: expected True or False"),
        ({"timestep_distribution": None}, "timestep_distribution=None: expected a string"),
        ({"checkpoints_total_limit": -1}, "checkpoints_total_limit=-1: expected at least 0"),
    ],
)
def test_a_setting_out_of_range_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        settings(tmp_path, **options)
    with pytest.raises(TypeError, match=r"^output_dir=3: expected a string or a path$"):
        TrainingConfig(max_train_steps=1, output_dir=3)  # type: ignore[arg-type]


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    policy, frozen = networks()
    with pytest.raises(ValueError, match="policy and reference are one module"):
        fit(tmp_path, policy=policy, reference=policy)
    with pytest.raises(ValueError, match="the data set holds 0 pairs"):
        fit(tmp_path, data=Pairs(0))
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        fit(tmp_path, policy=frozen.requires_grad_(False))
    with pytest.raises(ValueError, match="validation_steps=2: expected pairs to validate on, or a hook"):
        fit(tmp_path, validation_steps=2)
    with pytest.raises(ValueError, match="the validation set holds 0 pairs"):
        fit(tmp_path, validation=Pairs(0))
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1: expected gradient_accumulation_steps=2"):
        fit(tmp_path, gradient_accumulation_steps=2, accelerator=Accelerator(cpu=True))


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_other_ways_to_share_the_work_are_refused(tmp_path: Path, kind: DistributedType) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = kind
    message = f"^distributed_type='{kind.value}': expected one device, plain data parallelism or FSDP2$"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, accelerator=accelerator)
