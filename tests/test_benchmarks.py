"""The benchmark suite runs end to end, and says what it left out, what became slower, and whose numbers they are.

No timing is asserted anywhere: only that numbers are there, add up, and are named.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import mmap
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    baselines,
    cases,
    compare,
    footprint,
    host,
    kernel,
    kernel_summary,
    machine,
    parts,
    suite,
    sweep,
    timing,
)
from benchmarks.cases import BOTH, FORWARD, Case
from sipo_kernels import METRICS, Totals, backends, pair_loss, reference
from tests.benchmark_results import run_compare, small_machine

__all__ = ["small_machine"]  # a fixture that every test here runs in

ROOT = Path(__file__).parent.parent
TINY = Case("tiny", (3, 5, 7), 2, "bfloat16", "float32", upstream=1 / 8)
QUICK = ["--device", "cpu", "--seconds", "0.05"]


def check_layout(results: dict[str, Any], kind: str) -> None:
    """The schema of benchmarks/suite.py, and that derived numbers follow from measured ones."""
    assert results["kind"] == kind
    assert results["complete"] is True
    assert {"device", "threads", "torch", "python", "date", "commit"} <= set(results["machine"])
    assert results["auto"] in {baselines.OURS + name for name in baselines.available("cpu")[0]}
    rate = results["copy_bandwidth_gb_s"]
    assert set(rate["moments"]) == {"start", "between", "end"}
    assert rate["runs"] == sum(moment["runs"] for moment in rate["moments"].values())
    for entry in results["cases"]:
        elements = math.prod(entry["shape"])
        assert entry["elements"] == elements
        assert entry["shape"][0] == 2 * entry["pairs"]
        size, target = (torch.empty(0, dtype=getattr(torch, entry[k])).element_size() for k in ("dtype", "target"))
        tensors = (1 if entry["ref_error"] else 2) + (entry["mode"] == BOTH)
        assert entry["floor_bytes"] == elements * (tensors * size + target / (1 + entry["shared_target"]))
        assert entry["floor_ms"] == pytest.approx(entry["floor_bytes"] / rate["median"] / 1e6)
        assert entry["state"] in timing.STATES
        for name, result in entry["results"].items():
            wall = result["wall_ms"]
            assert wall["runs"] >= 3
            assert 0 < wall["quartiles"][0] <= wall["median"] <= wall["quartiles"][1]
            assert result["host_ms"] is result["device_ms"] is result["launches"] is None  # no GPU
            assert result["gb_s"] == pytest.approx(entry["floor_bytes"] / wall["median"] / 1e6)
            assert result["of_copy"] == pytest.approx(result["gb_s"] / rate["median"])
            assert name == baselines.PUBLISHED or result["loss_error"] < 0.05


# ---------------------------------------------------------------- cases


@pytest.mark.parametrize(
    ("case", "bytes_per_element", "name"),
    [
        (Case("x", (3, 5), 1, "bfloat16", "bfloat16"), 8, "x, 1 pair, bfloat16, upstream 1, forward+backward"),
        (Case("x", (3, 5), 1, "bfloat16", "bfloat16", FORWARD), 6, "x, 1 pair, bfloat16, forward"),
        (
            Case("x", (3, 5), 2, "float16", "float32", upstream=1 / 3),
            10,
            "x, 2 pairs, float16, float32 target, upstream 1/3, forward+backward",
        ),
        (
            Case("x", (3, 5), 4, "bfloat16", "float32", upstream=1 / 8, shared_target=True),
            8,
            "x, 4 pairs, bfloat16, shared float32 target, upstream 1/8, forward+backward",
        ),
        (
            Case("x", (3, 5), 4, "float32", "float32", FORWARD, shared_target=True, ref_error=True),
            6,
            "x, 4 pairs, float32, shared float32 target, ref_error, forward",
        ),
    ],
)
def test_a_case_says_what_it_is_and_what_it_moves(case: Case, bytes_per_element: int, name: str) -> None:
    assert case.floor_bytes == bytes_per_element * case.elements == bytes_per_element * 2 * case.pairs * 15
    assert case.name == name
    assert Case.of({**json.loads(json.dumps(case.fields())), "state": "cold"}) == case
    batch = cases.make_inputs(case, "cpu")
    assert sum(t.nbytes for t in batch[:3] if t is not None) == case.input_bytes
    assert batch.target.shape[0] == (case.pairs if case.shared_target else 2 * case.pairs)
    assert (batch.ref_pred is None, batch.ref_error is None) == (case.ref_error, not case.ref_error)
    assert float(batch.upstream) == pytest.approx(case.upstream)


def test_headline_cases_come_first_and_once() -> None:
    table, training, video = cases.headline_cases().values()
    assert len(table) == 16 and len({(case.shape, case.target, case.upstream) for case in table}) == 16
    assert {case.shape for case in table} == {
        (2, 16, 21, 60, 104),
        (8, 13, 16, 60, 90),
        (8, 4, 128, 128),
        (2, 4, 64, 64),
    }
    assert {(case.dtype, case.target, case.upstream) for case in training} == {("bfloat16", "float32", 1 / 8)}
    everything = list(cases.kernel_cases())
    assert everything[: len(table + training + video)] == table + training + video
    assert len(set(everything)) == len(everything)
    plain = {
        (case.label, case.pairs, case.mode) for case in everything if case.types == "bfloat16" and case.upstream == 1
    }
    assert len(plain) == len(cases.SHAPES) * len(cases.PAIRS) * 2  # as rows, all of them


@pytest.mark.parametrize(("shared", "ref_error"), [(False, False), (True, False), (False, True), (True, True)])
def test_baselines_compute_what_the_definition_says(shared: bool, ref_error: bool) -> None:
    case = Case("x", (3, 5), 2, "float32", "float32", upstream=1 / 8, shared_target=shared, ref_error=ref_error)
    batch = cases.make_inputs(case, "cpu")
    options = {"method": "sipo", "beta": cases.BETA, "ratio_scale": batch.ratio_scale, "ref_error": batch.ref_error}
    tensors = batch.model_pred.detach(), batch.ref_pred, batch.target
    exact = reference.pair_grad(*tensors, grad_output=batch.upstream.double(), **options)
    loss, grad = baselines.truth(batch)
    torch.testing.assert_close(loss, reference.pair_loss(*tensors, **options).loss)
    torch.testing.assert_close(grad, exact)
    for name, call in suite.make_calls(case, batch, "cpu", False).items():
        suite.make_before(batch)()
        # A logit in float32 is beta/2 times the difference of means around 1, each rounded to 6e-8.
        assert float(call()) == pytest.approx(float(loss), abs=4 * cases.BETA / 2 * 6e-8), name
        assert batch.model_pred.grad is not None
        assert (batch.model_pred.grad.double() - exact).norm() < 4e-4 * exact.norm(), name


def test_ours_is_called_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor remembers the upstream gradient over the calls, so that the second gradient is made for it at once."""
    expected = []
    monkeypatch.setattr(
        baselines,
        "pair_loss",
        lambda *tensors, expected_upstream, **options: (
            expected.append((id(expected_upstream), float(expected_upstream)))
            or pair_loss(*tensors, expected_upstream=expected_upstream, **options)
        ),
    )
    batch = cases.make_inputs(TINY, "cpu")
    name = baselines.available("cpu")[0][-1]
    call = suite.make_calls(TINY, batch, "cpu", False)[baselines.OURS + name]
    for _ in range(3):
        suite.make_before(batch)()
        call()
    assert len({place for place, _ in expected}) == 1
    assert [value for _, value in expected] == ([1.0, 1 / 8, 1 / 8] if name in backends.FUSED else [1.0] * 3)


