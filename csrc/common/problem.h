#pragma once

#include <cstdint>

#include "macros.h"

namespace reparam_fused {

enum DType { kFloat, kDouble, kHalf, kBFloat16, kDTypes };

enum Op {
  kSample,
  kSampleBackward,
  kNoise,
  kKlDivergence,
  kKlDivergenceBackward,
  kSamplesBackward,
  kOps
};

// What the scale is given as: the place of its form in the list of reparam.h.
using Form = int;
constexpr Form kLogVar = 0, kStd = 1;

// What is done with the scale before sigma is made of it, and what is added to sigma then.
template <class R>
struct Limits {
  static constexpr bool kBounded = true;
  R low, high, min_std;

  // Of those that a kernel asks at run time whether there are any
  REPARAM_FUSED_INLINE bool given() const { return true; }
};
using Bounds = Limits<double>;
struct Unbounded {
  static constexpr bool kBounded = false;
};

constexpr int kMaxOperands = 4, kMaxResults = 4;

// One call, as the kernels see it: operands and results, all of one dtype and of one broadcast
// shape. What differs from element to element has a stride for each dimension: where the operands
// lie, which noise index an element has, and which key. Dimensions are in logical (row-major)
// order, outermost first, merged where all of these allow it. The tables are in host memory.
struct Problem {
  Form form;
  const Bounds* bounds;  // null: none
  // mu or the incoming gradient, then the scale. What an op does not read is given as the first.
  const void* operands[kMaxOperands];
  void* results[kMaxResults];
  // (seed, offset) pairs, on the device of the tensors
  const uint64_t* keys;
  // The noise index of the first element: above 0 in a shard of a larger tensor
  int64_t first_index;
  int ndim;  // >= 1
  const int64_t* sizes;
  // In elements
  const int64_t* operand_strides[kMaxOperands];
  const int64_t* result_strides[kMaxResults];
  const int64_t* index_strides;
  // In words of 64 bits
  const int64_t* key_strides;
  // The dimensions after the first outer_ndim make a segment: its elements share a key,
  // and have noise indices in a row.
  int outer_ndim;
  int64_t segment_numel;
  // How often each element is drawn, and how far a sample is from the one before: in the tensor
  // that has one, the first result or in the backward the first operand; in the noise; and in
  // the keys. The dimensions above are those of one sample.
  int64_t samples;
  int64_t sample_stride, sample_index_stride, sample_key_stride;
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
