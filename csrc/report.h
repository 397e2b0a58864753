// What a batch reports (docs/math.md §8): its metrics and its sums by noise level, for CPU and CUDA.
// sipo_kernels/output.py has the same in plain torch.
#pragma once
#include <cstdint>

#include "pair_math.h"

namespace sipo {

// SAMPLE_ROWS, METRICS and STATISTICS of sipo_kernels/output.py, in the same order.
#define SIPO_SAMPLE_ROWS(X) \
  X(kModelErrorRow, "model_error") X(kRefErrorRow, "ref_error") X(kErrorGapRow, "error_gap") \
  X(kLogRatioRow, "log_ratio") X(kWeightRow, "weight") X(kRewardRow, "reward") X(kCoefRow, "coef")
#define SIPO_METRICS(X) \
  X(kLoss, "loss") X(kRewardsChosen, "rewards/chosen") X(kRewardsRejected, "rewards/rejected") \
  X(kMargins, "rewards/margins") X(kAccuracies, "rewards/accuracies") X(kModelMse, "model_mse") \
  X(kRefMse, "ref_mse") X(kChosenGap, "chosen_gap") X(kRejectedGap, "rejected_gap") \
  X(kWeightMean, "weight_mean") X(kClipFraction, "clip_fraction") X(kActiveFraction, "active_fraction") \
  X(kNonfinitePairs, "nonfinite_pairs")
#define SIPO_STATISTICS(X) \
  X(kCount, "count") X(kNonfinite, "nonfinite") \
  X(kModelErrorChosen, "model_error_chosen") X(kModelErrorRejected, "model_error_rejected") \
  X(kRefErrorChosen, "ref_error_chosen") X(kRefErrorRejected, "ref_error_rejected") \
  X(kLevelChosenGap, "chosen_gap") X(kLevelRejectedGap, "rejected_gap") X(kLevelRatio, "ratio") \
  X(kLevelWeight, "weight") X(kLevelClipped, "clipped") X(kLevelActive, "active") X(kLevelLogits, "logits") \
  X(kLogitsSq, "logits_sq") X(kLevelAccuracy, "accuracy") X(kLevelCoef, "coef") X(kCoefSq, "coef_sq") \
  X(kGradSq, "grad_sq")
enum SampleRow : int { SIPO_SAMPLE_ROWS(SIPO_CONSTANT) kSampleRows };
// After the metrics: the number of pairs that the means are taken over.
enum Metric : int { SIPO_METRICS(SIPO_CONSTANT) kMetrics, kCounted = kMetrics, kFacts };
enum Statistic : int { SIPO_STATISTICS(SIPO_CONSTANT) kStatistics, kFirstSummed = kModelErrorChosen };

// Stores one result, as double if `wide`, else as float.
SIPO_HD void put(void* array, int64_t i, double value, bool wide) {
  if (wide) static_cast<double*>(array)[i] = value;
  else static_cast<float*>(array)[i] = float(value);
}

SIPO_HD double correct(double logits) { return logits > 0 ? 1.0 : (logits == 0 ? 0.5 : 0.0); }  // a tie: one half

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

// A metric, from its sum over the batch and the sum of kCounted.
SIPO_HD double metric(int k, double sum, double counted, double pairs, const Settings& s, bool loss_per_pair) {
  if (k == kLoss && !loss_per_pair) return sum * s.loss_scale;
  if (k == kLoss || k == kActiveFraction) return sum / pairs;
  if (k == kNonfinitePairs) return sum;
  return counted > 0 ? sum / counted : 0.0;
}

// The number of pairs that a metric is a mean of.
SIPO_HD double metric_pairs(int k, double counted, double pairs) {
  return k == kNonfinitePairs ? 1.0 : (k == kLoss || k == kActiveFraction ? pairs : counted);
}

// Adds to the sums of many calls: the metric times its pairs, and the pairs ([2][kMetrics]). Skips what is not finite.
SIPO_HD void add_metric(float* totals, int k, double value, double pairs) {
  if (!finite_float(value * pairs)) return;
  totals[k] += float(value * pairs);
  totals[kMetrics + k] += float(pairs);
}

// The bin of a noise level, of `bins` of equal width from 0 to `top`. Rounded to float, the type of σ: 0.02 as a float
// is a little less, and still begins bin 1 of 50.
SIPO_HD int level_bin(double level, int bins, double top) {
  const float place = float(level * bins / top);
  return place >= 0 ? (place < float(bins) ? int(place) : bins - 1) : 0;  // NaN: 0
}

// What one pair adds to its bin: rows[kStatistics]. If a number is not finite in float, only `nonfinite` counts.
SIPO_HD void pair_statistics(const Sample& chosen, const Sample& rejected, const Pair& p, const Settings& s,
                             double* rows) {
  const double scale = s.beta * s.loss_scale;
  const double k_w = chosen.coef * (chosen.elements / scale), k_l = rejected.coef * (rejected.elements / scale);
  rows[kModelErrorChosen] = chosen.model_error, rows[kModelErrorRejected] = rejected.model_error;
  rows[kRefErrorChosen] = chosen.ref_error, rows[kRefErrorRejected] = rejected.ref_error;
  rows[kLevelChosenGap] = chosen.error_gap, rows[kLevelRejectedGap] = rejected.error_gap;
  rows[kLevelRatio] = 0.5 * (chosen.ratio + rejected.ratio);
  rows[kLevelWeight] = 0.5 * (chosen.weight + rejected.weight);
  rows[kLevelClipped] = 0.5 * (clipped(chosen, s) + clipped(rejected, s));
  rows[kLevelActive] = p.mask ? 1.0 : 0.0;
  rows[kLevelLogits] = p.logits, rows[kLogitsSq] = p.logits * p.logits;
  rows[kLevelAccuracy] = correct(p.logits);
  rows[kLevelCoef] = k_w, rows[kCoefSq] = k_w * k_w;
  rows[kGradSq] = k_w * k_w * chosen.model_error + k_l * k_l * rejected.model_error;
  bool whole = true;
  for (int i = kFirstSummed; i < kStatistics; ++i) whole = whole && finite_float(rows[i]);
  rows[kCount] = whole ? 1.0 : 0.0, rows[kNonfinite] = whole ? 0.0 : 1.0;
  for (int i = kFirstSummed; i < kStatistics; ++i) rows[i] = whole ? rows[i] : 0.0;
}

}  // namespace sipo
