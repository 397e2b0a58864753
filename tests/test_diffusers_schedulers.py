"""NoiseSchedule.from_scheduler: golden values, noise and targets through diffusers' own schedulers."""

from __future__ import annotations

import importlib
import inspect
import math
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import numpy as np
import pytest
import torch
from conftest import assert_refused
from torch import Tensor

from benchmarks.previous_level import markdown, rows
from sipo import NoiseSchedule
from sipo.batch import level_argument
from sipo.schedule import empirical_mu, linear_mu
from sipo.schedule.diffusers_schedulers import _REFUSED, check_sampler, with_settings
from sipo.schedule.levels import SettingError
from tests.schedule_cases import ALL_STEPS, BY_NAME, SD, close, latents, table

SCHEDULERS: list[tuple[str, Any]] = [
    ("sd15", diffusers.DDPMScheduler(**SD)),
    ("sd15", diffusers.DDIMScheduler(**SD)),
    ("sd15", diffusers.PNDMScheduler(**SD)),
    ("sd15", diffusers.EulerDiscreteScheduler(**SD)),
    ("sd15", diffusers.DPMSolverMultistepScheduler(**SD)),
    ("sd15", diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)),
    ("sd15", diffusers.UniPCMultistepScheduler(**SD)),
    *(
        (name, scheduler(snr_shift_scale=k, rescale_betas_zero_snr=True, prediction_type="v_prediction"))
        for scheduler in (diffusers.CogVideoXDDIMScheduler, diffusers.CogVideoXDPMScheduler)
        for name, k in (("cogvideox2b", 3.0), ("cogvideox5b", 1.0))
    ),
    ("wan480p", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    (
        "wan480p",
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    ),
    (
        "wan720p",
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"),
    ),
    ("wan720p", diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)),
]


