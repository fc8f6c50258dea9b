// observe, and the scales of weights whose rows are not contiguous: one launch.
#include "min_max.cuh"
#include "observer.cuh"

namespace divqat::cuda {
namespace {

constexpr int kThreads = kQuantizeThreads;

template <class T, int W>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks)
    observe_tensor(ObserverState s, const T* x, int64_t n, float* partial, uint32_t* counter) {
  write_partial(partial, tiles_min_max<T, W>(x, n));
  if (!is_last_block(counter)) return;
  const MinMax min_max = grid_min_max(partial);
  if (threadIdx.x == 0) update_channel(s, 0, min_max);
}

// How the elements are split between blocks: `parts` blocks per channel, or per tile of 32
// channels.
struct ChannelSplit {
  int64_t n, channels, inner, parts;
  float* partial;  // [parts, channels, 2]
  uint32_t* counter;
};

// Stores the result of one part for the last block, or updates the channel if it has only one part.
__device__ void write_partial(const ObserverState& s, const ChannelSplit& split, int64_t part,
                              int64_t channel, const MinMax& min_max) {
  if (split.parts == 1) return update_channel(s, channel, min_max);
  float* partial = split.partial + 2 * (part * split.channels + channel);
  partial[0] = min_max.min();
  partial[1] = min_max.max();
}

__device__ void reduce_in_last_block(const ObserverState& s, const ChannelSplit& split) {
  if (split.parts == 1 || !is_last_block(split.counter)) return;
  for (int64_t channel = threadIdx.x; channel < split.channels; channel += kThreads) {
    MinMax min_max;
    for (int64_t part = 0; part < split.parts; ++part) {
      const float* partial = split.partial + 2 * (part * split.channels + channel);
      min_max.merge(__ldcg(partial), __ldcg(partial + 1));
    }
    update_channel(s, channel, min_max);
  }
}

// One block per (channel, part). The elements of the channel's runs are numbered through.
template <class T>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks)
    observe_runs(ObserverState s, ChannelSplit split, const T* x) {
  const int64_t inner = split.inner, runs = split.n / (split.channels * inner);
  const int64_t channel = blockIdx.x / split.parts, part = blockIdx.x % split.parts;
  const int64_t step = split.parts * kThreads, first = part * kThreads + threadIdx.x;
  const int64_t step_run = step / inner, step_offset = step % inner;
  int64_t run = first / inner, offset = first % inner;
  MinMax min_max;
  while (run < runs) {
    T values[kQuantizeUnroll];
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      // Past the end, load the channel's first element again, which does not change the result.
      values[u] =
          x[run < runs ? (run * split.channels + channel) * inner + offset : channel * inner];
      run += step_run;
      offset += step_offset;
      if (offset >= inner) {
        offset -= inner;
        ++run;
      }
    }
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) min_max.add(float(to_compute(values[u])));
  }
  min_max = block_min_max(min_max);
  if (threadIdx.x == 0) write_partial(s, split, part, channel, min_max);
  reduce_in_last_block(s, split);
}

// inner == 1: one block per (tile of 32 channels, part), one warp per row of the tile.
template <class T>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks)
    observe_columns(ObserverState s, ChannelSplit split, const T* x) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float lows[kThreads], highs[kThreads];
  const int64_t channels = split.channels, rows = split.n / channels;
  const int64_t tile = blockIdx.x / split.parts, part = blockIdx.x % split.parts;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t channel = tile * 32 + lane, column = channel < channels ? channel : channels - 1;
  const int64_t step = split.parts * kWarps;
  MinMax min_max;
  for (int64_t row = part * kWarps + warp; row < rows; row += kQuantizeUnroll * step) {
    T values[kQuantizeUnroll];
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      // Past the end, load the last row again.
      const int64_t at = row + u * step < rows ? row + u * step : rows - 1;
      values[u] = x[at * channels + column];
    }
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) min_max.add(float(to_compute(values[u])));
  }
  lows[threadIdx.x] = min_max.min();
  highs[threadIdx.x] = min_max.max();
  __syncthreads();
  if (warp == 0 && channel < channels) {
    for (int other = 1; other < kWarps; ++other) {
      min_max.merge(lows[other * 32 + lane], highs[other * 32 + lane]);
    }
    write_partial(s, split, part, channel, min_max);
  }
  reduce_in_last_block(s, split);
}

// `groups`: channels, or tiles of 32. `rounds`: unrolled iterations of a block that cover a group.
template <class T>
void observe_channels(void (*kernel)(ObserverState, ChannelSplit, const T*), const ObserverState& s,
                      ChannelSplit split, int64_t groups, int64_t rounds, const T* x,
                      cudaStream_t stream) {
  const int64_t room =
      std::min(resident_blocks(kernel, kThreads) / groups, kObserverScratch / (2 * split.channels));
  split.parts = std::max<int64_t>(1, std::min(rounds, room));
  if (split.parts > 1) split.counter = next_counter(stream);
  launch(kernel, groups * split.parts, kThreads, stream, s, split, x);
}

template <class T, int W>
void observe_whole(const ObserverState& s, const T* x, int64_t n, float* scratch,
                   cudaStream_t stream) {
  const auto kernel = observe_tensor<T, W>;
  launch(kernel, min_max_blocks(kernel, n, W), kThreads, stream, s, x, n, scratch,
         next_counter(stream));
}

}  // namespace

void observe(DType dtype, const ObserverState& state, const void* x, int64_t n, int64_t channels,
             int64_t inner, float* scratch, cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(x);
    if (channels == 1) {
      is_aligned_16(x) ? observe_whole<T, kWidth<T>>(state, from, n, scratch, stream)
                       : observe_whole<T, 1>(state, from, n, scratch, stream);
      return;
    }
    const ChannelSplit split = {n, channels, inner, 1, scratch, nullptr};
    const int64_t length = n / channels;
    if (inner == 1) {
      constexpr int kRows = kThreads / 32 * kQuantizeUnroll;
      observe_channels(observe_columns<T>, state, split, ceil_div(channels, 32),
                       ceil_div(length, kRows), from, stream);
    } else {
      observe_channels(observe_runs<T>, state, split, channels, ceil_div(length, kQuantizeTile),
                       from, stream);
    }
  });
}

}  // namespace divqat::cuda
