#pragma once

#include "../common/reparam.h"
#include "../common/scalar.h"
#include "kernels.h"

// The one loop over elements. It is included by one file for each ISA, under
// that ISA's target pragmas: everything here is a template over the lane type,
// so that no function compiled for one ISA can be linked into another's code.

namespace reparam_fused {

template <class V, class T>
struct Element {
  using Register = typename V::F;
  static constexpr int kPerCounter = 4;
};
template <class V>
struct Element<V, double> {
  using Register = typename V::D;
  static constexpr int kPerCounter = 2;
};

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

  static constexpr int kMaxDims = 64; // at::kDimVectorStaticSize and TensorIterator allow no more
  const Problem& p_;
  int64_t x_ = 0, log_var_ = 0, out_ = 0;
  int64_t index_[kMaxDims];
};

// kLanes counters' worth of elements.
template <class V, class T, class Op>
REPARAM_FUSED_INLINE void compute_tile(
    const T* x, const T* log_var, T* out, uint64_t first_counter, uint64_t seed) {
  using R = typename Element<V, T>::Register;
  R eps[Element<V, T>::kPerCounter];
  normals<V>(first_counter, seed, eps);
#if !defined(_MSC_VER)
#pragma GCC unroll 4
#endif
  for (int j = 0; j < Element<V, T>::kPerCounter; ++j) {
    const int at = j * V::kLanes;
    const R value = Op::template apply<V, R>(V::load(x + at), V::load(log_var + at), eps[j]);
    V::store(out + at, value);
  }
}

template <class V, class T, class Op>
void run_kernel(const Problem& p, int64_t begin, int64_t end) {
  constexpr int kPerCounter = Element<V, T>::kPerCounter;
  constexpr int kTile = V::kLanes * kPerCounter;
  const int inner = p.ndim - 1;
  const int64_t x_stride = p.x_strides[inner];
  const int64_t log_var_stride = p.log_var_strides[inner];
  const int64_t out_stride = p.out_strides[inner];
  const T* const x = static_cast<const T*>(p.x);
  const T* const log_var = static_cast<const T*>(p.log_var);
  T* const out = static_cast<T*>(p.out);

  // Where a tile is cut, or an operand is not contiguous over it, its elements
  // are gathered here. Zeroed, so that unused lanes compute on numbers.
  alignas(64) T x_tile[kTile] = {};
  alignas(64) T log_var_tile[kTile] = {};
  alignas(64) T out_tile[kTile];
  Run runs[kTile];

  Cursor<V> cursor(p, begin);
  int64_t position = begin;
  while (position < end) {
    // The noise index starts from 0 in each slice.
    const int64_t slice = position / p.slice_numel;
    const uint64_t seed = p.keys[2 * slice];
    const uint64_t offset = p.keys[2 * slice + 1];
    int64_t index = position - slice * p.slice_numel;
    const int64_t slice_left = p.slice_numel - index;
    const int64_t stop = index + (slice_left < end - position ? slice_left : end - position);
    position += stop - index;

    while (index < stop) {
      const int skipped = static_cast<int>(index % kTile);
      const int count = static_cast<int>(stop - index < kTile - skipped ? stop - index : kTile - skipped);
      const uint64_t counter = offset + static_cast<uint64_t>((index - skipped) / kPerCounter);
      index += count;

      int n_runs = 0;
      for (int done = 0; done < count; done += runs[n_runs++].length) {
        runs[n_runs] = cursor.next(count - done);
      }
      const bool whole = n_runs == 1 && count == kTile;

      const T* x_in = x + runs[0].x;
      if (!(whole && x_stride == 1)) {
        T* to = x_tile + skipped;
        for (int r = 0; r < n_runs; ++r) {
          for (int i = 0; i < runs[r].length; ++i) *to++ = x[runs[r].x + i * x_stride];
        }
        x_in = x_tile;
      }
      const T* log_var_in = log_var + runs[0].log_var;
      if (!(whole && log_var_stride == 1)) {
        T* to = log_var_tile + skipped;
        for (int r = 0; r < n_runs; ++r) {
          for (int i = 0; i < runs[r].length; ++i) {
            *to++ = log_var[runs[r].log_var + i * log_var_stride];
          }
        }
        log_var_in = log_var_tile;
      }
      if (whole && out_stride == 1) {
        compute_tile<V, T, Op>(x_in, log_var_in, out + runs[0].out, counter, seed);
        continue;
      }
      compute_tile<V, T, Op>(x_in, log_var_in, out_tile, counter, seed);
      const T* from = out_tile + skipped;
      for (int r = 0; r < n_runs; ++r) {
        for (int i = 0; i < runs[r].length; ++i) out[runs[r].out + i * out_stride] = *from++;
      }
    }
  }
}

template <class V>
constexpr Kernels make_kernels() {
  return {
      V::kName,
      {run_kernel<V, float, Sample>, run_kernel<V, double, Sample>, run_kernel<V, Half, Sample>,
       run_kernel<V, BFloat16, Sample>},
      {run_kernel<V, float, SampleBackward>, run_kernel<V, double, SampleBackward>,
       run_kernel<V, Half, SampleBackward>, run_kernel<V, BFloat16, SampleBackward>}};
}

} // namespace reparam_fused
