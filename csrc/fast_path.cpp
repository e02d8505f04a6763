#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "common/problem.h"
#include "cpu/dispatch.h"

// The plain eager call, without the cost of a Python autograd.Function: at the
// size of a VAE's latent that costs more than the kernels. It takes a call only
// where nothing about it is special and leaves the rest, errors included, to
// functional.py and kl_divergence.py. Python has the same formulas there and in
// autograd.py; the tests run over both.

namespace reparam_fused {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using at::OptionalSymIntArrayRef;

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor sample_from_key(const Tensor& mu, const Tensor& scale, const Tensor& key,
                       c10::string_view form) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, c10::string_view,
                     OptionalSymIntArrayRef, OptionalSymIntArrayRef)>(
          "reparam_fused::sample_from_key");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(mu, scale, key, form, {}, {});
}

const char* name_of(Form form) { return form == kStd ? "std" : "log_var"; }

// z and the key that was drawn for it
std::tuple<Tensor, Tensor> sample(const Tensor& mu, const Tensor& scale,
                                  const std::optional<at::Generator>& generator,
                                  c10::string_view form) {
  static const auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, std::optional<at::Generator>,
                                         c10::string_view)>("reparam_fused::sample");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(mu, scale, generator, form);
}

// Without a scale the form is std: its derivative depends on no more than the noise.
Tensor sample_backward(const Tensor& grad_z, const std::optional<Tensor>& log_var,
                       const Tensor& key) {
  static const auto op =
      find_op<Tensor(const Tensor&, const std::optional<Tensor>&, const Tensor&, c10::string_view,
                     OptionalSymIntArrayRef, OptionalSymIntArrayRef)>(
          "reparam_fused::sample_backward");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(grad_z, log_var, key, name_of(log_var.has_value() ? kLogVar : kStd), {}, {});
}

// grad_log_var = grad_z eps sigma / 2, which depends on log_var by a factor
// exp(log_var / 2): its own derivative is the same function, halved.
struct LogVarBackward : Function<LogVarBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_z, const Tensor& log_var,
                        const Tensor& key) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({grad_z, log_var, key});
    return sample_backward(grad_z, log_var, key);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_z = saved[0], &log_var = saved[1], &key = saved[2], &grad = grads[0];
    Tensor grad_grad_z, grad_log_var;
    if (!grad.defined()) return {grad_grad_z, grad_log_var, Tensor()};
    if (ctx->needs_input_grad(0)) grad_grad_z = apply(grad, log_var, key);
    if (ctx->needs_input_grad(1))
      grad_log_var = apply(at::mul(grad, grad_z), log_var, key).mul(0.5);
    return {grad_grad_z, grad_log_var, Tensor()};
  }
};

// grad_std = grad_z eps
struct StdBackward : Function<StdBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_z, const Tensor& key) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({key});
    return sample_backward(grad_z, std::nullopt, key);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad = grads[0];
    return {grad.defined() ? apply(grad, ctx->get_saved_variables()[0]) : Tensor(), Tensor()};
  }
};

// z = mu + sigma eps: grad_mu is grad_z itself. Without a key, one is drawn.
struct FusedSample : Function<FusedSample> {
  // The key is optional, not an undefined Tensor: of every Tensor argument torch asks the
  // device, which an undefined one does not have.
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& scale,
                        const std::optional<Tensor>& given,
                        const std::optional<at::Generator>& generator, Form form) {
    Tensor z, key;
    if (given.has_value()) {
      key = *given;
      z = sample_from_key(mu, scale, key, name_of(form));
    } else {
      std::tie(z, key) = sample(mu, scale, generator, name_of(form));
    }
    ctx->set_materialize_grads(false);
    if (scale.requires_grad()) {
      ctx->save_for_backward(form == kStd ? variable_list{key} : variable_list{key, scale});
    }
    return z;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_z = grads[0];
    Tensor grad_scale;
    if (grad_z.defined() && ctx->needs_input_grad(1)) {
      const auto saved = ctx->get_saved_variables();
      const Tensor& key = saved[0];
      const bool is_std = saved.size() == 1;
      if (!at::GradMode::is_enabled()) {
        grad_scale = sample_backward(grad_z, is_std ? std::nullopt : std::optional(saved[1]), key);
      } else if (is_std) {
        grad_scale = StdBackward::apply(grad_z, key);
      } else {
        grad_scale = LogVarBackward::apply(grad_z, saved[1], key);
      }
    }
    return {grad_z, grad_scale, Tensor(), Tensor(), Tensor()};
  }
};

