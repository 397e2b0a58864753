"""Encoding in several processes, and what it costs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sipo import processes
from sipo.cache import encode, precompute
from sipo.cache.encode import PairEncoder
from sipo.cache.existing import ExistingCache
from sipo.cache.finished import open_cache
from sipo.cache.format import CacheError, ShardFolder
from sipo.cache.savings import Cost
from sipo.data.load import BadPairError
from sipo.data.records import DataError
from sipo.locks import LockedError, locked
from sipo.processes import OtherProcessError
from sipo.recipe.config import ConfigError, from_dict
from tests.data_sets import contents
from tests.small_family import Accelerator, Pipeline, Records, build, in_processes, outcomes_in_processes

# ---- Several processes ----


@pytest.mark.parametrize("fault", ["pair", "disk", "source"])
def test_an_error_of_one_process_ends_all_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Row 6 is in the second shard, which the second of two processes encodes."""
    records = Records.make().records
    if fault == "pair":
        records[5] = replace(records[5], chosen=b"no image")
    write = ShardFolder.write

    def full(folder: ShardFolder, name: str, *args: Any) -> Any:
        if name == "latents-00001":
            raise OSError(28, "No space left on device", str(folder.path / name))
        return write(folder, name, *args)

    def rows(rank: int) -> Any:
        yield from records[:6]
        if rank == 1:
            raise DataError("the pairs: not readable")
        yield from records[6:]

    if fault == "disk":
        monkeypatch.setattr(ShardFolder, "write", full)

    def run(accelerator: Accelerator) -> Any:
        reader = rows(accelerator.process_index) if fault == "source" else Records(records)
        return build(tmp_path, reader, None, accelerator)

    first, second = outcomes_in_processes(2, run)
    assert type(second) is {"pair": BadPairError, "disk": OSError, "source": DataError}[fault]
    assert type(first) is OtherProcessError
    assert str(first) == f"process 1: {second}" and "\n" not in str(first)
    with pytest.raises(CacheError, match="not finished"):
        open_cache(tmp_path)
    if fault == "pair":
        summaries = in_processes(2, lambda one: build(tmp_path, Records(records), None, one, skip_bad=True))
        assert [summary.skipped for summary in summaries] == [{"undecodable": 1}] * 2


def test_a_process_that_works_on_hears_of_an_error_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ROUND_SECONDS", 0.0)
    done = [0, 0]

    def work(rank: int) -> Any:
        for number in range(1000):
            done[rank] += 1
            if rank == 1 and number == 3:
                raise ValueError("no memory left")
            yield

    def unequal(rank: int) -> Any:
        for _ in range(3 + 4 * rank):
            done[rank] += 1
            yield

    outcomes = outcomes_in_processes(2, lambda one: processes.in_rounds(one, work(one.process_index)))
    assert [str(error) for error in outcomes] == ["process 1: no memory left", "no memory left"]
    assert max(done) <= 5
    done[:] = 0, 0
    in_processes(2, lambda one: processes.in_rounds(one, unequal(one.process_index)))
    assert done == [3, 7]


@pytest.mark.parametrize("lagging", [0, 1])
def test_processes_that_see_other_files_go_on_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lagging: int
) -> None:
    """On a network folder one of them may see a file's new times earlier than the others."""

    @dataclass
    class Stated(Records):
        def state(self) -> str:
            return "as before"

    build(tmp_path, Stated.make())
    before = contents(tmp_path)
    is_unchanged = ExistingCache.is_unchanged
    me = threading.local()
    monkeypatch.setattr(ExistingCache, "is_unchanged", lambda *a: me.rank != lagging and is_unchanged(*a))

    def run(accelerator: Accelerator) -> Any:
        me.rank = accelerator.process_index
        return build(tmp_path, Stated.make(), None, accelerator, check_hashes=False)

    summaries = in_processes(2, run)
    assert [summary.written for summary in summaries] == [0, 0] and [summary.kept for summary in summaries] == [3, 3]
    assert contents(tmp_path) == before


