"""Trackers: what they are given, and that one that fails does not stop training."""

from __future__ import annotations

import io
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker
from PIL import Image

from sipo.data.media import write_video
from sipo.training import TrainingConfig, TrainingWarning
from sipo.training.trackers import (
    check_trackers,
    finish_trackers,
    log_clips,
    log_images,
    running_trackers,
    start_trackers,
)
from tests.training_cases import Pairs, events_in, fit, settings


class Keeping(GeneralTracker):
    """Keeps what it is given, and raises from then on where it is told to."""

    requires_logging_directory = False

    def __init__(self, name: str = "keeping", broken: bool = False) -> None:
        self.name = name
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, Any]]] = []
        self.broken = broken
        self.finished = False

    @property
    def tracker(self) -> Any:
        return self.lines

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self.broken:
            raise ConnectionError("the service is\ngone")
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished = True


class KeepingImages(Keeping):
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.log(values, step)


def test_trackers_are_accelerates_and_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="report_to='wandbb': expected one of aim, "):
        fit(tmp_path, report_to=("tensorboard", "wandbb"))
    monkeypatch.setattr("accelerate.tracking._available_trackers", ["tensorboard"])
    with pytest.raises(ImportError, match="report_to='wandb': not installed, expected `pip install wandb`"):
        fit(tmp_path, report_to="wandb")


def test_a_tracker_of_the_callers_sees_every_number_and_stays_open(tmp_path: Path) -> None:
    tracker = Keeping()
    accelerator = Accelerator(cpu=True, log_with=[tracker])
    accelerator.init_trackers("own")
    _, result = fit(tmp_path, accelerator=accelerator, max_train_steps=2, validation_steps=2, validation=Pairs(4))
    assert [step for step, _ in tracker.lines] == [1, 2, 2]
    assert tracker.lines[1][1]["train/loss"] == result.history[1]["loss"]
    assert tracker.lines[2][1]["validation/rewards/accuracies"] == result.validation[0]["validation/rewards/accuracies"]
    assert accelerator.trackers == [tracker] and not tracker.finished


@pytest.mark.parametrize("report_to", ["none", [], ["none"]])
def test_none_is_no_tracker(tmp_path: Path, report_to: Any) -> None:
    fit(tmp_path, report_to=report_to)
    assert not (tmp_path / "tensorboard").exists()


def test_all_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", ["tensorboard", "aim"])
    for given in ("all", ["all"]):
        assert check_trackers(TrainingConfig(1, "o", report_to=given)) == ["tensorboard", "aim"]
    with pytest.raises(ValueError, match=r"report_to='all': expected one of aim, .*, or .all. or .none. alone"):
        check_trackers(TrainingConfig(1, "o", report_to=["all", "wandb"]))


def test_tensorboard_is_left_out_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    _, result = fit(tmp_path, report_to=["tensorboard"])
    assert result.steps == 4 and not (tmp_path / "tensorboard").exists()


def test_a_tracker_that_fails_does_not_stop_training(tmp_path: Path) -> None:
    broken, sound = Keeping("broken", broken=True), Keeping("sound")
    accelerator = Accelerator(cpu=True, log_with=[broken, sound])
    accelerator.init_trackers("own")
    with pytest.warns(TrainingWarning) as caught:
        _, result = fit(tmp_path, accelerator=accelerator)
    text = "tracker 'broken' failed, the run continues: ConnectionError: the service is gone"
    assert {str(warning.message) for warning in caught} == {text}
    assert [step for step, _ in sound.lines] == [1, 2, 3, 4] == [line["step"] for line in result.history]


# ---------------------------------------------------------------- samples


def images(count: int = 2) -> list[tuple[str, np.ndarray[Any, Any]]]:
    generator = np.random.default_rng(1)
    return [(f"a cat, {number}", generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)) for number in range(count)]


def clips(folder: Path) -> list[tuple[str, Path]]:
    """Two clips of one grey each, four frames of it."""
    made = []
    for number, grey in enumerate((40, 200)):
        path = folder / f"clip-{number}.mp4"
        write_video(path, torch.full((4, 3, 16, 32), grey, dtype=torch.uint8), fps=8)
        made.append((f"a grey, {number}", path))
    return made


