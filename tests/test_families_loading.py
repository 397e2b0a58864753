"""Loading a family's parts, its schedule and the shift by size; folders, schedulers and sizes that are refused."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from sipo.families import FAMILIES, get_family
from sipo.families.toy import TOYS
from sipo.schedule import NoiseSchedule, schedule_for
from sipo.schedule.levels import SettingError
from tests.family_cases import (
    each_toy,
    family_of,
    folder_of,
    load_toy,
    network_of,
    pipeline_of,
    sampled,
    sides_of,
    size_of,
)


@each_toy
def test_loads_in_parts(toy: str) -> None:
    family, network = load_toy(toy, dtype=torch.bfloat16)
    parts = family.networks_in(network)
    assert [type(part).__name__ for part in parts.values()] == [family.network_class] * len(family.networks)
    encoders = family.load_encoders(folder_of(toy), dtype=torch.bfloat16)
    assert all(encoders.components[name] is None for name in parts)
    modules = {name: m for name, m in encoders.components.items() if isinstance(m, nn.Module)}
    assert len(modules) >= 2
    for name, module in modules.items():
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
        assert next(module.parameters()).dtype == (torch.float32 if name == "vae" else torch.bfloat16)
    without = family.load_encoders(folder_of(toy), vae_dtype=torch.bfloat16, text=False)
    held = {name: m for name, m in without.components.items() if isinstance(m, nn.Module)}
    assert held.keys() == {"vae"} and held["vae"].dtype == torch.bfloat16
    whole = network_of(pipeline_of(toy), family)
    mine = network.state_dict()
    for name, tensor in whole.state_dict().items():  # diffusers keeps some of Wan's in float32
        assert torch.equal(mine[name], tensor.to(mine[name].dtype))


def test_an_image_vae_that_overflows_in_half_precision() -> None:
    encoders = get_family("sdxl").load_encoders(folder_of("sdxl"), dtype=torch.float16)
    assert (encoders.vae.dtype, encoders.text_encoder.dtype) == (torch.float32, torch.float16)
    for toy, message in {
        "sdxl": r"may overflow in vae_dtype='float16' \(force_upcast\), expected 'float32' or 'bfloat16'$",
        "qwen-image": "may overflow in vae_dtype='float16', expected 'float32' or 'bfloat16'$",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(str(folder_of(toy)))}: its VAE {message}"):
            family_of(toy).load_encoders(folder_of(toy), vae_dtype=torch.float16)


@pytest.mark.parametrize(
    ("toy", "kind", "prediction", "shift"),
    [
        ("sd15", "discrete", "epsilon", 1),
        ("sd21", "discrete", "v_prediction", 1),
        ("sdxl", "discrete", "epsilon", 1),
        ("sd3", "flow", "flow", 3),
        ("flux-schnell", "flow", "flow", 1),
        ("z-image", "flow", "flow", 3),
        ("lumina2", "flow", "flow", 6),
        ("sana", "flow", "flow", 3),
        ("cogvideox", "discrete", "v_prediction", 1),
        ("cogvideox-2b", "discrete", "v_prediction", 1),
        ("wan", "flow", "flow", 3),
    ],
)
def test_schedule(toy: str, kind: str, prediction: str, shift: float) -> None:
    schedule = family_of(toy).load_schedule(folder_of(toy), 20)
    assert (schedule.kind, schedule.prediction_type, schedule.shift) == (kind, prediction, shift)
    assert (schedule.num_inference_steps, schedule.num_train_timesteps) == (20, 1000)
    if toy.startswith("cogvideox"):
        alpha, sigma = schedule.alpha_sigma(torch.tensor([500, 999]))
        snr = (alpha / sigma) ** 2
        assert snr[1] == 0
        other = family_of(toy).load_schedule(folder_of("cogvideox-2b" if toy == "cogvideox" else "cogvideox"))
        assert snr[0] != pytest.approx(float((other.alpha_sigma(torch.tensor([500]))[0] ** 2)[0]), rel=0.01)


def with_scheduler(toy: str, folder: Path, **changes: Any) -> Path:
    """A toy's folder with another configuration of its scheduler."""
    shutil.copytree(folder_of(toy), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return folder


def test_schedule_with_a_users_settings() -> None:
    def load(toy: str, **settings: Any) -> Any:
        return family_of(toy).load_schedule(folder_of(toy), 20, **settings)

    assert load("sd15", prediction_type="v_prediction").prediction_type == "v_prediction"
    assert load("sd3", shift=5.0).shift == 5.0
    assert load("wan", shift=5.0, prediction_type="flow_prediction", sizes=[(64, 64)]).shift == 5.0
    for toy, settings, message in (
        ("sd15", {"shift": 3.0}, "shift=3.0: leave it out, PNDMScheduler has no flow"),
        ("sd15", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction': expected 'epsilon', 'v_"),
        ("sd3", {"prediction_type": "epsilon"}, "prediction_type='epsilon': expected 'flow_prediction'"),
        ("wan", {"prediction_type": "epsilon"}, "prediction_type='epsilon': expected 'flow_prediction' or 'sample'"),
    ):
        with pytest.raises(SettingError, match="^" + re.escape(message)) as caught:
            load(toy, **settings)
        assert caught.value.name == next(iter(settings))
    assert load("sd15", prediction_type="sample").prediction_type == "sample"
    with pytest.raises(SettingError, match=r"^prediction_type='sample': expected another, PNDMScheduler cannot"):
        load("sd15", prediction_type="sample", sampled=True)


def test_dynamic_shift_goes_by_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of("sd3")
    folder = with_scheduler("sd3", tmp_path / "sd3", use_dynamic_shifting=True)
    # 4096 tokens, where diffusers' mu is 1.15
    one_shift = family.load_schedule(folder, sizes=[(1024, 1024), (2048, 512)])
    assert type(one_shift) is NoiseSchedule and one_shift.shift == pytest.approx(math.exp(1.15))
    several = [(1024, 1024), (512, 512)]
    by_size = family.load_schedule(folder, sizes=several)
    for side, mu in ((128, 1.15), (64, 1024 * 0.65 / 3840 + 0.5 - 256 * 0.65 / 3840)):
        assert schedule_for(by_size, torch.zeros(1, 16, side, side)).shift == pytest.approx(math.exp(mu))
    assert type(family.load_schedule(folder, sizes=several, shift=3.0)) is NoiseSchedule
    # what the pipeline itself makes of that size
    asked: list[float] = []
    original = diffusers.FlowMatchEulerDiscreteScheduler.set_timesteps

    @functools.wraps(original)
    def recorded(self: Any, *args: Any, mu: float | None = None, **options: Any) -> None:
        asked.append(mu if mu is not None else math.nan)
        original(self, *args, mu=mu, **options)

    monkeypatch.setattr(diffusers.FlowMatchEulerDiscreteScheduler, "set_timesteps", recorded)
    for toy in ("sd3", "z-image"):
        family, folder = family_of(toy), with_scheduler(toy, tmp_path / f"{toy} asked", use_dynamic_shifting=True)
        pipeline, network = family.load_encoders(folder), family.load_network(folder)
        family.sample(pipeline, network, ["a"], seed=0, steps=1, **size_of(family))
        shift = family.load_schedule(folder, sizes=[sides_of(family)]).shift
        assert [math.exp(mu) for mu in asked] == pytest.approx([shift], rel=1e-12)
        asked.clear()
    # Wan's pipeline has no dynamic shifting, and Lumina 2's takes the number of channels for that of tokens.
    for toy in ("wan", "lumina2"):
        folder = with_scheduler(toy, tmp_path / toy, use_dynamic_shifting=True)
        with pytest.raises(ValueError, match="use_dynamic_shifting=True: expected image_seq_len=") as caught:
            family_of(toy).load_schedule(folder, sizes=[(64, 64)])
        assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)


LEAVE_THE_LEVELS_TO_THE_SCHEDULER = ("sd3", "wan", "wan2.2", "sana")  # math.md §3 has how far off its grid is


@pytest.mark.parametrize(
    "toy",
    [toy for toy in TOYS if family_of(toy).schedule_kind == "flow" and toy not in LEAVE_THE_LEVELS_TO_THE_SCHEDULER],
)
def test_the_pipeline_visits_the_levels_of_the_schedule(toy: str) -> None:
    family, pipeline = family_of(toy), pipeline_of(toy)
    sampled(pipeline, family, steps=4)
    schedule = family.load_schedule(folder_of(toy), 4, sizes=[sides_of(family)])
    u, k = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64), schedule.shift
    levels = k * u / (1 + (k - 1) * u)
    if schedule.shift_terminal is not None:
        levels = 1 - (1 - levels) * (1 - schedule.shift_terminal) / (1 - levels[-1])
    visited = pipeline.scheduler.sigmas[:-1].double()
    torch.testing.assert_close(visited, levels, rtol=0, atol=2e-7)


