#pragma once

#include "../common/element.h"
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
  int64_t x, log_var, out;
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
    const Run run{static_cast<int>(taken), x_, log_var_, out_};
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
    log_var_ += n * p_.log_var_strides[d];
    out_ += n * p_.out_strides[d];
  }

  // Dimensions of one element are merged away, and 2^63 elements have no more.
  static constexpr int kMaxDims = 63;
  const Problem& p_;
  int64_t x_ = 0, log_var_ = 0, out_ = 0;
  int64_t index_[kMaxDims];
};

// kLanes counters' worth of elements, contiguous in memory.
template <class V, class T, class Op>
REPARAM_FUSED_INLINE void compute_tile(const T* x, const T* log_var, T* out, uint64_t first_counter,
                                       uint64_t seed) {
  constexpr int kRegisters = Element<V, T>::kPerCounter;
  using R = typename Element<V, T>::Register;
  R eps[kRegisters], x_in[kRegisters], log_var_in[kRegisters], result[kRegisters];
  normals<V, T>(first_counter, seed, eps);
  V::load_tile(x, x_in);
  V::load_tile(log_var, log_var_in);
  for (int j = 0; j < kRegisters; ++j) {
    result[j] = Op::template apply<V, R>(x_in[j], log_var_in[j], eps[j]);
  }
  V::store_tile(out, result);
}

// A tile at a time: a wide one where as many elements are left, a narrow one for
// what remains, and for what is cut by the end of the range or of a slice.
template <class V, class T, class Op>
class Loop {
 public:
  explicit REPARAM_FUSED_INLINE Loop(const Problem& p, int64_t begin)
      : cursor_(p, begin),
        x_(static_cast<const T*>(p.x)),
        log_var_(static_cast<const T*>(p.log_var)),
        out_(static_cast<T*>(p.out)),
        x_stride_(p.x_strides[p.ndim - 1]),
        log_var_stride_(p.log_var_strides[p.ndim - 1]),
        out_stride_(p.out_strides[p.ndim - 1]) {}

  // The elements of noise index [index, stop) under one key; the first of them is
  // where the cursor stands.
  REPARAM_FUSED_INLINE void slice(uint64_t seed, uint64_t offset, int64_t index, int64_t stop) {
    while (index < stop) {
      const int skipped = static_cast<int>(index % kNarrow);
      const uint64_t counter = offset + static_cast<uint64_t>((index - skipped) / kPerCounter);
      const int64_t left = stop - index;
      if (skipped == 0 && left >= kWide) {
        tile<Twice<V>>(seed, counter, 0, kWide);
        index += kWide;
      } else {
        const int count = static_cast<int>(left < kNarrow - skipped ? left : kNarrow - skipped);
        tile<V>(seed, counter, skipped, count);
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
  REPARAM_FUSED_INLINE void tile(uint64_t seed, uint64_t counter, int skipped, int count) {
    int n_runs = 0;
    for (int done = 0; done < count; done += runs_[n_runs++].length) {
      runs_[n_runs] = cursor_.next(count - done);
    }
    const bool whole = n_runs == 1 && count == W::kLanes * kPerCounter;
    const T* x = x_ + runs_[0].x;
    const T* log_var = log_var_ + runs_[0].log_var;
    if (!whole || x_stride_ != 1) x = gather(x_, &Run::x, x_stride_, n_runs, x_tile_, skipped);
    if (!whole || log_var_stride_ != 1) {
      log_var = gather(log_var_, &Run::log_var, log_var_stride_, n_runs, log_var_tile_, skipped);
    }
    if (whole && out_stride_ == 1) {
      compute_tile<W, T, Op>(x, log_var, out_ + runs_[0].out, counter, seed);
    } else {
      compute_tile<W, T, Op>(x, log_var, out_tile_, counter, seed);
      scatter(n_runs, skipped);
    }
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
  const T* const x_;
  const T* const log_var_;
  T* const out_;
  const int64_t x_stride_, log_var_stride_, out_stride_;
  Run runs_[kWide];
  // Zeroed, so that the lanes without an element compute on numbers.
  alignas(64) T x_tile_[kWide] = {};
  alignas(64) T log_var_tile_[kWide] = {};
  alignas(64) T out_tile_[kWide];
};

template <class V, class T, class Op>
void run_kernel(const Problem& p, int64_t begin, int64_t end) {
  Loop<V, T, Op> loop(p, begin);
  for (int64_t position = begin; position < end;) {
    const int64_t slice = position / p.slice_numel;
    const int64_t index = position - slice * p.slice_numel;
    const int64_t slice_left = p.slice_numel - index;
    const int64_t taken = slice_left < end - position ? slice_left : end - position;
    loop.slice(p.keys[2 * slice], p.keys[2 * slice + 1], index, index + taken);
    position += taken;
  }
}

template <class V>
constexpr Kernels make_kernels() {
  return {V::kName,
          {run_kernel<V, float, Sample>, run_kernel<V, double, Sample>, run_kernel<V, Half, Sample>,
           run_kernel<V, BFloat16, Sample>},
          {run_kernel<V, float, SampleBackward>, run_kernel<V, double, SampleBackward>,
           run_kernel<V, Half, SampleBackward>, run_kernel<V, BFloat16, SampleBackward>}};
}

}  // namespace reparam_fused
