"""csrc/cuda on the CPU emulator: each element once, the same bits in every order of blocks, nothing touched in vain."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from sipo_kernels import METHODS, METRICS, STATISTICS, Totals, pair_loss
from sipo_kernels.backends import eager, native
from sipo_kernels.backends import library as description
from sipo_kernels.backends.cuda import emulation
from sipo_kernels.backends.cuda import launch as cuda
from sipo_kernels.backends.cuda.plan import ANY, MIXED, VECTOR, CudaPlan, Gpu, make_plan
from sipo_kernels.backends.interface import Stats
from sipo_kernels.inputs import Inputs
from sipo_kernels.options import Settings
from sipo_kernels.output import COEF_ROW, add_totals
from sipo_kernels.testing import Batch, make_batch, run
from tests.conftest import emulate

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or emulation.compiler() is None,
    reason="the emulator runs where there is a C++ compiler and no GPU",
)

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
OPTIONS: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0}
SETTINGS = Settings(beta=3.0, mask_threshold=0.0)
KEEP, STREAM, NORMAL = range(3)  # kinds of policies in emulate.h


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    emulate(monkeypatch)
    library = emulation.library()
    library.sipo_emulate_configure(0, 3, 0.0)
    return library


def launches(library: ctypes.CDLL) -> int:
    """Kernels since the last call."""
    counts = (ctypes.c_uint64 * 4)()
    library.sipo_emulate_statistics(counts)
    return int(counts[0])


class Case(NamedTuple):
    """Tensors to be read in one way: how, their shape and types, and the bytes of an access to each type's elements."""

    reader: int
    shape: tuple[int, int]
    types: tuple[torch.dtype, torch.dtype, torch.dtype]

    def batch(self, shared_target: bool = False) -> Batch:
        return make_batch(self.shape, self.types, shared_target=shared_target)

    def width(self, tensor: Tensor) -> int:
        """Bytes of one access to its elements: as many of them as 16 bytes hold of the widest."""
        if self.reader == ANY:
            return tensor.element_size()
        step = 4 if self.reader == MIXED else 16 // self.types[2].itemsize
        return min(16, step * tensor.element_size())


