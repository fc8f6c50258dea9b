// fake_quantize and its backward: one launch each, 8.125 bytes per float32 element.
#include "fake_quantize_common.cuh"

namespace divqat::cuda {
namespace {

template <class T, int W, ScaleLookup kLookup>
__global__ void __launch_bounds__(kQuantizeThreads, kQuantizeBlocks)
    fake_quantize_kernel(QuantizeParams p, const T* x, T* y, uint8_t* mask) {
  Quantizer<T> quantizer;
  if constexpr (kLookup == ScaleLookup::kOnce) quantizer = Quantizer<T>(p, 0);
  quantize_tiles<T, W, kLookup>(p, quantizer, x, y, mask, false, [](T) {});
}

// grad_x = grad_y where the mask is set, else 0. The W mask bits of a pack are in one byte.
template <class T, int W>
__global__ void __launch_bounds__(kQuantizeThreads, kQuantizeBlocks)
    masked_grad_kernel(const T* grad_y, const uint8_t* mask, T* grad_x, int64_t n) {
  for_each_tile<W>(n, false, [&](int64_t first, auto full) {
    constexpr bool kFull = decltype(full)::value;
    Pack<T, W> grads[kQuantizeUnroll];
    uint32_t bits[kQuantizeUnroll];
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      const int64_t i = (first + u * kQuantizeThreads) * W;
      bits[u] = kFull || i < n ? mask[i / 8] >> (i % 8) : 0;
      grads[u] = load_pack<kFull, W>(grad_y, i, n);
    }
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        grads[u].at[w] = bits[u] >> w & 1 ? grads[u].at[w] : from_compute<T>(0);
      }
      store_pack<kFull>(grad_x, (first + u * kQuantizeThreads) * W, n, grads[u]);
    }
  });
}

template <class K, class... A>
void launch_tiles(K kernel, int64_t n, int width, cudaStream_t stream, A... args) {
  const int64_t blocks = std::min(tile_count(n, width), resident_blocks(kernel, kQuantizeThreads));
  launch(kernel, blocks, kQuantizeThreads, stream, args...);
}

template <class T, int W>
void quantize(const QuantizeParams& p, const T* x, T* y, uint8_t* mask, cudaStream_t stream) {
  if (p.channels == 1) {
    launch_tiles(fake_quantize_kernel<T, W, ScaleLookup::kOnce>, p.n, W, stream, p, x, y, mask);
  } else if (p.inner % W == 0) {
    launch_tiles(fake_quantize_kernel<T, W, ScaleLookup::kPerPack>, p.n, W, stream, p, x, y, mask);
  } else {
    launch_tiles(fake_quantize_kernel<T, W, ScaleLookup::kPerElement>, p.n, W, stream, p, x, y,
                 mask);
  }
}

}  // namespace

void fake_quantize(DType dtype, const QuantizeParams& params, const void* x, void* y, uint8_t* mask,
                   cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    is_aligned_16(x, y) ? quantize<T, kWidth<T>>(params, from, to, mask, stream)
                        : quantize<T, 1>(params, from, to, mask, stream);
  });
}

void fake_quantize_backward(DType dtype, const void* grad_y, const uint8_t* mask, void* grad_x,
                            int64_t n, cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int W = kWidth<T>;
    const auto* from = static_cast<const T*>(grad_y);
    auto* to = static_cast<T*>(grad_x);
    is_aligned_16(grad_y, grad_x)
        ? launch_tiles(masked_grad_kernel<T, W>, n, W, stream, from, mask, to, n)
        : launch_tiles(masked_grad_kernel<T, 1>, n, 1, stream, from, mask, to, n);
  });
}

}  // namespace divqat::cuda
