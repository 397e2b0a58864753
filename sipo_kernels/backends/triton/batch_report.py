"""The report of a batch (docs/math.md §8) in Triton: its metrics, and its sums by noise level.

``csrc/report.h`` and ``output.py`` compute the same. The program that finishes a pair records its numbers, unrounded;
at the end one program makes the batch's numbers from all records, in a fixed order.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from sipo_kernels.backends.triton.math import widen
from sipo_kernels.options import METHODS
from sipo_kernels.output import METRICS, STATISTICS

DIFFUSION_DPO = tl.constexpr(METHODS.index("diffusion_dpo"))
# Columns of the metrics' sums; behind them, the pairs that the means are over.
LOSS = tl.constexpr(METRICS.index("loss"))
REWARDS_CHOSEN = tl.constexpr(METRICS.index("rewards/chosen"))
REWARDS_REJECTED = tl.constexpr(METRICS.index("rewards/rejected"))
ACCURACIES = tl.constexpr(METRICS.index("rewards/accuracies"))
MODEL_MSE = tl.constexpr(METRICS.index("model_mse"))
REF_MSE = tl.constexpr(METRICS.index("ref_mse"))
MARGINS = tl.constexpr(METRICS.index("rewards/margins"))
CHOSEN_GAP = tl.constexpr(METRICS.index("chosen_gap"))
REJECTED_GAP = tl.constexpr(METRICS.index("rejected_gap"))
WEIGHT_MEAN = tl.constexpr(METRICS.index("weight_mean"))
CLIP_FRACTION = tl.constexpr(METRICS.index("clip_fraction"))
ACTIVE_FRACTION = tl.constexpr(METRICS.index("active_fraction"))
NONFINITE_PAIRS = tl.constexpr(METRICS.index("nonfinite_pairs"))
COUNTED = tl.constexpr(len(METRICS))
METRIC_COLUMNS = tl.constexpr(16)
# Rows of the sums by noise level.
LEVEL_COUNT = tl.constexpr(STATISTICS.index("count"))
LEVEL_NONFINITE = tl.constexpr(STATISTICS.index("nonfinite"))
LEVEL_MODEL_ERROR_CHOSEN = tl.constexpr(STATISTICS.index("model_error_chosen"))
LEVEL_MODEL_ERROR_REJECTED = tl.constexpr(STATISTICS.index("model_error_rejected"))
LEVEL_REF_ERROR_CHOSEN = tl.constexpr(STATISTICS.index("ref_error_chosen"))
LEVEL_REF_ERROR_REJECTED = tl.constexpr(STATISTICS.index("ref_error_rejected"))
LEVEL_CHOSEN_GAP = tl.constexpr(STATISTICS.index("chosen_gap"))
LEVEL_REJECTED_GAP = tl.constexpr(STATISTICS.index("rejected_gap"))
LEVEL_RATIO = tl.constexpr(STATISTICS.index("ratio"))
LEVEL_WEIGHT = tl.constexpr(STATISTICS.index("weight"))
LEVEL_CLIPPED = tl.constexpr(STATISTICS.index("clipped"))
LEVEL_ACTIVE = tl.constexpr(STATISTICS.index("active"))
LEVEL_LOGITS = tl.constexpr(STATISTICS.index("logits"))
LEVEL_LOGITS_SQ = tl.constexpr(STATISTICS.index("logits_sq"))
LEVEL_ACCURACY = tl.constexpr(STATISTICS.index("accuracy"))
LEVEL_COEF = tl.constexpr(STATISTICS.index("coef"))
LEVEL_COEF_SQ = tl.constexpr(STATISTICS.index("coef_sq"))
LEVEL_GRAD_SQ = tl.constexpr(STATISTICS.index("grad_sq"))
STATISTIC_COUNT = tl.constexpr(len(STATISTICS))
STATISTIC_COLUMNS = tl.constexpr(32)
ROWS = tl.constexpr(8)  # pairs at a time: few, for a thread holds all numbers of the pairs whose columns it makes
# A pair's record, rows of [RECORD, B]. Each number of a sample takes two rows: the chosen sample's, then the
# rejected's. With an error mask, coef is that of §6 times Σw.
_OF_SAMPLES = ("model_error", "ref_error", "error_gap", "ratio", "weight", "reward", "coef")
_OF_PAIR = ("logits", "loss", "active", "finite")
MODEL_ERROR = tl.constexpr(2 * _OF_SAMPLES.index("model_error"))
REF_ERROR = tl.constexpr(2 * _OF_SAMPLES.index("ref_error"))
ERROR_GAP = tl.constexpr(2 * _OF_SAMPLES.index("error_gap"))
RATIO = tl.constexpr(2 * _OF_SAMPLES.index("ratio"))
WEIGHT = tl.constexpr(2 * _OF_SAMPLES.index("weight"))
REWARD = tl.constexpr(2 * _OF_SAMPLES.index("reward"))
COEF = tl.constexpr(2 * _OF_SAMPLES.index("coef"))
PAIR_LOGITS = tl.constexpr(2 * len(_OF_SAMPLES) + _OF_PAIR.index("logits"))
PAIR_LOSS = tl.constexpr(2 * len(_OF_SAMPLES) + _OF_PAIR.index("loss"))
PAIR_ACTIVE = tl.constexpr(2 * len(_OF_SAMPLES) + _OF_PAIR.index("active"))
PAIR_FINITE = tl.constexpr(2 * len(_OF_SAMPLES) + _OF_PAIR.index("finite"))
RECORD = 2 * len(_OF_SAMPLES) + len(_OF_PAIR)


@triton.jit
def store_record(records, pair, pairs, error, ref_err, gap, ratio, weight, reward, coef, z, pair_loss, active, whole):
    """Stores a pair's numbers for :func:`report`. Vectors are [chosen, rejected]."""
    at = records + pair + tl.arange(0, 2) * pairs
    tl.store(at + MODEL_ERROR * pairs, error)
    tl.store(at + REF_ERROR * pairs, ref_err)
    tl.store(at + ERROR_GAP * pairs, gap)
    tl.store(at + RATIO * pairs, ratio)
    tl.store(at + WEIGHT * pairs, weight)
    tl.store(at + REWARD * pairs, reward)
    tl.store(at + COEF * pairs, coef)
    tl.store(records + PAIR_LOGITS * pairs + pair, z)
    tl.store(records + PAIR_LOSS * pairs + pair, pair_loss)
    tl.store(records + PAIR_ACTIVE * pairs + pair, active.to(tl.float64))
    tl.store(records + PAIR_FINITE * pairs + pair, whole.to(tl.float64))


