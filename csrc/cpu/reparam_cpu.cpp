#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../call.h"
#include "dispatch.h"

// The CPU side of the ops: one parallel_for over the kernels.

namespace reparam_fused {
namespace {

// Elements below which a second thread costs more than it brings: about 8 us
// of work.
constexpr int64_t kGrain = 8192;

at::Tensor launch(const KernelTable& kernels, const Call& call) {
  if (call.empty()) return call.out();
  const Kernel kernel = kernels.of[call.dtype()];
  const int64_t numel = call.out().numel();
  const int64_t tiles = (numel + kMaxTile - 1) / kMaxTile;
  at::parallel_for(0, tiles, kGrain / kMaxTile, [&](int64_t begin, int64_t end) {
    kernel(call.problem(), begin * kMaxTile, std::min(end * kMaxTile, numel));
  });
  return call.out();
}

at::Tensor sample_from_key(const at::Tensor& mu, const at::Tensor& scale, const at::Tensor& key,
                           c10::string_view form, at::OptionalIntArrayRef global_shape,
                           at::OptionalIntArrayRef global_offset) {
  return launch(cpu_kernels().sample, Call(mu, scale, key, {form, global_shape, global_offset}));
}

at::Tensor sample_backward(const at::Tensor& grad_z, const std::optional<at::Tensor>& scale,
                           const at::Tensor& key, c10::string_view form,
                           at::OptionalIntArrayRef global_shape,
                           at::OptionalIntArrayRef global_offset) {
  const at::Tensor& operand = backward_operand(grad_z, scale, form);
  return launch(cpu_kernels().sample_backward,
                Call(grad_z, operand, key, {form, global_shape, global_offset}));
}

at::Tensor noise(const at::Tensor& key, at::IntArrayRef size, at::ScalarType dtype,
                 at::OptionalIntArrayRef global_shape, at::OptionalIntArrayRef global_offset) {
  return launch(cpu_kernels().noise,
                Call(key, size, dtype, {"log_var", global_shape, global_offset}));
}

at::Tensor kl_divergence(const at::Tensor& mu, const at::Tensor& log_var) {
  return launch(cpu_kernels().kl_divergence, Call(mu, log_var, std::nullopt, kWithoutNoise));
}

at::Tensor kl_divergence_backward(const at::Tensor& grad, const at::Tensor& log_var) {
  return launch(cpu_kernels().kl_divergence_backward,
                Call(grad, log_var, std::nullopt, kWithoutNoise));
}

}  // namespace

TORCH_LIBRARY_IMPL(reparam_fused, CPU, m) {
  m.impl("sample_from_key", &sample_from_key);
  m.impl("sample_backward", &sample_backward);
  m.impl("noise", &noise);
  m.impl("kl_divergence", &kl_divergence);
  m.impl("kl_divergence_backward", &kl_divergence_backward);
}

}  // namespace reparam_fused
