#pragma once

#include "../common/terms.h"
#include "kernels.cuh"

// The sample and, of each row, the sum of its terms, and the gradients of both. All of it lies
// densely. A row is summed in the order of problem.h: a thread takes vectors of 16 bytes of it,
// 128 vectors apart. Of a row of up to 32 vectors that is one, and rows share a block; a longer one
// has a block for each chunk. What sums the chunks of a row is a kernel of the same shape.

namespace reparam_fused {

template <class T>
using RegisterOf = typename Element<Thread, T>::Register;

// The part of a thread: every 128th vector of a chunk, from `vector` of the row on
struct Share {
  int64_t row, vector;
  bool writes;  // the sum of all

  explicit __device__ __forceinline__ Share(const Rows& rows) {
    if (rows.lane_bits == kBlockBits) {
      uint32_t chunk;
      row = divide(blockIdx.x, rows.chunks, chunk);
      vector = static_cast<int64_t>(chunk) * kChunkVectors + threadIdx.x;
      writes = threadIdx.x == 0;
    } else {
      const uint32_t lane = threadIdx.x & ((1u << rows.lane_bits) - 1);
      row = (static_cast<int64_t>(blockIdx.x) << (kBlockBits - rows.lane_bits)) +
            (threadIdx.x >> rows.lane_bits);
      // Beyond the last row there is nothing to take, but a shuffle takes every thread.
      vector = row < rows.count ? lane : rows.length;
      writes = row < rows.count && lane == 0;
    }
  }

  // Calls body(first, count), of each of its vectors that the row has: the first element, and how
  // many of the row are in it.
  template <int per_vector, class Body>
  __device__ __forceinline__ void each(const Rows& rows, Body body) const {
    const int64_t vectors = (rows.length + per_vector - 1) / per_vector;
#pragma unroll 1
    for (int i = 0; i < kVectorsPerThread; ++i) {
      const int64_t v = vector + i * kBlock;
      if (v >= vectors) break;
      const int64_t left = rows.length - v * per_vector;
      body(row * rows.length + v * per_vector,
           left < per_vector ? static_cast<int>(left) : per_vector);
    }
  }
};

// Of the sums that each thread has by elements of a vector the sum over 2^bits threads of a warp
template <class R, int n>
__device__ __forceinline__ R sum_of_warp(R (&sums)[n], int bits) {
#pragma unroll
  for (int half = n / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] = Thread::add(sums[i], sums[i + half]);
  }
  R sum = sums[0];
#pragma unroll
  for (int bit = 4; bit >= 0; --bit) {
    const R other = __shfl_xor_sync(0xffffffffu, sum, 1 << bit);
    if (bit < bits) sum = Thread::add(sum, other);
  }
  return sum;
}
template <class R>
__device__ __forceinline__ void write_sum(R sum, R* out) {
  *out = Thread::add(sum, R(0));  // not -0
}
template <class R, int n>
__device__ __forceinline__ void write_sum_of_block(R (&sums)[n], R* out) {
  __shared__ R of_warp[kBlock / 32];
  const R sum = sum_of_warp(sums, 5);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    write_sum(Thread::add(Thread::add(of_warp[0], of_warp[2]), Thread::add(of_warp[1], of_warp[3])),
              out + blockIdx.x);
  }
}
template <class R, int n>
__device__ __forceinline__ void write_sums(R (&sums)[n], const Rows& rows, const Share& share,
                                           R* out) {
  if (rows.lane_bits == kBlockBits) return write_sum_of_block(sums, out);
  const R sum = sum_of_warp(sums, rows.lane_bits);
  if (share.writes) write_sum(sum, out + share.row);
}

