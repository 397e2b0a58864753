// Checks that the emulator accepts right kernels and finds wrong ones: `g++ -std=c++17 -O2 selftest.cpp && ./a.out`.
// `./a.out bench` also prints the cost of a switch and how often the subtle mistakes were found.
#include "emulate.h"

#include <chrono>
#include <set>
#include <string>

using namespace sipo::device;

static int failures = 0;
static bool verbose = false;
#define CHECK(condition, ...)                                               \
  do {                                                                      \
    if (!(condition)) {                                                     \
      ++failures;                                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);           \
      std::printf(__VA_ARGS__);                                             \
      std::printf("; last error: %s\n", error_string(1));                   \
    }                                                                       \
  } while (0)
static bool says(int code, const char* text) { return std::strstr(error_string(code), text) != nullptr; }
static void configure(uint64_t seed) { sipo_emulate_configure(seed, 3, 0.0); }

// ---- One block: shuffles and barriers ----

struct Reduce { const double* in; double* out; int n; bool forget; };

__device__ __forceinline__ double block_sum(double x, double* scratch) {
  for (int delta = 16; delta; delta /= 2) x += shuffle_down(x, delta);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += scratch[w];
  return sum;
}

// Two sums, one after the other, in the same scratch memory. `forget` omits the barrier that keeps a fast warp from
// overwriting the first sum before a slow warp has read it. Only an interleaving where a warp runs far ahead finds it.
__global__ void __launch_bounds__(1024) reduce(const __grid_constant__ Reduce p) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  double x = 0;
  for (int i = int(threadIdx.x); i < p.n; i += int(blockDim.x)) x += p.in[int(blockIdx.x) * p.n + i];
  const double sum = block_sum(x, scratch);
  if (!p.forget) __syncthreads();
  const double squared = block_sum(x * x, scratch);
  double* out = p.out + 2 * (blockIdx.x * blockDim.x + threadIdx.x);
  out[0] = sum, out[1] = squared;
}

