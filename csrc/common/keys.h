#pragma once

#include "philox.h"

// Keys derived from keys. Child i of the key (seed, offset) is the Philox block at
// offset + i: its seed is w1 << 32 | w0, its offset w3 << 32 | w2.

namespace reparam_fused {

// The child keys of kLanes counters, which are sums offset + i, as a tile of floats that
// keeps their bits: in little-endian memory the words of a block in order are its key.
template <class V, class Seed>
REPARAM_FUSED_INLINE void child_keys(typename V::U low, typename V::U high, const Seed& seed,
                                     typename V::F (&keys)[4]) {
  const auto w = philox4x32_10<V>({low, high, V::set(0u), V::set(0u)}, seed);
  keys[0] = V::from_bits(w.w0);
  keys[1] = V::from_bits(w.w1);
  keys[2] = V::from_bits(w.w2);
  keys[3] = V::from_bits(w.w3);
  V::template to_tile_order<float>(keys);
}

}  // namespace reparam_fused