@triton.jit
def _clipped(ratio_w, ratio_l, clip_min, clip_max, METHOD: tl.constexpr):
    if METHOD == DIFFUSION_DPO:
        return tl.full([ROWS, 1], 0.0, tl.float64)
    clipped_w = ((ratio_w < clip_min) | (ratio_w > clip_max)).to(tl.float64)
    clipped_l = ((ratio_l < clip_min) | (ratio_l > clip_max)).to(tl.float64)
    return 0.5 * (clipped_w + clipped_l)


@triton.jit
def _correct(z):  # a tie counts one half
    return tl.where(z > 0, 1.0, tl.where(z == 0, 0.5, 0.0))


@triton.jit
def _load(records, row: tl.constexpr, pair, pairs):
    """Loads one row of these pairs' records, past the first-level cache, which does not see other programs' stores."""
    return tl.load(records + row * pairs + pair, mask=pair < pairs, other=0.0, cache_modifier=".cg")


@triton.jit
def _of_samples(records, row: tl.constexpr, pair, pairs):
    """Loads one number of these pairs' samples; returns the chosen and the rejected samples' numbers."""
    return _load(records, row, pair, pairs), _load(records, row + 1, pair, pairs)


@triton.jit
def _metrics(records, pair, pairs, clip_min, clip_max, METHOD: tl.constexpr, SKIP: tl.constexpr):
    """Returns what these pairs, ``[ROWS, 1]``, add to each metric's sum: ``[ROWS, METRIC_COLUMNS]``."""
    inside = pair < pairs
    error_w, error_l = _of_samples(records, MODEL_ERROR, pair, pairs)
    ref_w, ref_l = _of_samples(records, REF_ERROR, pair, pairs)
    gap_w, gap_l = _of_samples(records, ERROR_GAP, pair, pairs)
    ratio_w, ratio_l = _of_samples(records, RATIO, pair, pairs)
    weight_w, weight_l = _of_samples(records, WEIGHT, pair, pairs)
    reward_w, reward_l = _of_samples(records, REWARD, pair, pairs)
    z = _load(records, PAIR_LOGITS, pair, pairs)
    pair_loss = _load(records, PAIR_LOSS, pair, pairs)
    active = _load(records, PAIR_ACTIVE, pair, pairs)
    whole = _load(records, PAIR_FINITE, pair, pairs) > 0
    counted = whole if SKIP else inside  # means are over finite pairs alone where the others are skipped
    column = tl.arange(0, METRIC_COLUMNS)[None, :]
    x = tl.where(column == ACCURACIES, _correct(z), tl.full([ROWS, METRIC_COLUMNS], 0.0, tl.float64))
    x = tl.where(column == MODEL_MSE, 0.5 * (error_w + error_l), x)
    x = tl.where(column == REF_MSE, 0.5 * (ref_w + ref_l), x)
    x = tl.where(column == REWARDS_CHOSEN, reward_w, tl.where(column == REWARDS_REJECTED, reward_l, x))
    x = tl.where(column == MARGINS, z, x)
    x = tl.where(column == CHOSEN_GAP, gap_w, tl.where(column == REJECTED_GAP, gap_l, x))
    x = tl.where(column == WEIGHT_MEAN, 0.5 * (weight_w + weight_l), x)
    x = tl.where(column == CLIP_FRACTION, _clipped(ratio_w, ratio_l, clip_min, clip_max, METHOD), x)
    x = tl.where(counted, x, 0.0)
    x = tl.where(column == LOSS, pair_loss, x)
    x = tl.where(column == ACTIVE_FRACTION, active, x)
    x = tl.where(column == NONFINITE_PAIRS, (inside & ~whole).to(tl.float64), x)
    return tl.where(column == COUNTED, counted.to(tl.float64), x)


