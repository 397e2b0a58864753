"""Labelling: which pairs come of which scores, and that the scorers' numbers are the models' own."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sipo import cli
from sipo.data.check import check_pairs
from sipo.data.label import label, run_label
from sipo.data.media import read_media, write_image, write_video
from sipo.data.readers import JsonlReader
from sipo.data.records import FURTHER_IMAGES, DataError, PairRecord
from sipo.data.scorers import AestheticScorer, ClipScorer, ScorerError, load_function
from sipo.data.toy import make_toy_pairs
from sipo.files import FileError
from tests.data_sets import clip, noise, write_lines


def level(images: list[Tensor], prompts: list[str]) -> list[float]:
    """Mean grey level, of a clip over all the frames that it is given."""
    return [float(image.float().mean()) for image in images]


def flat(folder: Path, levels: Sequence[int]) -> list[str]:
    """One grey image for each level; names relative to ``folder``."""
    names = [f"images/{number:02d}.png" for number in range(len(levels))]
    for name, grey in zip(names, levels, strict=True):
        write_image(folder / name, torch.full((3, 8, 8), grey, dtype=torch.uint8))
    return names


def candidates(folder: Path, *rows: Sequence[int]) -> Path:
    """A JSONL file whose rows have images of these levels as candidates."""
    lines = []
    for row, levels in enumerate(rows):
        names = flat(folder / f"{row}", levels)
        lines.append({"prompt": f"prompt {row}", "candidates": [f"{row}/{name}" for name in names], "id": row * 10})
    return write_lines(folder / "candidates.jsonl", lines)


def scores(path: Path) -> list[tuple[int, float, float]]:
    """Prompt's number and both scores of every pair; the files are checked to have these levels."""
    found = []
    for record in JsonlReader(path):
        assert record.problem == "" and record.chosen_score is not None and record.rejected_score is not None
        for source, score in ((record.chosen, record.chosen_score), (record.rejected, record.rejected_score)):
            assert float(read_media(source).pixels.float().mean()) == score
        number = int(record.prompt.split()[1])
        assert record.extra == {"id": number * 10}
        found.append((number, record.chosen_score, record.rejected_score))
    return found


# ---- Which pairs ----


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_best_and_worst_of_each_row(tmp_path: Path, batch_size: int) -> None:
    source = candidates(tmp_path, [30, 90, 60], [5, 1], [7, 7], [10, 20, 20, 10])
    output = tmp_path / "out" / "pairs.jsonl"
    summary = label(source, output, level, batch_size=batch_size)
    assert scores(output) == [(0, 90.0, 30.0), (1, 5.0, 1.0), (3, 20.0, 10.0)]
    assert (summary.rows, summary.pairs, summary.below_margin, summary.skipped) == (4, 3, 1, [])
    assert summary.describe() == "3 pairs of 4 rows, 1 left out below the margin"


def test_all_ordered_pairs(tmp_path: Path) -> None:
    source = candidates(tmp_path, [30, 90, 60, 60], [5, 1])
    summary = label(source, tmp_path / "pairs.jsonl", level, pairs="all")
    assert scores(tmp_path / "pairs.jsonl") == [
        (0, 90.0, 60.0),
        (0, 90.0, 60.0),
        (0, 90.0, 30.0),
        (0, 60.0, 30.0),
        (0, 60.0, 30.0),
        (1, 5.0, 1.0),
    ]
    assert (summary.pairs, summary.below_margin) == (6, 1)
    assert check_pairs(JsonlReader(tmp_path / "pairs.jsonl"), frames=1).skipped == 0


@pytest.mark.parametrize(("margin", "expected"), [(0.0, 3), (4.0, 3), (4.001, 2), (60.0, 1), (60.5, 0)])
def test_margin(tmp_path: Path, margin: float, expected: int) -> None:
    source = candidates(tmp_path, [30, 90], [5, 1], [7, 7], [10, 20])
    summary = label(source, tmp_path / "pairs.jsonl", level, min_margin=margin)
    found = scores(tmp_path / "pairs.jsonl")
    assert len(found) == summary.pairs == expected and summary.below_margin == 4 - expected
    assert all(better - worse >= margin for _, better, worse in found)


