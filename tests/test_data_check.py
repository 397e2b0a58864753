"""The check of a data set: every planted fault is found in its row, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from PIL import Image

from sipo import cli
from sipo.data import check
from sipo.data.check import LEFT_OUT, NOTED, SKIPPED, check_pairs, run_check
from sipo.data.clips import Kind
from sipo.data.load import BadPairError, load_condition_image, load_error_mask, load_pair
from sipo.data.media import Media, write_image, write_video
from sipo.data.readers import open_pairs
from sipo.data.records import PairRecord
from sipo.data.toy import make_toy_pairs
from sipo.files import FileError
from tests.data_sets import (
    CLEAN_ROWS,
    Builder,
    Planted,
    clip,
    encode_clip,
    faulty_clips,
    faulty_images,
    faulty_pickapic,
    faulty_videodpo,
    noise,
    set_density,
    write_lines,
    write_rgba,
)
from tests.media_files import encode


def images(folder: Path) -> tuple[Path, Planted, int]:
    builder = faulty_images(folder)
    return builder.save(), builder.planted, 1


def clips(folder: Path) -> tuple[Path, Planted, int]:
    builder = faulty_clips(folder)
    return builder.save(), builder.planted, 6


def pickapic(folder: Path) -> tuple[Path, Planted, int]:
    builder = faulty_pickapic(folder)
    return builder.save(folder / "train.parquet"), builder.planted, 1


def videodpo(folder: Path) -> tuple[Path, Planted, int]:
    builder = faulty_videodpo(folder)
    return builder.save(), builder.planted, 6


def problem(record: PairRecord, **options: Any) -> str:
    """Why training would skip a pair; empty if it would not."""
    try:
        load_error_mask(record, load_pair(record, **options)[0])
    except BadPairError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("make", [images, clips, pickapic, videodpo])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_planted_fault_is_found_in_its_row(
    tmp_path: Path, make: Callable[[Path], tuple[Path, Planted, int]], workers: int
) -> None:
    path, planted, frames = make(tmp_path)
    report = check_pairs(open_pairs(path), frames=frames, workers=workers)
    assert [(f.row, f.kind) for f in report.findings] == sorted(planted.items())
    assert report.skipped == sum(kind in SKIPPED for kind in planted.values())
    assert report.pairs == len(list(open_pairs(path)))
    # What is reported is what training skips, for the same reason.
    reported = {finding.row: finding.text for finding in report.findings if finding.kind in SKIPPED}
    for record in open_pairs(path):
        assert problem(record, frames=frames) == reported.get(record.row, "")


def test_the_planted_sets_have_every_kind(tmp_path: Path) -> None:
    kinds = set()
    for make in (images, clips, pickapic, videodpo):
        kinds |= set(make(tmp_path / make.__name__)[1].values())
    assert kinds == (SKIPPED.keys() | NOTED.keys()) - {
        "rate",
        "enlarged",
        "large",
        "cut",
    }  # which depend on what is asked for


def test_clean_sets_have_no_findings(tmp_path: Path) -> None:
    for path, frames in (
        (Builder(tmp_path / "images", rows=CLEAN_ROWS).save(), 1),
        (Builder(tmp_path / "clips", ".mp4", rows=12).save(), 6),
        (make_toy_pairs(tmp_path / "toy", video=False), 1),
        (make_toy_pairs(tmp_path / "moving", video=True), 9),
    ):
        for asked in (frames, None):
            report = check_pairs(open_pairs(path), frames=asked)
            assert (report.findings, report.skipped) == ([], 0)
            assert report.pairs == len(path.read_text().splitlines())


def test_exit_code_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, planted, _ = images(tmp_path / "faulty")
    skipped = sum(kind in SKIPPED for kind in planted.values())
    for _ in range(2):  # only an earlier report is replaced
        assert run_check(path, frames=1, json_file=tmp_path / "report.json", rows=1, progress=False) == 1
    kept = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists already, expected a new file or a report of `sipo data check`"):
        run_check(path, json_file=path, progress=False)
    assert path.read_bytes() == kept
    (tmp_path / "config.json").write_text('{\n "a": 1\n}\n')
    with pytest.raises(FileExistsError, match=r"config\.json: exists already, expected a new file or a report"):
        run_check(path, json_file=tmp_path / "config.json", progress=False)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileError, match=r"fifo: is a FIFO, expected a file$"):
        run_check(path, json_file=tmp_path / "fifo", progress=False)
    assert (tmp_path / "fifo").is_fifo()
    printed = capsys.readouterr().out
    assert printed.startswith(f"{CLEAN_ROWS + len(planted) + 1} pairs, of which training would skip {skipped}; rows ")
    assert "; rows count from 1, as lines do in an editor\n" in printed
    lines = path.read_text(encoding="utf-8").splitlines()
    for row, kind in planted.items():
        if list(planted.values()).count(kind) == 1:
            assert f"       1  {(SKIPPED | NOTED)[kind]} (" in printed and f" row {row + 1}: " in printed
    assert "and 10 more" in printed  # of the eleven faulty rows, of which one is shown
    saved = json.loads((tmp_path / "report.json").read_text())
    assert {found["row"] - 1: found["kind"] for found in saved["findings"]} == planted
    (again,) = [found for found in saved["findings"] if found["kind"] == "duplicate"]
    earlier = int(again["text"].removeprefix("is row ").removesuffix(" again"))
    assert json.loads(lines[again["row"] - 1])["prompt"] == json.loads(lines[earlier - 1])["prompt"] == "prompt 3"
    assert (saved["pairs"], saved["skipped"]) == (CLEAN_ROWS + len(planted) + 1, skipped)
    assert saved["counts"]["undecodable"] == 5 and saved["counts"]["rate"] == 0
    # The clean rows alone.
    assert run_check(path, frames=1, limit=CLEAN_ROWS, progress=False) == 0
    assert capsys.readouterr().out == f"{CLEAN_ROWS} pairs, of which training would skip 0\n"


def test_the_limit_of_pixels_is_one_rule_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = Builder(tmp_path, rows=3)
    write_image(builder.add()[1], noise(4000, 3, 32, 48))
    path = builder.save()
    assert run_check(path, frames=1, max_pixels=32 * 48, progress=False) == 0
    capsys.readouterr()
    assert run_check(path, frames=1, max_pixels=32 * 48 - 1, progress=False) == 1
    text = "has 32x48 pixels, expected at most 1535 (max_pixels)"
    printed = capsys.readouterr().out
    assert f"       1  {SKIPPED['large']} (skipped)\n          row 4: rejected: " in printed and text in printed
    record = list(open_pairs(path))[3]
    assert problem(record) == "" and text in problem(record, max_pixels=1535)
    with pytest.raises(BadPairError) as caught:
        load_pair(record, max_pixels=1535)
    assert caught.value.kind == "large"
    with pytest.raises(ValueError, match="max_pixels=0: expected at least 1"):
        run_check(path, max_pixels=0)


def test_a_file_that_goes_while_it_is_looked_at_is_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Builder(tmp_path, rows=3).save()
    original = check.load_pair

    def load_and_lose(record: PairRecord, **options: Any) -> Any:
        pair = original(record, **options)
        if record.row == 1:
            assert isinstance(record.rejected, Path)
            record.rejected.unlink()
        return pair

    monkeypatch.setattr(check, "load_pair", load_and_lose)
    (finding,) = check_pairs(open_pairs(path), frames=1).findings
    assert (finding.row, finding.kind) == (1, "missing")
    assert finding.text.endswith("000001.png: cannot be read: No such file or directory")


def test_findings_that_nothing_is_skipped_for_leave_the_exit_code(tmp_path: Path) -> None:
    builder = Builder(tmp_path, rows=3)
    builder.lines.append(builder.lines[0])
    path = builder.save()
    assert run_check(path, frames=1, progress=False) == 0
    assert check_pairs(open_pairs(path), frames=1).counts()["duplicate"] == 1


def test_frames_and_rate_decide(tmp_path: Path) -> None:
    """One set of clips of 6 frames at 8 per second, asked for different things."""
    builder = Builder(tmp_path, ".mp4", rows=2)
    chosen, rejected = builder.add()
    for seed, path in enumerate((chosen, rejected)):
        write_video(path, clip(75 + seed, frames=12), 16.0)
    mixed, _ = builder.add()
    write_video(mixed, clip(77, frames=12), 16.0)
    path = builder.save()

    def kinds(**asked: Any) -> dict[int, str]:
        return {finding.row: finding.kind for finding in check_pairs(open_pairs(path), **asked).findings}

    assert kinds(frames=7) == {0: "short", 1: "short", 3: "short"}
    assert kinds(frames=6) == {3: "shape"}
    assert kinds(frames=6, fps=8.0) == {3: "length"}
    assert kinds(frames=6, fps=16.0) == {0: "rate", 1: "rate", 3: "rate"}
    assert kinds(frames=None) == {3: "shape"}
    assert kinds(frames=1) == dict.fromkeys(range(4), "medium")


def test_sizes_are_counted_and_small_pairs_listed(tmp_path: Path) -> None:
    builder = Builder(tmp_path, rows=3)  # of 16x24
    for side, path in enumerate(builder.add()):
        write_image(path, noise(90 + side, 3, 40, 40))
    report = check_pairs(open_pairs(builder.save()), frames=1, sizes=[(16, 24), (48, 48)])
    assert report.sizes == {(16, 24): 3, (48, 48): 1}
    assert [(f.row, f.kind, f.text) for f in report.findings] == [(3, "enlarged", "40x40 is enlarged to 48x48")]
    assert report.as_dict()["sizes"] == [
        {"height": 16, "width": 24, "pairs": 3},
        {"height": 48, "width": 48, "pairs": 1},
    ]
    assert "       3  pairs at 16x24" in report.describe()
    assert report.skipped == 0


def test_how_a_file_is_to_be_shown_is_told(tmp_path: Path) -> None:
    """One line for a pair and kind, with what was done about it; nothing is skipped for it."""
    stills = Builder(tmp_path / "stills")
    chosen, rejected = stills.add()
    pixels = noise(5, 4, 16, 24)
    pixels[3] = 255
    pixels[3, :4] = 0
    write_rgba(chosen, pixels)
    set_density(rejected, 100, 200)
    moving = Builder(tmp_path / "moving", ".mp4")
    chosen, rejected = moving.add()
    encode_clip(chosen, clip(6, height=16, width=32), aspect=Fraction(1, 2))
    encode_clip(rejected, clip(7, height=32, width=16), aspect=Fraction(2))
    found = {}
    for name, builder, frames in (("stills", stills, 1), ("moving", moving, 6)):
        report = check_pairs(open_pairs(builder.save()), frames=frames)
        assert report.skipped == 0
        found[name] = {(finding.kind, finding.text) for finding in report.findings}
    assert found["stills"] == {
        ("alpha", "25% of chosen is transparent"),
        ("pixels", "rejected has pixels of 2:1, taken as square"),
    }
    shapes = "chosen has pixels of 1:2, scaled to 32x32; rejected has pixels of 2:1, scaled to 32x32"
    assert found["moving"] == {("pixels", shapes)}


def test_images_that_differ_in_what_is_hidden_alone_are_the_same(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    for seed, path in enumerate(builder.add()):
        write_rgba(path, torch.cat([noise(seed, 3, 16, 24), torch.zeros(1, 16, 24, dtype=torch.uint8)]))
    shutil.copy(*builder.add())
    hidden, plain = check_pairs(open_pairs(builder.save()), frames=1).findings
    assert (hidden.kind, plain.kind) == ("identical", "identical")
    assert hidden.text == "chosen and rejected are the same, with transparent pixels shown on white"
    assert plain.text == "chosen and rejected are the same"


@pytest.mark.parametrize(
    ("transparent", "share"), [(1, "less than 1%"), (4, "1%"), (192, "50%"), (383, "more than 99%"), (384, "100%")]
)
def test_few_transparent_pixels_are_not_none(tmp_path: Path, transparent: int, share: str) -> None:
    builder = Builder(tmp_path)
    pixels = noise(5, 4, 16, 24)
    pixels[3].view(-1)[:] = 255
    pixels[3].view(-1)[:transparent] = 0
    write_rgba(builder.add()[0], pixels)
    (finding,) = check_pairs(open_pairs(builder.save()), frames=1).findings
    assert finding.text == f"{share} of chosen is transparent"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--limit", "0", "'0': expected a whole number of at least 1"),
        ("--limit", "-1", "'-1': expected a whole number of at least 1"),
        ("--frames", "1.5", "'1.5': expected a whole number of at least 1"),
        ("--max-pixels", "0", "'0': expected a whole number of at least 1"),
        ("--fps", "0", "'0': expected a number > 0"),
        ("--fps", "nan", "'nan': expected a number > 0"),
        ("--fps", "inf", "'inf': expected a number > 0"),
        ("--rows", "-1", "'-1': expected a whole number of at least 0"),
    ],
)
def test_senseless_options_are_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, expected: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "check", str(tmp_path / "nothing"), option, value])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"sipo: error: argument {option}: {expected}\n"


def test_clips_that_start_alike_are_not_the_same(tmp_path: Path) -> None:
    """Both made from one image, as image-to-video models do; only the first frame is kept where all are decoded."""
    builder = Builder(tmp_path, ".mp4")
    chosen, rejected = builder.add()
    pixels = clip(5)
    write_video(chosen, pixels, 8.0)
    pixels[3:] = 255 - pixels[3:]
    write_video(rejected, pixels, 8.0)
    reader = open_pairs(builder.save())
    assert check_pairs(reader, frames=None).findings == []
    assert check_pairs(reader, frames=6).findings == []


def test_a_pair_with_another_mask_is_no_duplicate(tmp_path: Path) -> None:
    """And no contradiction: each sample may be the better one in a region of its own."""
    builder = Builder(tmp_path, rows=1)
    one = builder.lines[0]
    assert isinstance(one, dict)
    swapped = one | {"chosen": one["rejected"], "rejected": one["chosen"]}
    for name, columns in (("left", slice(0, 12)), ("right", slice(12, 24))):
        pixels = torch.zeros(3, 16, 24, dtype=torch.uint8)
        pixels[..., columns] = 255
        write_image(tmp_path / f"{name}.png", pixels)
    left, right = {"error_mask": "left.png"}, {"error_mask": "right.png"}
    builder.lines = [one, one | left, swapped | right, one | right, one | left]
    found = [(f.row, f.kind) for f in check_pairs(open_pairs(builder.save())).findings]
    assert found == [(3, "contradiction"), (4, "duplicate")]


def test_further_images_are_counted_and_misspelt_keys_listed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = Builder(tmp_path)
    write_image(tmp_path / "white.png", torch.full((3, 16, 24), 255, dtype=torch.uint8))
    for keys in ({}, {"error_mask": "white.png"}, {"error_masks": "white.png"}, {"error_masks": "", "Error_mask": ""}):
        builder.add(**keys)
    builder.add(error_mask="none.png")  # would be skipped
    report = tmp_path / "report.json"
    assert run_check(builder.save(), json_file=report, progress=False) == 1
    printed = capsys.readouterr().out
    assert "\n       1  pairs with error_mask\n" in printed and "with condition_image" not in printed
    listed = "(not skipped)\n          row 3: the key 'error_masks' is not read, did you mean 'error_mask'?\n"
    assert f"       2  {NOTED['key']} {listed}          row 4: the key 'Error_mask' is not read, did" in printed
    assert json.loads(report.read_text())["further_images"] == {"condition_image": 0, "error_mask": 1}


def test_every_kind_of_pair_that_is_left_out_has_a_name() -> None:
    kinds = {*get_args(Kind), *get_args(get_type_hints(PairRecord)["problem_kind"])}
    assert kinds <= LEFT_OUT.keys() and not LEFT_OUT.keys() & NOTED.keys()


def test_condition_images_are_checked_and_are_part_of_the_prompt(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    for row in range(5):
        write_image(tmp_path / f"from/{row}.png", noise(50 + row, 3, 9, 31))  # of any shape
        builder.add(prompt="make it red", condition_image=f"from/{row}.png")
    (tmp_path / "from/1.png").unlink()
    (tmp_path / "from/2.png").write_bytes(b"no image")
    write_video(tmp_path / "from/3.mp4", clip(0), 8.0)
    builder.lines[3] = {**builder.lines[3], "condition_image": "from/3.mp4"}  # type: ignore[dict-item]
    for image in ("from/0.png", "from/4.png"):
        builder.lines.append({**builder.lines[0], "condition_image": image})  # type: ignore[dict-item]
    reader = open_pairs(builder.save())
    for frames in (1, None):
        findings = check_pairs(reader, frames=frames).findings
        assert [(f.row, f.text) for f in findings if f.kind == "cut"] == [
            (row, "condition_image is 9x31 and chosen 16x24") for row in (0, 4, 5, 6)
        ]
        findings = [finding for finding in findings if finding.kind != "cut"]
        assert [(f.row, f.kind) for f in findings] == [
            (1, "missing"),
            (2, "undecodable"),
            (3, "medium"),
            (5, "duplicate"),
            (6, "reused"),
            (6, "reused"),
        ]
        assert all(finding.text.startswith("condition_image: ") for finding in findings[:3])
    with pytest.raises(BadPairError, match=r"condition_image: .*9x31 pixels, expected at most 278") as caught:
        load_condition_image(next(iter(reader)), max_pixels=278)
    assert caught.value.kind == "large"


def test_load_pair_returns_both_sides_and_raises_the_kind(tmp_path: Path) -> None:
    builder = Builder(tmp_path, rows=1)
    (record,) = open_pairs(builder.save())
    chosen, rejected = load_pair(record)
    assert isinstance(chosen, Media)
    assert torch.equal(chosen.pixels, noise(0, 3, 16, 24)) and torch.equal(rejected.pixels, noise(1, 3, 16, 24))
    with pytest.raises(BadPairError, match="neither is preferred") as caught:
        load_pair(PairRecord(0, "a", b"", b"", tie=True))
    assert caught.value.kind == "tie"


# ---- Index shifts that only file names show ----


def numbered(folder: Path, numbers: list[tuple[str, str]]) -> dict[int, str]:
    """Findings of a set whose files are so named; the files are good, and no two alike."""
    lines = []
    for row, names in enumerate(numbers):
        paths = [folder / side / f"{name}.png" for side, name in zip(("win", "lose"), names, strict=True)]
        for side, path in enumerate(paths):
            write_image(path, noise(2 * row + side, 3, 4, 4))
        lines.append({"prompt": f"{row}", "chosen": str(paths[0]), "rejected": str(paths[1])})
    report = check_pairs(open_pairs(write_lines(folder / "pairs.jsonl", lines)), frames=1, workers=1)
    assert report.skipped == 0
    return {finding.row: finding.kind for finding in report.findings}


def test_shifts_of_one_side_are_suspected(tmp_path: Path) -> None:
    rows = range(24)
    stretch = [(f"{row:04d}", f"{row + (row >= 15):04d}") for row in rows]
    assert numbered(tmp_path / "a", stretch) == dict.fromkeys(range(15, 24), "shift")
    single = [(f"clip-{row}-of-24", f"clip-{row + 100 * (row in (3, 11))}-of-24") for row in rows]
    assert numbered(tmp_path / "b", single) == {3: "shift", 11: "shift"}
    # The first number is the prompt's, the second the candidate's.
    candidates = [(f"{row + (row == 7)}_{row % 3}", f"{row}_{(row + 1) % 3}") for row in rows]
    assert numbered(tmp_path / "c", candidates) == {7: "shift"}


def test_naming_schemes_are_no_shifts(tmp_path: Path) -> None:
    rows = range(24)
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(0, 2, (24,), generator=generator).tolist()
    schemes: dict[str, list[tuple[str, str]]] = {
        "from one": [(f"{row + 1}", f"{row + 1}") for row in rows],
        "gaps": [(f"{row + row // 5}", f"{row + row // 5}") for row in rows],
        "even and odd": [(f"{2 * row}", f"{2 * row + 1}") for row in rows],
        "best of two": [(f"{row}-{seed}", f"{row}-{1 - seed}") for row, seed in zip(rows, seeds, strict=True)],
        "versions": [(f"v{1 + (row == 4)}-{row}", f"v1-{row}") for row in rows],
        "two texts": [(f"win{row}", f"lose{row + 1}") for row in rows],
        "no numbers": [(chr(97 + row), chr(97 + row)) for row in rows],
        "half and half": [(f"{row}", f"{row + 1000 * (row % 2)}") for row in rows],
        "too few": [(f"{row}", f"{row + 100 * (row == 4)}") for row in range(9)],
    }
    for name, scheme in schemes.items():
        assert numbered(tmp_path / name, scheme) == {}, name


# ---- How it runs ----


def test_only_a_few_pairs_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader is never far ahead of what is decoded, and pixels are let go of with their pair."""
    content = {seed: encode(Image.fromarray(noise(seed, 8, 8, 3).numpy()), "PNG") for seed in range(2)}
    ahead: list[int] = []
    lock = threading.Lock()
    counts = {"read": 0, "decoded": 0}

    def records() -> Iterator[PairRecord]:
        for row in range(60):
            with lock:
                counts["read"] += 1
                ahead.append(counts["read"] - counts["decoded"])
            yield PairRecord(row, f"{row}", content[0], content[1])

    original = check._examine

    def counted(*arguments: Any, **options: Any) -> Any:
        examined = original(*arguments, **options)
        with lock:
            counts["decoded"] += 1
        assert not any(isinstance(value, (torch.Tensor, Media)) for value in vars(examined).values())
        return examined

    monkeypatch.setattr(check, "_examine", counted)
    report = check_pairs(records(), frames=1, workers=2)
    assert report.pairs == counts["decoded"] == 60
    assert max(ahead) <= 2 * 2 + 2


def test_an_error_of_the_reader_is_raised(tmp_path: Path) -> None:
    builder = Builder(tmp_path, rows=2)
    path = builder.save()
    shutil.copy(path, tmp_path / "gone.jsonl")
    reader = open_pairs(tmp_path / "gone.jsonl")
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(ValueError, match=r"gone\.jsonl: No such file"):
        check_pairs(reader, frames=1)
