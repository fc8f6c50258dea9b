// divergence_loss: value and gradient in one launch, 12 bytes per float32 logit (a second launch
// scales the gradient, or returns at once where there is nothing to scale).
//
// A group of threads owns a row: 8 or 32 lanes of a warp, or a block. The row stays in registers
// where it fits, so device memory is read once; a longer one is read once per pass, from the caches
// as far as they reach. Four passes, with a reduction between each two: maxima, sums of
// exponentials, D, gradient. The formulas are those of divqat/ops/reference_loss.py.
//
// The gradient needs the number of valid targets first. Up to kCountedAlone targets every block
// counts them all (at most 64 KiB from L2 per block, below 1 us); beyond, the blocks of a
// cooperative launch count a share each and meet at a grid barrier (8 bytes per target once).
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

constexpr int64_t kCountedAlone = 8192;
// A launch's blocks at most: each takes two sums and a count of scratch memory.
constexpr int64_t kLossBlocks = kLossScratch / 3;
// Rows that do not fit into registers are read four times: as many at once as L2 holds.
constexpr int64_t kL2Bytes = 32 << 20;

template <class T>
struct LossTask {
  using A = compute_t<T>;
  const T* logits;
  const T* teacher;
  const int64_t* target;
  const float* weight;
  int64_t rows;
  int classes;
  bool aligned, together;  // together: the blocks count the valid targets together
  RowOptions<A> options;
  int64_t ignore_index;
  T* grad;
  A *loss, *ce, *divergence;
  int64_t* counts;  // [blocks]
  double* partial;  // [blocks, 2]
  uint32_t* counter;
};

// Σ over the block, the same in every thread. All threads take part.
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
__device__ int64_t count_valid(const LossTask<T>& task) {
  const int64_t block = task.together ? blockIdx.x : 0, blocks = task.together ? gridDim.x : 1;
  long long count = 0;
#pragma unroll 4
  for (int64_t i = block * kBlock + threadIdx.x; i < task.rows; i += blocks * kBlock) {
    count += task.target[i] != task.ignore_index;
  }
  count = block_sum<kBlock>(count);
  if (!task.together) return count;
  if (threadIdx.x == 0) task.counts[block] = count;
  cooperative_groups::this_grid().sync();
  count = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kBlock) count += __ldcg(task.counts + i);
  return block_sum<kBlock>(count);
}

// The last block adds up the blocks' sums in their order and writes the three means.
template <int kBlock, class T>
__device__ void finish(const LossTask<T>& task, double ce, double divergence, int64_t count) {
  using A = compute_t<T>;
  ce = block_sum<kBlock>(ce);
  divergence = block_sum<kBlock>(divergence);
  if (threadIdx.x == 0) {
    task.partial[2 * blockIdx.x] = ce;
    task.partial[2 * blockIdx.x + 1] = divergence;
  }
  if (!last_block(task.counter)) return;
  ce = divergence = 0;
  for (int block = threadIdx.x; block < int(gridDim.x); block += kBlock) {
    // Past L1, which is not coherent: other blocks wrote these.
    ce += __ldcg(task.partial + 2 * block);
    divergence += __ldcg(task.partial + 2 * block + 1);
  }
  ce = block_sum<kBlock>(ce) / double(count);
  divergence = block_sum<kBlock>(divergence) / double(count);
  if (threadIdx.x != 0) return;
  // L = CE − λ T² D; λ = 0 switches the term off even where D is infinite.
  const double weight = *task.weight, temperature = task.options.temperature;
  const double penalty = weight == 0 ? 0 : weight * temperature * temperature * divergence;
  *task.loss = A(ce - penalty);
  *task.ce = A(ce);
  *task.divergence = A(divergence);
}

template <class T, Direction kDirection, int kGroup, int kPacks>
__global__ void __launch_bounds__(kBlockOf<kGroup>, 1)
    divergence_loss_rows(const __grid_constant__ LossTask<T> task) {
  using A = compute_t<T>;
  constexpr int kBlock = kBlockOf<kGroup>, kGroups = kBlock / kGroup;
  __shared__ Exchange<A, kGroup> exchange;
  const int64_t count = count_valid<kBlock>(task);
  RowOptions<A> options = task.options;
  options.weight = A(*task.weight);
  const A share = A(1) / A(count);
  double ce = 0, divergence = 0;  // of this thread's rows, in the first thread of a group
  // The same number of rounds for all groups of a block: reductions need whole warps.
  for (int64_t first = int64_t(blockIdx.x) * kGroups; first < task.rows;
       first += int64_t(gridDim.x) * kGroups) {
    const int64_t index = first + threadIdx.x / kGroup;
    const bool present = index < task.rows;
    const int64_t target = present ? task.target[index] : task.ignore_index;
    const bool valid = target != task.ignore_index;
    const LossRow<T, kGroup, kPacks> row(task.logits, task.teacher, task.grad, index, task.classes,
                                     present, task.aligned);
    const RowTerms<A> terms =
        row_loss<kDirection>(row, valid, target, share, options, exchange);
    if (valid && threadIdx.x % kGroup == 0) {
      ce += double(terms.ce);
      divergence += double(terms.divergence);
    }
  }
  finish<kBlock>(task, ce, divergence, count);
}

