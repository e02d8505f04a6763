#include "../call.h"
#include "launch.h"

// The CUDA side of the ops: device and stream in, one kernel out. No synchronisation, and
// nothing on the device is read here.

namespace reparam_fused {
namespace {

// Its device and its stream are the current ones. Made before anything is allocated.
class Cuda {
 public:
  explicit Cuda(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    check_binary(device_);
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
        check(aoti_torch_copy_(call.out().get(), dense.out().get(), 0));
        return call.take_out();
      }
    }
    refuse("a block or a batch of keys in more than ", kMaxDims, " dimensions");
  }

  void derive(const Derivation& d) const { reparam_fused::enqueue(d, stream()); }

 private:
  void enqueue(Op op, const Call& call, const GeneratorState* generator) const {
    reparam_fused::enqueue(op, call.dtype(), call.problem(), generator, stream());
  }
  cudaStream_t stream() const {
    const auto stream = torch::stable::accelerator::getCurrentStream(device_);
    return static_cast<cudaStream_t>(stream.nativeHandle());
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reparam_fused, CUDA, m) {
  Ops<Cuda>::add_to(m);
  m.impl("sample_at", TORCH_BOX(&sample_at));
}

}  // namespace reparam_fused
