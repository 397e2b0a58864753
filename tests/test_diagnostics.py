"""Statistics by noise level against sums made by hand, and alarms on runs made to set them off."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sipo import NoiseSchedule, SIPOLoss, cli
from sipo.batch import level_argument
from sipo.demo.digits import InkPairs, load_digits
from sipo.training import (
    CheckpointError,
    TrainingAlarmError,
    TrainingConfig,
    TrainingInterruptedError,
    TrainingWarning,
    checkpoint,
    train,
)
from sipo.training.alarms import ALARM_LINES, COLLAPSE_GROWTH, COLLAPSE_SHARE, DRIFT, AlarmWatch, collapsing, drifted
from sipo.training.log_reader import read_metrics
from sipo.training.measurements import MetricWindow
from sipo.training.statistics import (
    BINS,
    MEANS,
    NoiseBins,
    TimestepStatistics,
    merge,
    over_bins,
    read_statistics,
    scalars,
)
from sipo_kernels import METHODS
from tests.training_cases import Broken, Pairs, PlainLoss, events_in, fit, loss, same, settings, untimed

CPU = torch.device("cpu")


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_statistics(folder / "timesteps.jsonl")


# ---------------------------------------------------------------- the numbers


def by_hand(loss_fn: SIPOLoss, model: Any, ref: Any, target: Any, scale: Any, grad: Any, pairs: int) -> dict[str, Any]:
    """Each statistic of each pair by docs/math.md §2-6 in float64, the gradient's square from autograd's."""
    elements, beta = model[0].size, float(loss_fn.options.beta or 0)
    model_error = np.square(model - target).reshape(2, pairs, -1).mean(-1)
    ref_error = np.square(ref - target).reshape(2, pairs, -1).mean(-1)
    gap = model_error - ref_error
    scale = scale.reshape(2, pairs)
    log_ratio = -np.where(np.isinf(scale), 0, scale) * (model_error if loss_fn.options.ratio == "posterior" else gap)
    ratio = np.where(np.isinf(scale), 0, np.exp(log_ratio))  # the terminal step
    low, high = 1 - loss_fn.options.clip_low, 1 + loss_fn.options.clip_high
    weight = np.clip(ratio, low, high)
    plain = loss_fn.options.method == "diffusion_dpo"
    mask = np.ones(pairs) if plain else (ratio.min(0) >= loss_fn.options.mask_threshold).astype(float)
    a = {"sipo": weight, "sdpo": np.stack([weight.min(0)] * 2)}.get(loss_fn.options.method, np.ones_like(weight))
    b = weight.min(0) if loss_fn.options.method == "dpo_cm" else np.ones(pairs)
    logits = -0.5 * beta * (a[0] * gap[0] - a[1] * gap[1])
    coef = a[0] * b * mask / (1 + np.exp(logits))
    upstream = 1 if loss_fn.options.reduction == "sum" else pairs
    return {
        "model_error_chosen": model_error[0],
        "model_error_rejected": model_error[1],
        "ref_error_chosen": ref_error[0],
        "ref_error_rejected": ref_error[1],
        "chosen_gap": gap[0],
        "rejected_gap": gap[1],
        "ratio": ratio.mean(0),
        "weight": weight.mean(0),
        "clipped": 0 * gap[0] if plain else ((ratio < low) | (ratio > high)).mean(0),
        "active": mask,
        "logits": logits,
        "logits_sq": logits**2,
        "accuracy": np.where(logits == 0, 0.5, logits > 0),
        "coef": coef,
        "coef_sq": coef**2,
        "grad_sq": np.square(grad).reshape(2, pairs, -1).sum((0, 2)) * (upstream / beta) ** 2 * elements,
    }


@hypothesis_settings(max_examples=40)
@given(
    method=st.sampled_from(METHODS),
    flow=st.booleans(),
    ratio=st.sampled_from(["posterior", "reference"]),
    reduction=st.sampled_from(["mean", "sum"]),
    passes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 1 << 30),
    broken=st.booleans(),
    by_kernel=st.booleans(),
)
def test_each_mean_is_that_of_float64_by_hand(
    method: str, flow: bool, ratio: str, reduction: str, passes: list[int], seed: int, broken: bool, by_kernel: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    schedule = NoiseSchedule.flow(shift=3.0) if flow else NoiseSchedule.discrete()
    loss_fn = SIPOLoss(schedule, method=method, beta=3.0, ratio=ratio, reduction=reduction, nonfinite="skip")
    statistics = TimestepStatistics.of(loss_fn, CPU)
    assert statistics is not None
    found: dict[int, list[dict[str, float]]] = {}
    left_out = [0] * BINS
    for pairs in passes:
        if flow:
            levels = torch.rand(pairs, generator=generator).clamp(min=1e-3)
            levels[0] = 1.0
            bins = [min(math.floor(float(np.float32(s) * np.float32(BINS))), BINS - 1) for s in levels.tolist()]
        else:
            levels = torch.randint(1000, (pairs,), generator=generator)
            levels[0] = 999
            bins = [t // 20 for t in levels.tolist()]
        shape = (2 * pairs, 2, 3, 5)
        target = torch.randn(shape, generator=generator, dtype=torch.float64)
        ref = target + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
        model = ref + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        model.requires_grad_(True)
        argument = level_argument(schedule, levels)
        output = loss_fn(model, ref, target, **argument)
        output.loss.backward()
        scale = schedule.ratio_scale(**argument).repeat(2).double().numpy()
        arrays = [x.detach().numpy() for x in (model, ref, target)]
        expected = by_hand(loss_fn, *arrays, scale, model.grad.numpy(), pairs)
        given = model.detach().clone()
        if broken:  # the last pair's rejected sample
            given[-1, 0, 0, 0] = math.inf if seed % 2 else math.nan
            left_out[bins[-1]] += 1
        if by_kernel:  # the loss adds to the sums by itself
            loss_fn(given, ref, target, **argument, totals=statistics.totals()._replace(pair_levels=levels))
        else:
            statistics.add(levels, loss_fn(given, ref, target, **argument), (pairs, 2, 3, 5))
        for i in range(pairs - broken):
            found.setdefault(bins[i], []).append({name: float(values[i]) for name, values in expected.items()})

    line = statistics.take(7, statistics.window.flatten().tolist())
    assert line is not None and statistics.window.abs().sum() == 0
    assert list(line) == ["step", "kind", "levels", "bins", "pairs", "count", "nonfinite", *MEANS]
    assert (line["step"], line["pairs"], line["bins"]) == (7, sum(passes), BINS)
    assert (line["kind"], line["levels"]) == (("flow", 1) if flow else ("discrete", 1000))
    assert line["nonfinite"] == left_out
    assert line["count"] == [len(found.get(i, [])) for i in range(BINS)]
    for name in MEANS:
        for i, value in enumerate(line[name]):
            if i not in found:
                assert value is None
            else:  # float32 sums of a few pairs, written with six digits
                of = [pair[name] for pair in found[i]]
                assert value == pytest.approx(np.mean(of), rel=5e-6, abs=1e-6 * max(map(abs, of))), name


def test_bins_are_of_equal_width_and_the_ends_are_in_them() -> None:
    discrete = NoiseBins.of(NoiseSchedule.discrete(), 50)
    assert discrete == ("discrete", 1000, 50)
    assert discrete is not None and discrete(torch.tensor([0, 19, 20, 999])).tolist() == [0, 0, 1, 49]
    flow = NoiseBins.of(NoiseSchedule.flow(), 50)
    assert flow is not None and flow(torch.tensor([1e-4, 0.02, 0.999, 1.0])).tolist() == [0, 1, 49, 49]
    few = NoiseBins.of(NoiseSchedule.discrete(num_train_timesteps=20, num_inference_steps=20), 50)
    assert few is not None and few(torch.arange(20)).tolist() == list(range(20))
    assert NoiseBins.of(PlainLoss.schedule, 50) is None


def test_passes_of_a_step_add_up_to_one_big_pass() -> None:
    loss_fn = loss(mask_threshold=0.9)
    generator = torch.Generator().manual_seed(4)
    target, noise, shift = torch.randn(3, 2, 12, 1, 4, 4, generator=generator)
    ref, levels = target + 0.3 * noise, torch.randint(1000, (12,), generator=generator)
    windows = []
    for size in (12, 6, 4):
        statistics = TimestepStatistics.of(loss_fn, CPU)
        assert statistics is not None
        for i in range(0, 12, size):
            of = [x[:, i : i + size].flatten(0, 1) for x in (ref + 0.1 * shift, ref, target)]
            statistics.add(levels[i : i + size], loss_fn(*of, levels[i : i + size]), (size, 1, 4, 4))
        windows.append(statistics.window)
    assert windows[0][2 + MEANS.index("grad_sq")].sum() > 0.01
    for window in windows[1:]:
        torch.testing.assert_close(window, windows[0], rtol=1e-5, atol=1e-6)


def test_the_methods_own_beta_is_taken_where_none_is_given_and_none_where_there_is_none() -> None:
    generator = torch.Generator().manual_seed(4)
    target, noise = torch.randn(2, 4, 1, 4, 4, generator=generator)
    found = []
    for loss_fn in (loss(beta=None), loss(beta=1000.0)):
        statistics = TimestepStatistics.of(loss_fn, CPU)
        assert statistics is not None
        output = loss_fn(target + noise, target + noise, target, torch.tensor([400, 800]))
        statistics.add(torch.tensor([400, 800]), output, (2, 1, 4, 4))
        found.append(statistics.window)
    assert torch.equal(*found)

    class Bare:
        schedule = loss().schedule

    bare = TimestepStatistics.of(Bare(), CPU)
    assert bare is not None
    bare.add(torch.tensor([400, 800]), output, (2, 1, 4, 4))
    row = 2 + MEANS.index("coef")
    torch.testing.assert_close(bare.window[row], 1000 * found[0][row])


def test_adding_a_pass_reads_nothing() -> None:
    # A meta tensor has no values: whatever asked for one would fail.
    statistics = TimestepStatistics.of(loss(), torch.device("meta"))
    assert statistics is not None
    numbers = torch.randn(4, 1, 4, 4)
    output = loss()(numbers, numbers, numbers, torch.tensor([5, 6]))
    values = {each.name: getattr(output, each.name) for each in dataclasses.fields(output)}
    there = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in values.items()}
    statistics.add(torch.tensor([5, 6], device="meta"), type(output)(**there), (2, 1, 4, 4))
    assert statistics.window.is_meta and statistics.window.shape == (2 + len(MEANS), BINS)


# ---------------------------------------------------------------- in a run


def test_a_run_writes_a_line_for_the_pairs_since_the_one_before(tmp_path: Path) -> None:
    _, result = fit(
        tmp_path, max_train_steps=12, logging_steps=5, gradient_accumulation_steps=2, loss_fn=loss(mask_threshold=0.9)
    )
    found = lines(tmp_path)
    assert [(line["step"], line["pairs"]) for line in found] == [(1, 8), (5, 32), (10, 40), (12, 16)]
    for line, logged in zip(found, result.history, strict=True):
        for name, of in {
            "chosen_gap": "chosen_gap",
            "rejected_gap": "rejected_gap",
            "rewards/margins": "logits",
            "rewards/accuracies": "accuracy",
            "weight_mean": "weight",
            "clip_fraction": "clipped",
            "active_fraction": "active",
        }.items():
            assert logged[name] == pytest.approx(over_bins(line, of), rel=1e-4, abs=1e-6), name
        errors = 0.5 * (over_bins(line, "model_error_chosen") + over_bins(line, "model_error_rejected"))
        assert logged["model_mse"] == pytest.approx(errors, rel=1e-4)
    whole = merge(found)
    assert (whole["step"], whole["pairs"], sum(whole["count"])) == (12, 96, 96)
    assert over_bins(whole, "coef") == pytest.approx(sum(over_bins(x, "coef") * x["pairs"] for x in found) / 96)


def test_broken_pairs_are_counted_where_they_are(tmp_path: Path) -> None:
    _, result = fit(tmp_path, data=Broken((2,)), max_train_steps=3, logging_steps=3)
    (first, rest) = lines(tmp_path)
    assert (sum(first["nonfinite"]), sum(rest["nonfinite"]), sum(rest["count"])) == (0, 4, 4)
    assert result.history[1]["nonfinite_pairs"] == 4
    assert all((x is None) == (c == 0) for name in MEANS for x, c in zip(rest[name], rest["count"], strict=True))


def test_without_statistics_nothing_is_written(tmp_path: Path) -> None:
    # A loss met by hand has no such numbers, a run may want none, and what another run left there is not its own.
    (tmp_path / "own").mkdir()
    (tmp_path / "own/timesteps.jsonl").write_text('{"step": 3}\n')
    fit(tmp_path / "own", loss_fn=PlainLoss())
    off, _ = fit(tmp_path / "off", timestep_statistics=False)
    assert not (tmp_path / "own/timesteps.jsonl").exists()
    assert (tmp_path / "own/timesteps.1.jsonl").read_text() == '{"step": 3}\n'
    assert not (tmp_path / "off/timesteps.jsonl").exists()
    on, _ = fit(tmp_path / "on")
    assert same(on, off) and len(lines(tmp_path / "on")) == 4


def test_statistics_that_are_turned_on_when_a_run_is_resumed_begin_there(tmp_path: Path) -> None:
    options: dict[str, Any] = {"logging_steps": 3, "loss_fn": loss(mask_threshold=1.0)}
    with pytest.warns(TrainingWarning, match="step 6: stalled"):
        straight, _ = fit(tmp_path / "straight", max_train_steps=8, **options)
    off = options | {"timestep_statistics": False, "checkpointing_steps": 5}
    with pytest.raises(KeyboardInterrupt):  # in the sixth step, between two lines
        fit(tmp_path / "run", max_train_steps=8, data=Pairs(fail_after=22), **off)
    with pytest.warns(TrainingWarning, match="step 6: stalled"):
        resumed, _ = fit(tmp_path / "run", max_train_steps=8, resume_from="latest", **options)
    assert same(straight, resumed)
    assert [(line["step"], line["pairs"]) for line in lines(tmp_path / "run")] == [(6, 4), (8, 8)]


def test_a_checkpoint_of_another_format_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one was before there were alarms of drift and collapse."""
    save = checkpoint.save_checkpoint

    def former(*args: Any, **given: Any) -> Path:
        return save(*args, **(given | {"progress": {"low_active_lines": 2, "skipped": 0}}))

    monkeypatch.setattr(checkpoint, "save_checkpoint", former)
    fit(tmp_path, max_train_steps=2, checkpointing_steps=2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"step-00000002: does not fit this run \(state.json: progress"):
        fit(tmp_path, max_train_steps=4, resume_from="latest")


