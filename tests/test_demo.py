"""The demo end to end with few steps, and the pieces it is made of, on the real digits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from diffusers import UNet2DModel

from sipo import NoiseSchedule, SIPOLoss
from sipo.demo import train_base
from sipo.demo.digits import CLASSES, Digits, InkPairs, ink, load_digits
from sipo.demo.main import DemoConfig, describe, run_demo
from sipo.demo.measure import DigitClassifier, weight_by_timestep
from sipo.demo.model import BASE, build_model, load_base, predict, sample
from sipo.demo.picture import _title
from sipo.files import FileError
from sipo.training.log_reader import read_metrics, step_mean

SMALL: dict[str, Any] = {"steps": 10, "samples": 50, "batch_size": 8, "seed": 3}


class Outcome(NamedTuple):
    summary: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module", autouse=True)
def few_levels() -> Iterator[None]:
    """What the weights are measured at, most of the demo's time with few steps: 7 timesteps for its 28."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sipo.demo.main._WEIGHT_LEVELS", 7)
        yield


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("demo") / "nested" / "out"
    return Outcome(run_demo(DemoConfig(output=folder, **SMALL), progress=False), folder)


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    return load_digits()


# ---------------------------------------------------------------- the data


def test_the_digits_are_scikit_learns_and_split_once(digits: tuple[Digits, Digits]) -> None:
    fitted, held_out = digits
    assert (len(fitted.labels), len(held_out.labels)) == (1437, 360)
    images = torch.cat([fitted.images, held_out.images])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    # 16 grey levels a step of 1/8 apart.
    assert torch.equal(images * 8, (images * 8).round())
    assert ink(fitted.images).mean().item() == pytest.approx(-0.39, abs=0.005)


def test_pairs_are_of_one_class_and_the_inkier_is_chosen(digits: tuple[Digits, Digits]) -> None:
    images, labels = digits[0]
    pairs = InkPairs(digits[0], count=2000, seed=1)
    assert len(pairs) == 2000
    chosen, rejected = pairs.pairs.T
    assert torch.equal(labels[chosen], labels[rejected])
    reward = ink(images)
    assert (reward[chosen] > reward[rejected]).all()
    counts = torch.bincount(labels[chosen], minlength=CLASSES)
    assert counts.min().item() > 140 and counts.max().item() < 260  # 200 each, give or take 4 deviations
    item = pairs[7]
    assert torch.equal(item["chosen"], images[chosen[7]])
    assert torch.equal(item["rejected"], images[rejected[7]])
    assert item["condition"] == labels[chosen[7]]
    again, other = InkPairs(digits[0], 2000, 1), InkPairs(digits[0], 2000, 2)
    assert torch.equal(again.pairs, pairs.pairs)
    assert not torch.equal(other.pairs, pairs.pairs)


# ---------------------------------------------------------------- the base model


