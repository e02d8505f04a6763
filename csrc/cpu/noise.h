#pragma once

#include "../common/element.h"
#include "../common/normal.h"
#include "kernels.h"
#include "twice.h"
#include "walk.h"

#include <cstring>
#include <type_traits>

// The noise of a block of elements. Included as loop.h is.

namespace reparam_fused {

// Walks the segments in logical order.
template <class V>
class Segments {
 public:
  REPARAM_FUSED_INLINE Segments(const Problem& p, int64_t sample, int64_t position)
      : p_(p),
        key_(p.keys + sample * p.sample_key_stride),
        index_(p.first_index + sample * p.sample_index_stride),
        left_(p.segment_numel) {
    int64_t segment = position / p.segment_numel;
    for (int d = p.outer_ndim - 1; d >= 0; --d) {
      along_[d] = segment % p.sizes[d];
      segment /= p.sizes[d];
      step(d, along_[d]);
    }
    advance(position % p.segment_numel);
  }

  // Of the element that is next: its key, its noise index, and how many are left with it.
  REPARAM_FUSED_INLINE const uint64_t* key() const { return key_; }
  REPARAM_FUSED_INLINE int64_t index() const { return index_; }
  REPARAM_FUSED_INLINE int64_t left() const { return left_; }

  // Past as many of these.
  REPARAM_FUSED_INLINE void advance(int64_t n) {
    index_ += n;
    left_ -= n;
    if (left_ > 0) return;
    index_ -= p_.segment_numel;
    left_ = p_.segment_numel;
    if (p_.outer_ndim > 0) advance_segments(1);
  }

  // How many segments from here on are whole and at one distance from each other in the keys and
  // in the noise
  REPARAM_FUSED_INLINE int64_t alike() const {
    const int inner = p_.outer_ndim - 1;
    return inner < 0 || left_ < p_.segment_numel ? 0 : p_.sizes[inner] - along_[inner];
  }
  REPARAM_FUSED_INLINE int64_t key_step() const { return p_.key_strides[p_.outer_ndim - 1]; }
  REPARAM_FUSED_INLINE int64_t index_step() const { return p_.index_strides[p_.outer_ndim - 1]; }
  // Past as many of these.
  REPARAM_FUSED_INLINE void advance_segments(int64_t n) {
    for (int d = p_.outer_ndim - 1; d >= 0; --d, n = 1) {
      step(d, n);
      along_[d] += n;
      if (along_[d] < p_.sizes[d]) return;
      step(d, -along_[d]);
      along_[d] = 0;
    }
  }

 private:
  REPARAM_FUSED_INLINE void step(int d, int64_t n) {
    key_ += n * p_.key_strides[d];
    index_ += n * p_.index_strides[d];
  }

  const Problem& p_;
  const uint64_t* key_;
  int64_t index_, left_;
  int64_t along_[kMaxDims];
};

// What a block will read and write where it lies: without being asked for while noise is drawn
// ahead, memory would be idle then, and the rest wait for it.
template <class V>
struct Wanted {
  int n = 0, size = 0;
  const char* rows[kMaxOperands + kMaxResults];

  template <class T>
  REPARAM_FUSED_INLINE void add(const T* row) {
    rows[n++] = reinterpret_cast<const char*>(row);
    size = sizeof(T);
  }
  REPARAM_FUSED_INLINE void prefetch(int elements) {
    for (int k = 0; k < n; ++k) {
      for (int i = 0; i < elements * size; i += 64) REPARAM_FUSED_PREFETCH(rows[k] + i);
      rows[k] += elements * size;
    }
  }
};

// The noise of elements that no single counter starts: of short segments, or from within a
// counter on. Each lane has a counter and a key of its own; S is float or double.
template <class V, class S>
class Draws {
 public:
  // Of `count` elements, in a row. Up to a tile after them is written over.
  static REPARAM_FUSED_NOINLINE void draw(Segments<V> segments, int64_t count, Wanted<V> wanted,
                                          S* eps) {
    Draws draws;
    while (count > 0) {
      const int64_t taken = draws.take(segments, count);
      draws.finish(eps, wanted);
      eps += taken;
      count -= taken;
    }
  }

