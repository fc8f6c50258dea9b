// The kernels compiled for AVX2, FMA and F16C; see instruction_set_avx512.cpp.
#include "kernel_table.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

static bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace divqat {
namespace avx2 {
#include "simd_portable.h"
#include "simd_avx2.h"
using Float = Avx2;
#include "kernel_table.inc"
}  // namespace avx2

static constexpr InstructionSet set = avx2::kernels("avx2", runs_here);
const InstructionSet* const kAvx2 = &set;

}  // namespace divqat
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const divqat::InstructionSet* const divqat::kAvx2 = nullptr;
#endif