def test_processes_hear_of_each_other_while_shards_are_only_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a large cache may take longer than a collective operation waits."""
    build(tmp_path)
    read, looked, most = ShardFolder.read_intact, [0, 0], [0, 0]
    me = threading.local()

    def counted(folder: ShardFolder, name: str) -> Any:
        looked[me.rank] += 1
        return read(folder, name)

    def rounds(accelerator: Accelerator, work: Any) -> None:
        looked[me.rank] = 0
        rounds_of[me.rank] = 0
        for _ in work:
            rounds_of[me.rank] += 1
            most[me.rank] = max(most[me.rank], looked[me.rank])
            looked[me.rank] = 0
        assert looked[me.rank] == 0

    rounds_of = [0, 0]
    monkeypatch.setattr(ShardFolder, "read_intact", counted)
    monkeypatch.setattr(precompute, "in_rounds", rounds)

    def run(accelerator: Accelerator) -> Any:
        me.rank = accelerator.process_index
        return build(tmp_path, None, None, accelerator)

    assert [summary.kept for summary in in_processes(2, run)] == [3, 3]
    assert most == [2, 2]  # latents and text of one part
    assert rounds_of == [3, 3]  # after the partner's parts too, which have to be read


def test_processes_hear_of_each_other_while_text_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "TEXT_BATCH", 1)
    pipeline, told = Pipeline(), []

    def rounds(accelerator: Any, work: Any) -> None:
        told.extend(len(pipeline.prompts) for _ in work)

    monkeypatch.setattr(precompute, "in_rounds", rounds)
    build(tmp_path, pipeline=pipeline, shard_pairs=12)
    assert {2, 3, 4} <= set(told)


# ---- What it costs ----


def test_what_encoding_costs_is_said_before_and_refused_where_there_is_no_room(tmp_path: Path) -> None:
    """By paths the rows are known, by images in memory those that the source counts; what is there is left out."""

    @dataclass
    class Paths(Records):
        root: Path = tmp_path

    @dataclass
    class Counted(Records):
        def count(self) -> int:
            return 12

    costs: list[Cost] = []
    reader = Paths(Records.make().records)
    reader.records[1] = replace(reader.records[1], tie=True)
    build(tmp_path / "a", reader, on_cost=costs.append)
    build(tmp_path / "a", reader, on_cost=costs.append)  # finished: nothing to say
    (tmp_path / "a" / "index.json").unlink()
    assert build(tmp_path / "a", reader, on_cost=costs.append).written == 0  # nor where all pairs are there
    # Latents of 3x2x3 and 3x3x2 in float32, for both halves; text of 8x4 and 4.
    assert costs == [Cost(11, 0, 4, True, (144, 144), 144)]
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "b", Counted(Records.make().records), Pipeline(fail_at=6), dtype="float16")
    build(tmp_path / "b", Counted(Records.make().records), dtype="float16", on_cost=costs.append)
    build(tmp_path / "c", on_cost=costs.append, max_pairs=5)
    build(tmp_path / "d", on_cost=costs.append)
    assert costs[1:] == [
        Cost(8, 4, 8, False, (72, 72), 72),
        Cost(5, 0, 5, False, (144, 144), 144),
        Cost(None, 0, 1, False, (144, 144), 144),
    ]
    line = "to encode 11 pairs: about 1.58 kB of latents and at most 576 B of text on disk, 2 GB free; "
    assert costs[0].describe(2 * 10**9, 3) == (
        line + "22 passes of the VAE, at most 4 of the text encoders, 66 of the reference"
    )
    assert (
        costs[1].describe(999_700).startswith("to encode at most 8 pairs: at most 576 B of latents and at most 576 B ")
    )
    unknown = costs[3].describe(10**9)
    assert unknown.startswith("to encode each pair (the source does not say how many): at most 144 B of latents")
    assert "999 kB free" not in costs[1].describe(999_700) and "1 MB free" in costs[1].describe(999_700)
    costs[0].check(1584)
    with pytest.raises(ValueError, match="latents of 11 pairs take 1584 B, 1583 B are free: not enough disk space"):
        costs[0].check(1583)
    with pytest.raises(ValueError, match=r"latents of 11 pairs take 1\.58 kB, 0 B are free: not enough disk space"):
        costs[0].check(0)
    costs[1].check(0)  # at most so many: nobody knows


def test_what_a_run_will_not_see_of_a_cache_is_said() -> None:
    cost = Cost(90, 10, 5, True, (1, 1), 1)
    assert cost.unused(draws=0, held_out=20, seen=80) == ""
    assert cost.unused(draws=0, held_out=20, seen=79) == (
        "training uses only 79 of the 80 pairs; data.max_pairs=99 would encode just those and the held-out ones"
    )
    assert cost.unused(draws=0, held_out=0, seen=4) == (
        "training uses only 4 of the 100 pairs; data.max_pairs=4 would encode just those"
    )
    assert cost.unused(draws=4, held_out=20, seen=320) == ""
    assert cost.unused(draws=4, held_out=20, seen=241) == "", "all four draws are needed, of some pairs"
    assert cost.unused(draws=4, held_out=20, seen=161) == (
        "training uses only 161 of the 320 draws; data.draws=3 would compute just those"
    )


def test_another_run_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writes at a time; a finished cache is read by any number."""
    build(tmp_path)
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path, "the cache"):
            held.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert held.wait(60)
        assert len(open_cache(tmp_path)) == 12
        with pytest.raises(LockedError, match=r"^data\.cache='.*' is in use by "):
            build(tmp_path)
        (tmp_path / "index.json").unlink()  # not finished
        monkeypatch.setattr(PairEncoder, "pipeline", lambda encoder: pytest.fail("encoders are loaded"))
        with pytest.raises(LockedError):
            build(tmp_path)
        monkeypatch.undo()
    finally:
        leave.set()
        holder.join()
    assert build(tmp_path).kept == 3 and not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("key", ["num_workers", "queue_mb"])
def test_workers_and_queue_have_a_least_value_and_change_nothing(tmp_path: Path, key: str) -> None:
    tree: dict[str, Any] = {
        "model": {"family": "sd15", "pretrained_model_name_or_path": "p"},
        "data": {"dataset_name": "p", "cache": "c", key: 0},
        "training": {"max_train_steps": 1, "output_dir": "o"},
    }
    with pytest.raises(ConfigError, match=rf"^data\.{key}=0: expected at least 1$"):
        from_dict(tree)
    build(tmp_path / "a")
    build(tmp_path / "b", **{key: 1})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
