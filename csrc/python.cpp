#include <Python.h>

#include "cpu/launch.h"

// The module reparam_fused._C: plain eager calls of CPU tensors, without the dispatcher,
// which at the size of a VAE's latent costs as much as the kernel. Whatever is special
// about a call, errors included, it leaves to the ops, before it has done anything.

namespace reparam_fused {
namespace {

// A reference that is given up with its scope
struct Drop {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Object = std::unique_ptr<PyObject, Drop>;

// What a call asks of Python and of torch, looked up once. Where torch does not have all
// of it, as 2.13 has not the conversions, no call is plain.
struct {
  AOTITorchError (*from_pyobject)(void*, AtenTensorHandle*);
  AOTITorchError (*to_pyobject)(AtenTensorHandle, void*, void**);
  PyObject *tensor, *parameter, *generator, *is_neg, *random;
  PyObject *are_transforms_active, *count_dispatch_modes, *is_function_mode_enabled, *tracing_state;
  PyObject *forward_ad, *current_level, *requires_grad, *zero;
  bool complete;
} torch_;

bool says(PyObject* function, PyObject* argument, PyObject* expected) {
  const Object answer(PyObject_CallFunctionObjArgs(function, argument, nullptr));
  return answer.get() == expected;
}

// Nothing listens to the calls of this thread, or transforms them.
bool is_plain_thread() {
  if (!says(torch_.are_transforms_active, nullptr, Py_False)) return false;
  if (!says(torch_.count_dispatch_modes, nullptr, torch_.zero)) return false;
  if (!says(torch_.is_function_mode_enabled, nullptr, Py_False)) return false;
  if (!says(torch_.tracing_state, nullptr, Py_None)) return false;
  PyObject* level = PyDict_GetItemWithError(torch_.forward_ad, torch_.current_level);
  if (level == nullptr || PyLong_AsLong(level) >= 0) return false;
  return true;
}

// A dense CPU tensor of torch's own classes, whose memory holds its values
class PlainTensor {
 public:
  explicit PlainTensor(PyObject* object) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    AtenTensorHandle tensor;
    if (type != torch_.tensor && type != torch_.parameter) return;
    if (torch_.from_pyobject(object, &tensor) != AOTI_TORCH_SUCCESS) return;
    tensor_.reset(tensor);
    int32_t layout, device;
    check(aoti_torch_get_device_type(tensor, &device));
    if (device != aoti_torch_device_type_cpu()) return;
    check(aoti_torch_get_layout(tensor, &layout));
    if (layout != aoti_torch_layout_strided()) return;
    if (!says(torch_.is_neg, object, Py_False)) return;
    view_.emplace(tensor);
    int64_t numel;
    check(aoti_torch_get_numel(tensor, &numel));
    if (numel > 0 && view_->data() == nullptr) view_.reset();
  }
  explicit operator bool() const { return view_.has_value(); }
  const View& view() const { return *view_; }

 private:
  Owned tensor_;
  std::optional<View> view_;
};

bool requires_grad(PyObject* tensor) {
  const Object answer(PyObject_GetAttr(tensor, torch_.requires_grad));
  return answer.get() != Py_False;
}

PyObject* none() {
  PyErr_Clear();
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* not_implemented() {
  Py_INCREF(Py_NotImplemented);
  return Py_NotImplemented;
}

Object to_python(AtenTensorHandle tensor) {
  void* object = nullptr;
  check(torch_.to_pyobject(tensor, nullptr, &object));
  return Object(static_cast<PyObject*>(object));
}

bool is_cpu_generator(PyObject* object) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != torch_.generator) return false;
  const Object device(PyObject_GetAttrString(object, "device"));
  const Object type(device ? PyObject_GetAttrString(device.get(), "type") : nullptr);
  return type && PyUnicode_CompareWithASCIIString(type.get(), "cpu") == 0;
}

// As draw_word, by the method of Python's: no function of the ABI takes its generators.
bool draw_word_of(PyObject* generator, uint64_t* word) {
  const Object tensor = to_python(word_tensor(word).get());
  const Object arguments(Py_BuildValue("(OLO)", tensor.get(), INT64_MIN, Py_None));
  const Object options(Py_BuildValue("{sO}", "generator", generator));
  return arguments && options &&
         Object(PyObject_Call(torch_.random, arguments.get(), options.get())) != nullptr;
}

void launch_without_gil(Op op, const Call& call) {
  if (call.numel() <= kGrain) return launch(op, call);
  struct NoGil {
    PyThreadState* state = PyEval_SaveThread();
    ~NoGil() { PyEval_RestoreThread(state); }
  } no_gil;
  launch(op, call);
}

// Where a key is to be drawn: from a generator or None, and whether it is wanted
struct Draw {
  PyObject* generator;
  bool with_key;
};

PyObject* run(long op, long form, PyObject* x, PyObject* scale, PyObject* key, const Draw* draw) {
  const bool noise = op == kSample || op == kSampleBackward;
  const bool has_scale = op != kSampleBackward || form != kStd;
  if (!torch_.complete || op == kNoise || op < 0 || op > kKlDivergenceBackward) return none();
  if (form != kLogVar && form != kStd) return none();
  if (has_scale == (scale == Py_None) || (noise && !draw) == (key == Py_None)) return none();
  if (draw != nullptr && draw->generator != Py_None && !is_cpu_generator(draw->generator)) {
    return none();
  }
  try {
    if (!is_plain_thread()) return none();
    const PlainTensor a(x);
    if (!a) return none();
    std::optional<PlainTensor> b, k;
    if (has_scale && (!b.emplace(scale) || b->view().dtype != a.view().dtype)) return none();
    if (key != Py_None && !k.emplace(key)) return none();
    const Options options{static_cast<Form>(form), {}, {}, noise};
    Call call(a.view(), b ? b->view() : a.view(), k ? std::optional(k->view()) : std::nullopt,
              options);
    if (aoti_torch_grad_mode_is_enabled() &&
        (requires_grad(x) || (has_scale && requires_grad(scale)))) {
      return not_implemented();
    }
    call.allocate();
    uint64_t words[] = {0, 0};
    if (draw != nullptr) {
      if (call.numel() == 0) {
      } else if (draw->generator == Py_None) {
        words[0] = draw_word(std::nullopt);
      } else if (!draw_word_of(draw->generator, words)) {
        return none();
      }
      call.use_key(words);
    }
    launch_without_gil(static_cast<Op>(op), call);
    Object z = to_python(call.out());
    if (draw == nullptr || !draw->with_key) return z.release();
    const Object drawn = to_python(key_tensor(words, a.view()).get());
    return PyTuple_Pack(2, z.get(), drawn.get());
  } catch (const std::exception&) {
    return none();
  }
}

PyObject* launch_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "expected op, form, x, scale, key");
  return run(PyLong_AsLong(arguments[0]), PyLong_AsLong(arguments[1]), arguments[2], arguments[3],
             arguments[4], nullptr);
}