// A vector of which there are `count` elements: the others are 0, and stay unwritten. One of a row
// of whole vectors is one access.
template <class T>
__device__ __forceinline__ uint4 load_some(const void* tensor, int64_t first, int count,
                                           const Rows& rows) {
  if (tensor == nullptr) return {};
  const T* p = static_cast<const T*>(tensor) + first;
  if (rows.of_vectors) return Thread::load_vector(p);
  RegisterOf<T> x[kPerVector<T>] = {};
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) {
    if (j < count) x[j] = Thread::load(p + j);
  }
  return Thread::pack(static_cast<T*>(nullptr), x);
}
template <class T>
__device__ __forceinline__ void store_some(void* tensor, int64_t first, int count, const Rows& rows,
                                           uint4 v) {
  if (tensor == nullptr) return;
  T* p = static_cast<T*>(tensor) + first;
  if (rows.of_vectors) {
    *reinterpret_cast<uint4*>(p) = v;
    return;
  }
  RegisterOf<T> x[kPerVector<T>];
  Thread::unpack(p, v, x);
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) {
    if (j < count) Thread::store(p + j, x[j]);
  }
}

// A kernel of everything is a loop over elements, or it would be eight times as long. An array in
// registers has no index that is known at run time: the elements of a vector, of which those that
// are done make room for results, move by one place.
__device__ __forceinline__ float front(const float*, const uint4& v) {
  return __uint_as_float(v.x);
}
__device__ __forceinline__ double front(const double*, const uint4& v) {
  return __hiloint2double(v.y, v.x);
}
template <class T>
__device__ __forceinline__ float front(const T* type, const uint4& v) {
  float x, unused;
  Thread::unpack(type, v.x, x, unused);
  return x;
}
__device__ __forceinline__ void push(float*, uint4& v, float last) {
  v = make_uint4(v.y, v.z, v.w, __float_as_uint(last));
}
__device__ __forceinline__ void push(double*, uint4& v, double last) {
  v = make_uint4(v.z, v.w, __double2loint(last), __double2hiint(last));
}
template <class T>
__device__ __forceinline__ void push(T* type, uint4& v, float last) {
  v.x = __funnelshift_r(v.x, v.y, 16);
  v.y = __funnelshift_r(v.y, v.z, 16);
  v.z = __funnelshift_r(v.z, v.w, 16);
  v.w = __funnelshift_r(v.w, Thread::pack(type, last, last), 16);
}
template <class R, int n>
__device__ __forceinline__ void push(R (&x)[n], R last) {
#pragma unroll
  for (int j = 0; j + 1 < n; ++j) x[j] = x[j + 1];
  x[n - 1] = last;
}

// The noise of elements in a row, one after the other: a counter of it at a time
template <class T>
struct Draws {
  using R = RegisterOf<T>;
  static constexpr int n = kPerCounter<T>;
  const Numbering& numbering;
  Key key;
  R eps[n] = {};
  int left;

  explicit __device__ __forceinline__ Draws(const Numbering& numbering) : numbering(numbering) {
    if (numbering.keys != nullptr && numbering.one_segment) {
      key = read(KeyTensor{numbering.keys, 0}, 0);
    }
  }
  __device__ __forceinline__ void draw(int64_t element) {
    int64_t index = element, in_segment = n;
    if (!numbering.one_segment) {
      uint32_t place_in_segment;
      divide(static_cast<uint32_t>(element), numbering.segment, place_in_segment);
      in_segment = numbering.segment.divisor - place_in_segment;
      const Place place = place_of(numbering.layout, static_cast<uint32_t>(element));
      key = read(KeyTensor{numbering.keys, 0}, place.key);
      index = place.index;
    }
    index += numbering.first_index;
    const int skipped = static_cast<int>(index % n);
    normals<Thread, T>(key.offset + static_cast<uint64_t>(index / n), key.seed, eps);
#pragma unroll 1
    for (int k = 0; k < skipped; ++k) push(eps, R{});
    left = n - skipped;
    if (in_segment < left) left = static_cast<int>(in_segment);
  }
  __device__ __forceinline__ R next(int64_t element) {
    if (left == 0) draw(element);
    const R first = eps[0];
    push(eps, R{});
    --left;
    return first;
  }
};

