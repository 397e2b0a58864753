"""Progress of long work, on standard error: a bar on a terminal, plain lines where it is a file or a pipe.

Functions that report progress take ``progress``: ``True`` for a bar on a terminal and lines elsewhere, ``False`` for
lines everywhere, and ``None`` for nothing.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

_T = TypeVar("_T")

EVERY = 30.0
"""Seconds between two plain lines of work that has no steps of its own to report."""

# The bar comes last, so that a narrow terminal shows the numbers and cuts the bar.
_BAR = "{desc}: {n_fmt}/{total_fmt} {unit}, {remaining} left, {rate_noinv_fmt} |{bar}|"
_STEPS = "step {n_fmt}/{total_fmt}%s, {remaining} left, {rate_inv_fmt}%s |{bar}|"


def bars(progress: bool | None) -> bool:
    """Whether a bar is drawn: on a terminal, and in a notebook, which has bars of its own."""
    return bool(progress) and (sys.stderr.isatty() or "ipykernel" in sys.modules)


# Work goes on where nothing can be printed: a terminal that was closed, a full disk.
_printing = contextlib.suppress(OSError)


class _Terminal:
    """Standard error for bars, without errors: one inside tqdm would leave tqdm's lock held, for all threads."""

    def write(self, text: str) -> None:
        with _printing:
            sys.stderr.write(text)

    def flush(self) -> None:
        with _printing:
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def __eq__(self, other: object) -> bool:
        return other is self or other is sys.stderr  # so that tqdm.write clears the bar first

    __hash__ = object.__hash__


def say(text: str) -> None:
    """Prints a line on standard error, above a progress bar that is shown."""
    with _printing:
        if not bars(True):
            # Not tqdm's: it takes a lock that forked processes share, and one that is killed meanwhile keeps it.
            print(text, file=sys.stderr, flush=True)
            return
        from tqdm.auto import tqdm

        tqdm.write(text, file=sys.stderr)


def _bar(**options: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(dynamic_ncols=True, file=_Terminal(), **options)


def duration(seconds: float) -> str:
    """Formats seconds: ``02:05``, ``1:00:07``."""
    from tqdm.auto import tqdm

    return str(tqdm.format_interval(seconds))


class Meter:
    """Counts items that are done, with a bar or a line every :data:`EVERY` seconds; short work prints no line.

    Args:
        name: what is done.
        unit: of the items, in the plural.
        progress: as in the module.
        total: how many there will be, where that is known.
    """

    def __init__(self, name: str, unit: str, progress: bool | None, total: int | None = None) -> None:
        self._name, self._unit, self._total = name, unit, total
        self._lines = progress is not None and not bars(progress)
        self._bar: Any = None
        if bars(progress):
            form = None if total is None else _BAR
            own = {"unit": f" {unit}" if total is None else unit, "bar_format": form}
            self._bar = _bar(desc=name, total=total, delay=1.0, **own)
        self._done = self._said = 0
        self._started = self._last = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Counts ``count`` more."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._last >= EVERY:
            self._say()

    def close(self) -> None:
        """Ends the bar; where lines were printed, the last has the whole count."""
        if self._bar is not None:
            self._bar.close()
        if self._said and self._said < self._done:
            self._say()

    def _say(self) -> None:
        self._last, self._said = time.monotonic(), self._done
        rate = self._done / max(self._last - self._started, 1e-9)
        text = f"{self._name}: {self._done}{'' if self._total is None else f'/{self._total}'} {self._unit}"
        text += f", {rate:.3g} {self._unit}/s"
        if self._total is not None:
            text += f", {duration((self._total - self._done) / rate)} left"
        say(text)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def track(items: Iterable[_T], name: str, unit: str, progress: bool | None) -> Iterator[_T]:
    """Yields the items, and counts them with a :class:`Meter` as they are done."""
    with Meter(name, unit, progress, len(items) if isinstance(items, Sized) else None) as meter:
        for item in items:
            yield item
            meter.update()


class StepProgress:
    """Progress of a run's optimiser steps: a bar that shows the newest log line, or a plain line for each.

    Args:
        progress: as in the module.
        steps: of the whole run.
        first: steps done before.
    """

    def __init__(self, progress: bool | None, steps: int, first: int) -> None:
        self._steps = steps
        self._lines = progress is not None and not bars(progress)
        self._bar: Any = None
        if bars(progress):
            self._bar = _bar(total=steps, initial=first, unit="step", bar_format=_STEPS % ("", ""))
        self._line = (first, time.monotonic())  # the newest
        self._start: tuple[int, float] | None = None

    def advance(self) -> None:
        """Counts a step."""
        if self._bar is not None:
            self._bar.update(1)

    def show(self, step: int, numbers: str, more: str = "") -> None:
        """Shows a log line.

        Args:
            step: that it is of.
            numbers: what is to be seen of it, the most important first.
            more: what a narrow terminal is to cut before the time.
        """
        if self._bar is not None:
            self._bar.bar_format = _STEPS % (numbers and f", {numbers}", more and f", {more}")
            self._bar.refresh()
        if not self._lines:
            return
        (before, then), now = self._line, time.monotonic()
        self._line = step, now
        each = (now - then) / (step - before)
        if self._start is None:  # what came before, which is mostly the first step, says little about the others
            self._start, rest = self._line, each
        else:
            rest = (now - self._start[1]) / (step - self._start[0])
        time_left = duration((self._steps - step) * rest)
        parts = (f"step {step}/{self._steps}", numbers, more, f"{each:.3g} s/step", f"{time_left} left")
        say(", ".join(part for part in parts if part))

    def note(self, step: int, numbers: str) -> None:
        """Shows what was measured beside, at a step."""
        if self._lines:
            say(f"step {step}/{self._steps}, {numbers}")

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
