// Runs the vectorised loops over a tensor: kernels by dtype, ranges by thread.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "instruction_set.h"

namespace divqat {

using at::Tensor;

// Elements per thread below which another thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// Calls f(kernels of the dtype, pointer of its element type).
template <class F>
void with_kernels(at::ScalarType dtype, F&& f) {
  const InstructionSet& set = instruction_set();
  switch (dtype) {
    case at::kFloat:
      return f(set.f32, (float*)nullptr);
    case at::kDouble:
      return f(set.f64, (double*)nullptr);
    case at::kBFloat16:
      return f(set.b16, (bf16*)nullptr);
    default:
      return f(set.h16, (f16*)nullptr);  // check_float() let nothing else through
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

}  // namespace divqat
