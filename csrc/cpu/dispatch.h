#pragma once

#include "kernels.h"

namespace reparam_fused {

// The kernels for this CPU: the widest ISA it has, or the one that the
// environment variable REPARAM_FUSED_ISA names (scalar, avx2, avx512, neon). Throws
// std::runtime_error where that one is unknown or not to be had.
const Kernels& cpu_kernels();

// Elements below which a second thread costs more than it brings: about 8 us of work.
constexpr int64_t kGrain = 8192;

// torch_parallel_for: calls run(begin, end, context) for shares of a range, on torch's own
// threads. Returns an error of torch's, or 0.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*run)(int64_t, int64_t, void*), void* context);

// Runs the kernel of an op over the tiles of a problem. Returns what parallel_for does.
int32_t run_kernel(Op op, DType dtype, const Problem& problem, int64_t numel,
                   ParallelFor parallel_for);

}  // namespace reparam_fused
