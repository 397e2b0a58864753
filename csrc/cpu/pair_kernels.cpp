// Elementwise loops of the pair loss (docs/math.md §2 and §6), written once in GCC/Clang vector types and compiled for
// several instruction sets (setup.py passes -DSIPO_ISA=... and the flags). Everything but the table is file-local, so
// that the linker cannot choose a function that was compiled for a wider instruction set.
#include "cpu/kernels.h"
#include "cpu/vectors.h"

namespace {

using namespace sipo;

// ---- §2: errors ------------------------------------------------------------------------------------------------

template <class T> constexpr bool is_half = sizeof(T) == 2;

// accumulate_dtype (sipo_kernels/layout.py) decides the type of the terms: double costs nothing while memory is the
// limit. Float sums of half-precision terms are kept short: 32 terms in each lane.
constexpr int64_t kRun = 64 * Simd<float>::width;
constexpr int64_t kAhead = 1024;  // bytes

template <bool kWeighted, class Acc, class M, class R, class T>
void reduce(const void* mp, const void* rp, const void* tp, const float* w, int64_t n, double sums[4]) {
  using Vec = typename Simd<Acc>::vec;
  constexpr int W = Simd<Acc>::width;
  constexpr bool kEvenOdd = std::is_same_v<Acc, float> && is_bf16<M> && is_bf16<R> && has_even_odd<T>;
  const M* m = static_cast<const M*>(mp);
  const R* r = static_cast<const R*>(rp);
  const T* t = static_cast<const T*>(tp);
  double total[4] = {0, 0, 0, 0};
  int64_t i = 0;
  while (i + W <= n) {
    const int64_t end = std::is_same_v<Acc, double> || n - i < kRun ? n : i + kRun;
    Vec e[2] = {}, f[2] = {}, g[2] = {}, h[2] = {};  // two of each, to hide the latency of the additions
    auto add = [&](Vec vm, Vec vr, Vec vt, Vec vw, int k) {
      if constexpr (kWeighted) vm = counted(vm, vw), vr = counted(vr, vw), vt = counted(vt, vw), h[k] += vw;
      const auto weighed = [&](Vec v) {
        if constexpr (kWeighted) return Vec(vw * v);
        else return v;
      };
      const Vec d = vm - vt;
      e[k] += weighed(d) * d;
      if (r) {
        const Vec d_ref = vr - vt;
        f[k] += weighed(d_ref) * d_ref;
        g[k] += weighed(vm - vr) * (d + d_ref);
      }
    };
    for (; i + 2 * W <= end; i += 2 * W) {
      Vec vm[2], vr[2] = {}, vt[2], vw[2] = {};
      // The hardware's prefetcher stops at each 4 KiB page; three streams reach a new one every few hundred steps.
      __builtin_prefetch(reinterpret_cast<const char*>(m + i) + kAhead);
      __builtin_prefetch(reinterpret_cast<const char*>(t + i) + kAhead);
      if (r) __builtin_prefetch(reinterpret_cast<const char*>(r + i) + kAhead);
      load2<kEvenOdd>(m + i, vm[0], vm[1]);
      load2<kEvenOdd>(t + i, vt[0], vt[1]);
      if (r) load2<kEvenOdd>(r + i, vr[0], vr[1]);
      if constexpr (kWeighted) load2<kEvenOdd>(w + i, vw[0], vw[1]);
      add(vm[0], vr[0], vt[0], vw[0], 0);
      add(vm[1], vr[1], vt[1], vw[1], 1);
    }
    for (; i + W <= end; i += W) {
      Vec vw = {};
      if constexpr (kWeighted) vw = load(w + i, Acc());
      add(load(m + i, Acc()), r ? load(r + i, Acc()) : Vec{}, load(t + i, Acc()), vw, 0);
    }
    total[0] += lanes(e[0] + e[1]);
    total[1] += lanes(f[0] + f[1]);
    total[2] += lanes(g[0] + g[1]);
    if constexpr (kWeighted) total[3] += lanes(h[0] + h[1]);
  }
  for (; i < n; ++i) {
    const double weight = kWeighted ? w[i] : 1.0f;
    if (weight == 0) continue;
    const double vm = widen(m[i]), vt = widen(t[i]), d = vm - vt;
    total[0] += weight * d * d;
    if (r) {
      const double vr = widen(r[i]), d_ref = vr - vt;
      total[1] += weight * d_ref * d_ref;
      total[2] += weight * (vm - vr) * (d + d_ref);
    }
    total[3] += weight;
  }
  for (int k = 0; k < (kWeighted ? 4 : 3); ++k) sums[k] = total[k];
}

// ---- §6, relatives: inner product of chosen and rejected sample ------------------------------------------------

template <bool kWeighted, class M, class T>
double inner(const void* mw, const void* tw, const float* w_w, const void* ml, const void* tl, const float* w_l,
             int64_t n) {
  constexpr int W = Simd<double>::width;
  const M *m_w = static_cast<const M*>(mw), *m_l = static_cast<const M*>(ml);
  const T *t_w = static_cast<const T*>(tw), *t_l = static_cast<const T*>(tl);
  vdouble sum[2] = {};
  const auto product = [&](int64_t i) {
    vdouble d_w = load(m_w + i, 0.0) - load(t_w + i, 0.0), d_l = load(m_l + i, 0.0) - load(t_l + i, 0.0);
    if constexpr (kWeighted) d_w = counted(d_w, load(w_w + i, 0.0)), d_l = counted(d_l, load(w_l + i, 0.0));
    return vdouble(d_w * d_l);
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sum[0] += product(i);
    sum[1] += product(i + W);
  }
  double total = lanes(sum[0] + sum[1]);
  for (; i < n; ++i) {
    if (kWeighted && (w_w[i] == 0 || w_l[i] == 0)) continue;
    total += (double(widen(m_w[i])) - double(widen(t_w[i]))) * (double(widen(m_l[i])) - double(widen(t_l[i])));
  }
  return total;
}

// ---- §6: gradient ----------------------------------------------------------------------------------------------

template <bool kWeighted, class M, class T>
void gradient(const void* mp, const void* tp, const float* w, void* gp, int64_t n, double coef, bool stream) {
  using Acc = std::conditional_t<std::is_same_v<M, double> || std::is_same_v<T, double>, double, float>;
  using Vec = typename Simd<Acc>::vec;
  constexpr int W = Simd<Acc>::width;
  const M* m = static_cast<const M*>(mp);
  const T* t = static_cast<const T*>(tp);
  M* g = static_cast<M*>(gp);
  const Acc c = Acc(coef);
  auto one = [&](int64_t i) {
    Acc d = Acc(widen(m[i])) - Acc(widen(t[i]));
    if constexpr (kWeighted) d *= Acc(w[i]);
    narrow(kWeighted && w[i] == 0 ? Acc(0) : c * d, g[i]);
  };
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
    Vec d[2] = {vm[0] - vt[0], vm[1] - vt[1]};
    if constexpr (kWeighted) {
      Vec vw[2];
      load2<kEvenOdd>(w + i, vw[0], vw[1]);
      for (int k = 0; k < 2; ++k) d[k] = counted(Vec(c * (vw[k] * d[k])), vw[k]);
      store2<kEvenOdd>(g + i, d[0], d[1], past);
    } else {
      store2<kEvenOdd>(g + i, c * d[0], c * d[1], past);
    }
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

void weights(const uint8_t* mask, float* w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) w[i] = mask[i];
}

// ---- The table -------------------------------------------------------------------------------------------------

template <class Use> void for_each_type(Use use) {
  use(float(), kFloat32), use(bf16(), kBfloat16), use(fp16(), kFloat16), use(double(), kFloat64);
}

template <bool kWeighted> void fill(Kernels& k) {
  for_each_type([&](auto m, int model) {
    for_each_type([&](auto t, int target) {
      using M = decltype(m);
      using T = decltype(t);
      k.inner[kWeighted][model][target] = inner<kWeighted, M, T>;
      k.grad[kWeighted][model][target] = gradient<kWeighted, M, T>;
      for_each_type([&](auto r, int ref) {
        using R = decltype(r);
        using Narrow = std::conditional_t<is_half<M> && is_half<R> && sizeof(T) <= 4, float, double>;
        k.reduce[kWeighted][0][model][ref][target] = reduce<kWeighted, Narrow, M, R, T>;
        k.reduce[kWeighted][1][model][ref][target] = reduce<kWeighted, double, M, R, T>;
      });
    });
  });
}

Kernels make_table() {
  Kernels k;
  fill<false>(k);
  fill<true>(k);
  k.weights = weights;
  return k;
}

}  // namespace

#define SIPO_JOIN_(a, b) a##b
#define SIPO_JOIN(a, b) SIPO_JOIN_(a, b)
const sipo::Kernels& sipo::SIPO_JOIN(SIPO_ISA, _kernels)() {
  static const Kernels table = make_table();
  return table;
}