@pytest.mark.parametrize("key", FURTHER_IMAGES)
def test_condition_images_and_error_masks_stay_with_their_prompts(tmp_path: Path, key: str) -> None:
    names = flat(tmp_path, [50, 10])
    lines = [{"prompt": "a", "candidates": names, key: image} for image in ("from/a.png", 7)]
    source = write_lines(tmp_path / "candidates.jsonl", lines)
    summary = label(source, tmp_path / "out" / "pairs.jsonl", level, skip_bad=True)
    assert summary.skipped == [f"row 2: {key}=7: expected a path"]
    (record,) = JsonlReader(tmp_path / "out" / "pairs.jsonl")
    assert record.sources.keys() == {"chosen", "rejected", key} and record.extra == {}
    assert record.sources[key].resolve() == tmp_path / "from/a.png"  # type: ignore[union-attr]  # in another folder


def test_existing_pairs_are_labelled_again(tmp_path: Path) -> None:
    """The rejected one of the second row is the better one, whatever the file said."""
    names = flat(tmp_path, [50, 10, 60, 70])
    lines = [
        {"prompt": "prompt 0", "chosen": names[0], "rejected": names[1], "id": 0},
        {"prompt": "prompt 1", "chosen": names[2], "rejected": names[3], "chosen_score": 9, "id": 10},
    ]
    source = write_lines(tmp_path / "pairs.jsonl", lines)
    output = tmp_path / "labelled.jsonl"
    for _ in range(2):  # an earlier labelling is replaced
        label(source, output, level)
        assert scores(output) == [(0, 50.0, 10.0), (1, 70.0, 60.0)]


def test_visible_preference_of_the_toy_set_is_found(tmp_path: Path) -> None:
    def colourfulness(images: list[Tensor], prompts: list[str]) -> list[float]:
        return [float((i.amax(-3).float() - i.amin(-3).float()).mean()) for i in images]

    for video in (False, True):
        pairs = make_toy_pairs(tmp_path / str(video), video=video, pairs=8)
        turned = []
        for record in JsonlReader(pairs):
            assert isinstance(record.chosen, Path) and isinstance(record.rejected, Path)
            turned.append({"prompt": record.prompt, "candidates": [str(record.rejected), str(record.chosen)]})
        output = tmp_path / f"{video}.jsonl"
        label(write_lines(tmp_path / "turned.jsonl", turned), output, colourfulness, min_margin=1.0)
        for labelled, record in zip(JsonlReader(output), JsonlReader(pairs), strict=True):
            assert isinstance(labelled.chosen, Path) and isinstance(record.chosen, Path)
            assert labelled.chosen.resolve() == record.chosen.resolve()


def test_function_gets_evenly_spaced_frames_and_prompts(tmp_path: Path) -> None:
    levels = (torch.arange(12) * 20).to(torch.uint8)
    for number in range(2):
        pixels = levels[:, None, None, None].expand(12, 3, 16, 16).contiguous()
        write_video(tmp_path / f"{number}.mp4", pixels if number else pixels // 2, 8.0)
    write_image(tmp_path / "still.png", noise(1, 3, 4, 4))
    names = ["0.mp4", "1.mp4", "still.png"]
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "moving", "candidates": names}])
    seen: list[tuple[tuple[int, ...], str]] = []

    def look(images: list[Tensor], prompts: list[str]) -> Tensor:
        seen.extend((tuple(image.shape), prompt) for image, prompt in zip(images, prompts, strict=True))
        assert all(image.dtype == torch.uint8 for image in images)
        assert [round(float(frame.float().mean()) / 20) for frame in images[1]] == [1, 4, 7, 10]
        return torch.arange(float(len(images)))

    label(source, tmp_path / "out.jsonl", look, frames=4)
    assert seen == [((4, 3, 16, 16), "moving"), ((4, 3, 16, 16), "moving"), ((3, 4, 4), "moving")]
    (record,) = JsonlReader(tmp_path / "out.jsonl")
    assert (record.chosen, record.rejected) == (tmp_path / "still.png", tmp_path / "0.mp4")


