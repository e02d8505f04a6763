#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/result_type.h>
#include <torch/library.h>

#include "dispatch.h"

// The CPU side of the ops: shapes and strides in, one parallel_for over the
// kernels out. _validate.py has checked what a user gave; what is checked here
// again is what memory safety hangs on, for direct callers of the ops.

namespace reparam_fused {
namespace {

// Elements below which a second thread costs more than it brings: about 8 us
// of work.
constexpr int64_t kGrain = 8192;

DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return kFloat;
    case at::kDouble:
      return kDouble;
    case at::kHalf:
      return kHalf;
    case at::kBFloat16:
      return kBFloat16;
    default:
      TORCH_CHECK(false, "reparam_fused: expected float32, float64, float16 or bfloat16, got ",
                  dtype);
  }
}

// Contiguous, or as chunk and split leave a contiguous tensor: TensorIterator would
// make the output contiguous, at the cost of a small kernel.
bool in_row_major_order(const at::Tensor& t) {
  if (t.is_contiguous()) return true;
  for (int64_t d = 0; d < t.dim(); ++d) {
    const int64_t inner = d + 1 < t.dim() ? t.stride(d + 1) : 0;
    if (t.size(d) < 2 || t.stride(d) <= inner) return false;
  }
  return true;
}

// The output that torch.add(x, log_var) would have: its shape and its strides.
at::Tensor empty_output(const at::Tensor& x, const at::Tensor& log_var, at::ScalarType dtype) {
  if (x.sizes() == log_var.sizes() && in_row_major_order(x) && in_row_major_order(log_var)) {
    return at::empty(x.sizes(), x.options().dtype(dtype));
  }
  const at::Tensor undefined;
  auto iter = at::TensorIteratorConfig()
                  .add_output(undefined)
                  .add_const_input(x)
                  .add_const_input(log_var)
                  .check_all_same_dtype(false)
                  .declare_static_dtype_and_device(dtype, at::kCPU)
                  .build();
  return iter.output();
}

struct Dimension {
  int64_t size;
  int64_t stride[3];
};
using Dimensions = c10::SmallVector<Dimension, 8>;

// In logical order, with neighbours merged where all three tensors step through
// them as through one.
Dimensions merged_dimensions(const at::Tensor& x, const at::Tensor& log_var,
                             const at::Tensor& out) {
  Dimensions merged;
  for (int64_t d = 0; d < out.dim(); ++d) {
    const Dimension next{out.size(d), {x.stride(d), log_var.stride(d), out.stride(d)}};
    if (next.size == 1) continue;
    if (!merged.empty()) {
      Dimension& last = merged.back();
      bool joined = true;
      for (int k = 0; k < 3; ++k) joined &= last.stride[k] == next.stride[k] * next.size;
      if (joined) {
        last = {last.size * next.size, {next.stride[0], next.stride[1], next.stride[2]}};
        continue;
      }
    }
    merged.push_back(next);
  }
  if (merged.empty()) merged.push_back({1, {1, 1, 1}});
  return merged;
}

// One row of (seed, offset) for each slice of the output, and how long a slice
// is: the trailing dimensions that a key does not tell apart.
std::pair<at::Tensor, int64_t> slice_keys(const at::Tensor& key, const at::Tensor& out) {
  TORCH_CHECK(key.scalar_type() == at::kUInt64 && key.device().is_cpu() && key.dim() >= 1 &&
                  key.size(-1) == 2 && key.dim() <= out.dim() + 1,
              "reparam_fused: expected a uint64 key of shape (2,) or (*batch, 2) on the CPU, got ",
              key.scalar_type(), " ", key.sizes(), " on ", key.device());
  if (key.dim() == 1) return {key.contiguous(), out.numel()};
  int64_t batch_dims = key.dim() - 1;
  while (batch_dims > 0 && key.size(batch_dims - 1) == 1) --batch_dims;
  auto shape = out.sizes().slice(0, batch_dims).vec();
  auto keys = key;
  while (keys.dim() - 1 > batch_dims) keys = keys.squeeze(-2);
  shape.push_back(2);
  int64_t slice_numel = 1;
  for (int64_t d = batch_dims; d < out.dim(); ++d) slice_numel *= out.size(d);
  return {keys.expand(shape).contiguous(), slice_numel};
}

// Most calls need neither step, and small ones would feel their cost.
at::Tensor as_operand(const at::Tensor& t, const at::Tensor& out) {
  if (t.scalar_type() == out.scalar_type() && t.sizes() == out.sizes()) return t;
  return t.to(out.scalar_type()).expand(out.sizes());
}

at::Tensor launch(const Kernel (&kernels)[kDTypes], const at::Tensor& x_any,
                  const at::Tensor& log_var_any, const at::Tensor& key) {
  const auto dtype = at::result_type(x_any, log_var_any);
  const Kernel kernel = kernels[kernel_dtype(dtype)];
  const at::Tensor out = empty_output(x_any, log_var_any, dtype);
  const auto [keys, slice_numel] = slice_keys(key, out);
  const int64_t numel = out.numel();
  if (numel == 0) return out;

  const at::Tensor x = as_operand(x_any, out);
  const at::Tensor log_var = as_operand(log_var_any, out);
  const Dimensions dims = merged_dimensions(x, log_var, out);
  c10::SmallVector<int64_t, 32> table;
  for (const auto& d : dims) table.push_back(d.size);
  for (int k = 0; k < 3; ++k) {
    for (const auto& d : dims) table.push_back(d.stride[k]);
  }
  const auto ndim = dims.size();
  const Problem problem{x.const_data_ptr(),
                        log_var.const_data_ptr(),
                        out.mutable_data_ptr(),
                        static_cast<int>(ndim),
                        table.data(),
                        table.data() + ndim,
                        table.data() + 2 * ndim,
                        table.data() + 3 * ndim,
                        keys.const_data_ptr<uint64_t>(),
                        slice_numel};
  const int64_t tiles = (numel + kMaxTile - 1) / kMaxTile;
  at::parallel_for(0, tiles, kGrain / kMaxTile, [&](int64_t begin, int64_t end) {
    kernel(problem, begin * kMaxTile, std::min(end * kMaxTile, numel));
  });
  return out;
}

at::Tensor sample_from_key(const at::Tensor& mu, const at::Tensor& log_var, const at::Tensor& key) {
  return launch(cpu_kernels().sample, mu, log_var, key);
}

at::Tensor sample_backward(const at::Tensor& grad_z, const at::Tensor& log_var,
                           const at::Tensor& key) {
  return launch(cpu_kernels().sample_backward, grad_z, log_var, key);
}

}  // namespace

TORCH_LIBRARY_IMPL(reparam_fused, CPU, m) {
  m.impl("sample_from_key", &sample_from_key);
  m.impl("sample_backward", &sample_backward);
}

}  // namespace reparam_fused
