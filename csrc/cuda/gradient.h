// The gradient (docs/math.md §6): of a tile, and the kernel that makes it alone, for coefficients already known.
#pragma once
#include <type_traits>

#include "cuda/call.h"

namespace sipo {
namespace {

// Where tile `tile` of a sample begins for this thread.
template <class Reader> __device__ __forceinline__ int64_t element(int32_t tile) {
  return int64_t(tile) * kThreads * Reader::kVector + threadIdx.x * Reader::kStep;
}
__device__ __forceinline__ int64_t target_row(const Args& a, int64_t pair, int half) {
  return (a.target_shared ? pair : pair + half * a.pairs) * a.target_stride;
}

// A coefficient for the upstream gradient that came or is expected. Rounded as `coef` and the product are in memory, so
// that a gradient has the same bits whenever it is made.
__device__ __forceinline__ double upstream_coef(double coef, double upstream, bool wide) {
  if (wide) return coef == 0 ? 0.0 : coef * upstream;
  const float c = float(coef);
  return c == 0 ? 0.0f : c * float(upstream);
}

template <class T> __device__ __forceinline__ T gradient_of(T c, T model, T target) {
  return c == 0 ? T(0) : c * (model - target);  // exact zeros, whatever was loaded
}

// Of one thread's elements of a sample. In double where model or target is, else in float, whatever the reader.
template <class Reader>
__device__ __forceinline__ void write_gradient(const Args& a, const typename Reader::Prediction& m,
                                               const typename Reader::Target& t, double coef, int64_t sample,
                                               int64_t i, Policy policy) {
  using Wide = typename Reader::Wide;
  const bool wide = Reader::kTyped ? std::is_same_v<Wide, double>
                                   : a.model_dtype == kFloat64 || a.target_dtype == kFloat64;
  Wide x[Reader::kVector], y[Reader::kVector];
  Reader::widen_all(m, a.model_dtype, x);
  Reader::widen_all(t, a.target_dtype, y);
#pragma unroll
  for (int j = 0; j < Reader::kVector; ++j)
    x[j] = wide ? Wide(gradient_of<double>(coef, x[j], y[j])) : Wide(gradient_of<float>(coef, x[j], y[j]));
  Reader::store(a.grad, sample * a.elements + i, a.elements - i, a.model_dtype, x, policy);
}

// Of one thread's elements of a pair. slots: where shared memory holds its policy and, behind it, its target; or -1.
template <class Reader>
__device__ __forceinline__ void gradient_tile(const Args& a, int64_t pair, int32_t tile, const double (&coef)[2],
                                              const int32_t (&slots)[2], Policy out) {
  const int64_t i = element<Reader>(tile), left = a.elements - i;
  if (left <= 0) return;
  const Policy pass = device::stream();
  typename Reader::Prediction m[2] = {};
  typename Reader::Target t[2] = {};
  const bool shared = a.target_shared && coef[0] != 0;  // the winner's target is here and is the loser's too
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t sample = pair + half * a.pairs;
    const int32_t slot = a.target_shared ? slots[0] : slots[half];
    const bool wanted = coef[half] != 0, target_wanted = wanted && !(half && shared);
    Reader::load(m[half], a.model, sample * a.model_stride + i, left, a.model_dtype, pass, wanted && slots[half] < 0);
    Reader::load(t[half], a.target, target_row(a, pair, half) + i, left, a.target_dtype, pass, target_wanted && slot < 0);
    if constexpr (Reader::kTyped) {
      if (wanted && slots[half] >= 0) m[half].take_back(slots[half]);
      if (target_wanted && slot >= 0) t[half].take_back(slot + Reader::kTargetSlot);
    }
  }
  if (shared) t[1] = t[0];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    write_gradient<Reader>(a, m[half], t[half], coef[half], pair + half * a.pairs, i, out);
}

template <class Reader>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) grad_kernel(const __grid_constant__ Args a) {
  const double first = number(a.upstream, 0, 1.0);
  if (a.remembered && blockIdx.x == 0 && threadIdx.x == 0 && finite(first)) *a.remembered = first;
  const auto done = [&](double came) { return a.mend && came == get(a.numbers, kMetrics, a.double_stats); };
  if (!a.upstream.stride && done(first)) return;
  const int64_t all = a.pairs * a.tiles, end = all * (blockIdx.x + 1) / gridDim.x;
  for (int64_t u = all * blockIdx.x / gridDim.x; u < end;) {
    const int64_t pair = u / a.tiles, next = (pair + 1) * a.tiles < end ? (pair + 1) * a.tiles : end;
    const double came = number(a.upstream, pair, 1.0);
    double coef[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      coef[half] = upstream_coef(get(a.coef, pair + half * a.pairs, a.double_stats), came, a.double_stats);
    if (done(came)) u = next;
    for (; u < next; ++u) gradient_tile<Reader>(a, pair, u - pair * a.tiles, coef, {-1, -1}, device::normal());
  }
}

}  // namespace
}  // namespace sipo
