#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/result_type.h>

#include <algorithm>
#include <array>

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

// The output that torch.add(x, scale) would have: its shape and its strides.
inline at::Tensor empty_output(const at::Tensor& x, const at::Tensor& scale, at::ScalarType dtype) {
  if (x.sizes() == scale.sizes() && in_row_major_order(x) && in_row_major_order(scale)) {
    return at::empty(x.sizes(), x.options().dtype(dtype));
  }
  const at::Tensor undefined;
  auto iter = at::TensorIteratorConfig()
                  .add_output(undefined)
                  .add_const_input(x)
                  .add_const_input(scale)
                  .check_all_same_dtype(false)
                  .declare_static_dtype_and_device(dtype, x.device())
                  .build();
  return iter.output();
}

// What the scale is given as, and where the output lies in a larger tensor of whose
// noise it takes its part.
struct Options {
  c10::string_view form;
  at::OptionalIntArrayRef global_shape = {}, global_offset = {};
  bool noise = true;
};
// No element has an index of its own: dimensions go in the order of memory, not of logic.
inline const Options kWithoutNoise{"log_var", {}, {}, /*noise=*/false};

// In each dimension of the output, how far its elements are from each other: as
// operands, in the noise, and in the keys.
enum { kX, kScale, kOut, kIndex, kKey, kStrides };
struct Dimension {
  int64_t size;
  std::array<int64_t, kStrides> stride;
};
using Dimensions = c10::SmallVector<Dimension, 8>;

// In logical order, with neighbours merged where everything steps through them as
// through one.
inline Dimensions merged(const Dimensions& dims) {
  Dimensions merged;
  for (const Dimension& next : dims) {
    if (next.size == 1) continue;
    bool joined = !merged.empty();
    for (int k = 0; joined && k < kStrides; ++k) {
      joined = merged.back().stride[k] == next.stride[k] * next.size;
    }
    if (joined) {
      merged.back() = {merged.back().size * next.size, next.stride};
    } else {
      merged.push_back(next);
    }
  }
  if (merged.empty()) merged.push_back({1, {1, 1, 1, 1, 0}});
  return merged;
}

inline void check_key(const at::Tensor& key, const at::Tensor& out) {
  bool fits = key.scalar_type() == at::kUInt64 && key.device() == out.device() && key.dim() >= 1 &&
              key.size(-1) == 2 && key.dim() <= out.dim() + 1;
  for (int64_t d = 0; fits && d + 1 < key.dim(); ++d) {
    fits = key.size(d) == 1 || key.size(d) == out.size(d);
  }
  TORCH_CHECK(fits, "reparam_fused: expected a uint64 key of shape (2,) or (*batch, 2) for ",
              out.sizes(), " on ", out.device(), ", got ", key.scalar_type(), " ", key.sizes(),
              " on ", key.device());
}

// The leading dimensions that a key tells apart: ones at the end of its batch leave
// their dimension within a slice.
inline int64_t batch_dims(const at::Tensor& key) {
  int64_t dims = key.dim() - 1;
  while (dims > 0 && key.size(dims - 1) == 1) --dims;
  return dims;
}

// Most calls need neither step, and small ones would feel their cost.
inline at::Tensor as_operand(const at::Tensor& t, const at::Tensor& out) {
  if (t.scalar_type() == out.scalar_type() && t.sizes() == out.sizes()) return t;
  return t.to(out.scalar_type()).expand(out.sizes());
}

inline Form kernel_form(c10::string_view form) {
  if (form == "log_var") return kLogVar;
  TORCH_CHECK(form == "std", "reparam_fused: expected form to be log_var or std, got ", form);
  return kStd;
}

// The second operand of a backward: the scale, where the form's derivative depends on it.
inline const at::Tensor& backward_operand(const at::Tensor& grad_z,
                                          const std::optional<at::Tensor>& scale,
                                          c10::string_view form) {
  TORCH_CHECK(scale.has_value() == (kernel_form(form) == kLogVar),
              "reparam_fused: sample_backward takes a scale in the form log_var, and none in the "
              "form std");
  return scale.has_value() ? *scale : grad_z;
}