static int wrong_sums(int threads, int blocks, bool forget) {
  const int n = 3 * threads - 5;
  std::vector<double> in(size_t(blocks * n)), out(size_t(2 * blocks * threads), -1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = double(i % 13) - 3;
  const Reduce p{in.data(), out.data(), n, forget};
  const int code = launch(reduce, blocks, threads, threads / 32 * 8, false, nullptr, p);
  CHECK(code == 0, "code %d", code);
  int wrong = 0;
  for (int b = 0; b < blocks; ++b) {
    double sum = 0, squared = 0;
    for (int t = 0; t < threads; ++t) {
      double x = 0;
      for (int i = t; i < n; i += threads) x += in[size_t(b * n + i)];
      sum += x, squared += x * x;
    }
    for (int t = 0; t < threads; ++t) {
      const double* got = out.data() + 2 * (b * threads + t);
      wrong += !(got[0] == sum && got[1] == squared);  // small integers: exact in any order
    }
  }
  return wrong;
}

static void test_reduction() {
  int seen = 0;
  for (int seed = 0; seed < 20; ++seed) {
    configure(uint64_t(seed));
    for (int threads : {32, 128, 512}) {
      const int wrong = wrong_sums(threads, 5, false);
      CHECK(wrong == 0, "%d wrong sums, seed %d, %d threads", wrong, seed, threads);
    }
    seen += wrong_sums(128, 4, true) > 0;
  }
  if (verbose) std::printf("seeds of 20 that showed the barrier forgotten between sums: %d\n", seen);
  CHECK(seen >= 3, "the forgotten barrier between two sums showed under %d of 20 seeds", seen);
}

struct Shuffle { double* out; int delta; };
__global__ void shuffle_lanes(Shuffle p) {
  p.out[threadIdx.x] = shuffle_down(double(threadIdx.x), p.delta);
}
static void test_shuffle() {
  for (int delta : {0, 1, 5, 16, 31, 32}) {
    double out[64];
    CHECK(launch(shuffle_lanes, 1, 64, 0, false, nullptr, Shuffle{out, delta}) == 0, "delta %d", delta);
    for (int i = 0; i < 64; ++i) {
      const int expected = i % 32 + delta < 32 ? i + delta : i;
      CHECK(out[i] == expected, "lane %d, delta %d: %g", i, delta, out[i]);
    }
  }
  double out[64];
  const int code = launch(shuffle_lanes, 1, 40, 0, false, nullptr, Shuffle{out, 1});
  CHECK(code == 701, "a shuffle in a warp of 8 lanes gives %d", code);
}

struct Exchange { int* out; bool synchronized; };
__global__ void exchange(Exchange p) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = int(threadIdx.x);
  if (p.synchronized) __syncthreads();
  p.out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
static void test_missing_barrier() {
  int seen = 0;
  for (int seed = 0; seed < 8; ++seed) {
    for (bool synchronized : {true, false}) {
      configure(uint64_t(seed));
      int out[64], wrong = 0;
      CHECK(launch(exchange, 1, 64, 256, false, nullptr, Exchange{out, synchronized}) == 0, "seed %d", seed);
      for (int i = 0; i < 64; ++i) wrong += out[i] != 63 - i;
      CHECK(!synchronized || !wrong, "%d wrong with a barrier, seed %d", wrong, seed);
      seen += wrong > 0;
    }
  }
  CHECK(seen > 0, "a missing barrier showed under no seed");
}

// ---- What must be reported ----

struct Wrong { char* data; int how; };
__global__ void wrong(Wrong p) {
  const unsigned t = threadIdx.x;
  switch (p.how) {
    case 0: if (t < 40) __syncthreads(); break;              // some have ended
    case 1: if (t % 32 < 7) shuffle_down(0, 1); break;       // some lanes have ended
    case 2: if (t < 32) __syncthreads(); else __syncthreads(), shuffle_down(0, 1), __syncthreads(); break;
    case 3:                                                  // two barriers of one kind
      if (t < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case 4: if (t % 32) __syncthreads(); else shuffle_down(0, 1); break;  // two kinds
    case 5: if (blockIdx.x == 1 && t == 3) shared_memory()[100] = 1; break;
    case 6: if (t == 3) shared_memory()[-1] = 1; break;
    case 7: { Vec16 v; load16(v, p.data + 8, normal(), true); break; }
    case 8: store16(p.data + 4, Vec16{}, normal()); break;
    case 12: { Vec16 v; load8(v, 2, p.data + 4, normal(), true); break; }
    case 13: { Vec16 v; load16(v, p.data + 8, normal(), false); break; }  // not done
    case 9: while (load_acquire(reinterpret_cast<uint32_t*>(p.data)) == 0) {} break;
    case 11:                                                 // two shuffles
      if (t % 32 < 5)
        shuffle_down(0, 1);
      else
        shuffle_down(0, 1);
      break;
    default: shared_memory()[t] = 1; break;                  // nothing wrong
  }
}
static void test_reports() {
  alignas(16) char data[64] = {};
  const struct { int how, code; const char* text; } expected[] = {
      {0, 701, "barrier divergence"}, {1, 701, "barrier divergence"}, {2, 701, "barrier divergence"},
      {3, 701, "barrier divergence"}, {4, 701, "barrier divergence"}, {5, 702, "block 1 wrote byte 100 of its 100"},
      {6, 702, "wrote byte -1 of"},   {7, 716, "of 16 bytes at"},     {8, 716, "of 16 bytes at"},
      {12, 716, "of 8 bytes at"},
      {9, 700, "emulation: deadlock: "}, {10, 0, "no error"},
      {11, 701, "barrier divergence"}, {13, 0, "no error"}};
  for (const auto& e : expected) {
    const int code = launch(wrong, 2, 96, 100, false, nullptr, Wrong{data, e.how});
    CHECK(code == e.code && says(code, e.text), "case %d: code %d", e.how, code);
  }
  const Wrong fine{data, 10};
  CHECK(launch(wrong, 1, 2048, 0, false, nullptr, fine) == 9, "2048 threads");
  CHECK(launch(wrong, 0, 32, 0, false, nullptr, fine) == 9, "no blocks");
  CHECK(launch(wrong, 1, 32, 60 << 10, false, nullptr, fine) == 1, "60 KiB of shared memory without allow_shared");
  CHECK(allow_shared(wrong, 60 << 10) == 0, "allow_shared");
  CHECK(launch(wrong, 1, 32, 60 << 10, false, nullptr, fine) == 0, "60 KiB of shared memory");
  CHECK(allow_shared(wrong, 228 << 10) != 0, "more than a block can have");
}

struct Poison { int* nans; };
__global__ void poison(Poison p) {
  const double x = reinterpret_cast<double*>(shared_memory())[threadIdx.x];
  const float y = reinterpret_cast<float*>(shared_memory())[threadIdx.x];
  p.nans[blockIdx.x * blockDim.x + threadIdx.x] = std::isnan(x) + std::isnan(y);
  __syncthreads();
  reinterpret_cast<double*>(shared_memory())[threadIdx.x] = 0;
}
static void test_poison() {  // also where a block takes the place of an earlier one
  int nans[8 * 32] = {};
  CHECK(launch(poison, 8, 32, 256, false, nullptr, Poison{nans}) == 0, "poison");
  for (int n : nans) CHECK(n == 2, "%d", n);
}

// ---- The grid ----

enum Mistake { kNone, kEarly, kUnguarded, kMistakes };
struct Grid { uint32_t* arrivals; double* partials; int* wrong; int phases; Mistake mistake; };

// Every block publishes a number, all wait for all, every thread sums them; two rows of numbers take turns.
// kEarly arrives before publishing. kUnguarded arrives while threads of the block may still read the row before,
// which then is written two phases on: all blocks but that one have left the barrier and nothing holds them.
__global__ void grid_phases(Grid p) {
  for (int phase = 0; phase < p.phases; ++phase) {
    double* row = p.partials + phase % 2 * int(gridDim.x);
    const double mine = 100.0 * phase + blockIdx.x;
    if (p.mistake != kUnguarded) __syncthreads();
    if (threadIdx.x == 0) {
      if (p.mistake != kEarly) row[blockIdx.x] = mine;
      add_acquire_release(p.arrivals, 1);
      if (p.mistake == kEarly) row[blockIdx.x] = mine;
      while (load_acquire(p.arrivals) < gridDim.x * unsigned(phase + 1)) {}
    }
    __syncthreads();
    double sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += load_shared_result(row + b);
    if (sum != gridDim.x * 100.0 * phase + gridDim.x * (gridDim.x - 1) / 2) ++*p.wrong;
  }
}
static int run_grid(int blocks, bool cooperative, Mistake mistake, int& wrong) {
  uint32_t arrivals;
  std::vector<double> partials(size_t(2 * blocks), -1);
  zero(&arrivals, sizeof arrivals, nullptr);
  wrong = 0;
  return launch(grid_phases, blocks, 64, 0, cooperative, nullptr, Grid{&arrivals, partials.data(), &wrong, 4, mistake});
}
static void test_grid_barrier() {
  int wrong, seen[kMistakes] = {};
  for (int seed = 0; seed < 20; ++seed) {
    configure(uint64_t(seed));
    for (int blocks : {1, 4, 16}) {
      const int code = run_grid(blocks, true, kNone, wrong);
      CHECK(code == 0 && wrong == 0, "%d blocks, seed %d: code %d, %d wrong", blocks, seed, code, wrong);
    }
    for (Mistake mistake : {kEarly, kUnguarded}) seen[mistake] += run_grid(6, true, mistake, wrong) == 0 && wrong > 0;
    CHECK(run_grid(3, false, kNone, wrong) == 0 && wrong == 0, "as many blocks as can be resident");
    const int code = run_grid(4, false, kNone, wrong);
    CHECK(code == 700 && says(code, "1 of 4 blocks have not started"), "more than can be resident: code %d", code);
  }
  for (Mistake mistake : {kEarly, kUnguarded})
    CHECK(seen[mistake] >= 3, "mistake %d showed under %d of 20 seeds", int(mistake), seen[mistake]);
  if (verbose) std::printf("seeds of 20 that showed: kEarly %d, kUnguarded %d\n", seen[kEarly], seen[kUnguarded]);
}

struct Tickets { uint32_t* next; int* order; };
__global__ void take_tickets(Tickets p) {
  for (int i = 0; i < 2; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) p.order[add_acquire_release(p.next, 1)] = int(blockIdx.x);
  }
}
static std::string ticket_order(uint64_t seed) {
  uint32_t next = 0;
  int order[8];
  configure(seed);
  CHECK(launch(take_tickets, 4, 64, 0, true, nullptr, Tickets{&next, order}) == 0, "tickets");
  std::string text;
  for (int b : order) text += char('0' + b);
  return text;
}
static void test_seeds() {
  std::set<std::string> orders;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    orders.insert(ticket_order(seed));
    CHECK(ticket_order(seed) == ticket_order(seed), "seed %d is not repeatable", int(seed));
  }
  if (verbose) std::printf("orders of arrival from 40 seeds: %d\n", int(orders.size()));
  CHECK(orders.size() >= 20, "40 seeds gave %d orders of arrival", int(orders.size()));
}

