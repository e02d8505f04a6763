#pragma once

#include "kernels.h"

namespace reparam_fused {

// The kernels for this CPU: the widest ISA it has, or the one that the
// environment variable REPARAM_FUSED_ISA names (scalar, avx2, avx512). Throws
// std::runtime_error where that one is unknown or not to be had.
const Kernels& cpu_kernels();

}  // namespace reparam_fused
