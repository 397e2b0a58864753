"""Checks of values: every type, size, method and kind of input against ``sipo_kernels/reference.py`` in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch

from benchmarks.gpu_check.child_processes import ROOT
from benchmarks.gpu_check.context import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    CheckFailedError,
    Context,
    check,
    describe,
    largest,
    poisoned,
)
from sipo_kernels import METHODS, Totals, pair_loss, testing
from sipo_kernels.layout import SMALL_SAMPLE
from sipo_kernels.output import add_totals


@check(
    "dtypes", "dtypes", "scaled gradient", "unwritten element", "shifted logits", "expectation ignored", "mend skipped"
)
def check_dtypes(ctx: Context) -> None:
    """Each type of each input with each of every other (all 64 mixes where that costs no compilation).

    Then what training has: half-precision predictions beside a float32 target, shared by the pair or not, and an
    upstream gradient of 1/8 that was expected or not; in samples whose sums are wide, and in such whose sums are not.
    """
    shapes: list[tuple[int, ...]] = [(4, 3, 37), (4, 4, 16, 64), (2, 8209)] if ctx.on_gpu else [(4, 3, 37)]
    if ctx.backend == "triton":
        del shapes[2:]  # a shape costs seconds of compilation for each mix
    for i, j, k in itertools.product(range(4), repeat=3):
        if (ctx.backend == "triton" or ctx.quick or not ctx.on_gpu) and k != (i + j) % 4:
            continue  # a Latin square: every pair of types of every two inputs
        for shape in shapes:
            mix = DTYPES[i], DTYPES[j], DTYPES[k]
            ctx.hold(ctx.batch(shape, *mix), f"{mix}", method="dpo_cm")
    if ctx.on_gpu or ctx.backend != "triton":  # its interpreter is slow
        shapes.append((2, SMALL_SAMPLE + 5))
    upstream = torch.tensor(1 / 8, device=ctx.device)
    for shape, half, shared in itertools.product(shapes, (BF16, F16), (False, True)):
        batch = ctx.batch(shape, half, half, F32, shared_target=shared)
        for expected in (1 / 8, ctx.cell(1 / 8), 1.0):
            what = f"{half}, float32 target, {'shared, ' if shared else ''}expected {float(expected):g}"
            ctx.hold(batch, what, upstream=upstream, expected_upstream=expected)


@check("sizes", "sizes", "scaled gradient", "unwritten element", "shifted logits")
def check_sizes(ctx: Context) -> None:
    """Elements from 1 to a prime beyond a million, around every block's edge; pairs from 1 to 257."""
    elements = [1, 2, 7, 31, 1023, 1024, 1025]
    if not ctx.quick:
        elements += [3, 17, 2047, 2048, 2049, 8191, 8209]
    if ctx.on_gpu:
        elements += [4096, 65521, 65536, 65537, 131071, 1_000_003]
    for dtype, size in itertools.product((F32, BF16), elements):
        ctx.hold(ctx.batch((4, size), dtype, seed=size))
    for pairs, size in ((1, 5), (2, 13), (3, 64), (31, 3), (257, 2 if ctx.quick else 33)):
        ctx.hold(ctx.batch((2 * pairs, size), F32, seed=pairs))
    ctx.hold(ctx.batch((6,), F32))  # one number a sample and no further dimension


@check("methods", "methods", "scaled gradient", "shifted logits", "skip ignored", "mask ignored")
def check_methods(ctx: Context) -> None:
    """All methods, ratios, reductions and ways with what is not finite, masked and weighted in turn."""
    batch = ctx.batch((6, 5, 7), BF16, BF16, F32, distance=1.0, weighted=True)
    # Pair 1 is masked where masks are on, and clipped where they are off; the others take part with weights near 1.
    batch = batch._replace(ratio_scale=torch.tensor([0.01, 0.2, 0.02] * 2, dtype=F64, device=ctx.device))
    broken = batch._replace(target=batch.target.clone())
    broken.target[1, 0, 0] = math.nan  # pair 1: left out by "skip", so that it does differ
    kinds = itertools.product(METHODS, ("posterior", "reference"), ("mean", "sum", "none"), ("propagate", "skip"))
    for turn, (method, ratio, reduction, nonfinite) in enumerate(kinds):
        options: dict[str, Any] = {"method": method, "ratio": ratio, "reduction": reduction, "nonfinite": nonfinite}
        options["mask_threshold"] = (0.9, 0.0)[turn % 2]
        upstream = torch.ones(3, device=ctx.device) if reduction == "none" else None
        ctx.hold(batch if turn % 3 else batch._replace(error_weight=None), upstream=upstream, **options)
        if nonfinite == "skip" and (reduction == "mean" or not ctx.quick):
            out, grad = ctx.run(broken, upstream=upstream, beta=3.0, **options)
            truth = testing.run_reference(broken, beta=3.0, **options)
            ctx.gradient(
                grad, testing.reference_grad(broken, beta=3.0, **options), f"skip {describe(options)}: gradient"
            )
            ctx.require(torch.equal(out.mask, truth.mask), f"skip {describe(options)}: mask")
            ctx.require(torch.allclose(out.loss.double(), truth.loss, rtol=1e-5), f"skip {describe(options)}: loss")
    try:
        testing.run(broken, ctx.backend, method="sipo", beta=3.0, nonfinite="raise")
    except FloatingPointError as error_text:
        ctx.require("[1] of 3" in str(error_text), f"nonfinite='raise' names the pair: {error_text}")
    else:
        raise CheckFailedError("nonfinite='raise' did not raise")


