#pragma once

#include "../common/problem.h"
#include "arguments.h"
#include "driver.h"

// The choice of kernel, grid and indices for a problem, without torch and without CUDA's compiler.

namespace reparam_fused {

// Enqueues one kernel, or none for an empty problem; for each part one of what is more than that
// takes. With a generator problem.keys is not read, and there is one segment; problem.x and
// problem.scale are not read without operands.
void launch_on_cuda(Op op, DType dtype, const Problem& problem, const Generator* generator,
                    int device, CudaStream stream);
void launch_on_cuda(const Derivation& derivation, int device, CudaStream stream);

}  // namespace reparam_fused
