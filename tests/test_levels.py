"""§3's formulas against exact arithmetic, against the posteriors they stand for, and at their edges."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sipo import NoiseSchedule
from sipo.batch import level_argument
from tests.schedule_cases import ALL_STEPS, close, table


def exact_flow_ratio_scale(
    sigma: Fraction, shift: Fraction, steps: int, terminal: Fraction | None = None
) -> Fraction | None:
    """§3 for a flow in rational arithmetic; ``None`` at the terminal step."""
    stretch = Fraction(1)
    if terminal is not None:
        last = shift / (steps + shift - 1)  # of the grid that is not stretched
        stretch = (1 - terminal) / (1 - last)
    unstretched = 1 - (1 - sigma) / stretch
    u = unstretched / (shift - (shift - 1) * unstretched)
    previous = u - Fraction(1, steps)
    if unstretched <= 0 or previous <= 0:
        return None
    before = 1 - stretch * (1 - shift * previous / (1 + (shift - 1) * previous))
    if before <= 0:
        return None
    snr, snr_before = ((1 - s) ** 2 / s**2 for s in (sigma, before))
    return (snr_before - snr) * sigma**2 / 2


def flow(shift: float, steps: int, terminal: float | None = None, inverted: bool = False) -> NoiseSchedule:
    return NoiseSchedule(
        "flow",
        prediction_type="flow",
        num_inference_steps=steps,
        num_train_timesteps=1000,
        shift=shift,
        shift_terminal=terminal,
        invert_sigmas=inverted,
    )


@given(st.integers(1, 10**6), st.sampled_from([0.25, 1.0, 1.15, 3.0, 5.0, 17.0, 100.0]), st.sampled_from([1, 2, 7, 50]))
@settings(max_examples=300, deadline=None)
def test_flow_is_accurate_everywhere(millionths: int, shift: float, steps: int) -> None:
    sigma = millionths / 10**6
    exact = exact_flow_ratio_scale(Fraction(sigma), Fraction(shift), steps)
    scale = NoiseSchedule.flow(shift, steps).ratio_scale(sigmas=torch.tensor([sigma], dtype=torch.float64)).item()
    previous = Fraction(sigma) / (Fraction(shift) - (Fraction(shift) - 1) * Fraction(sigma)) - Fraction(1, steps)
    if abs(previous) < Fraction(1, 10**12):  # within rounding of the terminal step: inf, or immense
        assert scale > 1e10
    elif exact is None:
        assert scale == math.inf
    else:
        # u' = u − 1 / steps costs what it costs, nothing else does
        assert scale == pytest.approx(float(exact), rel=1e-13 + 1e-15 / float(previous))


@given(
    st.integers(1, 10**6),
    st.sampled_from([0.25, 1.0, 1.15, 3.0, 100.0]),
    st.sampled_from([2, 7, 50]),
    st.sampled_from([0.02, 0.1, 0.5, 0.9]),
)
@settings(max_examples=300, deadline=None)
def test_stretched_flow_is_accurate_everywhere(millionths: int, shift: float, steps: int, terminal: float) -> None:
    sigma = millionths / 10**6
    exact = exact_flow_ratio_scale(Fraction(sigma), Fraction(shift), steps, Fraction(terminal))
    scale = flow(shift, steps, terminal).ratio_scale(sigmas=torch.tensor([sigma], dtype=torch.float64)).item()
    if exact is None or exact > 10**9:  # σ' near 0, by a subtraction
        assert scale > 10**8.9
    else:
        assert scale == pytest.approx(float(exact), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0, 17.0])
@pytest.mark.parametrize("terminal", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("inverted", [False, True])
def test_only_the_last_step_of_a_stretched_or_inverted_flow_is_terminal(
    dtype: torch.dtype, shift: float, terminal: float, inverted: bool
) -> None:
    for steps in (2, 3, 7, 28, 50):
        u = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        sigma = shift * u / (1 + (shift - 1) * u)
        if not inverted:
            sigma = 1 - (1 - sigma) * (1 - terminal) / (1 - sigma[0])
            assert sigma[0].item() == pytest.approx(terminal)
        sigma = 1 - (1 - sigma).to(torch.promote_types(dtype, torch.float32))  # as schedulers do
        scale = flow(shift, steps, None if inverted else terminal, inverted).ratio_scale(sigmas=sigma.to(dtype))
        assert scale.isinf().tolist() == [True] + [False] * (steps - 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_ratio_scale_is_the_divergence_of_the_posteriors(prediction: str) -> None:
    """An error in x̂₀ moves the mean of q(x_t' | x_t, x₀) by b·(x̂₀ − x₀): KL = ½ b² (x̂₀ − x₀)² / variance."""
    if prediction == "flow":
        schedule = NoiseSchedule.flow(3.0, 20)
        u = torch.tensor([0.1, 0.4, 0.75, 0.9], dtype=torch.float64)
        now, before = (3 * v / (1 + 2 * v) for v in (u, u - 1 / 20))
    else:
        schedule = NoiseSchedule.discrete(prediction_type=prediction, num_inference_steps=20)
        now = torch.tensor([50, 200, 600, 950])
        before = now - 50
    (alpha, sigma), (alpha_p, sigma_p) = (schedule.alpha_sigma(**level_argument(schedule, t)) for t in (now, before))
    generator = torch.Generator().manual_seed(0)
    x0, noise, error = (torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(3))
    noisy = schedule.add_noise(x0, noise, **level_argument(schedule, now))
    output = schedule.target(x0, noise, **level_argument(schedule, now)) + error
    recovered = {
        "epsilon": lambda: (noisy - sigma * output) / alpha,
        "v_prediction": lambda: alpha * noisy - sigma * output,
        "sample": lambda: output,
        "flow": lambda: noisy - sigma * output,
    }[prediction]()
    step_variance = sigma**2 - (alpha / alpha_p) ** 2 * sigma_p**2  # of q(x_t | x_t')
    b = alpha_p * step_variance / sigma**2
    variance = step_variance * sigma_p**2 / sigma**2
    divergence = 0.5 * b**2 * (recovered - x0) ** 2 / variance
    close(schedule.ratio_scale(**level_argument(schedule, now)) * error**2, divergence, rtol=1e-9)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.sampled_from(["epsilon", "v_prediction", "sample"]),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_discrete_is_never_nan_nor_negative(values: list[float], prediction: str, data: st.DataObject) -> None:
    values = sorted(values, reverse=True)
    steps = data.draw(st.integers(1, len(values)))
    scale = table(NoiseSchedule.from_alphas_cumprod(values, prediction, steps))
    assert not scale.isnan().any() and (scale >= 0).all()
    stride = len(values) // steps
    assert scale[:stride].isinf().all()


def test_stride_where_steps_do_not_divide_the_training_steps() -> None:
    schedule = NoiseSchedule.discrete(num_inference_steps=30)
    alpha, sigma = schedule.alpha_sigma(ALL_STEPS)
    snr = (alpha / sigma) ** 2
    assert schedule.ratio_scale(ALL_STEPS).isinf().sum() == 33
    close(schedule.ratio_scale(ALL_STEPS)[33:], 0.5 * (snr[:-33] / snr[33:] - 1), rtol=1e-9)


def test_zero_terminal_snr() -> None:
    config: dict[str, Any] = {"rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}
    v = table(NoiseSchedule.discrete(prediction_type="v_prediction", **config))
    epsilon = table(NoiseSchedule.discrete(prediction_type="epsilon", **config))
    assert v[-1].item() == pytest.approx(1.3597549976783457e-05, rel=1e-10)
    assert epsilon[-1] == math.inf and epsilon[20:-1].isfinite().all()
    # flat zeros and flat ones, where SNR'/SNR would be 0/0 or inf/inf
    flat = NoiseSchedule.from_alphas_cumprod([1.0, 1.0, 0.5, 0.0, 0.0], "epsilon", 5)
    assert table(flat).tolist() == [math.inf, math.inf, math.inf, math.inf, math.inf]
    flat = NoiseSchedule.from_alphas_cumprod([1.0, 1.0, 0.5, 0.0, 0.0], "v_prediction", 5)
    assert table(flat).tolist() == [math.inf, math.inf, math.inf, 0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.25, 1.0, 1.15, 3.0, 7.3, 17.0, 100.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 28, 40, 49, 50, 250])
def test_only_the_last_flow_step_is_terminal(dtype: torch.dtype, shift: float, steps: int) -> None:
    # on the sampler's own grid, whatever type it was worked out in or rounded to
    work = dtype if dtype.itemsize >= 4 else torch.float32
    u = torch.arange(1, steps + 1).to(work) / steps
    sigma = (shift * u / (1 + (shift - 1) * u)).to(dtype)
    scale = NoiseSchedule.flow(shift, steps).ratio_scale(sigmas=sigma)
    assert scale.isinf().tolist() == [True] + [False] * (steps - 1)
