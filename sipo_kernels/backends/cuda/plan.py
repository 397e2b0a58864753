"""How the CUDA backend cuts one call into groups, tiles and blocks: a pure function of the call and the GPU.

``csrc/cuda/pair_loss.cu`` executes the plan. A pair is cut into tiles, and pairs are processed in groups: each block
reduces a run of tiles of a group and then writes their gradient. The inputs that the gradient reads again should still
be on the chip, so the plan counts their bytes.
"""

from __future__ import annotations

from typing import NamedTuple

# Of csrc/cuda/readers.h, as are the readers below; launch.py compares them when it loads the library.
THREADS = 320
BLOCKS_PER_SM = 2
SCRATCH_BYTES = 1024

# Shared memory that the hardware reserves for each block.
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
    """The properties of a GPU that a plan depends on.

    Attributes:
        sms: Number of streaming multiprocessors.
        l2_bytes: Size of the L2 cache.
        shared_bytes_per_sm: Shared memory of one multiprocessor.
        shared_bytes_per_block: The most shared memory that one block may use.
        cooperative: Whether a launch can require all of its blocks to run at the same time.
    """

    sms: int
    l2_bytes: int
    shared_bytes_per_sm: int
    shared_bytes_per_block: int
    cooperative: bool = True


class CudaCall(NamedTuple):
    """The properties of a call that a plan depends on.

    Attributes:
        pairs: B.
        elements: D, the elements of one sample.
        item_bytes: Bytes of one element of the predictions, and of the target.
        reader: ``VECTOR``, ``MIXED`` or ``ANY``.
        shared_target: Whether the chosen and the rejected sample share the target.
        with_grad: Whether the gradient is made too. The sums do not depend on it.
        error_mask_bytes: Bytes of one weight of the error mask; 0 without one. With one, VECTOR does not read.
        shared_error_mask: Whether the chosen and the rejected sample share it.
    """

    pairs: int
    elements: int
    item_bytes: tuple[int, int]
    reader: int
    shared_target: bool = False
    with_grad: bool = True
    error_mask_bytes: int = 0
    shared_error_mask: bool = False

    @property
    def vector(self) -> int:
        """The number of elements of a sample that a thread processes at a time."""
        return ELEMENTS.get(self.reader, 16 // self.item_bytes[0])

    @property
    def slot_bytes(self) -> int:
        """Bytes of shared memory for the ``d`` of a sample tile, in the type that the gradient is computed in."""
        return THREADS * self.vector * (8 if 8 in self.item_bytes else 4)

    def again(self, samples: int) -> int:
        """Returns the bytes of policy, target and error mask that the gradient reads again, for one element.

        Of so many samples, in the order chosen, rejected, chosen, ... What a pair shares is read again for the rejected
        sample.
        """
        policy, target = self.item_bytes
        targets = samples // 2 if self.shared_target else samples
        masks = samples // 2 if self.shared_error_mask else samples
        return samples * policy + targets * target + masks * self.error_mask_bytes


class CudaPlan(NamedTuple):
    """How one call is cut up.

    Attributes:
        tile: Elements of one sample in one tile.
        tiles: Tiles of a pair.
        group: Pairs that are reduced together before their gradient is written.
        groups: Number of groups; the last may be smaller.
        blocks: Thread blocks of the launch.
        parts: The most blocks that share one pair, and so the most partial sums of it.
        lead: Tiles of the next group that a block reduces before it writes this group's gradient.
        hold: Sample tiles whose ``d`` a block keeps in shared memory.
        keep: Fraction of the other cache lines that the L2 cache is asked to keep.
        shared_bytes: Dynamic shared memory of a block.
        one_pass: Whether reduction and gradient are one launch.
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
        """Returns the tiles of each block, in a group of that many pairs; tiles are numbered pair by pair."""
        total = pairs_in_group * self.tiles
        n = min(self.blocks, total)  # the other blocks are idle
        return [range(total * b // n, total * (b + 1) // n) for b in range(n)]

    def held_from(self, run: range) -> int:
        """Returns the first tile of a run that is kept in shared memory."""
        return max(run.start + self.lead, run.stop - (self.hold + 1) // 2)

    def held(self, run: range) -> int:
        """Returns how many sample tiles of a run are kept in shared memory."""
        return min(self.hold, 2 * max(0, run.stop - self.held_from(run)))


class Traffic(NamedTuple):
    """The memory traffic that a plan expects of a call with gradient, in whole tiles.

    Attributes:
        floor: Bytes to and from memory if every input is read once and the gradient is written once.
        expected: The same, plus what has to be read from memory a second time.
        held: Share of the policy's and the target's bytes that shared memory holds for the gradient.
        waiting: The most bytes of policy and target that wait in the L2 cache at a time, if it keeps them all.
    """

    floor: int
    expected: float
    held: float
    waiting: int


def slots(gpu: Gpu, call: CudaCall) -> int:
    """Returns how many sample tiles' ``d`` fit into the shared memory of one block."""
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

    # Bytes that are read again, of one pair and of one tile of each block, and how many of them fit on the chip.
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
    """Returns the traffic of a planned call that has a reference and a gradient."""
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
