// CUDA's keywords. Headers that could use one of these names themselves come first.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
// The threads of a block are fibers of one OS thread, so its thread-local memory is the block's. It
// holds what the block before left there, as shared memory does.
#define __shared__ static thread_local
