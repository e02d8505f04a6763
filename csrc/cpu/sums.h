#pragma once

#include "../common/problem.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

// Sums of rows, in the order that problem.h has for them. Included as loop.h is: a template over
// the lane type, of whose ISA the compiler makes the additions. What is missing is not added: it
// would be +0, and no sum is -0 in the end.

namespace reparam_fused {

template <class V, class S, int kVector>
struct Sums {
  static constexpr int kStride = kSumStride * kVector;

  // Of rows of n terms each, at most a chunk, and of no more than kMost together
  template <int kMost>
  static REPARAM_FUSED_NOINLINE void rows(const S* terms, int64_t rows, int64_t n, S* sums) {
    if (n == 1) {
      for (int64_t row = 0; row < rows; ++row) sums[row] = terms[row] + S(0);
    } else if (n <= kLanes * kVector && rows > 1) {
      short_rows<kMost>(terms, static_cast<int>(rows), static_cast<int>(n), sums);
    } else {
      for (int64_t row = 0; row < rows; ++row) sums[row] = chunk(terms + row * n, n);
    }
  }

  // Of one chunk of n terms
  static REPARAM_FUSED_NOINLINE S chunk(const S* terms, int64_t n) {
    static_assert(kSumTerms == 4, "as many are added");
    S a[kStride], b[kStride];
    if (n == kStride * kSumTerms) {
      for (int j = 0; j < kStride; ++j) {
        a[j] = ((terms[j] + terms[j + kStride]) + terms[j + 2 * kStride]) + terms[j + 3 * kStride];
      }
    } else {
      const int64_t first = n < kStride ? n : kStride;
      std::memcpy(a, terms, first * sizeof(S));
      std::memset(a + first, 0, (kStride - first) * sizeof(S));
      for (int64_t done = kStride; done < n; done += kStride) {
        const int64_t count = n - done < kStride ? n - done : kStride;
        for (int64_t j = 0; j < count; ++j) a[j] += terms[done + j];
      }
    }
    // Halves over the elements of a vector, 32 vectors, and 4 of those
    S* const lanes = halves<kVector, kSumStride>(a, b);
    S* const warps = halves<kLanes, kSumStride / kLanes>(lanes, lanes == a ? b : a);
    return halves<kSumStride / kLanes, 1>(warps, warps == a ? b : a)[0] + S(0);
  }

 private:
  static constexpr int kLanes = 32;

  // Of n groups of so many after each other one sum each, where it says: in a or in b.
  template <int kSize, int n>
  static REPARAM_FUSED_INLINE S* halves(S* a, S* b) {
    if constexpr (kSize == 1) {
      return a;
    } else {
      halve<kSize>(a, b, n);
      return halves<kSize / 2, n>(b, a);
    }
  }
  template <int kSize>
  static REPARAM_FUSED_INLINE void halve(const S* __restrict from, S* __restrict to, int n) {
    constexpr int kHalf = kSize / 2;
    for (int group = 0; group < n; ++group) {
      for (int i = 0; i < kHalf; ++i) {
        to[group * kHalf + i] = from[group * kSize + i] + from[group * kSize + kHalf + i];
      }
    }
  }
  template <int kSize>
  static REPARAM_FUSED_INLINE const S* halve_all(const S* from, S* to, S* other, int n) {
    if constexpr (kSize == 1) {
      return from;
    } else {
      halve<kSize>(from, to, n);
      return halve_all<kSize / 2>(to, other, to, n);
    }
  }

  // Rows of at most 32 vectors, which are not added one row after the other but all at a time as
  // far as a vector goes.
  template <int kMost>
  static REPARAM_FUSED_INLINE void short_rows(const S* terms, int rows, int n, S* sums) {
    // Rows are filled up to whole vectors: of two terms that is twice as many of them, or 4 times,
    // and where a vector has no more than two, of three terms a third more.
    constexpr int kFilled = kMost * (kVector > 4 ? kVector / 2 : 2);
    S filled[kFilled + kVector], a[kFilled / 2 + kVector], b[kFilled / 4 + kVector];
    const int vectors = (n + kVector - 1) / kVector;
    const S* from = terms;
    if (n % kVector != 0) {
      S* to = filled;
      for (int row = 0; row < rows; ++row, from += n, to += vectors * kVector) {
        // By whole vectors: what is taken of the next row, or of the room behind the last, goes.
        for (int v = 0; v < vectors; ++v) {
          std::memcpy(to + v * kVector, from + v * kVector, kVector * sizeof(S));
        }
        for (int i = n; i < vectors * kVector; ++i) to[i] = 0;
      }
      from = filled;
    }
    const S* const lane = halve_all<kVector>(from, a, b, rows * vectors);
    if (vectors == 1) return add_lanes<1>(lane, rows, 1, sums);
    if (vectors == 2) return add_lanes<2>(lane, rows, 2, sums);
    add_lanes<0>(lane, rows, vectors, sums);
  }

  // Of rows of as many lanes: kKnown, for which the compiler makes no loops, or where that is 0
  // `vectors`
  template <int kKnown>
  static REPARAM_FUSED_INLINE void add_lanes(const S* lane, int rows, int vectors, S* sums) {
    if constexpr (kKnown > 0) vectors = kKnown;
    int lanes = 1;
    while (lanes < vectors) lanes *= 2;
    for (int row = 0; row < rows; ++row, lane += vectors) {
      S sum[kKnown > 0 ? kKnown : kLanes];
      int have = vectors;
      for (int i = 0; i < have; ++i) sum[i] = lane[i];
      for (int half = lanes / 2; half > 0; half /= 2) {
        for (int i = 0; i + half < have; ++i) sum[i] += sum[i + half];
        have = half;
      }
      sums[row] = sum[0] + S(0);
    }
  }
};

// Of rows of n chunks' sums those of their chunks
template <class V, class S>
void sum_chunks(const S* terms, int64_t rows, int64_t n, S* sums) {
  constexpr int kVector = std::is_same<S, double>::value ? 2 : 4;
  constexpr int64_t kChunk = kSumStride * kSumTerms * kVector;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t first = 0; first < n; first += kChunk) {
      *sums++ = Sums<V, S, kVector>::chunk(terms + first, n - first < kChunk ? n - first : kChunk);
    }
    terms += n;
  }
}

}  // namespace reparam_fused
