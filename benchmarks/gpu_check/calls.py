"""Checks of how networks and training scripts call the loss: strides, broken pairs, autograd, autocast, compilation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.context import BF16, F16, F32, F64, Context, check, poisoned, same_bits
from sipo_kernels import PairLossOutput, backends, pair_loss, testing
from sipo_kernels.output import RESULTS

Options = dict[str, Any]

# ---- Layouts ---------------------------------------------------------------------------------------------------------


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """Yields the values of ``x`` ``[S, C, F, H, W]`` in the strides that networks produce."""
    wide = x.new_zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:])
    wide[:, x.shape[1] :] = x
    batch = x.new_zeros(2 * x.shape[0], *x.shape[1:])
    batch[::2] = x
    middle = x.new_zeros(x.shape[0] + 3, *x.shape[1:])
    middle[1:-2] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last_3d": x.contiguous(memory_format=torch.channels_last_3d),
        "frames first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "half the channels": wide[:, x.shape[1] :],
        "every other sample": batch[::2],
        "slice of the batch": middle[1:-2],
        "batch innermost": x.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
        "strided last": torch.stack([x, x], -1)[..., 0],
        "one element into its storage": torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
        "three elements into its storage": torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape),
    }


@check("layouts", "calls", "scaled gradient", "gradient in storage order")
def check_layouts(ctx: Context) -> None:
    """Every layout of the policy with every other of the rest: right values, and a gradient laid out as the policy."""
    shapes = [(4, 4, 3, 5, 6), (2, 16, 3, 8, 16), (2, 4, 9, 32, 32)]
    if ctx.quick or not ctx.on_gpu:
        del shapes[1:]
    for shape, dtype in itertools.product(shapes, (F32, BF16) if ctx.on_gpu else (F32,)):
        base = ctx.batch(shape, dtype)
        models, refs, targets = (_layouts(t.detach()) for t in base[:3])
        names = list(models)
        for place, (model, other) in enumerate(itertools.product(names, names)):
            if not ctx.on_gpu and model != other and other != names[(names.index(model) + 3) % len(names)]:
                continue
            ref = refs[other] if place % 2 else refs[model]
            batch = base._replace(model_pred=_leaf(models[model]), ref_pred=ref, target=targets[other])
            ctx.hold(batch, f"{model} with {other}", beta=3.0)
    image = ctx.batch((4, 6, 8, 5), BF16, F32, F32)
    last = [t.detach().contiguous(memory_format=torch.channels_last) for t in image[:3]]
    for tensors in ((last[0], last[1], last[2]), (last[0], image.ref_pred, last[2]), (image[0].detach(), *last[1:])):
        ctx.hold(image._replace(model_pred=_leaf(tensors[0]), ref_pred=tensors[1], target=tensors[2]), "channels_last")
    one = base.target[:1].expand(base.target.shape)
    ctx.hold(base._replace(target=one), "expanded target")
    ctx.hold(base._replace(target=base.target[:2, :, :, :1, :1].expand(2, *base.target.shape[1:])), "expanded, shared")
    ctx.hold(base._replace(ref_pred=base.ref_pred[:, :1].expand(base.ref_pred.shape)), "expanded reference", logit=5.0)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


# ---- What stays in its pair ------------------------------------------------------------------------------------------


@check("containment", "calls", "NaN leaks", "skip ignored")
def check_containment(ctx: Context) -> None:
    """NaN and infinity in one pair leave every bit of the others alone, and are what torch would make of them."""
    places = ("model_pred", "ref_pred", "target")
    for dtype, value, where in itertools.product((F32, BF16), (math.nan, math.inf, -math.inf), places):
        clean = ctx.batch((6, 3, 517), dtype)
        options: Options = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, "reduction": "none"}
        options["upstream"] = torch.ones(3, device=ctx.device)
        before, grad_before = ctx.run(clean, **options)
        tensors = {name: getattr(clean, name).detach().clone() for name in places}
        tensors[where][4, 1, 7] = value  # the rejected sample of pair 1
        tensors["model_pred"].requires_grad_()
        broken = clean._replace(**tensors)
        label = f"{value} in {where}"
        for nonfinite in ("propagate", "skip"):
            after, grad = ctx.run(broken, nonfinite=nonfinite, **options)
            ctx.same(after.loss[[0, 2]], before.loss[[0, 2]], f"{label}: other pairs' loss")
            ctx.same(grad[[0, 2, 3, 5]], grad_before[[0, 2, 3, 5]], f"{label}: other pairs' gradient")
            ctx.require(int(after.metrics()["nonfinite_pairs"]) == 1, f"{label}: nonfinite_pairs")
            if nonfinite == "skip":
                ctx.require(after.mask.tolist() == [True, False, True], f"{label}: mask")
                ctx.require(float(after.loss.detach()[1]) == 0, f"{label}: skipped loss")
                ctx.require(bool((grad[[1, 4]] == 0).all()), f"{label}: skipped gradient")
            else:
                reference_options = {k: v for k, v in options.items() if k != "upstream"}
                truth = testing.run_reference(broken, **reference_options)
                for name in ("logits", "loss"):
                    got, expected = getattr(after, name).double(), getattr(truth, name)
                    close = torch.isclose(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
                    ctx.require(close.all(), f"{label}: {name} {got.tolist()}, expected {expected.tolist()}")


@check("masked pairs", "calls", "masked pairs leak", "mask ignored")
def check_masked_pairs(ctx: Context) -> None:
    """Exact zeros in a masked pair, whatever it holds and whatever comes down; the others get their gradient."""
    for dtype in (F32, BF16):
        batch = ctx.batch((8, 3, 11), dtype, distance=1.0)
        scale = torch.tensor([0.0, 9.0, 0.0, math.inf] * 2, dtype=F64, device=ctx.device)
        batch = batch._replace(ratio_scale=scale)
        with torch.no_grad():  # pruned by its timestep, a pair may hold anything
            batch.model_pred[7, 0, 3] = math.inf
            batch.model_pred[5] = 1e18  # squared, it is still a float32: only the mask keeps it out
        for upstream in (None, math.inf, 0.25):
            given = None if upstream is None else torch.tensor(upstream, device=ctx.device)
            out, grad = ctx.run(batch, upstream=given, method="sipo", beta=3.0, nonfinite="skip")
            ctx.require(out.mask.tolist() == [True, False, True, False], f"mask {out.mask.tolist()}")
            ctx.require(bool((grad[[1, 3, 5, 7]] == 0).all()), f"upstream {upstream}: a masked pair has a gradient")
            moved = (grad != 0) | (batch.model_pred.detach().float() == batch.target.float())
            ctx.require(bool(moved[[0, 2, 4, 6]].all()), f"upstream {upstream}: an active pair has none")


# ---- Autograd --------------------------------------------------------------------------------------------------------


@check("upstream gradients", "calls", "upstream ignored", "scaled gradient")
def check_upstream(ctx: Context) -> None:
    """Scalars, a loss scale, zero, one for each pair, in any stride; float16 gradients live through a loss scale."""
    for dtype, shape in itertools.product((F32, BF16, F16), ((4, 3, 97), (4, 2048))):
        batch = ctx.batch(shape, dtype)
        options: Options = {"beta": 3.0, "mask_threshold": 0.0}
        for value in (1.0, 0.25, 1 / 3, 65536.0, -2.0, 0.0):
            factor = torch.tensor(value, dtype=F32, device=ctx.device)
            exact = testing.reference_grad(batch, method="sipo", grad_output=factor.double(), **options)
            _, grad = ctx.run(batch, upstream=factor, method="sipo", **options)
            ctx.gradient(grad, exact, f"upstream {value} {dtype}")
        each = torch.tensor([1.0, -3.0], device=ctx.device)
        kinds = {
            "1, -3": each,
            "1, 0": torch.tensor([1.0, 0.0], device=ctx.device),
            "expanded": torch.tensor(0.5, device=ctx.device).expand(2),
            "strided": torch.stack([each, each], 1)[:, 0],
        }
        for what, upstream in kinds.items():
            exact = testing.reference_grad(
                batch, method="sipo", reduction="none", grad_output=upstream.double(), **options
            )
            _, grad = ctx.run(batch, upstream=upstream, method="sipo", reduction="none", **options)
            ctx.gradient(grad, exact, f"upstream {what} {dtype}")
    faint = ctx.batch((2, 40_000), F16, scale=0.01)  # unscaled, every gradient is below float16's smallest number
    scale = torch.tensor(2.0**20, device=ctx.device)
    exact = testing.reference_grad(faint, method="diffusion_dpo", beta=0.01, grad_output=scale.double())
    for expected in (None, ctx.cell(2.0**20), 1.0):
        _, grad = ctx.run(faint, upstream=scale, method="diffusion_dpo", beta=0.01, expected_upstream=expected)
        ctx.gradient(grad, exact, f"float16 through a loss scale, expected {expected}")


@check(
    "expected upstream", "calls", "upstream ignored", "expectation ignored", "mend skipped", "mend scales",
    "mend mixes pairs", "nothing remembered", "infinity remembered",
)  # fmt: skip
def check_expected(ctx: Context) -> None:
    """The same bits whether the upstream gradient was expected, or another, or none; what came is remembered."""
    mixes = ((F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, F32), (F16, F16, F32), (F32, BF16, F64))
    shapes = [(6, 3, 517), (6, 4, 128, 128)] if ctx.on_gpu and not ctx.quick else [(6, 3, 51)]
    values: tuple[float, ...] = (1.0, 1 / 8, 1 / 3, 65536.0, 0.0, -2.0, math.inf, math.nan)
    slow = ctx.backend == "triton" and not ctx.on_gpu  # its interpreter
    if slow:
        values = (1 / 8, 65536.0, math.inf)
    kinds = itertools.product(shapes, mixes, (False, True), ("mean", "none"))
    for turn, (shape, mix, shared, reduction) in enumerate(kinds):
        if slow and turn % 3:
            continue
        batch = ctx.batch(shape, *mix, shared_target=shared)
        options: Options = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, "reduction": reduction}
        out, _ = ctx.run(batch, upstream=_like(batch, reduction, [1.0] * 3), **options)
        different: list[list[float]] = [[0.5, 0.5, -3.0], [0.25, 8.0, 0.0]] if reduction == "none" else []
        for each in [[value] * 3 for value in values] + different:
            upstream = _like(batch, reduction, each)
            label = f"{mix[0]}, {mix[2]} target{', shared' * shared}, {reduction}, upstream {each}"
            plain = backends.module(ctx.backend).gradient(batch.model_pred.detach(), batch.target, out.coef, upstream)
            if math.isfinite(each[0]):
                exact = testing.reference_grad(batch, grad_output=upstream.double(), **options)
                ctx.gradient(plain, exact, label)
            for expected in (each[0], ctx.cell(each[0]), ctx.cell(-7.0), 1.0):
                _, grad = ctx.run(batch, upstream=upstream, expected_upstream=expected, **options)
                ctx.same(_calm(grad), _calm(plain), f"{label}, expected {float(expected):g}")
            if ctx.backend in backends.FUSED:
                kept = ctx.cell(0.5)
                ctx.run(batch, upstream=upstream, expected_upstream=kept, **options)
                due = float(upstream.flatten()[0]) if math.isfinite(each[0]) else 0.5
                ctx.require(float(kept) == due, f"{label}: {float(kept):g} is remembered")


def _like(batch: testing.Batch, reduction: str, each: list[float]) -> Tensor:
    """Makes an upstream gradient as autograd does: in the loss's type, a scalar or one for each pair."""
    wide = F64 in (batch.model_pred.dtype, batch.ref_pred.dtype, batch.target.dtype)
    upstream = torch.tensor(each, dtype=F64 if wide else F32, device=batch.model_pred.device)
    return upstream if reduction == "none" else upstream[0]


