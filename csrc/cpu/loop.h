#pragma once

#include "../common/element.h"
#include "../common/kl_divergence.h"
#include "../common/reparam.h"
#include "../common/scalar.h"
#include "derive.h"
#include "kernels.h"
#include "twice.h"

// The one loop over elements. It is included by one file for each ISA, under
// that ISA's target pragmas: everything here is a template over the lane type,
// so that no function compiled for one ISA can be linked into another's code.

namespace reparam_fused {

// Dimensions of one element are merged away, and 2^63 elements have no more.
constexpr int kMaxDims = 63;

// A stretch of elements, consecutive in logical order, that no operand
// interrupts: their places are offset + i * inner stride.
struct Run {
  int length;
  int64_t x, scale, out;
};

// Walks the elements in logical order and gives them out as runs.
template <class V>
class Cursor {
 public:
  REPARAM_FUSED_INLINE Cursor(const Problem& p, int64_t position) : p_(p) {
    for (int d = p.ndim - 1; d >= 0; --d) {
      index_[d] = position % p.sizes[d];
      position /= p.sizes[d];
      step(d, index_[d]);
    }
  }

  // At most `length` elements from here on, to the end of the innermost
  // dimension; the cursor moves past them.
  REPARAM_FUSED_INLINE Run next(int64_t length) {
    const int inner = p_.ndim - 1;
    const int64_t left = p_.sizes[inner] - index_[inner];
    const int64_t taken = length < left ? length : left;
    const Run run{static_cast<int>(taken), x_, scale_, out_};
    index_[inner] += taken;
    step(inner, taken);
    for (int d = inner; d > 0 && index_[d] == p_.sizes[d]; --d) {
      step(d, -index_[d]);
      index_[d] = 0;
      ++index_[d - 1];
      step(d - 1, 1);
    }
    return run;
  }

 private:
  REPARAM_FUSED_INLINE void step(int d, int64_t n) {
    x_ += n * p_.x_strides[d];
    scale_ += n * p_.scale_strides[d];
    out_ += n * p_.out_strides[d];
  }

