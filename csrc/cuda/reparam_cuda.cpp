#include "../call.h"
#include "launch.h"

// The CUDA side of the ops: device and stream in, one kernel out. No synchronisation, and
// nothing on the device is read here.

namespace reparam_fused {
namespace {

// An op whose first argument is on a device that these kernels do not serve is its overload's in
// Python, which takes the same arguments off the stack.
template <Boxed boxed>
const char* name_of = nullptr;
template <Boxed boxed>
void run_where_served(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  int32_t device;
  check(aoti_torch_get_device_index(abi::to<AtenTensorHandle>(stack[0]), &device));
  if (cuda_refusal(device) == nullptr) return boxed(stack, n_arguments, n_results);
  check(torch_call_dispatcher(name_of<boxed>, "python", stack, TORCH_ABI_VERSION));
}

// Its device and its stream are the current ones. Made before anything is allocated.
struct Cuda {
  explicit Cuda(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {}

  Tensor run(Op op, Call&& call, const Generator* generator = nullptr) const {
    if (call.numel() > 0 && (op == kHead || op == kHeadBackward)) {
      const Problem& p = call.problem();
      const int64_t one = 1, bytes = head_workspace(call.dtype(), call.numel() / p.row, p.row);
      const Owned workspace = empty({1, &bytes, &one}, aoti_torch_dtype_uint8(), call.device());
      void* memory;
      check(torch_get_mutable_data_ptr(workspace.get(), &memory));
      launch_head_on_cuda(op, call.dtype(), p, memory, device_, stream());
    } else if (call.numel() > 0) {
      launch_on_cuda(op, call.dtype(), call.problem(), generator, device_, stream());
    }
    return call.take_out();
  }
  template <Boxed boxed>
  static void add(abi::StableLibrary& m, const char* name) {
    name_of<boxed> = name;
    m.impl(name, &run_where_served<boxed>);
  }
  void derive(const Derivation& d) const { launch_on_cuda(d, device_, stream()); }

 private:
  CudaStream stream() const {
    return torch::stable::accelerator::getCurrentStream(device_).nativeHandle();
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
                                     const std::optional<Tensor>& captured_offset, Text form,
                                     Numbers bounds, Count samples) {
  const Cuda device(mu);
  if (captured_seed.has_value() != captured_offset.has_value()) {
    refuse("expected captured_seed and captured_offset, or neither");
  }
  const Tensor key(empty_key(mu).release());
  const Generator generator{static_cast<uint64_t>(seed), static_cast<uint64_t>(offset),
                            captured(captured_seed, mu), captured(captured_offset, mu),
                            static_cast<uint64_t*>(key.mutable_data_ptr())};
  Call call(mu, scale, std::nullopt, with_samples(options_of(form_of(form), bounds), samples));
  return {device.run(kSample, std::move(call), &generator), key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reparam_fused, CUDA, m) {
  Ops<Cuda>::add_to(m);
  Cuda::add<TORCH_BOX(&sample_at)>(m, "reparam_fused::sample_at");
}

}  // namespace reparam_fused
