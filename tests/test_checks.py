"""Every input error: its type, its one line, the value it names and what it expected."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from sipo_kernels import backends, pair_loss
from sipo_kernels.backends import native
from sipo_kernels.backends.cuda import launch as cuda


def _call(**changes: Any) -> Any:
    """A correct call with some arguments changed."""
    arguments: dict[str, Any] = {
        "model_pred": torch.ones(4, 3),
        "ref_pred": torch.zeros(4, 3),
        "target": torch.zeros(4, 3),
        "method": "sipo",
        "beta": 2.0,
        "ratio_scale": torch.zeros(4),
        **changes,
    }
    return pair_loss(**arguments)


def test_the_correct_call_works() -> None:
    assert _call().loss.item() == pytest.approx(math.log(2))


NUMBERS = [
    ({"beta": 0}, ValueError, "beta=0: expected a finite number > 0"),
    ({"beta": -1.5}, ValueError, "beta=-1.5: expected a finite number > 0"),
    ({"beta": math.nan}, ValueError, "beta=nan: expected a finite number > 0"),
    ({"beta": math.inf}, ValueError, "beta=inf: expected a finite number > 0"),
    ({"beta": "5000"}, TypeError, "beta='5000' is a str: expected a finite number > 0"),
    ({"beta": torch.tensor(1.0)}, TypeError, "is a Tensor: expected a finite number > 0"),
    ({"beta": True}, TypeError, "beta=True is a bool: expected a finite number > 0"),
    ({"beta": [1.0]}, TypeError, "beta=[1.0] is a list: expected a finite number > 0"),
    ({"method": ["sipo"]}, ValueError, "method=['sipo']: expected one of"),
    ({"clip_low": 1.5}, ValueError, "clip_low=1.5: expected 0 <= clip_low <= 1"),
    ({"clip_low": -0.1}, ValueError, "clip_low=-0.1: expected 0 <= clip_low <= 1"),
    ({"clip_low": math.nan}, ValueError, "clip_low=nan: expected 0 <= clip_low <= 1"),
    ({"clip_high": -1}, ValueError, "clip_high=-1: expected clip_high >= 0"),
    ({"clip_high": math.inf}, ValueError, "clip_high=inf: expected clip_high >= 0"),
    ({"mask_threshold": 1.2}, ValueError, "mask_threshold=1.2: expected 0 <= mask_threshold <= 1"),
    ({"mask_threshold": -1}, ValueError, "mask_threshold=-1: expected 0 <= mask_threshold <= 1"),
    ({"method": "dpo"}, ValueError, "method='dpo': expected one of diffusion_dpo, dpo_cm, sipo, sdpo"),
    ({"ratio": "prior"}, ValueError, "ratio='prior': expected one of posterior, reference"),
    ({"reduction": "avg"}, ValueError, "reduction='avg': expected one of mean, sum, none"),
    ({"nonfinite": "drop"}, ValueError, "nonfinite='drop': expected one of propagate, skip, raise"),
    ({"backend": "tpu"}, ValueError, "backend='tpu': expected one of auto, eager, triton, native, cuda"),
]
TENSORS = [
    ({"model_pred": [1.0]}, TypeError, "model_pred is a list: expected a torch.Tensor"),
    ({"target": np.zeros((4, 3))}, TypeError, "target is a ndarray: expected a torch.Tensor"),
    ({"model_pred": torch.ones(4, 3).int()}, TypeError, "model_pred has dtype torch.int32: expected float32, bfloat16"),
    ({"target": torch.ones(4, 3, dtype=torch.complex64)}, TypeError, "target has dtype torch.complex64: expected"),
    ({"ref_pred": torch.ones(4, 3).to_sparse()}, TypeError, "ref_pred has layout torch.sparse_coo: expected a dense"),
    ({"target": torch.nested.nested_tensor([torch.ones(3)] * 4)}, TypeError, "target has layout nested: expected"),
    ({"model_pred": torch.ones(3, 3)}, ValueError, "model_pred has first dimension 3: expected an even number"),
    ({"model_pred": torch.ones(0, 3)}, ValueError, "model_pred has shape [0, 3]: expected a batch"),
    ({"model_pred": torch.ones(4, 0)}, ValueError, "model_pred has shape [4, 0]: expected a batch"),
    ({"model_pred": torch.tensor(1.0)}, ValueError, "model_pred has shape []: expected a batch"),
    ({"ref_pred": torch.ones(4, 2)}, ValueError, "ref_pred has shape [4, 2]: expected [4, 3], that of model_pred"),
    ({"target": torch.ones(3, 3)}, ValueError, "target has shape [3, 3]: expected [4, 3], or [2, 3] shared by each"),
    ({"ref_pred": torch.ones(4, 3, device="meta")}, ValueError, "ref_pred is on meta: expected cpu"),
    ({"target": torch.ones(4, 3, device="meta")}, ValueError, "target is on meta: expected cpu"),
    ({"ratio_scale": torch.ones(4, device="meta")}, ValueError, "ratio_scale is on meta: expected cpu"),
    ({"ratio_scale": None}, ValueError, "ratio_scale=None: method 'sipo' needs ratio_scale[4]"),
    ({"ratio_scale": torch.zeros(2)}, ValueError, "ratio_scale has shape [2]: expected [4], a number for each sample"),
    ({"ratio_scale": torch.zeros(4, dtype=torch.int32)}, TypeError, "ratio_scale has dtype torch.int32"),
    ({"error_weight": torch.zeros(4, 1)}, ValueError, "error_weight has shape [4, 1]: expected [4]"),
    ({"ref_pred": None}, ValueError, "neither of ref_pred and ref_error given: expected exactly one"),
    ({"ref_error": torch.zeros(4)}, ValueError, "both of ref_pred and ref_error given: expected exactly one"),
    ({"ref_pred": None, "ref_error": torch.zeros(3)}, ValueError, "ref_error has shape [3]: expected [4]"),
    ({"target": torch.zeros(4, 3, requires_grad=True)}, ValueError, "target requires grad, but gradients flow to"),
    ({"ref_pred": torch.zeros(4, 3, requires_grad=True)}, ValueError, "ref_pred requires grad, but gradients flow to"),
    ({"ratio_scale": torch.zeros(4, requires_grad=True)}, ValueError, "ratio_scale requires grad"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), NUMBERS + TENSORS, ids=lambda x: str(x)[:40])
def test_errors(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        _call(**changes)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


def test_settings_that_compare_equal_are_told_apart() -> None:
    """Settings once checked are remembered, and True == 1.0."""
    assert _call(beta=1.0).loss.item() == _call(beta=1).loss.item()
    with pytest.raises(TypeError, match="beta=True is a bool"):
        _call(beta=True)


def test_no_backend_runs_before_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "module", Mock(side_effect=AssertionError("a backend was asked for")))
    for changes, kind, message in NUMBERS + TENSORS:
        with pytest.raises(kind) as caught:
            _call(**changes)
        assert message in str(caught.value)
    with pytest.raises(AssertionError, match="was asked for"):  # so the patch is in the way of a correct call
        _call()


def test_diffusion_dpo_does_without_a_scale() -> None:
    out = _call(method="diffusion_dpo", ratio_scale=None)
    assert out.log_ratio.tolist() == [0.0] * 4 and out.weight.tolist() == [1.0] * 4


def test_gradients_may_be_required_where_none_are_made() -> None:
    with torch.no_grad():
        out = _call(target=torch.zeros(4, 3, requires_grad=True))
    assert out.loss.item() == pytest.approx(math.log(2))


def test_raise_cannot_be_compiled() -> None:
    with pytest.raises(Exception, match="nonfinite='raise' reads the loss on the host"):
        torch.compile(lambda m: _call(model_pred=m, nonfinite="raise").loss, fullgraph=True)(torch.ones(4, 3))


# ---- Backends --------------------------------------------------------------------------------------------------------


def test_environment_names_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    module = backends.module
    monkeypatch.setattr(backends, "module", lambda name: used.append(name) or module(name))
    monkeypatch.setenv("SIPO_BACKEND", "eager")
    _call()
    _call(backend="auto")
    assert used == ["eager", "eager"]
    monkeypatch.setenv("SIPO_BACKEND", "fast")
    with pytest.raises(ValueError, match="SIPO_BACKEND='fast': expected one of auto, eager, triton, native"):
        _call()


def test_auto_falls_back_and_a_named_backend_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIPO_BACKEND", raising=False)
    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(native, "REASON", "there is no native library: no compiler")
    assert backends.choose("auto", torch.device("cpu")) == "eager"
    with pytest.raises(RuntimeError, match=r"backend='native' cannot run: there is no native library: no compiler \("):
        _call(backend="native")


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: the tensors are on the CPU"):
        _call(backend="triton")
    monkeypatch.setattr(cuda, "LIBRARY", None)
    assert backends.choose("auto", torch.device("cuda")) == "triton"
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert backends.choose("auto", torch.device("cuda")) == "eager"
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        _call(backend="triton")


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch built without CUDA")
def test_cuda_without_cuda_in_torch() -> None:
    with pytest.raises(
        RuntimeError, match="backend='cuda' cannot run: it needs an NVIDIA GPU and this torch was built"
    ):
        backends.choose("cuda", torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run: .* the tensors are on the CPU"):
        _call(backend="cuda")


def test_native_only_runs_on_a_cpu() -> None:
    status = backends.status("native", "cuda")
    assert not status.available and "cuda" in status.reason
    with pytest.raises(RuntimeError, match="backend='native' cannot run: it is CPU code"):
        backends.choose("native", torch.device("cuda"))
