"""Builds csrc/cuda for the CPU, on the stand-in for CUDA in tests/cuda_emulation, and describes a small GPU for it.

What it shows: the kernels' arithmetic, and that the schedule of blocks, with its waiting, comes to an end and to the
same numbers whatever order blocks and threads run in. What it cannot show: weak memory ordering, and speed.
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

ROOT = Path(__file__).parent.parent
SOURCE = "csrc/cuda/pair_loss.cu"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]

# Few blocks, and little room on the chip: batches of a few thousand elements make several groups, some of their tiles
# held in shared memory and some not.
SMALL = Gpu(
    sms=3, l2_bytes=64 << 10, shared_bytes_per_sm=2 * (1024 + 1024 + 3 * 10240), shared_bytes_per_block=40 << 10
)


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return next(filter(None, map(shutil.which, ("g++", "c++"))), None)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The emulated kernels, built once for each state of the sources."""
    sources = sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "tests/cuda_emulation").glob("*.h"), ROOT / SOURCE])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + repr(FLAGS).encode()).hexdigest()
    built = Path(tempfile.gettempdir()) / f"sipo-emulated-{os.getuid()}-{digest[:16]}.so"
    if not built.exists():
        command = compiler()
        assert command is not None
        aside = built.with_suffix(f".{os.getpid()}")
        include = ["-DSIPO_EMULATE", "-Icsrc", "-Itests/cuda_emulation", "-x", "c++", SOURCE, "-o", str(aside)]
        subprocess.run([command, *FLAGS, *include], cwd=ROOT, check=True)
        os.replace(aside, built)
    found = ctypes.CDLL(str(built))
    found.sipo_emulate_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_double]
    pointer = ctypes.c_void_p
    found.sipo_emulate_watch.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t, ctypes.c_int, pointer, pointer]
    found.sipo_emulate_watch_kind.argtypes = [ctypes.c_int, ctypes.c_int, pointer]
    return found
