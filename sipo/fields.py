"""Types and ranges of settings: checks the fields of a dataclass against their annotations.

pydantic gives the values of a YAML their types; a configuration that is made in Python has only these checks.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin


class Allowed(NamedTuple):
    """Numbers that a field may have, as metadata of ``Annotated``."""

    values: Callable[[float], bool]
    expected: str


AtLeast0 = Annotated[int, Allowed(lambda value: value >= 0, "at least 0")]
AtLeast1 = Annotated[int, Allowed(lambda value: value >= 1, "at least 1")]
Positive = Annotated[float, Allowed(lambda value: 0 < value < math.inf, "a finite number > 0")]
NotNegative = Annotated[float, Allowed(lambda value: 0 <= value < math.inf, "a finite number >= 0")]
Share = Annotated[float, Allowed(lambda value: 0 <= value < 1, "a number >= 0 and < 1")]

_WORDS = {int: "an integer", float: "a number", bool: "True, False", str: "a string", Path: "a path", NoneType: "None"}


def check_fields(settings: Any) -> None:
    """Checks every field of a dataclass.

    Raises:
        TypeError: a value of another type than its annotation.
        ValueError: a value that is none of the choices, or a number out of range.
    """
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        fitting = [kind for kind in kinds if _fits(value, kind)]
        if not fitting:
            words = ", ".join(dict.fromkeys(map(_words, kinds)))
            if get_origin(kinds[0]) is Literal:
                raise ValueError(f"{name}={value!r}: expected one of {words}")
            raise TypeError(f"{name}={value!r}: expected {' or '.join(words.rsplit(', ', 1))}")
        for allowed in getattr(fitting[0], "__metadata__", ()):
            if not allowed.values(value):
                raise ValueError(f"{name}={value!r}: expected {allowed.expected}")


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(value, parts[0])
    if origin is Literal:
        return value in parts
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        kinds = parts if origin is tuple and parts[-1] is not ... else parts[:1] * len(value)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (list, tuple):
        return f"a list of {_words(parts[0]).split()[-1]}s" if parts[0] in _WORDS else "a list of lists"
    kind = parts[0] if origin is Annotated else kind
    return _WORDS.get(kind) or f"a {kind.__name__}"