def test_the_spread_of_gradient_norms_is_that_of_the_sample() -> None:
    window, accelerator = MetricWindow(CPU), Accelerator(cpu=True)
    norms = [300.0, math.nan, 300.01, 299.98, math.inf, 300.02]
    for _ in range(2):  # the second window starts again
        for norm in norms:
            window.add_step(torch.tensor(norm))
        metrics, _, _ = window.read(accelerator)
        of = np.array([np.float32(norm) for norm in norms if math.isfinite(norm)], dtype=np.float64)
        assert metrics["grad_norm"] == pytest.approx(of.mean(), rel=1e-6)
        assert metrics["grad_norm_std"] == pytest.approx(of.std(ddof=1), rel=0.05)  # of 300 ± 0.0000305 in float32
    window.add_step(torch.tensor(2.0))
    assert math.isnan(window.read(accelerator)[0]["grad_norm_std"])


def test_trackers_get_a_few_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fit(tmp_path, max_train_steps=3, train_batch_size=24, report_to="tensorboard")
    events = events_in(tmp_path)
    names = [name for name in events.Tags()["scalars"] if name.startswith("timesteps/")]
    parts = [f"{name}_{part}" for name in ("active", "grad_sq_share") for part in ("low", "middle", "high")]
    assert sorted(names) == sorted(f"timesteps/{name}" for name in parts)
    for name in parts:
        last = events.Scalars(f"timesteps/{name}")[-1]
        assert (last.step, last.value) == (3, pytest.approx(scalars(lines(tmp_path)[-1])[name], rel=1e-6))


