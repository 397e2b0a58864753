"""The page of ``sipo analyze``: plain labels, settings as they were in force, and samples beside their prompts."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sipo import cli
from sipo.analysis import figures
from sipo.analysis.report import read_run, run_page
from sipo.analysis.samples import sample_pictures
from sipo.analysis.settings import in_force
from sipo.data.media import split_image_grid, write_image_grid
from sipo.training.log_reader import LogWarning

CONFIG: dict[str, Any] = {
    "model": {"family": "sd15", "lora": {"rank": 4, "alpha": None}},
    "training": {"train_batch_size": 2, "max_grad_norm": None, "progress": True},
    "loss": {"method": "sipo", "beta": None, "mask_threshold": 0.9, "num_inference_steps": None},
    "samples": {"validation_prompts": [], "guidance_scale": None},
    "data": {"sizes": [[6, 4], [8, 8]]},
}


def run_folder(folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "loss": 0.6, "rewards/accuracies": 0.5, "model_mse": 1.1, "ref_mse": 1.0} for step in (1, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def page(folder: Path) -> str:
    run = read_run(folder)
    return run_page(run, run.findings()).html()


# ---- Figures ----


def labels(svg: str) -> list[str]:
    return [html.unescape(re.sub("<[^>]*>", "", text)) for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, re.S)]


def test_labels_are_plain_numbers() -> None:
    """On a logarithmic axis over less than a decade they were 1.12 × 10⁰, and 6 × 10⁻¹."""
    line = {"kind": "discrete", "levels": 1000, "bins": 4}

    def by_level(*values: float) -> list[str]:
        found = labels(figures.by_level(line, {"": values}, "error", log=True))
        assert not re.search("[×{}$]", "".join(found))
        return found

    assert {"1.04", "1.10", "1.16"} <= set(by_level(1.03, 1.12, 1.17, 1.05))
    assert {"0.1", "0.2", "0.5", "1"} <= set(by_level(0.09, 0.3, 1.2, 1.0))
    assert {"0.001", "0.01", "0.1", "1"} <= set(by_level(0.0009, 0.01, 1.0, 2.0))
    assert {"10⁻⁷", "10⁻⁵", "0.001"} <= set(by_level(0.9e-7, 1e-5, 1e-3, 0.01))


def test_an_axis_has_no_factor_beside_it_and_whole_steps_below() -> None:
    def over(steps: Sequence[float], values: Sequence[float]) -> list[str]:
        return labels(figures.curves(steps, {"": values}, "loss"))

    assert {"0.69310", "0.69320"} <= set(over([1, 2, 3], [0.6931, 0.69315, 0.6932]))  # in place of +6.931e-1
    assert {"2·10⁻⁶", "4·10⁻⁶"} <= set(over([1, 2, 3], [0, 2e-6, 4.5e-6]))  # in place of 1e-6 at the top
    assert {"1,000,000", "2,000,000"} <= set(over([1e5, 2e6], [0.1, 0.2]))
    assert not re.search(r"\d\.\d", "".join(over([1, 2], [3, 40])))  # no step 1.5
    found = [figures.number(value) for value in (0, 1, 0.1 + 0.2, -2.5e-7, 1e12, 12_000, 3.04e-12)]
    assert found == ["0", "1", "0.3", "-2.5·10⁻⁷", "10¹²", "12,000", "3.04·10⁻¹²"]


def test_rewards_are_drawn_where_the_log_has_them(tmp_path: Path) -> None:
    def drawn(**rewards: float) -> list[str]:
        folder = run_folder(tmp_path)
        lines = [json.loads(line) | rewards for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = re.search(r"<h3>Rewards</h3>.*?</svg>", page(folder), re.S)
        assert found is not None
        return labels(found[0])

    margin, both = {"rewards/margins": 0.7}, {"rewards/chosen": 0.5, "rewards/rejected": -0.2}
    assert {"chosen", "rejected", "margin", "reward"} <= set(drawn(**margin, **both))
    alone = set(drawn(**margin))  # of a loss of one's own
    assert "reward margin" in alone and not {"chosen", "rejected", "margin"} & alone


# ---- Settings ----


def test_settings_are_those_in_force(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path, CONFIG))
    rows = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert rows["loss.beta"] == "1000 (default)" and rows["loss.num_inference_steps"] == "50 (default)"
    assert rows["model.lora.alpha"] == "4 (default)" and rows["samples.guidance_scale"] == "7.5 (default)"
    assert rows["training.max_grad_norm"] == "null" and rows["training.progress"] == "true"  # as a YAML file has them
    assert "dt { white-space: nowrap; }" in text  # no name is broken in the middle
    flat = {"model.family": "wan", "loss.method": "diffusion_dpo", "loss.beta": None}
    clips = in_force(flat)["loss.beta"]
    assert clips.endswith(" (default)") and clips != "1000 (default)"
    assert in_force(flat | {"loss.beta": 20.0})["loss.beta"] == 20.0
    assert in_force({"method": "sipo", "beta": 5.0}) == {"method": "sipo", "beta": 5.0}  # the demo's


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("loss", "beta", "strong", "loss.beta='strong', expected a number"),
        ("training", "train_batch_size", [2], "training.train_batch_size=[…], expected a number"),
        ("loss", "method", {"a": 1}, ""),  # a section: there is no loss.method then
        ("loss", "method", 3, "loss.method=3, expected a name"),
        ("model", "family", ["sd15"], "model.family=[…], expected a name"),
        ("model", "family", "sd16", "family='sd16': expected one of"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    section: str, key: str, value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG | {section: CONFIG[section] | {key: value}}
    run_folder(tmp_path, config)
    status = cli.main(["analyze", str(tmp_path)])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == ((2, 1) if message else (0, 0)) and message in error


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"[1]", b"{", None])
def test_a_damaged_file_of_settings_is_one_line(
    name: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder(tmp_path) / name
    os.mkfifo(path) if content is None else path.write_bytes(content)
    assert cli.main(["analyze", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sipo: error: {path}: ") and error.count("\n") == 1 and len(error) < len(str(path)) + 120


# ---- Samples ----

PROMPTS = ["a fox", 'a "quoted" <b>word</b> & more', "", "four", "five"]


def samples(folder: Path, steps: Sequence[int], count: int = 5) -> None:
    """Each sample has one colour, which says of which prompt and step it is."""
    (folder / "samples").mkdir()
    for step in steps:
        colours = torch.arange(count, dtype=torch.uint8)[:, None, None, None] * 10 + step
        write_image_grid(folder / f"samples/step-{step:08d}.png", colours.expand(count, 3, 6, 4))


def pictures(folder: Path) -> str:
    """The page's figures of samples alone, as the others take time."""
    return "".join(picture.html() for picture in sample_pictures(folder, read_run(folder).settings)[1])


