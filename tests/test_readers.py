"""Readers of pairs: every row under its own number, a faulty one with its problem and no other row's files."""

from __future__ import annotations

import io
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sipo.data.parquet import ConnectionWarning
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
            GOOD | {"chosen": "/elsewhere/2.png", "chosen_score": None, "condition_image": None},
            GOOD | {"condition_image": "from/1.png"},
            GOOD | {"error_mask": "mask.png", "chosen_score": None},
        ],
    )
    first, second, third, edited, masked = open_pairs(path)
    assert first == PairRecord(0, "a cat", tmp_path / "win/1.png", tmp_path / "lose/1.png")
    assert (second.row, second.prompt, second.extra) == (2, "ünïcode", {"source": {"id": 7}})
    assert (second.chosen_score, second.rejected_score, second.tie) == (2, -0.5, False)
    assert (third.row, third.chosen, third.chosen_score) == (3, Path("/elsewhere/2.png"), None)
    assert third.condition_image is None and "condition_image" not in third.extra
    assert (edited.condition_image, edited.extra) == (tmp_path / "from/1.png", {})
    assert masked == replace(first, row=5, error_mask=tmp_path / "mask.png")


@pytest.mark.parametrize(
    ("keys", "misspelt"),
    [
        ({"error_masks": "a.png", "id": 3}, {"error_masks": "error_mask"}),
        (
            {"Error_mask": None, "conditionImage": "b.png"},
            {"Error_mask": "error_mask", "conditionImage": "condition_image"},
        ),
        ({"choosen_score": 1, "reject_score": 2}, {"choosen_score": "chosen_score", "reject_score": "rejected_score"}),
        ({"error_masks": ["a.png"], "error_mask": "a.png"}, {}),  # the row has that key: this is another
        (
            dict.fromkeys(
                ["prompts", "prompt_id", "chosen_id", "chosen_seed", "chosen_model", "rejected_seed", "mask", "score"]
            ),
            {},
        ),
    ],
)
def test_keys_that_may_be_misspelt_are_listed(tmp_path: Path, keys: dict[str, Any], misspelt: dict[str, str]) -> None:
    (record,) = open_pairs(write_lines(tmp_path / "pairs.jsonl", [GOOD | keys]))
    assert record.misspelt == misspelt and not record.problem and misspelt.keys() <= record.extra.keys()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", ', "not JSON: Expecting property name enclosed in double quotes, character "),
        ("[1, 2]", "holds [1, 2], expected a JSON object"),
        ({"prompt": "a", "chosen": "x"}, "no key 'rejected'"),
        (GOOD | {"prompt": None}, "prompt=None: expected text"),
        (GOOD | {"chosen": ["x"]}, "chosen=['x']: expected text"),
        (GOOD | {"prompt": "\ud83d!"}, "prompt='\\ud83d!': holds an unpaired surrogate"),
        (GOOD | {"rejected": ""}, "rejected='': expected a path"),
        (GOOD | {"condition_image": ""}, "condition_image='': expected a path"),
        (GOOD | {"condition_image": 7}, "condition_image=7: expected text"),
        (GOOD | {"error_mask": ["m.png"]}, "error_mask=['m.png']: expected text"),
        (GOOD | {"chosen_score": "good"}, "chosen_score='good': expected a number"),
        (GOOD | {"chosen_score": True}, "chosen_score=True: expected a number"),
        (GOOD | {"rejected_score": float("nan")}, "rejected_score=nan: expected a number"),
        (GOOD | {"chosen_score": int("7" * 400)}, f"chosen_score={'7' * 60}…: expected a number"),
        (f'{{"prompt": "a", "id": {"7" * 5000}}}', "not JSON (Exceeds the limit (4300"),
        ('{"prompt": "a", "id": ' + "[" * 100_000, "nested too deeply"),
        ("[" * 900 + "]" * 900, "nested too deeply, expected JSON of at most 64 levels"),
        (GOOD | {"id": json.loads('{"a":[' * 50 + "]}" * 50)}, "nested too deeply, expected JSON of at most 64 levels"),
        (GOOD | {"chosen_score": 1e400}, "chosen_score=inf: expected a number"),
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


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_line_without_an_end_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr("sipo.data.readers._LONGEST_LINE", 100)
    lines = [GOOD, json.dumps(GOOD | {"id": "x" * 500}), GOOD, json.dumps(GOOD).ljust(99), GOOD]
    path = write_lines(tmp_path / "pairs.jsonl", lines)
    path.write_text(path.read_text() + "x" * 500 + end)
    text = "is longer than 100 bytes, expected a JSON object"
    assert [record.row for record in open_pairs(path)] == list(range(6))
    assert problems(path) == {1: text, 5: text}


