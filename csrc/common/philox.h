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

// The words of a seed in the lanes, for one round after the other: the same seed in all...
template <class V>
struct OneSeed {
  uint32_t word0, word1;

  explicit REPARAM_FUSED_INLINE OneSeed(uint64_t seed)
      : word0(static_cast<uint32_t>(seed)), word1(static_cast<uint32_t>(seed >> 32)) {}
  REPARAM_FUSED_INLINE typename V::U key0() const { return V::set(word0); }
  REPARAM_FUSED_INLINE typename V::U key1() const { return V::set(word1); }
  REPARAM_FUSED_INLINE void step() {
    word0 += kPhiloxW0;
    word1 += kPhiloxW1;
  }
};
// ... or one of its own in each.
template <class V>
struct LaneSeeds {
  typename V::U word0, word1;

  REPARAM_FUSED_INLINE typename V::U key0() const { return word0; }
  REPARAM_FUSED_INLINE typename V::U key1() const { return word1; }
  REPARAM_FUSED_INLINE void step() {
    word0 = V::add(word0, V::set(kPhiloxW0));
    word1 = V::add(word1, V::set(kPhiloxW1));
  }
};

template <class V, class Seed>
REPARAM_FUSED_INLINE void philox_round(PhiloxBlock<V>& c, const Seed& seed) {
  typename V::U high0, low0, high1, low1;
  V::mulhilo(c.w0, kPhiloxM0, high0, low0);
  V::mulhilo(c.w2, kPhiloxM1, high1, low1);
  c = {V::xor3(high1, c.w1, seed.key0()), low1, V::xor3(high0, c.w3, seed.key1()), low0};
}

// The ten rounds on any 128-bit counter, as Random123 defines them.
template <class V, class Seed>
REPARAM_FUSED_INLINE PhiloxBlock<V> philox4x32_10(PhiloxBlock<V> counter, Seed seed) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    philox_round<V>(counter, seed);
    seed.step();
  }
  return counter;
}

}  // namespace reparam_fused
