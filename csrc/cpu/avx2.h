#pragma once

// Included between the target pragmas of avx2.cpp; immintrin.h comes before.

#include "../common/scalar.h"

namespace reparam_fused {

// Eight lanes: AVX2, FMA, F16C. Members as in scalar.h.
struct Avx2 {
  struct D {
    __m256d a, b;  // lanes 0-3 and 4-7
  };
  struct Q {
    __m256i a, b;
  };
  using F = __m256;
  using U = __m256i;
  static constexpr int kLanes = 8;
  static constexpr const char* kName = "avx2";

  static REPARAM_FUSED_INLINE F set(float x) { return _mm256_set1_ps(x); }
  static REPARAM_FUSED_INLINE D set(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
  static REPARAM_FUSED_INLINE U set(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static REPARAM_FUSED_INLINE Q set(uint64_t x) {
    const U q = _mm256_set1_epi64x(static_cast<long long>(x));
    return {q, q};
  }

  static REPARAM_FUSED_INLINE F fma(F x, F y, F z) { return _mm256_fmadd_ps(x, y, z); }
  static REPARAM_FUSED_INLINE F add(F x, F y) { return _mm256_add_ps(x, y); }
  static REPARAM_FUSED_INLINE F sub(F x, F y) { return _mm256_sub_ps(x, y); }
  static REPARAM_FUSED_INLINE F mul(F x, F y) { return _mm256_mul_ps(x, y); }
  static REPARAM_FUSED_INLINE F div(F x, F y) { return _mm256_div_ps(x, y); }
  static REPARAM_FUSED_INLINE F sqrt(F x) { return _mm256_sqrt_ps(x); }
  // min and max give their second operand where one is NaN
  static REPARAM_FUSED_INLINE F clamp(F x, float limit) {
    return _mm256_min_ps(set(limit), _mm256_max_ps(set(-limit), x));
  }
  static REPARAM_FUSED_INLINE F at_least(F x, float low) {
    return _mm256_max_ps(set(low_bound(low)), x);
  }
  static REPARAM_FUSED_INLINE F at_most(F x, float high) {
    return _mm256_min_ps(set(high_bound(high)), x);
  }
  static REPARAM_FUSED_INLINE F where_equal(F a, F b, F x, F y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
  }
  static REPARAM_FUSED_INLINE F flip_sign(F x, U word) {
    return _mm256_xor_ps(x, from_bits(and_(word, set(0x80000000u))));
  }
  static REPARAM_FUSED_INLINE D fma(D x, D y, D z) {
    return {_mm256_fmadd_pd(x.a, y.a, z.a), _mm256_fmadd_pd(x.b, y.b, z.b)};
  }
  static REPARAM_FUSED_INLINE D add(D x, D y) {
    return {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE D sub(D x, D y) {
    return {_mm256_sub_pd(x.a, y.a), _mm256_sub_pd(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE D mul(D x, D y) {
    return {_mm256_mul_pd(x.a, y.a), _mm256_mul_pd(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE D div(D x, D y) {
    return {_mm256_div_pd(x.a, y.a), _mm256_div_pd(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE D sqrt(D x) { return {_mm256_sqrt_pd(x.a), _mm256_sqrt_pd(x.b)}; }
  static REPARAM_FUSED_INLINE D clamp(D x, double limit) {
    const D low = set(-limit), high = set(limit);
    return {_mm256_min_pd(high.a, _mm256_max_pd(low.a, x.a)),
            _mm256_min_pd(high.b, _mm256_max_pd(low.b, x.b))};
  }
  static REPARAM_FUSED_INLINE D at_least(D x, double low) {
    const D bound = set(low_bound(low));
    return {_mm256_max_pd(bound.a, x.a), _mm256_max_pd(bound.b, x.b)};
  }
  static REPARAM_FUSED_INLINE D at_most(D x, double high) {
    const D bound = set(high_bound(high));
    return {_mm256_min_pd(bound.a, x.a), _mm256_min_pd(bound.b, x.b)};
  }
  static REPARAM_FUSED_INLINE D where_equal(D a, D b, D x, D y) {
    return {_mm256_blendv_pd(y.a, x.a, _mm256_cmp_pd(a.a, b.a, _CMP_EQ_OQ)),
            _mm256_blendv_pd(y.b, x.b, _mm256_cmp_pd(a.b, b.b, _CMP_EQ_OQ))};
  }

  static REPARAM_FUSED_INLINE U bits(F x) { return _mm256_castps_si256(x); }
  static REPARAM_FUSED_INLINE F from_bits(U x) { return _mm256_castsi256_ps(x); }
  static REPARAM_FUSED_INLINE Q bits(D x) {
    return {_mm256_castpd_si256(x.a), _mm256_castpd_si256(x.b)};
  }
  static REPARAM_FUSED_INLINE D from_bits(Q x) {
    return {_mm256_castsi256_pd(x.a), _mm256_castsi256_pd(x.b)};
  }

  static REPARAM_FUSED_INLINE U and_(U x, U y) { return _mm256_and_si256(x, y); }
  static REPARAM_FUSED_INLINE U or_(U x, U y) { return _mm256_or_si256(x, y); }
  static REPARAM_FUSED_INLINE U xor_(U x, U y) { return _mm256_xor_si256(x, y); }
  static REPARAM_FUSED_INLINE U xor3(U x, U y, U z) { return xor_(xor_(x, y), z); }
  static REPARAM_FUSED_INLINE U add(U x, U y) { return _mm256_add_epi32(x, y); }
  static REPARAM_FUSED_INLINE U sub(U x, U y) { return _mm256_sub_epi32(x, y); }
  template <int n>
  static REPARAM_FUSED_INLINE U shl(U x) {
    return _mm256_slli_epi32(x, n);
  }
  template <int n>
  static REPARAM_FUSED_INLINE U shr(U x) {
    return _mm256_srli_epi32(x, n);
  }
  static REPARAM_FUSED_INLINE Q and_(Q x, Q y) { return {and_(x.a, y.a), and_(x.b, y.b)}; }
  static REPARAM_FUSED_INLINE Q or_(Q x, Q y) { return {or_(x.a, y.a), or_(x.b, y.b)}; }
  static REPARAM_FUSED_INLINE Q sub(Q x, Q y) {
    return {_mm256_sub_epi64(x.a, y.a), _mm256_sub_epi64(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE Q add(Q x, Q y) {
    return {_mm256_add_epi64(x.a, y.a), _mm256_add_epi64(x.b, y.b)};
  }
  template <int n>
  static REPARAM_FUSED_INLINE Q shl(Q x) {
    return {_mm256_slli_epi64(x.a, n), _mm256_slli_epi64(x.b, n)};
  }
  template <int n>
  static REPARAM_FUSED_INLINE Q shr(Q x) {
    return {_mm256_srli_epi64(x.a, n), _mm256_srli_epi64(x.b, n)};
  }

  static REPARAM_FUSED_INLINE void mulhilo(U x, uint32_t m, U& high, U& low) {
    const U factor = _mm256_set1_epi64x(m);
    const U even = _mm256_mul_epu32(x, factor);
    const U odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    high = _mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xf5), odd, 0xaa);
    low = _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xa0), 0xaa);
  }

  static REPARAM_FUSED_INLINE F signed_to_float(U x) { return _mm256_cvtepi32_ps(x); }
  // AVX2 converts signed integers only: both halves of x are exact, their sum
  // is rounded once.
  static REPARAM_FUSED_INLINE F to_float(U x) {
    return fma(signed_to_float(shr<16>(x)), set(0x1p16f), signed_to_float(and_(x, set(0xffffu))));
  }
  static REPARAM_FUSED_INLINE __m128i upper(U x) { return _mm256_extracti128_si256(x, 1); }
  static REPARAM_FUSED_INLINE __m128i lower(U x) { return _mm256_castsi256_si128(x); }
  static REPARAM_FUSED_INLINE D signed_to_double(U x) {
    return {_mm256_cvtepi32_pd(lower(x)), _mm256_cvtepi32_pd(upper(x))};
  }
  // x is put into the low mantissa bits of 2^52, which is then taken off: exact.
  static REPARAM_FUSED_INLINE D to_double(U x) {
    const Q wide{_mm256_cvtepu32_epi64(lower(x)), _mm256_cvtepu32_epi64(upper(x))};
    return sub(from_bits(or_(wide, set(uint64_t{0x4330000000000000}))), set(0x1p52));
  }

  static REPARAM_FUSED_INLINE void load_tile(const float* p, F (&x)[4]) {
    for (int i = 0; i < 4; ++i) x[i] = _mm256_loadu_ps(p + 8 * i);
  }
  static REPARAM_FUSED_INLINE void load_tile(const Half* p, F (&x)[4]) {
    for (int i = 0; i < 4; ++i) x[i] = _mm256_cvtph_ps(_mm_loadu_si128(as<__m128i>(p + 8 * i)));
  }
  // Two halves of a word each: the elements of even and of odd index, apart
  static REPARAM_FUSED_INLINE void load_tile(const BFloat16* p, F (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      const U pairs = _mm256_loadu_si256(as<__m256i>(p + 16 * i));
      x[2 * i] = from_bits(shl<16>(pairs));
      x[2 * i + 1] = from_bits(and_(pairs, set(0xffff0000u)));
    }
  }
  static REPARAM_FUSED_INLINE void load_tile(const double* p, D (&x)[2]) {
    for (int i = 0; i < 2; ++i) x[i] = {_mm256_loadu_pd(p + 8 * i), _mm256_loadu_pd(p + 8 * i + 4)};
  }

  static REPARAM_FUSED_INLINE void store_tile(float* p, const F (&x)[4]) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(p + 8 * i, x[i]);
  }
  static REPARAM_FUSED_INLINE void store_tile(Half* p, const F (&x)[4]) {
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_si128(as<__m128i>(p + 8 * i), _mm256_cvtps_ph(x[i], _MM_FROUND_TO_NEAREST_INT));
    }
  }
  static REPARAM_FUSED_INLINE void store_tile(BFloat16* p, const F (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      const U even = shr<16>(round_to_bfloat16(x[2 * i]));
      const U odd = round_to_bfloat16(x[2 * i + 1]);
      _mm256_storeu_si256(as<__m256i>(p + 16 * i), _mm256_blend_epi16(even, odd, 0xaa));
    }
  }
  static REPARAM_FUSED_INLINE void store_tile(double* p, const D (&x)[2]) {
    for (int i = 0; i < 2; ++i) {
      _mm256_storeu_pd(p + 8 * i, x[i].a);
      _mm256_storeu_pd(p + 8 * i + 4, x[i].b);
    }
  }

  // Lane i takes counter first + order(i), chosen so that to_tile_order needs
  // shuffles within 128 bits only.
  template <class T>
  static REPARAM_FUSED_INLINE void counters(uint64_t first, U& low, U& high) {
    const U order = counter_order(static_cast<const T*>(nullptr));
    low = _mm256_add_epi32(set(static_cast<uint32_t>(first)), order);
    const U no_carry = _mm256_cmpeq_epi32(_mm256_max_epu32(low, order), low);  // -1 or 0
    high = _mm256_add_epi32(set(static_cast<uint32_t>((first >> 32) + 1)), no_carry);
  }
  template <class T>
  static REPARAM_FUSED_INLINE void halves(const uint64_t* words, U& low, U& high) {
    const F a = _mm256_castsi256_ps(_mm256_loadu_si256(as<__m256i>(words)));
    const F b = _mm256_castsi256_ps(_mm256_loadu_si256(as<__m256i>(words + 4)));
    // The shuffles leave them in this order, which is its own inverse.
    const U shuffled = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
    const U order =
        _mm256_permutevar8x32_epi32(shuffled, counter_order(static_cast<const T*>(nullptr)));
    low = _mm256_permutevar8x32_epi32(bits(_mm256_shuffle_ps(a, b, 0x88)), order);
    high = _mm256_permutevar8x32_epi32(bits(_mm256_shuffle_ps(a, b, 0xdd)), order);
  }
  template <class T>
  static REPARAM_FUSED_INLINE void to_tile_order(F (&n)[4]) {
    reorder(n, static_cast<const T*>(nullptr));
  }
  template <class T>
  static REPARAM_FUSED_INLINE void to_tile_order(D (&n)[2]) {
    const D first = n[0];
    n[0] = {_mm256_unpacklo_pd(first.a, n[1].a), _mm256_unpackhi_pd(first.a, n[1].a)};
    n[1] = {_mm256_unpacklo_pd(first.b, n[1].b), _mm256_unpackhi_pd(first.b, n[1].b)};
  }
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void as_tile_of(R (&x)[n]) {
    if constexpr (std::is_same<T, BFloat16>::value) {
      for (int i = 0; i < n; i += 2) {
        const F first = x[i];
        x[i] = in_order(_mm256_shuffle_ps(first, x[i + 1], 0x88));
        x[i + 1] = in_order(_mm256_shuffle_ps(first, x[i + 1], 0xdd));
      }
    }
  }

  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void as_row_of(R (&x)[n]) {
    if constexpr (std::is_same<T, BFloat16>::value) {
      for (int i = 0; i < n; i += 2) {
        const F low = _mm256_unpacklo_ps(x[i], x[i + 1]), high = _mm256_unpackhi_ps(x[i], x[i + 1]);
        x[i] = _mm256_permute2f128_ps(low, high, 0x20);
        x[i + 1] = _mm256_permute2f128_ps(low, high, 0x31);
      }
    }
  }

 private:
  template <class To>
  static REPARAM_FUSED_INLINE const To* as(const void* p) {
    return static_cast<const To*>(p);
  }
  template <class To>
  static REPARAM_FUSED_INLINE To* as(void* p) {
    return static_cast<To*>(p);
  }

  // In the upper half of each lane. Rounded to nearest even by an addition, which
  // could carry a NaN into inf: a NaN is left alone. Arithmetic made it quiet, so
  // its upper half is one too.
  static REPARAM_FUSED_INLINE U round_to_bfloat16(F x) {
    const U b = bits(x);
    const U odd = and_(shr<16>(b), set(1u));
    const U number = bits(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
    const U half_step = and_(number, _mm256_add_epi32(odd, set(0x7fffu)));
    return _mm256_add_epi32(b, half_step);
  }

  // Elements 0 1 8 9 2 3 10 11 of two registers, as they were
  static REPARAM_FUSED_INLINE F in_order(F x) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
  }

  static REPARAM_FUSED_INLINE U counter_order(const void*) {
    return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  }
  static REPARAM_FUSED_INLINE U counter_order(const BFloat16*) {
    return _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
  }
  static REPARAM_FUSED_INLINE U counter_order(const double*) {
    return _mm256_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7);
  }

  static REPARAM_FUSED_INLINE void reorder(F (&n)[4], const void*) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(n[0], n[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(n[0], n[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(n[2], n[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(n[2], n[3]));
    n[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    n[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    n[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    n[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
  static REPARAM_FUSED_INLINE void reorder(F (&n)[4], const BFloat16*) {
    const F even = n[0], odd = n[1];
    n[0] = _mm256_unpacklo_ps(even, n[2]);
    n[1] = _mm256_unpacklo_ps(odd, n[3]);
    n[2] = _mm256_unpackhi_ps(even, n[2]);
    n[3] = _mm256_unpackhi_ps(odd, n[3]);
  }
};

}  // namespace reparam_fused