// ---- Counting ----

struct Copy { const char* in; char* out; int vectors, rounds; };
__global__ void copy(Copy p) {  // `rounds` loads of every vector, the first kept, the others streamed; a tail of 3
  const int first = int(blockIdx.x * blockDim.x + threadIdx.x), step = int(gridDim.x * blockDim.x);
  for (int i = first; i < p.vectors; i += step) {
    Vec16 v;
    load16(v, p.in + 16 * i, keep(1.0f), true);
    for (int r = 1; r < p.rounds; ++r) load16(v, p.in + 16 * i, stream(), true);
    store16(p.out + 16 * i, v, stream());
  }
  if (first < 3) store1(p.out + 16 * p.vectors + first, load1(p.in + 16 * p.vectors + first));
}
static void test_counting() {
  constexpr int kVectors = 1001, kBytes = 16 * kVectors + 3, kGranules = (kBytes + 31) / 32;
  alignas(16) static char in[kBytes + 16], out[kBytes + 16];
  for (int i = 0; i < kBytes; ++i) in[i] = char(i * 7);
  std::vector<uint32_t> loads(kGranules), stores(kGranules), kept(kGranules), streamed(kGranules), small(kBytes);
  sipo_emulate_watch(0, in, kBytes, 32, loads.data(), stores.data());
  sipo_emulate_watch_kind(0, 0, kept.data());
  sipo_emulate_watch_kind(0, 1, streamed.data());
  sipo_emulate_watch(7, out, kBytes, 1, nullptr, small.data());
  sipo_emulate_configure(5, 2, 0.25);
  uint64_t statistics[4];
  sipo_emulate_statistics(statistics);
  CHECK(launch(copy, 5, 64, 0, false, nullptr, Copy{in, out, kVectors, 3}) == 0, "copy");
  CHECK(std::memcmp(in, out, kBytes) == 0, "the copy differs");
  for (int g = 0; g < kGranules; ++g) {
    const bool last = g == kGranules - 1;  // one vector and the tail
    const uint32_t want_kept = last ? 1 : 2, want_streamed = 2 * want_kept, want = want_kept * 3 + (last ? 3 : 0);
    CHECK(loads[g] == want && !stores[g] && kept[g] == want_kept && streamed[g] == want_streamed,
          "granule %d: %u loads, %u stores, %u kept, %u streamed", g, loads[g], stores[g], kept[g], streamed[g]);
  }
  for (int i = 0; i < kBytes; ++i) CHECK(small[i] == 1, "byte %d stored %u times", i, small[i]);
  sipo_emulate_watch(0, nullptr, 0, 0, nullptr, nullptr);
  sipo_emulate_watch(7, nullptr, 0, 0, nullptr, nullptr);
  CHECK(launch(copy, 5, 64, 0, false, nullptr, Copy{in, out, kVectors, 3}) == 0, "copy");
  CHECK(loads[0] == 6 && small[0] == 1, "a cleared watch counts");
  sipo_emulate_statistics(statistics);
  CHECK(statistics[0] == 2 && statistics[1] == 10 && statistics[2] > 640 && statistics[3] == 0,
        "%d launches, %d blocks", int(statistics[0]), int(statistics[1]));
  sipo_emulate_statistics(statistics);
  CHECK(statistics[0] + statistics[1] + statistics[2] + statistics[3] == 0, "reading the statistics does not reset them");
}

