"""Checkpoints: a run that goes on from one repeats an uninterrupted one, whatever killed it or spoilt its files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

import sipo.recipe.train
from sipo import NoiseSchedule, SIPOLoss
from sipo.processes import OtherProcessError
from sipo.training import CheckpointError, TrainingWarning, checkpoint, loop, storage, timesteps
from sipo.training.log import check_logs, set_aside_logs
from sipo.training.log_reader import read_metrics
from sipo.training.run_folder import earlier_run
from tests.data_sets import flip_bit
from tests.small_family import in_processes, outcomes_in_processes
from tests.training_cases import Pairs, fit, loss, networks, same, settings, untimed

# Everything that a checkpoint may hold: dropout, accumulation, an augmenting data set, a moving average, a schedule,
# statistics of timesteps, validation, and checkpoints between two log lines.
FULL: dict[str, Any] = {
    "max_train_steps": 11,
    "logging_steps": 4,
    "checkpointing_steps": 5,
    "gradient_accumulation_steps": 2,
    "dropout": 0.3,
    "lr_warmup_steps": 3,
    "lr_scheduler": "cosine",
    "use_ema": True,
    "ema_decay": 0.9,
    "timestep_sampling": "informative",
    "skip_inactive": True,
    "validation_steps": 3,
}


def full(folder: Path, **options: Any) -> tuple[Any, Any]:
    options = (
        FULL | {"data": Pairs(augment=True), "validation": Pairs(5), "loss_fn": loss(mask_threshold=0.9)} | options
    )
    return fit(folder, **options)


@pytest.fixture(autouse=True)
def few_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few pairs are enough for statistics."""
    monkeypatch.setattr(timesteps, "BINS", 5)


# ---------------------------------------------------------------- resuming


def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    random.seed(5)
    np.random.seed(5)
    straight, whole = full(tmp_path / "a")

    random.seed(77)  # as another process has it: the run's own seed is what counts
    np.random.seed(77)
    folder = tmp_path / "b"
    # In the ninth step: its log line of step 8 and the validation of step 6 are there already.
    with pytest.raises(KeyboardInterrupt):
        full(folder, data=Pairs(augment=True, fail_after=8 * 8 + 3))
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 4, 8]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    resumed, rest = full(folder, resume_from="latest")

    assert same(straight, resumed)
    assert [line["step"] for line in rest.history] == [8, 11]
    assert whole.history[-1]["timestep_share"] < 1 < sum(line["skipped_passes"] for line in whole.history)
    assert [line["step"] for line in rest.validation] == [6, 9, 11]
    assert (folder / "timesteps.jsonl").read_bytes() == (tmp_path / "a/timesteps.jsonl").read_bytes() != b""
    for kind, lines in (("training", whole.history), ("validation", whole.validation)):
        assert untimed(read_metrics(folder / "metrics.jsonl", kind)) == untimed(lines)
    assert all(torch.equal(rest.ema[name], whole.ema[name]) for name in whole.ema)
    names = sorted(path.name for path in (tmp_path / "a/checkpoints/step-00000011").iterdir())
    assert len(names) == 5
    for name in names:
        paths = [tmp_path / run / "checkpoints" / "step-00000011" / name for run in "ab"]
        assert paths[0].read_bytes() == paths[1].read_bytes(), name


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    # Step 5 has a log line in the shorter run alone: what is drawn after it must not hang on that.
    options: dict[str, Any] = {
        "timestep_sampling": "informative",
        "logging_steps": 4,
        "train_batch_size": 12,
        "learning_rate": 1e-3,
        "loss_fn": loss(mask_threshold=0.9),
    }
    straight, whole = fit(tmp_path / "a", max_train_steps=11, **options)
    fit(tmp_path / "b", max_train_steps=5, checkpointing_steps=5, **options)
    longer, result = fit(
        tmp_path / "b", max_train_steps=11, resume_from=tmp_path / "b/checkpoints/step-00000005", **options
    )
    assert same(straight, longer)
    assert [line["step"] for line in result.history] == [8, 11]
    shares = [line["timestep_share"] for line in whole.history]
    assert 1 > shares[1] != shares[2]  # statistics were at work, and moved
    with pytest.raises(CheckpointError, match="made with logging_steps=4, expected this run's 2"):
        fit(tmp_path / "b", max_train_steps=12, resume_from="latest", **(options | {"logging_steps": 2}))


