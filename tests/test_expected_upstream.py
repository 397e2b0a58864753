"""The upstream gradient that is expected: right gradients, of the same bits, whether it comes or another one does."""

from __future__ import annotations

import gc
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from sipo import NoiseSchedule, SIPOLoss
from sipo_kernels import backends, pair_loss
from sipo_kernels.layout import pair_dtype
from sipo_kernels.testing import Batch, make_batch, reference_grad, run

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
MIXES = [(F32,) * 3, (BF16,) * 3, (BF16, BF16, F32), (F16,) * 3, (F16, F16, F32), (F32, BF16, F64)]
UPSTREAMS = (1.0, 1 / 8, 1 / 3, 65536.0, 0.0, -2.0, math.inf, math.nan)
OPTIONS: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.9}


def cell(value: float) -> Tensor:
    """What :func:`pair_loss` takes, and the backward pass writes."""
    return torch.tensor(value, dtype=pair_dtype(torch.device(DEVICE)), device=DEVICE)


def bits(x: Tensor) -> Tensor:
    """To compare NaN with NaN."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def batch_of(mix: tuple[torch.dtype, ...], shared: bool, shape: tuple[int, ...] = (6, 3, 517)) -> Batch:
    batch = make_batch(shape, mix, shared_target=shared, device=DEVICE)  # type: ignore[arg-type]
    batch.ratio_scale[[1, 4]] = 100.0  # pair 1 is masked
    batch.ratio_scale[[0, 2, 3, 5]] = 0.001
    return batch


def pick(upstream: float, kind: str, loss: Tensor) -> Tensor:
    return torch.full_like(loss, upstream) if kind == "pairs" else torch.tensor(upstream).to(loss)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(t)[6:] for t in mix))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_whatever_was_expected(
    backend: str, mix: tuple[torch.dtype, ...], shared: bool, reduction: str
) -> None:
    slow = backend in ("triton", "cuda") and DEVICE == "cpu"  # interpreted and emulated
    batch = batch_of(mix, shared, (6, 3, 37) if slow else (6, 3, 517))
    options = {**OPTIONS, "reduction": reduction}
    for value in (1 / 8, math.inf) if slow else UPSTREAMS:
        out = pair_loss(*batch[:3], ratio_scale=batch.ratio_scale, backend=backend, **options)
        upstream = torch.full_like(out.loss, value)
        model, target = batch.model_pred.detach(), batch.target
        plain = backends.module(backend).gradient(model, target, out.coef, upstream)
        assert not plain[[1, 4]].any() and not bits(plain[[1, 4]]).any()
        for expected in (value, cell(-7.0)) if slow else (value, 1.0, cell(value), cell(-7.0)):
            _, grad = run(batch, backend, upstream=upstream, expected_upstream=expected, **options)
            assert torch.equal(bits(grad), bits(plain)), (value, expected)
            if isinstance(expected, Tensor) and backend in backends.FUSED and math.isfinite(value):
                assert expected.item() == float(upstream.flatten()[0])


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(t)[6:] for t in mix))
def test_the_gradient_is_that_of_the_definition(backend: str, mix: tuple[torch.dtype, ...]) -> None:
    batch = batch_of(mix, False)
    upstream = torch.tensor(1 / 8, device=DEVICE, dtype=F64 if F64 in mix else F32)
    exact = reference_grad(batch, grad_output=upstream.double(), **OPTIONS)
    rounding = (exact.to(mix[0]).double() - exact).norm()
    for expected in (1 / 8, 1.0, None):
        _, grad = run(batch, backend, upstream=upstream, expected_upstream=expected, **OPTIONS)
        assert (grad.double() - exact).norm() <= rounding + 1e-6 * exact.norm()


def test_float16_is_fused_once_its_scale_is_known(backend: str) -> None:
    """Unscaled, every gradient of this batch is below float16's smallest number."""
    batch = make_batch((2, 40_000), (F16,) * 3, scale=0.01, device=DEVICE)
    options: dict[str, Any] = {"method": "diffusion_dpo", "beta": 0.01, "backend": backend}
    scale = torch.tensor(2.0**20, device=DEVICE)
    expected = cell(2.0**20)
    out = pair_loss(*batch[:3], ratio_scale=batch.ratio_scale, expected_upstream=expected, **options)
    if backend in backends.FUSED:
        assert torch.count_nonzero(out.loss.grad_fn.fused_grad) > 30_000
    (grad,) = torch.autograd.grad(out.loss, batch.model_pred, grad_outputs=scale)
    exact = reference_grad(batch, method="diffusion_dpo", beta=0.01, grad_output=scale.double())
    assert (grad.double() - exact).norm() <= (exact.to(F16).double() - exact).norm() + 1e-6 * exact.norm()