template <class Op, class R, class Limits, int inputs, int results>
__device__ __forceinline__ void apply(const R (&in)[inputs], R eps, const Limits& limits,
                                      R (&out)[results]) {
  static_assert(Op::kOperands == inputs && Op::kResults == results, "an operand for each");
  Op::template apply<Thread>(in, eps, limits, out);
}
// Of those with one result
template <class Op, class R, class Limits, int inputs>
__device__ __forceinline__ R apply(const R (&in)[inputs], R eps, const Limits& limits) {
  R out[1];
  apply<Op>(in, eps, limits, out);
  return out[0];
}

// A scale as the terms take it, and from the gradient of that to the scale's
template <class R>
__device__ __forceinline__ R sigma_of(R scale, const AnyScale<R>& limits) {
  return apply<AnyForm<ToSigma>>({scale}, R{}, limits);
}
template <class R>
__device__ __forceinline__ R log_var_of(R scale, const AnyScale<R>& limits) {
  return apply<AnyForm<ToLogVar>>({scale}, R{}, limits);
}
template <class R>
__device__ __forceinline__ R from_spread(R grad, R scale, bool by_log_var,
                                         const AnyScale<R>& limits) {
  const R in[] = {grad, scale};
  if (by_log_var) return apply<AnyForm<FromLogVar>>(in, R{}, limits);
  return apply<AnyForm<FromSigma>>(in, R{}, limits);
}

template <class By, class R>
__device__ __forceinline__ R term_of(const Head<R>& head, R mu, R spread, R loc, R prior, R eps) {
  if (head.term != kKlTerm) return apply<LogProbTerm<By>>({spread}, eps, Unbounded{});
  if (head.has_prior()) return apply<PriorTerm<By>>({mu, spread, loc, prior}, eps, Unbounded{});
  return apply<KlTerm<By>>({mu, spread}, eps, Unbounded{});
}

// The gradients of mu, of the scale and of the prior's
template <class By, class R>
__device__ __forceinline__ void term_backward(const Head<R>& head, R mu, R spread, R loc, R prior,
                                              R grad, R dz, R (&out)[3]) {
  if (head.term != kKlTerm) {
    out[1] = apply<LogProbTermBackward<By>>({spread, grad}, R{}, Unbounded{});
  } else if (head.has_prior()) {
    apply<PriorTermBackward<By>>({mu, spread, loc, prior, grad}, R{}, Unbounded{}, out);
  } else {
    R both[2];
    apply<KlTermBackward<By>>({mu, spread, grad, dz}, R{}, Unbounded{}, both);
    out[0] = both[0];
    out[1] = both[1];
  }
}

// Of every term, form and prior
template <class T>
__device__ __forceinline__ void any_head(const Head<RegisterOf<T>>& head) {
  using R = RegisterOf<T>;
  constexpr int n = kPerVector<T>;
  const auto* in = static_cast<const T*>(nullptr);
  auto* out = static_cast<T*>(nullptr);
  const Rows& rows = head.rows;
  const Share share(rows);
  const bool draws_noise = head.numbering.keys != nullptr;
  Draws<T> draws(head.numbering);
  R sums[n] = {};
  share.each<n>(rows, [&](int64_t first, int count) {
    uint4 mu_or_z = load_some<T>(head.operands[0], first, count, rows);
    uint4 scales = load_some<T>(head.operands[1], first, count, rows);
    uint4 locs = load_some<T>(head.operands[2], first, count, rows);
    uint4 priors = load_some<T>(head.operands[3], first, count, rows);
    draws.left = 0;
#pragma unroll 1
    for (int j = 0; j < n; ++j) {
      R z = 0, term = 0;
      if (j < count) {
        const R mu = front(in, mu_or_z), scale = front(in, scales), loc = front(in, locs);
        R sigma = 0, prior = 0, eps = 0;
        if (draws_noise || !head.by_log_var) sigma = sigma_of(scale, head.scale);
        if (draws_noise) {
          eps = draws.next(first + j);
          z = apply<Sample<Std>>({mu, sigma}, eps, Unbounded{});
        }
        const R spread = head.by_log_var ? log_var_of(scale, head.scale) : sigma;
        if (head.has_prior())
          prior = head.by_log_var ? log_var_of(front(in, priors), head.prior)
                                  : sigma_of(front(in, priors), head.prior);
        term = head.by_log_var ? term_of<ByLogVar>(head, mu, spread, loc, prior, eps)
                               : term_of<BySigma>(head, mu, spread, loc, prior, eps);
        if (head.term == kTanhLogProbTerm) {
          R both[2];
          apply<Tanh>({z, term}, R{}, Unbounded{}, both);
          z = both[0];
          term = both[1];
        }
      }
      push(out, mu_or_z, z);
      push(out, scales, R{});
      push(out, locs, R{});
      push(out, priors, R{});
      push(sums, Thread::add(sums[0], term));
    }
    store_some<T>(head.results[0], first, count, rows, mu_or_z);
  });
  write_sums(sums, rows, share, static_cast<R*>(head.totals));
}

