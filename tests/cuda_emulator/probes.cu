#include "probes.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>

namespace {

constexpr unsigned kAll = 0xffffffffu;
__device__ int64_t device_variable[4];

// Every thread reads what another warp's thread wrote before the barrier.
__global__ void barrier(int64_t* out) {
  __shared__ int shared[64];
  for (int round = 0; round < 3; ++round) {
    shared[threadIdx.x] = int(threadIdx.x) + round;
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = shared[63 - threadIdx.x];
    __syncthreads();
  }
}

__global__ void missing_barrier(int64_t* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = 0;
  __syncthreads();
  shared[threadIdx.x] = int(threadIdx.x) + 2;
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void barrier_votes(int64_t* out) {
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int any = __syncthreads_or(threadIdx.x == 5), none = __syncthreads_or(0);
  const int all = __syncthreads_and(1), most = __syncthreads_and(threadIdx.x != 5);
  out[threadIdx.x] = count * 10000 + any * 1000 + none * 100 + all * 10 + most;
}

__global__ void votes(int64_t* out) {
  const int lane = threadIdx.x % 32;
  const unsigned odd = __ballot_sync(kAll, lane & 1);
  const int any = __any_sync(kAll, lane == 7), all = __all_sync(kAll, lane != 7);
  out[threadIdx.x] = int64_t(odd) << 2 | any << 1 | all;
}

// The halves of a warp on their own.
__global__ void halves(int64_t* out) {
  const bool upper = threadIdx.x >= 16;
  if (upper) {
    out[threadIdx.x] = __ballot_sync(0xffff0000u, threadIdx.x % 4 == 0);
    __syncwarp(0xffff0000u);
  } else {
    out[threadIdx.x] = __ballot_sync(0x0000ffffu, threadIdx.x % 2 == 0);
  }
}

__global__ void shuffles(int64_t* out) {
  const int lane = threadIdx.x;
  int64_t* to = out + 7 * lane;
  to[0] = __shfl_xor_sync(kAll, lane, 5);
  to[1] = __shfl_down_sync(kAll, (unsigned)lane, 3u);
  to[2] = __shfl_up_sync(kAll, int64_t(lane) << 40, 3u);
  to[3] = int64_t(__shfl_sync(kAll, lane + 0.5, 9) * 2);
  to[4] = int64_t(__shfl_sync(kAll, lane + 0.5f, 1, 8) * 2);
  to[5] = __shfl_down_sync(kAll, lane, 2u, 4);
  to[6] = int64_t(__shfl_xor_sync(kAll, uint64_t(lane), 8, 8));
}

__global__ void atomics(int64_t* out) {
  auto* at = reinterpret_cast<unsigned*>(out);
  atomicAdd(&at[0], threadIdx.x);
  atomicMax(&at[2], threadIdx.x);
  if (atomicInc(&at[4], gridDim.x * blockDim.x - 1) == gridDim.x * blockDim.x - 1) {
    atomicExch(&at[6], 1u);
  }
  atomicCAS(&at[8], 0u, 7u);
  atomicAdd(reinterpret_cast<double*>(&out[5]), 0.5);
}

// Every block sees what all wrote before.
__global__ void grid_sync(int64_t* out) {
  for (int round = 1; round < 4; ++round) {
    if (threadIdx.x == 3) out[blockIdx.x] += round;
    cooperative_groups::this_grid().sync();
    int64_t sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += out[block];
    if (threadIdx.x == 4) out[gridDim.x + blockIdx.x] = sum;
    cooperative_groups::this_grid().sync();
  }
}

__global__ void indices(int64_t* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * 24 + thread] = thread;
}

__global__ void block_order(int64_t* out) { out[device_variable[0]++] = blockIdx.x; }

__global__ void lane_returns_early(int64_t*) {
  if (threadIdx.x == 3) return;
  __ballot_sync(kAll, 1);
}
__global__ void thread_misses_barrier(int64_t*) {
  if (threadIdx.x != 40) __syncthreads();
}
__global__ void lanes_diverge(int64_t*) {
  if (threadIdx.x < 8) {
    __syncwarp();
  } else {
    __ballot_sync(kAll, 1);
  }
}
__global__ void reads_lane_outside(int64_t*) {
  if (threadIdx.x < 8) __shfl_xor_sync(0xffu, 1, 8);
}
__global__ void block_misses_grid(int64_t*) {
  if (blockIdx.x != 1) cooperative_groups::this_grid().sync();
}
__global__ void lane_returns_before_grid(int64_t*) {
  if (blockIdx.x == 1 && threadIdx.x == 2) return;
  cooperative_groups::this_grid().sync();
}
__global__ void misaligned(int64_t* out) {
  *reinterpret_cast<float4*>(reinterpret_cast<float*>(out) + 1) = make_float4(1, 2, 3, 4);
}

// float → bits and back, for every value of 16 bits and what lies half way to the next.
template <class T>
void round_trips(std::vector<int64_t>& out) {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const T value = std::bit_cast<T>(uint16_t(bits));
    out.push_back(__float_as_uint(float(value)));
    out.push_back(std::bit_cast<uint16_t>(T(float(value))));
    const T next = std::bit_cast<T>(uint16_t(bits + 1));
    const float between = 0.5f * float(value) + 0.5f * float(next);
    out.push_back(__float_as_uint(between));
    out.push_back(std::bit_cast<uint16_t>(T(between)));
  }
}

