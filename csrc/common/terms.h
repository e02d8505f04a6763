#pragma once

#include "kl_divergence.h"

// What an element adds to the sum of its row beside its sample: a divergence or a log-density, and
// the gradients of both. They take the scale as one of two: log_var, where that is what it is but
// for a factor; else sigma. So none of them knows of forms.

namespace reparam_fused {

// log_var and sigma of a scale, and from their gradient back to the scale's
template <class Form>
struct ToLogVar {
  static constexpr int kOperands = 1, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits& limits, R* out) {
    out[0] = V::mul(Scale<Form>::template clamp<V>(in[0], limits), constant<V, R>(Form::kLogVar));
  }
};
template <class Form>
struct ToSigma {
  static constexpr int kOperands = 1, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits& limits, R* out) {
    out[0] = Scale<Form>::template to_sigma<V>(in[0], limits);
  }
};
template <class Form>
struct FromLogVar {
  static constexpr int kOperands = 2, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits& limits, R* out) {
    const R grad = V::mul(in[0], constant<V, R>(Form::kLogVar));
    const R clamped = Scale<Form>::template clamp<V>(in[1], limits);
    out[0] = Scale<Form>::template within<V>(grad, in[1], clamped, limits);
  }
};
template <class Form>
struct FromSigma {
  static constexpr int kOperands = 2, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits& limits, R* out) {
    out[0] = Scale<Form>::template chain<V>(in[0], in[1], limits);
  }
};

