#pragma once

#include <cstdint>

// What a kernel is given, as the host that launches it and the kernel see it. Plain data, of the
// same layout for either compiler.

namespace reparam_fused {

constexpr int kBlock = 128;
// Keeps enough bytes in flight for the memory, and shares the key schedule: with
// two vectors a thread an element takes 2 to 3 more instructions.
constexpr int kVectorsPerThread = 4;
constexpr int kVectorBytes = 16;
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

// Division by a number known at launch. In 32 bits it is a multiplication
// (Granlund and Montgomery, Division by invariant integers using multiplication,
// 1994), right for dividends below 2^31.
template <class Index>
struct Divisor;

template <>
struct Divisor<uint32_t> {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d), shift(0) {
    while ((1u << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
};

template <>
struct Divisor<uint64_t> {
  uint64_t divisor;

  Divisor() = default;
  explicit Divisor(uint64_t d) : divisor(d) {}
};

// From the logical index of an element to its places, its noise index and its key; or
// of a vector, where sizes and strides count vectors, and counters. Innermost
// dimension first.
template <class Index>
struct Layout {
  int ndim;
  Divisor<Index> sizes[kMaxDims];
  int64_t x_strides[kMaxDims], scale_strides[kMaxDims], out_strides[kMaxDims];
  int64_t index_strides[kMaxDims], key_strides[kMaxDims];
  int64_t first_index;
};

}  // namespace reparam_fused
