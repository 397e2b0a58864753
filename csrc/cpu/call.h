// The arguments of a call of the CPU part.
#pragma once
#include <cstdint>

#include "pair_math.h"

namespace sipo {

// The fields of CpuArgs in sipo_kernels/backends/native.py. Strides are between samples, in elements.
#define SIPO_CPU_ARGS(X) \
  X(const void*, model) X(const void*, ref) /* null if ref_error is given */ X(const void*, target) \
  X(int64_t, model_stride) X(int64_t, ref_stride) X(int64_t, target_stride) \
  X(int64_t, pairs) X(int64_t, elements) \
  X(const void*, error_mask) /* null: every element counts */ X(int64_t, error_mask_stride) \
  X(const void*, ratio_scale) X(const void*, error_weight) X(const void*, ref_error) /* each [S] or null */ \
  /* Results, float or double. */ \
  X(void*, loss) X(void*, samples) /* [kSampleRows][S] */ X(void*, logits) X(void*, numbers) /* [kMetrics + 1] */ \
  X(const void*, coef) /* sipo_pair_grad: [S], float or double, the upstream gradient included */ \
  X(bool*, mask) \
  X(void*, grad) /* null: no gradient. Samples lie `elements` apart */ \
  X(float*, metrics) /* Totals in sipo_kernels/output.py: [2][kMetrics] or null */ \
  X(float*, levels) /* [kStatistics][bins] or null */ \
  X(const void*, pair_levels) /* [B], where there are levels */ \
  X(double, top) X(double, upstream) /* for which the gradient is made */ \
  X(const char*, isa) /* null: the widest */ \
  X(Settings, settings) \
  X(int32_t, model_dtype) X(int32_t, ref_dtype) X(int32_t, target_dtype) \
  X(int32_t, ratio_scale_dtype) X(int32_t, error_weight_dtype) X(int32_t, ref_error_dtype) X(int32_t, pair_levels_dtype) \
  X(int32_t, bins) \
  X(int32_t, target_shared) /* target is [B, ...] */ \
  X(int32_t, error_mask_dtype) /* kBool or kFloat32 */ X(int32_t, error_mask_shared) /* it is [B, ...] */ \
  X(int32_t, wide_sums) /* sum in double, whatever the types */ \
  X(int32_t, loss_per_pair) \
  X(int32_t, threads) \
  X(int32_t, own_threads) /* not torch's, which is what happens anyway where its OpenMP runtime is not found */
struct CpuArgs { SIPO_CPU_ARGS(SIPO_DECLARE) };

}  // namespace sipo
