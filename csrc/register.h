// Registers the kernels of each device under the schemas of divqat/ops/_library.py.
#pragma once
#include <torch/library.h>

namespace divqat {

void register_cpu(torch::Library& library);
#ifdef DIVQAT_CUDA
void register_cuda(torch::Library& library);
#endif

}  // namespace divqat
