#pragma once

#include <cstdint>

namespace reparam_fused {

// One call, as the kernels see it: two inputs, one output, all of one dtype and
// of one broadcast shape, with strides in elements. Dimensions are in logical
// (row-major) order, outermost first, merged where every operand allows it.
struct Problem {
  const void* x;  // mu, or grad_z
  const void* log_var;
  void* out;
  int ndim;  // >= 1
  const int64_t* sizes;
  const int64_t* x_strides;
  const int64_t* log_var_strides;
  const int64_t* out_strides;
  // One (seed, offset) for every slice_numel elements; the noise index starts
  // from 0 in each slice.
  const uint64_t* keys;
  int64_t slice_numel;
};

// Computes the elements [begin, end) in row-major order.
using Kernel = void (*)(const Problem& problem, int64_t begin, int64_t end);

enum DType { kFloat, kDouble, kHalf, kBFloat16, kDTypes };

struct Kernels {
  const char* isa;
  Kernel sample[kDTypes];
  Kernel sample_backward[kDTypes];
};

// A thread's share is a multiple of this, so that no tile is cut: it is the
// longest one, of 2 x 16 counters with 4 elements each.
constexpr int64_t kMaxTile = 128;

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace reparam_fused
