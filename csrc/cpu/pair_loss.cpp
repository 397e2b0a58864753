// The pair loss on a CPU: errors, per-pair arithmetic and gradient in one call, pair by pair, so that the gradient
// finds the pair's data in cache. Plain C interface for ctypes (sipo_kernels/backends/native.py); no torch headers.
//
// Chunks have a fixed size whatever the number of threads, and their partial sums are added in order: the same input
// gives the same bits. Threads synchronise once for each group of pairs and share nothing in between.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/call.h"
#include "cpu/kernels.h"
#include "describe.h"

namespace sipo {
namespace {

constexpr int64_t kChunk = 8192;             // elements
constexpr int64_t kThreadWork = 1 << 16;     // elements that justify one more thread
constexpr int64_t kStreamBytes = 8 << 20;    // gradients from here on bypass the caches
constexpr int64_t kHugePageBytes = 8 << 20;  // from here on they may lie in fresh memory: ask for huge pages

const int kBytesOf[kDtypes] = {4, 2, 2, 8};

struct Isa {
  const char* name;
  const Kernels& (*kernels)();
  bool runs;
};

const Isa* isas(int* count) {
  static const Isa list[] = {
#if defined(SIPO_X86)
      {"avx512", avx512_kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq")},
      // Every processor with AVX2 and FMA has F16C; not every compiler can be asked for it.
      {"avx2", avx2_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"portable", portable_kernels, true},
  };
  *count = sizeof list / sizeof list[0];
  return list;
}

const Isa* find_isa(const char* name) {  // null or "": the widest that runs here
  int count;
  const Isa* list = isas(&count);
  for (int i = 0; i < count; ++i)
    if (list[i].runs && (!name || !*name || !std::strcmp(name, list[i].name))) return &list[i];
  return nullptr;
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Barrier {
 public:
  void wait(int threads) {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
      spins < 4096 ? pause() : std::this_thread::yield();
  }

 private:
  std::atomic<int> arrived_{0}, round_{0};
};

// The OpenMP runtime that torch loaded. Its threads keep spinning for a while after each of torch's operators, so
// threads of our own would compete with them for the cores. Intel's and LLVM's runtimes have GNU's entry points too on
// Linux.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*threads)();
};

const OpenMp* openmp() {
#if defined(__linux__)
  static const OpenMp found = {reinterpret_cast<decltype(OpenMp::parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
                               reinterpret_cast<decltype(OpenMp::thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
                               reinterpret_cast<decltype(OpenMp::threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))};
  if (found.parallel && found.thread && found.threads) return &found;
#endif
  return nullptr;
}

// Runs work(thread, threads) on up to `most` threads, including the caller's.
template <class Work> void parallel(int most, bool own_threads, Work work) {
  if (most == 1) return work(0, 1);
  if (openmp() && !own_threads) {
    const auto body = [](void* w) { (*static_cast<Work*>(w))(openmp()->thread(), openmp()->threads()); };
    return openmp()->parallel(body, &work, unsigned(most), 0);
  }
  std::vector<std::thread> others;
  others.reserve(most - 1);
  for (int i = 1; i < most; ++i) others.emplace_back(work, i, most);
  work(0, most);
  for (auto& t : others) t.join();
}

int64_t cache_bytes() {  // of one core's second-level cache
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return 1 << 20;
}

// A large new gradient is untouched memory, and the first write to each page costs a fault: 512 times fewer with pages
// of 2 MiB instead of 4 KiB. Advice only: nothing happens on a system without transparent huge pages.
void advise_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugePageBytes) return;
  const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(begin) + page - 1) & ~(page - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~(page - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

double get(const void* array, int64_t i, int dtype) {
  switch (dtype) {
    case kFloat32: return static_cast<const float*>(array)[i];
    case kBfloat16: return widen(static_cast<const bf16*>(array)[i]);
    case kFloat16: return widen(static_cast<const fp16*>(array)[i]);
    case kInt64: return double(static_cast<const int64_t*>(array)[i]);
    case kInt32: return double(static_cast<const int32_t*>(array)[i]);
    default: return static_cast<const double*>(array)[i];
  }
}

const char* at(const void* base, int64_t element, int dtype) {
  return static_cast<const char*>(base) + element * kBytesOf[dtype];
}

// Numbers the chunks of a group of pairs: those of a chosen sample, of its rejected sample, of the next chosen one...
struct Group {
  int64_t first_pair, pairs, chunks;  // chunks per sample
  int64_t size() const { return 2 * pairs * chunks; }
  void locate(int64_t unit, int64_t batch_pairs, int64_t* pair, int64_t* sample, int64_t* chunk) const {
    const int64_t row = unit / chunks;
    *pair = first_pair + row / 2;
    *sample = *pair + (row % 2) * batch_pairs;
    *chunk = unit % chunks;
  }
};

using Sums = double[4];  // of reduce, by chunk

Sample read_sample(const CpuArgs& a, const Sums* partial, int64_t s, int64_t chunks) {
  Sums sums = {0, 0, 0, 0};
  for (int64_t c = 0; c < chunks; ++c)
    for (int k = 0; k < (a.error_mask ? 4 : 3); ++k) sums[k] += partial[s * chunks + c][k];
  Sample x{};
  const double n = x.elements = a.error_mask ? sums[3] : double(a.elements);
  if (n != 0) {
    x.model_error = sums[0] / n;
    x.ref_error = a.ref ? sums[1] / n : get(a.ref_error, s, a.ref_error_dtype);
    x.error_gap = a.ref ? sums[2] / n : x.model_error - x.ref_error;
  }
  x.ratio_scale = a.ratio_scale ? get(a.ratio_scale, s, a.ratio_scale_dtype) : 0.0;
  x.error_weight = a.error_weight ? get(a.error_weight, s, a.error_weight_dtype) : 1.0;
  return x;
}

void write_sample(const CpuArgs& a, int64_t s, const Sample& x) {
  const double rows[kSampleRows] = {x.model_error, x.ref_error, x.error_gap, x.log_ratio, x.weight, x.reward, x.coef};
  for (int i = 0; i < kSampleRows; ++i) put(a.samples, i * 2 * a.pairs + s, rows[i], a.settings.double_stats);
}

// The weights of a chunk of a sample, those of a boolean mask in `buffer`; null without a mask.
const float* weights_of(const CpuArgs& a, const Kernels& k, int64_t pair, int64_t s, int64_t begin, int64_t n,
                        float* buffer) {
  if (!a.error_mask) return nullptr;
  const int64_t at = (a.error_mask_shared ? pair : s) * a.error_mask_stride + begin;
  if (a.error_mask_dtype == kFloat32) return static_cast<const float*>(a.error_mask) + at;
  k.weights(static_cast<const uint8_t*>(a.error_mask) + at, buffer, n);
  return buffer;
}

void reduce_unit(const CpuArgs& a, const Kernels& k, int64_t pair, int64_t s, int64_t chunk, Sums& sums) {
  const int64_t begin = chunk * kChunk, n = std::min(kChunk, a.elements - begin);
  const int64_t t = a.target_shared ? pair : s;
  const void* ref = a.ref ? at(a.ref, s * a.ref_stride + begin, a.ref_dtype) : nullptr;
  float buffer[kChunk];
  const float* w = weights_of(a, k, pair, s, begin, n, buffer);
  k.reduce[w != nullptr][a.wide_sums][a.model_dtype][a.ref_dtype][a.target_dtype](
      at(a.model, s * a.model_stride + begin, a.model_dtype), ref,
      at(a.target, t * a.target_stride + begin, a.target_dtype), w, n, sums);
}

// §6, relatives: what this chunk of a pair adds to Σ d_w · d_l. The chosen sample should still be in cache.
double inner_unit(const CpuArgs& a, const Kernels& k, int64_t pair, int64_t chunk) {
  const int64_t begin = chunk * kChunk, n = std::min(kChunk, a.elements - begin), rejected = pair + a.pairs;
  float buffers[2][kChunk];
  const float* w = weights_of(a, k, pair, pair, begin, n, buffers[0]);
  return k.inner[w != nullptr][a.model_dtype][a.target_dtype](
      at(a.model, pair * a.model_stride + begin, a.model_dtype),
      at(a.target, pair * a.target_stride + begin, a.target_dtype), w,
      at(a.model, rejected * a.model_stride + begin, a.model_dtype),
      at(a.target, (a.target_shared ? pair : rejected) * a.target_stride + begin, a.target_dtype),
      weights_of(a, k, pair, rejected, begin, n, buffers[1]), n);
}

void grad_unit(const CpuArgs& a, const Kernels& k, int64_t pair, int64_t s, int64_t chunk, double coef, bool stream) {
  const int64_t begin = chunk * kChunk, n = std::min(kChunk, a.elements - begin);
  const int64_t t = a.target_shared ? pair : s;
  char* out = static_cast<char*>(a.grad) + (s * a.elements + begin) * kBytesOf[a.model_dtype];
  if (coef == 0) {  // exact zeros, whatever the inputs are
    std::memset(out, 0, n * kBytesOf[a.model_dtype]);
    return;
  }
  float buffer[kChunk];
  const float* w = weights_of(a, k, pair, s, begin, n, buffer);
  k.grad[w != nullptr][a.model_dtype][a.target_dtype](at(a.model, s * a.model_stride + begin, a.model_dtype),
                                                      at(a.target, t * a.target_stride + begin, a.target_dtype), w,
                                                      out, n, coef, stream);
}

// §8 of a whole batch: metrics, and what each pair adds to running sums.
class Report {
 public:
  explicit Report(const CpuArgs& a) : a_(a) {}

  void add(int64_t pair, const Sample& chosen, const Sample& rejected, const Pair& p) {
    double facts[kFacts];
    pair_facts(chosen, rejected, p, a_.settings, facts);
    for (int k = 0; k < kFacts; ++k) sums_[k] += facts[k];
    if (!a_.levels) return;
    double rows[kStatistics];
    pair_statistics(chosen, rejected, p, a_.settings, rows);
    float* const bin = a_.levels + level_bin(get(a_.pair_levels, pair, a_.pair_levels_dtype), a_.bins, a_.top);
    for (int i = 0; i < kStatistics; ++i) bin[i * a_.bins] += float(rows[i]);
  }

  void write() const {
    for (int k = 0; k < kMetrics; ++k) {
      const double value = metric(k, sums_[k], sums_[kCounted], double(a_.pairs), a_.settings, a_.loss_per_pair);
      put(a_.numbers, k, value, a_.settings.double_stats);
      if (k == kLoss && !a_.loss_per_pair) put(a_.loss, 0, value, a_.settings.double_stats);
      if (a_.metrics) add_metric(a_.metrics, k, value, metric_pairs(k, sums_[kCounted], double(a_.pairs)));
    }
    put(a_.numbers, kMetrics, a_.upstream, a_.settings.double_stats);
  }

 private:
  const CpuArgs& a_;
  double sums_[kFacts] = {};
};

int thread_count(const CpuArgs& a) {
  const int64_t useful = 2 * a.pairs * a.elements / kThreadWork;
  return int(std::max<int64_t>(1, std::min<int64_t>(a.threads, useful)));
}

}  // namespace
}  // namespace sipo

using namespace sipo;

// Forward pass, and the gradient if a.grad is not null. Returns 1 if the requested instruction set does not run here.
SIPO_API int sipo_pair_loss(const CpuArgs* args) {
  const CpuArgs& a = *args;
  const Isa* isa = find_isa(a.isa);
  if (!isa) return 1;
  const Kernels& k = isa->kernels();
  const int64_t chunks = (a.elements + kChunk - 1) / kChunk;
  const int64_t grad_bytes = 2 * a.pairs * a.elements * kBytesOf[a.model_dtype];
  const bool stream = grad_bytes >= kStreamBytes;
  const int most = thread_count(a);
  if (a.grad) advise_huge_pages(a.grad, grad_bytes);

  // As many pairs as fit into the caches together, so that threads synchronise less often.
  const int64_t pair_bytes = 2 * a.elements * (kBytesOf[a.model_dtype] + kBytesOf[a.target_dtype]);
  const int64_t group = a.grad ? std::max<int64_t>(1, most * cache_bytes() / pair_bytes) : a.pairs;

  const std::unique_ptr<Sums[]> partial(new Sums[2 * a.pairs * chunks]);  // uninitialised: written before it is read
  const bool safeguarded = a.settings.safeguard >= 0;
  const std::unique_ptr<double[]> inner(safeguarded ? new double[a.pairs * chunks] : nullptr);
  Report report(a);  // of thread 0
  Barrier barrier;
  parallel(most, a.own_threads, [&](int thread, int threads) {
    for (int64_t first = 0; first < a.pairs; first += group) {
      const Group g{first, std::min(group, a.pairs - first), chunks};
      const int64_t begin = g.size() * thread / threads, end = g.size() * (thread + 1) / threads;
      int64_t pair, s, chunk;
      for (int64_t u = begin; u < end; ++u) {
        g.locate(u, a.pairs, &pair, &s, &chunk);
        reduce_unit(a, k, pair, s, chunk, partial[s * chunks + chunk]);
        if (safeguarded && s != pair) inner[pair * chunks + chunk] = inner_unit(a, k, pair, chunk);
      }
      barrier.wait(threads);
      // Each thread does the arithmetic of the pairs that it needs, which costs less than to synchronise again.
      // Thread 0 does all of them and writes the results. Backwards, because what was read last is still in cache.
      int64_t known = -1;
      Sample chosen, rejected;
      const auto know = [&](int64_t i) {
        chosen = read_sample(a, partial.get(), i, chunks);
        rejected = read_sample(a, partial.get(), i + a.pairs, chunks);
        known = i;
        double product = 0;  // mean_D(d_w · d_l)
        for (int64_t c = 0; safeguarded && c < chunks; ++c) product += inner[i * chunks + c] / rejected.elements;
        return pair_math(chosen, rejected, a.settings, a.ratio_scale != nullptr, product);
      };
      if (a.grad) {
        for (int64_t u = end - 1; u >= begin; --u) {
          g.locate(u, a.pairs, &pair, &s, &chunk);
          if (pair != known) know(pair);
          const double coef = s == pair ? chosen.coef : rejected.coef;
          grad_unit(a, k, pair, s, chunk, upstream_coef(coef, a.upstream, a.settings.double_stats), stream);
        }
      }
      if (thread == 0) {
        for (int64_t i = first; i < first + g.pairs; ++i) {
          const Pair p = know(i);
          write_sample(a, i, chosen);
          write_sample(a, i + a.pairs, rejected);
          put(a.logits, i, p.logits, a.settings.double_stats);
          a.mask[i] = p.mask;
          if (a.loss_per_pair) put(a.loss, i, p.loss, a.settings.double_stats);
          report.add(i, chosen, rejected, p);
        }
      }
    }
  });

  report.write();
  return 0;
}

// Only the gradient, for given coefficients (`coef`, float or double as double_stats says).
SIPO_API int sipo_pair_grad(const CpuArgs* args) {
  const CpuArgs& a = *args;
  const Isa* isa = find_isa(a.isa);
  if (!isa) return 1;
  const Kernels& k = isa->kernels();
  const int64_t grad_bytes = 2 * a.pairs * a.elements * kBytesOf[a.model_dtype];
  const Group g{0, a.pairs, (a.elements + kChunk - 1) / kChunk};
  advise_huge_pages(a.grad, grad_bytes);
  parallel(thread_count(a), a.own_threads, [&](int thread, int threads) {
    int64_t pair, s, chunk;
    for (int64_t u = g.size() * thread / threads; u < g.size() * (thread + 1) / threads; ++u) {
      g.locate(u, a.pairs, &pair, &s, &chunk);
      const double coef = get(a.coef, s, a.settings.double_stats ? kFloat64 : kFloat32);
      grad_unit(a, k, pair, s, chunk, coef, grad_bytes >= kStreamBytes);
    }
  });
  return 0;
}

// Names of the instruction sets that run here, widest first; null past the end.
SIPO_API const char* sipo_isa(int index) {
  int count;
  const Isa* list = isas(&count);
  for (int i = 0; i < count; ++i)
    if (list[i].runs && index-- == 0) return list[i].name;
  return nullptr;
}

// What Python compares with its own definitions when it loads the library.
SIPO_API const char* sipo_description() {
  static const std::string text = describe_shared() + SIPO_DESCRIBE("arguments", CpuArgs, SIPO_CPU_ARGS);
  return text.c_str();
}

// The digest of the sources that the library was made from; setup.py defines it.
SIPO_API const char* sipo_sources() { return SIPO_SOURCES; }
