"""Reads the logs of a run, for resuming and for reports; damaged lines are named and left out.

``metrics.jsonl`` and ``timesteps.jsonl`` have a JSON object in each line, whose ``step`` says what it belongs to.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sipo.files import FileError, check_regular, parse_json, short

MOST = 10**12
"""Steps, pairs and counts are at most so many in a sound line."""

_LONGEST = 1 << 20  # bytes of a line; one of `timesteps.jsonl` has about 10,000
_LARGEST = 1e100  # float32 ends at 3.4e38, and squares of this are finite
_NAMED = 3  # damaged lines in a message
_SHARES = ("rewards/accuracies", "active_fraction")
_ERRORS = ("model_mse", "ref_mse")  # mean squares
_COUNTS = ("nonfinite_pairs", "nonfinite_steps")


class LogWarning(UserWarning):
    """Damaged lines of a log were left out."""


class Log(NamedTuple):
    """The content of a log.

    Attributes:
        lines: the sound ones, in order.
        texts: the same as they are in the file, each with its end.
        damage: of each of the others, its number in the file, counted from 1, and what is wrong with it.
    """

    lines: list[dict[str, Any]]
    texts: list[bytes]
    damage: list[str]

    def warn(self, path: Path, more: str = "") -> None:
        """Warns of the damage in one line, if there is any.

        Args:
            path: of the log.
            more: what else is to be said.
        """
        if not self.damage:
            return
        named = ", ".join(self.damage[:_NAMED]) + (", …" if len(self.damage) > _NAMED else "")
        count = f"{len(self.damage)} damaged line{'s' * (len(self.damage) > 1)}"
        warnings.warn(f"{path}: {count} left out: {named}{more}", LogWarning, stacklevel=3)


def read_log(path: str | Path, fault: Callable[[dict[str, Any]], str]) -> Log:
    """Reads a log, damaged or not.

    A last line without its end that is not whole is neither read nor named as damage: a running process is writing it,
    or one was killed there. Of lines whose steps contradict each other, those that fewest others contradict are kept.

    Args:
        path: of the log.
        fault: says what is wrong with a line that has a step; "" for nothing.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: no regular file.
        OSError: it cannot be read.
    """
    check_regular(Path(path))
    found: list[tuple[int, dict[str, Any], bytes]] = []
    damage: list[tuple[int, str]] = []
    number = 0
    with Path(path).open("rb") as file:
        while text := file.readline(_LONGEST):
            number += 1
            rest = text
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(_LONGEST)  # of a line that is too long, or nothing
            whole = text if text.endswith(b"\n") else text + b"\n"
            try:
                found.append((number, _parse(whole, fault), whole))
            except FileError as error:
                if rest:  # the line has an end
                    damage.append((number, str(error)))
    kept = _in_order([(line["step"], line.get("kind", "training") != "training") for _, line, _ in found])
    for place in set(range(len(found))) - set(kept):
        damage.append((found[place][0], f"step={found[place][1]['step']} is out of order"))
    return Log(
        [found[place][1] for place in kept],
        [found[place][2] for place in kept],
        [f"line {number} ({reason})" for number, reason in sorted(damage)],
    )


def read_metrics(path: str | Path, kind: str = "training") -> list[dict[str, Any]]:
    """Returns the lines of a run's ``metrics.jsonl``, in order: those of "training", or those of its "validation".

    Damaged lines are left out, with a warning that names them. Errors as for :func:`read_log`.
    """
    log = read_log(path, metrics_fault)
    log.warn(Path(path))
    return [line for line in log.lines if line.get("kind", "training") == kind]


def metric_values(history: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Returns one metric over the log lines, NaN where a line lacks it."""
    return [math.nan if line.get(name) is None else float(line[name]) for line in history]


def step_mean(history: Sequence[dict[str, Any]], name: str) -> float:
    """Averages a metric over the steps from the start of a run; a line stands for the steps since the line before."""
    total, covered, previous = 0.0, 0, 0
    for line, value in zip(history, metric_values(history, name), strict=True):
        if not math.isnan(value):
            total += value * (line["step"] - previous)
            covered += line["step"] - previous
        previous = line["step"]
    return total / covered if covered else math.nan


def metrics_fault(line: dict[str, Any]) -> str:
    """Returns what is wrong with a line of ``metrics.jsonl``; "" if nothing is."""
    if not isinstance(line.get("kind", "training"), str):
        return f"kind={show(line['kind'])}, expected a name"
    for name, value in line.items():
        if name == "kind" or value is None:
            continue
        if not is_number(value):
            return f"{name}={show(value)}, expected a finite number or null"
        kind = name.removeprefix("validation/")
        if kind in _SHARES and not 0 <= value <= 1:
            return f"{name}={value}, expected a number from 0 to 1"
        if kind in _ERRORS and value < 0:
            return f"{name}={value}, expected at least 0"
        # The names of our own; a loss may have metrics of any other name.
        if (kind in _COUNTS or name == "validation/pairs") and not (value == int(value) and is_count(int(value))):
            return f"{name}={show(value)}, expected a count"
    return ""


def is_number(value: object) -> bool:
    """Whether a JSON value is a number of a usable size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def is_count(value: object, least: int = 0) -> bool:
    """Whether a JSON value is an integer from ``least`` to :data:`MOST`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def show(value: object) -> str:
    """Formats a JSON value for a message, however large it is."""
    if isinstance(value, (list, dict)):
        return "[…]" if isinstance(value, list) else "{…}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MOST:
        return f"an integer of {value.bit_length()} bits"
    return short(value, 40)


def _parse(text: bytes, fault: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Parses a line to an object with a step.

    Raises:
        FileError: what is wrong with it, without the place.
    """
    if len(text) > _LONGEST:
        raise FileError(f"over {_LONGEST} bytes")
    try:
        line = parse_json(text.decode("utf-8"), "")
    except UnicodeDecodeError as error:
        raise FileError(f"not UTF-8, byte {error.start}") from error
    except FileError as error:
        raise FileError("not JSON") from error
    if not isinstance(line, dict):
        raise FileError("no JSON object")
    step = line.get("step")
    if not is_count(step, 1):
        raise FileError(f"step={show(step)}, expected an integer of at least 1" if "step" in line else "no step")
    if reason := fault(line):
        raise FileError(reason)
    return line


def _in_order(keys: list[tuple[int, bool]]) -> list[int]:
    """Places of the longest part of ``keys`` that rises throughout."""
    tops: list[tuple[int, bool]] = []  # the least key that a rising part of each length ends with,
    places: list[int] = []  # its place,
    before: list[int] = []  # and of every key the place of the one before it in the longest part that it ends
    for place, key in enumerate(keys):
        length = bisect_left(tops, key)
        before.append(places[length - 1] if length else -1)
        if tops[length : length + 1] != [key]:  # of two alike the first
            tops[length : length + 1], places[length : length + 1] = [key], [place]
    kept = []
    place = places[-1] if places else -1
    while place >= 0:
        kept.append(place)
        place = before[place]
    return kept[::-1]
