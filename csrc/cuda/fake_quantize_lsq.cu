// fake_quantize_lsq and its backward: one launch each, 8 and 12 bytes per float32 element.
//
// A thread meets one channel, or one pack of adjacent channels, so that the scale is read once and
// the backward's sums stay in registers:
//   runs     one channel, or inner > 1: a block walks a share of the runs of one channel
//   columns  inner == 1: a thread walks down a pack of columns of x as [rows, channels]
// Sums are float32 over a few elements and float64 beyond; the shares of a channel ("parts") meet
// in the last block, in a fixed order.
#include <algorithm>

#include "fake_quantize_lsq.cuh"

namespace divqat::cuda {
namespace {

// One block per (channel, part): packs part · kLsqThreads + thread, in steps of
// parts · kLsqThreads, of the channel's runs laid end to end. W divides the length of a run.
template <class T, int W, bool kBackward>
__global__ void __launch_bounds__(kLsqThreads, 2)
    lsq_runs(const __grid_constant__ LsqTask<T> task) {
  using A = compute_t<T>;
  constexpr int kLoads = kLsqUnroll<T, W>;
  const LsqGrid& g = task.grid;
  const int64_t channel = blockIdx.x / task.parts, part = blockIdx.x % task.parts;
  const LsqLevel<T> level(g, channel);
  const int64_t run = g.inner / W;                        // packs per run
  const int64_t runs = g.n / (g.channels * g.inner);      // runs per channel
  const int64_t step = task.parts * kLsqThreads;
  const int64_t step_outer = step / run, step_inner = step % run;
  const int64_t first = part * kLsqThreads + threadIdx.x;
  int64_t outer = first / run, inner = first % run;
  const auto* x = reinterpret_cast<const Pack<T, W>*>(task.x);
  const auto* grad_y = reinterpret_cast<const Pack<T, W>*>(task.grad_y);
  auto* out = reinterpret_cast<Pack<T, W>*>(task.out);
  LsqSums sums = {0, 0};
  while (outer < runs) {
    int64_t at[kLoads];  // -1: past the end
    Pack<T, W> values[kLoads], grads[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      at[u] = outer < runs ? (outer * g.channels + channel) * run + inner : -1;
      if (at[u] >= 0) {
        values[u] = x[at[u]];
        if constexpr (kBackward) grads[u] = grad_y[at[u]];
      }
      outer += step_outer;
      inner += step_inner;
      if (inner >= run) {
        inner -= run;
        ++outer;
      }
    }
    A scale_sum = 0, outside_sum = 0;
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (at[u] < 0) continue;
      Pack<T, W> result;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if constexpr (kBackward) {
          result.at[w] =
              level.backward(values[u].at[w], grads[u].at[w], g, &scale_sum, &outside_sum);
        } else {
          result.at[w] = level.forward(values[u].at[w], g);
        }
      }
      out[at[u]] = result;
    }
    sums.scale += double(scale_sum);
    sums.outside += double(outside_sum);
  }
  // With one channel, the elements after its last whole pack.
  const int64_t tail = g.n - runs * g.channels * g.inner;
  if (blockIdx.x == 0 && threadIdx.x < tail) {
    const int64_t i = g.n - tail + threadIdx.x;
    if constexpr (kBackward) {
      A scale_sum = 0, outside_sum = 0;
      task.out[i] = level.backward(task.x[i], task.grad_y[i], g, &scale_sum, &outside_sum);
      sums.scale += double(scale_sum);
      sums.outside += double(outside_sum);
    } else {
      task.out[i] = level.forward(task.x[i], g);
    }
  }
  if constexpr (kBackward) {
    sums = block_sum(sums);
    if (threadIdx.x == 0) hand_in(task, part, channel, sums);
    finish_in_last_block(task);
  }
}

// One block per (tile of `width` packs of columns, part): rows part · height + y, in steps of
// parts · height.
template <class T, int W, bool kBackward>
__global__ void __launch_bounds__(kLsqThreads, 2)
    lsq_columns(const __grid_constant__ LsqTask<T> task, int width) {
  using A = compute_t<T>;
  constexpr int kLoads = kLsqUnroll<T, W>;
  const LsqGrid& g = task.grid;
  const int64_t packs = g.channels / W, rows = g.n / g.channels;
  const int64_t tile = blockIdx.x / task.parts, part = blockIdx.x % task.parts;
  const int height = kLsqThreads / width;
  const int y = int(threadIdx.x) / width;
  const int64_t column = tile * width + int(threadIdx.x) % width;
  const bool active = y < height && column < packs;
  const auto* x = reinterpret_cast<const Pack<T, W>*>(task.x);
  const auto* grad_y = reinterpret_cast<const Pack<T, W>*>(task.grad_y);
  auto* out = reinterpret_cast<Pack<T, W>*>(task.out);
  LsqLevel<T> levels[W];
  LsqSums sums[W] = {};
  if (active) {
#pragma unroll
    for (int w = 0; w < W; ++w) levels[w] = LsqLevel<T>(g, column * W + w);
  }
  const int64_t step = task.parts * height;
  for (int64_t first = part * height + y; active && first < rows; first += kLoads * step) {
    Pack<T, W> values[kLoads], grads[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t row = first + u * step;
      if (row >= rows) continue;
      values[u] = x[row * packs + column];
      if constexpr (kBackward) grads[u] = grad_y[row * packs + column];
    }
    A scale_sums[W] = {}, outside_sums[W] = {};
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t row = first + u * step;
      if (row >= rows) continue;
      Pack<T, W> result;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if constexpr (kBackward) {
          result.at[w] = levels[w].backward(values[u].at[w], grads[u].at[w], g, &scale_sums[w],
                                            &outside_sums[w]);
        } else {
          result.at[w] = levels[w].forward(values[u].at[w], g);
        }
      }
      out[row * packs + column] = result;
    }
