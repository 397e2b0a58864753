"""A cache and its pairs and weights: what has changed is encoded again or refused, never used as it was."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_refused

from sipo.cache import source
from sipo.cache.finished import open_cache
from sipo.cache.format import INDEX, CacheError, DamagedError, write_json
from sipo.cache.index import pairs_fingerprint
from sipo.cache.precompute import CacheSummary, precompute_pairs
from sipo.data.load import BadPairError
from sipo.data.media import write_image
from sipo.data.readers import JsonlReader, PickapicReader
from sipo.data.records import DataError
from sipo.families.base import Family
from tests.changing_data import Lines, changed, drop, make_pairs, read, swap, write, written_at
from tests.data_sets import PickapicBuilder, noise
from tests.small_family import (
    MODEL,
    Accelerator,
    OptionalEditFamily,
    Pipeline,
    SeeingFamily,
    SmallFamily,
    build,
    in_processes,
    settings,
)

Change = Callable[[Lines], Any]


# ---- Three shards of two pairs, without a model ----


def encode(data: Path, pipeline: Pipeline | None = None, **options: Any) -> CacheSummary:
    settings: dict[str, Any] = {
        "sizes": [(32, 32)],
        "shard_pairs": 2,
        "dataset_name": "the pairs",
        "check_hashes": False,
    }
    return build(data.parent.parent / "cache", JsonlReader(data), pipeline, **settings | options)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pairs that have been encoded."""
    path = make_pairs(tmp_path / "data")
    encode(path)
    return path


def assert_as_new(data: Path) -> None:
    """The cache is the one that would be made today."""
    folder = data.parent.parent
    build(folder / "new", JsonlReader(data), sizes=[(32, 32)], shard_pairs=2, dataset_name="the pairs")
    found, wanted = open_cache(folder / "cache"), open_cache(folder / "new")
    assert found.rows.tolist() == wanted.rows.tolist()
    for place in range(len(wanted)):
        assert all(map(torch.equal, found.pair(place)[:2], wanted.pair(place)[:2]))
        assert all(torch.equal(found.text(place)[name], tensor) for name, tensor in wanted.text(place).items())
    names = [sorted(path.name for path in place.glob("*.safetensors")) for place in (folder / "cache", folder / "new")]
    assert names[0] == names[1]
    counts = [json.loads((place / INDEX).read_text()) for place in (folder / "cache", folder / "new")]
    for name in ("pairs", "records", "ties", "skipped"):
        assert counts[0][name] == counts[1][name]


def edit(lines: Lines) -> None:
    lines[3]["prompt"] = "prompt 0"


def edit_all(lines: Lines) -> None:
    for line in lines:
        line["prompt"] += " in the rain"


def drop_first(lines: Lines) -> None:
    del lines[0]


def drop_shard(lines: Lines) -> None:
    del lines[4:]


def add(lines: Lines) -> None:
    lines.append(lines[0] | {"prompt": "another"})


def tie(lines: Lines) -> None:
    lines[5] |= {"chosen_score": 1, "rejected_score": 1}


def tie_early(lines: Lines) -> None:
    lines[1] |= {"chosen_score": 1, "rejected_score": 1}


def empty_caption(lines: Lines) -> None:
    lines[3]["prompt"] = " "


EVERYTHING = [f"{kind}-0000{n}" for kind in ("latents", "text") for n in range(3)]
ROWS: list[tuple[Change, list[str], str]] = [
    (swap, ["latents-00001"], "row 4: chosen is b/3.bmp, was a/3.bmp"),
    (edit, [], "row 4: another prompt"),
    (edit_all, ["text-00000", "text-00001", "text-00002"], "row 1: another prompt"),
    (drop, ["latents-00002"], "row 6: no longer a pair"),
    (drop_first, EVERYTHING, "row 1: chosen is a/1.bmp, was a/0.bmp"),
    (drop_shard, [], "row 5: no longer a pair"),
    (add, ["latents-00003", "text-00003"], "row 7: a new pair"),
    (tie, ["latents-00002"], "row 6: no longer a pair"),
    (tie_early, ["latents-00000"], "row 2: no longer a pair"),
]