# ---------------------------------------------------------------- reading


def made(step: int, count: list[int], **values: list[float | None]) -> dict[str, Any]:
    n = len(count)
    line: dict[str, Any] = {"step": step, "kind": "flow", "levels": 1, "bins": n, "pairs": sum(count), "count": count}
    line |= {name: values.get(name, [1.0 if c else None for c in count]) for name in MEANS}
    return line | {"nonfinite": [0] * n}


def test_merging_weighs_by_counts() -> None:
    first = made(5, [1, 0, 3], active=[1.0, None, 0.5])
    second = made(9, [3, 0, 0], active=[0.0, None, None]) | {"nonfinite": [0, 2, 0], "pairs": 5}
    both = merge([first, second])
    assert (both["step"], both["pairs"], both["count"], both["nonfinite"]) == (9, 9, [4, 0, 3], [0, 2, 0])
    assert both["active"] == [0.25, None, 0.5]
    assert merge([first]) == first
    assert over_bins(both, "active") == pytest.approx(2.5 / 7)
    assert over_bins(both, "active", range(1, 3)) == 0.5
    assert math.isnan(over_bins(both, "active", range(1, 2)))
    with pytest.raises(ValueError, match="0 lines: expected at least one to merge"):
        merge([])
    with pytest.raises(ValueError, match="bins=2 in a line: expected 3 as in the first"):
        merge([first, made(9, [1, 1])])