#pragma unroll
    for (int w = 0; w < W; ++w) {
      sums[w].scale += double(scale_sums[w]);
      sums[w].outside += double(outside_sums[w]);
    }
  }
  if constexpr (kBackward) {
    __shared__ LsqSums tree[W][kLsqThreads];
#pragma unroll
    for (int w = 0; w < W; ++w) tree[w][threadIdx.x] = sums[w];
    int half = 1;
    while (half < height) half *= 2;
    for (half /= 2; half > 0; half /= 2) {
      __syncthreads();
      if (y < half && y + half < height) {
#pragma unroll
        for (int w = 0; w < W; ++w) tree[w][threadIdx.x] += tree[w][threadIdx.x + half * width];
      }
    }
    if (active && y == 0) {
#pragma unroll
      for (int w = 0; w < W; ++w) hand_in(task, part, column * W + w, tree[w][threadIdx.x]);
    }
    finish_in_last_block(task);
  }
}

template <class T, int W, bool kBackward>
void launch_runs(LsqTask<T> task, cudaStream_t stream) {
  LsqGrid& g = task.grid;
  if (g.channels == 1) g.inner = g.n / W * W;  // the kernel adds the tail
  const auto kernel = lsq_runs<T, W, kBackward>;
  const int64_t packs = divided_up(g.n / g.channels, W);
  const int64_t useful = std::min(divided_up(packs, kLsqUnroll<T, W> * kLsqThreads),
                                  kLsqMaxPartials / g.channels);
  const int64_t blocks = resident_blocks(kernel, kLsqThreads) / g.channels;
  task.parts = std::max<int64_t>(1, std::min(useful, blocks));
  launch(kernel, g.channels * task.parts, kLsqThreads, stream, false, task);
}

template <class T, int W, bool kBackward>
void launch_columns(LsqTask<T> task, cudaStream_t stream) {
  const LsqGrid& g = task.grid;
  const auto kernel = lsq_columns<T, W, kBackward>;
  // Tiles 128 bytes wide: whole cache lines, and few partial sums per row of blocks.
  constexpr int64_t kTile = 128 / (W * sizeof(T));
  const int64_t packs = g.channels / W, tiles = divided_up(packs, kTile);
  const int64_t width = divided_up(packs, tiles), height = kLsqThreads / width;
  const int64_t rows = divided_up(g.n / g.channels, kLsqUnroll<T, W> * height);
  const int64_t useful = kBackward ? std::min(rows, kLsqMaxPartials / g.channels) : rows;
  const int64_t blocks = resident_blocks(kernel, kLsqThreads) / tiles;
  task.parts = std::max<int64_t>(1, std::min(useful, blocks));
  launch(kernel, tiles * task.parts, kLsqThreads, stream, false, task, int(width));
}

template <class T, bool kBackward>
void run(LsqTask<T> task, cudaStream_t stream) {
  constexpr int W = kWidth<T>;
  const LsqGrid& g = task.grid;
  const bool aligned = on_16_bytes(task.x, task.grad_y, task.out);
  if (g.inner == 1 && g.channels > 1) {
    aligned && g.channels % W == 0 ? launch_columns<T, W, kBackward>(task, stream)
                                   : launch_columns<T, 1, kBackward>(task, stream);
  } else {
    const bool whole = g.channels == 1 ? g.n >= W : g.inner % W == 0;
    aligned && whole ? launch_runs<T, W, kBackward>(task, stream)
                     : launch_runs<T, 1, kBackward>(task, stream);
  }
}

}  // namespace

void fake_quantize_lsq(DType dtype, const LsqGrid& grid, const void* x, void* y,
                       cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    LsqTask<T> task = {};
    task.grid = grid;
    task.x = static_cast<const T*>(x);
    task.out = static_cast<T*>(y);
    run<T, false>(task, stream);
  });
}

void fake_quantize_lsq_backward(DType dtype, const LsqGrid& grid, const void* grad_y,
                                const void* x, void* grad_x, double grad_factor, double* scratch,
                                float* grad_scale, float* grad_zero_point, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    LsqTask<T> task = {};
    task.grid = grid;
    task.x = static_cast<const T*>(x);
    task.grad_y = static_cast<const T*>(grad_y);
    task.out = static_cast<T*>(grad_x);
    task.grad_factor = grad_factor;
    task.partial = scratch;
    task.counter = next_counter(stream);
    task.grad_scale = grad_scale;
    task.grad_zero_point = grad_zero_point;
    run<T, true>(task, stream);
  });
}

}  // namespace divqat::cuda
