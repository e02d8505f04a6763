#pragma once

#include "../common/macros.h"
#include "kernels.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

// From memory to blocks of elements in a row, and back. Included as loop.h is.

namespace reparam_fused {

// The elements of one tensor, of so many bytes each, in logical order. A walk has dimensions of
// its own: neighbours are one where this tensor steps through them as through one, whatever the
// others do. So of two operands the one may be used where it lies and the other be copied.
template <class V, int kSize>
class Walk {
 public:
  REPARAM_FUSED_INLINE void open(const Problem& p, const int64_t* strides) {
    last_ = -1;
    numel_ = 1;
    for (int d = 0; d < p.ndim; ++d) {
      const int64_t stride = strides[d] * kSize;
      if (last_ < 0 || strides_[last_] != stride * p.sizes[d]) sizes_[++last_] = 1;
      sizes_[last_] *= p.sizes[d];
      strides_[last_] = stride;
      numel_ *= p.sizes[d];
    }
  }

  // Of how many elements a block is to be a multiple, or 0: of whole rows, where what lies near
  // in memory is in another row, and of whole counters.
  REPARAM_FUSED_INLINE int64_t unit() const {
    if (last_ == 0 || strides_[last_ - 1] == 0 || strides_[last_ - 1] >= strides_[last_]) return 0;
    const int64_t row = sizes_[last_], rows = row % 4 == 0 ? 1 : 4;
    return rows * row <= kBlock ? rows * row : 0;
  }

  // Where `count` elements from a position on lie in a row, if they do: how many bytes from the
  // first of all. Else -1.
  REPARAM_FUSED_INLINE int64_t in_a_row(int64_t position, int64_t count) const {
    if (strides_[last_] != kSize) return -1;
    if (last_ == 0) return position * kSize;
    if (position % sizes_[last_] + count > sizes_[last_]) return -1;
    int64_t offset = 0;
    for (int d = last_; d >= 0; --d) {
      offset += position % sizes_[d] * strides_[d];
      position /= sizes_[d];
    }
    return offset;
  }

  REPARAM_FUSED_NOINLINE void gather(const char* memory, int64_t position, int64_t count,
                                     char* block) const {
    move<kGather>(const_cast<char*>(memory), position, count, block);
    prefetch(const_cast<char*>(memory), position + count, count);
  }
  REPARAM_FUSED_NOINLINE void scatter(char* memory, int64_t position, int64_t count,
                                      char* block) const {
    move<kScatter>(memory, position, count, block);
    prefetch(memory, position + count, count);
  }

 private:
  enum Move { kGather, kScatter, kPrefetch };

  // Asks for the next block where it is spread over memory: no CPU sees that coming.
  REPARAM_FUSED_INLINE void prefetch(char* memory, int64_t position, int64_t count) const {
    if (unit() > 0 && position + count <= numel_) move<kPrefetch>(memory, position, count, nullptr);
  }

  template <Move kMove>
  REPARAM_FUSED_INLINE void move(char* memory, int64_t position, int64_t count, char* block) const {
    int64_t index[kMaxDims];
    for (int d = last_; d >= 0; --d) {
      index[d] = position % sizes_[d];
      position /= sizes_[d];
      memory += index[d] * strides_[d];
    }
    const int64_t n = sizes_[last_], stride = strides_[last_];
    while (count > 0) {
      int64_t rows = 0;
      if (index[last_] == 0 && last_ > 0) {
        rows = count / n;
        const int64_t left = sizes_[last_ - 1] - index[last_ - 1];
        if (rows > left) rows = left;
      }
      if (rows > 0) {
        move_rows<kMove>(memory, stride, n, strides_[last_ - 1], rows, block);
        memory += rows * strides_[last_ - 1];
        block += rows * n * kSize;
        count -= rows * n;
        index[last_ - 1] += rows;
      } else {
        int64_t length = n - index[last_];
        if (length > count) length = count;
        move_rows<kMove>(memory, stride, length, 0, 1, block);
        block += length * kSize;
        count -= length;
        memory += length * stride;
        index[last_] += length;
      }
      for (int d = last_; d > 0; --d) {
        if (index[d] != sizes_[d]) {
          if (d != last_) break;
          continue;
        }
        memory += strides_[d - 1] - index[d] * strides_[d];
        index[d] = 0;
        ++index[d - 1];
      }
    }
  }

  template <Move kMove>
  static REPARAM_FUSED_INLINE void copy(char* memory, char* block) {
    std::memcpy(kMove == kScatter ? memory : block, kMove == kScatter ? block : memory, kSize);
  }

