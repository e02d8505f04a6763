#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/result_type.h>

#include "common/problem.h"

// From the arguments of an op to a Problem, for the kernels of any device.
// _validate.py has checked what a user gave; what is checked here again is what
// memory safety hangs on, for direct callers of the ops.

namespace reparam_fused {

inline DType kernel_dtype(at::ScalarType dtype) {
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
inline bool in_row_major_order(const at::Tensor& t) {
  if (t.is_contiguous()) return true;
  for (int64_t d = 0; d < t.dim(); ++d) {
    const int64_t inner = d + 1 < t.dim() ? t.stride(d + 1) : 0;
    if (t.size(d) < 2 || t.stride(d) <= inner) return false;
  }
  return true;
}

// The output that torch.add(x, log_var) would have: its shape and its strides.
inline at::Tensor empty_output(const at::Tensor& x, const at::Tensor& log_var,
                               at::ScalarType dtype) {
  if (x.sizes() == log_var.sizes() && in_row_major_order(x) && in_row_major_order(log_var)) {
    return at::empty(x.sizes(), x.options().dtype(dtype));
  }
  const at::Tensor undefined;
  auto iter = at::TensorIteratorConfig()
                  .add_output(undefined)
                  .add_const_input(x)
                  .add_const_input(log_var)
                  .check_all_same_dtype(false)
                  .declare_static_dtype_and_device(dtype, x.device())
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
inline Dimensions merged_dimensions(const at::Tensor& x, const at::Tensor& log_var,
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
inline std::pair<at::Tensor, int64_t> slice_keys(const at::Tensor& key, const at::Tensor& out) {
  TORCH_CHECK(key.scalar_type() == at::kUInt64 && key.device() == out.device() && key.dim() >= 1 &&
                  key.size(-1) == 2 && key.dim() <= out.dim() + 1,
              "reparam_fused: expected a uint64 key of shape (2,) or (*batch, 2) on ", out.device(),
              ", got ", key.scalar_type(), " ", key.sizes(), " on ", key.device());
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
inline at::Tensor as_operand(const at::Tensor& t, const at::Tensor& out) {
  if (t.scalar_type() == out.scalar_type() && t.sizes() == out.sizes()) return t;
  return t.to(out.scalar_type()).expand(out.sizes());
}

// Owns what the Problem points to. Without a key there is one slice, and no keys.
class Call {
 public:
  Call(const at::Tensor& x, const at::Tensor& log_var, const std::optional<at::Tensor>& key) {
    TORCH_CHECK(x.device() == log_var.device(),
                "reparam_fused: expected tensors on one device, got ", x.device(), " and ",
                log_var.device());
    const auto dtype = at::result_type(x, log_var);
    dtype_ = kernel_dtype(dtype);
    out_ = empty_output(x, log_var, dtype);
    int64_t slice_numel = out_.numel();
    if (key.has_value()) std::tie(keys_, slice_numel) = slice_keys(*key, out_);
    if (out_.numel() == 0) return;

    x_ = as_operand(x, out_);
    log_var_ = as_operand(log_var, out_);
    const Dimensions dims = merged_dimensions(x_, log_var_, out_);
    for (const auto& d : dims) table_.push_back(d.size);
    for (int k = 0; k < 3; ++k) {
      for (const auto& d : dims) table_.push_back(d.stride[k]);
    }
    const auto ndim = dims.size();
    problem_ = {x_.const_data_ptr(),
                log_var_.const_data_ptr(),
                out_.mutable_data_ptr(),
                static_cast<int>(ndim),
                table_.data(),
                table_.data() + ndim,
                table_.data() + 2 * ndim,
                table_.data() + 3 * ndim,
                key.has_value() ? keys_.const_data_ptr<uint64_t>() : nullptr,
                slice_numel};
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const at::Tensor& out() const { return out_; }
  // The operands as the kernels read them: of the output's dtype and shape.
  const at::Tensor& x() const { return x_; }
  const at::Tensor& log_var() const { return log_var_; }
  DType dtype() const { return dtype_; }
  bool empty() const { return out_.numel() == 0; }
  // Where the output is not empty.
  const Problem& problem() const { return problem_; }

 private:
  at::Tensor x_, log_var_, keys_, out_;
  DType dtype_;
  c10::SmallVector<int64_t, 32> table_;
  Problem problem_{};
};

}  // namespace reparam_fused
