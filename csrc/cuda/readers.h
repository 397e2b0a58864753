// How a thread reads and writes its elements, for three kinds of tensors: predictions and target of the usual types,
// 16 bytes of the wider at a time (Vector); any mix of types, 4 elements at a time (Mixed); anything at any address,
// one element at a time (Any).
//
// A reader has: kVector, the number of elements of a sample that a thread handles at a time, in runs of kStep that are
// a block apart; Prediction and Target, the raw elements of the policy or the reference, and of the target; load (if
// `wanted`; many loads are issued before the first is used), widen_all and store; Wide, a type that holds every element
// exactly; kMasked, whether there is an error mask. Offsets are in elements; `left` is the number of elements of the
// sample from there on. A load that is not wanted leaves its destination as it was.
#pragma once
#include <type_traits>

#include "cuda/device.h"
#include "elements.h"

namespace sipo {

constexpr int kThreads = 320, kBlocksPerSm = 2;  // 96 registers for each thread
enum ReaderCode : int { kVectorReader, kMixedReader, kAnyReader };  // of sipo_kernels/backends/cuda/plan.py

namespace {

using device::Policy;
using device::Vec16;

template <class T> __device__ __forceinline__ const T* at(const void* base, int64_t i) {
  return static_cast<const T*>(base) + i;
}

// Calls run with an element of the type that `dtype` names: all threads take the same branch.
template <class Run> __device__ __forceinline__ void with_element(int dtype, Run run) {
  if (dtype == kFloat32) run(float());
  else if (dtype == kBfloat16) run(bf16());
  else if (dtype == kFloat16) run(fp16());
  else run(double());
}

// N elements of type T in consecutive words.
template <class T, class Acc, int N> __device__ __forceinline__ void unpack(const Vec16* words, Acc (&out)[N]) {
  constexpr int kEach = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Vec16& v = words[i / kEach];
    const int j = i % kEach;
    if constexpr (sizeof(T) == 2) {
      out[i] = widen(bits<T>(uint16_t(v.word[j / 2] >> 16 * (j % 2))));
    } else if constexpr (sizeof(T) == 4) {
      out[i] = widen(bits<T>(v.word[j]));
    } else {
      out[i] = Acc(bits<T>(uint64_t(v.word[2 * j]) | uint64_t(v.word[2 * j + 1]) << 32));
    }
  }
}
template <class T, class Acc, int N> __device__ __forceinline__ void pack(const Acc (&x)[N], Vec16* words) {
  constexpr int kEach = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    Vec16& v = words[i / kEach];
    const int j = i % kEach;
    T y;
    narrow(x[i], y);
    if constexpr (sizeof(T) == 2) {
      const uint32_t half = bits<uint16_t>(y);
      v.word[j / 2] = j % 2 ? v.word[j / 2] | half << 16 : half;
    } else if constexpr (sizeof(T) == 4) {
      v.word[j] = bits<uint32_t>(y);
    } else {
      const uint64_t both = bits<uint64_t>(y);
      v.word[2 * j] = uint32_t(both), v.word[2 * j + 1] = uint32_t(both >> 32);
    }
  }
}

// N elements of type T.
template <class T, int N> struct Elements {
  static constexpr int kParts = N * sizeof(T) / 16;
  Vec16 part[kParts];

  // Drops the first elements and moves up the others.
  template <int kFirst> __device__ __forceinline__ void drop() {
    constexpr int kWords = kParts * 4, kAway = kFirst * sizeof(T) / 4;
#pragma unroll
    for (int i = kAway; i < kWords; ++i) part[(i - kAway) / 4].word[(i - kAway) % 4] = part[i / 4].word[i % 4];
  }
};

// A thread's own places in shared memory, after the scratch memory. No other thread uses them, so nothing has to be
// synchronised.
constexpr int kScratchBytes = 1024;

__device__ __forceinline__ Vec16* place(int32_t number) {
  return reinterpret_cast<Vec16*>(device::shared_memory() + kScratchBytes) + number * kThreads + threadIdx.x;
}

// Policy and reference of type P, target of type T, which is P or wider. Neighbouring threads read neighbouring bytes
// of every tensor, hence the steps: two consecutive loads of 16 bytes would request each sector of the target twice.
template <class P, class T> struct Vector {
  static_assert(sizeof(T) == sizeof(P) || sizeof(T) == 2 * sizeof(P));
  static constexpr bool kTyped = true;  // types are known at compile time; has slots in shared memory
  static constexpr bool kHalf = sizeof(P) == 2, kMasked = false;
  static constexpr int kVector = 16 / sizeof(P), kStep = 16 / sizeof(T);
  using Prediction = Elements<P, kVector>;
  using Target = Elements<T, kVector>;
  using Wide = std::conditional_t<sizeof(T) == 8, double, float>;

  static __device__ __forceinline__ bool within(int step, int64_t left) {
    return step == 0 || step * kThreads * kStep < left;
  }
  template <class E>
  static __device__ __forceinline__ void load(Elements<E, kVector>& raw, const void* base, int64_t i, int64_t left, int,
                                              Policy policy, bool wanted = true) {
#pragma unroll
    for (int s = 0; s < kVector / kStep; ++s) {
      const E* p = at<E>(base, i) + s * kThreads * kStep;
      if constexpr (sizeof(E) == sizeof(T)) device::load16(raw.part[s], p, policy, wanted && within(s, left));
      else device::load8(raw.part[s / 2], s % 2 * 2, p, policy, wanted && within(s, left));
    }
  }
  template <class E, class Acc, int N>
  static __device__ __forceinline__ void widen_all(const Elements<E, kVector>& raw, int, Acc (&out)[N]) {
    unpack<E>(raw.part, out);
  }
  template <class Acc>
  static __device__ __forceinline__ void store(void* base, int64_t i, int64_t left, int, const Acc (&x)[kVector],
                                               Policy policy) {
    Vec16 v;
    pack<P>(x, &v);
#pragma unroll
    for (int s = 0; s < kVector / kStep; ++s) {
      P* const p = static_cast<P*>(base) + i + s * kThreads * kStep;
      if (!within(s, left)) continue;
      if constexpr (sizeof(P) == sizeof(T)) device::store16(p, v, policy);
      else device::store8(p, v, 2 * s, policy);
    }
  }

  // To and from slot number `slot`.
  static __device__ __forceinline__ void put_aside(int32_t slot, const Wide (&x)[kVector]) {
    Elements<Wide, kVector> raw;
    pack<Wide>(x, raw.part);
#pragma unroll
    for (int i = 0; i < raw.kParts; ++i) *place(slot * raw.kParts + i) = raw.part[i];
  }
  static __device__ __forceinline__ void take_back(int32_t slot, Wide (&x)[kVector]) {
    Elements<Wide, kVector> raw;
#pragma unroll
    for (int i = 0; i < raw.kParts; ++i) raw.part[i] = *place(slot * raw.kParts + i);
    unpack<Wide>(raw.part, x);
  }
};

