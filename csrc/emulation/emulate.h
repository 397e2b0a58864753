// CUDA on the CPU, for tests: csrc/cuda compiled by g++ runs its real schedule on one operating-system thread.
// Every CUDA thread is a fiber; a seed decides which one continues at every barrier, shuffle and atomic operation, so
// different seeds give different interleavings, and each can be repeated. Memory is sequentially consistent here: a
// missing fence or a wrong scope is not found; a missing barrier, a wait for a block that never starts and a divergent
// barrier are. Kernels use dynamic shared memory only, throw nothing and own nothing: a failed launch drops its fibers.
// Include it in one translation unit only.
#pragma once
#include <sys/mman.h>

#include <cmath>  // every standard header before the macros below
#include <limits>
#include <type_traits>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__  // empty, so that __attribute__((__noinline__)) in a header included later stays valid
#define __grid_constant__
#define __launch_bounds__(...)

#pragma GCC visibility push(hidden)
namespace sipo::emulation {

// ---- Launches ----

constexpr size_t kPage = 4096, kStack = 64 << 10;
constexpr int kGuard = 1024;  // bytes watched on either side of a block's shared memory
constexpr int kSharedDefault = 48 << 10, kSharedMost = 227 << 10;  // without and with allow_shared, as on sm_90

// NaN in every type, and different from the poison, which a kernel that reads it could write back.
inline char guard_byte(const char* p) { return uintptr_t(p) & 1 ? char(0x7f) : char(0xfd); }

inline void prepare(Fiber& f, size_t index) {
  // Tops are staggered: equal offsets into the pages would make all stacks share a few sets of the cache.
  char* const stack = machine.stacks[index];
  char* const top = stack + kStack - index * 5 % 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack + kPage, kStack - kPage);  // the marks of frames that were never left
#endif
#if defined(SIPO_EMULATE_UCONTEXT)
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = size_t(top - stack);
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#else
  void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, where to "return", and an end for debuggers
  std::memset(frame, 0, 64);
  frame[6] = reinterpret_cast<void*>(&fiber_main);
  f.stack_pointer = frame;
#endif
}
inline void start_block(Block& b) {
  Machine& m = machine;
  b.index = m.waiting_blocks.back();
  m.waiting_blocks.pop_back();
  b.ready = b.waiting = b.ended = 0;
  std::memset(b.memory.data() + kGuard, 0xff, size_t(m.shared_bytes));
  for (int i = 0; i < kGuard; ++i) {
    for (char* c : {&b.memory[size_t(i)], &b.memory[b.memory.size() - 1 - size_t(i)]}) *c = guard_byte(c);
  }
  std::memset(b.warps, 0, sizeof b.warps);
  for (unsigned t = 0; t < blockDim.x; ++t) {
    Fiber& f = b.fibers[t];
    prepare(f, size_t(&f - m.fibers.data()));
    f.thread = t, f.block_index = b.index, f.block = &b;
    f.polled = nullptr, f.idle_since = 0;
    b.warps[t / 32].lanes |= 1u << t % 32;
  }
  for (unsigned w = 0; 32 * w < blockDim.x; ++w) wake(b, w, b.warps[w].lanes);
  ++m.statistics[1];
}
inline void finish_block(const Block& b) {
  const int bytes = machine.shared_bytes;
  const char* shared = b.memory.data() + kGuard;
  for (int i = -kGuard; i < bytes + kGuard; ++i) {
    if (i == 0) i = bytes;
    if (shared[i] == guard_byte(shared + i)) continue;
    report(kShared, "block %u wrote byte %d of its %d bytes of shared memory", b.index, i, bytes);
    return;
  }
}
inline int run(const void* kernel, int blocks, int threads, int shared_bytes, bool cooperative, void (*entry)(void*),
               void* argument) {
  Machine& m = machine;
  const std::lock_guard<std::mutex> guard(m.lock);
  if (blocks < 1 || threads < 1 || threads > 1024) return report(kBadGrid, "%d blocks of %d threads", blocks, threads);
  const auto allowed = m.allowed_shared.find(kernel);
  if (shared_bytes < 0 || shared_bytes > (allowed == m.allowed_shared.end() ? kSharedDefault : allowed->second))
    return report(kBadArgument, "%d bytes of shared memory without allow_shared", shared_bytes);
  const unsigned resident = cooperative || blocks < m.resident ? unsigned(blocks) : unsigned(m.resident);
  const size_t fibers = size_t(resident) * size_t(threads), have = m.stacks.size();
  if (fibers > have) {
    void* p = mmap(nullptr, (fibers - have) * kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return report(kBadGrid, "no memory for %zu stacks", fibers);
    for (size_t i = have; i < fibers; ++i) {
      m.stacks.push_back(static_cast<char*>(p) + (i - have) * kStack);
      mprotect(m.stacks[i], kPage, PROT_NONE);  // an overflow crashes here instead of overwriting a neighbour
    }
  }
  threadIdx = blockIdx = {0, 0, 0};
  blockDim = {unsigned(threads), 1, 1}, gridDim = {unsigned(blocks), 1, 1};
  m.entry = entry, m.argument = argument, m.shared_bytes = shared_bytes;
  m.error = 0, m.progress = 1, m.stuck = m.runnable_fibers = m.block_burst = 0;
  m.running = &m.main, m.finished = nullptr;
  m.runnable.clear();
  m.waiting_blocks.clear();
  for (unsigned i = 0; i < unsigned(blocks); ++i) {  // in random order: CUDA guarantees none
    m.waiting_blocks.push_back(i);
    std::swap(m.waiting_blocks[i], m.waiting_blocks[random_below(i + 1)]);
  }
  m.fibers.resize(fibers);
  m.blocks.resize(resident);
  for (Block& b : m.blocks) {
    b.fibers = m.fibers.data() + size_t(&b - m.blocks.data()) * size_t(threads);
    b.memory.resize(size_t(shared_bytes) + 2 * kGuard);
    start_block(b);
  }
  ++m.statistics[0];
  while (!m.runnable.empty() && !m.error) {
    resume(pick());
    if (m.error) break;
    finish_block(*m.finished);
    if (!m.waiting_blocks.empty() && !m.error) start_block(*m.finished);
  }
  return m.error;
}

// ---- Access to global memory ----

inline void access(const void* p, size_t size, bool store, int kind) {
  Machine& m = machine;
  progressed();
  if (m.preempt && random_bits() < m.preempt) yield_to_blocks();
  if (!m.watching) return;
  for (const Watch& w : m.watches) {
    const uintptr_t at = uintptr_t(p), end = w.base + w.bytes;
    const uintptr_t from = at > w.base ? at : w.base, to = at + size < end ? at + size : end;
    if (!w.base || from >= to) continue;
    for (size_t g = (from - w.base) / w.granule; g <= (to - 1 - w.base) / w.granule; ++g) {
      if (store && w.stores) ++w.stores[g];
      if (!store && w.loads) ++w.loads[g];
      if (!store && w.kinds[kind]) ++w.kinds[kind][g];
    }
  }
}
inline void check_alignment(const void* p, unsigned bytes) {
  if (uintptr_t(p) % bytes == 0) return;
  report(kAlignment, "an access of %u bytes at %p by thread %u of block %u", bytes, p, threadIdx.x, blockIdx.x);
  leave();
}

}  // namespace sipo::emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  sipo::emulation::barrier({file, line});
}

