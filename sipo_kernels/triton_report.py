"""What a batch reports (docs/math.md §8), in Triton: its metrics, and its sums by noise level.

The twin of ``csrc/report.h`` and ``output.py``. The program that finishes a pair records its numbers, unrounded; one
program makes the batch's numbers of all the records at the end, in a fixed order.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from sipo_kernels.contract import METHODS, METRICS, STATISTICS
from sipo_kernels.triton_math import widen

DIFFUSION_DPO = tl.constexpr(METHODS.index("diffusion_dpo"))
# A pair's facts are a row of these columns. What each metric sums up:
LOSS = tl.constexpr(METRICS.index("loss"))
IMPLICIT_ACC = tl.constexpr(METRICS.index("implicit_acc"))
MODEL_MSE = tl.constexpr(METRICS.index("model_mse"))
REF_MSE = tl.constexpr(METRICS.index("ref_mse"))
REWARD_MARGIN = tl.constexpr(METRICS.index("reward_margin"))
WIN_GAP = tl.constexpr(METRICS.index("win_gap"))
LOSE_GAP = tl.constexpr(METRICS.index("lose_gap"))
WEIGHT_MEAN = tl.constexpr(METRICS.index("weight_mean"))
CLIP_FRACTION = tl.constexpr(METRICS.index("clip_fraction"))
ACTIVE_FRACTION = tl.constexpr(METRICS.index("active_fraction"))
NONFINITE_PAIRS = tl.constexpr(METRICS.index("nonfinite_pairs"))
# ... the pairs that the means are over,
COUNTED = tl.constexpr(len(METRICS))
# ... the sums by noise level, which begin with count and nonfinite,
FIRST = tl.constexpr(len(METRICS) + 1)
MODEL_ERROR_W = tl.constexpr(FIRST.value + STATISTICS.index("model_error_winner"))
MODEL_ERROR_L = tl.constexpr(FIRST.value + STATISTICS.index("model_error_loser"))
REF_ERROR_W = tl.constexpr(FIRST.value + STATISTICS.index("ref_error_winner"))
REF_ERROR_L = tl.constexpr(FIRST.value + STATISTICS.index("ref_error_loser"))
GAP_W = tl.constexpr(FIRST.value + STATISTICS.index("win_gap"))
GAP_L = tl.constexpr(FIRST.value + STATISTICS.index("lose_gap"))
RATIO = tl.constexpr(FIRST.value + STATISTICS.index("ratio"))
WEIGHT = tl.constexpr(FIRST.value + STATISTICS.index("weight"))
CLIPPED = tl.constexpr(FIRST.value + STATISTICS.index("clipped"))
ACTIVE = tl.constexpr(FIRST.value + STATISTICS.index("active"))
LOGITS = tl.constexpr(FIRST.value + STATISTICS.index("logits"))
LOGITS_SQ = tl.constexpr(FIRST.value + STATISTICS.index("logits_sq"))
CORRECT = tl.constexpr(FIRST.value + STATISTICS.index("implicit_acc"))
COEF = tl.constexpr(FIRST.value + STATISTICS.index("coef"))
COEF_SQ = tl.constexpr(FIRST.value + STATISTICS.index("coef_sq"))
GRAD_SQ = tl.constexpr(FIRST.value + STATISTICS.index("grad_sq"))
# ... and the pair's bin.
BIN = tl.constexpr(FIRST.value + len(STATISTICS))
WIDTH = tl.constexpr(32)
ROWS = tl.constexpr(8)  # pairs at a time
# Rows of the records, each [B]: of winner and loser error, reference error, gap, ratio, weight and coefficient, in this
# order, and of the pair:
PAIR_LOGITS = tl.constexpr(12)
PAIR_LOSS = tl.constexpr(13)
PAIR_ACTIVE = tl.constexpr(14)
RECORD = 15


@triton.jit
def store_record(records, pair, pairs, error, ref_err, gap, ratio, weight, coef, z, pair_loss, active):
    """Keeps a pair's numbers for :func:`report`. Vectors are [winner, loser]."""
    at = records + pair + tl.arange(0, 2) * pairs
    tl.store(at, error)
    tl.store(at + 2 * pairs, ref_err)
    tl.store(at + 4 * pairs, gap)
    tl.store(at + 6 * pairs, ratio)
    tl.store(at + 8 * pairs, weight)
    tl.store(at + 10 * pairs, coef)
    tl.store(records + PAIR_LOGITS * pairs + pair, z)
    tl.store(records + PAIR_LOSS * pairs + pair, pair_loss)
    tl.store(records + PAIR_ACTIVE * pairs + pair, active.to(tl.float64))


