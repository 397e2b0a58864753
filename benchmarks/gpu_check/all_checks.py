"""The list of checks, whole: importing the modules that fill it."""

import subprocess

from benchmarks.gpu_check import calls, device, sanitizer, values
from benchmarks.gpu_check.context import CHECKS, Check, Context
from sipo_kernels.backends.cuda import emulation
from sipo_kernels.backends.cuda import launch as cuda

__all__ = ["CHECKS", "Check", "Context", "calls", "device", "emulate_cuda", "sanitizer", "values"]


def emulate_cuda() -> str:
    """Lets the backend ``cuda`` run on the CPU, on the emulator, for a rehearsal.

    Returns:
        Why it cannot, or an empty string.
    """
    try:
        if emulation.compiler() is None:
            return "there is no C++ compiler for the emulator"
        cuda.LIBRARY, cuda.REASON, cuda.REMEDY = cuda._load(emulation.library())
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        return f"the emulator does not build: {error}"
    cuda.EMULATED = emulation.SMALL
    return ""
