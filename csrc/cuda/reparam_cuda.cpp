#include <Python.h>

#include "../ops.h"
#include "launch.h"

// The CUDA side of the ops: device and stream in, one kernel out. No synchronisation, and
// nothing on the device is read here.

namespace reparam_fused {
namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call of torch would report it
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(status));
}

// Its device and its stream are the current ones. Made before anything is allocated.
class Cuda {
 public:
  explicit Cuda(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    const cudaError_t status = has_cuda_binary();
    if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction) {
      check(status);  // of an earlier kernel, it may be
      return;
    }
    (void)cudaGetLastError();
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));
    throw std::runtime_error(missing_cuda_binary(major, minor) + " (" + cudaGetErrorString(status) +
                             ")");
  }

  // Where the operands have more dimensions than a kernel takes, in row-major order
  Tensor run(Op op, Call&& call, const GeneratorState* generator = nullptr) const {
    call.allocate();
    if (call.numel() == 0) return call.take_out();
    if (call.problem().ndim <= kMaxDims) {
      enqueue(op, call, generator);
      return call.take_out();
    }
    const Shape shape = View(call.out().get()).shape;
    if (call.operands()) {
      const Owned x = copy(call.operands()->first, shape);
      const Owned scale = copy(call.operands()->second, shape);
      Call dense(View(x.get()), View(scale.get()), call.key(), call.options());
      dense.allocate();
      if (dense.problem().ndim <= kMaxDims) {
        enqueue(op, dense, generator);
        reparam_fused::check(aoti_torch_copy_(call.out().get(), dense.out().get(), 0));
        return call.take_out();
      }
    }
    refuse("a block or a batch of keys in more than ", kMaxDims, " dimensions");
  }

 private:
  void enqueue(Op op, const Call& call, const GeneratorState* generator) const {
    const auto current = torch::stable::accelerator::getCurrentStream(device_);
    const auto stream = static_cast<cudaStream_t>(current.nativeHandle());
    if (op == kSample) return check(sample_cuda(call.dtype(), call.problem(), generator, stream));
    const auto kernel = op == kSampleBackward ? sample_backward_cuda
                        : op == kNoise        ? noise_cuda
                        : op == kKlDivergence ? kl_divergence_cuda
                                              : kl_divergence_backward_cuda;
    check(kernel(call.dtype(), call.problem(), stream));
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// One of a captured generator's two tensors
const int64_t* captured(const std::optional<Tensor>& tensor, const View& device) {
  if (!tensor) return nullptr;
  const View word(*tensor);
  if (word.dtype != aoti_torch_dtype_int64() || !word.on_device_of(device) || !tensor->numel()) {
    refuse("expected the state of a captured generator in int64 tensors on its device");
  }
  return static_cast<const int64_t*>(word.data());
}

// With the key that a generator at (seed, offset) gives. While a graph is captured both
// are on the device, and offset is the graph's own part.
std::tuple<Tensor, Tensor> sample_at(const Tensor& mu, const Tensor& scale, int64_t seed,
                                     int64_t offset, const std::optional<Tensor>& captured_seed,
                                     const std::optional<Tensor>& captured_offset,
                                     const std::string& form) {
  const Cuda device(mu);
  if (captured_seed.has_value() != captured_offset.has_value()) {
    refuse("expected captured_seed and captured_offset, or neither");
  }
  const Tensor key(empty_key(mu).release());
  const GeneratorState generator{static_cast<uint64_t>(seed), static_cast<uint64_t>(offset),
                                 captured(captured_seed, mu), captured(captured_offset, mu),
                                 static_cast<uint64_t*>(key.mutable_data_ptr())};
  return {device.run(kSample, Call(mu, scale, std::nullopt, {form_of(form)}), &generator), key};
}

PyObject* archs(PyObject*, PyObject*) { return PyUnicode_FromString(built_cuda_archs().c_str()); }

PyMethodDef methods[] = {{"archs", archs, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reparam_fused, CUDA, m) {
  Ops<Cuda>::add_to(m);
  m.impl("sample_at", TORCH_BOX(&sample_at));
}

}  // namespace reparam_fused

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&reparam_fused::definition); }
