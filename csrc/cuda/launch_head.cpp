#include <algorithm>
#include <atomic>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/forms.h"
#include "enqueue.h"

namespace reparam_fused {
namespace {

enum Kind { kAny, kKl, kKinds };

// A kernel as kernels.cu names it. Each is looked up once.
CudaKernel find(Op op, DType dtype, Kind kind, int device) {
  static std::atomic<CudaKernel> known[2][kDTypes][kKinds];
  std::atomic<CudaKernel>& kernel = known[op == kHeadBackward][dtype][kind];
  if (kernel == nullptr) {
    std::string name = op == kHead ? "head_" : "head_backward_";
    if (kind == kKl) name += "kl_log_var_";
    kernel = find_cuda_kernel(name + kDTypeNames[dtype], device);
  }
  return kernel;
}
CudaKernel find_sum(bool of_double, int device) {
  static std::atomic<CudaKernel> known[2];
  std::atomic<CudaKernel>& kernel = known[of_double];
  if (kernel == nullptr) {
    kernel = find_cuda_kernel(of_double ? "sum_float64" : "sum_float32", device);
  }
  return kernel;
}

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// How many chunks there are of a row
int64_t chunks_of(int64_t row, int64_t per_vector) {
  return divide_up(row, kChunkVectors * per_vector);
}
// What is summed of vectors of the inputs, and then of sums
int64_t sum_size(DType dtype) { return dtype == kDouble ? 8 : 4; }

Rows make_rows(int64_t count, int64_t length, int64_t per_vector) {
  constexpr int kWarpBits = 5;
  const int64_t vectors = divide_up(length, per_vector);
  int bits = 0;
  while (bits <= kWarpBits && int64_t{1} << bits < vectors) ++bits;
  return {count,
          length,
          Divisor(static_cast<uint32_t>(chunks_of(length, per_vector))),
          static_cast<uint32_t>(length / (kChunkVectors * per_vector)),
          bits > kWarpBits ? kBlockBits : bits,
          length % per_vector == 0};
}
int64_t threads_of(const Rows& rows) {
  const bool by_chunks = rows.lane_bits == kBlockBits;
  return (rows.count * (by_chunks ? rows.chunks.divisor : 1)) << rows.lane_bits;
}

bool is_one_segment(const Problem& p) { return p.keys == nullptr || p.outer_ndim == 0; }

Numbering make_numbering(const Problem& p) {
  Numbering numbering{};
  numbering.keys = p.keys;
  numbering.first_index = p.first_index;
  numbering.one_segment = is_one_segment(p);
  if (numbering.one_segment) return numbering;
  numbering.segment = Divisor(static_cast<uint32_t>(p.segment_numel));
  numbering.layout.ndim = p.ndim;
  for (int d = 0; d < p.ndim; ++d) {
    const int from = p.ndim - 1 - d;
    Dimension& dimension = numbering.layout.dimensions[d];
    dimension.size = Divisor(static_cast<uint32_t>(p.sizes[from]));
    dimension.index_stride = Stride(p.index_strides[from]);
    dimension.key_stride = Stride(p.key_strides[from]);
  }
  return numbering;
}

// Whether it is what the kernels for one form are of: a sample and its divergence from N(0, 1), of
// a log_var without bounds, of which every vector begins with a counter of one key.
bool is_kl_of_log_var(DType dtype, const Problem& p, const Rows& rows) {
  return dtype != kDouble && p.term == kKlTerm && p.operands[2] == nullptr && p.form == kLogVar &&
         p.bounds == nullptr && p.keys != nullptr && p.outer_ndim == 0 && rows.of_vectors &&
         p.first_index % counter_of(dtype) == 0;
}

template <class R>
void launch_at(Op op, DType dtype, const Problem& p, void* workspace, int device,
               CudaStream stream) {
  const int64_t per_vector = kVectorBytes / size_of(dtype), count = numel_of(p) / p.row;
  Head<R> head{};
  std::copy_n(p.operands, kMaxOperands, head.operands);
  std::copy_n(p.results, kMaxResults, head.results);
  head.grad_totals = p.grad_totals;
  head.term = p.term;
  head.by_log_var = p.by_log_var;
  head.rows = make_rows(count, p.row, per_vector);
  head.scale = any_scale<R>(p.form, p.bounds);
  head.prior = any_scale<R>(p.prior_form, p.prior_bounds);
  head.numbering = make_numbering(p);
  const Kind kind = is_kl_of_log_var(dtype, p, head.rows) ? kKl : kAny;
  int64_t length = head.rows.chunks.divisor;
  R* sums = static_cast<R*>(workspace);
  head.totals = length == 1 ? p.totals : sums;
  enqueue_kernel(find(op, dtype, kind, device), threads_of(head.rows), device, stream, head);
  if (op == kHeadBackward) return;
  // The sums of chunks are the terms of rows that are shorter, written behind them or, where that
  // was done the time before, over what is summed already.
  R* const behind = sums + count * length;
  while (length > 1) {
    const Rows rows = make_rows(count, length, kVectorBytes / sizeof(R));
    length = rows.chunks.divisor;
    R* const to = length == 1 ? static_cast<R*>(p.totals)
                              : (sums == behind ? static_cast<R*>(workspace) : behind);
    enqueue_kernel(find_sum(sizeof(R) == 8, device), threads_of(rows), device, stream,
                   static_cast<const R*>(sums), to, rows);
    sums = to;
  }
}

const void* advance(const void* p, int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<const char*>(p) + bytes;
}
void* advance(void* p, int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<char*>(p) + bytes;
}

// A problem that has segments is counted in 31 bits: of more elements there are as many places of
// the outermost dimension at a time as are whole rows.
void launch_parts(Op op, DType dtype, const Problem& p, void* workspace, int device,
                  CudaStream stream) {
  if (is_one_segment(p) || (p.ndim <= kMaxDims && numel_of(p) <= kMostElements)) {
    return dtype == kDouble ? launch_at<double>(op, dtype, p, workspace, device, stream)
                            : launch_at<float>(op, dtype, p, workspace, device, stream);
  }
  const int64_t within = numel_of(p) / p.sizes[0];
  int64_t most = p.ndim > kMaxDims ? 1 : std::max<int64_t>(kMostElements / within, 1);
  most -= most % (p.row / std::gcd(p.row, within));
  if (most == 0) {
    throw std::runtime_error("cannot sum rows of " + std::to_string(p.row) +
                             " elements, of which parts have a key or a numbering of their own");
  }
  std::vector<int64_t> sizes(p.sizes, p.sizes + p.ndim);
  for (int64_t i = 0; i < p.sizes[0]; i += most) {
    sizes[0] = std::min(most, p.sizes[0] - i);
    Problem part = p;
    part.sizes = sizes.data();
    const int64_t elements = i * within * size_of(dtype);
    const int64_t rows = i * within / p.row * sum_size(dtype);
    for (auto& operand : part.operands) operand = advance(operand, elements);
    for (auto& result : part.results) result = advance(result, elements);
    part.totals = advance(p.totals, rows);
    part.grad_totals = advance(p.grad_totals, rows);
    part.first_index = p.first_index + i * p.index_strides[0];
    part.keys = p.keys + i * p.key_strides[0];
    if (sizes[0] == 1 && p.ndim > 1) {
      ++part.sizes;
      ++part.index_strides;
      ++part.key_strides;
      part.ndim = p.ndim - 1;
      part.outer_ndim = p.outer_ndim - 1;
    }
    launch_parts(op, dtype, part, workspace, device, stream);
  }
}

}  // namespace

void launch_head_on_cuda(Op op, DType dtype, const Problem& p, void* workspace, int device,
                         CudaStream stream) {
  launch_parts(op, dtype, p, workspace, device, stream);
}

int64_t head_workspace(DType dtype, int64_t rows, int64_t row) {
  const int64_t chunks = chunks_of(row, kVectorBytes / size_of(dtype));
  if (chunks <= 1) return 0;
  const int64_t size = sum_size(dtype), of_chunks = chunks_of(chunks, kVectorBytes / size);
  return rows * (chunks + (of_chunks > 1 ? of_chunks : 0)) * size;
}

}  // namespace reparam_fused
