"""Precomputing: the same files whatever happens on the way, and nothing left out unless asked for and counted."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_refused

from sipo.batch import PairBatch, collate, level_argument, network_timesteps
from sipo.cache.decode import ahead, queue_length
from sipo.cache.finished import open_cache
from sipo.cache.format import CacheError
from sipo.cache.index import pairs_fingerprint
from sipo.cache.pairs import CachedPairs, DrawnPairs
from sipo.cache.precompute import precompute_pairs
from sipo.cache.precompute_errors import precompute_reference_errors
from sipo.cache.reference_errors import FixedDraws
from sipo.cache.savings import Cost
from sipo.data.config import DataConfig
from sipo.data.load import BadPairError
from sipo.data.media import read_media, resize_and_crop, write_image, write_video
from sipo.data.readers import open_pairs, write_jsonl
from sipo.data.records import DataError, PairRecord
from sipo.data.toy import make_toy_pairs
from sipo.families import get_family
from sipo.families.base import Family
from sipo.families.config import ModelConfig
from sipo.families.toy import build_toy
from sipo.families.vae import as_floats
from sipo.seeds import derive_seed
from tests.data_sets import contents
from tests.family_cases import encoders_of, sides_of
from tests.small_family import (
    MODEL,
    Accelerator,
    EditFamily,
    OptionalEditFamily,
    Pipeline,
    Records,
    SeeingFamily,
    SmallFamily,
    build,
    in_processes,
    png,
    settings,
)


def test_what_is_stored_is_what_the_family_makes_of_the_files(tmp_path: Path) -> None:
    summary = build(tmp_path, latents="mode")
    assert (summary.pairs, summary.records, summary.ties, summary.skipped) == (12, 12, 0, {})
    assert (summary.prompts, summary.written, summary.kept) == (4, 3, 0)
    assert "12 pairs, 4 prompts" in summary.describe()
    cache = open_cache(tmp_path)
    assert cache.rows.tolist() == list(range(12))
    for index in (0, 7):
        record = Records.make().records[index]
        for half, source in enumerate((record.chosen, record.rejected)):
            fitted = resize_and_crop(read_media(source).pixels, 16, 24)
            wanted = SmallFamily().encode_pixels(Pipeline(), fitted.pixels[None])[0]
            assert torch.equal(cache.pair(index)[half], wanted)
            own = SmallFamily().own_condition(fitted.original_size, fitted.crop_top_left, (16, 24))
            assert torch.equal(cache.pair(index)[2]["time_ids"][half], own["time_ids"])


def test_every_prompt_is_encoded_once(tmp_path: Path) -> None:
    pipeline = Pipeline()
    build(tmp_path, pipeline=pipeline)
    assert pipeline.prompts == ["a", "a b", "a b c", "a b c d"]
    assert pipeline.encoded == 12  # both halves of a pair at once
    again = Pipeline()
    assert build(tmp_path, pipeline=again).kept == 3
    assert (again.encoded, again.prompts) == (0, [])


@pytest.mark.parametrize("fail_at", [1, 2, 4, 5, 9, 12])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, fail_at: int) -> None:
    changes: dict[str, Any] = {"random_flip": True, "center_crop": False}
    build(tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", pipeline=Pipeline(fail_at=fail_at), **changes)
    pipeline = Pipeline()
    summary = build(tmp_path / "cut", pipeline=pipeline, **changes)
    assert summary.kept == (fail_at - 1) // 4
    assert pipeline.encoded == 12 - 4 * summary.kept
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


_KILLED = """
import sys
from pathlib import Path
from tests.small_family import Records, build
print("ready", flush=True)
while True:
    build(Path(sys.argv[1]), Records.make(240), shard_pairs=2)
    print("done", flush=True)