struct Probe {
  void (*kernel)(int64_t*);
  dim3 grid, block;
  size_t outputs;
  bool cooperative = false;
};

const std::map<std::string, Probe> kProbes = {
    {"barrier", {barrier, 2, 64, 128}},
    {"missing_barrier", {missing_barrier, 1, 64, 64}},
    {"barrier_votes", {barrier_votes, 1, 40, 40}},
    {"votes", {votes, 1, 64, 64}},
    {"halves", {halves, 1, 32, 32}},
    {"shuffles", {shuffles, 1, 32, 7 * 32}},
    {"atomics", {atomics, 5, 64, 6}},
    {"atomics_together", {atomics, 5, 64, 6, true}},
    {"grid_sync", {grid_sync, 6, 64, 12, true}},
    {"too_many_blocks", {grid_sync, 7, 64, 14, true}},
    {"grid_sync_alone", {grid_sync, 2, 64, 4}},
    {"indices", {indices, dim3(2, 2, 3), dim3(4, 3, 2), 12 * 24}},
    {"lane_returns_early", {lane_returns_early, 1, 32, 0}},
    {"thread_misses_barrier", {thread_misses_barrier, 1, 64, 0}},
    {"lanes_diverge", {lanes_diverge, 1, 32, 0}},
    {"reads_lane_outside", {reads_lane_outside, 1, 32, 0}},
    {"block_misses_grid", {block_misses_grid, 3, 32, 0, true}},
    {"lane_returns_before_grid", {lane_returns_before_grid, 3, 32, 0, true}},
    {"misaligned", {misaligned, 1, 1, 4}},
    {"block_order", {block_order, 20, 1, 20}},
};

}  // namespace

std::vector<int64_t> probe(const std::string& name) {
  std::vector<int64_t> out;
  if (name == "bfloat16") round_trips<__nv_bfloat16>(out);
  if (name == "half") round_trips<__half>(out);
  if (!out.empty()) return out;
  const Probe& probe = kProbes.at(name);
  void* variable = nullptr;
  cudaGetSymbolAddress(&variable, device_variable);
  cudaLaunchAttribute attribute = {cudaLaunchAttributeCooperative, {}};
  attribute.val.cooperative = probe.cooperative;
  cudaLaunchConfig_t config;
  config.gridDim = probe.grid;
  config.blockDim = probe.block;
  config.attrs = &attribute;
  config.numAttrs = 1;
  out.resize(probe.outputs);
  const cudaError_t error = cudaLaunchKernelEx(&config, probe.kernel, out.data());
  cudaMemsetAsync(variable, 0, sizeof device_variable, nullptr);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return out;
}