SPECIAL = {"FIFO": "a FIFO", "device": "a device", "socket": "a socket"}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet", "pair.json", "set/pairs.jsonl", "set/a.parquet"])
def test_what_is_no_regular_file_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Opening a FIFO would wait for ever for somebody to write to it."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if name == "pair.json":
        (tmp_path / "metadata.json").write_text("[]")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(path.parent)  # a socket's path may have about a hundred characters
        socket.socket(socket.AF_UNIX).bind(path.name)
    places = [path] if path.parent == tmp_path else [path.parent]
    for place in (*places, tmp_path) if name == "pair.json" else places:
        with pytest.raises(DataError) as caught:
            list(open_pairs(place))
        assert str(caught.value) == f"{path}: is {SPECIAL[kind]}, expected a file"


def test_equal_scores_are_a_tie(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [GOOD | {"chosen_score": 1.5, "rejected_score": 1.5}])
    assert [record.tie for record in open_pairs(path)] == [True]


def test_written_pairs_are_read_back(tmp_path: Path) -> None:
    records = [
        PairRecord(0, "a \n 'cat'", tmp_path / "win/0.png", tmp_path / "lose/0.png"),
        PairRecord(1, "ünïcode", tmp_path / "deep/win/1.mp4", tmp_path / "1.mp4", 2.5, 1.0, extra={"note": [1, None]}),
        PairRecord(2, "a dog", tmp_path / "a.png", tmp_path / "b.png", condition_image=tmp_path / "c.png"),
        PairRecord(3, "a cow", tmp_path / "a.png", tmp_path / "b.png", error_mask=tmp_path / "m.png"),
    ]
    path = tmp_path / "deep" / "new" / "pairs.jsonl"
    write_jsonl(iter(records), path)
    assert json.loads(path.read_text().splitlines()[1])["chosen"] == "../win/1.mp4"
    back = list(JsonlReader(path))
    for record, again in zip(records, back, strict=True):
        assert again.sources.keys() == record.sources.keys()
        resolved = {name: source.resolve() for name, source in again.sources.items() if isinstance(source, Path)}
        assert replace(again, **resolved) == record  # type: ignore[arg-type]
    # A data set moves as a whole.
    tmp_path.joinpath("deep").rename(tmp_path / "moved")
    assert list(JsonlReader(tmp_path / "moved/new/pairs.jsonl"))[1].extra == {"note": [1, None]}


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_jsonl([PairRecord(0, "a", Path("b"), Path("c"))], path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="row 6: chosen is 3 bytes in memory, expected a file"):
        write_jsonl([PairRecord(5, "a", b"xyz", Path("c"))], path)
    with pytest.raises(DataError, match="row 7: no key, expected a pair"):
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
    builder = PickapicBuilder(tmp_path, 4)
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


def test_a_row_that_cannot_be_converted_is_no_other_row_s_fault(tmp_path: Path) -> None:
    """Text in a parquet file is not always UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    builder = PickapicBuilder(tmp_path)
    rows = [builder.add() for _ in range(3)]
    columns = {name: [row[name] for row in rows] for name in ("jpg_0", "jpg_1", "label_0", "label_1")}
    captions = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, captions.buffers())
    pq.write_table(pa.table(columns | {"caption": text}), tmp_path / "pairs.parquet")
    records = list(open_pairs(tmp_path / "pairs.parquet"))
    assert [record.prompt for record in records] == ["a", "", "c"]
    assert records[1].problem.startswith("caption cannot be read: 'utf-8' codec can't decode byte 0xff")
    assert records[2].chosen == rows[2]["jpg_0"] and not records[2].problem


# ---- A hub whose connection breaks ----


class Breaking:
    """A hub that has one parquet file in groups of four rows, and whose connection breaks every so many reads."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, every: int, error: Exception) -> None:
        import pyarrow.parquet as pq

        builder = PickapicBuilder(path.parent, 20)
        builder.save(path.with_suffix(".whole"))
        pq.write_table(pq.read_table(path.with_suffix(".whole")), path, row_group_size=4)
        self.path, self.every, self.error = path, every, error
        self.left = every
        self.waits: list[float] = []
        monkeypatch.setattr("sipo.data.parquet._open", self.open)
        monkeypatch.setattr("sipo.data.parquet.time.sleep", self.waits.append)
        monkeypatch.setattr(PickapicReader, "_files", lambda reader, place: ["hf://datasets/some/set/data.parquet"])

    def open(self, file: str) -> Any:
        assert file == "hf://datasets/some/set/data.parquet"
        hub = self

        class File(io.FileIO):
            def read(self, size: int | None = -1) -> bytes:
                if hub.left == 0:
                    hub.left = hub.every
                    raise hub.error
                hub.left -= 1
                return super().read(-1 if size is None else size) or b""

        return File(self.path)