def shown(text: str) -> list[tuple[str, list[str], list[int]]]:
    """Of each figure of samples its prompt, what is said under its pictures, and their colours."""
    from PIL import Image

    found = []
    for figure in re.findall(r'<figure class="sample">(.*?)</figure>', text, re.S):
        pngs = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]*)"', figure)]
        cells = [Image.open(io.BytesIO(png)) for png in pngs]
        assert all(cell.size == (4, 6) for cell in cells)
        prompt = html.unescape(re.findall("<h3>(.*?)</h3>", figure)[0])
        steps = re.findall(r'<span class="soft">(.*?)</span>', figure)
        found.append((prompt, steps, [cell.getpixel((2, 3))[0] for cell in cells]))  # type: ignore[index]
    return found


def test_a_prompt_that_no_file_can_hold_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    samples(run_folder(tmp_path, CONFIG), (0,), count=1)
    (tmp_path / "samples/prompts.json").write_text('["half \\ud800 of it"]')
    assert "<h3>half ? of it</h3>" in pictures(tmp_path).encode().decode()


@pytest.mark.parametrize("beside", [True, False])
def test_each_sample_is_shown_with_its_prompt_at_the_first_and_the_last_step(beside: bool, tmp_path: Path) -> None:
    """By the file beside the samples, or, for a run from before there was one, by its configuration."""
    prompts = ["of another time"] if beside else PROMPTS
    written = CONFIG | {"samples": {"validation_prompts": prompts}}
    samples(run_folder(tmp_path, written), (0, 5, 2))
    if beside:
        (tmp_path / "samples/prompts.json").write_text(json.dumps(PROMPTS))
    both = ["step 0", "step 5"]
    assert shown(page(tmp_path)) == [
        (prompt or "(an empty prompt)", both, [10 * i, 10 * i + 5]) for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": {"validation_prompts": PROMPTS[:3]}},
        {"samples": {}},
        {"data": {}},
        {"data": {"sizes": [["a", None]]}},
    ],
)
def test_samples_that_cannot_be_told_apart_are_shown_whole(changes: dict[str, Any], tmp_path: Path) -> None:
    """Of other prompts than those that are known, or where no prompts or no sizes are."""
    samples(run_folder(tmp_path, CONFIG | {"samples": {"validation_prompts": PROMPTS}} | changes), (0, 7))
    text = pictures(tmp_path)
    assert shown(text) == [] and text.count("Which prompts these are of is not known.") == 2
    whole = base64.b64encode((tmp_path / "samples/step-00000007.png").read_bytes()).decode()
    assert whole in text and "<h3>Step 7</h3>" in text


