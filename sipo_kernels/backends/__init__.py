"""Chooses the backend; says which cannot run, why, and what to do about it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from sipo_kernels import build_info
from sipo_kernels.backends import native
from sipo_kernels.backends.cuda import launch as cuda
from sipo_kernels.options import check_choice

BACKENDS = ("eager", "triton", "native", "cuda")
_CHOICES = ("auto", *BACKENDS)
# Backends whose forward also makes the gradient, in the same pass over memory.
FUSED = ("native", "cuda", "triton")
# What "auto" tries, in this order.
_ON_CPU, _ON_GPU = ("native", "eager"), ("cuda", "triton", "eager")
_MODULES = {
    "eager": "sipo_kernels.backends.eager",
    "triton": "sipo_kernels.backends.triton.launch",
    "native": "sipo_kernels.backends.native",
    "cuda": "sipo_kernels.backends.cuda.launch",
}
_WARNED: set[str] = set()
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class BackendWarning(RuntimeWarning):
    """A compiled library was refused, and another backend runs in its place."""


class BackendStatus(NamedTuple):
    """One line of ``sipo doctor``: a backend, whether it can run, else why not and what would help."""

    name: str
    available: bool
    reason: str
    remedy: str


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True", "on")


def _cuda_status(device_type: str) -> BackendStatus:
    if cuda.EMULATED is not None and device_type == "cpu":
        return BackendStatus("cuda", True, "the kernels on the CPU, for tests", "")
    if device_type != "cuda":
        reason = f"it needs an NVIDIA GPU and the tensors are on {'the CPU' if device_type == 'cpu' else device_type}"
        return BackendStatus("cuda", False, reason, "use 'auto'")
    if torch.version.hip is not None:
        reason = "it needs an NVIDIA GPU and this torch is for AMD's"
        return BackendStatus("cuda", False, reason, "use 'triton' or 'auto'")
    if torch.version.cuda is None:
        reason = "it needs an NVIDIA GPU and this torch was built without CUDA"
        return BackendStatus("cuda", False, reason, "install a CUDA build of torch, or use 'auto'")
    if cuda.LIBRARY is None:
        remedy = cuda.REMEDY or build_info.part("cuda").get("remedy", build_info.REINSTALL)
        return BackendStatus("cuda", False, cuda.REASON, remedy)
    if problem := cuda.problem(torch.cuda.current_device()):
        remedy = "rebuild for this GPU or update its driver: see SIPO_CUDA_ARCHS in setup.py; or use 'auto'"
        return BackendStatus("cuda", False, f"the driver says: {problem}", remedy)
    return BackendStatus("cuda", True, cuda.REASON, "")


def status(name: str, device_type: str) -> BackendStatus:
    """Whether backend ``name`` can run on tensors of ``device_type`` ("cpu", "cuda", ...)."""
    if name == "eager":
        return BackendStatus(name, True, "plain torch, any device", "")
    if name == "native":
        if device_type != "cpu":
            reason = f"it is CPU code and the tensors are on {device_type}"
            return BackendStatus(name, False, reason, "use 'cuda', 'triton' or 'auto'")
        if native.LIBRARY is None:
            remedy = native.REMEDY or build_info.part("cpu").get("remedy", build_info.REINSTALL)
            return BackendStatus(name, False, native.REASON, remedy)
        return BackendStatus(name, True, native.REASON, "")
    if name == "cuda":
        return _cuda_status(device_type)
    if not _HAS_TRITON:
        return BackendStatus(name, False, "Triton is not installed", "pip install 'sipo[triton]'")
    if device_type == "cpu" and not _interpreting():
        return BackendStatus(
            name,
            False,
            "the tensors are on the CPU, where Triton only runs in its interpreter",
            "use 'native' or 'auto', or set TRITON_INTERPRET=1 before Python starts, to test",
        )
    if device_type not in ("cuda", "xpu", "cpu"):
        return BackendStatus(name, False, f"Triton does not run on {device_type}", "use 'eager' or 'auto'")
    return BackendStatus(name, True, "Triton's interpreter" if device_type == "cpu" else "compiled on first use", "")


def statuses() -> list[tuple[str, BackendStatus]]:
    """Returns every backend on every device type present, for ``sipo doctor``: ``[(device type, status)]``."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [(device, status(name, device)) for device in devices for name in BACKENDS]


def _warn_once(message: str) -> None:
    if message in _WARNED:
        return
    _WARNED.add(message)
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("sipo", "sipo_kernels", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, BackendWarning, stacklevel=level)  # at the user's line


_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called at compile time instead of traced


def choose(backend: str, device: torch.device) -> str:
    """Resolves ``"auto"`` (or ``SIPO_BACKEND``) to a backend that can run on ``device``.

    Warns once if it passes over a compiled library that was refused.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: a named backend that cannot run, with the reason and the remedy.
    """
    check_choice("backend", backend, _CHOICES)
    source = "backend"
    if backend == "auto":
        backend = os.environ.get("SIPO_BACKEND", "auto")
        source = "SIPO_BACKEND"
        check_choice(source, backend, _CHOICES)
    if backend == "auto":
        for name in _ON_CPU if device.type == "cpu" else _ON_GPU:
            if (found := status(name, device.type)).available:
                return name
            if found.remedy and found.remedy in (native.REMEDY, cuda.REMEDY):
                _warn_once(f"the {name} backend is not used: {found.reason} ({found.remedy})")
    found = status(backend, device.type)
    if not found.available:
        raise RuntimeError(f"{source}={backend!r} cannot run: {found.reason} ({found.remedy})")
    return backend


def module(backend: str) -> ModuleType:
    """Returns the module of a backend: ``forward``, ``gradient``, and ``mend`` for those in ``FUSED``."""
    name = _MODULES[backend]
    return sys.modules.get(name) or importlib.import_module(name)
