"""Builds the CUDA kernels for the CPU, against the emulator of CUDA in csrc/emulation, and describes a small GPU.

Tests and the rehearsal of ``benchmarks.gpu_check`` use it; it needs a checkout, because a wheel has no csrc/. It shows
that the kernels' arithmetic is right, and that blocks which wait for one another all finish, with the same numbers in
whatever order blocks and threads run. It cannot show effects of weak memory ordering, or speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from sipo_kernels.backends.cuda.plan import Gpu

ROOT = Path(__file__).resolve().parents[3]
SOURCE = "csrc/cuda/pair_loss.cu"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]

# Few blocks, and little room on the chip: batches of a few thousand elements make several groups, some of their tiles
# held in shared memory and some not.
SMALL = Gpu(
    sms=3, l2_bytes=64 << 10, shared_bytes_per_sm=2 * (1024 + 1024 + 3 * 10240), shared_bytes_per_block=40 << 10
)


def compiler() -> str | None:
    """Returns the C++ compiler, or ``None`` if there is none."""
    return next(filter(None, map(shutil.which, ("g++", "c++"))), None)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Returns the library of emulated kernels, which is built once for each state of the sources."""
    sources = sorted([*(ROOT / "csrc").rglob("*.h"), ROOT / SOURCE])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + repr(FLAGS).encode()).hexdigest()
    built = Path(tempfile.gettempdir()) / f"sipo-emulated-{os.getuid()}-{digest[:16]}.so"
    if not built.exists():
        command = compiler()
        assert command is not None
        aside = built.with_suffix(f".{os.getpid()}")
        include = ["-DSIPO_EMULATE", "-Icsrc", "-Icsrc/emulation", "-x", "c++", SOURCE, "-o", str(aside)]
        subprocess.run([command, *FLAGS, *include], cwd=ROOT, check=True)
        os.replace(aside, built)
    found = ctypes.CDLL(str(built))
    found.sipo_emulate_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_double]
    pointer = ctypes.c_void_p
    found.sipo_emulate_watch.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t, ctypes.c_int, pointer, pointer]
    found.sipo_emulate_watch_kind.argtypes = [ctypes.c_int, ctypes.c_int, pointer]
    return found
