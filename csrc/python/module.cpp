#include "python.h"

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

#include <stdexcept>

// The module reparam_fused._C, and what plain calls ask of Python.

namespace reparam_fused {
namespace {

// Looked up once. Where torch does not have all of it, no call is plain.
struct {
  PyObject *tensor, *parameter, *is_neg, *random;
  PyObject *are_transforms_active, *count_dispatch_modes, *is_function_mode_enabled, *tracing_state;
  PyObject *forward_ad, *current_level, *requires_grad, *zero;
  bool complete;
} torch_;

// An attribute of a module, or of a class in it
PyObject* find(const char* module, const char* name, const char* of_class = nullptr) {
  Object found(PyImport_ImportModule(module));
  if (found && of_class != nullptr) found.reset(PyObject_GetAttrString(found.get(), of_class));
  return found ? PyObject_GetAttrString(found.get(), name) : nullptr;
}

void find_torch() {
  torch_.complete =
      can_run() && (torch_.tensor = find("torch", "Tensor")) &&
      (torch_.parameter = find("torch.nn", "Parameter")) &&
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

bool says(PyObject* function, PyObject* argument, PyObject* expected) {
  const Object answer(PyObject_CallFunctionObjArgs(function, argument, nullptr));
  return answer.get() == expected;
}

bool is_of(PyObject* object, PyObject* type) {
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type;
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

template <class Run>
PyObject* where_plain(Run run) {
  try {
    return torch_.complete && is_plain_thread() ? run() : left_to_the_op();
  } catch (const std::exception&) {
    return left_to_the_op();
  }
}

PyObject* run_where_plain(const PlainCall& call) {
  const bool has_form = call.form >= 0 && call.form < form_count();
  return has_form ? where_plain([&] { return run(call); }) : left_to_the_op();
}

// None, or a tuple of low, high and min_std. False, and an error of Python's or none, for anything
// else.
bool read_bounds(PyObject* tuple, std::optional<Bounds>* bounds) {
  if (tuple == Py_None) return true;
  double numbers[3];
  for (int i = 0; i < 3; ++i) {
    PyObject* number = PyTuple_GetItem(tuple, i);
    if (number == nullptr) return false;
    numbers[i] = PyFloat_AsDouble(number);
  }
  *bounds = {numbers[0], numbers[1], numbers[2]};
  return true;
}

// The arguments that both end with: None or a tuple of low, high and min_std; None or a number.
// False, and an error of Python's or none, for anything else.
bool read_options(PyObject* const* arguments, PlainCall* call) {
  if (!read_bounds(arguments[0], &call->bounds)) return false;
  if (arguments[1] != Py_None) call->samples = PyLong_AsLongLong(arguments[1]);
  return !PyErr_Occurred();
}

PyObject* launch(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 7) {
    return PyErr_Format(PyExc_TypeError, "expected op, form, x, scale, key, bounds, samples");
  }
  const long op = PyLong_AsLong(arguments[0]), form = PyLong_AsLong(arguments[1]);
  const bool backward = op == kSampleBackward || op == kSamplesBackward;
  const bool noise = op == kSample || backward;
  const bool known = noise || op == kKlDivergence || op == kKlDivergenceBackward;
  PlainCall call{static_cast<Op>(op), form, arguments[2], arguments[3], arguments[4]};
  if (!known || form < 0 || form >= form_count() || !read_options(arguments + 5, &call)) {
    return left_to_the_op();
  }
  const bool has_scale = !backward || call.bounds || form_backward_reads(static_cast<Form>(form));
  if (has_scale != (arguments[3] != Py_None) || noise != (arguments[4] != Py_None)) {
    return left_to_the_op();
  }
  return run_where_plain(call);
}

PyObject* draw(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 6) {
    return PyErr_Format(PyExc_TypeError, "expected form, mu, scale, generator, bounds, samples");
  }
  PlainCall call{kSample,     PyLong_AsLong(arguments[0]), arguments[1], arguments[2], Py_None,
                 arguments[3]};
  if (arguments[2] == Py_None || !read_options(arguments + 4, &call)) return left_to_the_op();
  return run_where_plain(call);
}

// The options that both heads begin with: term, summed, form, bounds, samples, and the prior's form
// and bounds.
bool read_head_options(PyObject* const* arguments, Options* options) {
  PlainCall given{};
  const long term = PyLong_AsLong(arguments[0]), form = PyLong_AsLong(arguments[2]);
  const long prior_form = PyLong_AsLong(arguments[5]);
  HeadOptions head{
      static_cast<Term>(term), PyLong_AsLongLong(arguments[1]), static_cast<Form>(prior_form), {}};
  if (!read_options(arguments + 3, &given)) return false;
  options->form = static_cast<Form>(form);
  options->bounds = given.bounds;
  options->samples = given.samples;
  if (!read_bounds(arguments[6], &head.prior_bounds)) return false;
  options->head = head;
  const bool forms =
      form >= 0 && form < form_count() && prior_form >= 0 && prior_form < form_count();
  return term >= 0 && term < kTerms && forms && !PyErr_Occurred();
}

PyObject* head(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 13) {
    return PyErr_Format(PyExc_TypeError,
                        "expected 7 options, mu, scale, key, loc, prior, generator");
  }
  PyObject* const* const tensors = arguments + 7;
  PlainHead call{{}, tensors[0], tensors[1], tensors[2], tensors[3], tensors[4]};
  if (!read_head_options(arguments, &call.options)) return left_to_the_op();
  // A call that draws is told so by a generator, or None for torch's own.
  const bool noise = tensors[2] != Py_None || tensors[5] != Py_False;
  if (tensors[5] != Py_False) call.generator = tensors[5];
  call.options.noise = noise;
  return where_plain([&] { return run_head(call); });
}

PyObject* head_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 14) {
    return PyErr_Format(PyExc_TypeError,
                        "expected 7 options, mu, scale, key, loc, prior, grad_z, grad_total");
  }
  PyObject* const* const tensors = arguments + 7;
  PlainHead call{{},         tensors[0], tensors[1], tensors[2],
                 tensors[3], tensors[4], tensors[5], tensors[6]};
  if (!read_head_options(arguments, &call.options)) return left_to_the_op();
  call.options.noise = tensors[2] != Py_None;
  return where_plain([&] { return run_head(call); });
}

