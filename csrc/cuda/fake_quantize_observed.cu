// fake_quantize_observed.
//
//   exact    one cooperative launch: minimum and maximum, a grid barrier, then quantize, from the
//            last tile back, which L2 still holds; 20.25 bytes per float32 element beyond L2.
//            Where the device has no cooperative launches: observe, then fake_quantize.
//   delayed  one launch: quantize with the old range while the new one is taken; 16.25 bytes
//   frozen   fake_quantize itself
// Per channel, which activations hardly use: one launch to observe, one to quantize.
#include <cooperative_groups.h>

#include "min_max.cuh"
#include "observer.cuh"

namespace divqat::cuda {
namespace {

constexpr int kThreads = kQuantizeThreads;

template <class T, int W>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks)
    exact(ObserverState s, QuantizeGrid g, const T* x, T* y, uint8_t* mask, float* partial) {
  // Every block computes the new range from the old buffers, which all have read before the
  // barrier; one of them writes it behind it.
  Updated updated(s, 0);
  hand_in(partial, tiles_range<T, W>(x, g.n));
  cooperative_groups::this_grid().sync();
  updated.observe(s, grid_range(partial));
  if (blockIdx.x == 0 && threadIdx.x == 0) updated.store(s, 0);
  const Step<T> level(updated.scale, updated.zero_point);
  quantize_tiles<T, W, Spread::kOne>(g, level, x, y, mask, true, [](T) {});
}

template <class T, int W>
__global__ void __launch_bounds__(kThreads, kQuantizeBlocks)
    delayed(ObserverState s, QuantizeGrid g, const T* x, T* y, uint8_t* mask, float* partial,
            uint32_t* counter) {
  Range range;
  quantize_tiles<T, W, Spread::kOne>(g, Step<T>(g, 0), x, y, mask, false,
                                     [&](T value) { range.add(float(to_compute(value))); });
  hand_in(partial, block_range(range));
  // The last block writes the buffers, which the others have read by then.
  if (!last_block(counter)) return;
  range = grid_range(partial);
  if (threadIdx.x == 0) update(s, 0, range);
}

template <class T, int W>
void quantize_exact(const ObserverState& s, const QuantizeGrid& g, const T* x, T* y, uint8_t* mask,
                    float* scratch, cudaStream_t stream) {
  const auto kernel = exact<T, W>;
  launch(kernel, range_blocks(kernel, g.n, W), kThreads, stream, true, s, g, x, y, mask, scratch);
}

template <class T, int W>
void quantize_delayed(const ObserverState& s, const QuantizeGrid& g, const T* x, T* y,
                      uint8_t* mask, float* scratch, cudaStream_t stream) {
  const auto kernel = delayed<T, W>;
  launch(kernel, range_blocks(kernel, g.n, W), kThreads, stream, false, s, g, x, y, mask, scratch,
         next_counter(stream));
}

}  // namespace

void fake_quantize_exact(DType dtype, const ObserverState& state, const QuantizeGrid& grid,
                         const void* x, void* y, uint8_t* mask, float* scratch,
                         cudaStream_t stream) {
  if (grid.channels > 1 || !cooperates()) {
    observe(dtype, state, x, grid.n, grid.channels, grid.inner, scratch, stream);
    return fake_quantize(dtype, grid, x, y, mask, stream);
  }
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    on_16_bytes(x, y)
        ? quantize_exact<T, kWidth<T>>(state, grid, from, to, mask, scratch, stream)
        : quantize_exact<T, 1>(state, grid, from, to, mask, scratch, stream);
  });
}

void fake_quantize_delayed(DType dtype, const ObserverState& state, const QuantizeGrid& grid,
                           const void* x, void* y, uint8_t* mask, float* scratch,
                           cudaStream_t stream) {
  if (grid.channels > 1) {
    fake_quantize(dtype, grid, x, y, mask, stream);
    return observe(dtype, state, x, grid.n, grid.channels, grid.inner, scratch, stream);
  }
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    on_16_bytes(x, y)
        ? quantize_delayed<T, kWidth<T>>(state, grid, from, to, mask, scratch, stream)
        : quantize_delayed<T, 1>(state, grid, from, to, mask, scratch, stream);
  });
}

}  // namespace divqat::cuda
