#include "cpu/launch.h"
#include "python.h"

// Plain eager calls of CPU tensors, without the dispatcher, which at the size of a VAE's
// latent costs as much as the kernel. Whatever is special about a call, errors included,
// is left to the ops, before anything is drawn or allocated.

namespace reparam_fused {
namespace {

const auto from_pyobject = reinterpret_cast<AOTITorchError (*)(void*, AtenTensorHandle*)>(
    abi::lookup_stable_symbol("torch_tensor_from_pyobject"));
const auto to_pyobject = reinterpret_cast<AOTITorchError (*)(AtenTensorHandle, void*, void**)>(
    abi::lookup_stable_symbol("torch_tensor_to_pyobject"));

// A dense CPU tensor that has its values in memory
class PlainTensor {
 public:
  explicit PlainTensor(PyObject* object) {
    AtenTensorHandle tensor;
    int32_t device, layout;
    int64_t numel;
    if (!is_plain_tensor(object)) return;
    check(from_pyobject(object, &tensor));
    tensor_.reset(tensor);
    check(aoti_torch_get_device_type(tensor, &device));
    if (device != aoti_torch_device_type_cpu()) return;
    check(aoti_torch_get_layout(tensor, &layout));
    if (layout != aoti_torch_layout_strided()) return;
    check(aoti_torch_get_numel(tensor, &numel));
    view_.emplace(tensor);
    if (numel > 0 && view_->data() == nullptr) view_.reset();
  }
  const std::optional<View>& view() const { return view_; }

 private:
  Owned tensor_;
  std::optional<View> view_;
};

Object to_python(const Owned& tensor) {
  void* object = nullptr;
  check(to_pyobject(tensor.get(), nullptr, &object));
  return Object(static_cast<PyObject*>(object));
}

void launch_without_gil(Op op, const Call& call) {
  if (call.numel() <= kGrain) return launch(op, call);
  struct NoGil {
    PyThreadState* state = PyEval_SaveThread();
    ~NoGil() { PyEval_RestoreThread(state); }
  } no_gil;
  launch(op, call);
}

PyObject* run_plain(const PlainCall& given) {
  const bool has_scale = given.scale != Py_None;
  const PlainTensor x(given.x);
  std::optional<PlainTensor> scale, key;
  if (!x.view()) return left_to_the_op();
  if (has_scale) {
    const auto& view = scale.emplace(given.scale).view();
    if (!view) return left_to_the_op();
  }
  if (given.key != Py_None) {
    const auto& view = key.emplace(given.key).view();
    if (!view || view->shape.ndim == 0) return left_to_the_op();
    if (view->shape.strides[view->shape.ndim - 1] != 1) return left_to_the_op();
  }
  const bool noise = given.op == kSample || given.op == kSampleBackward;
  Call call(*x.view(), scale ? *scale->view() : *x.view(), key ? key->view() : std::nullopt,
            {static_cast<Form>(given.form), {}, {}, noise});
  call.allocate();
  uint64_t words[] = {0, 0};
  if (given.generator != nullptr) {
    if (call.numel() > 0 && given.generator == Py_None) {
      words[0] = draw_word(std::nullopt);
    } else if (call.numel() > 0 &&
               !fill_random(to_python(word_tensor(words)).get(), given.generator)) {
      return left_to_the_op();
    }
    call.use_key(words);
  }
  launch_without_gil(given.op, call);
  Object z = to_python(call.out());
  const bool recorded = aoti_torch_grad_mode_is_enabled() &&
                        (requires_grad(given.x) || (has_scale && requires_grad(given.scale)));
  if (!recorded) return z.release();
  if (given.generator == nullptr) return PyTuple_Pack(2, z.get(), given.key);
  return PyTuple_Pack(2, z.get(), to_python(key_tensor(words, *x.view())).get());
}

}  // namespace

bool can_run() { return from_pyobject != nullptr && to_pyobject != nullptr; }

PyObject* run(const PlainCall& call) {
  try {
    return run_plain(call);
  } catch (const std::exception&) {
    return left_to_the_op();
  }
}

}  // namespace reparam_fused
