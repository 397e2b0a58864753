"""A short training loop for preference alignment: any network, schedule and data that meet a small protocol.

Needs accelerate: ``pip install 'sipo[train]'``.
"""

from sipo.protocols import PairDataset, PairLoss, PairLossResult, Predict, Schedule
from sipo.training.config import (
    CheckpointError,
    TrainingAlarmError,
    TrainingConfig,
    TrainingDivergedError,
    TrainingInterruptedError,
    TrainingMismatchError,
    TrainingOutOfMemoryError,
    TrainingWarning,
)
from sipo.training.forward import AdapterOff, ReferenceModel
from sipo.training.loop import TrainingResult, train
from sipo.training.preparation import make_accelerator
from sipo.training.sharding import gather_weights, is_sharded
from sipo.training.validation import OnValidation

__all__ = [
    "AdapterOff",
    "CheckpointError",
    "OnValidation",
    "PairDataset",
    "PairLoss",
    "PairLossResult",
    "Predict",
    "ReferenceModel",
    "Schedule",
    "TrainingAlarmError",
    "TrainingConfig",
    "TrainingDivergedError",
    "TrainingInterruptedError",
    "TrainingMismatchError",
    "TrainingOutOfMemoryError",
    "TrainingResult",
    "TrainingWarning",
    "gather_weights",
    "is_sharded",
    "make_accelerator",
    "train",
]
