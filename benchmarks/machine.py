"""What measured numbers depend on: processor, GPU, caches, versions, date, commit. Reads settings, changes none."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
# Cores busy with other processes from which on a measurement is marked as disturbed.
BUSY_CORES = 0.1


def default_device() -> str:
    """Returns ``"cuda"`` where torch sees a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def cache_bytes(device: str) -> int:
    """Returns the size of the last cache before memory: a GPU's L2, a CPU's largest (32 MiB if unknown)."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(text[:-1]) << 10 for text in map(_read, files) if text.endswith("K")), default=32 << 20)


def describe(device: str) -> dict[str, Any]:
    """Describes the machine, for every results file.

    Args:
        device: ``"cuda"`` or ``"cpu"``.

    Returns:
        JSON-ready fields. ``device`` names what was measured; GPU fields are present for ``"cuda"`` only. ``clocks``
        is what nvidia-smi reads at this moment: the card is measured as it is found.
    """
    facts: dict[str, Any] = {
        "device": processor(),
        "device_type": torch.device(device).type,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_cache_mib": round(cache_bytes("cpu") / 2**20, 1),
        "memory_gib": round(memory_bytes("cpu") / 2**30, 1),
        "native": _native(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts.update(
            device=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            l2_mib=round(properties.L2_cache_size / 2**20, 1),
            gpu_memory_gib=round(properties.total_memory / 2**30, 1),
            cuda=torch.version.cuda or torch.version.hip,
            driver=_nvidia_smi("driver_version"),
            clocks=_nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"),
        )
    return facts


def caption(info: dict[str, Any]) -> str:
    """Returns one line for tables and pictures: device, versions, date, commit."""
    parts = [info["device"]]
    if info.get("device_type") == "cuda":
        parts.append(f"CUDA {info.get('cuda')}, driver {info.get('driver')}")
    else:
        parts.append(f"{info['threads']} thread{'s' * (info['threads'] != 1)}, native: {info.get('native')}")
    parts += [f"torch {info['torch']}", info["date"][:10], f"commit {info['commit']}"]
    return " · ".join(parts)


def memory_bytes(device: str) -> int:
    """Returns the memory that can be had now: free on a GPU, available on a CPU (0 if the system does not say)."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = re.search(r"^MemAvailable: *(\d+)", _read(Path("/proc/meminfo")), re.MULTILINE)
    return int(available[1]) << 10 if available else 0


def disturbed(entries: Sequence[Mapping[str, Any]]) -> int:
    """Returns how many entries of a results file were measured while other processes were busy."""
    return sum((entry.get("others_cores") or 0) > BUSY_CORES for entry in entries)


class OthersLoad:
    """How many cores other processes kept busy over a stretch of time: a shared machine's numbers say less.

    Reads ``/proc/stat``; ``None`` where there is none. Compile workers that run on count as others.
    """

    def __init__(self) -> None:
        self._start = self._snapshot()

    def cores(self) -> float | None:
        """Returns the average since the object was made."""
        now = self._snapshot()
        if now is None or self._start is None:
            return None
        wall, others = (b - a for a, b in zip(self._start, now, strict=True))
        return round(max(others, 0.0) / max(wall, 1e-9), 3)

    @staticmethod
    def _snapshot() -> tuple[float, float] | None:
        """Wall seconds, and CPU seconds of everybody but this process (steal by other virtual machines included)."""
        line = _read(Path("/proc/stat")).partition("\n")[0].split()
        if len(line) < 9 or line[0] != "cpu":
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(text) for text in line[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy - own.user - own.system


def processor() -> str:
    """Returns the CPU's model name."""
    names = re.findall(r"^model name\s*: (.*)", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return names[0].strip() if names else platform.processor() or platform.machine()


def commit() -> str:
    """Returns the short hash, with ``+changes`` for an edited tree; ``SIPO_COMMIT`` without git, else ``"unknown"``."""

    def git(*args: str) -> str:
        try:
            done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("SIPO_COMMIT", "unknown")
    # Results are written while the suite runs, and change no code.
    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return head + ("+changes" if changed else "")


def _native() -> str:
    try:
        from sipo_kernels.backends import native
    except ImportError as error:
        return str(error)
    return native.REASON


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(fields: str) -> str | None:
    """Runs a query, which changes nothing; ``None`` if the tool does not exist or does not answer."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