def test_scalars_share_the_gradient_out_by_tenths() -> None:
    line = made(1, [2] + [0] * 5 + [1] * 3 + [1], grad_sq=[3.0, *[None] * 5, 1.0, 0.5, 0.5, 2.0])
    found = scalars(line)
    assert [found[f"grad_sq_share_{part}"] for part in ("low", "middle", "high")] == pytest.approx([0.6, 0.2, 0.2])
    assert scalars(made(1, [0] * 9 + [1])) == {"active_high": 1.0, "grad_sq_share_high": 1.0}


# ---------------------------------------------------------------- alarms


def warned(watch: AlarmWatch, metrics: list[dict[str, float]]) -> list[tuple[int, str]]:
    return [(i, message.split(":")[0]) for i, line in enumerate(metrics) for message in watch.update(line)]


def test_each_episode_of_few_active_pairs_has_its_own_alarm() -> None:
    values = [0.05, 0.05, 0.5, 0.05, 0.05, 0.05, 0.05, math.nan, 0.2, 0.0, 0.0, 0.0]
    watch = AlarmWatch()
    assert warned(watch, [{"active_fraction": value} for value in values]) == [(5, "stalled"), (11, "stalled")]
    assert watch.lines == {"stalled": 3, "drift": 0, "collapse": 0}
    again = AlarmWatch()  # from a checkpoint after the second of three lines
    again.lines |= {"stalled": 2}
    assert warned(again, [{}, {"active_fraction": 0.01}]) == [(1, "stalled")]