@check("inputs", "methods", "scaled gradient", "shifted logits")
def check_inputs(ctx: Context) -> None:
    """Shared targets, reference errors as numbers, error weights, infinite and absent ratio scales."""
    for dtype in (F32, BF16) if ctx.quick else DTYPES:
        ctx.hold(ctx.batch((6, 3, 37), dtype, shared_target=True), "shared target")
        ctx.hold(ctx.batch((6, 3, 37), dtype, weighted=True), "error_weight")
        ctx.hold(ctx.batch((6, 8, 64), dtype, shared_target=True, weighted=True), "shared and weighted")
        far = ctx.batch((6, 3, 37), dtype, distance=1.0)
        errors = testing.run_reference(far, method="sipo", beta=1.0).ref_error
        given: Any = far._replace(ref_pred=None)  # type: ignore[arg-type]
        ctx.hold(given, "ref_error", logit=5.0, ref_error=errors)
        ctx.hold(given, "ref_error in float32", logit=5.0, ref_error=errors.float(), method="dpo_cm")
        bare: Any = far._replace(ratio_scale=None)  # type: ignore[arg-type]
        ctx.hold(bare, "no ratio_scale", method="diffusion_dpo")
        scale = torch.tensor([math.inf, 0.02, 0.0, 0.01, math.inf, 0.02], dtype=F64, device=ctx.device)
        for threshold in (0.9, 0.0):
            ctx.hold(far._replace(ratio_scale=scale), "terminal", mask_threshold=threshold)
    exact = ctx.batch((4, 3, 5), F32)
    with torch.no_grad():
        exact.target[0] = exact.model_pred[0]  # error 0 at an infinite scale: −inf, never NaN
    endless = torch.tensor([math.inf, 0.0, 0.01, 0.01], dtype=F64, device=ctx.device)
    ctx.hold(exact._replace(ratio_scale=endless), "error 0 at the terminal step", beta=3.0)


@check("error mask", "methods", "scaled gradient", "shifted logits", "error mask ignored")
def check_error_mask(ctx: Context) -> None:
    """Elements that count and their weights, shared by the pair or not; what counts nowhere may hold anything."""
    shapes: list[tuple[int, ...]] = [(4, 3, 37), (4, 4, 16, 64)]
    if ctx.on_gpu:
        shapes += [(4, 16, 21, 60, 104), (6, 65_543)]
    kinds = itertools.product(
        shapes, ((BF16, BF16, F32), (F32,) * 3, (F16, F32, F64)), ("bool", "weights"), (True, False)
    )
    for shape, mix, mask, shared in kinds:
        batch = ctx.batch(shape, *mix, mask=f"{'shared ' * shared}{mask}", shared_target=not shared)
        ctx.hold(batch, f"{mix}, {mask}{', shared' * shared}", safeguard=0.4 if mask == "bool" else None)
    spoilt = ctx.batch((4, 3, 37), BF16, mask="bool")
    _, grad = ctx.run(spoilt, method="sipo", beta=3.0, mask_threshold=0.0)
    with torch.no_grad():
        spoilt.model_pred[~spoilt.error_mask] = math.nan  # type: ignore[operator]
    _, spoilt_grad = ctx.run(spoilt, method="sipo", beta=3.0, mask_threshold=0.0)
    ctx.same(spoilt_grad, grad, "NaN where nothing counts: gradient")


