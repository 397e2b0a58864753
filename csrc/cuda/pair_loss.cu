// The pair loss on a GPU: errors, per-pair arithmetic, gradient and what a batch reports, in one launch that traverses
// device memory once. Plain C interface for ctypes (sipo_kernels/backends/cuda/launch.py); no torch headers.
// sipo_kernels/backends/cuda/plan.py decides how a call is divided.
//
// A pair is cut into tiles: kThreads · kVector elements of the chosen sample and the same ones of the rejected sample.
// Pairs are processed in groups. Within a group each block reduces a run of consecutive tiles and returns for the
// gradient of the same run. By then its own shared memory holds d = policy − target of the last `hold` sample tiles;
// policy and target of the others were loaded with the hint to stay in the L2 cache, which the reference and the
// gradient bypass. The last block to have reduced its part of a group does the arithmetic of the group's pairs.
// Meanwhile the others reduce the first `lead` tiles of the next group, so that memory is never idle:
//
//     reduce group 0
//     for each group k: reduce `lead` tiles of k + 1; wait for k's coefficients; gradient of k; reduce the rest of k+1
//
// Waiting requires all blocks to be on the chip at once. The launch is therefore cooperative, which fails rather than
// hangs. Sums have a fixed order that depends on shape and device only: the same input gives the same bits.
#include "cuda/settle.h"
#include "describe.h"

namespace sipo {
namespace {

constexpr int kWarps = kThreads / 32;

// One block's part of the launch.
template <class Reader, class Acc> struct Block {
  using Prediction = typename Reader::Prediction;
  using Target = typename Reader::Target;

  struct Run {  // the tiles of this block in one group
    Group group;
    int32_t begin, end;
    int32_t held_from;  // the first that shared memory holds

    __device__ __forceinline__ Run(const CudaArgs& a, int32_t k) : group(a, k) {
      const int32_t block = blockIdx.x;
      begin = block < group.blocks ? group.first_tile(block) : group.tiles;
      end = block < group.blocks ? group.first_tile(block + 1) : group.tiles;
      const int32_t last = end - (a.hold + 1) / 2, first = begin + a.lead;
      held_from = last > first ? last : first;
    }
  };

  const Params& a;
  static constexpr int kSums = Reader::kMasked ? kMaskedSums : sipo::kSums;
  double sums[kSums] = {};  // the chosen sample's, the rejected sample's, and of both

  __device__ __forceinline__ explicit Block(const Params& params) : a(params) {}

  // The slot where a thread keeps d of its elements of a sample tile for the gradient; -1: none.
  __device__ __forceinline__ int32_t slot(const Run& r, int32_t u, int side) const {
    const int32_t i = 2 * (u - r.held_from) + side;
    return Reader::kTyped && i >= 0 && i < a.hold ? i : -1;
  }

  // ---- Reduction ---------------------------------------------------------------------------------------------

  __device__ __forceinline__ void reduce_tile(const Run& r, int32_t u, int32_t pair, int32_t tile, Policy stay,
                                              Policy pass) {
    const int64_t i = element<Reader>(tile), left = a.elements - i;
    if (left <= 0) return;
    Prediction m[2] = {}, ref[2] = {};
    Target t[2] = {};
    Weights w[2] = {};
    const int32_t slots[2] = {a.grad ? slot(r, u, 0) : -1, a.grad ? slot(r, u, 1) : -1};
#pragma unroll
    for (int side = 0; side < 2; ++side) {  // all loads are issued before the first is used
      const int64_t sample = pair + side * a.pairs;
      // A shared target is needed again unless the rejected sample, the second to be held, is held.
      const bool again = a.grad && slots[side] < 0, target_again = a.target_shared ? a.grad && slots[1] < 0 : again;
      Reader::load(m[side], a.model, sample * a.model_stride + i, left, a.model_dtype, again ? stay : pass);
      Reader::load(t[side], a.target, target_row(a, pair, side) + i, left, a.target_dtype, target_again ? stay : pass,
                   !side || !a.target_shared);
      if constexpr (Reader::kMasked)
        Reader::load_weights(w[side], a.error_mask, error_mask_row(a, pair, side) + i, a.error_mask_dtype,
                             a.grad ? stay : pass);
      Reader::load(ref[side], a.ref, sample * a.ref_stride + i, left, a.ref_dtype, pass, a.ref != nullptr);
    }
    if (a.target_shared) t[1] = t[0];
    if constexpr (Reader::kTyped) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (slots[side] < 0) continue;
        typename Reader::Wide d[Reader::kVector];
        difference<Reader>(a, m[side], t[side], d);
        Reader::put_aside(slots[side], d);
      }
    }
    // In float, a few terms at a time; in double, the sums themselves, which saves registers.
    constexpr bool kFew = std::is_same_v<Acc, float>;
    Acc terms[kSums];
#pragma unroll
    for (int j = 0; j < kSums; ++j) terms[j] = kFew ? Acc(0) : Acc(sums[j]);
    if constexpr (Reader::kHalf) {
      constexpr int kSome = kFew ? 4 : 2;  // all at once would not fit into the registers
#pragma unroll 1
      for (int j = 0; j < Reader::kVector; j += kSome) {
        add_terms<kSome>(m, ref, t, w, terms);
#pragma unroll
        for (int side = 0; side < 2; ++side)
          m[side].template drop<kSome>(), ref[side].template drop<kSome>(), t[side].template drop<kSome>();
      }
    } else {
      add_terms<Reader::kVector>(m, ref, t, w, terms);
    }
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[j] = kFew ? sums[j] + terms[j] : double(terms[j]);
  }

