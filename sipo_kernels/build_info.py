"""What setup.py built and what it left out, from the record that it wrote beside the library.

Run as a script (``make setup`` does), it prints what was left out, and needs no torch to do so.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("_build_info.json")
_REMEDIES = {
    "cpu": "install a C++ compiler, then reinstall: pip install .",
    "cuda": "install the CUDA toolkit, then reinstall: pip install .",
}


def part(name: str) -> dict[str, Any]:
    """What the build recorded of one part of the native library.

    Args:
        name: ``"cpu"`` or ``"cuda"``.

    Returns:
        ``built``; if true, ``compiler`` (its version), ``flags``, and ``isas`` (CPU) or ``archs`` (CUDA); if false,
        ``reason`` and ``remedy``, a line each.
    """
    try:
        parts = json.loads(RECORD.read_text(encoding="utf-8"))["parts"]
        found: dict[str, Any] = {"built": False, "reason": "the build knew of no such part", **parts.get(name, {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        reason = "the package was not built (from a checkout: python setup.py build_ext --inplace)"
        return {"built": False, "reason": reason, "remedy": "reinstall: pip install ."}
    if not found["built"]:
        # Without the CPU part there is no library for the others to be in.
        wanted = name if name == "cpu" or part("cpu")["built"] else "cpu"
        # An environment variable of setup.py's: the user's own choice, or a mistake in it.
        chosen = "SIPO_" in found["reason"]
        found["remedy"] = "change that, then reinstall: pip install ." if chosen else _REMEDIES[wanted]
    return found


def sources_digest(root: Path) -> str | None:
    """Returns a digest of the C++ sources below ``root/csrc``, or None where there are none, as in a wheel."""
    files = sorted(path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    made = hashlib.sha256()
    for path in files:
        made.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return made.hexdigest() if files else None


def main() -> None:
    for name, backend in (("cpu", "native CPU"), ("cuda", "CUDA")):
        found = part(name)
        if not found["built"]:
            print(f"sipo: the {backend} backend is left out: {found['reason']}")


if __name__ == "__main__":
    main()