def test_the_shipped_model_predicts_noise_and_draws_digits(digits: tuple[Digits, Digits]) -> None:
    model, scheduler = load_base()
    assert model.num_parameters() == build_model().num_parameters() == 702_625
    # Through JSON and back, as the shipped one has come: tuples are lists there.
    described = [json.loads(network.to_json_string()) for network in (model, build_model())]
    assert described[0] | {"_name_or_path": ""} == described[1] | {"_name_or_path": ""}
    images, labels = digits[1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.randint(1000, labels.shape, generator=generator)
    with torch.no_grad():
        predicted = predict(model, scheduler.add_noise(images, noise, timesteps), timesteps, labels)
    assert (predicted - noise).square().mean().item() == pytest.approx(0.087, abs=0.012)

    classes = torch.arange(100) % CLASSES
    drawn = sample(model, scheduler, classes, seed=0)
    assert drawn.shape == (100, 1, 8, 8) and drawn.abs().max().item() <= 1.0
    assert torch.equal(drawn, sample(model, scheduler, classes, seed=0))
    scores = DigitClassifier(*digits).score(drawn, classes)
    assert scores.ink == pytest.approx(-0.39, abs=0.03)
    assert scores.agreement >= 0.97


def test_the_shipped_schedule_is_stable_diffusions() -> None:
    _, scheduler = load_base()
    timesteps = torch.arange(20, 1000)
    shipped = NoiseSchedule.from_scheduler(scheduler).ratio_scale(timesteps)
    torch.testing.assert_close(shipped, NoiseSchedule.discrete().ratio_scale(timesteps), rtol=1e-4, atol=0.0)


def test_the_script_that_made_it_writes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_base.main(["--output", str(tmp_path / "base"), "--steps", "2"]) == 0
    assert "702,625 parameters, held-out noise loss" in capsys.readouterr().out
    written = {str(path.relative_to(tmp_path / "base")) for path in (tmp_path / "base").rglob("*.*")}
    assert written == {str(path.relative_to(BASE)) for path in BASE.rglob("*.*")}
    assert UNet2DModel.from_pretrained(tmp_path / "base").num_parameters() == 702_625
    with pytest.raises(SystemExit) as caught:
        train_base.main(["--output", str(tmp_path), "--steps", "0"])
    assert caught.value.code == 2 and "--steps is 0, expected at least 1" in capsys.readouterr().err


# ---------------------------------------------------------------- what is measured


def test_the_judge_counts_what_it_reads(digits: tuple[Digits, Digits]) -> None:
    judge = DigitClassifier(*digits)
    assert judge.accuracy == pytest.approx(0.983, abs=0.01)
    images, labels = digits[1]
    # Asked for the wrong digit, it agrees exactly where it errs in that direction: hardly ever.
    assert judge.score(images, labels).agreement == judge.accuracy
    assert judge.score(images, (labels + 1) % CLASSES).agreement < 0.02
    assert judge.score(torch.ones(10, 1, 8, 8), torch.arange(10)) == (1.0, pytest.approx(0.1))


def test_weights_by_timestep_are_the_references(digits: tuple[Digits, Digits]) -> None:
    model, scheduler = load_base()
    loss_fn = SIPOLoss(scheduler)
    pairs = InkPairs(digits[0], seed=0)
    timesteps = torch.tensor([10, 30, 55, 80, 400])
    weights = weight_by_timestep(model, model, loss_fn, pairs, timesteps, seed=0, count=64)
    assert weights[0].item() == 0.0  # terminal: t' < 0
    assert weights[2].item() == pytest.approx(0.9, abs=0.04)  # docs/math.md §3: crosses there
    assert torch.equal(weights, weights.sort().values)

    items = [pairs[i] for i in range(64)]
    images = torch.stack([item[name] for name in ("chosen", "rejected") for item in items])
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    levels = torch.full((128,), 80)
    classes = torch.stack([item["condition"] for item in items]).repeat(2)
    with torch.no_grad():
        predicted = predict(model, scheduler.add_noise(images, noise, levels), levels, classes)
    errors = (predicted.double() - noise.double()).square().mean(dim=(1, 2, 3))
    # §3: SNR = ᾱ / (1 − ᾱ), the previous level 1000 // 50 steps below.
    snr = [float(a / (1 - a)) for a in scheduler.alphas_cumprod.double()[[60, 80]]]
    expected = torch.exp(-0.5 * (snr[0] / snr[1] - 1) * errors).mean()
    assert weights[3].item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------- end to end


def test_the_outputs_are_there_and_nothing_else(outcome: Outcome) -> None:
    files = {str(path.relative_to(outcome.folder)) for path in outcome.folder.rglob("*") if path.is_file()}
    model = {"model/config.json", "model/diffusion_pytorch_model.safetensors"}
    assert files == {"demo.png", "metrics.jsonl", "timesteps.jsonl", "summary.json"} | model


def test_held_out_pairs_are_measured_at_the_end(outcome: Outcome) -> None:
    (line,) = read_metrics(outcome.folder / "metrics.jsonl", "validation")
    assert line["step"] == 10 and line["validation/pairs"] == 256
    assert 0 < line["validation/loss"] < line["validation/active_fraction"]
    assert line["validation/no_preference_loss"] == pytest.approx(line["validation/active_fraction"] * math.log(2))


def test_the_summary_agrees_with_the_log(outcome: Outcome) -> None:
    summary = outcome.summary
    assert json.loads((outcome.folder / "summary.json").read_text()) == summary
    lines = read_metrics(outcome.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 10]
    for name in ("active_fraction", "rewards/accuracies"):
        assert summary[name] == step_mean(lines, name)
    assert summary["active_fraction"] == pytest.approx(
        (lines[0]["active_fraction"] + 9 * lines[1]["active_fraction"]) / 10
    )
    # The policy starts as the reference (docs/math.md §8), in another of torch's attention kernels.
    assert lines[0]["loss"] == pytest.approx(lines[0]["active_fraction"] * math.log(2), rel=1e-5)
    assert abs(lines[0]["rewards/margins"]) < 1e-4
    assert (summary["method"], summary["beta"], summary["steps"], summary["seed"]) == ("sipo", 1000.0, 10, 3)
    assert summary["before"]["ink"] == pytest.approx(-0.39, abs=0.04)
    assert summary["after"]["ink"] > summary["before"]["ink"]


def test_the_saved_model_is_the_one_that_was_scored(outcome: Outcome, digits: tuple[Digits, Digits]) -> None:
    model = UNet2DModel.from_pretrained(outcome.folder / "model").eval()
    base, scheduler = load_base()
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    classes = torch.arange(SMALL["samples"]) % CLASSES
    scores = DigitClassifier(*digits).score(sample(model, scheduler, classes, SMALL["seed"]), classes)
    assert scores._asdict() == pytest.approx(outcome.summary["after"], abs=1e-6)
    timesteps = torch.tensor(outcome.summary["weights"]["timesteps"])
    pairs = InkPairs(digits[0], seed=SMALL["seed"])
    weights = weight_by_timestep(model, base, SIPOLoss(scheduler), pairs, timesteps[-3:], SMALL["seed"])
    assert weights.tolist() == pytest.approx(outcome.summary["weights"]["aligned"][-3:], rel=1e-6)


def test_a_second_run_gives_the_same_numbers_and_replaces_the_first_and_nothing_else(
    outcome: Outcome, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(outcome.folder, folder)
    for name in ("demo.png", "metrics.jsonl", "timesteps.jsonl", "model/diffusion_pytorch_model.safetensors"):
        (folder / name).write_text("of an earlier one\n")
    torch.manual_seed(12345)  # nothing may hang on the state that a process happens to be in
    again = run_demo(DemoConfig(output=folder, **SMALL), progress=False)
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in outcome.summary.items() if k != "seconds"
    }
    for name in ("model/diffusion_pytorch_model.safetensors", "demo.png"):
        assert (folder / name).read_bytes() == (outcome.folder / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in outcome.folder.iterdir()}
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 10]
    assert json.loads((folder / "summary.json").read_text()) == again
    (folder / "config.yaml").touch()  # a run of `sipo train`
    with pytest.raises(ValueError, match=r"again' holds more than a demo \(config.yaml, demo.png, .*another folder"):
        DemoConfig(output=folder)


