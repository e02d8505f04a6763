// The launcher of the heads on a driver that launches nothing: each launch goes to a callback.
// Compiled by test_cuda_head.py, as a library.
#include <set>

#include "../../csrc/common/forms.h"
#include "../../csrc/cuda/launch.h"

using namespace reparam_fused;

namespace {
using OnLaunch = void (*)(const char* kernel, int64_t blocks, void** arguments);
OnLaunch on_launch;
}  // namespace

namespace reparam_fused {

CudaKernel find_cuda_kernel(const std::string& name, int) {
  static std::set<std::string> names;
  return const_cast<char*>(names.insert(name).first->c_str());
}
void launch_cuda(CudaKernel kernel, int64_t blocks, unsigned, int, CudaStream, void** arguments) {
  on_launch(static_cast<const char*>(kernel), blocks, arguments);
}

}  // namespace reparam_fused

// Empty where it went well. Bounds have 3 numbers or are null.
extern "C" const char* launch_head(int op, int dtype, const char* form, const double* bounds,
                                   const char* prior_form, const double* prior_bounds, int term,
                                   const uint64_t* operands, const uint64_t* results, uint64_t keys,
                                   int64_t first_index, int ndim, const int64_t* sizes,
                                   const int64_t* index_strides, const int64_t* key_strides,
                                   int outer_ndim, int64_t segment_numel, int64_t row,
                                   uint64_t totals, uint64_t grad_totals, uint64_t workspace,
                                   OnLaunch launch) {
  Problem p{};
  p.form = form_id(form, std::strlen(form));
  p.prior_form = form_id(prior_form, std::strlen(prior_form));
  p.bounds = reinterpret_cast<const Bounds*>(bounds);
  p.prior_bounds = reinterpret_cast<const Bounds*>(prior_bounds);
  p.term = static_cast<Term>(term);
  p.by_log_var = form_is_log_var(p.form, p.bounds) &&
                 (operands[2] == 0 || form_is_log_var(p.prior_form, p.prior_bounds));
  for (int k = 0; k < kMaxOperands; ++k) p.operands[k] = reinterpret_cast<void*>(operands[k]);
  for (int k = 0; k < kMaxResults; ++k) p.results[k] = reinterpret_cast<void*>(results[k]);
  p.keys = reinterpret_cast<uint64_t*>(keys);
  p.first_index = first_index;
  p.ndim = ndim;
  p.sizes = sizes;
  p.index_strides = index_strides;
  p.key_strides = key_strides;
  p.outer_ndim = outer_ndim;
  p.segment_numel = segment_numel;
  p.samples = 1;
  p.row = row;
  p.totals = reinterpret_cast<void*>(totals);
  p.grad_totals = reinterpret_cast<void*>(grad_totals);
  on_launch = launch;
  static std::string refusal;
  refusal = "";
  try {
    launch_head_on_cuda(static_cast<Op>(op), static_cast<DType>(dtype), p,
                        reinterpret_cast<void*>(workspace), 0, nullptr);
  } catch (const std::exception& error) {
    refusal = error.what();
  }
  return refusal.c_str();
}

extern "C" int64_t workspace_of_head(int dtype, int64_t rows, int64_t row) {
  return head_workspace(static_cast<DType>(dtype), rows, row);
}
