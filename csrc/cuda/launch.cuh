#pragma once

#include <type_traits>

#include "kernels.cuh"

// The choice of kernel, grid and indices for a problem.

namespace reparam_fused {

// threads is above zero. What CUDA refuses, a grid of 2^31 blocks among it, is in
// the status.
template <class... Params>
cudaError_t enqueue(void (*kernel)(Params...), int64_t threads, cudaStream_t stream,
                    std::common_type_t<Params>... params) {
  void* pointers[] = {&params...};
  const int64_t blocks = (threads + kBlock - 1) / kBlock;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(blocks)), dim3(kBlock), pointers, 0, stream);
}

// Sizes and strides in units of `unit` elements, which divides them: 1, or a
// vector where the innermost stride is 1.
template <class Index>
Layout<Index> make_layout(const Problem& p, int64_t unit) {
  Layout<Index> layout{};
  layout.ndim = p.ndim;
  for (int d = 0; d < p.ndim; ++d) {
    const int from = p.ndim - 1 - d;
    const bool inner = d == 0;
    layout.sizes[d] = Divisor<Index>(static_cast<Index>(p.sizes[from] / (inner ? unit : 1)));
    layout.x_strides[d] = p.x_strides[from] / (inner ? 1 : unit);
    layout.log_var_strides[d] = p.log_var_strides[from] / (inner ? 1 : unit);
    layout.out_strides[d] = p.out_strides[from] / (inner ? 1 : unit);
  }
  return layout;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Every run of the innermost dimension is one of whole 16-byte vectors.
inline bool runs_of_vectors(const Problem& p, int64_t slice_numel, int64_t per_vector) {
  if (!aligned(p.x) || !aligned(p.log_var) || !aligned(p.out)) return false;
  const int inner = p.ndim - 1;
  bool fits = p.x_strides[inner] == 1 && p.log_var_strides[inner] == 1 &&
              p.out_strides[inner] == 1 && p.sizes[inner] % per_vector == 0 &&
              slice_numel % per_vector == 0;
  for (int d = 0; d < inner; ++d) {
    fits = fits && p.x_strides[d] % per_vector == 0 && p.log_var_strides[d] % per_vector == 0 &&
           p.out_strides[d] % per_vector == 0;
  }
  return fits;
}

template <class Op, class T, class Index, class Source>
cudaError_t launch_cut(const Problem& p, int64_t numel, int64_t slice_numel, const Source& source,
                       cudaStream_t stream) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* log_var = static_cast<const T*>(p.log_var);
  auto* out = static_cast<T*>(p.out);
  if (runs_of_vectors(p, slice_numel, kPerVector<T>)) {
    const int64_t vectors = numel / kPerVector<T>;
    return enqueue(rows_kernel<Op, T, Index, Source>, vectors, stream, x, log_var, out,
                   static_cast<Index>(vectors), make_layout<Index>(p, kPerVector<T>),
                   Divisor<Index>(static_cast<Index>(slice_numel / kPerVector<T>)), source);
  }
  const int64_t slice_counters = (slice_numel + kPerCounter<T> - 1) / kPerCounter<T>;
  const int64_t counters = numel / slice_numel * slice_counters;
  return enqueue(elements_kernel<Op, T, Index, Source>, counters, stream, x, log_var, out,
                 static_cast<Index>(counters), make_layout<Index>(p, 1),
                 static_cast<Index>(slice_numel),
                 Divisor<Index>(static_cast<Index>(slice_counters)), source);
}

template <class Op, class T, class Source>
cudaError_t launch(const Problem& p, const Source& source, cudaStream_t stream) {
  int64_t numel = 1;
  for (int d = 0; d < p.ndim; ++d) numel *= p.sizes[d];
  if (numel == 0) return cudaSuccess;
  const int64_t slice_numel = p.slice_numel;
  const bool whole = p.ndim == 1 && p.x_strides[0] == 1 && p.log_var_strides[0] == 1 &&
                     p.out_strides[0] == 1 && slice_numel == numel && aligned(p.x) &&
                     aligned(p.log_var) && aligned(p.out);
  if (whole) {
    constexpr int64_t kPerThread = kVectorsPerThread * kPerVector<T>;
    return enqueue(whole_kernel<Op, T, Source>, (numel + kPerThread - 1) / kPerThread, stream,
                   static_cast<const T*>(p.x), static_cast<const T*>(p.log_var),
                   static_cast<T*>(p.out), numel,
                   static_cast<uint32_t>(numel / (kPerThread * kBlock)), source);
  }
  // In 32 bits every count of elements and of counters stays below 2^31: a counter
  // of a short slice may stand for one element.
  return numel <= INT32_MAX
             ? launch_cut<Op, T, uint32_t, Source>(p, numel, slice_numel, source, stream)
             : launch_cut<Op, T, uint64_t, Source>(p, numel, slice_numel, source, stream);
}

template <class Op, class Source>
cudaError_t launch(DType dtype, const Problem& p, const Source& source, cudaStream_t stream) {
  switch (dtype) {
    case kFloat:
      return launch<Op, float, Source>(p, source, stream);
    case kDouble:
      return launch<Op, double, Source>(p, source, stream);
    case kHalf:
      return launch<Op, Half, Source>(p, source, stream);
    case kBFloat16:
      return launch<Op, BFloat16, Source>(p, source, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace reparam_fused