def test_drift_and_collapse_need_three_lines_beyond_their_thresholds() -> None:
    far, near = {"model_mse": 0.41, "ref_mse": 0.1}, {"model_mse": 0.39, "ref_mse": 0.1}
    assert warned(AlarmWatch(), [far, far, near, far, far, far, far]) == [(5, "drift")]
    assert drifted(DRIFT * 0.1 + 1e-9, 0.1) and not drifted(DRIFT * 0.1, 0.1)
    gaps = {"chosen_gap": 0.06, "rejected_gap": 0.07, "ref_mse": 0.1}
    assert warned(AlarmWatch(), [gaps] * 5) == [(ALARM_LINES - 1, "collapse")]
    assert collapsing(0.06, -1.0, 0.1)  # worse at the chosen sample alone
    assert not collapsing(COLLAPSE_GROWTH * 0.1, 0.05, 0.1)  # too little to tell
    assert not collapsing(COLLAPSE_SHARE, 1.0, 0.1)  # enough of it is preference
    assert not collapsing(-0.5, 0.5, 0.1)


class Chance(InkPairs):
    """Every other pair of digits is the wrong way round: there is nothing to be learnt."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if index // 7 % 2:
            item["chosen"], item["rejected"] = item["rejected"], item["chosen"]
        return item


def align(folder: Path, data: type[InkPairs] = InkPairs, **options: Any) -> list[str]:
    """A short run of the demo's model; what it warned of."""
    from sipo.demo.model import load_base, predict

    base, scheduler = load_base()
    loss_fn = SIPOLoss(scheduler, **{name: options.pop(name) for name in ("method", "beta") if name in options})
    quiet: dict[str, Any] = {"train_batch_size": 16, "progress": False, "report_to": "none", "checkpointing_steps": 0}
    config = TrainingConfig(output_dir=folder, **(quiet | options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TrainingWarning)
        pairs = data(load_digits()[0], seed=0)
        train(copy.deepcopy(base), base, loss_fn, pairs, predict, config, accelerator=Accelerator(cpu=True))
    return [str(w.message) for w in caught if w.category is TrainingWarning]


def test_a_healthy_run_of_digits_sets_nothing_off(tmp_path: Path) -> None:
    assert align(tmp_path, max_train_steps=30, learning_rate=2e-5, logging_steps=3) == []
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["rewards/accuracies"] > 0.8 and last["rewards/margins"] > 1  # and it did learn


def test_a_learning_rate_that_breaks_the_digits_sets_off_every_alarm(tmp_path: Path) -> None:
    said = align(tmp_path, max_train_steps=36, learning_rate=1e-3, logging_steps=4)
    assert sorted(message.split(": ")[1] for message in said) == ["collapse", "drift", "stalled"]
    drift = next(message for message in said if "drift" in message)
    step = int(drift.split()[1].rstrip(":"))
    logged = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["step"] <= step]
    over = [line["model_mse"] > DRIFT * line["ref_mse"] for line in logged]
    assert over[-3:] == [True] * 3 and over[-4] is False
    assert f"model_mse {logged[-1]['model_mse']:.4g} has stayed over 4 times ref_mse" in drift
    assert "\n" not in "".join(said)


