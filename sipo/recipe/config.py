"""The configuration of ``sipo train``: one tree of dataclasses, read from YAML with ``key=value`` overrides.

The error for a name that does not exist says which is nearest. Needs PyYAML: ``pip install 'sipo[train]'``.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sipo.data.config import DataConfig
from sipo.families.config import ModelConfig
from sipo.fields import AtLeast1, NotNegative, check_fields, from_yaml
from sipo.files import FileError, expand, one_line, short
from sipo.recipe.key_hints import probable_key
from sipo.training.config import TrainingConfig
from sipo.yaml_files import parse_yaml, read_yaml
from sipo_kernels.backends import BACKENDS
from sipo_kernels.options import LossOptions, check_choice

_LONGEST = 300  # letters of a message's part that a user has written
TOY = "toy"
"""Replaces the path of a model or data set: a small one is then made from the configuration."""

# The type that training.mixed_precision rounds weights in float32 to.
_COMPUTED = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}

# Keys whose values may have ~ and environment variables in them.
_PATHS = (
    *("model.pretrained_model_name_or_path", "data.dataset_name", "data.cache", "training.output_dir"),
    "samples.validation_images",
)


class ConfigError(ValueError):
    """A configuration that cannot be used, in one line that names the key and what was expected."""


@dataclass(frozen=True)
class LossConfig(LossOptions):
    """The ``loss`` section: the options of the loss, and the other arguments of :class:`sipo.SIPOLoss`.

    Attributes:
        num_inference_steps: steps of the sampler in the importance ratio (docs/math.md §3); ``None`` for 50.
        backend: "auto", or one of ``sipo_kernels.backends.BACKENDS``.
    """

    num_inference_steps: AtLeast1 | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        check_choice("backend", self.backend, ("auto", *BACKENDS))
        if self.reduction != "mean":
            raise ValueError(
                f"reduction={self.reduction!r}: expected 'mean', the only one whose gradient does not depend on "
                "gradient_accumulation_steps"
            )


@dataclass(frozen=True)
class SampleConfig:
    """Samples to look at, drawn whenever validation runs.

    Attributes:
        validation_prompts: one image or clip for each; none draws nothing.
        validation_images: paths of the images that these are edits of, one for each prompt, for a family that takes
            them; "toy" is one of the toy pairs'.
        seed: of the first prompt's noise, the same at every validation; each further prompt's is one more.
        num_inference_steps: of the sampler.
        guidance_scale: classifier-free guidance scale; ``None`` takes the family's.
    """

    validation_prompts: list[str] = field(default_factory=list)
    validation_images: list[str] = field(default_factory=list)
    seed: int = 0
    num_inference_steps: AtLeast1 = 50
    guidance_scale: NotNegative | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Config:
    """The configuration of a run of ``sipo train``."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    loss: LossConfig = field(default_factory=LossConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        precision = self.training.mixed_precision
        if self.model.reference == "errors" and not self.data.reference_errors:
            raise ConfigError("data.reference_errors=False: expected True with model.reference='errors'")
        # bfloat16 and float16 do not meet in one operator, and a pair's errors are compared in one type.
        used = {f"model.dtype={self.model.dtype!r}": self.policy_dtype}
        if self.reference_kind != "adapter_off":
            used[f"model.reference_dtype={self.model.reference_dtype!r}"] = self.reference_dtype
        used[f"training.mixed_precision={precision!r}"] = _COMPUTED[precision]
        halves = {dtype: name for name, dtype in reversed(used.items()) if dtype != "float32"}  # the first of each type
        if len(halves) > 1:
            keys = " with ".join(reversed(halves.values()))
            raise ConfigError(f"{keys}: expected at most one half-precision type in a run")

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON and YAML values, with every default filled in."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain

    @property
    def reference_kind(self) -> str:
        """``model.reference`` with "auto" resolved: "adapter_off", "copy" or "errors"."""
        if self.model.reference != "auto":
            return self.model.reference
        if self.data.reference_errors:
            return "errors"
        return "adapter_off" if self.model.tuning == "lora" else "copy"

    @property
    def policy_dtype(self) -> str:
        """The type of the weights that policy and reference start from."""
        return self.model.dtype if self.model.tuning == "lora" else "float32"

    @property
    def reference_dtype(self) -> str:
        """``model.reference_dtype``, or the smallest type in which the reference predicts as the policy does."""
        if self.model.reference_dtype is not None:
            return self.model.reference_dtype
        return self.policy_dtype if self.model.tuning == "lora" else _COMPUTED[self.training.mixed_precision]

    @property
    def differing_types(self) -> str | None:
        """Why the types alone make a frozen reference predict other than the policy before training; ``None`` if not.

        Weights in float32 may be held in the type that autocast rounds them to; any other difference shows.
        """
        ours, theirs, precision = self.policy_dtype, self.reference_dtype, self.training.mixed_precision
        same = [ours, _COMPUTED[precision]] if ours == "float32" else [ours]
        if theirs in same:
            return None
        return (
            f"model.reference_dtype={theirs!r}: the policy's weights are {ours} and training.mixed_precision is "
            f"{precision!r}, so the two differ before training by what one of them rounds; expected "
            f"{' or '.join(dict.fromkeys(same))}"
        )

    @property
    def differing_start(self) -> str | None:
        """Why the run's reference predicts other than the policy before training; ``None`` if it does not."""
        return None if self.reference_kind == "adapter_off" else self.differing_types

    def reference_marks(self, whole: torch.dtype | None = None) -> dict[str, Any]:
        """Returns what identifies the reference and how it runs, for the functions of sipo.cache.reference_errors.

        Args:
            whole: see :func:`sipo.training.sharding.whole_dtype`.
        """
        marks = {
            name: getattr(self.model, name)
            for name in ("family", "pretrained_model_name_or_path", "revision", "variant")
        }
        # One that predicts as the policy does has the policy's type: the storage type does not change the errors.
        dtype = self.policy_dtype if self.differing_types is None else self.reference_dtype
        if whole is not None:
            dtype = f"{str(whole).removeprefix('torch.')}, norms too"
        if self.model.guidance_scale is not None:
            marks["guidance_scale"] = self.model.guidance_scale
        return marks | {"dtype": dtype, "mixed_precision": self.training.mixed_precision}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file and applies overrides ``section.key=value``, whose values are YAML too.

    Raises:
        ConfigError: a file that does not exist or is not YAML, an unknown key, a value that does not fit.
    """
    if Path(path).suffix in (".jsonl", ".parquet"):
        raise ConfigError(f"{path}: is data, expected a YAML configuration, whose data.dataset_name names it")
    try:
        tree = read_yaml(Path(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}, expected a YAML file") from error
    except FileError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(tree, dict):
        known = ", ".join(f.name for f in dataclasses.fields(Config))
        held = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{path}: holds {held}, expected the sections {known}")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{short(override)}: expected section.key=value")
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{short(override)}: {section} is no section")
        try:
            place[name] = parse_yaml(text, short(override))
        except FileError as error:
            raise ConfigError(str(error)) from error
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Config:
    """Makes a configuration from plain values.

    Raises:
        ConfigError: an unknown key, a value that does not fit.
    """
    made: Config = _section(Config, tree)
    return made


def _section(kind: Any, values: Any, place: tuple[str, ...] = ()) -> Any:
    """Makes the section at ``place``, an instance of the dataclass ``kind``, from plain values."""
    prefix = "".join(f"{name}." for name in place)
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix[:-1]}={short(values)}: expected a section of keys")
    given, hints = {}, typing.get_type_hints(kind)
    for name in map(str, values):
        if name not in hints:
            meant = probable_key((*place, name), list(_paths(Config)))
            expected = f"did you mean {meant}?" if meant else f"expected one of {', '.join(hints)}"
            raise ConfigError(f"{one_line(prefix + name, _LONGEST)}: no such key, {expected}")
    for each in dataclasses.fields(kind):
        name, hint, value = prefix + each.name, hints[each.name], values.get(each.name)
        if each.name not in values:
            if each.default is each.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{name}: missing, expected a value")
        elif dataclasses.is_dataclass(hint):
            given[each.name] = _section(hint, value, (*place, each.name))
        else:
            try:
                value = _expanded(value) if name in _PATHS else value
                given[each.name] = from_yaml(value, hint)
            except ValueError as error:
                raise ConfigError(f"{name}={one_line(error, _LONGEST)}") from error
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:  # it names the key and what was expected
        raise ConfigError(f"{prefix}{one_line(error, _LONGEST)}") from error


def _expanded(value: Any) -> Any:
    """Expands a path, or each of a list; what is no text is refused later."""
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    return expand(value) if isinstance(value, str) else value


def _paths(section: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields all keys of a section and of the sections in it."""
    for name, kind in typing.get_type_hints(section).items():
        yield (*place, name)
        if dataclasses.is_dataclass(kind):
            yield from _paths(kind, (*place, name))
