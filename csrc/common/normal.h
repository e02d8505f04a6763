#pragma once

#include <type_traits>

#include "philox.h"

// Philox words to normals: Box-Muller, in one written order of IEEE operations,
// so that every backend computes the same bits. Each polynomial is printed by
// coefficients.py. Lane i holds the words of its own counter; in fp32 a counter
// gives four normals, in fp64 two.
//
// An error is against the real-valued function of the same input, over all 2^32
// inputs in fp32 and over 2^26 random ones in fp64. tests/test_numerics.py reads
// the figures below, and holds the code to them.

namespace reparam_fused {

// A number in the precision of R, or of two that of it, rounded where that does not hold it; and in
// every lane.
template <class V, class R>
REPARAM_FUSED_INLINE auto number(double of_double, double of_float) {
  if constexpr (std::is_same<R, typename V::D>::value) {
    return of_double;
  } else {
    return static_cast<float>(of_float);
  }
}
template <class V, class R>
REPARAM_FUSED_INLINE auto number(double value) {
  return number<V, R>(value, value);
}
template <class V, class R, class... Values>
REPARAM_FUSED_INLINE R constant(Values... values) {
  return V::set(number<V, R>(values...));
}

// p * y^k + c * y^(k-1) + ..., highest power first, one fma a coefficient.
template <class V, class R>
REPARAM_FUSED_INLINE R horner(R, R p) {
  return p;
}
template <class V, class R, class C, class... Rest>
REPARAM_FUSED_INLINE R horner(R y, R p, C c, Rest... rest) {
  return horner<V>(y, V::fma(p, y, constant<V, R>(c)), rest...);
}

template <class V>
REPARAM_FUSED_INLINE typename V::F magnitude(typename V::F x) {
  return V::from_bits(V::and_(V::bits(x), V::set(0x7fffffffu)));
}
template <class V>
REPARAM_FUSED_INLINE typename V::D magnitude(typename V::D x) {
  return V::from_bits(V::and_(V::bits(x), V::set(uint64_t{0x7fffffffffffffff})));
}

// The exponent e of u = 2^e (1 + f) where it is in the word of a float, with 1 + f in
// [sqrt(1/2), sqrt(2)); and 2^-e.
template <class V>
REPARAM_FUSED_INLINE typename V::U exponent_of(typename V::F u) {
  return V::and_(V::sub(V::bits(u), V::set(0x3f3504f3u)), V::set(0xff800000u));
}
template <class V>
REPARAM_FUSED_INLINE typename V::Q exponent_of(typename V::D u) {
  return V::and_(V::sub(V::bits(u), V::set(uint64_t{0x3fe6a09e667f3bcd})),
                 V::set(uint64_t{0xfff0000000000000}));
}
template <class V>
REPARAM_FUSED_INLINE typename V::F inverse_power(typename V::F u) {
  return V::from_bits(V::sub(V::set(0x3f800000u), exponent_of<V>(u)));
}
template <class V>
REPARAM_FUSED_INLINE typename V::D inverse_power(typename V::D u) {
  return V::from_bits(V::sub(V::set(uint64_t{0x3ff0000000000000}), exponent_of<V>(u)));
}

// f and 2^23 e of u = 2^e (1 + f), exactly, with 1 + f in [sqrt(1/2), sqrt(2)): the exponent
// stays in its place in the word. Valid: every normal u, and inf, which gives e = 128, f = 0.
template <class V>
REPARAM_FUSED_INLINE typename V::F split(typename V::F u, typename V::F& f) {
  const auto exponent = exponent_of<V>(u);
  f = V::sub(V::from_bits(V::sub(V::bits(u), exponent)), V::set(1.0f));
  return V::signed_to_float(exponent);
}

// The same in fp64, but e itself.
template <class V>
REPARAM_FUSED_INLINE typename V::D split(typename V::D u, typename V::D& f) {
  const auto exponent = exponent_of<V>(u);
  f = V::sub(V::from_bits(V::sub(V::bits(u), exponent)), V::set(1.0));
  // No 64-bit integer conversion below AVX-512: 1024 + e is put into the low
  // mantissa bits of 2^52, and taken off again.
  const auto biased = V::template shr<52>(V::add(exponent, V::set(uint64_t{1024} << 52)));
  return V::sub(V::from_bits(V::or_(biased, V::set(uint64_t{0x4330000000000000}))),
                V::set(0x1p52 + 1024));
}

// u = (w + 1/2) / 2^32, in [2^-33, 1]: a radius reaches 6.76, and u rounds to 1
// for the 128 largest words. Valid: every word. Max error: 0.75 ULP.
template <class V>
REPARAM_FUSED_INLINE typename V::F uniform(typename V::U w) {
  return V::fma(V::to_float(w), V::set(0x1p-32f), V::set(0x1p-33f));
}

// sqrt(-2 ln u), but 2^-30 for u = 1. Valid: u in [2^-33, 1]. Max error: 1.66 ULP.
template <class V>
REPARAM_FUSED_INLINE typename V::F radius(typename V::F u) {
  typename V::F f;
  const auto exponent = split<V>(u, f);
  const auto q =
      horner<V>(f, V::set(-0x1.5d8646p-3f), 0x1.243c02p-2f, -0x1.32bcb8p-2f, 0x1.53846ep-2f,
                -0x1.98b290p-2f, 0x1.00038cp-1f, -0x1.555796p-1f, 0x1.fffffep-1f, -0x1.000000p+1f);
  // -2 ln2 * 2^-23. The 2^-60 is lost on any sum but that of u = 1: a root that is
  // never taken of 0 needs no guard on a GPU.
  const auto scaled = V::fma(exponent, V::set(-0x1.62e430p-23f), V::set(0x1p-60f));
  return V::sqrt(V::fma(f, q, scaled));
}

// cos and sin of 2 pi w / 2^32, but for a common sign, which is the top bit of
// what is returned: it costs one operation, on the radius that they share.
// Valid: every word. Max error: sin 2.72 ULP, cos 1.78e-7 absolute.
template <class V>
REPARAM_FUSED_INLINE typename V::U half_turn(typename V::U w, typename V::F& cos,
                                             typename V::F& sin) {
  // Shifting the top bit out leaves the angle modulo half a turn, as a signed
  // integer: pi x with x in [-1/2, 1/2). The half turn was odd if the two top
  // bits of w differ.
  const auto doubled = V::template shl<1>(w);
  const auto x = V::mul(V::signed_to_float(doubled), V::set(0x1p-32f));
  const auto y = V::mul(x, x);
  sin = V::mul(x, horner<V>(y, V::set(0x1.3e1420p-4f), -0x1.32531ep-1f, 0x1.4668f0p+1f,
                            -0x1.4abbc4p+2f, 0x1.921fb6p+1f));
  cos = horner<V>(y, V::set(-0x1.937d98p-6f), 0x1.e16eacp-3f, -0x1.55d24ap+0f, 0x1.03c1eep+2f,
                  -0x1.3bd3ccp+2f, 1.0f);
  return V::xor_(w, doubled);
}

// One pair of words to one pair of normals.
template <class V>
REPARAM_FUSED_INLINE void box_muller(typename V::U w0, typename V::U w1, typename V::F& n0,
                                     typename V::F& n1) {
  typename V::F cos, sin;
  const auto sign = half_turn<V>(w1, cos, sin);
  const auto r = V::flip_sign(radius<V>(uniform<V>(w0)), sign);
  n0 = V::mul(r, cos);
  n1 = V::mul(r, sin);
}

// The same in fp64, from two words where fp32 takes one.

// u = (w + 1/2) / 2^64 with w = high * 2^32 + low, in [2^-65, 1]. Valid: every pair
// of words. Max error: 0.8 ULP.
template <class V>
REPARAM_FUSED_INLINE typename V::D uniform(typename V::U high, typename V::U low) {
  const auto w = V::fma(V::to_double(high), V::set(0x1p32), V::to_double(low));
  return V::fma(w, V::set(0x1p-64), V::set(0x1p-65));
}

// sqrt(-2 ln u). Valid: u in [2^-65, 1]. Max error: 1.4 ULP.
template <class V>
REPARAM_FUSED_INLINE typename V::D radius(typename V::D u) {
  typename V::D f;
  const auto e = split<V>(u, f);
  const auto q = horner<V>(
      f, V::set(-0x1.a1a07063e1f57p-5), 0x1.e54e6e031fa28p-4, -0x1.0b4d03bd1f9f7p-3,
      0x1.d3914dbd3ebe5p-4, -0x1.d0371db232745p-4, 0x1.fb16f6a9a7b44p-4, -0x1.11c9ecec742c1p-3,
      0x1.24dfeebfc6a64p-3, -0x1.3b0c419f8a2f5p-3, 0x1.555045ff6ea70p-3, -0x1.745d2f1d9ad65p-3,
      0x1.9999ca853bcdcp-3, -0x1.c71c729aa05edp-3, 0x1.fffffeee219efp-3, -0x1.2492492056ea3p-2,
      0x1.55555556f451cp-2, -0x1.99999999a6b5ap-2, 0x1.fffffffffdbffp-2, -0x1.55555555554ebp-1,
      0x1.0000000000004p+0, -0x1.0000000000000p+1);
  // -2 ln2
  return V::sqrt(V::fma(f, q, V::mul(e, V::set(-0x1.62e42fefa39efp+0))));
}

// cos and sin of 2 pi w / 2^64, times the common sign that is returned as -1
// or 1. Valid: every pair of words. Max error: sin 2.6 ULP, cos 3.6e-16 absolute.
template <class V>
REPARAM_FUSED_INLINE typename V::D half_turn(typename V::U high, typename V::U low,
                                             typename V::D& cos, typename V::D& sin) {
  const auto doubled_high = V::or_(V::template shl<1>(high), V::template shr<31>(low));
  const auto x = V::mul(V::fma(V::signed_to_double(doubled_high), V::set(0x1p32),
                               V::to_double(V::template shl<1>(low))),
                        V::set(0x1p-64));
  const auto y = V::mul(x, x);
  sin = V::mul(
      x, horner<V>(y, V::set(0x1.9d462020fcc78p-21), -0x1.6f7acdb8f6580p-16, 0x1.e8f3675ee37ddp-12,
                   -0x1.e3074dfaf87afp-8, 0x1.5078348551854p-4, -0x1.32d2cce627c86p-1,
                   0x1.466bc6775aa7dp+1, -0x1.4abbce625be52p+2, 0x1.921fb54442d18p+1));
  cos = horner<V>(y, V::set(-0x1.2175e33b10f9dp-23), 0x1.20a61e049e33fp-18, -0x1.b6e1cdea474b9p-14,
                  0x1.f9d38906e2150p-10, -0x1.a6d1f2a05f609p-6, 0x1.e1f50689191cbp-3,
                  -0x1.55d3c7e3cbfdap+0, 0x1.03c1f081b5ac4p+2, -0x1.3bd3cc9be45dep+2, 1.0);
  const auto odd = V::template shr<31>(V::xor_(high, V::template shl<1>(high)));
  return V::signed_to_double(V::sub(V::set(1u), V::template shl<1>(odd)));
}

template <class V>
REPARAM_FUSED_INLINE void box_muller(PhiloxBlock<V> w, typename V::D& n0, typename V::D& n1) {
  typename V::D cos, sin;
  const auto sign = half_turn<V>(w.w2, w.w3, cos, sin);
  const auto r = V::mul(radius<V>(uniform<V>(w.w0, w.w1)), sign);
  n0 = V::mul(r, cos);
  n1 = V::mul(r, sin);
}

template <class V>
REPARAM_FUSED_INLINE void box_muller(PhiloxBlock<V> w, typename V::F (&n)[4]) {
  box_muller<V>(w.w0, w.w1, n[0], n[1]);
  box_muller<V>(w.w2, w.w3, n[2], n[3]);
}
template <class V>
REPARAM_FUSED_INLINE void box_muller(PhiloxBlock<V> w, typename V::D (&n)[2]) {
  box_muller<V>(w, n[0], n[1]);
}

// The normals of kLanes counters from `first` on, as a tile of elements of T: in
// the registers, and in the order, that V::load_tile gives such elements.
template <class V, class T, class Seed, class R, int n>
REPARAM_FUSED_INLINE void normals(uint64_t first, const Seed& seed, R (&eps)[n]) {
  PhiloxBlock<V> w{{}, {}, V::set(0u), V::set(0u)};
  V::template counters<T>(first, w.w0, w.w1);
  box_muller<V>(philox4x32_10<V>(w, seed), eps);
  V::template to_tile_order<T>(eps);
}
template <class V, class T, class R, int n>
REPARAM_FUSED_INLINE void normals(uint64_t first, uint64_t seed, R (&eps)[n]) {
  normals<V, T>(first, OneSeed<V>(seed), eps);
}

// The same of any kLanes counters, each under a seed of its own.
template <class V, class T, class R, int n>
REPARAM_FUSED_INLINE void normals(const uint64_t* counters, const uint64_t* seeds, R (&eps)[n]) {
  PhiloxBlock<V> w{{}, {}, V::set(0u), V::set(0u)};
  LaneSeeds<V> lane_seeds;
  V::template halves<T>(counters, w.w0, w.w1);
  V::template halves<T>(seeds, lane_seeds.word0, lane_seeds.word1);
  box_muller<V>(philox4x32_10<V>(w, lane_seeds), eps);
  V::template to_tile_order<T>(eps);
}

}  // namespace reparam_fused
