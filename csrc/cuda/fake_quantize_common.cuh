// What the ops that quantize share: the tile loop, the quantizer, and masks of one bit per element.
#pragma once
#include <algorithm>

#include "launch.cuh"
#include "launchers.h"
#include "math.cuh"
#include "pack.cuh"

namespace divqat::cuda {

constexpr int kQuantizeThreads = 256;
// Resident blocks per multiprocessor, for __launch_bounds__. With 64 bytes in flight per thread,
// two blocks hide the latency of memory, and no register is spilled.
constexpr int kQuantizeBlocks = 2;
// Independent 16-byte loads in flight per thread.
constexpr int kQuantizeUnroll = 4;
// Packs of a tile, which a block loads at once.
constexpr int64_t kQuantizeTile = kQuantizeThreads * kQuantizeUnroll;

inline int64_t tile_count(int64_t n, int width) {
  return ceil_div(ceil_div(n, width), kQuantizeTile);
}

// Calls f(first pack, full) for each of this block's tiles. `reverse` starts with the last tile,
// which L2 may still hold from the pass before. `full` is a constant: a full tile needs no bounds
// checks, and only the last tile of x may be partial.
template <int W, class F>
__device__ void for_each_tile(int64_t n, bool reverse, F&& f) {
  const int64_t tiles = ceil_div(ceil_div(n, W), kQuantizeTile);
  const int64_t mine = tiles > blockIdx.x ? (tiles - blockIdx.x - 1) / gridDim.x + 1 : 0;
  for (int64_t round = 0; round < mine; ++round) {
    const int64_t tile = blockIdx.x + (reverse ? mine - 1 - round : round) * gridDim.x;
    const int64_t first = tile * kQuantizeTile + threadIdx.x;
    if ((tile + 1) * kQuantizeTile * W <= n) {
      f(first, std::true_type());
    } else {
      f(first, std::false_type());
    }
  }
}

// What all channels share, as values for selects instead of branches.
template <class A>
struct Limits {
  A low, high;
  A floor;     // 0 with relu, else -inf
  A nan_code;  // what NaN becomes

  __device__ explicit Limits(const QuantizeParams& p)
      : low(A(p.quant_min)),
        high(A(p.quant_max)),
        floor(p.relu ? A(0) : -A(INFINITY)),
        nan_code(p.propagate_nan ? A(NAN) : low) {}
};

// Quantizes and dequantizes with the scale and zero point of one channel.
template <class T>
struct Quantizer {
  using A = compute_t<T>;
  float scale;
  A inv_scale, zero_point;

  Quantizer() = default;
  __device__ Quantizer(float scale, int32_t zero_point)
      : scale(scale), inv_scale(A(1.0f / scale)), zero_point(A(zero_point)) {}
  __device__ Quantizer(const QuantizeParams& p, int64_t channel)
      : Quantizer(p.scale[channel], p.zero_point[channel]) {}

  // Returns whether the value was in range.
  __device__ bool operator()(T x, const Limits<A>& limits, bool per_tensor, T* y) const {
    const A given = to_compute(x);
    const A value = given < limits.floor ? limits.floor : given;  // NaN stays NaN
    // q = clamp(nearbyint(x · (1/scale)) + zero_point)
    const A rounded = rint_of(value * inv_scale) + zero_point;
    A q = rounded < limits.low ? limits.low : rounded;
    q = q > limits.high ? limits.high : q;
    q = rounded != rounded ? limits.nan_code : q;
    // y = (q − zero_point) · scale; float64 with one scale multiplies in float32
    const A level = q - zero_point;
    A dequantized = level * A(scale);
    if constexpr (std::is_same_v<A, double>) {
      if (per_tensor) dequantized = A(float(level) * scale);
    }
    *y = from_compute<T>(dequantized);
    return rounded == q && given > limits.floor;  // false for -inf, which is out of range
  }
};

// How often a thread looks up the scale.
enum class ScaleLookup { kOnce, kPerPack, kPerElement };

// The channels of consecutive elements.
class ChannelIterator {
 public:
  __device__ ChannelIterator(const QuantizeParams& p, int64_t i) : p_(p) {
    // 64-bit division is many times slower
    if (p.n <= 0x7fffffff) {
      const uint32_t run = uint32_t(i) / uint32_t(p.inner);
      offset_ = int64_t(uint32_t(i) - run * uint32_t(p.inner));
      channel_ = int64_t(run % uint32_t(p.channels));
    } else {
      const int64_t run = i / p.inner;
      offset_ = i - run * p.inner;
      channel_ = run % p.channels;
    }
  }
  __device__ int64_t channel() const { return channel_; }
  // Moves to the next element; returns whether it belongs to another channel.
  __device__ bool next() {
    if (++offset_ < p_.inner) return false;
    offset_ = 0;
    if (++channel_ == p_.channels) channel_ = 0;
    return true;
  }

