"""How the CUDA backend cuts one call into groups, tiles and blocks: a pure function of the shape and the GPU.

The words are those of ``csrc/cuda/pair_loss.cu``, which carries the plan out: a pair is cut into tiles, pairs go
through in groups, and each block reduces a run of tiles of a group and then comes back for their gradient. What it
comes back for should still be on the chip: the plan counts the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

# Of csrc/cuda/pair_loss.cu.
THREADS = 320
SCRATCH_BYTES = 1024
SLOT_BYTES = 32 * THREADS  # one sample tile: 16 bytes of policy and of target for each thread

# What the hardware keeps of shared memory for each block.
RESERVED_BYTES = 1024
# Part of the L2 cache that a call may count on. An estimate: the reference and the gradient pass through the rest, and
# on large chips the cache is two halves.
L2_SHARE = 0.6
# Tiles that each block reduces of the next group while this group's coefficients are worked out. One is 2 to 5
# microseconds of memory traffic on the GPUs of today, longer than the arithmetic of a group takes.
LEAD = 1

# How a kernel reads its tensors: csrc/cuda/readers.h.
SAME, MIXED, ANY = range(3)
BLOCKS_PER_SM = {SAME: 2, MIXED: 1, ANY: 2}


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


class Plan(NamedTuple):
    """One call, planned.

    Attributes:
        reader: ``SAME``, ``MIXED`` or ``ANY``.
        tile: elements of one sample in one tile.
        tiles: tiles of a pair.
        group: pairs that are reduced together before their gradient is written.
        groups: how many groups that makes; the last may be smaller.
        blocks: thread blocks of the launch.
        parts: most blocks that share one pair, and so partial sums of it.
        lead: tiles of the next group that a block reduces before this group's gradient.
        hold: sample tiles that a block keeps in shared memory.
        keep: fraction of the remaining lines that the L2 cache is asked to keep.
        shared_bytes: dynamic shared memory of a block.
        one_pass: whether reduction and gradient are one launch.
    """

    reader: int
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
        """First tile of a run, counted from its begin, that is kept in shared memory."""
        return max(self.lead, len(run) - (self.hold + 1) // 2)


def slots(gpu: Gpu, reader: int) -> int:
    """Sample tiles that fit into the shared memory of one block."""
    if reader != SAME:
        return 0
    room = min(gpu.shared_bytes_per_sm // BLOCKS_PER_SM[reader] - RESERVED_BYTES, gpu.shared_bytes_per_block)
    return max(0, (room - SCRATCH_BYTES) // SLOT_BYTES)


def make_plan(
    gpu: Gpu,
    *,
    pairs: int,
    elements: int,
    item_bytes: tuple[int, int],
    reader: int,
    shared_target: bool = False,
    with_grad: bool = True,
) -> Plan:
    """Plans one call.

    Args:
        gpu: the device.
        pairs: B.
        elements: D, elements of one sample.
        item_bytes: bytes of one element of policy and target, the tensors that are read twice.
        reader: ``SAME``, ``MIXED`` or ``ANY``.
        shared_target: whether both halves of a pair share the target.
        with_grad: whether the gradient is made too. It changes how the pass goes on, never which sums are made.

    Raises:
        ValueError: a sample too large for 32-bit tile numbers (from 2^40 elements on).
    """
    vector = {SAME: 16 // item_bytes[0], MIXED: 4, ANY: 1}[reader]
    tile = THREADS * vector
    tiles = -(-elements // tile)
    if 2 * tiles > 2**31 - 1:
        raise ValueError(f"a sample has {elements} elements: expected at most {(2**30 - 1) * tile}")
    most_blocks = BLOCKS_PER_SM[reader] * gpu.sms
    hold = slots(gpu, reader)

    # Bytes to be found again, of one pair and of one tile of each block, and the room for them.
    pair_bytes = elements * (2 * item_bytes[0] + (1 if shared_target else 2) * item_bytes[1])
    step_bytes = most_blocks * pair_bytes * tile // max(elements, tile)
    held_bytes = most_blocks * hold * SLOT_BYTES
    room = held_bytes + L2_SHARE * gpu.l2_bytes

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

    unheld = group * pair_bytes * max(0, 2 * longest - hold) / (2 * longest) + (step_bytes if lead else 0)
    keep = min(1.0, L2_SHARE * gpu.l2_bytes / unheld) if unheld else 1.0
    return Plan(
        reader=reader,
        tile=tile,
        tiles=tiles,
        group=group,
        groups=groups,
        blocks=blocks,
        parts=min(tiles, -(-blocks // last) + 1),
        lead=lead,
        hold=hold,
        keep=keep,
        shared_bytes=SCRATCH_BYTES + (hold * SLOT_BYTES if with_grad else 0),
        one_pass=gpu.cooperative,
    )
