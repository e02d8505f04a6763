#include "../common/keys.h"

#include "launch.cuh"

namespace reparam_fused {

// One key a thread.
__device__ __forceinline__ void write_child(const uint64_t* key, uint64_t data, uint4* out) {
  const uint64_t counter = __ldg(key + 1) + data;
  float words[4];
  child_keys<Thread>(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                     OneSeed<Thread>(__ldg(key)), words);
  *out = Thread::pack(static_cast<float*>(nullptr), words);
}

__global__ void __launch_bounds__(kBlock)
    child_keys_kernel(const uint64_t* __restrict__ keys, int64_t n, uint64_t first, int64_t total,
                      uint4* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= total) return;
  const int64_t child = i / n;
  write_child(keys + 2 * (i - child * n), first + static_cast<uint64_t>(child), out + i);
}

__global__ void __launch_bounds__(kBlock)
    fold_in_kernel(const uint64_t* __restrict__ keys, int64_t key_stride,
                   const uint64_t* __restrict__ data, int64_t data_stride, int64_t n,
                   uint4* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= n) return;
  write_child(keys + i * key_stride, __ldg(data + i * data_stride), out + i);
}

cudaError_t child_keys_cuda(const uint64_t* keys, int64_t n, uint64_t first, int64_t count,
                            uint64_t* out, cudaStream_t stream) {
  const int64_t total = n * count;
  if (total == 0) return cudaSuccess;
  return enqueue(child_keys_kernel, total, stream, keys, n, first, total,
                 reinterpret_cast<uint4*>(out));
}

cudaError_t fold_in_cuda(const uint64_t* keys, int64_t key_stride, const uint64_t* data,
                         int64_t data_stride, int64_t n, uint64_t* out, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return enqueue(fold_in_kernel, n, stream, keys, key_stride, data, data_stride, n,
                 reinterpret_cast<uint4*>(out));
}

}  // namespace reparam_fused
