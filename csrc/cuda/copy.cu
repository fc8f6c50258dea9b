// Copies in 16-byte accesses, with four independent loads in flight per thread.
#include <algorithm>

#include "launch.cuh"
#include "launchers.h"
#include "math.cuh"
#include "pack.cuh"

namespace divqat::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4;

__global__ void __launch_bounds__(kThreads) copy_packs(uint4* to, const uint4* from, int64_t packs,
                                                       uint8_t* tail_to, const uint8_t* tail_from,
                                                       int tail) {
  constexpr int64_t kTile = kThreads * kUnroll;
  for (int64_t base = blockIdx.x * kTile + threadIdx.x; base < packs; base += gridDim.x * kTile) {
    uint4 values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * kThreads < packs) values[u] = from[base + u * kThreads];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * kThreads < packs) to[base + u * kThreads] = values[u];
    }
  }
  if (blockIdx.x == 0 && int(threadIdx.x) < tail) tail_to[threadIdx.x] = tail_from[threadIdx.x];
}

}  // namespace

void copy(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  if (!is_aligned_16(to, from)) throw std::runtime_error("copy: wanted addresses on 16 bytes");
  const int64_t packs = bytes / 16, tile = kThreads * kUnroll;
  const int64_t useful = std::max<int64_t>(1, ceil_div(packs, tile));
  const int64_t blocks = std::min(useful, resident_blocks(copy_packs, kThreads));
  launch(copy_packs, blocks, kThreads, stream, static_cast<uint4*>(to),
         static_cast<const uint4*>(from), packs, static_cast<uint8_t*>(to) + packs * 16,
         static_cast<const uint8_t*>(from) + packs * 16, int(bytes % 16));
}

}  // namespace divqat::cuda
