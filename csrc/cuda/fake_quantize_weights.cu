// fake_quantize_weights: every row of every weight, one launch forward and one backward.
//
// The table of weights is a kernel parameter, in constant memory: there is no copy to the device,
// and a captured graph keeps its own table. A warp processes a row, or a block if the row is long.
// It reads the row for minimum and maximum, then again, from L1 or L2, to quantize it.
#include <algorithm>

#include "launch.cuh"
#include "launchers.h"
#include "math.cuh"
#include "pack.cuh"

namespace divqat::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kUnroll = 4;
// A row of at least this many columns gets a block.
constexpr int64_t kLongRow = 1024;
// Kernel parameters may take 4 KB, or 32,764 bytes from CUDA 12.1 on. Every launch copies them, so
// short lists use a small table.
constexpr int kFewWeights = 80;

struct Entry {
  const void* from;
  const void* grad;
  void* out;
  int64_t columns;
  int32_t rows;
  int32_t first_block;
};

template <int kCapacity>
struct Table {
  Entry entries[kCapacity];
  int32_t count;
  float quant_min, quant_max;
};
static_assert(sizeof(Table<kFewWeights>) <= 4096 && sizeof(Table<kWeightsPerLaunch>) <= 32764);

// Minimum and maximum of the elements of a row that were read; NaN is kept apart.
template <class A>
struct RowMinMax {
  A low, high;
  bool nan;
};

template <int kGroup, class A>
__device__ RowMinMax<A> group_min_max(RowMinMax<A> e) {
  for (int offset = 16; offset > 0; offset /= 2) {
    e.low = min_of(e.low, __shfl_xor_sync(0xffffffffu, e.low, offset));
    e.high = max_of(e.high, __shfl_xor_sync(0xffffffffu, e.high, offset));
    e.nan |= __shfl_xor_sync(0xffffffffu, int(e.nan), offset) != 0;
  }
  if constexpr (kGroup > 32) {
    __shared__ RowMinMax<A> warps[kWarps];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = e;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) {
      e.low = min_of(e.low, warps[warp].low);
      e.high = max_of(e.high, warps[warp].high);
      e.nan |= warps[warp].nan;
    }
  }
  return e;
}

// Calls f(index, pack) for this thread's packs of a row, with kUnroll loads in flight. W divides
// the length of the row.
template <int kGroup, int W, class T, class F>
__device__ void for_each_pack(const T* row, int64_t columns, int thread, const F& f) {
  const auto* packs = reinterpret_cast<const Pack<T, W>*>(row);
  const int64_t count = columns / W;
  for (int64_t first = thread; first < count; first += kGroup * kUnroll) {
    Pack<T, W> values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kGroup < count) values[u] = packs[first + u * kGroup];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kGroup < count) f(first + u * kGroup, values[u]);
    }
  }
}

template <int kGroup, int W, class T, class Table>
__device__ void quantize_row(const Table& table, const T* row, const T* grad, T* out,
                             int64_t columns, int thread) {
  using A = compute_t<T>;
  RowMinMax<A> e = {INFINITY, -INFINITY, false};
  for_each_pack<kGroup, W>(row, columns, thread, [&](int64_t, const Pack<T, W>& pack) {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const A x = to_compute(pack.at[w]);
      e.low = min_of(e.low, x);
      e.high = max_of(e.high, x);
      e.nan |= x != x;
    }
  });
  e = group_min_max<kGroup>(e);
  const float scale = symmetric_scale(e.nan ? NAN : float(e.low), float(e.high),
                                      int32_t(table.quant_min), int32_t(table.quant_max));
  const A inv_scale = A(1.0f / scale);
  const A low = A(table.quant_min), high = A(table.quant_max);
  // q = clamp(nearbyint(w · (1/scale))), zero point 0
  if (!grad) {
    for_each_pack<kGroup, W>(row, columns, thread, [&](int64_t i, const Pack<T, W>& pack) {
      Pack<T, W> y;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        A q = rint_of(to_compute(pack.at[w]) * inv_scale) + A(0);
        q = q < low ? low : q;
        q = q > high ? high : q;
        y.at[w] = from_compute<T>(q * A(scale));
      }
      reinterpret_cast<Pack<T, W>*>(out)[i] = y;
    });
    return;
  }
  // Rounding is monotonic: if minimum and maximum are in range, so is the row, and it need not be
  // read again. This is computed in A, as for float64 the last digits decide near a tie.
  const bool inside =
      !e.nan && rint_of(e.low * inv_scale) >= low && rint_of(e.high * inv_scale) <= high;
  for_each_pack<kGroup, W>(grad, columns, thread, [&](int64_t i, const Pack<T, W>& pack) {
    Pack<T, W> kept = pack;
    if (!inside) {
      const Pack<T, W> weight = reinterpret_cast<const Pack<T, W>*>(row)[i];
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const A q = rint_of(to_compute(weight.at[w]) * inv_scale);
        if (!(q >= low && q <= high)) kept.at[w] = from_compute<T>(0);
      }
    }
    reinterpret_cast<Pack<T, W>*>(out)[i] = kept;
  });
}

