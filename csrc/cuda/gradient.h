// The gradient (docs/math.md §6) of a tile, and the kernel that computes only the gradient, for given coefficients.
#pragma once
#include <type_traits>

#include "cuda/call.h"

namespace sipo {
namespace {

// The first element of a sample's tile for this thread.
template <class Reader> __device__ __forceinline__ int64_t element(int32_t tile) {
  return int64_t(tile) * kThreads * Reader::kVector + threadIdx.x * Reader::kStep;
}
__device__ __forceinline__ int64_t target_row(const CudaArgs& a, int64_t pair, int side) {
  return (a.target_shared ? pair : pair + side * a.pairs) * a.target_stride;
}
__device__ __forceinline__ int64_t error_mask_row(const CudaArgs& a, int64_t pair, int side) {
  return (a.error_mask_shared ? pair : pair + side * a.pairs) * a.error_mask_stride;
}

// Whether the gradient is computed in double: if model or target is double, whatever the reader.
template <class Reader> __device__ __forceinline__ bool in_double(const CudaArgs& a) {
  if constexpr (Reader::kTyped) return std::is_same_v<typename Reader::Wide, double>;
  return a.model_dtype == kFloat64 || a.target_dtype == kFloat64;
}

// d of one thread's elements.
template <class Reader>
__device__ __forceinline__ void difference(const CudaArgs& a, const typename Reader::Prediction& m,
                                           const typename Reader::Target& t,
                                           typename Reader::Wide (&d)[Reader::kVector]) {
  typename Reader::Wide x[Reader::kVector], y[Reader::kVector];
  Reader::widen_all(m, a.model_dtype, x);
  Reader::widen_all(t, a.target_dtype, y);
#pragma unroll
  for (int j = 0; j < Reader::kVector; ++j) d[j] = x[j] - y[j];
}

// Writes the gradient of one thread's elements of a sample. Where float holds both types exactly, a d in double rounds
// to what float arithmetic gives.
template <class Reader>
__device__ __forceinline__ void write_gradient(const CudaArgs& a, typename Reader::Wide (&d)[Reader::kVector],
                                               const Weights& weights, double coef, int64_t sample, int64_t i,
                                               Policy policy) {
  const float c = float(coef);
#pragma unroll
  for (int j = 0; j < Reader::kVector; ++j) {  // exact zeros, whatever the inputs are
    if constexpr (Reader::kMasked) {
      const float w = Reader::weight(weights, a.error_mask_dtype, j);
      d[j] = w == 0 ? 0 : in_double<Reader>(a) ? w * d[j] : w * float(d[j]);
    }
    if (in_double<Reader>(a)) d[j] = coef == 0 ? 0 : coef * d[j];
    else d[j] = c == 0 ? 0 : c * float(d[j]);
  }
  Reader::store(a.grad, sample * a.elements + i, a.elements - i, a.model_dtype, d, policy);
}

// Computes the gradient of one thread's elements of a pair. slots: where shared memory holds their d, or -1.
template <class Reader>
__device__ __forceinline__ void gradient_tile(const CudaArgs& a, int64_t pair, int32_t tile, const double (&coef)[2],
                                              const int32_t (&slots)[2], Policy out) {
  const int64_t i = element<Reader>(tile), left = a.elements - i;
  if (left <= 0) return;
  const Policy pass = device::stream();
  typename Reader::Prediction m[2] = {};
  typename Reader::Target t[2] = {};
  Weights w[2] = {};
  bool wanted[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    wanted[side] = coef[side] != 0 && slots[side] < 0;
    const int64_t at = (pair + side * a.pairs) * a.model_stride + i;
    Reader::load(m[side], a.model, at, left, a.model_dtype, pass, wanted[side]);
    Reader::load(t[side], a.target, target_row(a, pair, side) + i, left, a.target_dtype, pass,
                 wanted[side] && !(side && a.target_shared && wanted[0]));
    if constexpr (Reader::kMasked)
      Reader::load_weights(w[side], a.error_mask, error_mask_row(a, pair, side) + i, a.error_mask_dtype, pass,
                           wanted[side]);
  }
  if (a.target_shared && wanted[0]) t[1] = t[0];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    typename Reader::Wide d[Reader::kVector];
    difference<Reader>(a, m[side], t[side], d);
    if constexpr (Reader::kTyped)
      if (slots[side] >= 0) Reader::take_back(slots[side], d);
    write_gradient<Reader>(a, d, w[side], coef[side], pair + side * a.pairs, i, out);
  }
}

template <class Reader>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) grad_kernel(const __grid_constant__ CudaArgs a) {
  const double first = number(a.upstream, 0, 1.0);
  if (a.remembered && blockIdx.x == 0 && threadIdx.x == 0 && finite(first)) *a.remembered = first;
  const auto done = [&](double came) { return a.mend && came == get(a.numbers, kMetrics, a.settings.double_stats); };
  if (!a.upstream.stride && done(first)) return;
  const int64_t all = a.pairs * a.tiles, end = all * (blockIdx.x + 1) / gridDim.x;
  for (int64_t u = all * blockIdx.x / gridDim.x; u < end;) {
    const int64_t pair = u / a.tiles, next = (pair + 1) * a.tiles < end ? (pair + 1) * a.tiles : end;
    const double came = number(a.upstream, pair, 1.0);
    double coef[2];
#pragma unroll
    for (int side = 0; side < 2; ++side)
      coef[side] = upstream_coef(get(a.coef, pair + side * a.pairs, a.settings.double_stats), came, a.settings.double_stats);
    if (done(came)) u = next;
    for (; u < next; ++u) gradient_tile<Reader>(a, pair, u - pair * a.tiles, coef, {-1, -1}, device::normal());
  }
}

}  // namespace
}  // namespace sipo
