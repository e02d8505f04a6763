#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <mutex>

#include "../call.h"
#include "launch.h"

// The CUDA side of the ops: device, stream and generator in, one kernel out. No
// synchronisation, and nothing on the device is read here.

namespace reparam_fused {
namespace {

// Before anything is drawn or allocated.
void check_binary(at::Device device) {
  const cudaError_t status = has_cuda_binary();
  if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction) {
    C10_CUDA_CHECK(status);  // of an earlier kernel, it may be
    return;
  }
  (void)cudaGetLastError();  // or the next call of torch would report it
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
  TORCH_CHECK(false, missing_cuda_binary(major, minor), " (", cudaGetErrorString(status), ")");
}

// A call as a kernel takes it: with the operands made contiguous, where they have more
// dimensions than that. All that it allocates, it allocates when it is made.
class Launch {
 public:
  Launch(const at::Tensor& x, const at::Tensor& scale, const std::optional<at::Tensor>& key,
         const Options& options)
      : call_(x, scale, key, options) {
    if (call_.empty() || call_.problem().ndim <= kMaxDims) return;
    dense_.emplace(call_.x().contiguous(), call_.scale().contiguous(), key, options);
    check_dims(*dense_);
  }
  // Noise, which has no operands
  Launch(const at::Tensor& key, at::IntArrayRef size, at::ScalarType dtype, const Options& options)
      : call_(key, size, dtype, options) {
    check_dims(call_);
  }

  const Call& call() const { return call_; }

  template <class Enqueue>
  at::Tensor run(Enqueue enqueue) const {
    if (call_.empty()) return call_.out();
    const Call& call = dense_.has_value() ? *dense_ : call_;
    C10_CUDA_CHECK(enqueue(call.dtype(), call.problem(), c10::cuda::getCurrentCUDAStream()));
    if (dense_.has_value()) call_.out().copy_(dense_->out());
    return call_.out();
  }

 private:
  static void check_dims(const Call& call) {
    TORCH_CHECK(call.empty() || call.problem().ndim <= kMaxDims,
                "reparam_fused: a block or a batch of keys in more than ", kMaxDims, " dimensions");
  }

  Call call_;
  std::optional<Call> dense_;
};

at::Tensor sample_from_key(const at::Tensor& mu, const at::Tensor& scale, const at::Tensor& key,
                           c10::string_view form, at::OptionalIntArrayRef global_shape,
                           at::OptionalIntArrayRef global_offset) {
  const c10::cuda::CUDAGuard guard(mu.device());
  check_binary(mu.device());
  const Launch launch(mu, scale, key, {form, global_shape, global_offset});
  return launch.run([](DType dtype, const Problem& problem, cudaStream_t stream) {
    return sample_cuda(dtype, problem, nullptr, stream);
  });
}

at::Tensor sample_backward(const at::Tensor& grad_z, const std::optional<at::Tensor>& scale,
                           const at::Tensor& key, c10::string_view form,
                           at::OptionalIntArrayRef global_shape,
                           at::OptionalIntArrayRef global_offset) {
  const c10::cuda::CUDAGuard guard(grad_z.device());
  check_binary(grad_z.device());
  const Launch launch(grad_z, backward_operand(grad_z, scale, form), key,
                      {form, global_shape, global_offset});
  return launch.run(sample_backward_cuda);
}

at::Tensor noise(const at::Tensor& key, at::IntArrayRef size, at::ScalarType dtype,
                 at::OptionalIntArrayRef global_shape, at::OptionalIntArrayRef global_offset) {
  const c10::cuda::CUDAGuard guard(key.device());
  check_binary(key.device());
  return Launch(key, size, dtype, {"log_var", global_shape, global_offset}).run(noise_cuda);
}

at::Tensor kl_divergence(const at::Tensor& mu, const at::Tensor& log_var) {
  const c10::cuda::CUDAGuard guard(mu.device());
  check_binary(mu.device());
  return Launch(mu, log_var, std::nullopt, kWithoutNoise).run(kl_divergence_cuda);
}

at::Tensor kl_divergence_backward(const at::Tensor& grad, const at::Tensor& log_var) {
  const c10::cuda::CUDAGuard guard(grad.device());
  check_binary(grad.device());
  return Launch(grad, log_var, std::nullopt, kWithoutNoise).run(kl_divergence_backward_cuda);
}

// The generator's part in a call. It moves on by 4 for each Philox block used, so that
// no counter is one of torch's own ops.
class Draw {
 public:
  Draw(at::CUDAGeneratorImpl* generator, const Call& call, uint64_t* key_out)
      : generator_(generator) {
    const int64_t per_block = call.dtype() == kDouble ? 2 : 4;
    increment_ = 4 * static_cast<uint64_t>((call.out().numel() + per_block - 1) / per_block);
    const std::lock_guard<std::mutex> lock(generator_->mutex_);
    const at::PhiloxCudaState state = generator_->philox_cuda_state(increment_);
    state_ = state.captured_
                 ? GeneratorState{0, state.offset_intragraph_, state.seed_.ptr, state.offset_.ptr,
                                  key_out}
                 : GeneratorState{state.seed_.val, state.offset_.val, nullptr, nullptr, key_out};
  }

  const GeneratorState& state() const { return state_; }

  // For a call that failed: as before it, unless another has drawn since. A failed
  // capture has no state to give back.
  void undo() const {
    const std::lock_guard<std::mutex> lock(generator_->mutex_);
    if (state_.captured_seed == nullptr &&
        generator_->philox_offset_per_thread() == state_.offset + increment_) {
      generator_->set_philox_offset_per_thread(state_.offset);
    }
  }

 private:
  at::CUDAGeneratorImpl* generator_;
  uint64_t increment_;
  GeneratorState state_;
};

std::tuple<at::Tensor, at::Tensor> sample(const at::Tensor& mu, const at::Tensor& scale,
                                          std::optional<at::Generator> generator,
                                          c10::string_view form) {
  const c10::cuda::CUDAGuard guard(mu.device());
  check_binary(mu.device());
  const Launch launch(mu, scale, std::nullopt, {form});
  const auto options = mu.options().dtype(at::kUInt64);
  const at::Tensor key = at::empty({2}, options);
  if (launch.call().empty()) return {launch.call().out(), key};  // which nothing reads
  const Draw draw(at::get_generator_or_default<at::CUDAGeneratorImpl>(
                      generator, at::cuda::detail::getDefaultCUDAGenerator(mu.device().index())),
                  launch.call(), key.mutable_data_ptr<uint64_t>());
  try {
    const auto z = launch.run([&](DType dtype, const Problem& problem, cudaStream_t stream) {
      return sample_cuda(dtype, problem, &draw.state(), stream);
    });
    return {z, key};
  } catch (...) {
    draw.undo();
    throw;
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(reparam_fused, CUDA, m) {
  m.impl("sample", &sample);
  m.impl("sample_from_key", &sample_from_key);
  m.impl("sample_backward", &sample_backward);
  m.impl("noise", &noise);
  m.impl("kl_divergence", &kl_divergence);
  m.impl("kl_divergence_backward", &kl_divergence_backward);
}

}  // namespace reparam_fused

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("archs", &reparam_fused::built_cuda_archs); }
