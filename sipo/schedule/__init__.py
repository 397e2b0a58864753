"""Noise schedules (docs/math.md §3): their levels, and what diffusers' schedulers say about them."""

from sipo.schedule.diffusers_schedulers import empirical_mu, linear_mu
from sipo.schedule.noise_schedule import DEFAULT_INFERENCE_STEPS, NoiseSchedule

__all__ = ["DEFAULT_INFERENCE_STEPS", "NoiseSchedule", "empirical_mu", "linear_mu"]