Tensor kl_divergence(const Tensor& mu, const Tensor& log_var) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&)>("reparam_fused::kl_divergence");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(mu, log_var);
}

Tensor kl_divergence_backward(const Tensor& grad, const Tensor& log_var) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&)>("reparam_fused::kl_divergence_backward");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(grad, log_var);
}

// grad_log_var = grad (exp(log_var) - 1) / 2, whose own derivative by log_var is itself
// and half of grad more.
struct KlDivergenceBackward : Function<KlDivergenceBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& log_var) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({grad, log_var});
    return kl_divergence_backward(grad, log_var);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad = saved[0], &log_var = saved[1], &grad_out = grads[0];
    Tensor grad_grad, grad_log_var;
    if (!grad_out.defined()) return {grad_grad, grad_log_var};
    if (ctx->needs_input_grad(0)) grad_grad = apply(grad_out, log_var);
    if (ctx->needs_input_grad(1)) {
      const Tensor product = at::mul(grad_out, grad);
      grad_log_var = apply(product, log_var).add(product, 0.5);
    }
    return {grad_grad, grad_log_var};
  }
};

struct FusedKlDivergence : Function<FusedKlDivergence> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& log_var) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {mu.requires_grad() ? mu : Tensor(), log_var.requires_grad() ? log_var : Tensor()});
    return kl_divergence(mu, log_var);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &mu = saved[0], &log_var = saved[1], &grad = grads[0];
    Tensor grad_mu, grad_log_var;
    if (!grad.defined()) return {grad_mu, grad_log_var};
    if (ctx->needs_input_grad(0)) grad_mu = at::mul(grad, mu);
    if (ctx->needs_input_grad(1)) {
      grad_log_var = at::GradMode::is_enabled() ? KlDivergenceBackward::apply(grad, log_var)
                                                : kl_divergence_backward(grad, log_var);
    }
    return {grad_mu, grad_log_var};
  }
};

// Nothing listens to or transforms the calls of this thread: no functorch
// level, dispatch mode, tracer or torch function mode.
bool plain_thread() {
  static const c10::DispatchKeySet usual =
      c10::default_included_set | c10::autocast_dispatch_keyset;
  return (c10::impl::tls_local_dispatch_key_set().included_ - usual).empty() &&
         !at::impl::torch_function_mode_enabled();
}

bool has_kernels(at::Device device) {
  static const bool cuda = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("reparam_fused::sample", "")
                               .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return device.is_cpu() || (device.is_cuda() && cuda);
}

// A dense tensor of torch's own class, without a forward-mode tangent.
bool plain_tensor(py::handle object) {
  if (!THPVariable_CheckExact(object.ptr())) return false;
  const Tensor& t = THPVariable_Unpack(object.ptr());
  return has_kernels(t.device()) && t.layout() == at::kStrided && !t.is_nested() &&
         !at::isTensorSubclassLike(t) && !t.is_neg() && !t._fw_grad(/*level=*/0).defined();
}

// Where autocast computes exp in float32, which functional.py sees to.
bool autocasts(const Tensor& mu, Form form) {
  return form == kLogVar && !mu.is_cpu() && at::autocast::is_autocast_enabled(mu.device().type());
}