template <class T, int W, class Table>
__device__ void quantize_block(const Table& table, const Entry& entry, int32_t block) {
  const auto* from = static_cast<const T*>(entry.from);
  const auto* grad = static_cast<const T*>(entry.grad);
  auto* out = static_cast<T*>(entry.out);
  const bool long_row = entry.columns >= kLongRow;
  const int64_t row = long_row ? block : int64_t(block) * kWarps + threadIdx.x / 32;
  if (row >= entry.rows) return;  // a whole warp, never a part of the block of a long row
  const int64_t at = row * entry.columns;
  if (long_row) {
    quantize_row<kThreads, W>(table, from + at, grad ? grad + at : nullptr, out + at,
                              entry.columns, threadIdx.x);
  } else {
    quantize_row<32, W>(table, from + at, grad ? grad + at : nullptr, out + at, entry.columns,
                        threadIdx.x % 32);
  }
}

template <class T, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    quantize_weights(const __grid_constant__ Table<kCapacity> table) {
  // Binary search for the entry of this block.
  int32_t low = 0, high = table.count - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (table.entries[middle].first_block <= int32_t(blockIdx.x)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Entry& entry = table.entries[low];
  const int32_t block = int32_t(blockIdx.x) - entry.first_block;
  constexpr int W = kWidth<T>;
  const uint64_t addresses = uint64_t(entry.from) | uint64_t(entry.grad) | uint64_t(entry.out);
  if (entry.columns % W == 0 && addresses % 16 == 0) {
    quantize_block<T, W>(table, entry, block);
  } else {
    quantize_block<T, 1>(table, entry, block);
  }
}

template <class T, int kCapacity>
void launch_table(const WeightRows* weights, int count, int32_t quant_min, int32_t quant_max,
                  cudaStream_t stream) {
  Table<kCapacity> table;
  table.count = count;
  table.quant_min = float(quant_min);
  table.quant_max = float(quant_max);
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    const WeightRows& w = weights[i];
    table.entries[i] = {w.from, w.grad, w.out, w.columns, int32_t(w.rows), int32_t(blocks)};
    blocks += w.columns >= kLongRow ? w.rows : ceil_div(w.rows, kWarps);
  }
  if (blocks > 0) launch(quantize_weights<T, kCapacity>, blocks, kThreads, stream, table);
}

}  // namespace

void fake_quantize_weights(DType dtype, const std::vector<WeightRows>& weights, int32_t quant_min,
                           int32_t quant_max, cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (size_t first = 0; first < weights.size(); first += kWeightsPerLaunch) {
      const int count = int(std::min<size_t>(kWeightsPerLaunch, weights.size() - first));
      const auto launch_list =
          count <= kFewWeights ? launch_table<T, kFewWeights> : launch_table<T, kWeightsPerLaunch>;
      launch_list(&weights[first], count, quant_min, quant_max, stream);
    }
  });
}

}  // namespace divqat::cuda