class ReadTimeout(Exception):  # noqa: N818 - as the library for HTTP has it: neither an OSError nor a ValueError
    pass


def test_reading_goes_on_from_the_row_group_at_which_the_connection_broke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    hub = Breaking(tmp_path / "data.parquet", monkeypatch, every=10_000, error=ReadTimeout())
    reader = open_pairs("some/set", streaming=True)
    whole = list(reader)
    assert [record.prompt for record in whole] == [f"prompt {row}" for row in range(20)] and not hub.waits
    groups: list[int] = []
    original = pq.ParquetFile.iter_batches

    def spy(file: Any, *arguments: Any, row_groups: list[int], **options: Any) -> Any:
        groups.extend(row_groups)
        return original(file, *arguments, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    hub.every = hub.left = 2
    with pytest.warns(ConnectionWarning) as caught:
        again = list(reader)
    assert again == whole
    assert len(hub.waits) >= 3 and set(hub.waits) == {1.0}  # each attempt got further
    assert groups == sorted(groups) and set(groups) == set(range(5)) and len(groups) <= 5 + len(hub.waits)
    text = str(caught[0].message)
    assert text.startswith("hf://datasets/some/set/data.parquet: ReadTimeout; again in 1 s, from row ")
    assert text.endswith(" on")


def test_a_hub_that_stays_away_is_an_error_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Breaking(tmp_path / "data.parquet", monkeypatch, every=10_000, error=ReadTimeout("timed out"))
    rows = iter(open_pairs("some/set", streaming=True))
    assert [next(rows).row for _ in range(8)] == list(range(8))
    hub.every = hub.left = 0
    expected = r"^hf://datasets/some/set/data\.parquet: cannot be read from row 9 on: timed out$"
    with pytest.warns(ConnectionWarning), pytest.raises(DataError, match=expected):
        next(rows)
    assert hub.waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


@pytest.mark.parametrize("status", [401, 404, None])
def test_what_the_hub_refuses_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    error: Exception = FileNotFoundError("gone")
    if status is not None:
        error = ReadTimeout("no entry")
        error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    hub = Breaking(tmp_path / "data.parquet", monkeypatch, every=0, error=error)
    with pytest.raises(DataError, match=r"cannot be read from row 1 on: (no entry|gone)$"):
        next(iter(open_pairs("some/set", streaming=True)))
    assert not hub.waits


def test_a_damaged_file_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Breaking(tmp_path / "data.parquet", monkeypatch, every=10_000, error=ReadTimeout())
    hub.path.write_bytes(b"not parquet, and of no use a minute later either")
    with pytest.raises(DataError, match="cannot be read from row 1 on: Parquet magic bytes not found"):
        next(iter(open_pairs("some/set", streaming=True)))
    assert not hub.waits


@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_that_is_neither_here_nor_on_the_hub_is_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """A folder's mistyped name may look like one of the hub's."""
    asked: list[str] = []

    def refuse(api: Any, path: str, **options: Any) -> Any:
        asked.append(path)
        raise ReadTimeout("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("datasets.load_dataset", None)
    monkeypatch.setattr("datasets.load_dataset_builder", None)
    message = r"^data/pairs: no such file or folder, and no hub id that answers \(Name or service not known\)$"
    with pytest.raises(DataError, match=message):
        next(iter(open_pairs("data/pairs", streaming=streaming)))
    assert asked == ["data/pairs"]


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
    builder = VideoDpoBuilder(tmp_path, 5)
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


def test_half_a_character_in_videodpo_s_lists_is_its_row_s_fault(tmp_path: Path) -> None:
    """JSON lets it through, and no file of text in UTF-8 can hold it."""
    builder = VideoDpoBuilder(tmp_path, 3)
    builder.pairs[0]["frame_caption"] = "half\ud800"
    builder.clips[2]["basic"]["clip_path"] = "half\ud800.mp4"
    found = problems(builder.save())
    assert found == {
        0: "frame_caption='half\\ud800': expected text",
        1: "video1=2: that item of metadata.json has no clip_path or frame_caption",
    }


def test_a_clip_that_the_published_loader_drops_shifts_nothing(tmp_path: Path) -> None:
    """That loader leaves out clips of less than a second before it counts: every later pair gets other clips."""
    builder = VideoDpoBuilder(tmp_path, 3)
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
