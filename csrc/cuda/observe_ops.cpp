// observe: from tensors to the launcher of observe.cu.
#include "ops.h"
#include "ops_common.h"

namespace divqat::cuda {

void observe_cuda(const Tensor& x, const Tensor& running_min, const Tensor& running_max,
                  const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                  int64_t quant_max, std::optional<int64_t> ch_axis, double averaging_constant,
                  bool symmetric, bool relu) {
  check_float("x", x);
  const OnDevice device(x);
  const Tensor from = dense(x);
  const Channels channels = channels_of(from, ch_axis);
  const ObserverOptions options =
      observer_options(quant_min, quant_max, averaging_constant, symmetric, relu);
  const ObserverBuffers buffers(x, running_min, running_max, scale, zero_point, channels.count);
  const Tensor scratch = observer_scratch(x);
  if (x.numel() == 0) return;
  observe(dtype_of(x), state_of(buffers, options), from.const_data_ptr(), x.numel(), channels.count,
          channels.inner, scratch.mutable_data_ptr<float>(), device.stream());
  buffers.write_back();
}

}  // namespace divqat::cuda
