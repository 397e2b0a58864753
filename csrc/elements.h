// Element types, and the conversion of one element to a wider type and back, for CPU and CUDA.
// File-local, so that the linker cannot choose a copy that was compiled for a wider instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#include "pair_math.h"

namespace sipo {

// ELEMENT_TYPES of sipo_kernels/backends/library.py. Only noise levels may be integers, and only a mask is bool.
#define SIPO_DTYPES(X) \
  X(kFloat32, "float32") X(kBfloat16, "bfloat16") X(kFloat16, "float16") X(kFloat64, "float64") \
  X(kInt64, "int64") X(kInt32, "int32") X(kBool, "bool")
enum Dtype : int { SIPO_DTYPES(SIPO_CONSTANT) };
constexpr int kDtypes = kInt64;  // number of types that samples can have

namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <class To, class From> SIPO_HD To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

SIPO_HD float widen(float x) { return x; }
SIPO_HD double widen(double x) { return x; }
SIPO_HD float widen(bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }
SIPO_HD float widen(fp16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Moving the fields into place leaves the exponent 112 too small; a multiplication corrects it, subnormals included.
  return bits<float>(sign | bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f));
#endif
}

SIPO_HD void narrow(double x, double& out) { out = x; }
SIPO_HD void narrow(float x, double& out) { out = x; }
SIPO_HD void narrow(float x, float& out) { out = x; }
SIPO_HD void narrow(double x, float& out) { out = float(x); }
SIPO_HD void narrow(float x, bf16& out) {  // to nearest, ties to even; NaN stays NaN
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t u = bits<uint32_t>(x);
  out.bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
#endif
}
SIPO_HD void narrow(float x, fp16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    h = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: near ½, float's own spacing is 2^-24
    h = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    h = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = uint16_t(sign | h);
#endif
}
// The gradient of a half-precision tensor is double only beside a float64 target. It is rounded through float.
SIPO_HD void narrow(double x, bf16& out) { narrow(float(x), out); }
SIPO_HD void narrow(double x, fp16& out) { narrow(float(x), out); }

}  // namespace
}  // namespace sipo
