// Registers the CUDA kernels under the schemas of divqat/ops/_library.py.
#include <torch/library.h>

#include "../register.h"
#include "ops.h"

namespace divqat {

void register_cuda(torch::Library& library) {
  library.impl("fake_quantize", &cuda::fake_quantize_cuda);
  library.impl("fake_quantize_backward", &cuda::fake_quantize_backward_cuda);
  library.impl("observe", &cuda::observe_cuda);
  library.impl("fake_quantize_observed", &cuda::fake_quantize_observed_cuda);
  library.impl("fake_quantize_observed_inplace", &cuda::fake_quantize_observed_inplace_cuda);
  library.impl("fake_quantize_lsq", &cuda::fake_quantize_lsq_cuda);
  library.impl("fake_quantize_lsq_backward", &cuda::fake_quantize_lsq_backward_cuda);
  library.impl("fake_quantize_weights", &cuda::fake_quantize_weights_cuda);
  library.impl("fake_quantize_weights_backward", &cuda::fake_quantize_weights_backward_cuda);
  library.impl("divergence_loss", &cuda::divergence_loss_cuda);
  library.impl("divergence_loss_backward", &cuda::divergence_loss_backward_cuda);
}

}  // namespace divqat
