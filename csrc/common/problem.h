#pragma once

#include <cstdint>

namespace reparam_fused {

enum DType { kFloat, kDouble, kHalf, kBFloat16, kDTypes };

enum Op { kSample, kSampleBackward, kNoise, kKlDivergence, kKlDivergenceBackward, kOps };

// What the scale is given as: the place of its form in the list of reparam.h.
using Form = int;
constexpr Form kLogVar = 0, kStd = 1;

// One call, as the kernels see it: two inputs, one output, all of one dtype and of
// one broadcast shape. What differs from element to element has a stride for each
// dimension: where the operands lie, which noise index an element has, and which
// key. Dimensions are in logical (row-major) order, outermost first, merged where all
// of these allow it. The tables are in host memory.
struct Problem {
  Form form;
  // What an op without operands is given as x and scale is not read.
  const void* x;      // mu, or the incoming gradient
  const void* scale;  // the backward of a std makes no use of it
  void* out;
  // (seed, offset) pairs, on the device of the tensors
  const uint64_t* keys;
  // The noise index of the first element: above 0 in a shard of a larger tensor
  int64_t first_index;
  int ndim;  // >= 1
  const int64_t* sizes;
  // In elements
  const int64_t* x_strides;
  const int64_t* scale_strides;
  const int64_t* out_strides;
  const int64_t* index_strides;
  // In words of 64 bits
  const int64_t* key_strides;
  // The dimensions after the first outer_ndim make a segment: its elements share a key,
  // and have noise indices in a row.
  int outer_ndim;
  int64_t segment_numel;
};

// Keys of n keys: of each the child that its number of data names, or, without data, `count`
// from `first` on, one key after the other and then the next child of all. Strides in words.
struct Derivation {
  const uint64_t* keys;
  int64_t key_stride, n;
  const uint64_t* data;
  int64_t data_stride;
  uint64_t first;
  int64_t count;
  uint64_t* out;
};

}  // namespace reparam_fused