def test_the_picture_is_drawn(outcome: Outcome) -> None:
    from PIL import Image

    with Image.open(outcome.folder / "demo.png") as picture:
        assert picture.size == (1690, 1144)
        pixels = torch.from_numpy(np.array(picture.convert("L"))).float()
    # Text, two sheets of digits in the upper half and curves in the lower: ink everywhere, paper between.
    assert 0.6 < (pixels > 250).float().mean().item() < 0.95
    for rows, columns in ((slice(230, 560), slice(60, 560)), (slice(730, 1060), slice(110, 540))):
        assert (pixels[rows, columns] < 128).float().mean().item() > 0.003
    sheets = [(pixels[230:560, columns] < 128).float().mean().item() for columns in (slice(60, 560), slice(600, 1110))]
    assert min(sheets) > 0.15


def test_the_picture_says_what_is_chosen_and_what_the_scores_are_over() -> None:
    from matplotlib.figure import Figure

    figure, scores = Figure(), SimpleNamespace(ink=-0.25, agreement=0.96)
    result = {"before_scores": scores, "after_scores": scores, "method": "sipo", "beta": 20.0, "steps": 3}
    _title(figure, SimpleNamespace(**result, classes=[0] * 50))  # type: ignore[arg-type]
    expected = "of two scans of one digit, the one with more ink is chosen. Scores are over 50 samples."
    assert figure.texts[1].get_text().endswith(expected)


def test_the_closing_lines_state_the_numbers(outcome: Outcome) -> None:
    summary = outcome.summary
    text = describe(summary, outcome.folder)
    assert 4 <= len(text.splitlines()) <= 6
    assert f"mean ink             {summary['before']['ink']:+.3f} -> {summary['after']['ink']:+.3f}" in text
    assert f"{summary['before']['agreement']:.1%} -> {summary['after']['agreement']:.1%}" in text
    assert f"right on {summary['judge_accuracy']:.1%} of held-out real digits" in text
    assert f"mean active fraction {summary['active_fraction']:.1%}" in text
    assert str(outcome.folder) in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"seed": -1}, "seed=-1: expected at least 0"),
        ({"samples": 25}, "samples=25: expected a positive multiple of 10"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: expected a finite number > 0"),
        ({"method": "ppo"}, "method='ppo': expected one of diffusion_dpo, dpo_cm, sipo, sdpo"),
        ({"beta": -5.0}, "beta=-5.0: expected a finite number > 0"),
        ({"device": "tpu"}, "device='tpu': expected one of cpu, cuda"),
        ({"output": Path(__file__)}, "output='.*test_demo.py' is a file, expected a folder"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        DemoConfig(**options)


def test_a_damaged_base_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    monkeypatch.setattr("sipo.demo.model.BASE", base)
    weights = base / "diffusion_pytorch_model.safetensors"
    sound = weights.read_bytes()
    for content, message in ((sound[:-1], "not a sound safetensors file"), (b"\x80\x04.", "is a pickle, which is not")):
        weights.write_bytes(content)
        with pytest.raises(FileError, match=f"^{weights}: {message}"):
            load_base()
