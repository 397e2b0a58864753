"""How the Triton backend divides a batch: a pure function of shapes, item sizes and two numbers of the device.

The work is cut into **items**, one part of one sample, in the order (pair, part, chosen sample or rejected sample).
There are two things to do for each item: reduce it (errors, §2) and write its gradient (§6), and the gradient of a pair
can start only when all of the pair is reduced. The schedule is a list of **steps**, handed out one by one:

    step s:  reduce item s                           for s < items
             then write the gradient of item s − distance   for s ≥ distance

With ``distance ≥ items of a pair`` a gradient depends on reductions of its own or earlier steps alone. Between the two
visits of an item lie ``distance`` items: the smaller, the surer the second visit finds policy and target in the L2
cache; the larger, the surer the pair's arithmetic is done by then. Hence one pair and a ``lead``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

# A tile of the widest input: four 16-byte loads a thread, all in flight at a time.
TILE_BYTES = 8192
# Tiles of a part where there are enough of them: what an item costs beyond its loads (a step drawn, three sums over the
# threads, a count) is shared by so many.
TILES = 2
# Parts of a sample. Fixed by the shape alone, so that the same input gives the same bits on any device; never more than
# one program can add up quickly.
MAX_PARTS = 512
# Programs of 4 warps with at most 128 registers a thread: a multiprocessor of 65,536 registers runs four at a time.
WARPS = 4
REGISTERS = 128
PROGRAMS_PER_PROCESSOR = 4
# Share of the L2 cache that policy and target may fill between their two visits. The rest is for the reference and the
# gradient, which stream through, and for lines that a cache in two halves holds twice.
L2_SHARE = 0.5


class DeviceSpec(NamedTuple):
    """The properties of a device that a schedule depends on: bytes of L2 cache, and number of multiprocessors."""

    l2_bytes: int
    processors: int


class TritonPlan(NamedTuple):
    """How one batch is cut up; the module's docstring explains the terms.

    Attributes:
        parts: Parts of a sample.
        tiles: Tiles of ``block`` elements in a part.
        programs: Size of the grid.
        distance: Steps between an item's reduction and its gradient.
        keep: The cache is asked to keep the last ``keep`` items of each pair: all of them if they fit. If they do not,
            gradients are written from the last item to the first, so that the cached ones come first.
    """

    parts: int
    tiles: int
    programs: int
    distance: int
    keep: int


# For Triton's interpreter: small enough that tests reach every case of the plan.
INTERPRETER = DeviceSpec(l2_bytes=1 << 18, processors=1)
# For GPUs whose properties torch does not report: torch.xpu has none for the cache.
UNKNOWN = DeviceSpec(l2_bytes=16 << 20, processors=64)
# Tests set it.
DEVICE_OVERRIDE: DeviceSpec | None = None


@lru_cache
def _device(device: torch.device) -> DeviceSpec:
    if device.type == "cuda":  # and AMD's
        found = torch.cuda.get_device_properties(device)
        return DeviceSpec(found.L2_cache_size, found.multi_processor_count)
    return INTERPRETER if device.type == "cpu" else UNKNOWN


def device_of(tensor: torch.Tensor) -> DeviceSpec:
    """Returns the properties of a tensor's device, which are queried once, or ``DEVICE_OVERRIDE`` if that is set."""
    return DEVICE_OVERRIDE or _device(tensor.device)


def block(sums: torch.dtype, *inputs: torch.Tensor | None, error_mask: torch.Tensor | None = None) -> int:
    """Returns the elements of a tile: at most half as many where two-byte inputs are summed in float64.

    These sums take twice the registers, and so does an error mask.
    """
    width = sums.itemsize // 2 if error_mask is None else sums.itemsize
    return TILE_BYTES // max(width, *(0 if t is None else t.element_size() for t in inputs))


def kept_bytes(model: torch.Tensor, target: torch.Tensor, error_mask: torch.Tensor | None = None) -> int:
    """Returns the bytes of policy, target and error mask for one element of a pair; what is shared counts once."""
    inputs = (model, target) if error_mask is None else (model, target, error_mask)
    return sum((2 if t.shape[0] == model.shape[0] else 1) * t.element_size() for t in inputs)


def split(elements: int, block: int) -> tuple[int, int]:
    """Returns the parts of a sample, and the tiles of ``block`` elements in each part."""
    blocks = -(-elements // block)
    tiles = max(min(blocks, TILES), -(-blocks // MAX_PARTS))
    return -(-blocks // tiles), tiles


@lru_cache
def plan(pairs: int, elements: int, block: int, kept_bytes: int, device: DeviceSpec) -> TritonPlan:
    """Makes the schedule of one batch.

    Args:
        pairs: ``B``.
        elements: ``D``, the elements of one sample.
        block: Elements of a tile.
        kept_bytes: See :func:`kept_bytes`.
        device: Properties of the device.
    """
    parts, tiles = split(elements, block)
    per_pair = 2 * parts
    items = pairs * per_pair
    programs = min(items, PROGRAMS_PER_PROCESSOR * device.processors)
    assert 2 * items + programs < 2**31, "steps are counted in 32 bits"
    # How many items the cache holds at a time.
    room = int(L2_SHARE * device.l2_bytes) * 2 // (min(tiles * block, elements) * kept_bytes)
    # A round of all programs takes longer than a pair's arithmetic, half of one about as long. Within these bounds the
    # lead is what keeps most: |room − per_pair| costs nothing, see `keep`.
    most, least = -(-3 * programs // 4), -(-programs // 4)
    lead = min(most, max(least, abs(room - per_pair)))
    # Kept at a time: the pair's own `keep`, and what the lead has reached of the next pair's last `keep` items.
    keep = max(0, min(per_pair, room, (room + per_pair - lead) // 2))
    return TritonPlan(parts, tiles, programs, min(per_pair + lead, items), keep)
