#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/zeros.h>
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

// The operands made contiguous, where they have more dimensions than a kernel takes.
template <class Launch>
void launch(const Call& call, const std::optional<at::Tensor>& key, const Options& options,
            Launch enqueue) {
  if (call.empty()) return;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (call.problem().ndim <= kMaxDims) {
    C10_CUDA_CHECK(enqueue(call.dtype(), call.problem(), stream));
    return;
  }
  const Call dense(call.x().contiguous(), call.scale().contiguous(), key, options);
  TORCH_CHECK(dense.problem().ndim <= kMaxDims,
              "reparam_fused: a block or a batch of keys in more than ", kMaxDims, " dimensions");
  C10_CUDA_CHECK(enqueue(dense.dtype(), dense.problem(), stream));
  call.out().copy_(dense.out());
}

at::Tensor sample_from_key(const at::Tensor& mu, const at::Tensor& scale, const at::Tensor& key,
                           c10::string_view form, at::OptionalIntArrayRef global_shape,
                           at::OptionalIntArrayRef global_offset) {
  const c10::cuda::CUDAGuard guard(mu.device());
  check_binary(mu.device());
  const Options options{form, global_shape, global_offset};
  const Call call(mu, scale, key, options);
  launch(call, key, options, [](DType dtype, const Problem& problem, cudaStream_t stream) {
    return sample_cuda(dtype, problem, nullptr, stream);
  });
  return call.out();
}

at::Tensor sample_backward(const at::Tensor& grad_z, const std::optional<at::Tensor>& scale,
                           const at::Tensor& key, c10::string_view form,
                           at::OptionalIntArrayRef global_shape,
                           at::OptionalIntArrayRef global_offset) {
  const c10::cuda::CUDAGuard guard(grad_z.device());
  check_binary(grad_z.device());
  const Options options{form, global_shape, global_offset};
  const Call call(grad_z, backward_operand(grad_z, scale, form), key, options);
  launch(call, key, options, sample_backward_cuda);
  return call.out();
}

at::Tensor kl_divergence(const at::Tensor& mu, const at::Tensor& log_var) {
  const c10::cuda::CUDAGuard guard(mu.device());
  check_binary(mu.device());
  const Call call(mu, log_var, std::nullopt, kWithoutNoise);
  launch(call, std::nullopt, kWithoutNoise, kl_divergence_cuda);
  return call.out();
}

at::Tensor kl_divergence_backward(const at::Tensor& grad, const at::Tensor& log_var) {
  const c10::cuda::CUDAGuard guard(grad.device());
  check_binary(grad.device());
  const Call call(grad, log_var, std::nullopt, kWithoutNoise);
  launch(call, std::nullopt, kWithoutNoise, kl_divergence_backward_cuda);
  return call.out();
}

// The generator's (seed, offset / 4); it moves on by 4 for each Philox block used,
// so that no counter is one of torch's own ops.
GeneratorState draw(at::CUDAGeneratorImpl* generator, const Call& call, uint64_t* key_out) {
  const int64_t per_block = call.dtype() == kDouble ? 2 : 4;
  const auto blocks = static_cast<uint64_t>((call.out().numel() + per_block - 1) / per_block);
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  const at::PhiloxCudaState state = generator->philox_cuda_state(4 * blocks);
  if (!state.captured_) {
    return {state.seed_.val, state.offset_.val / 4, nullptr, nullptr, key_out};
  }
  return {0, state.offset_intragraph_, state.seed_.ptr, state.offset_.ptr, key_out};
}

std::tuple<at::Tensor, at::Tensor> sample(const at::Tensor& mu, const at::Tensor& scale,
                                          std::optional<at::Generator> generator,
                                          c10::string_view form) {
  const c10::cuda::CUDAGuard guard(mu.device());
  check_binary(mu.device());
  const Call call(mu, scale, std::nullopt, {form});
  const auto options = mu.options().dtype(at::kUInt64);
  if (call.empty()) return {call.out(), at::zeros({2}, options)};
  const at::Tensor key = at::empty({2}, options);
  const GeneratorState state =
      draw(at::get_generator_or_default<at::CUDAGeneratorImpl>(
               generator, at::cuda::detail::getDefaultCUDAGenerator(mu.device().index())),
           call, key.mutable_data_ptr<uint64_t>());
  launch(call, std::nullopt, {form}, [&](DType dtype, const Problem& problem, cudaStream_t stream) {
    return sample_cuda(dtype, problem, &state, stream);
  });
  return {call.out(), key};
}

}  // namespace

TORCH_LIBRARY_IMPL(reparam_fused, CUDA, m) {
  m.impl("sample", &sample);
  m.impl("sample_from_key", &sample_from_key);
  m.impl("sample_backward", &sample_backward);
  m.impl("kl_divergence", &kl_divergence);
  m.impl("kl_divergence_backward", &kl_divergence_backward);
}

}  // namespace reparam_fused

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("archs", &reparam_fused::built_cuda_archs); }
