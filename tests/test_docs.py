"""The pages in docs/: every command in them is run here, at toy size, and every key that they name exists.

Commands run as they stand. What makes them small is around them: a folder that has toys under the names of the published
models and data sets, the configurations of examples/ with their sizes and counts reduced by ``SMALLER``, and the same
reduction of what a command overrides. docs/README.md says so to the reader.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from sipo import cli
from sipo.config import from_dict
from sipo.data.readers import JsonlReader
from sipo.data.savings import FULL_SIZE
from sipo.families import get
from sipo.training import TrainingConfig
from tests.test_label import clip_folder

__all__ = ["clip_folder"]  # a fixture: a CLIP model of random weights

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in ("architecture", "math", "README"))

# By key: from the number that a page or an example has to the one that is run.
SMALLER: dict[str, Callable[[Any], Any]] = {
    "data.sizes": lambda _: [[32, 32]],
    "data.frames": lambda frames: max(1, frames // 9),
    "data.fps": lambda fps: fps / 2,
    "data.max_pairs": lambda pairs: min(pairs, 12),
    "data.held_out": lambda pairs: min(pairs, 2),
    "data.shard_pairs": lambda pairs: min(pairs, 4),
    "data.draws": lambda draws: min(draws, 2),
    "model.lora.rank": lambda rank: min(rank, 4),
    "training.steps": lambda steps: max(1, steps // 500),
    "training.batch_size": lambda pairs: min(pairs, 2),
    "training.accumulation": lambda passes: min(passes, 2),
    "training.warmup": lambda steps: min(steps, 1),
    "training.checkpoint_every": lambda steps: max(1, steps // 500),
    "training.validate_every": lambda steps: steps // 100,
    "training.num_workers": lambda _: 0,
    "samples.prompts": lambda prompts: prompts[:1],
}
QUIET = {"training.progress": False, "training.tensorboard": False, "training.log_every": 1, "samples.steps": 2}
# Options of commands, and sizes in Python blocks.
SMALLER_OPTIONS = {"--frames": lambda frames: str(int(frames) // 9), "--fps": lambda fps: str(float(fps) / 2)}
SMALLER_PYTHON = {
    r"\bheight=\d+": "height=32",
    r"\bwidth=\d+": "width=32",
    r"\bnum_frames=\d+": "num_frames=9",
    r"\bnum_inference_steps=\d+": "num_inference_steps=2",
    r'"cuda"': '"cpu"',
}
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan",
}
# What the two scripts of docs/moving.md take, at the commits that it names. Both's; the first one's alone; the second's.
FLAGS_OF_BOTH = """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 beta_dpo cache_dir checkpointing_steps
    dataloader_num_workers dataset_name gradient_accumulation_steps gradient_checkpointing hub_model_id learning_rate
    local_rank logging_dir lr_scheduler lr_warmup_steps max_grad_norm max_train_samples max_train_steps mixed_precision
    no_hflip num_train_epochs output_dir pretrained_model_name_or_path pretrained_vae_model_name_or_path random_crop
    report_to resolution resume_from_checkpoint revision scale_lr seed train_batch_size
""".split()
FLAGS_OF_TRAIN_PY = """
    caption_column choice_model dataset_config_name dreamlike_pairs_only hard_skip_resume image_column
    input_perturbation noise_offset proportion_empty_prompts sdxl sft split tracker_project_name train_data_dir unet_init
    use_adafactor
""".split()
FLAGS_OF_DIFFUSERS = """
    checkpoints_total_limit dataset_split_name enable_xformers_memory_efficient_attention hub_token loss_type
    lr_num_cycles lr_power prior_generation_precision push_to_hub rank run_validation tracker_name use_8bit_adam
    vae_encode_batch_size validation_steps variant
""".split()
LAUNCHED = 2  # processes, whatever a page's configuration of accelerate says


# ---- Reading pages ----


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    language: str
    text: str

    @property
    def file(self) -> str:
        """The name that its first line gives it, where it is a file: ``# ddp.yaml``."""
        match = re.match(r"# ([\w.-]+\.\w+)\n", self.text)
        return match[1] if match else ""


