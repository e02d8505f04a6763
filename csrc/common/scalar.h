#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "element.h"
#include "macros.h"

namespace reparam_fused {

// A zero bound, with the sign by which every maximum or minimum leaves a zero alone: they
// differ on two zeros of unlike sign.
template <class T>
REPARAM_FUSED_INLINE T low_bound(T low) {
  return low == 0 ? -T(0) : low;
}
template <class T>
REPARAM_FUSED_INLINE T high_bound(T high) {
  return high == 0 ? T(0) : high;
}

// The lane type of one value: the portable CPU path. The other lane types have
// the same members over a register of N values, and csrc/cuda/thread.h over the one
// of a GPU thread:
//
//   F, D, U, Q         fp32, fp64, uint32, uint64; as many of each: kLanes
//   set                a constant in every lane
//   fma ... sqrt       one IEEE operation, rounded to nearest even
//   clamp(x, limit)    x in [-limit, limit]; NaN passes
//   at_least(x, low)   the larger; NaN passes, and so does a zero where low is one, which
//   at_most(x, high)   else gives -0; the smaller likewise, and a zero bound gives +0
//   where_equal(a, b, x, y)   x where a == b, else y; NaN is equal to nothing
//   bits, from_bits    the same register seen as integers, and back
//   to_*, signed_to_*  exact or rounded once, to nearest even
//   mulhilo            the two halves of a 32 x 32 bit product
//   load_tile, store_tile   the elements of kLanes counters, converted from and
//                      to fp32 for the half types; rounded once, to nearest even
//   counters           kLanes counters, in the order that lets
//   to_tile_order      bring their normals where load_tile puts the elements
//   halves             the halves of any kLanes words, in that order
//   as_tile_of         brings what load_tile gave of fp32 to where it would put such elements
//   as_row_of          and back, to where store_tile of fp32 takes them from
struct Scalar {
  using F = float;
  using D = double;
  using U = uint32_t;
  using Q = uint64_t;
  static constexpr int kLanes = 1;
  static constexpr const char* kName = "scalar";

  template <class T>
  static REPARAM_FUSED_INLINE T set(T x) {
    return x;
  }

  // The build forbids the contraction of a * b + c: what is one fma here is
  // written as one.
  static REPARAM_FUSED_INLINE F fma(F a, F b, F c) { return std::fma(a, b, c); }
  static REPARAM_FUSED_INLINE F add(F a, F b) { return a + b; }
  static REPARAM_FUSED_INLINE F sub(F a, F b) { return a - b; }
  static REPARAM_FUSED_INLINE F mul(F a, F b) { return a * b; }
  static REPARAM_FUSED_INLINE F div(F a, F b) { return a / b; }
  static REPARAM_FUSED_INLINE F sqrt(F a) { return std::sqrt(a); }
  static REPARAM_FUSED_INLINE D fma(D a, D b, D c) { return std::fma(a, b, c); }
  static REPARAM_FUSED_INLINE D add(D a, D b) { return a + b; }
  static REPARAM_FUSED_INLINE D sub(D a, D b) { return a - b; }
  static REPARAM_FUSED_INLINE D mul(D a, D b) { return a * b; }
  static REPARAM_FUSED_INLINE D div(D a, D b) { return a / b; }
  static REPARAM_FUSED_INLINE D sqrt(D a) { return std::sqrt(a); }
  static REPARAM_FUSED_INLINE U bits(F a) { return copy_bits<U>(a); }
  static REPARAM_FUSED_INLINE F from_bits(U a) { return copy_bits<F>(a); }
  static REPARAM_FUSED_INLINE Q bits(D a) { return copy_bits<Q>(a); }
  static REPARAM_FUSED_INLINE D from_bits(Q a) { return copy_bits<D>(a); }
  static REPARAM_FUSED_INLINE void mulhilo(U a, uint32_t m, U& high, U& low) {
    const uint64_t product = uint64_t{a} * m;
    high = static_cast<U>(product >> 32);
    low = static_cast<U>(product);
  }
  template <class To, class From>
  static REPARAM_FUSED_INLINE To copy_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
  }

  template <class R>
  static REPARAM_FUSED_INLINE R clamp(R x, R limit) {
    return x < -limit ? -limit : (x > limit ? limit : x);
  }
  static REPARAM_FUSED_INLINE F at_least(F x, F low) { return x < low ? low_bound(low) : x; }
  static REPARAM_FUSED_INLINE D at_least(D x, D low) { return x < low ? low_bound(low) : x; }
  static REPARAM_FUSED_INLINE F at_most(F x, F high) { return x > high ? high_bound(high) : x; }
  static REPARAM_FUSED_INLINE D at_most(D x, D high) { return x > high ? high_bound(high) : x; }
  template <class R>
  static REPARAM_FUSED_INLINE R where_equal(R a, R b, R x, R y) {
    return a == b ? x : y;
  }

