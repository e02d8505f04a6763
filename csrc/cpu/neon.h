#pragma once

#include <arm_neon.h>

#include "../common/philox.h"
#include "../common/scalar.h"
#include "twice.h"

namespace reparam_fused {

// Four lanes: Advanced SIMD as every aarch64 has it. Members as in scalar.h. The registers are
// wrapped because MSVC has one type for all vectors, and overloads tell them apart here.
struct Neon {
  struct F {
    float32x4_t v;
  };
  struct U {
    uint32x4_t v;
  };
  struct D {
    float64x2_t a, b;  // lanes 0-1 and 2-3
  };
  struct Q {
    uint64x2_t a, b;
  };
  static constexpr int kLanes = 4;
  static constexpr const char* kName = "neon";

  static REPARAM_FUSED_INLINE F set(float x) { return {vdupq_n_f32(x)}; }
  static REPARAM_FUSED_INLINE D set(double x) { return {vdupq_n_f64(x), vdupq_n_f64(x)}; }
  static REPARAM_FUSED_INLINE U set(uint32_t x) { return {vdupq_n_u32(x)}; }
  static REPARAM_FUSED_INLINE Q set(uint64_t x) { return {vdupq_n_u64(x), vdupq_n_u64(x)}; }

  // The build forbids contraction, which would reach through these intrinsics: to GCC they are
  // a plain product, sum and difference.
  static REPARAM_FUSED_INLINE F fma(F x, F y, F z) { return {vfmaq_f32(z.v, x.v, y.v)}; }
  static REPARAM_FUSED_INLINE F add(F x, F y) { return {vaddq_f32(x.v, y.v)}; }
  static REPARAM_FUSED_INLINE F sub(F x, F y) { return {vsubq_f32(x.v, y.v)}; }
  static REPARAM_FUSED_INLINE F mul(F x, F y) { return {vmulq_f32(x.v, y.v)}; }
  static REPARAM_FUSED_INLINE F div(F x, F y) { return {vdivq_f32(x.v, y.v)}; }
  static REPARAM_FUSED_INLINE F sqrt(F x) { return {vsqrtq_f32(x.v)}; }
  // min and max give NaN where one operand is
  static REPARAM_FUSED_INLINE F clamp(F x, float limit) {
    return {vminq_f32(vmaxq_f32(x.v, vdupq_n_f32(-limit)), vdupq_n_f32(limit))};
  }
  static REPARAM_FUSED_INLINE F at_least(F x, float low) {
    return {vmaxq_f32(x.v, vdupq_n_f32(low_bound(low)))};
  }
  static REPARAM_FUSED_INLINE F at_most(F x, float high) {
    return {vminq_f32(x.v, vdupq_n_f32(high_bound(high)))};
  }
  static REPARAM_FUSED_INLINE F where_equal(F a, F b, F x, F y) {
    return {vbslq_f32(vceqq_f32(a.v, b.v), x.v, y.v)};
  }
  static REPARAM_FUSED_INLINE F flip_sign(F x, U word) {
    return from_bits(xor_(bits(x), and_(word, set(0x80000000u))));
  }
  static REPARAM_FUSED_INLINE D fma(D x, D y, D z) {
    return {vfmaq_f64(z.a, x.a, y.a), vfmaq_f64(z.b, x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE D add(D x, D y) { return {vaddq_f64(x.a, y.a), vaddq_f64(x.b, y.b)}; }
  static REPARAM_FUSED_INLINE D sub(D x, D y) { return {vsubq_f64(x.a, y.a), vsubq_f64(x.b, y.b)}; }
  static REPARAM_FUSED_INLINE D mul(D x, D y) { return {vmulq_f64(x.a, y.a), vmulq_f64(x.b, y.b)}; }
  static REPARAM_FUSED_INLINE D div(D x, D y) { return {vdivq_f64(x.a, y.a), vdivq_f64(x.b, y.b)}; }
  static REPARAM_FUSED_INLINE D sqrt(D x) { return {vsqrtq_f64(x.a), vsqrtq_f64(x.b)}; }
  static REPARAM_FUSED_INLINE D clamp(D x, double limit) {
    const D low = set(-limit), high = set(limit);
    return {vminq_f64(vmaxq_f64(x.a, low.a), high.a), vminq_f64(vmaxq_f64(x.b, low.b), high.b)};
  }
  static REPARAM_FUSED_INLINE D at_least(D x, double low) {
    const float64x2_t bound = vdupq_n_f64(low_bound(low));
    return {vmaxq_f64(x.a, bound), vmaxq_f64(x.b, bound)};
  }
  static REPARAM_FUSED_INLINE D at_most(D x, double high) {
    const float64x2_t bound = vdupq_n_f64(high_bound(high));
    return {vminq_f64(x.a, bound), vminq_f64(x.b, bound)};
  }
  static REPARAM_FUSED_INLINE D where_equal(D a, D b, D x, D y) {
    return {vbslq_f64(vceqq_f64(a.a, b.a), x.a, y.a), vbslq_f64(vceqq_f64(a.b, b.b), x.b, y.b)};
  }

  static REPARAM_FUSED_INLINE U bits(F x) { return {vreinterpretq_u32_f32(x.v)}; }
  static REPARAM_FUSED_INLINE F from_bits(U x) { return {vreinterpretq_f32_u32(x.v)}; }
  static REPARAM_FUSED_INLINE Q bits(D x) {
    return {vreinterpretq_u64_f64(x.a), vreinterpretq_u64_f64(x.b)};
  }
  static REPARAM_FUSED_INLINE D from_bits(Q x) {
    return {vreinterpretq_f64_u64(x.a), vreinterpretq_f64_u64(x.b)};
  }

  static REPARAM_FUSED_INLINE U and_(U x, U y) { return {vandq_u32(x.v, y.v)}; }
  static REPARAM_FUSED_INLINE U or_(U x, U y) { return {vorrq_u32(x.v, y.v)}; }
  static REPARAM_FUSED_INLINE U xor_(U x, U y) { return {veorq_u32(x.v, y.v)}; }
  static REPARAM_FUSED_INLINE U xor3(U x, U y, U z) { return xor_(x, xor_(y, z)); }
  static REPARAM_FUSED_INLINE U add(U x, U y) { return {vaddq_u32(x.v, y.v)}; }
  static REPARAM_FUSED_INLINE U sub(U x, U y) { return {vsubq_u32(x.v, y.v)}; }
  template <int n>
  static REPARAM_FUSED_INLINE U shl(U x) {
    return {vshlq_n_u32(x.v, n)};
  }
  template <int n>
  static REPARAM_FUSED_INLINE U shr(U x) {
    return {vshrq_n_u32(x.v, n)};
  }
  static REPARAM_FUSED_INLINE Q and_(Q x, Q y) {
    return {vandq_u64(x.a, y.a), vandq_u64(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE Q or_(Q x, Q y) { return {vorrq_u64(x.a, y.a), vorrq_u64(x.b, y.b)}; }
  static REPARAM_FUSED_INLINE Q sub(Q x, Q y) { return {vsubq_u64(x.a, y.a), vsubq_u64(x.b, y.b)}; }
  static REPARAM_FUSED_INLINE Q add(Q x, Q y) { return {vaddq_u64(x.a, y.a), vaddq_u64(x.b, y.b)}; }
  template <int n>
  static REPARAM_FUSED_INLINE Q shl(Q x) {
    return {vshlq_n_u64(x.a, n), vshlq_n_u64(x.b, n)};
  }
  template <int n>
  static REPARAM_FUSED_INLINE Q shr(Q x) {
    return {vshrq_n_u64(x.a, n), vshrq_n_u64(x.b, n)};
  }

  // A constant that is used again and again. GCC, which sees that it is one, would load it, with
  // its address, for each use: a twelfth of all instructions.
  static REPARAM_FUSED_INLINE U kept(U x) {
#if defined(__GNUC__)
    __asm__("" : "+w"(x.v));
#endif
    return x;
  }
  // By a lane of the factor: of the products of upper halves clang makes one instruction then.
  static REPARAM_FUSED_INLINE void mulhilo(U x, uint32_t m, U& high, U& low) {
    const uint32x4_t factor = kept(set(m)).v;
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_laneq_u32(vget_low_u32(x.v), factor, 0));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_laneq_u32(x.v, factor, 0));
    high = {vuzp2q_u32(first, second)};
    low = {vuzp1q_u32(first, second)};
  }

  static REPARAM_FUSED_INLINE F to_float(U x) { return {vcvtq_f32_u32(x.v)}; }
  static REPARAM_FUSED_INLINE F signed_to_float(U x) {
    return {vcvtq_f32_s32(vreinterpretq_s32_u32(x.v))};
  }
  static REPARAM_FUSED_INLINE D to_double(U x) {
    return {vcvtq_f64_u64(vmovl_u32(vget_low_u32(x.v))), vcvtq_f64_u64(vmovl_high_u32(x.v))};
  }
  static REPARAM_FUSED_INLINE D signed_to_double(U x) {
    const int32x4_t s = vreinterpretq_s32_u32(x.v);
    return {vcvtq_f64_s64(vmovl_s32(vget_low_s32(s))), vcvtq_f64_s64(vmovl_high_s32(s))};
  }

  static REPARAM_FUSED_INLINE void load_tile(const float* p, F (&x)[4]) {
    for (int i = 0; i < 4; ++i) x[i] = {vld1q_f32(p + 4 * i)};
  }
  static REPARAM_FUSED_INLINE void load_tile(const Half* p, F (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(&p[8 * i].bits));
      x[2 * i] = {vcvt_f32_f16(vget_low_f16(halves))};
      x[2 * i + 1] = {vcvt_high_f32_f16(halves)};
    }
  }
  // Two halves of a word each: the elements of even and of odd index, apart
  static REPARAM_FUSED_INLINE void load_tile(const BFloat16* p, F (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      const U pairs{vreinterpretq_u32_u16(vld1q_u16(&p[8 * i].bits))};
      x[2 * i] = from_bits(shl<16>(pairs));
      x[2 * i + 1] = from_bits(and_(pairs, set(0xffff0000u)));
    }
  }
  static REPARAM_FUSED_INLINE void load_tile(const double* p, D (&x)[2]) {
    for (int i = 0; i < 2; ++i) x[i] = {vld1q_f64(p + 4 * i), vld1q_f64(p + 4 * i + 2)};
  }

  static REPARAM_FUSED_INLINE void store_tile(float* p, const F (&x)[4]) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x[i].v);
  }
  static REPARAM_FUSED_INLINE void store_tile(Half* p, const F (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      const float16x8_t halves = vcvt_high_f16_f32(vcvt_f16_f32(x[2 * i].v), x[2 * i + 1].v);
      vst1q_u16(&p[8 * i].bits, vreinterpretq_u16_f16(halves));
    }
  }
  static REPARAM_FUSED_INLINE void store_tile(BFloat16* p, const F (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      const U even = round_to_bfloat16(x[2 * i]), odd = round_to_bfloat16(x[2 * i + 1]);
      // The upper half of odd stays, that of even goes below it.
      vst1q_u16(&p[8 * i].bits, vreinterpretq_u16_u32(vsriq_n_u32(odd.v, even.v, 16)));
    }
  }
  static REPARAM_FUSED_INLINE void store_tile(double* p, const D (&x)[2]) {
    for (int i = 0; i < 2; ++i) {
      vst1q_f64(p + 4 * i, x[i].a);
      vst1q_f64(p + 4 * i + 2, x[i].b);
    }
  }

  // Lane i takes counter first + i: no shuffle of four lanes gains by another order.
  template <class T>
  static REPARAM_FUSED_INLINE void counters(uint64_t first, U& low, U& high) {
    static constexpr uint32_t kOrder[] = {0, 1, 2, 3};
    const uint32x4_t order = vld1q_u32(kOrder);
    low = add(set(static_cast<uint32_t>(first)), {order});
    const U carry{vcltq_u32(low.v, order)};  // -1 or 0
    high = sub(set(static_cast<uint32_t>(first >> 32)), carry);
  }
  template <class T>
  static REPARAM_FUSED_INLINE void halves(const uint64_t* words, U& low, U& high) {
    const uint32x4_t a = vreinterpretq_u32_u64(vld1q_u64(words));
    const uint32x4_t b = vreinterpretq_u32_u64(vld1q_u64(words + 2));
    low = {vuzp1q_u32(a, b)};
    high = {vuzp2q_u32(a, b)};
  }
  template <class T>
  static REPARAM_FUSED_INLINE void to_tile_order(F (&n)[4]) {
    reorder(n, static_cast<const T*>(nullptr));
  }
  template <class T>
  static REPARAM_FUSED_INLINE void to_tile_order(D (&n)[2]) {
    const D first = n[0], second = n[1];
    n[0] = {vzip1q_f64(first.a, second.a), vzip2q_f64(first.a, second.a)};
    n[1] = {vzip1q_f64(first.b, second.b), vzip2q_f64(first.b, second.b)};
  }
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void as_tile_of(R (&x)[n]) {
    if constexpr (std::is_same<T, BFloat16>::value) {
      for (int i = 0; i < n; i += 2) {
        const F first = x[i];
        x[i] = {vuzp1q_f32(first.v, x[i + 1].v)};
        x[i + 1] = {vuzp2q_f32(first.v, x[i + 1].v)};
      }
    }
  }

  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void as_row_of(R (&x)[n]) {
    if constexpr (std::is_same<T, BFloat16>::value) {
      for (int i = 0; i < n; i += 2) {
        const F even = x[i];
        x[i] = {vzip1q_f32(even.v, x[i + 1].v)};
        x[i + 1] = {vzip2q_f32(even.v, x[i + 1].v)};
      }
    }
  }

 private:
  // In the upper half of each lane. Rounded to nearest even by an addition, which
  // could carry a NaN into inf: a NaN is left alone. Arithmetic made it quiet, so
  // its upper half is one too.
  static REPARAM_FUSED_INLINE U round_to_bfloat16(F x) {
    const U b = bits(x);
    const U odd{vtstq_u32(b.v, vdupq_n_u32(0x10000u))};  // -1 or 0
    const U number{vceqq_f32(x.v, x.v)};
    return add(b, and_(number, sub(set(0x7fffu), odd)));
  }

  // The transpose of four by four
  static REPARAM_FUSED_INLINE void reorder(F (&n)[4], const void*) {
    const float32x4_t a = vzip1q_f32(n[0].v, n[2].v), b = vzip2q_f32(n[0].v, n[2].v);
    const float32x4_t c = vzip1q_f32(n[1].v, n[3].v), d = vzip2q_f32(n[1].v, n[3].v);
    n[0] = {vzip1q_f32(a, c)};
    n[1] = {vzip2q_f32(a, c)};
    n[2] = {vzip1q_f32(b, d)};
    n[3] = {vzip2q_f32(b, d)};
  }
  static REPARAM_FUSED_INLINE void reorder(F (&n)[4], const BFloat16*) {
    const F even = n[0], odd = n[1];
    n[0] = {vzip1q_f32(even.v, n[2].v)};
    n[1] = {vzip1q_f32(odd.v, n[3].v)};
    n[2] = {vzip2q_f32(even.v, n[2].v)};
    n[3] = {vzip2q_f32(odd.v, n[3].v)};
  }
};

// The words of a seed are added to in the lanes: a word of each round would take five
// instructions from a scalar register, two for the constant and two to get across.
template <>
struct OneSeed<Neon> {
  Neon::U word0, word1;
  Neon::U step0 = Neon::kept(Neon::set(kPhiloxW0)), step1 = Neon::kept(Neon::set(kPhiloxW1));

  explicit REPARAM_FUSED_INLINE OneSeed(uint64_t seed)
      : word0(Neon::set(static_cast<uint32_t>(seed))),
        word1(Neon::set(static_cast<uint32_t>(seed >> 32))) {}
  REPARAM_FUSED_INLINE Neon::U key0() const { return word0; }
  REPARAM_FUSED_INLINE Neon::U key1() const { return word1; }
  REPARAM_FUSED_INLINE void step() {
    word0 = Neon::add(word0, step0);
    word1 = Neon::add(word1, step1);
  }
};
template <>
struct OneSeed<Twice<Neon>> : OneSeed<Neon> {
  using OneSeed<Neon>::OneSeed;
  REPARAM_FUSED_INLINE Twice<Neon>::U key0() const { return {word0, word0}; }
  REPARAM_FUSED_INLINE Twice<Neon>::U key1() const { return {word1, word1}; }
};

}  // namespace reparam_fused
