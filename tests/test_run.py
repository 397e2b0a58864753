"""``sipo train`` end to end: every family's toy example trains, resumes, saves, reloads in its pipeline and samples."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load, load_file

from sipo import cli
from sipo.data.media import read_media, write_video
from sipo.families import FAMILIES, get_family
from sipo.recipe import config
from sipo.recipe.build import make_loss, open_run
from sipo.recipe.sampling import SAMPLE_FPS
from sipo.recipe.verify import verify_run
from sipo.training.log_reader import read_metrics
from sipo.training.sums import SUMS
from tests.data_sets import contents, flip_bit
from tests.family_cases import QWEN_IMAGE_21, as_picture, load_adapters
from tests.training_cases import events_in

ROOT = Path(__file__).parent.parent
SHORT = [
    "training.checkpointing_steps=2",
    "training.validation_steps=2",
    "samples.num_inference_steps=2",
    "training.progress=false",
]
SHORT += ["training.logging_steps=1", "training.report_to=none"]
TRACKED = "training.report_to=tensorboard"


def example(name: str) -> Path:
    return ROOT / "examples" / "toy" / f"{name}.yaml"


def options(folder: Path, steps: int, *more: str, cache: Path | None = None) -> list[str]:
    """A short run in ``folder``."""
    places = [f"data.cache={cache or folder / 'cache'}", f"training.output_dir={folder / 'run'}"]
    return [*SHORT, *places, f"training.max_train_steps={steps}", *more]


def train(name: str, *overrides: str) -> None:
    assert cli.main(["train", str(example(name)), *overrides]) == 0


def steps_of(folder: Path, kind: str = "training") -> list[int]:
    return [line["step"] for line in read_metrics(folder / "run" / "metrics.jsonl", kind)]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Four steps of a toy example."""
    folder = tmp_path_factory.mktemp(request.param)
    train(request.param, *options(folder, 4, TRACKED))
    return request.param, folder