@triton.jit
def _statistics(records, pair, pairs, unit, clip_min, clip_max, METHOD: tl.constexpr):
    """Returns what these pairs add to their bins: ``[ROWS, STATISTIC_COLUMNS]`` float32.

    A pair with a number that is not finite in float32 adds to ``nonfinite`` alone.
    """
    error_w, error_l = _of_samples(records, MODEL_ERROR, pair, pairs)
    ref_w, ref_l = _of_samples(records, REF_ERROR, pair, pairs)
    gap_w, gap_l = _of_samples(records, ERROR_GAP, pair, pairs)
    ratio_w, ratio_l = _of_samples(records, RATIO, pair, pairs)
    weight_w, weight_l = _of_samples(records, WEIGHT, pair, pairs)
    coef_w, coef_l = _of_samples(records, COEF, pair, pairs)
    z = _load(records, PAIR_LOGITS, pair, pairs)
    active = _load(records, PAIR_ACTIVE, pair, pairs)
    k_w, k_l = unit * coef_w, unit * coef_l
    column = tl.arange(0, STATISTIC_COLUMNS)[None, :]
    x = tl.full([ROWS, STATISTIC_COLUMNS], 0.0, tl.float64)
    x = tl.where(
        column == LEVEL_MODEL_ERROR_CHOSEN, error_w, tl.where(column == LEVEL_MODEL_ERROR_REJECTED, error_l, x)
    )
    x = tl.where(column == LEVEL_REF_ERROR_CHOSEN, ref_w, tl.where(column == LEVEL_REF_ERROR_REJECTED, ref_l, x))
    x = tl.where(column == LEVEL_CHOSEN_GAP, gap_w, tl.where(column == LEVEL_REJECTED_GAP, gap_l, x))
    x = tl.where(column == LEVEL_RATIO, 0.5 * (ratio_w + ratio_l), x)
    x = tl.where(column == LEVEL_WEIGHT, 0.5 * (weight_w + weight_l), x)
    x = tl.where(column == LEVEL_CLIPPED, _clipped(ratio_w, ratio_l, clip_min, clip_max, METHOD), x)
    x = tl.where(column == LEVEL_ACTIVE, active, x)
    x = tl.where(
        column == LEVEL_LOGITS,
        z,
        tl.where(column == LEVEL_LOGITS_SQ, z * z, tl.where(column == LEVEL_ACCURACY, _correct(z), x)),
    )
    x = tl.where(column == LEVEL_COEF, k_w, tl.where(column == LEVEL_COEF_SQ, k_w * k_w, x))
    x = tl.where(column == LEVEL_GRAD_SQ, k_w * k_w * error_w + k_l * k_l * error_l, x)
    single = x.to(tl.float32)
    whole = (tl.sum(0.0 * single, 1) == 0)[:, None]
    single = tl.where(whole, single, 0.0)
    return tl.where(
        column == LEVEL_COUNT,
        whole.to(tl.float32),
        tl.where(column == LEVEL_NONFINITE, 1.0 - whole.to(tl.float32), single),
    )