template <class T>
__device__ __forceinline__ void any_head_backward(const Head<RegisterOf<T>>& head) {
  using R = RegisterOf<T>;
  constexpr int n = kPerVector<T>;
  const auto* in = static_cast<const T*>(nullptr);
  auto* out = static_cast<T*>(nullptr);
  const Rows& rows = head.rows;
  const Share share(rows);
  const bool draws_noise = head.numbering.keys != nullptr;
  Draws<T> draws(head.numbering);
  share.each<n>(rows, [&](int64_t first, int count) {
    uint4 mus = load_some<T>(head.operands[0], first, count, rows);
    uint4 scales = load_some<T>(head.operands[1], first, count, rows);
    uint4 locs = load_some<T>(head.operands[2], first, count, rows);
    uint4 priors = load_some<T>(head.operands[3], first, count, rows);
    uint4 grads = load_some<T>(head.operands[4], first, count, rows);
    const R grad = __ldg(static_cast<const R*>(head.grad_totals) + share.row);
    draws.left = 0;
#pragma unroll 1
    for (int j = 0; j < n; ++j) {
      R by_mu = 0, by_scale = 0, by_loc = 0, by_prior = 0;
      if (j < count) {
        const R mu = front(in, mus), scale = front(in, scales), loc = front(in, locs);
        const R prior_scale = front(in, priors);
        R sigma = 0, prior = 0;
        if (head.term == kTanhLogProbTerm || !head.by_log_var) sigma = sigma_of(scale, head.scale);
        const R spread = head.by_log_var ? log_var_of(scale, head.scale) : sigma;
        if (head.has_prior())
          prior = head.by_log_var ? log_var_of(prior_scale, head.prior)
                                  : sigma_of(prior_scale, head.prior);
        R by[3] = {}, dz = draws_noise ? front(in, grads) : R{};
        if (head.by_log_var) {
          term_backward<ByLogVar>(head, mu, spread, loc, prior, grad, dz, by);
        } else {
          term_backward<BySigma>(head, mu, spread, loc, prior, grad, dz, by);
        }
        by_mu = by[0];
        by_loc = Thread::sub(R(0), by_mu);
        by_scale = from_spread(by[1], scale, head.by_log_var, head.scale);
        if (head.has_prior()) {
          by_prior = from_spread(by[2], prior_scale, head.by_log_var, head.prior);
        }
        if (draws_noise) {
          const R eps = draws.next(first + j);
          if (head.term == kTanhLogProbTerm) {
            const R z = apply<Sample<Std>>({mu, sigma}, eps, Unbounded{});
            dz = by_mu = apply<TanhBackward>({dz, z, grad}, R{}, Unbounded{});
          } else if (head.has_prior()) {
            by_mu = Thread::add(dz, by_mu);
          }
          const R of_sample = from_spread(Thread::mul(dz, eps), scale, false, head.scale);
          by_scale = Thread::add(of_sample, by_scale);
        }
      }
      push(out, mus, by_mu);
      push(out, scales, by_scale);
      push(out, locs, by_loc);
      push(out, priors, by_prior);
      push(out, grads, R{});
    }
    store_some<T>(head.results[0], first, count, rows, mus);
    store_some<T>(head.results[1], first, count, rows, scales);
    store_some<T>(head.results[2], first, count, rows, locs);
    store_some<T>(head.results[3], first, count, rows, priors);
  });
}