PyObject* draw_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) {
    return PyErr_Format(PyExc_TypeError, "expected form, mu, scale, generator, with_key");
  }
  const Draw draw{arguments[3], arguments[4] == Py_True};
  return run(kSample, PyLong_AsLong(arguments[0]), arguments[1], arguments[2], Py_None, &draw);
}

PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(cpu_kernels().isa);
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
}

// The ids that launch and draw take, by name
PyObject* kernels(PyObject*, PyObject*) {
  return Py_BuildValue("{s{sisisisi}s{sisi}}", "ops", "sample_from_key", kSample, "sample_backward",
                       kSampleBackward, "kl_divergence", kKlDivergence, "kl_divergence_backward",
                       kKlDivergenceBackward, "forms", "log_var", kLogVar, "std", kStd);
}

// An attribute of a module of torch's, or of a class of one
PyObject* find(const char* module, const char* name, const char* of_class = nullptr) {
  Object found(PyImport_ImportModule(module));
  if (found && of_class != nullptr) found.reset(PyObject_GetAttrString(found.get(), of_class));
  return found ? PyObject_GetAttrString(found.get(), name) : nullptr;
}

void find_torch() {
  reinterpret_cast<void*&>(torch_.from_pyobject) =
      abi::lookup_stable_symbol("torch_tensor_from_pyobject");
  reinterpret_cast<void*&>(torch_.to_pyobject) =
      abi::lookup_stable_symbol("torch_tensor_to_pyobject");
  torch_.complete =
      torch_.from_pyobject && torch_.to_pyobject && (torch_.tensor = find("torch", "Tensor")) &&
      (torch_.parameter = find("torch.nn", "Parameter")) &&
      (torch_.generator = find("torch", "Generator")) &&
      (torch_.is_neg = find("torch", "is_neg", "Tensor")) &&
      (torch_.random = find("torch", "random_", "Tensor")) &&
      (torch_.are_transforms_active = find("torch._C", "_are_functorch_transforms_active")) &&
      (torch_.count_dispatch_modes = find("torch._C", "_len_torch_dispatch_stack")) &&
      (torch_.is_function_mode_enabled = find("torch._C", "_is_torch_function_mode_enabled")) &&
      (torch_.tracing_state = find("torch._C", "_get_tracing_state")) &&
      (torch_.forward_ad = find("torch.autograd.forward_ad", "__dict__")) &&
      (torch_.current_level = PyUnicode_InternFromString("_current_level")) &&
      (torch_.requires_grad = PyUnicode_InternFromString("requires_grad")) &&
      (torch_.zero = PyLong_FromLong(0));
  PyErr_Clear();
}

template <class Function>
PyCFunction method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {{"launch", method(launch_call), METH_FASTCALL, nullptr},
                         {"draw", method(draw_call), METH_FASTCALL, nullptr},
                         {"isa", isa, METH_NOARGS, nullptr},
                         {"kernels", kernels, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace reparam_fused

PyMODINIT_FUNC PyInit__C() {
  reparam_fused::find_torch();
  return PyModule_Create(&reparam_fused::definition);
}