bool plain_inputs(const Tensor& mu, const Tensor& scale) {
  const auto dtype = mu.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
          dtype == at::kDouble) &&
         scale.scalar_type() == dtype && mu.sizes() == scale.sizes() &&
         scale.device() == mu.device();
}

// The key that _draw.draw_key would draw: 64 bits of the CPU generator.
Tensor draw_key(at::CPUGeneratorImpl* generator) {
  Tensor key = at::empty({2}, at::kUInt64);
  auto* data = key.mutable_data_ptr<uint64_t>();
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  data[0] = generator->random64();
  data[1] = 0;
  return key;
}

// z, or None where the call is not a plain one.
py::object reparameterize(py::handle mu_object, py::handle log_var_object, py::handle std_object,
                          py::handle key_object, py::handle generator_object) {
  const Form form = log_var_object.is_none() ? kStd : kLogVar;
  const py::handle scale_object = form == kStd ? std_object : log_var_object;
  if (form == kLogVar && !std_object.is_none()) return py::none();
  if (!plain_thread() || !plain_tensor(mu_object) || !plain_tensor(scale_object)) {
    return py::none();
  }
  const Tensor& mu = THPVariable_Unpack(mu_object.ptr());
  const Tensor& scale = THPVariable_Unpack(scale_object.ptr());
  if (!plain_inputs(mu, scale) || autocasts(mu, form)) return py::none();

  std::optional<Tensor> key;
  if (!key_object.is_none()) {
    if (!generator_object.is_none() || !plain_tensor(key_object)) return py::none();
    key = THPVariable_Unpack(key_object.ptr());
    if (key->scalar_type() != at::kUInt64 || key->sizes() != at::IntArrayRef{2} ||
        key->device() != mu.device()) {
      return py::none();
    }
  }
  std::optional<at::Generator> generator;
  if (!generator_object.is_none()) {
    if (!THPGenerator_Check(generator_object.ptr())) return py::none();
    generator = py::cast<at::Generator>(generator_object);
    if (generator->device().type() != mu.device().type()) return py::none();
  }

  Tensor z;
  {
    const py::gil_scoped_release no_gil;
    // A GPU draws it in the kernel.
    if (!key.has_value() && mu.is_cpu()) {
      key = draw_key(at::get_generator_or_default<at::CPUGeneratorImpl>(
          generator, at::detail::getDefaultCPUGenerator()));
    }
    if (at::GradMode::is_enabled() && (mu.requires_grad() || scale.requires_grad())) {
      z = FusedSample::apply(mu, scale, key, generator, form);
    } else {
      z = key.has_value() ? sample_from_key(mu, scale, *key, name_of(form))
                          : std::get<0>(sample(mu, scale, generator, name_of(form)));
    }
  }
  return py::cast(z);
}

// The divergence, or None where the call is not a plain one.
py::object plain_kl_divergence(py::handle mu_object, py::handle log_var_object) {
  if (!plain_thread() || !plain_tensor(mu_object) || !plain_tensor(log_var_object)) {
    return py::none();
  }
  const Tensor& mu = THPVariable_Unpack(mu_object.ptr());
  const Tensor& log_var = THPVariable_Unpack(log_var_object.ptr());
  if (!plain_inputs(mu, log_var) || autocasts(mu, kLogVar)) return py::none();
  Tensor kl;
  {
    const py::gil_scoped_release no_gil;
    kl = at::GradMode::is_enabled() && (mu.requires_grad() || log_var.requires_grad())
             ? FusedKlDivergence::apply(mu, log_var)
             : kl_divergence(mu, log_var);
  }
  return py::cast(kl);
}

}  // namespace
}  // namespace reparam_fused

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("reparameterize", &reparam_fused::reparameterize);
  m.def("kl_divergence", &reparam_fused::plain_kl_divergence);
  m.def("isa", [] { return reparam_fused::cpu_kernels().isa; });
}
