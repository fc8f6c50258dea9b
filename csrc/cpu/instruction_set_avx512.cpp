// The kernels compiled for AVX-512. runs_here() is called on every machine, so it is defined before
// the target pragma. The table is constexpr, as its initialization at load time would be AVX-512
// code. Nothing with external inline linkage may be instantiated here: the linker could keep this
// file's copy for all files.
#include "kernel_table.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

static bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace divqat {
namespace avx512 {
#include "simd_portable.h"
#include "simd_avx512.h"
using Float = Avx512;
#include "kernel_table.inc"
}  // namespace avx512

static constexpr InstructionSet set = avx512::kernels("avx512", runs_here);
const InstructionSet* const kAvx512 = &set;

}  // namespace divqat
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const divqat::InstructionSet* const divqat::kAvx512 = nullptr;
#endif
