// A stand-in for the CUDA runtime, and the launchers of csrc/cuda by C names: what
// they launch is handed to a callback instead of a GPU. test_cuda.py builds
// this with the .cu files, by nvcc with -cudart none, and loads it by ctypes.

#include <cstring>
#include <map>
#include <string>

#include "../../csrc/cuda/launch.h"

using reparam_fused::DType;
using reparam_fused::GeneratorState;
using reparam_fused::Problem;

// args points to one value for each parameter of the kernel.
using OnLaunch = void (*)(const char* kernel, unsigned grid, unsigned block, size_t shared_bytes,
                          void* stream, void** args);

static std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}
static OnLaunch on_launch = nullptr;
static cudaError_t binary_status = cudaSuccess;

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host] = name;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t stream) {
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) return cudaErrorInvalidValue;
  on_launch(kernels().at(kernel).c_str(), grid.x, block.x, shared, stream, args);
  return cudaSuccess;
}
// What the stubs of <<<>>> launches refer to; csrc/cuda has none.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return cudaErrorUnknown; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(void**, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorUnknown;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return binary_status; }

void set_on_launch(OnLaunch callback) { on_launch = callback; }
void set_binary_status(int status) { binary_status = static_cast<cudaError_t>(status); }

int sample(int dtype, const Problem* problem, const GeneratorState* generator, void* stream) {
  return reparam_fused::sample_cuda(static_cast<DType>(dtype), *problem, generator,
                                    static_cast<cudaStream_t>(stream));
}
int sample_backward(int dtype, const Problem* problem, const GeneratorState*, void* stream) {
  return reparam_fused::sample_backward_cuda(static_cast<DType>(dtype), *problem,
                                             static_cast<cudaStream_t>(stream));
}
int noise(int dtype, const Problem* problem, const GeneratorState*, void* stream) {
  return reparam_fused::noise_cuda(static_cast<DType>(dtype), *problem,
                                   static_cast<cudaStream_t>(stream));
}
int kl_divergence(int dtype, const Problem* problem, const GeneratorState*, void* stream) {
  return reparam_fused::kl_divergence_cuda(static_cast<DType>(dtype), *problem,
                                           static_cast<cudaStream_t>(stream));
}
int kl_divergence_backward(int dtype, const Problem* problem, const GeneratorState*, void* stream) {
  return reparam_fused::kl_divergence_backward_cuda(static_cast<DType>(dtype), *problem,
                                                    static_cast<cudaStream_t>(stream));
}
int has_cuda_binary() { return reparam_fused::has_cuda_binary(); }
const char* missing_cuda_binary(int major, int minor) {
  static std::string message;
  message = reparam_fused::missing_cuda_binary(major, minor);
  return message.c_str();
}

}  // extern "C"
