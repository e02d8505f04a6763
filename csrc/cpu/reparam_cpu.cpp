#include "../call.h"
#include "../python.h"
#include "dispatch.h"
#include "keys.h"

// The CPU side: the ops, and plain eager calls without the dispatcher, which at the size
// of a VAE's latent costs as much as the kernel.

namespace reparam_fused {
namespace {

void launch(Op op, const Call& call) {
  check(run_kernel(op, call.dtype(), call.problem(), call.numel(), torch_parallel_for));
}

struct Cpu {
  Cpu() = default;
  explicit Cpu(const Tensor&) {}
  Tensor run(Op op, Call&& call) const {
    call.allocate();
    launch(op, call);
    return call.take_out();
  }
  void derive(const Derivation& d) const { derive_cpu(d); }
};

// A word as a tensor of one element, which it outlives
Owned word_tensor(uint64_t* word) {
  const int64_t one = 1;
  AtenTensorHandle tensor;
  check(torch_from_blob(word, 1, &one, &one, 0, aoti_torch_dtype_int64(),
                        aoti_torch_device_type_cpu(), -1, &tensor, aoti_torch_layout_strided(),
                        nullptr, 0, nullptr, nullptr));
  return Owned(tensor);
}

// 64 bits of a CPU generator, torch's own where none is given: one step of random64()
uint64_t draw_word(const std::optional<torch::stable::Generator>& generator) {
  uint64_t word = 0;
  StableIValue stack[] = {abi::from(word_tensor(&word).release()), abi::from(INT64_MIN),
                          abi::from(std::nullopt), abi::from(generator)};
  check(torch_call_dispatcher("aten::random_", "from", stack, TORCH_ABI_VERSION));
  const Owned drawn(abi::to<AtenTensorHandle>(stack[0]));
  return word;
}

Owned key_tensor(const uint64_t* words, const View& device) {
  Owned key = empty_key(device);
  void* data;
  check(torch_get_mutable_data_ptr(key.get(), &data));
  std::copy_n(words, 2, static_cast<uint64_t*>(data));
  return key;
}

// An empty call leaves the generator alone, as torch.randn(0) does.
std::tuple<Tensor, Tensor> sample(const Tensor& mu, const Tensor& scale,
                                  const std::optional<torch::stable::Generator>& generator,
                                  const std::string& form) {
  Call call(mu, scale, std::nullopt, {form_of(form)});
  call.allocate();
  const uint64_t key[] = {call.numel() == 0 ? 0 : draw_word(generator), 0};
  call.use_key(key);
  launch(kSample, call);
  return {call.take_out(), Tensor(key_tensor(key, mu).release())};
}

// Which tensor of its own a draw in a graph is given makes no difference to it.
std::tuple<Tensor, Tensor> sample_fresh(const Tensor& mu, const Tensor& scale, const Tensor&,
                                        const std::string& form) {
  return sample(mu, scale, std::nullopt, form);
}

// Plain calls. Whatever is special about one, errors included, is left to the ops, before
// anything is drawn.

const auto from_pyobject = reinterpret_cast<AOTITorchError (*)(void*, AtenTensorHandle*)>(
    abi::lookup_stable_symbol("torch_tensor_from_pyobject"));
const auto to_pyobject = reinterpret_cast<AOTITorchError (*)(AtenTensorHandle, void*, void**)>(
    abi::lookup_stable_symbol("torch_tensor_to_pyobject"));

// The view of a CPU tensor that has its values in memory; of any other, none.
struct PlainTensor {
  Owned tensor;
  std::optional<View> view;

  explicit PlainTensor(PyObject* object) {
    AtenTensorHandle handle;
    if (!is_plain_tensor(object)) return;
    check(from_pyobject(object, &handle));
    tensor.reset(handle);
    view.emplace(handle);
    const bool on_cpu = view->device_type == aoti_torch_device_type_cpu();
    if (!on_cpu || view->data() == nullptr) view.reset();
  }
};

Object to_python(const Owned& tensor) {
  void* object = nullptr;
  check(to_pyobject(tensor.get(), nullptr, &object));
  return Object(static_cast<PyObject*>(object));
}

}  // namespace

PyObject* run(const PlainCall& given) {
  const bool has_scale = given.scale != Py_None, has_key = given.key != Py_None;
  const PlainTensor x(given.x);
  if (!x.view) return left_to_the_op();
  const PlainTensor scale(given.scale), key(given.key);
  if ((has_scale && !scale.view) || (has_key && !key.view)) return left_to_the_op();
  const bool noise = given.op == kSample || given.op == kSampleBackward;
  Call call(*x.view, has_scale ? *scale.view : *x.view, key.view,
            {static_cast<Form>(given.form), {}, {}, noise});
  call.allocate();
  uint64_t words[] = {0, 0};
  if (given.generator != nullptr) {
    if (given.generator == Py_None) {
      words[0] = draw_word(std::nullopt);
    } else {
      fill_random(to_python(word_tensor(words)).get(), given.generator);
    }
    call.use_key(words);
  }
  {
    const WithoutGil without_gil(call.numel() > kGrain);
    launch(given.op, call);
  }
  Object z = to_python(call.out());
  const bool recorded = aoti_torch_grad_mode_is_enabled() &&
                        (requires_grad(given.x) || (has_scale && requires_grad(given.scale)));
  if (!recorded) return z.release();
  if (given.generator == nullptr) return PyTuple_Pack(2, z.get(), given.key);
  return PyTuple_Pack(2, z.get(), to_python(key_tensor(words, *x.view)).get());
}

PyObject* run_split(PyObject* object, uint64_t first, int64_t num) {
  const PlainTensor key(object);
  if (!key.view || key.view->shape.ndim != 1) return left_to_the_op();
  const int64_t ndim = num < 0 ? 1 : 2;
  return to_python(derive(*key.view, nullptr, first, std::abs(num), Cpu(), ndim)).release();
}

bool can_run() { return from_pyobject != nullptr && to_pyobject != nullptr; }

STABLE_TORCH_LIBRARY_IMPL(reparam_fused, CPU, m) {
  Ops<Cpu>::add_to(m);
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sample_fresh", TORCH_BOX(&sample_fresh));
}

}  // namespace reparam_fused