@triton.jit
def _add_levels(levels, bin_of, statistics, count, bins):
    """Adds ``count`` pairs to their bins, one after another.

    Each row computes the final value of its bin: rows of the same bin get the same value, and all store it.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, STATISTIC_COLUMNS)[None, :]
    at = levels + column * bins + bin_of
    inside = (row < count) & (column < STATISTIC_COUNT)
    total = tl.load(at, mask=inside, other=0.0)
    for i in range(count):
        one = tl.sum(tl.where(row == i, statistics, 0.0), 0)[None, :]
        its_bin = tl.sum(tl.where(row == i, bin_of, 0), 0)[None, :]
        total += tl.where(its_bin == bin_of, one, 0.0)
    tl.debug_barrier()  # until every thread has read what the others overwrite
    tl.store(at, total, mask=inside)
    tl.debug_barrier()


@triton.jit
def report(
    records,
    pair_levels,
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
    pair_level_stride,
    bins,
    top,
    METHOD: tl.constexpr,
    SKIP: tl.constexpr,
    PER_PAIR: tl.constexpr,
    METRICS_TOO: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Writes the batch's numbers and adds them to the running sums, once all pairs are recorded."""
    column = tl.arange(0, METRIC_COLUMNS)
    sums = tl.full([METRIC_COLUMNS], 0.0, tl.float64)
    for first in range(0, pairs, ROWS):
        pair = first + tl.arange(0, ROWS)[:, None]
        sums += tl.sum(_metrics(records, pair, pairs, clip_min, clip_max, METHOD, SKIP), 0)
    counted = tl.sum(tl.where(column == COUNTED, sums, 0.0), 0)
    value = tl.where(counted > 0, sums / tl.where(counted > 0, counted, 1.0), 0.0)
    value = tl.where(column == LOSS, sums / pairs if PER_PAIR else sums * loss_scale, value)
    value = tl.where(column == ACTIVE_FRACTION, sums / pairs, value)
    value = tl.where(column == NONFINITE_PAIRS, sums, value)
    tl.store(numbers + column, value, mask=column < COUNTED)
    if not PER_PAIR:
        tl.store(loss + column, value, mask=column == LOSS)
    if METRICS_TOO:
        over = tl.where((column == LOSS) | (column == ACTIVE_FRACTION), pairs, counted)  # pairs in the mean
        over = tl.where(column == NONFINITE_PAIRS, 1.0, over)
        single = (value * over).to(tl.float32)
        kept = (column < COUNTED) & (single - single == 0)
        at = metrics + column
        tl.store(at, tl.load(at, mask=kept) + single, mask=kept)
        tl.store(at + COUNTED, tl.load(at + COUNTED, mask=kept) + over.to(tl.float32), mask=kept)
    if LEVELS:
        unit = (tl.full([], 0.0, tl.float64) + elements) / (beta * loss_scale)  # frees a coefficient of sizes
        for first in range(0, pairs, ROWS):
            pair = first + tl.arange(0, ROWS)[:, None]
            statistics = _statistics(records, pair, pairs, unit, clip_min, clip_max, METHOD)
            level = tl.load(pair_levels + pair.to(tl.int64) * pair_level_stride, mask=pair < pairs, other=0)
            place = (widen(level, tl.float64) * bins / top).to(tl.float32)  # of σ in float32, its own type; NaN: 0
            place = tl.where(place >= 0, tl.where(place < bins, place, bins - 1), 0.0)
            _add_levels(levels, place.to(tl.int32), statistics, min(pairs - first, ROWS), bins)