 private:
  using W = Twice<V>;
  static constexpr int kPerCounter = Element<W, S>::kPerCounter;
  static constexpr int64_t kMost = 8 * W::kLanes;

  // Adds the next elements, as many as the lanes hold, and says how many.
  REPARAM_FUSED_INLINE int64_t take(Segments<V>& segments, int64_t most) {
    int64_t taken = 0;
    lanes_ = n_runs_ = 0;
    gaps_ = false;
    while (taken < most && lanes_ < kMost) {
      const int64_t length = segments.left();
      int64_t n = segments.alike();
      if (n > 0) {
        const uint64_t* const key = segments.key();
        const int64_t key_step = segments.key_step(), index_step = segments.index_step();
        const int64_t index = segments.index();
        // Each of them takes as many lanes as the first or, where it starts elsewhere within a
        // counter, perhaps one more.
        const int64_t lanes =
            lanes_of(index_step % kPerCounter == 0 ? index : kPerCounter - 1, length);
        n = least(n, least((most - taken) / length, (kMost - lanes_) / lanes));
        if (lanes == 1 || (lanes <= 4 && index_step % kPerCounter == 0)) {
          add_alike(key, key_step, index, index_step, length, n, lanes);
        } else {
          for (int64_t i = 0; i < n; ++i) add(key + i * key_step, index + i * index_step, length);
        }
        if (n > 0) segments.advance_segments(n);
        taken += n * length;
      }
      if (n == 0) {
        // A part of one
        const int64_t room = (kMost - lanes_) * kPerCounter - segments.index() % kPerCounter;
        const int64_t part = least(room, least(length, most - taken));
        add(segments.key(), segments.index(), part);
        segments.advance(part);
        taken += part;
      }
    }
    return taken;
  }

  static REPARAM_FUSED_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  static REPARAM_FUSED_INLINE int64_t lanes_of(int64_t index, int64_t length) {
    const auto skipped = static_cast<uint64_t>(index) % kPerCounter;
    return static_cast<int64_t>((skipped + static_cast<uint64_t>(length) + kPerCounter - 1) /
                                kPerCounter);
  }

  REPARAM_FUSED_INLINE void add(const uint64_t* key, int64_t index, int64_t length) {
    const uint64_t counter = key[1] + static_cast<uint64_t>(index) / kPerCounter, seed = key[0];
    const int64_t lanes = lanes_of(index, length);
    int64_t i = 0;
    do {
      for (int64_t j = 0; j < 4; ++j) {
        counters_[lanes_ + i + j] = counter + static_cast<uint64_t>(i + j);
        seeds_[lanes_ + i + j] = seed;
      }
      i += 4;
    } while (i < lanes);
    const auto skipped = static_cast<int64_t>(static_cast<uint64_t>(index) % kPerCounter);
    runs_[n_runs_++] = {lanes_ * kPerCounter + skipped, length};
    gaps_ |= lanes * kPerCounter != length;
    lanes_ += lanes;
  }

  // The same of n segments, of so many lanes each: few, for which a loop over them is too short.
  REPARAM_FUSED_INLINE void add_alike(const uint64_t* key, int64_t key_step, int64_t index,
                                      int64_t index_step, int64_t length, int64_t n,
                                      int64_t lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = lanes_ + i * lanes + lane;
        const auto counter = static_cast<uint64_t>(index + i * index_step) / kPerCounter;
        counters_[at] = key[i * key_step + 1] + counter + static_cast<uint64_t>(lane);
        seeds_[at] = key[i * key_step];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const auto skipped = static_cast<uint64_t>(index + i * index_step) % kPerCounter;
      runs_[n_runs_ + i] = {(lanes_ + i * lanes) * kPerCounter + static_cast<int64_t>(skipped),
                            length};
    }
    lanes_ += n * lanes;
    n_runs_ += n;
    gaps_ |= length != lanes * kPerCounter;
  }

