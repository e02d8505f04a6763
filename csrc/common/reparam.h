#pragma once

#include "problem.h"
#include "softplus.h"

// What is done with the noise: the forms of the scale, and the passes over them. A further form of
// the scale is a further struct in the list of forms, a further output a further struct
// below it: not a further loop.

namespace reparam_fused {

// What a scale is given as: sigma of it, and the chain rule back to it, which may need the scale
// again. kLogVar is how much of log_var, ln sigma^2, a unit of the scale is; 0: it is another
// function.
struct LogVar {
  static constexpr const char* kName = "log_var";
  static constexpr bool kBackwardReads = true;
  static constexpr float kLogVar = 1.0f;
  template <class V, class R>
  static REPARAM_FUSED_INLINE R to_sigma(R log_var) {
    return sigma<V>(log_var);
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R chain(R grad_sigma, R log_var) {
    return V::mul(grad_sigma, sigma<V>(log_var, 0.5f));
  }
};
struct Std {
  static constexpr const char* kName = "std";
  static constexpr bool kBackwardReads = false;
  static constexpr float kLogVar = 0.0f;
  template <class V, class R>
  static REPARAM_FUSED_INLINE R to_sigma(R std) {
    return std;
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R chain(R grad_sigma, R) {
    return grad_sigma;
  }
};
struct LogStd {
  static constexpr const char* kName = "log_std";
  static constexpr bool kBackwardReads = true;
  static constexpr float kLogVar = 2.0f;
  template <class V, class R>
  static REPARAM_FUSED_INLINE R to_sigma(R log_std) {
    return sigma<V>(log_std, 1.0f, 2.0f);
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R chain(R grad_sigma, R log_std) {
    return V::mul(grad_sigma, to_sigma<V>(log_std));
  }
};
// sigma = ln(1 + e^rho) (Blundell et al., Weight Uncertainty in Neural Networks, 2015)
struct Rho {
  static constexpr const char* kName = "rho";
  static constexpr bool kBackwardReads = true;
  static constexpr float kLogVar = 0.0f;
  template <class V, class R>
  static REPARAM_FUSED_INLINE R to_sigma(R rho) {
    return softplus<V>(rho);
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R chain(R grad_sigma, R rho) {
    return V::mul(grad_sigma, sigmoid<V>(rho));
  }
};

template <class... F>
struct FormList {
  static constexpr int kSize = sizeof...(F);
  static constexpr const char* kNames[] = {F::kName...};
  static constexpr bool kBackwardReads[] = {F::kBackwardReads...};
  static constexpr float kLogVars[] = {F::kLogVar...};
};

// All there are: every kernel takes each of them. The place of a form in this list is its
// number.
using Forms = FormList<LogVar, Std, LogStd, Rho>;

// A form of the scale within limits, which are Bounds or Unbounded. NaN passes a clamp, whose
// gradient is 0 outside of it and for NaN, as that of torch.clamp.
template <class Form>
struct Scale {
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE R clamp(R x, const Limits& limits) {
    if constexpr (Limits::kBounded) {
      x = V::at_most(V::at_least(x, number<V, R>(limits.low)), number<V, R>(limits.high));
    }
    return x;
  }
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE R to_sigma(R x, const Limits& limits) {
    R sigma = Form::template to_sigma<V>(clamp<V>(x, limits));
    if constexpr (Limits::kBounded) {
      if (limits.given()) sigma = V::add(sigma, constant<V, R>(limits.min_std));
    }
    return sigma;
  }
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE R chain(R grad_sigma, R x, const Limits& limits) {
    const R clamped = clamp<V>(x, limits);
    return within<V>(Form::template chain<V>(grad_sigma, clamped), x, clamped, limits);
  }
  // The gradient of the scale from that of the clamped scale
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE R within(R grad, R x, R clamped, const Limits& limits) {
    if constexpr (Limits::kBounded) {
      if (limits.given()) grad = V::where_equal(x, clamped, grad, constant<V, R>(0));
    }
    return grad;
  }
};

// An op is what is made of the operands and the noise of an element. kDraws: whether it makes use
// of noise.

// z = mu + sigma eps
template <class Form>
struct Sample {
  static constexpr int kOperands = 2, kResults = 1;
  static constexpr bool kDraws = true;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R eps, const Limits& limits, R* out) {
    out[0] = V::fma(Scale<Form>::template to_sigma<V>(in[1], limits), eps, in[0]);
  }
};

// grad_scale = grad_z * d z / d scale, with d z / d sigma = eps
template <class Form>
struct SampleBackward {
  static constexpr int kOperands = 2, kResults = 1;
  static constexpr bool kDraws = true;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R eps, const Limits& limits, R* out) {
    out[0] = Scale<Form>::template chain<V>(V::mul(in[0], eps), in[1], limits);
  }
};

// eps itself
struct Noise {
  static constexpr int kOperands = 0, kResults = 1;
  static constexpr bool kDraws = true;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R*, R eps, const Limits&, R* out) {
    out[0] = eps;
  }
};

// K samples of each element: what does not depend on the noise is made once, each sample is one of
// the form Std of it, and the backward sums over them, from the first on.

// mu and sigma
template <class Form>
struct Moments {
  static constexpr int kOperands = 2, kResults = 2;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits& limits, R* out) {
    out[0] = in[0];
    out[1] = Scale<Form>::template to_sigma<V>(in[1], limits);
  }
};

// Of the gradient of a sample and the sums so far: the sums with it
struct AddSample {
  static constexpr int kOperands = 3, kResults = 2;
  static constexpr bool kDraws = true;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R eps, const Limits&, R* out) {
    out[0] = V::add(in[1], in[0]);
    out[1] = V::fma(in[0], eps, in[2]);
  }
};

// Of the sums over all samples: the gradients
template <class Form>
struct Gradients {
  static constexpr int kOperands = 3, kResults = 2;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits& limits, R* out) {
    out[0] = in[0];
    out[1] = Scale<Form>::template chain<V>(in[1], in[2], limits);
  }
};

}  // namespace reparam_fused
