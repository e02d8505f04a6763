#pragma once

#include "sigma.h"

// softplus and its derivative, over the whole range: no threshold above which the argument
// itself is taken. Each is a polynomial of t = e^-|rho|, which is in [0, 1].

namespace reparam_fused {

template <class V, class R>
REPARAM_FUSED_INLINE R decay(R rho) {
  const R negative = V::from_bits(V::or_(V::bits(rho), V::bits(constant<V, R>(-0.0))));
  return sigma<V>(negative, 1.0f, 2.0f);
}

// ln(1 + t) / t
template <class V>
REPARAM_FUSED_INLINE typename V::F log1p_over(typename V::F t) {
  return horner<V>(t, V::set(-0x1.24b298p-8f), 0x1.9d455ap-6f, -0x1.11708cp-4f, 0x1.d992bcp-4f,
                   -0x1.448ee2p-3f, 0x1.969cb2p-3f, -0x1.ffb95cp-3f, 0x1.55540cp-2f,
                   -0x1.fffffep-2f, 1.0f);
}
template <class V>
REPARAM_FUSED_INLINE typename V::D log1p_over(typename V::D t) {
  return horner<V>(t, V::set(-0x1.80d9a3ccbf91fp-16), 0x1.162ed8469e3cap-12, -0x1.7dec9249c0d60p-10,
                   0x1.4cfe8d6ef2506p-8, -0x1.a1350510338a4p-7, 0x1.9467cbf5e4b32p-6,
                   -0x1.40832de4ea7f0p-5, 0x1.b401d10b0a3fbp-5, -0x1.0a677de2654e4p-4,
                   0x1.30f090840e956p-4, -0x1.522c60f86b9c8p-4, 0x1.7395166f619e2p-4,
                   -0x1.99730ed878462p-4, 0x1.c716c84fc063fp-4, -0x1.ffff6260f5970p-4,
                   0x1.2492430c8c061p-3, -0x1.5555550459f81p-3, 0x1.999999970365cp-3,
                   -0x1.fffffffff4bedp-3, 0x1.55555555554b9p-2, -0x1.0000000000000p-1, 1.0);
}

// ln(1 + e^rho). Valid: every input. NaN stays NaN, +inf gives inf, -inf gives 0, denormals
// are kept. Max error: 3.8 ULP in fp32, 3.5 ULP in fp64.
template <class V, class R>
REPARAM_FUSED_INLINE R softplus(R rho) {
  const R t = decay<V>(rho);
  return V::fma(t, log1p_over<V>(t), V::at_least(rho, 0));
}

// -1 / (1 + t), from an estimate within 2^-14, by Newton's step: a division, which on a GPU has a
// slow path for other divisors, would cost more. Valid: t in [0, 1]. Max error: 0.8 ULP in fp32,
// 0.6 ULP in fp64.
template <class V, class R>
REPARAM_FUSED_INLINE R minus_inverse_of_sum(R t) {
  const R minus_one = constant<V, R>(-1.0);
  R r = horner<V>(t, constant<V, R>(0x1.abf7e8p-4), -0x1.abf7e8p-2, 0x1.8a8888p-1, -0x1.e826c4p-1,
                  0x1.fe17dap-1, -0x1.fff950p-1);
  for (int i = 0; i < (std::is_same<R, typename V::D>::value ? 2 : 1); ++i) {
    r = V::fma(V::fma(t, r, V::sub(r, minus_one)), r, r);
  }
  return r;
}

// 1 / (1 + e^-rho), the derivative: 1 / (1 + t), and t / (1 + t) where rho is negative. Valid:
// every input. NaN stays NaN, +inf gives 1, -inf gives 0, denormals are kept. Max error:
// 3.7 ULP in fp32, 3.4 ULP in fp64.
template <class V, class R>
REPARAM_FUSED_INLINE R sigmoid(R rho) {
  const R t = decay<V>(rho);
  const R minus_one = constant<V, R>(-1.0);
  const R of_sign = V::where_equal(magnitude<V>(rho), rho, minus_one, t);
  return magnitude<V>(V::mul(of_sign, minus_inverse_of_sum<V>(t)));
}

}  // namespace reparam_fused