# ---------------------------------------------------------------- measuring


def small_cases(monkeypatch: pytest.MonkeyPatch, **shapes: tuple[int, ...]) -> None:
    """The kernel suite's list of cases, of these shapes."""
    first = next(iter(shapes))
    monkeypatch.setattr(cases, "SHAPES", shapes)
    monkeypatch.setattr(cases, "PAIRS", (4, 1))
    monkeypatch.setattr(cases, "TABLE", ((first, 1),))
    monkeypatch.setattr(cases, "MORE_PAIRS", ())
    monkeypatch.setattr(cases, "FLOAT32_VIDEO", ((first, 4),))


def test_the_kernel_suite_writes_every_case_and_lists_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_cases(monkeypatch, tiny=(3, 5, 7), huge=(1 << 26,))
    path = tmp_path / "new" / "kernel.json"
    kernel.main([*QUICK, "--output", str(path)])
    results = json.loads(path.read_text())
    assert not path.with_name(path.name + ".part").exists()
    check_layout(results, "kernel")

    def is_measured(case: Case) -> bool:
        if case.label != "tiny" or case.dtype == "float16":
            return False
        forward = case.mode == BOTH or (case.dtype == "bfloat16" and case.pairs == 4)
        return forward and (case.dtype == "bfloat16" or case.pairs == 4)

    wanted = [case for case in cases.kernel_cases() if is_measured(case)]
    assert len(wanted) == 4 + 3 + 1 + 2 + 1  # the table, the rest of training, float32 "video", bfloat16, float32
    assert [Case.of(entry) for entry in results["cases"][::2]] == wanted
    assert [entry["state"] for entry in results["cases"]] == ["cold", "in turn"] * len(wanted)
    names = {baselines.PUBLISHED, baselines.UPCAST, baselines.COMPILED, "sipo eager"}
    assert all(names <= set(entry["results"]) for entry in results["cases"])

    skipped = [(Case.of(s), s["reason"]) for s in results["skipped"] if "label" in s]
    assert {case for case, _ in skipped} | set(wanted) == set(cases.kernel_cases())
    assert len(skipped) + len(wanted) == len(list(cases.kernel_cases()))
    huge = [why for case, why in skipped if case.label == "huge" and case.dtype != "float16"]
    assert len(huge) == 8 and all("leaves out what exceeds" in why for why in huge)
    assert sum("float16 is not measured" in why for _, why in skipped) == 8
    assert sum("the forward alone is measured in bfloat16" in why for _, why in skipped) == 3
    assert {"sipo triton", baselines.AUTOTUNED} <= {s.get("implementation") for s in results["skipped"]}
    out = capsys.readouterr().out
    assert "no GPU is measured" in out

    assert results["summary"] == json.loads(json.dumps(kernel_summary.summarize(results)))
    assert [len(results["summary"][group]["cold"]["compile"]) for group in results["summary"]] == [4, 3, 1]
    kernel.main(["--summary", str(path)])
    printed, table = capsys.readouterr().out.split("\n| batch |")
    assert printed.strip() in out and "geometric mean of 4" in printed
    rows = table.strip().splitlines()[2:]
    assert len(rows) == 8 and all(row.count(" | ") == 6 for row in rows)


