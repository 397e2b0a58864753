"""Checks of how a backend uses its device: memory, launches, streams, graphs, no waiting, offsets beyond 32 bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.footprint import extra_memory_mb, launched
from benchmarks.gpu_check.context import BF16, F16, F32, CheckFailedError, Context, NotRunError, check, poisoned
from benchmarks.machine import memory_bytes
from sipo_kernels import PairLossOutput, Totals, backends, pair_loss, testing
from sipo_kernels.output import RESULTS

OPTIONS: dict[str, Any] = {"method": "sipo", "beta": 30.0, "mask_threshold": 0.0}
MOST_LAUNCHES = 3
SLEEP_CYCLES = 400_000_000  # about 0.2 s at 2 GHz: far longer than Python needs for a forward and a backward


def pass_of_training(
    ctx: Context, batch: testing.Batch, upstream: Tensor, expected: Tensor | float | None
) -> tuple[Callable[[], tuple[PairLossOutput, Tensor]], Totals]:
    """Loss, gradient, metrics and statistics by noise level, as a training pass makes them; and the sums added to."""
    timesteps = torch.arange(batch.model_pred.shape[0] // 2) * 100 % 1000
    totals = ctx.totals(timesteps)

    def work() -> tuple[PairLossOutput, Tensor]:
        out, grad = testing.run(
            batch, ctx.backend, upstream=upstream, expected_upstream=expected, totals=totals, **OPTIONS
        )
        out.metrics()
        return out, grad

    return work, totals


@check("memory", "device", "allocates a copy", "mend beside")
def check_memory(ctx: Context) -> None:
    """Less than 1 MB beyond the gradient (a tenth of it in a rehearsal) in the peak of a pass, whatever comes down."""
    # On a GPU, a gradient so large that the allocator gives it memory of its own, not a hole that it counts whole.
    shape = (4, 16, 21, 60, 104) if ctx.on_gpu else (4, 5, 101, 103)
    upstream = torch.tensor(1 / 8, device=ctx.device)
    for types, expected in itertools.product(((BF16,), (F32,), (BF16, BF16, F32)), (1 / 8, 1.0)):
        batch = ctx.batch(shape, *types)
        work, _ = pass_of_training(ctx, batch, upstream, expected)
        work()
        if ctx.on_gpu:
            torch.cuda.empty_cache()
        extra = extra_memory_mb(work, device=ctx.device)
        gradient, label = batch.model_pred.nbytes / 1e6, f"{types}, expected {expected:g}"
        ctx.require(extra >= 0.99 * gradient, f"{label}: peak {extra:.2f} MB misses the gradient's {gradient:.2f} MB")
        ctx.within(extra - gradient, 1.0 if ctx.on_gpu else gradient / 10, f"{label}: MB beyond the gradient")


def is_ours(kernel: str) -> bool:
    """Whether a kernel of this name is the package's: Triton's ``pair_*``, or CUDA C++ in namespace ``sipo``."""
    return kernel.startswith("pair_") or "sipo" in kernel


def judge_launches(ctx: Context, names: list[str], what: str) -> None:
    """At least one launch is ours, or the count is worth nothing; three there are at most, whoever's they are."""
    short = [name[:60] for name in names]
    if not names:
        raise NotRunError("the profiler recorded no kernel on this machine")
    ctx.require(any(map(is_ours, names)), f"{what}: no kernel of ours among {sorted(set(short))}")
    ctx.within(len(names), MOST_LAUNCHES, f"{what}: launches {short}")


@check("launches", "profile", "launches again", "sums in torch", needs_gpu=True)
def check_launches(ctx: Context) -> None:
    """At most three launches for loss, gradient, metrics and statistics, whether the upstream gradient was expected."""
    upstream = torch.tensor(1 / 8, device=ctx.device)
    kinds = [((2, 4, 64, 64), (BF16,)), ((16, 4, 128, 128), (F32,)), ((4, 16, 21, 60, 104), (BF16, BF16, F32))]
    for (shape, types), held in itertools.product(kinds, (True, False)):
        work, _ = pass_of_training(ctx, ctx.batch(shape, *types), upstream, ctx.cell(1 / 8) if held else 1.0)
        for _ in range(2):
            work()
        judge_launches(ctx, launched(work), f"{list(shape)} {types} {'as expected' if held else 'not expected'}")


