#pragma once

#include "../common/terms.h"
#include "rows.h"
#include "sums.h"

// A sample and the sums of its terms, and the gradients of both. By blocks of whole rows, or of
// parts of a long one, which stay in the first cache: what is made of one takes several passes over
// it there, each of an op that others have too, and none of memory. All are in the registers'
// type: a half type is converted where it is read and written.

namespace reparam_fused {

// a + b, and -a
struct Add {
  static constexpr int kOperands = 2, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits&, R* out) {
    out[0] = V::add(in[0], in[1]);
  }
};
struct Minus {
  static constexpr int kOperands = 1, kResults = 1;
  static constexpr bool kDraws = false;
  template <class V, class R, class Limits>
  static REPARAM_FUSED_INLINE void apply(const R* in, R, const Limits&, R* out) {
    out[0] = V::sub(constant<V, R>(0), in[0]);
  }
};

// Elements of the chunk of a row of T
template <class T>
constexpr int64_t kChunk = kSumStride * kSumTerms * 16 / static_cast<int64_t>(sizeof(T));

// One pass over a block, once for all dtypes of a precision
template <class Compute, class V, class S, class... In>
REPARAM_FUSED_NOINLINE void pass_of(const Problem& p, const BlockNoise<V, S>& noise, int64_t count,
                                    bool whole, S* const* out, const In*... in) {
  compute<Compute>(p, noise, count, whole, out, in...);
}

template <class V, class T>
class Head {
 public:
  using S = typename BlockNoise<V, T>::S;

  REPARAM_FUSED_INLINE explicit Head(const Problem& p)
      : p_(p), by_log_var_(p.by_log_var), prior_(p) {
    prior_.form = p.prior_form;
    prior_.bounds = p.prior_bounds;
    int64_t unit = 0;
    for (int k = 0; k < kMaxOperands; ++k) {
      if (p.operands[k] != nullptr) in_[k].open(p, p.operands[k], p.operand_strides[k], unit);
    }
    for (int k = 0; k < kMaxResults; ++k) {
      if (p.results[k] != nullptr) out_[k].open(p, p.results[k], p.result_strides[k], unit);
    }
  }

  // The pieces of a problem: its rows, or the chunks of long ones
  static REPARAM_FUSED_INLINE int64_t pieces_of(const Problem& p) {
    return p.row <= kChunk<T> ? 1 : (p.row + kChunk<T> - 1) / kChunk<T>;
  }

  template <bool kBackward>
  REPARAM_FUSED_INLINE void run(int64_t begin, int64_t end) {
    const int64_t pieces = pieces_of(p_);
    while (begin < end) {
      int64_t first, count, rows = 1;
      if (pieces == 1) {
        rows = p_.row < kMost ? kMost / p_.row : 1;
        if (rows > 4) rows -= rows % 4;  // to end with a counter
        if (rows > end - begin) rows = end - begin;
        first = begin * p_.row;
        count = rows * p_.row;
      } else {
        const int64_t within = begin % pieces * kChunk<T>;
        first = begin / pieces * p_.row + within;
        count = p_.row - within < kChunk<T> ? p_.row - within : kChunk<T>;
      }
      for (int64_t done = 0; done < count; done += kMost) {
        const int64_t part = count - done < kMost ? count - done : kMost;
        open(first + done, part);
        if constexpr (kBackward) {
          backward();
        } else {
          forward(terms_ + done);
        }
      }
      if constexpr (!kBackward) sum(begin, rows, count);
      begin += pieces == 1 ? rows : 1;
    }
  }

 private:
  enum { kMu, kScale, kLoc, kPrior, kGrad };
  static constexpr int kTile = BlockNoise<V, S>::kTile;
  // Elements of a block
  static constexpr int64_t kMost = kBlock < kChunk<T> ? kBlock : kChunk<T>;
  static constexpr int64_t kRoom = kMost + kTile;
  struct Array {
    alignas(64) S elements[kRoom];
    operator S*() { return elements; }
  };

  REPARAM_FUSED_NOINLINE void open(int64_t position, int64_t count) {
    position_ = position;
    count_ = count;
    // For a tile that lies over another its elements have to start a counter.
    whole_ = count >= kTile && count % BlockNoise<V, S>::kPerCounter == 0;
    if (p_.keys == nullptr) return;
    Wanted<V> wanted;
    noise_.start(p_, 0, position, count, wanted);
    // It is drawn once, and asked for by more than one pass.
    if (p_.term != kKlTerm) noise_.keep(count);
  }

