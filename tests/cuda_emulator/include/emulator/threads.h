// Who a thread is, and what the threads of a warp, a block or a grid do together. Each primitive
// waits until all that it names have come; where that cannot be, the launch throws an error that
// names primitive, kernel and block. It is stricter than the device, which lets threads that have
// returned be missing: on the emulator that, too, is an error. All threads come from the same place
// in the source.
#pragma once
#include <bit>
#include <concepts>
#include <source_location>

#include "keywords.h"
#include "vectors.h"

constexpr int warpSize = 32;
// Set for every fiber before it runs.
extern thread_local constinit uint3 threadIdx;
extern thread_local constinit uint3 blockIdx;
extern thread_local constinit dim3 blockDim;
extern thread_local constinit dim3 gridDim;

namespace emulator {

using Site = std::source_location;

struct Collective {
  const char* name;
  uint32_t mask;  // lanes of the warp that take part; unused for a block or grid
  Site site;

  bool operator==(const Collective& other) const {
    return strcmp(name, other.name) == 0 && mask == other.mask &&
           site.line() == other.site.line() && site.column() == other.site.column() &&
           strcmp(site.file_name(), other.site.file_name()) == 0;
  }
};

// The value that lane `source` brought.
uint64_t shuffle(const Collective& what, uint64_t value, int source);
// The lanes of the mask that brought true.
uint32_t ballot(const Collective& what, bool value);
// The number of threads of the block that brought true.
int block_count(const Collective& what, bool value);
void grid_sync(const Collective& what);
bool cooperative();
int lane();
// Ends the launch with an error.
[[noreturn]] void fail(const std::string& what);

// What the device has shuffles for.
template <class T>
concept Shuffled = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, long> ||
                   std::same_as<T, unsigned long> || std::same_as<T, long long> ||
                   std::same_as<T, unsigned long long> || std::same_as<T, float> ||
                   std::same_as<T, double>;

template <Shuffled T>
T shuffle_value(const char* name, uint32_t mask, T value, int source, Site site) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle({name, mask, site}, bits, source);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

inline void __syncthreads(emulator::Site site = emulator::Site::current()) {
  emulator::block_count({"__syncthreads", 0, site}, true);
}
inline int __syncthreads_count(int value, emulator::Site site = emulator::Site::current()) {
  return emulator::block_count({"__syncthreads_count", 0, site}, value != 0);
}
inline int __syncthreads_or(int value, emulator::Site site = emulator::Site::current()) {
  return emulator::block_count({"__syncthreads_or", 0, site}, value != 0) > 0;
}
inline int __syncthreads_and(int value, emulator::Site site = emulator::Site::current()) {
  return emulator::block_count({"__syncthreads_and", 0, site}, value == 0) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emulator::Site site = emulator::Site::current()) {
  emulator::ballot({"__syncwarp", mask, site}, true);
}
inline unsigned __ballot_sync(unsigned mask, int value,
                              emulator::Site site = emulator::Site::current()) {
  return emulator::ballot({"__ballot_sync", mask, site}, value != 0);
}
inline int __any_sync(unsigned mask, int value, emulator::Site site = emulator::Site::current()) {
  return emulator::ballot({"__any_sync", mask, site}, value != 0) != 0;
}
inline int __all_sync(unsigned mask, int value, emulator::Site site = emulator::Site::current()) {
  return emulator::ballot({"__all_sync", mask, site}, value == 0) == 0;
}

// A lane whose source lies outside of its segment of `width` lanes keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulator::Site site = emulator::Site::current()) {
  const int segment = emulator::lane() & ~(width - 1);
  return emulator::shuffle_value("__shfl_sync", mask, value, segment + (source & (width - 1)),
                                 site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize,
                  emulator::Site site = emulator::Site::current()) {
  const int lane = emulator::lane(), source = lane ^ lanes;
  const bool beyond = source >= (lane & ~(width - 1)) + width;
  return emulator::shuffle_value("__shfl_xor_sync", mask, value, beyond ? lane : source, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize,
                   emulator::Site site = emulator::Site::current()) {
  const int lane = emulator::lane(), source = lane + int(by);
  const bool beyond = source >= (lane & ~(width - 1)) + width;
  return emulator::shuffle_value("__shfl_down_sync", mask, value, beyond ? lane : source, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize,
                 emulator::Site site = emulator::Site::current()) {
  const int lane = emulator::lane(), source = lane - int(by);
  const bool beyond = source < (lane & ~(width - 1));
  return emulator::shuffle_value("__shfl_up_sync", mask, value, beyond ? lane : source, site);
}