def test_clips_are_shown_with_their_prompts(tmp_path: Path) -> None:
    (run_folder(tmp_path, CONFIG) / "samples").mkdir()
    (tmp_path / "samples/prompts.json").write_text(json.dumps(PROMPTS[:2]))
    for step in (0, 4, 10):
        for number in range(2):
            (tmp_path / f"samples/step-{step:08d}-{number}.mp4").write_bytes(b"clip %d of step %d" % (number, step))
    text = pictures(tmp_path)
    figures_of = re.findall(r'<figure class="sample"><h3>(.*?)</h3>(.*?)</figure>', text, re.S)
    assert [html.unescape(prompt) for prompt, _ in figures_of] == PROMPTS[:2]
    clips = [base64.b64decode(c) for c in re.findall(r'src="data:video/mp4;base64,([^"]*)"', text)]
    assert clips == [b"clip %d of step %d" % place for place in ((0, 0), (0, 10), (1, 0), (1, 10))]


def test_damaged_samples_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    samples(run_folder(tmp_path, CONFIG | {"samples": {"validation_prompts": PROMPTS}}), (0, 5))
    last = tmp_path / "samples/step-00000005.png"
    (tmp_path / "samples/step-odd.png").write_bytes(b"")  # not one of ours
    for damage in (last.read_bytes()[:60], b"", b"GIF89a"):
        last.write_bytes(damage)
        with pytest.warns(LogWarning, match=rf"^{last}: samples left out \("):
            assert [(steps, colours) for _, steps, colours in shown(pictures(tmp_path))] == [
                (["step 0"], [10 * i]) for i in range(5)
            ]
    last.unlink()
    for damage, reason in ((b"\xff", "not UTF-8"), (b"[" * 100_000, "nested too deeply")):
        (tmp_path / "samples/prompts.json").write_bytes(damage)
        said = rf"prompts.json: {reason}.*; the configuration's samples.validation_prompts are shown"
        with pytest.warns(LogWarning, match=said):
            assert len(shown(pictures(tmp_path))) == 5
    (tmp_path / "samples/prompts.json").write_text('{"a": 1}')
    assert "Which prompts these are of is not known." in pictures(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 9])
def test_a_grid_comes_apart_into_what_it_was_made_of(count: int, tmp_path: Path) -> None:
    images = torch.randint(256, (count, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    write_image_grid(tmp_path / "grid.png", images)
    for image, cell in zip(images, split_image_grid(tmp_path / "grid.png", count, 5, 7), strict=True):
        assert torch.equal(torch.tensor(np.asarray(cell)), image.permute(1, 2, 0))
    for wrong in ((97, 5, 7), (count, 6, 7), (0, 5, 7)):
        with pytest.raises(ValueError, match=r"pixels, expected \d+x\d+|expected at least 1 image"):
            split_image_grid(tmp_path / "grid.png", *wrong)
