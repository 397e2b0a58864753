// Vectors of elements in GCC/Clang vector types: loads that widen, stores that narrow. File-local, so that the linker
// cannot choose a function that was compiled for a wider instruction set.
#pragma once
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
// GCC's own header leaves an unused operand uninitialised and warns about it wherever it is inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#include "elements.h"

namespace sipo {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class Acc> struct Simd;
template <> struct Simd<float> {
  static constexpr int width = kBytes / 4;
  typedef float vec __attribute__((vector_size(kBytes)));
};
template <> struct Simd<double> {
  static constexpr int width = kBytes / 8;
  typedef double vec __attribute__((vector_size(kBytes)));
};
using vfloat = Simd<float>::vec;
using vdouble = Simd<double>::vec;
typedef uint16_t vu16 __attribute__((vector_size(kBytes / 2)));
typedef uint32_t vu32 __attribute__((vector_size(kBytes)));
typedef uint16_t vu16_half __attribute__((vector_size(kBytes / 4)));
typedef uint32_t vu32_half __attribute__((vector_size(kBytes / 2)));
typedef float vfloat_half __attribute__((vector_size(kBytes / 2)));

template <class V> inline V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// GCC 12 splits a conversion between vectors of different widths in two and joins the halves again.
inline vdouble to_double(vfloat_half v) {
#if defined(__AVX512F__)
  return bits<vdouble>(_mm512_cvtps_pd(bits<__m256>(v)));
#elif defined(__AVX2__)
  return bits<vdouble>(_mm256_cvtps_pd(bits<__m128>(v)));
#else
  return __builtin_convertvector(v, vdouble);
#endif
}
inline vfloat_half to_float(vdouble v) {
#if defined(__AVX512F__)
  return bits<vfloat_half>(_mm512_cvtpd_ps(bits<__m512d>(v)));
#elif defined(__AVX2__)
  return bits<vfloat_half>(_mm256_cvtpd_ps(bits<__m256d>(v)));
#else
  return __builtin_convertvector(v, vfloat_half);
#endif
}
inline vfloat to_float(vu16 v) {  // bfloat16
#if defined(__AVX512F__)
  return bits<vfloat>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits<__m256i>(v)), 16));
#elif defined(__AVX2__)
  return bits<vfloat>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits<__m128i>(v)), 16));
#else
  return bits<vfloat>(__builtin_convertvector(v, vu32) << 16);
#endif
}
inline vfloat_half to_float(vu16_half v) {
#if defined(__AVX512F__)
  return bits<vfloat_half>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits<__m128i>(v)), 16));
#elif defined(__AVX2__)
  return bits<vfloat_half>(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(bits<int64_t>(v))), 16));
#else
  return bits<vfloat_half>(__builtin_convertvector(v, vu32_half) << 16);
#endif
}
inline vu16 upper_half(vu32 v) {
#if defined(__AVX512F__)
  return bits<vu16>(_mm512_cvtepi32_epi16(bits<__m512i>(v >> 16)));
#else
  return __builtin_convertvector(v >> 16, vu16);
#endif
}

inline vfloat load(const float* p, float) { return load_raw<vfloat>(p); }
inline vdouble load(const double* p, double) { return load_raw<vdouble>(p); }
inline vdouble load(const float* p, double) { return to_double(load_raw<vfloat_half>(p)); }
inline vfloat load(const bf16* p, float) { return to_float(load_raw<vu16>(p)); }
inline vfloat load(const fp16* p, float) {
#if defined(__AVX512F__)
  return bits<vfloat>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#elif defined(__F16C__)
  return bits<vfloat>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#else
  vfloat v;
  for (int i = 0; i < Simd<float>::width; ++i) v[i] = float(widen(p[i]));
  return v;
#endif
}
inline vdouble load(const bf16* p, double) {  // half precision beside a wider tensor
  return to_double(to_float(load_raw<vu16_half>(p)));
}
inline vdouble load(const fp16* p, double) {
#if defined(__AVX512F__)
  return to_double(bits<vfloat_half>(_mm256_cvtph_ps(load_raw<__m128i>(p))));
#elif defined(__F16C__)
  return to_double(bits<vfloat_half>(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p))));
#else
  vdouble v;
  for (int i = 0; i < Simd<double>::width; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

template <class V> inline void store_raw(void* p, V v, bool stream) {
#if defined(__AVX512F__)
  if (stream) {
    if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)p, bits<__m512i>(v));
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, bits<__m256i>(v));
  }
#elif defined(__AVX2__)
  if (stream) {
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, bits<__m256i>(v));
    if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)p, bits<__m128i>(v));
  }
