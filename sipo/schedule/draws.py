"""Random noise levels to train on, in the distributions of diffusers' training scripts."""

from __future__ import annotations

import torch
from torch import Tensor

from sipo.schedule.levels import check_count
from sipo_kernels.options import check_choice

_DISTRIBUTIONS = {
    "discrete": ("uniform",),
    "flow": ("uniform", "logit_normal", "shifted", "shifted_logit_normal"),
}


def draw_levels(
    kind: str,
    num_train_timesteps: int,
    shift: float,
    n: int,
    generator: torch.Generator | None,
    distribution: str,
    device: torch.device | str | None,
) -> Tensor:
    """Draws for :meth:`sipo.NoiseSchedule.sample_levels`, which describes the arguments, result and errors."""
    check_count("n", n, 1)
    check_choice("distribution", distribution, _DISTRIBUTIONS[kind])
    drawn_on = torch.device(device or "cpu") if generator is None else generator.device
    out_device = drawn_on if device is None else torch.device(device)
    if kind == "discrete":
        u = torch.randint(num_train_timesteps, (n,), generator=generator, device=drawn_on)
    elif distribution.endswith("logit_normal"):
        u = torch.randn(n, generator=generator, device=drawn_on, dtype=torch.float32).sigmoid()
    else:
        u = 1 - torch.rand(n, generator=generator, device=drawn_on, dtype=torch.float32)  # rand is in [0, 1)
    if distribution.startswith("shifted"):  # the shift keeps 0 and 1 where they are
        u = (shift * u / (1 + (shift - 1) * u)).clamp(max=1)
    return u.to(out_device)
