#include "loop.h"

namespace reparam_fused {
constexpr Kernels kScalarKernels = make_kernels<Scalar>();
}  // namespace reparam_fused
