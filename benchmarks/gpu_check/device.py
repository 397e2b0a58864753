"""Checks of how a backend uses its device: memory, launches, streams, graphs, no waiting, offsets beyond 32 bits."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.footprint import extra_memory_mb
from benchmarks.gpu_check.context import BF16, F32, CheckFailed, Context, NotRun, cases, check, poisoned
from benchmarks.machine import memory_bytes
from sipo_kernels import PairLossOutput, pair_loss

OPTIONS: dict[str, Any] = {"method": "sipo", "beta": 30.0, "mask_threshold": 0.0}
MOST_LAUNCHES = 3
SLEEP_CYCLES = 400_000_000  # about 0.2 s at 2 GHz: far longer than Python needs for a forward and a backward


@check("memory", "device", "allocates a copy")
def check_memory(ctx: Context) -> None:
    """Less than 1 MB beyond the gradient (a tenth of it in a rehearsal), in the peak of a forward and a backward."""
    # On a GPU, a gradient so large that the allocator gives it memory of its own, not a hole that it counts whole.
    shape = (4, 16, 21, 60, 104) if ctx.on_gpu else (4, 5, 101, 103)
    for dtype in (BF16, F32):
        batch = ctx.batch(shape, dtype)
        cases.run(batch, ctx.backend, **OPTIONS)
        if ctx.on_gpu:
            torch.cuda.empty_cache()
        extra = extra_memory_mb(partial(cases.run, batch, ctx.backend, **OPTIONS), device=ctx.device)
        gradient = batch.model_pred.nbytes / 1e6
        ctx.require(extra >= 0.99 * gradient, f"{dtype}: peak {extra:.2f} MB misses the gradient's {gradient:.2f} MB")
        ctx.within(extra - gradient, 1.0 if ctx.on_gpu else gradient / 10, f"{dtype}: MB beyond the gradient")


def is_ours(kernel: str) -> bool:
    """Whether a kernel of this name is the package's: Triton's ``pair_*``, or CUDA C++ in namespace ``sipo``."""
    return kernel.startswith("pair_") or "sipo" in kernel


def launched(work: Callable[[], Any]) -> list[str]:
    """Names of the kernels that ``work`` launches, from the profiler; the driver's copies and fills are none."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first profile of a process may miss what ran while its tools were being loaded
        with torch.profiler.profile(activities=activities) as profile:
            work()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        return kernels_in(json.loads(trace.read_text(encoding="utf-8")))


def kernels_in(trace: dict[str, Any]) -> list[str]:
    """Names of the kernels in a Chrome trace of torch's profiler."""
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == "kernel"]


def judge_launches(ctx: Context, names: list[str], what: str) -> None:
    """At least one launch is ours, or the count is worth nothing; at most three are."""
    ours = [name[:60] for name in names if is_ours(name)]
    if not names:
        raise NotRun("the profiler recorded no kernel on this machine")
    ctx.require(len(ours) > 0, f"{what}: no kernel of ours among {sorted({n[:60] for n in names})}")
    ctx.within(len(ours), MOST_LAUNCHES, f"{what}: launches {ours}")


@check("launches", "profile", "launches again", needs_gpu=True)
def check_launches(ctx: Context) -> None:
    """At most three kernels of ours for a forward and a backward."""
    for shape in ((2, 4, 64, 64), (16, 4, 128, 128), (4, 16, 21, 60, 104)):
        for dtype in (BF16, F32):
            batch = ctx.batch(shape, dtype)
            for _ in range(2):
                cases.run(batch, ctx.backend, **OPTIONS)
            names = launched(partial(cases.run, batch, ctx.backend, **OPTIONS))
            judge_launches(ctx, names, f"{list(shape)} {dtype}")


