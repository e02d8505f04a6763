#if defined(__aarch64__) || defined(_M_ARM64)
#include "neon.h"

#include "loop.h"

namespace reparam_fused {
constexpr Kernels kNeonKernels = make_kernels<Neon>();
}  // namespace reparam_fused
#endif