  template <Move kMove>
  static REPARAM_FUSED_INLINE void move_rows(char* memory, int64_t stride, int64_t n,
                                             int64_t row_stride, int64_t rows, char* block) {
    if constexpr (kMove == kPrefetch) {
      if (row_stride != kSize || rows * kSize < 64) return;  // columns are near each other
      for (int64_t c = 0; c < n; ++c) {
        for (int64_t r = 0; r < rows * kSize; r += 64) {
          REPARAM_FUSED_PREFETCH(memory + c * stride + r);
        }
      }
    } else if (stride == kSize) {
      for (int64_t r = 0; r < rows; ++r, memory += row_stride, block += n * kSize) {
        copy_run<1>(kMove == kScatter ? memory : block, kMove == kScatter ? block : memory,
                    n * kSize);
      }
    } else if (kMove == kGather && stride == 0) {
      for (int64_t r = 0; r < rows; ++r, memory += row_stride, block += n * kSize) {
        char same[64];
        for (int i = 0; i < 64; i += kSize) std::memcpy(same + i, memory, kSize);
        copy_run<0>(block, same, n * kSize);
      }
    } else if (row_stride < stride && rows >= 4) {
      if constexpr (kSize == 8) {
        move_squares<kMove, 2>(memory, stride, n, row_stride, rows, block);
      } else if (rows >= 8) {
        move_squares<kMove, 8>(memory, stride, n, row_stride, rows, block);
      } else {
        move_squares<kMove, 4>(memory, stride, n, row_stride, rows, block);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r, memory += row_stride, block += n * kSize) {
        for (int64_t i = 0; i < n; ++i) copy<kMove>(memory + i * stride, block + i * kSize);
      }
    }
  }

  // Square by square, so that it is lines of the cache and not elements that are moved
  template <Move kMove, int kSide>
  static REPARAM_FUSED_INLINE void move_squares(char* memory, int64_t stride, int64_t n,
                                                int64_t row_stride, int64_t rows, char* block) {
    const int64_t columns = n / kSide * kSide, row = n * kSize;
    const int64_t whole = row_stride == kSize ? rows / kSide * kSide : 0;
    for (int64_t c = 0; c < n; c += kSide) {
      for (int64_t r = 0; r < whole && c < columns; r += kSide) {
        transpose<kMove, kSide>(memory + c * stride + r * kSize, stride,
                                block + r * row + c * kSize, row);
      }
      for (int64_t r = c < columns ? whole : 0; r < rows; ++r) {
        for (int64_t i = c; i < n && i < c + kSide; ++i) {
          copy<kMove>(memory + i * stride + r * row_stride, block + r * row + i * kSize);
        }
      }
    }
  }
  // Column by column in memory, row by row in a block
  template <Move kMove, int kSide>
  static REPARAM_FUSED_INLINE void transpose(char* memory, int64_t stride, char* block,
                                             int64_t row) {
    // GCC makes shuffles of registers of these, but not of integers in their place.
    using Word =
        std::conditional_t<kSize == 2, uint16_t, std::conditional_t<kSize == 4, float, double>>;
    constexpr bool kOut = kMove == kScatter;
    Word in[kSide][kSide], out[kSide][kSide];
    for (int i = 0; i < kSide; ++i) {
      std::memcpy(in[i], kOut ? block + i * row : memory + i * stride, sizeof(in[i]));
    }
    for (int i = 0; i < kSide; ++i) {
      for (int j = 0; j < kSide; ++j) out[i][j] = in[j][i];
    }
    for (int i = 0; i < kSide; ++i) {
      std::memcpy(kOut ? memory + i * stride : block + i * row, out[i], sizeof(in[i]));
    }
  }

  // So many bytes, all from `from` on or, without a step, the same again and again: in pieces of
  // one size, the last of which lies over the one before.
  template <int kStep>
  static REPARAM_FUSED_INLINE void copy_run(char* to, const char* from, int64_t bytes) {
    if (bytes >= 64) {
      copy_pieces<kStep, 64>(to, from, bytes);
    } else if (bytes >= 16) {
      copy_pieces<kStep, 16>(to, from, bytes);
    } else {
      for (int64_t i = 0; i < bytes; i += kSize) std::memcpy(to + i, from + kStep * i, kSize);
    }
  }
  template <int kStep, int kPiece>
  static REPARAM_FUSED_INLINE void copy_pieces(char* to, const char* from, int64_t bytes) {
    for (int64_t i = 0; i + kPiece < bytes; i += kPiece) {
      std::memcpy(to + i, from + kStep * i, kPiece);
    }
    std::memcpy(to + bytes - kPiece, from + kStep * (bytes - kPiece), kPiece);
  }

  int last_;
  int64_t numel_;
  int64_t sizes_[kMaxDims], strides_[kMaxDims];
};

}  // namespace reparam_fused