def test_tensorboard_has_images_and_clips(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accelerator, config = Accelerator(cpu=True), settings(tmp_path, report_to="tensorboard")
    with running_trackers(accelerator, config):
        assert [type(tracker) for tracker in accelerator.trackers] == [TensorBoardTracker]
        with warnings.catch_warnings():
            warnings.simplefilter("error", TrainingWarning)
            log_images(accelerator, 0, images())
            log_images(accelerator, 7, images())
            log_clips(accelerator, 7, clips(tmp_path))
    assert accelerator.trackers == []
    events = events_in(tmp_path)
    assert sorted(events.Tags()["images"]) == [
        *("samples/0 a cat, 0", "samples/0 a grey, 0", "samples/1 a cat, 1", "samples/1 a grey, 1")
    ]
    first, second = events.Images("samples/1 a cat, 1")
    assert (first.step, second.step) == (0, 7)
    shown = np.asarray(Image.open(io.BytesIO(second.encoded_image_string)))
    assert np.array_equal(shown, images()[1][1])
    for number, grey in enumerate((40, 200)):
        (event,) = events.Images(f"samples/{number} a grey, {number}")
        assert (event.step, event.width, event.height) == (7, 32, 16)
        with Image.open(io.BytesIO(event.encoded_image_string)) as gif:
            # Frames that are alike are one in a GIF, for as long as all of them.
            assert gif.format == "GIF" and gif.info["duration"] * getattr(gif, "n_frames", 1) == 4 * 125
            assert abs(int(np.asarray(gif.convert("RGB")).mean()) - grey) <= 3


@pytest.mark.parametrize(("first", "kept"), [(0, []), (3, [0])])
def test_events_that_a_run_writes_again_are_no_longer_shown(tmp_path: Path, first: int, kept: list[int]) -> None:
    """All of them where a run starts, and those after the checkpoint where it is resumed."""
    pytest.importorskip("tensorboard")
    accelerator, config = Accelerator(cpu=True), settings(tmp_path, report_to="tensorboard")
    with running_trackers(accelerator, config):
        log_images(accelerator, 0, images(1))
        log_images(accelerator, 4, images(1))
    # TensorBoard reads event files in the order of their names, which have whole seconds: two runs differ in them.
    time.sleep(1.01 - time.time() % 1)
    finish_trackers(accelerator, start_trackers(accelerator, config, first))
    shown = [e for tag in events_in(tmp_path).Tags()["images"] for e in events_in(tmp_path).Images(tag)]
    assert [event.step for event in shown] == kept


def test_wandb_has_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(name: str) -> Any:
        return lambda data, **options: (name, data, options)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Image=kind("image"), Video=kind("video")))
    tracker, accelerator = KeepingImages("wandb"), types.SimpleNamespace()
    accelerator.trackers = [tracker]
    shown, moving = images(), clips(tmp_path)
    log_images(accelerator, 3, shown)
    log_clips(accelerator, 4, moving)
    assert tracker.lines == [
        (3, {"samples": [("image", image, {"caption": prompt}) for prompt, image in shown]}),
        (4, {"samples": [("video", str(path), {"caption": prompt, "format": "mp4"}) for prompt, path in moving]}),
    ]


def test_other_trackers_have_images_where_they_take_them(tmp_path: Path) -> None:
    trackers = [KeepingImages("swanlab"), KeepingImages("clearml"), Keeping("plain"), KeepingImages("broken", True)]
    accelerator = types.SimpleNamespace(trackers=trackers)
    ((prompt, image),) = images(1)
    with pytest.warns(TrainingWarning, match="tracker 'broken' failed, the run continues: ConnectionError"):
        log_images(accelerator, 3, [(prompt, image)])
    log_clips(accelerator, 3, clips(tmp_path))
    listed, alone, plain, _ = (tracker.lines for tracker in trackers)
    assert listed == [(3, {"samples/0 a cat, 0": [image]})]
    assert alone == [(3, {"samples/0 a cat, 0": image})]
    assert plain == []
