"""The list of checks, whole: importing the modules that fill it."""

import subprocess

from benchmarks.gpu_check import calls, device, sanitizer, values
from benchmarks.gpu_check.context import CHECKS, Check, Context, from_tests
from sipo_kernels.backends.cuda import launch as cuda

__all__ = ["CHECKS", "Check", "Context", "calls", "device", "emulate_cuda", "sanitizer", "values"]


def emulate_cuda() -> str:
    """For a rehearsal: lets backend ``cuda`` run on the CPU, on the emulator of the tests; why not, if it cannot."""
    try:
        emulation = from_tests("emulation")
        if emulation.compiler() is None:
            return "there is no C++ compiler for the tests' emulator"
        cuda.LIBRARY, cuda.REASON = cuda._load(emulation.library())
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        return f"the tests' emulator does not build: {error}"
    cuda.EMULATED = emulation.SMALL
    return ""
