"""Readers of pairs: every row under its own number, a faulty one with its problem and no other row's files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sipo.data.readers import JsonlReader, PickapicReader, VideoDpoReader, open_pairs, write_jsonl
from sipo.data.records import DataError, PairRecord
from tests.data_sets import PickapicBuilder, VideoDpoBuilder, faulty_pickapic, faulty_videodpo, write_lines

GOOD = {"prompt": "a cat", "chosen": "win/1.png", "rejected": "lose/1.png"}


def problems(path: Path) -> dict[int, str]:
    return {record.row: record.problem for record in open_pairs(path) if record.problem}


# ---- JSONL ----


def test_jsonl_rows_as_written(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "pairs.jsonl",
        [
            GOOD,
            "",
            GOOD | {"prompt": "ünïcode", "chosen_score": 2, "rejected_score": -0.5, "source": {"id": 7}},
            GOOD | {"chosen": "/elsewhere/2.png", "chosen_score": None},
        ],
    )
    first, second, third = open_pairs(path)
    assert first == PairRecord(0, "a cat", tmp_path / "win/1.png", tmp_path / "lose/1.png")
    assert (second.row, second.prompt, second.extra) == (2, "ünïcode", {"source": {"id": 7}})
    assert (second.chosen_score, second.rejected_score, second.tie) == (2, -0.5, False)
    assert (third.row, third.chosen, third.chosen_score) == (3, Path("/elsewhere/2.png"), None)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", ', "not JSON: "),
        ("[1, 2]", "holds [1, 2], expected a JSON object"),
        ({"prompt": "a", "chosen": "x"}, "no key 'rejected'"),
        (GOOD | {"prompt": None}, "prompt=None: expected text"),
        (GOOD | {"chosen": ["x"]}, "chosen=['x']: expected text"),
        (GOOD | {"prompt": "\ud83d!"}, "prompt='\\ud83d!': holds half a character"),
        (GOOD | {"rejected": ""}, "rejected='': expected a path"),
        (GOOD | {"chosen_score": "good"}, "chosen_score='good': expected a number"),
        (GOOD | {"chosen_score": True}, "chosen_score=True: expected a number"),
        (GOOD | {"rejected_score": float("nan")}, "rejected_score=nan: expected a number"),
        (GOOD | {"chosen_score": 1, "rejected_score": 2}, "chosen_score=1 is below rejected_score=2"),
    ],
)
def test_faulty_line_is_a_record_with_a_problem(tmp_path: Path, line: Any, expected: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [GOOD, line, GOOD])
    records = list(open_pairs(path))
    assert [record.row for record in records] == [0, 1, 2]
    assert records[1].problem.startswith(expected) and "\n" not in records[1].problem
    assert records[1].problem_kind == "row"
    assert records[0] == replace(records[2], row=0)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "\xff"}\n')
    assert list(problems(path)) == [1]
    assert "not JSON: 'utf-8' codec" in problems(path)[1]


def test_equal_scores_are_a_tie(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [GOOD | {"chosen_score": 1.5, "rejected_score": 1.5}])
    assert [record.tie for record in open_pairs(path)] == [True]


def test_written_pairs_are_read_back(tmp_path: Path) -> None:
    records = [
        PairRecord(0, "a \n 'cat'", tmp_path / "win/0.png", tmp_path / "lose/0.png"),
        PairRecord(1, "ünïcode", tmp_path / "deep/win/1.mp4", tmp_path / "1.mp4", 2.5, 1.0, extra={"note": [1, None]}),
    ]
    path = tmp_path / "deep" / "new" / "pairs.jsonl"
    assert write_jsonl(iter(records), path) == 2
    assert json.loads(path.read_text().splitlines()[1])["chosen"] == "../win/1.mp4"
    back = list(JsonlReader(path))
    for record, again in zip(records, back, strict=True):
        assert isinstance(again.chosen, Path) and isinstance(again.rejected, Path)
        resolved = replace(again, chosen=again.chosen.resolve(), rejected=again.rejected.resolve())
        assert resolved == record
    # A data set moves as a whole.
    tmp_path.joinpath("deep").rename(tmp_path / "moved")
    assert list(JsonlReader(tmp_path / "moved/new/pairs.jsonl"))[1].extra == {"note": [1, None]}


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_jsonl([PairRecord(0, "a", Path("b"), Path("c"))], path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="row 5: chosen is 3 bytes in memory, expected a file"):
        write_jsonl([PairRecord(5, "a", b"xyz", Path("c"))], path)
    with pytest.raises(DataError, match="row 6: no key, expected a pair"):
        write_jsonl([PairRecord(6, "", b"", b"", problem="no key")], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---- Pick-a-Pic ----


def test_pickapic_rows(tmp_path: Path) -> None:
    builder = faulty_pickapic(tmp_path / "rows")
    path = builder.save(tmp_path / "data" / "train-00000-of-00001.parquet")
    for source, kind in ((path, "auto"), (path.parent, "auto"), (str(path), "pickapic")):
        reader = open_pairs(source, kind)  # type: ignore[arg-type]
        records = list(reader)
        assert isinstance(reader, PickapicReader)
        assert [record.row for record in records] == list(range(len(builder.rows)))
        assert {r.row for r in records if r.problem} == {row for row, kind in builder.planted.items() if kind == "row"}
        assert {r.row for r in records if r.tie} == {row for row, kind in builder.planted.items() if kind == "tie"}
        for record, row in zip(records, builder.rows, strict=True):
            if record.problem or record.tie:
                continue
            best = "jpg_0" if row["label_0"] == 1.0 else "jpg_1"
            assert record.chosen == row[best] and record.rejected == row[{"jpg_0": "jpg_1", "jpg_1": "jpg_0"}[best]]
            assert record.prompt == row["caption"]
            assert (record.chosen_score, record.rejected_score) == (1.0, 0.0)
    assert records[0].chosen == builder.rows[0]["jpg_0"] and records[1].chosen == builder.rows[1]["jpg_1"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"has_label": False}, "has_label=False"),
        ({"label_0": 1.0, "label_1": 1.0}, "label_0=1.0, label_1=1.0: expected a sum of 1"),
        ({"label_0": None}, "label_0=None"),
        ({"best_image_uid": "x"}, "best_image_uid=x: expected 0-0"),
        ({"label_0": 0.5, "label_1": 0.5}, "best_image_uid=0-0: expected tie"),
        ({"are_different": False}, "are_different=False"),
        ({"jpg_1": b""}, "jpg_1 is empty"),
        ({"caption": None}, "caption=None: expected text"),
    ],
)
def test_pickapic_problems_say_what_is_wrong(tmp_path: Path, columns: dict[str, Any], expected: str) -> None:
    builder = PickapicBuilder(tmp_path)
    builder.add(**columns)
    builder.add()
    assert problems(builder.save(tmp_path / "rows.parquet"))[0].startswith(expected)


def test_pickapic_without_the_columns_that_only_check(tmp_path: Path) -> None:
    builder = PickapicBuilder(tmp_path)
    for _ in range(3):
        row = builder.add()
        for name in ("best_image_uid", "image_0_uid", "image_1_uid", "has_label", "are_different"):
            del row[name]
    records = list(open_pairs(builder.save(tmp_path / "rows.parquet")))
    assert [record.problem for record in records] == ["", "", ""]


def test_pickapic_with_a_column_of_images(tmp_path: Path) -> None:
    """As some copies on the hub have it: the bytes are handed on, and nothing is decoded and encoded again."""
    from datasets import Dataset, Image

    builder = PickapicBuilder(tmp_path)
    builder.add()
    data = Dataset.from_list(builder.rows).cast_column("jpg_0", Image()).cast_column("jpg_1", Image())
    data.to_parquet(str(tmp_path / "rows.parquet"))
    assert [record.chosen for record in open_pairs(tmp_path / "rows.parquet")] == [builder.rows[0]["jpg_0"]]


def test_pickapic_splits_and_several_files(tmp_path: Path) -> None:
    builder = PickapicBuilder(tmp_path)
    for _ in range(4):
        builder.add()
    both = builder.rows
    for name, rows in (
        ("train-00000-of-00002", both[:1]),
        ("train-00001-of-00002", both[1:3]),
        ("validation_unique-00000-of-00001", both[3:]),
    ):
        builder.rows = rows
        builder.save(tmp_path / "set" / "data" / f"{name}.parquet")
    assert [r.prompt for r in open_pairs(tmp_path / "set")] == ["prompt 0", "prompt 1", "prompt 2"]
    assert [r.prompt for r in open_pairs(tmp_path / "set", split="validation_unique")] == ["prompt 3"]
    with pytest.raises(DataError, match=r"^[^\n]*set: split 'none' cannot be read: [^\n]+$"):
        list(open_pairs(tmp_path / "set", split="none"))


def test_parquet_of_something_else_and_of_nothing(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"caption": "a", "image": b"b"}]).to_parquet(str(tmp_path / "other.parquet"))
    with pytest.raises(DataError, match=r"other\.parquet: has no column 'jpg_0', expected Pick-a-Pic's"):
        list(open_pairs(tmp_path / "other.parquet"))
    (tmp_path / "none.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"^[^\n]*none.parquet: [^\n]+$"):
        list(open_pairs(tmp_path / "none.parquet"))


# ---- VideoDPO ----


def test_videodpo_rows(tmp_path: Path) -> None:
    builder = faulty_videodpo(tmp_path)
    builder.save()
    for source in (tmp_path, tmp_path / "pair.json", str(tmp_path / "metadata.json")):
        reader = open_pairs(source)
        assert isinstance(reader, VideoDpoReader)
        records = list(reader)
    assert [record.row for record in records] == list(range(len(builder.pairs)))
    faulty = {row: kind for row, kind in builder.planted.items() if kind in ("row", "index")}
    assert {record.row: record.problem_kind for record in records if record.problem} == faulty
    assert records[0].chosen == tmp_path / "winvideos/000000.mp4"
    assert records[0].rejected == tmp_path / "losevideos/000000.mp4"
    assert records[0].extra == {"label": 0}


def test_videodpo_problems_say_what_is_wrong(tmp_path: Path) -> None:
    builder = VideoDpoBuilder(tmp_path)
    for _ in range(5):
        builder.add()
    pairs = builder.pairs
    pairs[0]["video1"] = 10
    pairs[1]["video2"] = -7
    pairs[2] |= {"video1": 6, "video2": 7}
    pairs[3]["frame_caption"] = "never made"
    builder.clips[8]["basic"]["globalidx"] = 1
    found = problems(builder.save())
    assert found == {
        0: "video1=10: expected 0 to 9",
        1: "video2=-7: expected 0 to 9",
        2: "video1=6 is captioned 'prompt 3', the pair 'prompt 2', which is at 5: the index is off by +1",
        3: "video1=6 is captioned 'prompt 3', the pair 'never made'",
        4: "video1 was made for prompt 1 and video2 for prompt 4: expected one",
    }


def test_a_clip_that_the_published_loader_drops_shifts_nothing(tmp_path: Path) -> None:
    """That loader leaves out clips of less than a second before it counts: every later pair gets other clips."""
    builder = VideoDpoBuilder(tmp_path)
    for _ in range(3):
        builder.add()
    builder.clips[0]["basic"]["clip_duration"] = 0.5
    builder.clips[2] = "not an item"
    records = list(open_pairs(builder.save()))
    assert records[1].problem == "video1=2: that item of metadata.json has no clip_path or frame_caption"
    assert records[2].chosen == tmp_path / "winvideos/000002.mp4" and not records[2].problem


def test_videodpo_lists_from_another_machine(tmp_path: Path) -> None:
    builder = VideoDpoBuilder(tmp_path / "here")
    builder.add()
    for item in builder.clips:
        item["basic"]["clip_path"] = "/another/machine/set/" + item["basic"]["clip_path"]
    builder.clips[0]["basic"]["score"] = 0.75
    long = "/" + "machine/" * 1000  # more than a path may have here
    builder.clips[1]["basic"]["clip_path"] = long + "losevideos/000000.mp4"
    (record,) = open_pairs(builder.save())
    assert record.chosen == tmp_path / "here/winvideos/000000.mp4"
    assert record.rejected == tmp_path / "here/losevideos/000000.mp4"
    assert (record.chosen_score, record.rejected_score) == (0.75, None)


@pytest.mark.parametrize("name", ["metadata.json", "pair.json"])
def test_videodpo_lists_that_are_none(tmp_path: Path, name: str) -> None:
    builder = VideoDpoBuilder(tmp_path)
    builder.add()
    builder.save()
    for content, expected in (("{", "not JSON"), ('{"a": 1}', "holds dict, expected a list")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=f"{name}: {expected}"):
            list(open_pairs(tmp_path))


# ---- Which format ----


def test_formats_are_told_apart(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "set" / "some.jsonl", [GOOD])
    assert open_pairs(tmp_path / "set") == open_pairs(path) == JsonlReader(path)
    other = write_lines(tmp_path / "set" / "other.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"set: has 2 .jsonl files, expected one, or pairs.jsonl"):
        open_pairs(tmp_path / "set")
    named = other.rename(tmp_path / "set" / "pairs.jsonl")
    assert open_pairs(tmp_path / "set") == JsonlReader(named)
    plain = path.rename(tmp_path / "set" / "pairs.txt")
    assert open_pairs(plain, "jsonl") == JsonlReader(plain)
    assert open_pairs("somebody/some_set", split="test", streaming=True) == PickapicReader(
        "somebody/some_set", "test", True
    )


def test_what_is_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "pair.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("")
    for path, expected in (
        (tmp_path / "none", "none: no such file or folder, and no hub id"),
        ("a/b/c", "a/b/c: no such file or folder, and no hub id"),
        ("some/pairs.jsonl", "some/pairs.jsonl: no such file or folder"),
        (tmp_path / "empty", "empty: expected a .jsonl file, parquet files, or metadata.json and pair.json"),
        (tmp_path / "half", "half: has pair.json alone, expected both metadata.json and pair.json"),
        (tmp_path / "notes.txt", "notes.txt: expected a name that ends in .jsonl or .parquet"),
    ):
        with pytest.raises(DataError, match=expected):
            open_pairs(path)
    with pytest.raises(DataError, match="none: no such file or folder, expected jsonl data"):
        open_pairs(tmp_path / "none", "jsonl")
    with pytest.raises(DataError, match="format='csv': expected one of"):
        open_pairs(tmp_path, "csv")  # type: ignore[arg-type]
