// The machine that emulate.h runs on: fibers, a scheduler driven by a seed, barriers, shuffles, and errors.
// -DSIPO_EMULATE_UCONTEXT selects the portable switch on x86-64 too; it is 12 times slower.
#pragma once
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>
#if !defined(__x86_64__)
#define SIPO_EMULATE_UCONTEXT
#endif
#if defined(SIPO_EMULATE_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#pragma GCC visibility push(hidden)  // two such libraries in one process must share nothing
struct EmulatedIndex { unsigned x, y, z; };
static EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

namespace sipo::emulation {

enum Error : int { kBadArgument = 1, kBadGrid = 9, kDeadlock = 700, kDivergence = 701, kShared = 702,
                   kAlignment = 716 };
constexpr uint32_t kPatience = 256;  // load_acquires without progress, by each runnable thread, that make a deadlock
constexpr int kBlockBursts = 13, kWarpBursts = 10;  // one block runs 1 to 2^12 switches in a row, one warp 1 to 2^9

struct Site {  // where a primitive is called; one literal for each, so that addresses compare
  const char* file;
  int line;
};
inline bool operator!=(Site a, Site b) { return a.file != b.file || a.line != b.line; }
struct Fiber;
struct Warp {
  uint32_t lanes, ready, shuffling;  // bit masks: which exist, can run, wait in shuffle_down
  Site site;
};
struct Block {
  unsigned index, ready, position, waiting, ended;  // ready: mask of warps; position: in Machine::runnable
  Site site;
  Fiber* fibers;
  Warp warps[32];
  std::vector<char> memory;  // guard, shared memory, guard
};
struct Fiber {
#if defined(SIPO_EMULATE_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer;
#endif
  unsigned thread, block_index;
  Block* block;
  double value;  // offered to a shuffle, then its result
  int delta;
  const uint32_t* polled;  // the last load_acquire: where, what
  uint32_t seen, idle_loads;
  uint64_t idle_since;
};
struct Watch {
  uintptr_t base;
  size_t bytes, granule;
  uint32_t *loads, *stores, *kinds[3];
};
struct Machine {
  std::mutex lock;  // one launch at a time, from whichever thread
  uint64_t random = 0x9e3779b97f4a7c15;
  int resident = 3;
  uint64_t preempt = 0;  // probability · 2^32
  uint64_t statistics[4] = {};
  Watch watches[8] = {};
  int watching = 0;
  std::map<const void*, int> allowed_shared;
  std::vector<char*> stacks;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;  // the resident ones
  std::vector<Block*> runnable;
  std::vector<unsigned> waiting_blocks;
  Block *current = nullptr, *finished = nullptr;
  unsigned warp = 0, block_burst = 0, warp_burst = 0;
  unsigned runnable_fibers = 0, stuck = 0;  // stuck: those that ran out of patience since the last progress
  uint64_t progress = 0;
  int shared_bytes = 0;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  Fiber main = {}, *running = nullptr;
  int error = 0;
  char message[512] = "";
};
static Machine machine;

inline uint32_t random_bits() {
  uint64_t& x = machine.random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return uint32_t((x * 0x2545f4914f6cdd1dull) >> 32);
}
inline unsigned random_below(size_t n) { return unsigned((uint64_t(random_bits()) * n) >> 32); }
inline unsigned random_bit_of(uint32_t mask) {  // not quite uniform, but every set bit can be drawn
  const unsigned r = random_bits() & 31;
  return (__builtin_ctz(mask >> r | mask << (-r & 31)) + r) & 31;
}

// ---- Switching ----

#if defined(SIPO_EMULATE_UCONTEXT)
inline void swap_fibers(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#else
// noipa: callers must assume that it changes all memory and every caller-saved register.
__attribute__((naked, noipa)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void swap_fibers(Fiber& from, Fiber& to) { swap_stacks(&from.stack_pointer, to.stack_pointer); }
#endif

inline void identify(const Fiber& f) { threadIdx.x = f.thread, blockIdx.x = f.block_index; }

inline void resume(Fiber* next) {
  Fiber* self = machine.running;
  machine.running = next;
  ++machine.statistics[2];
  swap_fibers(*self, *next);
  identify(*self);
}

// A block, and within it a warp, runs for a burst of random length: with uniformly drawn fibers all blocks would
// advance in step, and no warp would ever run far ahead of another.
inline Fiber* pick() {
  Machine& m = machine;
  if (!m.block_burst || !m.current->ready) {
    m.current = m.runnable[random_below(m.runnable.size())];
    m.block_burst = 1u << random_below(kBlockBursts);
    m.warp_burst = 0;
  }
  --m.block_burst;
  if (!m.warp_burst || !(m.current->ready >> m.warp & 1)) {
    m.warp = random_bit_of(m.current->ready);
    m.warp_burst = 1u << random_below(kWarpBursts);
  }
  --m.warp_burst;
  return m.current->fibers + 32 * m.warp + random_bit_of(m.current->warps[m.warp].ready);
}
inline void yield() {
  Fiber* next = pick();
  if (next != machine.running) resume(next);
}
// At an access that other blocks may see. Unless the burst may end, a block's only runnable fiber would continue.
inline void yield_to_blocks() {
  if (random_bits() & 1) machine.block_burst = 0;
  yield();
}
inline void progressed() { ++machine.progress, machine.stuck = 0; }

// ---- Errors ----

__attribute__((format(printf, 2, 3))) inline int report(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int n = std::snprintf(machine.message, sizeof machine.message, "emulation: ");
  std::vsnprintf(machine.message + n, sizeof machine.message - n, format, arguments);
  va_end(arguments);
  return machine.error = code;
}
[[noreturn]] inline void leave() {  // back to run() for good: the block is done or the launch has failed
  resume(&machine.main);
  __builtin_unreachable();
}
[[noreturn]] inline void diverged(const Block& b, Site site) {
  unsigned shuffling = 0;
  for (const Warp& w : b.warps) shuffling += unsigned(__builtin_popcount(w.shuffling));
  report(kDivergence, "barrier divergence in block %u of %u threads, found at %s:%d: %u wait in __syncthreads (the "
         "first at %s:%d), %u in shuffle_down, %u have ended", b.index, blockDim.x, site.file, site.line, b.waiting,
         b.waiting ? b.site.file : "-", b.waiting ? b.site.line : 0, shuffling, b.ended);
  leave();
}
[[noreturn]] inline void deadlocked() {
  const Machine& m = machine;
  unsigned waiting = 0, shuffling = 0;
  for (const Block& b : m.blocks) {
    waiting += b.waiting;
    for (const Warp& w : b.warps) shuffling += unsigned(__builtin_popcount(w.shuffling));
  }
  report(kDeadlock, "deadlock: all %u threads that can run poll load_acquire in vain (block %u among them), %u wait in "
         "__syncthreads, %u in shuffle_down; %zu of %u blocks have not started", m.runnable_fibers,
         m.running->block_index, waiting, shuffling, m.waiting_blocks.size(), gridDim.x);
  leave();
}

// ---- Waiting and waking ----

inline void wake(Block& b, unsigned warp, uint32_t lanes) {
  Machine& m = machine;
  if (!lanes) return;
  if (!b.ready) b.position = unsigned(m.runnable.size()), m.runnable.push_back(&b);
  b.ready |= 1u << warp;
  b.warps[warp].ready |= lanes;
  m.runnable_fibers += unsigned(__builtin_popcount(lanes));
}
inline void stop_running() {  // the running fiber waits or has ended; the caller then switches
  Machine& m = machine;
  Block& b = *m.running->block;
  Warp& w = b.warps[m.running->thread / 32];
  w.ready &= ~(1u << m.running->thread % 32);
  --m.runnable_fibers;
  progressed();
  if (w.ready) return;
  b.ready &= ~(1u << m.running->thread / 32);
  if (b.ready) return;
  m.runnable[b.position] = m.runnable.back();
  m.runnable[b.position]->position = b.position;
  m.runnable.pop_back();
}
inline void wait(Site site) {
  stop_running();
  // Only threads of a block wake its threads: a block without a runnable thread can never continue.
  if (!machine.running->block->ready) diverged(*machine.running->block, site);
  resume(pick());
}
inline void barrier(Site site) {
  Block& b = *machine.running->block;
  if (!b.waiting) b.site = site;
  ++b.waiting;
  if (b.site != site) diverged(b, site);
  if (b.waiting < blockDim.x) return wait(site);
  b.waiting = 0;
  for (unsigned w = 0; 32 * w < blockDim.x; ++w) wake(b, w, b.warps[w].lanes & ~b.warps[w].ready);
  progressed();
  yield();
}
inline double shuffle(double value, int delta, Site site) {
  Fiber& self = *machine.running;
  Block& b = *self.block;
  Warp& w = b.warps[self.thread / 32];
  if (w.lanes != ~0u) diverged(b, site);  // the full mask names lanes that do not exist
  if (!w.shuffling) w.site = site;
  w.shuffling |= 1u << self.thread % 32;
  if (w.site != site) diverged(b, site);
  self.value = value, self.delta = delta;
  if (w.shuffling != w.lanes) {
    wait(site);
    return self.value;
  }
  double offered[32];
  Fiber* lanes = b.fibers + self.thread / 32 * 32;
  for (unsigned i = 0; i < 32; ++i) offered[i] = lanes[i].value;
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned delta = unsigned(lanes[i].delta);
    lanes[i].value = offered[delta < 32 - i ? i + delta : i];
  }
  w.shuffling = 0;
  wake(b, self.thread / 32, w.lanes & ~w.ready);
  progressed();
  yield();
  return self.value;
}
inline void fiber_main() {
  identify(*machine.running);
  machine.entry(machine.argument);
  Block& b = *machine.running->block;
  ++b.ended;
  stop_running();
  if (b.ended == blockDim.x) machine.finished = &b, leave();  // run() starts the next block in its place
  if (!b.ready) diverged(b, {"the end of the kernel", 0});
  resume(pick());
}

}  // namespace sipo::emulation
#pragma GCC visibility pop
