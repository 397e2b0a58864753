// How a thread reads and writes its elements, once for each kind of tensors: all of one type, 16 bytes at a time; of any
// mix of types, 4 elements at a time; and of anything at any address, one by one.
//
// A reader has: kVector, the elements a thread handles at a time; Raw, what it gets from memory; load (many loads are
// started before the first is used), widen and store; Wide, the type elements are widened to, in which the gradient is
// computed. Offsets are in elements.
#pragma once
#include <type_traits>

#include "cuda/device.h"
#include "elements.h"

namespace sipo {
namespace {

using device::Policy;
using device::Vec16;

template <int kCount> struct Raw16 { Vec16 part[kCount]; };

template <class T> __device__ __forceinline__ const T* at(const void* base, int64_t i) {
  return static_cast<const T*>(base) + i;
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

// All tensors of type T.
template <class T> struct Same {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr bool kHolds = true;  // its Raw fits a slot of shared memory
  using Raw = Raw16<1>;
  using Wide = std::conditional_t<sizeof(T) == 8, double, float>;

  static __device__ __forceinline__ void load(Raw& raw, const void* base, int64_t i, int, Policy policy) {
    raw.part[0] = device::load16(at<T>(base, i), policy);
  }
  template <class Acc> static __device__ __forceinline__ void widen_all(const Raw& raw, int, Acc (&out)[kVector]) {
    unpack<T>(raw.part, out);
  }
  template <class Acc>
  static __device__ __forceinline__ void store(void* base, int64_t i, int, const Acc (&x)[kVector], Policy policy) {
    Vec16 v;
    pack<T>(x, &v);
    device::store16(static_cast<T*>(base) + i, v, policy);
  }
};

// Each tensor of its own type, known at run time: a branch that all threads take alike.
struct Mixed {
  static constexpr int kVector = 4;
  static constexpr bool kHolds = false;
  using Raw = Raw16<2>;
  using Wide = double;

  static __device__ __forceinline__ void load(Raw& raw, const void* base, int64_t i, int dtype, Policy policy) {
    const char* p = static_cast<const char*>(base) + i * (dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2);
    if (dtype == kFloat32 || dtype == kFloat64) {
      raw.part[0] = device::load16(p, policy);
      if (dtype == kFloat64) raw.part[1] = device::load16(p + 16, policy);
    } else {
      const uint64_t four = device::load1(reinterpret_cast<const uint64_t*>(p));
      raw.part[0].word[0] = uint32_t(four), raw.part[0].word[1] = uint32_t(four >> 32);
    }
  }
  template <class Acc> static __device__ __forceinline__ void widen_all(const Raw& raw, int dtype, Acc (&out)[kVector]) {
    if (dtype == kFloat32) unpack<float>(raw.part, out);
    else if (dtype == kBfloat16) unpack<bf16>(raw.part, out);
    else if (dtype == kFloat16) unpack<fp16>(raw.part, out);
    else unpack<double>(raw.part, out);
  }
  template <class T, class Acc>
  static __device__ __forceinline__ void store_as(void* base, int64_t i, const Acc (&x)[kVector], Policy policy) {
    T* to = static_cast<T*>(base) + i;
    Vec16 v[2] = {};
    pack<T>(x, v);
    if constexpr (sizeof(T) == 2) {
      device::store1(reinterpret_cast<uint64_t*>(to), uint64_t(v[0].word[0]) | uint64_t(v[0].word[1]) << 32);
    } else {
      device::store16(to, v[0], policy);
      if constexpr (sizeof(T) == 8) device::store16(to + 2, v[1], policy);
    }
  }
  template <class Acc>
  static __device__ __forceinline__ void store(void* base, int64_t i, int dtype, const Acc (&x)[kVector], Policy policy) {
    if (dtype == kFloat32) store_as<float>(base, i, x, policy);
    else if (dtype == kBfloat16) store_as<bf16>(base, i, x, policy);
    else if (dtype == kFloat16) store_as<fp16>(base, i, x, policy);
    else store_as<double>(base, i, x, policy);
  }
};

// Anything, anywhere: sizes and addresses that do not fit 16 bytes.
struct Any {
  static constexpr int kVector = 1;
  static constexpr bool kHolds = false;
  struct Raw { double value; };  // holds every element of the four types exactly
  using Wide = double;

  static __device__ __forceinline__ void load(Raw& raw, const void* base, int64_t i, int dtype, Policy) {
    if (dtype == kFloat32) raw.value = device::load1(at<float>(base, i));
    else if (dtype == kBfloat16) raw.value = widen(device::load1(at<bf16>(base, i)));
    else if (dtype == kFloat16) raw.value = widen(device::load1(at<fp16>(base, i)));
    else raw.value = device::load1(at<double>(base, i));
  }
  template <class Acc> static __device__ __forceinline__ void widen_all(const Raw& raw, int, Acc (&out)[1]) {
    out[0] = raw.value;
  }
  template <class T> static __device__ __forceinline__ void store_as(void* base, int64_t i, double x) {
    T y;
    narrow(x, y);
    device::store1(static_cast<T*>(base) + i, y);
  }
  template <class Acc>
  static __device__ __forceinline__ void store(void* base, int64_t i, int dtype, const Acc (&x)[1], Policy) {
    if (dtype == kFloat32) store_as<float>(base, i, x[0]);
    else if (dtype == kBfloat16) store_as<bf16>(base, i, x[0]);
    else if (dtype == kFloat16) store_as<fp16>(base, i, x[0]);
    else store_as<double>(base, i, x[0]);
  }
};

}  // namespace
}  // namespace sipo
