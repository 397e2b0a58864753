"""Noise schedules (docs/math.md §3): their levels, and what diffusers' schedulers say about them."""

from sipo.schedule.diffusers_schedulers import empirical_mu, linear_mu
from sipo.schedule.noise_schedule import DEFAULT_INFERENCE_STEPS, NoiseSchedule
from sipo.schedule.sizes import SizeDependentSchedule, schedule_for

__all__ = [
    "DEFAULT_INFERENCE_STEPS",
    "NoiseSchedule",
    "SizeDependentSchedule",
    "empirical_mu",
    "linear_mu",
    "schedule_for",
]