@dataclass(frozen=True)
class Command:
    """A line of a shell block."""

    words: tuple[str, ...]
    status: int


def page_text(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", page_text(page), re.M | re.S)
    text = page_text(page)
    return [Block(text[: match.start()].count("\n") + 1, match[1], match[2]) for match in found]


def commands(block: Block) -> list[Command]:
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            status = re.search(r"# exit status (\d+)", line)
            found.append(Command(tuple(words), int(status[1]) if status else 0))
    return found


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page_text(page), flags=re.M | re.S)


def spans(page: str) -> list[str]:
    """What stands between backticks outside of the blocks."""
    return [span.replace("\n", " ").replace("\\|", "|") for span in re.findall(r"`([^`]+)`", prose(page))]


def known_keys() -> set[str]:
    least = {
        "model": {"family": "sd15", "path": "p"},
        "data": {"path": "p", "cache": "c"},
        "training": {"steps": 1, "output_dir": "o"},
    }
    return set(flat(from_dict(least).as_dict(), sections=True))


def flat(tree: dict[str, Any], place: str = "", *, sections: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            if sections:
                found[place + name] = value
            found |= flat(value, f"{place}{name}.", sections=sections)
        else:
            found[place + name] = value
    return found


# ---- What pages may say ----


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_every_block_is_of_a_kind_that_is_run_or_read(page: str) -> None:
    previous = ""
    for block in blocks(page):
        where = f"{page}.md:{block.line}"
        assert block.language in ("sh", "python", "yaml", "json", "text"), where
        if block.language == "text":
            assert previous in ("sh", "python"), f"{where}: the output of no block"
        previous = block.language
    assert page_text(page).count("\n```") == 2 * len(blocks(page)), f"{page}.md: a fence that nothing closes"


def test_every_page_is_in_the_index_and_short() -> None:
    for page in PAGES:
        assert f"({page}.md)" in page_text("README"), page
        assert 50 <= len(page_text(page).splitlines()) <= 170, page
        assert max(map(len, prose(page).splitlines())) <= 400, page


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_every_key_that_is_named_exists(page: str) -> None:
    known = known_keys()
    named = [
        key
        for span in spans(page)
        for key in re.findall(r"\b(?:model|data|training|loss|samples)\.[a-z]\w*(?:\.\w+)*", span)
    ]
    assert page == "README" or named
    for key in named:
        assert key in known, f"{page}.md names {key}"


@pytest.mark.parametrize("page", PAGES)
def test_yaml_and_json_are_what_they_are_for(page: str, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = {action.dest for action in launch_command_parser()._actions}
    for block in blocks(page):
        if block.language == "json":
            path = tmp_path / "pairs.jsonl"
            lines = [json.loads(line) for line in block.text.splitlines()]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines if "candidates" not in line))
            assert all(not record.problem for record in JsonlReader(path))
            assert all(len(line.get("candidates", "ab")) >= 2 and line["prompt"] for line in lines)
        elif block.language == "yaml" and block.file:
            path = tmp_path / block.file
            path.write_text(block.text)
            read = load_config_from_file(str(path))  # unknown keys are errors
            for key in (*(read.fsdp_config or {}), *(read.deepspeed_config or {})):
                assert key in options, f"{page}.md:{block.line}: accelerate has no {key}"
        elif block.language == "yaml":
            assert set(flat(yaml.safe_load(block.text))) <= known_keys(), f"{page}.md:{block.line}"