def test_what_is_not_finite_is_not_remembered(backend: str) -> None:
    batch = batch_of((BF16, BF16, F32), False)
    for value in (math.nan, math.inf, -math.inf):
        expected = cell(0.25)
        upstream = torch.tensor(value, device=DEVICE)
        _, grad = run(batch, backend, upstream=upstream, expected_upstream=expected, **OPTIONS)
        assert expected.item() == 0.25
        assert not grad[0].isfinite().any() and not grad[1].any()
    # The first pair's is remembered; pairs may differ.
    each = torch.tensor([0.5, -3.0, 0.0], device=DEVICE)
    expected = cell(0.5)
    options = {**OPTIONS, "reduction": "none"}
    _, grad = run(batch, backend, upstream=each, expected_upstream=expected, **options)
    exact = reference_grad(batch, grad_output=each.double(), **options)
    assert (grad.double() - exact).norm() <= (exact.to(BF16).double() - exact).norm() + 1e-6 * exact.norm()
    assert expected.item() == 0.5


def test_other_layouts(backend: str) -> None:
    """A gradient that a kernel cannot write where it lies is copied there, held or not."""
    batch = make_batch((4, 4, 6, 10), (BF16, BF16, F32), device=DEVICE)
    upstream = torch.tensor(0.125, device=DEVICE)
    _, plain = run(batch, backend, upstream=upstream, **OPTIONS)
    innermost = batch.model_pred.detach().permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    nhwc = batch.model_pred.detach().contiguous(memory_format=torch.channels_last)
    for model in (innermost, nhwc):
        for expected in (0.125, 1.0):
            moved = batch._replace(model_pred=model.detach().requires_grad_())
            _, grad = run(moved, backend, upstream=upstream, expected_upstream=expected, **OPTIONS)
            assert grad.stride() == torch.empty_like(model).stride()
            torch.testing.assert_close(grad, plain, rtol=2**-8, atol=0)


# ---- The module, which remembers ------------------------------------------------------------------------------------


def module(backend: str = "auto", **options: Any) -> SIPOLoss:
    return SIPOLoss(NoiseSchedule.discrete(), beta=3.0, mask_threshold=0.0, backend=backend, **options)


TIMESTEPS = torch.tensor([700, 400, 900], device=DEVICE)


def expects(out: Any) -> float:
    """What a call's gradient was made for; 0 where the forward pass makes none."""
    node = out.loss.grad_fn
    return 0.0 if node.numbers is None else float(node.numbers[-1])


@pytest.mark.parametrize("mix", [(BF16, BF16, F32), (F16, F16, F32), (F32,) * 3], ids=["bf16", "fp16", "fp32"])
def test_accumulation_is_foreseen_from_the_second_pass_on(backend: str, mix: tuple[torch.dtype, ...]) -> None:
    loss_fn = module(backend)
    for accumulated in (8, 3):
        found = []
        for turn in range(4):
            batch = batch_of(mix, False)
            out = loss_fn(*batch[:3], TIMESTEPS)
            found.append(expects(out))
            (out.loss / accumulated).backward()
            upstream = torch.tensor(1 / accumulated, device=DEVICE)
            plain = backends.module(backend).gradient(batch.model_pred.detach(), batch.target, out.coef, upstream)
            assert torch.equal(batch.model_pred.grad, plain), turn
        if backend in backends.FUSED:
            before = 1.0 if accumulated == 8 else 1 / 8
            assert found == pytest.approx([before] + 3 * [1 / accumulated], rel=1e-7)


def test_several_losses_of_one_module_in_flight(backend: str) -> None:
    """Backward passes in another order than the forward ones, each with its own upstream gradient."""
    loss_fn = module(backend)
    upstreams = (0.5, 0.25, 3.0, 0.5)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        batches = [make_batch((6, 3, 37), (BF16, BF16, F32), seed=seed, device=DEVICE) for seed in range(4)]
        outs = [loss_fn(*batch[:3], TIMESTEPS) for batch in batches]
        for i in order:
            (outs[i].loss * upstreams[i]).backward()
        for batch, out, value in zip(batches, outs, upstreams, strict=True):
            upstream = torch.tensor(value, device=DEVICE)
            plain = backends.module(backend).gradient(batch.model_pred.detach(), batch.target, out.coef, upstream)
            assert torch.equal(batch.model_pred.grad, plain)


def test_modules_do_not_share_what_they_remember(backend: str) -> None:
    first, second = module(backend), module(backend)
    batch = make_batch((6, 3, 37), device=DEVICE)
    (first(*batch[:3], TIMESTEPS).loss / 4).backward()
    out = second(*batch[:3], TIMESTEPS)
    assert expects(out) == (1.0 if backend in backends.FUSED else 0.0)
    out = first(*batch[:3], TIMESTEPS)
    assert expects(out) == (0.25 if backend in backends.FUSED else 0.0)


