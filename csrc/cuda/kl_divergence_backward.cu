#include "launch.cuh"

namespace reparam_fused {

cudaError_t kl_divergence_backward_cuda(DType dtype, const Problem& problem, cudaStream_t stream) {
  return launch<KlDivergenceBackward>(dtype, problem, NoKey{}, stream);
}

}  // namespace reparam_fused