def test_every_message_that_is_quoted_is_one_of_ours() -> None:
    """A message stands between backticks and has "expected" or "…" in it; "…" is for what differs."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "sipo").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # one literal in several lines
    pieces = [
        (page, piece.strip())
        for page in PAGES
        for span in spans(page)
        if "…" in span or re.search(r"\bexpected\b", span)
        for piece in re.split("…", span)
        if len(piece.strip()) > 2
    ]
    assert len(pieces) > 40
    assert not [(page, piece) for page, piece in pieces if piece not in source]


def test_commands_in_the_text_are_among_those_that_are_run() -> None:
    run = [
        " ".join(command.words) for page in PAGES for b in blocks(page) if b.language == "sh" for command in commands(b)
    ]
    for page in [*PAGES, "README"]:
        for span in spans(page):
            if span.startswith(("sipo ", "accelerate launch")):
                assert any(command.startswith(span) for command in run), f"{page}.md: {span}"


def test_every_flag_of_the_scripts_has_its_row() -> None:
    found: dict[str, str] = {}
    for line in page_text("moving").splitlines():
        if line.startswith("| `--"):
            flags, scripts = (cell.strip() for cell in line.split("|")[1:3])
            names = re.findall(r"`--(\w+)`", flags)
            where = [script.strip().removesuffix(" (SD)") for script in scripts.split(",")]
            where = where * len(names) if len(where) == 1 else where
            found |= dict(zip(names, where, strict=True))
    wanted = dict.fromkeys(FLAGS_OF_BOTH, "a b") | dict.fromkeys(FLAGS_OF_TRAIN_PY, "a")
    assert found == wanted | dict.fromkeys(FLAGS_OF_DIFFUSERS, "b")


def test_what_may_change_when_a_run_is_resumed_is_what_the_page_says() -> None:
    rows = [line.split("|")[1:3] for line in page_text("resuming").splitlines() if line.startswith("| `training.")]
    may, must = (set(re.findall(r"`training\.(\w+)[`:]", " ".join(row[i] for row in rows[:7]))) for i in (0, 1))
    plain = set(TrainingConfig(1, "o").identity())
    assert must - {"steps"} == plain
    assert may - {"lr_schedule", "timestep_sampling"} == {f.name for f in dataclasses.fields(TrainingConfig)} - plain
    bound = TrainingConfig(1, "o", lr_schedule="cosine", timestep_sampling="informative")
    assert set(bound.identity()) == plain | {"steps", "log_every"}


def test_numbers_in_the_text_follow_from_the_models() -> None:
    sd15, sdxl, wan = (FULL_SIZE[name].parameters for name in ("SD1.5", "SDXL", "Wan 2.1 1.3B"))
    assert f"{sd15:,} weights,\n{sd15 * 12 / 1e9:.1f} GB a checkpoint" in page_text("resuming")
    assert f"{46_448_640:,} weights, {46_448_640 * 12 / 1e9:.2f} GB" in page_text("resuming")
    assert "46_448_640" in page_text("sdxl-pickapic") and f"{(77 * 2048 + 1280) * 2:,} bytes" in page_text(
        "sdxl-pickapic"
    )
    assert f"{wan * 2 / 1e9:.2f} GB of frozen bfloat16 weights ({wan:,} of 2 bytes)" in page_text("wan-clips")
    assert f"{47_185_920 * 16 / 1e9:.2f} GB of trained ones ({47_185_920:,} of LoRA rank 64" in page_text("wan-clips")
    # The adapters themselves, counted on networks without storage.
    import diffusers
    from peft import LoraConfig

    blocks_of_sdxl: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        networks = {
            "sdxl": (diffusers.UNet2DConditionModel(**blocks_of_sdxl), 32, sdxl, 46_448_640),
            "wan": (
                diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
                64,
                wan,
                47_185_920,
            ),
        }
        for family, (network, rank, parameters, adapted) in networks.items():
            assert sum(p.numel() for p in network.parameters()) == parameters
            network.requires_grad_(False)
            network.add_adapter(LoraConfig(r=rank, target_modules=list(get(family).lora_targets)))
            assert sum(p.numel() for p in network.parameters() if p.requires_grad) == adapted


# ---- Running them ----


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """A folder that has what the pages' commands name: toys, under the published names."""
    from sipo.data.toy import make_toy_pairs
    from sipo.families.toy import build_toy

    folder = tmp_path_factory.mktemp("docs")
    for name, family in MODELS.items():
        build_toy(family, folder / name)
    for path in (folder / "stabilityai").rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))  # examples/sdxl.yaml asks for this variant
    shutil.copytree(clip_folder, folder / "yuvalkirstain" / "PickScore_v1")
    make_pickapic(make_toy_pairs(folder / "images", video=False, pairs=14), folder / "yuvalkirstain" / "pickapic_v2")
    pairs = make_toy_pairs(folder / "data", video=True, pairs=12)
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    candidates = [{"prompt": line["prompt"], "candidates": [line["chosen"], line["rejected"]]} for line in lines]
    (folder / "data" / "candidates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in candidates))
    (folder / "examples").mkdir()
    for path in (ROOT / "examples").glob("*.yaml"):
        (folder / "examples" / path.name).write_text(yaml.safe_dump(smaller(yaml.safe_load(path.read_text()))))
    return folder


def make_pickapic(pairs: Path, folder: Path) -> None:
    """Pairs of images under Pick-a-Pic's columns; the second row is a tie."""
    from datasets import Dataset

    rows = []
    for row, record in enumerate(JsonlReader(pairs)):
        assert isinstance(record.chosen, Path) and isinstance(record.rejected, Path)
        images = [record.chosen.read_bytes(), record.rejected.read_bytes()]
        label = 0.5 if row == 1 else 1.0 - row % 2
        first = row % 2
        rows.append(
            {
                "caption": record.prompt,
                "jpg_0": images[first],
                "jpg_1": images[1 - first],
                "label_0": label,
                "label_1": 1.0 - label,
                "has_label": True,
            }
        )
    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(str(folder / "train-00000.parquet"))


def smaller(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration at toy size."""
    for key, value in (flat(tree) | QUIET).items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = SMALLER[key](value) if key in SMALLER else value
    return tree


def smaller_words(words: tuple[str, ...]) -> list[str]:
    """A command at toy size."""
    small: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if small and small[-1] in SMALLER_OPTIONS:
            word = SMALLER_OPTIONS[small[-1]](word)
        elif key in SMALLER:
            word = f"{key}={json.dumps(SMALLER[key](yaml.safe_load(value)))}"
        small.append(word)
    return small


def run_sipo(words: list[str]) -> tuple[int, str]:
    """``sipo`` in this process, which has imported everything already."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = cli.main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, output.getvalue()


def run_launch(words: list[str], folder: Path) -> tuple[int, str]:
    """``accelerate launch`` with its configuration made one of two processes on the CPU."""
    assert words[:2] == ["--config_file", words[1]] and words[2:4] == ["-m", "sipo"], words
    path = folder / words[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = yaml.safe_load(path.read_text()) | {"num_processes": LAUNCHED, "main_process_port": port}
    path.write_text(yaml.safe_dump(settings))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    return process.returncode, process.stdout


def run_python(text: str) -> str:
    for pattern, small in SMALLER_PYTHON.items():
        text = re.sub(pattern, small, text)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(text, "<docs>", "exec"), {"__name__": "__docs__"})
    return output.getvalue()


def unnumbered(text: str) -> list[str]:
    """Lines without what toy size changes: numbers, and how they are aligned."""
    return [" ".join(re.sub(r"\d[\d.,]*", "#", line).split()) for line in text.splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    shutil.rmtree("runs", ignore_errors=True)  # each page begins anew; what was encoded stays
    output, language = "", ""
    for block in blocks(page):
        where = f"{page}.md:{block.line}"
        if block.file:
            Path(block.file).write_text(block.text)
        elif block.language == "sh":
            output = ""
            for command in commands(block):
                program, *words = smaller_words(command.words)
                if program == "sipo":
                    status, said = run_sipo(words)
                else:
                    assert [program, words[0]] == ["accelerate", "launch"], f"{where}: {program} is not run by the test"
                    status, said = run_launch(words[1:], workspace)
                assert status == command.status, f"{where}: {' '.join(command.words)}\n{said}"
                output += said
        elif block.language == "python":
            output = run_python(block.text)
        elif block.language == "text" and language == "python":
            assert block.text == output, where
        elif block.language == "text":
            said_lines = unnumbered(output)
            for line in unnumbered(block.text):
                assert any(line in said for said in said_lines), f"{where}: {line!r} is not in\n{output}"
        language = block.language
