// What the emulator's own sources and the tests' module share.
#pragma once
#include <cuda_runtime.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>

namespace emulator {

// Where the blocks of a cooperative launch meet. One that fails, or returns while the others wait,
// takes them down with it.
class GridBarrier {
 public:
  explicit GridBarrier(unsigned blocks) : blocks_(blocks) {}

  // Whether all have come.
  bool wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned round = round_;
    ++waiting_;
    step();
    changed_.wait(lock, [&] { return broken_ || round_ != round; });
    return round_ != round;
  }
  void leave(bool failed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++left_;
    broken_ |= failed;
    step();
  }

 private:
  void step() {
    if (waiting_ == blocks_) {
      ++round_;
      waiting_ = 0;
    }
    broken_ |= left_ > 0 && waiting_ > 0 && left_ + waiting_ == blocks_;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  const unsigned blocks_;
  unsigned waiting_ = 0, left_ = 0, round_ = 0;
  bool broken_ = false;
};

// Name and parameters of a kernel by its address, from the symbol table of its library.
std::string kernel_name(const void* kernel);

// One launch, as its blocks see it.
struct Launch {
  const void* kernel;
  const std::function<void()>& body;
  dim3 grid, block;
  uint32_t seed;
  GridBarrier* barrier;  // of a cooperative launch, else null
};
// Runs one block on this OS thread; the error that stopped it, if one did.
std::optional<std::string> run_block(const Launch& launch, unsigned block);

// For the tests.
void set_capturing(bool capturing);
// Whether the device has cooperative launches; it does until this says otherwise.
void set_cooperative(bool cooperative);
// Whether others hold multiprocessors, so that blocks as many as the device has are not resident at
// the same time; the occupancy does not change.
void set_crowded(bool crowded);
// The order of blocks and threads follows from the seed and the number of launches since.
void set_seed(uint32_t seed);
// Whether the __device__ variables whose address was asked for are zero.
bool symbols_are_zero();

}  // namespace emulator