@check("no synchronisation", "device", "waits for the device", "reads on the host", needs_gpu=True)
def check_no_synchronisation(ctx: Context) -> None:
    """The host never waits: torch reports no synchronisation, and the calls return while the device still sleeps."""
    for dtype, upstream in ((BF16, None), (F32, 3.0), (torch.float16, 65536.0)):
        batch = ctx.batch((16, 4, 128, 128), dtype)
        factor = None if upstream is None else torch.tensor(upstream, device=ctx.device)
        for _ in range(3):  # compiled, loaded, and the allocator has what it needs
            result = cases.run(batch, ctx.backend, upstream=factor, **OPTIONS)[0].metrics()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = cases.run(batch, ctx.backend, upstream=factor, **OPTIONS)[0].metrics()
        except RuntimeError as error:
            raise CheckFailed(f"{dtype}, upstream {upstream}: {error}") from None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        awake = torch.cuda.Event()
        torch.cuda._sleep(SLEEP_CYCLES)
        awake.record()
        result = cases.run(batch, ctx.backend, upstream=factor, **OPTIONS)[0].metrics()
        waited = awake.query()
        torch.cuda.synchronize()
        ctx.require(not waited, f"{dtype}, upstream {upstream}: the host waited for the device")
        ctx.require(math.isfinite(float(result["loss"])), "the loss after it")


def capture(work: Callable[[], tuple[PairLossOutput, Tensor]]) -> tuple[Callable[[], None], PairLossOutput, Tensor]:
    """A CUDA graph of ``work``: how to replay it, and the output and gradient that a replay fills."""
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


@check("CUDA graph", "device", "frozen inputs", needs_gpu=True)
def check_graph(ctx: Context) -> None:
    """Forward and backward captured once; each replay on new inputs is right, and has the bits of a plain call."""
    for shape, dtype in (((4, 3, 97), F32), ((16, 4, 64, 64), BF16), ((2, 4, 128, 128), torch.float16)):
        static = ctx.batch(shape, dtype)

        def work(static: cases.Batch = static) -> tuple[PairLossOutput, Tensor]:
            return cases.run(static, ctx.backend, **OPTIONS)

        replay, out, grad = capture(work)
        for seed in (1, 2, 3):
            fresh = ctx.batch(shape, dtype, seed=seed)
            with torch.no_grad():
                for place, value in zip(static[:4], fresh[:4], strict=True):
                    place.copy_(value)
                for result in (grad, *out[:8]):
                    result.zero_()  # what the last replay left is not this one's
            for turn in range(2):
                replay()
                label = f"replay {turn} on inputs {seed} {list(shape)} {dtype}"
                plain, plain_grad = cases.run(fresh, ctx.backend, **OPTIONS)
                ctx.same(grad, plain_grad, f"{label}: gradient")
                for name in ("loss", "logits", "mask", "weight", "reward_gap"):
                    ctx.same(getattr(out, name), getattr(plain, name), f"{label}: {name}")
            exact, truth = cases.reference_grad(fresh, **OPTIONS), cases.run_reference(fresh, **OPTIONS)
            ctx.compare(fresh, out, grad, exact, truth, f"replay on inputs {seed}")


@check("two streams", "device", "another stream", needs_gpu=True)
def check_streams(ctx: Context) -> None:
    """Two batches in two streams at once, each behind a delay of its own: the bits of one after the other."""
    batches = [ctx.batch((16, 4, 128, 128), BF16, seed=1), ctx.batch((6, 5, 1999), F32, seed=2)]
    alone = [cases.run(batch, ctx.backend, **OPTIONS) for batch in batches]
    for batch, (out, grad) in zip(batches, alone, strict=True):
        exact, truth = cases.reference_grad(batch, **OPTIONS), cases.run_reference(batch, **OPTIONS)
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
        raise NotRun("needs a second GPU")
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
    """diffusion_dpo against float64 (§2, §5, §6), chunk by chunk, with the budgets of ``tests/cases.py``."""
    rows = samples // 2 if shared else samples
    needed = 2 * elements * (3 * samples + rows) + 12 * 8 * chunk + (1 << 28)
    if (free := memory_bytes(ctx.device)) < needed:
        raise NotRun(f"needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free")
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
            # Losers farther from the reference than winners: a gap between the two that is no rounding error.
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
