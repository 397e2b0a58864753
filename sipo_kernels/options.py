"""The options of the loss, each defined once: name, type, default, range or choices, meaning (docs/math.md §3 to §6).

Everything that takes, checks, lists or documents these options derives from :class:`LossOptions`: ``pair_loss`` and its
operator, ``reference``, ``SIPOLoss``, the ``loss`` section of the YAML, the model card and the tables of
``docs/options.md``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

# The orders are part of the C interface: csrc/pair_math.h has the same.
METHODS = ("diffusion_dpo", "dpo_cm", "sipo", "sdpo")
RATIOS = ("posterior", "reference")
LOSS_TYPES = ("sigmoid", "ipo", "hinge", "dmpo")
REDUCTIONS = ("mean", "sum", "none")
NONFINITE = ("propagate", "skip", "raise")
SMOOTHED_LOSS_TYPES = ("sigmoid", "dmpo")  # those that have a label_smoothing
# The smallest ε of "dmpo", which takes its logarithm; the published code has the same bound (§5).
LEAST_SMOOTHING = 1e-6
# β of each method where none is given (§5), by the number of dimensions of the batch: 4 for images, 5 for videos.
DEFAULT_BETA = {
    "diffusion_dpo": {4: 5000.0, 5: 2000.0},
    "dpo_cm": {4: 1000.0, 5: 20.0},
    "sipo": {4: 1000.0, 5: 20.0},
    "sdpo": {4: 1000.0, 5: 20.0},
}


def _choice(default: str, choices: tuple[str, ...], meaning: str, hidden: bool = False) -> Any:
    """Returns the field of an option with a fixed set of values; ``hidden`` as for :func:`_number`."""
    return field(default=default, metadata={"choices": choices, "meaning": meaning, "hidden": hidden})


def _number(
    default: float | None, allowed: Callable[[float], bool], expected: str, meaning: str, hidden: bool = False
) -> Any:
    """Returns the field of a numeric option; if the default is None, so may the option be.

    Args:
        default: Default value.
        allowed: Whether a number is in the range. A function, because torch.compile treats its constants as constants;
            it would turn those of a table into inputs of the graph.
        expected: The range, for error messages and the docs.
        meaning: What the option does, for the docs.
        hidden: Whether the loss's repr leaves the option out at its default, as it must for every option added from
            now on: a checkpoint holds the repr, and is refused where it differs.
    """
    metadata = {"allowed": allowed, "expected": expected, "meaning": meaning, "hidden": hidden}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class LossOptions:
    """The options of the preference loss, checked when they are made."""

    method: str = _choice("sipo", METHODS, "how pairs and samples are weighted (§5)")
    beta: float | None = _number(
        None,
        lambda value: 0 < value < math.inf,
        "a finite number > 0",
        "strength of the implicit reward in this project's convention (§7); `None` takes the default of the method for "
        "images (4-D batches) or videos (5-D)",
    )
    ratio: str = _choice(
        "posterior", RATIOS, "the importance ratio (§3); `reference` for pairs sampled from the reference itself"
    )
    clip_low: float = _number(
        0.1,
        lambda value: 0 <= value <= 1,
        "0 <= clip_low <= 1 (weights are clipped below at 1 - clip_low)",
        "weights are at least `1 - clip_low` (§4)",
    )
    clip_high: float = _number(
        0.1,
        lambda value: 0 <= value < math.inf,
        "clip_high >= 0 (weights are clipped above at 1 + clip_high)",
        "weights are at most `1 + clip_high` (§4)",
    )
    mask_threshold: float = _number(
        0.9,
        lambda value: 0 <= value <= 1,
        "0 <= mask_threshold <= 1 (0 turns the mask off)",
        "pairs whose smaller ratio is below this are masked; 0 turns the mask off, and `diffusion_dpo` has none (§4)",
    )
    reduction: str = _choice(
        "mean", REDUCTIONS, "over pairs, where masked pairs count in the mean's divisor; `none` returns a loss per pair"
    )
    nonfinite: str = _choice(
        "propagate",
        NONFINITE,
        "what happens to a pair with NaN or infinity (§8): it propagates, is skipped as if masked, or raises an error, "
        "which reads the result on the host",
    )
    loss_type: str = _choice("sigmoid", LOSS_TYPES, "the loss of a logit (§5, relatives)", hidden=True)
    label_smoothing: float = _number(
        0.0,
        lambda value: 0 <= value < 0.5,
        "0 <= label_smoothing < 0.5 (the share of pairs whose labels are taken to be swapped)",
        "the share of pairs whose labels are taken to be swapped, for `sigmoid` and `dmpo` (§5, relatives)",
        hidden=True,
    )
    safeguard: float | None = _number(
        None,
        lambda value: 0 <= value <= 1,
        "None (off) or 0 <= safeguard <= 1",
        "μ of Safeguarded DPO: the rejected sample's gradient is scaled down where it would undo the chosen sample's; "
        "the loss keeps its value, and the gradient is no longer its derivative (§6, relatives). `None` turns it off",
        hidden=True,
    )

    def __post_init__(self) -> None:
        """Checks every value and turns numbers into floats.

        Raises:
            TypeError: A number is not a number.
            ValueError: A choice or number outside its range, or options that do not go together.
        """
        values = self.values()
        check_options(values)
        for name in NUMBERS:
            if values[name] is not None:
                object.__setattr__(self, name, float(values[name]))
        object.__setattr__(self, "_made", {})  # settings by number of dimensions, for settings_of

    def values(self) -> dict[str, Any]:
        """Returns the loss's options by name, without the fields that a subclass adds."""
        return {name: getattr(self, name) for name in DEFAULTS}

    def beta_for(self, ndim: int) -> float:
        """Returns β for a batch of ``ndim`` dimensions: ``beta``, or the default for the method and the medium (§5).

        Raises:
            ValueError: ``beta`` is None and ``ndim`` is neither 4 (images) nor 5 (videos).
        """
        return default_beta(self.method, ndim) if self.beta is None else self.beta

    def settings(self, ndim: int) -> Settings:
        """Returns the options with the β of a batch of ``ndim`` dimensions.

        Raises:
            ValueError: As :meth:`beta_for`.
        """
        return Settings(**(self.values() | {"beta": self.beta_for(ndim)}))