@pytest.mark.parametrize(("change", "wanted", "said"), ROWS)
def test_rows_that_have_changed_are_encoded_again_and_no_others(
    data: Path, change: Change, wanted: list[str], said: str
) -> None:
    before, lines = written_at(data.parent.parent / "cache"), read(data)
    change(lines)
    write(data, lines)
    summary = encode(data)
    assert summary.changes[0] == said and said in summary.news()[0]
    assert f"{summary.written} of {(len(lines) + 1) // 2} shards of latents and" in summary.news()[0]
    assert f"and {sum(name[0] == 't' for name in wanted)} of text encoded again" in summary.news()[0]
    assert changed(before, data.parent.parent / "cache") == wanted
    assert_as_new(data)
    before, pipeline = written_at(data.parent.parent / "cache"), Pipeline()
    again = encode(data, pipeline)
    assert not again.news() and not changed(before, data.parent.parent / "cache") and not pipeline.encoded


@pytest.mark.parametrize("family", [OptionalEditFamily(), SeeingFamily()], ids=lambda family: family.name)
def test_condition_images_are_compared_as_the_samples_are(tmp_path: Path, family: Family) -> None:
    path = make_pairs(tmp_path / "data")
    lines = read(path)
    for row, line in enumerate(lines):
        write_image(tmp_path / f"data/c/{row}.bmp", noise(50 + row, 3, 40, 33))
        line["condition_image"] = f"c/{row}.bmp"
    write(path, lines)
    encode(path, family=family)
    cache, sees = tmp_path / "cache", family.text_sees_image

    def again(wanted: str, *shards: int) -> None:
        before, pipeline = written_at(cache), Pipeline()
        summary = encode(path, pipeline, family=family)
        assert summary.changes[:1] == [wanted] * bool(wanted)
        kinds = ("latents", "text") if sees else ("latents",)
        assert changed(before, cache) == [f"{kind}-0000{n}" for kind in kinds for n in shards]
        assert (pipeline.encoded, len(pipeline.prompts)) == (2 * len(shards), 2 * len(shards) if sees else 0)
        assert not encode(path, family=family).changes

    again("")
    write_image(tmp_path / "data/c/3.bmp", noise(99, 3, 40, 33))
    again("row 4: c/3.bmp has other content", 1)
    lines[4]["condition_image"] = "c/3.bmp"
    write(path, lines)
    again("row 5: condition_image is c/3.bmp, was c/4.bmp", 2)
    lines[1]["prompt"] = lines[0]["prompt"] = "other words"
    if sees:
        write(path, lines)
        again("row 1: another prompt", 0)
    else:
        del lines[1]["condition_image"]
        lines[1]["prompt"] = lines[0]["prompt"] = "prompt 0"
        write(path, lines)
        again("row 2: condition_image is none, was c/1.bmp", 0)
    found = open_cache(cache)
    build(tmp_path / "new", JsonlReader(path), family=family, sizes=[(32, 32)], shard_pairs=2)
    wanted = open_cache(tmp_path / "new")
    for place in range(6):
        one, other = ({**c.text(place), **c.condition_image(place)} for c in (found, wanted))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_error_masks_are_compared_as_the_samples_are(tmp_path: Path) -> None:
    path = make_pairs(tmp_path / "data")
    lines = read(path)
    write_image(tmp_path / "data/m.bmp", torch.full((3, 32, 32), 255, dtype=torch.uint8))
    encode(path)
    for change, shard in (({"error_mask": "m.bmp"}, 1), ({}, 1), ({"error_mask": "m.bmp"}, 1)):
        before = written_at(tmp_path / "cache")
        write(path, [*lines[:3], lines[3] | change, *lines[4:]])
        was, now = ("none", "m.bmp") if change else ("m.bmp", "none")
        assert encode(path).changes == [f"row 4: error_mask is {now}, was {was}"]
        assert changed(before, tmp_path / "cache") == [f"latents-0000{shard}"]
        mask = open_cache(tmp_path / "cache").error_mask(3)
        assert (mask is None) == (not change) and not encode(path).changes
    write_image(tmp_path / "data/m.bmp", torch.full((3, 32, 32), 51, dtype=torch.uint8))
    assert encode(path).changes == ["row 4: m.bmp has other content"]
    mask = open_cache(tmp_path / "cache").error_mask(3)
    assert mask is not None and torch.allclose(mask, torch.tensor(0.2))


