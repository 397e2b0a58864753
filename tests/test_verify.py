"""``sipo verify``, and the hashes beside trained weights: whatever one flipped bit does, it is noticed and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from sipo import cli
from sipo.files import file_hash, save_tensors
from sipo.recipe.verify import VerifiedPath, verify_run
from sipo.training.sums import (
    SUMS,
    ConfigWarning,
    check_config_sum,
    check_sums,
    remove_run_sums,
    write_run_sums,
    write_sums,
)
from tests.data_sets import flip_bit
from tests.training_cases import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a run writes."""
    folder = tmp_path_factory.mktemp("run")
    fit(folder, max_train_steps=4, checkpointing_steps=2)
    config = {
        "model": {"family": "sd15", "pretrained_model_name_or_path": "toy"},
        "data": {"dataset_name": "toy", "cache": "c", "sizes": [[16, 16]]},
    }
    (folder / "config.yaml").write_text(
        yaml.safe_dump(config | {"training": {"output_dir": "r", "max_train_steps": 4}})
    )
    network = folder / "weights" / "unet"
    network.mkdir(parents=True)
    save_tensors(network / "diffusion_pytorch_model.safetensors", {"a": torch.arange(6.0)})
    (network / "config.json").write_text("{}")
    (folder / "weights" / "trained_on.json").write_text("{}")
    (folder / "weights" / "README.md").write_text("# a model")
    write_sums(folder / "weights")
    (folder / "samples").mkdir()
    (folder / "samples" / "prompts.json").write_text('["a cat"]')
    write_run_sums(folder)
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def test_a_sound_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ok       {run / 'config.yaml'}",
        f"ok       {run / 'checkpoints' / 'step-00000002'}",
        f"ok       {run / 'checkpoints' / 'step-00000004'}",
        f"ok       {run / 'metrics.jsonl'} (4 lines)",
        f"ok       {run / 'timesteps.jsonl'} (4 lines)",
        f"ok       {run / 'samples' / 'prompts.json'}",
        f"ok       {run / 'weights'} (3 files)",
    ]


