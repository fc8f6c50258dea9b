// Launches, and what the runtime API answers.
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

std::atomic<bool> capturing{false}, cooperates{true}, crowded{false};
std::atomic<uint32_t> next_seed{0};
thread_local cudaError_t last_error = cudaSuccess;

std::mutex symbols_mutex;
std::map<const char*, size_t> symbols;

cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool is_cooperative(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) return attribute.val.cooperative != 0;
  }
  return false;
}

// One block after the other, in any order.
std::optional<std::string> run_in_turn(const Launch& launch, unsigned blocks) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::minstd_rand(launch.seed));
  for (unsigned block : order) {
    if (auto error = run_block(launch, block)) return error;
  }
  return {};
}

// All at the same time, each on an OS thread.
std::optional<std::string> run_together(Launch launch, unsigned blocks) {
  GridBarrier barrier(blocks);
  launch.barrier = &barrier;
  std::vector<std::optional<std::string>> errors(blocks);
  std::vector<std::thread> threads;
  for (unsigned block = 0; block < blocks; ++block) {
    threads.emplace_back([&, block] {
      errors[block] = run_block(launch, block);
      barrier.leave(errors[block].has_value());
    });
  }
  for (std::thread& thread : threads) thread.join();
  // The cause rather than what followed from it: an empty message.
  std::optional<std::string> first;
  for (auto& error : errors) {
    if (error && (!first || first->empty())) first = error;
  }
  if (first && first->empty()) {
    first = "kernel " + kernel_name(launch.kernel) +
            ": some blocks wait at this_grid().sync(), others have returned";
  }
  return first;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& body) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 0x7fffffffu || blocks > 0xffffffffu || config.dynamicSmemBytes > 0) {
    return returned(cudaErrorInvalidConfiguration);
  }
  const bool together = is_cooperative(config);
  if (together && !cooperates) return returned(cudaErrorNotSupported);
  if (together && (crowded || blocks > kMultiprocessors * kBlocksPerMultiprocessor)) {
    return returned(cudaErrorCooperativeLaunchTooLarge);
  }
  // There is one stream, whose launches follow each other whoever makes them.
  static std::mutex stream;
  const std::lock_guard<std::mutex> lock(stream);
  const Launch launch{kernel, body, grid, block, next_seed++, nullptr};
  const auto error = together ? run_together(launch, blocks) : run_in_turn(launch, blocks);
  if (error) throw std::runtime_error("CUDA emulator: " + *error);
  return cudaSuccess;
}

void record_symbol(const void* address, size_t bytes) {
  const std::lock_guard<std::mutex> lock(symbols_mutex);
  symbols[static_cast<const char*>(address)] = bytes;
}

bool symbols_are_zero() {
  const std::lock_guard<std::mutex> lock(symbols_mutex);
  for (const auto& [address, bytes] : symbols) {
    if (std::any_of(address, address + bytes, [](char byte) { return byte != 0; })) return false;
  }
  return true;
}

void set_capturing(bool value) { capturing = value; }
void set_cooperative(bool value) { cooperates = value; }
void set_crowded(bool value) { crowded = value; }
void set_seed(uint32_t seed) { next_seed = seed; }

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorNotSupported: return "operation not supported";
    default: return "invalid argument";
  }
}

cudaError_t cudaPeekAtLastError() { return emulator::last_error; }

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulator::kMultiprocessors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrL2CacheSize: *value = 32 << 20; break;
    case cudaDevAttrCooperativeLaunch: *value = emulator::cooperates; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    default: return emulator::returned(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulator::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(current, *mode);
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = 1;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
