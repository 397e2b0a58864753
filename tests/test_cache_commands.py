"""What the commands do about data and weights that have changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sipo import cli
from sipo.cache import source
from sipo.cache.finished import open_cache
from sipo.cache.format import INDEX, read_json, write_json
from sipo.cache.weights import weight_hashes
from sipo.families import get_family
from sipo.families.config import ModelConfig
from sipo.families.toy import build_toy
from tests.changing_data import changed, drop, make_pairs, read, swap, write, written_at


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """A JSON file of a cache, as if sipo had written it otherwise."""
    write_json(path, json.loads(change(json.dumps(read_json(path)))), indent=None)


# ---- Commands ----

EXAMPLE = Path(__file__).parent.parent / "examples" / "toy" / "sd15.yaml"
SHORT = [
    "training.max_train_steps=1",
    "training.progress=false",
    "training.report_to=none",
    "samples.validation_prompts=[]",
]
SHORT += ["training.validation_steps=0", "data.held_out=0", "data.shard_pairs=2"]
ERRORS = ["data.draws=1", "data.reference_errors=true"]


class Place:
    """Pairs in files, a model, and the cache and runs made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache, self.data = folder, folder / "cache", folder / "data" / "pairs.jsonl"

    def run(self, command: str, *more: str, run: str = "run", flags: tuple[str, ...] = ()) -> int:
        places = [
            f"model.pretrained_model_name_or_path={self.folder / 'model'}",
            f"data.dataset_name={self.data}",
            f"data.cache={self.cache}",
        ]
        places.append(f"training.output_dir={self.folder / run}")
        return cli.main([command, str(EXAMPLE), *SHORT, *places, *more, *flags])

    def errors(self) -> list[torch.Tensor]:
        found = self.cache.glob("references/*/errors-*.safetensors")
        return [load_file(path)["errors"] for path in sorted(found)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six pairs, with reference errors beside its cache."""
    place = Place(tmp_path_factory.mktemp("trained"))
    make_pairs(place.data.parent)
    build_toy("sd15", place.folder / "model")
    assert place.run("train", *ERRORS) == 0
    return place.folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Place:
    """The same in a place of its own."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder)
    rewrite(
        folder / "cache" / INDEX, lambda text: text.replace(str(trained), str(folder))
    )  # as if data.dataset_name were it
    return Place(folder)


def test_a_new_run_trains_on_the_pairs_as_they_are_now(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    lines = read(place.data)
    swap(lines)
    drop(lines)
    write(place.data, lines)
    latents, errors = [open_cache(place.cache).pair(n)[:2] for n in range(5)], place.errors()
    assert place.run("train", *ERRORS, run="again") == 0
    output = capsys.readouterr().err
    assert output.count("the data has changed (row 4: chosen is b/3.bmp, was a/3.bmp, and in 1 more shard): 2 of") == 1
    assert "| pairs | 5 |" in (place.folder / "again" / "weights" / "README.md").read_text()
    cache = open_cache(place.cache)
    # The posterior is drawn with one seed for each pair, so that samples that change places have other latents.
    assert not torch.equal(cache.pair(3)[0], latents[3][0]) and torch.equal(cache.pair(0)[0], latents[0][0])
    now = place.errors()
    assert [len(each) for each in now] == [2, 2, 1]
    assert torch.equal(now[0], errors[0]) and not torch.equal(now[1][1], errors[1][1])
    # And the run that was trained on the pairs as they were does not go on with these.
    assert place.run("train", *ERRORS, "training.max_train_steps=2", flags=("--resume",)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the data has changed since this checkpoint (6 pairs, " in error and "; now 5 pairs, " in error


def test_a_run_is_not_resumed_on_other_data(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before, original = written_at(place.cache), read(place.data)
    lines = read(place.data)
    swap(lines)
    write(place.data, lines)
    assert place.run("train", *ERRORS, "training.max_train_steps=2", flags=("--resume",)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{place.data}: row 4: chosen is b/3.bmp, was a/3.bmp" in error and "another training.output_dir" in error
    assert not changed(before, place.cache)
    write(place.data, original)
    for path in place.folder.glob("*/*/*.*"):  # new times, of weights too
        path.touch()
    assert place.run("train", *ERRORS, "training.max_train_steps=2", flags=("--resume",)) == 0
    assert not changed(before, place.cache) and len(list(place.cache.glob("references/*"))) == 1


def test_error_masks_beside_the_safeguard_are_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before, lines = written_at(place.cache), read(place.data)
    lines[4]["error_mask"] = "mask.png"  # which is not even opened
    lines[1]["Error_mask"] = lines[2]["Error_mask"] = lines[2]["mine"] = "mask.png"
    write(place.data, lines)
    assert place.run("train", "loss.safeguard=0.5", run="again") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    expected = f"sipo: error: loss.safeguard=0.5: expected null, {place.data}: row 5 has an error_mask"
    assert error == expected and not changed(before, place.cache)
    Image.new("L", (32, 32), 255).save(place.data.parent / "mask.png")
    for command, times in (("precompute", 1), ("train", 0)):  # only where the source is read
        assert place.run(command, run="masked") == 0
        output = capsys.readouterr().err
        assert output.count(f"{place.cache}: 1 of 6 pairs have an error mask\n") == times
        line = f"{place.data}: row 2: the key 'Error_mask' is not read, did you mean 'error_mask'?\n"
        assert (output.count(line), output.count("is not read")) == (times, times)
    shutil.rmtree(place.data.parent)
    assert place.run("train", "loss.safeguard=0.5", run="again") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == expected


def test_a_cache_without_its_source_is_used_and_that_is_said(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before = written_at(place.cache)
    shutil.rmtree(place.data.parent)
    assert place.run("train", run="again") == 0
    output = capsys.readouterr().err
    said = f"{place.cache}: could not be compared with its pairs, the encoded data is used unchanged: {place.data}"
    assert output.count(said) == 1
    assert "| pairs | 6 |" in (place.folder / "again" / "weights" / "README.md").read_text()
    assert place.run("precompute", "--verify") == 2 and "no such file or folder" in capsys.readouterr().err
    assert place.run("precompute", "data.dataset_name=others.jsonl") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        f'{place.cache}: made with data.dataset_name="{place.data}", this run has "others.jsonl", which cannot be'
        in error
    )
    assert "(others.jsonl: no such file or folder" in error
    assert not changed(before, place.cache)


def test_pairs_that_are_left_out_are_said_in_training(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.data.parent / "a" / "1.bmp").unlink()
    (place.data.parent / "a" / "2.bmp").write_bytes(b"no image")
    for run in ("again", "once more"):  # encoded, and without the source
        assert place.run("train", "data.skip_bad=true", "training.gradient_accumulation_steps=2", run=run) == 0
        line = f"{place.cache}: 2 of 6 pairs cannot be used and are left out (missing files: 1; undecodable files: 1)\n"
        output = capsys.readouterr()
        assert output.err.count(line) == 1 and output.out.startswith("# 1 process, 4 pairs in a step\nmodel:\n")
        shutil.rmtree(place.data.parent, ignore_errors=True)


def replace_weights(path: Path, keep_time: bool = False) -> None:
    """Other weights of the same size, in place."""
    tensors, before = load_file(path), path.stat()
    name = max(tensors, key=lambda each: tensors[each].numel())
    tensors[name] = tensors[name].flip(0) + 0.5
    save_file(tensors, path, {"format": "pt"})
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_other_encoders_under_the_same_path_are_refused(
    place: Place, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    before = written_at(place.cache)
    replace_weights(place.folder / "model" / f"{part}.safetensors", keep_time=True)
    assert place.run("train", run="again") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{place.cache}: encoded with other weights: {part}.safetensors has changed (hash " in error
    assert error.endswith("): restore that file, or use another data.cache")
    assert not changed(before, place.cache)


def test_errors_of_another_network_under_the_same_path_are_not_used(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written_at(place.cache)
    assert place.run("train", run="plain") == 0
    (place.folder / "model" / "unet" / "unused.bin").write_bytes(b"x")
    (place.folder / "model" / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    assert place.run("precompute", *ERRORS) == 0
    assert len(place.errors()) == 3  # of what is not read, nothing depends
    replace_weights(place.folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    for run, more in (("run", ERRORS), ("plain", [])):
        assert place.run("train", *more, "training.max_train_steps=2", run=run, flags=("--resume",)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "other weights: unet/diffusion_pytorch_model.safetensors has changed (hash " in error
    assert len(place.errors()) == 3
    assert place.run("train", *ERRORS, run="again") == 0
    assert len(place.errors()) == 6 and len({each.sum().item() for each in place.errors()}) == 6
    assert not changed(before, place.cache)  # latents and text do not depend on it


def test_weights_of_a_hub_are_known_by_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "models--owner--name"
    for commit in ("a" * 40, "b" * 40):
        (hub / "snapshots" / commit).mkdir(parents=True)
        (hub / "snapshots" / commit / "model_index.json").write_text("{}")
    (hub / "refs").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def marks(revision: str | None = None) -> dict[str, str]:
        model = ModelConfig(family="sd15", pretrained_model_name_or_path="owner/name", revision=revision)
        return weight_hashes(get_family("sd15"), "owner/name", model, tmp_path / "cache", network=True)

    (hub / "refs" / "main").write_text("a" * 40)
    assert marks() == {"pretrained_model_name_or_path": "owner/name", "commit": "a" * 40}
    (hub / "refs" / "main").write_text("b" * 40)
    assert marks()["commit"] == "b" * 40
    assert marks("a" * 40)["commit"] == "a" * 40  # so that a pinned run goes on


def test_files_of_a_model_that_are_read(place: Place) -> None:
    model = place.folder / "model"
    (model / "unet" / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors").write_bytes(b"1")
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")

    def names(variant: str | None, network: bool) -> set[str]:
        config = ModelConfig(family="sd15", pretrained_model_name_or_path=str(model), variant=variant)
        return set(weight_hashes(get_family("sd15"), str(model), config, place.cache, network=network))

    weights = "unet/diffusion_pytorch_model"
    unread = ["unet/lora.safetensors", "unet/model_ema.safetensors", "unet/old/model.safetensors", "vae/notes.json"]
    for name in [*unread, "text_encoder/notes.txt"]:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"{}")  # which nothing reads
    assert names(None, True) == {"unet/config.json", f"{weights}.safetensors"}
    sharded = {f"{weights}.fp16-00001-of-00002.safetensors", f"{weights}.safetensors.index.fp16.json"}
    assert names("fp16", True) == {"unet/config.json", *sharded}
    encoders = {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    encoders |= {f"{part}/config.json" for part in ("vae", "text_encoder")}
    assert names("fp16", False) == encoders | {f"tokenizer/tokenizer{end}.json" for end in ("", "_config")}


def test_a_configuration_is_known_by_what_it_says_of_the_model(place: Place) -> None:
    path = place.folder / "model" / "unet" / "config.json"

    def mark() -> str:
        model = place.folder / "model"
        found = weight_hashes(get_family("sd15"), str(model), ModelConfig("sd15", ""), place.cache, network=True)
        return found["unet/config.json"]

    before, config = mark(), json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_name_or_path": "elsewhere", "_diffusers_version": "0.0"}))
    assert mark() == before
    path.write_text(json.dumps(config | {"sample_size": 5}))
    assert mark() != before


def test_weights_are_read_once_and_again_to_verify(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real, hashed = place.folder / "model", source.stamp, source.file_hash
    monkeypatch.setattr("sipo.cache.weights.stamp", lambda path: [*real(path)[:2], 0, 0])
    monkeypatch.setattr(source, "stamp", lambda path: [*real(path)[:2], 0, 0])
    reads: list[Path] = []
    monkeypatch.setattr(source, "file_hash", lambda path: reads.append(path) or hashed(path))

    def marks(**options: Any) -> dict[str, str]:
        return weight_hashes(
            get_family("sd15"), str(model), ModelConfig("sd15", ""), place.cache, network=True, **options
        )

    before = marks()
    assert len(reads) == 2 and marks() == before and len(reads) == 2
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    path.touch()
    assert marks() == before and reads[2:] == [path]
    replace_weights(path, keep_time=True)
    assert marks() == before and len(reads) == 3  # nothing shows it
    assert marks(verify=True) != before
    assert marks() != before


def test_a_cache_of_another_format_is_one_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    index = place.cache / INDEX
    old = {key: value for key, value in json.loads(index.read_text()).items() if key != "sha256_below"}
    index.write_text(json.dumps(old | {"format": 1}))  # which had no hash
    assert place.run("train", run="again") == 2
    error = capsys.readouterr().err
    assert "cache format 1, expected 8: " in error and "delete this one" in error and error.count("\n") == 1