def _calm(grad: Tensor) -> Tensor:
    """Replaces every NaN by the same NaN."""
    return torch.where(grad.isnan(), math.nan, grad)


@check("accumulation", "calls", "upstream ignored", "scaled gradient", "expectation ignored", "mend skipped")
def check_accumulation(ctx: Context) -> None:
    """Two half batches at half the loss, accumulated into a parameter, give the whole batch's gradient.

    The second pass expects what the first one brought, as :class:`sipo.SIPOLoss` has it.
    """
    for dtype in (F32, F64):
        batch = ctx.batch((8, 3, 13), dtype)
        options: Options = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, "backend": ctx.backend}
        exact = testing.reference_grad(batch, **{k: v for k, v in options.items() if k != "backend"})
        weight = torch.ones_like(batch.model_pred, requires_grad=True)
        remembered = ctx.cell(1.0)
        for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
            model = batch.model_pred.detach() * weight
            out = pair_loss(
                model[rows], *(t[rows] for t in batch[1:3]), ratio_scale=batch.ratio_scale[rows],
                expected_upstream=remembered, **options,
            )  # fmt: skip
            (out.loss / 2).backward()
        assert weight.grad is not None
        expected = exact * batch.model_pred.detach().double()
        ctx.gradient(weight.grad, expected, f"accumulated {dtype}")