// Owns what the Problem points to. Without a key there is one slice, and no keys.
class Call {
 public:
  Call(const at::Tensor& x, const at::Tensor& scale, const std::optional<at::Tensor>& key,
       const Options& options) {
    TORCH_CHECK(x.device() == scale.device(), "reparam_fused: expected tensors on one device, got ",
                x.device(), " and ", scale.device());
    const auto dtype = at::result_type(x, scale);
    dtype_ = kernel_dtype(dtype);
    out_ = empty_output(x, scale, dtype);
    x_ = as_operand(x, out_);
    scale_ = as_operand(scale, out_);
    describe(key, options);
  }
  // Without operands: in their place stands the output, which is not read.
  Call(const at::Tensor& key, at::IntArrayRef size, at::ScalarType dtype, const Options& options) {
    dtype_ = kernel_dtype(dtype);
    out_ = at::empty(size, key.options().dtype(dtype));
    x_ = scale_ = out_;
    describe(key, options);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const at::Tensor& out() const { return out_; }
  // The operands as the kernels read them: of the output's dtype and shape.
  const at::Tensor& x() const { return x_; }
  const at::Tensor& scale() const { return scale_; }
  DType dtype() const { return dtype_; }
  bool empty() const { return out_.numel() == 0; }
  // Where the output is not empty.
  const Problem& problem() const { return problem_; }

 private:
  void describe(const std::optional<at::Tensor>& key, const Options& options) {
    const Form form = kernel_form(options.form);
    if (key.has_value()) {
      check_key(*key, out_);
      keys_ = key->stride(-1) == 1 ? *key : key->contiguous();
    }
    Dimensions dims = operand_dimensions();
    if (!options.noise) {
      std::stable_sort(dims.begin(), dims.end(), [](const Dimension& a, const Dimension& b) {
        return a.stride[kOut] > b.stride[kOut];
      });
    }
    const int64_t first_index = number(dims, options);
    if (out_.numel() == 0) return;

    dims = merged(dims);
    const auto ndim = dims.size();
    for (const auto& d : dims) table_.push_back(d.size);
    for (int k = 0; k < kStrides; ++k) {
      for (const auto& d : dims) table_.push_back(d.stride[k]);
    }
    auto outer_ndim = ndim;
    int64_t segment_numel = 1;
    while (outer_ndim > 0 && dims[outer_ndim - 1].stride[kIndex] == segment_numel) {
      segment_numel *= dims[--outer_ndim].size;
    }
    const auto strides = [&](int k) { return table_.data() + (k + 1) * ndim; };
    problem_ = {form,
                x_.const_data_ptr(),
                scale_.const_data_ptr(),
                out_.mutable_data_ptr(),
                key.has_value() ? keys_.const_data_ptr<uint64_t>() : nullptr,
                first_index,
                static_cast<int>(ndim),
                table_.data(),
                strides(kX),
                strides(kScale),
                strides(kOut),
                strides(kIndex),
                strides(kKey),
                static_cast<int>(outer_ndim),
                segment_numel};
  }

  Dimensions operand_dimensions() const {
    Dimensions dims;
    for (int64_t d = 0; d < out_.dim(); ++d) {
      dims.push_back({out_.size(d), {x_.stride(d), scale_.stride(d), out_.stride(d), 0, 0}});
    }
    return dims;
  }

  // Gives the dimensions their strides in the keys and in the noise, which is numbered
  // in row-major order of the whole, from 0 in each slice that a key tells apart.
  // Returns the index of the first element.
  int64_t number(Dimensions& dims, const Options& options) const {
    const int64_t batch = keys_.defined() ? batch_dims(keys_) : 0;
    for (int64_t d = 0; d < batch; ++d) {
      if (keys_.size(d) != 1) dims[d].stride[kKey] = keys_.stride(d);
    }
    const bool whole = !options.global_shape.has_value();
    TORCH_CHECK(whole == !options.global_offset.has_value(),
                "reparam_fused: expected global_shape and global_offset, or neither");
    const auto ndim = dims.size();
    TORCH_CHECK(
        whole || (options.global_shape->size() == ndim && options.global_offset->size() == ndim),
        "reparam_fused: expected global_shape and global_offset to have the ", ndim,
        " dimensions of the output");
    int64_t stride = 1, first = 0;
    for (int64_t d = static_cast<int64_t>(ndim) - 1; d >= 0; --d) {
      const int64_t size = whole ? dims[d].size : (*options.global_shape)[d];
      const int64_t offset = whole ? 0 : (*options.global_offset)[d];
      TORCH_CHECK(offset >= 0 && offset <= size - dims[d].size, "reparam_fused: dimension ", d,
                  " of the output, ", dims[d].size, " from ", offset, ", is not within ", size);
      if (d < batch) continue;
      int64_t whole_stride;
      TORCH_CHECK(!__builtin_mul_overflow(stride, size, &whole_stride),
                  "reparam_fused: expected global_shape to have less than 2^63 elements, got ",
                  whole ? out_.sizes() : *options.global_shape);
      dims[d].stride[kIndex] = stride;
      first += offset * stride;
      stride = whole_stride;
    }
    return first;
  }

  at::Tensor x_, scale_, keys_, out_;
  DType dtype_;
  c10::SmallVector<int64_t, 32> table_;
  Problem problem_{};
};

}  // namespace reparam_fused
