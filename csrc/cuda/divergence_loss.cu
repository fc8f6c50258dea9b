// divergence_loss: loss and gradient in one launch, 12 bytes per float32 logit. The backward scales
// the gradient in a second launch, which returns at once if the factor is 1.
//
// A group of 8 or 32 lanes, or a block, processes a row in four passes: maxima, sums of
// exponentials, D, gradient, with a reduction after each of the first three. A row that fits stays
// in registers, so that device memory is read once. A longer row is read in every pass, mostly from
// the caches. The formulas are those of divqat/ops/reference_loss.py.
//
// The gradient needs the number of valid targets first. For up to kMaxRedundantCount targets every
// block counts all of them (at most 64 KiB from L2 per block, below 1 us). Beyond that the launch
// is cooperative, unless that is refused: each block counts a part, and the counts are added after a
// grid barrier.
#include <cooperative_groups.h>

#include <algorithm>

#include "divergence_loss_math.cuh"
#include "divergence_loss_rows.cuh"
#include "launch.cuh"
#include "launchers.h"
#include "math.cuh"
#include "pack.cuh"

namespace divqat::cuda {
namespace {

constexpr int64_t kMaxRedundantCount = 8192;
// Upper bound on the blocks of a launch: each needs two sums and a count in scratch memory.
constexpr int64_t kLossBlocks = kLossScratch / 3;
// Rows that do not fit into registers are read four times, so the rows in flight should fit into
// L2.
constexpr int64_t kL2Bytes = 32 << 20;

template <class T>
struct LossArguments {
  using A = compute_t<T>;
  const T* logits;
  const T* teacher;
  const int64_t* target;
  const float* weight;
  int64_t rows;
  int classes;
  bool aligned, cooperative;  // cooperative: each block counts a part of the targets
  RowOptions<A> options;
  int64_t ignore_index;
  T* grad;
  A *loss, *ce, *divergence;
  int64_t* counts;  // [blocks]
  double* partial;  // [blocks, 2]
  uint32_t* counter;
};

// Sum over the block, returned to every thread. All threads must call it.
template <int kBlock, class V>
__device__ V block_sum(V value) {
  __shared__ V warps[kBlock / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < kBlock / 32; ++warp) value += warps[warp];
  __syncthreads();
  return value;
}

template <int kBlock, class T>
__device__ int64_t count_valid(const LossArguments<T>& args) {
  const int64_t block = args.cooperative ? blockIdx.x : 0,
                blocks = args.cooperative ? gridDim.x : 1;
  long long count = 0;
#pragma unroll 4
  for (int64_t i = block * kBlock + threadIdx.x; i < args.rows; i += blocks * kBlock) {
    count += args.target[i] != args.ignore_index;
  }
  count = block_sum<kBlock>(count);
  if (!args.cooperative) return count;
  if (threadIdx.x == 0) args.counts[block] = count;
  cooperative_groups::this_grid().sync();
  count = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kBlock) count += __ldcg(args.counts + i);
  return block_sum<kBlock>(count);
}

// Writes the three means: the last block adds the blocks' partial sums in a fixed order.
template <int kBlock, class T>
__device__ void write_means(const LossArguments<T>& args, double ce, double divergence,
                            int64_t count) {
  using A = compute_t<T>;
  ce = block_sum<kBlock>(ce);
  divergence = block_sum<kBlock>(divergence);
  if (threadIdx.x == 0) {
    args.partial[2 * blockIdx.x] = ce;
    args.partial[2 * blockIdx.x + 1] = divergence;
  }
  if (!is_last_block(args.counter)) return;
  ce = divergence = 0;
  for (int block = threadIdx.x; block < int(gridDim.x); block += kBlock) {
    // From L2: other blocks wrote these, and L1 is not coherent.
    ce += __ldcg(args.partial + 2 * block);
    divergence += __ldcg(args.partial + 2 * block + 1);
  }
  ce = block_sum<kBlock>(ce) / double(count);
  divergence = block_sum<kBlock>(divergence) / double(count);
  if (threadIdx.x != 0) return;
  // L = CE − λ T² D; without the term if λ = 0, even if D is infinite.
  const double weight = *args.weight, temperature = args.options.temperature;
  const double penalty = weight == 0 ? 0 : weight * temperature * temperature * divergence;
  *args.loss = A(ce - penalty);
  *args.ce = A(ce);
  *args.divergence = A(divergence);
}

template <class T, Direction kDirection, int kGroup, int kPacks>
__global__ void __launch_bounds__(kBlockOf<kGroup>, 1)
    divergence_loss_rows(const __grid_constant__ LossArguments<T> args) {
  using A = compute_t<T>;
  constexpr int kBlock = kBlockOf<kGroup>, kGroups = kBlock / kGroup;
  __shared__ ReduceBuffer<A, kGroup> buffer;
  const int64_t count = count_valid<kBlock>(args);
  RowOptions<A> options = args.options;
  options.weight = A(*args.weight);
  const A inv_count = A(1) / A(count);
  double ce = 0, divergence = 0;  // summed over the group's rows, in its first thread
  // All groups of a block make the same number of iterations: the reductions need full warps.
  for (int64_t first = int64_t(blockIdx.x) * kGroups; first < args.rows;
       first += int64_t(gridDim.x) * kGroups) {
    const int64_t index = first + threadIdx.x / kGroup;
    const bool present = index < args.rows;
    const int64_t target = present ? args.target[index] : args.ignore_index;
    const bool valid = target != args.ignore_index;
    const LossRow<T, kGroup, kPacks> row(args.logits, args.teacher, args.grad, index, args.classes,
                                         present, args.aligned);
    const RowTerms<A> terms = row_loss<kDirection>(row, valid, target, inv_count, options, buffer);
    if (valid && threadIdx.x % kGroup == 0) {
      ce += double(terms.ce);
      divergence += double(terms.divergence);
    }
  }
  write_means<kBlock>(args, ce, divergence, count);
}

template <class T, Direction kDirection, int kGroup, int kPacks>
void launch_rows(LossArguments<T> args, cudaStream_t stream) {
  const auto kernel = divergence_loss_rows<T, kDirection, kGroup, kPacks>;
  constexpr int kBlock = kBlockOf<kGroup>, kGroups = kBlock / kGroup;
  int64_t blocks = std::min<int64_t>(resident_blocks(kernel, kBlock), kLossBlocks);
  if (kPacks == 0) {
    const int64_t row_bytes = 2 * int64_t(sizeof(T)) * args.classes;
    blocks = std::min(blocks, std::max<int64_t>(kL2Bytes / std::max<int64_t>(row_bytes, 1), 64));
  }
  blocks = std::max<int64_t>(1, std::min(blocks, ceil_div(args.rows, kGroups)));
  args.cooperative = args.rows > kMaxRedundantCount;
  if (args.cooperative && launch_together(kernel, blocks, kBlock, stream, args)) return;
  args.cooperative = false;  // every block counts all targets
  launch(kernel, blocks, kBlock, stream, args);
}

template <class T, Direction kDirection>
void launch_for_classes(const LossArguments<T>& args, cudaStream_t stream) {
  constexpr int W = kWidth<T>;
  // The most packs that a row can touch, whatever its alignment.
  const int64_t packs = args.classes % W == 0 ? args.classes / W : (args.classes + W - 2) / W + 1;
  if constexpr (sizeof(T) < 8) {
    if (packs <= 8 * (8 / W)) {
      return launch_rows<T, kDirection, 8, 8 / W>(args, stream);
    }
    if (packs <= 32 * (8 / W)) {
      return launch_rows<T, kDirection, 32, 8 / W>(args, stream);
    }
    if (packs <= 128 * (16 / W)) {
      return launch_rows<T, kDirection, 128, 16 / W>(args, stream);
    }
  } else if (packs <= 256) {
    return launch_rows<T, kDirection, 32, 0>(args, stream);
  }
  launch_rows<T, kDirection, 512, 0>(args, stream);
}

template <class T>
__global__ void __launch_bounds__(256) scale_in_place(T* values, const compute_t<T>* factor_at,
                                                      int64_t n, bool aligned) {
  constexpr int W = kWidth<T>;
  const compute_t<T> factor = *factor_at;
  if (factor == 1) return;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  auto* packs = reinterpret_cast<Pack<T, W>*>(values);
  const int64_t whole = aligned ? n / W : 0;
#pragma unroll 4
  for (int64_t i = first; i < whole; i += step) {
    Pack<T, W> pack = packs[i];
#pragma unroll
    for (int w = 0; w < W; ++w) pack.at[w] = from_compute<T>(to_compute(pack.at[w]) * factor);
    packs[i] = pack;
  }
  for (int64_t i = whole * W + first; i < n; i += step) {
    values[i] = from_compute<T>(to_compute(values[i]) * factor);
  }
}

}  // namespace