def test_learning_from_chance_sets_off_the_collapse_alone(tmp_path: Path) -> None:
    said = align(tmp_path, Chance, max_train_steps=21, learning_rate=3e-4, logging_steps=3, method="sipo", beta=20.0)
    assert [message.split(": ")[1] for message in said] == ["collapse"]
    step = int(said[0].split()[1].rstrip(":"))
    of = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["step"] <= step]
    assert [x["chosen_gap"] > COLLAPSE_GROWTH * x["ref_mse"] for x in of[-4:]] == [False, True, True, True]


def test_stopped_by_an_alarm_a_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_train_steps": 7,
        "loss_fn": loss(mask_threshold=1.0),
        "use_ema": True,
        "ema_decay": 0.9,
        "logging_steps": 2,
    }
    with pytest.warns(TrainingWarning, match="step 4: stalled: active_fraction 0.000 has stayed under 0.1"):
        straight, whole = fit(tmp_path / "straight", checkpointing_steps=7, **options)
    with pytest.raises(TrainingAlarmError) as caught:
        fit(tmp_path / "run", alarms="stop", **options)
    saved = tmp_path / "run/checkpoints/step-00000004"
    assert (caught.value.step, caught.value.checkpoint) == (4, saved)
    message = str(caught.value)
    assert message.startswith("step 4: stalled: active_fraction 0.000 has stayed under 0.1 for 3 log lines, so ")
    assert message.endswith(f"alarms='stop': resume with resume_from={str(saved)!r}") and "\n" not in message
    # It has said so: the same episode stops nothing again.
    resumed, rest = fit(tmp_path / "run", alarms="stop", resume_from="latest", checkpointing_steps=7, **options)
    assert [line["step"] for line in rest.history] == [6, 7]
    assert untimed(read_metrics(tmp_path / "run/metrics.jsonl")) == untimed(whole.history)
    for name in ("timesteps.jsonl", *(f"checkpoints/step-00000007/{x}" for x in ("state.json", "ema.safetensors"))):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    assert same(straight, resumed)


def test_after_the_last_step_an_alarm_has_nothing_to_stop(tmp_path: Path) -> None:
    with pytest.warns(TrainingWarning, match="step 3: stalled"):
        _, result = fit(tmp_path, max_train_steps=3, alarms="stop", loss_fn=loss(mask_threshold=1.0))
    assert result.steps == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        fit(tmp_path / "off", max_train_steps=4, alarms="off", loss_fn=loss(mask_threshold=1.0))


def test_the_command_line_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    example = Path(__file__).parents[1] / "examples/toy/sd15.yaml"
    place = f"training.output_dir={tmp_path}"
    alarm = TrainingAlarmError(40, tmp_path, ["drift: model_mse 9"])
    monkeypatch.setattr("sipo.recipe.train.run_training", Mock(side_effect=alarm))
    assert cli.main(["train", str(example), place, "data.sizes=[[32, 32]]"]) == 2
    end = f"; `sipo train {example} {place} 'data.sizes=[[32, 32]]' --resume` continues from there\n"
    assert capsys.readouterr().err == f"sipo: error: step 40: drift: model_mse 9; alarms='stop'{end}"
    # How several processes were launched is not known.
    two = SimpleNamespace(num_processes=2, is_main_process=True)
    monkeypatch.setattr("sipo.training.make_accelerator", lambda training: two)

    def interrupted(*_: Any, on_start: Any, **__: Any) -> None:
        on_start()  # prints the configuration
        raise TrainingInterruptedError(7, tmp_path, "SIGTERM")

    monkeypatch.setattr("sipo.recipe.train.run_training", interrupted)
    assert cli.main(["train", str(example), place]) == 130
    end = "stopped after step 7; the same command with --resume continues from there"
    assert capsys.readouterr().err == f"sipo: {end}\n"
    with suppress(OSError), open("/dev/full", "w") as full:  # closing it fails once more
        monkeypatch.setattr("sys.stdout", full)
        assert cli.main(["train", str(example), place]) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err.startswith("sipo: error: standard output: No space left on device")
    with pytest.raises(ValueError, match="alarms='loud': expected one of warn, stop, off"):
        settings(tmp_path, alarms="loud")
