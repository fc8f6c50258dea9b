// The kernels for any machine.
#include "kernels.h"

namespace divqat {
namespace portable {
#include "simd_portable.h"
using Float = Portable<float, 8>;
#include "kernels.inc"
}  // namespace portable

static constexpr InstructionSet set = portable::kernels("portable", [] { return true; });
const InstructionSet* const kPortable = &set;

}  // namespace divqat