  // An operand in the registers' type, where it lies or in an array
  REPARAM_FUSED_NOINLINE const S* operand(int k) {
    const T* const place = in_[k].load(position_, count_, whole_);
    if constexpr (std::is_same<T, S>::value) {
      return place;
    } else {
      convert(place, loaded_[k]);
      return loaded_[k];
    }
  }
  // Where a result is to be written, and what follows
  REPARAM_FUSED_NOINLINE S* result(int k) {
    place_[k] = out_[k].find(position_, count_, whole_);
    if constexpr (std::is_same<T, S>::value) {
      return place_[k];
    } else {
      return made_[k];
    }
  }
  REPARAM_FUSED_NOINLINE void store(int k) {
    if constexpr (!std::is_same<T, S>::value) convert_back(made_[k], place_[k]);
    out_[k].store(place_[k], position_, count_);
  }

  // The first element of the tile after so many: the last one of a whole block may lie over the
  // one before.
  REPARAM_FUSED_INLINE int64_t tile(int64_t i) const {
    return whole_ && i > count_ - kTile ? count_ - kTile : i;
  }
  REPARAM_FUSED_INLINE void convert(const T* from, S* to) const {
    using W = Twice<V>;
    for (int64_t i = 0; i < count_; i += kTile) {
      typename Element<W, T>::Register x[Element<W, T>::kPerCounter];
      W::load_tile(from + tile(i), x);
      W::template as_row_of<T>(x);
      W::store_tile(to + tile(i), x);
    }
  }
  REPARAM_FUSED_INLINE void convert_back(const S* from, T* to) const {
    using W = Twice<V>;
    for (int64_t i = 0; i < count_; i += kTile) {
      typename Element<W, T>::Register x[Element<W, T>::kPerCounter];
      W::load_tile(from + tile(i), x);
      W::template as_tile_of<T>(x);
      W::store_tile(to + tile(i), x);
    }
  }

  // One pass over the block
  template <class Compute, class... In>
  REPARAM_FUSED_INLINE void pass(S* const (&out)[Compute::kResults], const In*... in) {
    pass_of<Compute>(p_, noise_, count_, whole_, out, in...);
  }
  template <template <class> class Op, class... In>
  REPARAM_FUSED_INLINE void pass_by(S* const (&out)[Op<ByLogVar>::kResults], const In*... in) {
    by_log_var_ ? pass<ForAll<Op<ByLogVar>>>(out, in...) : pass<ForAll<Op<BySigma>>>(out, in...);
  }

  // A scale as the terms take it, which may be as it is
  REPARAM_FUSED_INLINE bool is_spread(const Problem& p) const {
    return p.bounds == nullptr && p.form == (by_log_var_ ? kLogVar : kStd);
  }
  REPARAM_FUSED_INLINE const S* to_spread(const Problem& p, const S* scale, S* spread) {
    if (is_spread(p)) return scale;
    S* const out[] = {spread};
    by_log_var_ ? pass_of<ByForm<ToLogVar>>(p, noise_, count_, whole_, out, scale)
                : pass_of<ByForm<ToSigma>>(p, noise_, count_, whole_, out, scale);
    return spread;
  }
  // And its gradient
  REPARAM_FUSED_INLINE void from_spread(const Problem& p, const S* grad, const S* scale, S* to) {
    S* const out[] = {to};
    by_log_var_ ? pass_of<ByForm<FromLogVar>>(p, noise_, count_, whole_, out, grad, scale)
                : pass_of<ByForm<FromSigma>>(p, noise_, count_, whole_, out, grad, scale);
  }

  REPARAM_FUSED_INLINE void forward(S* terms) {
    const bool draws = p_.keys != nullptr, has_prior = p_.operands[kPrior] != nullptr;
    const S *const mu = operand(kMu), *const scale = operand(kScale);
    S* const z = draws ? result(0) : nullptr;
    S* const sample = p_.term == kTanhLogProbTerm ? arrays_[0] : z;
    if (draws) pass<ByForm<Sample>>({sample}, mu, scale);
    const S* const spread = to_spread(p_, scale, arrays_[1]);
    if (p_.term != kKlTerm) {
      S* const log_prob = p_.term == kTanhLogProbTerm ? arrays_[2] : terms;
      pass_by<LogProbTerm>({log_prob}, spread);
      if (p_.term == kTanhLogProbTerm) {
        pass<ForAll<Tanh>>({z, terms}, written(sample), written(log_prob));
      }
    } else if (has_prior) {
      const S* const prior = to_spread(prior_, operand(kPrior), arrays_[2]);
      pass_by<PriorTerm>({terms}, mu, spread, operand(kLoc), prior);
    } else {
      pass_by<KlTerm>({terms}, mu, spread);
    }
    if (draws) store(0);
  }

