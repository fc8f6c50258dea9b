// fake_quantize_lsq and its backward: one launch each, 8 and 12 bytes per float32 element.
//
// Each thread processes one channel, or one pack of adjacent channels, so that it reads the scale
// once and keeps the sums of the backward in registers:
//   runs     one channel, or inner > 1: a block processes a part of the runs of one channel
//   columns  inner == 1: with x as [rows, channels], a thread goes down a pack of columns
// Sums are float32 over a few elements and float64 beyond. The last block adds the partial sums of
// a channel's parts in a fixed order.
#include <algorithm>

#include "fake_quantize_lsq.cuh"

namespace divqat::cuda {
namespace {

// One block per (channel, part). The packs of the channel's runs are numbered through; a thread
// takes pack part · kLsqThreads + thread and goes on in steps of parts · kLsqThreads. W divides
// inner.
template <class T, int W, bool kBackward>
__global__ void __launch_bounds__(kLsqThreads, 2)
    lsq_runs(const __grid_constant__ LsqArguments<T> args) {
  using A = compute_t<T>;
  constexpr int kLoads = kLsqUnroll<T, W>;
  const LsqParams& p = args.params;
  const int64_t channel = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
  const LsqQuantizer<T> quantizer(p, channel);
  const int64_t run = p.inner / W;                    // packs per run
  const int64_t runs = p.n / (p.channels * p.inner);  // runs per channel
  const int64_t step = args.parts * kLsqThreads;
  const int64_t step_outer = step / run, step_inner = step % run;
  const int64_t first = part * kLsqThreads + threadIdx.x;
  int64_t outer = first / run, inner = first % run;
  const auto* x = reinterpret_cast<const Pack<T, W>*>(args.x);
  const auto* grad_y = reinterpret_cast<const Pack<T, W>*>(args.grad_y);
  auto* out = reinterpret_cast<Pack<T, W>*>(args.out);
  LsqSums sums = {0, 0};
  while (outer < runs) {
    int64_t at[kLoads];  // -1: past the end
    Pack<T, W> values[kLoads], grads[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      at[u] = outer < runs ? (outer * p.channels + channel) * run + inner : -1;
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
              quantizer.backward(values[u].at[w], grads[u].at[w], p, &scale_sum, &outside_sum);
        } else {
          result.at[w] = quantizer.forward(values[u].at[w], p);
        }
      }
      out[at[u]] = result;
    }
    sums.scale += double(scale_sum);
    sums.outside += double(outside_sum);
  }
  // With one channel: the elements after the last full pack.
  const int64_t tail = p.n - runs * p.channels * p.inner;
  if (blockIdx.x == 0 && threadIdx.x < tail) {
    const int64_t i = p.n - tail + threadIdx.x;
    if constexpr (kBackward) {
      A scale_sum = 0, outside_sum = 0;
      args.out[i] = quantizer.backward(args.x[i], args.grad_y[i], p, &scale_sum, &outside_sum);
      sums.scale += double(scale_sum);
      sums.outside += double(outside_sum);
    } else {
      args.out[i] = quantizer.forward(args.x[i], p);
    }
  }
  if constexpr (kBackward) {
    sums = block_sum(sums);
    if (threadIdx.x == 0) write_partial(args, part, channel, sums);
    reduce_in_last_block(args);
  }
}

// One block per (tile of `width` packs of columns, part). A thread takes row part · height + y and
// goes on in steps of parts · height.
template <class T, int W, bool kBackward>
__global__ void __launch_bounds__(kLsqThreads, 2)
    lsq_columns(const __grid_constant__ LsqArguments<T> args, int width) {
  using A = compute_t<T>;
  constexpr int kLoads = kLsqUnroll<T, W>;
  const LsqParams& p = args.params;
  const int64_t packs = p.channels / W, rows = p.n / p.channels;
  const int64_t tile = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
  const int height = kLsqThreads / width;
  const int y = int(threadIdx.x) / width;
  const int64_t column = tile * width + int(threadIdx.x) % width;
  const bool active = y < height && column < packs;
  const auto* x = reinterpret_cast<const Pack<T, W>*>(args.x);
  const auto* grad_y = reinterpret_cast<const Pack<T, W>*>(args.grad_y);
  auto* out = reinterpret_cast<Pack<T, W>*>(args.out);
  LsqQuantizer<T> quantizers[W];
  LsqSums sums[W] = {};
  if (active) {
#pragma unroll
    for (int w = 0; w < W; ++w) quantizers[w] = LsqQuantizer<T>(p, column * W + w);
  }
  const int64_t step = args.parts * height;
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
          result.at[w] = quantizers[w].backward(values[u].at[w], grads[u].at[w], p, &scale_sums[w],
                                                &outside_sums[w]);
        } else {
          result.at[w] = quantizers[w].forward(values[u].at[w], p);
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
      for (int w = 0; w < W; ++w) write_partial(args, part, column * W + w, tree[w][threadIdx.x]);
    }
    reduce_in_last_block(args);
  }
}