# Samples of SMALL_SAMPLE elements or more are summed in float32, if of half precision; others in float64.
CASES = {
    "bf16, several groups": Case(VECTOR, (6, 70_000), (BF16, BF16, BF16)),
    "bf16 beside fp32, several groups": Case(VECTOR, (6, 70_004), (BF16, BF16, F32)),
    "fp16 beside fp32, several groups": Case(VECTOR, (4, 67_588), (F16, F16, F32)),
    "small bf16": Case(VECTOR, (10, 9_000), (BF16, BF16, BF16)),
    "small fp16 beside fp32, several groups": Case(VECTOR, (8, 25_604), (F16, F16, F32)),
    "fp32, several groups": Case(VECTOR, (10, 16_384), (F32, F32, F32)),
    "fp64": Case(VECTOR, (4, 6_002), (F64, F64, F64)),
    "mixed": Case(MIXED, (8, 9_000), (BF16, F32, F16)),
    "odd": Case(ANY, (8, 5_003), (BF16, F32, F16)),
    "many small pairs": Case(VECTOR, (60, 64), (BF16, BF16, F32)),
    "blocks with nothing to do in the last group": Case(ANY, (6, 1_023), (F32, F32, F32)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
shared_or_not = pytest.mark.parametrize("shared", [False, True], ids=["own target", "shared target"])


def plan_of(batch: Batch) -> CudaPlan:
    model, ref, target = batch[:3]
    assert cuda.EMULATED is not None
    return make_plan(cuda.EMULATED, cuda._call(model, ref, target, torch.empty_like(model)))


def running_sums(pairs: int, bins: int = 5) -> Totals:
    timesteps = torch.arange(pairs) * 7 % 11
    return Totals(torch.zeros(2, len(METRICS)), torch.zeros(len(STATISTICS), bins), timesteps, 11.0)


# ---- The schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safeguard", [None, 0.5])
@pytest.mark.parametrize("label", CASES)
def test_same_bits_in_every_order(label: str, safeguard: float | None, emulated: ctypes.CDLL) -> None:
    """Gradient, every number, and what is added to running sums."""
    case = CASES[label]
    batch = case.batch()
    plan, pairs = plan_of(batch), case.shape[0] // 2
    assert cuda._call(*batch[:3], None).reader == case.reader
    assert ("several groups" in label) <= (plan.groups > 1 and plan.lead == 1)
    first: list[Tensor] = []
    for seed in range(12):
        emulated.sipo_emulate_configure(seed, 3, 0.2 * (seed % 3))
        sums = running_sums(pairs)
        out, grad = run(batch, "cuda", **OPTIONS, safeguard=safeguard, totals=sums)
        assert out.numbers is not None and sums.metrics is not None and sums.levels is not None
        found = [out.coef, out.logits, out.error_gap, out.model_error, grad, out.numbers, sums.metrics, sums.levels]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), seed
    assert torch.equal(out.loss.detach(), first[5][0])


@pytest.mark.parametrize("sms", [1, 3])
def test_same_bits_in_every_order_without_gradient(
    sms: int, emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits then: blocks run ahead of each other, those with nothing to do by a whole group."""
    emulate(monkeypatch, emulation.SMALL._replace(sms=sms, l2_bytes=1))
    batch = make_batch((6, 1_023 if sms == 3 else 255), (F32,) * 3)
    plan = plan_of(batch)
    assert plan.groups == 2 and plan.blocks == 2 * sms > len(plan.runs(1))
    found = set()
    with torch.no_grad():
        for seed in range(60):
            emulated.sipo_emulate_configure(seed, 2 * sms, 0.3)
            out = pair_loss(*batch[:3], ratio_scale=batch.ratio_scale, backend="cuda", **OPTIONS)
            assert out.numbers is not None
            found.add((out.loss.item(), *out.numbers.tolist()))
    assert len(found) == 1


@pytest.mark.parametrize("shape", [(80, 1_280), (14, 7_000)], ids=["whole pairs", "runs that begin within a pair"])
def test_pair_after_pair_in_one_block(
    shape: tuple[int, int], emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block's sums of one pair are read while some of its warps are already at the next."""
    emulate(monkeypatch, emulation.SMALL._replace(l2_bytes=8 << 20))
    batch = make_batch(shape, (BF16,) * 3)
    plan = plan_of(batch)
    assert plan.groups == 1 and plan.blocks == 6 and plan.tiles == (1 if shape[0] == 80 else 3)
    truth = run(batch, "eager", **OPTIONS)[0].logits
    for seed in range(20):
        emulated.sipo_emulate_configure(seed, 6, 0.0)
        torch.testing.assert_close(run(batch, "cuda", **OPTIONS)[0].logits, truth, rtol=1e-5, atol=1e-6)


# ---- Accesses --------------------------------------------------------------------------------------------------------


class Watch:
    """Counts of loads and stores of one tensor, by accesses of so many bytes, filled while the emulator runs."""

    def __init__(self, library: ctypes.CDLL, slot: int, tensor: Tensor, width: int) -> None:
        self.tensor, self.width = tensor, width
        count = tensor.numel() * tensor.element_size() // width
        self.loads, self.stores = np.zeros(count, np.uint32), np.zeros(count, np.uint32)
        self.kinds = [np.zeros(count, np.uint32) for _ in range(3)]
        library.sipo_emulate_watch(
            slot, tensor.data_ptr(), count * width, width, self.loads.ctypes.data, self.stores.ctypes.data
        )
        for kind, counts in enumerate(self.kinds):
            library.sipo_emulate_watch_kind(slot, kind, counts.ctypes.data)

    def by_element(self, counts: np.ndarray) -> np.ndarray:
        """``counts`` in the tensor's shape."""
        return np.repeat(counts, self.width // self.tensor.element_size()).reshape(self.tensor.shape)


@pytest.fixture()
def watched(emulated: ctypes.CDLL) -> Iterator[Any]:
    def start(case: Case, *tensors: Tensor) -> list[Watch]:
        return [Watch(emulated, slot, tensor, case.width(tensor)) for slot, tensor in enumerate(tensors)]

    yield start
    for slot in range(8):
        emulated.sipo_emulate_watch(slot, None, 0, 1, None, None)


def watch_forward(watched: Any, case: Case, batch: Batch, with_grad: bool, **options: Any) -> tuple[list[Watch], Stats]:
    """Counts for policy, reference, target and gradient of one call of the backend."""
    counts: list[list[Watch]] = []
    original = cuda.dense_like

    def catch(model: Tensor, grad: Tensor) -> Tensor:
        filled = original(model, grad)
        counts.append(watched(case, *batch[:3], filled))
        return filled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "dense_like", catch)
        if not with_grad:
            counts.append(watched(case, *batch[:3]))
        inputs = Inputs(batch.model_pred.detach(), *batch[1:4])
        stats = cuda.forward(inputs, dataclasses.replace(SETTINGS, **options), with_grad=with_grad)
    return counts[0], stats


@shared_or_not
@pytest.mark.parametrize("safeguard", [None, 0.5])
@cases
def test_every_element_once(case: Case, safeguard: float | None, shared: bool, watched: Any) -> None:
    """Read once from memory, once again from the cache unless shared memory holds d; the gradient written once.

    Each time by one access of the full width. The inner product of chosen and rejected sample is made of what is there
    already.
    """
    batch = case.batch(shared)
    (model, ref, target, grad), _ = watch_forward(watched, case, batch, True, safeguard=safeguard)
    assert (ref.loads == 1).all() and (grad.stores == 1).all() and (grad.loads == 0).all()
    assert not any(w.stores.any() for w in (model, ref, target))
    held = _held(plan_of(batch), case.shape)
    np.testing.assert_array_equal(model.by_element(model.loads), np.where(held, 1, 2))
    # A shared target is read for both samples, and again unless the rejected sample's d is held: then the chosen
    # sample's is too.
    target_held = held[case.shape[0] // 2 :] if shared else held
    np.testing.assert_array_equal(target.by_element(target.loads), np.where(target_held, 1, 2))
    if case.reader != ANY:
        # What will be read again is asked to stay, what will not is not; the second time is the last.
        for watch in (model, target):
            np.testing.assert_array_equal(watch.kinds[KEEP], watch.loads - 1)
            assert (watch.kinds[STREAM] == 1).all()
        assert (ref.kinds[STREAM] == 1).all()


@pytest.mark.parametrize("mask", ["bool", "shared bool", "weights", "shared weights"])
@pytest.mark.parametrize("case", [CASES["mixed"], CASES["odd"], Case(MIXED, (6, 25_604), (BF16, BF16, F32))])
def test_every_element_and_its_weight_twice(
    case: Case, mask: str, watched: Any, emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the sums and for the gradient, in one launch, with the bits that two make; a shared one for each sample."""
    batch = make_batch(case.shape, case.types, mask=mask)
    weights = batch.error_mask
    assert weights is not None
    inputs = Inputs(batch.model_pred.detach(), *batch[1:4], error_mask=weights)
    (seen,) = watched(case._replace(types=(F32, F32, F32)) if weights.dtype == F32 else case, weights)
    if weights.dtype == torch.bool and case.reader == MIXED:
        seen = Watch(emulated, 0, weights, 4)
    others = [Watch(emulated, 1 + i, t, case.width(t)) for i, t in enumerate(batch[:3])]
    launches(emulated)
    together = cuda.forward(inputs, SETTINGS, with_grad=True, expected=1 / 3)
    assert launches(emulated) == 1
    assert [np.unique(watch.loads).tolist() for watch in others] == [[2], [1], [2]]
    times = 2 if mask.startswith("shared") else 1
    assert (seen.loads == 2 * times).all() and not seen.stores.any()
    if case.reader == MIXED:
        assert (seen.kinds[KEEP] == times).all() and (seen.kinds[STREAM] == times).all()
    emulate(monkeypatch, emulation.SMALL._replace(cooperative=False))
    split = cuda.forward(inputs, SETTINGS, with_grad=True, expected=1 / 3)
    assert launches(emulated) == 2
    for got, want in zip(split, together, strict=True):
        assert got is not None and want is not None and torch.equal(got, want)


@pytest.mark.parametrize("elements", [1_280, 1_283])
def test_a_mask_in_every_order_fused_mended_and_alone(elements: int, emulated: ctypes.CDLL) -> None:
    """NaN where nothing counts; a gradient made again, or alone, or in another order of blocks, is the same."""
    batch = make_batch((6, elements), (BF16, BF16, F32), mask="weights")
    assert batch.error_mask is not None
    model = torch.where(batch.error_mask == 0, math.nan, batch.model_pred.detach())
    inputs = Inputs(model, *batch[1:4], error_mask=batch.error_mask)
    assert cuda._call(*inputs[:3], None, batch.error_mask).reader == (ANY if elements % 4 else MIXED)
    first: Stats | None = None
    for seed in range(6):
        emulated.sipo_emulate_configure(seed, 3, 0.2 * (seed % 3))
        stats = cuda.forward(inputs, SETTINGS, with_grad=True)
        first = first or stats
        assert all(torch.equal(a, b) for a, b in zip(stats[:5], first[:5], strict=True)), seed
    assert first is not None and bool(first.loss.isfinite()) and first.numbers is not None
    assert torch.equal(first.grad != 0, batch.error_mask != 0)
    args = (model, batch.target, first.samples[COEF_ROW], torch.tensor(1 / 3))
    alone = cuda.gradient(*args, error_mask=batch.error_mask)
    assert torch.equal(alone, eager.gradient(*args, error_mask=batch.error_mask))
    assert torch.equal(cuda.mend(first.grad, *args, first.numbers, error_mask=batch.error_mask), alone)


def _held(plan: CudaPlan, shape: tuple[int, ...]) -> np.ndarray:
    """Of which elements shared memory holds d, from the plan alone."""
    pairs, elements = shape[0] // 2, int(np.prod(shape[1:]))
    held = np.zeros((shape[0], elements), bool)
    for first in range(0, pairs, plan.group):
        for run_ in plan.runs(min(plan.group, pairs - first)):
            for u in run_:
                for side in range(2):
                    if 0 <= 2 * (u - plan.held_from(run_)) + side < plan.hold:
                        row = first + u // plan.tiles + side * pairs
                        begin = u % plan.tiles * plan.tile
                        held[row, begin : begin + plan.tile] = True
    return held.reshape(shape)


def test_shared_memory_holds_a_part_of_some_cases() -> None:
    """An odd number of sample tiles among them: the chosen sample's without the rejected sample's."""
    for label, hold in (("bf16", 3), ("bf16 beside fp32", 3), ("small fp16 beside fp32", 2), ("fp32", 4)):
        case = CASES[f"{label}, several groups"]
        plan = plan_of(case.batch())
        assert plan.hold == hold and 0 < _held(plan, case.shape).mean() < 1


@cases
def test_without_gradient_one_read_and_no_more(case: Case, watched: Any) -> None:
    counts, stats = watch_forward(watched, case, case.batch(), False)
    assert stats.grad.numel() == 0
    assert all((w.loads == 1).all() and not w.stores.any() and not w.kinds[KEEP].any() for w in counts)


@pytest.mark.parametrize("label", ["fp32, several groups", "bf16 beside fp32, several groups", "mixed", "odd"])
def test_a_masked_pair_is_not_read_again(label: str, watched: Any) -> None:
    case = CASES[label]
    batch = case.batch()
    batch.ratio_scale[:] = 0
    pairs = case.shape[0] // 2
    masked = [1, 1 + pairs]
    batch.ratio_scale[masked] = 1e3
    (model, _, target, grad), stats = watch_forward(watched, case, batch, True, mask_threshold=0.9)
    for watch in (model, target):
        assert (watch.by_element(watch.loads)[masked] == 1).all()
    assert (grad.stores == 1).all()
    assert (stats.grad[masked] == 0).all() and (stats.grad[[0, pairs]] != 0).any()


@shared_or_not
@cases
def test_in_two_launches_and_without_gradient_the_bits_are_the_same(
    case: Case, shared: bool, emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where blocks cannot be asked to be there together: then only one at a time is."""
    batch = case.batch(shared)
    inputs = Inputs(batch.model_pred.detach(), *batch[1:4])
    together = cuda.forward(inputs, SETTINGS, with_grad=True, expected=1 / 3)
    alone = cuda.forward(inputs, SETTINGS, expected=1 / 3)
    emulate(monkeypatch, emulation.SMALL._replace(cooperative=False))
    emulated.sipo_emulate_configure(1, 1, 0.0)
    launches(emulated)
    split = cuda.forward(inputs, SETTINGS, with_grad=True, expected=1 / 3)
    assert launches(emulated) == 2
    assert torch.equal(split.grad, together.grad) and alone.grad.numel() == 0
    for other in (split, alone):
        for got, want in zip([*other[:4], other.numbers], [*together[:4], together.numbers], strict=True):
            assert got is not None and want is not None and torch.equal(got, want)


# ---- The upstream gradient ------------------------------------------------------------------------------------------


def numbers_for(made_for: float, dtype: torch.dtype) -> Tensor:
    numbers = torch.zeros(len(METRICS) + 1, dtype=dtype)
    numbers[-1] = made_for
    return numbers


@shared_or_not
@cases
def test_what_was_expected_touches_nothing_and_what_was_not_is_made_once(
    case: Case, shared: bool, watched: Any, emulated: ctypes.CDLL
) -> None:
    """In one launch, whatever comes: every input read once, the gradient written once."""
    batch = case.batch(shared)
    model, pairs = batch.model_pred.detach(), case.shape[0] // 2
    stats = F64 if F64 in case.types else F32
    coef = torch.rand(case.shape[0], dtype=stats) + 1
    for made_for in (1.0, 0.125, 1 / 3):
        for shape in ((), (pairs,)):
            held = torch.full(shape, made_for, dtype=stats)
            for upstream in (held, held + 1, torch.full(shape, math.nan, dtype=stats)):
                fused = torch.full_like(model, 7.0)
                remembered = torch.tensor(5.0, dtype=F64)
                watches = watched(case, model, batch.target, fused)
                launches(emulated)
                args = (model, batch.target, coef, upstream)
                assert cuda.mend(fused, *args, numbers_for(made_for, stats), remembered) is fused
                assert launches(emulated) == 1
                if upstream is held:
                    assert not any(w.loads.any() or w.stores.any() for w in watches) and (fused == 7).all()
                else:
                    assert all((w.loads == 1).all() for w in watches[:2]) and (watches[2].stores == 1).all()
                    assert bits_equal(fused, cuda.gradient(*args))
                assert remembered.item() == (upstream.flatten()[0].item() if upstream.isfinite().all() else 5.0)


def test_upstream_per_pair_mends_only_what_differs(watched: Any) -> None:
    case = CASES["bf16 beside fp32, several groups"]
    batch = case.batch(shared_target=True)
    model, coef = batch.model_pred.detach(), torch.rand(6)
    upstream = torch.tensor([0.5, 2.0, 0.5])
    fused = torch.full_like(model, 7.0)
    remembered = torch.zeros((), dtype=F64)
    (w,) = watched(case, fused)
    cuda.mend(fused, model, batch.target, coef, upstream, numbers_for(0.5, F32), remembered)
    touched = w.by_element(w.stores).reshape(6, -1)
    assert (touched[[1, 4]] == 1).all() and (touched[[0, 2, 3, 5]] == 0).all()
    assert torch.equal(fused[[1, 4]], cuda.gradient(model, batch.target, coef, upstream)[[1, 4]])
    assert remembered.item() == 0.5  # the first pair's
    spread = torch.full((3, 2), 2.0)[:, 0]  # read where it lies
    cuda.mend(fused, model, batch.target, coef, spread, numbers_for(0.5, F32))
    assert torch.equal(fused, cuda.gradient(model, batch.target, coef, torch.tensor(2.0)))


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


UPSTREAMS = (1.0, 1 / 8, 1 / 3, 65536.0, 0.0, -2.0, math.inf, math.nan)
MIXES = [(F32,) * 3, (F64,) * 3, (BF16,) * 3, (F16,) * 3, (BF16, BF16, F32), (F16, F16, F32), (BF16, F32, F16)]
MIXES += [(BF16, F64, F32), (BF16, BF16, F64)]


@shared_or_not
@pytest.mark.parametrize("elements", [1_280, 1_283])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(t)[6:] for t in mix))
def test_same_bits_fused_mended_and_alone(mix: Any, elements: int, shared: bool) -> None:
    """For every upstream gradient, given as a number or read on the device, one for all or one a pair."""
    batch = make_batch((6, elements), mix, shared_target=shared)
    batch.ratio_scale[:] = 0.001
    batch.ratio_scale[[1, 4]] = 100.0  # masked
    model, target = batch.model_pred.detach(), batch.target
    inputs = Inputs(model, *batch[1:4])
    stats = F64 if F64 in mix else F32
    for reduction in ("mean", "none"):
        settings = dataclasses.replace(SETTINGS, mask_threshold=0.9, reduction=reduction)
        plain = cuda.forward(inputs, settings)
        coef = plain.samples[COEF_ROW]
        for value in UPSTREAMS:
            upstream = torch.full((3,) if reduction == "none" else (), value, dtype=stats)
            alone = cuda.gradient(model, target, coef, upstream)
            assert (alone[[1, 4]] == 0).all() and (alone[[0, 2, 3, 5]] != 0).any(1).all() == (value != 0)
            for expected in (value, torch.tensor(value, dtype=F64)):
                fused = cuda.forward(inputs, settings, with_grad=True, expected=expected)
                assert bits_equal(fused.grad, alone), value
                assert fused.numbers is not None and bits_equal(fused.numbers[-1], upstream.flatten()[0])
                assert torch.equal(fused.samples, plain.samples)
            other = cuda.forward(inputs, settings, with_grad=True, expected=-7.0)
            assert other.numbers is not None
            assert bits_equal(cuda.mend(other.grad, model, target, coef, upstream, other.numbers), alone), value


def test_the_gradient_does_not_depend_on_how_it_is_read() -> None:
    """Types and alignment choose a reader; the bits are those of the types of policy and target."""
    for mix in MIXES:
        batch = make_batch((4, 1_288), mix)
        model, target = batch.model_pred.detach(), batch.target
        coef = torch.rand(4, dtype=F64 if F64 in mix else F32)
        aligned = cuda.gradient(model, target, coef, torch.tensor(1 / 3, dtype=coef.dtype))
        shifted = torch.cat([model.new_zeros(1), model.flatten()])[1:].view(model.shape)
        assert cuda._call(shifted, None, target, None).reader == ANY != cuda._call(model, None, target, None).reader
        assert torch.equal(cuda.gradient(shifted, target, coef, torch.tensor(1 / 3, dtype=coef.dtype)), aligned)


@pytest.mark.parametrize("mix", [(BF16, BF16, F32), (F16, F16, F16), (BF16, F32, F16)], ids=["vector", "fp16", "mixed"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_is_the_gradient_and_little_else_whatever_comes(mix: Any, reduction: str, emulated: ctypes.CDLL) -> None:
    batch = make_batch((4, 5, 101, 104), mix)
    for value in (1.0, 3.0):
        upstream = torch.full((2,) if reduction == "none" else (), value)
        launches(emulated)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.profiler.profile(profile_memory=True) as profile:
                run(batch, "cuda", upstream, **OPTIONS, reduction=reduction, expected_upstream=1.0)
        assert launches(emulated) == 2
        allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
        gradient = batch.model_pred.numel() * 2
        assert gradient <= allocated <= gradient + 16_384


# ---- What a batch reports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("label", ["small fp16 beside fp32, several groups", "many small pairs", "fp64"])
def test_metrics_and_running_sums_are_those_of_the_fields(label: str, nonfinite: str) -> None:
    """Against output.py on the same output, with a pair that is not finite among the others; sums start anywhere."""
    case = CASES[label]
    pairs, elements = case.shape[0] // 2, case.shape[1]
    for method in METHODS:
        batch = case.batch()
        with torch.no_grad():
            batch.model_pred[pairs + 1, 3] = math.nan
        got = running_sums(pairs)
        assert got.metrics is not None and got.levels is not None
        got.metrics.fill_(0.5)
        got.levels.fill_(0.25)
        want = got._replace(metrics=got.metrics.clone(), levels=got.levels.clone())
        options: dict[str, Any] = {"method": method, "beta": 3.0, "mask_threshold": 0.98}
        out, _ = run(batch, "cuda", **options, nonfinite=nonfinite, totals=got)
        fields = dataclasses.replace(out, numbers=None)
        add_totals(want, fields, elements * pairs / 3.0)
        for name, value in fields.metrics().items():
            torch.testing.assert_close(out.metrics()[name], value, rtol=1e-5, atol=1e-8, equal_nan=True, msg=name)
        torch.testing.assert_close(got.metrics, want.metrics, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got.levels, want.levels, rtol=1e-5, atol=1e-6)
        assert want.levels is not None and got.levels[0].sum() - 0.25 * 5 == pairs - 1
        assert out.metrics()["nonfinite_pairs"].item() == got.levels[1].sum().item() - 0.25 * 5 == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, F32, F64, BF16, F16, torch.int16, torch.uint8])
def test_timesteps_are_read_where_they_lie(dtype: torch.dtype) -> None:
    """Of the usual types; what a call is given is not copied, but for types that nobody samples."""
    batch = make_batch((8, 64))
    place = torch.tensor([0.0, 3.0, 10.0, 7.0], dtype=F64)
    for timesteps in (place.to(dtype), place.repeat(2).to(dtype), place.to(dtype).repeat_interleave(3)[::3]):
        sums = running_sums(4)._replace(pair_levels=timesteps)
        read = native.set_totals(cuda.CudaArgs(), sums)
        assert read is not None and (read is timesteps) == (dtype not in (torch.int16, torch.uint8))
        run(batch, "cuda", **OPTIONS, totals=sums)
        assert sums.levels is not None and sums.levels[0].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
    one = running_sums(4)._replace(pair_levels=torch.tensor(3).to(dtype).expand(8))
    run(batch, "cuda", **OPTIONS, totals=one)
    assert one.levels is not None and one.levels[0].tolist() == [0.0, 4.0, 0.0, 0.0, 0.0]


def test_per_sample_numbers_of_any_type_and_stride() -> None:
    batch = make_batch((6, 1_000), (F32,) * 3, weighted=True)
    plain, grad = run(batch, "cuda", **OPTIONS)
    assert batch.error_weight is not None
    wide = torch.stack([batch.ratio_scale, batch.ratio_scale], -1)[:, 0]
    assert wide.stride(0) == 2
    other, other_grad = run(batch._replace(ratio_scale=wide), "cuda", **OPTIONS)
    assert torch.equal(other.logits, plain.logits) and torch.equal(other_grad, grad)
    for dtype in (F32, BF16, F16):
        rounded = batch._replace(ratio_scale=batch.ratio_scale.to(dtype), error_weight=batch.error_weight.to(dtype))
        same = batch._replace(ratio_scale=rounded.ratio_scale.double(), error_weight=rounded.error_weight.double())
        assert torch.equal(run(rounded, "cuda", **OPTIONS)[0].logits, run(same, "cuda", **OPTIONS)[0].logits)


# ---- Python and C++, the emulator ------------------------------------------------------------------------------------


def test_errors_of_the_device_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """More shared memory than there is: the call fails with the device's words, and the next one works."""
    batch = make_batch((6, 16_384), (F32,) * 3)
    big = Gpu(sms=3, l2_bytes=64 << 10, shared_bytes_per_sm=1 << 20, shared_bytes_per_block=1 << 20)
    emulate(monkeypatch, big)
    with pytest.raises(RuntimeError, match=r"sipo_cuda_pair_loss failed: .+ \(CUDA error 1\)"):
        run(make_batch((2, 1 << 20), (F32,) * 3), "cuda", **OPTIONS)
    emulate(monkeypatch)
    run(batch, "cuda", **OPTIONS)


class _OtherNumbers(ctypes.Structure):
    """Fields of the same sizes in another order."""

    _fields_ = [cuda._Numbers._fields_[0], *cuda._Numbers._fields_[:0:-1]]


class _OtherArguments(ctypes.Structure):
    """An integer of the same size in place of a floating-point number."""

    _fields_ = [(name, ctypes.c_int32 if name == "keep" else kind) for name, kind in cuda.CudaArgs._fields_]


@pytest.mark.parametrize(
    ("module", "name", "value", "line"),
    [
        (cuda, "THREADS", 256, "constants"),
        (cuda, "BLOCKS_PER_SM", 1, "constants"),
        (cuda, "SCRATCH_BYTES", 512, "constants"),
        (cuda, "VECTOR", ANY, "constants"),
        (cuda, "MIXED", ANY, "constants"),
        (cuda, "ELEMENTS", {MIXED: 8, ANY: 1}, "constants"),
        (cuda, "_Numbers", _OtherNumbers, "numbers"),
        (cuda, "CudaArgs", _OtherArguments, "arguments"),
        (description, "LOSS_TYPES", ("ipo", "sigmoid", "hinge", "dmpo"), "loss types"),
        (description, "ELEMENT_TYPES", (*description.ELEMENT_TYPES[:4], torch.int32, torch.int64), "element types"),
    ],
)
def test_a_cuda_part_that_differs_is_refused(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any, line: str
) -> None:
    """Nothing on which Python and the kernels must agree differs without being noticed."""
    assert cuda._load(emulation.library()).remedy == ""
    monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(cuda.native_library, "ROOT", emulation.ROOT)
    reason = f"the native library has other {line} than this version"
    assert cuda._load(emulation.library()) == (None, reason, "rebuild: make setup")


def test_the_emulator_finds_what_it_is_for(tmp_path: Any) -> None:
    """Its own test: right kernels pass; a race, a deadlock, a divergent barrier and a stray write are found."""
    binary = tmp_path / "selftest"
    command = emulation.compiler()
    assert command is not None
    source = "csrc/emulation/selftest.cpp"
    subprocess.run([command, "-std=c++17", "-O2", source, "-o", str(binary)], cwd=emulation.ROOT, check=True)
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
