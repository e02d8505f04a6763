#pragma once

#include "../common/macros.h"

#include <cstdint>

namespace reparam_fused {

// Two registers of V as one lane type. The rounds of Philox are one chain of
// dependent operations; two chains, written in step, keep the ports busy where
// the scheduler of the CPU could not see from one tile to the next.
template <class V>
struct Twice {
  template <class R>
  struct Both {
    R a, b;
  };
  using F = Both<typename V::F>;
  using D = Both<typename V::D>;
  using U = Both<typename V::U>;
  using Q = Both<typename V::Q>;
  static constexpr int kLanes = 2 * V::kLanes;

  template <class T>
  static REPARAM_FUSED_INLINE auto set(T x) {
    return Both<decltype(V::set(x))>{V::set(x), V::set(x)};
  }
#define REPARAM_FUSED_TWICE(name)                                                \
  template <class R, class... Rest>                                              \
  static REPARAM_FUSED_INLINE auto name(const Both<R>& x, const Rest&... rest) { \
    return Both<decltype(V::name(x.a, rest.a...))>{V::name(x.a, rest.a...),      \
                                                   V::name(x.b, rest.b...)};     \
  }
  REPARAM_FUSED_TWICE(fma)
  REPARAM_FUSED_TWICE(add)
  REPARAM_FUSED_TWICE(sub)
  REPARAM_FUSED_TWICE(mul)
  REPARAM_FUSED_TWICE(div)
  REPARAM_FUSED_TWICE(sqrt)
  REPARAM_FUSED_TWICE(where_equal)
  REPARAM_FUSED_TWICE(flip_sign)
  REPARAM_FUSED_TWICE(bits)
  REPARAM_FUSED_TWICE(from_bits)
  REPARAM_FUSED_TWICE(and_)
  REPARAM_FUSED_TWICE(or_)
  REPARAM_FUSED_TWICE(xor_)
  REPARAM_FUSED_TWICE(xor3)
  REPARAM_FUSED_TWICE(to_float)
  REPARAM_FUSED_TWICE(signed_to_float)
  REPARAM_FUSED_TWICE(to_double)
  REPARAM_FUSED_TWICE(signed_to_double)
#undef REPARAM_FUSED_TWICE
  template <int n, class R>
  static REPARAM_FUSED_INLINE Both<R> shl(const Both<R>& x) {
    return {V::template shl<n>(x.a), V::template shl<n>(x.b)};
  }
  template <int n, class R>
  static REPARAM_FUSED_INLINE Both<R> shr(const Both<R>& x) {
    return {V::template shr<n>(x.a), V::template shr<n>(x.b)};
  }
  template <class R, class S>
  static REPARAM_FUSED_INLINE Both<R> clamp(const Both<R>& x, S limit) {
    return {V::clamp(x.a, limit), V::clamp(x.b, limit)};
  }
  template <class R, class S>
  static REPARAM_FUSED_INLINE Both<R> at_least(const Both<R>& x, S low) {
    return {V::at_least(x.a, low), V::at_least(x.b, low)};
  }
  template <class R, class S>
  static REPARAM_FUSED_INLINE Both<R> at_most(const Both<R>& x, S high) {
    return {V::at_most(x.a, high), V::at_most(x.b, high)};
  }
  static REPARAM_FUSED_INLINE void mulhilo(const U& x, uint32_t m, U& high, U& low) {
    V::mulhilo(x.a, m, high.a, low.a);
    V::mulhilo(x.b, m, high.b, low.b);
  }

  // The first register takes the first kLanes counters and their elements, the
  // second those that follow.
  template <class T>
  static REPARAM_FUSED_INLINE void counters(uint64_t first, U& low, U& high) {
    V::template counters<T>(first, low.a, high.a);
    V::template counters<T>(first + V::kLanes, low.b, high.b);
  }
  template <class T>
  static REPARAM_FUSED_INLINE void halves(const uint64_t* words, U& low, U& high) {
    V::template halves<T>(words, low.a, high.a);
    V::template halves<T>(words + V::kLanes, low.b, high.b);
  }
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void to_tile_order(Both<R> (&x)[n]) {
    R a[n], b[n];
    split(x, a, b);
    V::template to_tile_order<T>(a);
    V::template to_tile_order<T>(b);
    join(a, b, x);
  }
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void as_tile_of(Both<R> (&x)[n]) {
    R a[n], b[n];
    split(x, a, b);
    V::template as_tile_of<T>(a);
    V::template as_tile_of<T>(b);
    join(a, b, x);
  }
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void as_row_of(Both<R> (&x)[n]) {
    R a[n], b[n];
    split(x, a, b);
    V::template as_row_of<T>(a);
    V::template as_row_of<T>(b);
    join(a, b, x);
  }
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void load_tile(const T* p, Both<R> (&x)[n]) {
    R a[n], b[n];
    V::load_tile(p, a);
    V::load_tile(p + n * V::kLanes, b);
    join(a, b, x);
  }
  template <class T, class R, int n>
  static REPARAM_FUSED_INLINE void store_tile(T* p, const Both<R> (&x)[n]) {
    R a[n], b[n];
    split(x, a, b);
    V::store_tile(p, a);
    V::store_tile(p + n * V::kLanes, b);
  }

 private:
  template <class R, int n>
  static REPARAM_FUSED_INLINE void split(const Both<R> (&x)[n], R (&a)[n], R (&b)[n]) {
    for (int i = 0; i < n; ++i) {
      a[i] = x[i].a;
      b[i] = x[i].b;
    }
  }
  template <class R, int n>
  static REPARAM_FUSED_INLINE void join(const R (&a)[n], const R (&b)[n], Both<R> (&x)[n]) {
    for (int i = 0; i < n; ++i) x[i] = {a[i], b[i]};
  }
};

}  // namespace reparam_fused
