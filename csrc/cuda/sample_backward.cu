#include "launch.cuh"

namespace reparam_fused {

cudaError_t sample_backward_cuda(DType dtype, const Problem& problem, cudaStream_t stream) {
  return launch<SampleBackward>(dtype, problem, KeyTensor{problem.keys}, stream);
}

std::string built_cuda_archs() {
  std::string archs;
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    archs += (archs.empty() ? "" : " ") + std::to_string(arch / 100) + "." +
             std::to_string(arch % 100 / 10);
  }
  return archs;
}

}  // namespace reparam_fused
