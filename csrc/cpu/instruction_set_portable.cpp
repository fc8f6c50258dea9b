// The kernels in plain C++, for any machine.
#include "kernel_table.h"

namespace divqat {
namespace portable {
#include "simd_portable.h"
using Float = Portable<float, 8>;
#include "kernel_table.inc"
}  // namespace portable

static constexpr InstructionSet set = portable::kernels("portable", [] { return true; });
const InstructionSet* const kPortable = &set;

}  // namespace divqat