def test_a_number_out_of_range_is_the_users_or_the_files(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^num_inference_steps=1001: expected an integer in \[1, 1000\]") as caught:
        family_of("sd15").load_schedule(folder_of("sd15"), 1001)
    assert caught.value.name == "num_inference_steps"
    folder = with_scheduler("sd3", tmp_path / "sd3", shift=-1.0)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(folder))}: shift=-1\.0: expected a finite number > 0$"
    ) as file:
        family_of("sd3").load_schedule(folder)
    assert type(file.value) is ValueError


def test_schedulers_that_cannot_be_used_are_named_in_one_line(tmp_path: Path) -> None:
    folder = with_scheduler("sd3", tmp_path / "sd3", invert_sigmas=True)
    with pytest.raises(ValueError, match="DiscreteScheduler has invert_sigmas=True, expected a model without"):
        family_of("sd3").load_schedule(folder)
    folder = with_scheduler("sd15", tmp_path / "sd15")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name, message in (
        ("EDMEulerScheduler", "scheduler EDMEulerScheduler is not modelled, its samples are"),
        ("DPMSolverSDEScheduler", "torchsde"),
    ):
        index["scheduler"] = ["diffusers", name]
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        if name == "DPMSolverSDEScheduler" and not hasattr(diffusers.DPMSolverSDEScheduler, "_backends"):
            continue  # torchsde is there
        with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}: .*{message}") as caught:
            family_of("sd15").load_schedule(folder)
        assert "\n" not in str(caught.value)


