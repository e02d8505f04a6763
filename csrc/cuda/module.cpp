#include <Python.h>

#include <stdexcept>

#include "launch.h"

// The module reparam_fused._cuda, and what the ops ask of CUDA, without torch's headers.

namespace reparam_fused {
namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call of torch would report it
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(status));
}

PyObject* archs(PyObject*, PyObject*) { return PyUnicode_FromString(built_cuda_archs().c_str()); }

PyMethodDef methods[] = {{"archs", archs, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

void check_binary(int device) {
  const cudaError_t status = has_cuda_binary();
  if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction) {
    return check(status);  // of an earlier kernel, it may be
  }
  (void)cudaGetLastError();
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  throw std::runtime_error("reparam_fused has no CUDA binary for a device of compute capability " +
                           capability + ": this build has " + built_cuda_archs() +
                           ". To get one, build it with TORCH_CUDA_ARCH_LIST=\"" + capability +
                           "\" (" + cudaGetErrorString(status) + ")");
}

void enqueue(Op op, DType dtype, const Problem& problem, const GeneratorState* generator,
             cudaStream_t stream) {
  if (op == kSample) return check(sample_cuda(dtype, problem, generator, stream));
  const auto kernel = op == kSampleBackward ? sample_backward_cuda
                      : op == kNoise        ? noise_cuda
                      : op == kKlDivergence ? kl_divergence_cuda
                                            : kl_divergence_backward_cuda;
  check(kernel(dtype, problem, stream));
}

void enqueue(const Derivation& d, cudaStream_t stream) {
  check(d.data == nullptr
            ? child_keys_cuda(d.keys, d.n, d.first, d.count, d.out, stream)
            : fold_in_cuda(d.keys, d.key_stride, d.data, d.data_stride, d.n, d.out, stream));
}

}  // namespace reparam_fused

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&reparam_fused::definition); }
