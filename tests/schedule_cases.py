"""Golden noise schedules, a Stable Diffusion scheduler's settings, and comparisons, for the tests of schedules."""

from __future__ import annotations

from typing import Any

import torch
from conftest import GOLDEN_FILES
from torch import Tensor

from sipo import NoiseSchedule
from sipo_kernels.testing import golden_ratio_scales

GOLDEN = golden_ratio_scales(GOLDEN_FILES)
BY_NAME = {case.name: case for case in GOLDEN}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALL_STEPS = torch.arange(1000)


def from_config(config: dict[str, Any]) -> NoiseSchedule:
    """Makes the schedule that a golden file describes."""
    options = {key: value for key, value in config.items() if key not in ("kind", "prediction")}
    if config["kind"] == "flow":
        return NoiseSchedule.flow(**options)
    return NoiseSchedule.discrete(prediction_type=config["prediction"], **options)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-10, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


def table(schedule: NoiseSchedule) -> Tensor:
    return schedule.ratio_scale(torch.arange(schedule.num_train_timesteps))


def latents(n: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, 3, 4, 2, generator=generator).to(dtype) for _ in range(2))  # type: ignore[return-value]