@check("kept graph", "calls", "gradient handed out twice", "upstream ignored")
def check_kept_graph(ctx: Context) -> None:
    """A second backward through a kept graph, after the caller has changed the first gradient, and with another one."""
    for dtype in (F32, BF16):
        batch = ctx.batch((4, 3, 13), dtype)
        options: Options = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0}
        exact = testing.reference_grad(batch, **options)
        out = pair_loss(*batch[:3], ratio_scale=batch.ratio_scale, backend=ctx.backend, **options)
        (first,) = torch.autograd.grad(out.loss, batch.model_pred, retain_graph=True)
        ctx.gradient(first, exact, f"first backward {dtype}")
        first.mul_(100)  # what was handed out is the caller's
        (second,) = torch.autograd.grad(out.loss, batch.model_pred, retain_graph=True)
        ctx.gradient(second, exact, f"second backward {dtype}")
        (third,) = torch.autograd.grad(out.loss * 3, batch.model_pred)
        ctx.gradient(third, 3 * exact, f"third backward, of three times the loss, {dtype}")


@check("repetition", "calls", "wandering gradient", "wandering logits", "wandering totals")
def check_repetition(ctx: Context) -> None:
    """20 runs with other work between (and, on a GPU, beside) them, on memory that holds NaN: one set of bits."""
    shapes = [(6, 5, 1999), (2, 16, 21, 60, 104), (64, 4, 64, 64)] if ctx.on_gpu else [(6, 5, 211)]
    beside = torch.cuda.Stream() if ctx.on_gpu else None
    busy = torch.randn(1024, 1024, device=ctx.device) if ctx.on_gpu else torch.randn(32, 32)
    for shape, dtypes in itertools.product(shapes, ((BF16, BF16, F32), (BF16,), (F32,))):
        batch = ctx.batch(shape, *dtypes)
        timesteps = torch.arange(shape[0] // 2) % 3 * 400  # several pairs to a bin
        upstream, expected = torch.tensor(1 / 8, device=ctx.device), ctx.cell(1 / 8)
        first: list[Tensor] = []
        for turn in range(5 if ctx.quick else 20):
            size = batch.model_pred.numel() + 64 * turn
            poison = [torch.full((n,), math.nan, device=ctx.device) for n in (size, 3 * shape[0], 1024 + 8 * turn)]
            del poison  # back to the allocator, for the next call's results
            if beside is not None:
                with torch.cuda.stream(beside):  # takes multiprocessors away: blocks finish in another order
                    for _ in range(turn % 4):
                        busy @ busy
            sums = ctx.totals(timesteps)
            assert sums.metrics is not None and sums.levels is not None
            out, grad = testing.run(
                batch, ctx.backend, upstream=upstream, expected_upstream=expected, totals=sums,
                method="sipo", beta=30.0, mask_threshold=0.0,
            )  # fmt: skip
            found = [grad, *(getattr(out, name) for name in RESULTS), sums.metrics, sums.levels]
            first = first or found
            names = ("gradient", *RESULTS, "sums of metrics", "sums by noise level")
            for name, got, due in zip(names, found, first, strict=True):
                ctx.same(got, due, f"run {turn} {list(shape)}: {name}")
            (busy @ busy).sum()
        exact = testing.reference_grad(
            batch, method="sipo", beta=30.0, mask_threshold=0.0, grad_output=upstream.double()
        )
        ctx.gradient(first[0], exact, f"{list(shape)}: gradient")


# ---- torch's ways of calling -----------------------------------------------------------------------------------------


@check("autocast", "calls", "scaled gradient", "shifted logits")
def check_autocast(ctx: Context) -> None:
    """A network in half precision under autocast beside float32 targets; its output's gradient within the budget."""
    for dtype in (BF16, F16):
        batch = ctx.batch((4, 64), F32)
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).div_(8).to(ctx.device)
        weight.requires_grad_()
        options: Options = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0}
        with torch.autocast(ctx.device, dtype=dtype):
            pred = batch.model_pred.detach() @ weight
            pred.retain_grad()
            out = pair_loss(pred, *batch[1:3], ratio_scale=batch.ratio_scale, backend=ctx.backend, **options)
        ctx.require(pred.dtype == dtype and out.loss.dtype == F32, f"types under autocast: {pred.dtype}")
        out.loss.backward()
        inner = batch._replace(model_pred=_leaf(pred))
        exact, truth = testing.reference_grad(inner, **options), testing.run_reference(inner, **options)
        assert pred.grad is not None and weight.grad is not None
        ctx.compare(inner, out, pred.grad, exact, truth, f"autocast {dtype}")
        ctx.require(bool(weight.grad.any()), "the network got a gradient")


