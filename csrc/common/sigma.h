#pragma once

#include "normal.h"

// sigma of its logarithm or of its square's.

namespace reparam_fused {

// p and root of sigma = p root^2: p is near 1 and root a power of two, which is finite where sigma
// is not. What is multiplied by one after the other is the product, wherever that is a number.
template <class V>
REPARAM_FUSED_INLINE typename V::F sigma_parts(typename V::F log_var, typename V::F& root,
                                               float factor = 1.0f, float unit = 1.0f) {
  // In units of 1: exp(log_var / 2) = 2^(2 h + t) with t in [-1, 1]. The sum below ends in
  // steps of 2, so its last bits are h + 127, which one shift makes 2^h; two
  // factors 2^h reach every exponent, denormals included, with one rounding.
  // Past 300 even the square of a product with a denormal is inf or 0 already; the clamp keeps h
  // in range.
  const auto x = V::clamp(log_var, 300.0f / unit);
  const auto magic = V::set(0x1.8p24f + 254.0f);
  // log2(e) / 2 in two parts
  const auto high = V::set(unit * 0x1.715476p-1f);
  const auto low = V::set(unit * 0x1.4ae0c0p-27f);
  const auto shifted = V::fma(x, high, magic);
  const auto minus_2h = V::sub(magic, shifted);
  const auto t = V::fma(x, low, V::fma(x, high, minus_2h));
  const auto p =
      horner<V>(t, V::set(factor * 0x1.02e730p-16f), factor * 0x1.47eb04p-13f,
                factor * 0x1.5d81fap-10f, factor * 0x1.3b20eep-7f, factor * 0x1.c6b094p-5f,
                factor * 0x1.ebfbf4p-3f, factor * 0x1.62e430p-1f, factor);
  root = V::from_bits(V::template shl<23>(V::bits(shifted)));
  return p;
}

template <class V>
REPARAM_FUSED_INLINE typename V::D sigma_parts(typename V::D log_var, typename V::D& root,
                                               float factor = 1.0f, float unit = 1.0f) {
  const auto x = V::clamp(log_var, 2240.0 / unit);
  const auto magic = V::set(0x1.8p53 + 2046.0);
  const auto high = V::set(unit * 0x1.71547652b82fep-1);
  const auto low = V::set(unit * 0x1.777d0ffda0d24p-57);
  const auto shifted = V::fma(x, high, magic);
  const auto minus_2h = V::sub(magic, shifted);
  const auto t = V::fma(x, low, V::fma(x, high, minus_2h));
  const auto p = horner<V>(
      t, V::set(factor * 0x1.8441bf9925f7bp-40), factor * 0x1.c7a18f180dd0bp-36,
      factor * 0x1.e8c72def0d7f6p-32, factor * 0x1.e4ca728581d34p-28,
      factor * 0x1.b5253f626f217p-24, factor * 0x1.62c02526eaf10p-20,
      factor * 0x1.ffcbfc5748551p-17, factor * 0x1.430912f6b7aadp-13,
      factor * 0x1.5d87fe78a6c3cp-10, factor * 0x1.3b2ab6fba5c1ep-7, factor * 0x1.c6b08d704a0bep-5,
      factor * 0x1.ebfbdff82c587p-3, factor * 0x1.62e42fefa39efp-1, double{factor});
  root = V::from_bits(V::template shl<52>(V::bits(shifted)));
  return p;
}

// factor exp(unit log_var / 2): both are powers of two and constants, which go into the
// coefficients, exactly, and cost nothing. With a unit of 2 the argument is the logarithm
// itself. Valid: every input. NaN stays NaN, +inf gives inf, -inf gives 0, denormals are
// kept, sigma(0) is exactly 1. Max error: 1.7 ULP in fp32, 1.8 ULP in fp64.
template <class V, class R>
REPARAM_FUSED_INLINE R sigma(R log_var, float factor = 1.0f, float unit = 1.0f) {
  R root;
  const R p = sigma_parts<V>(log_var, root, factor, unit);
  return V::mul(V::mul(p, root), root);
}

}  // namespace reparam_fused
