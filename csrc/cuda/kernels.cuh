#pragma once

#include "../common/kl_divergence.h"
#include "../common/reparam.h"
#include "arguments.h"
#include "thread.h"

// Three kernels, by how the elements lie:
//   whole     all operands contiguous and aligned, one key: 16-byte accesses, four
//             vectors a thread without bounds in full blocks, one a thread in the rest
//   rows      runs of 16-byte vectors (chunk, split, expanded rows and columns, a key for
//             each slice, shards): 16-byte accesses, one vector a thread; an operand that is
//             one element all along a run is read as that element
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

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divisor& by, uint32_t& remainder) {
  const uint32_t quotient = (__umulhi(n, by.multiplier) + n) >> by.shift;
  remainder = n - quotient * by.divisor;
  return quotient;
}

// Of products with strides
struct Sum {
  uint64_t low;
  uint32_t high;

  __device__ __forceinline__ void add(uint32_t along, const Stride& stride) {
    low += static_cast<uint64_t>(along) * stride.low;
    high += along * stride.high;
  }
  __device__ __forceinline__ operator int64_t() const {
    return static_cast<int64_t>(low + (static_cast<uint64_t>(high) << 32));
  }
};

// Of the operands in bytes
struct Place {
  Sum x, scale, out, index, key;
};

template <class T>
__device__ __forceinline__ const T* at(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}
template <class T>
__device__ __forceinline__ T* at(T* p, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(p) + bytes);
}

__device__ __forceinline__ uint32_t step(Place& place, uint32_t index, const Dimension& dimension) {
  uint32_t remainder;
  const uint32_t quotient = divide(index, dimension.size, remainder);
  place.x.add(remainder, dimension.x_stride);
  place.scale.add(remainder, dimension.scale_stride);
  place.out.add(remainder, dimension.out_stride);
  place.index.add(remainder, dimension.index_stride);
  place.key.add(remainder, dimension.key_stride);
  return quotient;
}

// The first dimension apart: it adds to nothing, and its table is at a place that the compiler
// knows.
__device__ __forceinline__ Place place_of(const Layout& layout, uint32_t index) {
  Place place{};
  index = step(place, index, layout.dimensions[0]);
#pragma unroll 1
  for (int d = 1; d < layout.ndim; ++d) index = step(place, index, layout.dimensions[d]);
  return place;
}

// An op whose form is known at launch alone: for what is seldom, so that not every form has a
// kernel.
template <template <class> class Op>
struct AnyForm {
  static constexpr int kOperands = Op<LogVar>::kOperands, kResults = Op<LogVar>::kResults;
  static constexpr bool kDraws = Op<LogVar>::kDraws;
  template <class V, class R>
  static __device__ __forceinline__ void apply(const R* in, R eps, const AnyScale<R>& scale,
                                               R* out) {
    apply_one_of<V>(Forms{}, scale.form, in, eps, scale, out);
  }

 private:
  template <class V, class R, class First, class... Rest>
  static __device__ __forceinline__ void apply_one_of(FormList<First, Rest...>, int form,
                                                      const R* in, R eps, const AnyScale<R>& scale,
                                                      R* out) {
    if constexpr (sizeof...(Rest) > 0) {
      if (form != 0) {
        return apply_one_of<V>(FormList<Rest...>{}, form - 1, in, eps, scale, out);
      }
    }
    Op<First>::template apply<V>(in, eps, scale, out);
  }
};

template <class Op, class R, class Limits>
__device__ __forceinline__ R apply(R x, R scale, R eps, const Limits& limits) {
  const R in[] = {x, scale};
  R out;
  Op::template apply<Thread>(in, eps, limits, &out);
  return out;
}

// A vector of an operand, of an op that has any.
template <class Op>
__device__ __forceinline__ uint4 load_vector(const uint4* p) {
  if constexpr (Op::kOperands > 0) {
    return Thread::load_vector(p);
  } else {
    return {};
  }
}

// The same of an operand that may be one element all along
template <class Op, class T>
__device__ __forceinline__ uint4 load_run(const T* p, bool repeated) {
  if constexpr (Op::kOperands > 0) {
    return repeated ? Thread::load_repeated(p) : Thread::load_vector(p);
  } else {
    return {};
  }
}

template <class Op, class T, class Limits>
__device__ __forceinline__ uint4 compute_vector(uint4 x_in, uint4 scale_in, uint64_t counter,
                                                uint64_t seed, const Limits& limits) {
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
      out[i] = apply<Op>(x[i], scale[i], eps[j], limits);
    }
  }
  return Thread::pack(static_cast<T*>(nullptr), out);
}

