// The 16-bit element types, without a torch header.
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
