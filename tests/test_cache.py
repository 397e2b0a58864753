"""The cache's files: what is written is what is read, and what is damaged is named."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from sipo.batch import padded
from sipo.cache.finished import open_cache
from sipo.cache.format import (
    INDEX,
    CacheError,
    DamagedError,
    ShardFolder,
    ShardReader,
    read_json,
    text_key,
    trim,
    write_json,
)
from sipo.cache.index import pairs_fingerprint
from tests.data_sets import contents, flip_bit
from tests.small_family import MODEL, Pipeline, Records, SmallFamily, build, settings


def read_everything(cache: Any) -> None:
    for index in range(len(cache)):
        cache.pair(index)
        cache.text(index)
    cache.unconditional()


@pytest.mark.parametrize("rows", [0, 1, 5, 8])
def test_trimmed_text_comes_back_exactly(rows: int) -> None:
    text = torch.randn(8, 4, generator=torch.Generator().manual_seed(rows))
    text[rows:] = 0.0
    assert trim(text).shape[0] == rows
    assert torch.equal(padded(trim(text), len(text)), text)


def test_only_rows_of_positive_zeros_at_the_end_are_trimmed() -> None:
    text = torch.zeros(6, 3)
    text[1, 2] = 1.0  # zeros before and after
    text[3] = -0.0  # bits that are not zero
    assert trim(text).shape[0] == 4
    assert torch.equal(torch.signbit(padded(trim(text), len(text))), torch.signbit(text))
    for kept in (torch.zeros(5), torch.zeros(5, 3, dtype=torch.int64)):  # a pooled vector; token ids
        assert trim(kept) is kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_text_is_restored_in_its_full_length(tmp_path: Path, dtype: str) -> None:
    build(tmp_path, dtype=dtype)
    cache = open_cache(tmp_path)
    records = Records.make().records
    for index, record in enumerate(records):
        (wanted,) = SmallFamily().encode_text(Pipeline(), [record.prompt])
        found = cache.text(index)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor.to(getattr(torch, dtype)))
    wanted = SmallFamily().encode_unconditional(None)
    assert torch.equal(cache.unconditional()["prompt_embeds"], wanted["prompt_embeds"].to(getattr(torch, dtype)))
    stored = ShardReader(tmp_path, [ShardFolder(tmp_path).read_intact("text-00000")])  # type: ignore[list-item]
    key = text_key("a")
    assert stored.tensor("text-00000", f"{key}.prompt_embeds").shape[0] == 2  # of 8: the padding is not on disk


def test_nothing_is_left_aside(tmp_path: Path) -> None:
    build(tmp_path)
    names = {name.partition(".")[0] for name in contents(tmp_path)}
    shards = [f"{kind}-0000{number}" for kind in ("latents", "text") for number in range(3)]
    assert names == {"index", "files", "unconditional", *shards}


def test_a_shard_cut_short_is_named_when_the_cache_is_opened(tmp_path: Path) -> None:
    build(tmp_path)
    path = tmp_path / "latents-00001.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedError, match=f"latents-00001.* has {size - 3} bytes, expected {size}.*sipo precompute"):
        open_cache(tmp_path)
    path.unlink()
    with pytest.raises(DamagedError, match=r"latents-00001\.safetensors: is missing; `sipo precompute`"):
        open_cache(tmp_path)


@pytest.mark.parametrize("name", ["latents-00002", "text-00001", "unconditional"])
def test_a_changed_bit_is_named_when_the_shard_is_first_used(tmp_path: Path, name: str) -> None:
    build(tmp_path)
    flip_bit(tmp_path / f"{name}.safetensors", -9)
    cache = open_cache(tmp_path)
    with pytest.raises(DamagedError, match=rf"{name}\.safetensors: changed since .*`sipo precompute`"):
        read_everything(cache)


def test_a_header_that_is_damaged_is_an_error_of_the_cache(tmp_path: Path) -> None:
    build(tmp_path)
    flip_bit(tmp_path / "latents-00000.safetensors", 9)
    with pytest.raises(DamagedError, match="latents-00000"):
        read_everything(open_cache(tmp_path))


def test_another_fingerprint_is_an_error_with_both_values(tmp_path: Path) -> None:
    build(tmp_path)
    assert len(open_cache(tmp_path, pairs_fingerprint(MODEL, settings()))) == 12
    wanted = pairs_fingerprint(MODEL, settings(center_crop=False, seed=6))
    with pytest.raises(CacheError, match=r"made with data\.center_crop=true, expected this run's false"):
        open_cache(tmp_path, wanted)
    with pytest.raises(CacheError, match=r"made with data\.seed=5, expected this run's null"):
        open_cache(tmp_path, {k: v for k, v in pairs_fingerprint(MODEL, settings()).items() if k != "data.seed"})


def test_a_folder_without_a_finished_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no cache there, expected index\.json; `sipo precompute` makes one"):
        open_cache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, pipeline=Pipeline(fail_at=6))
    with pytest.raises(CacheError, match="not finished; `sipo precompute` continues where it stopped"):
        open_cache(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 8}', '{"format": 8, "complete": true, "fingerprint": {}}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(DamagedError, match=r"index\.json: .*`sipo precompute` rebuilds it"):
        open_cache(tmp_path)


def test_an_index_of_another_format(tmp_path: Path) -> None:
    build(tmp_path)
    index = read_json(tmp_path / INDEX)
    assert index is not None
    write_json(tmp_path / INDEX, index | {"format": 99})
    with pytest.raises(CacheError, match=r"cache format 99, expected 8: .*use another folder, or delete this one"):
        open_cache(tmp_path)


def test_a_reader_goes_through_more_shards_than_it_keeps_open(tmp_path: Path) -> None:
    shards = [ShardFolder(tmp_path).write(f"errors-{n:05d}", {"x": torch.tensor([n])}, {}) for n in range(40)]
    reader = ShardReader(tmp_path, shards)
    for _ in range(2):
        assert [int(reader.tensor(shard.name, "x")) for shard in shards] == list(range(40))
    assert len(reader._open) < 40


def test_a_cache_may_be_sent_to_another_process(tmp_path: Path) -> None:
    build(tmp_path)
    cache = open_cache(tmp_path)
    read_everything(cache)
    copy = pickle.loads(pickle.dumps(cache))
    flip_bit(tmp_path / "latents-00000.safetensors", -9)
    assert torch.equal(copy.pair(11)[0], cache.pair(11)[0])
    with pytest.raises(DamagedError, match="latents-00000"):  # the other process looks for itself
        copy.pair(0)


@pytest.mark.parametrize(
    ("one", "other"), [("files", "index"), ("latents-00000", "latents-00001"), ("text-00000", "index")]
)
def test_a_file_that_has_another_ones_name_is_noticed_and_replaced(tmp_path: Path, one: str, other: str) -> None:
    """Also where a shard and its JSON file have changed places together with another's."""
    build(tmp_path)
    whole = contents(tmp_path)
    for ending in (".json", ".safetensors"):
        pair = [tmp_path / f"{name}{ending}" for name in (one, other)]
        if all(path.is_file() for path in pair):
            swapped = [path.read_bytes() for path in reversed(pair)]
            for path, content in zip(pair, swapped, strict=True):
                path.write_bytes(content)
    with pytest.raises(DamagedError, match="`sipo precompute` rebuilds it") as caught:
        read_everything(open_cache(tmp_path))
    assert "\n" not in str(caught.value)
    build(tmp_path, check_hashes=True)
    assert contents(tmp_path) == whole


