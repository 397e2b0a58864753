// The arithmetic of pairs: from partial sums to coefficients, one group at a time, and after the last group what the
// batch reports. One block does it, with a thread for each sample or pair.
#pragma once
#include "cuda/gradient.h"

namespace sipo {
namespace {

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int delta = 16; delta; delta /= 2) x += device::shuffle_down(x, delta);
  return x;  // of lane 0
}

template <bool kMasked> struct Settling {
  const Params& a;

  __device__ __forceinline__ void group(int32_t k) const {
    const Group g(a, k);
    sum_parts(g);
    __syncthreads();
    // Samples and pairs go through memory, to save registers.
    for (int32_t i = threadIdx.x; i < 2 * g.pairs; i += kThreads)
      sample(i < g.pairs ? g.first_pair + i : a.pairs + g.first_pair + i - g.pairs);
    __syncthreads();
    for (int32_t i = threadIdx.x; i < g.pairs; i += kThreads) pair(g.first_pair + i);
    __syncthreads();
    if (threadIdx.x == 0) device::store_release(a.work.ready, uint32_t(k + 1));
  }

  // Sums the parts of each pair of the group, and stores the result in the first part.
  __device__ __forceinline__ void sum_parts(const Group& g) const {
    for (int32_t i = threadIdx.x / 32; i < a.sums * g.pairs; i += kThreads / 32) {
      const int32_t p = i / a.sums;
      const int32_t parts = g.owner((p + 1) * a.tiles - 1) - g.owner(p * a.tiles) + 1;
      double* first = sums_of(g.first_pair + p) + i % a.sums;
      double sum = 0;
      for (int32_t part = threadIdx.x % 32; part < parts; part += 32)
        sum += device::load_shared_result(first + part * a.sums);
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) *first = sum;
    }
  }
  __device__ __forceinline__ double* sums_of(int64_t pair) const {
    return a.work.partial + pair * a.parts * a.sums;
  }

  __device__ __forceinline__ void sample(int64_t s) const {
    const int side = s < a.pairs ? 0 : 1;
    const double *sums = sums_of(s - side * a.pairs), *of = sums + 3 * side;
    Sample x;
    x.elements = kMasked ? device::load_shared_result(sums + kWeightSum + side) : a.size;
    const bool empty = kMasked && x.elements == 0;  // then all errors are 0
    const double n = empty ? 1 : x.elements;
    x.model_error = device::load_shared_result(of) / n;
    x.ref_error = a.ref ? device::load_shared_result(of + 1) / n : empty ? 0 : number(a.ref_error, s, 0.0);
    x.error_gap = a.ref ? device::load_shared_result(of + 2) / n : x.model_error - x.ref_error;
    x.ratio_scale = number(a.ratio_scale, s, 0.0);
    x.error_weight = number(a.error_weight, s, 1.0);
    x.reward = x.coef = 0;
    weigh(x, a.settings, a.ratio_scale.data != nullptr);
    const double rows[kRewardRow] = {x.model_error, x.ref_error, x.error_gap, x.log_ratio, x.weight};
#pragma unroll
    for (int i = 0; i < kRewardRow; ++i) put(a.samples, i * 2 * a.pairs + s, rows[i], a.settings.double_stats);
    a.work.samples[s] = x;
  }

  // Keeps the compiler from computing what depends on these in advance, and holding it through the main loops.
  __device__ __forceinline__ Settings settings() const {
    Settings s = a.settings;
    s.beta = device::opaque(s.beta);
    s.log_label = device::opaque(s.log_label);
    s.safeguard = device::opaque(s.safeguard);
    return s;
  }

  __device__ __forceinline__ double upstream() const { return a.expected_at ? *a.expected_at : a.expected; }

  __device__ __forceinline__ void pair(int64_t i) const {
    Sample chosen = a.work.samples[i], rejected = a.work.samples[i + a.pairs];
    const Settings s = settings();
    double share = 1;  // of the rejected sample's gradient (§6, relatives)
    if (a.safeguarded) {
      const double inner = device::load_shared_result(sums_of(i) + kInnerSum) / rejected.elements;
      share = rejected_share(chosen, rejected, s, inner);
    }
    const Pair p = judge(chosen, rejected, s, share);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int64_t row = i + side * a.pairs;
      const double coef = side ? rejected.coef : chosen.coef;
      put(a.samples, kCoefRow * 2 * a.pairs + row, coef, a.settings.double_stats);
      a.work.samples[row].coef = coef;
      a.work.coef[row] = upstream_coef(coef, upstream(), a.settings.double_stats);
    }
    put(a.logits, i, p.logits, a.settings.double_stats);
    a.mask[i] = p.mask;
    a.work.pairs[i] = p;
    if (a.loss_per_pair) put(a.loss, i, p.loss, a.settings.double_stats);
  }

  // ---- §8 ----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void report() const {
    const int32_t pairs = device::opaque(int32_t(a.pairs)), bins = device::opaque(a.bins);
    for (int32_t i = threadIdx.x; i < pairs; i += kThreads) report_pair(i, i + pairs, bins);
    __syncthreads();
    for (int k = threadIdx.x / 32; k < kMetrics; k += kThreads / 32) report_metric(k, pairs);
    if (threadIdx.x == 0) put(a.numbers, kMetrics, upstream(), a.settings.double_stats);
    if (!a.levels) return;
    for (int32_t i = threadIdx.x; i < kStatistics * bins; i += kThreads)
      a.levels[i % kStatistics * bins + i / kStatistics] += float(level_sum(i / kStatistics, i % kStatistics, pairs));
  }

  // Another block may have settled the pair.
  __device__ __forceinline__ void report_pair(int32_t i, int32_t of_rejected, int32_t bins) const {
    Sample chosen = device::load_shared_result(a.work.samples + i);
    Sample rejected = device::load_shared_result(a.work.samples + of_rejected);
    const Pair p = device::load_shared_result(a.work.pairs + i);
    set_rewards(chosen, rejected, a.settings);
    put(a.samples, kRewardRow * 2 * a.pairs + i, chosen.reward, a.settings.double_stats);
    put(a.samples, kRewardRow * 2 * a.pairs + of_rejected, rejected.reward, a.settings.double_stats);
    PairReport& to = a.work.reports[i];
    pair_facts(chosen, rejected, p, a.settings, to.facts);
    if (!a.levels) return;
    pair_statistics(chosen, rejected, p, a.settings, to.statistics);
    to.bin = level_bin(noise_level(a.pair_levels, i), bins, a.top);
  }

  __device__ __forceinline__ void report_metric(int k, int32_t pairs) const {  // a warp's work
    double sum = 0, counted = 0;
    for (int32_t i = threadIdx.x % 32; i < pairs; i += 32) {
      sum += a.work.reports[i].facts[k];
      counted += a.work.reports[i].facts[kCounted];
    }
    sum = warp_sum(sum), counted = warp_sum(counted);
    if (threadIdx.x % 32) return;
    const double value = metric(k, sum, counted, double(pairs), a.settings, a.loss_per_pair);
    put(a.numbers, k, value, a.settings.double_stats);
    if (k == kLoss && !a.loss_per_pair) put(a.loss, 0, value, a.settings.double_stats);
    if (a.metrics) add_metric(a.metrics, k, value, metric_pairs(k, counted, double(pairs)));
  }

  // The sum of one statistic over the pairs in one bin, in order.
  __device__ __forceinline__ double level_sum(int32_t bin, int32_t row, int32_t pairs) const {
    double sum = 0;
    for (int32_t i = 0; i < pairs; ++i)
      if (a.work.reports[i].bin == bin) sum += a.work.reports[i].statistics[row];
    return sum;
  }
};

}  // namespace
}  // namespace sipo
