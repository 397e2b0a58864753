// The functions that are compiled for each instruction set (pair_kernels.cpp): loops over consecutive elements of one
// sample. pair_loss.cpp chooses an instruction set at run time.
#pragma once
#include <cstdint>

#include "elements.h"

namespace sipo {

// Σ d², Σ d_ref², Σ (m − r)(d + d_ref) over n elements. If `r` is null, only the first is computed.
using ReduceFn = void (*)(const void* m, const void* r, const void* t, int64_t n, double sums[3]);
// Σ (m_w − t_w) · (m_l − t_l) over n elements, in double.
using InnerFn = double (*)(const void* m_w, const void* t_w, const void* m_l, const void* t_l, int64_t n);
// g = coef · (m − t), in m's type. `stream`: write past the caches.
using GradFn = void (*)(const void* m, const void* t, void* g, int64_t n, double coef, bool stream);

struct Kernels {
  ReduceFn reduce[2][kDtypes][kDtypes][kDtypes];  // [wide][model][ref][target]; wide: sums in double, see layout.py
  InnerFn inner[kDtypes][kDtypes];                // [model][target]
  GradFn grad[kDtypes][kDtypes];                  // [model][target]
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

}  // namespace sipo
