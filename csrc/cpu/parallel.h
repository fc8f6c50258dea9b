// Runs the vectorised loops over a tensor: dispatch by dtype, and ranges for the threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "instruction_set.h"

namespace divqat {

using at::Tensor;

// The fewest elements that are worth a thread.
constexpr int64_t kGrain = 32768;

// Calls f with the kernels of the dtype and a null pointer of its element type.
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

// Calls f(begin, end) in all threads, for ranges of [0, n) that begin at multiples of kMaskWord.
// Each thread goes from the end of its part to the beginning: the pass before has left the end in
// the cache, and this one leaves the beginning there for the next.
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