  // What one pass has written, for the next
  static REPARAM_FUSED_INLINE const S* written(const S* p) { return p; }

  REPARAM_FUSED_INLINE void backward() {
    const bool draws = p_.keys != nullptr, has_prior = p_.operands[kPrior] != nullptr;
    const S* const grad = grads();
    const S* const scale = operand(kScale);
    const S* const spread = to_spread(p_, scale, arrays_[1]);
    S *const by_mu = arrays_[2], *const by_spread = arrays_[3], *const by_prior = arrays_[4];
    const S* grad_z = draws ? operand(kGrad) : nullptr;
    if (p_.term != kKlTerm) {
      if (p_.term == kTanhLogProbTerm) {
        S* const sample = arrays_[0];
        pass<ByForm<Sample>>({sample}, operand(kMu), scale);
        S* const by_sample = result(0);
        pass<ForAll<TanhBackward>>({by_sample}, grad_z, written(sample), grad);
        grad_z = by_sample;
      }
      pass_by<LogProbTermBackward>({by_spread}, spread, grad);
    } else {
      const S* const mu = operand(kMu);
      if (has_prior) {
        S* const first = draws ? by_mu : result(0);
        const S* const given = operand(kPrior);
        const S* const prior = to_spread(prior_, given, arrays_[0]);
        pass_by<PriorTermBackward>({first, by_spread, by_prior}, mu, spread, operand(kLoc), prior,
                                   grad);
        pass<ForAll<Minus>>({result(2)}, written(first));
        from_spread(prior_, by_prior, given, result(3));
        if (draws) pass<ForAll<Add>>({result(0)}, grad_z, written(first));
      } else {
        if (!draws) std::memset(by_mu, 0, sizeof(Array));
        pass_by<KlTermBackward>({result(0), by_spread}, mu, spread, grad,
                                draws ? grad_z : written(by_mu));
      }
    }
    S* const by_scale = result(1);
    if (draws) {
      S* const by_sample = arrays_[5];
      pass<ByForm<SampleBackward>>({by_sample}, grad_z, scale);
      const S* by_term = by_spread;
      if (!is_spread(p_)) from_spread(p_, by_spread, scale, arrays_[6]), by_term = arrays_[6];
      pass<ForAll<Add>>({by_scale}, written(by_sample), by_term);
    } else {
      from_spread(p_, by_spread, scale, by_scale);
    }
    for (int k = 0; k < kMaxResults; ++k) {
      if (p_.results[k] != nullptr) store(k);
    }
  }

  // The gradient of its row's sum for each element of the block
  REPARAM_FUSED_INLINE const S* grads() {
    const S* grad = static_cast<const S*>(p_.grad_totals) + position_ / p_.row;
    int64_t left = p_.row - position_ % p_.row;
    for (int64_t i = 0; i < count_; left = p_.row, ++grad) {
      const int64_t n = left < count_ - i ? left : count_ - i;
      for (int64_t j = 0; j < n; ++j) grads_[i + j] = *grad;
      i += n;
    }
    if (!whole_) std::memset(grads_ + count_, 0, kTile * sizeof(S));
    return grads_;
  }

  REPARAM_FUSED_INLINE void sum(int64_t piece, int64_t rows, int64_t count) {
    S* const sums = static_cast<S*>(p_.totals) + piece;
    using Sums = reparam_fused::Sums<V, S, 16 / static_cast<int>(sizeof(T))>;
    Sums::template rows<kMost>(terms_, rows, count / rows, sums);
  }

  const Problem& p_;
  const bool by_log_var_;
  Problem prior_;  // its form and bounds as those of the scale
  int64_t position_, count_;
  bool whole_;
  // Of the room that others have so many would take more than the stack of some threads.
  Rows<V, T, kRoom> in_[kMaxOperands], out_[kMaxResults];
  T* place_[kMaxResults];
  BlockNoise<V, S> noise_;
  Array loaded_[std::is_same<T, S>::value ? 1 : kMaxOperands];
  Array made_[std::is_same<T, S>::value ? 1 : kMaxResults];
  Array arrays_[7];
  Array grads_;
  alignas(64) S terms_[kChunk<T> + kTile];
};

// Of pieces [begin, end): of each its sum
template <class V, class T>
void run_head(const Problem& p, int64_t begin, int64_t end) {
  Head<V, T>(p).template run<false>(begin, end);
}
template <class V, class T>
void run_head_backward(const Problem& p, int64_t begin, int64_t end) {
  Head<V, T>(p).template run<true>(begin, end);
}

}  // namespace reparam_fused
