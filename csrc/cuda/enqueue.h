#pragma once

#include <limits>

#include "launch.h"

// What the files that launch kernels share.

namespace reparam_fused {

constexpr const char* kDTypeNames[] = {"float32", "float64", "float16", "bfloat16"};

inline int64_t size_of(DType dtype) { return dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2; }
inline int64_t counter_of(DType dtype) { return dtype == kDouble ? 2 : 4; }

inline int64_t numel_of(const Problem& p) {
  int64_t numel = 1;
  for (int d = 0; d < p.ndim; ++d) numel *= p.sizes[d];
  return numel;
}

// In a kernel that is not for whole tensors every count of elements and of counters, of which one
// of a short segment may stand for one element, is below 2^31. Whole vectors of every dtype.
constexpr int64_t kMostElements = (int64_t{1} << 31) - kVectorBytes;

// So many threads, in blocks of kBlock
template <class... Arguments>
void enqueue_kernel(CudaKernel kernel, int64_t threads, int device, CudaStream stream,
                    Arguments... arguments) {
  void* pointers[] = {&arguments...};
  launch_cuda(kernel, (threads + kBlock - 1) / kBlock, kBlock, device, stream, pointers);
}

// Form and bounds, in the precision of the kernel
template <class R>
AnyScale<R> any_scale(Form form, const Bounds* bounds) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const Bounds given = bounds != nullptr ? *bounds : Bounds{-kInf, kInf, 0};
  AnyScale<R> scale{};
  scale.low = static_cast<R>(given.low);
  scale.high = static_cast<R>(given.high);
  scale.min_std = static_cast<R>(given.min_std);
  scale.form = form;
  scale.bounded = bounds != nullptr;
  return scale;
}

}  // namespace reparam_fused