// The elements of the lanes [from, to) of one counter. All are loaded before the first is
// used, so that a thread waits for its memory once.
template <class Op, class T, class Where, class Limits>
__device__ __forceinline__ void compute_counter(const T* x, const T* scale, T* out,
                                                uint64_t counter, uint64_t seed, int from, int to,
                                                Where where, const Limits& limits) {
  using R = typename Element<Thread, T>::Register;
  R x_in[kPerCounter<T>] = {}, scale_in[kPerCounter<T>] = {}, eps[kPerCounter<T>];
  int64_t places[kPerCounter<T>] = {};
#pragma unroll
  for (int j = 0; j < kPerCounter<T>; ++j) {
    if (j >= from && j < to) {
      const Place place = where(j);
      if constexpr (Op::kOperands > 0) {
        x_in[j] = Thread::load(at(x, place.x));
        scale_in[j] = Thread::load(at(scale, place.scale));
      }
      places[j] = place.out;
    }
  }
  normals<Thread, T>(counter, seed, eps);
#pragma unroll
  for (int j = 0; j < kPerCounter<T>; ++j) {
    if (j >= from && j < to) {
      Thread::store(at(out, places[j]), apply<Op>(x_in[j], scale_in[j], eps[j], limits));
    }
  }
}

// Indices are 64-bit: on sm_90 32-bit ones save 0.1 instructions an element.
template <class Op, class T, class Source, class Limits>
__device__ __forceinline__ void whole(const T* __restrict__ x, const T* __restrict__ scale,
                                      T* __restrict__ out, int64_t numel, uint32_t full_blocks,
                                      const Source& source, const Limits& limits) {
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
          x_in[i], scale_in[i], counter + i * kBlock * kCountersPerVector<T>, key.seed, limits);
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
                              key.offset + v * kCountersPerVector<T>, key.seed, limits);
  } else {
    const int64_t counter = vectors * kCountersPerVector<T> + (v - vectors);
    const int64_t element = counter * kPerCounter<T>;
    const int64_t left = numel - element;
    if (left <= 0) return;
    // Where a counter is as long as a vector, this one is not whole.
    constexpr int kMost = kPerCounter<T> - (kCountersPerVector<T> == 1);
    const auto where = [=](int j) {
      const Sum place{static_cast<uint64_t>(element + j) * sizeof(T), 0};
      return Place{place, place, place};
    };
    compute_counter<Op, T>(x, scale, out, key.offset + counter, key.seed, 0,
                           left < kMost ? static_cast<int>(left) : kMost, where, limits);
  }
}

template <class Op, class T, class Source, class Limits>
__device__ __forceinline__ void rows(const T* __restrict__ x, const T* __restrict__ scale,
                                     T* __restrict__ out, uint32_t vectors, const Layout& layout,
                                     const Source& source, const Limits& limits) {
  const uint32_t v = blockIdx.x * kBlock + threadIdx.x;
  if (v >= vectors) return;
  const Place place = place_of(layout, v);
  const Key key = read(source, place.key);
  *reinterpret_cast<uint4*>(at(out, place.out)) = compute_vector<Op, T>(
      load_run<Op>(at(x, place.x), layout.dimensions[0].x_stride.low == 0),
      load_run<Op>(at(scale, place.scale), layout.dimensions[0].scale_stride.low == 0),
      key.offset + place.index, key.seed, limits);
}

// A thread takes the lanes of one counter that fall into one segment, of which the
// first may begin within a counter.
template <class Op, class T, class Source, class Limits>
__device__ __forceinline__ void elements(const T* __restrict__ x, const T* __restrict__ scale,
                                         T* __restrict__ out, uint32_t counters,
                                         const Layout& layout, int64_t first_index,
                                         uint32_t segment_numel, const Divisor& segment_counters,
                                         const Source& source, const Limits& limits) {
  const uint32_t c = blockIdx.x * kBlock + threadIdx.x;
  if (c >= counters) return;
  uint32_t in_segment = c, first = 0;
  Place start{};
  if constexpr (!kWholeTensor<Source>) {
    first = divide(c, segment_counters, in_segment) * segment_numel;
    start = place_of(layout, first);
    start.index.low += static_cast<uint64_t>(first_index);
  }
  const Key key = read(source, start.key);
  const int64_t index = start.index;
  const int skipped = static_cast<int>(index % kPerCounter<T>);
  const int64_t lane_0 = static_cast<int64_t>(in_segment) * kPerCounter<T> - skipped;
  const int64_t left = static_cast<int64_t>(segment_numel) - lane_0;
  compute_counter<Op, T>(
      x, scale, out, key.offset + index / kPerCounter<T> + in_segment, key.seed,
      in_segment == 0 ? skipped : 0,
      left < kPerCounter<T> ? static_cast<int>(left) : kPerCounter<T>,
      [&](int j) { return place_of(layout, first + static_cast<uint32_t>(lane_0 + j)); }, limits);
}

