"""The native library by itself: conversions of every 16-bit number, chunk seams, threads, streaming, loading."""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sipo_kernels import backends, build_info, pair_loss
from sipo_kernels.backends import library, native
from sipo_kernels.build_info import sources_digest
from sipo_kernels.testing import make_batch, run

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason=f"needs the native library: {native.REASON}")


REBUILD = "rebuild: make setup"
LIBRARY = "_native.dylib" if sys.platform == "darwin" else "_native.so"
SIPO: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0}


@pytest.fixture(params=native.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "ISA", request.param)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_right(isa: str, dtype: torch.dtype) -> None:
    """gradient = 1 · (m − 0) in float64: the widened value itself."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(2, -1)
    zeros = torch.zeros(2, 32768, dtype=torch.float32)
    got = native.gradient(zeros, numbers, torch.full((2,), -1.0), torch.tensor(1.0))
    torch.testing.assert_close(got, numbers.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [1 << 16, 37])
def test_rounding_to_16_bits_is_torchs(isa: str, dtype: torch.dtype, elements: int) -> None:
    """Random bit patterns, halfway cases and subnormals: coef · 1 rounds as torch's own conversion does."""
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (200,), generator=g).to(torch.int32).view(torch.float32)
    halfway = [1 + 2**-8, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-12, 65519.996, 65520.0]
    small = [2.0**-24, 2.0**-25, 1.5 * 2**-25, 2.9802322e-08, 3e-8, 6.1e-5, 1e-40]
    for coef in [*patterns.tolist(), *halfway, *small, 3.4e38]:
        if coef != coef or coef == 0:
            continue
        ones = torch.ones(2, elements, dtype=dtype)
        got = native.gradient(ones, torch.zeros_like(ones), torch.full((2,), coef), torch.tensor(1.0))
        assert torch.equal(got, torch.full((2, elements), coef, dtype=torch.float32).to(dtype)), coef


