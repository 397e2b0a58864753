"""Backends that are wrong on purpose, and the self-test: every check must catch the faults that it names.

A fault (a class of ``wrong_results.py`` or ``wrong_use.py``) wraps a backend's module where ``pair_loss.py`` looks it
up, so that everything above it runs as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks.gpu_check import wrong_use  # noqa: F401 # fills FAULTS
from benchmarks.gpu_check.context import CHECKS, Context, NotRunError
from benchmarks.gpu_check.wrong_results import FAULTS, OF_FUSED
from sipo_kernels import backends


@contextlib.contextmanager
def injected(name: str) -> Iterator[None]:
    """Every backend has fault ``name`` meanwhile."""
    kind, real = FAULTS[name], backends.module
    for attribute in ("calls", "last", "seen"):  # what a fault remembers between calls starts afresh
        if hasattr(kind, attribute):
            setattr(kind, attribute, type(getattr(kind, attribute))())

    def module(backend: str) -> Any:
        faulty = kind(real(backend))
        return SimpleNamespace(forward=faulty.forward, gradient=faulty.gradient, mend=faulty.mend)

    backends.module = module
    try:
        yield
    finally:
        backends.module = real


class SelfTestRow(NamedTuple):
    """One check with one fault: ``"caught"``, ``"missed"``, ``"not run"`` (without one: ``"passes"``); what it said."""

    check: str
    fault: str
    outcome: str
    said: str


def try_check(name: str, context: Context, fault: str | None) -> SelfTestRow:
    """Runs a check on a backend with a fault (or without: a check must pass before its failures mean anything)."""
    if CHECKS[name].needs_gpu and not context.on_gpu:
        return SelfTestRow(name, fault or "", "not run", "needs a GPU")
    if fault in OF_FUSED and context.backend not in backends.FUSED:
        return SelfTestRow(name, fault or "", "not run", f"{context.backend} has nothing of the kind")
    try:
        with injected(fault) if fault else contextlib.nullcontext():
            CHECKS[name].run(context)
    except AssertionError as said:
        return SelfTestRow(name, fault or "", "caught" if fault else "missed", str(said))
    except NotRunError as why:
        return SelfTestRow(name, fault or "", "not run", str(why))
    return SelfTestRow(name, fault or "", "missed" if fault else "passes", "")


def self_test(backend: str, device: str, report: Callable[[SelfTestRow], None]) -> bool:
    """Every check without a fault and with each fault that it names, quickly; whether all is as it should be."""
    good = True
    for name, check in CHECKS.items():
        for fault in (None, *check.faults):
            try:
                row = try_check(name, Context(backend, device, quick=True), fault)
            except Exception as error:  # a fault must end in a failed comparison, not in an accident
                row = SelfTestRow(name, fault or "", "missed", f"{type(error).__name__}: {error}")
            good = good and row.outcome != "missed"
            report(row)
    return good
