#pragma once

#include "../common/problem.h"

namespace reparam_fused {

// Computes the elements [begin, end) in row-major order.
using Kernel = void (*)(const Problem& problem, int64_t begin, int64_t end);

struct KernelTable {
  Kernel of[kDTypes];
};

struct Kernels {
  const char* isa;
  // samples: of kSample with samples other than 1
  KernelTable sample, sample_backward, noise, kl_divergence, kl_divergence_backward, samples,
      samples_backward;
  // Of pieces instead of elements: rows or, of one that is longer than a chunk, its chunks
  KernelTable head, head_backward;
  // As sums.h has them
  void (*sum_float)(const float* terms, int64_t rows, int64_t n, float* sums);
  void (*sum_double)(const double* terms, int64_t rows, int64_t n, double* sums);
  // As keys.h has them
  void (*child_keys)(const uint64_t* keys, int64_t n, uint64_t first, int64_t count, uint64_t* out);
  void (*fold_in)(const uint64_t* keys, int64_t key_stride, const uint64_t* data,
                  int64_t data_stride, int64_t n, uint64_t* out);
};

// A thread's share is a multiple of this, so that no tile is cut: it is the
// longest one, of 2 x 16 counters with 4 elements each.
constexpr int64_t kMaxTile = 128;

// Elements of a block: what is read and written of them, and the noise, are to stay in the first
// cache, or, of rows that are near each other in memory, whole lines of them in the second.
constexpr int64_t kBlock = 2048, kLarge = 8192;
// Dimensions of one element are merged away, and 2^63 elements have no more.
constexpr int kMaxDims = 63;

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#elif defined(__aarch64__) || defined(_M_ARM64)
extern const Kernels kNeonKernels;
#endif

}  // namespace reparam_fused
