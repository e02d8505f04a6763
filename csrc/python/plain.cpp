#include "../call.h"
#include "python.h"

// Plain eager calls on the CPU without the dispatcher, which at the size of a VAE's latent costs
// as much as the kernel. Whatever is special about one, errors included, is left to the ops,
// before anything is drawn.

namespace reparam_fused {
namespace {

const auto from_pyobject = reinterpret_cast<AOTITorchError (*)(void*, AtenTensorHandle*)>(
    find_symbol("torch_tensor_from_pyobject"));
const auto to_pyobject = reinterpret_cast<AOTITorchError (*)(AtenTensorHandle, void*, void**)>(
    find_symbol("torch_tensor_to_pyobject"));

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
    if (view->device_type != aoti_torch_device_type_cpu() || !view->data()) view.reset();
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
  const bool recorded = aoti_torch_grad_mode_is_enabled() &&
                        (requires_grad(given.x) || (has_scale && requires_grad(given.scale)));
  const bool summed = given.op == kSamplesBackward;
  if (summed && recorded) return left_to_the_op();
  const bool noise = has_key || given.generator != nullptr;
  Call call(*x.view, has_scale ? *scale.view : *x.view, key.view,
            {static_cast<Form>(given.form), given.bounds, {}, {}, noise, given.samples, summed});
  uint64_t words[] = {0, 0};
  if (given.generator != nullptr) {
    // An empty call leaves the generator alone.
    if (call.draws() == 0) return left_to_the_op();
    if (given.generator == Py_None) {
      words[0] = library->draw_word();
    } else {
      fill_random(to_python(Owned(library->word_tensor(words))).get(), given.generator);
    }
    call.use_key(words);
  }
  {
    const WithoutGil without_gil(call.draws() > kGrain);
    check(library->run_kernel(given.op, call.dtype(), call.problem(), call.numel(),
                              torch_parallel_for));
  }
  Object z = to_python(call.out());
  if (summed) return PyTuple_Pack(2, z.get(), to_python(call.out(1)).get());
  if (!recorded) return z.release();
  if (given.generator == nullptr) return PyTuple_Pack(2, z.get(), given.key);
  const Owned drawn(library->key_tensor(words, x.tensor.get()));
  return PyTuple_Pack(2, z.get(), to_python(drawn).get());
}

PyObject* run_split(PyObject* object, uint64_t first, int64_t num) {
  const PlainTensor key(object);
  if (!key.view || key.view->shape.ndim != 1) return left_to_the_op();
  const auto& run = library->derive;
  return to_python(derive(*key.view, nullptr, first, std::abs(num), run, num < 0 ? 1 : 2))
      .release();
}

bool can_run() { return from_pyobject != nullptr && to_pyobject != nullptr; }

}  // namespace reparam_fused
