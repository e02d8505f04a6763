#pragma once

// Included between the target pragmas of avx512.cpp; immintrin.h comes before.

#include "../common/scalar.h"

namespace reparam_fused {

// Sixteen lanes: AVX-512 F, DQ, BW, VL. Members as in scalar.h.
struct Avx512 {
  struct D {
    __m512d a, b;  // lanes 0-7 and 8-15
  };
  struct Q {
    __m512i a, b;
  };
  using F = __m512;
  using U = __m512i;
  static constexpr int kLanes = 16;
  static constexpr const char* kName = "avx512";

  static REPARAM_FUSED_INLINE F set(float x) { return _mm512_set1_ps(x); }
  static REPARAM_FUSED_INLINE D set(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
  static REPARAM_FUSED_INLINE U set(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static REPARAM_FUSED_INLINE Q set(uint64_t x) {
    const U q = _mm512_set1_epi64(static_cast<long long>(x));
    return {q, q};
  }
  static REPARAM_FUSED_INLINE F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static REPARAM_FUSED_INLINE F add(F x, F y) { return _mm512_add_ps(x, y); }
  static REPARAM_FUSED_INLINE F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  static REPARAM_FUSED_INLINE F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static REPARAM_FUSED_INLINE F div(F x, F y) { return _mm512_div_ps(x, y); }
  static REPARAM_FUSED_INLINE F sqrt(F x) { return _mm512_sqrt_ps(x); }
  // min and max give their second operand where one is NaN
  static REPARAM_FUSED_INLINE F clamp(F x, float limit) {
    return _mm512_min_ps(set(limit), _mm512_max_ps(set(-limit), x));
  }
  static REPARAM_FUSED_INLINE F at_least(F x, float low) {
    return _mm512_max_ps(set(low_bound(low)), x);
  }
  static REPARAM_FUSED_INLINE F at_most(F x, float high) {
    return _mm512_min_ps(set(high_bound(high)), x);
  }
  static REPARAM_FUSED_INLINE F where_equal(F a, F b, F x, F y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), y, x);
  }
  static REPARAM_FUSED_INLINE D fma(D x, D y, D z) {
    return {_mm512_fmadd_pd(x.a, y.a, z.a), _mm512_fmadd_pd(x.b, y.b, z.b)};
  }
  static REPARAM_FUSED_INLINE D add(D x, D y) {
    return {_mm512_add_pd(x.a, y.a), _mm512_add_pd(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE D sub(D x, D y) {
    return {_mm512_sub_pd(x.a, y.a), _mm512_sub_pd(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE D mul(D x, D y) {
    return {_mm512_mul_pd(x.a, y.a), _mm512_mul_pd(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE D div(D x, D y) {
    return {_mm512_div_pd(x.a, y.a), _mm512_div_pd(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE D sqrt(D x) { return {_mm512_sqrt_pd(x.a), _mm512_sqrt_pd(x.b)}; }
  static REPARAM_FUSED_INLINE D clamp(D x, double limit) {
    const D low = set(-limit), high = set(limit);
    return {_mm512_min_pd(high.a, _mm512_max_pd(low.a, x.a)),
            _mm512_min_pd(high.b, _mm512_max_pd(low.b, x.b))};
  }
  static REPARAM_FUSED_INLINE D at_least(D x, double low) {
    const D bound = set(low_bound(low));
    return {_mm512_max_pd(bound.a, x.a), _mm512_max_pd(bound.b, x.b)};
  }
  static REPARAM_FUSED_INLINE D at_most(D x, double high) {
    const D bound = set(high_bound(high));
    return {_mm512_min_pd(bound.a, x.a), _mm512_min_pd(bound.b, x.b)};
  }
  static REPARAM_FUSED_INLINE D where_equal(D a, D b, D x, D y) {
    return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.a, b.a, _CMP_EQ_OQ), y.a, x.a),
            _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.b, b.b, _CMP_EQ_OQ), y.b, x.b)};
  }

  static REPARAM_FUSED_INLINE F flip_sign(F x, U word) {
    return from_bits(
        _mm512_ternarylogic_epi32(bits(x), word, set(0x80000000u), 0x78));  // x ^ (w & s)
  }

  static REPARAM_FUSED_INLINE U bits(F x) { return _mm512_castps_si512(x); }
  static REPARAM_FUSED_INLINE F from_bits(U x) { return _mm512_castsi512_ps(x); }
  static REPARAM_FUSED_INLINE Q bits(D x) {
    return {_mm512_castpd_si512(x.a), _mm512_castpd_si512(x.b)};
  }
  static REPARAM_FUSED_INLINE D from_bits(Q x) {
    return {_mm512_castsi512_pd(x.a), _mm512_castsi512_pd(x.b)};
  }

  static REPARAM_FUSED_INLINE U and_(U x, U y) { return _mm512_and_si512(x, y); }
  static REPARAM_FUSED_INLINE U or_(U x, U y) { return _mm512_or_si512(x, y); }
  static REPARAM_FUSED_INLINE U xor_(U x, U y) { return _mm512_xor_si512(x, y); }
  static REPARAM_FUSED_INLINE U xor3(U x, U y, U z) {
    return _mm512_ternarylogic_epi32(x, y, z, 0x96);
  }
  static REPARAM_FUSED_INLINE U add(U x, U y) { return _mm512_add_epi32(x, y); }
  static REPARAM_FUSED_INLINE U sub(U x, U y) { return _mm512_sub_epi32(x, y); }
  template <int n>
  static REPARAM_FUSED_INLINE U shl(U x) {
    return _mm512_slli_epi32(x, n);
  }
  template <int n>
  static REPARAM_FUSED_INLINE U shr(U x) {
    return _mm512_srli_epi32(x, n);
  }
  static REPARAM_FUSED_INLINE Q and_(Q x, Q y) { return {and_(x.a, y.a), and_(x.b, y.b)}; }
  static REPARAM_FUSED_INLINE Q or_(Q x, Q y) { return {or_(x.a, y.a), or_(x.b, y.b)}; }
  static REPARAM_FUSED_INLINE Q sub(Q x, Q y) {
    return {_mm512_sub_epi64(x.a, y.a), _mm512_sub_epi64(x.b, y.b)};
  }
  static REPARAM_FUSED_INLINE Q add(Q x, Q y) {
    return {_mm512_add_epi64(x.a, y.a), _mm512_add_epi64(x.b, y.b)};
  }
  template <int n>
  static REPARAM_FUSED_INLINE Q shl(Q x) {
    return {_mm512_slli_epi64(x.a, n), _mm512_slli_epi64(x.b, n)};
  }
  template <int n>
  static REPARAM_FUSED_INLINE Q shr(Q x) {
    return {_mm512_srli_epi64(x.a, n), _mm512_srli_epi64(x.b, n)};
  }

  // Even and odd lanes are multiplied apart, and put together by shuffles, which
  // run on another port than the products.
  static REPARAM_FUSED_INLINE void mulhilo(U x, uint32_t m, U& high, U& low) {
    const U factor = _mm512_set1_epi64(m);
    const U even = _mm512_mul_epu32(x, factor);
    const U odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
    high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xf5));
    low = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, static_cast<_MM_PERM_ENUM>(0xa0));
  }

  static REPARAM_FUSED_INLINE F to_float(U x) { return _mm512_cvtepu32_ps(x); }
  static REPARAM_FUSED_INLINE F signed_to_float(U x) { return _mm512_cvtepi32_ps(x); }
  static REPARAM_FUSED_INLINE __m256i upper(U x) { return _mm512_extracti64x4_epi64(x, 1); }
  static REPARAM_FUSED_INLINE __m256i lower(U x) { return _mm512_castsi512_si256(x); }
  static REPARAM_FUSED_INLINE D to_double(U x) {
    return {_mm512_cvtepu32_pd(lower(x)), _mm512_cvtepu32_pd(upper(x))};
  }
  static REPARAM_FUSED_INLINE D signed_to_double(U x) {
    return {_mm512_cvtepi32_pd(lower(x)), _mm512_cvtepi32_pd(upper(x))};
  }

  static REPARAM_FUSED_INLINE void load_tile(const float* p, F (&x)[4]) {
    for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_ps(p + 16 * i);
  }
  static REPARAM_FUSED_INLINE void load_tile(const Half* p, F (&x)[4]) {
    for (int i = 0; i < 4; ++i) x[i] = _mm512_cvtph_ps(_mm256_loadu_si256(as<__m256i>(p + 16 * i)));
  }
  // Two halves of a word each: the elements of even and of odd index, apart
  static REPARAM_FUSED_INLINE void load_tile(const BFloat16* p, F (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      const U pairs = _mm512_loadu_si512(p + 32 * i);
      x[2 * i] = from_bits(shl<16>(pairs));
      x[2 * i + 1] = from_bits(and_(pairs, set(0xffff0000u)));
    }
  }
  static REPARAM_FUSED_INLINE void load_tile(const double* p, D (&x)[2]) {
    for (int i = 0; i < 2; ++i)
      x[i] = {_mm512_loadu_pd(p + 16 * i), _mm512_loadu_pd(p + 16 * i + 8)};
  }

  static REPARAM_FUSED_INLINE void store_tile(float* p, const F (&x)[4]) {
    for (int i = 0; i < 4; ++i) _mm512_storeu_ps(p + 16 * i, x[i]);
  }
  static REPARAM_FUSED_INLINE void store_tile(Half* p, const F (&x)[4]) {
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_si256(as<__m256i>(p + 16 * i),
                          _mm512_cvtps_ph(x[i], _MM_FROUND_TO_NEAREST_INT));
    }
  }
  static REPARAM_FUSED_INLINE void store_tile(BFloat16* p, const F (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      const U even = shr<16>(round_to_bfloat16(x[2 * i]));
      const U odd = round_to_bfloat16(x[2 * i + 1]);
      _mm512_storeu_si512(p + 32 * i, _mm512_mask_blend_epi16(0xaaaaaaaa, even, odd));
    }
  }
  static REPARAM_FUSED_INLINE void store_tile(double* p, const D (&x)[2]) {
    for (int i = 0; i < 2; ++i) {
      _mm512_storeu_pd(p + 16 * i, x[i].a);
      _mm512_storeu_pd(p + 16 * i + 8, x[i].b);
    }
  }

  // Lane i takes counter first + order(i), chosen so that to_tile_order needs
  // shuffles within 128 bits only.
  template <class T>
  static REPARAM_FUSED_INLINE void counters(uint64_t first, U& low, U& high) {
    const U order = counter_order(static_cast<const T*>(nullptr));
    low = _mm512_add_epi32(set(static_cast<uint32_t>(first)), order);
    high = set(static_cast<uint32_t>(first >> 32));
    high = _mm512_mask_add_epi32(high, _mm512_cmplt_epu32_mask(low, order), high, set(1u));
  }
  template <class T>
  static REPARAM_FUSED_INLINE void halves(const uint64_t* words, U& low, U& high) {
    const U a = _mm512_loadu_si512(words), b = _mm512_loadu_si512(words + 8);
    const U even = shl<1>(counter_order(static_cast<const T*>(nullptr)));
    low = _mm512_permutex2var_epi32(a, even, b);
    high = _mm512_permutex2var_epi32(a, or_(even, set(1u)), b);
  }
  template <class T>
  static REPARAM_FUSED_INLINE void to_tile_order(F (&n)[4]) {
    reorder(n, static_cast<const T*>(nullptr));
  }
  template <class T>
  static REPARAM_FUSED_INLINE void to_tile_order(D (&n)[2]) {
    const D first = n[0];
    n[0] = {_mm512_unpacklo_pd(first.a, n[1].a), _mm512_unpackhi_pd(first.a, n[1].a)};
    n[1] = {_mm512_unpacklo_pd(first.b, n[1].b), _mm512_unpackhi_pd(first.b, n[1].b)};
  }
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void as_tile_of(R (&x)[n]) {
    if constexpr (std::is_same<T, BFloat16>::value) {
      const U even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      for (int i = 0; i < n; i += 2) {
        const F first = x[i];
        x[i] = _mm512_permutex2var_ps(first, even, x[i + 1]);
        x[i + 1] = _mm512_permutex2var_ps(first, or_(even, set(1u)), x[i + 1]);
      }
    }
  }

  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void as_row_of(R (&x)[n]) {
    if constexpr (std::is_same<T, BFloat16>::value) {
      const U low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      for (int i = 0; i < n; i += 2) {
        const F even = x[i];
        x[i] = _mm512_permutex2var_ps(even, low, x[i + 1]);
        x[i + 1] = _mm512_permutex2var_ps(even, or_(low, set(8u)), x[i + 1]);
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
    const __mmask16 odd = _mm512_test_epi32_mask(b, set(0x10000u));
    const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    const U half_step = _mm512_mask_mov_epi32(set(0x7fffu), odd, set(0x8000u));
    return _mm512_mask_add_epi32(b, number, b, half_step);
  }

  static REPARAM_FUSED_INLINE U counter_order(const void*) {
    return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  }
  static REPARAM_FUSED_INLINE U counter_order(const BFloat16*) {
    return _mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  }
  static REPARAM_FUSED_INLINE U counter_order(const double*) {
    return _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  }

  static REPARAM_FUSED_INLINE void reorder(F (&n)[4], const void*) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(n[0], n[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(n[0], n[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(n[2], n[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(n[2], n[3]));
    n[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    n[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    n[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    n[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  static REPARAM_FUSED_INLINE void reorder(F (&n)[4], const BFloat16*) {
    const F even = n[0], odd = n[1];
    n[0] = _mm512_unpacklo_ps(even, n[2]);
    n[1] = _mm512_unpacklo_ps(odd, n[3]);
    n[2] = _mm512_unpackhi_ps(even, n[2]);
    n[3] = _mm512_unpackhi_ps(odd, n[3]);
  }
};

}  // namespace reparam_fused