// The case that is the most frequent: a sample and its divergence from N(0, 1), of a log_var
// without bounds, where every vector begins with a counter of one key. A full chunk is without
// bounds, and the loads of a thread are on their way at once.

// So many vectors of a full chunk, of 16 elements, are computed without a loop. All four of the
// half types would be twice the code, for 1 instruction less an element.
template <class T>
constexpr int kAtOnce = 16 / kPerVector<T>;

// Whether the block has a chunk of which nothing is missing, and then the first vector of the
// thread
template <int per_vector>
__device__ __forceinline__ bool has_full_chunk(const Rows& rows, uint32_t& row, int64_t& vector) {
  uint32_t chunk;
  row = divide(blockIdx.x, rows.chunks, chunk);
  vector =
      row * (rows.length / per_vector) + static_cast<int64_t>(chunk) * kChunkVectors + threadIdx.x;
  return chunk < rows.full_chunks;
}

template <class T>
__device__ __forceinline__ void kl_head(const Head<RegisterOf<T>>& head) {
  using R = RegisterOf<T>;
  constexpr int n = kPerVector<T>;
  const Rows& rows = head.rows;
  const Key key = read(KeyTensor{head.numbering.keys, 0}, 0);
  const uint64_t first_counter =
      key.offset + static_cast<uint64_t>(head.numbering.first_index) / kPerCounter<T>;
  const auto* mus = static_cast<const uint4*>(head.operands[0]);
  const auto* scales = static_cast<const uint4*>(head.operands[1]);
  auto* out = static_cast<uint4*>(head.results[0]);
  auto* totals = static_cast<R*>(head.totals);
  R sums[n] = {};
  const auto compute = [&](uint4 mu_in, uint4 scale_in, int64_t v, uint64_t counter, bool first) {
    const auto* type = static_cast<const T*>(nullptr);
    R mu[n], log_var[n], z[n];
    Thread::unpack(type, mu_in, mu);
    Thread::unpack(type, scale_in, log_var);
#pragma unroll
    for (int c = 0; c < kCountersPerVector<T>; ++c) {
      R eps[kPerCounter<T>];
      normals<Thread, T>(counter + c, key.seed, eps);
#pragma unroll
      for (int j = 0; j < kPerCounter<T>; ++j) {
        const int i = c * kPerCounter<T> + j;
        z[i] = apply<Sample<LogVar>>({mu[i], log_var[i]}, eps[j], Unbounded{});
        const R term = apply<KlTerm<ByLogVar>>({mu[i], log_var[i]}, eps[j], Unbounded{});
        sums[i] = first ? term : Thread::add(sums[i], term);
      }
    }
    out[v] = Thread::pack(static_cast<T*>(nullptr), z);
  };
  uint32_t row;
  int64_t v;
  if (has_full_chunk<n>(rows, row, v)) {
#pragma unroll 1
    for (int k = 0; k < kVectorsPerThread; k += kAtOnce<T>, v += kAtOnce<T> * kBlock) {
      const uint64_t counter = first_counter + v * kCountersPerVector<T>;
      uint4 mu_in[kAtOnce<T>], scale_in[kAtOnce<T>];
#pragma unroll
      for (int i = 0; i < kAtOnce<T>; ++i) {
        mu_in[i] = Thread::load_vector(mus + v + i * kBlock);
        scale_in[i] = Thread::load_vector(scales + v + i * kBlock);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce<T>; ++i) {
        compute(mu_in[i], scale_in[i], v + i * kBlock, counter + i * kBlock * kCountersPerVector<T>,
                kAtOnce<T> == kVectorsPerThread && i == 0);
      }
    }
    return write_sum_of_block(sums, totals);
  }
  const Share share(rows);
  share.each<n>(rows, [&](int64_t first, int) {
    v = first / n;
    compute(Thread::load_vector(mus + v), Thread::load_vector(scales + v), v,
            first_counter + v * kCountersPerVector<T>, false);
  });
  write_sums(sums, rows, share, totals);
}

