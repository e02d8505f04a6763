#include "launch.cuh"

namespace reparam_fused {

cudaError_t sample_cuda(DType dtype, const Problem& problem, const GeneratorState* generator,
                        cudaStream_t stream) {
  return generator == nullptr ? launch<Sample>(dtype, problem, KeyTensor{problem.keys}, stream)
                              : launch<Sample>(dtype, problem, Generator{*generator}, stream);
}

}  // namespace reparam_fused