# ---- Bad rows and bad scorers ----


def test_bad_rows_stop_or_are_skipped_and_told(tmp_path: Path) -> None:
    source = candidates(tmp_path, [1, 2], [3, 4], [5, 6])
    lines: list[Any] = [json.loads(line) for line in source.read_text().splitlines()]
    lines[1]["candidates"].insert(0, "none.png")
    lines += ["{", {"prompt": "a", "candidates": ["one.png"]}, {"prompt": " ", "candidates": ["a", "b"]}]
    write_lines(source, lines)
    output = tmp_path / "pairs.jsonl"
    before = '{"prompt": "a", "chosen": "a.png", "rejected": "b.png", "chosen_score": 1.0, "rejected_score": 0.0}\n'
    output.write_text(before)
    told = r"\(rows count from 1; skip_bad=True leaves such rows out\)"
    with pytest.raises(DataError, match=rf"^row 2: [^\n]*none\.png: no such file {told}$"):
        label(source, output, level, batch_size=2)
    assert output.read_text() == before
    for batch_size in (1, 2, 4, 50):
        summary = label(source, output, level, batch_size=batch_size, skip_bad=True)
        assert scores(output) == [(0, 2.0, 1.0), (2, 6.0, 5.0)]
        assert summary.rows == 6
        skipped = sorted(summary.skipped)
        assert [text.split(":")[0] for text in skipped] == ["row 2", "row 4", "row 5", "row 6"]
        assert "expected 'candidates', a list of two paths or more" in skipped[2]
        assert "4 rows skipped; they count from 1, as lines do in an editor\n  row " in summary.describe()


def test_whatever_one_row_does_the_others_are_labelled(tmp_path: Path) -> None:
    source = candidates(tmp_path, [1, 2], [3, 4], [5, 6], [7, 8], [9, 10])
    lines: list[Any] = [json.loads(line) for line in source.read_text().splitlines()]
    lines[0]["id"] = "half\ud800"  # which is passed on, and no text in UTF-8
    lines[1]["prompt"] = "half\ud800"
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "a.png")
    lines[2]["candidates"][0] = "fifo/a.png"
    write_image(tmp_path / "large.png", noise(1, 3, 100, 200))
    lines[3]["candidates"][1] = "large.png"
    lines += ['{"prompt": ' + "[" * 100_000, {"prompt": "a", "candidates": ["a\0.png", "b" * 300]}]
    write_lines(source, lines)
    output = tmp_path / "pairs.jsonl"
    summary = label(source, output, level, skip_bad=True, max_pixels=19_999)
    pairs = list(JsonlReader(output))
    assert [(pair.prompt, pair.chosen_score, pair.extra["id"]) for pair in pairs] == [
        ("prompt 0", 2.0, "half\ud800"),
        ("prompt 4", 10.0, 40),
    ]
    found = [text.split(": ", 1) for text in sorted(summary.skipped)]
    assert [row for row, _ in found] == ["row 2", "row 3", "row 4", "row 6", "row 7"]
    expected = (
        "prompt='half\\ud800': expected text",
        f"{tmp_path / 'fifo/a.png'}: is a FIFO, expected a file",
        f"{tmp_path / 'large.png'}: has 100x200 pixels, expected at most 19999 (max_pixels)",
        "nested too deeply, expected JSON of a few levels",
        f"'{tmp_path}/a\\x00.png': no such file",
    )
    assert tuple(problem for _, problem in found) == expected


