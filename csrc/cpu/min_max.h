// Minimum and maximum of each channel.
#pragma once
#include "../checks.h"

namespace divqat {

// For a dense x with at least one element; both are NaN if the channel has a NaN. low, high
// [channels].
void min_max_tensor(const Tensor& x, Channels channels, float* low, float* high);

}  // namespace divqat
