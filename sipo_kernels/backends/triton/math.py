"""The arithmetic of the Triton kernels as device functions: errors and gradient of an item, §2 to §6 of a pair.

``csrc/pair_math.h`` and ``eager.py`` compute the same, section by section of docs/math.md.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from sipo_kernels.options import LOSS_TYPES, METHODS
from sipo_kernels.output import SAMPLE_ROWS

DPO_CM = tl.constexpr(METHODS.index("dpo_cm"))
SIPO = tl.constexpr(METHODS.index("sipo"))
SDPO = tl.constexpr(METHODS.index("sdpo"))
IPO = tl.constexpr(LOSS_TYPES.index("ipo"))
HINGE = tl.constexpr(LOSS_TYPES.index("hinge"))
DMPO = tl.constexpr(LOSS_TYPES.index("dmpo"))
MODEL_ERROR_ROW = tl.constexpr(SAMPLE_ROWS.index("model_error"))
REF_ERROR_ROW = tl.constexpr(SAMPLE_ROWS.index("ref_error"))
ERROR_GAP_ROW = tl.constexpr(SAMPLE_ROWS.index("error_gap"))
LOG_RATIO_ROW = tl.constexpr(SAMPLE_ROWS.index("log_ratio"))
WEIGHT_ROW = tl.constexpr(SAMPLE_ROWS.index("weight"))
REWARD_ROW = tl.constexpr(SAMPLE_ROWS.index("reward"))
COEF_ROW = tl.constexpr(SAMPLE_ROWS.index("coef"))
# Triton's interpreter truncates where a GPU rounds to nearest even; there the kernel rounds by itself.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def widen(x, ACC: tl.constexpr):
    if x.dtype == tl.bfloat16:  # which the interpreter converts to float32 alone
        return x.to(tl.float32).to(ACC)
    return x.to(ACC)


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        x = x.to(tl.float32)
        if INTERPRETED:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
            x = tl.where(x != x, x, rounded)
    return x.to(DTYPE)


@triton.jit
def row(tensor, sample, stride):
    return tensor + sample.to(tl.int64) * stride


@triton.jit
def inner_sums(partial, pair, pairs, parts, HAS_ERROR_MASK: tl.constexpr):
    """Returns the address of a pair's sums of ``inner_part``, which follow those of ``reduce_part``."""
    return row(row(partial, 2 * pairs, parts * (4 if HAS_ERROR_MASK else 3)), pair, parts)