@triton.jit
def _facts(
    records,
    timesteps,
    pair,  # [ROWS, 1]
    pairs,
    unit,  # §8: what frees a coefficient of sizes
    clip_min,
    clip_max,
    timestep_stride,
    bins,
    top,
    METHOD: tl.constexpr,
    SKIP: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """``[ROWS, WIDTH]``: what these pairs add to each sum. Zeros for a pair that there is not."""
    inside = pair < pairs
    at = records + pair
    # .cg: past the first-level cache, which is not coherent with what other programs just wrote.
    error_w = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    error_l = tl.load(at + pairs, mask=inside, other=0.0, cache_modifier=".cg")
    ref_w = tl.load(at + 2 * pairs, mask=inside, other=0.0, cache_modifier=".cg")
    ref_l = tl.load(at + 3 * pairs, mask=inside, other=0.0, cache_modifier=".cg")
    gap_w = tl.load(at + 4 * pairs, mask=inside, other=0.0, cache_modifier=".cg")
    gap_l = tl.load(at + 5 * pairs, mask=inside, other=0.0, cache_modifier=".cg")
    ratio_w = tl.load(at + 6 * pairs, mask=inside, other=0.0, cache_modifier=".cg")
    ratio_l = tl.load(at + 7 * pairs, mask=inside, other=0.0, cache_modifier=".cg")
    weight_w = tl.load(at + 8 * pairs, mask=inside, other=0.0, cache_modifier=".cg")
    weight_l = tl.load(at + 9 * pairs, mask=inside, other=0.0, cache_modifier=".cg")
    z = tl.load(at + PAIR_LOGITS * pairs, mask=inside, other=0.0, cache_modifier=".cg")
    pair_loss = tl.load(at + PAIR_LOSS * pairs, mask=inside, other=0.0, cache_modifier=".cg")
    active = tl.load(at + PAIR_ACTIVE * pairs, mask=inside, other=0.0, cache_modifier=".cg")

    weight = 0.5 * (weight_w + weight_l)
    correct = tl.where(z > 0, 1.0, tl.where(z == 0, 0.5, 0.0))  # a tie counts one half
    if METHOD == DIFFUSION_DPO:
        clipped = 0.0 * active
    else:
        clipped = 0.5 * ((ratio_w < clip_min) | (ratio_w > clip_max)).to(tl.float64)
        clipped += 0.5 * ((ratio_l < clip_min) | (ratio_l > clip_max)).to(tl.float64)
    nothing = 0.0 * error_w + 0.0 * error_l + 0.0 * gap_w + 0.0 * gap_l + 0.0 * z  # NaN where one is not finite
    whole = (nothing == 0) & inside
    counted = whole if SKIP else inside  # means are over finite pairs alone where the others are skipped

    column = tl.arange(0, WIDTH)[None, :]
    facts = tl.where(column == IMPLICIT_ACC, correct, tl.full([ROWS, WIDTH], 0.0, tl.float64))
    facts = tl.where(column == MODEL_MSE, 0.5 * (error_w + error_l), facts)
    facts = tl.where(column == REF_MSE, 0.5 * (ref_w + ref_l), facts)
    facts = tl.where(column == REWARD_MARGIN, z, facts)
    facts = tl.where(column == WIN_GAP, gap_w, facts)
    facts = tl.where(column == LOSE_GAP, gap_l, facts)
    facts = tl.where(column == WEIGHT_MEAN, weight, facts)
    facts = tl.where(column == CLIP_FRACTION, clipped, facts)
    facts = tl.where(counted, facts, 0.0)
    facts = tl.where(column == LOSS, pair_loss, facts)
    facts = tl.where(column == ACTIVE_FRACTION, active, facts)
    facts = tl.where(column == NONFINITE_PAIRS, (inside & ~whole).to(tl.float64), facts)
    facts = tl.where(column == COUNTED, counted.to(tl.float64), facts)
    if LEVELS:
        k_w = unit * tl.load(at + 10 * pairs, mask=inside, other=0.0, cache_modifier=".cg")
        k_l = unit * tl.load(at + 11 * pairs, mask=inside, other=0.0, cache_modifier=".cg")
        facts = tl.where(column == MODEL_ERROR_W, error_w, facts)
        facts = tl.where(column == MODEL_ERROR_L, error_l, facts)
        facts = tl.where(column == REF_ERROR_W, ref_w, facts)
        facts = tl.where(column == REF_ERROR_L, ref_l, facts)
        facts = tl.where(column == GAP_W, gap_w, facts)
        facts = tl.where(column == GAP_L, gap_l, facts)
        facts = tl.where(column == RATIO, 0.5 * (ratio_w + ratio_l), facts)
        facts = tl.where(column == WEIGHT, weight, facts)
        facts = tl.where(column == CLIPPED, clipped, facts)
        facts = tl.where(column == ACTIVE, active, facts)
        facts = tl.where(column == LOGITS, z, facts)
        facts = tl.where(column == LOGITS_SQ, z * z, facts)
        facts = tl.where(column == CORRECT, correct, facts)
        facts = tl.where(column == COEF, k_w, facts)
        facts = tl.where(column == COEF_SQ, k_w * k_w, facts)
        facts = tl.where(column == GRAD_SQ, k_w * k_w * error_w + k_l * k_l * error_l, facts)
        # A pair with a number that is not finite in float32 counts, and adds nothing else.
        statistics = tl.where(column < FIRST, 0.0, facts.to(tl.float32))
        fits = (tl.sum(0.0 * statistics, 1) == 0)[:, None]
        facts = tl.where(fits | (column < FIRST), facts, 0.0)
        facts = tl.where(column == FIRST, (fits & inside).to(tl.float64), facts)
        facts = tl.where(column == FIRST + 1, (inside & ~fits).to(tl.float64), facts)
        timestep = widen(tl.load(timesteps + pair.to(tl.int64) * timestep_stride, mask=inside, other=0), tl.float64)
        place = (timestep * bins / top).to(tl.float32)  # of σ in float32, its own type; NaN: 0
        place = tl.where(place >= 0, tl.where(place < bins, place, bins - 1), 0.0)
        facts = tl.where(column == BIN, place.to(tl.int32).to(tl.float64), facts)
    return facts


@triton.jit
def _add_levels(levels, facts, count, bins):
    """Adds so many rows of ``facts`` to their bins, one after another.

    Each row works out what its bin holds in the end: those of the same bin come to the same number and all store it.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    bin_of = tl.sum(tl.where(column == BIN, facts, 0.0), 1).to(tl.int32)[:, None]
    at = levels + (column - FIRST) * bins + bin_of
    inside = (row < count) & (column >= FIRST) & (column < BIN)
    total = tl.load(at, mask=inside, other=0.0)
    for i in range(count):
        one = tl.sum(tl.where(row == i, facts, 0.0), 0)[None, :]
        its_bin = tl.sum(tl.where(row == i, bin_of, 0), 0)[None, :]
        total += tl.where(its_bin == bin_of, one.to(tl.float32), 0.0)
    tl.debug_barrier()  # until every thread has read what the others overwrite
    tl.store(at, total, mask=inside)
    tl.debug_barrier()


@triton.jit
def report(
    records,
    timesteps,
    numbers,
    loss,
    metrics,
    levels,
    pairs,
    elements,
    beta,
    loss_scale,
    clip_min,
    clip_max,
    timestep_stride,
    bins,
    top,
    METHOD: tl.constexpr,
    SKIP: tl.constexpr,
    PER_PAIR: tl.constexpr,
    METRICS_TOO: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """The batch's numbers, written and added to the running sums, once all pairs are recorded."""
    column = tl.arange(0, WIDTH)
    sums = tl.full([WIDTH], 0.0, tl.float64)
    unit = (tl.full([], 0.0, tl.float64) + elements) / (beta * loss_scale)
    for first in range(0, pairs, ROWS):
        facts = _facts(
            records,
            timesteps,
            first + tl.arange(0, ROWS)[:, None],
            pairs,
            unit,
            clip_min,
            clip_max,
            timestep_stride,
            bins,
            top,
            METHOD,
            SKIP,
            LEVELS,
        )
        sums += tl.sum(facts, 0)
        if LEVELS:
            _add_levels(levels, facts, min(pairs - first, ROWS), bins)
    counted = tl.sum(tl.where(column == COUNTED, sums, 0.0), 0)
    value = tl.where(counted > 0, sums / tl.where(counted > 0, counted, 1.0), 0.0)
    value = tl.where(column == LOSS, sums / pairs if PER_PAIR else sums * loss_scale, value)
    value = tl.where(column == ACTIVE_FRACTION, sums / pairs, value)
    value = tl.where(column == NONFINITE_PAIRS, sums, value)
    tl.store(numbers + column, value, mask=column < COUNTED)
    if not PER_PAIR:
        tl.store(loss + column, value, mask=column == LOSS)
    if METRICS_TOO:
        single = value.to(tl.float32)
        kept = (column < COUNTED) & (single - single == 0)
        at = metrics + column
        tl.store(at, tl.load(at, mask=kept) + single, mask=kept)
        tl.store(at + COUNTED, tl.load(at + COUNTED, mask=kept) + 1.0, mask=kept)
