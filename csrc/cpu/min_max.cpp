// Minimum and maximum of each channel, over threads.
#include "min_max.h"

#include <limits>
#include <mutex>

#include "parallel.h"

namespace divqat {
namespace {

// NaN if one of them is.
float nan_min(float a, float b) { return b < a || b != b ? b : a; }
float nan_max(float a, float b) { return b > a || b != b ? b : a; }

}  // namespace

// The order does not matter to minimum and maximum, so each thread merges its own when it is done.
void min_max_tensor(const Tensor& x, Channels channels, float* low, float* high) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  std::fill_n(low, channels.count, infinity);
  std::fill_n(high, channels.count, -infinity);
  std::mutex mutex;
  with_kernels(x.scalar_type(), [&](const auto& kernels, auto* type) {
    const auto* from = data(x, type);
    if (channels.count == 1) {
      at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
        float least, most;
        kernels.min_max(from + begin, end - begin, &least, &most);
        const std::lock_guard<std::mutex> lock(mutex);
        *low = nan_min(*low, least);
        *high = nan_max(*high, most);
      });
      return;
    }
    // Either rows of one element per channel, or runs of `inner` elements of one channel.
    const bool columns = channels.inner == 1;
    const int64_t unit = columns ? channels.count : channels.inner;
    const int64_t grain = std::max<int64_t>(1, kGrain / unit);
    at::parallel_for(0, x.numel() / unit, grain, [&](int64_t begin, int64_t end) {
      c10::SmallVector<float, 256> mine(size_t(2 * channels.count));
      float *least = mine.data(), *most = least + channels.count;
      if (columns) {
        kernels.min_max_columns(from + begin * unit, end - begin, channels.count, least, most);
      } else {
        std::fill_n(least, channels.count, infinity);
        std::fill_n(most, channels.count, -infinity);
        for (int64_t run = begin; run < end; ++run) {
          const int64_t c = run % channels.count;
          float run_low, run_high;
          kernels.min_max(from + run * unit, unit, &run_low, &run_high);
          least[c] = nan_min(least[c], run_low);
          most[c] = nan_max(most[c], run_high);
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (int64_t c = 0; c < channels.count; ++c) {
        low[c] = nan_min(low[c], least[c]);
        high[c] = nan_max(high[c], most[c]);
      }
    });
  });
}

}  // namespace divqat
