#pragma once

#include <cmath>

#include "reparam.h"

// The divergence of N(mu, sigma) from N(0, 1): without noise, on the loops of the rest.

namespace reparam_fused {

// e^x = 8 scale (1 + f + square r), with 8 scale = 2^(2 h) and f in [-ln 2, ln 2] but
// for rounding, so that what is near 1 can be taken off before it swallows the rest.
template <class R>
struct ExpParts {
  R scale, f, square, r;
};

template <class V>
REPARAM_FUSED_INLINE ExpParts<typename V::F> exp_parts(typename V::F x) {
  // A sum in steps of 2, as in sigma. At 90 half of e^x is inf already, less the largest
  // number too; at -90 it is lost on -1. The eighth keeps the scale finite up to there.
  const auto clamped = V::clamp(x, 90.0f);
  const auto magic = V::set(0x1.8p24f + 254.0f);
  const auto shifted = V::fma(clamped, V::set(0x1.715476p+0f), magic);
  const auto minus_2h = V::sub(magic, shifted);
  // ln 2 in two parts
  const auto f =
      V::fma(minus_2h, V::set(-0x1.05c610p-29f), V::fma(minus_2h, V::set(0x1.62e430p-1f), clamped));
  const auto r = horner<V>(f, V::set(0x1.a401b0p-16f), 0x1.a4fcc0p-13f, 0x1.6c1300p-10f,
                           0x1.110c5ep-7f, 0x1.555558p-5f, 0x1.55555ap-3f, 0x1.000000p-1f);
  const auto root = V::from_bits(V::template shl<23>(V::bits(shifted)));
  return {V::mul(V::mul(root, V::set(0.125f)), root), f, V::mul(f, f), r};
}

template <class V>
REPARAM_FUSED_INLINE ExpParts<typename V::D> exp_parts(typename V::D x) {
  const auto clamped = V::clamp(x, 711.0);
  const auto magic = V::set(0x1.8p53 + 2046.0);
  const auto shifted = V::fma(clamped, V::set(0x1.71547652b82fep+0), magic);
  const auto minus_2h = V::sub(magic, shifted);
  const auto f = V::fma(minus_2h, V::set(0x1.abc9e3b39803fp-56),
                        V::fma(minus_2h, V::set(0x1.62e42fefa39efp-1), clamped));
  const auto r = horner<V>(f, V::set(0x1.b12a9db4f807fp-41), 0x1.966da1182d481p-37,
                           0x1.61229d567a25bp-33, 0x1.1eebaea3fb1b7p-29, 0x1.ae6457a7878c3p-26,
                           0x1.27e4fcb26a5abp-22, 0x1.71de3a5508cebp-19, 0x1.a01a019f46261p-16,
                           0x1.a01a01a01a219p-13, 0x1.6c16c16c17055p-10, 0x1.1111111111111p-7,
                           0x1.5555555555554p-5, 0x1.5555555555555p-3, 0x1.0000000000000p-1);
  const auto root = V::from_bits(V::template shl<52>(V::bits(shifted)));
  return {V::mul(V::mul(root, V::set(0.125)), root), f, V::mul(f, f), r};
}

// (e^x - 1 - x) / 2. Valid: every input. NaN stays NaN, both infinities give inf, 0 gives
// exactly 0. Max error: 3.3 ULP in fp32, 4.8 ULP in fp64.
template <class V, class R>
REPARAM_FUSED_INLINE R half_excess(R x) {
  const auto e = exp_parts<V>(x);
  const R linear = V::fma(e.scale, e.f, V::sub(e.scale, constant<V, R>(0.125)));
  const R sum = V::fma(e.scale, V::mul(e.square, e.r), V::fma(x, constant<V, R>(-0.125), linear));
  // Never negative, but where e^x was clamped and x is inf.
  return V::mul(magnitude<V>(sum), constant<V, R>(4.0));
}

// (e^x - 1) / 2. Valid: every input. NaN stays NaN, -inf gives -1/2, 0 gives exactly 0.
// Max error: 2.0 ULP in fp32, 1.6 ULP in fp64.
template <class V, class R>
REPARAM_FUSED_INLINE R half_expm1(R x) {
  const auto e = exp_parts<V>(x);
  const R sum = V::fma(e.scale, V::fma(e.square, e.r, e.f), V::sub(e.scale, constant<V, R>(0.125)));
  return V::mul(sum, constant<V, R>(4.0));
}

// ln s = rest + f - f^2 r, with f as in split
template <class R>
struct LogParts {
  R f, r, rest;
};

// Of a normal s; shift is added to the logarithm.
template <class V>
REPARAM_FUSED_INLINE LogParts<typename V::F> log_parts(typename V::F s, typename V::F shift) {
  typename V::F f;
  const auto exponent = split<V>(s, f);
  const auto r =
      horner<V>(f, V::set(0x1.3a4ff6p-4f), -0x1.048f72p-3f, 0x1.0cda32p-3f, -0x1.22ea5ap-3f,
                0x1.548382p-3f, -0x1.99a012p-3f, 0x1.00020cp-2f, -0x1.555554p-2f, 0x1.fffffep-2f);
  return {f, r, V::fma(exponent, V::set(0x1.62e430p-24f), shift)};
}

template <class V>
REPARAM_FUSED_INLINE LogParts<typename V::D> log_parts(typename V::D s, typename V::D shift) {
  typename V::D f;
  const auto exponent = split<V>(s, f);
  const auto r = horner<V>(
      f, V::set(0x1.8e8f5f6d78efbp-6), -0x1.ceab3eecb74d9p-5, 0x1.fc84a09888c57p-5,
      -0x1.bb08e0be73d94p-5, 0x1.b635ac30a3dacp-5, -0x1.dd3093b701211p-5, 0x1.00b0e81fd59f4p-4,
      -0x1.115b4daceee38p-4, 0x1.248b2a78bff20p-4, -0x1.3b0eda8f5d75cp-4, 0x1.55556c388aeddp-4,
      -0x1.745d460eacbc4p-4, 0x1.99999a6364b62p-4, -0x1.c71c70c1303cbp-4, 0x1.fffffff7e955cp-4,
      -0x1.249249261f2ccp-3, 0x1.5555555561dddp-3, -0x1.999999999772bp-3, 0x1.fffffffffff34p-3,
      -0x1.555555555555cp-2, 0x1.0000000000000p-1);
  return {f, r, V::fma(exponent, V::set(0x1.62e42fefa39efp-1), shift)};
}

// Of every s but a negative one. Denormals, whose exponent does not say where they are, are
// made normal first, and the logarithm of that power of two taken off again.
template <class V, class R>
REPARAM_FUSED_INLINE LogParts<R> log_parts(R s) {
  const R small = V::at_most(s, number<V, R>(0x1p-1022, 0x1p-126)), zero = constant<V, R>(0);
  const R none = V::where_equal(s, zero, constant<V, R>(-INFINITY), zero);
  const R less = V::sub(none, constant<V, R>(0x1.25e4f7b2737fap+5, 0x1.0a2b24p+4));
  const R normal = V::mul(s, constant<V, R>(0x1p53, 0x1p24));
  return log_parts<V>(V::where_equal(s, small, normal, s), V::where_equal(s, small, less, none));
}

// (s^2 - 1 - ln s^2) / 2, of a std and of its negative. Valid: every input. NaN stays NaN,
// both infinities and 0 give inf, 1 gives exactly 0, denormals are kept. Max error:
// 2.1 ULP in fp32, 3.4 ULP in fp64.
template <class V, class R>
REPARAM_FUSED_INLINE R half_excess_of_sigma(R s) {
  const R std = magnitude<V>(s);
  const auto log = log_parts<V>(std);
  // With a = s - 1 it is a^2 / 2 + (a - f) - rest + f^2 r, and near 1, where a is f and the
  // rest 0, two positive terms.
  const R a = V::sub(std, constant<V, R>(1.0));
  const R linear = V::sub(V::sub(a, log.f), log.rest);
  const R sum = V::fma(V::mul(log.f, log.f), log.r, linear);
  return V::fma(V::mul(a, constant<V, R>(0.5)), a, sum);
}

// s / t - 1 of two stds, with more digits than the ratio has near 1; of an infinite t too
template <class V, class R>
REPARAM_FUSED_INLINE R over_one(R s, R t) {
  const R apart = V::sub(s, t);
  return V::where_equal(apart, constant<V, R>(-INFINITY), constant<V, R>(-1.0), V::div(apart, t));
}

// (x^2 - 1 - ln x^2) / 2 of x = s / t, two stds, and of over = x - 1. Valid: every input that is
// not negative, also where x is no number of the type. NaN stays NaN; 0 and infinity give inf, two
// of them NaN. Max error, with that of over as over_one rounds it: 3.8 ULP in fp32 and 3.5 ULP in
// fp64 for x in [sqrt(1/2), sqrt(2)), over the whole range 4.6 ULP and 4.6 ULP.
template <class V, class R>
REPARAM_FUSED_INLINE R half_excess_of_ratio(R s, R t, R over) {
  const R zero = constant<V, R>(0);
  // Where x may be no normal number, it is one in other units of both. The addend, which keeps t
  // from 0, is lost there.
  const R up = V::mul(s, constant<V, R>(0x1p600, 0x1p76));
  const R least = constant<V, R>(0x1p-1074, 0x1p-149);
  const R down = V::fma(t, constant<V, R>(0x1p-600, 0x1p-76), least);
  const R far = V::add(s, down);
  const R x = V::div(V::where_equal(far, down, up, s), V::where_equal(far, down, down, t));
  const R units = constant<V, R>(-0x1.9fe3682cd3be4p+9, -0x1.a56ef8p+6);
  const R shift = V::where_equal(far, down, units, zero);
  const auto log = log_parts<V>(x, V::where_equal(x, zero, constant<V, R>(-INFINITY), shift));
  // Near 1 it is the logarithm of over + 1, whose rounding is that of the rest.
  const R near = V::at_least(V::at_most(over, number<V, R>(2.0)), number<V, R>(-0.5));
  const R power = inverse_power<V>(x);
  const R of_over = V::fma(power, over, V::sub(power, constant<V, R>(1.0)));
  const R f = V::where_equal(over, near, of_over, log.f);
  const R linear = V::sub(V::sub(over, log.rest), f);
  const R sum = V::fma(V::mul(f, f), log.r, linear);
  return V::fma(V::mul(over, constant<V, R>(0.5)), over, sum);
}

// s - 1 / s, its derivative. Valid: every input. NaN stays NaN, both infinities stay, 0 gives
// inf of the other sign, 1 and -1 exactly 0. Max error: 2.5 ULP in fp32, 2.6 ULP in fp64.
template <class V, class R>
REPARAM_FUSED_INLINE R half_excess_slope(R s) {
  // (|s| - 1) (sign + 1 / s), of which near 1 and -1 neither factor cancels
  const R std = magnitude<V>(s);
  const R one = constant<V, R>(1.0), minus_one = constant<V, R>(-1.0);
  const R sign = V::where_equal(std, s, one, minus_one);
  return V::mul(V::sub(std, one), V::sub(sign, V::div(minus_one, s)));
}

// (sigma^2 - 1 - ln sigma^2) / 2 of a scale within limits, and the chain rule from its gradient
// back to the scale: where log_var is what is given, without sigma.
template <class Form>
struct ExcessOf {
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE R apply(R x, const Limits& limits) {
    if constexpr (Form::kLogVar != 0) {
      if (!raised(limits))
        return half_excess<V>(log_var<V>(Scale<Form>::template clamp<V>(x, limits)));
    }
    return half_excess_of_sigma<V>(Scale<Form>::template to_sigma<V>(x, limits));
  }
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE R chain(R grad, R x, const Limits& limits) {
    const R clamped = Scale<Form>::template clamp<V>(x, limits);
    R result;
    if (Form::kLogVar != 0 && !raised(limits)) {
      const R slope = half_expm1<V>(log_var<V>(clamped));
      result =
          V::mul(grad, Form::kLogVar == 1 ? slope : V::mul(slope, constant<V, R>(Form::kLogVar)));
    } else {
      const R sigma = Scale<Form>::template to_sigma<V>(x, limits);
      result = Form::template chain<V>(V::mul(grad, half_excess_slope<V>(sigma)), clamped);
    }
    return Scale<Form>::template within<V>(result, x, clamped, limits);
  }

 private:
  template <class Limits>
  static REPARAM_FUSED_INLINE bool raised(const Limits& limits) {
    if constexpr (Limits::kBounded) return limits.min_std != 0;
    return false;
  }
  template <class V, class R>
  static REPARAM_FUSED_INLINE R log_var(R x) {
    return Form::kLogVar == 1 ? x : V::mul(x, constant<V, R>(Form::kLogVar));
  }
};

// (mu^2 + sigma^2 - 1 - ln sigma^2) / 2
template <class Form>
struct KlDivergence {
  static constexpr int kOperands = 2, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits& limits, R* out) {
    const R excess = ExcessOf<Form>::template apply<V>(in[1], limits);
    out[0] = V::fma(V::mul(in[0], constant<V, R>(0.5)), in[0], excess);
  }
};

// Of the scale: the gradient of the divergence, times what comes in
template <class Form>
struct KlDivergenceBackward {
  static constexpr int kOperands = 2, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits& limits, R* out) {
    out[0] = ExcessOf<Form>::template chain<V>(in[0], in[1], limits);
  }
};

}  // namespace reparam_fused
