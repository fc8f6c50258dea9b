// fake_quantize_observed.
//
//   exact    one cooperative launch: minimum and maximum, a grid barrier, then quantization, from the
//            last tile to the first, as L2 still holds the last ones; 20.25 bytes per float32 element
//            if x does not fit into L2. Where cooperative launches are refused: observe, then
//            fake_quantize.
//   delayed  one launch: quantizes with the old range while it takes the new one; 16.25 bytes
//   frozen   fake_quantize
// Per channel, which is rare for activations: one launch to observe, one to quantize.
#include <cooperative_groups.h>

#include "min_max.cuh"
#include "observer.cuh"

namespace divqat::cuda {
namespace {

constexpr int kThreads = kQuantizeThreads;

template <class T, int W>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks)
    fake_quantize_exact_kernel(ObserverState s, QuantizeParams p, const T* x, T* y, uint8_t* mask,
                               float* partial) {
  // Every block reads the old buffers before the barrier and computes the new state from them;
  // block 0 writes it after the barrier.
  ObserverChannel observer(s, 0);
  write_partial(partial, tiles_min_max<T, W>(x, p.n));
  cooperative_groups::this_grid().sync();
  observer.update(s, grid_min_max(partial));
  if (blockIdx.x == 0 && threadIdx.x == 0) observer.store(s, 0);
  const Quantizer<T> quantizer(observer.scale, observer.zero_point);
  quantize_tiles<T, W, ScaleLookup::kOnce>(p, quantizer, x, y, mask, true, [](T) {});
}

template <class T, int W>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks)
    fake_quantize_delayed_kernel(ObserverState s, QuantizeParams p, const T* x, T* y, uint8_t* mask,
                                 float* partial, uint32_t* counter) {
  MinMax min_max;
  quantize_tiles<T, W, ScaleLookup::kOnce>(p, Quantizer<T>(p, 0), x, y, mask, false,
                                           [&](T value) { min_max.add(float(to_compute(value))); });
  write_partial(partial, block_min_max(min_max));
  // The last block updates the buffers; all others have read them by then.
  if (!is_last_block(counter)) return;
  min_max = grid_min_max(partial);
  if (threadIdx.x == 0) update_channel(s, 0, min_max);
}

// False, with nothing done, where cooperative launches are refused.
template <class T, int W>
bool quantize_exact(const ObserverState& s, const QuantizeParams& p, const T* x, T* y,
                    uint8_t* mask, float* scratch, cudaStream_t stream) {
  const auto kernel = fake_quantize_exact_kernel<T, W>;
  return launch_together(kernel, min_max_blocks(kernel, p.n, W), kThreads, stream, s, p, x, y, mask,
                         scratch);
}

template <class T, int W>
void quantize_delayed(const ObserverState& s, const QuantizeParams& p, const T* x, T* y,
                      uint8_t* mask, float* scratch, cudaStream_t stream) {
  const auto kernel = fake_quantize_delayed_kernel<T, W>;
  launch(kernel, min_max_blocks(kernel, p.n, W), kThreads, stream, s, p, x, y, mask, scratch,
         next_counter(stream));
}

}  // namespace

void fake_quantize_exact(DType dtype, const ObserverState& state, const QuantizeParams& params,
                         const void* x, void* y, uint8_t* mask, float* scratch,
                         cudaStream_t stream) {
  bool done = false;
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (params.channels > 1) return;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    done = is_aligned_16(x, y)
               ? quantize_exact<T, kWidth<T>>(state, params, from, to, mask, scratch, stream)
               : quantize_exact<T, 1>(state, params, from, to, mask, scratch, stream);
  });
  if (done) return;
  observe(dtype, state, x, params.n, params.channels, params.inner, scratch, stream);
  fake_quantize(dtype, params, x, y, mask, stream);
}

void fake_quantize_delayed(DType dtype, const ObserverState& state, const QuantizeParams& params,
                           const void* x, void* y, uint8_t* mask, float* scratch,
                           cudaStream_t stream) {
  if (params.channels > 1) {
    fake_quantize(dtype, params, x, y, mask, stream);
    return observe(dtype, state, x, params.n, params.channels, params.inner, scratch, stream);
  }
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    is_aligned_16(x, y)
        ? quantize_delayed<T, kWidth<T>>(state, params, from, to, mask, scratch, stream)
        : quantize_delayed<T, 1>(state, params, from, to, mask, scratch, stream);
  });
}

}  // namespace divqat::cuda