  // -x where the top bit of word is set
  static REPARAM_FUSED_INLINE F flip_sign(F x, U word) {
    return from_bits(bits(x) ^ (word & 0x80000000u));
  }

  template <class I>
  static REPARAM_FUSED_INLINE I and_(I a, I b) {
    return a & b;
  }
  template <class I>
  static REPARAM_FUSED_INLINE I or_(I a, I b) {
    return a | b;
  }
  static REPARAM_FUSED_INLINE U xor_(U a, U b) { return a ^ b; }
  static REPARAM_FUSED_INLINE U xor3(U a, U b, U c) { return a ^ b ^ c; }
  static REPARAM_FUSED_INLINE U add(U a, U b) { return a + b; }
  static REPARAM_FUSED_INLINE U sub(U a, U b) { return a - b; }
  static REPARAM_FUSED_INLINE Q sub(Q a, Q b) { return a - b; }
  static REPARAM_FUSED_INLINE Q add(Q a, Q b) { return a + b; }
  template <int n, class I>
  static REPARAM_FUSED_INLINE I shl(I a) {
    return a << n;
  }
  template <int n, class I>
  static REPARAM_FUSED_INLINE I shr(I a) {
    return a >> n;
  }

  static REPARAM_FUSED_INLINE F to_float(U a) { return static_cast<F>(a); }
  static REPARAM_FUSED_INLINE F signed_to_float(U a) {
    return static_cast<F>(static_cast<int32_t>(a));
  }
  static REPARAM_FUSED_INLINE D to_double(U a) { return static_cast<D>(a); }
  static REPARAM_FUSED_INLINE D signed_to_double(U a) {
    return static_cast<D>(static_cast<int32_t>(a));
  }

  static REPARAM_FUSED_INLINE F load(const float* p) { return *p; }
  static REPARAM_FUSED_INLINE D load(const double* p) { return *p; }
  static REPARAM_FUSED_INLINE F load(const BFloat16* p) { return from_bits(U{p->bits} << 16); }
  static REPARAM_FUSED_INLINE F load(const Half* p) {
    // The exponent moves by 112 when the fields move to their fp32 place, which
    // a multiplication mends for denormals too; inf and NaN need all ones.
    const U magnitude = p->bits & 0x7fffu;
    const U value = bits(mul(from_bits(magnitude << 13), 0x1p112f));
    const U ones = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    return from_bits(value | ones | (U{p->bits} & 0x8000u) << 16);
  }

  static REPARAM_FUSED_INLINE void store(float* p, F x) { *p = x; }
  static REPARAM_FUSED_INLINE void store(double* p, D x) { *p = x; }
  static REPARAM_FUSED_INLINE void store(BFloat16* p, F x) {
    const U b = bits(x);
    const U rounded = (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
    p->bits = static_cast<uint16_t>(x != x ? (b >> 16 | 0x40u) : rounded);
  }
  static REPARAM_FUSED_INLINE void store(Half* p, F x) {
    const U sign = bits(x) >> 16 & 0x8000u;
    const U magnitude = bits(x) & 0x7fffffffu;
    U half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520 and up round to inf
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
      // Below 2^-14: in a sum with 1/2 the last bit is the denormal step 2^-24.
      half = bits(add(from_bits(magnitude), 0.5f)) - 0x3f000000u;
    } else {
      half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    p->bits = static_cast<uint16_t>(sign | half);
  }

  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void load_tile(const T* p, R (&x)[n]) {
    for (int i = 0; i < n; ++i) x[i] = load(p + i);
  }
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void store_tile(T* p, const R (&x)[n]) {
    for (int i = 0; i < n; ++i) store(p + i, x[i]);
  }
  template <class T>
  static REPARAM_FUSED_INLINE void counters(Q first, U& low, U& high) {
    low = static_cast<U>(first);
    high = static_cast<U>(first >> 32);
  }
  template <class T>
  static REPARAM_FUSED_INLINE void halves(const Q* words, U& low, U& high) {
    counters<T>(*words, low, high);
  }
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void to_tile_order(R (&)[n]) {}
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void as_tile_of(R (&)[n]) {}
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void as_row_of(R (&)[n]) {}
};

}  // namespace reparam_fused
