#include "launch.cuh"

namespace reparam_fused {

cudaError_t noise_cuda(DType dtype, const Problem& problem, cudaStream_t stream) {
  return launch<Noise>(dtype, problem, KeyTensor{problem.keys}, stream);
}

}  // namespace reparam_fused
