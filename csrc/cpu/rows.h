#pragma once

#include "../common/reparam.h"
#include "noise.h"
#include "twice.h"
#include "walk.h"

// What the loops over elements are made of. Included as loop.h is.

namespace reparam_fused {

// An op that is the same for every form, on the registers of a tile.
template <class Op>
struct ForAll {
  static constexpr int kOperands = Op::kOperands, kResults = Op::kResults;
  static constexpr bool kDraws = Op::kDraws;
  template <class V, class Limits, class R, int kIn, int n>
  static REPARAM_FUSED_INLINE void apply(const Limits& limits, const R (&x)[kIn][n],
                                         const R (&eps)[n], R (&z)[kResults][n]) {
    for (int j = 0; j < n; ++j) {
      R in[kIn], out[kResults];
      for (int k = 0; k < kOperands; ++k) in[k] = x[k][j];
      Op::template apply<V>(in, eps[j], limits, out);
      for (int k = 0; k < kResults; ++k) z[k][j] = out[k];
    }
  }
  template <class V, class... Tile>
  static REPARAM_FUSED_INLINE void tile(const Problem&, Tile&... tile) {
    apply<V>(Unbounded{}, tile...);
  }
};

// And one that is not. Form and bounds are no template parameters of the loop: a branch for a
// tile costs nothing, twice the kernels twice the build. Two forms are in the loop; with all of
// them there, and their bounds, it has so many constants that the noise itself takes a third
// longer. The others are out of line, once for all dtypes of a precision.
template <template <class> class Op>
struct ByForm {
  static constexpr int kOperands = Op<LogVar>::kOperands, kResults = Op<LogVar>::kResults;
  static constexpr bool kDraws = Op<LogVar>::kDraws;
  template <class V, class R, int kIn, int n>
  static REPARAM_FUSED_INLINE void tile(const Problem& p, R (&x)[kIn][n], R (&eps)[n],
                                        R (&z)[kResults][n]) {
    if (p.bounds == nullptr && p.form == kLogVar) {
      return ForAll<Op<LogVar>>::template apply<V>(Unbounded{}, x, eps, z);
    }
    if (p.bounds == nullptr && p.form == kStd) {
      return ForAll<Op<Std>>::template apply<V>(Unbounded{}, x, eps, z);
    }
    // By copies: arrays of which a function out of line has the address are in no registers.
    R in[kIn][n], noise[n], out[kResults][n];
    std::memcpy(in, x, sizeof(in));
    std::memcpy(noise, eps, sizeof(noise));
    tile_of<V>(p, in, noise, out);
    std::memcpy(z, out, sizeof(z));
  }

 private:
  template <class V, class R, int kIn, int n>
  static REPARAM_FUSED_NOINLINE void tile_of(const Problem& p, const R (&x)[kIn][n],
                                             const R (&eps)[n], R (&z)[kResults][n]) {
    apply_one_of<V>(Forms{}, p.form, p.bounds, x, eps, z);
  }
  template <class V, class First, class... Rest, class... Tile>
  static REPARAM_FUSED_INLINE void apply_one_of(FormList<First, Rest...>, Form form,
                                                const Bounds* bounds, Tile&... tile) {
    if constexpr (sizeof...(Rest) > 0) {
      if (form != 0) return apply_one_of<V>(FormList<Rest...>{}, form - 1, bounds, tile...);
    }
    if (bounds == nullptr) {
      ForAll<Op<First>>::template apply<V>(Unbounded{}, tile...);
    } else {
      ForAll<Op<First>>::template apply<V>(*bounds, tile...);
    }
  }
};

// One operand or result: its elements in a row, where they lie or in a copy, of which there is room
// for so many.
template <class V, class T, int64_t kRoom = kPadded<V, T>>
class Rows {
 public:
  // Blocks are to be of whole units, which this may raise.
  REPARAM_FUSED_INLINE void open(const Problem& p, const void* memory, const int64_t* strides,
                                 int64_t& unit) {
    walk_.open(p, strides);
    memory_ = static_cast<char*>(const_cast<void*>(memory));
    // What begins within an element, as torch.frombuffer and a slice of a storage may, is copied:
    // whatever goes over a block may take its elements for aligned.
    aligned_ = reinterpret_cast<uintptr_t>(memory) % alignof(T) == 0;
    if (unit < walk_.unit()) unit = walk_.unit();
  }

