"""Whether a long run's memory grows: training in a process of its own, looked at a few times on the way.

``python -m benchmarks.training_memory STEPS DEVICE`` is that process; it prints one JSON object. The run is one as users
have it: log lines, TensorBoard where it is installed, checkpoints, the toy SD1.5 and a cache of toy pairs.
"""

from __future__ import annotations

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

SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)  # of the steps; the first look is at a run that still warms up
LIMIT_MB = 1.0  # per 1,000 steps: 100 log lines that the result keeps are 0.1 MB
BATCH_SIZE = 2


def growth(steps: int, device: str) -> tuple[dict[str, Any] | None, str]:
    """Trains for ``steps`` steps in a new process.

    Returns:
        ``{"steps", "looks", "growth_mb_per_1000_steps", "limit_mb", "met"}``, or ``None`` and why not.
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


def summarise(looks: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth by the straight line through all looks but the first.

    Args:
        looks: in the order of their ``step``, with ``rss_mb``.
    """
    warm = looks[1:]
    line = statistics.linear_regression([look["step"] for look in warm], [look["rss_mb"] for look in warm])
    slope = 1000 * line.slope
    return {
        "steps": looks[-1]["step"],
        "looks": looks,
        "growth_mb_per_1000_steps": slope,
        "limit_mb": LIMIT_MB,
        "met": slope <= LIMIT_MB,
    }


def print_growth(memory: dict[str, Any]) -> None:
    """A line: resident memory at each look, and how fast it grows."""
    looks = ", ".join(f"{look['step']}: {look['rss_mb']:.1f}" for look in memory["looks"])
    slope, limit = memory["growth_mb_per_1000_steps"], memory["limit_mb"]
    print(
        f"memory of the process in MB after steps {looks}; {slope:+.2f} MB per 1,000 steps "
        f"(limit {limit:g}, {'met' if memory['met'] else 'missed'})",
        flush=True,
    )


def watch(steps: int, device: str, folder: Path) -> list[dict[str, Any]]:
    """Trains and looks; runs in the new process."""
    from accelerate import Accelerator

    from benchmarks.training_setup import TrainingCase, frozen_copy, make_setup
    from sipo import SIPOLoss
    from sipo.training import TrainingConfig, train

    setup = make_setup(TrainingCase("SD1.5", "sd15", BATCH_SIZE, pixels=(32, 32, 1)), device, folder)
    policy = setup.base.requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    moments = {max(1, round(share * steps)) for share in SHARES}
    looks: list[dict[str, Any]] = []
    done = 0

    def look(*_: object) -> None:
        nonlocal done
        done += 1
        if done not in moments:
            return
        gc.collect()
        found = {"step": done, "rss_mb": resident_mb(), "python_objects": len(gc.get_objects())}
        if device == "cuda":
            torch.cuda.synchronize()
            found["device_mb"] = torch.cuda.memory_allocated() / 1e6
        looks.append(found)

    optimizer.register_step_post_hook(look)
    config = TrainingConfig(
        steps=steps, output_dir=folder / "run", batch_size=BATCH_SIZE, progress=False, checkpoint_every=max(1, steps // 8)
    )
    loss = SIPOLoss(setup.schedule)
    train(
        policy,
        frozen_copy(setup),
        loss,
        setup.pairs,
        setup.predict,
        config,
        optimizer=optimizer,
        accelerator=Accelerator(cpu=device == "cpu"),
    )
    return looks


def resident_mb() -> float:
    """This process's resident memory in MB (1e6 bytes); its highest so far where the system has no ``/proc``."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        looks = watch(int(sys.argv[1]), sys.argv[2], Path(folder))
    print(json.dumps(looks))


if __name__ == "__main__":
    main()
