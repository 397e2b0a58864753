"""The pair loss at its edges: tensors that are not what they seem, numbers at the end of float32, symbolic settings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch.autograd import forward_ad

from sipo import NoiseSchedule, SIPOLoss
from sipo_kernels import METHODS, METRICS, STATISTICS, Totals, backends, pair_loss, reference
from sipo_kernels.backends.cuda import emulation
from sipo_kernels.backends.cuda import launch as cuda
from sipo_kernels.layout import pair_dtype
from sipo_kernels.testing import make_batch, run, run_reference

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
NAMES = ("model_pred", "ref_pred", "target", "ratio_scale", "error_weight", "error_mask")
OPTIONS: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0}


# ---- Lazy bits -------------------------------------------------------------------------------------------------------


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    """The same values behind torch's negative bit: memory holds their opposites."""
    lazy = torch._neg_view(-tensor.detach())
    assert lazy.is_neg() and torch.equal(lazy, tensor)
    return lazy.requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_the_negative_bit_is_heeded(backend: str, name: str) -> None:
    batch = make_batch((6, 3, 7), weighted=True, mask="weights", device=DEVICE)
    out, grad = run(batch, backend, **OPTIONS)
    lazy = batch._replace(**{name: _negated(getattr(batch, name))})
    lazy_out, lazy_grad = run(lazy, backend, **OPTIONS)
    torch.testing.assert_close(lazy_out.logits, out.logits, rtol=1e-6, atol=0)
    torch.testing.assert_close(lazy_grad, grad, rtol=1e-6, atol=0)


def test_the_imaginary_part_of_a_conjugate(backend: str) -> None:
    """Where the bit comes from: a view of a complex tensor, with strides of its own."""
    batch = make_batch((6, 3, 7), device=DEVICE)
    complex_model = torch.complex(torch.zeros_like(batch.target), -batch.model_pred.detach())
    lazy = complex_model.conj().imag
    assert lazy.is_neg()
    lazy_out, _ = run(batch._replace(model_pred=lazy.requires_grad_()), backend, **OPTIONS)
    torch.testing.assert_close(lazy_out.logits, run(batch, backend, **OPTIONS)[0].logits, rtol=1e-6, atol=0)


def test_the_negative_bit_of_reference_errors_timesteps_and_upstream(backend: str) -> None:
    batch = make_batch((6, 3, 7), device=DEVICE)
    model, _, target, scale = batch[:4]
    errors, upstream = run(batch, backend, **OPTIONS)[0].ref_error, torch.tensor([0.5, -2.0, 3.0], device=DEVICE)
    levels = [torch.zeros(len(STATISTICS), 4, device=DEVICE) for _ in range(2)]
    timesteps = torch.tensor([-1.0, 0.3, 0.9], device=DEVICE).neg()  # −(−1) is in the last bin, −1 in the first
    results = []
    for lazy, sums in zip((False, True), levels, strict=True):
        bit = _negated if lazy else torch.clone
        totals = Totals(levels=sums, pair_levels=bit(timesteps))
        options = OPTIONS | {"ref_error": bit(errors), "ratio_scale": bit(scale), "reduction": "none"}
        out = pair_loss(model, None, target, totals=totals, backend=backend, **options)
        results.append((out.logits, *torch.autograd.grad(out.loss, model, bit(upstream))))
    assert levels[0][0, 3] == 1
    torch.testing.assert_close(levels[1], levels[0], rtol=1e-6, atol=0)
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [*NAMES, "ref_error"])
def test_zeros_without_memory(backend: str, name: str) -> None:
    """``_efficientzerotensor``, which forward-mode AD makes, has no data: its pointer is null."""
    batch = make_batch((6, 3, 7), weighted=True, mask="weights", device=DEVICE)
    options: dict[str, Any] = dict(zip(NAMES, batch, strict=True))
    if name == "ref_error":
        options |= {"ref_pred": None, "ref_error": options["ratio_scale"]}
    zeros = torch._efficientzerotensor(options[name].shape, dtype=options[name].dtype, device=DEVICE)
    wanted = pair_loss(**options | {name: torch.zeros_like(options[name])}, **OPTIONS, backend=backend)
    got = pair_loss(**options | {name: zeros}, **OPTIONS, backend=backend)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["expected_upstream", "totals.metrics", "totals.levels"])