@dataclass(frozen=True)
class Settings(LossOptions):
    """The options of one call with β resolved to a number, and what backends derive from them."""

    beta: float = 1.0

    @property
    def smoothing(self) -> float:
        """ε of the loss type's formula (§5)."""
        return max(self.label_smoothing, LEAST_SMOOTHING) if self.loss_type == "dmpo" else self.label_smoothing

    @property
    def masks(self) -> bool:
        """Whether pairs are masked by their ratio (§4): never for ``diffusion_dpo`` or a threshold of 0."""
        return self.method != "diffusion_dpo" and self.mask_threshold > 0

    @property
    def skip_nonfinite(self) -> bool:
        """Whether pairs that are not finite are left out (§8)."""
        return self.nonfinite == "skip"

    def loss_scale(self, pairs: int) -> float:
        """Returns the factor between the sum over pairs and the reduced loss: 1/B for the mean."""
        return 1.0 / pairs if self.reduction == "mean" else 1.0


class OptionValues(TypedDict, total=False):
    """:class:`LossOptions` as keyword arguments, for type checkers and editors; a test holds the two equal."""

    method: str
    beta: float | None
    ratio: str
    clip_low: float
    clip_high: float
    mask_threshold: float
    reduction: str
    nonfinite: str
    loss_type: str
    label_smoothing: float
    safeguard: float | None


_FIELDS = dataclasses.fields(LossOptions)
DEFAULTS: dict[str, Any] = {f.name: f.default for f in _FIELDS}
"""Default of every option, in order."""
# Plain tuples, which torch.compile can trace: (name, choices) and (name, allowed, expected, whether None is allowed).
_CHOICES = tuple((f.name, f.metadata["choices"]) for f in _FIELDS if "choices" in f.metadata)
_NUMBERS = tuple(
    (f.name, f.metadata["allowed"], f.metadata["expected"], f.default is None)
    for f in _FIELDS
    if "allowed" in f.metadata
)
NUMBERS = tuple(name for name, *_ in _NUMBERS)
HIDDEN = frozenset(f.name for f in _FIELDS if f.metadata["hidden"])


def default_beta(method: str, ndim: int) -> float:
    """Returns the default β of a method for a batch of ``ndim`` dimensions (§5).

    Raises:
        ValueError: ``ndim`` is neither 4 (images) nor 5 (videos).
    """
    if ndim not in DEFAULT_BETA[method]:
        raise ValueError(
            f"beta=None with a {ndim}-D model_pred: expected a number (defaults are for images, 4-D, and videos, 5-D)"
        )
    return DEFAULT_BETA[method][ndim]


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


