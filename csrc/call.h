#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "layout.h"

// The ops of every device, and the way from their arguments to a Problem. Of torch it takes
// the stable ABI alone, so that one binary serves every release since 2.13.

namespace reparam_fused {

namespace abi = torch::stable::detail;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Of a function of the ABI: its error, in the words of torch
inline void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
}

struct Release {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using Owned = std::unique_ptr<AtenTensorOpaque, Release>;

// What a call asks of a tensor, asked once. Borrowed.
struct View {
  AtenTensorHandle tensor;
  int32_t dtype, device_type, device_index;
  Shape shape;

  View(AtenTensorHandle tensor) : tensor(tensor) {
    int64_t *sizes, *strides;
    check(aoti_torch_get_dtype(tensor, &dtype));
    check(aoti_torch_get_device_type(tensor, &device_type));
    check(aoti_torch_get_device_index(tensor, &device_index));
    check(aoti_torch_get_dim(tensor, &shape.ndim));
    check(aoti_torch_get_sizes(tensor, &sizes));
    check(aoti_torch_get_strides(tensor, &strides));
    shape.sizes = sizes;
    shape.strides = strides;
  }
  View(const Tensor& tensor) : View(tensor.get()) {}

  bool on_device_of(const View& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  const void* data() const {
    const void* data = nullptr;
    check(torch_get_const_data_ptr(tensor, &data));
    return data;
  }
};

inline std::string name_of_dtype(int32_t dtype) {
  return torch::headeronly::toString(abi::to<ScalarType>(dtype));
}

inline int32_t torch_dtype(DType dtype) {
  int32_t (*const of[])() = {aoti_torch_dtype_float32, aoti_torch_dtype_float64,
                             aoti_torch_dtype_float16, aoti_torch_dtype_bfloat16};
  return of[dtype]();
}

inline DType kernel_dtype(int32_t dtype) {
  for (int d = 0; d < kDTypes; ++d) {
    if (dtype == torch_dtype(static_cast<DType>(d))) return static_cast<DType>(d);
  }
  refuse("expected float32, float64, float16 or bfloat16, got ", name_of_dtype(dtype));
}

inline Owned empty(const Shape& shape, int32_t dtype, const View& device) {
  AtenTensorHandle tensor;
  check(aoti_torch_empty_strided(shape.ndim, shape.sizes, shape.strides, dtype, device.device_type,
                                 device.device_index, &tensor));
  return Owned(tensor);
}

inline Owned empty_key(const View& device) {
  const int64_t size = 2, stride = 1;
  return empty({1, &size, &stride}, aoti_torch_dtype_uint64(), device);
}

// In another dtype, as t.to(dtype)
inline Owned cast(const View& t, int32_t dtype) {
  AtenTensorHandle tensor;
  check(aoti_torch_new_tensor_handle(t.tensor, &tensor));
  StableIValue stack[] = {abi::from(tensor), abi::from(dtype), abi::from(false), abi::from(false),
                          abi::from(std::nullopt)};
  check(torch_call_dispatcher("aten::to", "dtype", stack, TORCH_ABI_VERSION));
  return Owned(abi::to<AtenTensorHandle>(stack[0]));
}

// A row-major copy
inline Owned copy(const View& t) {
  Dimensions dims;
  dims.pack(t.shape);
  Owned copy = empty(dims.shape(), t.dtype, t);
  check(aoti_torch_copy_(copy.get(), t.tensor, /*non_blocking=*/0));
  return copy;
}

// Of a key or of what is folded into one: 64 bits an element
inline bool holds_words(const View& t) {
  return t.dtype == aoti_torch_dtype_uint64() || t.dtype == aoti_torch_dtype_int64();
}

// The children of keys, as Children has them, by what the device derives them with.
template <class Run>
Owned derive(const View& keys, const View* data, uint64_t first, int64_t num, const Run& run,
             int64_t ndim = 3) {
  Children children(keys.shape, data ? &data->shape : nullptr, first, num, ndim);
  if (!children.fit || !holds_words(keys) ||
      (data && !(holds_words(*data) && data->on_device_of(keys)))) {
    refuse("expected contiguous keys (m, 2) and numbers (n) of 64 bits on one device, got ",
           name_of_dtype(keys.dtype), " ", keys.shape);
  }
  Derivation d = children.derivation;
  Owned out = empty(children.shape, keys.dtype, keys);
  d.keys = static_cast<const uint64_t*>(keys.data());
  if (data) d.data = static_cast<const uint64_t*>(data->data());
  check(torch_get_mutable_data_ptr(out.get(), reinterpret_cast<void**>(&d.out)));
  if (d.n * d.count > 0) run(d);
  return out;
}

// A call that has passed the checks, with its output. Owns what its Problem points to. Without a
// key there is one slice.
class Call {
 public:
  Call(View x, View scale, std::optional<View> key, const Options& options)
      : device_(x), key_(key), options_(options) {
    if (!x.on_device_of(scale)) refuse("expected tensors on one device, got two");
    dtype_ =
        promoted(kernel_dtype(x.dtype), x.shape.ndim, kernel_dtype(scale.dtype), scale.shape.ndim);
    const int32_t dtype = torch_dtype(dtype_);
    if (x.dtype != dtype) x = View((x_cast_ = cast(x, dtype)).get());
    if (scale.dtype != dtype) scale = View((scale_cast_ = cast(scale, dtype)).get());
    operands_ = {x, scale};
    dims_.broadcast(x.shape, scale.shape);
    dims_.lay_out(x.shape, scale.shape);
    allocate();
  }
  // Without operands
  Call(View key, const Sizes& size, ScalarType dtype, const Options& options)
      : device_(key), key_(key), options_(options) {
    dtype_ = kernel_dtype(abi::to<int32_t>(abi::from(dtype)));
    dims_.pack(shape_of(size));
    allocate();
  }
  Call(const Call&) = delete;

