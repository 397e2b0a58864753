"""What needs no data is refused before any data is encoded: by a table of mistakes, none of which reaches it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from accelerate.utils import DistributedType
from conftest import assert_refused

from sipo import cli
from sipo.cache.savings import Cost
from sipo.families import FAMILIES, Family, get_family
from sipo.families.toy import build_toy
from sipo.recipe import config
from sipo.recipe.build import RunContext, open_run
from sipo.recipe.config import ConfigError
from sipo.recipe.preflight import _check_all, _check_condition_images, _check_training, check_run
from sipo.recipe.prepare_data import _say_cost
from sipo.training import TrainingWarning
from tests.family_cases import folder_of
from tests.small_family import EditFamily, OptionalEditFamily, SeeingFamily, SmallFamily, png

ROOT = Path(__file__).parent.parent


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command's checks; whatever would look at data is an error of its own."""
    # The module that defines it comes last: the others, if imported only now, would take this one for theirs.
    for module in ("sipo.recipe.train", "sipo.recipe.analyze_start", "sipo.recipe.prepare_data"):
        monkeypatch.setattr(f"{module}.prepare_data", Mock(side_effect=AssertionError("data is prepared")))

    def run(command: str, family: str, *overrides: str, model: Path | None = None) -> int:
        example = ROOT / "examples" / "toy" / f"{family}.yaml"
        # each has toy pairs of its own beside its cache
        places = [f"data.cache={tmp_path / family / 'cache'}", f"training.output_dir={tmp_path / 'run'}"]
        places.append(f"model.pretrained_model_name_or_path={folder_of(family) if model is None else model}")
        return cli.main([command, str(example), *places, *overrides])

    return run


BEFORE_DATA = [
    ("sd15", ["training.optimizer=adamw8bit"], "training.optimizer='adamw8bit': bitsandbytes is not installed"),
    ("sd15", ["training.report_to=[nonsense]"], "training.report_to='nonsense': expected one of "),
    ("sd15", ["training.report_to=[swanlab]"], "training.report_to='swanlab': not installed"),
    ("sd15", ["loss.backend=cuda"], "loss.backend='cuda' cannot run: "),
    ("sd15", ["loss.backend=warp"], "loss.backend='warp': expected one of "),
    ("sd15", ["loss.beta=-1"], "loss.beta=-1"),
    ("sd15", ["training.timestep_distribution=shifted"], "training.timestep_distribution='shifted': expected one of"),
    (
        "sd15",
        ["data.sizes=[[33, 32]]"],
        "data.sizes=[[33, 32]]: height=33, width=32, frames=1: expected multiples of 8",
    ),
    ("cogvideox", ["data.frames=8"], "frames=8: expected multiples of 16 pixels and 4k+1 frames"),
    (
        "sd3",
        ["data.sizes=[[32, 32], [32, 4096]]", "data.dataset_name=nowhere.jsonl"],
        "height=32, width=4096: expected at most ",
    ),
    (
        "wan",
        ["data.sizes=[[16, 32768]]", "data.dataset_name=nowhere.jsonl"],
        "patches each way, by the network's rope_max_seq_len",
    ),
    (
        "z-image",
        ["data.sizes=[[32, 1040]]", "data.dataset_name=nowhere.jsonl"],
        "height=32, width=1040: expected at most 1024 pixels a side, by the network's axes_lens=[1024, 64, 64]",
    ),
    ("sana", ["data.sizes=[[32, 48]]"], "frames=1: expected multiples of 32 pixels and 1 frame"),
    ("sd15", ["model.lora.target_modules=[to_x]"], "model.lora.target_modules: 'to_x' is no linear layer"),
    ("sd15", ["model.lora.target_modules=[]"], "model.lora.target_modules=[]: expected at least one name"),
    ("sd15", ["loss.num_inference_steps=1001"], "loss.num_inference_steps=1001: expected an integer in [1, 1000]"),
    ("sd15", ["samples.num_inference_steps=1001"], "samples.num_inference_steps=1001: expected at most 1000"),
    (
        "qwen-image",
        ["samples.num_inference_steps=1"],
        "samples.num_inference_steps=1: expected at least 2, with the scheduler's shift_terminal=0.02",
    ),
    (
        "qwen-image",
        ["loss.num_inference_steps=1"],
        "loss.num_inference_steps=1 with shift_terminal: expected at least 2",
    ),
    (
        "sd15",
        ["data.held_out=0", "samples.validation_prompts=[]"],
        "training.validation_steps=10: expected data.held_out > 0",
    ),
    ("sd15", ["data.max_pairs=8", "data.held_out=8"], "data.held_out=8: expected fewer than data.max_pairs=8"),
    ("sd15", ["data.draws=2", "training.timestep_sampling=informative"], "informative': expected data.draws=0"),
]