// The ids that launch and draw take, by name
PyObject* kernels(PyObject*, PyObject*) {
  const Object ops(Py_BuildValue("{sisisisisi}", "sample_from_key", kSample, "sample_backward",
                                 kSampleBackward, "samples_backward", kSamplesBackward,
                                 "kl_divergence", kKlDivergence, "kl_divergence_backward",
                                 kKlDivergenceBackward));
  const Object forms(PyDict_New());
  for (Form form = 0; forms && form < form_count(); ++form) {
    const Object id(PyLong_FromLong(form));
    if (!id || PyDict_SetItemString(forms.get(), form_name(form), id.get()) < 0) return nullptr;
  }
  return ops && forms ? Py_BuildValue("{sOsO}", "ops", ops.get(), "forms", forms.get()) : nullptr;
}

// Children of a key: so many from the first on, or, for None, that one
PyObject* split(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "expected key, first, num");
  const long long first = PyLong_AsLongLong(arguments[1]);
  const bool one = arguments[2] == Py_None;
  const long long num = one ? 1 : PyLong_AsLongLong(arguments[2]);
  if (PyErr_Occurred()) return left_to_the_op();
  return where_plain(
      [&] { return run_split(arguments[0], static_cast<uint64_t>(first), one ? -1 : num); });
}

// The module to its library, of which this is the address. Before anything else.
PyObject* connect(PyObject*, PyObject* address) {
  library = static_cast<const Library*>(PyLong_AsVoidPtr(address));
  return left_to_the_op();
}

template <class Function>
PyCFunction method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {{"launch", method(launch), METH_FASTCALL, nullptr},
                         {"draw", method(draw), METH_FASTCALL, nullptr},
                         {"head", method(head), METH_FASTCALL, nullptr},
                         {"head_backward", method(head_backward), METH_FASTCALL, nullptr},
                         {"split", method(split), METH_FASTCALL, nullptr},
                         {"kernels", kernels, METH_NOARGS, nullptr},
                         {"connect", connect, METH_O, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

const Library* library = nullptr;

void* find_symbol(const char* name) {
#if defined(_WIN32)
  (void)name;  // where it would be looked for is not known, and no call is plain
  return nullptr;
#else
  return dlsym(RTLD_DEFAULT, name);
#endif
}

bool is_finalizing() {
  // Before 3.13 it had the other name.
  static const auto asked = [] {
    void* found = find_symbol("Py_IsFinalizing");
    return reinterpret_cast<int (*)()>(found ? found : find_symbol("_Py_IsFinalizing"));
  }();
  return asked != nullptr && asked();
}

bool is_plain_tensor(PyObject* object) {
  if (!is_of(object, torch_.tensor) && !is_of(object, torch_.parameter)) return false;
  return says(torch_.is_neg, object, Py_False);
}

bool requires_grad(PyObject* tensor) {
  const Object answer(PyObject_GetAttr(tensor, torch_.requires_grad));
  return answer.get() != Py_False;
}

void fill_random(PyObject* tensor, PyObject* generator) {
  const Object arguments(Py_BuildValue("(OLO)", tensor, INT64_MIN, Py_None));
  const Object options(Py_BuildValue("{sO}", "generator", generator));
  const bool given = arguments && options;
  const Object filled(given ? PyObject_Call(torch_.random, arguments.get(), options.get())
                            : nullptr);
  if (!filled) throw std::runtime_error("random_ raised");
}

PyObject* left_to_the_op() {
  PyErr_Clear();
  Py_INCREF(Py_None);
  return Py_None;
}

}  // namespace reparam_fused

PyMODINIT_FUNC PyInit__C() {
  reparam_fused::find_torch();
  return PyModule_Create(&reparam_fused::definition);
}