@pytest.mark.parametrize("elements", [1, 7, 8191, 8192, 8193, 3 * 8192 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_seams(isa: str, elements: int, dtype: torch.dtype) -> None:
    """Each element counts once: with m = 1 at one place, the error is 1/D wherever the place is; with a mask 1/Σw."""
    for place in {0, elements // 2, elements - 1, min(8191, elements - 1), min(8192, elements - 1)}:
        model = torch.zeros(2, elements, dtype=dtype)
        model[1, place] = 1
        model.requires_grad_()
        zeros = torch.zeros(2, elements, dtype=dtype)
        batch = make_batch((2, elements))._replace(model_pred=model, ref_pred=zeros, target=zeros)
        out, grad = run(batch, "native", method="diffusion_dpo", beta=1.0)
        assert out.model_error.tolist() == [0.0, pytest.approx(1 / elements)]
        assert out.error_gap.tolist() == [0.0, pytest.approx(1 / elements)]
        assert grad.nonzero().tolist() == [[1, place]]
        mask = torch.zeros(2, elements, dtype=torch.bool)
        mask[:, [place, 0, elements // 3]] = True
        out, grad = run(batch._replace(error_mask=mask), "native", method="diffusion_dpo", beta=1.0)
        assert out.model_error.tolist() == [0.0, pytest.approx(1 / int(mask[1].sum()))]
        assert grad.nonzero().tolist() == [[1, place]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, "bool"])
def test_large_gradients_stream_past_the_cache(
    dtype: torch.dtype, mask: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 8 MiB on the stores are non-temporal: heads and tails of misaligned samples must still be written."""
    batch = make_batch((4, 7, 613, 499 if dtype == torch.bfloat16 else 257), (dtype,) * 3, mask=mask)
    assert batch.model_pred.numel() * batch.model_pred.element_size() > 8 << 20
    _, eager = run(batch, "eager", method="diffusion_dpo", beta=100.0)
    for isa in native.instruction_sets():
        monkeypatch.setattr(native, "ISA", isa)
        _, grad = run(batch, "native", method="diffusion_dpo", beta=100.0)
        torch.testing.assert_close(grad, eager, rtol=2e-6, atol=0, msg=lambda m, isa=isa: f"{isa}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_each_sample_in_any_type_and_stride(dtype: torch.dtype) -> None:
    batch = make_batch((6, 5, 13), weighted=True)
    scale, weight = batch.ratio_scale.to(dtype), batch.error_weight.to(dtype)
    wide, wide_grad = run(batch._replace(ratio_scale=scale.double(), error_weight=weight.double()), "native", **SIPO)
    spread = torch.stack([weight, weight], dim=1)[:, 0]
    out, grad = run(batch._replace(ratio_scale=scale, error_weight=spread), "native", **SIPO)
    assert torch.equal(out.logits, wide.logits) and torch.equal(grad, wide_grad)
    one = pair_loss(*batch[:2], batch.target, ratio_scale=scale[:1].expand(6), backend="native", **SIPO)
    each = pair_loss(*batch[:2], batch.target, ratio_scale=scale[:1].double().repeat(6), backend="native", **SIPO)
    assert torch.equal(one.logits, each.logits)
    given = out.ref_error.detach().to(dtype)
    options = {**SIPO, "ratio_scale": scale, "ref_error": given}
    short = pair_loss(batch.model_pred, None, batch.target, backend="native", **options)
    assert torch.equal(short.ref_error, given.float())


def test_whose_threads_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch((6, 5, 101, 307), (torch.bfloat16, torch.bfloat16, torch.float32), mask="shared bool")
    threads = torch.get_num_threads()
    out, grad = run(batch, "native", method="sipo", beta=3.0)
    try:
        for own, count in itertools.product((False, True), (1, 2, 5)):
            monkeypatch.setattr(native, "OWN_THREADS", own)
            torch.set_num_threads(count)
            again, grad_again = run(batch, "native", method="sipo", beta=3.0)
            assert torch.equal(again.logits, out.logits) and torch.equal(grad_again, grad)
    finally:
        torch.set_num_threads(threads)


def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch((6, 5, 4001), (torch.bfloat16,) * 3)
    results = []
    for name in native.instruction_sets():
        monkeypatch.setattr(native, "ISA", name)
        results.append(run(batch, "native", method="sipo", beta=3.0))
    for out, grad in results[1:]:
        torch.testing.assert_close(out.logits, results[0][0].logits, rtol=1e-6, atol=1e-6)
        assert (grad.float() - results[0][1].float()).norm() <= 2**-9 * grad.float().norm()


def test_an_instruction_set_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ISA", "avx1024")
    with pytest.raises(RuntimeError, match=r"instruction set 'avx1024' does not run here: expected one of .*portable"):
        run(make_batch((2, 3)), "native", method="diffusion_dpo", beta=1.0)


def test_reasons_for_having_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that was never built has no remedy of its own; one that cannot be used is to be built again."""
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    record = tmp_path / "_build_info.json"
    monkeypatch.setattr(build_info, "RECORD", record)
    assert native._load() == (None, "there is no native library: the package was not built", "")
    assert build_info.part("cpu")["remedy"] == "reinstall: pip install ."
    assert build_info.rebuild(library.ROOT) == REBUILD
    record.write_text(json.dumps({"parts": {"cpu": {"reason": "no C++ compiler found"}}}))
    assert native._load() == (None, "there is no native library: no C++ compiler found", "")
    record.write_text(json.dumps({"parts": {"cpu": {"built": True, "reason": None}}}))
    assert native._load() == (None, f"{LIBRARY} was built but does not exist", REBUILD)
    (tmp_path / LIBRARY).write_bytes(b"not a library")
    loaded, reason, remedy = native._load()
    assert loaded is None and reason.startswith(f"{LIBRARY} does not load: ") and remedy == REBUILD


def _with_fields(fields: list[Any]) -> type[ctypes.Structure]:
    return type("Changed", (ctypes.Structure,), {"_fields_": fields})


SETTINGS, ARGUMENTS = native.CSettings._fields_, native.CpuArgs._fields_


@pytest.mark.parametrize(
    ("name", "fields", "line"),
    [
        ("CpuArgs", [*ARGUMENTS, ("more", ctypes.c_int64)], "arguments"),
        ("CSettings", [SETTINGS[1], SETTINGS[0], *SETTINGS[2:]], "settings"),
        ("CSettings", [(SETTINGS[0][0], ctypes.c_int64), *SETTINGS[1:]], "settings"),  # of the same size
        ("CSettings", [*SETTINGS, ("in_the_padding", ctypes.c_int)], "settings"),
    ],
)
def test_a_library_with_other_fields_is_refused(
    name: str, fields: list[Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ctypes.sizeof(_with_fields([*SETTINGS, ("in_the_padding", ctypes.c_int)])) == ctypes.sizeof(native.CSettings)
    monkeypatch.setattr(native, name, _with_fields(fields))
    assert native._load() == (None, f"the native library has other {line} than this version", REBUILD)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("METHODS", "methods"),
        ("RATIOS", "ratios"),
        ("LOSS_TYPES", "loss types"),
        ("SAMPLE_ROWS", "sample rows"),
        ("METRICS", "metrics"),
        ("STATISTICS", "statistics"),
        ("ELEMENT_TYPES", "element types"),
    ],
)
def test_a_library_older_than_two_swapped_names_is_refused(
    name: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Structures of the same size: only the names tell."""
    *rest, first, second = getattr(library, name)
    monkeypatch.setattr(library, name, (*rest, second, first))
    assert native._load() == (None, f"the native library has other {line} than this version", REBUILD)


def test_a_refusal_names_all_that_differs() -> None:
    built, expected = "methods: a,\nloss types: b,\nmetrics: c,\n", "methods: b,\nloss types: b,\nmetrics: d,\n"
    assert library.difference(built, expected) == "the native library has other methods, metrics than this version"
    assert library.difference(built, "methods: a,\n") == "the native library has other contents than this version"
    assert library.difference(built, built) is None


def test_a_library_older_than_the_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.LIBRARY is not None
    assert native.LIBRARY.sipo_sources().decode() == sources_digest(library.ROOT)
    monkeypatch.setattr(library, "ROOT", tmp_path)
    (tmp_path / "csrc" / "emulation").mkdir(parents=True)
    assert native._load().library is not None  # a wheel has no sources
    assert library.refused("it differs").remedy == "reinstall: pip install ."
    source = tmp_path / "csrc" / "a.h"
    source.write_text("int x;")
    built_from = sources_digest(tmp_path)
    assert built_from is not None and library.stale(built_from) is None
    source.with_name("emulation").joinpath("b.h").write_text("int z;")  # which only tests compile
    assert library.stale(built_from) is None
    source.write_text("int y;")
    assert library.stale(built_from) is not None
    reason = "the native library was built from other sources than csrc/ has now"
    assert native._load() == (None, reason, REBUILD)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_WARNED", set())
    monkeypatch.delenv("SIPO_BACKEND", raising=False)
    for name, value in library.refused("the native library has other metrics than this version")._asdict().items():
        monkeypatch.setattr(native, name.upper(), value)


def test_status_of_a_refused_library_says_how_to_rebuild(refused: None) -> None:
    assert backends.status("native", "cpu") == backends.BackendStatus(
        "native", False, "the native library has other metrics than this version", REBUILD
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_auto_warns_once_of_a_refused_library(refused: None, compiled: bool) -> None:
    """In a graph that must be whole as well."""
    torch._dynamo.reset()
    batch = make_batch((4, 7))

    def call(model: torch.Tensor) -> torch.Tensor:
        return pair_loss(model, batch.ref_pred, batch.target, method="diffusion_dpo", beta=1.0).loss

    step = torch.compile(call, fullgraph=True, backend="eager") if compiled else call
    words = "the native backend is not used: the native library has other metrics than this version"
    with pytest.warns(backends.BackendWarning, match=re.escape(f"{words} ({REBUILD})")) as caught:
        step(batch.model_pred)
    assert compiled or caught[0].filename == __file__  # the caller's line, not one of ours
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch._dynamo.reset()
        step(batch.model_pred)


def test_auto_says_nothing_of_a_library_that_was_never_built(refused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "REMEDY", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert backends.choose("auto", torch.device("cpu")) == "eager"
