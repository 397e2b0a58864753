"""How far the previous level of docs/math.md §3 is from the one that diffusers' samplers go to.

For every step but the last of a sampler with 50 steps: §3's ``ratio_scale`` at the level it is at, over
½ (SNR(t') − SNR(t)) · x0_factor(t) with the level t' that it goes to next. The log ratio is off by the same factor.

    python -m benchmarks.previous_level
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sipo import NoiseSchedule
from sipo.batch import level_argument

STEPS = 50


class LevelComparison(NamedTuple):
    """One sampler: what it is, and ``ratio_scale`` over the exact value, step by step, the noisiest first."""

    name: str
    factors: list[float]

    def cells(self) -> list[str]:
        """Returns the smallest and the largest of the first and last step that is not terminal."""
        first, *_, last = self.factors
        return [f"{value:.3f}" for value in (first, last, min(self.factors), max(self.factors))]


def sigmas_of(scheduler: Any) -> Tensor:
    """Returns the levels that a sampler visits, the last 0: σ of a flow, σ/α of a discrete schedule; float64."""
    if hasattr(scheduler, "sigmas"):
        return torch.as_tensor(scheduler.sigmas, dtype=torch.float64).unique_consecutive()
    # DDIM's and PNDM's step is T // steps, whatever the spacing
    cumprod = scheduler.alphas_cumprod.double()
    timesteps = scheduler.timesteps.unique_consecutive().clamp(max=len(cumprod) - 1)
    return torch.cat([((1 - cumprod) / cumprod)[timesteps].sqrt(), torch.zeros(1, dtype=torch.float64)])


def compare(name: str, scheduler: Any, **options: Any) -> LevelComparison:
    """Sets a scheduler's steps and compares every step that neither side has as terminal."""
    schedule = NoiseSchedule.from_scheduler(scheduler, STEPS, mu=options.get("mu"))
    scheduler.set_timesteps(**(options or {"num_inference_steps": STEPS}))
    sigma = sigmas_of(scheduler)
    if schedule.kind == "flow":
        levels, snr = sigma[:-1].float(), ((1 - sigma) / sigma) ** 2
        factor = sigma[:-1] ** 2
    else:
        cumprod = scheduler.alphas_cumprod.double()
        table = ((1 - cumprod) / cumprod).sqrt()
        levels = (table[None] - sigma[:-1, None]).abs().argmin(1)  # some levels are between whole timesteps
        snr = sigma**-2.0
        alpha_sq = 1 / (1 + sigma[:-1] ** 2)
        factor = (1 - alpha_sq) / alpha_sq if schedule.prediction_type == "epsilon" else 1 - alpha_sq
    exact = 0.5 * (snr[1:] - snr[:-1]) * factor
    ours = schedule.ratio_scale(**level_argument(schedule, levels))
    both = exact.isfinite() & ours.isfinite() & (ours > 0)
    return LevelComparison(name, (ours / exact)[both].tolist())


def rows() -> list[LevelComparison]:
    """Returns the samplers of the families' published models, and others that users put in their place."""
    import diffusers as d

    sd: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    leading: dict[str, Any] = {**sd, "timestep_spacing": "leading", "steps_offset": 1}
    cog: dict[str, Any] = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    flow: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    qwen: dict[str, Any] = {"use_dynamic_shifting": True, "shift_terminal": 0.02}
    uniform: dict[str, Any] = {"sigmas": np.linspace(1, 1 / STEPS, STEPS).tolist()}
    euler = d.FlowMatchEulerDiscreteScheduler
    return [
        compare("PNDM, as in SD 1.5", d.PNDMScheduler(**leading, skip_prk_steps=True)),
        compare("Euler, leading, as in SDXL", d.EulerDiscreteScheduler(**leading)),
        compare("DDIM, trailing, as in CogVideoX", d.CogVideoXDDIMScheduler(**cog, snr_shift_scale=3.0)),
        compare("Euler, linspace", d.EulerDiscreteScheduler(**sd)),
        compare("DPM-Solver++, linspace", d.DPMSolverMultistepScheduler(**sd)),
        compare("DPM-Solver++, Karras", d.DPMSolverMultistepScheduler(**sd, use_karras_sigmas=True)),
        compare("FlowMatchEuler, shift 3, as in SD 3", euler(shift=3.0)),
        compare("the same with σ = 1, …, 1/50 given, as Z-Image", euler(shift=3.0), **uniform),
        compare("the same with μ = 0.7, as FLUX", euler(use_dynamic_shifting=True), mu=0.7, **uniform),
        compare("the same, stretched to 0.02, as Qwen-Image", euler(**qwen), mu=0.7, **uniform),
        compare("UniPC, flow_shift 3, as in Wan", d.UniPCMultistepScheduler(**flow)),
        compare("DPM-Solver++, flow_shift 3, as in SANA", d.DPMSolverMultistepScheduler(**flow)),
    ]


def markdown() -> str:
    """Returns the table of docs/math.md §3."""
    head = "| sampler | first step | last step | smallest | largest |\n|---|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join([row.name, *row.cells()])} |\n" for row in rows())


if __name__ == "__main__":
    print(markdown(), end="")
