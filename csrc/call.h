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
    check(aoti_torch_get_dtype(tensor, &dtype));
    check(aoti_torch_get_device_type(tensor, &device_type));
    check(aoti_torch_get_device_index(tensor, &device_index));
    check(aoti_torch_get_dim(tensor, &shape.ndim));
    check(aoti_torch_get_sizes(tensor, const_cast<int64_t**>(&shape.sizes)));
    check(aoti_torch_get_strides(tensor, const_cast<int64_t**>(&shape.strides)));
  }
  View(const Tensor& tensor) : View(tensor.get()) {}

  bool on_device_of(const View& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  const void* data() const {
    const void* data;
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

// What an op of torch's own gives of a tensor
template <class... Arguments>
Owned call_aten(const char* op, const char* overload, const View& t, Arguments... arguments) {
  AtenTensorHandle tensor;
  check(aoti_torch_new_tensor_handle(t.tensor, &tensor));
  StableIValue stack[] = {abi::from(tensor), abi::from(arguments)...};
  check(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION));
  return Owned(abi::to<AtenTensorHandle>(stack[0]));
}
inline void copy_into(const Owned& to, const View& t) {
  AtenTensorHandle from;
  check(aoti_torch_new_tensor_handle(t.tensor, &from));
  call_aten("aten::copy_", "", View(to.get()), from, false);
}
inline Owned cast(const View& t, int32_t dtype) {
  return call_aten("aten::to", "dtype", t, dtype, false, false, std::nullopt);
}

// torch.frombuffer and a slice of a storage may begin within an element.
inline bool is_aligned(const View& t) {
  return reinterpret_cast<uintptr_t>(t.data()) % aoti_torch_dtype_element_size(t.dtype) == 0;
}
// On a GPU such an access is a fault, after which its context is of no use.
inline void check_alignment(const View& t) {
  if (t.device_type == aoti_torch_device_type_cpu() || is_aligned(t)) return;
  refuse("expected a tensor on a GPU to be aligned to its elements, got ", name_of_dtype(t.dtype),
         " at ", t.data());
}

// In a memory of its own if it does not lie so, or is not aligned
inline Owned contiguous(const View& t) {
  constexpr auto kFormat = torch::headeronly::MemoryFormat::Contiguous;
  return is_aligned(t) ? call_aten("aten::contiguous", "", t, kFormat)
                       : call_aten("aten::clone", "", t, std::optional(kFormat));
}

// Of a key or of what is folded into one: 64 bits an element
inline bool holds_words(const View& t) {
  return t.dtype == aoti_torch_dtype_uint64() || t.dtype == aoti_torch_dtype_int64();
}

// Where they lie, or in a copy that is aligned
inline const uint64_t* words_of(const View& t, Owned& copy) {
  if (!is_aligned(t)) copy = contiguous(t);
  return static_cast<const uint64_t*>((copy ? View(copy.get()) : t).data());
}

// The children of keys, as Children has them, by what the device derives them with.
template <class Run>
Owned derive(const View& keys, const View* data, uint64_t first, int64_t num, const Run& run,
             int64_t ndim = 3) {
  const bool words =
      holds_words(keys) && (!data || (holds_words(*data) && data->on_device_of(keys)));
  Children children(keys.shape, data ? &data->shape : nullptr, first, num, ndim);
  if (!words || !children.fit) children.refuse(name_of_dtype(keys.dtype), keys.shape);
  check_alignment(keys);
  if (data) check_alignment(*data);
  Derivation d = children.derivation;
  Owned out = empty(children.shape, keys.dtype, keys);
  Owned keys_copy, data_copy;
  d.keys = words_of(keys, keys_copy);
  if (data) d.data = words_of(*data, data_copy);
  check(torch_get_mutable_data_ptr(out.get(), reinterpret_cast<void**>(&d.out)));
  if (d.n * d.count > 0) run(d);
  return out;
}

// The tensors of a head beside mu, the scale and the key: in a backward the gradients too
struct HeadTensors {
  std::optional<View> loc, prior, grad_z, grad_totals;
};

// A call that has passed the checks, with its output. Owns what its Problem points to. Without a
// key there is one slice.
class Call {
 public:
  Call(View x, View scale, std::optional<View> key, const Options& options)
      : device_(x), key_(key), options_(options) {
    place(x, scale);
    allocate(kBoth, options_.summed ? 2 : 1);
  }
  // Of a head, whose results are z, or with a gradient of the sums the gradients
  Call(View mu, View scale, std::optional<View> key, const HeadTensors& given,
       const Options& options, bool draws = false)
      : device_(mu), key_(key), options_(options) {
    const bool backward = given.grad_totals.has_value(), divergence = options.head->term == kKlTerm;
    if (given.loc.has_value() != given.prior.has_value() || (given.prior && !divergence) ||
        (!key && !draws && !divergence) || (options.samples && divergence) ||
        (backward && key.has_value() != given.grad_z.has_value())) {
      refuse(
          "expected loc and prior of a kl_divergence, or neither; a key and in a backward grad_z, "
          "but of a kl_divergence perhaps neither; and samples of a log_prob alone");
    }
    place(mu, scale);
    operands_ = {dense(operands_->first, kX), dense(operands_->second, kScale)};
    for (const auto& [table, operand] : {std::pair(kLoc, given.loc), std::pair(kPrior, given.prior),
                                         std::pair(kGrad, given.grad_z)}) {
      if (!operand) continue;
      if (operand->dtype != torch_dtype(dtype_) || !operand->on_device_of(mu)) {
        refuse("expected tensors of one dtype on one device, got ", name_of_dtype(operand->dtype));
      }
      check_alignment(*operand);
      dims_.add_operand(table, operand->shape);
      problem_.operands[table - kLoc + 2] = dense(*operand, table).data();
    }
    const Shape rows = dims_.sums(*options.head);
    const int32_t dtype =
        dtype_ == kDouble ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    if (backward) {
      const View& grad = *given.grad_totals;
      if (grad.dtype != dtype || !grad.on_device_of(mu) || !same_sizes(grad.shape, rows)) {
        refuse("expected the gradient of the sums to be ", name_of_dtype(dtype), " ", rows);
      }
      check_alignment(grad);
      totals_ = contiguous(grad);
      check(torch_get_const_data_ptr(totals_.get(), &problem_.grad_totals));
    } else {
      totals_ = empty(rows, dtype, device_);
      check(torch_get_mutable_data_ptr(totals_.get(), &problem_.totals));
    }
    const bool has[] = {backward ? options.head->term != kLogProbTerm : key || draws, backward,
                        backward && given.prior, backward && given.prior};
    allocate(has, backward ? 4 : 1);
    if (!backward && numel_ == 0) call_aten("aten::zero_", "", View(totals_.get()));
  }
  // Without operands
  Call(View key, const Sizes& size, ScalarType dtype, const Options& options)
      : device_(key), key_(key), options_(options) {
    dtype_ = kernel_dtype(abi::to<int32_t>(abi::from(dtype)));
    dims_.pack(shape_of(size));
    allocate(kBoth, 1);
  }
  Call(const Call&) = delete;

  const View& device() const { return device_; }
  DType dtype() const { return dtype_; }
  int64_t numel() const { return numel_; }  // that a kernel goes over, for each sample
  int64_t draws() const { return numel_ * problem_.samples; }
  const Problem& problem() const { return problem_; }
  const Owned& out(int i = 0) const { return out_[i]; }
  // One that there is not is empty.
  Tensor take_out(int i = 0) {
    const int64_t zero = 0, one = 1;
    if (!out_[i]) out_[i] = empty({1, &zero, &one}, torch_dtype(dtype_), device_);
    return Tensor(out_[i].release());
  }
  const Owned& totals() const { return totals_; }
  Tensor take_totals() { return Tensor(totals_.release()); }
  // In place of a key's tensor: two words that outlive the call
  void use_key(const uint64_t* words) { problem_.keys = words; }

 private:
  void place(View x, View scale) {
    if (!x.on_device_of(scale)) refuse("expected tensors on one device, got two");
    check_alignment(x);
    check_alignment(scale);
    dtype_ =
        promoted(kernel_dtype(x.dtype), x.shape.ndim, kernel_dtype(scale.dtype), scale.shape.ndim);
    const int32_t dtype = torch_dtype(dtype_);
    if (x.dtype != dtype) x = View((x_cast_ = cast(x, dtype)).get());
    if (scale.dtype != dtype) scale = View((scale_cast_ = cast(scale, dtype)).get());
    operands_ = {x, scale};
    options_.on_cpu = x.device_type == aoti_torch_device_type_cpu();
    dims_.place(x.shape, scale.tensor == x.tensor ? nullptr : &scale.shape, &options_);
  }

  // An operand of a head as the kernels of other devices than the CPU take it: dense, of the shape
  // of the result, and from a whole vector on
  View dense(const View& t, int table) {
    constexpr uintptr_t kVectorBytes = 16;
    const Shape whole = dims_.shape();
    const bool fits = same_sizes(t.shape, whole) && is_row_major(t.shape) &&
                      reinterpret_cast<uintptr_t>(t.data()) % kVectorBytes == 0;
    if (options_.on_cpu || fits || dims_.numel() == 0) return t;
    Owned& copy = dense_[table] = empty(whole, torch_dtype(dtype_), device_);
    copy_into(copy, t);
    std::copy_n(dims_.strides[kOut], dims_.ndim, dims_.strides[table]);
    return View(copy.get());
  }

  static constexpr bool kBoth[] = {true, true};

  // Makes the outputs that there are, and the problem where that is not empty.
  void allocate(const bool* has, int results) {
    const bool fits =
        !key_ || (holds_words(*key_) && key_->on_device_of(device_) && dims_.fits(key_->shape));
    if (!fits) dims_.refuse_key(name_of_dtype(key_->dtype), key_->shape);
    if (key_) check_alignment(*key_);
    const Shape result = dims_.result(options_);
    for (int i = 0; i < results; ++i) {
      if (has[i]) out_[i] = empty(result, torch_dtype(dtype_), device_);
    }
    if (key_ && (key_->shape.strides[key_->shape.ndim - 1] != 1 || !is_aligned(*key_))) {
      key_ = View((key_copy_ = contiguous(*key_)).get());
    }
    numel_ = dims_.plan(key_ ? key_->shape : Shape{}, options_, &problem_);
    if (numel_ == 0) return;
    for (int i = 0; i < results; ++i) {
      if (has[i]) check(torch_get_mutable_data_ptr(out_[i].get(), &problem_.results[i]));
    }
    if (key_) problem_.keys = static_cast<const uint64_t*>(key_->data());
    if (!operands_) return;
    const auto& [x, scale] = *operands_;
    problem_.operands[0] = x.data();
    // Of no samples a scale that is not read would be no memory.
    const bool none = problem_.samples == 0 && scale.tensor == x.tensor;
    problem_.operands[1] = none ? problem_.results[1] : scale.data();
  }

  View device_;  // any tensor on it
  std::optional<View> key_;
  std::optional<std::pair<View, View>> operands_;
  Options options_;
  Owned x_cast_, scale_cast_, key_copy_, dense_[kStrides], out_[kMaxResults], totals_;
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
  using Given = const Tensor&;
  using Maybe = const std::optional<Tensor>&;

  static Tensor sample_from_key(Given mu, Given scale, Given key, Text form, Ints whole, Ints from,
                                Numbers bounds, Count samples) {
    const Options options = options_of(form_of(form), bounds, whole, from);
    return Device(mu).run(kSample, Call(mu, scale, key, with_samples(options, samples)));
  }

  static Tensor sample_backward(Given grad_z, Maybe scale, Given key, Text form, Ints whole,
                                Ints from, Numbers bounds) {
    const Form id = backward_form_of(form, bounds.has_value(), scale.has_value());
    const Options options = options_of(id, bounds, whole, from);
    return Device(grad_z).run(kSampleBackward, Call(grad_z, scale.value_or(grad_z), key, options));
  }

  static std::tuple<Tensor, Tensor> samples_backward(Given grad_z, Maybe scale, Given key,
                                                     Text form, Ints whole, Ints from,
                                                     Numbers bounds) {
    const Form id = backward_form_of(form, bounds.has_value(), scale.has_value());
    const Device device(grad_z);
    Call call(grad_z, scale.value_or(grad_z), key, summed(options_of(id, bounds, whole, from)));
    Tensor grad_mu = device.run(kSamplesBackward, std::move(call));
    return {std::move(grad_mu), call.take_out(1)};
  }

  static Tensor noise(Given key, const Sizes& size, ScalarType dtype, Ints whole, Ints from) {
    return Device(key).run(kNoise, Call(key, size, dtype, options_of(kLogVar, {}, whole, from)));
  }

  // The divergence, of mu, or its backward, of what comes in
  template <Op op>
  static Tensor divergence(Given x, Given scale, Text form, Numbers bounds) {
    const Options options = without_noise(options_of(form_of(form), bounds));
    return Device(x).run(op, Call(x, scale, std::nullopt, options));
  }

  static Options head_options(Text term, int64_t summed, Text form, Text prior_form, Ints whole,
                              Ints from, Numbers bounds, Numbers prior_bounds, Count samples) {
    Options options = with_samples(options_of(form_of(form), bounds, whole, from), samples);
    options.head = HeadOptions{term_of(term), summed, form_of(prior_form), bounds_of(prior_bounds)};
    return options;
  }
  static std::optional<View> view(Maybe t) { return t ? std::optional<View>(*t) : std::nullopt; }

  static std::tuple<Tensor, Tensor> head(Given mu, Given scale, Maybe key, Maybe loc, Maybe prior,
                                         Text term, int64_t summed, Text form, Text prior_form,
                                         Ints whole, Ints from, Numbers bounds,
                                         Numbers prior_bounds, Count samples) {
    const Device device(mu);
    Call call(
        mu, scale, view(key), HeadTensors{view(loc), view(prior), {}, {}},
        head_options(term, summed, form, prior_form, whole, from, bounds, prior_bounds, samples));
    Tensor z = device.run(kHead, std::move(call));
    return {std::move(z), call.take_totals()};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> head_backward(
      Given mu, Given scale, Maybe key, Maybe loc, Maybe prior, Maybe grad_z, Given grad_totals,
      Text term, int64_t summed, Text form, Text prior_form, Ints whole, Ints from, Numbers bounds,
      Numbers prior_bounds, Count samples) {
    const Device device(mu);
    Call call(
        mu, scale, view(key), HeadTensors{view(loc), view(prior), view(grad_z), grad_totals},
        head_options(term, summed, form, prior_form, whole, from, bounds, prior_bounds, samples));
    Tensor grad_mu = device.run(kHeadBackward, std::move(call));
    return {std::move(grad_mu), call.take_out(1), call.take_out(2), call.take_out(3)};
  }

  static Tensor derive(Given keys, Maybe data, int64_t first, int64_t num) {
    const View numbers(data.value_or(keys)), *given = data ? &numbers : nullptr;
    const Device device(keys);
    const auto run = [&](const Derivation& d) { device.derive(d); };
    return Tensor(reparam_fused::derive(keys, given, first, num, run).release());
  }

  static void add_to(abi::StableLibrary& m) {
#define REPARAM_FUSED_ADD(name, op) Device::template add<TORCH_BOX(&op)>(m, "reparam_fused::" name)
    REPARAM_FUSED_ADD("sample_from_key", sample_from_key);
    REPARAM_FUSED_ADD("sample_backward", sample_backward);
    REPARAM_FUSED_ADD("samples_backward", samples_backward);
    REPARAM_FUSED_ADD("noise", noise);
    REPARAM_FUSED_ADD("head", head);
    REPARAM_FUSED_ADD("head_backward", head_backward);
    REPARAM_FUSED_ADD("derive", derive);
    REPARAM_FUSED_ADD("kl_divergence", divergence<kKlDivergence>);
    REPARAM_FUSED_ADD("kl_divergence_backward", divergence<kKlDivergenceBackward>);
  }
};

}  // namespace reparam_fused