  // §2: adds Σ w·d², Σ w·d_ref², Σ w·(m − r)(d + d_ref) of one thread's first N elements, of chosen and rejected sample,
  // Σ d_w · d_l, and Σ w of both where there is a mask.
  template <int N>
  __device__ __forceinline__ void add_terms(const Prediction (&m)[2], const Prediction (&ref)[2], const Target (&t)[2],
                                            const Weights (&w)[2], Acc (&terms)[kSums]) const {
    typename Reader::Wide ms[2][N], rs[2][N], ts[2][N];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      Reader::widen_all(m[side], a.model_dtype, ms[side]);
      Reader::widen_all(ref[side], a.ref_dtype, rs[side]);
      Reader::widen_all(t[side], a.target_dtype, ts[side]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Acc d[2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        Acc model = ms[side][j], target = ts[side][j], weight = 1;
        if constexpr (Reader::kMasked) {
          weight = Reader::weight(w[side], a.error_mask_dtype, j);
          terms[kWeightSum + side] += weight;
          if (weight == 0) model = target = 0;  // whatever they are
        }
        d[side] = model - target;
        terms[3 * side] += weight * d[side] * d[side];
        if (a.ref) {
          Acc reference = rs[side][j];
          if (weight == 0) reference = 0;
          const Acc d_ref = reference - target;
          terms[3 * side + 1] += weight * d_ref * d_ref;
          terms[3 * side + 2] += weight * (model - reference) * (d[side] + d_ref);
        }
      }
      if (a.safeguarded) terms[kInnerSum] += d[0] * d[1];  // §6, relatives: beside it, a mask is boolean
    }
  }

  // Reduces tiles [from, to) of this block's run of group k. Sums stay in registers to the block's last tile of a pair.
  __device__ __forceinline__ void reduce(int32_t k, int32_t from, int32_t to) {
    const Run r(a, k);
    int32_t u = r.begin + from;
    const int32_t stop = to < r.end - r.begin ? r.begin + to : r.end;
    if (u >= stop) return;
    const Policy stay = device::keep(a.keep), pass = device::stream();
    int32_t pair = u / a.tiles, tile = u - pair * a.tiles;
    // The block's number among those that share the pair; 0 for a pair that begins in its run.
    int32_t part = pair * a.tiles < r.begin ? blockIdx.x - r.group.owner(pair * a.tiles) : 0;
    pair += r.group.first_pair;
    for (; u < stop; ++u) {
      reduce_tile(r, u, pair, tile, stay, pass);
      if (++tile == a.tiles || u + 1 == r.end) {
        flush(int64_t(pair) * a.parts + part);
        tile = part = 0, ++pair;
      }
    }
  }

