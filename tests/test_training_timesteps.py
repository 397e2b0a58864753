"""Work that the mask makes needless: noise levels that are not drawn, and backward passes that are left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from sipo import NoiseSchedule, SIPOLoss
from sipo.training import timesteps
from sipo.training.stream import step_levels
from sipo.training.timesteps import BINS, EXPLORATION, LEAST_PAIRS, MEMORY, InformativeTimesteps
from tests.training_cases import Pairs, fit, loss, same, untimed

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule.discrete()


class Output(NamedTuple):
    log_ratio: Tensor


def informative(schedule: NoiseSchedule | None = None, **options: Any) -> InformativeTimesteps:
    loss_fn = SIPOLoss(schedule or SCHEDULE, beta=1.0, **options)
    return InformativeTimesteps(loss_fn, CPU, 0, "uniform")


def show(statistics: InformativeTimesteps, levels: list[float], chosen: list[float], rejected: list[float]) -> None:
    dtype = torch.long if statistics.bin_of.kind == "discrete" else torch.float32
    statistics.add(torch.tensor(levels, dtype=dtype), Output(torch.tensor(chosen + rejected).log()))


def read(statistics: InformativeTimesteps) -> None:
    statistics.absorb(statistics.window.flatten().tolist())


# ---------------------------------------------------------------- statistics


def test_the_mean_is_of_the_pairs_smaller_ratio() -> None:
    statistics = informative()
    show(statistics, [0, 9, 10, 999], [0.5, 0.9, 0.7, 1.0], [0.8, 0.3, 0.7, 0.25])
    read(statistics)
    assert statistics.means[0] == pytest.approx((0.5 + 0.3) / 2)
    assert (statistics.means[1], statistics.means[99]) == (pytest.approx(0.7), pytest.approx(0.25))
    assert statistics.counts == [2.0, 1.0] + [0.0] * 97 + [1.0]
    assert statistics.window.abs().sum() == 0


def test_terminal_levels_count_as_zero_and_broken_pairs_not_at_all() -> None:
    statistics = informative()
    statistics.add(torch.tensor([5, 5, 5]), Output(torch.tensor([-math.inf, math.nan, 0.0, 0.0, 0.0, 0.0])))
    read(statistics)
    assert (statistics.means[0], statistics.counts[0]) == (0.5, 2.0)


def test_a_flow_has_bins_of_sigma() -> None:
    statistics = informative(NoiseSchedule.flow(shift=3.0))
    show(statistics, [0.001, 0.0101, 0.995, 1.0], [0.1, 0.2, 0.3, 0.5], [1.0] * 4)
    read(statistics)
    assert [statistics.means[i] for i in (0, 1, 99)] == pytest.approx([0.1, 0.2, 0.4])


def test_a_running_mean_forgets() -> None:
    statistics = informative()
    for value in (0.2, 0.95):
        for _ in range(40):
            show(statistics, [500] * 8, [value] * 8, [1.0] * 8)
            read(statistics)
        assert statistics.means[50] == pytest.approx(value, abs=0.01)
        assert statistics.counts[50] == (MEMORY if value == 0.95 else LEAST_PAIRS)
    # Within the memory it is the plain mean.
    statistics = informative()
    for value in (0.1, 0.2, 0.6):  # fewer than would shorten the memory
        show(statistics, [500], [value], [1.0])
        read(statistics)
    assert statistics.means[50] == pytest.approx(0.3)


# ---------------------------------------------------------------- draws


def test_with_nothing_known_draws_are_those_of_all() -> None:
    statistics = informative()
    assert torch.equal(statistics.sample(SCHEDULE, 64, 3), step_levels(SCHEDULE, 64, 3, 0, "uniform"))
    assert statistics.share == 1.0


def low_until(statistics: InformativeTimesteps, bins: int) -> None:
    """Bins below the threshold up to a number, above it from there on."""
    statistics.counts = [100.0] * statistics.bins
    statistics.means = [0.5] * bins + [0.95] * (statistics.bins - bins)


def test_bins_under_the_threshold_are_left_out_but_for_the_exploration() -> None:
    statistics = informative()
    low_until(statistics, 60)
    drawn = torch.cat([statistics.sample(SCHEDULE, 100, step) for step in range(100)])
    low = (drawn < 600).float().mean().item()
    # Exploration draws from all levels, of which 60 % are low; four standard errors.
    expected = 0.6 * EXPLORATION
    assert low == pytest.approx(expected, abs=4 * math.sqrt(expected / 10_000))
    high = drawn[drawn >= 600].float()
    assert high.mean().item() == pytest.approx(799.5, abs=5) and high.min() == 600 and high.max() == 999
    assert statistics.share == pytest.approx(0.4)
    assert torch.equal(statistics.sample(SCHEDULE, 100, 7), drawn[700:800])  # a function of the step
    assert not torch.equal(statistics.sample(SCHEDULE, 100, 8), drawn[700:800])


def test_few_pairs_leave_a_bin_in_and_all_bins_are_never_left_out() -> None:
    statistics = informative()
    show(statistics, [5] * 7, [0.1] * 7, [0.1] * 7)
    read(statistics)
    assert statistics.share == 1.0
    show(statistics, [5], [0.1], [0.1])
    read(statistics)
    assert statistics.share == pytest.approx(0.99)
    low_until(statistics, BINS)
    assert statistics.share == 1.0
    assert torch.equal(statistics.sample(SCHEDULE, 8, 0), step_levels(SCHEDULE, 8, 0, 0, "uniform"))
    low_until(statistics, BINS - 1)  # one level in a hundred: some pairs find none in their draws, and keep the first
    drawn = statistics.sample(SCHEDULE, 2000, 0)
    assert 0.2 < (drawn >= 990).float().mean().item() < 0.4


def test_a_bin_that_recovers_comes_back() -> None:
    statistics = informative()
    for _ in range(20):
        show(statistics, list(range(0, 500, 10)) * 4, [0.5] * 200, [1.0] * 200)
        read(statistics)
    assert statistics.share == 0.5
    shares = []
    for step in range(100):
        drawn = statistics.sample(SCHEDULE, 512, step)
        statistics.add(drawn, Output(torch.zeros(1024)))  # ratios of 1 everywhere from now on
        read(statistics)
        shares.append(statistics.share)
    # 26 pairs a step explore 100 bins, and a low one needs some 14 of them to forget: about 55 steps.
    assert shares[10] == 0.5 and shares[-1] > 0.9


def test_sampling_follows_the_distribution_of_a_flow() -> None:
    schedule = NoiseSchedule.flow(shift=3.0)
    statistics = InformativeTimesteps(SIPOLoss(schedule, beta=1.0), CPU, 0, "shifted_logit_normal")
    low_until(statistics, 50)
    drawn = torch.cat([statistics.sample(schedule, 1000, step) for step in range(20)])
    plain = torch.cat([step_levels(schedule, 1000, s, 1, "shifted_logit_normal") for s in range(20)])
    assert drawn.dtype == plain.dtype == torch.float32
    expected = plain[plain >= 0.5]
    assert drawn[drawn >= 0.5].mean().item() == pytest.approx(expected.mean().item(), abs=0.006)


# ---------------------------------------------------------------- in a run


def test_a_run_stops_drawing_what_the_mask_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timesteps, "BINS", 10)
    # With these random weights the mask drops most pairs at low levels and few at high ones.
    options: dict[str, Any] = {"max_train_steps": 40, "train_batch_size": 16, "logging_steps": 5, "learning_rate": 1e-5}
    actives = []
    for sampling in ("all", "informative"):
        loss_fn = loss(mask_threshold=0.9)
        _, result = fit(tmp_path / sampling, loss_fn=loss_fn, timestep_sampling=sampling, **options)
        actives.append([line["active_fraction"] for line in result.history])
    everywhere, chosen = ([sum(line[1:3]) / 2, sum(line[-3:]) / 3] for line in actives)
    assert everywhere[1] == pytest.approx(everywhere[0], abs=0.15)
    assert chosen[1] > everywhere[1] + 0.1
    assert result.history[0]["timestep_share"] == 1 > result.history[-1]["timestep_share"] > 0


def test_informative_timesteps_need_a_mask_levels_and_draws_of_the_run(tmp_path: Path) -> None:
    for options in ({"method": "diffusion_dpo"}, {"mask_threshold": 0.0}):
        with pytest.raises(ValueError, match="timestep_sampling='informative': expected a loss with a mask"):
            fit(tmp_path, loss_fn=loss(**options), timestep_sampling="informative")

    class Fixed(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            return item | {"noise": torch.zeros_like(item["chosen"]), "level": torch.tensor(3)}

    with pytest.raises(ValueError, match="informative': the items have draws of their own, expected 'all'"):
        fit(tmp_path, data=Fixed(), loss_fn=loss(mask_threshold=0.9), timestep_sampling="informative")


# ---------------------------------------------------------------- passes without an active pair


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_pass_without_an_active_pair_is_skipped_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    calls = 0
    backward = Accelerator.backward

    def counting(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        backward(self, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", counting)
    options: dict[str, Any] = {
        "max_train_steps": 20,
        "train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-3,
    }
    options["logging_steps"] = 10
    done, results = [], []
    for skip in (False, True):
        calls = 0
        results.append(fit(tmp_path / str(skip), loss_fn=loss(mask_threshold=0.9), skip_inactive=skip, **options))
        done.append(calls)
    (plain, one), (skipping, other) = results
    skipped = sum(line.pop("skipped_passes") for line in other.history)
    assert done == [20 * accumulation, 20 * accumulation - skipped] and 3 < skipped < 20 * accumulation - 3
    assert same(plain, skipping)
    assert untimed(one.history) == untimed(other.history)


def test_skipping_needs_a_mask_to_look_at(tmp_path: Path) -> None:
    class Plain:
        schedule = NoiseSchedule.discrete()

        def __call__(self, model_pred: Tensor, ref_pred: Tensor, target: Tensor, timesteps: Tensor) -> Any:
            return Output(model_pred.sum())

    with pytest.raises(ValueError, match="skip_inactive=True: Output has no mask, expected a loss that masks"):
        fit(tmp_path, loss_fn=Plain(), skip_inactive=True)
