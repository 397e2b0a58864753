"""Moving digits of the alignment study: the clips, their rewards, the judge and the two shipped models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from benchmarks.alignment import moving_digits, train_moving_digits
from benchmarks.alignment.moving_digits import (
    BASE,
    BLANK_SMOOTHNESS,
    CLIP_SHAPE,
    FRAMES,
    KINDS,
    ClipJudge,
    build_scheduler,
    ink,
    load_base,
    load_moving,
    predict,
    random_paths,
    render,
    sample,
    smoothness,
)
from benchmarks.alignment.tasks import frechet_distance
from sipo import NoiseSchedule, SIPOLoss
from sipo.batch import PairBatch, level_argument, noisy_pairs
from sipo.demo.digits import CLASSES, Digits, load_digits

# On 200 held-out clips; the shipped weights have 0.127 and 0.195.
LOSS = {"cogvideox": 0.15, "wan": 0.23}


@pytest.fixture(scope="module")
def judge() -> ClipJudge:
    return ClipJudge(*load_moving("wan"))


@pytest.fixture(scope="module", params=KINDS)
def base(request: Any) -> tuple[str, Any, Any]:
    return request.param, *load_base(request.param)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("kind", KINDS)
def test_the_clips_are_of_the_demos_digits_and_made_alike_each_time(kind: str) -> None:
    train, held_out = load_moving(kind)
    assert train.images.shape == (3 * 1437, *CLIP_SHAPE[kind]) and held_out.images.shape == (3 * 360, *CLIP_SHAPE[kind])
    assert train.images.dtype == torch.float32 and train.labels.dtype == torch.int64
    assert train.images.min() == -1.0 and 0.99 < train.images.max() <= 1.0
    load_moving.cache_clear()
    again = load_moving(kind)
    assert torch.equal(again[0].images, train.images) and torch.equal(again[1].images, held_out.images)
    digits, digits_held_out = load_digits()
    for data, source in ((train, digits), (held_out, digits_held_out)):
        assert torch.equal(data.labels, source.labels.repeat(3))
        # A digit keeps its ink wherever it is drawn: 64 pixels of it, and the empty rest of a frame.
        drawn = (data.images.reshape(-1, FRAMES, 144) + 1).sum(dim=-1)
        torch.testing.assert_close(
            drawn, (source.images.flatten(1) + 1).sum(dim=1).repeat(3)[:, None].expand(-1, FRAMES), rtol=1e-5, atol=0
        )


def test_the_two_layouts_hold_the_same_clips() -> None:
    cogvideox, wan = (load_moving(kind)[0] for kind in KINDS)
    assert torch.equal(cogvideox.images, wan.images.transpose(1, 2))
    assert torch.equal(ink(cogvideox.images), ink(wan.images))
    assert torch.equal(smoothness(cogvideox.images), smoothness(wan.images))


def test_paths_stay_on_the_canvas_and_differ_in_smoothness() -> None:
    paths = random_paths(4000, torch.Generator().manual_seed(5))
    assert paths.shape == (4000, FRAMES, 2) and paths.min() >= 0 and paths.max() <= 4
    jerk = paths.diff(n=2, dim=1).square().sum(dim=-1).mean(dim=1)
    assert len(jerk.unique()) == 4000  # no two alike: a pair always has a chosen sample
    assert jerk.quantile(0.25) < 0.05 and jerk.quantile(0.9) > 3
    speed = (paths[:, -1] - paths[:, 0]).norm(dim=-1) / (FRAMES - 1)
    # of two components uniform in [-1, 1] the mean length is 0.765; jitter and border change it a little
    assert speed.mean().item() == pytest.approx(0.765, abs=0.05) and speed.min() < 0.1 and speed.max() > 1.2


def test_whole_pixels_are_drawn_exactly_and_halves_in_between() -> None:
    images = load_digits()[0].images[:3, 0]
    paths = torch.tensor([[[0.0, 0.0], [1.0, 3.0], [4.0, 4.0], [2.0, 2.0], [2.5, 2.0]]]).expand(3, -1, -1)
    clips = render(images, paths)
    assert clips.shape == (3, FRAMES, 12, 12)
    for frame, (row, column) in enumerate([(0, 0), (1, 3), (4, 4), (2, 2)]):
        assert torch.equal(clips[:, frame, row : row + 8, column : column + 8], images)
        assert (clips[:, frame].sum(dim=(1, 2)) - images.sum(dim=(1, 2)) + 80).abs().max() < 1e-4
    below = render(images, torch.tensor([[[3.0, 2.0]]]).expand(3, -1, -1))[:, 0]
    torch.testing.assert_close(clips[:, 4], (clips[:, 3] + below) / 2, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- rewards


def _drawn(path: list[tuple[float, float]], kind: str = "wan") -> Tensor:
    return render(load_digits()[0].images[:4, 0], torch.tensor([path]).expand(4, -1, -1)).reshape(-1, *CLIP_SHAPE[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_smoothness_is_minus_the_mean_squared_second_difference(kind: str) -> None:
    still = _drawn([(1.5, 2.0)] * 5, kind)
    even = _drawn([(0.3 + 0.7 * f, 3.9 - 0.6 * f) for f in range(5)], kind)
    shaken = _drawn([(2, 2), (3, 2), (2, 2), (3, 2), (2, 2)], kind)  # second differences of 2 pixels: 4 on average
    turned = _drawn([(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)], kind)  # one of (-1, 1) in three: 2 / 3
    for clips, expected in ((still, 0.0), (even, 0.0), (shaken, -4.0), (turned, -2 / 3)):
        torch.testing.assert_close(smoothness(clips), torch.full((4,), expected), rtol=1e-4, atol=1e-8)


def test_a_clip_without_a_digit_is_not_smooth() -> None:
    clips = _drawn([(2.0, 2.0)] * 5)
    clips[0] = -1.0
    clips[1, :, 3] = -1.0  # one empty frame
    clips[2] = -1.0 + 2 * 1.9 / 144  # grey, of less than two pixels' ink
    found = smoothness(clips)
    assert found[:3].tolist() == [BLANK_SMOOTHNESS] * 3 and found[3].abs() < 1e-8
    assert torch.isfinite(smoothness(3 * torch.randn(4, *CLIP_SHAPE["wan"]))).all()


def test_ink_is_the_mean_pixel() -> None:
    clips = torch.full((2, *CLIP_SHAPE["cogvideox"]), -1.0)
    clips[1, :, :, :6] = 0.5
    assert ink(clips).tolist() == [-1.0, -0.25]


def test_clips_of_another_shape_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"shape \[2, 5, 12, 12\]: expected \[N, 5, 1, 12, 12\] or \[N, 1, 5, 12, 12\]"
    ):
        smoothness(torch.zeros(2, 5, 12, 12))
    for call in (load_moving, load_base, predict, build_scheduler):
        with pytest.raises(ValueError, match="kind='sora': expected one of cogvideox, wan"):
            call("sora")


# ---------------------------------------------------------------- the judge


def test_the_judge_reads_real_clips_wherever_they_are(judge: ClipJudge) -> None:
    assert judge.accuracy > 0.97
    held_out = load_moving("cogvideox")[1]
    read = judge.read(held_out.images)
    assert read.dtype == torch.int64
    assert (read == held_out.labels).double().mean().item() == judge.accuracy
    # Chance for labels that belong to other clips: the accuracy is not one of the labels' own making.
    assert (read == held_out.labels.roll(1)).double().mean().item() < 0.2


def test_features_see_looks_and_motion(judge: ClipJudge) -> None:
    train, held_out = load_moving("wan")
    features = judge.features(train.images)
    assert features.shape == (len(train.labels), 26) and features.dtype == np.float64
    np.testing.assert_allclose(features.mean(axis=0), 0.0, atol=1e-6)
    np.testing.assert_allclose(features.var(axis=0, ddof=1), 1.0, rtol=1e-6)
    # Held-out clips as they come lie near the real ones; those chosen for jerks or for ink do not.
    some, jerky, inky = (
        frechet_distance(judge.features(held_out.images[rows[:300]]), features)
        for rows in (
            torch.randperm(len(held_out.labels), generator=torch.Generator().manual_seed(0)),
            smoothness(held_out.images).argsort(),
            ink(held_out.images).argsort(descending=True),
        )
    )
    assert jerky > 2 * some and inky > 2 * some
    assert np.array_equal(judge.features(load_moving("cogvideox")[0].images[:9]), judge.features(train.images[:9]))


# ---------------------------------------------------------------- models


def test_the_shipped_weights_are_small_and_float16_but_loaded_as_float32(base: tuple[str, Any, Any]) -> None:
    from safetensors import safe_open

    kind, model, _ = base
    files = [file for file in (BASE / kind).rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 2e6
    (weights,) = (BASE / kind).glob("*.safetensors")
    with safe_open(weights, "pt") as stored:
        assert {str(stored.get_tensor(name).dtype) for name in stored.keys()} == {"torch.float16"}  # noqa: SIM118
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 1.2e6


def test_schedules_are_the_families_own() -> None:
    cogvideox, wan = (NoiseSchedule.from_scheduler(build_scheduler(kind)) for kind in KINDS)
    assert (cogvideox.kind, cogvideox.prediction_type) == ("discrete", "v_prediction")
    assert (wan.kind, wan.prediction_type, wan.shift) == ("flow", "flow", 3.0)
    alpha, _ = cogvideox.alpha_sigma(torch.tensor([0, 999]))
    assert alpha[1] == 0.0  # no signal at the end
    # the SNR before the rescaling to that, which moves it by little at the start: (1 - β) / β, divided by 3
    assert (alpha[0] ** 2 / (1 - alpha[0] ** 2)).item() == pytest.approx((1 / 0.00085 - 1) / 3, rel=1e-3)


def test_samples_are_reproducible_and_read_as_requested(base: tuple[str, Any, Any], judge: ClipJudge) -> None:
    kind, model, scheduler = base
    classes = torch.arange(60) % CLASSES
    before = torch.get_rng_state()
    clips = sample(model, scheduler, classes, seed=3)
    assert clips.shape == (60, *CLIP_SHAPE[kind]) and clips.dtype == torch.float32
    assert clips.min() >= -1.0 and clips.max() <= 1.0
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(
        sample(model, scheduler, classes[:20], seed=4, steps=4), sample(model, scheduler, classes[:20], 4, 4)
    )
    assert not torch.equal(
        sample(model, scheduler, classes[:20], seed=4, steps=4), sample(model, scheduler, classes[:20], 5, 4)
    )
    # 400 samples: 0.935 and 0.927
    assert (judge.read(clips) == classes).double().mean() >= 0.8
    real = load_moving(kind)[1].images
    assert ink(clips).mean().item() == pytest.approx(ink(real).mean().item(), abs=0.03)


def test_the_base_denoises_and_listens_to_the_digit(base: tuple[str, Any, Any]) -> None:
    kind, model, _ = base
    _, held_out = load_moving(kind)
    some = Digits(held_out.images[:200], held_out.labels[:200])
    loss = train_moving_digits.held_out_loss(kind, model, some)
    told_wrong = train_moving_digits.held_out_loss(kind, model, Digits(some.images, (some.labels + 1) % CLASSES))
    assert loss < LOSS[kind] and told_wrong > 1.1 * loss


def test_a_pair_step_moves_the_model_towards_the_chosen(base: tuple[str, Any, Any]) -> None:
    kind, _, scheduler = base
    policy, reference = (load_base(kind)[0] for _ in range(2))
    loss_fn = SIPOLoss(NoiseSchedule.from_scheduler(scheduler, 20), method="diffusion_dpo", beta=100.0)
    schedule, call = loss_fn.schedule, predict(kind)
    clips, labels = load_moving(kind)[0].images, load_moving(kind)[0].labels[:8]
    generator = torch.Generator().manual_seed(0)
    levels = schedule.sample_levels(8, generator)
    noise = torch.randn(8, *CLIP_SHAPE[kind], generator=generator)
    pairs = noisy_pairs(PairBatch(clips[:8], clips[8:16], labels).with_draws(noise, levels), schedule)
    inputs, argument = (pairs.samples, pairs.timesteps, pairs.condition), level_argument(schedule, pairs.levels)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        with torch.no_grad():
            expected = call(reference, *inputs)
        loss = loss_fn(call(policy, *inputs), expected, pairs.target, **argument).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0] - 0.01


def test_training_the_base_is_reproducible_and_can_be_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (train_moving_digits.train("wan", steps=3, batch_size=8) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(moving_digits, "BASE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"wan: no base model, expected .*train_moving_digits wan writes"):
        load_base("wan")
    train_moving_digits.save("wan", first, tmp_path / "wan")
    loaded, _ = load_base("wan")
    for one, other in zip(first.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one.half().float(), other)
    with pytest.raises(SystemExit):
        train_moving_digits.main(["wan", "--steps", "0"])
    assert "--steps is 0, expected at least 1" in capsys.readouterr().err