@check("torch.compile", "compile", "scaled gradient", "shifted logits")
def check_compile(ctx: Context) -> None:
    """One whole graph with work around the loss, in a layout of its own: within the budget, and eager mode's bits."""

    def step(model: Tensor, ref: Tensor, target: Tensor, scale: Tensor, reduction: str) -> tuple[Any, ...]:
        model = (model * 2).contiguous(memory_format=torch.channels_last)
        out = pair_loss(
            model, ref, target, ratio_scale=scale, method="sipo", beta=3.0, mask_threshold=0.0, reduction=reduction,
            backend=ctx.backend,
        )  # fmt: skip
        return out.loss.sum(), (out.samples, out.logits, out.mask), out.metrics()

    kinds = ((F32, "mean"), (BF16, "none"), (F16, "sum"))
    for dtype, reduction in kinds[:2] if ctx.quick else kinds:
        torch._dynamo.reset()
        batch = ctx.batch((4, 3, 8, 8), dtype)
        # Code generation is torch's; a rehearsal does without it, and without the seconds that it takes.
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if ctx.on_gpu else "aot_eager")
        tensors = (*batch[:4], reduction)
        _, _, metrics = step(*tensors)
        with poisoned():
            loss, rest, compiled_metrics = compiled(*tensors)
            (grad,) = torch.autograd.grad(loss, batch.model_pred)
        (plain,) = torch.autograd.grad(step(*tensors)[0], batch.model_pred)
        ctx.require(same_bits(grad, plain), f"compiled {dtype}: the gradient's bits are not eager mode's")
        doubled = batch._replace(model_pred=_leaf(2 * batch.model_pred))  # exact, and so is halving the gradient
        options: Options = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0}
        summed = "mean" if reduction == "mean" else "sum"
        exact = testing.reference_grad(doubled, reduction=summed, **options)
        truth = testing.run_reference(doubled, reduction=summed, **options)
        out = PairLossOutput(loss.detach(), *rest)
        ctx.compare(doubled, out, grad / 2, exact, truth, f"compiled {dtype}")
        for name, value in metrics.items():
            close = torch.isclose(compiled_metrics[name], value, rtol=1e-5, atol=1e-7)
            ctx.require(close, f"compiled metrics: {name}")