def test_memory_beyond_the_inputs_is_the_gradient_for_ours_and_more_for_plain_torch(tmp_path: Path) -> None:
    case = Case("tiny", (4, 64, 64), 2, "float32", "float32", upstream=1 / 8)
    run = suite.Suite("kernel", "cpu", tmp_path / "k.json", seconds=0.01, budget=60)
    run.run([case], ("warm",))
    results = run.results["cases"][0]["results"]
    assert results[baselines.UPCAST]["extra_mb"] > 2 * case.tensor_bytes / 1e6
    for name in ("sipo native",) if "sipo native" in results else ():
        assert case.tensor_bytes / 1e6 <= results[name]["extra_mb"] < 1.2 * case.tensor_bytes / 1e6


def test_the_sweep_covers_every_power_of_two(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    sweep.main([*QUICK, "--low", "8", "--high", "10", "--output", str(path)])
    results = json.loads(path.read_text())
    check_layout(results, "sweep")
    assert {(entry["dtype"], entry["target"], entry["upstream"]) for entry in results["cases"]} == {
        ("bfloat16", "float32", 1 / 8)
    }
    found = [(entry["elements"], entry["state"]) for entry in results["cases"]]
    assert found == [(2**power, state) for power in (8, 9, 10) for state in ("cold", "warm")]


@pytest.mark.parametrize("module", [kernel, sweep, compare, parts, host])
def test_options_are_explained(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert f"python -m {module.__name__}" in capsys.readouterr().out


def test_a_bare_checkout_is_enough(tmp_path: Path) -> None:
    """Torch and numpy, no matplotlib, no pytest: what a GPU machine may lack."""
    path = tmp_path / "k.json"
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "pytest", "pytest_benchmark", "diffusers")))
from benchmarks import compare, host, kernel, machine, parts, sweep
machine.memory_bytes = lambda device: 1 << 24
kernel.main(["--device", "cpu", "--budget", "0", "--output", {str(path)!r}])
sys.exit(compare.main([{str(path)!r}, {str(path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr  # two files with no case in common
    results = json.loads(path.read_text())
    left_out = [s["label"] for s in results["skipped"] if "label" in s]
    assert len(left_out) == len(list(cases.kernel_cases()))  # all are listed
    assert results["cases"] == []


def test_a_spent_budget_keeps_what_there_is_and_lists_the_rest(tmp_path: Path) -> None:
    run = suite.Suite("kernel", "cpu", tmp_path / "k.json", seconds=0.01, budget=0)
    assert run.run([TINY], ("cold",)) == []
    assert run.finish()["cases"] == []
    (reason,) = (s["reason"] for s in run.results["skipped"] if s.get("label") == "tiny")
    assert "budget" in reason


def test_a_cut_off_run_has_whole_cases_on_disk_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = suite.Suite("kernel", "cpu", tmp_path / "k.json", seconds=0.01, budget=60)
    run.run([TINY], ("cold",))
    monkeypatch.setattr(run, "measure_case", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.run([TINY], ("cold",))
    results = json.loads((tmp_path / "k.json").read_text())
    assert results["complete"] is False
    assert len(results["cases"]) == 1


class _IgnoresUpstream(torch.autograd.Function):
    """The loss as it is, and its gradient as if 1 came down."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(upstream)


def test_what_is_wrong_or_fails_or_is_too_slow_is_listed_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = baselines.implementations

    def with_bad_ones(batch: cases.LossInputs, device: str, autotune: bool) -> dict[str, Any]:
        good = functions(batch, device, autotune)

        def slow() -> torch.Tensor:
            time.sleep(0.2)
            return good[baselines.UPCAST]()

        return {
            **good,
            "sipo wrong": lambda: good["sipo eager"]() + 1,
            "sipo nan": lambda: good["sipo eager"]() * math.nan,
            "sipo halved gradient": lambda: good["sipo eager"]() / 2 + good["sipo eager"]().detach() / 2,
            "sipo for 1": lambda: _IgnoresUpstream.apply(good["sipo eager"]()),
            "sipo broken": lambda: torch.zeros(2) @ torch.zeros(3),
            "sipo slow": slow,
        }

    monkeypatch.setattr(baselines, "implementations", with_bad_ones)
    monkeypatch.setattr(suite, "MAX_CALL_SECONDS", 0.15)
    run = suite.Suite("kernel", "cpu", tmp_path / "k.json", seconds=0.01, budget=60)
    run.run([TINY, Case("more", (3, 5, 8), 2, "bfloat16", "float32", FORWARD)], ("cold",))
    for entry in run.results["cases"]:
        assert "sipo eager" in entry["results"]
        assert not {"sipo wrong", "sipo nan", "sipo broken", "sipo slow"} & set(entry["results"])
    assert not {"sipo halved gradient", "sipo for 1"} & set(run.results["cases"][0]["results"])
    why = {s["implementation"]: s["reason"] for s in run.results["skipped"] if s.get("label") == "tiny"}
    assert all(why[f"sipo {name}"].startswith("wrong") for name in ("wrong", "nan", "halved gradient", "for 1"))
    assert "RuntimeError" in why["sipo broken"]
    assert "too slow" in why["sipo slow"]
    assert any(s.get("implementation") == "sipo slow" and s["label"] == "more" for s in run.results["skipped"])


def test_large_inputs_are_measured_cold_only(tmp_path: Path) -> None:
    case = Case("large", (1 << 17,), 1, "float32", "float32", FORWARD)  # 3 MiB of inputs, 256 KiB of cache
    run = suite.Suite("kernel", "cpu", tmp_path / "k.json", seconds=0.01, budget=60)
    run.run([case], timing.STATES)
    assert [entry["state"] for entry in run.results["cases"]] == ["cold"]
    assert [s["state"] for s in run.results["skipped"] if "every call is cold" in s["reason"]] == ["in turn", "warm"]


@pytest.mark.skipif("native" not in baselines.available("cpu")[0], reason="the native library is not built")
def test_the_parts_of_a_call_are_timed_and_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.SHAPES, parts.LABEL, (3, 5, 7))
    path = tmp_path / "parts.json"
    options = ["--pairs", "2", "--upstream", "0.125", "--shared-target", "--seconds", "0.05", "--output", str(path)]
    parts.main(options)
    found = json.loads(path.read_text())
    assert [(entry["target"], entry["upstream"]) for entry in found["cases"]] == [
        ("float32", 1 / 8),
        ("bfloat16", 1 / 8),
    ]
    for entry in found["cases"]:
        median = {name: result["wall_ms"]["median"] for name, result in entry["results"].items()}
        names = [parts.COMPILE, parts.CALL, parts.FORWARD_PART, parts.USED, parts.NEW, parts.AGAIN]
        assert list(median) == names
        least = median[parts.FORWARD_PART] + 2 * median[parts.AGAIN] + median[parts.USED]
        assert entry["least_ms"] == pytest.approx(least)
        elements, target = 4 * 105, 2 * 105 * (4 if entry["target"] == "float32" else 2)
        moved = [entry["results"][name]["bytes"] for name in names]
        whole, forward = 6 * elements + target, 4 * elements + target
        assert moved == [whole, whole, forward, 2 * elements, 2 * elements, (2 * elements + target) // 2]
        assert entry["floor_bytes"] == whole
        assert all(result["page_faults"]["runs"] == parts.FAULT_RUNS for result in entry["results"].values())


def test_page_faults_are_those_of_new_memory() -> None:
    size = 40 << 20
    used = torch.ones(size, dtype=torch.uint8)
    # Mapped for this call: malloc may have a hole of that size from the tests before.
    calls = {
        "used": lambda: used.fill_(1),
        "new": lambda: torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1),
    }
    faults = parts.page_faults(calls, lambda: None, 3)
    assert faults["used"]["median"] < 16
    assert faults["new"]["median"] >= size // (2 << 20)  # one a page, of 2 MiB at the most


def test_host_times_are_those_of_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LOOP", 4)
    path = tmp_path / "host.json"
    host.main(["--device", "cpu", "--seconds", "0.02", "--output", str(path)])
    found = json.loads(path.read_text())
    assert (found["kind"], found["complete"], found["options"]) == ("host", True, {"seconds": 0.02, "loop": 4})
    assert [Case.of(entry) for entry in found["cases"]] == list(host.CASES)
    names = [host.LOSS, host.PASS, host.METRIC_PASS, host.FORWARD, host.METRICS_ALONE]
    assert [list(entry["results"]) for entry in found["cases"]] == [[host.LOSS], [host.LOSS], names]
    last = found["cases"][-1]["results"]
    # Not a timing: a part of a call against the whole of it, the loop's length forgotten or not.
    assert last[host.METRICS_ALONE]["host_ms"]["median"] < last[host.METRIC_PASS]["host_ms"]["median"] < 20
    assert run_compare(tmp_path, found, found) == 0
    slower = copy.deepcopy(found)
    time_of = slower["cases"][0]["results"][host.LOSS]["host_ms"]
    time_of.update(median=9 * time_of["median"], quartiles=[9 * quartile for quartile in time_of["quartiles"]])
    assert run_compare(tmp_path, found, slower) == 1


def test_a_training_pass_adds_to_its_totals() -> None:
    """What is timed does what training does: metrics and statistics of every pass are in the sums."""
    calls = host.calls_of(host.CASES[-1], "cpu")
    cells = {cell.cell_contents for cell in calls[host.PASS].__closure__ if isinstance(cell.cell_contents, Totals)}
    (totals,) = cells
    for _ in range(3):
        calls[host.PASS]()
    assert totals.metrics[1].tolist() == [3.0] * len(METRICS)
    assert totals.levels[:2].sum(1).tolist() == [3.0, 0.0]


def test_turns_give_equal_time_and_nobody_follows_itself() -> None:
    calls: list[str] = []

    def call(name: str, seconds: float) -> Any:
        def work() -> None:
            calls.append(name)
            time.sleep(seconds)

        return work

    work = {"fast": call("fast", 1e-4), "also fast": call("also fast", 1e-4), "slow": call("slow", 0.02)}
    times = timing.time_alternately(work, seconds=0.12, device="cpu", state="in turn")
    assert [len(t.wall_ms) for t in times.values()] == [calls.count(name) for name in times]
    assert all(before != after for before, after in itertools.pairwise(calls))
    assert len(times["slow"].wall_ms) >= 3
    assert len(times["fast"].wall_ms) > len(times["slow"].wall_ms)

    calls.clear()
    times = timing.time_alternately(work, seconds=0.01, device="cpu", state="warm")
    assert len(calls) == 2 * sum(len(t.wall_ms) for t in times.values())  # each timed call follows one of its own
    assert calls[::2] == calls[1::2]
    with pytest.raises(ValueError, match="lukewarm"):
        timing.time_alternately(work, seconds=0.01, device="cpu", state="lukewarm")


def test_before_runs_untimed_before_every_call() -> None:
    times = timing.time_alternately(
        {"a": lambda: None}, seconds=0.01, device="cpu", before=lambda: time.sleep(0.002), state="cold"
    )
    assert min(times["a"].wall_ms) < 2


def test_summary_is_median_and_quartiles() -> None:
    assert timing.summary([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "quartiles": [2.0, 4.0], "runs": 5}
    assert timing.summary([7.0]) == {"median": 7.0, "quartiles": [7.0, 7.0], "runs": 1}


def test_launches_are_the_kernels_copies_and_fills_of_a_trace() -> None:
    names = ("kernel", "gpu_memset", "cuda_runtime", "kernel", "gpu_user_annotation", "gpu_memcpy")
    events = [{"cat": kind, "name": f"{kind} {place}"} for place, kind in enumerate(names)]
    found = footprint.launches_in({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]})
    assert found == ["kernel 0", "gpu_memset 1", "kernel 3", "gpu_memcpy 5"]


def test_the_machine_is_described_and_others_load_is_seen() -> None:
    info = machine.describe("cpu")
    assert info["device"] == info["cpu"]
    assert info["torch"] == torch.__version__
    assert info["device"] in machine.caption(info)
    load = machine.OthersLoad()
    subprocess.run([sys.executable, "-c", "import time\nend = time.time() + 0.6\nwhile time.time() < end: pass"])
    cores = load.cores()
    assert cores is None or cores > 0.3


def test_a_partial_run_does_not_take_the_place_of_a_whole_one() -> None:
    assert suite.default_output("kernel", "cpu") == timing.RESULTS / "kernel-cpu.json"
    assert suite.default_output("kernel", "cpu", partial=True).parent == ROOT / "out" / "bench"


# ---------------------------------------------------------------- the GPU's part, on a made-up device


class FakeDevice:
    """A queue of work that takes time, driven by torch's CUDA calls: the host runs ahead until it synchronises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free_at = 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(fake.free_at, time.perf_counter())

            def query(self) -> bool:
                return time.perf_counter() >= self.at

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(cycles / 1e9))
        timing._cycles_per_ms.cache_clear()

    def work(self, seconds: float) -> None:
        self.free_at = max(self.free_at, time.perf_counter()) + seconds

    def synchronize(self, device: str | None = None) -> None:
        time.sleep(max(0.0, self.free_at - time.perf_counter()))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield FakeDevice(monkeypatch)
    timing._cycles_per_ms.cache_clear()


def test_host_wall_and_device_time_are_told_apart(gpu: FakeDevice) -> None:
    def launch() -> None:  # two kernels of 3 ms, between them 8 ms of Python
        gpu.work(0.003)
        time.sleep(0.008)
        gpu.work(0.003)

    def wait() -> None:  # synchronises inside: its device time cannot be had without gaps
        gpu.work(0.001)
        gpu.synchronize()
        gpu.work(0.001)

    times = timing.time_alternately({"launch": launch, "wait": wait}, seconds=0.2, device="cuda", state="warm")
    found = {name: t.summary() for name, t in times.items()}
    assert found["launch"]["device_ms"]["median"] == pytest.approx(6, abs=0.5)  # the gap is not in it
    assert found["launch"]["host_ms"]["median"] >= 8
    assert found["launch"]["wall_ms"]["median"] >= 11
    assert found["launch"].get("device_ms_with_host_gaps", 0) < found["launch"]["device_ms"]["runs"] / 2
    assert found["wait"]["device_ms_with_host_gaps"] == found["wait"]["device_ms"]["runs"]


def test_a_gpu_run_counts_launches_at_its_end(gpu: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bandwidth, inputs = timing.CopyBandwidth, suite.make_inputs
    monkeypatch.setattr(timing, "CopyBandwidth", lambda device: bandwidth("cpu"))
    monkeypatch.setattr(timing, "_flusher", lambda device: lambda: None)
    described = {**machine.describe("cpu"), "device_type": "cuda"}
    monkeypatch.setattr(machine, "describe", lambda device: described)
    monkeypatch.setattr(suite, "make_inputs", lambda case, device: inputs(case, "cpu"))
    calls = suite.make_calls
    monkeypatch.setattr(
        suite,
        "make_calls",
        lambda *args: {name: lambda call=call: gpu.work(1e-4) or call() for name, call in calls(*args).items()},
    )
    monkeypatch.setattr(suite, "lacks_memory", lambda case, device: None)
    monkeypatch.setattr(suite, "extra_memory_mb", lambda call, device, before: 1.5)
    monkeypatch.setattr(suite, "launched", lambda call, before: ["kernel"] * 7)
    monkeypatch.setattr(suite.backends, "choose", lambda backend, device: "eager")
    monkeypatch.setattr(baselines, "available", lambda device: (["eager"], {"sipo cuda": "not built"}))
    small_cases(monkeypatch, small=(4, 8, 8))
    path = tmp_path / "k.json"
    only = "1 pair, (bfloat16, (shared float32 target, )?upstream|bfloat16, forward|float32, forward)"
    kernel.main(["--device", "cuda", "--seconds", "0.02", "--only", only, "--output", str(path)])
    results = json.loads(path.read_text())
    found = [Case.of(entry) for entry in results["cases"]]
    assert len(found) == (2 + 1 + 2) * 2  # of the table, a shared target, forward alone in two types
    counted = [entry for entry, case in zip(results["cases"], found, strict=True) if cases.is_headline(case)]
    assert len(counted) == 3 * 2
    for entry, case in zip(results["cases"], found, strict=True):
        autotuned = {baselines.AUTOTUNED, baselines.AUTOTUNED_NO_GRAPHS} <= set(entry["results"])
        assert autotuned == (case in list(cases.table_cases()))
        for name, result in entry["results"].items():
            assert result["launches"] == (7 if entry in counted else None)
            assert result["extra_mb"] == (None if name == baselines.AUTOTUNED else 1.5)
            assert result["gb_s"] == pytest.approx(entry["floor_bytes"] / result["device_ms"]["median"] / 1e6)
    assert {"implementation": "sipo cuda", "reason": "not built"} in results["skipped"]
