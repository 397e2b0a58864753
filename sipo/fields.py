"""Checks the fields of a dataclass of settings against their annotations, in Python as in YAML."""

from __future__ import annotations

import contextlib
import difflib
import math
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from sipo.files import short


class Allowed(NamedTuple):
    """The numbers that a field may have, as metadata of ``Annotated``."""

    values: Callable[[float], bool]
    expected: str


AtLeast0 = Annotated[int, Allowed(lambda value: value >= 0, "at least 0")]
AtLeast1 = Annotated[int, Allowed(lambda value: value >= 1, "at least 1")]
Positive = Annotated[float, Allowed(lambda value: 0 < value < math.inf, "a finite number > 0")]
NotNegative = Annotated[float, Allowed(lambda value: 0 <= value < math.inf, "a finite number >= 0")]
Share = Annotated[float, Allowed(lambda value: 0 <= value < 1, "a number >= 0 and < 1")]

_WORDS = {int: "an integer", float: "a number", bool: "True, False", str: "a string", Path: "a path", NoneType: "None"}

_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}


def nearest(name: str, names: Iterable[str], least: float) -> str | None:
    """Returns the name that is spelt most like ``name``, if the two are at least this similar (from 0 to 1)."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=least)), None)


def check_fields(settings: Any) -> None:
    """Checks every field of a dataclass.

    Raises:
        TypeError: a value of another type than its annotation.
        ValueError: a value that is none of the choices, or a number out of range.
    """
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        kinds = _kinds(hint)
        fitting = [kind for kind in kinds if _fits(value, kind)]
        if not fitting:
            words = ", ".join(dict.fromkeys(map(_words, kinds)))
            if get_origin(kinds[0]) is Literal:
                raise ValueError(f"{name}={short(value)}: expected one of {words}")
            raise TypeError(f"{name}={short(value)}: expected {' or '.join(words.rsplit(', ', 1))}")
        for allowed in getattr(fitting[0], "__metadata__", ()):
            if not allowed.values(value):
                raise ValueError(f"{name}={short(value)}: expected {allowed.expected}")


def from_yaml(value: Any, hint: Any) -> Any:
    """Gives a YAML value the type of its field where that loses nothing; any other is returned for the check to refuse.

    Whole numbers become floats, and so does text such as 1e-4, which YAML 1.1 does not read as a number. YAML 1.1's
    words for Booleans are taken as such where a Boolean is expected.

    Raises:
        ValueError: an integer that does not fit into 64 bits.
    """
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"{short(value)}: expected an integer of 64 bits")
    for kind in _kinds(hint):
        if kind is bool and isinstance(value, str) and value in _BOOLEANS:
            return _BOOLEANS[value]
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                return float(value)
        if isinstance(value, list) and get_origin(kind) in (list, tuple) and _fits(value, kind):
            return get_origin(kind)(from_yaml(item, get_args(kind)[0]) for item in value)
    return value


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Returns the types that an annotation allows."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


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
        noun, _, more = _words(parts[0]).partition(" ")[2].partition(" ")
        count = f"{len(parts)} " if origin is tuple and parts[-1] is not ... else ""
        return f"a list of {count}{noun}s {more}".rstrip()
    kind = parts[0] if origin is Annotated else kind
    return _WORDS.get(kind) or f"a {kind.__name__}"
