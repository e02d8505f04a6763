#pragma once

#include <Python.h>

#include <chrono>
#include <memory>
#include <thread>

#include "../layout.h"
#include "../library.h"

// What a plain call asks of Python, without torch's headers.

namespace reparam_fused {

// What it is connected to
extern const Library* library;

// A function that not every torch has, or null
void* find_symbol(const char* name);

// A reference that is given up with its scope
struct Drop {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Object = std::unique_ptr<PyObject, Drop>;

// Of a class of torch's own, with values that are those in its memory
bool is_plain_tensor(PyObject* object);
bool requires_grad(PyObject* tensor);
// tensor.random_(-2^63, None, generator=generator). Throws where that raises.
void fill_random(PyObject* tensor, PyObject* generator);

// Whether the interpreter is at its end
bool is_finalizing();

// Lets other threads of Python run during its scope, where that is `wanted`
class WithoutGil {
 public:
  // Where the interpreter ends already, this is the thread that ends it: it waits for none.
  explicit WithoutGil(bool wanted)
      : state_(wanted && !is_finalizing() ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_ == nullptr) return;
    // An interpreter at its end lets no thread back in. Since 3.14 Python lets such a thread wait
    // for the end of the process, and before ends it by unwinding its stack, on which a destructor,
    // this one or one of torch's, ends the process by std::terminate.
    while (is_finalizing()) std::this_thread::sleep_for(std::chrono::seconds(1));
    PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// A new reference to None, without an error
PyObject* left_to_the_op();

struct PlainCall {
  Op op;
  long form;
  PyObject *x, *scale, *key;      // None where there is none
  PyObject* generator = nullptr;  // in place of a key; None is torch's own
  std::optional<Bounds> bounds = {};
  std::optional<int64_t> samples = {};
};
// Of a head; with grad_totals its backward
struct PlainHead {
  Options options;
  PyObject *mu, *scale, *key, *loc, *prior;  // None where there is none
  PyObject *grad_z = nullptr, *grad_totals = nullptr;
  PyObject* generator = nullptr;  // as above
};
// These throw for what they do not take, and give None for what is left to the op.
// The result; for autograd to record, the result and its key; of samples_backward both results
PyObject* run(const PlainCall& call);
// (z, sums), and for autograd to record the key too; of a backward the four gradients. None stands
// for what there is not.
PyObject* run_head(PlainHead call);
// num children of a key, from the first on; of num -1 that one alone
PyObject* run_split(PyObject* key, uint64_t first, int64_t num);
// Whether torch converts its tensors, as it does since 2.14
bool can_run();

}  // namespace reparam_fused
