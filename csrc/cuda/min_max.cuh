// Minimum and maximum of a tensor: over threads, the block and the grid.
#pragma once
#include "fake_quantize_common.cuh"

namespace divqat::cuda {

// Minimum and maximum of what was added; NaN in both after a NaN.
struct Range {
  float low = INFINITY, high = -INFINITY;
  bool nan = false;

  __device__ void add(float x) {
    nan |= x != x;
    low = fminf(low, x);  // takes the number where the other is NaN
    high = fmaxf(high, x);
  }
  // What another one gave as its least() and most(); infinities the other way round if it is empty.
  __device__ void merge(float other_low, float other_high) {
    nan |= other_low != other_low;
    low = fminf(low, other_low);
    high = fmaxf(high, other_high);
  }
  __device__ float least() const { return nan ? NAN : low; }
  __device__ float most() const { return nan ? NAN : high; }
};

// The block's range, in every thread. All threads take part.
__device__ inline Range block_range(Range range) {
  __shared__ float lows[kQuantizeThreads / 32], highs[kQuantizeThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    const float low = __shfl_xor_sync(0xffffffffu, range.least(), offset);
    const float high = __shfl_xor_sync(0xffffffffu, range.most(), offset);
    range.merge(low, high);
  }
  if (threadIdx.x % 32 == 0) {
    lows[threadIdx.x / 32] = range.least();
    highs[threadIdx.x / 32] = range.most();
  }
  __syncthreads();
  for (int warp = 0; warp < kQuantizeThreads / 32; ++warp) range.merge(lows[warp], highs[warp]);
  __syncthreads();
  return range;
}

// What the blocks found, put together; the same in all blocks as minimum and maximum do not depend
// on the order. All threads take part.
__device__ inline Range grid_range(const float* partial) {
  Range range;
  for (int block = threadIdx.x; block < int(gridDim.x); block += kQuantizeThreads) {
    // Past L1, which is not coherent: other blocks wrote these.
    range.merge(__ldcg(partial + 2 * block), __ldcg(partial + 2 * block + 1));
  }
  return block_range(range);
}

// For grid_range(): this block's.
__device__ inline void hand_in(float* partial, const Range& range) {
  if (threadIdx.x != 0) return;
  partial[2 * blockIdx.x] = range.least();
  partial[2 * blockIdx.x + 1] = range.most();
}

// The range of this block's tiles.
template <class T, int W>
__device__ Range tiles_range(const T* x, int64_t n) {
  Range range;
  for_each_tile<W>(n, false, [&](int64_t first, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    Pack<T, W> values[kQuantizeUnroll];
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      values[u] = load_pack<kWhole, W>(x, (first + u * kQuantizeThreads) * W, n);
    }
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const bool inside = kWhole || (first + u * kQuantizeThreads) * W + w < n;
        if (inside) range.add(float(to_compute(values[u].at[w])));
      }
    }
  });
  return block_range(range);
}

// Blocks that take the range of n elements, each with its two floats of scratch memory.
template <class K>
int64_t range_blocks(K kernel, int64_t n, int width) {
  return std::min({quantize_tiles_of(n, width), resident_blocks(kernel, kQuantizeThreads),
                   kObserverScratch / 2});
}

}  // namespace divqat::cuda
