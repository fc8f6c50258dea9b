// The element types of tensors as the kernels see them, without a torch header.
#pragma once
#include <stdint.h>

namespace divqat {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace divqat
