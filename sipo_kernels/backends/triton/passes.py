"""The two Triton kernels: loss and gradient in one launch, and the gradient alone.

A fixed grid of programs draws steps from a counter until none is left (``plan.py``). A step reduces one item,
a part of one sample, and then writes the gradient of an item some way back, whose policy and target are still in the L2
cache: device memory is traversed once. The program that reduces the last item of a pair adds up the pair's partial sums
in a fixed order and does its arithmetic (``math.py``). The first program that finds no step left makes the
batch's numbers (``batch_report.py``). Which program that is varies, what it computes does not: same input, same bits,
with the gradient or without.

A gradient waits for its pair to be reduced, in this step or in earlier ones; the batch's numbers wait for all pairs.
Those reductions are held by programs that run, and wait for nothing. So the wait ends, however few of the programs the
device runs at a time, also when that is one after the other, as in the interpreter.

Offsets are 64-bit. A sample's start is a multiple of ``sample stride``; where that and D are multiples of 16 the
compiler proves 16-byte alignment and every load and store of the main loops is 16 bytes wide.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from sipo_kernels.backends.triton.batch_report import report, store_record
from sipo_kernels.backends.triton.math import (
    COEF_ROW,
    finish_pair,
    finite,
    inner_part,
    inner_sums,
    reduce_part,
    row,
    upstream_coef,
    write_part,
)
from sipo_kernels.output import METRICS

MADE_FOR = tl.constexpr(len(METRICS))  # where a batch's numbers hold the upstream gradient


@triton.jit
def expected_upstream(expected, number, ON_DEVICE: tl.constexpr):
    """Returns the expected upstream gradient in float64: ``number``, or with ON_DEVICE the value at ``expected``."""
    if ON_DEVICE:
        return tl.load(expected).to(tl.float64)
    return tl.full([], 0.0, tl.float64) + number


@triton.jit
def all_equal(x, stride, count, value):
    """Returns whether ``count`` numbers all equal ``value``; NaN equals nothing."""
    at = tl.arange(0, 128)
    others = 0
    for i in range(0, count, 128):
        found = tl.load(x + (i + at).to(tl.int64) * stride, mask=i + at < count, other=value)
        others += tl.sum((found != value).to(tl.int32), 0)
    return others == 0


@triton.jit(do_not_specialize=["pairs", "parts", "tiles", "distance", "keep", "pair_level_stride", "bins"])
def pair_forward(
    model,
    ref,
    target,
    ratio_scale,
    error_weight,
    ref_error,
    expected,  # [] float64, where EXPECTED_ON_DEVICE
    pair_levels,  # [B] or longer, where LEVELS
    partial,  # [S, parts, 3], or 4 with HAS_ERROR_MASK; and with SAFEGUARDED then [B, parts]
    records,  # [RECORD, B] float64: see batch_report.py
    tickets,  # [2 + B] int32, zero: steps handed out; pairs done; of each pair, items reduced, plus 1 when it is done
    loss,  # [] or [B]
    samples,  # [SAMPLE_ROWS, S]
    logits,  # [B]
    mask,  # [B]
    numbers,  # [METRICS + 1]
    grad,
    metrics,  # [2, METRICS], where METRICS_TOO
    levels,  # [STATISTICS, bins], where LEVELS
    elements,
    model_stride,
    ref_stride,
    target_stride,
    pair_level_stride,
    pairs,
    parts,
    tiles,
    distance,
    keep,
    bins,
    beta: tl.float64,  # Triton would pass Python's floats as float32
    clip_min: tl.float64,
    clip_max: tl.float64,
    mask_threshold: tl.float64,
    loss_scale: tl.float64,
    smoothing: tl.float64,
    log_label: tl.float64,
    log_other: tl.float64,
    safeguard: tl.float64,
    top: tl.float64,
    expected_number: tl.float64,
    error_mask,  # bool or float32, where HAS_ERROR_MASK
    error_mask_stride,
    METHOD: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SAFEGUARDED: tl.constexpr,
    MASKS: tl.constexpr,
    POSTERIOR: tl.constexpr,
    SKIP: tl.constexpr,
    PER_PAIR: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    HAS_ERROR_MASK: tl.constexpr,
    SHARED_ERROR_MASK: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    EXPECTED_ON_DEVICE: tl.constexpr,
    METRICS_TOO: tl.constexpr,
    LEVELS: tl.constexpr,
    ACC: tl.constexpr,
    GRAD_ACC: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):
    per_pair = 2 * parts
    items = pairs * per_pair
    steps = items + distance if WITH_GRAD else items
    step = tl.atomic_add(tickets, 1, sem="relaxed")
    while step < steps:
        if step < items:
            pair = step // per_pair
            item = step % per_pair
            part = item // 2
            sample = pair + item % 2 * pairs
            m_row = row(model, sample, model_stride)
            r_row = row(ref, sample, ref_stride)
            t_row = row(target, pair if SHARED_TARGET else sample, target_stride)
            w_row = row(error_mask, pair if SHARED_ERROR_MASK else sample, error_mask_stride)
            start = part.to(tl.int64) * tiles * BLOCK
            if WITH_GRAD:
                if item >= per_pair - keep:
                    e, f, g, n = reduce_part(
                        m_row, r_row, t_row, w_row, start, tiles, elements, HAS_REF, HAS_ERROR_MASK, ACC, BLOCK, FOLD,
                        "evict_last",
                    )  # fmt: skip
                else:
                    e, f, g, n = reduce_part(
                        m_row, r_row, t_row, w_row, start, tiles, elements, HAS_REF, HAS_ERROR_MASK, ACC, BLOCK, FOLD,
                        "evict_first",
                    )  # fmt: skip
            else:
                e, f, g, n = reduce_part(
                    m_row, r_row, t_row, w_row, start, tiles, elements, HAS_REF, HAS_ERROR_MASK, ACC, BLOCK, FOLD, ""
                )
            SUMS: tl.constexpr = 4 if HAS_ERROR_MASK else 3
            sums = row(partial, sample, parts * SUMS) + part * SUMS
            tl.store(sums, e)
            tl.store(sums + 1, f)
            tl.store(sums + 2, g)
            if HAS_ERROR_MASK:
                tl.store(sums + 3, n)
            if SAFEGUARDED:  # noqa: SIM102 (known when compiling; the next one is not)
                if item % 2 == 1:
                    m_chosen, t_chosen = row(model, pair, model_stride), row(target, pair, target_stride)
                    w_chosen = row(error_mask, pair, error_mask_stride)
                    product = inner_part(
                        m_chosen, t_chosen, m_row, t_row, w_chosen, w_row, start, tiles, elements, HAS_ERROR_MASK, ACC,
                        BLOCK, FOLD,
                    )  # fmt: skip
                    tl.store(inner_sums(partial, pair, pairs, parts, HAS_ERROR_MASK) + part, product)
            # The stores must be seen by whoever counts the pair's last item: a barrier, then acquire-release.
            tl.debug_barrier()
            if tl.atomic_add(tickets + 2 + pair, 1, sem="acq_rel") == per_pair - 1:
                error, ref_err, gap, ratio, weight, reward, k, z, pair_loss, active, whole = finish_pair(
                    partial,
                    ratio_scale,
                    error_weight,
                    ref_error,
                    samples,
                    logits,
                    mask,
                    pair,
                    pairs,
                    parts,
                    elements,
                    beta,
                    clip_min,
                    clip_max,
                    mask_threshold,
                    loss_scale,
                    smoothing,
                    log_label,
                    log_other,
                    safeguard,
                    METHOD,
                    LOSS_TYPE,
                    SMOOTHED,
                    SAFEGUARDED,
                    MASKS,
                    POSTERIOR,
                    SKIP,
                    HAS_REF,
                    HAS_SCALE,
                    HAS_WEIGHT,
                    HAS_ERROR_MASK,
                    PARTS,
                )
                if PER_PAIR:
                    tl.store(loss + pair, pair_loss)
                store_record(
                    records, pair, pairs, error, ref_err, gap, ratio, weight, reward, k, z, pair_loss, active, whole
                )
                tl.debug_barrier()
                if WITH_GRAD:
                    tl.atomic_add(tickets + 2 + pair, 1, sem="release")
                tl.atomic_add(tickets + 1, 1, sem="release")
        if WITH_GRAD:
            back = step - distance
            if back >= 0:
                pair = back // per_pair
                item = back % per_pair
                if keep < per_pair:  # what was read last is in the cache: start there
                    item = per_pair - 1 - item
                sample = pair + item % 2 * pairs
                while tl.atomic_add(tickets + 2 + pair, 0, sem="acquire") <= per_pair:
                    pass  # until the count that was released above
                its_coef = tl.load(samples + COEF_ROW * 2 * pairs + sample, cache_modifier=".cg")
                upstream = expected_upstream(expected, expected_number, EXPECTED_ON_DEVICE)
                write_part(
                    row(model, sample, model_stride),
                    row(target, pair if SHARED_TARGET else sample, target_stride),
                    row(error_mask, pair if SHARED_ERROR_MASK else sample, error_mask_stride),
                    row(grad, sample, elements),
                    upstream_coef(its_coef, upstream).to(GRAD_ACC),
                    (item // 2).to(tl.int64) * tiles * BLOCK,
                    tiles,
                    elements,
                    HAS_ERROR_MASK,
                    BLOCK,
                )
        step = tl.atomic_add(tickets, 1, sem="relaxed")
    if step == steps:  # the first to find none; outside of the loop, whose registers this would take
        while tl.atomic_add(tickets + 1, 0, sem="acquire") < pairs:
            pass
        report(
            records,
            pair_levels,
            numbers,
            loss,
            metrics,
            levels,
            pairs,
            1 if HAS_ERROR_MASK else elements,  # which the records' coefficients include then
            beta,
            loss_scale,
            clip_min,
            clip_max,
            pair_level_stride,
            bins,
            top,
            METHOD,
            SKIP,
            PER_PAIR,
            METRICS_TOO,
            LEVELS,
        )
        tl.store(numbers + MADE_FOR, expected_upstream(expected, expected_number, EXPECTED_ON_DEVICE))


@triton.jit(do_not_specialize=["upstream_stride", "pairs", "parts", "tiles"])
def pair_backward(
    model,
    target,
    coef,
    upstream,  # [] or [B]
    numbers,  # of the forward, where MEND
    remembered,  # [] float64, where REMEMBER: takes what came, if that is finite
    grad,
    elements,
    model_stride,
    target_stride,
    upstream_stride,
    pairs,
    parts,
    tiles,
    error_mask,  # bool or float32, where HAS_ERROR_MASK
    error_mask_stride,
    MEND: tl.constexpr,  # grad holds what the expected upstream gradient makes: leave it where that is what came
    REMEMBER: tl.constexpr,
    PER_PAIR: tl.constexpr,
    SHARED_TARGET: tl.constexpr,
    HAS_ERROR_MASK: tl.constexpr,
    SHARED_ERROR_MASK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the gradient of §6, coef · upstream · w · (model − target), with exact zeros where coef or w is 0."""
    items = pairs * 2 * parts
    if REMEMBER:  # noqa: SIM102 (known when compiling; the next one is not)
        if tl.program_id(0) == 0:
            first = tl.load(upstream).to(tl.float64)
            tl.store(remembered, first, mask=finite(first))
    if MEND:  # where what came is what was expected, nothing but these is read
        made_for = tl.load(numbers + MADE_FOR)
        if PER_PAIR:
            held = all_equal(upstream, upstream_stride, pairs, made_for)
        else:
            held = tl.load(upstream) == made_for
        items = tl.where(held, 0, items)
    for step in range(tl.program_id(0), items, tl.num_programs(0)):
        pair = step // (2 * parts)
        item = step % (2 * parts)
        sample = pair + item % 2 * pairs
        came = tl.load(row(upstream, pair, upstream_stride) if PER_PAIR else upstream)
        if not MEND or came != made_for:
            write_part(
                row(model, sample, model_stride),
                row(target, pair if SHARED_TARGET else sample, target_stride),
                row(error_mask, pair if SHARED_ERROR_MASK else sample, error_mask_stride),
                row(grad, sample, elements),
                upstream_coef(tl.load(coef + sample), came).to(ACC),
                (item // 2).to(tl.int64) * tiles * BLOCK,
                tiles,
                elements,
                HAS_ERROR_MASK,
                BLOCK,
            )