def test_a_falling_learning_rate_fixes_the_number_of_steps(tmp_path: Path) -> None:
    fit(tmp_path, max_train_steps=4, checkpointing_steps=2, lr_scheduler="linear")
    with pytest.raises(CheckpointError, match="made with max_train_steps=4, expected this run's 6"):
        fit(tmp_path, max_train_steps=6, lr_scheduler="linear", resume_from="latest")


def test_checkpoints_hold_no_pickle_and_the_oldest_go(tmp_path: Path) -> None:
    _, result = fit(tmp_path, max_train_steps=8, checkpointing_steps=2, checkpoints_total_limit=2)
    root = tmp_path / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["step-00000006", "step-00000008"]
    assert result.checkpoint == root / "step-00000008"
    names = sorted(path.name for path in result.checkpoint.iterdir())
    assert names == ["model.safetensors", "optimizer.safetensors", "process-00000.safetensors", "state.json"]
    state = json.loads((result.checkpoint / "state.json").read_text())
    assert state["step"] == 8
    assert sorted(state["files"]) == names[:3]
    assert state["files"]["model.safetensors"]["bytes"] == (result.checkpoint / names[0]).stat().st_size


def test_a_checkpoint_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    replace = os.replace

    def renamed(source: Any, target: Any) -> None:
        done.append(f"-> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    monkeypatch.setattr(os, "replace", renamed)
    fit(tmp_path, max_train_steps=2, checkpointing_steps=2)
    place = done.index("-> step-00000002")
    files = [path.name for path in (tmp_path / "checkpoints/step-00000002").iterdir()]
    last_written = max(done.index(f"-> {name}") for name in files)
    assert sorted(done[last_written + 1 : place]) == sorted([*files, ".step-00000002.tmp"])
    assert {tmp_path.name, tmp_path.parent.name} <= {*done[:place]}  # the folder's own name, and the run's
    assert done[place - 1] == ".step-00000002.tmp" and done[place + 1] == "checkpoints"


def test_only_what_is_trained_is_saved(tmp_path: Path) -> None:
    policy, _ = networks()
    policy.inward.requires_grad_(False)
    frozen = policy.inward.weight.clone()
    _, result = fit(tmp_path, policy=policy, checkpointing_steps=4, use_ema=True, ema_decay=0.99)
    assert result.checkpoint is not None and result.ema is not None
    saved = load_file(result.checkpoint / "model.safetensors")
    averaged = load_file(result.checkpoint / "ema.safetensors")
    assert (
        sorted(saved) == sorted(averaged) == sorted(result.ema) == ["classes.weight", "outward.bias", "outward.weight"]
    )
    assert torch.equal(saved["outward.weight"], policy.outward.weight.detach())
    assert torch.equal(averaged["outward.weight"], result.ema["outward.weight"])
    assert torch.equal(policy.inward.weight, frozen)


# ---------------------------------------------------------------- what is damaged, and what does not fit


def _forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a state and its hash along with it."""
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    change(state)
    (folder / "state.json").write_text(json.dumps(state | {"sha256": storage._digest(state)}))


def _instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in the place of state.json."""

    def spoil(folder: Path) -> None:
        (folder / "state.json").unlink()
        make(folder / "state.json")

    return spoil


def _escape(state: dict[str, Any]) -> None:
    state["files"]["../step-00000002/model.safetensors"] = {"bytes": 1, "sha256": ""}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        r"model.safetensors has \d+ bytes, expected \d+",
    ),
    "flipped": (
        lambda f: flip_bit(f / "process-00000.safetensors"),
        "process-00000.safetensors does not have the SHA-256 that state.json states",
    ),
    "no JSON": (lambda f: (f / "state.json").write_text("{"), "state.json: not JSON"),
    "empty": (lambda f: (f / "state.json").write_text(""), "state.json: not JSON"),
    "no state": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "format": (
        lambda f: (f / "state.json").write_text(json.dumps(json.loads((f / "state.json").read_text()) | {"format": 9})),
        "state.json: format 9, expected 3",
    ),
    "edited": (
        lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace('"lr": 0.01', '"lr": 0.02')),
        "state.json does not have the SHA-256 that it states",
    ),
    "nested": (lambda f: (f / "state.json").write_text('{"a":' * 100_000), "state.json: nested too deeply"),
    "null": (lambda f: (f / "state.json").write_text("null"), "state.json: holds NoneType, expected a JSON object"),
    "digits": (lambda f: (f / "state.json").write_text(f'{{"a": {"9" * 5000}}}'), "state.json: not JSON"),
    "no UTF-8": (lambda f: (f / "state.json").write_bytes(b'{"a": "\xff"}'), r"state.json: not UTF-8 \(byte 7\)"),
    "folder": (_instead(Path.mkdir), "state.json: is a folder, expected a file"),
    "FIFO": (_instead(os.mkfifo), "state.json: is a FIFO, expected a file"),
    "device": (_instead(lambda path: path.symlink_to("/dev/zero")), "state.json: is a device, expected a file"),
    "FIFO of tensors": (
        lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
        "model.safetensors: is a FIFO, expected a file",
    ),
    "no files": (
        lambda f: _forge(f, lambda state: state.pop("files")),
        "state.json: files=None, expected the bytes and",
    ),
    "files of null": (
        lambda f: _forge(f, lambda state: state["files"].update({"ema.safetensors": None})),
        r"state.json: files=\{'model.safetensors': .*…, expected the bytes and SHA-256 of each file by its name",
    ),
    "files elsewhere": (lambda f: _forge(f, _escape), r"state.json: files=\{.*…, expected the bytes and SHA-256"),
    "deep": (
        lambda f: (f / "state.json").write_text(f'{{"format": 3, "a": {"[" * 900}{"]" * 900}}}'),
        r"state.json(: nested too deeply| does not have)",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, what: str) -> None:
    straight, _ = fit(tmp_path / "a", max_train_steps=5)
    fit(tmp_path / "b", max_train_steps=4, checkpointing_steps=2)
    spoil, message = DAMAGE[what]
    newest = tmp_path / "b/checkpoints/step-00000004"
    before = (newest / "state.json").read_bytes()
    spoil(newest)
    state = newest / "state.json"
    tensors = ("missing", "cut", "flipped", "FIFO of tensors")
    assert what in tensors or not state.is_file() or state.read_bytes() != before

    with pytest.raises(CheckpointError, match=f"step-00000004: damaged, {message}") as caught:
        if state.is_file():
            fit(tmp_path / "b", max_train_steps=5, resume_from=newest)
        else:  # then it is not to be told from a folder of something else
            raise CheckpointError(f"{newest}: damaged, {storage.damage(newest)}")
    assert "\n" not in str(caught.value)
    with pytest.warns(TrainingWarning, match=rf"step-00000004: damaged, {message}.*; resuming from .*step-00000002"):
        policy, result = fit(tmp_path / "b", max_train_steps=5, resume_from="latest", checkpointing_steps=2)
    assert [line["step"] for line in result.history] == [3, 4, 5]
    assert same(straight, policy)
    assert not storage.damage(newest)  # the run has been there again