// Of a log_var
struct ByLogVar {
  template <class V, class R>
  static REPARAM_FUSED_INLINE R excess(R log_var) {
    return half_excess<V>(log_var);
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R excess_backward(R grad, R log_var) {
    return V::mul(grad, half_expm1<V>(log_var));
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R log_sigma(R log_var) {
    return V::mul(log_var, constant<V, R>(0.5));
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R log_sigma_backward(R grad, R) {
    return V::mul(grad, constant<V, R>(0.5));
  }

  // How N(mu, sigma) and N(loc, prior) differ: the difference of the means and of the logarithms,
  // in units of the prior's.
  template <class R>
  struct Ratio {
    R p, root, distance, log;  // p root^2: 1 / prior
  };
  // x p root^2, a number wherever the product is one
  template <class V, class R>
  static REPARAM_FUSED_INLINE R times(R x, R p, R root) {
    return V::mul(V::mul(V::mul(x, root), p), root);
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE Ratio<R> ratio(R mu, R log_var, R loc, R prior) {
    R root;
    const R p = sigma_parts<V>(V::sub(constant<V, R>(0), prior), root);
    return {p, root, times<V>(V::sub(mu, loc), p, root), V::sub(log_var, prior)};
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R excess(const Ratio<R>& ratio, R, R) {
    return half_excess<V>(ratio.log);
  }
  // The gradients of mu, log_var and prior: that of loc is the first's negative.
  template <class V, class R>
  static REPARAM_FUSED_INLINE void backward(R grad, const Ratio<R>& ratio, R, R, R* out) {
    const R slope = half_expm1<V>(ratio.log);
    out[0] = times<V>(V::mul(grad, ratio.distance), ratio.p, ratio.root);
    out[1] = V::mul(grad, slope);
    const R half = V::mul(ratio.distance, constant<V, R>(-0.5));
    out[2] = V::mul(grad, V::sub(V::mul(half, ratio.distance), slope));
  }
};

// Of a sigma, whose sign does not count
struct BySigma {
  template <class V, class R>
  static REPARAM_FUSED_INLINE R excess(R sigma) {
    return half_excess_of_sigma<V>(sigma);
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R excess_backward(R grad, R sigma) {
    return V::mul(grad, half_excess_slope<V>(sigma));
  }
  // ln |sigma|. Valid: every input. NaN stays NaN, both infinities give inf, 0 gives -inf, 1 gives
  // exactly 0, denormals are kept. Max error: 1.2 ULP in fp32, 1.6 ULP in fp64.
  template <class V, class R>
  static REPARAM_FUSED_INLINE R log_sigma(R sigma) {
    const auto log = log_parts<V>(magnitude<V>(sigma));
    const R minus_square = V::mul(log.f, V::sub(constant<V, R>(0), log.f));
    const R log_sigma = V::add(V::fma(minus_square, log.r, log.f), log.rest);
    // NaN and infinity have no exponent.
    const R zero = constant<V, R>(0);
    return V::where_equal(V::mul(sigma, zero), zero, log_sigma, magnitude<V>(sigma));
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R log_sigma_backward(R grad, R sigma) {
    return V::div(grad, sigma);
  }

  template <class R>
  struct Ratio {
    R unit, distance, over;  // over: the ratio of the sigmas less 1
  };
  template <class V, class R>
  static REPARAM_FUSED_INLINE Ratio<R> ratio(R mu, R sigma, R loc, R prior) {
    const R t = magnitude<V>(prior);
    // Of equal means 0 even where the prior has no width
    const R unit = V::at_least(t, number<V, R>(0x1p-1074, 0x1p-149));
    return {unit, V::div(V::sub(mu, loc), unit), over_one<V>(magnitude<V>(sigma), t)};
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R excess(const Ratio<R>& ratio, R sigma, R prior) {
    return half_excess_of_ratio<V>(magnitude<V>(sigma), magnitude<V>(prior), ratio.over);
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE void backward(R grad, const Ratio<R>& ratio, R sigma, R prior,
                                            R* out) {
    // sigma^2 / prior^2 - 1
    const R square = V::mul(ratio.over, V::add(ratio.over, constant<V, R>(2)));
    out[0] = V::div(V::mul(grad, ratio.distance), ratio.unit);
    out[1] = V::div(V::mul(grad, square), sigma);
    const R both = V::fma(ratio.distance, ratio.distance, square);
    out[2] = V::div(V::mul(grad, V::sub(constant<V, R>(0), both)), prior);
  }
};

// A term and its gradients: of operands, of which the scales are what By takes. The operand after
// those of a backward is the gradient of the sum.

// The divergence from N(0, 1). The backward adds the gradient of mu to that of the sample, its last
// operand, and gives that of the scale.
template <class By>
struct KlTerm {
  static constexpr int kOperands = 2, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits&, R* out) {
    out[0] = V::fma(V::mul(in[0], constant<V, R>(0.5)), in[0], By::template excess<V>(in[1]));
  }
};
template <class By>
struct KlTermBackward {
  static constexpr int kOperands = 4, kResults = 2;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits&, R* out) {
    out[0] = V::fma(in[2], in[0], in[3]);
    out[1] = By::template excess_backward<V>(in[2], in[1]);
  }
};

// That from a prior: of mu, the scale, loc and the prior's scale. The backward gives the gradients
// of mu, of the scale and of the prior's scale. Max error where the sigmas are within a factor of
// 1.4 of each other, down to the smallest divergence: of sigmas 4.3 ULP in fp32 and 4 ULP in fp64,
// of two log_var 8 ULP and 8 ULP.
template <class By>
struct PriorTerm {
  static constexpr int kOperands = 4, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits&, R* out) {
    const auto ratio = By::template ratio<V>(in[0], in[1], in[2], in[3]);
    out[0] = V::fma(V::mul(ratio.distance, constant<V, R>(0.5)), ratio.distance,
                    By::template excess<V>(ratio, in[1], in[3]));
  }
};
template <class By>
struct PriorTermBackward {
  static constexpr int kOperands = 5, kResults = 3;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits&, R* out) {
    const auto ratio = By::template ratio<V>(in[0], in[1], in[2], in[3]);
    By::template backward<V>(in[4], ratio, in[1], in[3], out);
  }
};

// The log-density of the sample itself, -eps^2 / 2 - ln sigma - ln(2 pi) / 2: of the scale. The
// backward gives the scale's gradient, what autograd gives of log_prob(rsample()): that of mu is 0.
template <class By>
struct LogProbTerm {
  static constexpr int kOperands = 1, kResults = 1;
  static constexpr bool kDraws = true;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R eps, const Limits&, R* out) {
    const R rest = V::sub(constant<V, R>(-0.918938533204672742), By::template log_sigma<V>(in[0]));
    out[0] = V::fma(V::mul(eps, constant<V, R>(-0.5)), eps, rest);
  }
};
template <class By>
struct LogProbTermBackward {
  static constexpr int kOperands = 2, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits&, R* out) {
    const R minus = V::sub(constant<V, R>(0), in[1]);
    out[0] = By::template log_sigma_backward<V>(minus, in[0]);
  }
};

// tanh z, by t = e^-2|z| and -1 / (1 + t). Valid: every input. NaN stays NaN, the infinities give 1
// and -1, denormals are kept. Max error: 2.8 ULP in fp32 and 2.9 ULP in fp64, of t 1.7 ULP and
// 1.9 ULP.
template <class R>
struct TanhParts {
  R size, t, inverse, tanh;
};
template <class V, class R>
REPARAM_FUSED_INLINE TanhParts<R> tanh_parts(R z) {
  const R size = magnitude<V>(z), minus_two = constant<V, R>(-2.0);
  const R x = V::mul(size, minus_two);
  const R t = sigma<V>(x, 1.0f, 2.0f), inverse = minus_inverse_of_sum<V>(t);
  const R half = V::mul(half_expm1<V>(x), inverse);
  // Of 0 it is +0.
  const R of_size = V::fma(half, constant<V, R>(2.0), constant<V, R>(0));
  const R minus = V::sub(constant<V, R>(-0.0), of_size);
  return {size, t, inverse, V::where_equal(size, z, of_size, minus)};
}

// Of a sample z and its log-density: a = tanh z and the log-density of a, which is less by
// ln(1 - a^2) = 2 (ln 2 - z - softplus(-2 z)). Max error of that: 2.5e-7 absolute in fp32 and
// 3.6e-16 absolute in fp64 for |z| <= 1, beyond 1.4 ULP and 1.8 ULP.
struct Tanh {
  static constexpr int kOperands = 2, kResults = 2;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits&, R* out) {
    const auto parts = tanh_parts<V>(in[0]);
    const R near = V::sub(constant<V, R>(0.693147180559945309), parts.size);
    const R minus_t = V::sub(constant<V, R>(0), parts.t);
    const R log = V::fma(minus_t, log1p_over<V>(parts.t), near);
    out[0] = parts.tanh;
    out[1] = V::fma(log, constant<V, R>(-2.0), in[1]);
  }
};
// The gradient of z, of those of a and of its log-density. Max error of 1 - a^2, which does not
// cancel: 4.7 ULP in fp32 and 4.7 ULP in fp64.
struct TanhBackward {
  static constexpr int kOperands = 3, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits&, R* out) {
    const auto parts = tanh_parts<V>(in[1]);
    const R four_t = V::mul(parts.t, constant<V, R>(4.0));
    const R slope = V::mul(V::mul(four_t, parts.inverse), parts.inverse);
    out[0] = V::fma(in[0], slope, V::mul(V::add(parts.tanh, parts.tanh), in[2]));
  }
};

}  // namespace reparam_fused
