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
  if (!tensor) return Object(left_to_the_op());
  void* object = nullptr;
  check(to_pyobject(tensor.get(), nullptr, &object));
  return Object(static_cast<PyObject*>(object));
}

// A key of this generator; None is torch's own.
void draw(PyObject* generator, uint64_t* words) {
  if (generator == Py_None) {
    words[0] = library->draw_word();
  } else {
    fill_random(to_python(Owned(library->word_tensor(words))).get(), generator);
  }
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
    draw(given.generator, words);
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

PyObject* run_head(PlainHead given) {
  // In the order of the backward's arguments; the first two are there.
  PyObject* const objects[] = {given.mu,    given.scale,  given.key,        given.loc,
                               given.prior, given.grad_z, given.grad_totals};
  std::optional<PlainTensor> tensors[7];
  bool recorded = false;
  for (int i = 0; i < 7; ++i) {
    if (objects[i] == nullptr || (i > 1 && objects[i] == Py_None)) continue;
    if (!tensors[i].emplace(objects[i]).view) return left_to_the_op();
    recorded = recorded || requires_grad(objects[i]);
  }
  recorded = recorded && aoti_torch_grad_mode_is_enabled();
  const auto view = [&](int i) { return tensors[i] ? tensors[i]->view : std::nullopt; };
  const bool backward = given.grad_totals != nullptr, draws = given.generator != nullptr;
  if (backward && recorded) return left_to_the_op();
  Call call(*view(0), *view(1), view(2), HeadTensors{view(3), view(4), view(5), view(6)},
            given.options, draws);
  uint64_t words[] = {0, 0};
  if (draws) {
    // An empty call leaves the generator alone.
    if (call.draws() == 0) return left_to_the_op();
    draw(given.generator, words);
    call.use_key(words);
  }
  {
    const WithoutGil without_gil(call.draws() > kGrain);
    check(library->run_kernel(backward ? kHeadBackward : kHead, call.dtype(), call.problem(),
                              call.numel(), torch_parallel_for));
  }
  const auto result = [&](int i) { return to_python(call.out(i)); };
  if (backward) {
    return PyTuple_Pack(4, result(0).get(), result(1).get(), result(2).get(), result(3).get());
  }
  const Object z = result(0), totals = to_python(call.totals());
  if (!recorded) return PyTuple_Pack(2, z.get(), totals.get());
  if (!draws) return PyTuple_Pack(3, z.get(), totals.get(), given.key);
  const Owned drawn(library->key_tensor(words, tensors[0]->tensor.get()));
  return PyTuple_Pack(3, z.get(), totals.get(), to_python(drawn).get());
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