  const Problem& p_;
  int64_t x_ = 0, scale_ = 0, out_ = 0;
  int64_t index_[kMaxDims];
};

// Walks the segments in logical order.
template <class V>
class Segments {
 public:
  REPARAM_FUSED_INLINE Segments(const Problem& p, int64_t position)
      : p_(p), key_(p.keys), index_(p.first_index), left_(p.segment_numel) {
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
    for (int d = p_.outer_ndim - 1; d >= 0; --d) {
      step(d, 1);
      if (++along_[d] < p_.sizes[d]) return;
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

// A problem for a cursor, which asks for the places of operands alone: neighbouring
// dimensions are one where all operands step through them as through one.
template <class V>
struct Operands {
  Problem problem;

  explicit REPARAM_FUSED_INLINE Operands(const Problem& p) : problem(p) {
    int64_t* const merged[] = {x_, scale_, out_};
    const int64_t* const strides[] = {p.x_strides, p.scale_strides, p.out_strides};
    int last = -1;
    for (int d = 0; d < p.ndim; ++d) {
      bool joined = last >= 0;
      for (int k = 0; joined && k < 3; ++k) {
        joined = merged[k][last] == strides[k][d] * p.sizes[d];
      }
      if (!joined) sizes_[++last] = 1;
      sizes_[last] *= p.sizes[d];
      for (int k = 0; k < 3; ++k) merged[k][last] = strides[k][d];
    }
    problem.ndim = last + 1;
    problem.sizes = sizes_;
    problem.x_strides = x_;
    problem.scale_strides = scale_;
    problem.out_strides = out_;
  }
  Operands(const Operands&) = delete;
  Operands& operator=(const Operands&) = delete;

 private:
  int64_t sizes_[kMaxDims], x_[kMaxDims], scale_[kMaxDims], out_[kMaxDims];
};

// An op that is the same for every form, on the registers of a tile.
template <class Op>
struct ForAll {
  static constexpr bool kReads = Op::kReads;
  static constexpr bool kDraws = Op::kDraws;
  template <class V, class R, int n>
  static REPARAM_FUSED_INLINE void apply(Form, const R (&x)[n], const R (&scale)[n],
                                         const R (&eps)[n], R (&out)[n]) {
    for (int j = 0; j < n; ++j) out[j] = Op::template apply<V, R>(x[j], scale[j], eps[j]);
  }
};

// And one that is not. The form is no template parameter of the loop: a branch for a tile
// costs nothing, twice the kernels twice the build.
template <template <class> class Op>
struct ByForm {
  static constexpr bool kReads = true;
  static constexpr bool kDraws = true;
  template <class V, class R, int n>
  static REPARAM_FUSED_INLINE void apply(Form form, const R (&x)[n], const R (&scale)[n],
                                         const R (&eps)[n], R (&out)[n]) {
    apply_one_of<V>(Forms{}, form, x, scale, eps, out);
  }

 private:
  template <class V, class First, class... Rest, class R, int n>
  static REPARAM_FUSED_INLINE void apply_one_of(FormList<First, Rest...>, Form form,
                                                const R (&x)[n], const R (&scale)[n],
                                                const R (&eps)[n], R (&out)[n]) {
    if constexpr (sizeof...(Rest) > 0) {
      if (form != 0) {
        return apply_one_of<V>(FormList<Rest...>{}, form - 1, x, scale, eps, out);
      }
    }
    ForAll<Op<First>>::template apply<V>(form, x, scale, eps, out);
  }
};

// The elements of runs to their positions in a tile, and back. Indices are of 64 bits: with
// -fwrapv a compiler sees no stretch of memory in shorter ones.
template <class V, class T, class Where>
REPARAM_FUSED_INLINE void copy_in(const Where& where, const Run* runs, int n_runs,
                                  int64_t Run::* place, const T* from, int64_t stride, T* tile) {
  int64_t element = 0;
  for (int r = 0; r < n_runs; ++r) {
    const T* run = from + runs[r].*place;
    for (int64_t i = 0; i < runs[r].length; ++i)
      tile[where.position(element + i)] = run[i * stride];
    element += runs[r].length;
  }
}
template <class V, class T, class Where>
REPARAM_FUSED_INLINE void copy_out(const Where& where, const Run* runs, int n_runs, const T* tile,
                                   T* to, int64_t stride) {
  int64_t element = 0;
  for (int r = 0; r < n_runs; ++r) {
    T* run = to + runs[r].out;
    for (int64_t i = 0; i < runs[r].length; ++i)
      run[i * stride] = tile[where.position(element + i)];
    element += runs[r].length;
  }
}

// The elements of a tile that belong to one segment: those of counters in a row.
template <class V, class T>
struct OneSegment {
  const uint64_t* key;
  uint64_t counter;
  int64_t skipped;  // elements of the first counter that are not in the segment

  REPARAM_FUSED_INLINE int64_t position(int64_t element) const { return skipped + element; }
  template <class R, int n>
  REPARAM_FUSED_INLINE void draw(R (&eps)[n]) const {
    normals<V, T>(key[1] + counter, key[0], eps);
  }
  template <class... Args>
  REPARAM_FUSED_INLINE void gather(Args... args) const {
    copy_in<V, T>(*this, args...);
  }
  template <class... Args>
  REPARAM_FUSED_INLINE void scatter(Args... args) const {
    copy_out<V, T>(*this, args...);
  }
};

// And those of a tile that short segments share: each lane has a counter and a key of its
// own. What is the same for every op is out of line: it would take half as much code again.
template <class V, class T>
class ManySegments {
 public:
  // Takes as many elements as fit, at most this many, and says how many.
  template <class Walk>
  REPARAM_FUSED_INLINE int take(Walk& segments, int64_t most) {
    int count = 0;
    for (int lane = 0; lane < V::kLanes && count < most; ++lane) {
      const uint64_t* key = segments.key();
      const auto index = static_cast<uint64_t>(segments.index());
      counters_[lane] = key[1] + index / kPerCounter;
      seeds_[lane] = key[0];
      const int skipped = static_cast<int>(index % kPerCounter);
      // Of all the counter's elements: those that are not taken are written over.
      for (int i = 0; i < kPerCounter; ++i) {
        positions_[count + i] = lane * kPerCounter + skipped + i;
      }
      int taken = kPerCounter - skipped;
      if (taken > segments.left()) taken = static_cast<int>(segments.left());
      if (taken > most - count) taken = static_cast<int>(most - count);
      count += taken;
      segments.advance(taken);
    }
    return count;
  }

  REPARAM_FUSED_INLINE int64_t position(int64_t element) const { return positions_[element]; }
  template <class R, int n>
  REPARAM_FUSED_NOINLINE void draw(R (&eps)[n]) const {
    normals<V, T>(counters_, seeds_, eps);
  }
  template <class... Args>
  REPARAM_FUSED_NOINLINE void gather(Args... args) const {
    copy_in<V, T>(*this, args...);
  }
  template <class... Args>
  REPARAM_FUSED_NOINLINE void scatter(Args... args) const {
    copy_out<V, T>(*this, args...);
  }

 private:
  static constexpr int kPerCounter = Element<V, T>::kPerCounter;
  // Zeroed, for the lanes that are not taken
  alignas(64) uint64_t counters_[V::kLanes] = {};
  alignas(64) uint64_t seeds_[V::kLanes] = {};
  int positions_[V::kLanes * kPerCounter + kPerCounter - 1];
};

// A tile at a time: a wide one where as many elements are left, a narrow one for
// what remains, and for what is cut by the end of the range or of a slice.
template <class V, class T, class Compute>
class Loop {
 public:
  explicit REPARAM_FUSED_INLINE Loop(const Problem& p, int64_t begin)
      : cursor_(p, begin),
        form_(p.form),
        x_(static_cast<const T*>(p.x)),
        scale_(static_cast<const T*>(p.scale)),
        out_(static_cast<T*>(p.out)),
        x_stride_(p.x_strides[p.ndim - 1]),
        scale_stride_(p.scale_strides[p.ndim - 1]),
        out_stride_(p.out_strides[p.ndim - 1]) {}

  using Wide = Twice<V>;
  static constexpr int kPerCounter = Element<V, T>::kPerCounter;
  static constexpr int kNarrow = V::kLanes * kPerCounter;
  static constexpr int kWide = 2 * kNarrow;

  // The elements of noise index [index, stop) under one key; the first of them is
  // where the cursor stands.
  REPARAM_FUSED_INLINE void segment(const uint64_t* key, int64_t index, int64_t stop) {
    while (index < stop) {
      const int64_t skipped = index % kPerCounter;
      const auto counter = static_cast<uint64_t>(index / kPerCounter);
      const int64_t left = stop - index;
      if (skipped == 0 && left >= kWide) {
        tile<Wide>(OneSegment<Wide, T>{key, counter, 0}, kWide);
        index += kWide;
      } else {
        const int count = static_cast<int>(left < kNarrow - skipped ? left : kNarrow - skipped);
        tile<V>(OneSegment<V, T>{key, counter, skipped}, count);
        index += count;
      }
    }
  }

  // The next elements, of segments that are shorter than a tile: a lane of it takes the
  // counter after that of the lane before, or the first of the next segment.
  REPARAM_FUSED_INLINE void short_segments(Segments<V>& segments, int64_t numel) {
    ManySegments<Wide, T> many;
    while (numel > 0) {
      const int count = many.take(segments, numel);
      tile<Wide>(many, count);
      numel -= count;
    }
  }

 private:
  // Operands that are contiguous over the whole tile are used where they lie,
  // others by way of a buffer.
  template <class W, class Where>
  REPARAM_FUSED_INLINE void tile(const Where& where, int count) {
    int n_runs = 0;
    for (int done = 0; done < count; done += runs_[n_runs++].length) {
      runs_[n_runs] = cursor_.next(count - done);
    }
    const bool whole = n_runs == 1 && count == W::kLanes * kPerCounter;
    const T *x = x_tile_, *scale = scale_tile_;
    if constexpr (Compute::kReads) {
      x = operand<W>(x_, &Run::x, x_stride_, whole, n_runs, where, x_tile_);
      scale = operand<W>(scale_, &Run::scale, scale_stride_, whole, n_runs, where, scale_tile_);
    }
    const bool in_place = whole && out_stride_ == 1;
    compute<W>(x, scale, in_place ? out_ + runs_[0].out : out_tile_, where);
    if (!in_place) where.scatter(runs_, n_runs, out_tile_, out_, out_stride_);
  }

  // A tile takes more instructions than a CPU looks ahead: without a prefetch the loop takes up
  // to a third longer beyond the caches, by where the compiler has put the loads. Three tiles
  // on is 4 to 6 % faster there than the next one, within the caches the same.
  template <class W, class Where>
  REPARAM_FUSED_INLINE const T* operand(const T* from, int64_t Run::* place, int64_t stride,
                                        bool whole, int n_runs, const Where& where, T* tile) {
    if (!whole || stride != 1) {
      where.gather(runs_, n_runs, place, from, stride, tile);
      return tile;
    }
    constexpr int kTile = W::kLanes * kPerCounter, kLine = 64 / static_cast<int>(sizeof(T));
    const T* first = from + runs_[0].*place;
    for (int i = 0; i < kTile; i += kLine) REPARAM_FUSED_PREFETCH(first + 3 * kTile + i);
    return first;
  }

  template <class W, class Where>
  REPARAM_FUSED_INLINE void compute(const T* x, const T* scale, T* out, const Where& where) {
    using R = typename Element<W, T>::Register;
    R x_in[kPerCounter] = {}, scale_in[kPerCounter] = {}, eps[kPerCounter] = {};
    if constexpr (Compute::kDraws) where.draw(eps);
    if constexpr (Compute::kReads) {
      W::load_tile(x, x_in);
      W::load_tile(scale, scale_in);
    }
    R result[kPerCounter];
    Compute::template apply<W>(form_, x_in, scale_in, eps, result);
    W::store_tile(out, result);
  }

  Cursor<V> cursor_;
  const Form form_;
  const T* const x_;
  const T* const scale_;
  T* const out_;
  const int64_t x_stride_, scale_stride_, out_stride_;
  Run runs_[kWide];
  // Zeroed, so that the lanes without an element compute on numbers.
  alignas(64) T x_tile_[kWide] = {};
  alignas(64) T scale_tile_[kWide] = {};
  alignas(64) T out_tile_[kWide];
};

template <class V, class T, class Compute>
void run_kernel(const Problem& p, int64_t begin, int64_t end) {
  using KernelLoop = Loop<V, T, Compute>;
  Segments<V> segments(p, begin);
  if constexpr (Compute::kDraws && V::kLanes > 1) {
    // Where a segment ends within a counter, elements have to be moved in between.
    const bool packed = p.segment_numel % KernelLoop::kPerCounter == 0;
    if (p.segment_numel < KernelLoop::kNarrow / (packed ? 1 : 2)) {
      const Operands<V> operands(p);
      KernelLoop(operands.problem, begin).short_segments(segments, end - begin);
      return;
    }
  }
  KernelLoop loop(p, begin);
  while (begin < end) {
    const int64_t left = segments.left(), index = segments.index();
    const int64_t taken = left < end - begin ? left : end - begin;
    loop.segment(segments.key(), index, index + taken);
    segments.advance(taken);
    begin += taken;
  }
}

template <class V, class Compute>
constexpr KernelTable make_table() {
  return {{run_kernel<V, float, Compute>, run_kernel<V, double, Compute>,
           run_kernel<V, Half, Compute>, run_kernel<V, BFloat16, Compute>}};
}

template <class V>
constexpr Kernels make_kernels() {
  return {V::kName,
          make_table<V, ByForm<Sample>>(),
          make_table<V, ByForm<SampleBackward>>(),
          make_table<V, ForAll<Noise>>(),
          make_table<V, ForAll<KlDivergence>>(),
          make_table<V, ForAll<KlDivergenceBackward>>(),
          derive_children<V>,
          derive_folded<V>};
}

}  // namespace reparam_fused