#elif defined(__SSE2__)
  if constexpr (sizeof(V) == 16) {
    if (stream) return _mm_stream_si128((__m128i*)p, bits<__m128i>(v));
  }
#else
  (void)stream;
#endif
  std::memcpy(p, &v, sizeof v);
}
inline void store(float* p, vfloat v, bool stream) { store_raw(p, v, stream); }
inline void store(double* p, vdouble v, bool stream) { store_raw(p, v, stream); }
inline void store(float* p, vdouble v, bool stream) { store_raw(p, to_float(v), stream); }
inline vu32 round_bf16(vfloat v) {  // the result is the upper half of each lane
  const vu32 u = bits<vu32>(v), nan = bits<vu32>(v != v);
  return (nan & (u | 0x400000)) | (~nan & (u + 0x7fff + (u >> 16 & 1)));
}
inline void store(bf16* p, vfloat v, bool stream) {
  store_raw(p, upper_half(round_bf16(v)), stream);
}
inline void store(fp16* p, vfloat v, bool stream) {
#if defined(__AVX512F__)
  store_raw(p, _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT), stream);
#elif defined(__F16C__)
  store_raw(p, _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT), stream);
#else
  for (int i = 0; i < Simd<float>::width; ++i) narrow(v[i], p[i]);
  (void)stream;
#endif
}
template <class Half> inline void store(Half* p, vdouble v, bool) {
  for (int i = 0; i < Simd<double>::width; ++i) narrow(v[i], p[i]);
}

// The even and the odd elements of two neighbouring vectors.
inline void deinterleave(vfloat a, vfloat b, vfloat& even, vfloat& odd) {
#if defined(__AVX512F__)
  vu32 evens;
  for (unsigned i = 0; i < Simd<float>::width; ++i) evens[i] = 2 * i;  // a constant once compiled
  const auto pick = [&](vu32 from) {
    return bits<vfloat>(_mm512_permutex2var_ps(bits<__m512>(a), bits<__m512i>(from), bits<__m512>(b)));
  };
  even = pick(evens), odd = pick(evens + 1);
#elif defined(__AVX2__)
  const __m256 low = _mm256_permute2f128_ps(bits<__m256>(a), bits<__m256>(b), 0x20);
  const __m256 high = _mm256_permute2f128_ps(bits<__m256>(a), bits<__m256>(b), 0x31);
  even = bits<vfloat>(_mm256_shuffle_ps(low, high, 0x88));
  odd = bits<vfloat>(_mm256_shuffle_ps(low, high, 0xdd));
#else
  constexpr int kHalf = Simd<float>::width / 2;
  for (int i = 0; i < kHalf; ++i) {
    even[i] = a[2 * i], odd[i] = a[2 * i + 1];
    even[kHalf + i] = b[2 * i], odd[kHalf + i] = b[2 * i + 1];
  }
#endif
}

// Two vectors of elements. Beside bfloat16 predictions they are the even and the odd elements, which takes a shift and
// a mask instead of three shuffles, and stores whole cache lines.
template <bool kEvenOdd, class T, class V> inline void load2(const T* p, V& a, V& b) {
  if constexpr (kEvenOdd && std::is_same_v<T, float>) {
    deinterleave(load_raw<vfloat>(p), load_raw<vfloat>(p + Simd<float>::width), a, b);
  } else if constexpr (kEvenOdd) {
    const vu32 both = load_raw<vu32>(p);
    a = bits<V>(both << 16);
    b = bits<V>(both & 0xffff0000);
  } else {
    a = load(p, a[0]);
    b = load(p + sizeof(V) / sizeof(a[0]), a[0]);
  }
}
template <bool kEvenOdd, class T, class V> inline void store2(T* p, V a, V b, bool stream) {
  if constexpr (kEvenOdd) {
    store_raw(p, (round_bf16(a) >> 16) | (round_bf16(b) & 0xffff0000), stream);
  } else {
    store(p, a, stream);
    store(p + sizeof(V) / sizeof(a[0]), b, stream);
  }
}
template <class T> constexpr bool is_bf16 = std::is_same_v<T, bf16>;
// Whether a target beside bfloat16 predictions can be read as even and odd elements.
template <class T> constexpr bool has_even_odd = is_bf16<T> || std::is_same_v<T, float>;

// 0 where the weight is 0, whatever is there.
template <class V> inline V counted(V v, V weight) {
  const auto counts = weight != 0;
  return bits<V>(bits<decltype(counts & counts)>(v) & counts);
}

template <class V> inline double lanes(V v) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}

}  // namespace
}  // namespace sipo