def test_a_buffer_that_is_written_to_has_no_lazy_bit(name: str) -> None:
    batch = make_batch((4, 3), device=DEVICE)
    lazy = {
        "expected_upstream": torch.ones((), dtype=pair_dtype(batch.target.device), device=DEVICE),
        "totals.metrics": torch.zeros(2, len(METRICS), device=DEVICE),
        "totals.levels": torch.zeros(len(STATISTICS), 3, device=DEVICE),
    }[name]
    for tensor in (_negated(lazy), torch._efficientzerotensor(lazy.shape, dtype=lazy.dtype, device=DEVICE)):
        extras: dict[str, Any] = {
            "expected_upstream": {"expected_upstream": tensor},
            "totals.metrics": {"totals": Totals(metrics=tensor)},
            "totals.levels": {"totals": Totals(levels=tensor, pair_levels=torch.zeros(2, device=DEVICE))},
        }[name]
        with pytest.raises(ValueError, match=f"{name} .*plain buffer"):
            pair_loss(*batch[:3], method="diffusion_dpo", beta=1.0, **extras)


# ---- Forward-mode AD -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "ref_error"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_says_so(backend: str, name: str, requires_grad: bool) -> None:
    batch = make_batch((4, 3, 5), weighted=True, mask="weights", device=DEVICE)
    options: dict[str, Any] = dict(zip(NAMES, batch, strict=True))
    options["model_pred"] = batch.model_pred.detach().requires_grad_(requires_grad)
    if name == "ref_error":
        options |= {"ref_pred": None, "ref_error": batch.ratio_scale}
    pair_loss(**options, **OPTIONS, backend=backend)
    with forward_ad.dual_level():
        pair_loss(**options, **OPTIONS, backend=backend)  # nothing here has a tangent
        options[name] = forward_ad.make_dual(options[name].detach(), torch.ones_like(options[name]))
        with pytest.raises(NotImplementedError, match=f"{name} has a tangent, .*forward-mode AD"):
            pair_loss(**options, **OPTIONS, backend=backend)


def test_an_upstream_gradient_with_a_tangent_says_so(backend: str) -> None:
    batch = make_batch((4, 3, 5), device=DEVICE)
    out = pair_loss(*batch[:3], ratio_scale=batch.ratio_scale, **OPTIONS, backend=backend)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones((), device=DEVICE), torch.ones((), device=DEVICE))
        with pytest.raises(NotImplementedError, match=r"upstream has a tangent, .*forward-mode AD"):
            torch.autograd.grad(out.loss, batch.model_pred, upstream)


# ---- Finite: one rule, in the type that results are reported in ------------------------------------------------------


@pytest.mark.parametrize("where", ["model_pred", "ref_pred"])
@pytest.mark.parametrize(("dtype", "finite"), [(F32, False), (BF16, False), (F64, True)])
def test_an_error_beyond_float32_is_not_finite(backend: str, where: str, dtype: torch.dtype, finite: bool) -> None:
    """1e25 squared is a number in the sums' float64 and none in the results' float32."""
    batch = make_batch((6, 3, 7), (dtype,) * 3, device=DEVICE)
    with torch.no_grad():
        getattr(batch, where)[1, 2, 3] = 1e25  # pair 1
    if where == "ref_pred":
        options = OPTIONS | {"ratio": "posterior"}
    else:
        options = OPTIONS
    totals = Totals(torch.zeros(2, len(METRICS), device=DEVICE))
    out, grad = run(batch, backend, nonfinite="skip", totals=totals, **options)
    metrics, index = out.metrics(), METRICS.index("nonfinite_pairs")
    assert metrics["nonfinite_pairs"] == totals.metrics[0, index] == (0 if finite else 1)
    assert out.finite_pairs().tolist() == out.mask.tolist() == [True, finite, True]
    truth = run_reference(batch, nonfinite="skip", **options)
    assert truth.finite.tolist() == [True, finite, True]
    torch.testing.assert_close(out.loss.double(), truth.loss.double(), rtol=1e-5, atol=0)
    if not finite:
        assert math.isfinite(out.loss.item()) and math.isfinite(metrics["model_mse"])
        assert not grad[[1, 4]].any() and bool(grad[[0, 2]].isfinite().all())
        with pytest.raises(FloatingPointError, match=r"pairs \[1\] of 3"):
            run(batch, backend, nonfinite="raise", **options)
        with pytest.raises(FloatingPointError, match="pairs 1 of 3"):
            run_reference(batch, nonfinite="raise", **options)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_squared_logit_beyond_float32_is_not_finite(backend: str, dtype: torch.dtype) -> None:
    """The loss type "ipo" squares its logit: one of 1e25 is finite, and its loss is not."""
    finite = dtype == F64
    batch = make_batch((6, 3, 7), (dtype,) * 3, device=DEVICE)
    with torch.no_grad():
        batch.model_pred[1, 2, 3] = 1e13
    options = {"method": "diffusion_dpo", "beta": 3.0, "loss_type": "ipo"}
    out, grad = run(batch, backend, nonfinite="skip", **options)
    truth = run_reference(batch, nonfinite="skip", **options)
    assert math.isfinite(out.logits[1].item())
    assert out.finite_pairs().tolist() == out.mask.tolist() == truth.finite.tolist() == [True, finite, True]
    assert out.metrics()["nonfinite_pairs"] == (0 if finite else 1)
    assert math.isfinite(out.loss.item())
    torch.testing.assert_close(out.loss.double(), truth.loss.double(), rtol=1e-5, atol=0)
    assert bool(grad[[1, 4]].any()) == finite
    sigmoid, _ = run(batch, backend, nonfinite="skip", **options | {"loss_type": "sigmoid"})
    assert sigmoid.finite_pairs().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_no_number_is_not_finite(backend: str, method: str) -> None:
    """Whether the weight is in the logit (sipo, sdpo), in front of the loss (dpo_cm), or only reported."""
    batch = make_batch((6, 3, 7), device=DEVICE)
    batch.ratio_scale[4] = math.nan  # the rejected sample of pair 1
    options = {"method": method, "beta": 3.0, "mask_threshold": 0.0}
    out, grad = run(batch, backend, nonfinite="skip", **options)
    truth = run_reference(batch, nonfinite="skip", **options)
    assert out.finite_pairs().tolist() == out.mask.tolist() == truth.finite.tolist() == [True, False, True]
    torch.testing.assert_close(out.loss.double(), truth.loss.double(), rtol=1e-5, atol=0)
    assert math.isfinite(out.loss.item()) and not grad[[1, 4]].any()
    metrics = out.metrics()
    assert metrics["nonfinite_pairs"] == 1 and math.isfinite(metrics["weight_mean"])
    with pytest.raises(FloatingPointError, match=r"pairs \[1\] of 3"):
        run(batch, backend, nonfinite="raise", **options)


