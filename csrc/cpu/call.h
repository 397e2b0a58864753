// The arguments of a call of the CPU part, and the list of their fields that is compared when the library is loaded.
#pragma once

#include <cstdint>
#include <string>

#include "describe.h"
#include "pair_math.h"

namespace sipo {

// Mirrored field by field in sipo_kernels/backends/native.py. Strides are between samples, in elements.
struct CpuArgs {
  const void *model, *ref, *target;  // ref: null if ref_error is given
  int64_t model_stride, ref_stride, target_stride;
  int64_t pairs, elements;
  const void *ratio_scale, *error_weight, *ref_error;  // [S] or null
  // Float or double; samples: [kSampleRows][S]; numbers: [kMetrics + 1].
  void *loss, *samples, *logits, *numbers;
  const void* coef;  // sipo_pair_grad: [S], float or double, the upstream gradient included
  bool* mask;
  void* grad;         // null: no gradient. Samples lie `elements` apart
  float* metrics;     // Totals in sipo_kernels/output.py: [2][kMetrics] or null
  float* levels;      // [kStatistics][bins] or null
  const void* timesteps;  // [B], where there are levels
  double top;
  double upstream;  // that the gradient is made for
  const char* isa;  // null: the widest
  Settings settings;
  int32_t model_dtype, ref_dtype, target_dtype;
  int32_t ratio_scale_dtype, error_weight_dtype, ref_error_dtype, timesteps_dtype;
  int32_t bins;
  int32_t target_shared;  // target is [B, ...]
  int32_t wide_sums;      // sum in double, whatever the types
  int32_t loss_per_pair;
  int32_t threads;
  int32_t own_threads;  // not torch's: what happens anyway where torch's OpenMP runtime is not to be found
};

namespace {

inline std::string describe_arguments() {
  using Described = CpuArgs;
  std::string text = describe_names() + "arguments";
  SIPO_FIELD(model) SIPO_FIELD(ref) SIPO_FIELD(target)
  SIPO_FIELD(model_stride) SIPO_FIELD(ref_stride) SIPO_FIELD(target_stride) SIPO_FIELD(pairs) SIPO_FIELD(elements)
  SIPO_FIELD(ratio_scale) SIPO_FIELD(error_weight) SIPO_FIELD(ref_error)
  SIPO_FIELD(loss) SIPO_FIELD(samples) SIPO_FIELD(logits) SIPO_FIELD(numbers) SIPO_FIELD(coef) SIPO_FIELD(mask)
  SIPO_FIELD(grad) SIPO_FIELD(metrics) SIPO_FIELD(levels) SIPO_FIELD(timesteps) SIPO_FIELD(top) SIPO_FIELD(upstream)
  SIPO_FIELD(isa) SIPO_FIELD(settings) SIPO_FIELD(model_dtype) SIPO_FIELD(ref_dtype) SIPO_FIELD(target_dtype)
  SIPO_FIELD(ratio_scale_dtype) SIPO_FIELD(error_weight_dtype) SIPO_FIELD(ref_error_dtype)
  SIPO_FIELD(timesteps_dtype) SIPO_FIELD(bins) SIPO_FIELD(target_shared) SIPO_FIELD(wide_sums)
  SIPO_FIELD(loss_per_pair) SIPO_FIELD(threads) SIPO_FIELD(own_threads)
  return text + " =" + decimal(sizeof(CpuArgs)) + "\n";
}

}  // namespace

}  // namespace sipo
