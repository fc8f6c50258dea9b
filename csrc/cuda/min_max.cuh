// Minimum and maximum: of a thread, a block and a grid.
#pragma once
#include "fake_quantize_common.cuh"

namespace divqat::cuda {

// Minimum and maximum of what was added; both NaN once a NaN was added.
struct MinMax {
  float low = INFINITY, high = -INFINITY;
  bool nan = false;

  __device__ void add(float x) {
    nan |= x != x;
    low = fminf(low, x);  // fminf ignores NaN
    high = fmaxf(high, x);
  }
  // Adds another one by its min() and max(), which are +inf and -inf if it is empty.
  __device__ void merge(float other_low, float other_high) {
    nan |= other_low != other_low;
    low = fminf(low, other_low);
    high = fmaxf(high, other_high);
  }
  __device__ float min() const { return nan ? NAN : low; }
  __device__ float max() const { return nan ? NAN : high; }
};

// Reduction over the block, returned to every thread. All threads must call it.
__device__ inline MinMax block_min_max(MinMax min_max) {
  __shared__ float lows[kQuantizeThreads / 32], highs[kQuantizeThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    const float low = __shfl_xor_sync(0xffffffffu, min_max.min(), offset);
    const float high = __shfl_xor_sync(0xffffffffu, min_max.max(), offset);
    min_max.merge(low, high);
  }
  if (threadIdx.x % 32 == 0) {
    lows[threadIdx.x / 32] = min_max.min();
    highs[threadIdx.x / 32] = min_max.max();
  }
  __syncthreads();
  for (int warp = 0; warp < kQuantizeThreads / 32; ++warp) min_max.merge(lows[warp], highs[warp]);
  __syncthreads();
  return min_max;
}

// Reduction of the partial results of all blocks. Every block that calls it gets the same, as
// minimum and maximum do not depend on the order. All threads must call it.
__device__ inline MinMax grid_min_max(const float* partial) {
  MinMax min_max;
  for (int block = threadIdx.x; block < int(gridDim.x); block += kQuantizeThreads) {
    // From L2: other blocks wrote these, and L1 is not coherent.
    min_max.merge(__ldcg(partial + 2 * block), __ldcg(partial + 2 * block + 1));
  }
  return block_min_max(min_max);
}

// Stores this block's result for grid_min_max().
__device__ inline void write_partial(float* partial, const MinMax& min_max) {
  if (threadIdx.x != 0) return;
  partial[2 * blockIdx.x] = min_max.min();
  partial[2 * blockIdx.x + 1] = min_max.max();
}

// Minimum and maximum of this block's tiles.
template <class T, int W>
__device__ MinMax tiles_min_max(const T* x, int64_t n) {
  MinMax min_max;
  for_each_tile<W>(n, false, [&](int64_t first, auto full) {
    constexpr bool kFull = decltype(full)::value;
    Pack<T, W> values[kQuantizeUnroll];
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      values[u] = load_pack<kFull, W>(x, (first + u * kQuantizeThreads) * W, n);
    }
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const bool inside = kFull || (first + u * kQuantizeThreads) * W + w < n;
        if (inside) min_max.add(float(to_compute(values[u].at[w])));
      }
    }
  });
  return block_min_max(min_max);
}

// The number of blocks for n elements: each needs two floats of scratch memory.
template <class K>
int64_t min_max_blocks(K kernel, int64_t n, int width) {
  return std::min(
      {tile_count(n, width), resident_blocks(kernel, kQuantizeThreads), kObserverScratch / 2});
}

}  // namespace divqat::cuda