@check("metrics and totals", "methods", "wrong metrics", "totals not added", "totals twice", "neighbour's bin")
def check_totals(ctx: Context) -> None:
    """§8 as the kernel writes it: metrics within float32 of the definition, running sums those of the same fields."""
    timesteps = torch.tensor([0, 142, 143, 999, 500, 500])
    kinds = list(itertools.product(METHODS, ("mean", "sum", "none"), ("propagate", "skip"), (False, True)))
    slow = ctx.backend == "triton" and not ctx.on_gpu
    for turn, (method, reduction, nonfinite, broken) in enumerate(kinds):
        if turn % 5 and (slow or ctx.quick):
            continue
        options: dict[str, Any] = {"method": method, "reduction": reduction, "nonfinite": nonfinite, "beta": 3.0}
        options["mask_threshold"] = (0.0, 0.9)[turn % 2]
        upstream = torch.ones(6, device=ctx.device) if reduction == "none" else None
        got, want = ctx.totals(timesteps), ctx.totals(timesteps)
        for seed in range(2):  # the second call finds sums there
            batch = ctx.batch((12, 3, 37), BF16, BF16, F32, distance=1.0, weighted=True, seed=seed)
            if broken:
                with torch.no_grad():
                    batch.model_pred[4, 0, 0] = math.nan
            out, _ = ctx.run(batch, upstream=upstream, totals=got, **options)
            label = f"{describe(options)}{', a pair with NaN' * broken}"
            truth = testing.run_reference(batch, **options).metrics()
            fields = dataclasses.replace(out, numbers=None)
            for name, value in out.metrics().items():
                near = torch.isclose(value, fields.metrics()[name], rtol=2e-6, atol=1e-7, equal_nan=True)
                ctx.require(near, f"{label}: {name} {float(value):g}, of the fields {float(fields.metrics()[name]):g}")
                near = torch.isclose(value.double(), truth[name], rtol=2e-5, atol=2e-5, equal_nan=True)
                ctx.require(near, f"{label}: {name} {float(value):g}, by definition {float(truth[name]):g}")
            add_totals(want, fields, 111 / 3.0 * (6 if reduction == "mean" else 1))
        _same_sums(ctx, got, want, label)
    few = ctx.batch((16, 3), F32)
    sigma = torch.tensor([1e-6, 1 / 7, 2 / 7, 0.999, 1.0, -3.0, math.inf, math.nan])
    steps = torch.tensor([0, 1, 2, 6, 6, -3, 9, 0])
    wide = torch.stack([sigma, sigma], 1).repeat(2, 1)[:, 0]  # strided, and one for each sample
    for times, top in ((sigma, 1.0), (sigma.double(), 1.0), (wide, 1.0), (steps, 7.0), (steps.int(), 7.0)):
        sums = ctx.totals(times, top)
        ctx.run(few, totals=sums, method="diffusion_dpo", beta=3.0)
        assert sums.levels is not None
        found = [int(count) for count in sums.levels[0]]
        ctx.require(found == [3, 1, 1, 0, 0, 0, 3], f"bins of {times.dtype}, up to {top:g}: {found}")
    if ctx.on_gpu:  # more pairs than a block has threads, and than a group has pairs
        many = ctx.batch((1400, 5), F32, distance=1.0)
        got, want = (ctx.totals(torch.arange(700) * 1000 // 700) for _ in range(2))
        out, _ = ctx.run(many, totals=got, method="sipo", beta=3.0)
        add_totals(want, dataclasses.replace(out, numbers=None), 5 * 700 / 3.0)
        _same_sums(ctx, got, want, "700 pairs", 1e-4)


def _same_sums(ctx: Context, got: Totals, want: Totals, label: str, slack: float = 1e-6) -> None:
    """Counts are equal, sums within the rounding of float32 fields, whose squares and differences they are made of."""
    assert got.metrics is not None and want.metrics is not None and got.levels is not None and want.levels is not None
    ctx.require(torch.equal(got.metrics[1], want.metrics[1]), f"{label}: counts of metrics")
    ctx.require(torch.equal(got.levels[:2], want.levels[:2]), f"{label}: counts by noise level")
    for what, mine, plain in (("metrics", got.metrics[0], want.metrics[0]), ("levels", got.levels, want.levels)):
        near = torch.isclose(mine, plain, rtol=2e-5, atol=slack)
        ctx.require(near.all(), f"{label}: sums of {what}, off by {float((mine - plain).abs().max()):.3g}")


@check("scales", "sizes", "scaled gradient", "shifted logits")
def check_scales(ctx: Context) -> None:
    """Values from 1e-4 to 1e4, gaps that cancel a hundredfold, logits far out on both sides."""
    for exponent, dtype in itertools.product((-4, -1, 2, 4), (F32, BF16, F64)):
        ctx.hold(ctx.batch((4, 3, 5, 7), dtype, scale=10.0**exponent))
    long = (2, 4, 128, 128) if ctx.on_gpu else (2, 4, 16, 16)
    for seed in range(2 if ctx.quick else 6):
        ctx.hold(ctx.batch(long, F32, distance=1.0, seed=seed), logit=20.0, method="dpo_cm")
    for distance in (0.0, 1e-3):
        ctx.hold(ctx.batch((4, 1021), F32, distance=distance), "reference near the policy", beta=2000.0)
    far = ctx.batch((4, 31), F64, distance=1.0)
    for beta in (1e4, 1e7):
        out, grad = ctx.run(far, method="diffusion_dpo", beta=beta)
        truth = testing.run_reference(far, method="diffusion_dpo", beta=beta)
        exact = testing.reference_grad(far, method="diffusion_dpo", beta=beta)
        ctx.within(largest((out.loss - truth.loss).abs() / truth.loss), 1e-10, f"loss at beta={beta:g}")
        ctx.within((grad - exact).norm() / exact.norm(), 1e-10, f"gradient at beta={beta:g}")


@check("golden", "sizes", "scaled gradient", "shifted logits")
def check_golden(ctx: Context) -> None:
    """Independent float64 values of ``tests/golden``, to 1e-11."""
    for case in testing.golden_cases(ROOT / "tests" / "golden"):
        model = case.model_pred.to(ctx.device).requires_grad_()
        tensors = (t.to(ctx.device) for t in (case.ref_pred, case.target, case.ratio_scale))
        out, grad = ctx.run(testing.Batch(model, *tensors), **case.options)
        for name in ("model_error", "ref_error", "error_gap", "log_ratio", "weight", "logits", "loss"):
            close = torch.isclose(getattr(out, name).cpu(), case.expected[name], rtol=1e-11, atol=1e-14)
            ctx.require(close.all(), f"{case.name}: {name}")
        ctx.require(torch.equal(out.mask.cpu(), case.expected["mask"]), f"{case.name}: mask")
        ctx.within((grad.cpu() - case.expected["grad"]).norm() / case.expected["grad"].norm(), 1e-11, case.name)


@check("real shapes", "sizes", "scaled gradient", "shifted logits")
def check_real_shapes(ctx: Context) -> None:
    """Images and videos of many pairs and of one; a fraction of them in a rehearsal."""
    if ctx.on_gpu:
        shapes = {"SDXL": (16, 4, 128, 128), "Wan": (4, 16, 21, 60, 104), "HunyuanVideo": (2, 16, 33, 90, 160)}
        shapes |= {"SD1.5, 64 pairs": (128, 4, 64, 64), "Wan, 8 pairs": (16, 16, 21, 60, 104)}
    else:
        shapes = {"SDXL": (16, 4, 8, 16), "Wan": (4, 16, 3, 6, 10), "HunyuanVideo": (2, 16, 3, 9, 16)}
    for name, shape in shapes.items():
        for dtype in (BF16,) if name == "HunyuanVideo" or ctx.quick else (BF16, F32, F16):
            ctx.hold(ctx.batch(shape, dtype, distance=0.05, shared_target=name == "SDXL"), name)


@check("without gradient", "sizes", "wandering logits")
def check_without_gradient(ctx: Context) -> None:
    """Without a gradient, the bits of the forward that trains; where policy and reference are equal, logits of 0."""
    shapes: list[tuple[int, ...]] = [(4, 3, 7), (6, 2049)]
    if ctx.on_gpu:  # where a backend may cut the work differently
        shapes += [(2, 4, 64, 64), (16, 4, 128, 128), (4, 16, 21, 60, 104)]
    for dtype, shape in itertools.product((F32, BF16, F16), shapes):
        batch = ctx.batch(shape, dtype, weighted=True)
        options: dict[str, Any] = {"method": "sipo", "beta": 30.0, "mask_threshold": 0.0, "backend": ctx.backend}
        options |= {"ratio_scale": batch.ratio_scale, "error_weight": batch.error_weight}
        training = pair_loss(batch.model_pred, batch.ref_pred, batch.target, **options)
        with torch.no_grad(), poisoned():
            plain = pair_loss(batch.model_pred, batch.ref_pred, batch.target, **options)
        ctx.require(training.loss.requires_grad and not plain.loss.requires_grad, "who requires grad")
        for name in ("loss", "model_error", "ref_error", "error_gap", "log_ratio", "weight", "mask", "logits"):
            ctx.same(getattr(plain, name), getattr(training, name), f"{name} without gradient")
        for name, value in plain.metrics().items():
            ctx.same(value, training.metrics()[name], f"metric {name} without gradient")
        equal = batch._replace(ref_pred=batch.model_pred.detach().clone())
        out, grad = ctx.run(equal, method="sipo", beta=2000.0, mask_threshold=0.0)
        ctx.require(bool((out.logits == 0).all()) and bool((out.error_gap == 0).all()), "policy = reference: logits")
        ctx.require(bool((grad.flatten(1).norm(dim=1) > 0).all()), "policy = reference: the gradient is not 0")