  // The elements from a position on of the sample that starts so many elements later in memory.
  // Of a block that is not of whole tiles it is a copy, filled up to one.
  REPARAM_FUSED_INLINE const T* load(int64_t position, int64_t count, bool whole,
                                     int64_t sample = 0) {
    T* const place = find(position, count, whole, sample);
    if (place != block_) return place;
    walk_.gather(memory_ + sample * kSize, position, count, reinterpret_cast<char*>(block_));
    if (!whole) std::memset(static_cast<void*>(block_ + count), 0, kTile * sizeof(T));
    return block_;
  }
  // Where they are to be written before they are stored
  REPARAM_FUSED_INLINE T* find(int64_t position, int64_t count, bool whole, int64_t sample = 0) {
    const int64_t offset = whole && aligned_ ? walk_.in_a_row(position, count) : -1;
    return offset < 0 ? block_ : reinterpret_cast<T*>(memory_ + sample * kSize + offset);
  }
  REPARAM_FUSED_INLINE void store(const T* place, int64_t position, int64_t count,
                                  int64_t sample = 0) {
    if (place != block_) return;
    walk_.scatter(memory_ + sample * kSize, position, count, reinterpret_cast<char*>(block_));
  }

 private:
  static constexpr int kTile = BlockNoise<V, T>::kTile;
  static constexpr int64_t kSize = sizeof(T);

  Walk<V, sizeof(T)> walk_;
  char* memory_;
  bool aligned_;
  alignas(64) T block_[kRoom];
};

// A tile takes more instructions than a CPU looks ahead: without a prefetch the loop takes up
// to a third longer beyond the caches, by where the compiler has put the loads. Three tiles
// on is 4 to 6 % faster there than the next one, within the caches the same.
template <int kTile, class In>
REPARAM_FUSED_INLINE void prefetch(const In* tile) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(In));
  for (int j = 0; j < kTile; j += kLine) REPARAM_FUSED_PREFETCH(tile + 3 * kTile + j);
}

// Computes the tiles of a block. What is loaded or stored may be registers instead of elements. Of
// a whole block the last tile may lie over the one before.
template <class Compute, class V, class T, class Out, class... In>
REPARAM_FUSED_INLINE void compute(const Problem& p, const BlockNoise<V, T>& noise, int64_t count,
                                  bool whole, Out* const* out, const In*... in) {
  using W = Twice<V>;
  constexpr int kPerCounter = Element<W, T>::kPerCounter, kTile = W::kLanes * kPerCounter;
  using R = typename Element<W, T>::Register;
  for (int64_t tile = 0; tile < count; tile += kTile) {
    const int64_t i = whole && tile > count - kTile ? count - kTile : tile;
    // An op without operands has a register that is not read: there are no arrays of none.
    R x[Compute::kOperands + 1][kPerCounter], eps[kPerCounter] = {};
    R z[Compute::kResults][kPerCounter];
    (prefetch<kTile>(in + i), ...);
    if constexpr (Compute::kDraws) noise.tile(i, eps);
    int operand = 0;
    (W::load_tile(in + i, x[operand++]), ...);
    Compute::template tile<W>(p, x, eps, z);
    for (int k = 0; k < Compute::kResults; ++k) W::store_tile(out[k] + i, z[k]);
  }
}

// How many elements the block from a position on has, of those up to the end of a range: where it
// can be, it is a whole one, and in a long segment one of counters in a row.
template <class V, class T>
REPARAM_FUSED_INLINE int64_t block_length(const Problem& p, int64_t position, int64_t end,
                                          int64_t unit, bool draws, bool overlap) {
  constexpr int kPerCounter = BlockNoise<V, T>::kPerCounter, kTile = BlockNoise<V, T>::kTile;
  const int64_t most = unit > 0 ? kLarge : kBlock;
  int64_t count = end - position < most ? end - position : most;
  if (unit > 0) {
    const int64_t over = (position + count) % unit;
    return over < count ? count - over : count;
  }
  if (draws && p.segment_numel >= kBlock / 4) {
    const Segments<V> segments(p, 0, position);
    if (count > segments.left()) count = segments.left();
    const int64_t skipped = segments.index() % kPerCounter;
    if (skipped != 0 && segments.left() > 8 * kBlock) return kPerCounter - skipped;
  }
  return count < kTile ? count : count - count % (overlap ? kPerCounter : kTile);
}

}  // namespace reparam_fused