def test_text_whose_images_are_gone_is_not_given_up(tmp_path: Path) -> None:
    """Left out as pairs that cannot be used, all of them would be lost."""
    path = make_pairs(tmp_path / "data")
    write(path, [line | {"condition_image": line["chosen"]} for line in read(path)])
    encode(path, family=SeeingFamily(), skip_bad=True)
    shutil.rmtree(tmp_path / "data" / "a")
    shutil.rmtree(tmp_path / "data" / "b")
    assert encode(path, family=SeeingFamily(), skip_bad=True).absent == 3
    (tmp_path / "cache" / "text-00001.safetensors").unlink()
    message = (
        "the pairs: text-00001 is to be encoded again, and none of its images exists any more: expected those of row 3"
    )
    assert_refused(lambda: encode(path, family=SeeingFamily(), skip_bad=True), CacheError, message)
    assert all((tmp_path / "cache" / f"latents-0000{n}.safetensors").is_file() for n in range(3))


def test_ties_are_counted_as_they_are_now(data: Path) -> None:
    lines = read(data)
    write(data, [*lines, lines[0] | {"chosen_score": 1, "rejected_score": 1}])
    before = written_at(data.parent.parent / "cache")
    assert (encode(data).ties, encode(data).records) == (1, 7)
    assert not changed(before, data.parent.parent / "cache")
    assert_as_new(data)


def test_a_caption_that_is_empty_now_is_a_bad_pair(data: Path) -> None:
    lines = read(data)
    empty_caption(lines)
    write(data, lines)
    changed_row = re.escape("the data has changed (row 4: the caption is empty now) and is encoded again, but row 4: ")
    with pytest.raises(BadPairError, match=f"^{changed_row}the caption is empty "):
        encode(data)
    assert encode(data, skip_bad=True).skipped == {"caption": 1}


def test_another_prompt_of_a_pair_that_is_left_out_is_a_change_too(data: Path) -> None:
    (data.parent / "a" / "3.bmp").unlink()
    encode(data, skip_bad=True)
    lines = read(data)
    lines[3]["prompt"] = "another"
    write(data, lines)
    with pytest.raises(CacheError, match="row 3 or one behind it: another prompt"):
        encode(data, skip_bad=True, refuse_changes=True)
    assert encode(data, skip_bad=True).texts == 1


def test_what_is_no_part_of_a_pair_changes_nothing(data: Path) -> None:
    lines = read(data)
    write(data, [line | {"note": "seen", "chosen_score": 2, "rejected_score": 1} for line in lines])
    assert encode(data).kept == 3 and not encode(data).news()


@pytest.mark.parametrize("change", [change for change, _, _ in ROWS])
def test_changes_are_refused_where_a_run_goes_on(data: Path, change: Change) -> None:
    before, kept = written_at(data.parent.parent / "cache"), (data.parent.parent / "cache" / INDEX).read_bytes()
    lines = read(data)
    (data.parent / "a" / "0.bmp").touch()  # a new time is no change
    change(lines)
    write(data, lines)
    with pytest.raises(CacheError, match=r"^the pairs: row \d: .*expected the data that the run has been trained on"):
        encode(data, refuse_changes=True)
    assert not changed(before, data.parent.parent / "cache")
    assert (data.parent.parent / "cache" / INDEX).read_bytes() == kept


def swap_files(folder: Path) -> None:
    a, b = folder / "a" / "4.bmp", folder / "b" / "4.bmp"
    a.rename(folder / "aside")
    b.rename(a)
    (folder / "aside").rename(b)


def overwrite(folder: Path, number: int = 4) -> None:
    write_image(folder / "a" / f"{number}.bmp", noise(99, 3, 32, 32))


def shorten(folder: Path) -> None:
    (folder / "a" / "4.bmp").write_bytes((folder / "a" / "5.bmp").read_bytes() + b"\0")