def test_a_run_leaves_what_it_says(trained: tuple[str, Path]) -> None:
    name, folder = trained
    run = folder / "run"
    assert steps_of(folder) == [1, 2, 3, 4] and steps_of(folder, "validation") == [2, 4]
    lines = read_metrics(run / "metrics.jsonl")
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)  # the policy still is the reference
    assert lines[-1]["chosen_gap"] != 0 and lines[-1]["rejected_gap"] != 0
    kept = config.from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    assert kept == config.load_config(example(name), options(folder, 4, TRACKED))
    card = (run / "weights" / "README.md").read_text()
    assert f"| β (`beta`) | {20 if get_family(name).video else 1000}:" in card and "| pairs | 28 |" in card
    assert cli.main(["verify", str(run)]) == 0 and not any("no hash" in item.note for item in verify_run(run))
    assert {line.split()[1] for line in (run / SUMS).read_text().splitlines()} == {
        *("config.yaml", "metrics.jsonl", "timesteps.jsonl", "samples/prompts.json")
    }
    umask = os.umask(0o077)
    os.umask(umask)
    modes = {path.relative_to(folder): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*.*")}
    assert len(modes) > 20 and {path for path in modes if modes[path] != 0o666 & ~umask} == set()


def test_tensorboard_has_every_sample(trained: tuple[str, Path]) -> None:
    name, folder = trained
    events = events_in(folder / "run")
    prompts = config.load_config(example(name)).samples.validation_prompts
    assert events.Tags()["images"] == [f"samples/{number} {prompt}" for number, prompt in enumerate(prompts)]
    for tag in events.Tags()["images"]:
        assert [event.step for event in events.Images(tag)] == [0, 2, 4]


def test_weights_reload_in_the_pipeline_and_sample_the_same(trained: tuple[str, Path], tmp_path: Path) -> None:
    """What the last validation drew from the network in training is what diffusers draws from the files."""
    import diffusers

    name, folder = trained
    family, kept = get_family(name), config.load_config(example(name))
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder / "cache-toy" / "model")
    network = load_adapters(pipeline, family, folder / "run" / "weights")
    height, width = kept.data.sizes[0]
    size = {"height": height, "width": width, "frames": kept.data.frames}
    images = None
    if kept.samples.validation_images:  # "toy": of the toy pairs
        conditions = sorted((folder / "cache-toy" / "pairs" / "condition").glob("*.png"))
        images = [read_media(path).pixels for path in conditions[: len(kept.samples.validation_images)]]
    drawn = family.sample(pipeline, network, kept.samples.validation_prompts, images=images, seed=0, steps=2, **size)
    samples = folder / "run" / "samples"
    if family.video:
        for number, clip in enumerate(drawn):
            write_video(tmp_path / "clip.mp4", clip, SAMPLE_FPS)
            saved = samples / f"step-00000004-{number}.mp4"
            assert (tmp_path / "clip.mp4").read_bytes() == saved.read_bytes()
            assert saved.read_bytes() != (samples / f"step-00000000-{number}.mp4").read_bytes()
    else:
        saved = read_media(samples / "step-00000004.png").pixels
        assert torch.equal(saved[:, :height, :width], drawn[0])
        assert torch.equal(saved[:, :height, width + 2 :], drawn[1])
        assert not torch.equal(saved, read_media(samples / "step-00000000.png").pixels)
    options: dict[str, Any] = {"num_frames": 9} if family.video else {}
    options |= {"image": as_picture(images[0])} if images else {}
    options |= {"max_area": height * width, "_auto_resize": False} if name == "flux-kontext" else {}
    options |= {"use_resolution_binning": False} if name == "sana" else {}
    options |= {"output_resolution": height} if name == "qwen-image-2.1-edit" else {}
    image = pipeline(
        prompt="a bright circle", height=height, width=width, num_inference_steps=2, output_type="pt", **options
    )
    pixels = image[0]
    assert pixels.shape[-2:] == (height, width) and pixels.isfinite().all()


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(trained: tuple[str, Path]) -> None:
    name, folder = trained
    run = folder / "run"
    once = contents(run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")  # as if it had been stopped in its fourth step
    shutil.rmtree(run / "weights")
    train(name, *options(folder, 4), "--resume")
    assert steps_of(folder) == [1, 2, 3, 4]
    if name == "sd15":  # the same code for all
        shutil.rmtree(run / "weights")  # as if it had been stopped just before it wrote them
        train(name, *options(folder, 4), "--resume")
        assert steps_of(folder) == [1, 2, 3, 4]
    resumed = contents(run)
    below = [{key for key in files if key.startswith(("weights/", "checkpoints/"))} for files in (once, resumed)]
    assert below[0] == below[1] and any("step-00000004/" in key for key in below[0])
    differing = {key for key in below[0] if once[key] != resumed[key]} - {"weights/README.md"}  # which has a date
    assert not differing
    assert list(run.rglob(".*")) == []
    if name == "sd15":
        train(name, *options(folder, 6), "--resume")  # for more steps than it was begun for
        assert steps_of(folder) == [1, 2, 3, 4, 5, 6]
    for file in (run / "weights").rglob("*.safetensors"):
        assert any(tensor.abs().sum() > 0 for key, tensor in load_file(file).items() if "lora_B" in key)


def test_a_runs_lora_is_exported_from_its_weights_and_its_last_checkpoint(
    trained: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which are the same; under names of each family's, for what reads no others."""
    starts = {"sd15": "lora_unet_down_blocks_", "sdxl": "lora_unet_input_blocks_", "sd3": "transformer."}
    starts |= dict.fromkeys(
        ("flux", "flux-kontext", "chroma", "qwen-image", "qwen-image-edit", "qwen-image-edit-plus"),
        "transformer.transformer_blocks.",
    )
    starts |= dict.fromkeys(("flux2", "flux2-klein"), "diffusion_model.double_blocks.")
    starts |= {"z-image": "transformer.layers.", "lumina2": "diffusion_model.layers."}
    starts |= dict.fromkeys((*QWEN_IMAGE_21, "sana"), "transformer.")
    name, folder = trained
    files = [tmp_path / "weights.safetensors", tmp_path / "checkpoint.safetensors"]
    for file, more in zip(files, ([], ["--checkpoint", "latest"]), strict=True):
        format = "diffusers" if name in (*QWEN_IMAGE_21, "sana") else "comfyui"
        command = ["export", str(folder / "run"), "--format", format, "--output", str(file), *more]
        if get_family(name).experts:
            assert "its LoRA is a file for each network in" in refused(capsys, *command)
            return
        assert cli.main(command) == 0
    weights = load_file(files[0])
    assert any(key.startswith(starts.get(name, "diffusion_model.blocks.")) for key in weights)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("trained", ["sd15"], indirect=True)  # the same code for all
def test_a_folder_with_a_run_is_not_overwritten(trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, folder = trained
    assert cli.main(["train", str(example(name)), *options(folder, 9)]) == 2
    error = capsys.readouterr().err
    assert "holds a run already (checkpoints/step-" in error and "--resume continues it" in error
    assert error.count("\n") == 1
    kept = (folder / "run" / "config.yaml").read_bytes()
    assert cli.main(["train", str(example(name)), *options(folder, 9), "--resume", "model.lora.alpha=9"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("made with model.lora.alpha=None, expected this run's 9.0")
    assert (folder / "run" / "config.yaml").read_bytes() == kept


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that does nothing else."""
    capsys.readouterr()  # of what was done before
    assert cli.main([*words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sipo: error: ") and error.count("\n") == 1
    return error


def test_a_run_without_checkpoints_is_not_overwritten_either(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ["training.checkpointing_steps=0", "training.validation_steps=0", "samples.validation_prompts=[]"]
    command = ["train", str(example("sd15")), *options(tmp_path, 2, *plain, cache=shared)]
    page = tmp_path / "run" / "before.html"
    # A look at what a run would be leaves a page in its folder: that is no run.
    assert cli.main(["analyze", *command[1:], "--pairs", "2", "--levels", "2"]) == 0 and page.is_file()
    assert cli.main(command) == 0
    report = tmp_path / "run" / "report.html"
    assert cli.main(["analyze", str(tmp_path / "run")]) == 0 and report.is_file()
    # A look before the next one leaves the report of this one alone.
    kept = contents(tmp_path / "run")
    assert cli.main(["analyze", *command[1:], "loss.beta=20", "--pairs", "2", "--levels", "2"]) == 0
    changed = contents(tmp_path / "run")
    assert {name for name in changed if changed[name] != kept.get(name)} == {"before.html"}
    # And no second run replaces it, whether it is to go on or to start: refused before anything is opened.
    monkeypatch.setattr("sipo.recipe.train.open_run", None)
    for resume in ((), ("--resume",)):
        error = refused(capsys, *command, *resume)
        assert f"training.output_dir='{tmp_path / 'run'}' holds a run already (metrics.jsonl, weights): " in error
        assert "no checkpoint to continue from; --overwrite replaces it, another training.output_dir keeps it" in error
    assert contents(tmp_path / "run") == changed


def test_a_run_that_ended_before_its_first_checkpoint_starts_over_and_keeps_its_log(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(tmp_path, 2, "training.validation_steps=0", "samples.validation_prompts=[]", cache=shared)
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()  # ended before its first step: nothing to keep
    train("sd15", *arguments)
    finished = contents(run)
    old = {"metrics.jsonl": finished["metrics.jsonl"], "timesteps.jsonl": finished["timesteps.jsonl"]}
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "weights")
    error = refused(capsys, "train", str(example("sd15")), *arguments)
    assert "holds a run already (metrics.jsonl): it has no checkpoint yet; --resume starts it over and keeps" in error
    for number in (1, 2):
        train("sd15", *arguments, "--resume")
        kept = contents(run)
        for name, text in old.items():
            assert kept[name.replace(".", f".{number}.")] == text, name
        assert kept.keys() - finished.keys() == {
            f"{name}.{n}.jsonl" for name in ("metrics", "timesteps") for n in range(1, number + 1)
        }
        one, other = (load(files["weights/pytorch_lora_weights.safetensors"]) for files in (finished, kept))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        old = {name: kept[name] for name in old}
        shutil.rmtree(run / "checkpoints")
        shutil.rmtree(run / "weights")


def test_overwrite_replaces_a_run_and_nothing_else(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ["training.validation_steps=0", "samples.validation_prompts=[]", "training.report_to=tensorboard"]
    command = ["train", str(example("sd15")), *options(tmp_path, 2, *plain, cache=shared)]
    run = tmp_path / "run"
    assert cli.main(command) == 0
    others = {"report.html": "mine", "metrics.1.jsonl": "of an earlier one", "samples/mine.png": "mine"}
    events = {name for name in contents(run) if name.startswith("tensorboard/events")}
    assert events
    (run / "samples").mkdir()
    for name, text in others.items():
        (run / name).write_text(text)
    (run / "samples" / "step-00000002.png").write_text("drawn")
    (run / "checkpoints" / "step-00000009").mkdir()
    kept = contents(run)
    with pytest.raises(SystemExit):
        cli.main([*command, "--resume", "--overwrite"])
    # What is refused removes nothing, whether it is a setting or a run in another process.
    refused(capsys, *command, "training.optimizer=adamw8bit", "training.mixed_precision=fp8", "--overwrite")
    refused(capsys, *command, "data.held_out=1000", "--overwrite")
    hold = (
        f"from sipo.locks import locked\nwith locked({str(run)!r}, 'it'):\n    print('held', flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert "is in use by process" in refused(capsys, *command, "--overwrite")
        other.communicate("\n")
    assert contents(run) == kept
    capsys.readouterr()
    assert cli.main([*command, "training.max_train_steps=1", "--overwrite"]) == 0
    removed = "checkpoints, metrics.jsonl, timesteps.jsonl, samples, weights, tensorboard"
    assert f"{run}: --overwrite removed the run that was here ({removed})" in capsys.readouterr().err
    assert steps_of(tmp_path) == [1]
    now = contents(run)
    assert {name: now[name].decode() for name in others} == others
    assert {name.split("/")[1] for name in now if name.startswith("checkpoints/")} == {"step-00000001"}
    assert not events & now.keys() and any(name.startswith("tensorboard/events") for name in now)
    assert "samples/step-00000002.png" not in now and not (run / "checkpoints" / "step-00000009").exists()
    assert yaml.safe_load(now["config.yaml"])["training"]["max_train_steps"] == 1


def test_overwrite_keeps_weights_that_no_run_has_written(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "run" / "weights"
    weights.mkdir(parents=True)
    (weights / "mine.safetensors").write_text("mine")
    command = ["train", str(example("sd15")), *options(tmp_path, 1, cache=shared), "--overwrite"]
    assert f"{weights} has no SHA256SUMS, so no run has written it, and --overwrite" in refused(capsys, *command)
    assert (weights / "mine.safetensors").read_text() == "mine"


# ---- Ways to train: full tuning, reference errors, averages, flows of both kinds ----


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for the tests below."""
    folder = tmp_path_factory.mktemp("shared") / "cache"
    assert cli.main(["precompute", str(example("sd15")), f"data.cache={folder}", *SHORT]) == 0
    return folder


def test_full_tuning_saves_a_network_that_diffusers_loads(shared: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    full = [
        "model.tuning=full",
        "training.use_ema=true",
        "training.ema_decay=0.5",
        "samples.validation_prompts=[]",
        "training.learning_rate=1e-3",
    ]
    train("sd15", *options(tmp_path, 3, *full, cache=shared))
    network = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "weights", subfolder="unet")
    base = UNet2DConditionModel.from_pretrained(f"{shared}-toy/model", subfolder="unet")
    raw = load_file(tmp_path / "run" / "checkpoints" / "step-00000003" / "model.safetensors")
    moved = {name: (tensor - base.state_dict()[name]).abs().max() for name, tensor in network.state_dict().items()}
    assert sum(distance > 0 for distance in moved.values()) > len(moved) / 2
    # The average is what is saved: behind the last weights, ahead of the first.
    assert any(not torch.equal(raw[name], tensor) for name, tensor in network.state_dict().items())


def test_precomputed_reference_errors_give_the_losses_of_a_reference(shared: Path, tmp_path: Path) -> None:
    fixed = [
        "data.draws=3",
        "data.reference_errors=true",
        "training.proportion_empty_prompts=0.3",
        "samples.validation_prompts=[]",
    ]
    losses = {}
    for kind in ("adapter_off", "errors", "copy"):
        train("sd15", *options(tmp_path / kind, 5, *fixed, f"model.reference={kind}", cache=shared))
        lines = read_metrics(tmp_path / kind / "run" / "metrics.jsonl")
        losses[kind] = [[v for k, v in line.items() if k.endswith(("loss", "ref_mse"))] for line in lines]
    assert losses["copy"] == losses["adapter_off"]
    for with_network, without in zip(losses["copy"], losses["errors"], strict=True):
        assert without == pytest.approx(with_network, rel=2e-5)
    assert len({tuple(values) for values in losses["errors"]}) > 4


@pytest.mark.parametrize(
    ("name", "settings", "kept"),
    [
        ("sd3", {"shift": 5.0}, {"shift": 5.0, "use_dynamic_shifting": False}),
        ("wan", {"shift": 4.0, "prediction_type": "flow_prediction"}, {"flow_shift": 4.0}),
        ("sd15", {"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
    ],
)
def test_what_the_scheduler_says_can_be_set(
    name: str, settings: dict[str, Any], kept: dict[str, Any], tmp_path: Path
) -> None:
    """For training and for the samples alike; a checkpoint of one is not resumed with another."""
    overrides = [f"model.{key}={value}" for key, value in settings.items()]
    before, after = (
        open_run(config.load_config(example(name), [f"data.cache={tmp_path / 'cache'}", *more]))
        for more in ([], overrides)
    )
    assert after.schedule.shift == settings.get("shift", 1.0)
    assert after.schedule.prediction_type == ("v_prediction" if name == "sd15" else "flow")
    assert {key: after.load_encoders().scheduler.config[key] for key in kept} == kept
    assert repr(make_loss(before)) != repr(make_loss(after))


def test_precompute_mends_what_was_damaged(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    for kind in ("cache", "cache-toy"):
        shutil.copytree(shared.with_name(kind), tmp_path / kind)
    shutil.rmtree(cache / "references", ignore_errors=True)  # of other draws, from another test
    more = [
        *options(tmp_path, 3, cache=cache),
        "data.draws=2",
        "data.reference_errors=true",
        "samples.validation_prompts=[]",
    ]
    precompute = ["precompute", str(example("sd15")), *more]
    assert cli.main(precompute) == 0
    kept = {path: path.read_bytes() for path in sorted(cache.rglob("*.safetensors"))}
    assert any("errors" in path.name for path in kept) and any("latents" in path.name for path in kept)
    for path in kept:  # one bit in the middle of the data of each
        flip_bit(path, -9)
    assert cli.main(["train", *precompute[1:]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ".safetensors" in error and "sipo precompute" in error
    assert cli.main(precompute) == 0
    for path, data in kept.items():
        if "errors" not in path.name:
            assert path.read_bytes() == data, path.name
        else:  # a network's passes may round otherwise where its memory lies otherwise
            for key, tensor in load(data).items():
                torch.testing.assert_close(load_file(path)[key], tensor, rtol=1e-6, atol=0)
    train("sd15", *more)


def test_other_options_train(shared: Path, tmp_path: Path) -> None:
    """bfloat16 weights under autocast, checkpointing, a learning rate that falls, dropped captions, skipped work."""
    more = ["model.dtype=bfloat16", "training.mixed_precision=bf16", "model.gradient_checkpointing=true"]
    more += [
        "training.lr_scheduler=cosine",
        "training.proportion_empty_prompts=0.5",
        "training.timestep_sampling=informative",
    ]
    more += [
        "training.skip_inactive=true",
        "data.random_flip=true",
        "data.enable_tiling=true",
        "data.center_crop=false",
    ]
    more += ["loss.method=dpo_cm", "model.prediction_type=v_prediction"]
    train("sd15", *options(tmp_path, 4, *more))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.5 * rates[0]
    assert all(0 < line["timestep_share"] <= 1 and line["nonfinite_steps"] == 0 for line in lines)
    card = (tmp_path / "run" / "weights" / "README.md").read_text()
    assert "from_config(pipeline.scheduler.config, prediction_type='v_prediction')\n" in card


# ---- Processes: killed, and two at once ----


def start(name: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "sipo", "train", str(example(name)), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_lines(process: subprocess.Popen[str], log: Path, count: int) -> None:
    """Until a run has written so many log lines."""
    until = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) > count):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < until, "no log lines in two minutes"
        time.sleep(0.02)


def test_killed_and_resumed_ends_with_the_same_bits(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["training.checkpointing_steps=3", "samples.validation_prompts=[]"]
    train("sd15", *options(tmp_path / "once", 40, *arguments, cache=shared))
    log = tmp_path / "killed" / "run" / "metrics.jsonl"
    process = start("sd15", *options(tmp_path / "killed", 40, *arguments, cache=shared))
    wait_for_lines(process, log, 12)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [line["step"] for line in map(json.loads, log.read_text().splitlines()[:-1])]
    assert 5 < max(done) < 40
    train("sd15", *options(tmp_path / "killed", 40, *arguments, cache=shared), "--resume")
    assert "weights, and how to load them" in "".join(capsys.readouterr())
    files = [tmp_path / place / "run" / "weights" / "pytorch_lora_weights.safetensors" for place in ("once", "killed")]
    one, other = map(load_file, files)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(shared: Path, tmp_path: Path) -> None:
    arguments = options(tmp_path, 4000, "samples.validation_prompts=[]", "training.validation_steps=0", cache=shared)
    process = start("sd15", *arguments)
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for_lines(process, log, 4)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output[-3000:]
    done = read_metrics(log)[-1]["step"]
    assert f"stopped after step {done}; `sipo train {example('sd15')}" in output and "--resume` continues" in output
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:08d}" / "state.json").is_file()


def train_in_two(*arguments: str) -> str:
    """Runs ``sipo train`` in two processes; returns what they print on standard error."""
    # accelerate's own launcher starts several processes on a CPU by mpirun alone; torch's sets the same variables.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "sipo"]
    command = [sys.executable, *launch, "train", str(example("sd15")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stderr


def test_two_processes_are_one_with_twice_the_batch(shared: Path, tmp_path: Path) -> None:
    """The same losses, and the same weights to rounding; they remove a run that was there, once."""
    arguments = ["samples.validation_prompts=[]", "training.max_grad_norm=null"]
    train("sd15", *options(tmp_path / "one", 4, *arguments, "training.train_batch_size=4", cache=shared))
    train("sd15", *options(tmp_path / "two", 6, *arguments, cache=shared))
    two_of_them = options(tmp_path / "two", 4, *arguments, "training.train_batch_size=2", cache=shared)
    error, run = train_in_two(*two_of_them, "--overwrite"), tmp_path / "two" / "run"
    removed = "checkpoints, metrics.jsonl, timesteps.jsonl, weights"
    assert error.count(f"{run}: --overwrite removed the run that was here ({removed})") == 1
    assert steps_of(tmp_path / "two") == [1, 2, 3, 4]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
    assert cli.main(["verify", str(run)]) == 0
    for kind in ("training", "validation"):
        one, two = (read_metrics(tmp_path / place / "run" / "metrics.jsonl", kind) for place in ("one", "two"))
        assert [line["step"] for line in one] == [line["step"] for line in two] != []
        for single, double in zip(one, two, strict=True):
            for key in single.keys() - {"seconds", "step", "kind"}:
                # AdamW's first steps make much of a gradient's last bits, and beta more of what comes of it. The margin
                # is half of beta (1000) times a difference of two gaps that may nearly cancel: it is as exact as they.
                budget, least = 1e-5 if single["step"] == 1 else 5e-3, 1e-6
                if key.endswith("rewards/margins"):
                    gaps = (abs(single[key.replace("rewards/margins", gap)]) for gap in ("chosen_gap", "rejected_gap"))
                    least += budget * 500 * sum(gaps)
                elif key.endswith(("rewards/chosen", "rewards/rejected")):
                    least *= 500  # a reward is that many times a gap, and as exact as the gap
                if single[key] is None:  # a spread of one step
                    assert double[key] is None, (key, single["step"])
                    continue
                assert double[key] == pytest.approx(single[key], rel=budget, abs=least), (key, single["step"])
    weights = [
        load_file(tmp_path / place / "run" / "weights" / "pytorch_lora_weights.safetensors") for place in ("one", "two")
    ]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-3, atol=1e-5)


# ---- What goes wrong ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.family=sd16"], "model.family='sd16': expected one of sd15, sdxl, sd3, "),
        (["model.pretrained_model_name_or_path=nowhere"], "nowhere"),
        (["data.dataset_name=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.frames=9"], "data.frames=9: expected 1, sd15 makes images"),
        (["model.shift=3"], "model.shift=3.0: leave it out, PNDMScheduler has no flow schedule"),
        (["model.prediction_type=flow_prediction"], "model.prediction_type='flow_prediction': expected 'epsilon', 'v_"),
        (["model.prediction_type=sample"], "model.prediction_type='sample': expected another, PNDMScheduler cannot"),
        (["data.held_out=32"], "data.held_out=32: expected at least 0 and fewer than the 32 pairs there are"),
        (["loss.method=ppo"], "loss.method='ppo': expected one of diffusion_dpo, dpo_cm, sipo, sdpo"),
        (["data.dtype=bfloat16"], "data.dtype"),
        (["data.cache=/dev/null/x"], "/dev/null/x-toy: Not a directory, expected a folder that can be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    overrides: list[str], message: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(example("sd15")), *options(tmp_path, 3, cache=shared), *overrides]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sipo: error: ") and message in error, error
    assert not (tmp_path / "run" / "checkpoints").exists()