@triton.jit
def _fold(x, FOLD: tl.constexpr):
    return tl.sum(tl.reshape(x, [x.shape[0] // FOLD, FOLD]), 1)


@triton.jit
def _weighted(w, x):
    """Returns w · x, which is 0 where w is 0, whatever x is. ``w`` is bool or float32."""
    if w.dtype == tl.int1:
        return tl.where(w, x, 0.0)
    return tl.where(w == 0, 0.0, w.to(x.dtype) * x)


@triton.jit
def reduce_part(
    m_row,
    r_row,
    t_row,
    w_row,
    start,
    tiles,
    elements,
    HAS_REF: tl.constexpr,
    HAS_ERROR_MASK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
    EVICT: tl.constexpr,  # how policy, target and error mask are to be cached
):
    """Returns one item's part of §2's sums: Σ w·d², Σ w·d_ref², Σ w·(m − r)(d + d_ref), and with HAS_ERROR_MASK Σ w."""
    e = tl.full([BLOCK // FOLD], 0.0, ACC)
    f = tl.full([BLOCK // FOLD], 0.0, ACC)
    g = tl.full([BLOCK // FOLD], 0.0, ACC)
    n = tl.full([BLOCK // FOLD], 0.0, ACC)
    for tile in range(tiles):
        at = start + tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < elements
        m = widen(tl.load(m_row + at, mask=inside, other=0.0, eviction_policy=EVICT), ACC)
        t = widen(tl.load(t_row + at, mask=inside, other=0.0, eviction_policy=EVICT), ACC)
        d = m - t
        square = d * d
        if HAS_ERROR_MASK:
            w = tl.load(w_row + at, mask=inside, other=0, eviction_policy=EVICT)
            n += _fold(w.to(ACC), FOLD)
            square = _weighted(w, square)
        e += _fold(square, FOLD)
        if HAS_REF:
            r = widen(tl.load(r_row + at, mask=inside, other=0.0, eviction_policy="evict_first"), ACC)
            d_ref = r - t
            square = d_ref * d_ref
            product = (m - r) * (d + d_ref)
            if HAS_ERROR_MASK:
                square = _weighted(w, square)
                product = _weighted(w, product)
            f += _fold(square, FOLD)
            g += _fold(product, FOLD)
    # In float64 from here on: each accumulator has seen a few dozen terms, and the threads' are many.
    counted = tl.full([], 0.0, tl.float64)
    if HAS_ERROR_MASK:
        counted = tl.sum(n.to(tl.float64), 0)
    return tl.sum(e.to(tl.float64), 0), tl.sum(f.to(tl.float64), 0), tl.sum(g.to(tl.float64), 0), counted


@triton.jit
def inner_part(
    m_chosen,
    t_chosen,
    m_rejected,
    t_rejected,
    w_chosen,
    w_rejected,
    start,
    tiles,
    elements,
    HAS_ERROR_MASK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Returns one part's share of Σ w_w · w_l · d_w · d_l (§6, relatives), from memory that was just read."""
    total = tl.full([BLOCK // FOLD], 0.0, ACC)
    for tile in range(tiles):
        at = start + tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < elements
        chosen = widen(tl.load(m_chosen + at, mask=inside, other=0.0), ACC)
        chosen -= widen(tl.load(t_chosen + at, mask=inside, other=0.0), ACC)
        rejected = widen(tl.load(m_rejected + at, mask=inside, other=0.0), ACC)
        rejected -= widen(tl.load(t_rejected + at, mask=inside, other=0.0), ACC)
        product = chosen * rejected
        if HAS_ERROR_MASK:
            # Beside the safeguard, masks are bool.
            w = tl.load(w_chosen + at, mask=inside, other=0) & tl.load(w_rejected + at, mask=inside, other=0)
            product = _weighted(w, product)
        total += _fold(product, FOLD)
    return tl.sum(total.to(tl.float64), 0)


@triton.jit
def write_part(
    m_row, t_row, w_row, g_row, c, start, tiles, elements, HAS_ERROR_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes one item of §6's gradient, c · w · (m − t); if c is 0, exact zeros, and nothing is read."""
    for tile in range(tiles):
        at = start + tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < elements
        if c == 0:
            grad = tl.full([BLOCK], 0.0, c.dtype)
        else:
            m = widen(tl.load(m_row + at, mask=inside, other=0.0, eviction_policy="evict_first"), c.dtype)
            t = widen(tl.load(t_row + at, mask=inside, other=0.0, eviction_policy="evict_first"), c.dtype)
            d = m - t
            if HAS_ERROR_MASK:
                d = _weighted(tl.load(w_row + at, mask=inside, other=0, eviction_policy="evict_first"), d)
            grad = c * d
        tl.store(g_row + at, _narrow(grad, g_row.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
def _nan_min(a, b):  # as torch.minimum: NaN wins
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def finite(x):
    return x - x == 0


@triton.jit
def _all_finite(error, gap, weight, z, penalty, DTYPE: tl.constexpr):
    """Returns whether a pair's numbers are finite in the type that they are returned in.

    Vectors are [chosen, rejected].
    """
    samples = finite(error.to(DTYPE)) & finite(gap.to(DTYPE)) & finite(weight.to(DTYPE))
    return (tl.sum(samples.to(tl.int32), 0) == 2) & finite(z.to(DTYPE)) & finite(penalty.to(DTYPE))


@triton.jit
def _log_ratio(scale, error):  # §3: an infinite scale is the terminal step, also at error 0; NaN stays NaN
    return tl.where((scale == float("inf")) & (error == error), -float("inf"), -scale * error)


@triton.jit
def _sum_partials(partial, both, parts, HAS_ERROR_MASK: tl.constexpr, PARTS: tl.constexpr):
    """Returns the sums of a pair's two samples, added in float64 and in a fixed order."""
    at = tl.arange(0, PARTS)[None, :]
    inside = at < parts
    SUMS: tl.constexpr = 4 if HAS_ERROR_MASK else 3
    sums = row(partial, both, parts * SUMS)[:, None] + at * SUMS
    # .cg: past the first-level cache, which is not coherent with what other programs just wrote.
    e = tl.sum(tl.load(sums, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64), 1)
    f = tl.sum(tl.load(sums + 1, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64), 1)
    g = tl.sum(tl.load(sums + 2, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64), 1)
    counted = tl.full([2], 0.0, tl.float64)
    if HAS_ERROR_MASK:
        counted = tl.sum(tl.load(sums + 3, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64), 1)
    return e, f, g, counted


@triton.jit
def _logit_loss(z, smoothing, log_label, log_other, LOSS_TYPE: tl.constexpr, SMOOTHED: tl.constexpr):
    """Returns §5's ℓ(z) and §6's −ℓ'(z); NaN stays NaN. The logarithms are those of 1 − ε and ε."""
    if LOSS_TYPE == IPO:
        return (z - 0.5) * (z - 0.5), 1.0 - 2.0 * z
    if LOSS_TYPE == HINGE:
        beyond = tl.where(z >= 1, 0.0, z)
        return tl.where(z < 1, 1.0 - z, beyond), tl.where(z < 1, 1.0, beyond)
    if LOSS_TYPE == DMPO:  # the bound, beyond which σ is 0 or 1, keeps infinity from a 0
        z = tl.where(z < -1e3, -1e3, tl.where(z > 1e3, 1e3, z))
    decay = tl.exp(-tl.abs(z))
    # log(1 + x) in place of log1p: x is at most 1, and what is lost below 1e-16 is lost beside a loss of order 1.
    tail = tl.log(1.0 + decay)
    softplus = tl.where(z != z, z, tl.where(z < 0, -z, 0.0)) + tail  # of −z
    sigmoid = tl.where(z >= 0, decay, 1.0) / (1.0 + decay)  # of −z
    if LOSS_TYPE == DMPO:
        pull = sigmoid * (log_label - log_other - z)
        return pull - log_label - softplus, tl.where(z >= 0, 1.0, decay) / (1.0 + decay) * pull
    if SMOOTHED:  # (1 − ε) softplus(−z) + ε softplus(z)
        return tl.where(z < 0, (smoothing - 1.0) * z, smoothing * z) + tail, sigmoid - smoothing
    return softplus, sigmoid


@triton.jit
def _rejected_share(
    partial, a, model_error, safeguard, pair, pairs, parts, n, HAS_ERROR_MASK: tl.constexpr, PARTS: tl.constexpr
):
    """Returns [1, λ] of §6, relatives: the factors of the two samples' gradients. ``a`` is a · c."""
    at = tl.arange(0, PARTS)
    sums = inner_sums(partial, pair, pairs, parts, HAS_ERROR_MASK)
    chosen = tl.arange(0, 2) == 0
    if HAS_ERROR_MASK:
        n = tl.sum(tl.where(chosen, 0.0, n), 0)  # of the rejected sample
    inner = tl.sum(tl.load(sums + at, mask=at < parts, other=0.0, cache_modifier=".cg").to(tl.float64), 0) / n
    a_chosen, a_rejected = tl.sum(tl.where(chosen, a, 0.0), 0), tl.sum(tl.where(chosen, 0.0, a), 0)
    aligned = a_chosen * a_rejected * inner
    room = (1.0 - safeguard) * a_chosen * a_chosen * tl.sum(tl.where(chosen, model_error, 0.0), 0) / aligned
    share = tl.where((aligned > 0) & (room < 1), room, 1.0)
    return tl.where(chosen, 1.0, share)


@triton.jit
def finish_pair(
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
    METHOD: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SAFEGUARDED: tl.constexpr,
    MASKS: tl.constexpr,
    POSTERIOR: tl.constexpr,
    SKIP: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ERROR_MASK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Computes §2 to §6 of one pair in float64, stores its results and returns the numbers for §8.

    Vectors are [chosen, rejected].
    """
    both = pair + tl.arange(0, 2) * pairs
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float64)
    error, ref_err, gap, counted = _sum_partials(partial, both, parts, HAS_ERROR_MASK, PARTS)
    if HAS_ERROR_MASK:  # the mean over no elements is 0
        n = tl.where(counted == 0, 1.0, counted)
    else:
        n = tl.full([], 0.0, tl.float64) + elements
    error /= n
    if HAS_REF:
        ref_err /= n
        gap /= n
    else:
        ref_err = tl.load(ref_error + both).to(tl.float64)
        if HAS_ERROR_MASK:
            ref_err = tl.where(counted == 0, 0.0, ref_err)
        gap = error - ref_err

    # §3, §4
    if HAS_SCALE:
        log_ratio = _log_ratio(tl.load(ratio_scale + both).to(tl.float64), error if POSTERIOR else gap)
        ratio = tl.exp(log_ratio)
    else:
        log_ratio = tl.full([2], 0.0, tl.float64)
        ratio = tl.full([2], 1.0, tl.float64)
    weight = tl.where(ratio < clip_min, clip_min, tl.where(ratio > clip_max, clip_max, ratio))
    pair_weight = tl.reduce(weight, 0, _nan_min)
    if MASKS:
        active = tl.reduce(ratio, 0, _nan_min) >= mask_threshold
    else:
        active = elements > 0

    # §5
    a = tl.full([2], 1.0, tl.float64)
    b = tl.full([], 1.0, tl.float64)
    if METHOD == DPO_CM:
        b = pair_weight
    if METHOD == SIPO:
        a = weight
    if METHOD == SDPO:
        a *= pair_weight
    if HAS_WEIGHT:
        a *= tl.load(error_weight + both).to(tl.float64)
    z = -0.5 * beta * tl.sum(sign * a * gap, 0)
    reward = -0.5 * beta * (a * gap)
    penalty, pull = _logit_loss(z, smoothing, log_label, log_other, LOSS_TYPE, SMOOTHED)
    pair_loss = b * active.to(tl.float64) * penalty
    whole = _all_finite(error, gap, weight, z, penalty, logits.dtype.element_ty)
    if SKIP:
        active = active & whole
        pair_loss = tl.where(whole, pair_loss, 0.0)

    # §6
    g = b * pull * (0.5 * beta * loss_scale) * (2.0 / n)
    if SAFEGUARDED:
        g *= _rejected_share(partial, a, error, safeguard, pair, pairs, parts, n, HAS_ERROR_MASK, PARTS)
    coef = tl.where(active, sign * g * a, 0.0)
    if HAS_ERROR_MASK:
        coef = tl.where(counted == 0, 0.0, coef)

    at = samples + both
    stride = 2 * pairs
    tl.store(at + MODEL_ERROR_ROW * stride, error)
    tl.store(at + REF_ERROR_ROW * stride, ref_err)
    tl.store(at + ERROR_GAP_ROW * stride, gap)
    tl.store(at + LOG_RATIO_ROW * stride, log_ratio)
    tl.store(at + WEIGHT_ROW * stride, weight)
    tl.store(at + REWARD_ROW * stride, reward)
    tl.store(at + COEF_ROW * stride, coef)
    tl.store(logits + pair, z)
    tl.store(mask + pair, active)
    # §8 frees a coefficient of the number of elements, which with an error mask is each sample's own.
    k = coef * n if HAS_ERROR_MASK else coef
    return error, ref_err, gap, ratio, weight, reward, k, z, pair_loss, active, whole


@triton.jit
def upstream_coef(coef, upstream):
    """Returns §6's factor of a sample's gradient, rounded as ``coef`` is: both kernels make the same bits with it."""
    return tl.where(coef == 0, 0.0, coef * upstream.to(coef.dtype))
