#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../common/problem.h"

// The launchers: torch-free, so that the kernels compile in seconds.

namespace reparam_fused {

// The generator's part in a call without a key: its seed and its offset, which is 4
// for each Philox block; while a CUDA graph is captured both are on the device, and
// `offset` is the graph's own part of it. The kernel writes the key that it used,
// (seed, offset / 4 + 2^63), to key_out.
struct GeneratorState {
  uint64_t seed, offset;
  const int64_t* captured_seed;
  const int64_t* captured_offset;
  uint64_t* key_out;
};

constexpr int kMaxDims = 16;

// Enqueue one kernel, or none for an empty problem. ndim is at most kMaxDims.
// With a generator state, problem.keys is not read, and there is one slice.
cudaError_t sample_cuda(DType dtype, const Problem& problem, const GeneratorState* generator,
                        cudaStream_t stream);
cudaError_t sample_backward_cuda(DType dtype, const Problem& problem, cudaStream_t stream);
// Without operands: problem.x and problem.scale are not read.
cudaError_t noise_cuda(DType dtype, const Problem& problem, cudaStream_t stream);
// Without noise: problem.keys is not read.
cudaError_t kl_divergence_cuda(DType dtype, const Problem& problem, cudaStream_t stream);
cudaError_t kl_divergence_backward_cuda(DType dtype, const Problem& problem, cudaStream_t stream);

// Keys derived from keys, as in cpu/keys.h; `out` is aligned to 16 bytes.
cudaError_t child_keys_cuda(const uint64_t* keys, int64_t n, uint64_t first, int64_t count,
                            uint64_t* out, cudaStream_t stream);
cudaError_t fold_in_cuda(const uint64_t* keys, int64_t key_stride, const uint64_t* data,
                         int64_t data_stride, int64_t n, uint64_t* out, cudaStream_t stream);

// Whether the current device can run the kernels: cudaSuccess, or why not. The
// driver is asked once for each device.
cudaError_t has_cuda_binary();

// Compute capabilities with a binary in this build, as "8.0 9.0". The driver
// compiles for newer ones where the build has PTX.
std::string built_cuda_archs();

// module.cpp: these throw, and say which error of CUDA's it was.

// Where the current device, which has this index, has no binary that it can run.
void check_binary(int device);

// By the launcher of the op. The generator state is that of a sample without a key.
void enqueue(Op op, DType dtype, const Problem& problem, const GeneratorState* generator,
             cudaStream_t stream);
void enqueue(const Derivation& derivation, cudaStream_t stream);

}  // namespace reparam_fused
