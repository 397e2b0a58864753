"""Logs that are damaged: named in one line and left out, by resuming and by reports alike; nothing of them is lost."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from accelerate import Accelerator

from sipo import cli
from sipo.analysis.facts import beyond_chance
from sipo.analysis.report import read_run
from sipo.files import FileError
from sipo.training.log import Recorder
from sipo.training.log_reader import LogWarning, metrics_fault, read_log, read_metrics
from sipo.training.statistics import STATISTICS, read_statistics, statistics_fault
from tests.training_cases import fit, settings, untimed


def metrics(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 0.6, "rewards/accuracies": 0.5, "seconds": 1.5} | values


def levels(step: int, **values: Any) -> dict[str, Any]:
    """A line of two bins, the second without a pair."""
    means = {name: [0.5, None] for name in STATISTICS[2:]}
    shape = {"kind": "discrete", "levels": 1000, "bins": 2, "pairs": 3}
    return {"step": step, **shape, "count": [3, 0], "nonfinite": [0, 0], **means} | values


def written(path: Path, *lines: bytes | dict[str, Any], end: bytes = b"\n") -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + end)
    return path


DAMAGED: list[tuple[bytes | dict[str, Any], str]] = [
    (b'{"step": 2, "loss": 0.6\xff}', "not UTF-8, byte 23"),
    (b'{"step": 2, "lo', "not JSON"),
    (b"", "not JSON"),
    (b"\0" * 40, "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"step": 2, "loss": ' + b"1" * 5000 + b"}", "not JSON"),
    (b'{"step": 2, "loss": "' + b"a" * (1 << 20) + b'"}', "over 1048576 bytes"),
    (b"[1]", "no JSON object"),
    (b"null", "no JSON object"),
    (b"{}", "no step"),
    (metrics(2) | {"step": "2"}, "step='2', expected an integer of at least 1"),
    (metrics(0), "step=0, expected an integer of at least 1"),
    (metrics(10**400), "step=an integer of 1329 bits, expected an integer of at least 1"),
    (metrics(2, loss="0.6"), "loss='0.6', expected a finite number or null"),
    (metrics(2, loss=True), "loss=True, expected a finite number or null"),
    (metrics(2, loss=[0.6]), "loss=[…], expected a finite number or null"),
    (metrics(2, loss=float("nan")), "loss=nan, expected a finite number or null"),
    (metrics(2, loss=10**400), "loss=an integer of 1329 bits, expected a finite number or null"),
    (metrics(2, **{"rewards/accuracies": 1.5}), "rewards/accuracies=1.5, expected a number from 0 to 1"),
    (metrics(2, ref_mse=-0.1), "ref_mse=-0.1, expected at least 0"),
    (metrics(2, nonfinite_pairs=0.5), "nonfinite_pairs=0.5, expected a count"),
    (metrics(2, nonfinite_steps=-1), "nonfinite_steps=-1, expected a count"),
    (metrics(2, kind=["training"]), "kind=[…], expected a name"),
    (metrics(2, kind="validation", **{"validation/pairs": -3}), "validation/pairs=-3, expected a count"),
    (metrics(9), "step=9 is out of order"),
    (metrics(1), "step=1 is out of order"),  # a second time
]


def test_metrics_of_a_loss_of_ones_own_have_any_value() -> None:
    assert metrics_fault(metrics(1, nonfinite_share=0.5, pairs=0.25)) == ""
    assert (
        metrics_fault(metrics(1, kind="validation", **{"validation/nonfinite_share": 0.5, "validation/pairs": 3.0}))
        == ""
    )


@pytest.mark.parametrize(("bad", "reason"), DAMAGED, ids=[reason for _, reason in DAMAGED])
def test_a_damaged_line_is_named_and_the_others_are_read(
    bad: bytes | dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Wherever it stands but at the end, which a killed run leaves."""
    good = [metrics(1), metrics(3, loss=None), metrics(3, kind="validation"), metrics(5)]
    path = written(tmp_path / "metrics.jsonl", good[0], bad, *good[1:])
    log = read_log(path, metrics_fault)
    assert log.lines == good and log.damage == [f"line 2 ({reason})"]
    assert b"".join(log.texts) == b"".join(json.dumps(line).encode() + b"\n" for line in good)
    with pytest.warns(LogWarning) as said:
        assert read_metrics(path) == [good[0], good[1], good[3]]
    assert [str(w.message) for w in said] == [f"{path}: 1 damaged line left out: line 2 ({reason})"]
    assert len(str(said[0].message)) < len(str(path)) + 150
    with pytest.warns(LogWarning, match="line 2"):
        assert read_run(tmp_path).lines == [good[0], good[1], good[3]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "flows"}, "kind='flows', expected discrete or flow"),
        ({"bins": 3}, "count=[…], expected 3 values"),
        ({"bins": 0}, "bins=0, expected an integer of at least 1"),
        ({"levels": 1.5}, "levels=1.5, expected an integer of at least 1"),
        ({"pairs": None}, "pairs=None, expected a count"),
        ({"ratio": 0.5}, "ratio=0.5, expected 2 values"),
        ({"count": [3, "0"]}, "count: expected counts"),
        ({"nonfinite": [0, -1]}, "nonfinite: expected counts"),
        ({"coef": [None, None]}, "coef: None of 3 pairs, expected a finite number, and null of none"),
        ({"coef": [0.5, 0.5]}, "coef: 0.5 of 0 pairs, expected a finite number, and null of none"),
        ({"coef": [10**400, None]}, "coef: an integer of 1329 bits of 3 pairs"),
    ],
)
def test_so_is_a_line_of_the_statistics(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = written(tmp_path / "timesteps.jsonl", levels(1), levels(2) | changes, levels(3))
    with pytest.warns(LogWarning, match="1 damaged line left out: line 2") as said:
        assert read_statistics(path) == [levels(1), levels(3)]
    assert reason in str(said[0].message)
    missing = levels(2)
    del missing["ratio"]
    assert statistics_fault(missing) == "no ratio" and statistics_fault(levels(2)) == ""


def test_lines_over_other_bins_than_most_are_no_reason_to_read_none(tmp_path: Path) -> None:
    path = written(tmp_path / "timesteps.jsonl", levels(1, levels=500), levels(2), levels(3))
    with pytest.warns(LogWarning, match=r"left out: step 1 \(other bins\)"):
        assert read_statistics(path) == [levels(2), levels(3)]


def test_one_wrong_step_costs_one_line_and_many_are_one_warning(tmp_path: Path) -> None:
    """A flipped bit may turn 5 into 500: neither what follows nor what came before is at fault."""
    for wrong in (500, 1):
        path = written(tmp_path / "metrics.jsonl", *(metrics(s if s != 5 else wrong) for s in range(1, 10)))
        log = read_log(path, metrics_fault)
        assert [line["step"] for line in log.lines] == [1, 2, 3, 4, 6, 7, 8, 9]
        assert log.damage == [f"line 5 (step={wrong} is out of order)"]
    path = written(tmp_path / "metrics.jsonl", *[b"x"] * 2000, metrics(1))
    with pytest.warns(LogWarning) as said:
        assert read_metrics(path) == [metrics(1)]
    lines = ", ".join(f"line {number} (not JSON)" for number in (1, 2, 3))
    assert [str(w.message) for w in said] == [f"{path}: 2000 damaged lines left out: {lines}, …"]


@pytest.mark.parametrize("cut", [b"", b'{"step": 2, "lo', b"\xff", b"\0" * 30, b"a" * (1 << 21)])
def test_what_a_killed_run_leaves_at_the_end_is_no_damage(cut: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", metrics(1), cut, end=b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_metrics(path) == [metrics(1)]
        written(path, metrics(1), metrics(2), end=b"")  # whole but for its end
        assert read_metrics(path) == [metrics(1), metrics(2)]
        path.write_bytes(b"")
        assert read_metrics(path) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "timesteps.jsonl"])
