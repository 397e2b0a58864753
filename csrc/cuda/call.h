// One call: its arguments, its workspace, how its pairs are grouped, and access to the numbers of pairs and samples.
#pragma once
#include <type_traits>

#include "cuda/readers.h"
#include "report.h"

namespace sipo {

// A number for each sample, of any type: element i lies i · stride elements further on. `data` may be null.
#define SIPO_NUMBERS(X) X(const void*, data) X(int64_t, stride) X(int64_t, dtype)
struct Numbers { SIPO_NUMBERS(SIPO_DECLARE) };

// The fields of CudaArgs in sipo_kernels/backends/cuda/launch.py. Strides are between samples, in elements.
#define SIPO_CUDA_ARGS(X) \
  X(const void*, model) X(const void*, ref) /* null if ref_error is given */ X(const void*, target) \
  X(int64_t, model_stride) X(int64_t, ref_stride) X(int64_t, target_stride) \
  X(int64_t, pairs) X(int64_t, elements) \
  X(Numbers, ratio_scale) X(Numbers, error_weight) X(Numbers, ref_error) \
  X(Numbers, pair_levels) /* of pairs, where there are levels; integers too */ \
  X(Numbers, upstream) /* sipo_cuda_pair_grad: of pairs, with stride 0 if there is one for all; none: 1 */ \
  /* Results, float or double. */ \
  X(void*, loss) X(void*, samples) /* [kSampleRows][S] */ X(void*, logits) X(void*, numbers) /* [kMetrics + 1] */ \
  X(bool*, mask) \
  X(void*, grad) /* null: no gradient. Samples lie `elements` apart */ \
  X(float*, metrics) /* Totals in sipo_kernels/output.py: [2][kMetrics] or null */ \
  X(float*, levels) /* [kStatistics][bins] or null */ \
  X(const double*, expected_at) /* where to read the expected upstream gradient; null: it is `expected` */ \
  X(double*, remembered) /* where to store the upstream gradient that came, or null */ \
  X(const void*, coef) /* sipo_cuda_pair_grad: [S] */ \
  X(void*, workspace) X(void*, stream) \
  X(double, expected) X(double, top) \
  X(Settings, settings) \
  /* The plan: see sipo_kernels/backends/cuda/plan.py. */ \
  X(int32_t, group) /* pairs */ X(int32_t, tiles) /* of a pair */ \
  X(int32_t, blocks) X(int32_t, parts) X(int32_t, lead) X(int32_t, hold) X(int32_t, shared_bytes) X(int32_t, one_pass) \
  X(float, keep) \
  X(int32_t, model_dtype) X(int32_t, ref_dtype) X(int32_t, target_dtype) \
  X(int32_t, reader) \
  X(int32_t, double_terms) /* half precision read by Vector is summed in double */ \
  X(int32_t, target_shared) /* target is [B, ...] */ \
  X(int32_t, loss_per_pair) \
  X(int32_t, bins) \
  X(int32_t, mend) /* sipo_cuda_pair_grad: leave alone what was made for the upstream gradient that came */ \
  X(int32_t, device) \
  X(const void*, error_mask) /* null: every element counts */ X(int64_t, error_mask_stride) \
  X(int32_t, error_mask_dtype) /* kBool or kFloat32 */ X(int32_t, error_mask_shared) /* it is [B, ...] */
struct CudaArgs { SIPO_CUDA_ARGS(SIPO_DECLARE) };

namespace {

// Sums of a pair: three for each sample, the inner product that the safeguard needs (§6, relatives), and with an error
// mask Σw of each sample.
constexpr int kInnerSum = 6, kWeightSum = 7, kSums = 7, kMaskedSums = 9;

struct PairReport {  // §8 of one pair
  double facts[kFacts], statistics[kStatistics];
  double bin;
};

struct Workspace {
  double *partial, *coef;     // [B][parts][sums]; [S], times the upstream gradient
  Sample* samples;            // [S]
  Pair* pairs;                // [B]
  PairReport* reports;        // [B]
  uint32_t *ready, *arrived;  // groups whose coefficients are ready; blocks that have reduced each group
  int64_t bytes = 0;

  Workspace(const CudaArgs& a, int sums, int groups) {
    const auto take = [&](auto*& part, int64_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(uintptr_t(a.workspace) + bytes);
      bytes += count * sizeof *part;
    };
    take(partial, a.pairs * a.parts * sums);
    take(coef, 2 * a.pairs);
    take(samples, 2 * a.pairs);
    take(pairs, a.pairs);
    take(reports, a.pairs);
    take(ready, 1);
    take(arrived, groups);
  }
};

// The argument of pair_kernel: a call, and what the host computes because the kernel has no registers to spare.
struct Params : CudaArgs {
  bool safeguarded;
  int32_t sums, groups;  // sums of a pair
  double size;           // elements
  Workspace work;

  explicit Params(const CudaArgs& a)
      : CudaArgs(a),
        safeguarded(a.settings.safeguard >= 0),
        sums(a.error_mask ? kMaskedSums : safeguarded ? kSums : kSums - 1),
        groups(int32_t((a.pairs + a.group - 1) / a.group)),
        size(double(a.elements)),
        work(a, sums, groups) {}
};

// Group k: its pairs, its tiles (numbered pair by pair), and the number of blocks that share them.
struct Group {
  int32_t first_pair, pairs, tiles, blocks;

  __device__ __forceinline__ Group(const CudaArgs& a, int32_t k) : first_pair(k * a.group) {
    const int32_t left = int32_t(a.pairs) - first_pair;
    pairs = left < a.group ? left : a.group;
    tiles = pairs * a.tiles;  // below 2^31: backends/cuda/plan.py
    blocks = tiles < int32_t(gridDim.x) ? tiles : int32_t(gridDim.x);
  }
  __device__ __forceinline__ int32_t first_tile(int32_t block) const { return int64_t(tiles) * block / blocks; }
  __device__ __forceinline__ int32_t owner(int32_t tile) const {  // the block that reduces it
    return ((int64_t(tile) + 1) * blocks - 1) / tiles;
  }
};

__device__ __forceinline__ double number(const Numbers& x, int64_t i, double otherwise) {
  if (!x.data) return otherwise;
  Any::Prediction raw;
  Any::load(raw, x.data, i * x.stride, 1, int(x.dtype), Policy{});
  return raw.value;
}

__device__ __forceinline__ double noise_level(const Numbers& x, int64_t i) {
  if (x.dtype == kInt64) return double(at<int64_t>(x.data, i * x.stride)[0]);
  if (x.dtype == kInt32) return double(at<int32_t>(x.data, i * x.stride)[0]);
  return number(x, i, 0.0);
}

__device__ __forceinline__ double get(const void* array, int64_t i, bool wide) {
  return wide ? static_cast<const double*>(array)[i] : double(static_cast<const float*>(array)[i]);
}

}  // namespace
}  // namespace sipo
