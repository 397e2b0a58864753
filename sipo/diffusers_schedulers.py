"""What a diffusers scheduler says about noise levels, read without importing diffusers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from sipo.levels import check_count, check_positive

_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
# Options of a flow scheduler that bend its grid of σ away from that of docs/math.md §3.
_UNMODELLED_FLOW_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

_EXPLODING = "its samples are x0 + sigma * noise, scaled by its own rule (variance exploding)"
_CONTINUOUS = "its time is continuous, without a table of levels"
_TOKENS = "it works on discrete tokens"
_STAGES = "it goes through stages of several resolutions"
# Why, of those that have neither alphas_cumprod nor a flow's plain grid.
_REFUSED = {
    "CMStochasticIterativeScheduler": _EXPLODING,
    "CosineDPMSolverMultistepScheduler": _EXPLODING,
    "EDMDPMSolverMultistepScheduler": _EXPLODING,
    "EDMEulerScheduler": _EXPLODING,
    "KarrasVeScheduler": _EXPLODING,
    "ScoreSdeVeScheduler": _EXPLODING,
    "ConsistencyDecoderScheduler": "it has two levels alone, those of a consistency decoder",
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
    "MiniMaxH3Scheduler": "its timesteps run from 0 to 1, and its grid has a step less than it is asked for",
    "PiflowScheduler": "its network predicts several levels at once",
    "RFD4ProteinaScheduler": "it is of protein structures",
}


class SchedulerFacts(NamedTuple):
    """A discrete schedule has ``alphas_cumprod`` (``[T]``); a flow has what follows it, and no ``alphas_cumprod``."""

    prediction_type: str
    num_train_timesteps: int
    alphas_cumprod: Tensor | None = None
    shift: float = 1.0
    shift_terminal: float | None = None
    invert_sigmas: bool = False


def read_scheduler(scheduler: Any, shift: float | None = None, image_seq_len: int | None = None) -> SchedulerFacts:
    """Reads a flow scheduler by the name of its class, or of one that it inherits from; others by ``alphas_cumprod``.

    Args:
        scheduler: A diffusers scheduler, with its ``config``.
        shift: In place of the scheduler's own; for flow schedulers alone.
        image_seq_len: Number of the image's tokens, which ``use_dynamic_shifting`` makes the shift of.

    Raises:
        TypeError: A number of the wrong type.
        ValueError: A scheduler that is not modelled, or an option of it that is not.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)

    def option(key: str, default: Any = None) -> Any:
        return getattr(config, key, default)

    if not _is_flow(scheduler):
        table = getattr(scheduler, "alphas_cumprod", None)
        if config is None or table is None:
            why = [_REFUSED[base] for base in _bases(scheduler) if base in _REFUSED]
            reason = why[0] if why else "it has no alphas_cumprod"
            expected = f"expected one with alphas_cumprod or use_flow_sigmas, or {', '.join(_FLOW)}"
            raise ValueError(f"scheduler {name} is not modelled, {reason}: {expected}")
        if shift is not None:
            raise ValueError(f"shift={shift!r}: expected None, {name} is not a flow schedule here")
        if option("timestep_type") == "continuous":
            raise ValueError(f"{name} has timestep_type='continuous': expected 'discrete' timesteps")
        return SchedulerFacts(option("prediction_type", "epsilon"), int(option("num_train_timesteps")), table)

    for key in _UNMODELLED_FLOW_OPTIONS:
        if option(key):
            raise ValueError(f"{name} has {key}={option(key)!r}: expected a flow schedule without it")
    if shift is None and option("use_dynamic_shifting", False):
        shift = _dynamic_shift(name, config, image_seq_len)
    elif shift is None and option("use_flow_sigmas", False):
        shift = option("flow_shift", 1.0)
    elif shift is None:
        # set_shift() changes a property of those that have it, and leaves their configuration as it was
        shift = scheduler.shift if hasattr(type(scheduler), "shift") else option("shift", 1.0)
    return SchedulerFacts(
        option("prediction_type", "flow"),
        int(option("num_train_timesteps")),
        shift=shift,
        shift_terminal=option("shift_terminal") or None,  # diffusers takes 0 for none
        invert_sigmas=bool(option("invert_sigmas", False)),
    )


def with_settings(scheduler: Any, prediction_type: str | None = None, shift: float | None = None) -> Any:
    """The scheduler with a user's settings in place of its own, which its sampling then follows; itself without any.

    Args:
        scheduler: A diffusers scheduler; not changed.
        prediction_type: As diffusers spells it.
        shift: ``k`` of a flow; dynamic shifting is then off.

    Raises:
        TypeError, ValueError: A setting that the scheduler does not have, or a ``shift`` that is not finite and > 0.
    """
    name, config, flow = type(scheduler).__name__, scheduler.config, _is_flow(scheduler)
    changes: dict[str, Any] = {}
    if prediction_type is not None:
        own = "flow_prediction" if flow else "epsilon"  # of those without the option
        if "prediction_type" in config:
            changes["prediction_type"] = prediction_type
        elif prediction_type != own:
            raise ValueError(f"prediction_type={prediction_type!r}: expected {own!r}, {name} samples no other")
    if shift is not None:
        check_positive("shift", shift)
        if not flow:
            raise ValueError(f"shift={shift!r}: expected None, {name} is not a flow schedule here")
        changes["flow_shift" if getattr(config, "use_flow_sigmas", False) else "shift"] = shift
        changes["use_dynamic_shifting"] = False
    return type(scheduler).from_config(config, **changes) if changes else scheduler


def _bases(scheduler: Any) -> list[str]:
    return [base.__name__ for base in type(scheduler).__mro__]


def _is_flow(scheduler: Any) -> bool:
    """``use_flow_sigmas`` is an option of schedulers that have ``alphas_cumprod`` as well, and of refused ones."""
    names, config = _bases(scheduler), getattr(scheduler, "config", None)
    solver = getattr(config, "use_flow_sigmas", False) and not any(name in _REFUSED for name in names)
    return config is not None and (bool(solver) or any(name in _FLOW for name in names))


def _dynamic_shift(name: str, config: Any, image_seq_len: int | None) -> float:
    """``k`` of a resolution, as ``calculate_shift`` of diffusers' pipelines has it, with their defaults.

    μ is linear in the number of tokens; k is exp(μ), or with ``time_shift_type="linear"`` μ itself.
    """
    linear = getattr(config, "time_shift_type", "exponential") == "linear"
    if image_seq_len is None:
        raise ValueError(
            f"{name} has use_dynamic_shifting=True: expected image_seq_len=, the number of tokens of the resolution "
            f"trained on, or shift=, which is {'mu' if linear else 'exp(mu)'} there"
        )
    check_count("image_seq_len", image_seq_len, 1)
    base, most = getattr(config, "base_image_seq_len", 256), getattr(config, "max_image_seq_len", 4096)
    low, high = getattr(config, "base_shift", 0.5), getattr(config, "max_shift", 1.15)
    if base == most:
        raise ValueError(f"{name} has base_image_seq_len={base!r}: expected another than max_image_seq_len")
    slope = (high - low) / (most - base)
    mu = image_seq_len * slope + (low - slope * base)
    return float(mu) if linear else math.exp(mu)
