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

// A head or its backward. Operands and results lie densely in row-major order, at addresses of
// whole vectors, and are of the full shape, of which the samples are a dimension. There are rows
// and elements. The workspace is for as many bytes as head_workspace says, of a head alone.
void launch_head_on_cuda(Op op, DType dtype, const Problem& problem, void* workspace, int device,
                         CudaStream stream);
int64_t head_workspace(DType dtype, int64_t rows, int64_t row);

}  // namespace reparam_fused
