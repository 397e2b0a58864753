"""Whether a long run's memory grows: training in a process of its own, whose memory is read a few times.

``python -m benchmarks.training_memory STEPS DEVICE`` is that process; it prints one JSON object. The run is one as
users have it: log lines, TensorBoard where it is installed, checkpoints, the toy SD1.5 and a cache of toy pairs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT

READINGS = 20
WARM = 0.25  # of the steps: what comes before is a run that warms up
TELLING = 1000  # steps from which on a slope says something
LIMIT_MB = 1.0  # per 1,000 steps: the 100 log lines that the result keeps are 0.1 MB, the rest is the allocator's noise
BATCH_SIZE = 2


def growth(steps: int, device: str) -> tuple[dict[str, Any] | None, str]:
    """Trains for ``steps`` steps in a new process.

    Returns:
        ``{"steps", "readings", "growth_mb_per_1000_steps", "limit_mb", "met"}``, or ``None`` and why not.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_memory", str(steps), device],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return None, (done.stderr.strip() or "?").splitlines()[-1][:300]
    return summarise(json.loads(done.stdout.splitlines()[-1])), ""


def summarise(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth by the line through the readings of the warm run; ``"met"`` is ``None`` for a run too short to tell.

    Args:
        readings: in the order of their ``step``, with ``rss_mb``.
    """
    steps = readings[-1]["step"]
    warm = [reading for reading in readings if reading["step"] >= WARM * steps]
    line = statistics.linear_regression([reading["step"] for reading in warm], [reading["rss_mb"] for reading in warm])
    slope = 1000 * line.slope
    return {
        "steps": steps,
        "readings": readings,
        "growth_mb_per_1000_steps": slope,
        "limit_mb": LIMIT_MB,
        "met": slope <= LIMIT_MB if steps >= TELLING else None,
    }


def print_growth(memory: dict[str, Any]) -> None:
    """A line: resident memory at each reading, and how fast it grows."""
    shown = memory["readings"][:: max(1, len(memory["readings"]) // 4)] + memory["readings"][-1:]
    readings = ", ".join(f"{reading['step']}: {reading['rss_mb']:.1f}" for reading in shown)
    verdict = {True: "met", False: "missed", None: "too short a run to tell"}[memory["met"]]
    slope = memory["growth_mb_per_1000_steps"]
    print(
        f"memory of the process in MB after steps {readings}; {slope:+.2f} MB per 1,000 steps (limit "
        f"{memory['limit_mb']:g}: {verdict})",
        flush=True,
    )


def watch(steps: int, device: str, folder: Path) -> list[dict[str, Any]]:
    """Trains and reads the memory; runs in the new process."""
    from accelerate import Accelerator

    from benchmarks.training_setup import TrainingCase, make_setup, reference_for
    from sipo import SIPOLoss
    from sipo.training import TrainingConfig, train

    case = TrainingCase("SD1.5", "sd15", BATCH_SIZE, pixels=(32, 32, 1))
    setup = make_setup(case, device, folder)
    reference = reference_for(setup.base, case)
    policy = setup.base.requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    moments = {max(1, steps * number // READINGS) for number in range(1, READINGS + 1)}
    readings: list[dict[str, Any]] = []
    done = 0

    def read_memory(*_: object) -> None:
        nonlocal done
        done += 1
        if done not in moments:
            return
        gc.collect()
        _give_back()
        reading = {"step": done, "rss_mb": resident_mb(), "python_objects": len(gc.get_objects())}
        if device == "cuda":
            torch.cuda.synchronize()
            reading["device_mb"] = torch.cuda.memory_allocated() / 1e6
        readings.append(reading)

    optimizer.register_step_post_hook(read_memory)
    config = TrainingConfig(
        max_train_steps=steps,
        output_dir=folder / "run",
        train_batch_size=BATCH_SIZE,
        progress=None,
        checkpointing_steps=max(1, steps // 8),
    )
    accelerator = Accelerator(cpu=device == "cpu")
    loss = SIPOLoss(setup.schedule)
    train(policy, reference, loss, setup.pairs, setup.predict, config, optimizer=optimizer, accelerator=accelerator)
    return readings


def resident_mb() -> float:
    """Returns this process's resident memory in MB (1e6 bytes); its highest so far if there is no ``/proc``."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _give_back() -> None:
    """Has glibc return freed memory to the system, so that what is left is in use; does nothing elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        readings = watch(int(sys.argv[1]), sys.argv[2], Path(folder))
    print(json.dumps(readings))


if __name__ == "__main__":
    main()
