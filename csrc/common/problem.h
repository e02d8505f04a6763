#pragma once

#include <cstdint>

namespace reparam_fused {

enum DType { kFloat, kDouble, kHalf, kBFloat16, kDTypes };

// One call, as the kernels see it: two inputs, one output, all of one dtype and
// of one broadcast shape, with strides in elements. Dimensions are in logical
// (row-major) order, outermost first, merged where every operand allows it. The
// tables are in host memory.
struct Problem {
  const void* x;  // mu, or grad_z
  const void* log_var;
  void* out;
  int ndim;  // >= 1
  const int64_t* sizes;
  const int64_t* x_strides;
  const int64_t* log_var_strides;
  const int64_t* out_strides;
  // One (seed, offset) for every slice_numel elements, on the device of the
  // tensors; the noise index starts from 0 in each slice.
  const uint64_t* keys;
  int64_t slice_numel;
};

}  // namespace reparam_fused
