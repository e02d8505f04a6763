#pragma once

#include <cstdint>

#include "macros.h"

// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy
// as 1, 2, 3. SC11): a keyed bijection of 128-bit counters. It is what torch's
// own generators use, needs no state, and any block of it can be had at once.

namespace reparam_fused {

template <class V>
struct PhiloxBlock {
  typename V::U w0, w1, w2, w3;
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;

template <class V>
REPARAM_FUSED_INLINE void philox_round(PhiloxBlock<V>& c, uint32_t key0, uint32_t key1) {
  typename V::U high0, low0, high1, low1;
  V::mulhilo(c.w0, kPhiloxM0, high0, low0);
  V::mulhilo(c.w2, kPhiloxM1, high1, low1);
  c = {V::xor3(high1, c.w1, V::set(key0)), low1, V::xor3(high0, c.w3, V::set(key1)), low0};
}

// The ten rounds on any 128-bit counter, as Random123 defines them.
template <class V>
REPARAM_FUSED_INLINE PhiloxBlock<V> philox4x32_10(PhiloxBlock<V> counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    philox_round<V>(counter, key0, key1);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return counter;
}

}  // namespace reparam_fused
