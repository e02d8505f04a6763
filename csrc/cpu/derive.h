#pragma once

#include "../common/keys.h"
#include "../common/scalar.h"

// The loop over keys, included as loop.h is.

namespace reparam_fused {

// A tile of child keys: those of a key and of a number for each lane.
template <class V>
class ChildKeys {
 public:
  explicit REPARAM_FUSED_INLINE ChildKeys(uint64_t* out) : out_(out) {}

  REPARAM_FUSED_INLINE void add(const uint64_t* key, uint64_t data) {
    seeds_[lane_] = key[0];
    counters_[lane_] = key[1] + data;
    if (++lane_ == V::kLanes) finish();
  }

  // Writes what was added.
  REPARAM_FUSED_INLINE void finish() {
    LaneSeeds<V> seeds;
    typename V::U low, high;
    typename V::F keys[4];
    V::template halves<float>(seeds_, seeds.word0, seeds.word1);
    V::template halves<float>(counters_, low, high);
    child_keys<V>(low, high, seeds, keys);
    float tile[4 * V::kLanes];
    V::store_tile(tile, keys);
    std::memcpy(out_, tile, lane_ * 2 * sizeof(uint64_t));
    out_ += lane_ * 2;
    lane_ = 0;
  }

 private:
  uint64_t* out_;
  int lane_ = 0;
  // Zeroed, for the lanes to which nothing is added
  alignas(64) uint64_t seeds_[V::kLanes] = {};
  alignas(64) uint64_t counters_[V::kLanes] = {};
};

template <class V>
void derive_children(const uint64_t* keys, int64_t n, uint64_t first, int64_t count,
                     uint64_t* out) {
  ChildKeys<V> children(out);
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t k = 0; k < n; ++k) children.add(keys + 2 * k, first + static_cast<uint64_t>(j));
  }
  children.finish();
}

template <class V>
void derive_folded(const uint64_t* keys, int64_t key_stride, const uint64_t* data,
                   int64_t data_stride, int64_t n, uint64_t* out) {
  ChildKeys<V> children(out);
  for (int64_t k = 0; k < n; ++k) children.add(keys + k * key_stride, data[k * data_stride]);
  children.finish();
}

}  // namespace reparam_fused