"""


def test_a_killed_process_leaves_nothing_that_is_half(tmp_path: Path) -> None:
    build(tmp_path / "whole", Records.make(240), shard_pairs=2)
    root = Path(__file__).parent.parent
    chance = random.Random(4)
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    cut = tmp_path / "cut"
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(cut)], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        target = len(list(cut.glob("latents-*.json"))) + 10 + chance.randrange(30)
        deadline = time.monotonic() + 60
        while len(list(cut.glob("latents-*.json"))) < target and time.monotonic() < deadline:
            time.sleep(chance.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(CacheError, match="not finished"):
            open_cache(cut)
    kept = build(cut, Records.make(240), shard_pairs=2).kept
    assert 20 <= kept < 120
    assert contents(cut) == contents(tmp_path / "whole")  # nor are there leftovers of interrupted writes


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    build(tmp_path)
    whole = contents(tmp_path)
    gone = 4_000_000  # beyond the numbers that processes have
    for name in (f".latents-00002.safetensors.{gone}.tmp/latents-00002.safetensors", f".index.json.{gone}.tmp/x"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    (tmp_path / ".mine.txt").write_text("")
    build(tmp_path)
    assert contents(tmp_path) == whole | {".mine.txt": b""}


@pytest.mark.parametrize("name", ["latents-00001", "text-00002", "unconditional"])
@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "sidecar"])
def test_a_damaged_shard_is_rebuilt_and_no_other(tmp_path: Path, name: str, damage: str) -> None:
    build(tmp_path)
    whole = contents(tmp_path)
    path = tmp_path / f"{name}.safetensors"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "bit":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
    elif damage == "missing":
        path.unlink()
    else:
        (tmp_path / f"{name}.json").write_text("{")
    shards = [other for other in whole if name not in other and other not in ("index.json", "files.json")]
    inodes = {other: (tmp_path / other).stat().st_ino for other in shards}
    pipeline = Pipeline()
    build(tmp_path, pipeline=pipeline)
    assert contents(tmp_path) == whole
    assert inodes == {other: (tmp_path / other).stat().st_ino for other in inodes}
    assert pipeline.encoded == (4 if name.startswith("latents") else 0)
    assert len(pipeline.prompts) == (1 if name.startswith("text") else 0)


def test_a_damaged_index_is_written_again_from_the_shards(tmp_path: Path) -> None:
    build(tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "index.json").write_text("{")
    pipeline = Pipeline()
    build(tmp_path, pipeline=pipeline)
    assert contents(tmp_path) == whole and pipeline.encoded == 0


def test_the_folder_of_another_cache_is_left_alone(tmp_path: Path) -> None:
    build(tmp_path)
    whole = contents(tmp_path)
    with pytest.raises(CacheError, match=r"made with data\.seed=5, expected this run's 6: use another folder"):
        build(tmp_path, seed=6)
    assert contents(tmp_path) == whole


def test_a_source_that_has_changed_replaces_the_shards_it_changes(tmp_path: Path) -> None:
    build(tmp_path)
    reader = Records.make()
    reader.records[5] = replace(reader.records[5], chosen=png(99))
    pipeline = Pipeline()
    assert build(tmp_path, reader, pipeline).written == 1
    build(tmp_path / "new", reader)
    assert pipeline.encoded == 4
    assert contents(tmp_path / "new") == {k: v for k, v in contents(tmp_path).items() if not k.startswith("new")}


@pytest.mark.parametrize("row", [2, 9])
def test_a_condition_image_that_the_family_does_not_take_is_refused_before_encoding(tmp_path: Path, row: int) -> None:
    reader, pipeline = Records.make(edits=[row]), Pipeline()
    reader.root = tmp_path  # type: ignore[attr-defined]  # of a list of paths, which is read at once
    message = f"nowhere: row {row + 1} has a condition_image, family 'small' takes none"
    assert_refused(lambda: build(tmp_path, reader, pipeline, on_cost=print), DataError, message)
    assert pipeline.encoded == 0
    assert not (tmp_path / "unconditional.json").exists()  # before encoders are loaded


@pytest.mark.parametrize("family", [EditFamily(), SeeingFamily()])
def test_a_pair_without_the_condition_image_that_the_family_needs_is_bad(tmp_path: Path, family: Family) -> None:
    reader = Records.make(edits=[0, 1, 2, 3, 4, 6, 8, 11])
    needed = rf"row 6: no condition_image, family '{family.name}' needs one \(rows count.* and counts them\)$"
    with pytest.raises(BadPairError, match=needed):  # `sipo data check` does not know the family
        build(tmp_path, reader, family=family)
    reader.records[4] = replace(reader.records[4], condition_image=b"no image")
    for _ in range(2):
        summary = build(tmp_path, reader, family=family, skip_bad=True)
        assert (summary.pairs, summary.skipped) == (7, {"condition": 4, "undecodable": 1})
    assert (summary.written, summary.texts) == (0, 0)
    assert open_cache(tmp_path).rows.tolist() == [0, 1, 2, 3, 6, 8, 11]
    cached = open_cache(tmp_path)
    assert all(cached.text(place)["prompt_embeds"].isfinite().all() for place in range(7))


@pytest.mark.parametrize(
    ("edits", "root", "skip_bad", "problem"),
    [
        (range(9), True, False, "^row 10: no condition_image, family 'edit' needs one; the row has 'condition_images'"),
        ((), False, False, "^row 1: no condition_image"),
        (
            (),
            True,
            True,
            r"^nowhere: none of 12 rows is a pair that can be used \(row 1: no condition_image, .* one\)$",
        ),
    ],
)
def test_missing_condition_images_are_told_before_encoders_are_loaded(
    tmp_path: Path, edits: Any, root: bool, skip_bad: bool, problem: str
) -> None:
    reader, wanted, loaded = Records.make(edits=edits), settings(skip_bad=skip_bad), []
    reader.records[9] = replace(reader.records[9], misspelt={"condition_images": "condition_image"})
    if root:
        reader.root = tmp_path  # type: ignore[attr-defined]  # of a list of paths, which is read at once
    with pytest.raises((BadPairError, CacheError), match=problem):
        precompute_pairs(
            reader,
            EditFamily(),
            lambda: loaded.append(1),
            tmp_path / "cache",
            settings=wanted,
            fingerprint=pairs_fingerprint(MODEL, wanted),
            progress=False,
        )
    assert not loaded and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_condition_images_of_another_shape_are_counted(tmp_path: Path, world: int) -> None:
    reader = Records.make(edits=range(12))  # 40x31 beside samples of 20x24
    for row, width in ((3, 54), (7, 53), (8, 43)):  # 11 %, 9 % and, cut at the top, 10.4 % are lost
        reader.records[row] = replace(reader.records[row], condition_image=png(row, 40, width))
    for row in (0, 1, 2, 4, 5, 6, 9, 10):
        reader.records[row] = replace(reader.records[row], condition_image=png(row, 5, 6))
    summaries = in_processes(world, lambda process: build(tmp_path, reader, accelerator=process, family=EditFamily()))
    for summary in summaries:
        assert summary.cut.keys() == {3, 8, 11}
        assert re.fullmatch(
            "3 condition images lost more than 10% of the area to get the shape of the samples, first row 4: sha256:.*",
            *summary.news(),
        )
    assert build(tmp_path, reader, family=EditFamily()).news() == []


def test_a_condition_image_counts_in_what_encoding_costs(tmp_path: Path) -> None:
    for number, (family, sizes) in enumerate([(EditFamily(), (3, 3)), (OptionalEditFamily(), (3, 2))]):
        costs: list[Cost] = []
        build(tmp_path / f"{number}", Records.make(edits=range(12)), family=family, on_cost=costs.append)
        assert costs[0].pair_bytes == tuple(4 * 3 * 2 * 3 * size for size in sizes)
        reader = Records.make(edits=range(12))
        reader.count = lambda: 12  # type: ignore[attr-defined]
        build(tmp_path / f"counted {number}", reader, family=family, on_cost=costs.append)
        assert all("at most 36 passes of the VAE" in replace(costs[1], exact=e).describe(0) for e in (0, 1))
    costs = []
    build(tmp_path / "seen", Records.make(edits=range(12)), family=SeeingFamily(), on_cost=costs.append)
    assert costs[0].prompt_bytes == 4 * ((512 + 2) * (4 + 1) + 4)
    assert queue_length(EditFamily(), settings(sizes=[(1000, 1000)], queue_mb=90), 8) == 8
    assert queue_length(SmallFamily(), settings(sizes=[(1000, 1000)], queue_mb=90), 8) == 11


@pytest.mark.parametrize("name", ["latents-00001", "text-00001"])
def test_text_that_sees_the_image_is_encoded_again_with_its_pairs(tmp_path: Path, name: str) -> None:
    reader, family = Records.make(edits=range(12)), SeeingFamily()
    build(tmp_path, reader, family=family)
    whole = contents(tmp_path)
    (tmp_path / f"{name}.safetensors").unlink()
    pipeline = Pipeline()
    assert build(tmp_path, reader, pipeline, family=family).written == 1
    assert contents(tmp_path) == whole and (pipeline.encoded, len(pipeline.prompts)) == (4, 4)


def test_condition_images_are_released_when_their_text_is_encoded(tmp_path: Path) -> None:
    import weakref

    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    class Watched(SeeingFamily):
        def encode_text(self, pipeline: Any, prompts: Any, images: Any = None) -> list[Any]:
            alive.append(sum(image() is not None for image in seen))
            seen.extend(map(weakref.ref, images))
            return super().encode_text(pipeline, prompts, images)

    build(tmp_path, Records.make(edits=range(12)), family=Watched(), shard_pairs=12)
    assert alive == [0] * 13  # a black one and twelve pairs


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_same_files(tmp_path: Path, processes: int) -> None:
    build(tmp_path / "one", Records.make(14))
    pipelines = [Pipeline() for _ in range(processes)]

    def run(accelerator: Accelerator) -> Any:
        pipeline = pipelines[accelerator.process_index]
        return build(tmp_path / "many", Records.make(14), pipeline, accelerator)

    summaries = in_processes(processes, run)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert [summary.pairs for summary in summaries] == [14] * processes
    assert sum(pipeline.encoded for pipeline in pipelines) == 14
    assert all(pipeline.encoded for pipeline in pipelines)


@pytest.mark.parametrize("latents", ["sample", "mode"])
def test_a_pair_is_the_same_in_any_company(tmp_path: Path, latents: str) -> None:
    changes: dict[str, Any] = {"latents": latents, "random_flip": True, "center_crop": False}
    build(tmp_path / "a", **changes)
    reader = Records.make()
    build(tmp_path / "b", Records(reader.records[3::2]), shard_pairs=3, **changes)
    one, other = open_cache(tmp_path / "a"), open_cache(tmp_path / "b")
    for index, row in enumerate(other.rows.tolist()):
        assert torch.equal(one.pair(row)[0], other.pair(index)[0])
        assert torch.equal(one.pair(row)[1], other.pair(index)[1])
        assert torch.equal(one.pair(row)[2]["time_ids"], other.pair(index)[2]["time_ids"])


def test_the_posterior_is_drawn_once_for_each_half(tmp_path: Path) -> None:
    build(tmp_path / "mode", latents="mode")
    build(tmp_path / "sample", latents="sample")
    mode, sample = open_cache(tmp_path / "mode"), open_cache(tmp_path / "sample")
    drawn = torch.stack([torch.stack(sample.pair(i)[:2]) - torch.stack(mode.pair(i)[:2]) for i in range(12)]) / 0.1
    assert abs(drawn.std().item() - 1) < 0.1 and abs(drawn.mean().item()) < 0.15
    assert len({round(value, 5) for value in drawn.flatten().tolist()}) > 0.99 * drawn.numel()


def test_both_halves_are_flipped_and_cropped_alike(tmp_path: Path) -> None:
    image = png(1, 20, 40)
    other = png(2, 20, 40)
    reader = Records([PairRecord(row, "a", image, other) for row in range(40)])
    build(tmp_path, reader, random_flip=True, center_crop=False, latents="mode", sizes=[(16, 16)], shard_pairs=16)
    cache = open_cache(tmp_path)
    lefts, flips = set(), 0
    for index in range(40):
        chosen, rejected, own = cache.pair(index)
        assert torch.equal(own["time_ids"][0], own["time_ids"][1])
        flip = derive_seed(5, 100, index) % 2 == 1
        left = int(own["time_ids"][0, 3])
        for stored, source in ((chosen, image), (rejected, other)):
            # 20x40 covers 16x16 as 16x32
            whole = resize_and_crop(read_media(source).pixels, 16, 32, flip=flip).pixels[:, :, left : left + 16]
            assert torch.equal(stored, torch.nn.functional.avg_pool2d(as_floats(whole), 8))
        lefts.add(left)
        flips += flip
    assert len(lefts) > 8 and 10 < flips < 30


def faulty() -> Records:
    """Rows 1 and 2 cannot be decoded, 4 has no files, 6 is a tie, 9 has no caption."""
    records = Records.make().records
    records[1] = replace(records[1], rejected=records[1].rejected[:700])
    records[2] = replace(records[2], chosen=b"no image")
    records[4] = replace(records[4], problem="label_0=None", chosen=b"", rejected=b"")
    records[6] = replace(records[6], tie=True)
    records[9] = replace(records[9], prompt="")
    return Records(records)


def test_a_bad_pair_stops_the_run_and_what_is_finished_stays(tmp_path: Path) -> None:
    records = Records.make().records
    records[7] = replace(records[7], rejected=records[7].rejected[:700])
    with pytest.raises(BadPairError, match=r"^row 8: rejected: .*cannot be decoded.*data\.skip_bad=true") as caught:
        build(tmp_path, Records(records))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "latents-00000.safetensors").is_file()
    summary = build(tmp_path, Records(records), skip_bad=True)
    assert (summary.kept, summary.pairs) == (1, 11)


def test_bad_pairs_are_left_out_when_told_and_counted(tmp_path: Path) -> None:
    summary = build(tmp_path, faulty(), skip_bad=True)
    assert (summary.pairs, summary.records, summary.ties) == (7, 12, 1)
    assert summary.skipped == {"caption": 1, "row": 1, "undecodable": 2}
    assert [row for row, _ in summary.skipped_rows] == [1, 2, 4, 9]
    assert "ties: 1, left out: 4" in summary.describe()
    cache = open_cache(tmp_path)
    assert cache.rows.tolist() == [0, 3, 5, 7, 8, 10, 11]
    build(tmp_path / "good")
    whole = open_cache(tmp_path / "good")
    for index, row in enumerate(cache.rows.tolist()):  # nobody takes another's place
        assert torch.equal(cache.pair(index)[0], whole.pair(row)[0])
        assert torch.equal(cache.text(index)["pooled"], whole.text(row)["pooled"])
    with pytest.raises(BadPairError, match=r"^row 2: "):  # not told any more: what was skipped counts again
        build(tmp_path, faulty())


def test_a_cache_without_a_pair_is_an_error(tmp_path: Path) -> None:
    reader = Records([replace(record, tie=True) for record in Records.make(3).records])
    with pytest.raises(CacheError, match=r"^nowhere: none of 3 rows is a pair that can be used \(ties: 3\)$"):
        build(tmp_path / "ties", reader)
    for record in reader.records[1:]:
        reader.records[record.row] = replace(record, tie=False, rejected=b"no image")
    why = r"none of 3 rows is a pair that can be used \(row 2: rejected: .*is no image"
    for _ in range(2):  # encoded, and from what was found then
        with pytest.raises(CacheError, match=why):
            build(tmp_path / "bad", reader, skip_bad=True)


def test_latents_that_are_not_finite_are_a_bad_pair(tmp_path: Path) -> None:
    class Overflows(SmallFamily):
        def encode_pixels(self, pipeline: Any, pixels: Any, generator: Any = None) -> torch.Tensor:
            latents = super().encode_pixels(pipeline, pixels, generator)
            return latents * (1e6 if pipeline.encoded == 2 else 1.0)

    def run(skip_bad: bool, **changes: Any) -> Any:
        wanted = settings(dtype="float16", skip_bad=skip_bad, num_workers=1, **changes)
        pipeline = Pipeline()
        return precompute_pairs(
            Records.make(),
            Overflows(),
            lambda: pipeline,
            tmp_path,
            settings=wanted,
            fingerprint=pairs_fingerprint(MODEL, wanted),
            progress=False,
        )

    with pytest.raises(BadPairError, match="row 2: its latents are not finite in float16"):
        run(skip_bad=False)
    summary = run(skip_bad=True)
    assert (summary.pairs, summary.skipped) == (11, {"latents": 1})
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match=r"row 2: latents that are not finite with data\.vae_dtype='float16'"):
        run(skip_bad=True, vae_dtype="float16")  # a setting's fault is no pair's


@pytest.mark.parametrize(("first", "then"), [(None, 5), (5, None), (8, 5), (5, 8)])
def test_an_unfinished_cache_takes_another_max_pairs_and_keeps_whole_shards(
    first: int | None, then: int | None, tmp_path: Path
) -> None:
    """As the line on what training will not see advises, read when encoding has begun."""
    records = Records.make().records
    expected = build(tmp_path / "whole", Records(records), max_pairs=then, shard_pairs=2)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", Records(records), Pipeline(fail_at=5), max_pairs=first, shard_pairs=2)
    kept = tmp_path / "cut" / "latents-00000.safetensors"
    before = kept.stat().st_mtime_ns
    summary = build(tmp_path / "cut", Records(records), max_pairs=then, shard_pairs=2)
    assert (summary.pairs, summary.prompts) == (expected.pairs, expected.prompts) and not summary.changes
    assert summary.kept >= 1 and kept.stat().st_mtime_ns == before
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_max_pairs_takes_the_first_rows_that_are_no_ties(tmp_path: Path) -> None:
    records = Records.make().records
    records[1] = replace(records[1], tie=True)
    summary = build(tmp_path, Records(records), max_pairs=5)
    assert (summary.pairs, summary.records, summary.ties) == (5, 6, 1)
    assert open_cache(tmp_path).rows.tolist() == [0, 2, 3, 4, 5]


def test_rows_that_do_not_grow_are_refused(tmp_path: Path) -> None:
    records = Records.make().records
    with pytest.raises(ValueError, match="row 4 after row 4: expected a source whose rows grow"):
        build(tmp_path, Records([*records[:4], records[3]]))


def test_sizes_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    pipeline = Pipeline()
    with pytest.raises(ValueError, match="height=20, width=24: expected multiples of 8"):
        build(tmp_path / "none", pipeline=pipeline, sizes=[(16, 24), (20, 24)])
    with pytest.raises(ValueError, match=r"^shard_pairs=0: expected at least 1"):
        build(tmp_path / "none", pipeline=pipeline, shard_pairs=0)
    assert pipeline.encoded == 0 and not [*(tmp_path / "none").glob("*")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_latents_are_stored_in_the_type_asked_for(tmp_path: Path, dtype: str) -> None:
    build(tmp_path / "wide")
    build(tmp_path / "asked", dtype=dtype)
    wide, asked = open_cache(tmp_path / "wide"), open_cache(tmp_path / "asked")
    wanted = getattr(torch, dtype)
    assert torch.equal(asked.pair(3)[0], wide.pair(3)[0].to(wanted))
    assert torch.equal(asked.text(3)["prompt_embeds"], wide.text(3)["prompt_embeds"].to(wanted))
    # A size of 1023 is no bfloat16: what describes an image keeps its own type.
    assert asked.pair(3)[2]["time_ids"].dtype == torch.float32


@pytest.mark.parametrize(
    "name",
    [
        *("sd15", "sdxl", "flux", "qwen-image", "qwen-image-2.1", "qwen-image-2.1-edit"),
        *("qwen-image-edit", "z-image", "lumina2", "sana", "cogvideox", "wan"),
    ],
)
def test_real_families_from_files_to_reference_errors(tmp_path: Path, name: str) -> None:
    family = get_family(name)
    frames = 9 if family.video else 1
    images = family.condition_image
    data = make_toy_pairs(tmp_path / "data", video=family.video, pairs=5, frames=frames, condition_image=images)
    *records, last = open_pairs(data)
    write_image(tmp_path / "mask.png", torch.full((3, 32, 32), 51, dtype=torch.uint8))
    write_jsonl([*records, replace(last, error_mask=tmp_path / "mask.png")], data)
    model = ModelConfig(family=name, pretrained_model_name_or_path=str(build_toy(name, tmp_path / "model")))
    wanted = DataConfig(
        dataset_name=str(data),
        cache="unused",
        sizes=[(32, 32)],
        frames=frames,
        dtype="float32",
        latents="mode",
        shard_pairs=3,
    )
    pipeline = family.load_encoders(model.pretrained_model_name_or_path)
    summary = precompute_pairs(
        open_pairs(data),
        family,
        lambda: pipeline,
        tmp_path / "cache",
        settings=wanted,
        fingerprint=pairs_fingerprint(model, wanted),
        progress=False,
    )
    assert (summary.pairs, summary.skipped) == (5, {})
    cached = CachedPairs(open_cache(tmp_path / "cache"))
    for index, record in enumerate(open_pairs(data)):
        item = cached[index]
        pixels = resize_and_crop(read_media(record.rejected, frames).pixels, 32, 32).pixels
        assert torch.equal(item["chosen"], item["rejected"]) is False
        latents = family.encode_pixels(pipeline, pixels[None])[0]
        torch.testing.assert_close(item["rejected"], latents, rtol=1e-4, atol=1e-4)  # another batch size
        told: dict[str, torch.Tensor] = {}
        if record.condition_image:
            image = resize_and_crop(read_media(record.condition_image).pixels, 32, 32).pixels
            told = family.encode_condition_image(pipeline, image[None])[0]
        told |= family.encode_text(pipeline, [record.prompt], [image] if told else None)[0]
        assert item["condition"].keys() == told.keys()
        for key, tensor in told.items():
            assert item["condition"][key].shape == tensor.shape
            torch.testing.assert_close(item["condition"][key], tensor, rtol=1e-4, atol=1e-5)
        assert ("own_condition" in item) == (name == "sdxl")
        assert ("error_mask" in item) == (index == 4)
    mask = PairBatch.of_items(collate([item])).error_mask
    assert mask is not None and mask.unique().tolist() == pytest.approx([0.2])
    schedule = family.load_schedule(model.pretrained_model_name_or_path, sizes=[(32, 32)])
    network = family.load_network(model.pretrained_model_name_or_path)
    fixed = FixedDraws(2, 3, proportion_empty_prompts=0.0 if family.text_sees_image else 0.5)
    references = precompute_reference_errors(
        cached.cache, network, family.predict, schedule, fixed, {}, batch_size=4, progress=False
    )
    drawn = DrawnPairs(cached, schedule, fixed, references)
    errors = torch.stack([drawn[i]["ref_error"] for i in range(10)])
    assert errors.isfinite().all() and (errors > 0).all() and errors.unique().numel() == 20
    # Drawn again, one at a time and by hand.
    item = drawn[7]
    condition = {key: tensor[None] for key, tensor in item["condition"].items()}
    condition |= {key: tensor[1:] for key, tensor in item.get("own_condition", {}).items()}
    sample, noise, level = item["rejected"][None], item["noise"][None], item["level"][None]
    with torch.no_grad():
        noisy = schedule.add_noise(sample, noise, **level_argument(schedule, level))
        prediction = family.predict(network, noisy, network_timesteps(schedule, level), condition)
    error = (prediction - schedule.target(sample, noise, **level_argument(schedule, level))).double().square().mean()
    assert item["ref_error"][1].item() == pytest.approx(error.item(), rel=1e-5)


# ---- Memory ----


def clips(folder: Path, pairs: int = 1, frames: int = 9, height: int = 40, width: int = 64) -> list[PairRecord]:
    """Random clips in files."""
    records = []
    for row in range(pairs):
        for side in range(2):
            generator = torch.Generator().manual_seed(2 * row + side)
            pixels = torch.randint(256, (frames, 3, height, width), generator=generator, dtype=torch.uint8)
            write_video(folder / f"{row}-{side}.mp4", pixels, 8.0)
        records.append(PairRecord(row, "a", folder / f"{row}-0.mp4", folder / f"{row}-1.mp4"))
    return records


class Clips(SmallFamily):
    """Records what it is given; latents are those of each frame."""

    video = True

    def encode_pixels(self, pipeline: Any, pixels: Any, generator: Any = None) -> torch.Tensor:
        pipeline.given.append(pixels)
        return torch.stack([super(Clips, self).encode_pixels(pipeline, clip, generator) for clip in pixels])


def encode_clips(folder: Path, records: list[PairRecord], **changes: Any) -> list[torch.Tensor]:
    """What the family was given."""
    pipeline: Any = Pipeline()
    pipeline.given = []
    wanted = settings(frames=9, sizes=[(16, 24)], **changes)
    marks = pairs_fingerprint(MODEL, wanted)
    precompute_pairs(
        Records(records), Clips(), lambda: pipeline, folder, settings=wanted, fingerprint=marks, progress=None
    )
    given: list[torch.Tensor] = pipeline.given
    return given


def test_clips_are_encoded_one_at_a_time_in_eight_bits_and_cut_as_they_are_decoded(tmp_path: Path) -> None:
    records = clips(tmp_path)
    given = encode_clips(tmp_path / "cache", records)
    assert [(pixels.dtype, list(pixels.shape)) for pixels in given] == [(torch.uint8, [1, 9, 3, 16, 24])] * 2
    whole = [read_media(source, 9) for source in (records[0].chosen, records[0].rejected)]
    assert all(
        torch.equal(pixels[0], resize_and_crop(media.pixels, 16, 24).pixels)
        for pixels, media in zip(given, whole, strict=True)
    )
    seen = []

    def shrink(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels.shape)
        return pixels[:, ::2, ::2]

    media = read_media(records[0].chosen, 9, transform=shrink)
    assert seen == [(3, 40, 64)] * 9 and media.size == (40, 64)  # one frame at a time
    assert torch.equal(media.pixels, whole[0].pixels[..., ::2, ::2])


def test_one_clip_after_the_other_gives_the_latents_that_both_at_once_give(tmp_path: Path) -> None:
    for name in ("wan", "cogvideox"):
        family, encoders = get_family(name), encoders_of(name)
        levels = torch.randint(256, (2, 9, 3, 32, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        both = family.encode_pixels(encoders, levels, torch.Generator().manual_seed(2))
        generator = torch.Generator().manual_seed(2)
        each = [family.encode_pixels(encoders, clip[None], generator) for clip in levels]
        torch.testing.assert_close(torch.cat(each), both, rtol=1e-5, atol=1e-5)
        floats = family.encode_pixels(encoders, levels[:1].float() / 127.5 - 1, torch.Generator().manual_seed(2))
        assert torch.equal(floats, each[0])  # the same bits as of floats
        shape = family.latent_shape(encoders, 32, 48, 9)
        assert shape == tuple(both.shape[1:])


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux2", "sana"])
def test_shapes_of_latents_are_known_beforehand(name: str) -> None:
    family, encoders = get_family(name), encoders_of(name)
    found = family.encode_pixels(encoders, torch.zeros(1, 3, *sides_of(family), dtype=torch.uint8))
    assert family.latent_shape(encoders, *sides_of(family)) == tuple(found.shape[1:])


def test_levels_become_the_floats_they_became_before() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_floats(levels), levels.to(torch.float32) / 127.5 - 1.0)


def test_memory_of_decoded_frames_does_not_wait_for_the_collector(tmp_path: Path) -> None:
    import gc

    import av

    def decoded() -> list[Any]:
        # One without a format is empty: PyAV 17 keeps it for the next frame.
        return [each for each in gc.get_objects() if type(each) is av.VideoFrame and each.format is not None]

    (record,) = clips(tmp_path)
    gc.collect()
    gc.disable()
    try:
        earlier = decoded()  # frames that other tests in this process still hold
        read_media(record.chosen, 9)
        assert len(decoded()) == len(earlier)
    finally:
        gc.enable()


def test_pairs_that_are_decoded_ahead_are_bounded_in_bytes() -> None:
    def length(workers: int, **changes: Any) -> int:
        return queue_length(SmallFamily(), settings(**changes), workers)

    clip = {"frames": 81, "sizes": [(240, 416), (480, 832)]}  # 194 MB a pair at the larger size
    assert length(2, **clip) == 4 and length(8, **clip) == 4
    assert length(8, queue_mb=400, **clip) == 1 and length(8, queue_mb=1, **clip) == 1
    assert length(8, queue_mb=600, **clip) == 2
    assert length(8, sizes=[(1024, 1024)]) == 16  # 6 MB: two for each thread


def test_no_more_results_wait_than_asked_for() -> None:
    import weakref

    alive: list[weakref.ref[Any]] = []

    def decode(number: int) -> torch.Tensor:
        result = torch.zeros(1)
        alive.append(weakref.ref(result))
        return result

    with ThreadPoolExecutor(1) as pool:
        for pair in ahead(pool, decode, iter(range(10)), 2):
            assert sum(each() is not None for each in alive) <= 3 and pair is not None
            del pair