@each_toy
def test_wrong_folders_are_named_in_one_line(toy: str, tmp_path: Path) -> None:
    family = family_of(toy)
    other = folder_of("sd15" if family.pipeline_class == "WanPipeline" else "wan")
    cases: list[tuple[Path, type[Exception], str]] = [
        (tmp_path / "absent", FileNotFoundError, "no such folder"),
        (tmp_path, FileNotFoundError, "model_index.json"),
        (other, ValueError, f"expected a {family.pipeline_class}"),
    ]
    for path, kind, text in cases:
        for load in (family.load_network, family.load_encoders, family.load_schedule):
            with pytest.raises(kind, match=text) as caught:
                load(path)
            message = str(caught.value)
            assert str(path) in message and "\n" not in message
    for path_text in ("./absent", "of/three/parts", "~/absent"):  # no hub is asked
        with pytest.raises(FileNotFoundError, match="no such folder"):
            family.load_network(path_text)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(folder_of("sd15"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    network = get_family("sd15").load_network(folder)
    torch.save(network.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors") as caught:
        get_family("sd15").load_network(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("toy", "file", "changes", "text"),
    [
        (
            "wan",
            "model_index.json",
            {"boundary_ratio": 0.9},
            "boundary_ratio=0.9, expected none; family 'wan2.2' takes it",
        ),
        (
            "wan2.2",
            "model_index.json",
            {"boundary_ratio": None},
            "boundary_ratio=None, expected .*; family 'wan' takes",
        ),
        (
            "wan2.2",
            "model_index.json",
            {"boundary_ratio": "0.9"},
            r"boundary_ratio='0.9', expected a number in \(0, 1\)",
        ),
        ("wan2.2", "model_index.json", {"boundary_ratio": 1.5}, r"boundary_ratio=1.5, expected a number in \(0, 1\)"),
        ("wan2.2", "model_index.json", {"boundary_ratio": None, "expand_timesteps": True}, "a Wan 2.2 5B: expected"),
        ("cogvideox", "transformer/config.json", {"in_channels": 8}, "takes 8 channels and gives 4"),
        ("cogvideox", "transformer/config.json", {"patch_size_t": 2}, "patch_size_t=2, a CogVideoX 1.5"),
        ("sd3", "scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "has 500 timesteps, expected 1000"),
        (
            "sd3",
            "model_index.json",
            {"text_encoder_3": [None, None]},
            "has no text_encoder_3, expected a pipeline with T5",
        ),
        ("flux", "model_index.json", {"_class_name": "FluxKontextPipeline"}, "family 'flux-kontext' takes it"),
        ("flux2", "model_index.json", {"_class_name": "Flux2KleinPipeline"}, "; family 'flux2-klein' takes it"),
        ("flux2-klein", "model_index.json", {"_class_name": "FluxPipeline"}, "; family 'flux' takes it"),
        ("flux", "transformer/config.json", {"in_channels": 32, "out_channels": 16}, "takes 32 channels and gives 16"),
        (
            "flux",
            "scheduler/scheduler_config.json",
            {"time_shift_type": "cubic"},
            "time_shift_type='cubic': expected 'exponential' or 'linear'",
        ),
        ("chroma", "scheduler/scheduler_config.json", {"use_beta_sigmas": True}, "has use_beta_sigmas=True: expected"),
        (
            "z-image",
            "model_index.json",
            {"_class_name": "ZImageOmniPipeline"},
            "holds a ZImageOmniPipeline, expected a",
        ),
        (
            "flux2",
            "transformer/config.json",
            {"in_channels": 32},
            "transformer takes 32 channels, expected 16, by the 4 channels of its VAE",
        ),
        ("sana", "model_index.json", {"_class_name": "SanaSprintPipeline"}, "holds a SanaSprintPipeline, expected a"),
        ("sana", "transformer/config.json", {"out_channels": 8}, "takes 4 channels and gives 8"),
        ("lumina2", "model_index.json", {"_class_name": "ZImagePipeline"}, "; family 'z-image' takes it"),
        ("sd15", "model_index.json", {"scheduler": ["elsewhere", "Mine"]}, "its scheduler is 'Mine'"),
    ],
)
def test_relatives_of_a_family_are_refused(
    toy: str, file: str, changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    family = family_of(toy)
    folder = tmp_path / toy
    shutil.copytree(folder_of(toy), folder)
    config = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(config | changes), encoding="utf-8")
    if file.startswith("transformer"):  # weights that fit
        network_class = getattr(diffusers, family.network_class)
        network_class.from_config(network_class.load_config(folder, subfolder="transformer")).save_pretrained(
            folder / "transformer"
        )
    with pytest.raises(ValueError, match=text):
        family.load_schedule(folder) if "scheduler" in text + file or toy == "sd3" else family.load_network(folder)


@each_toy
def test_a_network_takes_what_the_vae_and_the_text_encoders_give(toy: str, tmp_path: Path) -> None:
    """As parts of pipelines of several sizes would not, without weights that are read."""
    family, folder = family_of(toy), tmp_path / toy
    shutil.copytree(folder_of(toy), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    start = re.escape(f"{folder}: its {family.network}")
    for parts, key, message in (
        (
            "vae",
            "latent_channels|z_dim",
            rf"{start} takes (\d+) channels, expected (\d+), by the \d+ channels of its VAE",
        ),
        (
            "text_encoder*",
            "hidden_size|d_model",
            rf"{start} has {family.text_width_key}=(\d+), expected (\d+), by the .*",
        ),
    ):
        family.empty_network(folder)
        before = {
            part / "config.json": (part / "config.json").read_text(encoding="utf-8") for part in folder.glob(parts)
        }
        for file, text in before.items():
            twice = re.sub(rf'("(?:{key})": )(\d+)', lambda found: f"{found[1]}{2 * int(found[2])}", text)
            file.write_text(twice, encoding="utf-8")
        with pytest.raises(ValueError) as caught:
            family.empty_network(folder)
        found = re.fullmatch(message, str(caught.value))
        assert found and int(found[2]) == 2 * int(found[1]) and "\n" not in str(caught.value)
        for file, text in before.items():
            file.write_text(text, encoding="utf-8")
        if parts == "vae":
            (folder / "vae" / "config.json").unlink()  # a folder without a VAE has nothing to be held to


@pytest.mark.parametrize(
    ("toy", "size", "nearest"),
    [
        ("sd15", (512, 500, 1), "height=512, width=496, frames=1"),
        ("sdxl", (1024, 1024, 2), "height=1024, width=1024, frames=1"),
        ("sd3", (1000, 1024, 1), "height=992, width=1024, frames=1"),
        ("flux", (1024, 1016, 1), "height=1024, width=1024, frames=1"),
        ("flux2", (1024, 1016, 1), "height=1024, width=1024, frames=1"),
        ("sana", (1000, 1024, 1), "height=992, width=1024, frames=1"),
        ("cogvideox", (480, 720, 48), "height=480, width=720, frames=49"),
        ("wan", (480, 830, 81), "height=480, width=832, frames=81"),
        ("wan", (3, 832, 0), "height=16, width=832, frames=1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(toy: str, size: tuple[int, int, int], nearest: str) -> None:
    with pytest.raises(ValueError, match=f"the nearest is {nearest}"):
        family_of(toy).check_size(*size)
    good = [int(part.partition("=")[2]) for part in nearest.split(", ")]
    family_of(toy).check_size(*good)


def test_families_by_name() -> None:
    assert [get_family(name).name for name in FAMILIES] == list(FAMILIES)
    with pytest.raises(ValueError, match=r"family='sd1.5': expected one of sd15, .*did you mean 'sd15'"):
        get_family("sd1.5")