def test_where_all_are_damaged_each_is_named(tmp_path: Path) -> None:
    fit(tmp_path, max_train_steps=4, checkpointing_steps=2)
    for step in (2, 4):
        (tmp_path / f"checkpoints/step-0000000{step}/model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"step-00000004: damaged, .*; .*step-00000002: damaged, .*model.*missing"
    ):
        fit(tmp_path, max_train_steps=5, resume_from="latest")


def test_a_sound_checkpoint_is_not_thrown_out_for_a_later_damaged_one(tmp_path: Path) -> None:
    fit(tmp_path, max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=2)
    (tmp_path / "checkpoints/step-00000006/model.safetensors").unlink()
    with pytest.warns(TrainingWarning), pytest.raises(KeyboardInterrupt):
        # Stops in the sixth step: the checkpoint of step 5 is all that it adds, and all that it may keep.
        data = Pairs(fail_after=7)
        fit(
            tmp_path,
            data=data,
            max_train_steps=6,
            resume_from="latest",
            checkpointing_steps=5,
            checkpoints_total_limit=1,
        )
    assert [path.name for path in storage.list_checkpoints(tmp_path / "checkpoints")] == [
        "step-00000005",
        "step-00000006",
    ]
    assert not storage.damage(tmp_path / "checkpoints/step-00000005")