// The words of a seed in every round, of a key that many counters share
struct Schedule {
  static constexpr int kRounds = 10;
  uint32_t word0[kRounds], word1[kRounds];
  int round = 0;

  Schedule() = default;
  explicit __device__ __forceinline__ Schedule(uint64_t seed) {
    OneSeed<Thread> words(seed);
#pragma unroll
    for (int i = 0; i < kRounds; ++i, words.step()) {
      word0[i] = words.key0();
      word1[i] = words.key1();
    }
  }
  __device__ __forceinline__ uint32_t key0() const { return word0[round]; }
  __device__ __forceinline__ uint32_t key1() const { return word1[round]; }
  __device__ __forceinline__ void step() { ++round; }
};

// The normals of as many elements as a counter has, from this index of a key's stream on, which may
// be within a counter.
template <class T, class R>
__device__ __forceinline__ void normals_from(uint64_t offset, const Schedule& seed, uint64_t index,
                                             R (&eps)[kPerCounter<T>]) {
  constexpr int n = kPerCounter<T>;
  const uint64_t counter = offset + index / n;
  const int skipped = static_cast<int>(index % n);
  normals<Thread, T>(counter, seed, eps);
  if (skipped == 0) return;
  R next[n];
  normals<Thread, T>(counter + 1, seed, next);
  // One place at a time: an array in registers has no index that is known at run time.
  for (int k = 0; k < skipped; ++k) {
    const R first = next[0];
#pragma unroll
    for (int j = 0; j + 1 < n; ++j) {
      eps[j] = eps[j + 1];
      next[j] = next[j + 1];
    }
    eps[n - 1] = first;
  }
}

// The elements of a counter that lie in a row, as one access
template <class T, class R, int n>
__device__ __forceinline__ void load_row(const T* p, R (&x)[n]) {
  if constexpr (sizeof(T) == 2) {
    const uint2 row = *reinterpret_cast<const uint2*>(p);
    Thread::unpack(p, row.x, x[0], x[1]);
    Thread::unpack(p, row.y, x[2], x[3]);
  } else {
    Thread::unpack(p, Thread::load_vector(p), x);
  }
}
template <class T, class R, int n>
__device__ __forceinline__ void store_row(T* p, const R (&x)[n]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint2*>(p) =
        make_uint2(Thread::pack(p, x[0], x[1]), Thread::pack(p, x[2], x[3]));
  } else {
    *reinterpret_cast<uint4*>(p) = Thread::pack(p, x);
  }
}

// The elements of a thread that has as many of a segment as a counter has, for all samples
template <class T>
struct Group {
  int count;  // of kPerCounter<T>
  int64_t index, key;
  int64_t x[kPerCounter<T>], scale[kPerCounter<T>], out[kPerCounter<T>];  // in bytes

  template <class Source>
  __device__ __forceinline__ bool find(uint32_t groups, const Layout& layout, int64_t first_index,
                                       uint32_t segment_numel, const Divisor& segment_groups,
                                       const Source&, const Samples& samples) {
    const uint32_t g = blockIdx.x * kBlock + threadIdx.x;
    if (g >= groups) return false;
    uint32_t in_segment = g, first = 0;
    if constexpr (!kWholeTensor<Source>) {
      first = divide(g, segment_groups, in_segment) * segment_numel;
    }
    in_segment *= kPerCounter<T>;
    const uint32_t left = segment_numel - in_segment;
    count = left < kPerCounter<T> ? static_cast<int>(left) : kPerCounter<T>;
    Place place = place_of(layout, first + in_segment);
    index = first_index + place.index;
    key = place.key;
#pragma unroll
    for (int j = 0; j < kPerCounter<T>; ++j) {
      if (j > 0 && samples.vectors) {
        place.x.add(1, layout.dimensions[0].x_stride);
        place.scale.add(1, layout.dimensions[0].scale_stride);
        place.out.add(1, layout.dimensions[0].out_stride);
      } else if (j > 0) {
        place = place_of(layout, first + in_segment + (j < count ? j : 0));
      }
      x[j] = place.x;
      scale[j] = place.scale;
      out[j] = place.out;
    }
    return true;
  }
};

