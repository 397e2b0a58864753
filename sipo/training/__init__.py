"""Training loop for preference alignment of any network, schedule and data set that meet ``sipo.protocols``.

Needs accelerate: ``pip install 'sipo[train]'``. The settings alone do not: what is not in ``sipo.training.config`` is
imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from sipo.training.forward import AdapterOff, ReferenceModel
    from sipo.training.loop import TrainingResult, train
    from sipo.training.preparation import make_accelerator
    from sipo.training.sharding import gather_weights, is_sharded
    from sipo.training.validation import OnValidation

__all__ = [
    "AdapterOff",
    "CheckpointError",
    "OnValidation",
    "ReferenceModel",
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

_MODULES = {
    "AdapterOff": "forward",
    "OnValidation": "validation",
    "ReferenceModel": "forward",
    "TrainingResult": "loop",
    "gather_weights": "sharding",
    "is_sharded": "sharding",
    "make_accelerator": "preparation",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
