"""The CUDA backend's plan, over descriptions of real GPUs: every element once, on the chip when it is needed again."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest
from docs_pages import DOCS
from hypothesis import given
from hypothesis import strategies as st

from sipo_kernels.backends.cuda.plan import (
    ANY,
    L2_SHARE,
    MIXED,
    RESERVED_BYTES,
    SCRATCH_BYTES,
    THREADS,
    VECTOR,
    CudaCall,
    CudaPlan,
    Gpu,
    make_plan,
    traffic,
)

KB, MB = 1 << 10, 1 << 20
GPUS = {
    "A100": Gpu(sms=108, l2_bytes=40 * MB, shared_bytes_per_sm=164 * KB, shared_bytes_per_block=163 * KB),
    "L40S": Gpu(sms=142, l2_bytes=96 * MB, shared_bytes_per_sm=100 * KB, shared_bytes_per_block=99 * KB),
    "H100": Gpu(sms=132, l2_bytes=50 * MB, shared_bytes_per_sm=228 * KB, shared_bytes_per_block=227 * KB),
    "H200": Gpu(sms=132, l2_bytes=60 * MB, shared_bytes_per_sm=228 * KB, shared_bytes_per_block=227 * KB),
    "B200": Gpu(sms=148, l2_bytes=126 * MB, shared_bytes_per_sm=228 * KB, shared_bytes_per_block=227 * KB),
    "tiny": Gpu(sms=2, l2_bytes=256 * KB, shared_bytes_per_sm=48 * KB, shared_bytes_per_block=47 * KB),
}

gpus = st.sampled_from(list(GPUS.values()))
# How tensors are read, and the bytes of their elements: every mix that has a kernel of its own, and others.
TYPED = [(2, 2), (2, 4), (4, 4), (8, 8)]
kinds = st.one_of(
    st.tuples(st.just(VECTOR), st.sampled_from(TYPED)),
    st.tuples(st.sampled_from([MIXED, ANY]), st.tuples(*[st.sampled_from([2, 4, 8])] * 2)),
)


class Visits(NamedTuple):
    """What one call does to each tile of each pair, and what it hopes to find on the chip."""

    reduced: np.ndarray  # [pairs, tiles]: how often
    written: np.ndarray
    held: np.ndarray  # [pairs, tiles, 2] bool: in shared memory when the gradient comes by
    most_waiting: int  # most bytes that wait in the L2 cache at once, for each element of a tile


masks = st.sampled_from([(0, False), (1, False), (1, True), (4, False), (4, True)])  # bytes of a weight; is it shared?


def simulate(plan: CudaPlan, call: CudaCall) -> Visits:
    """The schedule of csrc/cuda/pair_loss.cu, block by block and step by step, on counters instead of elements."""
    pairs = call.pairs
    policy, target = call.item_bytes
    reduced = np.zeros((pairs, plan.tiles), int)
    written = np.zeros((pairs, plan.tiles), int)
    held = np.zeros((pairs, plan.tiles, 2), bool)
    waiting = np.zeros(2 * plan.groups + 2, int)  # bytes for each element of a tile, change by step
    groups = [range(k * plan.group, min(pairs, (k + 1) * plan.group)) for k in range(plan.groups)]
    for k, members in enumerate(groups):
        for run in plan.runs(len(members)):
            slots: set[int] = set()
            for u in run:
                pair, tile = members[u // plan.tiles], u % plan.tiles
                reduced[pair, tile] += 1
                for side in range(2):
                    slot = 2 * (u - plan.held_from(run)) + side
                    if 0 <= slot < plan.hold:
                        assert slot not in slots and u - run.start >= plan.lead, "the slot still holds the group before"
                        slots.add(slot)
                        held[pair, tile, side] = True
                # Not held: the policy of each sample, and the target of each or, shared, as long as the rejected sample
                # is not.
                away = [not x for x in held[pair, tile]]
                again = sum(away) * policy + (away[1] if call.shared_target else sum(away)) * target
                again += (away[1] if call.shared_error_mask else sum(away)) * call.error_mask_bytes
                # In from step 2k (the lead) or 2k + 1; out in step 2(k + 1), by the gradient.
                waiting[2 * k + (u - run.start >= plan.lead)] += again
                waiting[2 * k + 3 if 2 * k + 3 < len(waiting) else -1] -= again
                written[pair, tile] += 1
            assert len(slots) == plan.held(run)
    return Visits(reduced, written, held, int(np.cumsum(waiting).max()))


@given(gpus, kinds, st.integers(1, 40), st.integers(1, 400_000), st.booleans())
def test_every_tile_once(gpu: Gpu, kind: tuple[int, tuple[int, int]], pairs: int, elements: int, shared: bool) -> None:
    call = CudaCall(pairs, elements, kind[1], kind[0], shared)
    plan = make_plan(gpu, call)
    assert plan.tile * plan.tiles >= elements > plan.tile * (plan.tiles - 1)
    assert (plan.groups - 1) * plan.group < pairs <= plan.groups * plan.group
    visits = simulate(plan, call)
    assert (visits.reduced == 1).all() and (visits.written == 1).all()


@given(gpus, kinds, st.integers(1, 40), st.integers(1, 400_000), st.booleans(), masks)
def test_traffic_is_that_of_the_schedule(
    gpu: Gpu, kind: tuple[int, tuple[int, int]], pairs: int, elements: int, shared: bool, mask: tuple[int, bool]
) -> None:
    call = CudaCall(pairs, elements, kind[1], kind[0], shared, True, *mask)
    plan = make_plan(gpu, call)
    visits, found = simulate(plan, call), traffic(plan, call)
    policy, target = call.item_bytes
    away = ~visits.held
    targets, weights = (away[..., 1] if x else away for x in (shared, mask[1]))
    # Bytes that shared memory does not hold.
    again = plan.tile * int(away.sum() * policy + targets.sum() * target + weights.sum() * mask[0])
    samples = 2 * pairs * plan.tiles * plan.tile
    twice = samples * policy + (samples // 2 if shared else samples) * target
    twice += (samples // 2 if mask[1] else samples) * mask[0]
    assert found.floor == twice + 2 * samples * policy  # the reference, and the gradient
    assert found.held == pytest.approx(1 - again / twice, abs=1e-12)
    assert found.expected == pytest.approx(found.floor + (1 - plan.keep) * again, rel=1e-12)
    assert found.waiting == visits.most_waiting * plan.tile


@given(gpus, kinds, st.integers(1, 300), st.integers(1, 100_000))
def test_parts_are_enough_and_distinct(gpu: Gpu, kind: tuple[int, tuple[int, int]], pairs: int, elements: int) -> None:
    """Each block's sum of a pair has a place of its own, none is missing, and owner() of the kernel finds them."""
    plan = make_plan(gpu, CudaCall(pairs, elements, kind[1], kind[0]))
    for members in {plan.group, pairs - (plan.groups - 1) * plan.group}:
        runs = plan.runs(members)
        assert len(runs) <= plan.blocks and all(len(run) > 0 for run in runs)
        total = members * plan.tiles
        for pair in range(members):
            tiles = range(pair * plan.tiles, (pair + 1) * plan.tiles)
            blocks = [b for b, run in enumerate(runs) if run.start < tiles.stop and run.stop > tiles.start]
            first, last = (((u + 1) * len(runs) - 1) // total for u in (tiles[0], tiles[-1]))
            assert blocks == list(range(first, last + 1))
            assert len(blocks) <= plan.parts


sizes = st.integers(1, 2**33).flatmap(lambda n: st.sampled_from([n, n - n % 64 or 1]))


@given(gpus, kinds, sizes, st.integers(1, 64), st.booleans(), st.booleans())
def test_limits_of_the_hardware(
    gpu: Gpu, kind: tuple[int, tuple[int, int]], elements: int, pairs: int, shared: bool, with_grad: bool
) -> None:
    call = CudaCall(pairs, elements, kind[1], kind[0], shared, with_grad)
    plan = make_plan(gpu, call)
    per_sm = -(-plan.blocks // gpu.sms)
    assert plan.blocks >= 1 and per_sm <= 2, "all blocks on the chip at once"
    assert plan.shared_bytes <= gpu.shared_bytes_per_block
    assert per_sm * (plan.shared_bytes + RESERVED_BYTES) <= gpu.shared_bytes_per_sm
    assert plan.shared_bytes == SCRATCH_BYTES + (plan.hold * call.slot_bytes if with_grad else 0)
    assert plan.hold == 0 or call.reader == VECTOR
    assert 0 < plan.keep <= 1
    assert 2 * plan.group * plan.tiles < 2**32, "tile numbers are 32 bits"
    # Sums are the same with and without the gradient: the same runs of the same groups.
    other = make_plan(gpu, call._replace(with_grad=not with_grad))
    assert (plan.tiles, plan.group, plan.blocks, plan.lead) == (other.tiles, other.group, other.blocks, other.lead)
    # Partial sums and what csrc/cuda/call.h keeps of pairs: less than 1 MB beside tensors of any real size.
    workspace = pairs * (plan.parts * 48 + 432) + 4 * (plan.groups + 1)
    assert workspace < MB


@pytest.mark.parametrize(
    ("item_bytes", "slot"),
    [((2, 2), 32), ((2, 4), 32), ((4, 4), 16), ((8, 8), 16)],
    ids=["bf16", "mixed", "fp32", "fp64"],
)
def test_shared_memory_is_filled(item_bytes: tuple[int, int], slot: int) -> None:
    """As many slots as fit, of 16 or 32 bytes a thread."""
    for gpu in GPUS.values():
        for shared in (False, True):
            call = CudaCall(1, 1 << 26, item_bytes, VECTOR, shared)
            assert call.slot_bytes == THREADS * slot
            plan = make_plan(gpu, call)
            assert plan.blocks == 2 * gpu.sms
            used = plan.shared_bytes + RESERVED_BYTES
            assert used <= gpu.shared_bytes_per_sm // 2 < used + call.slot_bytes


def test_a_sample_too_large_for_tile_numbers() -> None:
    with pytest.raises(ValueError, match=r"a sample has 1099511627776 elements: expected at most \d+"):
        make_plan(GPUS["H100"], CudaCall(1, 2**40, (2, 2), ANY))


VIDEO = {
    "CogVideoX": (13, 16, 60, 90),
    "Wan 480p": (16, 21, 60, 104),
    "Wan 720p": (16, 21, 90, 160),
    "HunyuanVideo": (16, 33, 90, 160),
}
# Columns of the table in docs/architecture.md, by the target beside bfloat16 predictions: is it shared?
TARGETS = {"bfloat16": (2, False), "float32": (4, False), "float32, shared": (4, True)}
FLOORS = {"bfloat16": 8, "float32": 10, "float32, shared": 8}  # bytes for each element of the stacked tensors


def training_call(target: str, elements: int) -> CudaCall:
    item_bytes, shared = TARGETS[target]
    return CudaCall(16, elements, (2, item_bytes), VECTOR, shared)


def video(label: str, target: str) -> CudaCall:
    return training_call(target, int(np.prod(VIDEO[label])))


@pytest.mark.parametrize("name", ["A100", "H100", "H200", "B200", "L40S"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("label", VIDEO)
def test_what_is_found_again(name: str, label: str, target: str) -> None:
    """The kept part of what waits in the L2 cache fits the share of it that the plan counts on."""
    gpu, call = GPUS[name], video(label, target)
    plan = make_plan(gpu, call)
    found = traffic(plan, call)
    assert found.waiting * plan.keep <= 1.1 * L2_SHARE * gpu.l2_bytes
    assert found.held > 0


@pytest.mark.parametrize("name", ["H100", "H200", "B200"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("label", VIDEO)
def test_predicted_traffic(name: str, label: str, target: str) -> None:
    """What is read again from memory makes the traffic little more than the least there can be, as the plan counts."""
    call = video(label, target)
    found = traffic(make_plan(GPUS[name], call), call)
    assert found.expected <= (1.14 if target == "float32" else 1.12) * found.floor


@pytest.mark.parametrize("target", TARGETS)
def test_floors(target: str) -> None:
    call = training_call(target, 2560 * 40)  # whole tiles
    stacked = 2 * call.pairs * call.elements
    assert traffic(make_plan(GPUS["H100"], call), call).floor == FLOORS[target] * stacked


def test_the_table_in_the_documentation() -> None:
    """docs/architecture.md, a line a model and a column for each target: pairs in a group, held, waiting, traffic."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\S.*?) `([\d×]+)` \| (.*) \|$", text, re.MULTILINE)
    assert [name for name, _, _ in lines] == list(VIDEO)
    for name, shape, cells in lines:
        assert tuple(map(int, shape.split("×"))) == VIDEO[name]
        for target, cell in zip(TARGETS, cells.split(" | "), strict=True):
            call = video(name, target)
            plan = make_plan(GPUS["H100"], call)
            found = traffic(plan, call)
            cached = f"{100 * found.held:.0f} %; {found.waiting / 1e6:.1f} MB"
            assert cell == f"{plan.group}; {cached}; {found.expected / found.floor:.2f}", (name, target)


def test_no_waiting_without_arriving() -> None:
    """A block says that it has reduced group k before it waits for k: with all blocks running, none waits forever."""
    for groups in (1, 2, 5):
        events = []
        for step in range(2 * groups + 1):  # the loop of pair_kernel
            k, leading = step // 2, step % 2 == 0
            if not leading:
                events.append(("arrive", k))
            elif k > 0:
                events.append(("wait", k - 1))
        arrived = -1
        for what, k in events:
            if what == "arrive":
                assert k == arrived + 1
                arrived = k
            else:
                assert k <= arrived
        assert events.count(("arrive", groups - 1)) == events.count(("wait", groups - 1)) == 1