@pytest.mark.parametrize(("folder", "count"), [(".", 4), ("weights", 3)])
def test_the_hashes_are_those_of_sha256sum(run: Path, folder: str, count: int) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    command = ["sha256sum", "--check", "--strict", SUMS]
    done = subprocess.run(command, cwd=run / folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == count


def _damaged(folder: Path) -> list[VerifiedPath]:
    return [item for item in verify_run(folder) if item.fault]


def test_a_flipped_bit_in_any_file_that_is_read_back_is_noticed(copied: Path) -> None:
    """At a few places spread over the file. The model card is not read back: it is there to be edited."""
    read_back = {path for path in copied.rglob("*") if path.is_file()} - {copied / "weights/README.md"}
    assert len(read_back) == 17
    for file in sorted(read_back):
        content = file.read_bytes()
        for place in {*range(0, len(content), len(content) // 7 + 1), len(content) - 1}:
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            items = _damaged(copied)
            assert items and all("\n" not in item.describe() for item in items)
            if file != copied / SUMS:
                assert [item for item in items if not file.is_relative_to(item.path)] == []
        file.write_bytes(content)
    (copied / "weights/README.md").write_text("edited")
    assert not _damaged(copied)


def test_a_run_that_has_not_ended_has_no_hashes(copied: Path) -> None:
    remove_run_sums(copied)
    (copied / "samples/prompts.json").write_text('["a dog"]')
    items = verify_run(copied)
    assert not any(item.fault for item in items)
    notes = {item.path.name: item.note for item in items if "no hash: written when a run" in item.note}
    assert sorted(notes) == ["config.yaml", "metrics.jsonl", "prompts.json", "timesteps.jsonl"]
    assert notes["metrics.jsonl"] == "4 lines; no hash: written when a run of sipo train ends"


def test_a_run_that_goes_on_removes_its_hashes_before_it_changes_its_log(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        assert not (copied / SUMS).exists()
        raise KeyError

    monkeypatch.setattr("sipo.training.log._keep_lines", broken)
    with pytest.raises(KeyError):
        fit(copied, max_train_steps=5, checkpointing_steps=2, resume_from="latest")
    assert not _damaged(copied)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


_PROMPTS = "samples/prompts.json"
_NETWORK = "weights/unet/diffusion_pytorch_model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "weights": (lambda f: flip_bit(f / _NETWORK), _NETWORK, f"damaged, its SHA-256 is not the one that {SUMS} states"),
    "no weights": (lambda f: (f / _NETWORK).unlink(), _NETWORK, f"missing, {SUMS} lists it"),
    "another": (
        lambda f: shutil.copy(f / _NETWORK, f / "weights/unet/a.safetensors"),
        "weights/unet/a.safetensors",
        f"not in {SUMS}, expected only files that the run has written",
    ),
    "FIFO": (lambda f: _fifo(f / _NETWORK), _NETWORK, "is a FIFO, expected a file"),
    "no sums": (
        lambda f: (f / "weights" / SUMS).unlink(),
        "weights",
        f"no {SUMS} (the run was interrupted while it wrote the weights)",
    ),
    "empty sums": (lambda f: (f / "weights" / SUMS).write_text(""), f"weights/{SUMS}", "damaged, it is empty"),
    "escape": (
        lambda f: (f / "weights" / SUMS).write_text(f"{'0' * 64}  ../config.yaml\n"),
        f"weights/{SUMS}",
        "damaged, line 1 is not a SHA-256, two spaces and a file's name",
    ),
    "absolute": (
        lambda f: (f / "weights" / SUMS).write_text(f"{file_hash(f / _NETWORK)}  {f / _NETWORK}\n"),
        f"weights/{SUMS}",
        "damaged, line 1 is not a SHA-256, two spaces and a file's name",
    ),
    "checkpoint": (
        lambda f: flip_bit(f / "checkpoints/step-00000002/model.safetensors"),
        "checkpoints/step-00000002",
        "model.safetensors does not have the SHA-256 that state.json states",
    ),
    "config": (lambda f: (f / "config.yaml").write_text("a: [b"), "config.yaml", ""),
    "config changed": (
        lambda f: (f / "config.yaml").write_text((f / "config.yaml").read_text() + "# a remark\n"),
        "config.yaml",
        f"damaged, its SHA-256 is not the one that {SUMS} states",
    ),
    "log changed": (
        lambda f: (f / "metrics.jsonl").write_text(
            (f / "metrics.jsonl").read_text().replace('"seconds": ', '"seconds": 1')
        ),
        "metrics.jsonl",
        f"damaged, its SHA-256 is not the one that {SUMS} states",
    ),
    "prompts lost": (lambda f: (f / _PROMPTS).unlink(), _PROMPTS, f"missing, {SUMS} lists it"),
    "prompts": (lambda f: (f / _PROMPTS).write_text('["a'), _PROMPTS, "not JSON ("),
    "another log": (
        lambda f: shutil.copy(f / "metrics.jsonl", f / "metrics.1.jsonl"),
        "metrics.1.jsonl",
        f"not in {SUMS}, expected only files that the run has written",
    ),
    "sums of the run": (lambda f: (f / SUMS).write_text(""), SUMS, "damaged, it is empty"),
    "log": (
        lambda f: (f / "metrics.jsonl").write_text("3\n" + (f / "metrics.jsonl").read_text()),
        "metrics.jsonl",
        "1 of 5 lines: line 1 (no JSON object)",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_line_that_names_the_file(what: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, place, message = DAMAGE[what]
    spoil(copied)
    assert cli.main(["verify", str(copied)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (8 if what in ("another log", "sums of the run") else 7)
    (line,) = (line for line in lines if not line.startswith("ok       "))
    assert line.startswith(f"damaged  {copied / place}: {message.removeprefix('damaged, ')}")


@pytest.mark.parametrize("name", ["checkpoints", "weights"])
def test_a_file_in_a_folders_place_is_damage(name: str, copied: Path) -> None:
    shutil.rmtree(copied / name)
    (copied / name).write_text("")
    (item,) = _damaged(copied)
    assert item.describe() == f"damaged  {copied / name}: is a file, expected a folder"


def test_a_configuration_that_was_changed_is_noticed(copied: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_config_sum(copied)
    (copied / "config.yaml").write_text((copied / "config.yaml").read_text() + "# a remark\n")
    with pytest.warns(ConfigWarning, match=r"config\.yaml: has been changed since the run was trained with it; it is"):
        check_config_sum(copied)
    (copied / SUMS).write_text("?")
    with pytest.warns(ConfigWarning, match=rf"config\.yaml: cannot be compared .*{SUMS}: damaged, line 1 is not"):
        check_config_sum(copied)
    remove_run_sums(copied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_config_sum(copied)


def test_weights_that_were_copied_are_verified_alone(copied: Path, tmp_path: Path) -> None:
    weights = shutil.move(copied / "weights", tmp_path / "elsewhere")
    assert [item.describe() for item in verify_run(Path(weights))] == [f"ok       {weights} (3 files)"]
    assert not check_sums(tmp_path)  # there are none to compare with


def test_what_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no config.yaml, checkpoints, logs")):
        assert cli.main(["verify", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sipo: error: {folder}: {message}") and error.count("\n") == 1


def test_sums_are_the_same_for_the_same_files(copied: Path) -> None:
    before = (copied / "weights" / SUMS).read_bytes()
    (copied / "weights" / ".hidden").write_text("left by another tool")
    (copied / "weights" / "README.md").write_text(json.dumps({}))
    write_sums(copied / "weights")
    assert (copied / "weights" / SUMS).read_bytes() == before