template <class T>
__device__ __forceinline__ void kl_head_backward(const Head<RegisterOf<T>>& head) {
  using R = RegisterOf<T>;
  constexpr int n = kPerVector<T>;
  const Rows& rows = head.rows;
  const Key key = read(KeyTensor{head.numbering.keys, 0}, 0);
  const uint64_t first_counter =
      key.offset + static_cast<uint64_t>(head.numbering.first_index) / kPerCounter<T>;
  const auto* mus = static_cast<const uint4*>(head.operands[0]);
  const auto* scales = static_cast<const uint4*>(head.operands[1]);
  const auto* grads = static_cast<const uint4*>(head.operands[4]);
  auto* out_mu = static_cast<uint4*>(head.results[0]);
  auto* out_scale = static_cast<uint4*>(head.results[1]);
  const auto compute = [&](uint4 mu_in, uint4 scale_in, uint4 grad_in, R grad, int64_t v,
                           uint64_t counter) {
    const auto* type = static_cast<const T*>(nullptr);
    R mu[n], log_var[n], dz[n], by_mu[n], by_scale[n];
    Thread::unpack(type, mu_in, mu);
    Thread::unpack(type, scale_in, log_var);
    Thread::unpack(type, grad_in, dz);
#pragma unroll
    for (int c = 0; c < kCountersPerVector<T>; ++c) {
      R eps[kPerCounter<T>];
      normals<Thread, T>(counter + c, key.seed, eps);
#pragma unroll
      for (int j = 0; j < kPerCounter<T>; ++j) {
        const int i = c * kPerCounter<T> + j;
        R by[2];
        apply<KlTermBackward<ByLogVar>>({mu[i], log_var[i], grad, dz[i]}, eps[j], Unbounded{}, by);
        const R of_sample = apply<SampleBackward<LogVar>>({dz[i], log_var[i]}, eps[j], Unbounded{});
        by_mu[i] = by[0];
        by_scale[i] = Thread::add(of_sample, by[1]);
      }
    }
    out_mu[v] = Thread::pack(static_cast<T*>(nullptr), by_mu);
    out_scale[v] = Thread::pack(static_cast<T*>(nullptr), by_scale);
  };
  uint32_t row;
  int64_t v;
  if (has_full_chunk<n>(rows, row, v)) {
    const R grad = __ldg(static_cast<const R*>(head.grad_totals) + row);
#pragma unroll 1
    for (int k = 0; k < kVectorsPerThread; k += kAtOnce<T>, v += kAtOnce<T> * kBlock) {
      const uint64_t counter = first_counter + v * kCountersPerVector<T>;
      uint4 mu_in[kAtOnce<T>], scale_in[kAtOnce<T>], grad_in[kAtOnce<T>];
#pragma unroll
      for (int i = 0; i < kAtOnce<T>; ++i) {
        mu_in[i] = Thread::load_vector(mus + v + i * kBlock);
        scale_in[i] = Thread::load_vector(scales + v + i * kBlock);
        grad_in[i] = Thread::load_vector(grads + v + i * kBlock);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce<T>; ++i) {
        compute(mu_in[i], scale_in[i], grad_in[i], grad, v + i * kBlock,
                counter + i * kBlock * kCountersPerVector<T>);
      }
    }
    return;
  }
  const Share share(rows);
  share.each<n>(rows, [&](int64_t first, int) {
    v = first / n;
    const R grad = __ldg(static_cast<const R*>(head.grad_totals) + share.row);
    compute(Thread::load_vector(mus + v), Thread::load_vector(scales + v),
            Thread::load_vector(grads + v), grad, v, first_counter + v * kCountersPerVector<T>);
  });
}

// Of sums of chunks, which may begin anywhere
template <class R>
__device__ __forceinline__ void sum_chunks(const R* __restrict__ terms, R* __restrict__ out,
                                           const Rows& rows) {
  constexpr int n = kVectorBytes / sizeof(R);
  const Share share(rows);
  R sums[n] = {};
  share.each<n>(rows, [&](int64_t first, int count) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j < count) sums[j] = Thread::add(sums[j], __ldg(terms + first + j));
    }
  });
  write_sums(sums, rows, share, out);
}

}  // namespace reparam_fused
