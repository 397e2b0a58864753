"""The Triton kernels: their schedule, the one-launch gradient, and the machine code that a GPU would get.

What the numbers are is checked in ``test_pair_loss.py`` (in the interpreter where there is no GPU). Here: that the
schedule covers everything once, in an order that cannot lock up, within the cache; that fusing changes no bit; and what
the compiler makes of it, in a process without the interpreter.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sipo_kernels import output
from sipo_kernels.backends import eager
from sipo_kernels.backends.interface import Stats
from sipo_kernels.backends.native import CSettings
from sipo_kernels.backends.triton import launch as triton_kernels
from sipo_kernels.backends.triton import passes as triton_passes
from sipo_kernels.backends.triton import plan as triton_plan
from sipo_kernels.backends.triton.plan import DeviceSpec
from sipo_kernels.inputs import Inputs
from sipo_kernels.layout import SMALL_SAMPLE
from sipo_kernels.options import METHODS, Settings
from sipo_kernels.output import METRICS, STATISTICS, Totals
from sipo_kernels.testing import Batch, assert_within_budget, beta_for, make_batch, reference_grad, run, run_reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
MB = 1 << 20
DEVICES = {
    "A100": DeviceSpec(40 * MB, 108),
    "L40S": DeviceSpec(96 * MB, 142),
    "H100": DeviceSpec(50 * MB, 132),
    "H200": DeviceSpec(50 * MB, 132),
    "B200": DeviceSpec(126 * MB, 148),
    "4 MB": DeviceSpec(4 * MB, 40),
    "interpreter": triton_plan.INTERPRETER,
}

# ---- The schedule ----------------------------------------------------------------------------------------------------


def _schedule(plan: triton_plan.TritonPlan, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Item reduced, and item written, in each step (−1: none), as ``pair_forward`` decodes them."""
    per_pair = 2 * plan.parts
    items = pairs * per_pair
    step = np.arange(items + plan.distance)
    back = step - plan.distance
    pair, item = back // per_pair, back % per_pair
    if plan.keep < per_pair:
        item = per_pair - 1 - item
    return np.where(step < items, step, -1), np.where(back >= 0, pair * per_pair + item, -1)


# Pairs, and what each of them holds; the largest batch has 2^33 elements in each tensor.
batches = st.one_of(
    st.tuples(st.integers(1, 600), st.integers(1, 40_000)),
    st.tuples(st.integers(1, 64), st.integers(1, 1 << 22)),
    st.tuples(st.integers(1, 4), st.integers(1 << 22, 1 << 30)),
)
element_types = st.sampled_from([(BF16, BF16), (BF16, F32), (F16, F32), (F32, F32), (F64, F64), (F32, BF16)])