def test_a_bad_row_names_the_option_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sipo.data.label.load_function", lambda name: level)
    source = write_lines(tmp_path / "candidates.jsonl", ["{"])
    arguments = ["label", str(source), str(tmp_path / "pairs.jsonl"), "--function", "a:b"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("sipo: error: row 1: not JSON: ")
    assert error.endswith(" (rows count from 1; --skip-bad leaves such rows out)\n")
    assert cli.main([*arguments, "--skip-bad"]) == 0
    for option, value in (("--min-margin", "-1"), ("--batch-size", "0"), ("--frames", "x"), ("--max-pixels", "0")):
        with pytest.raises(SystemExit):
            cli.main([*arguments, option, value])
        assert capsys.readouterr().err.startswith(f"sipo: error: argument {option}: '{value}': expected a ")


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_scored(tmp_path: Path) -> None:
    source = candidates(tmp_path, [1, 2])

    def never(images: Any, prompts: Any) -> Any:
        raise AssertionError("scored")

    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "candidates": ["a.png", "b.png"]}\n')
    new = "exists already, expected a new file or pairs of `sipo label`"
    refused = {
        "folder": "is a folder, expected a file",
        "fifo": "is a FIFO, expected a file",
        source.name: "is the source, expected a new file",
        "link.jsonl": "is the source, expected a new file",
        "notes.txt": new,
        "other.jsonl": new,
    }
    for name, what in refused.items():
        with pytest.raises((OSError, FileError), match=f"^{tmp_path / name}: {what}"):
            label(source, tmp_path / name, never)
        with pytest.raises((OSError, FileError), match=f"^{tmp_path / name}: {what}"):
            run_label(source, tmp_path / name, clip="no/model")
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(DataError, match="none: No such file or directory, expected a file"):
        run_label(tmp_path / "none", tmp_path / "pairs.jsonl", clip="no/model")


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1.0], "returned 1 scores, expected 2"),
        ([1.0, float("nan")], "returned nan, expected a finite number"),
        (None, "returned NoneType, expected numbers"),
        (["a", "b"], "returned list, expected numbers"),
    ],
)
def test_scorers_that_return_something_else(tmp_path: Path, returned: Any, expected: str) -> None:
    source = candidates(tmp_path, [1, 2])
    with pytest.raises(ScorerError, match=expected):
        label(source, tmp_path / "pairs.jsonl", lambda images, prompts: returned)
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize(("name", "value"), [("pairs", "some"), ("min_margin", -1.0), ("frames", 0), ("batch_size", 0)])
def test_senseless_arguments(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected"):
        label(candidates(tmp_path, [1, 2]), tmp_path / "out.jsonl", level, **{name: value})


# ---- Python functions ----


def test_function_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_taste.py").write_text(
        "def darkness(images, prompts):\n    return [-image.float().mean() for image in images]\n"
        "class Nested:\n    best = staticmethod(darkness)\n"
        "number = 3\n"
    )
    source = candidates(tmp_path, [30, 90, 60])
    assert run_label(source, tmp_path / "pairs.jsonl", function="my_taste:darkness", progress=False) == 0
    assert capsys.readouterr().out == "1 pairs of 1 rows, 0 left out below the margin\n"
    (record,) = JsonlReader(tmp_path / "pairs.jsonl")
    assert (record.chosen_score, record.rejected_score) == (-30.0, -90.0)
    assert load_function("my_taste:Nested.best") is load_function("my_taste:darkness")
    for name, expected in (
        ("my_taste", "expected module:function"),
        (":darkness", "expected module:function"),
        ("no_such_module_here:f", "No module named"),
        ("my_taste:none", "has no attribute 'none'"),
        ("my_taste:number", "is int, expected a function"),
    ):
        with pytest.raises(ScorerError, match=expected):
            load_function(name)


def test_one_scorer_is_named(tmp_path: Path) -> None:
    source = candidates(tmp_path, [1, 2])
    for arguments in ({}, {"clip": "a", "function": "b:c"}, {"aesthetic": "head.safetensors"}):
        with pytest.raises(ValueError, match="expected a scorer: either --clip"):
            run_label(source, tmp_path / "out.jsonl", **arguments)
    with pytest.raises(ValueError, match="--aesthetic head: expected --clip beside it"):
        run_label(source, tmp_path / "out.jsonl", function="b:c", aesthetic="head")


