"""What every check is made of: the list of checks, one backend's context, comparisons with float64.

Batches and budgets are those of ``sipo_kernels/testing.py``. A check is a function of a :class:`Context` that raises
where the contract (``docs/architecture.md``) is broken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sipo_kernels import METRICS, STATISTICS, PairLossOutput, Totals, testing
from sipo_kernels.layout import pair_dtype

Batch = testing.Batch

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (F32, BF16, F16, F64)
BINS = 7


class CheckFailedError(AssertionError):
    """A backend breaks the contract; the message says how."""


class NotRunError(Exception):
    """A check cannot run here; the message says why."""


@dataclass
class Context:
    """One check of one backend: where it runs, and what it has counted.

    Attributes:
        backend: name of the backend under test.
        device: ``"cuda"``, or ``"cpu"`` for a rehearsal with smaller sizes.
        quick: leave out the repetitions of what another case covers.
        cases: calls compared so far.
        worst: largest error so far as a fraction of its budget; ``None`` where nothing had one. Gradients in half
            precision are counted apart, in ``worst_half``: their budget is the rounding itself, so that 0.999 is
            where they belong.
    """

    backend: str
    device: str
    quick: bool = False
    cases: int = 0
    worst: float | None = None
    worst_half: float | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def batch(self, shape: tuple[int, ...], *dtypes: torch.dtype, **options: Any) -> Batch:
        """Returns ``testing.make_batch`` on this device; one dtype stands for all three."""
        kinds = dtypes * 3 if len(dtypes) == 1 else dtypes or (F32, F32, F32)
        return testing.make_batch(shape, kinds, device=self.device, **options)  # type: ignore[arg-type]

    def cell(self, value: float) -> Tensor:
        """Returns a cell for ``expected_upstream``, which the backward pass writes."""
        device = torch.device(self.device)
        return torch.tensor(value, dtype=pair_dtype(device), device=device)

    def totals(self, timesteps: Tensor, top: float = 1000.0) -> Totals:
        """Returns empty running sums, with these timesteps."""
        levels = torch.zeros(len(STATISTICS), BINS, device=self.device)
        return Totals(torch.zeros(2, len(METRICS), device=self.device), levels, timesteps.to(self.device), top)

    def run(self, batch: Batch, **options: Any) -> tuple[PairLossOutput, Tensor]:
        """Runs forward and backward over poisoned memory."""
        with poisoned():
            return testing.run(batch, self.backend, **options)

    def require(self, holds: bool | Tensor, what: str) -> None:
        """Counts a case; raises :class:`CheckFailedError` with ``what`` unless it holds."""
        self.cases += 1
        if not bool(holds):
            raise CheckFailedError(what)

    def same(self, got: Tensor, expected: Tensor, what: str) -> None:
        """Bit for bit, NaN included."""
        self.require(same_bits(got, expected), f"{what}: not the same bits")

    def within(self, error: float | Tensor, budget: float | Tensor, what: str, half: bool = False) -> None:
        """Counts a case and notes its fraction of the budget; NaN never passes."""
        error, budget = float(error), float(budget)
        fraction = 0.0 if error == 0 else (error / budget if budget > 0 else math.inf)
        if half and not math.isnan(fraction):
            self.worst_half = max(self.worst_half or 0.0, fraction)
        elif not math.isnan(fraction):
            self.worst = max(self.worst or 0.0, fraction)
        self.require(fraction <= 1, f"{what}: error {error:.3g}, budget {budget:.3g}")

    def gradient(self, grad: Tensor, exact: Tensor, what: str) -> None:
        """A gradient within its budget: the L2 norms over the batch of ``assert_within_budget``."""
        norm, half = exact.double().norm(), grad.dtype in (BF16, F16)
        rounding = (exact.to(grad.dtype).double() - exact).norm()
        self.within((grad.double() - exact).norm(), rounding + 1e-6 * norm if half else 5e-6 * norm, what, half)

    def hold(self, batch: Batch, what: str = "", logit: float = 15.0, **options: Any) -> None:
        """Compares one call with float64 within every budget; β is chosen so that the largest |logit| is ``logit``.

        The mask is off by default: a batch of masked pairs has no gradient to be wrong.

        Args:
            batch: the call's tensors; ``ref_pred`` and ``ratio_scale`` may be ``None`` with the options that allow it.
            what: names the case in a failure.
            logit: as ``testing.beta_for``.
            options: of ``pair_loss``, and ``upstream``.
        """
        upstream = options.pop("upstream", None)
        beside = {name: options.pop(name) for name in ("expected_upstream", "totals") if name in options}
        options = {"method": "sipo", "mask_threshold": 0.0, **options}
        if "beta" not in options:
            options["beta"] = testing.beta_for(batch, logit, **options)
        label = f"{what} {list(batch.model_pred.shape)} {describe(options)}".strip()
        # `upstream` goes to the backend in the loss's own type, to the definition in float64.
        exact = testing.reference_grad(batch, grad_output=None if upstream is None else upstream.double(), **options)
        truth = testing.run_reference(batch, **options)
        if upstream is None and bool(truth.mask.any()):
            self.require(bool(exact.any()), f"{label}: there is a gradient to compare")
        out, grad = self.run(batch, upstream=upstream, **options, **beside)
        expected = torch.empty_like(batch.model_pred)
        self.require(grad.dtype == expected.dtype and grad.stride() == expected.stride(), f"{label}: gradient's layout")
        self.compare(batch, out, grad, exact, truth, label)

    def compare(self, batch: Batch, out: PairLossOutput, grad: Tensor, exact: Tensor, truth: Any, label: str) -> None:
        """Compares the results of one call with float64; the fractions of budgets are for the report alone."""
        z = truth.logits
        self.within(largest((out.logits.double() - z).abs() / (1e-5 * (1 + z.abs()))), 1, f"{label}: logits")
        self.require(torch.equal(out.mask, truth.mask), f"{label}: mask {out.mask.tolist()[:8]}")
        self.gradient(grad, exact, f"{label}: gradient")
        # The loss moves no faster than its logit (twice that: the weight in front of it has an error of its own).
        slack = 2e-5 * (1 + z.abs().max()) * max(1, z.numel() if out.loss.ndim == 0 else 1)
        self.within(largest((out.loss.double() - truth.loss).abs()), slack, f"{label}: loss")
        # Terminal steps are −inf by definition: compared here, and left out of the arithmetic of budgets.
        scale = torch.zeros_like(truth.log_ratio) if batch.ratio_scale is None else batch.ratio_scale
        terminal = torch.isposinf(scale)
        self.same(out.log_ratio[terminal].double(), truth.log_ratio[terminal], f"{label}: terminal log_ratio")
        batch = batch._replace(ratio_scale=torch.where(terminal, 0.0, scale))
        truth = truth._replace(log_ratio=torch.where(terminal, 0.0, truth.log_ratio))
        try:
            finite = dataclasses.replace(out, samples=out.samples.clone())
            finite.log_ratio[terminal] = 0.0
            testing.assert_within_budget(batch, finite, grad, exact, truth)
        except AssertionError as error_text:
            raise CheckFailedError(f"{label}: {str(error_text).strip() or 'log_ratio out of budget'}") from None


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every bit."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    raw = [t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (got, expected)]
    return torch.equal(raw[0], raw[1])


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that torch allocates without filling it holds NaN (or the largest integer) meanwhile."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def largest(values: Tensor) -> float:
    return float(values.detach().max()) if values.numel() else 0.0  # NaN stays NaN through max


def describe(options: dict[str, Any]) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in options.items()
                    if not isinstance(v, Tensor))  # fmt: skip


# ---- The list of checks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: unique.
        group: checks of a group share a process.
        run: raises where the contract is broken.
        faults: names in ``faults.FAULTS``, each of which this check must catch.
        needs_gpu: listed as not run in a rehearsal on a CPU.
    """

    name: str
    group: str
    run: Callable[[Context], None]
    faults: tuple[str, ...]
    needs_gpu: bool = False


CHECKS: dict[str, Check] = {}


def check(
    name: str, group: str, *faults: str, needs_gpu: bool = False
) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Puts a function on the list."""

    def add(run: Callable[[Context], None]) -> Callable[[Context], None]:
        assert name not in CHECKS, name
        CHECKS[name] = Check(name, group, run, faults, needs_gpu)
        return run

    return add
