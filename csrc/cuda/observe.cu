// observe, and the scales of weights whose rows are not contiguous: one launch.
#include "min_max.cuh"
#include "observer.cuh"

namespace divqat::cuda {
namespace {

constexpr int kThreads = kQuantizeThreads;

template <class T, int W>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks)
    observe_tensor(ObserverState s, const T* x, int64_t n, float* partial, uint32_t* counter) {
  hand_in(partial, tiles_range<T, W>(x, n));
  if (!last_block(counter)) return;
  const Range range = grid_range(partial);
  if (threadIdx.x == 0) update(s, 0, range);
}

// How a channel's elements are shared out: `parts` blocks per channel, or tile of 32 channels.
struct Shares {
  int64_t n, channels, inner, parts;
  float* partial;  // [parts, channels, 2]
  uint32_t* counter;
};

// A share's range: final where it is the only one, else for the last block.
__device__ void hand_in(const ObserverState& s, const Shares& shares, int64_t part, int64_t channel,
                        const Range& range) {
  if (shares.parts == 1) return update(s, channel, range);
  float* partial = shares.partial + 2 * (part * shares.channels + channel);
  partial[0] = range.least();
  partial[1] = range.most();
}

__device__ void finish_in_last_block(const ObserverState& s, const Shares& shares) {
  if (shares.parts == 1 || !last_block(shares.counter)) return;
  for (int64_t channel = threadIdx.x; channel < shares.channels; channel += kThreads) {
    Range range;
    for (int64_t part = 0; part < shares.parts; ++part) {
      const float* partial = shares.partial + 2 * (part * shares.channels + channel);
      range.merge(__ldcg(partial), __ldcg(partial + 1));
    }
    update(s, channel, range);
  }
}

// A block per channel and part, over the channel's runs of `inner` elements laid end to end.
template <class T>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks)
    observe_runs(ObserverState s, Shares shares, const T* x) {
  const int64_t inner = shares.inner, runs = shares.n / (shares.channels * inner);
  const int64_t channel = blockIdx.x / shares.parts, part = blockIdx.x % shares.parts;
  const int64_t step = shares.parts * kThreads, first = part * kThreads + threadIdx.x;
  const int64_t step_run = step / inner, step_offset = step % inner;
  int64_t run = first / inner, offset = first % inner;
  Range range;
  while (run < runs) {
    T values[kQuantizeUnroll];
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      // Past the end, the channel's first element once more: it changes no minimum or maximum.
      values[u] = x[run < runs ? (run * shares.channels + channel) * inner + offset
                               : channel * inner];
      run += step_run;
      offset += step_offset;
      if (offset >= inner) {
        offset -= inner;
        ++run;
      }
    }
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) range.add(float(to_compute(values[u])));
  }
  range = block_range(range);
  if (threadIdx.x == 0) hand_in(s, shares, part, channel, range);
  finish_in_last_block(s, shares);
}

// A block per part and 32 channels that follow each other in memory: a warp reads a piece of a row.
template <class T>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks)
    observe_columns(ObserverState s, Shares shares, const T* x) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float lows[kThreads], highs[kThreads];
  const int64_t channels = shares.channels, rows = shares.n / channels;
  const int64_t tile = blockIdx.x / shares.parts, part = blockIdx.x % shares.parts;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t channel = tile * 32 + lane, column = channel < channels ? channel : channels - 1;
  const int64_t step = shares.parts * kWarps;
  Range range;
  for (int64_t row = part * kWarps + warp; row < rows; row += kQuantizeUnroll * step) {
    T values[kQuantizeUnroll];
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      // Past the end, the last row once more.
      const int64_t at = row + u * step < rows ? row + u * step : rows - 1;
      values[u] = x[at * channels + column];
    }
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) range.add(float(to_compute(values[u])));
  }
  lows[threadIdx.x] = range.least();
  highs[threadIdx.x] = range.most();
  __syncthreads();
  if (warp == 0 && channel < channels) {
    for (int other = 1; other < kWarps; ++other) {
      range.merge(lows[other * 32 + lane], highs[other * 32 + lane]);
    }
    hand_in(s, shares, part, channel, range);
  }
  finish_in_last_block(s, shares);
}

// `groups` channels, or tiles of 32; `rounds` of a block's loads make up one of them.
template <class T>
void observe_channels(void (*kernel)(ObserverState, Shares, const T*), const ObserverState& s,
                      Shares shares, int64_t groups, int64_t rounds, const T* x,
                      cudaStream_t stream) {
  const int64_t room = std::min(resident_blocks(kernel, kThreads) / groups,
                                kObserverScratch / (2 * shares.channels));
  shares.parts = std::max<int64_t>(1, std::min(rounds, room));
  if (shares.parts > 1) shares.counter = next_counter(stream);
  launch(kernel, groups * shares.parts, kThreads, stream, false, s, shares, x);
}

template <class T, int W>
void observe_whole(const ObserverState& s, const T* x, int64_t n, float* scratch,
                   cudaStream_t stream) {
  const auto kernel = observe_tensor<T, W>;
  launch(kernel, range_blocks(kernel, n, W), kThreads, stream, false, s, x, n, scratch,
         next_counter(stream));
}

}  // namespace

void observe(DType dtype, const ObserverState& state, const void* x, int64_t n, int64_t channels,
             int64_t inner, float* scratch, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(x);
    if (channels == 1) {
      on_16_bytes(x) ? observe_whole<T, kWidth<T>>(state, from, n, scratch, stream)
                     : observe_whole<T, 1>(state, from, n, scratch, stream);
      return;
    }
    const Shares shares = {n, channels, inner, 1, scratch, nullptr};
    const int64_t length = n / channels;
    if (inner == 1) {
      constexpr int kRows = kThreads / 32 * kQuantizeUnroll;
      observe_channels(observe_columns<T>, state, shares, divided_up(channels, 32),
                       divided_up(length, kRows), from, stream);
    } else {
      observe_channels(observe_runs<T>, state, shares, channels, divided_up(length, kQuantizeTile),
                       from, stream);
    }
  });
}

}  // namespace divqat::cuda
