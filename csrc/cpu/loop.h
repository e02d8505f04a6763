#pragma once

#include "../common/element.h"
#include "../common/kl_divergence.h"
#include "../common/reparam.h"
#include "../common/scalar.h"
#include "kernels.h"
#include "twice.h"

// The one loop over elements. It is included by one file for each ISA, under
// that ISA's target pragmas: everything here is a template over the lane type,
// so that no function compiled for one ISA can be linked into another's code.

namespace reparam_fused {

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

  // Dimensions of one element are merged away, and 2^63 elements have no more.
  static constexpr int kMaxDims = 63;
  const Problem& p_;
  int64_t x_ = 0, scale_ = 0, out_ = 0;
  int64_t index_[kMaxDims];
};

template <class V, class T, class Op>
REPARAM_FUSED_INLINE void apply_tile(const T* x, const T* scale, T* out,
                                     const typename Element<V, T>::Register* eps) {
  constexpr int kRegisters = Element<V, T>::kPerCounter;
  using R = typename Element<V, T>::Register;
  R x_in[kRegisters] = {}, scale_in[kRegisters] = {}, result[kRegisters];
  if constexpr (Op::kReads) {
    V::load_tile(x, x_in);
    V::load_tile(scale, scale_in);
  }
  for (int j = 0; j < kRegisters; ++j) {
    result[j] = Op::template apply<V, R>(x_in[j], scale_in[j], eps[j]);
  }
  V::store_tile(out, result);
}

// A tile of an op that is not the same for each form. The form is no template parameter of
// the loop: a branch for a tile costs nothing, twice the kernels twice the build.
template <template <class> class Op>
struct ByForm {
  static constexpr bool kReads = true;
  static constexpr bool kDraws = true;
  template <class V, class T>
  static REPARAM_FUSED_INLINE void tile(Form form, const T* x, const T* scale, T* out,
                                        const typename Element<V, T>::Register* eps) {
    tile_of<V>(Forms{}, form, x, scale, out, eps);
  }

 private:
  template <class V, class T, class First, class... Rest>
  static REPARAM_FUSED_INLINE void tile_of(FormList<First, Rest...>, Form form, const T* x,
                                           const T* scale, T* out,
                                           const typename Element<V, T>::Register* eps) {
    if constexpr (sizeof...(Rest) > 0) {
      if (form != 0) return tile_of<V>(FormList<Rest...>{}, form - 1, x, scale, out, eps);
    }
    apply_tile<V, T, Op<First>>(x, scale, out, eps);
  }
};

// And of one that is.
template <class Op>
struct ForAll {
  static constexpr bool kReads = Op::kReads;
  static constexpr bool kDraws = Op::kDraws;
  template <class V, class T>
  static REPARAM_FUSED_INLINE void tile(Form, const T* x, const T* scale, T* out,
                                        const typename Element<V, T>::Register* eps) {
    apply_tile<V, T, Op>(x, scale, out, eps);
  }
};

// kLanes counters' worth of elements, contiguous in memory, of which the first has the
// noise index counter * kPerCounter under this key, if the op draws.
template <class V, class T, class Compute>
REPARAM_FUSED_INLINE void compute_tile(Form form, const T* x, const T* scale, T* out,
                                       const uint64_t* key, uint64_t counter) {
  typename Element<V, T>::Register eps[Element<V, T>::kPerCounter] = {};
  if constexpr (Compute::kDraws) normals<V, T>(key[1] + counter, key[0], eps);
  Compute::template tile<V, T>(form, x, scale, out, eps);
}

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

  // The elements of noise index [index, stop) under one key; the first of them is
  // where the cursor stands.
  REPARAM_FUSED_INLINE void segment(const uint64_t* key, int64_t index, int64_t stop) {
    while (index < stop) {
      const int skipped = static_cast<int>(index % kPerCounter);
      const auto counter = static_cast<uint64_t>(index / kPerCounter);
      const int64_t left = stop - index;
      if (skipped == 0 && left >= kWide) {
        tile<Twice<V>>(key, counter, 0, kWide);
        index += kWide;
      } else {
        const int count = static_cast<int>(left < kNarrow - skipped ? left : kNarrow - skipped);
        tile<V>(key, counter, skipped, count);
        index += count;
      }
    }
  }

 private:
  static constexpr int kPerCounter = Element<V, T>::kPerCounter;
  static constexpr int kNarrow = V::kLanes * kPerCounter;
  static constexpr int kWide = 2 * kNarrow;

  // Operands that are contiguous over the whole tile are used where they lie,
  // others by way of a buffer.
  template <class W>
  REPARAM_FUSED_INLINE void tile(const uint64_t* key, uint64_t counter, int skipped, int count) {
    int n_runs = 0;
    for (int done = 0; done < count; done += runs_[n_runs++].length) {
      runs_[n_runs] = cursor_.next(count - done);
    }
    const bool whole = n_runs == 1 && count == W::kLanes * kPerCounter;
    const T* x = x_ + runs_[0].x;
    const T* scale = scale_ + runs_[0].scale;
    if (Compute::kReads && (!whole || x_stride_ != 1)) {
      x = gather(x_, &Run::x, x_stride_, n_runs, x_tile_, skipped);
    }
    if (Compute::kReads && (!whole || scale_stride_ != 1)) {
      scale = gather(scale_, &Run::scale, scale_stride_, n_runs, scale_tile_, skipped);
    }
    const bool in_place = whole && out_stride_ == 1;
    T* out = in_place ? out_ + runs_[0].out : out_tile_;
    compute_tile<W, T, Compute>(form_, x, scale, out, key, counter);
    if (!in_place) scatter(n_runs, skipped);
  }

  REPARAM_FUSED_INLINE const T* gather(const T* from, int64_t Run::* place, int64_t stride,
                                       int n_runs, T* tile, int skipped) {
    T* to = tile + skipped;
    for (int r = 0; r < n_runs; ++r) {
      const T* run = from + runs_[r].*place;
      for (int i = 0; i < runs_[r].length; ++i) *to++ = run[i * stride];
    }
    return tile;
  }

  REPARAM_FUSED_INLINE void scatter(int n_runs, int skipped) {
    const T* from = out_tile_ + skipped;
    for (int r = 0; r < n_runs; ++r) {
      T* run = out_ + runs_[r].out;
      for (int i = 0; i < runs_[r].length; ++i) run[i * out_stride_] = *from++;
    }
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

// The noise index of a segment's first element; the key moves on to its own.
template <class V>
REPARAM_FUSED_INLINE int64_t start_of_segment(const Problem& p, int64_t segment,
                                              const uint64_t*& key) {
  int64_t index = p.first_index;
  for (int d = p.outer_ndim - 1; segment > 0; --d) {
    const int64_t along = segment % p.sizes[d];
    segment /= p.sizes[d];
    index += along * p.index_strides[d];
    key += along * p.key_strides[d];
  }
  return index;
}

template <class V, class T, class Compute>
void run_kernel(const Problem& p, int64_t begin, int64_t end) {
  Loop<V, T, Compute> loop(p, begin);
  for (int64_t position = begin; position < end;) {
    const int64_t segment = position / p.segment_numel;
    const int64_t skipped = position - segment * p.segment_numel;
    const int64_t left = p.segment_numel - skipped;
    const int64_t taken = left < end - position ? left : end - position;
    const uint64_t* key = p.keys;
    const int64_t index = skipped + start_of_segment<V>(p, segment, key);
    loop.segment(key, index, index + taken);
    position += taken;
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
          make_table<V, ForAll<KlDivergenceBackward>>()};
}

}  // namespace reparam_fused