namespace sipo::device {

inline char* shared_memory() { return emulation::machine.running->block->memory.data() + emulation::kGuard; }
inline double shuffle_down(double value, int delta, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulation::shuffle(value, delta, {file, line});
}

template <class T> T opaque(T x) { return x; }

// Other threads may run before an atomic operation, and between it and the next operation of its thread.
inline uint32_t add_acquire_release(uint32_t* p, uint32_t v) {
  emulation::yield_to_blocks();
  const uint32_t old = *p;
  *p = old + v;
  emulation::progressed();
  if (emulation::random_bits() & 1) emulation::yield_to_blocks();
  return old;
}
inline void store_release(uint32_t* p, uint32_t v) {
  emulation::yield_to_blocks();
  *p = v;
  emulation::progressed();
  if (emulation::random_bits() & 1) emulation::yield_to_blocks();
}
inline uint32_t load_acquire(const uint32_t* p) {
  emulation::Machine& m = emulation::machine;
  emulation::Fiber& self = *m.running;
  emulation::yield_to_blocks();
  const uint32_t value = *p;
  if (self.idle_since != m.progress) self.idle_since = m.progress, self.idle_loads = 0;
  if (++self.idle_loads == emulation::kPatience && ++m.stuck == m.runnable_fibers) emulation::deadlocked();
  if (self.polled == p && self.seen == value) {
    ++m.statistics[3];
    m.block_burst = 0;  // polling: let another block continue
  } else if (emulation::random_bits() & 1) {
    emulation::yield_to_blocks();
  }
  self.polled = p, self.seen = value;
  return value;
}

struct Policy { int kind; };
inline Policy keep(float) { return {0}; }
inline Policy stream() { return {1}; }
inline Policy normal() { return {2}; }

struct alignas(16) Vec16 { uint32_t word[4]; };
inline void load16(Vec16& v, const void* p, Policy policy, bool wanted) {
  if (!wanted) return;
  emulation::check_alignment(p, 16);
  emulation::access(p, 16, false, policy.kind);
  std::memcpy(&v, p, 16);
}
inline void load8(Vec16& v, int first, const void* p, Policy policy, bool wanted) {
  if (!wanted) return;
  emulation::check_alignment(p, 8);
  emulation::access(p, 8, false, policy.kind);
  std::memcpy(v.word + first, p, 8);
}
inline void load4(uint32_t& v, const void* p, Policy policy, bool wanted) {
  if (!wanted) return;
  emulation::check_alignment(p, 4);
  emulation::access(p, 4, false, policy.kind);
  std::memcpy(&v, p, 4);
}
inline void store16(void* p, Vec16 v, Policy policy) {
  emulation::check_alignment(p, 16);
  emulation::access(p, 16, true, policy.kind);
  std::memcpy(p, &v, 16);
}
inline void store8(void* p, const Vec16& v, int first, Policy policy) {
  emulation::check_alignment(p, 8);
  emulation::access(p, 8, true, policy.kind);
  std::memcpy(p, v.word + first, 8);
}
template <class T> T load1(const T* p) {
  emulation::access(p, sizeof(T), false, normal().kind);
  return *p;
}
template <class T> void store1(T* p, T v) {
  emulation::access(p, sizeof(T), true, normal().kind);
  *p = v;
}
template <class T> T load_shared_result(const T* p) {  // of another block; not counted, and never polled
  if (emulation::machine.preempt && emulation::random_bits() < emulation::machine.preempt) emulation::yield_to_blocks();
  asm volatile("" ::: "memory");
  return *p;
}

template <class Params>
int launch(void (*kernel)(Params), int blocks, int threads, int shared_bytes, bool cooperative, void* /*stream*/,
           const Params& params) {
  static_assert(std::is_trivially_copyable<Params>::value && sizeof(Params) <= 4096, "as CUDA demands");
  auto call = [&] { kernel(params); };
  return emulation::run(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, cooperative,
                        [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call);
}
template <class F> int usable(F) { return 0; }
inline int zero(void* p, size_t bytes, void* /*stream*/) { return std::memset(p, 0, bytes), 0; }
constexpr int kTooLarge = 720;  // CUDA's own code; here a cooperative launch is never too large
inline const char* error_string(int code) { return code ? emulation::machine.message : "no error"; }
struct DeviceGuard { explicit DeviceGuard(int) {} };
template <class F> int allow_shared(F kernel, int bytes) {
  const std::lock_guard<std::mutex> guard(emulation::machine.lock);
  if (bytes > emulation::kSharedMost) return emulation::report(emulation::kBadArgument, "allow_shared(%d)", bytes);
  int& allowed = emulation::machine.allowed_shared[reinterpret_cast<const void*>(kernel)];
  allowed = bytes > emulation::kSharedDefault ? bytes : emulation::kSharedDefault;
  return 0;
}

}  // namespace sipo::device
#pragma GCC visibility pop

// ---- For the tests, through ctypes ----

#define SIPO_EMULATE_API extern "C" __attribute__((visibility("default"))) void
// Adds accesses to [base, base + bytes) to the counters, one for each granule that an access touches. Null counters are
// skipped, and a null base stops counting. Afterwards, call watch_kind again.
SIPO_EMULATE_API sipo_emulate_watch(int slot, const void* base, size_t bytes, int granule, uint32_t* loads,
                                    uint32_t* stores) {
  auto& m = sipo::emulation::machine;
  const std::lock_guard<std::mutex> guard(m.lock);
  m.watches[slot & 7] = {uintptr_t(base), bytes, size_t(granule < 1 ? 1 : granule), loads, stores, {}};
  m.watching = 0;
  for (const auto& w : m.watches) m.watching += w.base != 0;
}
SIPO_EMULATE_API sipo_emulate_watch_kind(int slot, int kind, uint32_t* loads) {
  const std::lock_guard<std::mutex> guard(sipo::emulation::machine.lock);
  if (kind >= 0 && kind < 3) sipo::emulation::machine.watches[slot & 7].kinds[kind] = loads;
}
// resident_blocks: number of blocks that run at once if the launch is not cooperative. preempt_probability: probability
// of a switch at a load or store of global memory.
SIPO_EMULATE_API sipo_emulate_configure(uint64_t seed, int resident_blocks, double preempt_probability) {
  auto& m = sipo::emulation::machine;
  const std::lock_guard<std::mutex> guard(m.lock);
  uint64_t x = seed + 0x9e3779b97f4a7c15;  // splitmix64: neighbouring seeds start far apart
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  m.random = (x ^ x >> 31) | 1;
  m.resident = resident_blocks < 1 ? 1 : resident_blocks;
  m.preempt = uint64_t(preempt_probability * 4294967296.0);
}
SIPO_EMULATE_API sipo_emulate_statistics(uint64_t out[4]) {  // launches, blocks, switches, spins since the last call
  const std::lock_guard<std::mutex> guard(sipo::emulation::machine.lock);
  std::memcpy(out, sipo::emulation::machine.statistics, sizeof sipo::emulation::machine.statistics);
  std::memset(sipo::emulation::machine.statistics, 0, sizeof sipo::emulation::machine.statistics);
}
