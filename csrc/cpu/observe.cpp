// observe on the CPU.
#include "observer.h"
#include "ops.h"

namespace divqat {

void observe_cpu(const Tensor& x, const Tensor& running_min, const Tensor& running_max,
                 const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                 int64_t quant_max, std::optional<int64_t> ch_axis, double averaging_constant,
                 bool symmetric, bool relu) {
  check_float("x", x);
  const Tensor from = dense(x);
  Observer observer(x, running_min, running_max, scale, zero_point, channels_of(from, ch_axis),
                    observer_options(quant_min, quant_max, averaging_constant, symmetric, relu));
  observer.observe(from);
  observer.write_back();
}

}  // namespace divqat
