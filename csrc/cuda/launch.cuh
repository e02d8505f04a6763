#pragma once

#include <type_traits>

#include "kernels.cuh"

// The choice of kernel, grid and indices for a problem.

namespace reparam_fused {

// Below so many full blocks a thread takes one vector, and waits for its memory once and not
// four times: there are then too few blocks to hide it, less than 31 for each of the 132
// multiprocessors of an H200. It takes 12 more instructions an element in float32 and 6 in the
// half types, on sm_90. Of 4M elements in float32, forward and backward, an H200 takes 1.03 and
// 1.05 of torch.add's time with it, 1.14 and 1.24 without (benchmarks/gpu_report.md); in
// bfloat16 it makes no difference there.
constexpr int64_t kFewBlocks = 4096;

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

// Sizes and strides in units of `unit` elements, which divides them: 1, or a vector
// where the innermost stride is 1. Noise is counted in units of `index_unit`: elements,
// or counters with every vector.
template <class Index>
Layout<Index> make_layout(const Problem& p, int64_t unit, int64_t index_unit) {
  Layout<Index> layout{};
  layout.ndim = p.ndim;
  layout.first_index = p.first_index / index_unit;
  for (int d = 0; d < p.ndim; ++d) {
    const int from = p.ndim - 1 - d;
    const int64_t inner = d == 0 ? unit : 1, outer = unit / inner;
    layout.sizes[d] = Divisor<Index>(static_cast<Index>(p.sizes[from] / inner));
    layout.x_strides[d] = p.x_strides[from] / outer;
    layout.scale_strides[d] = p.scale_strides[from] / outer;
    layout.out_strides[d] = p.out_strides[from] / outer;
    layout.index_strides[d] = p.index_strides[from] * inner / index_unit;
    layout.key_strides[d] = p.key_strides[from];
  }
  return layout;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Every segment begins with a counter.
inline bool begins_with_counters(const Problem& p, int64_t per_counter) {
  bool begins = p.first_index % per_counter == 0;
  for (int d = 0; d < p.outer_ndim; ++d) {
    begins = begins && p.index_strides[d] % per_counter == 0;
  }
  return begins;
}

// Every run of the innermost dimension is one of whole 16-byte vectors and counters.
inline bool runs_of_vectors(const Problem& p, int64_t per_vector, int64_t per_counter) {
  if (!aligned(p.x) || !aligned(p.scale) || !aligned(p.out)) return false;
  const int inner = p.ndim - 1;
  bool fits = p.x_strides[inner] == 1 && p.scale_strides[inner] == 1 && p.out_strides[inner] == 1 &&
              p.index_strides[inner] == 1 && p.sizes[inner] % per_vector == 0 &&
              p.first_index % per_counter == 0;
  for (int d = 0; d < inner; ++d) {
    fits = fits && p.x_strides[d] % per_vector == 0 && p.scale_strides[d] % per_vector == 0 &&
           p.out_strides[d] % per_vector == 0 && p.index_strides[d] % per_counter == 0;
  }
  return fits;
}

template <class Op, class T, class Index, class Source>
cudaError_t launch_cut(const Problem& p, int64_t numel, const Source& source, cudaStream_t stream) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* scale = static_cast<const T*>(p.scale);
  auto* out = static_cast<T*>(p.out);
  if (runs_of_vectors(p, kPerVector<T>, kPerCounter<T>)) {
    const int64_t vectors = numel / kPerVector<T>;
    return enqueue(rows_kernel<Op, T, Index, Source>, vectors, stream, x, scale, out,
                   static_cast<Index>(vectors),
                   make_layout<Index>(p, kPerVector<T>, kPerCounter<T>), source);
  }
  // A segment that begins within a counter may end within another.
  const int64_t cut = begins_with_counters(p, kPerCounter<T>) ? 0 : kPerCounter<T> - 1;
  const int64_t segment_counters = (p.segment_numel + kPerCounter<T> - 1 + cut) / kPerCounter<T>;
  const int64_t counters = numel / p.segment_numel * segment_counters;
  return enqueue(elements_kernel<Op, T, Index, Source>, counters, stream, x, scale, out,
                 static_cast<Index>(counters), make_layout<Index>(p, 1, 1),
                 static_cast<Index>(p.segment_numel),
                 Divisor<Index>(static_cast<Index>(segment_counters)), source);
}

template <class Op, class T, class Source>
cudaError_t launch(const Problem& p, const Source& source, cudaStream_t stream) {
  int64_t numel = 1;
  for (int d = 0; d < p.ndim; ++d) numel *= p.sizes[d];
  if (numel == 0) return cudaSuccess;
  const bool whole = p.ndim == 1 && p.x_strides[0] == 1 && p.scale_strides[0] == 1 &&
                     p.out_strides[0] == 1 && p.outer_ndim == 0 &&
                     p.first_index % kPerCounter<T> == 0 && aligned(p.x) && aligned(p.scale) &&
                     aligned(p.out);
  if (whole) {
    constexpr int64_t kVectors = kBlock * kVectorsPerThread;
    const int64_t vectors = numel / kPerVector<T>;
    const int64_t full_blocks = vectors < kFewBlocks * kVectors ? 0 : vectors / kVectors;
    const int64_t rest = vectors - full_blocks * kVectors +
                         (numel % kPerVector<T> + kPerCounter<T> - 1) / kPerCounter<T>;
    return enqueue(whole_kernel<Op, T, Source>, full_blocks * kBlock + rest, stream,
                   static_cast<const T*>(p.x), static_cast<const T*>(p.scale),
                   static_cast<T*>(p.out), numel, static_cast<uint32_t>(full_blocks),
                   source.from(static_cast<uint64_t>(p.first_index / kPerCounter<T>)));
  }
  // In 32 bits every count of elements and of counters stays below 2^31: a counter
  // of a short segment may stand for one element.
  return numel <= INT32_MAX ? launch_cut<Op, T, uint32_t, Source>(p, numel, source, stream)
                            : launch_cut<Op, T, uint64_t, Source>(p, numel, source, stream);
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

template <template <class> class Op, class Source, class First, class... Rest>
cudaError_t launch(FormList<First, Rest...>, Form form, DType dtype, const Problem& p,
                   const Source& source, cudaStream_t stream) {
  if constexpr (sizeof...(Rest) > 0) {
    if (form != 0) {
      return launch<Op>(FormList<Rest...>{}, form - 1, dtype, p, source, stream);
    }
  }
  return launch<Op<First>>(dtype, p, source, stream);
}
template <template <class> class Op, class Source>
cudaError_t launch(DType dtype, const Problem& p, const Source& source, cudaStream_t stream) {
  return launch<Op>(Forms{}, p.form, dtype, p, source, stream);
}

}  // namespace reparam_fused
