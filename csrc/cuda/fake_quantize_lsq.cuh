// What the kernels of fake_quantize_lsq share: the quantizer of a channel, and the backward's sums.
#pragma once
#include "launch.cuh"
#include "launchers.h"
#include "math.cuh"
#include "pack.cuh"

namespace divqat::cuda {

constexpr int kLsqThreads = 256;
// Independent loads in flight per thread and tensor; two blocks must fit into the registers.
template <class T, int W>
constexpr int kLsqUnroll = W > 4 || sizeof(T) == 8 ? 2 : 4;
// Upper bound on the pairs of partial sums that the last block adds: 256 KiB, a few microseconds.
constexpr int64_t kLsqMaxPartials = kLsqScratch / 2;

template <class T>
struct LsqArguments {
  LsqParams params;
  int64_t parts;  // of a channel (runs) or of a tile of columns
  const T* x;
  const T* grad_y;  // for the backward only, like grad_factor and what follows
  T* out;           // y, or grad_x
  double grad_factor;
  double* partial;  // [parts, channels, 2]
  uint32_t* counter;
  float* grad_scale;
  float* grad_zero_point;
};

// Quantizes with the scale and zero point of one channel.
template <class T>
struct LsqQuantizer {
  using A = compute_t<T>;
  float scale;
  A inv_scale, zero_point;

  LsqQuantizer() = default;
  __device__ LsqQuantizer(const LsqParams& p, int64_t channel) {
    scale = at_least(p.scale[channel], kMinScale);
    inv_scale = A(1.0f / scale);
    const float exact = p.learned ? static_cast<const float*>(p.zero_point)[channel]
                                  : float(static_cast<const int32_t*>(p.zero_point)[channel]);
    // zero_point = clamp(nearbyint(zero_point))
    zero_point = A(at_most(at_least(rintf(exact), p.quant_min), p.quant_max));
  }

  // v = x / scale, rounded = nearbyint(v) + zero_point; returns q = clamp(rounded). NaN stays NaN.
  __device__ A quantize(T x, const LsqParams& p, A* v, A* rounded) const {
    const A low = A(p.quant_min), high = A(p.quant_max);
    *v = to_compute(x) * inv_scale;
    *rounded = rint_of(*v) + zero_point;
    const A at_least_low = *rounded < low ? low : *rounded;
    return at_least_low > high ? high : at_least_low;
  }

  __device__ T forward(T x, const LsqParams& p) const {
    A v, rounded;
    const A level = quantize(x, p, &v, &rounded) - zero_point;
    // y = (q − zero_point) · scale; a float64 tensor with one scale multiplies in float32
    if (p.per_tensor) return from_compute<T>(A(float(level) * scale));
    return from_compute<T>(level * A(scale));
  }

  // Returns grad_x. Adds to the sums of the scale's and the zero point's gradients, the latter
  // without its factor −scale.
  __device__ T backward(T x, T grad_y, const LsqParams& p, A* scale_sum, A* outside_sum) const {
    A v, rounded;
    const A q = quantize(x, p, &v, &rounded), grad = to_compute(grad_y);
    const bool inside = rounded == q;
    // dy/dscale = q − zero_point − (v inside, 0 outside)
    *scale_sum += grad * (q - zero_point - (inside ? v : A(0)));
    *outside_sum += inside ? A(0) : grad;
    return inside ? grad_y : from_compute<T>(A(0));
  }
};

struct LsqSums {
  double scale, outside;

  __device__ void operator+=(const LsqSums& other) {
    scale += other.scale;
    outside += other.outside;
  }
};

__device__ inline LsqSums shuffle_xor(const LsqSums& sums, int offset) {
  LsqSums other;
  other.scale = __shfl_xor_sync(0xffffffffu, sums.scale, offset);
  other.outside = __shfl_xor_sync(0xffffffffu, sums.outside, offset);
  return other;
}

// Sum over the block, valid in thread 0. All threads must call it.
__device__ inline LsqSums block_sum(LsqSums sums) {
  __shared__ LsqSums warps[kLsqThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) sums += shuffle_xor(sums, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kLsqThreads / 32; ++warp) sums += warps[warp];
  }
  return sums;
}

template <class T>
__device__ void store_grads(const LsqArguments<T>& args, int64_t channel, const LsqSums& sums) {
  const float scale = args.params.scale[channel];
  args.grad_scale[channel] = lsq_scale_grad(float(sums.scale * args.grad_factor), scale);
  // dy/dzero_point = −scale outside, 0 inside
  const double offset = -sums.outside * double(at_least(scale, kMinScale)) * args.grad_factor;
  args.grad_zero_point[channel] = args.params.learned ? float(offset) : 0.0f;
}

// Stores the sums of one part for the last block, or the gradients if the channel has only one
// part.
template <class T>
__device__ void write_partial(const LsqArguments<T>& args, int64_t part, int64_t channel,
                              const LsqSums& sums) {
  if (args.parts == 1) return store_grads(args, channel, sums);
  double* partial = args.partial + 2 * (part * args.params.channels + channel);
  partial[0] = sums.scale;
  partial[1] = sums.outside;
}

// The last block adds the parts of each channel. `lanes` threads of a warp share a channel, so many
// that all threads are busy.
template <class T>
__device__ void reduce_in_last_block(const LsqArguments<T>& args) {
  if (args.parts == 1 || !is_last_block(args.counter)) return;
  const int64_t channels = args.params.channels;
  int lanes = 32;
  while (lanes > 1 && lanes * channels > kLsqThreads) lanes /= 2;
  const int lane = int(threadIdx.x) % lanes;
  for (int64_t first = 0; first < channels; first += kLsqThreads / lanes) {
    const int64_t channel = first + int(threadIdx.x) / lanes;
    LsqSums sums = {0, 0};
    if (channel < channels) {
#pragma unroll 8
      for (int64_t part = lane; part < args.parts; part += lanes) {
        const double* partial = args.partial + 2 * (part * channels + channel);
        // From L2: other blocks wrote these, and L1 is not coherent.
        sums.scale += __ldcg(partial);
        sums.outside += __ldcg(partial + 1);
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) sums += shuffle_xor(sums, offset);
    if (channel < channels && lane == 0) store_grads(args, channel, sums);
  }
}

}  // namespace divqat::cuda