@pytest.mark.parametrize(("make", "what"), [(os.mkfifo, "a FIFO"), (os.mkdir, "a folder")])
def test_what_is_no_file_is_refused_before_it_is_opened(
    name: str,
    make: Callable[[Path], None],
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written(tmp_path / "metrics.jsonl", metrics(1))
    path = tmp_path / name
    path.unlink(missing_ok=True)
    make(path)
    assert cli.main(["analyze", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"sipo: error: {path}: is {what}, expected a file\n"
    with pytest.raises(FileError, match=f"{name}: is {what}, expected a file"):
        fit(tmp_path)
    monkeypatch.setattr("sipo.recipe.train.open_run", Mock(side_effect=AssertionError("too late")))
    toy = Path(__file__).parents[1] / "examples/toy/sd15.yaml"
    assert cli.main(["train", str(toy), f"training.output_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"sipo: error: {path}: is {what}, expected a file\n"


def test_a_run_with_a_damaged_log_is_resumed_and_the_log_is_kept(tmp_path: Path) -> None:
    fit(tmp_path, max_train_steps=4, checkpointing_steps=2)
    path, statistics = tmp_path / "metrics.jsonl", tmp_path / "timesteps.jsonl"
    straight = read_metrics(path)
    before = {}
    for log in (path, statistics):
        lines = log.read_bytes().splitlines(keepends=True)
        lines[1] = lines[1][:20] + b"\xff" + lines[1][21:]
        before[log] = b"".join(lines) + b'{"step": 5, "lo'
        log.write_bytes(before[log])
    with pytest.warns(LogWarning) as said:
        fit(tmp_path, max_train_steps=6, checkpointing_steps=2, resume_from="latest")
    messages = [str(w.message) for w in said]
    assert messages == [
        f"{log}: 1 damaged line left out: line 2 (not UTF-8, byte 20); the log as it was is {log.stem}.1.jsonl"
        for log in (path, statistics)
    ]
    for log in (path, statistics):
        assert log.with_name(f"{log.stem}.1.jsonl").read_bytes() == before[log]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = read_metrics(path)
        assert [line["step"] for line in read_statistics(statistics)] == [1, 3, 4, 5, 6]
    assert [line["step"] for line in lines] == [1, 3, 4, 5, 6]
    assert untimed(lines[:3]) == untimed([straight[0], *straight[2:]])
    names = sorted(p.name for p in tmp_path.glob("*.jsonl"))
    fit(tmp_path, max_train_steps=6, checkpointing_steps=2, resume_from="latest")  # nothing is damaged any more
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == names


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a device that is always full")
def test_a_line_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    recorder = Recorder(settings(tmp_path), 0, Accelerator(cpu=True))
    assert recorder._file is not None
    recorder._file.close()
    with open("/dev/full", "w") as full:
        recorder._file = full
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            recorder.write(1, {"loss": 0.5})
        recorder.close()  # without another error, which would take the first one's place
    with pytest.raises(ValueError, match="closed file"):
        full.flush()


def test_the_sign_test_of_billions_of_pairs_takes_no_time() -> None:
    """A damaged line may claim any number of them: each term of the sum cost a microsecond, so these were an hour."""
    assert not beyond_chance(0.5 + 0.9 / 1e5, 10**10)  # 1.8 standard errors
    assert beyond_chance(0.5 + 1.0 / 1e5, 10**10)  # 2
    assert beyond_chance(1.0, 10**12)