@pytest.mark.parametrize("change", [swap_files, overwrite, shorten])
def test_files_that_have_changed_are_encoded_again(data: Path, change: Callable[[Path], None]) -> None:
    before = written_at(data.parent.parent / "cache")
    change(data.parent)
    with pytest.raises(CacheError, match=r"row 5: a/4\.bmp has other content"):
        encode(data, refuse_changes=True)
    summary = encode(data)
    assert summary.changes[0].startswith("row 5: a/4.bmp has other content")
    assert (summary.written, summary.kept) == (1, 2)
    assert changed(before, data.parent.parent / "cache") == ["latents-00002"]
    assert_as_new(data)


def test_files_of_one_time_that_change_places_are_told_apart(tmp_path: Path) -> None:
    """As out of an archive: size and modification time are equal."""
    path = make_pairs(tmp_path / "data")
    for file in path.parent.glob("?/*.bmp"):
        os.utime(file, ns=(10**18, 10**18))
    encode(path)
    swap_files(path.parent)
    assert encode(path).written == 1
    assert_as_new(path)


def test_folders_that_change_places_are_told_apart_by_inodes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written in one tick of the clock have equal times, and renaming their folder leaves these alone."""
    real = source.stamp
    monkeypatch.setattr(source, "stamp", lambda path: real(path) and [real(path)[0], 1, 1, *real(path)[3:]])
    data.touch()
    assert encode(data).kept == 3
    before, folder = written_at(data.parent.parent / "cache"), data.parent
    for name, target in (("a", "c"), ("b", "a"), ("c", "b")):
        (folder / name).rename(folder / target)
    assert encode(data).written == 3
    assert_as_new(data)
    before = written_at(folder.parent / "cache")
    shutil.copytree(folder / "a", folder / "c")
    shutil.rmtree(folder / "a")
    (folder / "c").rename(folder / "a")
    assert not encode(data).news() and not changed(before, folder.parent / "cache")  # another inode alone is no change


def test_new_times_alone_encode_nothing_and_are_read_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a clone."""
    before = written_at(data.parent.parent / "cache")
    shutil.copytree(data.parent, data.parent.with_name("copy"), copy_function=shutil.copyfile)
    shutil.rmtree(data.parent)
    data.parent.with_name("copy").rename(data.parent)
    read_files = []
    hashed = source.file_hash
    monkeypatch.setattr(source, "file_hash", lambda path: read_files.append(path) or hashed(path))
    pipeline = Pipeline()
    assert not encode(data, pipeline).news() and len(read_files) == 12
    assert encode(data, pipeline).kept == 3 and len(read_files) == 12
    (data.parent / "b" / "2.bmp").touch()
    assert encode(data, pipeline).kept == 3 and len(read_files) == 13
    assert not pipeline.encoded and not changed(before, data.parent.parent / "cache")


def test_rows_are_not_read_where_nothing_has_changed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    rows = JsonlReader.__iter__
    monkeypatch.setattr(JsonlReader, "__iter__", lambda self: reads.append(1) or rows(self))
    assert encode(data).kept == 3 and not reads
    data.touch()
    assert encode(data).kept == 3 and len(reads) == 1
    assert encode(data).kept == 3 and len(reads) == 1
    (data.parent.parent / "cache" / "files.json").write_text("{")  # which only saves time
    assert encode(data).kept == 3 and len(reads) == 2


