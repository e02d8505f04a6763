#include <atomic>

#include "launch.cuh"

namespace reparam_fused {

cudaError_t sample_backward_cuda(DType dtype, const Problem& problem, cudaStream_t stream) {
  return launch<SampleBackward>(dtype, problem, KeyTensor{problem.keys}, stream);
}

cudaError_t has_cuda_binary() {
  static std::atomic<uint64_t> known{0};
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((known & bit) != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  status = cudaFuncGetAttributes(
      &attributes,
      reinterpret_cast<const void*>(whole_kernel<SampleBackward<LogVar>, float, KeyTensor>));
  if (status == cudaSuccess) known |= bit;
  return status;
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
