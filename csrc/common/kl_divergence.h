#pragma once

#include "normal.h"

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

template <class V>
REPARAM_FUSED_INLINE typename V::F magnitude(typename V::F x) {
  return V::from_bits(V::and_(V::bits(x), V::set(0x7fffffffu)));
}
template <class V>
REPARAM_FUSED_INLINE typename V::D magnitude(typename V::D x) {
  return V::from_bits(V::and_(V::bits(x), V::set(uint64_t{0x7fffffffffffffff})));
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

// (mu^2 + sigma^2 - 1 - ln sigma^2) / 2
struct KlDivergence {
  static constexpr bool kReads = true;
  static constexpr bool kDraws = false;
  template <class V, class R>
  static REPARAM_FUSED_INLINE R apply(R mu, R log_var, R) {
    return V::fma(V::mul(mu, constant<V, R>(0.5)), mu, half_excess<V>(log_var));
  }
};

// grad_log_var = grad (sigma^2 - 1) / 2
struct KlDivergenceBackward {
  static constexpr bool kReads = true;
  static constexpr bool kDraws = false;
  template <class V, class R>
  static REPARAM_FUSED_INLINE R apply(R grad, R log_var, R) {
    return V::mul(grad, half_expm1<V>(log_var));
  }
};

}  // namespace reparam_fused
