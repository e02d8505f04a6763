#pragma once

#include <cstdint>

#include "../common/problem.h"

// Keys derived from keys: contiguous pairs of words (seed, offset), but where a stride is
// given, in words.

namespace reparam_fused {

// Runs a derivation on the CPU.
void derive_cpu(const Derivation& d);

// out[j][k]: child first + j, modulo 2^64, of key k of n.
void child_keys_cpu(const uint64_t* keys, int64_t n, uint64_t first, int64_t count, uint64_t* out);

// out[k]: child data[k] of key k of n. A stride of 0 gives all the same.
void fold_in_cpu(const uint64_t* keys, int64_t key_stride, const uint64_t* data,
                 int64_t data_stride, int64_t n, uint64_t* out);

}  // namespace reparam_fused