  // Writes the block's sums of one pair to memory, and sets them to 0.
  __device__ __forceinline__ void flush(int64_t part) {
    double* scratch = reinterpret_cast<double*>(device::shared_memory());
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
      const double sum = warp_sum(sums[j]);
      if (lane == 0) scratch[warp * kSums + j] = sum;
      sums[j] = 0;
    }
    __syncthreads();
    if (int(threadIdx.x) < a.sums) {
      double sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += scratch[w * kSums + threadIdx.x];
      a.work.partial[part * a.sums + threadIdx.x] = sum;
    }
    __syncthreads();
  }

  // Reports that this block has reduced its run of group k. The last block to report does the arithmetic of its pairs.
  // All blocks arrive at k before k + 1, and at k + 1 only after settling k: groups are settled in order.
  __device__ __forceinline__ void arrive(int32_t k) {
    if (threadIdx.x == 0) *was_last() = device::add_acquire_release(a.work.arrived + k, 1) == gridDim.x - 1;
    __syncthreads();
    if (*was_last()) Settling<Reader::kMasked>{a}.group(k);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[j] = 0;  // they are 0 already: this tells the compiler
  }
  // Whether this block was the last one to arrive.
  __device__ __forceinline__ static volatile uint32_t* was_last() {
    return reinterpret_cast<uint32_t*>(device::shared_memory() + kScratchBytes) - 1;
  }

  // ---- Gradient ----------------------------------------------------------------------------------------------

  __device__ __forceinline__ void wait(int32_t k) const {
    if (threadIdx.x == 0)
      while (device::load_acquire(a.work.ready) < uint32_t(k + 1)) {}
    __syncthreads();
  }

  __device__ __forceinline__ void gradient(int32_t k) const {
    const Run r(a, k);
    if (r.begin >= r.end) return;
    wait(k);
    // A gradient that fits into the cache stays there for the network's backward pass; a larger one would evict inputs.
    const bool stays = a.groups == 1;
    int32_t pair = r.begin / a.tiles, tile = r.begin - pair * a.tiles;
    pair += r.group.first_pair;
    double coef[2];
    for (int32_t u = r.begin; u < r.end; ++u) {
      if (tile == 0 || u == r.begin) {
        coef[0] = device::load_shared_result(a.work.coef + pair);
        coef[1] = device::load_shared_result(a.work.coef + pair + a.pairs);
      }
      gradient_tile<Reader>(a, pair, tile, coef, {slot(r, u, 0), slot(r, u, 1)}, stays ? device::normal() : device::stream());
      if (++tile == a.tiles) tile = 0, ++pair;
    }
  }
};

template <class Reader, class Acc>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) pair_kernel(const __grid_constant__ Params a) {
  constexpr int32_t kAll = 0x7fffffff;
  Block<Reader, Acc> block(a);
  for (int32_t step = 0; step <= 2 * a.groups; ++step) {
    const int32_t k = step / 2;
    const bool leading = step % 2 == 0;
    if (k < a.groups) block.reduce(k, leading ? 0 : a.lead, leading ? a.lead : kAll);
    if (!leading) block.arrive(k);
    else if (a.grad && k > 0) block.gradient(k - 1);
  }
  if (*block.was_last()) Settling<Reader::kMasked>{a}.report();
}

// ---- Host ------------------------------------------------------------------------------------------------------

template <class Reader> int gradient_alone(const CudaArgs& a) {
  return device::launch(grad_kernel<Reader>, a.blocks, kThreads, 0, false, a.stream, a);
}

