// What a batch reports (docs/math.md §8): its metrics, and its sums by noise level. One source for CPU and CUDA; the
// plain-torch twin is sipo_kernels/output.py.
#pragma once
#include "pair_math.h"

namespace sipo {

// The order of SAMPLE_ROWS in sipo_kernels/output.py: results of each sample, [kSampleRows][S].
enum SampleRow : int {
  kModelErrorRow, kRefErrorRow, kErrorGapRow, kLogRatioRow, kWeightRow, kRewardRow, kCoefRow, kSampleRows
};
// The order of METRICS in sipo_kernels/output.py; behind them, the pairs that the means are over.
enum Metric : int {
  kLoss, kRewardsChosen, kRewardsRejected, kMargins, kAccuracies, kModelMse, kRefMse, kChosenGap, kRejectedGap,
  kWeightMean, kClipFraction, kActiveFraction, kNonfinitePairs, kMetrics, kCounted = kMetrics, kFacts
};
// Rows of the sums by noise level: STATISTICS in sipo_kernels/output.py.
constexpr int kStatistics = 18;

SIPO_HD double correct(double logits) { return logits > 0 ? 1.0 : (logits == 0 ? 0.5 : 0.0); }  // a tie counts one half

SIPO_HD double clipped(const Sample& x, const Settings& s) {
  return s.method != kDiffusionDpo && (x.ratio < s.clip_min || x.ratio > s.clip_max) ? 1.0 : 0.0;
}

// What one pair adds to each metric's sum: facts[kFacts].
SIPO_HD void pair_facts(const Sample& chosen, const Sample& rejected, const Pair& p, const Settings& s, double* facts) {
  const bool counted = p.finite || !s.skip_nonfinite;
  facts[kLoss] = p.loss;
  facts[kRewardsChosen] = counted ? chosen.reward : 0.0;
  facts[kRewardsRejected] = counted ? rejected.reward : 0.0;
  facts[kAccuracies] = counted ? correct(p.logits) : 0.0;
  facts[kModelMse] = counted ? 0.5 * (chosen.model_error + rejected.model_error) : 0.0;
  facts[kRefMse] = counted ? 0.5 * (chosen.ref_error + rejected.ref_error) : 0.0;
  facts[kMargins] = counted ? p.logits : 0.0;
  facts[kChosenGap] = counted ? chosen.error_gap : 0.0;
  facts[kRejectedGap] = counted ? rejected.error_gap : 0.0;
  facts[kWeightMean] = counted ? 0.5 * (chosen.weight + rejected.weight) : 0.0;
  facts[kClipFraction] = counted ? 0.5 * (clipped(chosen, s) + clipped(rejected, s)) : 0.0;
  facts[kActiveFraction] = p.mask ? 1.0 : 0.0;
  facts[kNonfinitePairs] = p.finite ? 0.0 : 1.0;
  facts[kCounted] = counted ? 1.0 : 0.0;
}

// A metric from its sum over the batch, and that of kCounted.
SIPO_HD double metric(int k, double sum, double counted, double pairs, const Settings& s, bool loss_per_pair) {
  if (k == kLoss && !loss_per_pair) return sum * s.loss_scale;
  if (k == kLoss || k == kActiveFraction) return sum / pairs;
  if (k == kNonfinitePairs) return sum;
  return counted > 0 ? sum / counted : 0.0;
}

// How many pairs a metric is a mean over.
SIPO_HD double metric_pairs(int k, double counted, double pairs) {
  return k == kNonfinitePairs ? 1.0 : (k == kLoss || k == kActiveFraction ? pairs : counted);
}

// Running sums of many calls: the metric's finite values times their pairs, and the pairs ([2][kMetrics]).
SIPO_HD void add_metric(float* totals, int k, double value, double pairs) {
  if (!finite_float(value * pairs)) return;
  totals[k] += float(value * pairs);
  totals[kMetrics + k] += float(pairs);
}

// Of `bins` bins of equal width from 0 to `top`. In float, in which σ is given: 0.02 as a float is a little less, and
// still begins bin 1 of 50.
SIPO_HD int level_bin(double timestep, int bins, double top) {
  const float place = float(timestep * bins / top);
  return place >= 0 ? (place < float(bins) ? int(place) : bins - 1) : 0;  // NaN: 0
}

// What one pair adds to its bin: rows[kStatistics]; nothing but to `nonfinite` where a number is not finite in float.
SIPO_HD void pair_statistics(const Sample& chosen, const Sample& rejected, const Pair& p, const Settings& s,
                             double elements, double* rows) {
  const double unit = elements / (s.beta * s.loss_scale), k_w = chosen.coef * unit, k_l = rejected.coef * unit;
  rows[2] = chosen.model_error, rows[3] = rejected.model_error;
  rows[4] = chosen.ref_error, rows[5] = rejected.ref_error;
  rows[6] = chosen.error_gap, rows[7] = rejected.error_gap;
  rows[8] = 0.5 * (chosen.ratio + rejected.ratio);
  rows[9] = 0.5 * (chosen.weight + rejected.weight);
  rows[10] = 0.5 * (clipped(chosen, s) + clipped(rejected, s));
  rows[11] = p.mask ? 1.0 : 0.0;
  rows[12] = p.logits, rows[13] = p.logits * p.logits;
  rows[14] = correct(p.logits);
  rows[15] = k_w, rows[16] = k_w * k_w;
  rows[17] = k_w * k_w * chosen.model_error + k_l * k_l * rejected.model_error;
  bool whole = true;
  for (int i = 2; i < kStatistics; ++i) whole = whole && finite_float(rows[i]);
  rows[0] = whole ? 1.0 : 0.0, rows[1] = whole ? 0.0 : 1.0;
  for (int i = 2; i < kStatistics; ++i) rows[i] = whole ? rows[i] : 0.0;
}

}  // namespace sipo
