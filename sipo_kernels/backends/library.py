"""What Python and the compiled library must agree on, and the check that they do.

``csrc/describe.h`` makes the same text from the enumerations and structures of C++.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from sipo_kernels.build_info import sources_digest
from sipo_kernels.layout import DTYPES
from sipo_kernels.options import LOSS_TYPES, METHODS, RATIOS
from sipo_kernels.output import METRICS, SAMPLE_ROWS, STATISTICS

REBUILD = "rebuild: make setup"


def _fields(structure: type[ctypes.Structure]) -> str:
    described = [(field[0], getattr(structure, field[0])) for field in structure._fields_]
    placed = [f"{name}@{field.offset}:{field.size}" for name, field in described]
    return " ".join([*placed, f"={ctypes.sizeof(structure)}"])


def description(settings: type[ctypes.Structure], arguments: type[ctypes.Structure], counts: str = "") -> str:
    """Returns the text that a library built from sources of this version has.

    Args:
        settings: Structure of the settings of a call.
        arguments: Structure of all arguments.
        counts: A line about thread counts, for the CUDA part.
    """
    lists = {
        "methods": METHODS,
        "ratios": RATIOS,
        "loss types": LOSS_TYPES,
        "sample rows": SAMPLE_ROWS,
        "metrics": METRICS,
        "statistics": STATISTICS,
        "element types": [str(dtype).removeprefix("torch.") for dtype in DTYPES],
    }
    lines = [f"{name} {''.join(value + ',' for value in values)}" for name, values in lists.items()]
    lines += [f"settings {_fields(settings)}", *([counts] if counts else []), f"arguments {_fields(arguments)}"]
    return "".join(line + "\n" for line in lines)


def difference(built: str, expected: str) -> str | None:
    """Returns why a library with the description ``built`` does not fit ``expected``, in one line, or None."""
    if built == expected:
        return None
    theirs = built.splitlines()
    for line in expected.splitlines():
        if line not in theirs:
            return f"the native library has other {line.split(' ')[0]} than this version; {REBUILD}"
    return f"the native library has another layout than this version; {REBUILD}"


def stale(built_from: str, root: Path) -> str | None:
    """Returns why a library is older than the sources below ``root``, or None; without sources nothing is compared."""
    at_hand = sources_digest(root)
    if at_hand is None or at_hand == built_from:
        return None
    return f"the native library was built from other sources than csrc/ has now; {REBUILD}"