@pytest.mark.parametrize(("family", "overrides", "message"), BEFORE_DATA, ids=lambda value: str(value)[:40])
def test_mistakes_are_refused_before_data_is_encoded(
    family: str, overrides: list[str], message: str, opened: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opened("train", family, *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sipo: error: ") and message in error, error


EDITS = [
    (
        SmallFamily(),
        {"validation_images": ["a.png"]},
        "samples.validation_images=['a.png']: expected none, family 'small'",
    ),
    (EditFamily(), {}, "samples.validation_images=[]: expected one for each of 2 samples.validation_prompts"),
    (EditFamily(), {"validation_images": ["a.png"] * 3}, "['a.png', 'a.png', 'a.png']: expected one for each of 2"),
    (
        OptionalEditFamily(),
        {"validation_images": ["a.png"]},
        "expected none, or one for each of 2 samples.validation_p",
    ),
    (OptionalEditFamily(), {}, ""),
    (EditFamily(), {"validation_images": ["a.png", "b.png"]}, "samples.validation_images: b.png: "),
    (
        EditFamily(),
        {"validation_images": ["toy", "toy"]},
        "samples.validation_images: toy: no such file; 'toy' goes with data.dataset_name: toy",
    ),
    (EditFamily(), {"validation_images": ["a.png", "a.png"]}, ""),
    (
        type("LargeEditFamily", (EditFamily,), {"least_image_side": 1024})(),
        {"validation_images": ["a.png", "a.png"]},
        "data.sizes=[[512, 512]]: expected at least 1024 pixels a side, to sample with samples.validation_images",
    ),
]


@pytest.mark.parametrize(("family", "samples", "message"), EDITS)
def test_validation_images_are_checked_before_data_is_encoded(
    family: Family, samples: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(png(0))
    run = run_of_edits(family, validation_prompts=["a", "b"], **samples)
    if message:
        assert_refused(lambda: _check_condition_images(run), ConfigError, message)
    else:
        _check_condition_images(run)


def run_of_edits(family: Family, **samples: Any) -> RunContext:
    values = {
        "model": {"family": "sd15", "pretrained_model_name_or_path": "toy"},
        "data": {"dataset_name": "a", "cache": "b"},
        "training": {"output_dir": "c", "max_train_steps": 1, "proportion_empty_prompts": 0.1},
        "samples": samples,
    }
    accelerator: Any = Mock(num_processes=1, gradient_accumulation_steps=1)
    return RunContext(config.from_dict(values), family, accelerator, "", "", None)  # type: ignore[arg-type]


def test_captions_are_not_dropped_where_text_depends_on_the_image() -> None:
    _check_training(run_of_edits(EditFamily()), False)
    share = (
        "training.proportion_empty_prompts=0.1: expected 0, text embeddings of family 'seeing' depend on the condition"
    )
    assert_refused(lambda: _check_training(run_of_edits(SeeingFamily()), False), ConfigError, share)


@pytest.mark.parametrize("command", ["precompute", "analyze"])
def test_other_commands_refuse_what_they_need_and_warn_of_the_rest(
    command: str, opened: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that only encodes may lack what training needs."""
    assert opened(command, "sd15", "model.lora.target_modules=[to_x]") == 2
    assert "model.lora.target_modules: 'to_x' is no linear layer" in capsys.readouterr().err
    lacks = {"training.optimizer=adamw8bit": "optimizer='adamw8bit': bitsandbytes"}
    if command == "precompute":
        lacks["loss.backend=cuda"] = "loss.backend='cuda' cannot run: "
    else:
        assert opened(command, "sd15", "loss.backend=cuda") == 2
    capsys.readouterr()
    with pytest.raises(AssertionError, match="data is prepared"):
        opened(command, "sd15", *lacks)
    said = capsys.readouterr().err.splitlines()
    for message in lacks.values():
        assert any(message in line and line.endswith("; `sipo train` would stop here") for line in said)


def test_more_pairs_held_out_than_there_are_is_refused_before_any_is_encoded(tmp_path: Path) -> None:
    values = {
        "model": {"family": "sd15", "pretrained_model_name_or_path": "toy"},
        "data": {"dataset_name": "toy", "cache": str(tmp_path), "held_out": 9},
        "training": {"output_dir": str(tmp_path), "max_train_steps": 1},
    }
    cost = Cost(pairs=6, encoded=3, prompts=0, exact=True, pair_bytes=(8, 8), prompt_bytes=8)
    opened: Any = SimpleNamespace(
        config=config.from_dict(values), cache=tmp_path, accelerator=SimpleNamespace(num_processes=1)
    )
    with pytest.raises(ConfigError, match=r"^data\.held_out=9: expected fewer than the 9 pairs there are$"):
        _say_cost(opened, cost)
    _say_cost(opened, dataclasses.replace(cost, encoded=4))
    _say_cost(opened, dataclasses.replace(cost, exact=False))  # at most so many: the data say it themselves


def test_a_backend_of_the_environment_is_refused_as_well(
    opened: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIPO_BACKEND", "cuda")
    assert opened("train", "sd15") == 2
    assert "sipo: error: SIPO_BACKEND='cuda' cannot run: " in capsys.readouterr().err


def test_a_sound_configuration_comes_to_its_data(opened: Any) -> None:
    for family in FAMILIES:
        with pytest.raises(AssertionError, match="data is prepared"):
            opened("train", family)


def test_weights_that_are_not_there_or_are_damaged_are_refused_before_data(
    opened: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(
        ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    ):
        model = Path(shutil.copytree(folder_of("sd15"), tmp_path / f"model-{number}"))
        file = model / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
        assert opened("train", "sd15", model=model) == 2
        assert f"sipo: error: {file}: not a sound safetensors file" in capsys.readouterr().err
        file.unlink()
        assert opened("precompute", "sd15", model=model) == 2
        assert f"sipo: error: {file.parent}: has no weights in safetensors" in capsys.readouterr().err


def test_a_network_is_looked_at_without_its_weights(tmp_path: Path) -> None:
    """By its configuration alone: patches, positions, checkpointing."""
    model = Path(shutil.copytree(folder_of("cogvideox-2b"), tmp_path / "model"))
    file = model / "transformer" / "config.json"
    kept = json.loads(file.read_text())
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    family = get_family("cogvideox")
    for changes, size, message in (
        ({}, (32, 48, 9), ""),
        ({"patch_size": 4}, (32, 48, 9), "width=48: expected a multiple of 32 pixels, by the network's patch_size=4"),
        (
            {
                "use_learned_positional_embeddings": True,
                "use_rotary_positional_embeddings": True,
                "sample_height": 4,
                "sample_width": 4,
            },
            (32, 48, 9),
            "width=32, whose",
        ),
    ):
        file.write_text(json.dumps(kept | changes))
        network: Any = family.empty_network(model)
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
        if not message:
            family.check_network_size(network.config, *size)
            continue
        with pytest.raises(ValueError, match=message):
            family.check_network_size(network.config, *size)
    file.write_text(json.dumps(kept | {"num_attention_heads": "many"}))
    with pytest.raises(ValueError, match=f"^{model}: its transformer/config.json describes no Cog") as caught:
        family.empty_network(model)
    assert "\n" not in str(caught.value)


def test_checkpointing_that_a_network_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    build_toy("sd15", tmp_path / "model")
    more = [
        f"data.cache={tmp_path / 'cache'}",
        f"model.pretrained_model_name_or_path={tmp_path / 'model'}",
        "model.gradient_checkpointing=true",
    ]
    run = open_run(config.load_config(ROOT / "examples" / "toy" / "sd15.yaml", more))
    check_run(run, "train")
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "_supports_gradient_checkpointing", False)
    with pytest.raises(config.ConfigError, match=r"^model.gradient_checkpointing=True: expected False"):
        check_run(run, "train")


def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [f"data.cache={tmp_path / 'cache'}", f"model.pretrained_model_name_or_path={folder_of('sd15')}"]
    run = open_run(config.load_config(ROOT / "examples" / "toy" / "sd15.yaml", more))
    monkeypatch.setattr(run.accelerator.state, "distributed_type", DistributedType.DEEPSPEED)
    message = r"^distributed_type='DEEPSPEED': expected one device, plain data parallelism or FSDP2$"
    with pytest.raises(config.ConfigError, match=message):
        check_run(run, "train")


def test_several_networks_are_trained_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes may compute reference errors with them."""
    more = [f"data.cache={tmp_path / 'cache'}", f"model.pretrained_model_name_or_path={folder_of('wan2.2')}"]
    run = open_run(config.load_config(ROOT / "examples" / "toy" / "wan2.2.yaml", more))
    _check_all(run, "train", False)
    monkeypatch.setattr(run.accelerator.state, "num_processes", 2)
    message = "model.family='wan2.2': expected one process, it trains several networks"
    assert_refused(lambda: _check_all(run, "train", False), config.ConfigError, message)
    with pytest.warns(TrainingWarning, match=f"^{message}; `sipo train` would stop here$"):
        _check_all(run, "precompute", False)
