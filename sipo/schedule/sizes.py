"""Noise schedules that depend on the size of a sample, as those with dynamic shifting do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sipo.schedule.noise_schedule import NoiseSchedule


class SizeDependentSchedule(NoiseSchedule):
    """A flow whose shift depends on the size of the sample.

    α, σ and targets are the same at every size. Levels to be drawn and ``ratio_scale`` are those of the first size:
    :func:`schedule_for` gives the schedule of another. :class:`sipo.SIPOLoss` asks it.

    Args:
        schedules: Flows that differ in ``shift`` alone, by height and width of a sample.
    """

    def __init__(self, schedules: Mapping[tuple[int, int], NoiseSchedule]) -> None:
        """Takes at least one schedule."""
        first = next(iter(schedules.values()))
        super().__init__(
            "flow",
            prediction_type=first.prediction_type,
            num_inference_steps=first.num_inference_steps,
            num_train_timesteps=first.num_train_timesteps,
            shift=first.shift,
            shift_terminal=first.shift_terminal,
            invert_sigmas=first.invert_sigmas,
        )
        self.schedules = dict(schedules)

    def settings(self) -> dict[str, Any]:
        """Returns those of :class:`NoiseSchedule` with every size's shift in place of one."""
        shifts = {f"{h}x{w}": each.settings()["shift"] for (h, w), each in self.schedules.items()}
        return super().settings() | {"shift": shifts}


def schedule_for(schedule: Any, samples: Tensor) -> Any:
    """Returns the schedule of samples of one size; any but a :class:`SizeDependentSchedule` itself.

    Args:
        schedule: A :class:`NoiseSchedule`, or one of a user's own.
        samples: ``[..., H, W]``.

    Raises:
        ValueError: A size that the schedule does not have.
    """
    if not isinstance(schedule, SizeDependentSchedule):
        return schedule
    size = tuple(samples.shape[-2:])
    if size not in schedule.schedules:
        sizes = ", ".join(str(list(each)) for each in schedule.schedules)
        raise ValueError(f"samples of size {list(size)}: expected one that the noise schedule has a shift for, {sizes}")
    return schedule.schedules[size]