  // Draws what was added.
  REPARAM_FUSED_INLINE void finish(S* eps, Wanted<V>& wanted) {
    for (int64_t lane = lanes_; lane % W::kLanes != 0; ++lane) counters_[lane] = seeds_[lane] = 0;
    S* const elements = gaps_ ? elements_ : eps;
    for (int64_t lane = 0; lane < lanes_; lane += W::kLanes) {
      wanted.prefetch(W::kLanes * kPerCounter);
      typename Element<W, S>::Register tile[kPerCounter];
      normals<W, S>(counters_ + lane, seeds_ + lane, tile);
      W::store_tile(elements + lane * kPerCounter, tile);
    }
    if (!gaps_) return;
    for (int64_t r = 0; r < n_runs_; ++r) {
      // Counters as they are, of which there are few: what is written too much is written over.
      const S* const from = elements_ + runs_[r].from;
      const int64_t length = runs_[r].length;
      std::memcpy(eps, from, 16);
      if (length > kPerCounter) std::memcpy(eps + kPerCounter, from + kPerCounter, 16);
      if (length > 2 * kPerCounter) std::memcpy(eps, from, length * sizeof(S));
      eps += length;
    }
  }

  struct Run {
    int64_t from, length;
  };
  int64_t lanes_, n_runs_;
  bool gaps_;
  Run runs_[kMost];
  alignas(64) S elements_[(kMost + 1) * kPerCounter];
  alignas(64) uint64_t counters_[kMost + 3], seeds_[kMost + 3];
};

// And with room for a tile that is not full
template <class V, class T>
constexpr int64_t kPadded = kLarge + Twice<V>::kLanes * Element<V, T>::kPerCounter;

// The noise of a block: by counters in a row from one on, or drawn ahead.
template <class V, class T>
class BlockNoise {
 public:
  using W = Twice<V>;
  using S = std::conditional_t<std::is_same<T, double>::value, double, float>;
  static constexpr int kPerCounter = Element<W, T>::kPerCounter;
  static constexpr int kTile = W::kLanes * kPerCounter;

  REPARAM_FUSED_INLINE void start(const Problem& p, int64_t sample, int64_t position, int64_t count,
                                  const Wanted<V>& wanted) {
    const Segments<V> segments(p, sample, position);
    in_a_row_ = count <= segments.left() && segments.index() % kPerCounter == 0;
    if (in_a_row_) {
      seed_ = segments.key()[0];
      counter_ = segments.key()[1] + static_cast<uint64_t>(segments.index() / kPerCounter);
    } else {
      Draws<V, S>::draw(segments, count, wanted, drawn_);
      if (count % kTile != 0) std::memset(drawn_ + count, 0, kTile * sizeof(S));
    }
  }

  // The noise of a block of so many elements from now on, which is asked for more than once.
  REPARAM_FUSED_NOINLINE void keep(int64_t count) {
    if (!in_a_row_) return;
    for (int64_t i = 0; i < count; i += kTile) {
      typename Element<W, T>::Register eps[kPerCounter];
      tile(i, eps);
      W::template as_row_of<T>(eps);
      W::store_tile(drawn_ + i, eps);
    }
    in_a_row_ = false;
  }

  // Of the tile whose first element this is
  template <class R>
  REPARAM_FUSED_INLINE void tile(int64_t first, R (&eps)[kPerCounter]) const {
    if (in_a_row_) {
      normals<W, T>(counter_ + static_cast<uint64_t>(first / kPerCounter), seed_, eps);
    } else {
      W::load_tile(drawn_ + first, eps);
      W::template as_tile_of<T>(eps);
    }
  }

 private:
  bool in_a_row_;
  uint64_t seed_, counter_;
  alignas(64) S drawn_[kPadded<V, T>];
};

}  // namespace reparam_fused