void divergence_loss(DType dtype, const LossInputs& in, const LossOptions& options,
                     const LossOutputs& out, double* scratch, cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = compute_t<T>;
    LossArguments<T> args = {};
    args.logits = static_cast<const T*>(in.logits);
    args.teacher = static_cast<const T*>(in.teacher_logits);
    args.target = in.target;
    args.weight = in.weight;
    args.rows = in.rows;
    args.classes = int(in.classes);
    args.ignore_index = options.ignore_index;
    args.grad = static_cast<T*>(out.grad_logits);
    args.loss = static_cast<A*>(out.loss);
    args.ce = static_cast<A*>(out.ce);
    args.divergence = static_cast<A*>(out.divergence);
    args.aligned = is_aligned_16(args.logits, args.teacher, args.grad);
    args.options.temperature = A(options.temperature);
    args.options.inv_temperature = A(1 / options.temperature);
    args.options.bound = A(options.bound);
    args.options.smoothing = A(options.label_smoothing);
    args.options.bounded = options.bounded;
    args.options.non_label = options.non_label;
    args.options.guard = options.guard;
    args.partial = scratch;
    args.counts = reinterpret_cast<int64_t*>(scratch + 2 * kLossBlocks);
    args.counter = next_counter(stream);
    switch (options.direction) {
      case Direction::kStudentTeacher:
        return launch_for_classes<T, Direction::kStudentTeacher>(args, stream);
      case Direction::kTeacherStudent:
        return launch_for_classes<T, Direction::kTeacherStudent>(args, stream);
      default:
        return launch_for_classes<T, Direction::kJs>(args, stream);
    }
  });
}

void divergence_loss_backward(DType dtype, void* grad_logits, const void* grad_output, int64_t n,
                              cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = compute_t<T>;
    const auto kernel = scale_in_place<T>;
    const int64_t useful = ceil_div(n, 256 * 16);
    const int64_t blocks = std::min<int64_t>(resident_blocks(kernel, 256), useful);
    launch(kernel, blocks, 256, stream, static_cast<T*>(grad_logits),
           static_cast<const A*>(grad_output), n, is_aligned_16(grad_logits));
  });
}

}  // namespace divqat::cuda