template <class Reader, class Acc> int pair_loss(const CudaArgs& args) {
  const auto kernel = pair_kernel<Reader, Acc>;
  Params a(args);
  int error = device::zero(a.work.ready, (1 + a.groups) * sizeof(uint32_t), a.stream);
  if (!error) error = device::allow_shared(kernel, a.shared_bytes);
  if (error) return error;
  if (a.grad && a.one_pass) {
    error = device::launch(kernel, a.blocks, kThreads, a.shared_bytes, true, a.stream, a);
    if (error != device::kTooLarge) return error;
  }
  // No gradient; or one in a second launch, if the blocks cannot all be on the chip at once (another process may use
  // part of it).
  a.grad = nullptr;
  error = device::launch(kernel, a.blocks, kThreads, kScratchBytes, false, a.stream, a);
  if (error || !args.grad) return error;
  a.grad = args.grad, a.coef = a.work.coef, a.settings.double_stats = 1, a.upstream = {};  // which these coefficients include
  return gradient_alone<Reader>(a);
}

// Half precision is summed in float, or in double if there are few elements; anything else in double.
template <class Reader> int pair_loss(const CudaArgs& a) {
  if constexpr (Reader::kHalf)
    if (!a.double_terms) return pair_loss<Reader, float>(a);
  return pair_loss<Reader, double>(a);
}

// Calls run with the reader of the call.
template <class Run> int with_reader(const CudaArgs& a, Run run) {
  if (a.error_mask) return a.reader == kAnyReader ? run(WithErrorMask<Any>{}) : run(WithErrorMask<Mixed>{});
  if (a.reader == kMixedReader) return run(Mixed{});
  if (a.reader == kAnyReader) return run(Any{});
  switch (a.model_dtype) {
    case kBfloat16: return a.target_dtype == kFloat32 ? run(Vector<bf16, float>{}) : run(Vector<bf16, bf16>{});
    case kFloat16: return a.target_dtype == kFloat32 ? run(Vector<fp16, float>{}) : run(Vector<fp16, fp16>{});
    case kFloat32: return run(Vector<float, float>{});
    default: return run(Vector<double, double>{});
  }
}

}  // namespace
}  // namespace sipo

using namespace sipo;

// Forward pass, and the gradient if args->grad is not null. Returns 0 or CUDA's error code.
SIPO_API int sipo_cuda_pair_loss(const CudaArgs* args) {
  const device::DeviceGuard guard(args->device);
  return with_reader(*args, [&](auto reader) { return pair_loss<decltype(reader)>(*args); });
}

// The size that args->workspace must have, for arguments that are otherwise complete.
SIPO_API int64_t sipo_cuda_workspace_bytes(const CudaArgs* args) { return Params(*args).work.bytes; }

// Only the gradient, for `coef` times `upstream`. Returns 0 or CUDA's error code.
SIPO_API int sipo_cuda_pair_grad(const CudaArgs* args) {
  const device::DeviceGuard guard(args->device);
  return with_reader(*args, [&](auto reader) { return gradient_alone<decltype(reader)>(*args); });
}

// Returns 0 if this driver and device can run the kernels, else CUDA's error code.
SIPO_API int sipo_cuda_status(int device) {
  const device::DeviceGuard guard(device);
  return device::usable(pair_kernel<Vector<bf16, bf16>, float>);
}

SIPO_API const char* sipo_cuda_error(int code) { return device::error_string(code); }

// What Python compares with its own definitions when it loads the library.
SIPO_API const char* sipo_cuda_description() {
  static const std::string text =
      describe_shared("constants: threads " + decimal(kThreads) + ", blocks " + decimal(kBlocksPerSm) + ", scratch " +
                      decimal(kScratchBytes) + ", vector " + decimal(kVectorReader) +
                      ", mixed " + decimal(kMixedReader) + " by " + decimal(Mixed::kVector) +
                      ", any " + decimal(kAnyReader) + " by " + decimal(Any::kVector) + "\n") +
      SIPO_DESCRIBE("numbers", Numbers, SIPO_NUMBERS) + SIPO_DESCRIBE("arguments", CudaArgs, SIPO_CUDA_ARGS);
  return text.c_str();
}
