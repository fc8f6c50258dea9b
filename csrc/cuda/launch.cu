// The host side of launches: counters, occupancy, and the launch count.
#include <atomic>
#include <map>
#include <mutex>
#include <tuple>

#include "launch.cuh"
#include "launchers.h"

namespace divqat::cuda {
namespace {

// Kernels on one stream run one after another, so a stream needs only one counter. A captured
// launch may run at the same time as any other, so it gets a counter of its own. After kCaptured of
// them the counters are reused, which matters only to graphs that run at the same time.
constexpr uint32_t kStreams = 4096, kCaptured = 1 << 18;
__device__ uint32_t counters[kStreams + kCaptured];

std::atomic<int64_t> launches{0};
std::mutex mutex;

// Allows a module or kernel to be loaded on first use while a graph is being captured.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

int64_t launch_count() { return launches.load(); }
void count_launch() { ++launches; }

uint32_t* next_counter(cudaStream_t stream) {
  static std::map<int, uint32_t*> arrays;                                 // per device
  static std::map<std::pair<int, unsigned long long>, uint32_t> streams;  // (device, id) → slot
  static uint32_t captured = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  const int device = current_device();

  const std::lock_guard<std::mutex> lock(mutex);
  uint32_t*& array = arrays[device];
  if (!array) {
    const RelaxedCapture relaxed_capture;
    void* address = nullptr;
    check(cudaGetSymbolAddress(&address, counters), "cudaGetSymbolAddress");
    array = static_cast<uint32_t*>(address);
  }
  if (status != cudaStreamCaptureStatusNone) return array + kStreams + captured++ % kCaptured;
  unsigned long long id = 0;  // unlike a stream handle, an id is never reused
  check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
  const auto slot = streams.try_emplace({device, id}, uint32_t(streams.size()) % kStreams).first;
  return array + slot->second;
}

int64_t resident_blocks(const void* kernel, int threads) {
  static std::map<std::tuple<int, const void*, int>, int64_t> known;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& blocks = known[{device, kernel, threads}];
  if (blocks == 0) {
    const RelaxedCapture relaxed_capture;
    int per_multiprocessor = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, 0),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    const int count = attribute_of(device, cudaDevAttrMultiProcessorCount);
    blocks = std::max<int64_t>(1, int64_t(per_multiprocessor) * count);
  }
  return blocks;
}

bool supports_cooperative_launch() {
  return attribute_of(current_device(), cudaDevAttrCooperativeLaunch) != 0;
}

}  // namespace divqat::cuda