@settings(max_examples=150)
@given(batch=batches, types=element_types, shared=st.booleans(), device=st.sampled_from(list(DEVICES.values())))
def test_schedule(batch: tuple[int, int], types: tuple[torch.dtype, ...], shared: bool, device: DeviceSpec) -> None:
    """Of policy and target of these types."""
    pairs, elements = batch
    model, target = torch.empty(2, dtype=types[0]), torch.empty(1 if shared else 2, dtype=types[1])
    sizes = types[0].itemsize, types[1].itemsize
    block, kept_bytes = triton_plan.block(F32, model, target), triton_plan.kept_bytes(model, target)
    assert block == 8192 // max(sizes)
    assert kept_bytes == 2 * sizes[0] + (1 if shared else 2) * sizes[1]
    mask = torch.empty(1 if shared else 2, dtype=torch.bool)
    assert triton_plan.kept_bytes(model, target, mask) == kept_bytes + len(mask)
    plan = triton_plan.plan(pairs, elements, block, kept_bytes, device)
    per_pair, part = 2 * plan.parts, plan.tiles * block
    items = pairs * per_pair
    assert 1 <= plan.programs <= min(items, 4 * device.processors)

    # The parts of a sample: each element in exactly one, none empty; fixed by the shape alone.
    assert (plan.parts - 1) * part < elements <= plan.parts * part
    assert (plan.parts, plan.tiles) == triton_plan.split(elements, block)
    assert plan.parts <= triton_plan.MAX_PARTS

    # Each item is reduced once and written once.
    reduced, written = _schedule(plan, pairs)
    assert np.array_equal(np.sort(reduced[reduced >= 0]), np.arange(items))
    assert np.array_equal(np.sort(written[written >= 0]), np.arange(items))

    # No gradient waits for a step after its own.
    last_reduction = np.arange(1, pairs + 1) * per_pair - 1  # item s is reduced in step s
    steps = np.flatnonzero(written >= 0)
    assert bool((last_reduction[written[steps] // per_pair] <= steps).all())

    # What is asked to stay between its two visits fits in the share of the cache.
    kept = np.arange(items) % per_pair >= per_pair - plan.keep
    arrivals = np.where(reduced >= 0, kept[reduced], False).astype(np.int64)
    departures = np.where(written >= 0, kept[written], False).astype(np.int64)
    held = np.cumsum(arrivals) - np.cumsum(departures) + departures  # at its fullest, within the step
    item_bytes = min(part, elements) * kept_bytes / 2
    room = triton_plan.L2_SHARE * device.l2_bytes
    assert held.max() * item_bytes <= room + item_bytes
    # ... and a pair that fits beside a quarter of the programs' items stays whole.
    if (per_pair + math.ceil(plan.programs / 4)) * item_bytes <= room:
        assert plan.keep == per_pair


@pytest.mark.parametrize(
    ("device", "pairs", "elements", "kept_share"),  # in bfloat16, with a float32 target of each sample or of each pair
    [
        ("H100", 32, 4 * 64 * 64, (1.0, 1.0, 1.0)),  # Stable Diffusion, 512 px
        ("H100", 32, 16 * 128 * 128, (1.0, 1.0, 1.0)),  # FLUX, 1024 px
        ("H100", 8, 16 * 13 * 60 * 90, (1.0, 1.0, 1.0)),  # CogVideoX, 49 frames
        ("A100", 8, 16 * 13 * 60 * 90, (1.0, 1.0, 1.0)),
        ("H200", 4, 16 * 21 * 60 * 104, (1.0, 0.95, 1.0)),  # Wan 2.1, 81 frames at 480p
        ("B200", 4, 16 * 21 * 60 * 104, (1.0, 1.0, 1.0)),
        ("L40S", 4, 16 * 21 * 60 * 104, (1.0, 1.0, 1.0)),
        ("H100", 2, 16 * 21 * 90 * 160, (0.65, 0.44, 0.65)),  # at 720p: 38.7 MB of policy and target in bfloat16
        ("B200", 2, 16 * 21 * 90 * 160, (1.0, 0.98, 1.0)),
    ],
)
def test_what_stays_in_the_cache(device: str, pairs: int, elements: int, kept_share: tuple[float, ...]) -> None:
    """What stays is not read from device memory again."""
    half, single, shared = torch.empty(2, dtype=BF16), torch.empty(2), torch.empty(1)
    for target, share in zip((half, single, shared), kept_share, strict=True):
        block, kept_bytes = triton_plan.block(F32, half, target), triton_plan.kept_bytes(half, target)
        plan = triton_plan.plan(pairs, elements, block, kept_bytes, DEVICES[device])
        assert plan.keep >= share * 2 * plan.parts


@settings(max_examples=40)
@given(
    pairs=st.integers(1, 6),
    parts=st.integers(1, 5),
    lead=st.integers(0, 8),
    programs=st.integers(1, 9),
    resident=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_no_order_of_execution_locks_up(
    pairs: int, parts: int, lead: int, programs: int, resident: int, seed: int
) -> None:
    """The kernel's protocol, its programs interleaved at random, of which ``resident`` run at a time."""
    per_pair, items = 2 * parts, 2 * parts * pairs
    distance = min(per_pair + lead, items)
    drawn, done = itertools.count(), [0] * pairs
    written: list[int] = []
    reported: list[int] = []

    def program() -> Iterator[None]:
        while (step := next(drawn)) < items + distance:
            yield
            if step < items:
                done[step // per_pair] += 1
                if done[step // per_pair] == per_pair:
                    yield  # the pair's arithmetic
                    done[step // per_pair] += 1
                yield
            if step >= distance:
                while done[(step - distance) // per_pair] <= per_pair:
                    yield
                written.append(step - distance)
            yield
        if step == items + distance:
            while min(done) <= per_pair:
                yield
            reported.append(step)

    choose = random.Random(seed)
    waiting = [program() for _ in range(programs)]
    running: list[Iterator[None]] = []
    for _ in range(100_000):
        while waiting and len(running) < resident:
            running.append(waiting.pop())
        if not running:
            break
        chosen = choose.choice(running)
        if next(chosen, chosen) is chosen:
            running.remove(chosen)
    assert not running and sorted(written) == list(range(items)) and len(reported) == 1


def test_device_is_asked_once_and_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1, device=DEVICE)
    assert triton_plan.device_of(tensor) is triton_plan.device_of(tensor)
    monkeypatch.setattr(triton_plan, "DEVICE_OVERRIDE", DEVICES["H100"])
    assert triton_plan.device_of(tensor) == DeviceSpec(50 * MB, 132)


def test_tiles_are_sized_by_the_widest_input() -> None:
    half, single, double = (torch.zeros(1, dtype=dtype) for dtype in (BF16, F32, F64))
    assert triton_plan.block(F32, half, None, half) == 4096
    assert triton_plan.block(F32, half, None, half, error_mask=single) == 2048
    assert triton_plan.block(F32, half, None, single, error_mask=half) == 2048  # single is as wide
    assert triton_plan.block(F64, half, half, half, error_mask=half) == 1024
    assert triton_plan.block(F32, half, half, single) == 2048
    assert triton_plan.block(F64, half, half, half) == 2048  # a small sample, summed in float64
    assert triton_plan.block(F64, half, half, single) == 2048
    assert triton_plan.block(F64, single, double, half) == 1024


# ---- Loss and gradient in one launch ---------------------------------------------------------------------------------

# Small tiles, so that small tensors have many parts; devices whose caches hold pairs and a lead, nearly a pair, some of
# it, and nothing.
SMALL_DEVICES = [DeviceSpec(1 << 20, 2), DeviceSpec(1 << 15, 1), DeviceSpec(6000, 1), DeviceSpec(64, 1)]


@pytest.fixture(params=SMALL_DEVICES, ids=str)
def small_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DeviceSpec:
    monkeypatch.setattr(triton_plan, "TILE_BYTES", 512)
    monkeypatch.setattr(triton_plan, "DEVICE_OVERRIDE", request.param)
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory is NaN until something is written to it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _settings(**changes: Any) -> Settings:
    return Settings(**({"beta": 3.0, "mask_threshold": 0.0} | changes))


def _inputs(batch: Batch, ref_error: torch.Tensor | None = None) -> Inputs:
    model, ref, target, scale, weight, mask = (None if t is None else t.detach() for t in batch)
    return Inputs(model, ref if ref_error is None else None, target, scale, weight, ref_error, mask)


def _forward(
    batch: Batch, with_grad: bool, ref_error: torch.Tensor | None = None, expected: Any = 1.0, **changes: Any
) -> Stats:
    inputs = _inputs(batch, ref_error)
    return triton_kernels.forward(inputs, _settings(**changes), with_grad=with_grad, expected=expected)


def _both_ways(batch: Batch, ref_error: torch.Tensor | None = None, **changes: Any) -> tuple[Stats, Stats]:
    """Results of one launch, and of two: the second with its gradient from ``gradient``."""
    one, two = (_forward(batch, with_grad, ref_error, **changes) for with_grad in (True, False))
    upstream = torch.ones_like(two.loss)
    args = (batch.model_pred.detach(), batch.target, two.samples[output.COEF_ROW], upstream)
    return one, two._replace(grad=triton_kernels.gradient(*args, error_mask=batch.error_mask))


def _assert_same_bits(one: Stats, two: Stats) -> None:
    for name, a, b in zip(Stats._fields, one, two, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride(), name
        assert a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8)), name


def test_small_devices_cover_the_schedule() -> None:
    plans = [triton_plan.plan(5, 3 * 307, 128, 16, device) for device in SMALL_DEVICES]
    assert [(plan.parts, plan.distance, plan.keep) for plan in plans] == [(4, 14, 8), (4, 9, 7), (4, 11, 1), (4, 11, 0)]


DTYPES = [(F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, F32), (F32, BF16, F64), (BF16, F64, BF16)]


@pytest.mark.parametrize("types", DTYPES, ids=lambda t: "-".join(str(x)[6:] for x in t))
@pytest.mark.parametrize("shared", [False, True])
def test_fusing_changes_no_bit(
    types: tuple[torch.dtype, ...], shared: bool, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """Nor does the device."""
    monkeypatch.setattr(triton_plan, "TILE_BYTES", 1024)
    batch = make_batch((6, 3, 307), types, shared_target=shared, weighted=True, device=DEVICE)
    one, two = _both_ways(batch)
    _assert_same_bits(one, two)
    assert bool((one.grad != 0).any(-1).all())
    for device in SMALL_DEVICES[1:3]:
        monkeypatch.setattr(triton_plan, "DEVICE_OVERRIDE", device)
        _assert_same_bits(_forward(batch, True), one)


@pytest.mark.parametrize("mask", ["bool", "shared weights"])
def test_fusing_changes_no_bit_with_an_error_mask(small_device: DeviceSpec, mask: str, poisoned: None) -> None:
    """NaN where nothing counts stays out of it; another upstream gradient makes the bits that it makes alone."""
    batch = make_batch((6, 3, 107), (BF16, BF16, F32), mask=mask, device=DEVICE)
    weights = batch.error_mask
    assert weights is not None
    weights = weights.repeat(6 // len(weights), 1, 1)
    with torch.no_grad():
        batch.model_pred[weights == 0], batch.ref_pred[weights == 0], batch.target[weights == 0] = (
            math.nan,
            math.inf,
            1.0,
        )
    one, two = _both_ways(batch)
    _assert_same_bits(one, two)
    assert bool(one.loss.isfinite()) and torch.equal(one.grad != 0, weights != 0)
    model, coef, upstream = batch.model_pred.detach(), one.samples[output.COEF_ROW], _cell(1 / 3).float()
    args = (model, batch.target, coef, upstream)
    made = triton_kernels.gradient(*args, error_mask=batch.error_mask)
    assert torch.equal(made, eager.gradient(*args, error_mask=batch.error_mask))  # zeros of either sign
    _assert_equal(triton_kernels.mend(one.grad, *args, one.numbers, error_mask=batch.error_mask), made)


@pytest.mark.parametrize(("shape", "method"), [*zip([(2, 1), (2,), (2, 4099), (14, 5)], METHODS, strict=True)])
def test_fusing_changes_no_bit_of_odd_shapes(
    shape: tuple[int, ...], method: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    monkeypatch.setattr(triton_plan, "TILE_BYTES", 512)
    batch = make_batch(shape, (F32,) * 3, device=DEVICE)
    _assert_same_bits(*_both_ways(batch, method=method, reduction="none"))
    errors = torch.linspace(0.5, 1.5, shape[0], dtype=F64, device=DEVICE)
    _assert_same_bits(*_both_ways(batch, errors, method=method, reduction="sum"))
    _assert_same_bits(*_both_ways(batch, method=method, loss_type="dmpo", safeguard=0.25))


def test_fusing_changes_no_bit_of_other_layouts(small_device: DeviceSpec, poisoned: None) -> None:
    batch = make_batch((6, 5, 7, 5), (BF16,) * 3, device=DEVICE)
    wide = torch.cat([batch.model_pred.detach(), batch.ref_pred], 1)
    innermost = batch.model_pred.detach().permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    nhwc = batch.model_pred.detach().contiguous(memory_format=torch.channels_last)
    _, plain = _both_ways(batch)
    for model in (wide[:, :5], innermost, nhwc):
        one, two = _both_ways(batch._replace(model_pred=model))
        _assert_same_bits(one, two)
        assert torch.equal(one.grad, plain.grad) and one.grad.stride() == torch.empty_like(model).stride()


@pytest.mark.parametrize("small_device", SMALL_DEVICES[1:3], indirect=True)
def test_masked_and_broken_pairs_stay_alone(small_device: DeviceSpec, poisoned: None) -> None:
    clean = make_batch((10, 3, 107), device=DEVICE)
    scale = clean.ratio_scale.clone()
    scale[[3, 8]] = math.inf  # pairs 3 masked by its chosen sample, as a terminal step is
    model = clean.model_pred.detach().clone()
    model[3, 1, 5], model[8, 0, 0] = math.inf, math.nan  # whatever a masked pair holds
    model[6, 2, 100] = math.nan  # rejected sample of pair 1, which is not masked
    before, _ = _both_ways(clean, mask_threshold=0.1, reduction="none")
    after, two = _both_ways(Batch(model, *clean[1:3], scale), mask_threshold=0.1, reduction="none", nonfinite="skip")
    _assert_same_bits(after, two)
    assert after.mask.tolist() == [True, False, True, False, True]
    for sample in (1, 3, 6, 8):
        assert not after.grad[sample].view(torch.int32).any()  # +0.0, every one
    keep = [0, 2, 4, 5, 7, 9]
    assert torch.equal(after.grad[keep], before.grad[keep])
    spread, two = _both_ways(Batch(model, *clean[1:3], scale), mask_threshold=0.0, reduction="none")
    _assert_same_bits(spread, two)
    assert torch.equal(spread.grad[keep], before.grad[keep]) and bool(spread.grad[1].isnan().all())


# ---- The upstream gradient that is expected, and another one ---------------------------------------------------------

UPSTREAMS = (1.0, 1 / 8, 1 / 3, 65536.0, 0.0, -2.0, math.inf, math.nan)
MIXES = [(F32,) * 3, (BF16,) * 3, (F16,) * 3, (BF16, BF16, F32), (F16, F16, F32), (F32, BF16, F64)]


def _assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    """To the last bit; any NaN equals any other."""
    assert got.dtype == want.dtype and got.stride() == want.stride()
    assert torch.equal(got.isnan(), want.isnan())
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    assert torch.equal(got.nan_to_num(7.0).view(integer), want.nan_to_num(7.0).view(integer))


def _cell(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64, device=DEVICE)


@pytest.mark.parametrize("types", MIXES, ids=lambda t: "-".join(str(x)[6:] for x in t))
def test_fused_mended_or_made_alone_the_bits_are_the_same(
    types: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """Every other mix with a target of each pair; every other upstream gradient as a number, the rest on the device."""
    monkeypatch.setattr(triton_plan, "TILE_BYTES", 512)
    monkeypatch.setattr(triton_plan, "DEVICE_OVERRIDE", SMALL_DEVICES[1])
    batch = make_batch((6, 101), types, shared_target=MIXES.index(types) % 2 == 1, device=DEVICE)
    batch.ratio_scale[4] = math.inf  # pair 1 is masked
    model, target = batch.model_pred.detach(), batch.target
    plain = _forward(batch, True, mask_threshold=0.1)
    coef = plain.samples[output.COEF_ROW]
    assert coef.count_nonzero() == 4
    for turn, value in enumerate(UPSTREAMS):
        expected = _cell(value) if turn % 2 else value
        fused = _forward(batch, True, expected=expected, mask_threshold=0.1)
        upstream = torch.tensor(value, dtype=plain.loss.dtype, device=DEVICE)
        made = triton_kernels.gradient(model, target, coef, upstream)
        _assert_equal(made, eager.gradient(model, target, coef, upstream))
        _assert_equal(fused.grad, made)
        mended = triton_kernels.mend(plain.grad.clone(), model, target, coef, upstream, plain.numbers)
        _assert_equal(mended, made)
        _assert_same_bits(fused._replace(grad=made, numbers=plain.numbers), plain._replace(grad=made))
        assert torch.equal(fused.numbers[:-1], plain.numbers[:-1])
        _assert_equal(fused.numbers[-1], upstream)
        for masked in (1, 4):
            assert not fused.grad[masked].any() and not fused.grad[masked].signbit().any()


@pytest.mark.parametrize("shared", [False, True])
def test_mend_touches_what_must_change_and_remembers(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "TILE_BYTES", 512)
    batch = make_batch((8, 3, 107), (BF16, BF16, F32), shared_target=shared, device=DEVICE)
    model, target = batch.model_pred.detach(), batch.target
    coef = torch.tensor([1.0, 0.0, -2.0, 0.5, 0.25, 0.0, 3.0, -1.0], device=DEVICE)
    marked = torch.full_like(model, 7.0)  # no gradient: shows what was left alone
    third = torch.tensor(1 / 3, device=DEVICE)
    numbers = torch.full((len(METRICS) + 1,), math.nan, device=DEVICE)
    numbers[-1] = third

    def mend(upstream: torch.Tensor, remembered: torch.Tensor | None = None) -> torch.Tensor:
        grad = marked.clone()
        assert triton_kernels.mend(grad, model, target, coef, upstream, numbers, remembered) is grad
        return grad

    remembered = _cell(7.0)
    assert torch.equal(mend(third, remembered), marked) and remembered.item() == third.item()
    assert torch.equal(mend(third.expand(4)), marked)
    for value in (0.3, -1.0, 0.0, math.inf, -math.inf, math.nan):
        upstream = torch.tensor(value, device=DEVICE)
        before = remembered.item()
        mended = mend(upstream, remembered)
        _assert_equal(mended, triton_kernels.gradient(model, target, coef, upstream))
        assert not mended[[1, 5]].any()
        assert remembered.item() == (upstream.item() if math.isfinite(value) else before)

    per_pair = torch.stack([third, third * 0 - 3, third * 0, third])
    for upstream in (per_pair, torch.stack([per_pair, per_pair], 1)[:, 1]):
        mended = mend(upstream, remembered)
        assert remembered.item() == third.item()
        expected = triton_kernels.gradient(model, target, coef, upstream)
        assert torch.equal(mended[[0, 3, 4, 7]], marked[[0, 3, 4, 7]])
        assert torch.equal(mended[[1, 2, 5, 6]], expected[[1, 2, 5, 6]])
    mend(per_pair.flip(0) * torch.tensor([math.inf, 1, 1, 1], device=DEVICE), remembered)
    assert remembered.item() == third.item()


@pytest.mark.parametrize("changed", [None, 0, 127, 128, 299])
def test_mend_of_many_pairs(changed: int | None) -> None:
    batch = make_batch((600, 3), device=DEVICE)
    upstream = torch.full((300,), 0.5, device=DEVICE)
    if changed is not None:
        upstream[changed] = 2.0
    coef, marked = torch.ones(600, device=DEVICE), torch.full((600, 3), 7.0, device=DEVICE)
    numbers = torch.full((len(METRICS) + 1,), 0.5, device=DEVICE)
    mended = triton_kernels.mend(marked.clone(), batch.model_pred.detach(), batch.target, coef, upstream, numbers)
    left = torch.ones(600, dtype=torch.bool)
    if changed is not None:
        left[[changed, changed + 300]] = False
    assert torch.equal(mended[left], marked[left])
    expected = 2 * (batch.model_pred.detach().double() - batch.target.double())
    torch.testing.assert_close(mended[~left].double(), expected[~left], rtol=1e-6, atol=0)


def test_mend_where_the_kernel_does_not_write_the_layout() -> None:
    batch = make_batch((6, 5, 7), device=DEVICE)
    model = batch.model_pred.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    coef = torch.linspace(-1, 1, 6, device=DEVICE)
    numbers = torch.ones(len(METRICS) + 1, device=DEVICE)
    for value in (1.0, 0.5):
        upstream, remembered = torch.tensor(value, device=DEVICE), _cell(7.0)
        expected = triton_kernels.gradient(batch.model_pred.detach(), batch.target, coef, upstream)
        fused = triton_kernels.gradient(model, batch.target, coef, torch.ones((), device=DEVICE))
        mended = triton_kernels.mend(fused, model, batch.target, coef, upstream, numbers, remembered)
        assert mended is fused and remembered.item() == value
        assert torch.equal(mended, expected) and mended.stride() == model.stride()


@pytest.mark.parametrize("types", [(F32,) * 3, (BF16,) * 3, (F16, F16, F32)], ids=["fp32", "bf16", "fp16-fp32"])
def test_backward_through_the_public_function(
    types: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    monkeypatch.setattr(triton_plan, "TILE_BYTES", 512)
    batch = make_batch((6, 3, 207), types, device=DEVICE)
    options: dict[str, Any] = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, "reduction": "none"}
    for values, expected in (([1.0, 1.0, 1.0], 1.0), ([1.0, -3.0, 0.0], _cell(1.0)), ([0.5, 0.5, 0.5], _cell(0.25))):
        upstream = torch.tensor(values, device=DEVICE)
        _, grad = run(batch, "triton", upstream=upstream, expected_upstream=expected, **options)
        exact = reference_grad(batch, grad_output=upstream.double(), **options)
        rounding = (exact.to(types[0]).double() - exact).norm()
        assert (grad.double() - exact).norm() <= rounding + 1e-6 * exact.norm()
        assert not isinstance(expected, torch.Tensor) or expected.item() == values[0]


# ---- Metrics and running sums ----------------------------------------------------------------------------------------


def _totals(timesteps: torch.Tensor, top: float = 1000.0, bins: int = 6) -> Totals:
    levels = torch.zeros(len(STATISTICS), bins, device=DEVICE)
    return Totals(torch.zeros(2, len(METRICS), device=DEVICE), levels, timesteps.to(DEVICE), top)


@pytest.mark.parametrize("method", METHODS)
def test_numbers_and_totals_are_those_of_the_fields(method: str, poisoned: None) -> None:
    """In float64, so that the fields are what the kernel worked with; some pairs are broken, and there are many."""
    batch = make_batch((38, 5), (F64,) * 3, distance=1.0, weighted=True, device=DEVICE)
    model = batch.model_pred.detach().clone()
    model[4, 0], model[20, 1], model[5] = math.nan, math.inf, 1e30  # the last is too much for float32 alone
    inputs = _inputs(batch._replace(model_pred=model))
    timesteps = torch.arange(19, dtype=F32) * 170 % 1000
    timesteps[7:10] = torch.tensor([-5.0, math.nan, math.inf])
    got, want = _totals(timesteps), _totals(timesteps)
    for reduction, skip in (("mean", False), ("none", True)):
        settings = _settings(
            method=method, mask_threshold=0.9, reduction=reduction, nonfinite="skip" if skip else "propagate"
        )
        stats = triton_kernels.forward(inputs, settings, totals=got)
        clip = None if method == "diffusion_dpo" else (0.9, 1.1)
        fields = output.PairLossOutput(*stats[:4], clip_range=clip, skip_nonfinite=skip)
        truth = torch.stack(list(fields.metrics().values()))
        torch.testing.assert_close(stats.numbers[:-1], truth, rtol=1e-12, atol=1e-15, equal_nan=True)
        output.add_totals(want, fields, 5 / 3.0 * (19 if reduction == "mean" else 1))
    assert torch.equal(got.metrics[1], want.metrics[1]) and torch.equal(got.levels[:2], want.levels[:2])
    torch.testing.assert_close(got.metrics[0], want.metrics[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got.levels[2:], want.levels[2:], rtol=2e-6, atol=1e-6)
    assert got.levels[0].sum() == 2 * 16 and got.levels[1].sum() == 2 * 3 and bool((got.levels[0] > 0).all())
    assert got.metrics[1, METRICS.index("ref_mse")] == 19 + 17
    assert got.metrics[0, METRICS.index("nonfinite_pairs")] == 2 * 2


def test_the_order_of_programs_changes_no_sum(small_device: DeviceSpec) -> None:
    """Running sums are the same wherever the schedule puts the pairs, with the gradient or without."""
    batch = make_batch((10, 3, 107), (BF16, BF16, F32), device=DEVICE)
    timesteps = torch.tensor([10, 990, 10, 400, 10])
    found = []
    for device, with_grad in ((small_device, True), (small_device, False), (SMALL_DEVICES[0], True)):
        triton_plan.DEVICE_OVERRIDE = device
        sums = _totals(timesteps)
        triton_kernels.forward(_inputs(batch), _settings(), with_grad=with_grad, totals=sums)
        found.append(sums)
    for other in found[1:]:
        assert torch.equal(other.metrics, found[0].metrics) and torch.equal(other.levels, found[0].levels)
    assert found[0].levels[0].tolist() == [3.0, 0.0, 1.0, 0.0, 0.0, 1.0]


class _Launches(TorchDispatchMode):
    """Notes what would run on a GPU: torch's operations but those that allocate or look, and kernels in our place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.startswith(("empty", "new_empty", "select", "alias", "detach")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **constants: self.seen.append("kernel")


@pytest.mark.parametrize("upstream", [torch.tensor(0.5), torch.tensor(0.5).expand(3)], ids=["mean", "none"])
def test_three_launches_do_it_all(upstream: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = _Launches()
    monkeypatch.setattr(triton_kernels, "pair_forward", launches)
    monkeypatch.setattr(triton_kernels, "pair_backward", launches)
    batch = make_batch((6, 3, 8), (BF16, BF16, F32), shared_target=True, weighted=True, device=DEVICE)
    inputs, remembered = _inputs(batch), _cell(0.25)
    settings = _settings(reduction="none" if upstream.ndim else "mean")
    sums = _totals(torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.uint8)[:, 1])
    with launches:
        stats = triton_kernels.forward(inputs, settings, with_grad=True, expected=remembered, totals=sums)
        model, target, coef = inputs.model_pred, inputs.target, stats.samples[output.COEF_ROW]
        triton_kernels.mend(stats.grad, model, target, coef, upstream.to(DEVICE), stats.numbers, remembered)
    assert launches.seen == ["zeros", "kernel", "kernel"]


# ---- Half-precision predictions beside a float32 target --------------------------------------------------------------


@pytest.mark.parametrize("half", [BF16, F16])
@pytest.mark.parametrize("shared", [False, True])
def test_a_float32_target(half: torch.dtype, shared: bool) -> None:
    """From SMALL_SAMPLE on in float32, over many tiles; below in float64."""
    for elements in (SMALL_SAMPLE + 9, 1009):
        batch = make_batch((2, elements), (half, half, F32), distance=0.05, shared_target=shared, device=DEVICE)
        options: dict[str, Any] = {"method": "sipo", "mask_threshold": 0.0}
        options["beta"] = beta_for(batch, **options)
        out, grad = run(batch, "triton", expected_upstream=1.0, **options)
        assert_within_budget(batch, out, grad, reference_grad(batch, **options), run_reference(batch, **options))


# ---- The machine code ------------------------------------------------------------------------------------------------

CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """What ``aot.py`` read off each kernel: ``{"fused-bf16-90": {...}}``."""
    script = Path(__file__).with_name("aot.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# 16-byte accesses of one tile and one thread: policy, reference, target and gradient. A tile of bfloat16 has 4096
# elements, for 128 threads; beside a float32 target, half as many.
ACCESSES = {"bf16": (4, 4, 4, 4), "fp32": (4, 4, 4, 4), "mixed": (2, 2, 4, 2)}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_reads_and_writes_16_bytes_at_a_time(compiled: dict[str, Any], capability: int) -> None:
    kernels = [(variant, mix) for mix in ACCESSES for variant in ("fused", "reduce", "gradient", "mend")]
    for variant, mix in [*kernels, ("fused", "small"), ("fused", "totals")]:
        model, ref, target, grad = ACCESSES.get(mix, ACCESSES["mixed"])
        reads, writes = model + ref + target, model + target  # of a reduction, and of a gradient
        # A fused kernel has two loops that reduce: inputs are to be kept in the cache or not.
        loads = {"fused": 2 * reads + writes, "reduce": reads}.get(variant, writes)
        found = compiled[f"{variant}-{mix}-{capability}"]
        assert found["wide_loads"] == loads, (variant, mix)
        assert found["wide_stores"] == found["streamed_stores"] == (0 if variant == "reduce" else grad), (variant, mix)
        assert found["input_loads_narrower"] == 0, (variant, mix)  # the rest are partial sums and numbers of the pair
        assert found["kept_loads"] == (writes if variant == "fused" else 0), (variant, mix)
        if masked := compiled.get(f"{variant}-{mix}-mask-{capability}"):
            # 16 elements a thread then: 32 bytes of bfloat16, 64 of float32, 16 of a boolean mask.
            model, ref, target = (2, 2, 2 if mix == "bf16" else 4)
            reads, kept = model + ref + target + 1, model + target + 1
            assert masked["wide_loads"] == (2 * reads + kept if variant == "fused" else kept), (variant, mix)
            assert masked["input_loads_narrower"] == 0, (variant, mix)
            assert masked["kept_loads"] == (kept if variant == "fused" else 0), (variant, mix)
        if variant in ("gradient", "mend"):
            assert found["narrow_stores"] == (1 if variant == "mend" else 0)  # what is remembered


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_spills_and_four_programs_at_a_time(compiled: dict[str, Any], capability: int) -> None:
    variants = {name: found for name, found in compiled.items() if name.endswith(f"-{capability}")}
    assert len(variants) == 21
    for name, found in variants.items():
        # Two variants with an error mask keep one number of the program in memory, outside of the loop over elements.
        spilled = 8 * (name in ("mend-mixed-mask-90", "fused-relatives-mask-90"))
        assert found["local_bytes"] == 0 and found["stack_bytes"] <= spilled, name
        assert found["local_instructions"] <= spilled // 4, name
        assert 16 <= found["registers"] <= triton_plan.REGISTERS, name
    threads = 32 * triton_plan.WARPS
    assert triton_plan.PROGRAMS_PER_PROCESSOR * threads * triton_plan.REGISTERS <= 65_536


def test_settings_reach_the_kernel_in_float64() -> None:
    """Triton passes Python's floats as float32 unless told otherwise: 0.9 would be 0.89999998."""
    kernel = triton_passes.pair_forward
    if not hasattr(kernel, "params"):
        from triton.runtime.jit import JITFunction

        kernel = JITFunction(kernel.fn)
    wide = {p.name for p in kernel.params if p.annotation_type == "fp64"}
    settings = {name for name, kind, *_ in CSettings._fields_ if kind is ctypes.c_double}
    assert settings > {"beta", "mask_threshold", "loss_scale"}
    assert wide == settings | {"top", "expected_number"}