@pytest.mark.parametrize(("name", "scheduler"), SCHEDULERS, ids=[f"{type(s).__name__}-{n}" for n, s in SCHEDULERS])
def test_golden_through_schedulers(name: str, scheduler: Any) -> None:
    case = BY_NAME[name]
    steps = case.schedule["num_inference_steps"]
    schedule = NoiseSchedule.from_scheduler(scheduler, steps)
    assert schedule.prediction_type == case.schedule["prediction"]
    assert (schedule.kind, schedule.num_train_timesteps) == (case.schedule["kind"], 1000)
    close(schedule.ratio_scale(**level_argument(schedule, case.noise_levels)), case.ratio_scale, rtol=1e-4)
    # a scheduler that has been used for sampling gives the same
    scheduler.set_timesteps(7)
    again = NoiseSchedule.from_scheduler(scheduler, steps)
    assert torch.equal(*(s.ratio_scale(**level_argument(s, case.noise_levels)) for s in (again, schedule)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_prediction_types_of_schedulers(name: str, prediction: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")
    expected = table(NoiseSchedule.discrete(prediction_type=prediction))
    own = NoiseSchedule.from_scheduler(scheduler(**SD, prediction_type=prediction))
    close(table(own), expected, rtol=1e-4)
    told = NoiseSchedule.from_scheduler(scheduler(**SD), prediction_type=prediction)
    assert torch.equal(table(told), table(own))


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_other_beta_schedules(beta_schedule: str, zero_snr: bool) -> None:
    config: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": beta_schedule}
    config |= {"rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    scheduler = diffusers.DDIMScheduler(**config)
    schedule = NoiseSchedule.discrete(**config)
    alpha, sigma = schedule.alpha_sigma(ALL_STEPS)
    close(alpha**2, scheduler.alphas_cumprod, atol=1e-6, rtol=0)
    # the scheduler's float32 ᾱ is off by some 1e-7, which counts where 1 − ᾱ of the previous level is small
    exact, own = table(schedule)[20:], table(NoiseSchedule.from_scheduler(scheduler))[20:]
    assert ((own / exact - 1).abs() <= 1e-4 + 4e-7 / sigma[:-20] ** 2).all()


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.1, 7.3])
def test_every_sigma_of_the_scheduler_is_taken(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    u = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    exact = schedule.ratio_scale(sigmas=shift * u / (1 + (shift - 1) * u))
    assert exact[-20:].isinf().all() and exact[:-20].isfinite().all()
    # its σ are float32, which near σ = 1 leaves few digits of 1 − σ, and so of the SNR
    error = (schedule.ratio_scale(sigmas=scheduler.sigmas) / exact - 1)[:-20]
    assert error.abs().max() < 1e-4


def test_sample_prediction_of_a_flow() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigma = torch.tensor([0.2, 0.5, 1.0])
    schedule = NoiseSchedule.from_scheduler(scheduler, prediction_type="sample")
    flow = NoiseSchedule.from_scheduler(scheduler)
    close(schedule.ratio_scale(sigmas=sigma), flow.ratio_scale(sigmas=sigma) / sigma.double() ** 2)
    assert torch.equal(schedule.target(sigma, sigma, sigmas=sigma), sigma)


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete"])
def test_add_noise_is_that_of_the_scheduler(name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SD)
    sample, noise = latents()
    t = torch.tensor([0, 1, 500, 998, 999])
    if "Multistep" in name:
        # until its steps are set, diffusers 0.42 looks these up in a table that runs the wrong way
        scheduler.set_timesteps(20)
        t = scheduler.timesteps[[0, 3, 10, 18, 19]]
    expected = scheduler.add_noise(sample, noise, t)
    if name == "EulerDiscrete":
        # its samples are scaled up by 1/α = √(1 + (σ/α)²), which scale_model_input undoes
        ratio = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod)[t].sqrt()
        expected = expected / (1 + ratio**2).sqrt().reshape(-1, 1, 1, 1)
    close(NoiseSchedule.from_scheduler(scheduler).add_noise(sample, noise, t), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "CogVideoXDDIM", "CogVideoXDPM"])
def test_velocity_is_that_of_the_scheduler(name: str) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    schedule = NoiseSchedule.from_scheduler(scheduler)
    sample, noise = latents()
    t = torch.tensor([0, 1, 500, 998, 999])
    close(schedule.target(sample, noise, t), scheduler.get_velocity(sample, noise, t), rtol=1e-5, atol=1e-6)
    close(schedule.add_noise(sample, noise, t), scheduler.add_noise(sample, noise, t), rtol=1e-5, atol=1e-6)


def test_flow_noise_is_that_of_the_scheduler() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sample, noise = latents()
    index = [0, 10, 500, 900, 999]
    noisy = NoiseSchedule.from_scheduler(scheduler).add_noise(sample, noise, sigmas=scheduler.sigmas[index])
    close(noisy, scheduler.scale_noise(sample, scheduler.timesteps[index], noise), rtol=1e-6, atol=1e-7)
    solver = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    solver.set_timesteps(20)
    noisy = NoiseSchedule.from_scheduler(solver).add_noise(sample, noise, sigmas=solver.sigmas[:5])
    close(noisy, solver.add_noise(sample, noise, solver.timesteps[:5]), rtol=1e-6, atol=1e-7)


def scheduler_classes() -> list[Any]:
    """Every scheduler class that diffusers has here; those that need a library that is missing are stand-ins."""
    names = [name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")]
    classes = {each for each in (getattr(diffusers.schedulers, name) for name in names) if inspect.isclass(each)}
    return sorted(classes, key=lambda each: each.__name__)


DISCRETE_OPTIONS: list[dict[str, Any]] = [
    {},
    SD,
    {"trained_betas": np.linspace(1e-4, 0.03, 1000, dtype=np.float32)},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": "laplace"},
    SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


def variants(scheduler_class: Any) -> list[Any]:
    """Schedulers of a class, with those of the above options that it takes."""
    known, made = inspect.signature(scheduler_class).parameters.values(), []
    if any(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in known):
        return [object.__new__(scheduler_class)]  # of tokens or proteins, with arguments that have no default
    for options in DISCRETE_OPTIONS:
        if options.keys() <= {each.name for each in known}:
            try:
                made.append(scheduler_class(**options))
            except (NotImplementedError, ValueError):  # a beta_schedule that this one does not have
                assert "beta_schedule" in options and options is not SD
    return made


def own_noise(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Noisy latents at each timestep, as the network of a discrete scheduler sees them."""
    sample, noise = latents()
    if isinstance(scheduler, (diffusers.RePaintScheduler, diffusers.DDIMInverseScheduler)):  # they only sample
        return diffusers.DDPMScheduler.from_config(scheduler.config).add_noise(sample, noise, timesteps)
    if not hasattr(scheduler, "sigmas"):
        return scheduler.add_noise(sample, noise, timesteps)
    if "timestep_spacing" in scheduler.config:
        scheduler.register_to_config(timestep_spacing="trailing")
        scheduler.set_timesteps(100)  # every tenth, down from the last; what is between these is interpolated
    else:
        scheduler.set_timesteps(1000)
    seen = []
    for x0, eps, t in zip(sample.split(1), noise.split(1), timesteps.split(1), strict=True):
        t = t.to(scheduler.timesteps.dtype)
        scheduler._step_index = None
        seen.append(scheduler.scale_model_input(scheduler.add_noise(x0, eps, t), t[0]))
    return torch.cat(seen)


@pytest.mark.parametrize("scheduler_class", scheduler_classes(), ids=lambda each: each.__name__)
def test_every_scheduler_is_read_as_it_adds_noise_or_refused(scheduler_class: Any) -> None:
    """Any that a model repository may name; flows, with grids of their own, have their own tests below."""
    name = scheduler_class.__name__
    if hasattr(scheduler_class, "_backends"):
        pytest.skip(f"needs {scheduler_class._backends}")
    schedulers = variants(scheduler_class)
    assert schedulers
    for scheduler in schedulers:
        if name in FLOWS:
            assert NoiseSchedule.from_scheduler(scheduler).kind == "flow"
        elif not hasattr(scheduler, "alphas_cumprod"):
            for options in ({}, {"shift": 3.0}):
                with pytest.raises(ValueError, match=f"^scheduler {name} is not modelled, .*: expected one") as caught:
                    NoiseSchedule.from_scheduler(scheduler, **options)
                assert "\n" not in str(caught.value) and "it has no alphas_cumprod" not in str(caught.value)
        else:
            schedule = NoiseSchedule.from_scheduler(scheduler)
            assert schedule.kind == "discrete"
            assert schedule.prediction_type == getattr(scheduler.config, "prediction_type", "epsilon")
            close(schedule.alpha_sigma(ALL_STEPS)[0] ** 2, scheduler.alphas_cumprod.double(), atol=1e-15)
            t = torch.tensor([9, 19, 499, 899, 989])
            # its tables are float32, and some are taken to powers and logarithms first
            close(schedule.add_noise(*latents(), t), own_noise(scheduler, t), rtol=1e-4, atol=1e-5)


FLOW_UNIPC: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")


OPTIONS: dict[str, str] = {
    "read by from_scheduler": "num_train_timesteps prediction_type shift flow_shift use_flow_sigmas invert_sigmas "
    "use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len time_shift_type shift_terminal",
    "in alphas_cumprod": "beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr snr_shift_scale",
    # Sigmas of Karras and the like only of a flow: for the others, math.md §3 has how far off the previous level is.
    "refused": "use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_lu_lambdas scale_factors timestep_type",
    "which levels the sampler visits": "timestep_spacing steps_offset set_alpha_to_one final_sigmas_type sigma_min "
    "sigma_max interpolation_type lambda_min_clipped original_inference_steps",
    "how the sampler steps from one to the next": "clip_sample clip_sample_range thresholding sample_max_value "
    "dynamic_thresholding_ratio solver_order solver_type solver_p algorithm_type lower_order_final euler_at_final "
    "predict_x0 disable_corrector predictor_order corrector_order skip_prk_steps timestep_scaling upscale_mode",
    "noise that the sampler adds": "stochastic_sampling variance_type eta tau_func",  # learned: refused by channels
}


@pytest.mark.parametrize("scheduler_class", scheduler_classes(), ids=lambda each: each.__name__)
def test_every_option_of_a_scheduler_is_read_refused_or_of_no_concern(scheduler_class: Any) -> None:
    """Levels and targets depend on no option of the sampler alone; a new one of a later diffusers is to be decided."""
    name, options = scheduler_class.__name__, inspect.signature(scheduler_class).parameters.keys() - {"kwargs"}
    if name in _REFUSED or hasattr(scheduler_class, "_backends"):
        return
    kinds = {option: kind for kind, listed in OPTIONS.items() for option in listed.split()}
    new = options - kinds.keys()
    assert not new, f"{name} has {new}: decide whether NoiseSchedule reads or refuses it, and add it to OPTIONS"
    flow: dict[str, Any] = FLOW_UNIPC if "use_flow_sigmas" in options else {}
    refused = {option for option in options if kinds[option] == "refused"}
    for option in refused if flow or name in FLOWS else refused & {"timestep_type"}:
        value: Any = {"scale_factors": [0.5], "timestep_type": "continuous"}.get(option, True)
        with pytest.raises(ValueError, match=f"^{name} has {option}="):
            NoiseSchedule.from_scheduler(scheduler_class(**flow, **{option: value}))


def test_the_noise_of_a_stochastic_sampler_changes_no_level() -> None:
    plain, noisy = (
        NoiseSchedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=each))
        for each in (False, True)
    )
    assert noisy.settings() == plain.settings()


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_a_shift_makes_the_grid_of_a_flow_plain(option: str) -> None:
    """For the ratio and, by :func:`with_settings`, for samples."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **{option: True})
    schedule = NoiseSchedule.from_scheduler(theirs, shift=2.0)
    assert schedule.settings() == NoiseSchedule.flow(shift=2.0).settings()
    ours, plain = with_settings(theirs, shift=2.0), diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    for scheduler in (ours, plain, theirs):
        scheduler.set_timesteps(10)
    assert torch.equal(ours.sigmas, plain.sigmas) and not torch.equal(theirs.sigmas, plain.sigmas)


def test_shift_of_a_scheduler() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert NoiseSchedule.from_scheduler(scheduler).shift == 3.0
    assert NoiseSchedule.from_scheduler(scheduler, shift=5.0).shift == 5.0
    scheduler.set_shift(7.0)
    assert NoiseSchedule.from_scheduler(scheduler).shift == 7.0
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    schedule = NoiseSchedule.from_scheduler(dynamic, shift=math.exp(1.15))
    # the sampler's own grid with that mu
    dynamic.set_timesteps(sigmas=[1.0, 0.5], mu=1.15)
    sigma = dynamic.sigmas[:2].double()
    u = sigma / (schedule.shift - (schedule.shift - 1) * sigma)
    close(u, torch.tensor([1.0, 0.5]), rtol=1e-6)


QWEN = {"base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}


@pytest.mark.parametrize(
    ("options", "tokens", "shift"),
    [
        ({}, 256, math.exp(0.5)),
        ({}, 4096, math.exp(1.15)),
        ({}, 2176, math.exp(0.825)),
        (QWEN, 8192, math.exp(0.9)),
        (QWEN | {"time_shift_type": "linear"}, 4224, 0.7),
        ({"time_shift_type": "linear"}, 4096, 1.15),
    ],
)
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchLCM"])
def test_dynamic_shift_of_a_resolution(name: str, options: dict[str, Any], tokens: int, shift: float) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(use_dynamic_shifting=True, **options)
    schedule = NoiseSchedule.from_scheduler(scheduler, 10, image_seq_len=tokens)
    assert schedule.shift == pytest.approx(shift, rel=1e-12)
    mu = shift if options.get("time_shift_type") == "linear" else math.log(shift)
    assert linear_mu(scheduler.config, tokens) == pytest.approx(mu, rel=1e-12)
    assert NoiseSchedule.from_scheduler(scheduler, 10, mu=mu).shift == pytest.approx(shift, rel=1e-12)
    check_grid(scheduler, schedule, mu=mu)
    # one that was named is taken as it is
    assert NoiseSchedule.from_scheduler(scheduler, shift=2.0, image_seq_len=tokens).shift == 2.0


def test_dynamic_shift_of_solvers_has_the_pipelines_defaults() -> None:
    for name in ("UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep"):
        scheduler = getattr(diffusers, f"{name}Scheduler")(**FLOW_UNIPC, use_dynamic_shifting=True)
        assert NoiseSchedule.from_scheduler(scheduler, image_seq_len=4096).shift == pytest.approx(math.exp(1.15))


def check_grid(scheduler: Any, schedule: NoiseSchedule, **options: Any) -> None:
    """Every step of the sampler, on the grid that pipelines ask for: its levels are those of math.md §3, ratio_scale is
    that of two of them in a row, and Euler's step with the schedule's own target leads from the noisy sample at one to
    that at the next."""
    steps = schedule.num_inference_steps
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), **options)
    sigma = (1 - scheduler.sigmas if schedule.invert_sigmas else scheduler.sigmas).double().clamp(0, 1)
    assert sigma[0] == 1 and sigma[-1] == 0 and len(sigma) == steps + 1
    u, k = torch.arange(steps, 0, -1).double() / steps, schedule.shift
    levels = k * u / (1 + (k - 1) * u)
    if schedule.shift_terminal is not None:
        levels = 1 - (1 - levels) * (1 - schedule.shift_terminal) / (1 - levels[-1])
    close(sigma[:-1], levels, rtol=0, atol=2e-7)  # the sampler's are float32, and differences of their SNR less exact
    snr = ((1 - levels) / levels) ** 2
    close(schedule.ratio_scale(sigmas=levels[:-1]), 0.5 * snr.diff() * levels[:-1] ** 2, rtol=1e-10)
    assert schedule.ratio_scale(sigmas=sigma[-2:-1].float()) == math.inf
    sample, noise = (each.double() for each in latents(1))
    velocity = schedule.target(sample, noise, sigmas=sigma[:1])
    for now, then, step in zip(sigma[:-1], sigma[1:], scheduler.sigmas.diff(), strict=True):
        moved = schedule.add_noise(sample, noise, sigmas=now[None]) + step.double() * velocity
        expected = schedule.add_noise(sample, noise, sigmas=then[None]) if then > 0 else sample
        close(moved, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3.0},
        {"shift": 0.5},
        {"shift": 3.0, "shift_terminal": 0.02},
        {"shift": 3.0, "shift_terminal": 0.5},
        {"shift": 1.0, "invert_sigmas": True},
        {"shift": 3.0, "invert_sigmas": True, "shift_terminal": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchLCM"])
def test_the_grid_of_a_flow_is_the_samplers(name: str, options: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    schedule = NoiseSchedule.from_scheduler(scheduler, 10)
    assert (schedule.shift, schedule.shift_terminal) == (options["shift"], options.get("shift_terminal"))
    assert schedule.invert_sigmas == options.get("invert_sigmas", False)
    check_grid(scheduler, schedule)


def test_mu_of_flux2_depends_on_tokens_and_steps() -> None:
    """The lines at 10 and at 200 steps by hand, and diffusers' own function where it has one."""
    assert empirical_mu(4096, 10) == pytest.approx(8.73809524e-05 * 4096 + 1.89833333, rel=1e-12)
    assert empirical_mu(4096, 200) == pytest.approx(0.00016927 * 4096 + 0.45666666, rel=1e-12)
    assert empirical_mu(4301, 10) == empirical_mu(4301, 50) == pytest.approx(0.00016927 * 4301 + 0.45666666, rel=1e-12)
    if not hasattr(diffusers, "Flux2Pipeline"):
        pytest.skip("this diffusers has no FLUX.2")
    own = importlib.import_module("diffusers.pipelines.flux2.pipeline_flux2").compute_empirical_mu
    for tokens in (1, 1024, 4096, 4300, 4301, 8100):
        for steps in (1, 4, 28, 50, 1000):
            assert empirical_mu(tokens, steps) == pytest.approx(own(tokens, steps), rel=1e-12)


FLUX = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
PUBLISHED: dict[str, tuple[dict[str, Any], Any]] = {
    "FLUX.1-dev": (FLUX, lambda config, steps: linear_mu(config, 4096)),
    "FLUX.1-dev at 832 by 1216": (FLUX, lambda config, steps: linear_mu(config, 52 * 76)),
    "FLUX.1-schnell": ({"shift": 1.0}, lambda config, steps: None),
    "FLUX.2": (FLUX, lambda config, steps: empirical_mu(4096, steps)),
    "FLUX.2 at 1440 by 1440": (FLUX, lambda config, steps: empirical_mu(8100, steps)),
    "Qwen-Image": (
        QWEN | {"use_dynamic_shifting": True, "shift_terminal": 0.02},
        lambda config, steps: linear_mu(config, 83 * 104),
    ),
    "Qwen-Image, linear": (
        QWEN | {"use_dynamic_shifting": True, "shift_terminal": 0.02, "time_shift_type": "linear"},
        lambda config, steps: linear_mu(config, 4096),
    ),
    "Z-Image-Turbo": ({"shift": 3.0}, lambda config, steps: linear_mu(config, 4096)),  # passed, and not used
    "Z-Image, Lumina 2": ({"shift": 6.0}, lambda config, steps: linear_mu(config, 4096)),
}


@pytest.mark.parametrize("steps", [8, 50])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_grid_of_a_published_model_is_its_pipelines(name: str, steps: int) -> None:
    """With the levels from 1 to 1/n and the mu that its pipeline passes to the scheduler."""
    options, mu_of = PUBLISHED[name]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    mu = mu_of(scheduler.config, steps)
    schedule = NoiseSchedule.from_scheduler(scheduler, steps, mu=mu)
    assert (schedule.shift == options.get("shift")) == ("use_dynamic_shifting" not in options)
    check_grid(scheduler, schedule, mu=mu)


def test_flows_of_other_classes() -> None:
    assert NoiseSchedule.from_scheduler(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)).shift == 3.0
    solvers = ("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DEISMultistep", "SASolver")
    for name in (*solvers, "UniPCMultistep"):
        schedule = NoiseSchedule.from_scheduler(getattr(diffusers, f"{name}Scheduler")(**FLOW_UNIPC, flow_shift=5.0))
        assert (schedule.kind, schedule.prediction_type, schedule.shift) == ("flow", "flow", 5.0)
    if "shift_terminal" in inspect.signature(diffusers.UniPCMultistepScheduler).parameters:  # of diffusers 0.42
        stretched = diffusers.UniPCMultistepScheduler(**FLOW_UNIPC, flow_shift=3.0, shift_terminal=0.1)
        assert NoiseSchedule.from_scheduler(stretched, 10).shift_terminal == 0.1


def test_settings_of_a_user_hold_for_the_sampler_too() -> None:
    sd = diffusers.DDIMScheduler(**SD)
    assert with_settings(sd) is sd
    changed = with_settings(sd, "v_prediction")
    assert (changed.config.prediction_type, sd.config.prediction_type) == ("v_prediction", "epsilon")
    assert torch.equal(changed.alphas_cumprod, sd.alphas_cumprod)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    static = with_settings(dynamic, "flow_prediction", 3.0)
    schedule = NoiseSchedule.from_scheduler(static, 10)
    assert (schedule.shift, schedule.shift_terminal) == (3.0, 0.1)
    check_grid(static, schedule)
    wan = with_settings(diffusers.UniPCMultistepScheduler(**FLOW_UNIPC, flow_shift=3.0), shift=5.0)
    assert (wan.config.flow_shift, NoiseSchedule.from_scheduler(wan).shift) == (5.0, 5.0)


def test_how_far_the_previous_level_is_off_is_what_the_page_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "math.md").read_text(encoding="utf-8")
    assert markdown() in page
    factors = {row.name: row.factors for row in rows()}
    few = {name: len(each) for name, each in factors.items() if len(each) != 49}
    assert few == {"DPM-Solver++, Karras": 49 - 8}
    assert sum(max(each) - min(each) < 1e-3 for each in factors.values()) >= 4


@pytest.mark.parametrize("config", [{"prediction_type": "v_prediction"}, {}])
def test_a_scheduler_of_another_library(config: dict[str, Any]) -> None:
    """With a dictionary for a configuration, and the table for its length."""

    class Theirs:
        alphas_cumprod = np.linspace(0.99, 0.01, 100)

    scheduler: Any = Theirs()
    scheduler.config = config
    schedule = NoiseSchedule.from_scheduler(scheduler, 10)
    assert (schedule.prediction_type, schedule.num_train_timesteps) == (config.get("prediction_type", "epsilon"), 100)
    flow = FlowMatchEulerDiscreteScheduler()
    flow.config = flow.config | {"num_train_timesteps": 500}
    found = NoiseSchedule.from_scheduler(flow)
    assert (found.kind, found.shift, found.num_train_timesteps) == ("flow", 3.0, 500)


@pytest.mark.parametrize(
    ("scheduler", "prediction", "message"),
    [
        ("PNDMScheduler", "sample", "prediction_type='sample': expected another, PNDMScheduler cannot"),
        ("EulerAncestralDiscreteScheduler", "sample", "DiscreteScheduler cannot sample with it"),
        ("PNDMScheduler", "v_prediction", None),
        ("DDIMScheduler", "sample", None),
        ("DDPMScheduler", "sample", None),  # which draws noise
        ("CogVideoXDPMScheduler", "v_prediction", None),  # whose step takes other arguments
    ],
)
def test_a_sampler_that_would_refuse_is_found_out_beforehand(
    scheduler: str, prediction: str, message: str | None
) -> None:
    changed = with_settings(getattr(diffusers, scheduler)(**SD), prediction)
    before = torch.get_rng_state()
    if message is None:
        check_sampler(changed)
        assert torch.equal(torch.get_rng_state(), before)
        return
    assert_refused(lambda: check_sampler(changed), SettingError, message)


def test_subclass_of_a_scheduler() -> None:
    class MyScheduler(diffusers.DDPMScheduler):
        pass

    assert torch.equal(
        table(NoiseSchedule.from_scheduler(MyScheduler(**SD))),
        table(NoiseSchedule.from_scheduler(diffusers.DDPMScheduler(**SD))),
    )


def test_a_table_changed_by_hand_is_taken_as_it_is() -> None:
    scheduler = diffusers.DDPMScheduler(**SD)
    scheduler.alphas_cumprod = torch.linspace(0.99, 0.0, 1000, dtype=torch.float64)
    expected = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.99, 0.0, 1000, dtype=torch.float64))
    assert torch.equal(table(NoiseSchedule.from_scheduler(scheduler)), table(expected))
    scheduler.alphas_cumprod.zero_()  # and not kept
    assert expected.alpha_sigma(ALL_STEPS)[0][0].item() == pytest.approx(0.99**0.5)


class NotAScheduler:
    config = None


class FlowMatchEulerDiscreteScheduler:
    """One of another library, under a name that is known."""

    config: ClassVar[dict[str, Any]] = {"shift": 3.0}


read, DYNAMIC = NoiseSchedule.from_scheduler, diffusers.FlowMatchEulerDiscreteScheduler
ERRORS: list[tuple[Any, type, str]] = [
    (
        lambda: read(NotAScheduler()),
        ValueError,
        "scheduler NotAScheduler is not modelled, it has no alphas_cumprod: expected one with alphas_cumprod",
    ),
    *[
        (
            lambda kind=kind: read(DYNAMIC(use_dynamic_shifting=True, time_shift_type=kind)),
            ValueError,
            f"use_dynamic_shifting=True: expected image_seq_len=, the number of tokens of the resolution trained on, "
            f"mu= of its pipeline, or shift=, which is {shift} there",
        )
        for kind, shift in (("exponential", "exp(mu)"), ("linear", "mu"))
    ],
    (
        lambda: read(
            diffusers.UniPCMultistepScheduler(
                **FLOW_UNIPC, use_dynamic_shifting=True, time_shift_type=cast(Any, "cubic")
            ),
            mu=1.0,
        ),
        ValueError,
        "time_shift_type='cubic': expected 'exponential' or 'linear'",
    ),
    (lambda: read(DYNAMIC(use_dynamic_shifting=True), image_seq_len=0), ValueError, "image_seq_len=0: expected an"),
    (lambda: read(DYNAMIC(use_dynamic_shifting=True), image_seq_len=9.0), TypeError, "image_seq_len=9.0 is a float"),
    (
        lambda: read(DYNAMIC(use_dynamic_shifting=True, base_image_seq_len=4096), image_seq_len=9),
        ValueError,
        "base_image_seq_len=4096: expected another than max_image_seq_len",
    ),
    *[
        (
            lambda value=value: linear_mu({"base_shift": value}, 9),
            ValueError,
            f"base_shift={value!r}: expected a finite number",
        )
        for value in ("0.5", None, True, math.nan)
    ],
    (lambda: read(DYNAMIC(shift_terminal=1.5)), ValueError, "shift_terminal=1.5: expected a number in (0, 1)"),
    (
        lambda: read(DYNAMIC(shift_terminal=0.1), 1),
        ValueError,
        "num_inference_steps=1 with shift_terminal: expected at least 2",
    ),
    (lambda: read(diffusers.DDPMScheduler), TypeError, "scheduler is the class DDPMScheduler: expected an instance"),
    (
        lambda: read(DYNAMIC(use_dynamic_shifting=True), image_seq_len=10**9),
        ValueError,
        "image_seq_len=1000000000: expected fewer tokens, the shift exp(mu) is not finite",
    ),
    (
        lambda: read(DYNAMIC(use_dynamic_shifting=True), mu=1000.0),
        ValueError,
        "mu=1000.0: expected less, the shift exp(mu) is not finite",
    ),
    (
        lambda: read(DYNAMIC(use_dynamic_shifting=True, time_shift_type="linear"), mu=-0.5),
        ValueError,
        "shift=-0.5: expected a finite number > 0",
    ),
    (
        lambda: read(DYNAMIC(use_dynamic_shifting=True, time_shift_type="linear"), image_seq_len=10**400),
        ValueError,
        "expected fewer tokens, the shift mu is not finite",
    ),
    (lambda: read(FlowMatchEulerDiscreteScheduler()), TypeError, "num_train_timesteps=None is a NoneType"),
    (
        lambda: with_settings(diffusers.DDPMScheduler(), shift=3.0),
        ValueError,
        "shift=3.0: leave it out, DDPMScheduler has no flow schedule",
    ),
    (
        lambda: with_settings(diffusers.DDPMScheduler(), "flow_prediction"),
        ValueError,
        "prediction_type='flow_prediction': expected 'epsilon', 'v_prediction' or 'sample', DDPMScheduler has no other",
    ),
    (lambda: with_settings(DYNAMIC(), shift=0.0), ValueError, "shift=0.0: expected a finite number > 0"),
    (
        lambda: with_settings(DYNAMIC(), "epsilon"),
        ValueError,
        "prediction_type='epsilon': expected 'flow_prediction', FlowMatchEulerDiscreteScheduler has no other",
    ),
    *[
        (
            lambda o=option, v=value: read(diffusers.FlowMatchEulerDiscreteScheduler(**{o: v})),
            ValueError,
            f"{option}={value!r}",
        )
        for option, value in (("use_karras_sigmas", True), ("use_exponential_sigmas", True))
    ],
    (
        lambda: read(diffusers.UniPCMultistepScheduler(**FLOW_UNIPC, use_beta_sigmas=True)),
        ValueError,
        "use_beta_sigmas=True",
    ),
    (
        lambda: read(diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True)),
        ValueError,
        "prediction_type='epsilon': expected one of flow_prediction, sample for a flow schedule",
    ),
    (
        lambda: read(diffusers.EulerDiscreteScheduler(timestep_type="continuous")),
        ValueError,
        "timestep_type='continuous'",
    ),
    (lambda: read(diffusers.DDPMScheduler(), shift=3.0), ValueError, "shift=3.0: leave it out, DDPMScheduler has no"),
    (lambda: read(diffusers.DDPMScheduler(), 0), ValueError, "num_inference_steps=0: expected an integer in [1, 1000]"),
    (lambda: read(diffusers.DDPMScheduler(), 1001), ValueError, "num_inference_steps=1001"),
    (lambda: read(diffusers.DDPMScheduler(), 50.0), TypeError, "num_inference_steps=50.0 is a float"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    assert_refused(call, error, message)
