"""What setup.py built and what it left out, from the record that it wrote beside the library.

The Makefile runs this file as a script, which needs no torch: it prints what was left out, and fails if the library
does not fit the sources.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("_build_info.json")
BACKENDS = {"cpu": "native CPU", "cuda": "CUDA"}  # the backend that each part of the library is for
REINSTALL = "reinstall: pip install ."
_MISSING = {"cpu": "a C++ compiler", "cuda": "the CUDA toolkit"}


def read_record(path: Path) -> dict[str, Any]:
    """Returns what setup.py wrote to ``path``, or an empty dictionary where there is nothing readable."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def part(name: str) -> dict[str, Any]:
    """Returns what the build recorded of one part of the native library.

    Args:
        name: ``"cpu"`` or ``"cuda"``.

    Returns:
        ``built``; if true, ``compiler`` (its version), ``flags``, and ``isas`` (CPU) or ``archs`` (CUDA); if false,
        ``reason`` and ``remedy``, a line each.
    """
    try:
        parts = read_record(RECORD)["parts"]
        found: dict[str, Any] = {"built": False, "reason": "the build knew of no such part", **parts.get(name, {})}
    except (KeyError, TypeError, AttributeError):
        return {"built": False, "reason": "the package was not built", "remedy": rebuild(RECORD.parents[1])}
    if not found["built"]:
        # The CUDA part is in the same library as the CPU part, and is never built alone.
        missing = _MISSING["cuda" if name == "cuda" and part("cpu")["built"] else "cpu"]
        # The reason names an environment variable of setup.py: the user's own choice, or a mistake in it.
        change = "change that" if "SIPO_" in found["reason"] else f"install {missing}"
        found["remedy"] = f"{change}, then {REINSTALL}"
    return found


def sources_digest(root: Path) -> str | None:
    """Returns a digest of the C++ sources of the library below ``root/csrc``, or None where there are none."""
    files = sorted(path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    digest = hashlib.sha256()
    for path in files:
        if path.parent.name != "emulation":  # for tests, and no part of the library
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest() if files else None


def rebuild(root: Path) -> str:
    """Returns how to build a library that is missing or cannot be used: only a checkout has the sources for it."""
    return "rebuild: make setup" if sources_digest(root) else REINSTALL


def fits(library: Path, root: Path) -> bool:
    """Returns whether ``library`` exists and was made from the sources below ``root``."""
    return library.exists() and str(sources_digest(root)).encode() in library.read_bytes()


def main() -> None:
    """Prints the parts that were left out; exits with an error if the library does not fit the sources."""
    for name, backend in BACKENDS.items():
        if not (found := part(name))["built"]:
            print(f"sipo: the {backend} backend is left out: {found['reason']}")
    record = read_record(RECORD)
    library = record.get("library")
    if "library" not in record or (library is not None and not fits(RECORD.with_name(library), RECORD.parents[1])):
        sys.exit("sipo: the native library does not fit the sources in csrc/")


if __name__ == "__main__":
    main()
