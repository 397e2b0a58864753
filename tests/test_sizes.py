"""Schedules that depend on the size of a sample: the ratio and every draw have the shift of the pair's own size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import assert_refused
from torch import Tensor, nn

from sipo import NoiseSchedule, SIPOLoss
from sipo.analysis.score import score_pairs
from sipo.analysis.untrained import measure_untrained
from sipo.cache.finished import open_cache
from sipo.cache.format import CacheError
from sipo.cache.pairs import CachedPairs, DrawnPairs
from sipo.cache.precompute_errors import precompute_reference_errors
from sipo.cache.reference_errors import FixedDraws, open_reference_errors
from sipo.schedule import SizeDependentSchedule, schedule_for
from sipo.training.forward import PairForward
from tests.small_family import Network as SmallNetwork
from tests.small_family import Records, SmallFamily, build
from tests.test_training_data import Shapes
from tests.training_cases import fit, networks, predict, same, untimed

SMALL, LARGE = NoiseSchedule.flow(shift=2.0), NoiseSchedule.flow(shift=5.0)
BY_SIZE = SizeDependentSchedule({(4, 4): SMALL, (6, 6): LARGE})
SIZED = {4: SMALL, 6: LARGE}


class Recorded:
    """A predict that keeps the size and the noise levels of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Tensor]] = []

    def __call__(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        self.calls.append((noisy.shape[-1], timesteps / 1000))
        return predict(module, noisy, timesteps, condition)


def loss(schedule: NoiseSchedule, **options: Any) -> SIPOLoss:
    return SIPOLoss(schedule, beta=50.0, **options)


def run(folder: Path, schedule: NoiseSchedule, **options: Any) -> tuple[Any, Any, Recorded]:
    recorded = Recorded()
    policy, result = fit(
        folder, data=Shapes(), loss_fn=loss(schedule, mask_threshold=0.5), predict=recorded, train_batch_size=2,
        gradient_accumulation_steps=3, timestep_distribution="shifted", **options,
    )  # fmt: skip
    return policy, result, recorded


def test_the_loss_has_the_ratio_of_the_samples_size() -> None:
    sigmas = torch.tensor([0.3, 0.8])
    for side, own in SIZED.items():
        pred, ref, target = torch.randn(3, 4, 1, side, side, generator=torch.Generator().manual_seed(0))
        found = loss(BY_SIZE)(pred, ref, target, sigmas=sigmas)
        expected = loss(own)(pred, ref, target, sigmas=sigmas)
        assert torch.equal(found.loss, expected.loss) and torch.equal(found.log_ratio, expected.log_ratio)
    assert not torch.equal(SMALL.ratio_scale(sigmas=sigmas), LARGE.ratio_scale(sigmas=sigmas))
    message = "samples of size [4, 6]: expected one that the noise schedule has a shift for, [4, 4], [6, 6]"
    assert_refused(lambda: loss(BY_SIZE)(*torch.zeros(3, 2, 1, 4, 6), sigmas=sigmas[:1]), ValueError, message)


def test_other_schedules_are_every_sizes() -> None:
    for schedule in (SMALL, NoiseSchedule.discrete()):
        assert schedule_for(schedule, torch.zeros(1, 5, 7)) is schedule


def test_its_settings_have_every_shift() -> None:
    settings = BY_SIZE.settings()
    assert settings.pop("shift") == {"4x4": 2.0, "6x6": 5.0}
    assert settings.items() < SMALL.settings().items()
    assert repr(BY_SIZE).startswith("SizeDependentSchedule(kind='flow', prediction_type='flow', shift={'4x4': 2.0, ")


@pytest.mark.parametrize("sampling", ["all", "informative"])
def test_a_run_draws_each_level_with_the_shift_of_its_size(tmp_path: Path, sampling: str) -> None:
    options: dict[str, Any] = {"validation": Shapes(), "validation_steps": 3, "max_train_steps": 3}
    *_, plain = run(tmp_path / "plain", NoiseSchedule.flow(), timestep_sampling=sampling, **options)
    *_, sized = run(tmp_path / "sized", BY_SIZE, timestep_sampling=sampling, **options)
    assert len(plain.calls) == len(sized.calls) and {side for side, _ in sized.calls} == {4, 6}
    for (side, u), (same_side, levels) in zip(plain.calls, sized.calls, strict=True):
        k = SIZED[side].shift
        assert side == same_side
        torch.testing.assert_close(levels, k * u / (1 + (k - 1) * u))


def test_a_run_with_one_shift_is_that_of_the_plain_schedule(tmp_path: Path) -> None:
    by_size = SizeDependentSchedule({(4, 4): SMALL, (6, 6): NoiseSchedule.flow(shift=2.0)})
    options: dict[str, Any] = {"validation": Shapes(), "validation_steps": 4}
    (one, first, _), (other, second, _) = (run(tmp_path / str(s), s, **options) for s in (by_size, SMALL))
    assert same(one, other)
    assert untimed(first.history) == untimed(second.history)
    assert untimed(first.validation) == untimed(second.validation)


def test_fixed_draws_and_reference_errors_have_the_shift_of_their_size(tmp_path: Path) -> None:
    build(tmp_path, Records.make(two_sizes=True))
    cached, fixed = CachedPairs(open_cache(tmp_path)), FixedDraws(2, 3, "shifted")
    by_size = SizeDependentSchedule({(2, 3): SMALL, (3, 2): LARGE})
    drawn, u = (DrawnPairs(cached, schedule, fixed) for schedule in (by_size, NoiseSchedule.flow()))
    for index in (0, 2 * cached.groups[1][0] + 1):
        k = SMALL.shift if drawn[index]["chosen"].shape[-1] == 3 else LARGE.shift
        level = u[index]["level"]
        torch.testing.assert_close(drawn[index]["level"], k * level / (1 + (k - 1) * level))
    arguments = cached.cache, SmallNetwork(), SmallFamily().predict
    precompute_reference_errors(*arguments, by_size, fixed, {}, batch_size=4, progress=False)
    references = open_reference_errors(cached.cache, by_size, fixed, {})
    assert all(DrawnPairs(cached, by_size, fixed, references)[index]["ref_error"].shape == (2,) for index in (0, 23))
    other = SizeDependentSchedule({(2, 3): SMALL, (3, 2): NoiseSchedule.flow(shift=4.0)})
    stretched = NoiseSchedule(
        "flow", prediction_type="flow", num_inference_steps=50, num_train_timesteps=1000, shift_terminal=0.1
    )
    for schedule in (SMALL, other, stretched):
        with pytest.raises(CacheError, match="schedule"):
            open_reference_errors(cached.cache, schedule, fixed, {})


def test_scores_are_those_at_the_levels_of_each_size() -> None:
    policy, reference = networks()
    with torch.no_grad():
        policy.outward.bias += 0.1
    found, small, large = (
        score_pairs(
            policy, reference, schedule, Shapes(), predict, beta=1.0, draws=4, batch_size=8, distribution="shifted"
        ).margin
        for schedule in (BY_SIZE, SMALL, LARGE)
    )
    is_large = torch.arange(24) % 3 == 0
    assert torch.equal(found, torch.where(is_large, large, small))
    assert not torch.equal(small[is_large], large[is_large])


def test_what_is_measured_before_training_weighs_levels_as_all_sizes_draw_them() -> None:
    policy, reference = networks()
    accelerator = Accelerator(cpu=True)

    def drawn(schedule: NoiseSchedule) -> Tensor:
        forward = PairForward(loss(schedule), predict, copy.deepcopy(reference), accelerator, offload=False)
        options: dict[str, Any] = {"pairs": 24, "levels": 4, "batch_size": 8, "seed": 0, "distribution": "shifted"}
        return torch.tensor(measure_untrained(policy, forward, Shapes(), beta=1.0, **options).drawn)

    found, small, large = (drawn(schedule) for schedule in (BY_SIZE, SMALL, LARGE))
    torch.testing.assert_close(found, (2 * small + large) / 3, rtol=0, atol=0.005)  # of 65,536 draws
    assert (small - large).abs().max() > 0.1


@pytest.mark.parametrize("sampling", ["all", "informative"])
def test_levels_are_drawn_once_for_a_step_or_a_run_of_validations_and_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: str
) -> None:
    drawn: list[int] = []
    draw = NoiseSchedule.sample_levels
    monkeypatch.setattr(
        NoiseSchedule, "sample_levels", lambda self, n, *args, **kw: drawn.append(n) or draw(self, n, *args, **kw)
    )
    options = {"timestep_sampling": sampling, "validation": Shapes(), "validation_steps": 1, "max_train_steps": 4}
    *_, recorded = run(tmp_path, BY_SIZE, **options)
    sides = [side for side, _ in recorded.calls[::2]]  # of each pass: the policy's call and the reference's
    training = [sides[step * (3 + 12) : step * (3 + 12) + 3] for step in range(4)]
    assert drawn.count(24) == 2 and drawn.count(6) == sum(len(set(step)) for step in training) > 4
