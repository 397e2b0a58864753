"""``benchmarks.gpu_check`` without a GPU: its checks can fail, a crash ends one check, a stand-in runs its GPU code.

What is on trial here is the trial: each check must pass on a right backend and fail on each fault that it names.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import child, child_processes, device, faults, sanitizer
from benchmarks.gpu_check.all_checks import CHECKS, Context
from benchmarks.gpu_check.child_processes import CheckOptions, Row
from benchmarks.gpu_check.context import CheckFailedError, NotRunError, poisoned, same_bits
from sipo_kernels import backends
from sipo_kernels.backends import native
from sipo_kernels.output import RESULTS

BACKEND = "native" if native.LIBRARY is not None else "eager"
QUICK = CheckOptions("cpu", quick=True)
ON_A_CPU = [name for name, check in CHECKS.items() if not check.needs_gpu]
ON_A_GPU = [name for name, check in CHECKS.items() if check.needs_gpu and check.faults]


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        child_processes.command(*arguments), cwd=child_processes.ROOT, env=child_processes.environment(QUICK),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


# ---- Every check can fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_A_CPU)
def test_each_check_catches_its_faults(name: str) -> None:
    assert CHECKS[name].faults
    if name == "memory" and BACKEND == "eager":
        pytest.skip("plain torch keeps its intermediate tensors, which is what this check catches")
    for fault in (None, *CHECKS[name].faults):
        row = faults.try_check(name, Context(BACKEND, "cpu", quick=True), fault)
        due = "not run" if fault in faults.OF_FUSED and BACKEND not in backends.FUSED else "caught"
        assert row.outcome == (due if fault else "passes"), row


def test_each_fault_belongs_to_a_check() -> None:
    named = {fault for check in CHECKS.values() for fault in check.faults}
    assert named | {"crashes", "hangs"} == set(faults.FAULTS)
    assert [name for name, check in CHECKS.items() if not check.faults] == ["device guard"]  # needs two GPUs


def test_faults_of_fused_backends_are_not_asked_of_plain_torch() -> None:
    assert set(faults.FAULTS) > faults.OF_FUSED
    row = faults.try_check("expected upstream", Context("eager", "cpu", quick=True), "mend skipped")
    assert (row.outcome, row.said) == ("not run", "eager has nothing of the kind")


def test_poison_is_in_everything_that_torch_does_not_fill() -> None:
    with poisoned():
        like = torch.empty(3, 4, 5).contiguous(memory_format=torch.contiguous_format)
        for tensor in (like, torch.empty_like(like), like.new_empty(3), torch.empty_strided((2, 2), (1, 2))):
            assert bool(torch.isnan(tensor).all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_same_bits() -> None:
    nan, zero = torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, -0.0])
    assert same_bits(nan, nan.clone()) and not same_bits(nan, zero)
    assert not same_bits(nan, nan.double()) and not same_bits(nan, nan[:1])


def test_fractions_of_a_budget() -> None:
    context = Context(BACKEND, "cpu")
    context.within(0.5, 1.0, "half of it")
    context.within(0.0, 0.0, "nothing of nothing")
    assert (context.worst, context.cases) == (0.5, 2)
    for error, budget in ((2.0, 1.0), (torch.nan, 1.0), (1e-300, 0.0)):
        with pytest.raises(CheckFailedError, match="too much"):
            context.within(error, budget, "too much")


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert capsys.readouterr().out == (
        "gpu_check: no GPU that torch can use here; --device cpu rehearses the checks on the CPU\n"
    )
    assert command.main(["--device", "cuda"]) == 2


def test_a_rehearsal_ends_with_a_table_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    only = ["--only", "golden", "--only", "kept graph", "--only", "CUDA graph"]
    done = run_command("--device=cpu", "--quick", f"--backend={BACKEND}", f"--output={path}", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    assert (results["kind"], results["rehearsal"], results["complete"], results["failed"]) == (
        "gpu_check",
        True,
        True,
        0,
    )
    found = {row["check"]: row for row in results["cases"]}
    assert {name: row["outcome"] for name, row in found.items()} == {
        "golden": "pass", "kept graph": "pass", "CUDA graph": "not run",
    }  # fmt: skip
    assert found["CUDA graph"]["reason"] == "needs a GPU"
    assert found["golden"]["cases"] >= 8 * 9 and 0 <= found["golden"]["worst"] <= 1
    assert {"device", "torch", "triton", "nvcc", "date", "commit"} <= set(results["machine"])
    assert "2 pass, 0 fail, 1 not run" in done.stdout
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_backend_fails_the_command(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    arguments = ["--device=cpu", "--quick", f"--backend={BACKEND}", f"--output={path}", "--fault=scaled gradient"]
    done = run_command(*arguments, "--only", "golden", "--only", "masked pairs")
    assert done.returncode == 1
    rows = {row["check"]: row for row in json.loads(path.read_text())["cases"]}
    assert rows["golden"]["outcome"] == "fail" and "error 0.001, budget 1e-11" in rows["golden"]["reason"]
    assert rows["masked pairs"]["outcome"] == "pass"  # its zeros are right: the others went on


def test_what_is_not_there_is_no_success(tmp_path: Path) -> None:
    done = run_command("--device=cpu", "--backend=metal", "--only=golden", f"--output={tmp_path / 'r.json'}")
    assert done.returncode == 1 and "this checkout has no backend of that name" in done.stdout
    done = run_command("--device=cpu", "--only=no such check")
    assert done.returncode == 2 and "golden" in done.stdout


def test_imports_need_torch_and_triton_alone() -> None:
    row = command.imports()
    assert row.outcome == "pass", row


def test_optimised_python_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-m", "benchmarks.gpu_check", "--device=cpu"], cwd=child_processes.ROOT,
        env=child_processes.environment(QUICK), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "without -O" in done.stdout


# ---- Processes -------------------------------------------------------------------------------------------------------


def test_a_crash_ends_one_check() -> None:
    rows = child_processes.run_checks(["golden", "kept graph"], BACKEND, CheckOptions("cpu", True, fault="crashes"))
    assert [(row.check, row.outcome, row.reason) for row in rows] == [
        ("golden", "fail", "the process died: SIGSEGV"),
        ("kept graph", "fail", "the process died: SIGSEGV"),
    ]


def test_a_hang_ends_one_check() -> None:
    (row,) = child_processes.run_checks(["golden"], BACKEND, CheckOptions("cpu", True, limit=1.0, fault="hangs"))
    assert (row.outcome, row.reason) == ("fail", "took longer than 1 seconds")


def test_a_process_that_does_not_start_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        child_processes, "command", lambda *_: [sys.executable, "-c", "print('no torch'); raise SystemExit(7)"]
    )
    rows = child_processes.run_checks(["golden", "sizes"], BACKEND, QUICK)
    assert [(row.check, row.outcome) for row in rows] == [("golden", "fail"), ("sizes", "fail")]
    assert rows[0].reason == "before the first check: the process ended with code 7" and rows[0].detail == ["no torch"]


def test_out_of_time_is_a_failure() -> None:
    rows = child_processes.run_checks(["golden"], BACKEND, CheckOptions("cpu", deadline=0.0))
    assert [(row.outcome, row.reason) for row in rows] == [("fail", "out of time (--seconds)")]


def test_a_check_that_compares_nothing_is_a_failure() -> None:
    assert child._attempt(lambda context: None, Context(BACKEND, "cpu"))[:2] == ("fail", "it compared nothing")


# ---- Building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, built, expected",
    [((9, 0), ["80", "90a"], "80;90a"), ((9, 0), [], "90a"), ((8, 0), ["90a"], "80"), ((12, 0), [], "120")],
)
def test_builds_for_the_present_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], built: list[str], expected: str
) -> None:
    asked: list[str] = []
    record = tmp_path / "sipo_kernels" / "_build_info.json"
    record.parent.mkdir()

    def note(archs: list[str], **part: Any) -> None:
        record.write_text(json.dumps({"parts": {"cuda": {"built": True, "archs": archs, **part}}}))

    def setup(arguments: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        assert arguments[1:] == ["setup.py", "-q", "build_ext", "--inplace"]
        asked.append(env["SIPO_CUDA_ARCHS"])
        note(asked[-1].split(";"), compiler="release 13.0")
        return SimpleNamespace(returncode=0, stdout="")

    note(built)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(command.subprocess, "run", setup)
    monkeypatch.delenv("SIPO_CUDA_ARCHS", raising=False)
    row = command.build("cuda")
    assert asked == [expected] and (row.outcome, row.reason) == ("pass", f"release 13.0, for {expected}")
    note([], built=False, reason="no CUDA compiler found")
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout="said so"))
    row = command.build("cuda")
    assert (row.outcome, row.reason) == ("fail", "no CUDA part: no CUDA compiler found")


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------

CASES = "sanitizer cases: 35 comparisons on cuda\n"
OURS = """========= Invalid __global__ write of size 4 bytes
=========     at void sipo::pair_kernel<float>(Args)+0x160 in pair_loss.cu:6
=========     by thread (0,0,0) in block (0,0,0)
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: at::native::empty [0x1] in libtorch.so
"""
TRITONS = """========= Error: Race reported between Write access at pair_forward+0x90 in triton_kernels.py:80
=========     and Read access at pair_forward+0x120 in triton_kernels.py:90 [128 hazards]
"""
TORCHS = """========= Uninitialized __global__ memory read of size 2 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x40
=========         Host Frame: sipo_cuda_pair_loss [0x1] in sipo_kernels/_native.so
"""


@pytest.mark.parametrize(
    "output, code, outcome, reason",
    [
        (CASES + "========= ERROR SUMMARY: 0 errors\n", 0, "pass", ""),
        (CASES + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, "pass", ""),
        (CASES + OURS + "========= ERROR SUMMARY: 1 error\n", 99, "fail", "Invalid __global__ write of size 4 bytes"),
        (CASES + TRITONS + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", 99, "fail",
         "Error: Race reported between Write access at pair_forward+0x90 in triton_kernels.py:80"),
        (CASES + TORCHS + "========= ERROR SUMMARY: 1 error\n", 99, "pass",
         "1 findings in torch's own kernels, none in ours"),
        (CASES + TORCHS + OURS + "========= ERROR SUMMARY: 2 errors\n", 99, "fail",
         "Invalid __global__ write of size 4 bytes"),
        (CASES + "========= ERROR SUMMARY: 3 errors\n", 99, "fail", "3 findings, and none could be read"),
        ("========= ERROR SUMMARY: 0 errors\n", 0, "fail", "the cases themselves failed, with code 0"),
        (CASES + "========= ERROR SUMMARY: 0 errors\n", 1, "fail", "the cases themselves failed, with code 1"),
        ("========= Device not supported. Please refer to the documentation\n", 1, "not run",
         "the tool refuses this device: Device not supported. Please refer to the documentation"),
        ("Killed\n", 137, "fail", "the tool ended without a summary, with code 137"),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says(output: str, code: int, outcome: str, reason: str) -> None:
    row = sanitizer.judge("compute-sanitizer", "cuda", "========= COMPUTE-SANITIZER\n" + output, code)
    assert (row.outcome, row.reason) == (outcome, reason)


def test_the_sanitizers_process_says_how_much_it_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitizer.run_small_cases([BACKEND], "cpu") == 0
    counted = capsys.readouterr().out
    assert int(counted.split()[2]) >= 7 * 5
    row = sanitizer.judge("", "", counted + "========= ERROR SUMMARY: 0 errors\n", 0)
    assert (row.outcome, row.cases) == ("pass", int(counted.split()[2]))


# ---- The GPU's checks, on a stand-in ---------------------------------------------------------------------------------


class _Dry(Context):
    """Takes the ways of a GPU with tensors on the CPU."""

    on_gpu = True  # type: ignore[assignment]


class _StandIn:
    """torch.cuda where there is none: everything happens at once, and a graph's replay does its work again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waited = False
        self.launched = ["void at::native::fill_kernel<float>()", "void sipo::pair_kernel<float>(Args)"]
        self.replays = True
        self.called: set[str] = set()
        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: setattr(self, "waited", True))

        @contextlib.contextmanager
        def entered(*_: Any) -> Iterator[None]:
            yield

        fakes: dict[str, Any] = {
            "synchronize": lambda *_: setattr(self, "waited", False),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": entered,
            "graph": entered,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "Event": lambda: SimpleNamespace(record=lambda: None, query=lambda: self.waited),
            "_sleep": lambda cycles: None,
            "set_sync_debug_mode": lambda mode: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, self._counted(name, fake))
        capture = device.capture

        def capture_again(work: Callable[[], Any]) -> Any:
            replay, out, grad = capture(work)

            def again() -> None:
                replay()
                if self.replays:
                    fresh, fresh_grad = work()
                    with torch.no_grad():
                        grad.copy_(fresh_grad)
                        for name in RESULTS:
                            getattr(out, name).copy_(getattr(fresh, name))

            return again, out, grad

        def launched(work: Callable[[], Any]) -> list[str]:
            work()
            return self.launched

        monkeypatch.setattr(device, "capture", capture_again)
        monkeypatch.setattr(device, "launched", launched)

    def _counted(self, name: str, fake: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.called.add(name)
            return fake(*arguments)

        return call


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> _StandIn:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: benchmarks.gpu_check runs the checks themselves")
    return _StandIn(monkeypatch)


def dry(name: str) -> Context:
    context = _Dry(BACKEND, "cpu", quick=True)
    CHECKS[name].run(context)
    return context


@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_gpus_checks_run_through(name: str, stand_in: _StandIn) -> None:
    assert dry(name).cases > 0
    needed = {
        "no synchronisation": {"set_sync_debug_mode", "_sleep", "Event", "synchronize"},
        "CUDA graph": {"CUDAGraph", "graph", "Stream", "stream"},
        "two streams": {"Stream", "stream", "_sleep", "synchronize"},
        "launches": set(),
    }
    assert needed[name] <= stand_in.called


def test_a_gpus_checks_catch_what_the_stand_in_can_show(stand_in: _StandIn) -> None:
    assert faults.try_check("no synchronisation", _Dry(BACKEND, "cpu"), "waits for the device").outcome == "caught"
    for fault in CHECKS["CUDA graph"].faults:
        if fault not in faults.OF_FUSED or BACKEND in backends.FUSED:
            assert faults.try_check("CUDA graph", _Dry(BACKEND, "cpu", quick=True), fault).outcome == "caught", fault
    stand_in.replays = False
    with pytest.raises(CheckFailedError, match="replay 0 on inputs 1"):
        dry("CUDA graph")
    stand_in.launched = stand_in.launched * 4
    with pytest.raises(CheckFailedError, match="error 8, budget 3"):
        dry("launches")
    stand_in.launched = ["void at::native::fill_kernel<float>()"]
    with pytest.raises(CheckFailedError, match="no kernel of ours"):
        dry("launches")
    stand_in.launched = []
    with pytest.raises(NotRunError, match="the profiler recorded no kernel"):
        dry("launches")


def test_kernels_are_told_by_their_names() -> None:
    assert device.is_ours("pair_forward") and device.is_ours("void sipo::(anonymous namespace)::pair_loss<float>()")
    assert not device.is_ours("void at::native::vectorized_elementwise_kernel<4>()")


def test_a_row_survives_its_file() -> None:
    row = Row("golden", "native", "pass", "", 3, 0.5, None, 1.0, ["x"])
    text = json.dumps({"start": "golden"}) + "\n" + json.dumps(row.__dict__) + '\n{"start": "sizes"}\n{"check": "siz'
    assert child_processes._read(text) == ([row], "sizes")