# ---- CLIP ----


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with random weights, its tokenizer (of single letters) and its image processor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    numbered = {token: number for number, token in enumerate(vocabulary)}
    CLIPTokenizer(numbered, []).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 20,
        "bos_token_id": numbered["<|startoftext|>"],
        "eos_token_id": numbered["<|endoftext|>"],
        "pad_token_id": numbered["<|endoftext|>"],
    }
    vision = small | {"image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, logit_scale_init_value=2.0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


PROMPTS = ["a cat", "a rather long text about a dog that is cut off", "b"]


def model_logits(folder: Path, images: list[Tensor], prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The model's own ``logits_per_image`` and image embeddings, one image and one prompt at a time."""
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model: Any = CLIPModel.from_pretrained(folder)
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    logits, embeddings = [], []
    for image, prompt in zip(images, prompts, strict=True):
        tokens = tokenizer([prompt], truncation=True, max_length=20, return_tensors="pt")
        pixels = processor(images=Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")
        with torch.no_grad():
            output = model(**tokens, pixel_values=pixels["pixel_values"])
        logits.append(output.logits_per_image[0, 0])
        embeddings.append(output.image_embeds[0])
    return torch.stack(logits), torch.stack(embeddings)


def test_clip_scores_are_the_models_logits(clip_folder: Path) -> None:
    images = [noise(1, 3, 24, 24), noise(2, 3, 30, 50), noise(3, 3, 64, 24)]
    expected, _ = model_logits(clip_folder, images, PROMPTS)
    found = torch.tensor(ClipScorer(str(clip_folder))(images, PROMPTS))
    assert torch.allclose(found, expected, atol=1e-4)
    assert expected.abs().max() <= torch.tensor(2.0).exp() and expected.std() > 0.1
    # A prompt's score does not depend on what else is in the batch.
    single = [ClipScorer(str(clip_folder))([image], [prompt])[0] for image, prompt in zip(images, PROMPTS, strict=True)]
    assert torch.allclose(torch.tensor(single), expected, atol=1e-4)


def test_clips_are_scored_by_the_mean_of_their_frames(clip_folder: Path) -> None:
    moving = torch.stack([noise(seed, 3, 24, 24) for seed in range(3)])
    still = noise(9, 3, 24, 24)
    scorer = ClipScorer(str(clip_folder))
    frames = scorer(list(moving), ["a cat"] * 3)
    found = scorer([still, moving, still], ["b", "a cat", "a cat"])
    assert found[1] == pytest.approx(sum(frames) / 3, abs=1e-4)
    assert found[0] == pytest.approx(scorer([still], ["b"])[0], abs=1e-4)


def test_processor_from_elsewhere(clip_folder: Path, tmp_path: Path) -> None:
    """As HPSv2's copy for transformers asks for: it has no processor of its own."""
    from transformers import CLIPModel

    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    images = [noise(1, 3, 24, 24)]
    with pytest.raises(ScorerError, match=r"^\S+: no CLIP model with its processor: [^\n]+$"):
        ClipScorer(str(tmp_path))
    found = ClipScorer(str(tmp_path), processor=str(clip_folder))(images, ["a cat"])
    assert found == ClipScorer(str(clip_folder))(images, ["a cat"])


def test_pickled_weights_are_not_loaded(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    model: Any = CLIPModel.from_pretrained(clip_folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ScorerError, match="no CLIP model with its processor"):
            ClipScorer(str(path), processor=str(clip_folder))


def test_labelling_with_clip(clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for row, prompt in enumerate(PROMPTS):
        names = [f"{row}-{number}.png" for number in range(3)]
        for number, name in enumerate(names):
            write_image(tmp_path / name, noise(10 * row + number, 3, 24, 24))
        lines.append({"prompt": prompt, "candidates": names})
    write_video(tmp_path / "moving.mp4", clip(1, frames=6, height=24, width=24), 8.0)
    lines.append({"prompt": "moving", "candidates": ["0-0.png", "moving.mp4"]})
    source = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    assert run_label(source, output, clip=str(clip_folder), batch_size=4, frames=2, progress=False) == 0
    assert capsys.readouterr().out.startswith("4 pairs of 4 rows")
    records: list[PairRecord] = list(JsonlReader(output))
    for record, prompt in zip(records[:3], PROMPTS, strict=True):
        row = PROMPTS.index(prompt)
        images = [noise(10 * row + number, 3, 24, 24) for number in range(3)]
        expected, _ = model_logits(clip_folder, images, [prompt] * 3)
        assert record.chosen == tmp_path / f"{row}-{int(expected.argmax())}.png"
        assert record.rejected == tmp_path / f"{row}-{int(expected.argmin())}.png"
        assert record.chosen_score == pytest.approx(float(expected.max()), abs=1e-4)
        assert record.rejected_score == pytest.approx(float(expected.min()), abs=1e-4)


# ---- Aesthetic heads ----


def head(path: Path, *widths: int, prefix: str = "layers.{}.") -> dict[str, Tensor]:
    """Linear layers with random weights, numbered with gaps, as in a module with dropout between them."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for number, (inward, outward) in enumerate(itertools.pairwise(widths)):
        name = prefix.format(6 * number)
        state[f"{name}weight"] = torch.randn(outward, inward, generator=generator)
        state[f"{name}bias"] = torch.randn(outward, generator=generator)
    save_file(state, path)
    return state


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_aesthetic_scores_are_the_layers_own(clip_folder: Path, tmp_path: Path, activation: Any) -> None:
    state = head(tmp_path / "head.safetensors", 16, 8, 4, 1)  # layers.12 comes after layers.6
    images = [noise(seed, 3, 24, 24) for seed in range(4)]
    _, values = model_logits(clip_folder, images, ["a"] * 4)
    for number in (0, 6, 12):
        values = values.relu() if number and activation == "relu" else values
        values = values @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    scorer = AestheticScorer(str(clip_folder), tmp_path / "head.safetensors", activation=activation)
    assert torch.allclose(torch.tensor(scorer(images, ["a"] * 4)), values[:, 0], atol=1e-4)
    moving = scorer([torch.stack(images)], ["b"])[0]
    assert moving == pytest.approx(float(values.mean()), abs=1e-4)


def test_a_single_linear_layer(clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = head(tmp_path / "head.safetensors", 16, 1, prefix="")
    names = [f"{seed}.png" for seed in range(4)]
    for seed, name in enumerate(names):
        write_image(tmp_path / name, noise(seed, 3, 24, 24))
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "candidates": names}])
    run_label(
        source, tmp_path / "out.jsonl", clip=str(clip_folder), aesthetic=tmp_path / "head.safetensors", progress=False
    )
    _, values = model_logits(clip_folder, [noise(seed, 3, 24, 24) for seed in range(4)], ["a"] * 4)
    expected = (values @ state["weight"].T + state["bias"])[:, 0]
    (record,) = JsonlReader(tmp_path / "out.jsonl")
    assert record.chosen == tmp_path / f"{int(expected.argmax())}.png"
    assert record.chosen_score == pytest.approx(float(expected.max()), abs=1e-4)


def test_heads_that_do_not_fit(clip_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    for widths, expected in (
        ((12, 1), r"layers\.0\.weight takes 12 numbers, expected 16"),
        ((16, 2), "has 1 linear layers with 2 outputs, expected one output"),
        ((16,), "has 0 linear layers"),
    ):
        head(path, *widths)
        with pytest.raises(ScorerError, match=expected):
            AestheticScorer(str(clip_folder), path)
    path.write_bytes(b"not safetensors")
    none = tmp_path / "none.safetensors"
    for bad, problem in ((path, "not a sound safetensors file"), (none, "No such file or directory, expected")):
        with pytest.raises(ScorerError, match=rf"^{bad}: {problem}"):
            AestheticScorer(str(clip_folder), bad)
    with pytest.raises(ValueError, match="activation='tanh': expected"):
        AestheticScorer(str(clip_folder), path, activation="tanh")  # type: ignore[arg-type]
