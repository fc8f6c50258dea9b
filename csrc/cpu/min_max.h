// Minimum and maximum of each channel.
#pragma once
#include "../checks.h"

namespace divqat {

// Of a dense x with at least one element; both NaN where a channel has one. low, high [channels].
void min_max_tensor(const Tensor& x, Channels channels, float* low, float* high);

}  // namespace divqat
