"""The noise levels of docs/math.md §3 as plain functions: ᾱ, ``ratio_scale`` and random draws.

They never subtract two large, nearly equal numbers: SNR(t) spans many orders of magnitude, and only the difference
between neighbouring levels matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sipo_kernels.options import check_choice

PREDICTIONS = {
    "discrete": ("epsilon", "v_prediction", "sample"),
    "flow": ("flow_prediction", "sample"),
}
"""What a network of each kind of schedule may predict, in diffusers' spelling."""

_DISTRIBUTIONS = {
    "discrete": ("uniform",),
    "flow": ("uniform", "logit_normal", "shifted", "shifted_logit_normal"),
}

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# How far from exact a given σ may be, in units of its type's machine epsilon: a handful of roundings.
ROUNDING = 4


class SettingError(ValueError):
    """A setting has a wrong value, or one that does not fit the scheduler; one line that begins with its name.

    Attributes:
        name: Of the setting.
    """

    def __init__(self, name: str, text: str) -> None:
        """Takes the name, and what follows it in the message."""
        super().__init__(name, text)
        self.name = name

    def __str__(self) -> str:
        return "".join(self.args)


def vp_alphas_cumprod(
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    snr_shift_scale: float,
    rescale_betas_zero_snr: bool,
) -> Tensor:
    """Returns ᾱ = α² of every level of a variance-preserving schedule, float64 ``[T]``.

    The arguments are those of :meth:`sipo.NoiseSchedule.discrete`.

    Raises:
        TypeError, ValueError: A value outside its range.
    """
    check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
    check_count("num_train_timesteps", num_train_timesteps, 2 if rescale_betas_zero_snr else 1)
    check_positive("snr_shift_scale", snr_shift_scale)
    if not 0 < beta_start <= beta_end < 1:
        given = f"beta_start={beta_start!r}, beta_end={beta_end!r}"
        raise ValueError(f"{given}: expected 0 < beta_start <= beta_end < 1")
    steps = num_train_timesteps
    if beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    else:
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        level = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    table = torch.cumprod(1 - betas, 0)
    # SNR / k, in terms of ᾱ = SNR / (1 + SNR)
    table = table / (snr_shift_scale + (1 - snr_shift_scale) * table)
    if rescale_betas_zero_snr:
        root = table.sqrt()
        table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return table


def checked_alphas_cumprod(alphas_cumprod: Tensor | Sequence[float]) -> Tensor:
    """Checks a given ᾱ of each level; returns it as a float64 tensor ``[T]`` on the CPU.

    Raises:
        ValueError: Not 1-D, empty, a value outside [0, 1] or larger than the one before.
    """
    # Straight to float64: the numbers of a list would otherwise pass through torch's default type.
    table = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").detach()
    if table.ndim != 1 or table.numel() == 0:
        raise ValueError(f"alphas_cumprod has shape {list(table.shape)}: expected [T] with T >= 1")
    most = torch.cat([table.new_ones(1), table[:-1]])
    wrong = ~((table >= 0) & (table <= most))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        given, limit = table[i].item(), most[i].item()
        raise ValueError(f"alphas_cumprod[{i}]={given!r}: expected a value in [0, {limit!r}], never rising")
    return table


def check_discrete(
    num_train_timesteps: int,
    shift: float,
    shift_terminal: float | None,
    invert_sigmas: bool,
    alphas_cumprod: Tensor | None,
) -> None:
    """Raises SettingError for an option of a flow, and ValueError where the table is missing or of another length."""
    given = {"shift": shift, "shift_terminal": shift_terminal, "invert_sigmas": invert_sigmas}
    for (name, value), default in zip(given.items(), (1, None, False), strict=True):
        if value != default:
            raise SettingError(name, f"={value!r}: expected it only for a flow schedule")
    if alphas_cumprod is None:
        raise ValueError(f"alphas_cumprod=None: expected the table [{num_train_timesteps}] of a discrete schedule")
    if list(alphas_cumprod.shape) != [num_train_timesteps]:
        shape = list(alphas_cumprod.shape)
        raise ValueError(f"alphas_cumprod has shape {shape}: expected [{num_train_timesteps}]")


def vp_tables(alphas_cumprod: Tensor, num_inference_steps: int, prediction_type: str) -> dict[str, Tensor]:
    """Returns ``alpha``, ``sigma`` and ``ratio_scale`` of every level, float64 ``[T]`` each, from ᾱ."""
    stride = alphas_cumprod.shape[0] // num_inference_steps
    now, previous = alphas_cumprod[stride:], alphas_cumprod[:-stride]
    # SNR' − SNR = (ᾱ' − ᾱ) / ((1 − ᾱ')(1 − ᾱ)); this is times σ² = 1 − ᾱ, the x0_factor of v-prediction
    scale = 0.5 * (previous - now) / (1 - previous)
    if prediction_type == "epsilon":
        # Infinite where the SNR is 0; 0 / 0 would be NaN where it is 0 at the previous level too.
        scale = torch.where(now == 0, torch.inf, scale / now)
    elif prediction_type == "sample":
        scale = scale / (1 - now)
    # If the previous level has no noise, the posterior is a point, as at the terminal step.
    scale = torch.where(previous == 1, torch.inf, scale)
    return {
        "alpha": alphas_cumprod.sqrt(),
        "sigma": (1 - alphas_cumprod).sqrt(),
        "ratio_scale": torch.cat([scale.new_full((stride,), torch.inf), scale]),
    }