def test_a_kept_graph_with_another_upstream(backend: str) -> None:
    batch = make_batch((6, 3, 37), (BF16, BF16, F32), device=DEVICE)
    loss_fn = module(backend)
    out = loss_fn(*batch[:3], TIMESTEPS)
    found = []
    for value in (1.0, 0.125, 1.0):
        upstream = torch.tensor(value, device=DEVICE)
        (grad,) = torch.autograd.grad(out.loss, batch.model_pred, grad_outputs=upstream, retain_graph=True)
        plain = backends.module(backend).gradient(batch.model_pred.detach(), batch.target, out.coef, upstream)
        assert torch.equal(grad, plain)
        found.append(grad)
    assert len({grad.data_ptr() for grad in found}) == 3  # what was handed out is the caller's


def test_a_loss_scale_that_changes(backend: str) -> None:
    """GradScaler: the scale is learnt by the second step, an overflow halves it, and gradients stay right."""
    weight = torch.nn.Parameter(torch.ones(6, 1, 1, device=DEVICE))
    batch = make_batch((6, 3, 37), (F16, F16, F32), device=DEVICE)
    exact = reference_grad(batch, method="sipo", beta=3.0, mask_threshold=0.0)
    expected = (exact * batch.model_pred.detach().double()).sum((1, 2))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    loss_fn, scales, foreseen = module(backend), [], []
    fixed = batch.ratio_scale
    for turn in range(6):
        model = (batch.model_pred.detach().float() * weight).to(F16)
        if turn == 4:
            model = model * math.inf
        out = pair_loss(
            model, *batch[1:3], ratio_scale=fixed, expected_upstream=loss_fn._expected(model), backend=backend,
            method="sipo", beta=3.0, mask_threshold=0.0,
        )  # fmt: skip
        foreseen.append(expects(out))
        scales.append(scaler.get_scale())
        scaler.scale(out.loss).backward()
        scaler.unscale_(optimizer)
        if turn != 4:
            error = (weight.grad.flatten().double() - expected).norm() / expected.norm()
            assert error < 2e-3, (turn, error)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scales == [2.0**10, 2.0**10, 2.0**11, 2.0**11, 2.0**12, 2.0**11]
    if backend in backends.FUSED:
        assert foreseen == [1.0, *scales[:-1]]


def test_compiled_graphs_leave_it_alone() -> None:
    torch._dynamo.reset()
    loss_fn = module()
    batch = make_batch((6, 3, 37), device=DEVICE)

    def step(model: Tensor) -> Tensor:
        return loss_fn(model, *batch[1:3], TIMESTEPS).loss / 8

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(batch.model_pred)
    (grad,) = torch.autograd.grad(loss, batch.model_pred)
    (plain,) = torch.autograd.grad(step(batch.model_pred), batch.model_pred)
    assert torch.equal(grad, plain)


def test_inside_distributed_data_parallel(tmp_path: Path) -> None:
    """A loss that is part of the wrapped module: buckets and hooks get the gradient that is due, pass after pass."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        compare_with_wrapped()
        gc.collect()  # DDP, were it the last to hold the group, would wait for its threads and keep the GIL
    finally:
        dist.destroy_process_group()


def compare_with_wrapped() -> None:
    """Gradients of a module by itself and of the same in DistributedDataParallel."""
    network = torch.nn.Linear(8, 8).to(DEVICE)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.loss_fn = network, module()

        def forward(self, x: Tensor, ref: Tensor, target: Tensor) -> Tensor:
            return self.loss_fn(self.network(x), ref, target, TIMESTEPS).loss

    x, ref, target = (make_batch((6, 4, 8), seed=seed, device=DEVICE).target for seed in range(3))
    plain = Whole()
    wrapped = torch.nn.parallel.DistributedDataParallel(plain, gradient_as_bucket_view=True)
    for turn in range(3):
        grads = []
        for model in (plain, wrapped):
            network.zero_grad()
            for _ in range(2):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    (model(x, ref, target) / 2).backward()
            grads.append([p.grad.clone() for p in network.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), turn


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "error", "message"),
    [
        ("1", TypeError, "expected_upstream='1' is a str: expected a number or a 0-d tensor"),
        (True, TypeError, "expected_upstream=True is a bool: expected a number"),
        (torch.ones(2, dtype=F64), ValueError, r"expected_upstream has shape \[2\]: expected \[\]"),
        (torch.ones(()), TypeError, "expected_upstream has dtype torch.float32: expected torch.float64"),
        (torch.ones((), dtype=F64, requires_grad=True), ValueError, "expected_upstream requires grad"),
        (torch.ones((), dtype=F64, device="meta"), ValueError, "expected_upstream is on meta: expected cpu"),
    ],
)
def test_what_cannot_be_expected_is_refused(expected: Any, error: type[Exception], message: str) -> None:
    batch = make_batch((4, 3))
    with pytest.raises(error, match=message):
        run(batch, "eager", method="diffusion_dpo", beta=1.0, expected_upstream=expected)
