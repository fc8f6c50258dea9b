// Where each device registers its kernels under the ops that divqat/ops/_library.py declares.
#pragma once
#include <torch/library.h>

namespace divqat {

void register_cpu(torch::Library& library);
#ifdef DIVQAT_CUDA
void register_cuda(torch::Library& library);
#endif

}  // namespace divqat