@check(
    "no synchronisation", "device", "waits for the device", "reads on the host", "compares on the host", needs_gpu=True
)
def check_no_synchronisation(ctx: Context) -> None:
    """The host never waits: torch reports no synchronisation, and the calls return while the device still sleeps."""
    mixes = ((BF16, BF16, BF16), (BF16, BF16, F32), (F32, F32, F32), (F16, F16, F16))
    for types, expects in itertools.product(mixes, (None, 1.0, 65536.0)):
        batch, upstream = ctx.batch((16, 4, 128, 128), *types), torch.tensor(65536.0, device=ctx.device)
        expected = None if expects is None else ctx.cell(expects)
        work, _ = pass_of_training(ctx, batch, upstream, expected)
        label = f"{types}, expected {expects}"
        for _ in range(3):  # compiled, loaded, and the allocator has what it needs
            result = work()[0].metrics()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = work()[0].metrics()
        except RuntimeError as error:
            raise CheckFailedError(f"{label}: {error}") from None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        awake = torch.cuda.Event()
        torch.cuda._sleep(SLEEP_CYCLES)
        awake.record()
        result = work()[0].metrics()
        waited = awake.query()
        torch.cuda.synchronize()
        ctx.require(not waited, f"{label}: the host waited for the device")
        ctx.require(math.isfinite(float(result["loss"])), "the loss after it")