// ---- What a switch costs ----

struct Bench { double* out; int rounds; };
__global__ void bench_kernel(Bench p) {
  double x = threadIdx.x;
  for (int r = 0; r < p.rounds; ++r) {
    for (int delta = 16; delta; delta /= 2) x += shuffle_down(x, delta);
    __syncthreads();
  }
  if (threadIdx.x == 0) p.out[blockIdx.x] = x;
}
static void bench() {
  double out[16];
  for (int blocks : {4, 16}) {
    for (int threads : {32, 128, 512}) {
      double best = 1e9;
      uint64_t statistics[4];
      for (int repeat = 0; repeat < 3; ++repeat) {
        sipo_emulate_statistics(statistics);
        const auto start = std::chrono::steady_clock::now();
        launch(bench_kernel, blocks, threads, 256, true, nullptr, Bench{out, 40960 / blocks / threads});
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        sipo_emulate_statistics(statistics);
        best = std::fmin(best, seconds / double(statistics[2]) * 1e9);
      }
      std::printf("%2d blocks of %3d threads: %5.1f ns a switch\n", blocks, threads, best);
    }
  }
}

int main(int argc, char** argv) {
  verbose = argc > 1 && std::string(argv[1]) == "bench";
  test_reduction();
  test_shuffle();
  test_missing_barrier();
  test_reports();
  test_poison();
  test_grid_barrier();
  test_seeds();
  test_counting();
  if (verbose) bench();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