# ---- Compiled, with settings and shapes that are symbols -------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_whole_while_shapes_and_beta_change(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    loss_fn = SIPOLoss(NoiseSchedule.discrete(), beta=300.0, mask_threshold=0.0, label_smoothing=0.1)

    def step(model: torch.Tensor, ref: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> Any:
        out = loss_fn(model, ref, target, timesteps)
        return out.loss, out.metrics()["rewards/accuracies"]

    # What is traced is in question here, and not the code that is made of it.
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for pairs, beta, smoothing in ((2, 300.0, 0.1), (3, 300.0, 0.1), (3, 17.5, 0.1), (5, 4000.0, 0.2)):
        loss_fn.options = dataclasses.replace(loss_fn.options, beta=beta, label_smoothing=smoothing)
        batch = make_batch((2 * pairs, 4, 3, 5), distance=0.01, seed=pairs, device=DEVICE)
        timesteps = torch.arange(100, 100 + pairs, device=DEVICE) * 7
        loss, accuracy = step(*batch[:3], timesteps)
        (grad,) = torch.autograd.grad(loss, batch.model_pred)
        c_loss, c_accuracy = compiled(*batch[:3], timesteps)
        (c_grad,) = torch.autograd.grad(c_loss, batch.model_pred)
        torch.testing.assert_close((c_loss, c_accuracy, c_grad), (loss, accuracy, grad), rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(emulation.compiler() is None, reason="needs a C++ compiler to build the stand-in for CUDA")
def test_the_look_at_the_driver_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing the backend asks the library by ctypes, which Dynamo cannot follow: on a GPU no whole graph came out."""
    torch._dynamo.reset()
    cuda._problem.cache_clear()
    monkeypatch.setattr(cuda, "LIBRARY", cuda._load(emulation.library()).library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    @torch.compile(fullgraph=True, backend="eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        found = backends.status("cuda", "cuda")
        return x * (2.0 if found.available else 3.0)

    assert step(torch.ones(2)).tolist() == [2.0, 2.0]


def test_a_wrong_beta_is_refused_while_compiling() -> None:
    torch._dynamo.reset()
    batch = make_batch((4, 3), device=DEVICE)
    beta = 3.0

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(model: torch.Tensor, ref: torch.Tensor, target: torch.Tensor, beta: float) -> torch.Tensor:
        return pair_loss(model, ref, target, method="diffusion_dpo", beta=beta).loss

    wanted = reference.pair_loss(*batch[:3], method="diffusion_dpo", beta=beta).loss
    torch.testing.assert_close(step(*batch[:3], beta).double(), wanted, rtol=1e-6, atol=0)
    for wrong in (-1.0, math.inf, math.nan, 0.0):
        with pytest.raises(Exception, match="expected a finite number > 0"):
            step(*batch[:3], wrong)
