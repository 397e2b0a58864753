"""Backends that are wrong on purpose, and the self-test: every check must catch the faults that it names.

A fault (``wrong_results.py``, ``wrong_use.py``) wraps a backend's module where ``pair_loss.py`` looks it up, so that
everything above it runs as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks.gpu_check import wrong_results as results
from benchmarks.gpu_check import wrong_use as use
from benchmarks.gpu_check.context import CHECKS, Context, NotRun
from sipo_kernels import backends

FAULTS: dict[str, type[results.Faulty]] = {
    "scaled gradient": results.ScaledGradient,
    "unwritten element": results.UnwrittenElement,
    "gradient in storage order": results.StorageOrder,
    "wandering gradient": results.WanderingGradient,
    "masked pairs leak": results.MaskedPairsLeak,
    "NaN leaks": results.NanLeaks,
    "gradient handed out twice": results.TwiceHandedOut,
    "upstream ignored": results.UpstreamIgnored,
    "expectation ignored": results.ExpectationIgnored,
    "mend skipped": results.MendSkipped,
    "mend scales": results.MendScales,
    "mend mixes pairs": results.MendsOnePair,
    "mend beside": results.MendsBeside,
    "nothing remembered": results.NothingRemembered,
    "infinity remembered": results.InfinityRemembered,
    "shifted logits": results.ShiftedLogits,
    "wandering logits": results.WanderingLogits,
    "wrong metrics": results.WrongMetrics,
    "totals not added": results.TotalsNotAdded,
    "totals twice": results.TotalsTwice,
    "neighbour's bin": results.NeighboursBin,
    "wandering totals": results.WanderingTotals,
    "skip ignored": results.SkipIgnored,
    "mask ignored": results.MaskIgnored,
    "allocates a copy": use.AllocatesACopy,
    "launches again": use.LaunchesAgain,
    "sums in torch": use.SumsInTorch,
    "reads on the host": use.ReadsOnTheHost,
    "compares on the host": use.ComparesOnTheHost,
    "waits for the device": use.WaitsForTheDevice,
    "frozen inputs": use.FrozenInputs,
    "frozen expectation": use.FrozenExpectation,
    "another stream": use.AnotherStream,
    # For the processes around the checks, and named by none of them.
    "crashes": use.Crashes,
    "hangs": use.Hangs,
}
# What plain torch cannot have: it makes no gradient beforehand, and §8 is none of its business.
OF_FUSED = frozenset((
    "expectation ignored", "mend skipped", "mend scales", "mend mixes pairs", "mend beside", "nothing remembered",
    "infinity remembered", "wrong metrics", "totals not added", "totals twice", "neighbour's bin", "wandering totals",
    "sums in torch", "compares on the host", "frozen expectation",
))  # fmt: skip


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
    except NotRun as why:
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
