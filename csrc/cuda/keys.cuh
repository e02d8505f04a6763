#pragma once

#include "../common/keys.h"
#include "arguments.h"
#include "thread.h"

// Keys derived from keys, one a thread. `out` is aligned to 16 bytes.

namespace reparam_fused {

__device__ __forceinline__ void write_child(const uint64_t* key, uint64_t data, uint4* out) {
  const uint64_t counter = __ldg(key + 1) + data;
  float words[4];
  child_keys<Thread>(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                     OneSeed<Thread>(__ldg(key)), words);
  *out = Thread::pack(static_cast<float*>(nullptr), words);
}

__device__ __forceinline__ void write_children(const uint64_t* __restrict__ keys, int64_t n,
                                               uint64_t first, int64_t total,
                                               uint4* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= total) return;
  const int64_t child = i / n;
  write_child(keys + 2 * (i - child * n), first + static_cast<uint64_t>(child), out + i);
}

__device__ __forceinline__ void write_folded(const uint64_t* __restrict__ keys, int64_t key_stride,
                                             const uint64_t* __restrict__ data, int64_t data_stride,
                                             int64_t n, uint4* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= n) return;
  write_child(keys + i * key_stride, __ldg(data + i * data_stride), out + i);
}

}  // namespace reparam_fused
