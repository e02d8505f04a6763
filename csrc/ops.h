#pragma once

#include "call.h"

namespace reparam_fused {

// The ops that are the same on every device. A Device is made of the first tensor, before
// anything else is done, and runs the kernel of an op.
template <class Device>
struct Ops {
  static Tensor sample_from_key(const Tensor& mu, const Tensor& scale, const Tensor& key,
                                const std::string& form, const std::optional<Sizes>& global_shape,
                                const std::optional<Sizes>& global_offset) {
    const Options options{form_of(form), shape_of(global_shape), shape_of(global_offset)};
    return Device(mu).run(kSample, Call(mu, scale, key, options));
  }

  static Tensor sample_backward(const Tensor& grad_z, const std::optional<Tensor>& scale,
                                const Tensor& key, const std::string& form,
                                const std::optional<Sizes>& global_shape,
                                const std::optional<Sizes>& global_offset) {
    const Options options{backward_form_of(form, scale.has_value()), shape_of(global_shape),
                          shape_of(global_offset)};
    return Device(grad_z).run(kSampleBackward, Call(grad_z, scale.value_or(grad_z), key, options));
  }

  static Tensor noise(const Tensor& key, const Sizes& size, ScalarType dtype,
                      const std::optional<Sizes>& global_shape,
                      const std::optional<Sizes>& global_offset) {
    const Options options{kLogVar, shape_of(global_shape), shape_of(global_offset)};
    return Device(key).run(kNoise, Call(key, size, dtype, options));
  }

  static Tensor kl_divergence(const Tensor& mu, const Tensor& log_var) {
    return Device(mu).run(kKlDivergence, Call(mu, log_var, std::nullopt, kWithoutNoise));
  }

  static Tensor kl_divergence_backward(const Tensor& grad, const Tensor& log_var) {
    return Device(grad).run(kKlDivergenceBackward,
                            Call(grad, log_var, std::nullopt, kWithoutNoise));
  }

  static void add_to(abi::StableLibrary& m) {
    m.impl("sample_from_key", TORCH_BOX(&sample_from_key));
    m.impl("sample_backward", TORCH_BOX(&sample_backward));
    m.impl("noise", TORCH_BOX(&noise));
    m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
    m.impl("kl_divergence_backward", TORCH_BOX(&kl_divergence_backward));
  }
};

}  // namespace reparam_fused
