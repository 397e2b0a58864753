"""The CUDA backend's plan, over descriptions of real GPUs: every element once, on the chip when it is needed again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sipo_kernels.cuda_plan import ANY, L2_SHARE, MIXED, SAME, SCRATCH_BYTES, SLOT_BYTES, Gpu, Plan, make_plan

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
readers = st.sampled_from([SAME, MIXED, ANY])
widths = st.sampled_from([2, 4, 8])


class Traffic(NamedTuple):
    """What one call does to each tile of each pair, and the bytes that it hopes to find on the chip."""

    reduced: np.ndarray  # [pairs, tiles]: how often
    written: np.ndarray
    held: np.ndarray  # [pairs, tiles, 2] bool: in shared memory when the gradient comes by
    most_waiting: int  # sample tiles, most that wait in the L2 cache at once, between reduction and gradient


def simulate(plan: Plan, pairs: int) -> Traffic:
    """The schedule of csrc/cuda/pair_loss.cu, block by block and step by step, on counters instead of elements."""
    reduced = np.zeros((pairs, plan.tiles), int)
    written = np.zeros((pairs, plan.tiles), int)
    held = np.zeros((pairs, plan.tiles, 2), bool)
    waiting = np.zeros(2 * plan.groups + 2, int)  # sample tiles in the L2 cache, change by step
    groups = [range(k * plan.group, min(pairs, (k + 1) * plan.group)) for k in range(plan.groups)]
    for k, members in enumerate(groups):
        for run in plan.runs(len(members)):
            slots: set[int] = set()
            for at, u in enumerate(run):
                pair, tile = members[u // plan.tiles], u % plan.tiles
                reduced[pair, tile] += 1
                for half in range(2):
                    slot = 2 * (at - plan.held_from(run)) + half
                    if 0 <= slot < plan.hold:
                        assert slot not in slots and at >= plan.lead, "the slot still holds the group before"
                        slots.add(slot)
                        held[pair, tile, half] = True
                    else:
                        # In from step 2k (the lead) or 2k + 1; out in step 2(k + 1), by the gradient.
                        waiting[2 * k + (at >= plan.lead)] += 1
                        waiting[2 * k + 3 if 2 * k + 3 < len(waiting) else -1] -= 1
                written[pair, tile] += 1
    return Traffic(reduced, written, held, int(np.cumsum(waiting).max()))


@given(gpus, readers, widths, st.integers(1, 40), st.integers(1, 400_000), st.booleans())
def test_every_tile_once(gpu: Gpu, reader: int, width: int, pairs: int, elements: int, shared: bool) -> None:
    plan = make_plan(
        gpu, pairs=pairs, elements=elements, item_bytes=(width, width), reader=reader, shared_target=shared
    )
    assert plan.tile * plan.tiles >= elements > plan.tile * (plan.tiles - 1)
    assert (plan.groups - 1) * plan.group < pairs <= plan.groups * plan.group
    traffic = simulate(plan, pairs)
    assert (traffic.reduced == 1).all() and (traffic.written == 1).all()


@given(gpus, readers, widths, st.integers(1, 300), st.integers(1, 100_000))
def test_parts_are_enough_and_distinct(gpu: Gpu, reader: int, width: int, pairs: int, elements: int) -> None:
    """Each block's sum of a pair has a place of its own, none is missing, and owner() of the kernel finds them."""
    plan = make_plan(gpu, pairs=pairs, elements=elements, item_bytes=(width, width), reader=reader)
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


@given(gpus, readers, widths, sizes, st.integers(1, 64), st.booleans(), st.booleans())
def test_limits_of_the_hardware(
    gpu: Gpu, reader: int, width: int, elements: int, pairs: int, shared: bool, with_grad: bool
) -> None:
    plan = make_plan(
        gpu,
        pairs=pairs,
        elements=elements,
        item_bytes=(width, width),
        reader=reader,
        shared_target=shared,
        with_grad=with_grad,
    )
    per_sm = -(-plan.blocks // gpu.sms)
    assert plan.blocks >= 1 and per_sm <= 2, "all blocks on the chip at once"
    assert plan.shared_bytes <= gpu.shared_bytes_per_block
    assert per_sm * (plan.shared_bytes + KB) <= gpu.shared_bytes_per_sm
    assert plan.shared_bytes == SCRATCH_BYTES + (plan.hold * SLOT_BYTES if with_grad else 0)
    assert plan.hold == 0 or reader == SAME
    assert 0 < plan.keep <= 1
    assert 2 * plan.group * plan.tiles < 2**32, "tile numbers are 32 bits"
    # Sums are the same with and without the gradient: the same runs of the same groups.
    other = make_plan(
        gpu,
        pairs=pairs,
        elements=elements,
        item_bytes=(width, width),
        reader=reader,
        shared_target=shared,
        with_grad=not with_grad,
    )
    assert (plan.tiles, plan.group, plan.blocks, plan.lead) == (other.tiles, other.group, other.blocks, other.lead)
    # Partial sums and per-sample numbers: less than 1 MB beside tensors of any real size.
    workspace = pairs * plan.parts * 48 + pairs * 170 + 4 * (plan.groups + 1)
    assert workspace < MB


def test_a_sample_too_large_for_tile_numbers() -> None:
    with pytest.raises(ValueError, match=r"a sample has 1099511627776 elements: expected at most \d+"):
        make_plan(GPUS["H100"], pairs=1, elements=2**40, item_bytes=(2, 2), reader=ANY)


VIDEO = {
    "CogVideoX": (13, 16, 60, 90),
    "Wan 480p": (16, 21, 60, 104),
    "Wan 720p": (16, 21, 90, 160),
    "HunyuanVideo": (16, 33, 90, 160),
}


@pytest.mark.parametrize("name", ["A100", "H100", "H200", "B200", "L40S"])
@pytest.mark.parametrize("label", VIDEO)
def test_what_is_found_again(name: str, label: str) -> None:
    """The kept part of what waits in the L2 cache fits the share of it that the plan counts on."""
    gpu, elements = GPUS[name], int(np.prod(VIDEO[label]))
    plan = make_plan(gpu, pairs=16, elements=elements, item_bytes=(2, 2), reader=SAME)
    traffic = simulate(plan, 16)
    assert traffic.most_waiting * SLOT_BYTES * plan.keep <= 1.1 * L2_SHARE * gpu.l2_bytes
    assert traffic.held.mean() > 0 or plan.hold == 0


@pytest.mark.parametrize("name", ["H100", "H200", "B200"])
@pytest.mark.parametrize("label", VIDEO)
def test_predicted_traffic(name: str, label: str) -> None:
    """bfloat16: policy and target read again from memory make the traffic at most 1.12 of 4N·b, as the plan counts."""
    gpu, elements = GPUS[name], int(np.prod(VIDEO[label]))
    plan = make_plan(gpu, pairs=16, elements=elements, item_bytes=(2, 2), reader=SAME)
    held = simulate(plan, 16).held.mean()
    missed = (1 - held) * (1 - plan.keep)
    assert 1 + 2 * missed / 4 <= 1.12


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
