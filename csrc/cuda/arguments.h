#pragma once

#include <cstdint>

#include "../common/problem.h"

// What a kernel is given, as the host that launches it and the kernel see it. Plain data, of the
// same layout for either compiler.

namespace reparam_fused {

constexpr int kBlock = 128, kBlockBits = 7;
// Keeps enough bytes in flight for the memory, and shares the key schedule: with
// two vectors a thread an element takes 2 to 3 more instructions.
constexpr int kVectorsPerThread = 4;
constexpr int kVectorBytes = 16;
// Of a row that is summed
constexpr int kChunkVectors = kBlock * kVectorsPerThread;
// Of a kernel that is not for whole tensors so many blocks fit on a multiprocessor: more registers
// than 40 save it nothing, but with bounds, where half types would spill some.
template <class Limits>
constexpr int kCutBlocks = Limits::kBounded ? 10 : 12;
constexpr int kMaxDims = 16;

// Where a key comes from. A kernel is compiled for either: to choose in the kernel
// would cost an element 2 instructions.
struct KeyTensor {
  const uint64_t* keys;
  uint64_t first_counter;
};

// The generator's part in a call without a key: its seed and its offset, which is 4
// for each Philox block; while a CUDA graph is captured both are on the device, and
// `offset` is the graph's own part of it. The kernel writes the key that it used,
// (seed, offset / 4 + 2^63), to key_out. There is one segment, whose noise begins at index 0.
struct Generator {
  uint64_t seed, offset;
  const int64_t* captured_seed;
  const int64_t* captured_offset;
  uint64_t* key_out;
};

// Of an op without noise
struct NoKey {};

// The form and the limits of a kernel that is compiled for all of them. `read`: whether a gradient
// depends on the scale, without which there may be none.
template <class R>
struct AnyScale : Limits<R> {
  int form;
  bool bounded, read;

  REPARAM_FUSED_INLINE bool given() const { return bounded; }
};

// Division by a number known at launch: a multiplication (Granlund and Montgomery, Division by
// invariant integers using multiplication, 1994), right for dividends below 2^31.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d), shift(0) {
    while ((1u << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
};

// In halves: a GPU multiplies by each of them in one instruction, which its compiler would spend
// four on.
struct Stride {
  uint32_t low, high;

  Stride() = default;
  explicit Stride(int64_t stride)
      : low(static_cast<uint32_t>(stride)), high(static_cast<uint32_t>(stride >> 32)) {}
};

// From the logical index of an element, or of a vector, to its places, its noise index, or its
// counter, and its key: innermost dimension first.
struct Dimension {
  Divisor size;
  Stride x_stride, scale_stride, out_stride;  // in bytes
  Stride index_stride, key_stride;
};
struct Layout {
  int ndim;
  Dimension dimensions[kMaxDims];
};

// The samples of a problem: how many, and how far one is from the next, of the tensor that has
// them in bytes. `vectors`: whether that tensor has the elements of a counter in a row.
struct Samples {
  int64_t count, stride, index_stride, key_stride;
  bool vectors;
};

// The rows of a head, one after the other, and who sums them: 2^lane_bits threads a row, of less
// than a block one vector each, or a block each of its chunks. `of_vectors`: whether a row is one
// of whole vectors of 16 bytes.
struct Rows {
  int64_t count, length;
  Divisor chunks;
  uint32_t full_chunks;  // of a row
  int lane_bits;
  bool of_vectors;
};

// Where the noise of an element comes from, of one dense tensor: in the layout there are places in
// the noise and among the keys alone, and none of one segment. No keys: no noise.
struct Numbering {
  const uint64_t* keys;
  int64_t first_index;
  bool one_segment;
  Divisor segment;
  Layout layout;
};

// A head, as in Problem
template <class R>
struct Head {
  const void* operands[kMaxOperands];
  void* results[kMaxResults];
  void* totals;  // of rows of more than a chunk the sums of these
  const void* grad_totals;
  Term term;
  bool by_log_var;
  Rows rows;
  AnyScale<R> scale, prior;
  Numbering numbering;

  REPARAM_FUSED_INLINE bool has_prior() const { return operands[2] != nullptr; }
};

}  // namespace reparam_fused
