// From tensors to the pointers and tables that the vectorised loops take.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>

#include <algorithm>

#include "../checks.h"
#include "instruction_set.h"

namespace divqat {

// Elements per thread below which another thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// An activation of more bytes than this is written past the cache: most of it would be gone before
// anything reads it, and what it overwrites need not be read first.
constexpr size_t kStreamBytes = 8 << 20;

// Calls f(kernels of the dtype, pointer of its element type).
template <class F>
void with_kernels(at::ScalarType dtype, F&& f) {
  const InstructionSet& set = instruction_set();
  switch (dtype) {
    case at::kFloat: return f(set.f32, (float*)nullptr);
    case at::kDouble: return f(set.f64, (double*)nullptr);
    case at::kBFloat16: return f(set.b16, (bf16*)nullptr);
    default: return f(set.h16, (f16*)nullptr);  // check_float() let nothing else through
  }
}

template <class T>
const T* data(const Tensor& x, T*) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& x, T*) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Per-channel tables as Grid wants them: reciprocals, and the wrapped-around end.
class GridTables {
 public:
  // zero_point(i) is the i-th channel's, a float.
  template <class ZeroPoint>
  GridTables(const float* scale, ZeroPoint zero_point, Channels channels, int64_t quant_min,
             int64_t quant_max, bool per_tensor) {
    const int64_t length = channels.count + kMaxLanes;
    table_.resize(size_t(3 * length));
    float* scales = table_.data();
    for (int64_t i = 0; i < length && channels.count > 0; ++i) {
      const int64_t c = i % channels.count;
      scales[i] = scale[c];
      scales[length + i] = 1.0f / scale[c];
      scales[2 * length + i] = zero_point(c);
    }
    grid_ = {scales,           scales + length,  scales + 2 * length, channels.count,
             std::max<int64_t>(channels.inner, 1), float(quant_min), float(quant_max), per_tensor};
  }
  GridTables(const GridTables&) = delete;

  const Grid& operator*() const { return grid_; }

 private:
  c10::SmallVector<float, 3 * (8 + kMaxLanes)> table_;
  Grid grid_;
};

// Calls f(begin, end) on parts of n elements that start at a multiple of kMaskWord, in all threads,
// each from the end of its share to the beginning: what was written or read before is in the cache
// at its end, and what is read next will begin where this stopped.
template <class F>
void in_parallel(int64_t n, const F& f) {
  const int64_t words = (n + kMaskWord - 1) / kMaskWord;
  at::parallel_for(0, words, kGrain / kMaskWord, [&](int64_t begin, int64_t end) {
    for (int64_t stop = std::min(end * kMaskWord, n); stop > begin * kMaskWord;) {
      const int64_t start = std::max((stop - 1) / kGrain * kGrain, begin * kMaskWord);
      f(start, stop);
      stop = start;
    }
  });
}

// y and, unless it is undefined, mask from x; all dense in the same memory order.
inline void quantize_all(const Tensor& x, const Tensor& y, const Tensor& mask, Grid grid,
                         Rule rule) {
  grid.stream = y.nbytes() > kStreamBytes;
  uint8_t* const bits = mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  with_kernels(x.scalar_type(), [&](const auto& kernels, auto* type) {
    const auto* from = data(x, type);
    auto* to = mutable_data(y, type);
    in_parallel(x.numel(), [&](int64_t begin, int64_t end) {
      kernels.fake_quantize(from, to, bits, begin, end, grid, rule);
    });
  });
}

// grad_x = grad_y where the mask is set, else 0; all dense in the same memory order.
void masked_grad_all(const Tensor& grad_y, const Tensor& mask, const Tensor& grad_x);

}  // namespace divqat