template <class T, Direction kDirection, int kGroup, int kPacks>
void launch_rows(LossTask<T> task, cudaStream_t stream) {
  const auto kernel = divergence_loss_rows<T, kDirection, kGroup, kPacks>;
  constexpr int kBlock = kBlockOf<kGroup>, kGroups = kBlock / kGroup;
  int64_t blocks = std::min<int64_t>(resident_blocks(kernel, kBlock), kLossBlocks);
  if (kPacks == 0) {
    const int64_t row_bytes = 2 * int64_t(sizeof(T)) * task.classes;
    blocks = std::min(blocks, std::max<int64_t>(kL2Bytes / std::max<int64_t>(row_bytes, 1), 64));
  }
  blocks = std::max<int64_t>(1, std::min(blocks, divided_up(task.rows, kGroups)));
  task.together = task.rows > kCountedAlone && cooperates();
  launch(kernel, blocks, kBlock, stream, task.together, task);
}

template <class T, Direction kDirection>
void launch_fitting(const LossTask<T>& task, cudaStream_t stream) {
  constexpr int W = kWidth<T>;
  // Packs that a row touches, wherever it starts.
  const int64_t packs =
      task.classes % W == 0 ? task.classes / W : (task.classes + W - 2) / W + 1;
  if constexpr (sizeof(T) < 8) {
    if (packs <= 8 * (8 / W)) {
      return launch_rows<T, kDirection, 8, 8 / W>(task, stream);
    }
    if (packs <= 32 * (8 / W)) {
      return launch_rows<T, kDirection, 32, 8 / W>(task, stream);
    }
    if (packs <= 128 * (16 / W)) {
      return launch_rows<T, kDirection, 128, 16 / W>(task, stream);
    }
  } else if (packs <= 256) {
    return launch_rows<T, kDirection, 32, 0>(task, stream);
  }
  launch_rows<T, kDirection, 512, 0>(task, stream);
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
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = compute_t<T>;
    LossTask<T> task = {};
    task.logits = static_cast<const T*>(in.logits);
    task.teacher = static_cast<const T*>(in.teacher_logits);
    task.target = in.target;
    task.weight = in.weight;
    task.rows = in.rows;
    task.classes = int(in.classes);
    task.ignore_index = options.ignore_index;
    task.grad = static_cast<T*>(out.grad_logits);
    task.loss = static_cast<A*>(out.loss);
    task.ce = static_cast<A*>(out.ce);
    task.divergence = static_cast<A*>(out.divergence);
    task.aligned = on_16_bytes(task.logits, task.teacher, task.grad);
    task.options.temperature = A(options.temperature);
    task.options.inv_temperature = A(1 / options.temperature);
    task.options.bound = A(options.bound);
    task.options.smoothing = A(options.label_smoothing);
    task.options.bounded = options.bounded;
    task.options.non_label = options.non_label;
    task.options.guard = options.guard;
    task.partial = scratch;
    task.counts = reinterpret_cast<int64_t*>(scratch + 2 * kLossBlocks);
    task.counter = next_counter(stream);
    switch (options.direction) {
      case Direction::kStudentTeacher:
        return launch_fitting<T, Direction::kStudentTeacher>(task, stream);
      case Direction::kTeacherStudent:
        return launch_fitting<T, Direction::kTeacherStudent>(task, stream);
      default: return launch_fitting<T, Direction::kJs>(task, stream);
    }
  });
}

void divergence_loss_backward(DType dtype, void* grad_logits, const void* grad_output, int64_t n,
                              cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = compute_t<T>;
    const auto kernel = scale_in_place<T>;
    const int64_t useful = divided_up(n, 256 * 16);
    const int64_t blocks = std::min<int64_t>(resident_blocks(kernel, 256), useful);
    launch(kernel, blocks, 256, stream, false, static_cast<T*>(grad_logits),
           static_cast<const A*>(grad_output), n, on_16_bytes(grad_logits));
  });
}

}  // namespace divqat::cuda