template <class T, int W, bool kBackward>
void launch_runs(LsqArguments<T> args, cudaStream_t stream) {
  LsqParams& p = args.params;
  if (p.channels == 1) p.inner = p.n / W * W;  // the kernel adds the tail
  const auto kernel = lsq_runs<T, W, kBackward>;
  const int64_t packs = ceil_div(p.n / p.channels, W);
  const int64_t useful =
      std::min(ceil_div(packs, kLsqUnroll<T, W> * kLsqThreads), kLsqMaxPartials / p.channels);
  const int64_t blocks = resident_blocks(kernel, kLsqThreads) / p.channels;
  args.parts = std::max<int64_t>(1, std::min(useful, blocks));
  launch(kernel, p.channels * args.parts, kLsqThreads, stream, args);
}

template <class T, int W, bool kBackward>
void launch_columns(LsqArguments<T> args, cudaStream_t stream) {
  const LsqParams& p = args.params;
  const auto kernel = lsq_columns<T, W, kBackward>;
  // Tiles are 128 bytes wide: full cache lines, and few partial sums.
  constexpr int64_t kTile = 128 / (W * sizeof(T));
  const int64_t packs = p.channels / W, tiles = ceil_div(packs, kTile);
  const int64_t width = ceil_div(packs, tiles), height = kLsqThreads / width;
  const int64_t rows = ceil_div(p.n / p.channels, kLsqUnroll<T, W> * height);
  const int64_t useful = kBackward ? std::min(rows, kLsqMaxPartials / p.channels) : rows;
  const int64_t blocks = resident_blocks(kernel, kLsqThreads) / tiles;
  args.parts = std::max<int64_t>(1, std::min(useful, blocks));
  launch(kernel, tiles * args.parts, kLsqThreads, stream, args, int(width));
}

template <class T, bool kBackward>
void run(LsqArguments<T> args, cudaStream_t stream) {
  constexpr int W = kWidth<T>;
  const LsqParams& p = args.params;
  const bool aligned = is_aligned_16(args.x, args.grad_y, args.out);
  if (p.inner == 1 && p.channels > 1) {
    aligned&& p.channels % W == 0 ? launch_columns<T, W, kBackward>(args, stream)
                                  : launch_columns<T, 1, kBackward>(args, stream);
  } else {
    const bool whole = p.channels == 1 ? p.n >= W : p.inner % W == 0;
    aligned&& whole ? launch_runs<T, W, kBackward>(args, stream)
                    : launch_runs<T, 1, kBackward>(args, stream);
  }
}

}  // namespace

void fake_quantize_lsq(DType dtype, const LsqParams& params, const void* x, void* y,
                       cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    LsqArguments<T> args = {};
    args.params = params;
    args.x = static_cast<const T*>(x);
    args.out = static_cast<T*>(y);
    run<T, false>(args, stream);
  });
}

void fake_quantize_lsq_backward(DType dtype, const LsqParams& params, const void* grad_y,
                                const void* x, void* grad_x, double grad_factor, double* scratch,
                                float* grad_scale, float* grad_zero_point, cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    LsqArguments<T> args = {};
    args.params = params;
    args.x = static_cast<const T*>(x);
    args.grad_y = static_cast<const T*>(grad_y);
    args.out = static_cast<T*>(grad_x);
    args.grad_factor = grad_factor;
    args.partial = scratch;
    args.counter = next_counter(stream);
    args.grad_scale = grad_scale;
    args.grad_zero_point = grad_zero_point;
    run<T, true>(args, stream);
  });
}

}  // namespace divqat::cuda
