"""Shared set-up: Triton's interpreter where there is no GPU, one hypothesis profile, the backends under test."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, and nobody waits for a network to say so
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import pytest
from hypothesis import HealthCheck, settings

from sipo_kernels import backends
from sipo_kernels.backends import native
from sipo_kernels.backends.cuda import emulation
from sipo_kernels.backends.cuda import launch as cuda

if os.environ.get("TRITON_INTERPRET") == "1" and backends.status("triton", "cpu").available:
    from triton.runtime import interpreter

    # For each function that a kernel calls, the interpreter replaces triton.language by itself once more, which takes
    # half of its time: for the kernel it has been replaced already.
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)

# A shell starts what runs in the background with Ctrl-C ignored, and what tests start inherits it; some send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests run side by side on all cores, and what a run computes to the last bit may hang on how many threads it has.
torch.set_num_threads(1)

# No test cuts the power: those that look at durability look at the calls.
os.fsync = lambda fd: None

settings.register_profile(
    "sipo", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("sipo")


def _reset_accelerate() -> None:
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Resets the state that accelerate keeps for the whole process, mixed precision included."""
    _reset_accelerate()  # a fixture of the module may have left some
    yield
    _reset_accelerate()


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> None:
    """Leaves what is alive between modules, libraries above all, out of later searches for garbage, which are slow."""
    gc.collect()
    gc.freeze()


GOLDEN_FILES = Path(__file__).parent / "golden"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Checks that a call raises an error of this type, whose message has one line and contains this text."""
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _implementations() -> list[str]:
    """Everything that the contract's tests run over: each backend that can run, native once per instruction set.

    Without a GPU, ``cuda`` runs on the emulator, where there is a compiler to build it.
    """
    names = [name for name in ("eager", "triton", "cuda") if backends.status(name, DEVICE).available]
    if DEVICE == "cpu" and emulation.compiler() is not None:
        names.append("cuda-emulated")
    return names + [f"native-{isa}" for isa in native.instruction_sets()]


IMPLEMENTATIONS = _implementations()
# What comes before a backend's kernels, or around them, is the same for each of native's instruction sets.
each_backend_once = pytest.mark.parametrize(
    "backend", {name.partition("-")[0]: name for name in reversed(IMPLEMENTATIONS)}.values(), indirect=True
)


@pytest.fixture(params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend's name; for ``native`` with one instruction set after another."""
    name, _, variant = request.param.partition("-")
    if name == "native":
        monkeypatch.setattr(native, "ISA", variant)
    if variant == "emulated":
        emulate(monkeypatch)
    return name


def emulate(monkeypatch: pytest.MonkeyPatch, gpu: cuda.Gpu = emulation.SMALL) -> None:
    """Lets backend ``cuda`` run on the CPU, as a GPU of that description would."""
    monkeypatch.setattr(cuda, "LIBRARY", cuda._load(emulation.library()).library)
    monkeypatch.setattr(cuda, "EMULATED", gpu)
