"""``sipo export``: of a run, its checkpoints and their average; what cannot be exported is said in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sipo import cli
from sipo.families import get_family
from sipo.families.lora_files import Adapter, write_adapter
from sipo.families.tuning import save_lora
from sipo.recipe import config
from sipo.training import storage
from sipo.training.sums import write_run_sums, write_sums
from tests.data_sets import flip_bit
from tests.family_cases import folder_of, lora_network, metadata_of, pipeline_of, predictions

ALPHA = 5.0


class Alone:
    """What :func:`sipo.training.storage.write` asks of an accelerator."""

    is_main_process, num_processes = True, 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a run of SDXL with two checkpoints and an average; and the network, which is the average."""
    folder = tmp_path_factory.mktemp("runs") / "cats"
    network = lora_network("sdxl", rank=3, alpha=ALPHA)
    folder.mkdir()
    settings = config.from_dict(
        {
            "model": {
                "family": "sdxl",
                "pretrained_model_name_or_path": str(folder_of("sdxl")),
                "lora": {"rank": 3, "alpha": ALPHA},
            },
            "data": {"dataset_name": "toy", "cache": str(folder / "cache")},
            "training": {"output_dir": str(folder), "max_train_steps": 2},
        }
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.as_dict()))
    save_lora(get_family("sdxl"), network, folder / "weights")
    average = {name: tensor.clone() for name, tensor in network.state_dict().items() if ".lora_" in name}
    for step in (1, 2):
        weights = {name: tensor * step + 1 for name, tensor in average.items()} | {"pos_embed": torch.ones(1)}
        shared = {"model.safetensors": weights} | ({"ema.safetensors": average} if step == 2 else {})
        storage.write(
            folder / "checkpoints", step, shared=shared, own=lambda _: None, state={}, keep=0, accelerator=Alone()
        )
    return folder, network


