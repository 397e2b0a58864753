// Everything that only a CUDA device has, in short functions: memory accesses with cache hints, ordered accesses
// between blocks, shuffles, launches. Under SIPO_EMULATE, csrc/emulation/emulate.h replaces them and the kernels run on a CPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(SIPO_EMULATE)
#include "emulate.h"
#else
#include <cuda_runtime.h>

namespace sipo {
namespace device {

// How long a line should stay in the second-level cache, as far as there is room.
struct Policy { uint64_t bits; };

// Read again by this kernel: `fraction` of the lines (chosen by address) stay until the others are evicted.
__device__ __forceinline__ Policy keep(float fraction) {
  Policy p;
  asm("createpolicy.fractional.L2::evict_last.L2::evict_first.b64 %0, %1;" : "=l"(p.bits) : "f"(fraction));
  return p;
}
__device__ __forceinline__ Policy stream() {  // read for the last time: evicted first
  Policy p;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p.bits));
  return p;
}
__device__ __forceinline__ Policy normal() {
  Policy p;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(p.bits));
  return p;
}

struct alignas(16) Vec16 { uint32_t word[4]; };

// Loads inputs (which this kernel never writes) into v, or leaves v as it is if the load is not wanted: without a
// branch, so that many loads are in flight together. Bypasses the first-level cache, of which shared memory leaves little.
__device__ __forceinline__ void load16(Vec16& v, const void* p, Policy policy, bool wanted) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %6, 0;\n\t"
      "@wanted ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;\n\t}"
      : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3])
      : "l"(p), "l"(policy.bits), "r"(int(wanted)));
}
// Loads two words of v, from word `first` on.
__device__ __forceinline__ void load8(Vec16& v, int first, const void* p, Policy policy, bool wanted) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %4, 0;\n\t"
      "@wanted ld.global.nc.L1::no_allocate.L2::cache_hint.v2.b32 {%0, %1}, [%2], %3;\n\t}"
      : "+r"(v.word[first]), "+r"(v.word[first + 1])
      : "l"(p), "l"(policy.bits), "r"(int(wanted)));
}
// Loads four bytes.
__device__ __forceinline__ void load4(uint32_t& v, const void* p, Policy policy, bool wanted) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %3, 0;\n\t"
      "@wanted ld.global.nc.L1::no_allocate.L2::cache_hint.b32 %0, [%1], %2;\n\t}"
      : "+r"(v)
      : "l"(p), "l"(policy.bits), "r"(int(wanted)));
}
__device__ __forceinline__ void store16(void* p, Vec16 v, Policy policy) {
  asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "l"(policy.bits)
               : "memory");
}
__device__ __forceinline__ void store8(void* p, const Vec16& v, int first, Policy policy) {  // two words of v, from word `first` on
  asm volatile("st.global.L1::no_allocate.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(p), "r"(v.word[first]),
               "r"(v.word[first + 1]), "l"(policy.bits)
               : "memory");
}
template <class T> __device__ __forceinline__ T load1(const T* p) { return *p; }
template <class T> __device__ __forceinline__ void store1(T* p, T v) { *p = v; }

// Loads what another block wrote earlier in this launch, made of doubles; the accesses below order it.
template <class T> __device__ __forceinline__ T load_shared_result(const T* p) {
  constexpr int kWords = sizeof(T) / sizeof(double);
  static_assert(sizeof(T) % sizeof(double) == 0);
  double words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __ldcg(reinterpret_cast<const double*>(p) + i);
  T value;
  std::memcpy(&value, words, sizeof value);
  return value;
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ double shuffle_down(double value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}

// Returns x, as a value that the compiler knows nothing about: it cannot compute what depends on x before a loop and
// keep it in registers.
__device__ __forceinline__ double opaque(double x) {
  asm volatile("" : "+d"(x));
  return x;
}
__device__ __forceinline__ int32_t opaque(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* p, uint32_t v) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// ---- Host ------------------------------------------------------------------------------------------------------

// Makes a device the current one. Nothing to restore: the caller makes it torch's current device during the call.
struct DeviceGuard {
  explicit DeviceGuard(int device) { cudaSetDevice(device); }
};

// Requests more than 48 KB of shared memory for a kernel, and the largest carveout, so that two blocks fit.
template <class Params> int allow_shared(void (*kernel)(Params), int bytes) {
  if (bytes <= 48 << 10) return 0;
  const void* function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return int(error);
  return int(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared));
}

template <class Params>
int launch(void (*kernel)(Params), int blocks, int threads, int shared_bytes, bool cooperative, void* on,
           const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaStream_t s = static_cast<cudaStream_t>(on);
  const cudaError_t error =
      cooperative ? cudaLaunchCooperativeKernel(function, dim3(blocks), dim3(threads), arguments, shared_bytes, s)
                  : cudaLaunchKernel(function, dim3(blocks), dim3(threads), arguments, shared_bytes, s);
  if (error != cudaSuccess) cudaGetLastError();  // reported here, not by the next caller who checks
  return int(error);
}

// Whether this driver and the current device can run the kernel: 0 or CUDA's error code.
template <class Params> int usable(void (*kernel)(Params)) {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) cudaGetLastError();
  return int(error);
}

inline int zero(void* p, size_t bytes, void* on) {
  return int(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(on)));
}

inline const char* error_string(int code) { return cudaGetErrorString(cudaError_t(code)); }
constexpr int kTooLarge = cudaErrorCooperativeLaunchTooLarge;

}  // namespace device
}  // namespace sipo
#endif
