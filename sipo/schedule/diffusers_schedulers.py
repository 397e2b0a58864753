"""Reads noise levels from diffusers' schedulers, without importing diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sipo.schedule.levels import PREDICTIONS, SettingError, check_count, check_positive

_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
# Options of a flow scheduler with which its grid of σ is not that of docs/math.md §3.
_OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

_EXPLODING = "its samples are x0 + sigma * noise, scaled by its own rule (variance exploding)"
_CONTINUOUS = "its time is continuous, without a table of levels"
_TOKENS = "it works on discrete tokens"
_STAGES = "it goes through stages of several resolutions"
# Why a scheduler is refused that has neither alphas_cumprod nor a flow's plain grid.
_REFUSED = {
    "CMStochasticIterativeScheduler": _EXPLODING,
    "CosineDPMSolverMultistepScheduler": _EXPLODING,
    "EDMDPMSolverMultistepScheduler": _EXPLODING,
    "EDMEulerScheduler": _EXPLODING,
    "KarrasVeScheduler": _EXPLODING,
    "ScoreSdeVeScheduler": _EXPLODING,
    "ConsistencyDecoderScheduler": "it has only the two levels of a consistency decoder",
    "SCMScheduler": "its levels are angles (TrigFlow)",
    "DDPMWuerstchenScheduler": _CONTINUOUS,
    "IPNDMScheduler": _CONTINUOUS,
    "ScoreSdeVpScheduler": _CONTINUOUS,
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "FlowMapEulerDiscreteScheduler": "its network is told two levels (flow map)",
    "HeliosScheduler": _STAGES,
    "HeliosDMDScheduler": _STAGES,
    "LTXEulerAncestralRFScheduler": "it takes its levels from the pipeline",
    "MiniMaxH3Scheduler": "its timesteps run from 0 to 1, and its grid has one step fewer than requested",
    "PiflowScheduler": "its network predicts several levels at once",
    "RFD4ProteinaScheduler": "it is for protein structures",
}


class ScheduleArguments(NamedTuple):
    """Arguments of :class:`sipo.NoiseSchedule`: ``alphas_cumprod`` ``[T]`` if it is discrete, the rest if a flow."""

    prediction_type: str
    alphas_cumprod: Tensor | None = None
    num_train_timesteps: Any = None
    shift: float = 1.0
    shift_terminal: float | None = None
    invert_sigmas: bool = False


def linear_mu(config: Any, image_seq_len: int) -> float:
    """Returns μ of a resolution, as most of diffusers' pipelines do: linear in the number of the image's tokens.

    Args:
        config: The scheduler's, which has two points of the line; what it lacks has the pipelines' defaults.
        image_seq_len: Number of the image's tokens.

    Raises:
        TypeError: ``image_seq_len`` is no integer.
        ValueError: It is below 1; an option of the scheduler is no finite number; two points that are one.
    """
    check_count("image_seq_len", image_seq_len, 1)
    points: dict[str, float] = {
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
    }
    for name, default in points.items():
        points[name] = value = _option(config, name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r}: expected a finite number")
    base, most, low, high = points.values()
    if base == most:
        raise ValueError(f"base_image_seq_len={base!r}: expected another than max_image_seq_len")
    slope = (high - low) / (most - base)
    return float(image_seq_len * slope + (low - slope * base))


def empirical_mu(image_seq_len: int, num_inference_steps: int) -> float:
    """Returns μ of a resolution and a number of steps, as FLUX.2's pipelines do.

    It is linear in the number of the image's tokens, and up to 4300 tokens also in the number of steps: the two lines
    are those for 10 and for 200 steps. Above, it is that for 200 steps.
    """
    many = 0.00016927 * image_seq_len + 0.45666666
    if image_seq_len > 4300:
        return many
    few = 8.73809524e-05 * image_seq_len + 1.89833333
    return few + (many - few) * (num_inference_steps - 10) / 190


def time_shift_type(config: Any) -> str:
    """Returns how a scheduler's dynamic shift follows from μ: "linear", or "exponential" where it does not say.

    Raises:
        ValueError: It is neither. Some of diffusers' schedulers take any value.
    """
    kind = _option(config, "time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type={kind!r}: expected 'exponential' or 'linear'")
    return str(kind)


def read_scheduler(
    scheduler: Any, shift: float | None = None, image_seq_len: int | None = None, mu: float | None = None
) -> ScheduleArguments:
    """Reads a scheduler: a flow is known by the name of its class or of a base class, others by ``alphas_cumprod``.

    Args:
        scheduler: A diffusers scheduler, with its ``config``.
        shift: In place of the scheduler's own shift and grid; only for flow schedulers.
        image_seq_len: Number of the image's tokens, from which ``use_dynamic_shifting`` derives μ.
        mu: μ itself, in place of it.

    Raises:
        TypeError: A number of the wrong type, or a class in place of a scheduler.
        ValueError: A scheduler that is not modelled, or an option of it that is not.
    """
    if isinstance(scheduler, type):
        raise TypeError(f"scheduler is the class {scheduler.__name__}: expected an instance")
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)

    def option(key: str, default: Any = None) -> Any:
        return _option(config, key, default)

    if not _is_flow(scheduler):
        table = getattr(scheduler, "alphas_cumprod", None)
        if config is None or table is None:
            why = [_REFUSED[base] for base in _bases(scheduler) if base in _REFUSED]
            reason = why[0] if why else "it has no alphas_cumprod"
            expected = f"expected one with alphas_cumprod or use_flow_sigmas, or {', '.join(_FLOW)}"
            raise ValueError(f"scheduler {name} is not modelled, {reason}: {expected}")
        if shift is not None:
            raise SettingError("shift", f"={shift!r}: leave it out, {name} has no flow schedule")
        if option("timestep_type") == "continuous":
            raise ValueError(f"{name} has timestep_type='continuous': expected 'discrete' timesteps")
        return ScheduleArguments(option("prediction_type", "epsilon"), table)

    if option("scale_factors"):  # the size of its samples changes
        raise ValueError(f"{name} has scale_factors={option('scale_factors')!r}: expected a flow schedule without it")
    for key in _OTHER_GRIDS if shift is None else ():
        if option(key):
            expected = "expected a flow schedule without it, or shift=, with which the grid is plain"
            raise ValueError(f"{name} has {key}={option(key)!r}: {expected}")
    if shift is None and option("use_dynamic_shifting", False):
        linear = time_shift_type(config) == "linear"
        formula = "mu" if linear else "exp(mu)"
        try:
            if mu is None:
                if image_seq_len is None:
                    raise ValueError(
                        f"{name} has use_dynamic_shifting=True: expected image_seq_len=, the number of tokens of the "
                        f"resolution trained on, mu= of its pipeline, or shift=, which is {formula} there"
                    )
                mu = linear_mu(config, image_seq_len)
            shift = mu if linear else math.exp(mu)
        except OverflowError as error:
            tokens = f"image_seq_len={image_seq_len}: expected fewer tokens"
            given = f"mu={mu!r}: expected less" if image_seq_len is None else tokens
            raise ValueError(f"{given}, the shift {formula} is not finite") from error
    elif shift is None and option("use_flow_sigmas", False):
        shift = option("flow_shift", 1.0)
    elif shift is None:
        # set_shift() changes the property of schedulers that have one, but not their configuration.
        shift = scheduler.shift if hasattr(type(scheduler), "shift") else option("shift", 1.0)
    return ScheduleArguments(
        option("prediction_type", "flow"),
        num_train_timesteps=option("num_train_timesteps"),
        shift=shift,
        shift_terminal=option("shift_terminal") or None,  # diffusers takes 0 as none
        invert_sigmas=bool(option("invert_sigmas", False)),
    )


def setting_changes(scheduler: Any, prediction_type: str | None = None, shift: float | None = None) -> dict[str, Any]:
    """Returns options for ``type(scheduler).from_config(scheduler.config, ...)`` that apply a user's settings.

    Arguments and errors are those of :func:`with_settings`.
    """
    name, config, kind = type(scheduler).__name__, scheduler.config, "flow" if _is_flow(scheduler) else "discrete"
    changes: dict[str, Any] = {}
    if prediction_type is not None:
        has_option = _option(config, "prediction_type") is not None
        expected = PREDICTIONS[kind] if has_option else ("flow_prediction" if kind == "flow" else "epsilon",)
        if prediction_type not in expected:
            *others, last = map(repr, expected)
            choice = f"{', '.join(others)} or {last}" if others else last
            raise SettingError("prediction_type", f"={prediction_type!r}: expected {choice}, {name} has no other")
        if has_option:
            changes["prediction_type"] = prediction_type
    if shift is not None:
        check_positive("shift", shift)
        if kind != "flow":
            raise SettingError("shift", f"={shift!r}: leave it out, {name} has no flow schedule")
        changes["flow_shift" if _option(config, "use_flow_sigmas") else "shift"] = shift
        changes |= {key: False for key in ("use_dynamic_shifting", *_OTHER_GRIDS) if _option(config, key)}
    return changes


def with_settings(scheduler: Any, prediction_type: str | None = None, shift: float | None = None) -> Any:
    """Returns a scheduler with a user's settings, which sampling then follows; without any, the same scheduler.

    Args:
        scheduler: A diffusers scheduler; not changed.
        prediction_type: As diffusers spells it.
        shift: ``k`` of a flow; it turns off dynamic shifting, and grids of Karras and others.

    Raises:
        SettingError: A setting that the scheduler does not have, or a ``shift`` that is not finite and > 0.
        TypeError: A ``shift`` that is not a number.
    """
    changes = setting_changes(scheduler, prediction_type, shift)
    return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler


def check_sampler(scheduler: Any) -> None:
    """Raises SettingError if the scheduler cannot sample with its ``prediction_type``."""
    trial, zeros = type(scheduler).from_config(scheduler.config), torch.zeros(1, 1, 1, 1, dtype=torch.float32)
    try:
        trial.set_timesteps(10)  # the first steps may have other formulas
        with torch.random.fork_rng(devices=[]):
            for timestep in trial.timesteps:
                trial.step(trial.scale_model_input(zeros, timestep), timestep, zeros)
    except Exception as error:  # other errors are about arguments that only a pipeline passes
        if "prediction_type" in str(error):
            given = _option(scheduler.config, "prediction_type")
            message = f"expected another, {type(scheduler).__name__} cannot sample with it"
            raise SettingError("prediction_type", f"={given!r}: {message}") from error


def _option(config: Any, key: str, default: Any = None) -> Any:
    """Reads an option of a configuration: diffusers' own, a mapping, or an object with attributes."""
    return config.get(key, default) if isinstance(config, Mapping) else getattr(config, key, default)


def _bases(scheduler: Any) -> list[str]:
    return [base.__name__ for base in type(scheduler).__mro__]


def _is_flow(scheduler: Any) -> bool:
    """Tells flow schedulers, by class or by ``use_flow_sigmas``, which refused schedulers may have too."""
    names, config = _bases(scheduler), getattr(scheduler, "config", None)
    solver = _option(config, "use_flow_sigmas", False) and not any(name in _REFUSED for name in names)
    return config is not None and (bool(solver) or any(name in _FLOW for name in names))
