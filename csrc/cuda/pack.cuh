// Packs of elements that one instruction loads or stores.
#pragma once
#include "math.cuh"

namespace divqat::cuda {

// W elements, aligned to their size, as a vector access to global memory requires.
template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  T at[W];
};

// Elements of a 16-byte access, the widest there is.
template <class T>
constexpr int kWidth = 16 / int(sizeof(T));

inline bool is_aligned_16(const void* a, const void* b = nullptr, const void* c = nullptr) {
  return (uintptr_t(a) | uintptr_t(b) | uintptr_t(c)) % 16 == 0;
}

// The pack that starts at element i of x [n], with zeros past the end. kFull: i + W <= n is known.
template <bool kFull, int W, class T>
__device__ Pack<T, W> load_pack(const T* x, int64_t i, int64_t n) {
  if constexpr (!kFull) {
    if (i + W > n) {
      Pack<T, W> pack;
#pragma unroll
      for (int w = 0; w < W; ++w) pack.at[w] = i + w < n ? x[i + w] : from_compute<T>(0);
      return pack;
    }
  }
  return *reinterpret_cast<const Pack<T, W>*>(x + i);
}

template <bool kFull, int W, class T>
__device__ void store_pack(T* y, int64_t i, int64_t n, const Pack<T, W>& pack) {
  if constexpr (!kFull) {
    if (i + W > n) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if (i + w < n) y[i + w] = pack.at[w];
      }
      return;
    }
  }
  *reinterpret_cast<Pack<T, W>*>(y + i) = pack;
}

}  // namespace divqat::cuda