 private:
  const QuantizeParams& p_;
  int64_t offset_, channel_;
};

// Quantizes the pack that starts at element i; returns its mask bits.
template <class T, int W, ScaleLookup kLookup>
__device__ uint32_t quantize_pack(const Pack<T, W>& x, const QuantizeParams& p,
                                  const Limits<compute_t<T>>& limits, const Quantizer<T>& quantizer,
                                  int64_t i, Pack<T, W>* y) {
  uint32_t bits = 0;
  if constexpr (kLookup == ScaleLookup::kOnce) {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      bits |= uint32_t(quantizer(x.at[w], limits, p.per_tensor, &y->at[w])) << w;
    }
  } else {
    ChannelIterator it(p, i);
    Quantizer<T> channel_quantizer(p, it.channel());
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (kLookup == ScaleLookup::kPerElement && w > 0 && it.next()) {
        channel_quantizer = Quantizer<T>(p, it.channel());
      }
      bits |= uint32_t(channel_quantizer(x.at[w], limits, p.per_tensor, &y->at[w])) << w;
    }
  }
  return bits;
}

// Stores the W mask bits of each lane, whose packs are adjacent, as 32-bit words; bytes at the end
// of the mask. All lanes of the warp must call it.
template <bool kFull, int W>
__device__ void store_mask(uint8_t* mask, uint32_t bits, int64_t pack, int64_t n) {
  constexpr int kLanes = 32 / W;  // per word
  uint32_t word;
  if constexpr (W == 1) {
    word = __ballot_sync(0xffffffffu, bits);
  } else {
    word = bits << (threadIdx.x % kLanes * W);
#pragma unroll
    for (int lane = 1; lane < kLanes; lane *= 2) word |= __shfl_xor_sync(0xffffffffu, word, lane);
  }
  const int64_t first = pack * W;  // element of bit 0, in the first lane of the word
  if (!mask || threadIdx.x % kLanes != 0) return;
  if (kFull || n - first > 24) {
    *reinterpret_cast<uint32_t*>(mask + first / 8) = word;
  } else {
#pragma unroll 1
    for (int64_t at = first; at < n; at += 8, word >>= 8) mask[at / 8] = uint8_t(word);
  }
}

// Quantizes this block's tiles of x, and calls visit with every element.
template <class T, int W, ScaleLookup kLookup, class Visit>
__device__ void quantize_tiles(const QuantizeParams& p, const Quantizer<T>& quantizer, const T* x,
                               T* y, uint8_t* mask, bool reverse, Visit&& visit) {
  const Limits<compute_t<T>> limits(p);
  for_each_tile<W>(p.n, reverse, [&](int64_t first, auto full) {
    constexpr bool kFull = decltype(full)::value;
    Pack<T, W> values[kQuantizeUnroll];
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      values[u] = load_pack<kFull, W>(x, (first + u * kQuantizeThreads) * W, p.n);
    }
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      const int64_t pack = first + u * kQuantizeThreads, i = pack * W;
      uint32_t bits = 0;
      Pack<T, W> out;
      if (kFull || i < p.n) {
        bits = quantize_pack<T, W, kLookup>(values[u], p, limits, quantizer, i, &out);
        store_pack<kFull>(y, i, p.n, out);
#pragma unroll
        for (int w = 0; w < W; ++w) {
          if (kFull || i + w < p.n) {
            visit(values[u].at[w]);
          } else {
            bits &= ~(1u << w);
          }
        }
      }
      store_mask<kFull, W>(mask, bits, pack, p.n);
    }
  });
}

}  // namespace divqat::cuda
