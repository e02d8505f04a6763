#pragma once

#include "../common/kl_divergence.h"
#include "../common/reparam.h"
#include "arguments.h"
#include "thread.h"

// Three kernels, by how the elements lie:
//   whole     all operands contiguous and aligned, one key: 16-byte accesses, four
//             vectors a thread without bounds in full blocks, one a thread in the rest
//   rows      runs of 16-byte vectors (chunk, split, expanded rows, a key for each
//             slice, shards): 16-byte accesses, one vector a thread
//   elements  anything else: one counter a thread, one element at a time

namespace reparam_fused {

template <class T>
constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPerCounter = Element<Thread, T>::kPerCounter;
template <class T>
constexpr int kCountersPerVector = kPerVector<T> / kPerCounter<T>;

struct Key {
  uint64_t seed, offset;
};

// Of an element whose place in the tensor of keys is `at`
__device__ __forceinline__ Key read(const KeyTensor& source, int64_t at) {
  return {__ldg(source.keys + at), __ldg(source.keys + at + 1) + source.first_counter};
}
__device__ __forceinline__ Key read(const Generator& source, int64_t) {
  Key key{source.seed, source.offset};
  if (source.captured_seed != nullptr) {
    key.seed = static_cast<uint64_t>(*source.captured_seed);
    key.offset += static_cast<uint64_t>(*source.captured_offset);
  }
  // A domain of its own, or the first draw after manual_seed(s) would be that of key(s)
  key.offset = key.offset / 4 + (uint64_t{1} << 63);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    source.key_out[0] = key.seed;
    source.key_out[1] = key.offset;
  }
  return key;
}
// The compiler leaves out the normals, of which an op without noise makes no use.
__device__ __forceinline__ Key read(const NoKey&, int64_t) { return {}; }

// Whether the whole tensor is one segment, whose noise begins at index 0
template <class Source>
constexpr bool kWholeTensor = true;
template <>
constexpr bool kWholeTensor<KeyTensor> = false;

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divisor<uint32_t>& by,
                                           uint32_t& remainder) {
  const uint32_t quotient = (__umulhi(n, by.multiplier) + n) >> by.shift;
  remainder = n - quotient * by.divisor;
  return quotient;
}
__device__ __forceinline__ uint64_t divide(uint64_t n, const Divisor<uint64_t>& by,
                                           uint64_t& remainder) {
  const uint64_t quotient = n / by.divisor;
  remainder = n - quotient * by.divisor;
  return quotient;
}

struct Place {
  int64_t x, scale, out, index, key;
};

template <class Index>
__device__ __forceinline__ void step(const Layout<Index>& layout, Place& place, int d,
                                     int64_t along) {
  place.x += along * layout.x_strides[d];
  place.scale += along * layout.scale_strides[d];
  place.out += along * layout.out_strides[d];
  place.index += along * layout.index_strides[d];
  place.key += along * layout.key_strides[d];
}

template <class Index>
__device__ __forceinline__ Place place_of(const Layout<Index>& layout, Index index) {
  Place place{0, 0, 0, layout.first_index, 0};
#pragma unroll 1
  for (int d = 0; d + 1 < layout.ndim; ++d) {
    Index along;
    index = divide(index, layout.sizes[d], along);
    step(layout, place, d, along);
  }
  step(layout, place, layout.ndim - 1, index);
  return place;
}

// A vector of an operand, of an op that has any.
template <class Op>
__device__ __forceinline__ uint4 load_vector(const uint4* p) {
  if constexpr (Op::kReads) {
    return Thread::load_vector(p);
  } else {
    return {};
  }
}

template <class Op, class T>
__device__ __forceinline__ uint4 compute_vector(uint4 x_in, uint4 scale_in, uint64_t counter,
                                                uint64_t seed) {
  using R = typename Element<Thread, T>::Register;
  R x[kPerVector<T>], scale[kPerVector<T>], out[kPerVector<T>];
  Thread::unpack(static_cast<const T*>(nullptr), x_in, x);
  Thread::unpack(static_cast<const T*>(nullptr), scale_in, scale);
#pragma unroll
  for (int c = 0; c < kCountersPerVector<T>; ++c) {
    R eps[kPerCounter<T>];
    normals<Thread, T>(counter + c, seed, eps);
#pragma unroll
    for (int j = 0; j < kPerCounter<T>; ++j) {
      const int i = c * kPerCounter<T> + j;
      out[i] = Op::template apply<Thread, R>(x[i], scale[i], eps[j]);
    }
  }
  return Thread::pack(static_cast<T*>(nullptr), out);
}

// The elements of the lanes [from, to) of one counter. All are loaded before the first is
// used, so that a thread waits for its memory once.
template <class Op, class T, class Where>
__device__ __forceinline__ void compute_counter(const T* x, const T* scale, T* out,
                                                uint64_t counter, uint64_t seed, int from, int to,
                                                Where where) {
  using R = typename Element<Thread, T>::Register;
  R x_in[kPerCounter<T>] = {}, scale_in[kPerCounter<T>] = {}, eps[kPerCounter<T>];
  int64_t places[kPerCounter<T>] = {};
#pragma unroll
  for (int j = 0; j < kPerCounter<T>; ++j) {
    if (j >= from && j < to) {
      const Place at = where(j);
      if constexpr (Op::kReads) {
        x_in[j] = Thread::load(x + at.x);
        scale_in[j] = Thread::load(scale + at.scale);
      }
      places[j] = at.out;
    }
  }
  normals<Thread, T>(counter, seed, eps);
#pragma unroll
  for (int j = 0; j < kPerCounter<T>; ++j) {
    if (j >= from && j < to) {
      Thread::store(out + places[j], Op::template apply<Thread, R>(x_in[j], scale_in[j], eps[j]));
    }
  }
}