def capture(work: Callable[[], tuple[PairLossOutput, Tensor]]) -> tuple[Callable[[], None], PairLossOutput, Tensor]:
    """Captures a CUDA graph of ``work``; returns how to replay it, and the output and gradient that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = work()
    return graph.replay, out, grad


@check("CUDA graph", "device", "frozen inputs", "frozen expectation", "mend skipped", needs_gpu=True)
def check_graph(ctx: Context) -> None:
    """A pass captured once; each replay on new inputs and another upstream gradient has the bits of a plain call.

    The first replay's upstream gradient is not what was expected, the second one's is what the first remembered.
    """
    kinds = (((4, 3, 97), (F32,)), ((16, 4, 64, 64), (BF16,)), ((16, 4, 64, 64), (BF16, BF16, F32)))
    for shape, types in (*kinds, ((2, 4, 128, 128), (F16,))):
        static, upstream, expected = ctx.batch(shape, *types), torch.ones((), device=ctx.device), ctx.cell(1.0)
        work, totals = pass_of_training(ctx, static, upstream, expected)
        replay, out, grad = capture(work)
        for seed, value in ((1, 1 / 8), (2, 1 / 3), (3, 1 / 8)):
            fresh = ctx.batch(shape, *types, seed=seed)
            with torch.no_grad():
                for place, new in zip((*static[:4], upstream), (*fresh[:4], torch.tensor(value)), strict=True):
                    place.copy_(new)
                for result in (grad, *(getattr(out, name) for name in RESULTS)):
                    result.zero_()  # what the last replay left is not this one's
            for turn in range(2):
                label = f"replay {turn} on inputs {seed} {list(shape)} {types}"
                plain_work, plain_totals = pass_of_training(ctx, fresh, upstream, None)
                plain, plain_grad = plain_work()
                assert totals.metrics is not None and totals.levels is not None
                totals.metrics.zero_()
                totals.levels.zero_()
                replay()
                ctx.same(grad, plain_grad, f"{label}: gradient")
                for name in ("loss", "logits", "mask", "weight", "error_gap"):
                    ctx.same(getattr(out, name), getattr(plain, name), f"{label}: {name}")
                assert plain_totals.metrics is not None and plain_totals.levels is not None
                ctx.same(totals.metrics, plain_totals.metrics, f"{label}: sums of metrics")
                ctx.same(totals.levels, plain_totals.levels, f"{label}: sums by noise level")
                if ctx.backend in backends.FUSED:
                    ctx.require(float(expected) == float(upstream), f"{label}: {float(expected):g} is remembered")
            exact = testing.reference_grad(fresh, grad_output=upstream.double(), **OPTIONS)
            ctx.compare(fresh, out, grad, exact, testing.run_reference(fresh, **OPTIONS), f"replay on inputs {seed}")


@check("two streams", "device", "another stream", needs_gpu=True)
def check_streams(ctx: Context) -> None:
    """Two batches in two streams at once, each behind a delay of its own: the bits of one after the other."""
    batches = [ctx.batch((16, 4, 128, 128), BF16, seed=1), ctx.batch((6, 5, 1999), F32, seed=2)]
    alone = [testing.run(batch, ctx.backend, **OPTIONS) for batch in batches]
    for batch, (out, grad) in zip(batches, alone, strict=True):
        exact, truth = testing.reference_grad(batch, **OPTIONS), testing.run_reference(batch, **OPTIONS)
        ctx.compare(batch, out, grad, exact, truth, "default stream")
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for turn in range(5 if ctx.quick else 20):
        together: list[tuple[Tensor, dict[str, Tensor]]] = []
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000 * ((turn + place) % 3))
                out, grad = ctx.run(batches[place], **OPTIONS)
                # Read in the same stream: a kernel that ran elsewhere has not written this yet.
                names = ("loss", "logits", "mask", "weight")
                together.append((grad.clone(), {name: getattr(out, name).detach().clone() for name in names}))
        torch.cuda.synchronize()
        for place, (grad, numbers) in enumerate(together):
            ctx.same(grad, alone[place][1], f"turn {turn}, stream {place}: gradient")
            for name, got in numbers.items():
                ctx.same(got, getattr(alone[place][0], name), f"turn {turn}, stream {place}: {name}")


@check("device guard", "device", needs_gpu=True)
def check_device_guard(ctx: Context) -> None:
    """Tensors on the second GPU while the first is current."""
    if torch.cuda.device_count() < 2:
        raise NotRunError("needs a second GPU")
    with torch.cuda.device(0):
        second = Context(ctx.backend, "cuda:1")
        second.hold(second.batch((4, 3, 97), F32))
        second.hold(second.batch((16, 4, 64, 64), BF16))
        ctx.require(torch.cuda.current_device() == 0, "the current device has changed")
    ctx.cases, ctx.worst, ctx.worst_half = ctx.cases + second.cases, second.worst, second.worst_half


# ---- Beyond 32 bits --------------------------------------------------------------------------------------------------


@check("over 2^31 elements", "large", "scaled gradient", "unwritten element", "shifted logits")
def check_large(ctx: Context) -> None:
    """Samples of more than 2^31 elements, unaligned; and smaller ones that are past 2^31 together. In bfloat16."""
    if ctx.on_gpu:
        _hold_in_chunks(ctx, samples=2, elements=2**31 + 17, chunk=2**26, shared=True)
        if not ctx.quick:
            _hold_in_chunks(ctx, samples=6, elements=2**29 + 8, chunk=2**26, shared=False)
    else:  # the same steps where they cost nothing
        _hold_in_chunks(ctx, samples=2, elements=5003, chunk=1000, shared=True)
        _hold_in_chunks(ctx, samples=6, elements=1032, chunk=500, shared=False)


def _hold_in_chunks(ctx: Context, samples: int, elements: int, chunk: int, shared: bool) -> None:
    """diffusion_dpo against float64 (§2, §5, §6), chunk by chunk, with the budgets of ``sipo_kernels/testing.py``."""
    rows = samples // 2 if shared else samples
    needed = 2 * elements * (3 * samples + rows) + 12 * 8 * chunk + (1 << 28)
    if (free := memory_bytes(ctx.device)) < needed:
        raise NotRunError(f"needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free")
    generator = torch.Generator(ctx.device).manual_seed(0)
    model, ref = (torch.empty(samples, elements, dtype=BF16, device=ctx.device) for _ in range(2))
    target = torch.empty(rows, elements, dtype=BF16, device=ctx.device)
    spans = [slice(start, min(start + chunk, elements)) for start in range(0, elements, chunk)]

    def noise(span: slice) -> Tensor:
        return torch.randn(span.stop - span.start, device=ctx.device, generator=generator)

    sums = torch.zeros(samples, 3, dtype=torch.float64, device=ctx.device)
    for span in spans:
        for row in range(rows):
            target[row, span] = noise(span)
        for s in range(samples):
            model[s, span] = noise(span)
            # Rejected samples farther from the reference than chosen samples: a gap between the two that is no rounding
            # error.
            ref[s, span] = model[s, span].float() + (0.1 if s < samples // 2 else 0.2) * noise(span)
            m, r, t = (x.double() for x in (model[s, span], ref[s, span], target[s % rows, span]))
            sums[s] += torch.stack([(m - t).square().sum(), (r - t).square().sum(), ((m - r) * (m + r - 2 * t)).sum()])
    model_error, ref_error, gap = (sums / elements).unbind(1)
    gap_w, gap_l = gap.chunk(2)
    beta = 4.0 / float((gap_w - gap_l).abs().max())
    logits = -0.5 * beta * (gap_w - gap_l)
    g = torch.sigmoid(-logits) * 0.5 * beta / len(logits)
    coef = torch.cat([g, -g]) * (2 / elements)

    model.requires_grad_()
    with poisoned():
        out = pair_loss(model, ref, target, method="diffusion_dpo", beta=beta, backend=ctx.backend)
        (grad,) = torch.autograd.grad(out.loss, model)
    label = f"[{samples}, {elements}]"
    ctx.within(((out.logits.double() - logits).abs() / (1e-5 * (1 + logits.abs()))).max(), 1, f"{label}: logits")
    for name, truth in (("model_error", model_error), ("ref_error", ref_error)):
        ctx.within(((getattr(out, name).double() - truth) / truth).abs().max(), 1e-6, f"{label}: {name}")
    ctx.within(
        (out.loss.detach().double() - torch.nn.functional.softplus(-logits).mean()).abs(), 1e-4, f"{label}: loss"
    )
    error, rounding, norm = (torch.zeros((), dtype=torch.float64, device=ctx.device) for _ in range(3))
    model = model.detach()
    for s in range(samples):
        for span in spans:
            exact = coef[s] * (model[s, span].double() - target[s % rows, span].double())
            error += (grad[s, span].double() - exact).square().sum()
            rounding += (exact.to(BF16).double() - exact).square().sum()
            norm += exact.square().sum()
    # One element in 2^31 does not show in a norm; one that was not written holds the poison, NaN, which no sum hides.
    ctx.within(error.sqrt(), rounding.sqrt() + 1e-6 * norm.sqrt(), f"{label}: gradient", half=True)