// Of sample after sample: the key, which is read again where each has its own, and the place in its
// stream
template <class T, class Source>
struct Stream {
  const Source& source;
  const Samples& samples;
  int64_t key_at, left;
  uint64_t index, offset;
  Schedule seed;

  __device__ __forceinline__ Stream(const Source& source, const Samples& samples,
                                    const Group<T>& group)
      : source(source),
        samples(samples),
        key_at(group.key),
        left(samples.count),
        index(group.index) {
    if (left > 0) read_key();
  }
  __device__ __forceinline__ void read_key() {
    const Key key = read(source, key_at);
    offset = key.offset;
    seed = Schedule(key.seed);
  }
  template <class R>
  __device__ __forceinline__ void draw(R (&eps)[kPerCounter<T>]) const {
    normals_from<T>(offset, seed, index, eps);
  }
  // Whether there is another sample
  __device__ __forceinline__ bool next() {
    if (--left == 0) return false;
    index += samples.index_stride;
    if constexpr (!kWholeTensor<Source>) {
      if (samples.key_stride != 0) {
        key_at += samples.key_stride;
        read_key();
      }
    }
    return true;
  }
};

template <class T, class Source, class R>
__device__ __forceinline__ void draw_samples(const T* __restrict__ mu, const T* __restrict__ scale,
                                             T* __restrict__ out, uint32_t groups,
                                             const Layout& layout, int64_t first_index,
                                             uint32_t segment_numel, const Divisor& segment_groups,
                                             const Source& source, const AnyScale<R>& form,
                                             const Samples& samples) {
  constexpr int n = kPerCounter<T>;
  Group<T> group;
  if (!group.find(groups, layout, first_index, segment_numel, segment_groups, source, samples)) {
    return;
  }
  R moments[n][2];
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const R in[] = {Thread::load(at(mu, group.x[j])), Thread::load(at(scale, group.scale[j]))};
    AnyForm<Moments>::template apply<Thread>(in, R{}, form, moments[j]);
  }
  Stream<T, Source> stream(source, samples, group);
  if (stream.left == 0) return;
  do {
    R eps[n], z[n];
    stream.draw(eps);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      z[j] = apply<Sample<Std>>(moments[j][0], moments[j][1], eps[j], Unbounded{});
    }
    if (samples.vectors) {
      store_row(at(out, group.out[0]), z);
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (j < group.count) Thread::store(at(out, group.out[j]), z[j]);
      }
    }
    out = at(out, samples.stride);
  } while (stream.next());
}

template <class T, class Source, class R>
__device__ __forceinline__ void sum_samples(const T* __restrict__ grad_z,
                                            const T* __restrict__ scale, T* __restrict__ grad_mu,
                                            T* __restrict__ grad_scale, uint32_t groups,
                                            const Layout& layout, int64_t first_index,
                                            uint32_t segment_numel, const Divisor& segment_groups,
                                            const Source& source, const AnyScale<R>& form,
                                            const Samples& samples) {
  constexpr int n = kPerCounter<T>;
  Group<T> group;
  if (!group.find(groups, layout, first_index, segment_numel, segment_groups, source, samples)) {
    return;
  }
  R sums[n][2] = {};
  Stream<T, Source> stream(source, samples, group);
  for (bool more = stream.left > 0; more; more = stream.next()) {
    R grad[n] = {}, eps[n];
    if (samples.vectors) {
      load_row(at(grad_z, group.x[0]), grad);
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (j < group.count) grad[j] = Thread::load(at(grad_z, group.x[j]));
      }
    }
    grad_z = at(grad_z, samples.stride);
    stream.draw(eps);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const R in[] = {grad[j], sums[j][0], sums[j][1]};
      AddSample::apply<Thread>(in, eps[j], form, sums[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < n; ++j) {
    R in[] = {sums[j][0], sums[j][1], R{}};
    if (form.read) in[2] = Thread::load(at(scale, group.scale[j]));
    R grads[2];
    AnyForm<Gradients>::template apply<Thread>(in, R{}, form, grads);
    if (j < group.count) {
      Thread::store(at(grad_mu, group.out[j]), grads[0]);
      Thread::store(at(grad_scale, group.out[j]), grads[1]);
    }
  }
}

}  // namespace reparam_fused
