// Quantize-dequantize of packs of elements, and masks of one bit per element.
#pragma once
#include <algorithm>

#include "launch.cuh"
#include "launchers.h"
#include "math.cuh"
#include "pack.cuh"

namespace divqat::cuda {

constexpr int kQuantizeThreads = 256;
// Blocks per multiprocessor that the registers must leave room for: with 64 bytes under way per
// thread two of them cover the latency of memory, and nothing has to be spilled.
constexpr int kQuantizeBlocks = 2;
// Independent 16-byte loads in flight per thread.
constexpr int kQuantizeUnroll = 4;
// Packs that a block takes at a time, all of them at once.
constexpr int64_t kQuantizeTile = kQuantizeThreads * kQuantizeUnroll;

inline int64_t tile_count(int64_t n, int width) {
  return ceil_div(ceil_div(n, width), kQuantizeTile);
}

// Calls f(first pack, whole) for each tile of x that falls to this block, the last one first where
// `reverse`: then what the block read last, and L2 still holds, comes first. `whole` is a constant,
// so that whole tiles need no test per pack; only the last one of x may not be whole.
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

// What holds for all channels, as values to select with instead of branches.
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

// The scale and zero point of one channel.
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
    const A value = given < limits.floor ? limits.floor : given;  // NaN stays
    // q = clamp(nearbyint(x · (1/scale)) + zero_point)
    const A rounded = rint_of(value * inv_scale) + zero_point;
    A q = rounded < limits.low ? limits.low : rounded;
    q = q > limits.high ? limits.high : q;
    q = rounded != rounded ? limits.nan_code : q;
    // y = (q − zero_point) · scale; float64 codes with one scale in float32
    const A level = q - zero_point;
    A dequantized = level * A(scale);
    if constexpr (std::is_same_v<A, double>) {
      if (per_tensor) dequantized = A(float(level) * scale);
    }
    *y = from_compute<T>(dequantized);
    return rounded == q && given > limits.floor;  // -inf was out of range anyway
  }
};

// How the elements of a pack find their channel.
enum class ScaleLookup { kOnce, kPerPack, kPerElement };

// The channel of an element, and of those that follow.
class ChannelIterator {
 public:
  __device__ ChannelIterator(const QuantizeParams& p, int64_t i) : p_(p) {
    // 32-bit division where it reaches: the other is many times slower
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
  // On to the next element; whether it is of another channel.
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

// Quantizes one pack that starts at element i; returns a bit per element.
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
      if (kLookup == ScaleLookup::kPerElement && w > 0 && it.next())
        channel_quantizer = Quantizer<T>(p, it.channel());
      bits |= uint32_t(channel_quantizer(x.at[w], limits, p.per_tensor, &y->at[w])) << w;
    }
  }
  return bits;
}

// Stores the W bits of each lane's pack, the lanes' packs adjacent: words of 32 bits, whole where
// the mask goes on that far. `pack` is this lane's; all lanes of the warp take part.
template <bool kFull, int W>
__device__ void store_mask(uint8_t* mask, uint32_t bits, int64_t pack, int64_t n) {
  constexpr int kLanes = 32 / W;  // that fill a word
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

// All of x's tiles that fall to this block. `seen` is shown every element that is read.
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