// Indices are 64-bit: on sm_90 32-bit ones save 0.1 instructions an element.
template <class Op, class T, class Source>
__device__ __forceinline__ void whole(const T* __restrict__ x, const T* __restrict__ scale,
                                      T* __restrict__ out, int64_t numel, uint32_t full_blocks,
                                      const Source& source) {
  constexpr int64_t kVectors = kBlock * kVectorsPerThread;
  const Key key = read(source, 0);
  const auto* x_vectors = reinterpret_cast<const uint4*>(x);
  const auto* scale_vectors = reinterpret_cast<const uint4*>(scale);
  auto* out_vectors = reinterpret_cast<uint4*>(out);
  if (blockIdx.x < full_blocks) {
    const int64_t v = blockIdx.x * kVectors + threadIdx.x;
    uint4 x_in[kVectorsPerThread], scale_in[kVectorsPerThread];
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
      x_in[i] = load_vector<Op>(x_vectors + v + i * kBlock);
      scale_in[i] = load_vector<Op>(scale_vectors + v + i * kBlock);
    }
    const uint64_t counter = key.offset + v * kCountersPerVector<T>;
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
      out_vectors[v + i * kBlock] = compute_vector<Op, T>(
          x_in[i], scale_in[i], counter + i * kBlock * kCountersPerVector<T>, key.seed);
    }
    return;
  }
  // The rest: a thread takes a vector, or a counter of the last one where that is not whole.
  const int64_t v = full_blocks * kVectors +
                    static_cast<int64_t>(blockIdx.x - full_blocks) * kBlock + threadIdx.x;
  const int64_t vectors = numel / kPerVector<T>;
  if (v < vectors) {
    out_vectors[v] =
        compute_vector<Op, T>(load_vector<Op>(x_vectors + v), load_vector<Op>(scale_vectors + v),
                              key.offset + v * kCountersPerVector<T>, key.seed);
  } else {
    const int64_t counter = vectors * kCountersPerVector<T> + (v - vectors);
    const int64_t element = counter * kPerCounter<T>;
    const int64_t left = numel - element;
    if (left <= 0) return;
    // Where a counter is as long as a vector, this one is not whole.
    constexpr int kMost = kPerCounter<T> - (kCountersPerVector<T> == 1);
    compute_counter<Op, T>(x, scale, out, key.offset + counter, key.seed, 0,
                           left < kMost ? static_cast<int>(left) : kMost,
                           [=](int j) { return Place{element + j, element + j, element + j}; });
  }
}

template <class Op, class T, class Index, class Source>
__device__ __forceinline__ void rows(const T* __restrict__ x, const T* __restrict__ scale,
                                     T* __restrict__ out, Index vectors,
                                     const Layout<Index>& layout, const Source& source) {
  const Index v = static_cast<Index>(blockIdx.x) * kBlock + threadIdx.x;
  if (v >= vectors) return;
  const Place at = place_of(layout, v);
  const Key key = read(source, at.key);
  reinterpret_cast<uint4*>(out)[at.out] =
      compute_vector<Op, T>(load_vector<Op>(reinterpret_cast<const uint4*>(x) + at.x),
                            load_vector<Op>(reinterpret_cast<const uint4*>(scale) + at.scale),
                            key.offset + at.index, key.seed);
}

// A thread takes the lanes of one counter that fall into one segment, of which the
// first may begin within a counter.
template <class Op, class T, class Index, class Source>
__device__ __forceinline__ void elements(const T* __restrict__ x, const T* __restrict__ scale,
                                         T* __restrict__ out, Index counters,
                                         const Layout<Index>& layout, Index segment_numel,
                                         const Divisor<Index>& segment_counters,
                                         const Source& source) {
  const Index c = static_cast<Index>(blockIdx.x) * kBlock + threadIdx.x;
  if (c >= counters) return;
  Index in_segment = c, first = 0;
  Place start{};
  if constexpr (!kWholeTensor<Source>) {
    first = divide(c, segment_counters, in_segment) * segment_numel;
    start = place_of(layout, first);
  }
  const Key key = read(source, start.key);
  const int skipped = static_cast<int>(start.index % kPerCounter<T>);
  const int64_t lane_0 = static_cast<int64_t>(in_segment) * kPerCounter<T> - skipped;
  const int64_t left = static_cast<int64_t>(segment_numel) - lane_0;
  compute_counter<Op, T>(
      x, scale, out, key.offset + start.index / kPerCounter<T> + in_segment, key.seed,
      in_segment == 0 ? skipped : 0,
      left < kPerCounter<T> ? static_cast<int>(left) : kPerCounter<T>,
      [&](int j) { return place_of(layout, first + static_cast<Index>(lane_0 + j)); });
}

}  // namespace reparam_fused