def _check_number(name: str, value: object, allowed: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: expected {expected}")
    if not allowed(float(value)):
        # In a compiled function the value may be a symbol, which a format string does not accept.
        if torch.compiler.is_compiling():
            raise ValueError(f"{name}: expected {expected}")
        raise ValueError(f"{name}={value!r}: expected {expected}")


def check_options(values: Mapping[str, Any]) -> None:
    """Checks the values of all options.

    Raises:
        TypeError: A number is not a number.
        ValueError: A choice or number outside its range, or options that do not go together.
    """
    for name, choices in _CHOICES:
        check_choice(name, values[name], choices)
    for name, allowed, expected, optional in _NUMBERS:
        if not (optional and values[name] is None):
            _check_number(name, values[name], allowed, expected)
    loss_type, smoothing = values["loss_type"], values["label_smoothing"]
    if smoothing and loss_type not in SMOOTHED_LOSS_TYPES:
        smoothed = " or ".join(map(repr, SMOOTHED_LOSS_TYPES))
        raise ValueError(
            f"label_smoothing={smoothing!r} with loss_type={loss_type!r}: expected 0, or loss_type {smoothed}"
        )


def check_names(given: Iterable[str]) -> None:
    """Raises TypeError, with the nearest name, for a name that is no option of the loss."""
    for name in given:
        if name not in DEFAULTS:
            near = difflib.get_close_matches(name, DEFAULTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(DEFAULTS)}"
            raise TypeError(f"{name}: no such option, {hint}")


def make_options(options: LossOptions | None, given: Mapping[str, Any]) -> LossOptions:
    """Returns the options of a loss that takes either ``options=`` or keyword arguments.

    Raises:
        TypeError: Both were given, an unknown name, or a number that is not a number.
        ValueError: As :class:`LossOptions`.
    """
    if options is None:
        check_names(given)
        return LossOptions(**given)
    if given:
        raise TypeError(f"options and {next(iter(given))} given: expected either options= or keyword arguments")
    if not isinstance(options, LossOptions):
        raise TypeError(f"options is a {type(options).__name__}: expected sipo_kernels.LossOptions")
    return options


def make_settings(ndim: int, options: LossOptions | None, given: Mapping[str, Any]) -> Settings:
    """Returns the settings of a call with a batch of ``ndim`` dimensions; arguments and errors of make_options."""
    return make_options(options, given).settings(ndim)


# Typed, because True == 1 and only one of them is a number.
@functools.lru_cache(maxsize=64, typed=True)
def _cached_settings(ndim: int, **given: Any) -> Settings:
    return make_settings(ndim, None, given)


def settings_of(ndim: int, options: LossOptions | None, given: Mapping[str, Any]) -> Settings:
    """Returns what :func:`make_settings` does, remembered: training asks for the same settings at every step."""
    if options is None:
        try:
            return _cached_settings(ndim, **given)
        except TypeError:  # of a wrong type, or so wrong that no cache can hold it: this says which and why
            return make_settings(ndim, None, given)
    made: dict[int, Settings] | None = getattr(options, "_made", None)
    if given or made is None:
        return make_settings(ndim, options, given)
    if ndim not in made:
        made[ndim] = options.settings(ndim)
    return made[ndim]


def show_options(function: Any) -> None:
    """Lists the options in the signature of a function that takes them as ``**given``, for help() and notebooks."""
    signature = inspect.signature(function)
    listed = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in _FIELDS
    ]
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[*kept, *listed])


def markdown_tables() -> str:
    """Returns the tables of ``docs/options.md``: the options, and the default β of each method."""
    rows = ["| option | default | values | meaning |", "|---|---|---|---|"]
    for f in _FIELDS:
        choices = f.metadata.get("choices")
        if choices:
            values = ", ".join(f"`{choice}`" for choice in choices)
        else:
            values = re.sub(r" \(.*?\)", "", f.metadata["expected"])  # without what an error explains
            values += ", or None" if f.default is None and "None" not in values else ""
        rows.append(f"| `{f.name}` | `{f.default}` | {values} | {f.metadata['meaning']} |")
    rows += ["", "| method | default `beta` for images | for videos |", "|---|---|---|"]
    rows += [f"| `{method}` | {betas[4]:g} | {betas[5]:g} |" for method, betas in DEFAULT_BETA.items()]
    return "\n".join(rows)


# help() shows the options' meanings, which are written in one place alone.
LossOptions.__doc__ = f"{LossOptions.__doc__}\n\n    Attributes:\n" + "\n".join(
    f"        {f.name}: {f.metadata['meaning'].replace('`', '``')}." for f in _FIELDS
)