def test_any_bit_of_any_json_file_that_has_changed_is_noticed(tmp_path: Path) -> None:
    build(tmp_path)
    whole = contents(tmp_path)
    for name in ("index.json", "files.json", "latents-00001.json", "text-00000.json"):
        content = whole[name]
        for place in range(0, len(content), max(1, len(content) // 60)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(DamagedError, match=r"`sipo precompute` rebuilds it$"):
                read_json(tmp_path / name)
        if name == "files.json":
            build(tmp_path)  # which says at every start whether anything has to be compared
            assert contents(tmp_path) == whole
        (tmp_path / name).write_bytes(content)


def test_swapped_prompts_are_noticed(tmp_path: Path) -> None:
    build(tmp_path)
    text = (tmp_path / INDEX).read_text()
    keys = [text_key("a"), text_key("a b c")]
    (tmp_path / INDEX).write_text(text.replace(keys[0], "x").replace(keys[1], keys[0]).replace("x", keys[1]))
    with pytest.raises(DamagedError, match=r"index\.json: not as it was written"):
        open_cache(tmp_path)


@pytest.mark.parametrize("content", [b'{"a": ' + b"[" * 100_000, b'{"format": ' + b"9" * 10_000 + b"}", b"\xff", b""])
def test_json_that_no_parser_takes_is_one_line(tmp_path: Path, content: bytes) -> None:
    build(tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(DamagedError, match=r"index\.json: (nested|not) [^\n]*; `sipo precompute` rebuilds it$"):
        open_cache(tmp_path)
    (tmp_path / INDEX).unlink()
    os.mkfifo(tmp_path / INDEX)
    with pytest.raises(DamagedError, match=r"index\.json: is a FIFO, expected a file"):
        open_cache(tmp_path)
