// The functions that are compiled for each instruction set (pair_kernels.cpp): loops over consecutive elements of one
// sample. pair_loss.cpp chooses an instruction set at run time.
#pragma once
#include <cstdint>

#include "elements.h"

namespace sipo {

// Each has a variant with the elements' weights w (§2), null in the other. An element whose weight is 0 adds exactly 0,
// whatever the other inputs hold there.

// Σ w·d², Σ w·d_ref², Σ w·(m − r)(d + d_ref), Σ w over n elements. If `r` is null, the second and the third are 0; the
// last is written by the variant with weights alone.
using ReduceFn = void (*)(const void* m, const void* r, const void* t, const float* w, int64_t n, double sums[4]);
// Σ (m_w − t_w) · (m_l − t_l) over n elements, in double. The weights of both samples are 0 or 1.
using InnerFn = double (*)(const void* m_w, const void* t_w, const float* w_w, const void* m_l, const void* t_l,
                           const float* w_l, int64_t n);
// g = coef · (w · (m − t)), in m's type. `stream`: write past the caches.
using GradFn = void (*)(const void* m, const void* t, const float* w, void* g, int64_t n, double coef, bool stream);

struct Kernels {
  // [weighted][wide][model][ref][target]; wide: sums in double, see layout.py
  ReduceFn reduce[2][2][kDtypes][kDtypes][kDtypes];
  InnerFn inner[2][kDtypes][kDtypes];  // [weighted][model][target]
  GradFn grad[2][kDtypes][kDtypes];    // [weighted][model][target]
  // 0 and 1 of a boolean mask as weights.
  void (*weights)(const uint8_t* mask, float* w, int64_t n);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

}  // namespace sipo