def test_what_killed_runs_have_left_is_gone_when_the_next_one_starts(tmp_path: Path) -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    fit(tmp_path, max_train_steps=2, checkpointing_steps=2)
    before = sorted(tmp_path.rglob("*"))
    for left in (f".metrics.jsonl.{dead}.tmp", f"weights/.unet.{dead}.tmp", "checkpoints/.step-00000004.tmp"):
        (tmp_path / left).mkdir(parents=True)
        (tmp_path / left / "model.safetensors").touch()
    (tmp_path / "checkpoints/.step-00000002.old").mkdir()
    (tmp_path / ".lock").write_text("")  # as a process that was killed while it took the lock
    fit(tmp_path, max_train_steps=2, checkpointing_steps=2, resume_from="latest")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "weights"])


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_nothing(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path)) if named else OSError(f"{path}: cannot be written")

    monkeypatch.setattr(storage, "save_tensors", full)
    with pytest.raises(OSError, match="step-00000005") as caught:
        storage.write(
            tmp_path,
            5,
            shared={"a.safetensors": {}},
            own=lambda folder: None,
            state={},
            keep=1,
            accelerator=Accelerator(cpu=True),
        )
    assert str(tmp_path / "step-00000005" / "a.safetensors") in str(caught.value) and ".tmp" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [] and (not named or caught.value.errno == 28)


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_run_killed_while_it_replaces_its_only_checkpoint_keeps_one(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, accelerator = tmp_path / "run" / "checkpoints", Accelerator(cpu=True)
    options: dict[str, Any] = {"own": lambda folder: None, "keep": 1, "accelerator": accelerator}

    def write(number: float) -> None:
        shared = {"model.safetensors": {"a": torch.full((2,), number)}}
        storage.write(root, 5, shared=shared, state={}, **options)

    class Killed(BaseException):
        pass

    write(1.0)
    calls = []
    for name in ("replace", "remove"):
        module = os if name == "replace" else storage
        original = getattr(module, name)

        def step(*places: Any, real: Callable[..., Any] = original) -> None:
            if any(Path(place).parent == root for place in places):
                calls.append(places)
                if len(calls) == killed_at:
                    raise Killed
            real(*places)

        monkeypatch.setattr(module, name, step)
    with pytest.raises(Killed):
        write(2.0)
    monkeypatch.undo()
    assert sipo.recipe.train._check_folder(settings(tmp_path / "run"), resume=True)
    assert [path.name for path in root.iterdir()] == ["step-00000005"]
    assert not storage.damage(root / "step-00000005")
    held = load_file(root / "step-00000005" / "model.safetensors")["a"]
    assert held.tolist() == [2.0, 2.0] if killed_at == 3 else [1.0, 1.0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("model", r"'outward.weight' is \[1, 6, 3, 3\] in the checkpoint, \[1, 6, 1, 1\] in the policy"),
        ("names", r"'extra' is in the policy and not in the checkpoint"),
        ("seed", r"made with seed=0, expected this run's 1"),
        ("data", r"made with dataset_length=24, expected this run's 20"),
        ("loss", r"step-00000002: made with loss\.beta=50\.0, expected this run's 51\.0$"),
        ("schedule", r"made with loss\.schedule\.alphas_cumprod='sha256:\w+', expected this run's 'sha256:\w+'$"),
        ("steps", r"steps=1: the checkpoint has 2 already, expected at least as many"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, what: str, message: str) -> None:
    fit(tmp_path, max_train_steps=2, checkpointing_steps=2)
    policy, _ = networks()
    if what == "model":
        policy.outward = nn.Conv2d(6, 1, 1)
    elif what == "names":
        policy.extra = nn.Parameter(torch.zeros(1))
    other: dict[str, Any] = {"seed": {"seed": 1}, "data": {"data": Pairs(20)}, "loss": {"loss_fn": loss(beta=51.0)}}
    other["schedule"] = {"loss_fn": SIPOLoss(NoiseSchedule.discrete(beta_end=0.02), beta=50.0, mask_threshold=0.0)}
    other = other.get(what, {})
    options: dict[str, Any] = {"max_train_steps": 1 if what == "steps" else 3} | other
    with pytest.raises(ValueError, match=message) as caught:
        fit(tmp_path, policy=policy, resume_from="latest", **options)
    assert "\n" not in str(caught.value)


def test_settings_have_the_configurations_names_and_a_default_its_own(tmp_path: Path) -> None:
    fit(tmp_path, max_train_steps=2, checkpointing_steps=2, loss_fn=loss(beta=None))
    default = r"made with loss\.beta=the method's own default, expected this run's 51\.0$"
    with pytest.raises(CheckpointError, match=default):
        fit(tmp_path, max_train_steps=3, resume_from="latest", loss_fn=loss(beta=51.0))
    with (
        pytest.raises(CheckpointError, match=r": made with training\.seed=0, expected"),
        sipo.recipe.train._naming_sections(),
    ):
        fit(tmp_path, max_train_steps=3, resume_from="latest", loss_fn=loss(beta=None), seed=1)
    with (
        pytest.raises(CheckpointError, match=r": made with dataset_length=24, expected"),
        sipo.recipe.train._naming_sections(),
    ):
        fit(tmp_path, max_train_steps=3, resume_from="latest", loss_fn=loss(beta=None), data=Pairs(20))
    with (
        pytest.raises(ValueError, match=r"^training\.max_train_steps=1: the checkpoint has 2 already, expected"),
        sipo.recipe.train._naming_sections(),
    ):
        fit(tmp_path, max_train_steps=1, resume_from="latest", loss_fn=loss(beta=None))


def test_a_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    """What was stopped after its last checkpoint and before its weights were saved still gets there."""
    whole, _ = networks()
    fit(tmp_path, policy=whole, max_train_steps=4, checkpointing_steps=2)
    log = (tmp_path / "metrics.jsonl").read_text()
    policy, _ = networks()
    _, result = fit(tmp_path, policy=policy, max_train_steps=4, checkpointing_steps=2, resume_from="latest")
    assert result.steps == 4 and result.history == []
    assert (tmp_path / "metrics.jsonl").read_text() == log
    for name, tensor in whole.state_dict().items():
        assert torch.equal(policy.state_dict()[name], tensor), name


def test_an_absent_checkpoint_and_a_used_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"resume_from='latest': no checkpoint in .*checkpoints"):
        fit(tmp_path, resume_from="latest")
    with pytest.raises(CheckpointError, match=r"resume_from='.*nowhere': no checkpoint there"):
        fit(tmp_path, resume_from=str(tmp_path / "nowhere"))
    fit(tmp_path, checkpointing_steps=4)
    held = r"output_dir='.*' holds a run already \(%s\), expected resume_from or another output_dir"
    with pytest.raises(ValueError, match=held % r"checkpoints/step-00000004, metrics\.jsonl"):
        fit(tmp_path)


@pytest.mark.parametrize("left", ["metrics.jsonl", "weights"])
def test_a_run_without_checkpoints_is_not_replaced_either(left: str, tmp_path: Path) -> None:
    fit(tmp_path, checkpointing_steps=0)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    if left == "weights":
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "weights").mkdir()
    with pytest.raises(ValueError, match=rf"holds a run already \({left}\), expected another output_dir$"):
        fit(tmp_path, checkpointing_steps=0)
    assert left == "weights" or (tmp_path / "metrics.jsonl").read_bytes() == log


