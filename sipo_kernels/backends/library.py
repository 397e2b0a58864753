"""Describes what Python and the compiled library must agree on, and checks that they do.

``csrc/describe.h`` makes the same text from the enumerations, structures and constants of C++.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch

from sipo_kernels.build_info import rebuild, sources_digest
from sipo_kernels.layout import DTYPES
from sipo_kernels.options import LOSS_TYPES, METHODS, RATIOS
from sipo_kernels.output import METRICS, SAMPLE_ROWS, STATISTICS

# In the order of their codes. Only noise levels may be integers.
ELEMENT_TYPES = (*DTYPES, torch.int64, torch.int32, torch.bool)
ROOT = Path(__file__).resolve().parents[2]
# By the code of ctypes: pointers, floating-point numbers and structures; all others are integers.
_KINDS = {"P": "p", "z": "p", "d": "f", "f": "f", "structure": "s"}


class LoadedLibrary(NamedTuple):
    """The library or a part of it, or the reason why it cannot be used.

    Attributes:
        library: None if it cannot be used.
        reason: How it runs, or why not, in one line.
        remedy: What to do about a library that was refused; empty if it was not.
    """

    library: ctypes.CDLL | None
    reason: str
    remedy: str = ""


def refused(reason: str) -> LoadedLibrary:
    """Returns that the library is refused, with the remedy."""
    return LoadedLibrary(None, reason, rebuild(ROOT))


def _fields(structure: type[ctypes.Structure]) -> str:
    text = ""
    for name, kind, *_ in structure._fields_:
        place = getattr(structure, name)
        text += f" {name}@{place.offset}:{_KINDS.get(getattr(kind, '_type_', 'structure'), 'i')}{place.size}"
    return f"{text} ={ctypes.sizeof(structure)}"


def description(constants: str = "", **structures: type[ctypes.Structure]) -> str:
    """Returns the text that a library built from sources of this version has.

    Args:
        constants: Constants of the CUDA part, in one line.
        structures: Every structure of the interface, under the name that the text has for it.
    """
    lists = {
        "methods": METHODS,
        "ratios": RATIOS,
        "loss types": LOSS_TYPES,
        "sample rows": SAMPLE_ROWS,
        "metrics": METRICS,
        "statistics": STATISTICS,
        "element types": [str(dtype).removeprefix("torch.") for dtype in ELEMENT_TYPES],
    }
    lines = [f"{name}: {''.join(value + ',' for value in values)}" for name, values in lists.items()]
    lines += [f"constants: {constants}"] if constants else []
    lines += [f"{name}:{_fields(structure)}" for name, structure in structures.items()]
    return "".join(line + "\n" for line in lines)


def difference(built: str, expected: str) -> str | None:
    """Returns why a library with the description ``built`` does not fit ``expected``, in one line, or None."""
    if built == expected:
        return None
    theirs = built.splitlines()
    other = [line.partition(":")[0] for line in expected.splitlines() if line not in theirs]
    return f"the native library has other {', '.join(other) or 'contents'} than this version"


def stale(built_from: str) -> str | None:
    """Returns why a library is older than the sources of a checkout, or None; a wheel has none to compare."""
    if sources_digest(ROOT) in (None, built_from):
        return None
    return "the native library was built from other sources than csrc/ has now"
