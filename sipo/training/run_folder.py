"""Finds what an earlier run has left in ``training.output_dir``, so that no other run starts there by mistake."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sipo.files import remove
from sipo.training import storage
from sipo.training.config import TrainingConfig
from sipo.training.log import check_logs
from sipo.training.sums import PROMPTS, remove_run_sums
from sipo.training.trackers import TENSORBOARD

WEIGHTS = "weights"
"""Folder in ``training.output_dir`` that ``sipo train`` writes the trained weights to when a run ends."""


@dataclass(frozen=True)
class EarlierRun:
    """A run's files in a folder; false where there are none.

    Attributes:
        checkpoints: oldest first, sound or not.
        log: ``metrics.jsonl``, unless it is absent or empty.
        weights: the folder of trained weights, if it exists.
    """

    checkpoints: list[Path]
    log: Path | None
    weights: Path | None

    def __bool__(self) -> bool:
        return bool(self.checkpoints or self.log or self.weights)

    def __str__(self) -> str:
        names = [f"{path.parent.name}/{path.name}" for path in self.checkpoints[-1:]]
        return ", ".join([*names, *(path.name for path in (self.log, self.weights) if path is not None)])


def earlier_run(config: TrainingConfig) -> EarlierRun:
    """Looks for a run in ``config.folder``; clears what killed runs have left half-written there.

    Raises:
        FileError: something else than a file stands in the place of a log.
    """
    storage.clear(config.folder)  # may give a checkpoint its name back
    logs, weights = check_logs(config), config.folder / WEIGHTS
    log = config.metrics_path if config.metrics_path in logs and config.metrics_path.stat().st_size else None
    return EarlierRun(storage.list_checkpoints(config.checkpoints), log, weights if weights.exists() else None)


def remove_run(config: TrainingConfig) -> list[str]:
    """Removes what a run has written to ``config.folder``, TensorBoard's events included.

    Other files stay: reports, exported weights, and the renamed logs of runs before that one.

    Returns:
        Names of what was removed, in the order in which a run writes it.
    """
    folder, removed = config.folder, []
    samples, events = (folder / PROMPTS).parent, folder / TENSORBOARD
    groups = {
        "checkpoints": storage.list_checkpoints(config.checkpoints),
        "metrics.jsonl": [config.metrics_path],
        "timesteps.jsonl": [config.statistics_path],
        samples.name: [folder / PROMPTS, *sorted(samples.glob("step-*.png")), *sorted(samples.glob("step-*.mp4"))],
        WEIGHTS: [folder / WEIGHTS],
        TENSORBOARD: list(events.glob("events.out.tfevents.*")),
    }
    remove_run_sums(folder)
    for name, paths in groups.items():
        paths = [path for path in paths if path.exists() or path.is_symlink()]
        for path in paths:
            remove(path)
        removed += [name] if paths else []
    for parent in (config.checkpoints, samples, events):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    return removed
