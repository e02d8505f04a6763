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
  kHead,
  kHeadBackward,
  kOps
};

// What a head adds up beside the sample
enum Term { kKlTerm, kLogProbTerm, kTanhLogProbTerm, kTerms };

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

constexpr int kMaxOperands = 5, kMaxResults = 4;

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

  // Of a head, whose operands are mu, the scale, loc and the scale of the prior, and the gradient
  // of z; null for those that there are not: without keys there is no sample, and no z. Its results
  // are z, or the gradients of the first four, of which a log_prob has none of mu.
  Term term;
  Form prior_form;
  const Bounds* prior_bounds;  // null: none
  // How many elements after each other are summed, and the sums of the rows or their gradients,
  // one after the other: float, or double of doubles.
  int64_t row;
  void* totals;
  const void* grad_totals;
  // Whether the terms take both scales as log_var, and not as sigma
  bool by_log_var;
};

// What fits into a vector of 16 bytes, of so many bytes each. A row is summed by chunks of 512
// vectors, and what there are of chunks by the same rule as rows of 4 a vector, of doubles 2:
// first by strides of 128 vectors, (x0 + x1) + x2 + x3, then by halves (v[i] + v[i + half]) over
// the elements of a vector, over 32 vectors and over 4 of those. What is missing is +0, and so is
// the sum where it would be -0.
constexpr int64_t kSumStride = 128, kSumTerms = 4;

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