// Each tensor has its own type, known at run time.
struct Mixed {
  static constexpr bool kTyped = false, kHalf = false, kMasked = false;
  static constexpr int kVector = 4, kStep = 4;
  struct Prediction { Vec16 part[2]; };
  using Target = Prediction;
  using Wide = double;

  static __device__ __forceinline__ void load(Prediction& raw, const void* base, int64_t i, int64_t, int dtype,
                                              Policy policy, bool wanted = true) {
    const bool half = dtype == kBfloat16 || dtype == kFloat16;
    const char* p = static_cast<const char*>(base) + i * (half ? 2 : dtype == kFloat32 ? 4 : 8);
    device::load8(raw.part[0], 0, p, policy, wanted && half);
    device::load16(raw.part[0], p, policy, wanted && !half);
    device::load16(raw.part[1], p + 16, policy, wanted && dtype == kFloat64);
  }
  template <class Acc>
  static __device__ __forceinline__ void widen_all(const Prediction& raw, int dtype, Acc (&out)[kVector]) {
    with_element(dtype, [&](auto element) { unpack<decltype(element)>(raw.part, out); });
  }
  template <class Acc>
  static __device__ __forceinline__ void store(void* base, int64_t i, int64_t, int dtype, const Acc (&x)[kVector],
                                               Policy policy) {
    with_element(dtype, [&](auto element) {
      using T = decltype(element);
      T* to = static_cast<T*>(base) + i;
      Vec16 v[2] = {};
      pack<T>(x, v);
      if constexpr (sizeof(T) == 2) {
        device::store8(to, v[0], 0, policy);
      } else {
        device::store16(to, v[0], policy);
        if constexpr (sizeof(T) == 8) device::store16(to + 2, v[1], policy);
      }
    });
  }
};

// Any size at any address.
struct Any {
  static constexpr bool kTyped = false, kHalf = false, kMasked = false;
  static constexpr int kVector = 1, kStep = 1;
  struct Prediction { double value; };  // holds every element of the four types exactly
  using Target = Prediction;
  using Wide = double;

  static __device__ __forceinline__ void load(Prediction& raw, const void* base, int64_t i, int64_t, int dtype, Policy,
                                              bool wanted = true) {
    if (!wanted) return;
    with_element(dtype, [&](auto element) { raw.value = widen(device::load1(at<decltype(element)>(base, i))); });
  }
  template <class Acc>
  static __device__ __forceinline__ void widen_all(const Prediction& raw, int, Acc (&out)[1]) {
    out[0] = raw.value;
  }
  template <class Acc>
  static __device__ __forceinline__ void store(void* base, int64_t i, int64_t, int dtype, const Acc (&x)[1], Policy) {
    with_element(dtype, [&](auto element) {
      narrow(double(x[0]), element);
      device::store1(static_cast<decltype(element)*>(base) + i, element);
    });
  }
};

// Weights of a thread's elements: four bytes in the first word, or a float in each.
struct Weights { Vec16 raw; };

// Mixed or Any with an error mask: a weight for each element, bool or float32. One that a pair shares is read for both
// samples, the second time from the cache.
template <class Reader> struct WithErrorMask : Reader {
  static constexpr bool kMasked = true;

  static __device__ __forceinline__ void load_weights(Weights& w, const void* base, int64_t i, int dtype, Policy policy,
                                                      bool wanted = true) {
    const bool wide = dtype == kFloat32;
    if constexpr (Reader::kVector == 4) {
      device::load4(w.raw.word[0], at<uint8_t>(base, i), policy, wanted && !wide);
      device::load16(w.raw, at<float>(base, i), policy, wanted && wide);
    } else if (wanted) {
      w.raw.word[0] = wide ? device::load1(at<uint32_t>(base, i)) : device::load1(at<uint8_t>(base, i));
    }
  }
  static __device__ __forceinline__ float weight(const Weights& w, int dtype, int j) {
    return dtype == kFloat32 ? bits<float>(w.raw.word[j]) : w.raw.word[0] >> 8 * j & 0xff ? 1.0f : 0.0f;
  }
};

}  // namespace
}  // namespace sipo
