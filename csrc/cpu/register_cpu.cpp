// Registers the CPU kernels under the schemas of divqat/ops/_library.py.
#include <torch/library.h>

#include "../register.h"
#include "ops.h"

namespace divqat {

void register_cpu(torch::Library& library) {
  library.impl("fake_quantize", &fake_quantize_cpu);
  library.impl("fake_quantize_backward", &fake_quantize_backward_cpu);
  library.impl("observe", &observe_cpu);
  library.impl("fake_quantize_observed", &fake_quantize_observed_cpu);
  library.impl("fake_quantize_observed_inplace", &fake_quantize_observed_inplace_cpu);
  library.impl("fake_quantize_lsq", &fake_quantize_lsq_cpu);
  library.impl("fake_quantize_lsq_backward", &fake_quantize_lsq_backward_cpu);
  library.impl("fake_quantize_weights", &fake_quantize_weights_cpu);
  library.impl("fake_quantize_weights_backward", &fake_quantize_weights_backward_cpu);
  library.impl("divergence_loss", &divergence_loss_cpu);
  library.impl("divergence_loss_backward", &divergence_loss_backward_cpu);
}

}  // namespace divqat