def terminal_stretch(shift: float, num_inference_steps: int, shift_terminal: float | None) -> float:
    """Returns ``c`` of a flow's grid 1 − c (1 − σ), which makes ``shift_terminal`` its last level before 0 (§3).

    It is 1 without ``shift_terminal``: the grid is not stretched.

    Raises:
        TypeError, SettingError: ``shift_terminal`` outside (0, 1), or a sampler of one step, which has no such level.
    """
    if shift_terminal is None:
        return 1.0
    check_positive("shift_terminal", shift_terminal)
    if shift_terminal >= 1:
        raise SettingError("shift_terminal", f"={shift_terminal!r}: expected a number in (0, 1)")
    if num_inference_steps < 2:
        text = f"={num_inference_steps!r} with shift_terminal: expected at least 2"
        raise SettingError("num_inference_steps", text)
    return (1 - shift_terminal) * (num_inference_steps + shift - 1) / (num_inference_steps - 1)


def flow_ratio_scale(
    sigma: Tensor,
    shift: float,
    num_inference_steps: int,
    prediction_type: str,
    eps: float,
    stretch: float = 1.0,
    subtracted: bool = False,
) -> Tensor:
    """Returns ``ratio_scale`` of a rectified flow at σ in (0, 1], ``[N]``; NaN where σ is.

    Args:
        sigma: ``[N]``, float32 or wider; a value that rounding has carried above 1 counts as 1.
        shift: ``k``.
        num_inference_steps: Steps of the sampler.
        prediction_type: ``"flow"`` or ``"sample"``.
        eps: Machine epsilon of the type that σ was given in: u' ≤ 0, within its rounding, is the terminal step.
        stretch: ``c`` of :func:`terminal_stretch`; 1 for a grid that is not stretched.
        subtracted: Whether σ is the result of a subtraction from 1, so that its error is eps and not eps · σ.
    """
    step = 1 / num_inference_steps
    sigma = sigma.clamp(max=1)
    distance = 1 - sigma
    # σ before the stretch, and its distance from 1; below 0 there, the step is terminal.
    unstretched = sigma if stretch == 1 else (1 - distance / stretch).clamp(min=0)
    unstretched_distance = distance if stretch == 1 else 1 - unstretched
    q = unstretched + shift * unstretched_distance
    u = unstretched / q
    previous = u - step
    # Uncertainty of the last step's u = 1 / num_inference_steps: du/dσ, which is slope² / k there, times an error of a
    # few units in the last place of σ = k · step / slope, or of 1. At most half a step, so that the step before is
    # never taken for the last.
    slope = 1 + (shift - 1) * step
    size = max(step, slope**2 / (shift * stretch) if subtracted else step * slope)
    uncertainty = min(ROUNDING * eps * size, step / 2)
    # σ' times 1 + (k − 1) u'; not above 0 where a stretch carries u' > 0 below its own 0
    scaled_previous = shift * previous
    if stretch != 1:
        scaled_previous = stretch * scaled_previous + (1 - stretch) * (1 + (shift - 1) * previous)
    terminal = (previous <= uncertainty) | (scaled_previous <= 0)
    scaled_previous = torch.where(terminal, 1, scaled_previous)
    one_minus_previous = shift * unstretched_distance / q + step
    # (SNR' − SNR) σ² = A² − B² = (A − B)(A + B) with A = σ (1 − σ') / σ' and B = 1 − σ. A and both factors are
    # written as sums of positive terms.
    difference = stretch * step * q / scaled_previous
    total = distance + sigma * stretch * one_minus_previous / scaled_previous
    scale = 0.5 * difference * total
    if prediction_type == "sample":
        scale = scale / sigma**2
    return torch.where(terminal, torch.inf, scale)


def draw_levels(
    kind: str,
    num_train_timesteps: int,
    shift: float,
    shift_terminal: float | None,
    n: int,
    generator: torch.Generator | None,
    distribution: str,
    device: torch.device | str | None,
) -> Tensor:
    """Draws noise levels as :meth:`sipo.NoiseSchedule.sample_levels` documents."""
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
        if shift_terminal is not None:
            u = (shift_terminal + (1 - shift_terminal) * u).clamp(max=1)
    return u.to(out_device)


def check_count(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raises TypeError or SettingError unless ``value`` is an integer from ``low`` to ``high``."""
    expected = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected {expected}")
    if value < low or (high is not None and value > high):
        raise SettingError(name, f"={value!r}: expected {expected}")


def check_positive(name: str, value: object) -> None:
    """Raises TypeError or SettingError unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected a finite number > 0")
    if not 0 < value < math.inf:
        raise SettingError(name, f"={value!r}: expected a finite number > 0")
