"""How the CUDA backend cuts one call into groups, tiles and blocks: a pure function of the call and the GPU.

The words are those of ``csrc/cuda/pair_loss.cu``, which carries the plan out: a pair is cut into tiles, pairs go
through in groups, and each block reduces a run of tiles of a group and then comes back for their gradient. What it
comes back for should still be on the chip: the plan counts the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

# Of csrc/cuda/readers.h, as are the readers below; launch.py compares them when it loads the library.
THREADS = 320
BLOCKS_PER_SM = 2
SCRATCH_BYTES = 1024

# What the hardware keeps of shared memory for each block.
RESERVED_BYTES = 1024
# Part of the L2 cache that a call may count on. An estimate: the reference and the gradient pass through the rest, and
# on large chips the cache is two halves.
L2_SHARE = 0.6
# Tiles that each block reduces of the next group while this group's coefficients are worked out. One is 2 to 5
# microseconds of memory traffic on the GPUs of today, longer than the arithmetic of a group takes.
LEAD = 1

# How a kernel reads its tensors: 16 bytes at a time, or so many elements.
VECTOR, MIXED, ANY = range(3)
ELEMENTS = {MIXED: 4, ANY: 1}


class Gpu(NamedTuple):
    """What the plan needs to know of a device.

    Attributes:
        sms: streaming multiprocessors.
        l2_bytes: size of the L2 cache.
        shared_bytes_per_sm: shared memory of one multiprocessor.
        shared_bytes_per_block: the most that one block may ask for.
        cooperative: whether a launch can ask for all of its blocks to be on the chip at once.
    """

    sms: int
    l2_bytes: int
    shared_bytes_per_sm: int
    shared_bytes_per_block: int
    cooperative: bool = True


class CudaCall(NamedTuple):
    """What the plan needs to know of a call.

    Attributes:
        pairs: B.
        elements: D, elements of one sample.
        item_bytes: bytes of one element of the predictions, and of the target.
        reader: ``VECTOR``, ``MIXED`` or ``ANY``.
        shared_target: whether both halves of a pair share the target.
        with_grad: whether the gradient is made too. It changes how the pass goes on, never which sums are made.
    """

    pairs: int
    elements: int
    item_bytes: tuple[int, int]
    reader: int
    shared_target: bool = False
    with_grad: bool = True

    @property
    def vector(self) -> int:
        """Elements of a sample that a thread handles at a time."""
        return ELEMENTS.get(self.reader, 16 // self.item_bytes[0])

    @property
    def slot_bytes(self) -> int:
        """Shared memory for a sample tile's ``d``, in the type that the gradient is computed in."""
        return THREADS * self.vector * (8 if 8 in self.item_bytes else 4)

    def again(self, samples: int) -> int:
        """Bytes of one element of policy and target that the gradient needs again, in so many samples.

        Counted chosen sample, rejected sample, chosen sample, ...; a shared target is needed until the rejected
        sample's ``d`` is there.
        """
        policy, target = self.item_bytes
        return samples * policy + (samples // 2 if self.shared_target else samples) * target


class CudaPlan(NamedTuple):
    """One call, planned.

    Attributes:
        tile: elements of one sample in one tile.
        tiles: tiles of a pair.
        group: pairs that are reduced together before their gradient is written.
        groups: how many groups that makes; the last may be smaller.
        blocks: thread blocks of the launch.
        parts: most blocks that share one pair, and so partial sums of it.
        lead: tiles of the next group that a block reduces before this group's gradient.
        hold: sample tiles whose ``d`` a block keeps in shared memory.
        keep: fraction of the remaining lines that the L2 cache is asked to keep.
        shared_bytes: dynamic shared memory of a block.
        one_pass: whether reduction and gradient are one launch.
    """

    tile: int
    tiles: int
    group: int
    groups: int
    blocks: int
    parts: int
    lead: int
    hold: int
    keep: float
    shared_bytes: int
    one_pass: bool

    def runs(self, pairs_in_group: int) -> list[range]:
        """Tiles of each block in a group of that many pairs, numbered pair after pair."""
        total = pairs_in_group * self.tiles
        n = min(self.blocks, total)  # the other blocks are idle
        return [range(total * b // n, total * (b + 1) // n) for b in range(n)]

    def held_from(self, run: range) -> int:
        """First tile of a run that is kept in shared memory."""
        return max(run.start + self.lead, run.stop - (self.hold + 1) // 2)

    def held(self, run: range) -> int:
        """Sample tiles of a run that are kept in shared memory."""
        return min(self.hold, 2 * max(0, run.stop - self.held_from(run)))


class Traffic(NamedTuple):
    """What a planned call, gradient included, is expected to move. Whole tiles are counted.

    Attributes:
        floor: bytes to and from memory if policy, reference and target are read once and the gradient is written once.
        expected: the same, with what is not found again on the chip.
        held: share of the policy's and the target's bytes that shared memory holds for the gradient.
        waiting: most bytes of them that wait in the L2 cache at a time, where it keeps them all.
    """

    floor: int
    expected: float
    held: float
    waiting: int


def slots(gpu: Gpu, call: CudaCall) -> int:
    """Sample tiles whose ``d`` fits into the shared memory of one block."""
    if call.reader != VECTOR:
        return 0
    room = min(gpu.shared_bytes_per_sm // BLOCKS_PER_SM - RESERVED_BYTES, gpu.shared_bytes_per_block)
    return max(0, (room - SCRATCH_BYTES) // call.slot_bytes)


def make_plan(gpu: Gpu, call: CudaCall) -> CudaPlan:
    """Plans one call.

    Raises:
        ValueError: a sample too large for 32-bit tile numbers (from 2^40 elements on).
    """
    pairs, elements = call.pairs, call.elements
    tile = THREADS * call.vector
    tiles = -(-elements // tile)
    if 2 * tiles > 2**31 - 1:
        raise ValueError(f"a sample has {elements} elements: expected at most {(2**30 - 1) * tile}")
    most_blocks = BLOCKS_PER_SM * gpu.sms
    hold = slots(gpu, call)

    # Bytes to be found again, of one pair and of one tile of each block, and what there is room for.
    pair_bytes = elements * call.again(2)
    step_bytes = most_blocks * pair_bytes * tile // max(elements, tile)
    room = most_blocks * tile * call.again(hold) + L2_SHARE * gpu.l2_bytes

    # A group fills the chip, and half of the room: the other half is for what the estimate left out.
    group = max(1, -(-most_blocks // tiles), int(room / 2) // pair_bytes)
    group = max(1, min(group, pairs, (2**31 - 1) // tiles))
    groups = -(-pairs // group)
    group = -(-pairs // groups)  # even groups
    groups = -(-pairs // group)
    last = pairs - (groups - 1) * group
    blocks = min(most_blocks, group * tiles)
    lead = LEAD if groups > 1 else 0
    longest = -(-group * tiles // blocks)
    hold = min(hold, 2 * max(0, longest - lead))

    share = call.again(hold) / call.again(2 * longest)
    unheld = group * pair_bytes * max(0.0, 1 - share) + (step_bytes if lead else 0)
    keep = min(1.0, L2_SHARE * gpu.l2_bytes / unheld) if unheld else 1.0
    return CudaPlan(
        tile=tile,
        tiles=tiles,
        group=group,
        groups=groups,
        blocks=blocks,
        parts=min(tiles, -(-blocks // last) + 1),
        lead=lead,
        hold=hold,
        keep=keep,
        shared_bytes=SCRATCH_BYTES + (hold * call.slot_bytes if call.with_grad else 0),
        one_pass=gpu.cooperative,
    )


def traffic(plan: CudaPlan, call: CudaCall) -> Traffic:
    """What the plan expects, of a call with a reference and a gradient."""
    tile_bytes = plan.tile * call.again(2)
    held = waiting = unheld_before = 0
    for k in range(plan.groups):
        members = min(plan.group, call.pairs - k * plan.group)
        runs = plan.runs(members)
        # When a group's gradient begins, the first tiles of the next group wait as well.
        waiting = max(waiting, unheld_before + sum(min(plan.lead, len(run)) for run in runs) * tile_bytes)
        held_now = sum(call.again(plan.held(run)) for run in runs) * plan.tile
        unheld_before = members * plan.tiles * tile_bytes - held_now
        held += held_now
    waiting = max(waiting, unheld_before)
    pair_bytes = plan.tiles * tile_bytes
    once = plan.tiles * plan.tile * 4 * call.item_bytes[0]  # of a pair: the reference, and the gradient
    floor = call.pairs * (pair_bytes + once)
    missed = (1 - plan.keep) * (call.pairs * pair_bytes - held)
    return Traffic(floor, floor + missed, held / (call.pairs * pair_bytes), waiting)
