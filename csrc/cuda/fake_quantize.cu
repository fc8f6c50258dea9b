// fake_quantize and its backward: one launch each, 8.125 bytes per float32 element.
#include "fake_quantize_common.cuh"

namespace divqat::cuda {
namespace {

template <class T, int W, Spread kSpread>
__global__ void __launch_bounds__(kQuantizeThreads, kQuantizeBlocks)
    fake_quantize_kernel(QuantizeGrid g, const T* x, T* y, uint8_t* mask) {
  Step<T> level;
  if constexpr (kSpread == Spread::kOne) level = Step<T>(g, 0);
  quantize_tiles<T, W, kSpread>(g, level, x, y, mask, false, [](T) {});
}

// grad_x = grad_y where the mask is set, else 0. A lane's pack needs W bits of the mask: a byte, or
// part of one.
template <class T, int W>
__global__ void __launch_bounds__(kQuantizeThreads, kQuantizeBlocks)
    masked_grad(const T* grad_y, const uint8_t* mask, T* grad_x, int64_t n) {
  for_each_tile<W>(n, false, [&](int64_t first, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    Pack<T, W> grads[kQuantizeUnroll];
    uint32_t bits[kQuantizeUnroll];
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      const int64_t i = (first + u * kQuantizeThreads) * W;
      bits[u] = kWhole || i < n ? mask[i / 8] >> (i % 8) : 0;
      grads[u] = load_pack<kWhole, W>(grad_y, i, n);
    }
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        grads[u].at[w] = bits[u] >> w & 1 ? grads[u].at[w] : from_compute<T>(0);
      }
      store_pack<kWhole>(grad_x, (first + u * kQuantizeThreads) * W, n, grads[u]);
    }
  });
}

template <class K, class... A>
void launch_tiles(K kernel, int64_t n, int width, cudaStream_t stream, A... args) {
  const int64_t blocks =
      std::min(quantize_tiles_of(n, width), resident_blocks(kernel, kQuantizeThreads));
  launch(kernel, blocks, kQuantizeThreads, stream, false, args...);
}

template <class T, int W>
void quantize(const QuantizeGrid& g, const T* x, T* y, uint8_t* mask, cudaStream_t stream) {
  if (g.channels == 1) {
    launch_tiles(fake_quantize_kernel<T, W, Spread::kOne>, g.n, W, stream, g, x, y, mask);
  } else if (g.inner % W == 0) {
    launch_tiles(fake_quantize_kernel<T, W, Spread::kPerPack>, g.n, W, stream, g, x, y, mask);
  } else {
    launch_tiles(fake_quantize_kernel<T, W, Spread::kPerElement>, g.n, W, stream, g, x, y, mask);
  }
}

}  // namespace

void fake_quantize(DType dtype, const QuantizeGrid& grid, const void* x, void* y, uint8_t* mask,
                   cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    on_16_bytes(x, y) ? quantize<T, kWidth<T>>(grid, from, to, mask, stream)
                      : quantize<T, 1>(grid, from, to, mask, stream);
  });
}

void fake_quantize_backward(DType dtype, const void* grad_y, const uint8_t* mask, void* grad_x,
                            int64_t n, cudaStream_t stream) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int W = kWidth<T>;
    const auto* from = static_cast<const T*>(grad_y);
    auto* to = static_cast<T*>(grad_x);
    on_16_bytes(grad_y, grad_x)
        ? launch_tiles(masked_grad<T, W>, n, W, stream, from, mask, to, n)
        : launch_tiles(masked_grad<T, 1>, n, 1, stream, from, mask, to, n);
  });
}

}  // namespace divqat::cuda