  DType dtype() const { return dtype_; }
  int64_t numel() const { return numel_; }
  const Problem& problem() const { return problem_; }
  const Owned& out() const { return out_; }
  Tensor take_out() { return Tensor(out_.release()); }
  // In place of a key's tensor: two words that outlive the call
  void use_key(const uint64_t* words) { problem_.keys = words; }

 private:
  // Makes the output, and the problem where that is not empty.
  void allocate() {
    check_key();
    numel_ = dims_.numel();
    out_ = empty(dims_.shape(), torch_dtype(dtype_), device_);
    if (key_ && key_->shape.strides[key_->shape.ndim - 1] != 1) {
      key_ = View((key_copy_ = copy(*key_)).get());
    }
    if (!options_.noise) dims_.sort_by_memory();
    problem_.first_index = dims_.number(key_ ? key_->shape : Shape{}, options_);
    if (numel_ == 0) return;
    dims_.merge();
    dims_.describe(&problem_);
    problem_.form = options_.form;
    if (operands_) problem_.x = operands_->first.data();
    if (operands_) problem_.scale = operands_->second.data();
    if (key_) problem_.keys = static_cast<const uint64_t*>(key_->data());
    check(torch_get_mutable_data_ptr(out_.get(), &problem_.out));
  }

  void check_key() const {
    if (!key_) return;
    if (holds_words(*key_) && key_->on_device_of(device_) && dims_.fits(key_->shape)) return;
    refuse("expected a uint64 key of shape (2,) or (*batch, 2) for ", dims_.shape(),
           " on the same device, got ", name_of_dtype(key_->dtype), " ", key_->shape);
  }

  View device_;  // any tensor on it
  std::optional<View> key_;
  std::optional<std::pair<View, View>> operands_;
  Options options_;
  Owned x_cast_, scale_cast_, key_copy_, out_;
  DType dtype_;
  int64_t numel_;
  Dimensions dims_;
  Problem problem_{};
};

// A kernel as torch calls it, with its arguments on a stack
using Boxed = void (*)(StableIValue* stack, uint64_t n_arguments, uint64_t n_results);

// The ops that are the same on every device. A Device is made of the first tensor, before
// anything else is done, and runs the kernel of an op.
template <class Device>
struct Ops {
  using Ints = const std::optional<Sizes>&;

  static Tensor sample_from_key(const Tensor& mu, const Tensor& scale, const Tensor& key,
                                const std::string& form, Ints global_shape, Ints global_offset) {
    const Options options{form_of(form), shape_of(global_shape), shape_of(global_offset)};
    return Device(mu).run(kSample, Call(mu, scale, key, options));
  }

  static Tensor sample_backward(const Tensor& grad_z, const std::optional<Tensor>& scale,
                                const Tensor& key, const std::string& form, Ints global_shape,
                                Ints global_offset) {
    const Options options{backward_form_of(form, scale.has_value()), shape_of(global_shape),
                          shape_of(global_offset)};
    return Device(grad_z).run(kSampleBackward, Call(grad_z, scale.value_or(grad_z), key, options));
  }

  static Tensor noise(const Tensor& key, const Sizes& size, ScalarType dtype, Ints global_shape,
                      Ints global_offset) {
    const Options options{kLogVar, shape_of(global_shape), shape_of(global_offset)};
    return Device(key).run(kNoise, Call(key, size, dtype, options));
  }

  static Tensor kl_divergence(const Tensor& mu, const Tensor& log_var) {
    return Device(mu).run(kKlDivergence, Call(mu, log_var, std::nullopt, kWithoutNoise));
  }

  static Tensor kl_divergence_backward(const Tensor& grad, const Tensor& log_var) {
    return Device(grad).run(kKlDivergenceBackward,
                            Call(grad, log_var, std::nullopt, kWithoutNoise));
  }

  static Tensor derive(const Tensor& keys, const std::optional<Tensor>& data, int64_t first,
                       int64_t num) {
    const View numbers(data.value_or(keys)), *given = data ? &numbers : nullptr;
    const Device device(keys);
    const auto run = [&](const Derivation& d) { device.derive(d); };
    return Tensor(reparam_fused::derive(keys, given, first, num, run).release());
  }

  static void add_to(abi::StableLibrary& m) {
    Device::template add<TORCH_BOX(&sample_from_key)>(m, "reparam_fused::sample_from_key");
    Device::template add<TORCH_BOX(&sample_backward)>(m, "reparam_fused::sample_backward");
    Device::template add<TORCH_BOX(&noise)>(m, "reparam_fused::noise");
    Device::template add<TORCH_BOX(&derive)>(m, "reparam_fused::derive");
    Device::template add<TORCH_BOX(&kl_divergence)>(m, "reparam_fused::kl_divergence");
    Device::template add<TORCH_BOX(&kl_divergence_backward)>(
        m, "reparam_fused::kl_divergence_backward");
  }
};

}  // namespace reparam_fused