def test_verify_finds_what_sizes_and_times_do_not_show(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = source.stamp
    monkeypatch.setattr(source, "stamp", lambda path: [*real(path)[:2], 0, 0])  # some file systems keep no other time
    encode(data)
    path = data.parent / "a" / "0.bmp"
    times = path.stat()
    overwrite(data.parent, 0)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert encode(data).kept == 3
    assert encode(data, verify=True).changes == ["row 1: a/0.bmp has other content"]
    assert_as_new(data)
    assert encode(data, verify=True).kept == 3


def test_a_file_that_is_written_to_while_pairs_are_encoded_is_found(data: Path) -> None:
    """One file in two shards, other in the second: what is known of the later one says nothing of the earlier."""
    lines = read(data)
    lines[4]["chosen"] = lines[0]["chosen"]
    write(data, lines)

    class Overwrites(Pipeline):
        @property
        def encoded(self) -> int:
            return self.count

        @encoded.setter
        def encoded(self, count: int) -> None:
            self.count = count
            if count == 3:
                overwrite(data.parent, 0)

    shutil.rmtree(data.parent.parent / "cache")
    encode(data, Overwrites(), num_workers=1, check_hashes=True)
    assert encode(data).changes == ["row 1: a/0.bmp has other content"]
    assert_as_new(data)


def test_a_cache_that_may_only_be_read_is_used(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in data.parent.glob("?/*.bmp"):
        path.touch()

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        for module in ("format", "index"):
            patch.setattr(f"sipo.cache.{module}.write_json", refuse)
        for _ in range(2):
            assert encode(data).kept == 3
    assert encode(data).kept == 3


def test_another_prompt_that_cannot_be_written_down_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: the embeddings would be those of the prompt before."""
    lines = read(data)
    edit(lines)
    write(data, lines)
    real = write_json

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name.startswith("latents"):
            raise OSError(28, "No space left on device", str(path))
        real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("sipo.cache.format.write_json", refuse)
        with pytest.raises(OSError, match="No space left"):
            encode(data)
    encode(data)
    assert_as_new(data)


def test_files_that_are_gone(data: Path) -> None:
    """A shard without any of its files is kept, and told; one that lacks some has pairs that cannot be used."""
    before = written_at(data.parent.parent / "cache")
    for name in ("a/4", "b/4", "a/5", "b/5"):
        (data.parent / f"{name}.bmp").unlink()
    for _ in range(2):
        summary = encode(data)
        assert summary.absent == 1 and "1 of 3 shards could not be checked: their images" in summary.news()[0]
    lines = read(data)
    edit_all(lines)
    write(data, lines)
    assert encode(data).absent == 1  # text needs no image
    assert not [name for name in changed(before, data.parent.parent / "cache") if name.startswith("latents")]
    (data.parent / "a" / "2.bmp").unlink()
    with pytest.raises(BadPairError, match="row 3: chosen: "):
        encode(data)
    assert encode(data, skip_bad=True).skipped == {"missing": 1}
    write_image(data.parent / "a" / "2.bmp", noise(4, 3, 32, 32))
    assert encode(data).changes == ["row 3: a/2.bmp exists now"]
    for number in (4, 5):
        for side, folder in enumerate("ab"):
            write_image(data.parent / folder / f"{number}.bmp", noise(2 * number + side, 3, 32, 32))
    assert not encode(data).news()
    assert_as_new(data)


def test_pairs_that_cannot_be_encoded_again_are_not_thrown_away(data: Path) -> None:
    """Neither are they left out: a row that has changed is in a shard with others whose encoded data is sound."""
    cache, lines = data.parent.parent / "cache", read(data)
    before, kept = written_at(cache), (cache / INDEX).read_bytes()
    for row in (2, 3):
        for side in "ab":
            (data.parent / side / f"{row}.bmp").unlink()
    with pytest.raises(CacheError, match=r"^the pairs: none of the images or clips of rows 3 to 4 exists, expected"):
        encode(data, verify=True)
    swap(lines)
    write(data, lines)
    message = "^the pairs: row 4: chosen is b/3.bmp, was a/3.bmp, since .* rows 3 to 4 exists any more: exp"
    for skip_bad in (False, True):
        with pytest.raises(CacheError, match=message):
            encode(data, skip_bad=skip_bad)
    lines[3] |= {"chosen": "c/3.bmp"}
    write_image(data.parent / "c" / "3.bmp", noise(50, 3, 32, 32))
    write(data, lines)  # another image, which is there, and the rest of the shard is not
    with pytest.raises(CacheError, match=r"row 4: chosen is c/3\.bmp, was a/3\.bmp, since"):
        encode(data, skip_bad=True)
    assert not changed(before, cache) and (cache / INDEX).read_bytes() == kept


def test_why_a_shard_is_encoded_again_comes_before_what_it_lacks(data: Path) -> None:
    (data.parent / "a" / "2.bmp").unlink()
    lines = read(data)
    swap(lines)
    write(data, lines)
    said = r"^the data has changed \(row 4: chosen is b/3\.bmp.*, but row 3: chosen: .*2\.bmp"
    with pytest.raises(BadPairError, match=said):
        encode(data)


def test_a_run_whose_cache_another_run_encodes_again_is_told(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sipo.cache.format._OPEN_SHARDS", 1)
    cache = open_cache(data.parent.parent / "cache")
    cache.pair(0)
    cache.pair(4)  # and the first shard is closed
    lines = read(data)
    for row in (0, 3):
        lines[row]["chosen"], lines[row]["rejected"] = lines[row]["rejected"], lines[row]["chosen"]
    write(data, lines)
    encode(data)
    for pair in (2, 0):
        with pytest.raises(CacheError, match="encoded again by another run since this one opened the cache"):
            cache.pair(pair)
    path = data.parent.parent / "cache" / "latents-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    with pytest.raises(DamagedError, match="changed since it was written"):
        open_cache(data.parent.parent / "cache").pair(4)


def test_a_json_file_whose_content_is_damaged_is_written_again(data: Path) -> None:
    """Each of its values in turn: what is valid JSON and wrong is damage all the same."""
    cache = data.parent.parent / "cache"
    for path in sorted(cache.glob("*.json")):
        whole = json.loads(path.read_text())
        name = path.stem
        for number, key in enumerate(whole):
            wrong = (None, "x", [1], {})[number % 4]
            path.write_text(json.dumps(whole | {key: wrong}))
            if name == "index":
                with pytest.raises(CacheError, match=r"cache format|not as it was written"):
                    open_cache(cache)
                if key == "format":
                    continue
            before = written_at(cache)
            data.touch()
            with contextlib.suppress(DamagedError):  # training says which one and what mends it, or does so itself
                encode(data)
            encode(data, check_hashes=True)
            assert set(changed(before, cache)) <= {name}, (key, wrong)
            assert "sha256_below" in json.loads(path.read_text()) and encode(data).kept == 3
    assert_as_new(data)


def test_a_data_set_that_has_moved_is_taken_if_it_is_the_same(data: Path) -> None:
    before = written_at(data.parent.parent / "cache")
    moved = data.parent.rename(data.parent.with_name("moved")) / data.name
    assert not encode(moved, dataset_name="elsewhere").news()
    assert open_cache(data.parent.parent / "cache").path == "elsewhere"
    lines = read(moved)
    swap(lines)
    write(moved, lines)
    others = r'this run has "another", whose pairs are others \(row 4: chosen is b/3'
    with pytest.raises(CacheError, match=others):
        encode(moved, dataset_name="another")
    assert not changed(before, data.parent.parent / "cache")
    assert encode(moved, dataset_name="elsewhere").written == 1


def test_a_process_that_is_killed_while_it_encodes_again_leaves_no_finished_cache(data: Path) -> None:
    lines = read(data)
    swap(lines)
    lines[5]["chosen"], lines[5]["rejected"] = lines[5]["rejected"], lines[5]["chosen"]
    write(data, lines)
    with pytest.raises(KeyboardInterrupt):
        encode(data, Pipeline(fail_at=3))
    with pytest.raises(CacheError, match="not finished"):
        open_cache(data.parent.parent / "cache")
    pipeline = Pipeline()
    encode(data, pipeline, check_hashes=True)
    assert pipeline.encoded == 2
    assert_as_new(data)


def test_several_processes_find_what_has_changed(data: Path) -> None:
    lines = read(data)
    swap(lines)
    add(lines)
    write(data, lines)
    pipelines = [Pipeline(), Pipeline()]

    def run(accelerator: Accelerator) -> CacheSummary:
        return encode(data, pipelines[accelerator.process_index], accelerator=accelerator)

    summaries = in_processes(2, run)
    for summary in summaries:
        assert summary.changes == ["row 4: chosen is b/3.bmp, was a/3.bmp", "row 7: a new pair"]
        assert (summary.written, summary.kept) == (2, 2)
    assert [pipeline.encoded for pipeline in pipelines] == [0, 3]
    assert_as_new(data)


def test_new_times_that_another_process_has_seen_are_written_down(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data.parent / "b" / "2.bmp").touch()  # in the second shard, which is the second process's
    in_processes(2, lambda accelerator: encode(data, accelerator=accelerator))
    monkeypatch.setattr(JsonlReader, "__iter__", None)
    assert encode(data).kept == 3


# ---- Sources that are known without reading their rows ----


def test_parquet_files_are_compared_by_sizes_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = PickapicBuilder(tmp_path, 6)
    path = builder.save(tmp_path / "data" / "train.parquet")
    rows = PickapicReader._rows
    reads = []
    monkeypatch.setattr(PickapicReader, "_rows", lambda self: reads.append(1) or rows(self))

    def encode_parquet(**options: Any) -> CacheSummary:
        own: dict[str, Any] = {"sizes": [(16, 24)], "shard_pairs": 2, "check_hashes": False}
        return build(tmp_path / "cache", PickapicReader(str(path.parent)), **own | options)

    encode_parquet()
    assert encode_parquet().kept == 3 and len(reads) == 1
    path.touch()
    assert encode_parquet().kept == 3 and len(reads) == 2  # the images' content decides
    assert encode_parquet().kept == 3 and len(reads) == 2
    assert encode_parquet(verify=True).kept == 3 and len(reads) == 3
    builder.rows[3]["jpg_0"] = builder.rows[0]["jpg_1"]
    builder.save(path)
    summary = encode_parquet()
    assert summary.changes == ["row 4: rejected has other content"] and summary.written == 1
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(DataError, match="no such file or folder, and no hub id that answers"):
        encode_parquet()


def test_a_source_that_cannot_be_reached_is_told_before_encoders_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", Mock(side_effect=OSError("timed out")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "none"))
    loaded: list[int] = []
    with pytest.raises(DataError, match=r"no hub id that answers \(timed out\)$"):
        precompute_pairs(
            PickapicReader("owner/name"),
            SmallFamily(),
            lambda: loaded.append(1),
            tmp_path / "cache",
            settings=settings(),
            fingerprint=pairs_fingerprint(MODEL, settings()),
            progress=False,
        )
    assert loaded == []


def test_a_hub_s_data_set_is_known_by_the_hashes_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"README.md": "1", "data/train-00000.parquet": "2", "data/train-00001.parquet": "3"}
    card: dict[str, Any] = {"configs": [{"config_name": "default"}]}

    def dataset_info(api: Any, path: str, **options: Any) -> SimpleNamespace:
        assert path == "owner/name" and options["files_metadata"]
        files = [SimpleNamespace(rfilename=name, blob_id=blob) for name, blob in found.items()]
        return SimpleNamespace(sha="".join(found.values()), siblings=files, card_data=card)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    reader = PickapicReader("owner/name")
    before = reader.state()
    assert json.loads(json.dumps(before)) == before
    found["README.md"] = "4"
    assert reader.state() == before
    found["data/train-00001.parquet"] = "5"
    assert reader.state() != before
    found["data/train-00001.parquet"] = "3"
    card["configs"] = [{"config_name": "other"}]
    assert reader.state() != before


def test_a_higher_limit_of_pixels_lets_pairs_in(tmp_path: Path) -> None:
    """The shard in which a pair was left out is encoded again, and no other."""
    data = make_pairs(tmp_path / "data")
    for side in "ab":
        write_image(data.parent / side / "3.bmp", noise(ord(side), 3, 64, 64))
    message = r"^row 4: chosen: .*3\.bmp: has 64x64 pixels, expected at most 4095 \(max_pixels\)"
    with pytest.raises(BadPairError, match=message):
        encode(data, max_pixels=4095)
    assert encode(data, max_pixels=4095, skip_bad=True).skipped == {"large": 1}
    assert encode(data, max_pixels=4095, skip_bad=True).changes == []
    with pytest.raises(CacheError, match=r"row 3 or one behind it: data\.max_pixels allows for it now, since .* was"):
        encode(data, max_pixels=4096, refuse_changes=True)
    before = written_at(tmp_path / "cache")
    assert encode(data, max_pixels=4096).changes == ["row 3 or one behind it: data.max_pixels allows for it now"]
    assert changed(before, tmp_path / "cache") == ["latents-00001"]
    assert_as_new(data)
    assert encode(data, max_pixels=5000).changes == encode(data, max_pixels=1).changes == []
