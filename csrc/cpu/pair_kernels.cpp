// Elementwise loops of the pair loss (docs/math.md §2 and §6), written once in GCC/Clang vector types and compiled for
// several instruction sets (setup.py passes -DSIPO_ISA=... and the flags). Everything but the table is file-local, so
// that the linker cannot choose a function that was compiled for a wider instruction set.
#include "cpu/kernels.h"

#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
// GCC's own header leaves an unused operand uninitialised and warns about it wherever it is inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace {

using namespace sipo;

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

// ---- One vector ------------------------------------------------------------------------------------------------

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

template <class V> inline double lanes(V v) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}

// ---- §2: errors ------------------------------------------------------------------------------------------------

template <class T> constexpr bool is_half = sizeof(T) == 2;

// accumulate_dtype (sipo_kernels/layout.py) decides the type of the terms: double costs nothing while memory is the
// limit. Float sums of half-precision terms are kept short: 32 terms in each lane.
constexpr int64_t kRun = 64 * Simd<float>::width;
constexpr int64_t kAhead = 1024;  // bytes

template <class Acc, class M, class R, class T>
void reduce(const void* mp, const void* rp, const void* tp, int64_t n, double sums[3]) {
  using Vec = typename Simd<Acc>::vec;
  constexpr int W = Simd<Acc>::width;
  constexpr bool kEvenOdd = std::is_same_v<Acc, float> && is_bf16<M> && is_bf16<R> && has_even_odd<T>;
  const M* m = static_cast<const M*>(mp);
  const R* r = static_cast<const R*>(rp);
  const T* t = static_cast<const T*>(tp);
  double total[3] = {0, 0, 0};
  int64_t i = 0;
  while (i + W <= n) {
    const int64_t end = std::is_same_v<Acc, double> || n - i < kRun ? n : i + kRun;
    Vec e[2] = {}, f[2] = {}, g[2] = {};  // two of each, to hide the latency of the additions
    auto add = [&](Vec vm, Vec vr, Vec vt, int k) {
      const Vec d = vm - vt;
      e[k] += d * d;
      if (r) {
        const Vec d_ref = vr - vt;
        f[k] += d_ref * d_ref;
        g[k] += (vm - vr) * (d + d_ref);
      }
    };
    for (; i + 2 * W <= end; i += 2 * W) {
      Vec vm[2], vr[2] = {}, vt[2];
      // The hardware's prefetcher stops at each 4 KiB page; three streams reach a new one every few hundred steps.
      __builtin_prefetch(reinterpret_cast<const char*>(m + i) + kAhead);
      __builtin_prefetch(reinterpret_cast<const char*>(t + i) + kAhead);
      if (r) __builtin_prefetch(reinterpret_cast<const char*>(r + i) + kAhead);
      load2<kEvenOdd>(m + i, vm[0], vm[1]);
      load2<kEvenOdd>(t + i, vt[0], vt[1]);
      if (r) load2<kEvenOdd>(r + i, vr[0], vr[1]);
      add(vm[0], vr[0], vt[0], 0);
      add(vm[1], vr[1], vt[1], 1);
    }
    for (; i + W <= end; i += W) add(load(m + i, Acc()), r ? load(r + i, Acc()) : Vec{}, load(t + i, Acc()), 0);
    total[0] += lanes(e[0] + e[1]);
    total[1] += lanes(f[0] + f[1]);
    total[2] += lanes(g[0] + g[1]);
  }
  for (; i < n; ++i) {
    const double vm = widen(m[i]), vt = widen(t[i]), d = vm - vt;
    total[0] += d * d;
    if (r) {
      const double vr = widen(r[i]), d_ref = vr - vt;
      total[1] += d_ref * d_ref;
      total[2] += (vm - vr) * (d + d_ref);
    }
  }
  for (int k = 0; k < 3; ++k) sums[k] = total[k];
}

// ---- §6, relatives: inner product of chosen and rejected sample ------------------------------------------------

