"""The pages in docs/: how they are read, and how what is in them is run at toy size.

Commands run as they stand. What makes them small is around them: a folder that has toys under the names of the
published models and data sets, the configurations of examples/ with their sizes and counts reduced by ``SMALLER``, and
the same reduction of what a command overrides. docs/README.md says so to the reader.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.state import AcceleratorState

from sipo import cli
from sipo.data.readers import JsonlReader

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Those of README.md under "How to do something"; tests/test_alignment.py has the study's.
OTHERS = ("alignment", "architecture", "math", "options", "README")
PAGES = sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in OTHERS)

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
    "training.max_train_steps": lambda steps: max(1, steps // 500),
    "training.train_batch_size": lambda pairs: min(pairs, 2),
    "training.gradient_accumulation_steps": lambda passes: min(passes, 2),
    "training.lr_warmup_steps": lambda steps: min(steps, 1),
    "training.checkpointing_steps": lambda steps: max(1, steps // 500),
    "training.validation_steps": lambda steps: steps // 100,
    "training.dataloader_num_workers": lambda _: 0,
    "samples.validation_prompts": lambda prompts: prompts[:1],
}
QUIET = {
    "training.progress": False,
    "training.report_to": "none",
    "training.logging_steps": 1,
    "samples.num_inference_steps": 2,
}
# Options of commands, and sizes in Python blocks.
SMALLER_OPTIONS = {
    "--frames": lambda frames: str(int(frames) // 9),
    "--fps": lambda fps: str(float(fps) / 2),
    "--checkpoint": lambda step: str(int(step) // 500),
    "--levels": lambda levels: str(int(levels) // 5),
    "--draws": lambda draws: str(int(draws) // 8),
}
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


# ---- Running what is in them ----


def make_workspace(folder: Path, clip: Path) -> Path:
    """A folder that has what the pages' commands name: toys, under the published names; ``clip`` is a CLIP model."""
    from sipo.data.toy import make_toy_pairs
    from sipo.families.toy import build_toy

    for name, family in MODELS.items():
        build_toy(family, folder / name)
    for path in (folder / "stabilityai").rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))  # examples/sdxl.yaml asks for this variant
    shutil.copytree(clip, folder / "yuvalkirstain" / "PickScore_v1")
    make_pickapic(make_toy_pairs(folder / "images", video=False, pairs=14), folder / "liuhuohuo2" / "pick-a-pic-v2")
    pairs = make_toy_pairs(folder / "data", video=True, pairs=12)
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    scores = {"chosen_score": 1.0, "rejected_score": 0.0}  # as an earlier labelling, which `sipo label` replaces
    pairs.write_text("".join(json.dumps(line | scores) + "\n" for line in lines))
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
    if words[4] == "train":
        assert re.search(rf"^# {LAUNCHED} processes, \d+ pairs in a step$", process.stdout, re.M), process.stdout
        assert list(Path("runs").rglob(f"process-{LAUNCHED - 1:05d}.safetensors")), process.stdout
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