def test_the_main_process_says_what_a_folder_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network folder another process may still see what was removed, or not yet see what was written."""
    fit(tmp_path / "there", checkpointing_steps=4)
    sound, me = tmp_path / "there" / "checkpoints", threading.local()
    listed = storage.list_checkpoints

    def ranked(function: Callable[..., Any]) -> Callable[[Any], Any]:
        def call(accelerator: Any) -> Any:
            me.rank = accelerator.process_index
            return function(accelerator)

        return call

    # The second process lacks what is there, and has what is not.
    monkeypatch.setattr(storage, "list_checkpoints", lambda root: listed(root) if me.rank == 0 else [])
    chosen = in_processes(2, ranked(lambda one: storage.choose_checkpoint("latest", sound, one)))
    assert chosen == [sound / "step-00000004"] * 2

    class Reached(Exception):  # noqa: N818
        pass

    def reached(*args: Any, **options: Any) -> Any:
        raise Reached(str(options.get("resume")))

    def start(accelerator: Any) -> None:
        fit(tmp_path, accelerator=accelerator)

    monkeypatch.setattr(loop, "check_setup", lambda *_: None)
    monkeypatch.setattr(loop, "PairForward", reached)
    monkeypatch.setattr(storage, "list_checkpoints", lambda root: [] if me.rank == 0 else [root / "step-00000001"])
    assert [type(outcome) for outcome in outcomes_in_processes(2, ranked(start))] == [Reached, Reached]

    monkeypatch.setattr(sipo.recipe.train, "_check_folder", lambda *_: me.rank == 0)
    monkeypatch.setattr(sipo.recipe.train, "open_run", lambda *_: None)
    monkeypatch.setattr(sipo.recipe.train, "check_run", reached)
    config = SimpleNamespace(training=settings(tmp_path))
    run = ranked(lambda one: sipo.recipe.train.run_training(config, accelerator=one))  # type: ignore[arg-type]
    assert [str(outcome) for outcome in outcomes_in_processes(2, run)] == ["True", "True"]


def test_leftovers_that_cannot_be_removed_end_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "check_setup", lambda *_: None)
    monkeypatch.setattr(storage, "clear", Mock(side_effect=PermissionError(13, "Permission denied")))
    outcomes = outcomes_in_processes(2, lambda one: fit(tmp_path, accelerator=one))
    assert [type(outcome) for outcome in outcomes] == [PermissionError, OtherProcessError]


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL error, remote process exited"),
        RuntimeError("[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:7"),
        MemoryError("no room"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("out of memory"),
        OSError(5, "Input/output error", "model.safetensors"),
        PermissionError(13, "Permission denied", "model.safetensors"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_a_checkpoint_is_not_said_of_it(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, checkpoint.reading(Path("step-00000001")):
        raise error
    assert caught.value is error


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "step": (lambda state: state.update(step="4"), "state.json: step is missing or has an invalid value"),
    "digits": (lambda state: state.update(step=10**400), "state.json: step is missing or has an invalid value"),
    "true": (lambda state: state.update(step=True), "state.json: step is missing or has an invalid value"),
    "no step": (lambda state: state.pop("step"), "state.json: step is missing or has an invalid value"),
    "no file": (lambda state: state["files"].pop("ema.safetensors"), "state.json: no ema.safetensors among its files"),
    "identity": (lambda state: state.update(identity=[]), "state.json: identity is missing or has an invalid value"),
    "progress": (lambda state: state.update(progress=None), "state.json: progress is missing or has an invalid value"),
    "alarms": (
        lambda state: state["progress"].update(alarms={"stalled": "x"}),
        "state.json: progress is missing or has an invalid value",
    ),
    "skipped": (
        lambda state: state["progress"].update(skipped=0.5),
        "state.json: progress is missing or has an invalid value",
    ),
    "optimizer": (lambda state: state.update(optimizer=3), "state.json: optimizer is missing or has an invalid value"),
    "groups": (
        lambda state: state["optimizer"].update(groups=[3]),
        "state.json: optimizer is missing or has an invalid value",
    ),
    "lr": (
        lambda state: state["optimizer"]["groups"][0].update(betas=[0.9, "x"]),
        r"optimiser group has betas=\[0.9, 'x'\], expected one like \(0.9, 0.999\)",
    ),
    "scalars": (lambda state: state["optimizer"].update(scalars={"x": 1}), "does not fit this run"),
    "timesteps": (
        lambda state: state["progress"]["timesteps"].update(means=["x"] * 5),
        "does not fit this run .*statistics of noise levels are not numbers",
    ),
    "bins": (lambda state: state["progress"]["timesteps"].update(means=[1.0]), "statistics of 1 bins of noise levels"),
    "no timesteps": (
        lambda state: state["progress"].pop("timesteps"),
        r"does not fit this run \(KeyError: 'timesteps'",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timesteps, "BINS", 5)
        full(folder)
    return folder


@pytest.mark.parametrize("what", WRONG)
def test_wrong_values_behind_a_right_hash_are_one_line(saved: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(saved, tmp_path / "run")
    change, message = WRONG[what]
    newest = storage.list_checkpoints(tmp_path / "run/checkpoints")[-1]
    _forge(newest, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        full(tmp_path / "run", resume_from="latest")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{newest}: ")


# ---------------------------------------------------------------- killed

KILLED = {
    "max_train_steps": 120,
    "checkpointing_steps": 3,
    "logging_steps": 5,
    "validation_steps": 20,
    "learning_rate": 1e-3,
}
_CAMPAIGN = "import sys; from tests import test_training_resume as t; t.campaign(sys.argv[1])"
_PLACES = ("save_file", "replace", "rmtree", "write_bytes", "backward")  # where a run kills itself, by name


def _kill_at(place: str, count: int) -> None:
    """Has this process killed as it begins, for the ``count``-th time from now, to do one thing."""
    from accelerate import Accelerator

    owner, name = {
        "save_file": (storage, "file_hash"),  # after a file was written, before the folder is whole
        "replace": (os, "replace"),
        "rmtree": (shutil, "rmtree"),
        "write_bytes": (Path, "write_bytes"),
        "backward": (Accelerator, "backward"),
    }[place]
    former = getattr(owner, name)
    left = count

    def killing(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return former(*args, **options)

    setattr(owner, name, killing)


def campaign(folder: str) -> None:
    """Runs to the end in child after child, all but the last of which are killed; prints what became of each."""
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # a killed process loses nothing that was written
    timesteps.BINS = 5
    draw = random.Random(7)
    orders: list[tuple[str, float]] = [("time", draw.uniform(0.0, 0.2)) for _ in range(6)]
    orders += [(place, draw.randint(1, 9)) for place in _PLACES for _ in range(2)]
    draw.shuffle(orders)
    started = time.perf_counter()
    full(Path(folder) / "warm", max_train_steps=2)  # what is imported late is imported before the clock runs
    for place, amount in [*orders, ("none", 0)]:
        child = os.fork()
        if child == 0:
            _child(Path(folder) / "killed", place, int(amount))
        if place == "time":
            time.sleep(amount)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(place, amount, "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)
    print(f"{time.perf_counter() - started:.1f} s", flush=True)


def _child(folder: Path, place: str, count: int) -> None:
    code = 1
    try:
        found = earlier_run(settings(folder))
        source = "latest" if found.checkpoints else None
        if source is None and found.log is not None:  # killed before its first checkpoint: as `sipo train --resume`
            set_aside_logs(check_logs(settings(folder)))
        if place not in ("time", "none"):
            _kill_at(place, count)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*damaged")  # no kill may do that
            full(folder, resume_from=source, **KILLED)
        code = 0
    except ValueError as error:
        code = 3 if "already, expected at least" in str(error) else 1
        print(error, flush=True)
    finally:
        os._exit(code)


def test_a_run_killed_at_any_point_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight, whole = full(tmp_path / "straight", **KILLED)
    tests = Path(__file__).parent
    process = subprocess.run(
        [sys.executable, "-c", _CAMPAIGN, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    ends = [line.rsplit(" ", 2) for line in process.stdout.splitlines()[:-1]]
    assert sum(end[-1] == "killed" for end in ends) >= 8, process.stdout
    assert process.stdout.splitlines()[-2].startswith("none 0 exit"), process.stdout
    saved = [tmp_path / run / "checkpoints" / "step-00000120" for run in ("straight", "killed")]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "process-00000.safetensors"):
        assert (saved[0] / name).read_bytes() == (saved[1] / name).read_bytes(), name
    assert (saved[0] / "state.json").read_bytes() == (saved[1] / "state.json").read_bytes()
    assert torch.equal(load_file(saved[1] / "model.safetensors")["outward.weight"], straight.outward.weight.detach())
    statistics = [(tmp_path / run / "timesteps.jsonl").read_bytes() for run in ("straight", "killed")]
    assert statistics[0] == statistics[1] != b""
    for kind, lines in (("training", whole.history), ("validation", whole.validation)):
        assert untimed(read_metrics(tmp_path / "killed/metrics.jsonl", kind)) == untimed(lines)