template <class M, class T>
double inner(const void* mw, const void* tw, const void* ml, const void* tl, int64_t n) {
  constexpr int W = Simd<double>::width;
  const M *m_w = static_cast<const M*>(mw), *m_l = static_cast<const M*>(ml);
  const T *t_w = static_cast<const T*>(tw), *t_l = static_cast<const T*>(tl);
  vdouble sum[2] = {};
  const auto product = [&](int64_t i) {
    return (load(m_w + i, 0.0) - load(t_w + i, 0.0)) * (load(m_l + i, 0.0) - load(t_l + i, 0.0));
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sum[0] += product(i);
    sum[1] += product(i + W);
  }
  double total = lanes(sum[0] + sum[1]);
  for (; i < n; ++i)
    total += (double(widen(m_w[i])) - double(widen(t_w[i]))) * (double(widen(m_l[i])) - double(widen(t_l[i])));
  return total;
}

// ---- §6: gradient ----------------------------------------------------------------------------------------------

template <class M, class T>
void gradient(const void* mp, const void* tp, void* gp, int64_t n, double coef, bool stream) {
  using Acc = std::conditional_t<std::is_same_v<M, double> || std::is_same_v<T, double>, double, float>;
  using Vec = typename Simd<Acc>::vec;
  constexpr int W = Simd<Acc>::width;
  const M* m = static_cast<const M*>(mp);
  const T* t = static_cast<const T*>(tp);
  M* g = static_cast<M*>(gp);
  const Acc c = Acc(coef);
  auto one = [&](int64_t i) { narrow(c * (Acc(widen(m[i])) - Acc(widen(t[i]))), g[i]); };
  int64_t i = 0;
  constexpr bool kEvenOdd = is_bf16<M> && has_even_odd<T>;
  constexpr uintptr_t unit = 64;  // streaming stores must be aligned, and fill cache lines
  if (stream)
    for (; i < n && (reinterpret_cast<uintptr_t>(g + i) & (unit - 1)); ++i) one(i);
  auto step = [&](bool past) {
    Vec vm[2], vt[2];
    __builtin_prefetch(reinterpret_cast<const char*>(m + i) + kAhead);
    __builtin_prefetch(reinterpret_cast<const char*>(t + i) + kAhead);
    if (!past) __builtin_prefetch(reinterpret_cast<const char*>(g + i) + kAhead, 1);  // to be written
    load2<kEvenOdd>(m + i, vm[0], vm[1]);
    load2<kEvenOdd>(t + i, vt[0], vt[1]);
    store2<kEvenOdd>(g + i, c * (vm[0] - vt[0]), c * (vm[1] - vt[1]), past);
  };
  if (stream) {
    for (; i + 2 * W <= n; i += 2 * W) step(true);
  } else {
    for (; i + 2 * W <= n; i += 2 * W) step(false);
  }
  for (; i < n; ++i) one(i);
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#endif
}

// ---- The table -------------------------------------------------------------------------------------------------

template <class Use> void for_each_type(Use use) {
  use(float(), kFloat32), use(bf16(), kBfloat16), use(fp16(), kFloat16), use(double(), kFloat64);
}

Kernels make_table() {
  Kernels k;
  for_each_type([&](auto m, int model) {
    for_each_type([&](auto t, int target) {
      using M = decltype(m);
      using T = decltype(t);
      k.inner[model][target] = inner<M, T>;
      k.grad[model][target] = gradient<M, T>;
      for_each_type([&](auto r, int ref) {
        using R = decltype(r);
        using Narrow = std::conditional_t<is_half<M> && is_half<R> && sizeof(T) <= 4, float, double>;
        k.reduce[0][model][ref][target] = reduce<Narrow, M, R, T>;
        k.reduce[1][model][ref][target] = reduce<double, M, R, T>;
      });
    });
  });
  return k;
}

}  // namespace

#define SIPO_JOIN_(a, b) a##b
#define SIPO_JOIN(a, b) SIPO_JOIN_(a, b)
const sipo::Kernels& sipo::SIPO_JOIN(SIPO_ISA, _kernels)() {
  static const Kernels table = make_table();
  return table;
}