def export(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What ``sipo export`` prints; an error's line without what all begin with."""
    status = cli.main(["export", *map(str, words)])
    printed = capsys.readouterr()
    assert (status == 0) == (not printed.err) and (printed.out + printed.err).count("\n") == 1
    return (printed.out or printed.err.removeprefix("sipo: error: ")).rstrip("\n")


def test_a_run_is_exported_under_its_name(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, network = run
    file = folder / "cats-kohya.safetensors"
    words = (folder, "--format", "kohya")
    assert export(capsys, *words) == f"{file}: 64 layers of rank 3, to be loaded at strength 1"
    pipeline = pipeline_of("sdxl")
    pipeline.load_lora_weights(folder, weight_name=file.name)
    torch.testing.assert_close(predictions("sdxl", pipeline.unet), predictions("sdxl", network), rtol=1e-5, atol=1e-5)
    # Nothing is lost that is there already.
    file.write_bytes(b"mine")
    assert export(capsys, *words) == f"{file}: exists already; --force replaces it, --output names another"
    assert file.read_bytes() == b"mine"
    monkeypatch.chdir(folder)
    assert export(capsys, ".", "--format", "kohya", "--force").startswith("cats-kohya.safetensors: 64 layers")
    assert len(load_file(file)) == 3 * 64

    def full(tensors: Any, filename: Any, *args: Any, **options: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert export(capsys, *words, "--force") == "disk full"
    assert len(load_file(file)) == 3 * 64 and not list(folder.glob(".*"))


def test_checkpoints_are_exported_by_step_with_their_average(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    options = ("--format", "diffusers", "--checkpoint")
    export(capsys, folder, *options, "1")
    export(capsys, folder, *options, "latest", "--output", tmp_path / "new" / "l.safetensors")
    first = load_file(folder / "cats-step-00000001-diffusers.safetensors")
    latest = load_file(tmp_path / "new" / "l.safetensors")
    saved = load_file(folder / "weights" / "pytorch_lora_weights.safetensors")
    assert saved.keys() == latest.keys() == first.keys()
    assert all(torch.equal(latest[name], tensor) for name, tensor in saved.items())
    scales = {name: ALPHA / 3 if ".lora_B." in name else 1.0 for name in saved}
    for name, tensor in saved.items():
        torch.testing.assert_close(first[name], tensor + scales[name], rtol=1e-5, atol=1e-6)
    assert metadata_of(tmp_path / "new" / "l.safetensors") == metadata_of(
        folder / "weights" / "pytorch_lora_weights.safetensors"
    )


def test_what_cannot_be_exported_is_said_in_one_line(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run[0], folder)
    kohya = (folder, "--format", "kohya", "--force")
    where = folder / "checkpoints"
    cases = [
        ((tmp_path, "--format", "kohya"), f"{tmp_path}: no config.yaml, expected the folder of a run of `sipo train`"),
        ((*kohya, "--checkpoint", "3"), "--checkpoint 3: expected one of 1, 2, or 'latest'"),
        ((*kohya, "--output", tmp_path / "a.bin"), f"--output {tmp_path / 'a.bin'}: expected a name that ends in"),
        (
            (*kohya, "model.pretrained_model_name_or_path=/nowhere/at/all"),
            "model.pretrained_model_name_or_path='/nowhere/at/all': cannot read the configuration of its",
        ),
        (
            (*kohya, "model.lora.alpha=400", "--checkpoint", "latest"),
            "model.lora.alpha=400: expected model.pretrained_model_name_or_path,",
        ),
        (
            (*kohya, "model.family=sd15"),
            "model.family=sd15: expected model.pretrained_model_name_or_path, model.revision or model.variant",
        ),
        ((*kohya, "--output", folder / "config.yaml" / "a" / "b.safetensors"), f"--output {folder}/config.yaml/a/b."),
    ]
    for words, message in cases:
        assert export(capsys, *words).startswith(message)
    file = folder / "config.yaml"
    kept = file.read_text()
    weights = f"{folder}/weights/pytorch_lora_weights.safetensors"
    for old, new, message in (
        ("family: sdxl", "family: cogvideox", "--format='kohya': no LoRA of cogvideox is read in it, expected"),
        ("tuning: lora", "tuning: full", "model.tuning='full': expected 'lora'; diffusers loads"),
        ("family: sdxl", "family: sd3", f"{weights}: unet."),
        ("rank: 3", "rank: 4", f"{weights}: rank 3, expected 4 of model.lora.rank"),
        ("target_modules: null", "target_modules: [to_q]", f"{weights}: down_blocks.1.attentions.0."),
    ):
        assert kept.count(old) == 1
        file.write_text(kept.replace(old, new))
        assert export(capsys, *kohya).startswith(message)
    file.write_text(kept)
    assert len(load_file(weights)) == 2 * 64
    (folder / "dir.safetensors").mkdir()
    assert "is a folder" in export(capsys, *kohya, "--output", folder / "dir.safetensors")
    (where / "step-00000002" / "ema.safetensors").write_bytes(b"")
    assert export(capsys, *kohya, "--checkpoint", "latest").startswith(f"{where / 'step-00000002'}: damaged, ema")
    shutil.rmtree(where)
    assert export(capsys, *kohya, "--checkpoint", "latest") == f"--checkpoint latest: no checkpoint in {where}"
    shutil.rmtree(folder / "weights")
    assert "does not exist, weights are saved when a run ends; --checkpoint" in export(capsys, *kohya)
    with pytest.raises(SystemExit):
        cli.main(["export", str(folder), "--format", "a1111"])
    assert "invalid choice: 'a1111'" in capsys.readouterr().err
    assert not list(folder.rglob("other-*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(
    value: float, run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run[0], folder)
    weights = folder / "weights" / "pytorch_lora_weights.safetensors"
    with safe_open(weights, "pt") as opened:
        metadata = opened.metadata()
    saved = load_file(weights)
    place = sorted(saved)[-1]
    module, _, factor = place.removeprefix("unet.").rpartition(".lora_")
    saved[place][-1, -1] = value
    save_file(saved, weights, metadata=metadata)
    trained = {name.removeprefix("unet.").replace(".weight", ".default.weight"): t for name, t in saved.items()}
    step = storage.write(
        folder / "checkpoints",
        3,
        shared={"model.safetensors": trained},
        own=lambda _: None,
        state={},
        keep=0,
        accelerator=Alone(),
    )
    for source, words in ((weights, ()), (step, ("--checkpoint", "3"))):
        printed = export(capsys, folder, "--format", "diffusers", *words)
        assert printed == f"{source}: {module} has NaN or infinite weights, expected finite ones"
    assert factor == "B.weight" and not list(folder.glob("other-*"))


def test_a_module_without_an_original_name_is_named(tmp_path: Path) -> None:
    factors = {f"blocks.0.norm2.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}
    adapter = Adapter.of_tensors(factors, 1.0)
    with pytest.raises(ValueError, match=r"blocks\.0\.norm2: wan's original code has no module for it"):
        write_adapter(get_family("wan"), adapter, tmp_path / "lora.safetensors", "comfyui")
    assert not list(tmp_path.iterdir())


def test_weights_that_have_changed_since_they_were_written_are_not_exported(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run[0], folder)
    write_sums(folder / "weights")
    weights = folder / "weights" / "pytorch_lora_weights.safetensors"
    flip_bit(weights, -4)  # of a mantissa: as good a number as before
    printed = export(capsys, folder, "--format", "diffusers")
    assert printed == f"{weights}: damaged, its SHA-256 is not the one that SHA256SUMS states"


def test_a_changed_configuration_is_said_and_a_fifo_in_its_place_is_refused(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sipo.recipe.score_run.check_sums", Mock(side_effect=ValueError("stops here")))
    folder = tmp_path / "other"
    shutil.copytree(run[0], folder)
    file = folder / "config.yaml"
    write_run_sums(folder)
    file.write_text(file.read_text() + "# a remark\n")
    changed = "has been changed since the run was trained with it; it is used as it is now"
    for command in (["export", str(folder), "--format", "kohya", "--force"], ["score", str(folder)]):
        status = cli.main(command)
        error = capsys.readouterr().err
        assert error.startswith(f"sipo: warning: {file}: {changed}\n")
        assert (status, error.count("\n")) == ((0, 1) if command[0] == "export" else (2, 2))
    file.unlink()
    os.mkfifo(file)
    for command in (["export", str(folder), "--format", "kohya"], ["score", str(folder)]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err == f"sipo: error: {file}: is a FIFO, expected a file\n"
